"What confidence is for: against brute force, known expectations, and counts of how often intervals hold"
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdc_nb.calibration.decisions import (
    ConformalSets, aurc_contributions, aurc_difference, conformal_sets, deferral_curve, estimate_aurc,
    evaluate_sets, risk_coverage, share_to_defer,
)
from kdc_nb.calibration.differences import estimate_difference
from kdc_nb.calibration.null_bands import simulate_calibrated
from kdc_nb.calibration.outcomes import compute_outcomes
from tests.conftest import made

pytestmark = pytest.mark.filterwarnings("ignore:the outputs look like probabilities")


def outcomes(confidences, correct):
    "Two classes, of which every label is the first"
    odds = torch.tensor([math.log(p/(1 - p)) for p in confidences], dtype=torch.float64)
    return compute_outcomes(torch.stack([odds*(2*torch.tensor(correct) - 1), 0*odds], 1), [0]*len(correct))


def aurc(o): return float(aurc_contributions(o).mean())


def slow_aurc(confidence, wrong):
    "Without ties"
    wrong = np.asarray(wrong, float)[np.argsort(-np.asarray(confidence), kind="stable")]
    return np.mean([wrong[:k].mean() for k in range(1, len(wrong) + 1)])


few = st.lists(st.tuples(st.sampled_from([.6, .7, .8, .9]), st.integers(0, 1)), min_size=1, max_size=12)


@given(few)
def test_ties_count_as_if_in_random_order(pairs):
    p, correct = (np.array(x) for x in zip(*pairs))
    rng = np.random.default_rng(0)
    jittered = [slow_aurc(p + 1e-6*rng.random(len(p)), 1 - correct) for _ in range(600)]
    assert aurc(outcomes(p, correct.tolist())) == pytest.approx(np.mean(jittered), abs=.06)


@given(few)
def test_the_curve_is_that_of_every_threshold(pairs):
    p, correct = (np.array(x) for x in zip(*pairs))
    curve = risk_coverage(outcomes(p, correct.tolist()))
    slow = [((p >= t).mean(), 1 - correct[p >= t].mean()) for t in sorted(set(p), reverse=True)]
    assert torch.stack(list(curve), 1).numpy() == pytest.approx(np.array(slow))


def test_without_ties_it_is_the_mean_of_all_risks():
    z, y, _ = made(300)
    o = compute_outcomes(z, y)
    assert aurc(o) == pytest.approx(slow_aurc(o.log_odds.numpy(), 1 - o.correct.numpy()))


def test_contributions_are_what_leaving_an_image_out_changes():
    z, y, _ = made(400)
    o = compute_outcomes(z, y)
    without = [aurc(o._replace(**{k: torch.cat([getattr(o, k)[:i], getattr(o, k)[i + 1:]])
                                  for k in ("pred", "correct", "log_odds", "nll")})) for i in range(400)]
    jackknife = 400*aurc(o) - 399*np.array(without)
    assert np.corrcoef(jackknife, aurc_contributions(o))[0, 1] > .999
    assert jackknife.std() == pytest.approx(float(aurc_contributions(o).std()), rel=.02)


@pytest.mark.parametrize("n, sharpness", [(500, 3.), (300, 8.), (2000, 6.)])
def test_intervals_and_null_bands_hold(n, sharpness):
    truth = aurc(compute_outcomes(*simulate_calibrated(400_000, sharpness=sharpness, seed=99)))
    found = [estimate_aurc(compute_outcomes(*simulate_calibrated(n, sharpness=sharpness, seed=s)), 200)
             for s in range(300)]
    assert 273 <= sum(e.low <= truth <= e.high for e in found) <= 297 # 285 are expected, +-3 errors
    assert 273 <= sum(e.null_low <= e.value <= e.null_high for e in found) <= 297


def test_no_error_at_all():
    e = estimate_aurc(outcomes([.9]*50, [1]*50))
    assert e.value == e.low == 0 and .07 < e.high < .5 # of 50 images, up to 7.1% may be wrong
    e = estimate_aurc(outcomes([.9]*50, [0]*50))
    assert e.value == e.high == 1 and .7 < e.low < 1


def test_a_temperature_moves_the_promise_and_not_the_area():
    z, y = simulate_calibrated(2000, 2) # of more classes a temperature changes the order of images, too
    cold, as_it_is = (estimate_aurc(compute_outcomes(f*z, y)) for f in (3, 1))
    assert cold.value == as_it_is.value and cold.null_high < as_it_is.null_low


def test_the_difference_of_two_models_is_seldom_seen_where_there_is_none():
    "Two models of the same quality on the same images, 300 times"
    g, seen = torch.Generator().manual_seed(0), 0
    for s in range(300):
        z, y = simulate_calibrated(500, seed=s)
        a, b = (compute_outcomes(z + torch.randn(z.shape, generator=g), y) for _ in range(2))
        seen += aurc_difference([a], [b]).p < .05
    assert seen <= 26 # 15 are expected


def test_a_worse_confidence_is_found():
    z, y = simulate_calibrated(4000)
    o = compute_outcomes(z, y)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    shuffled = o._replace(log_odds=o.log_odds[order])
    d = aurc_difference([shuffled], [o])
    assert d.low > .05 and d.p < 1e-10 and d.mean == pytest.approx(aurc(shuffled) - aurc(o))


def test_deferral_is_that_of_every_threshold():
    z, y, _ = made(200)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    student = compute_outcomes((z + 2*noise).round(), y)
    teacher = compute_outcomes(z, y)
    curve = deferral_curve(student, teacher)
    for share, accuracy in zip(*curve):
        k = round(float(share)*200)
        cut = student.log_odds.sort().values[k - 1] if k else -math.inf
        handed = student.log_odds <= cut
        assert int(handed.sum()) == k
        assert accuracy == pytest.approx(float(torch.where(handed, teacher.correct, student.correct).mean()))
    assert curve.share[0] == 0 and curve.share[-1] == 1


def test_the_share_to_hand_over():
    student = outcomes([.6, .7, .8, .9], [0, 0, 1, 1])
    teacher = outcomes([.9]*4, [1, 0, 1, 1])
    least = lambda wanted: share_to_defer(student, teacher, wanted, 50).value
    assert [least(w) for w in (0, .5, .6, .75, .76)] == [0, 0, .25, .25, math.inf]
    z, y = simulate_calibrated(3000)
    small = compute_outcomes(z + 2*torch.randn(z.shape, generator=torch.Generator().manual_seed(0)), y)
    large = compute_outcomes(z, y)
    e = share_to_defer(small, large, float(large.correct.mean()) - .02, 300)
    again = share_to_defer(small, large, float(large.correct.mean()) - .02, 300)
    assert 0 < e.low < e.value < e.high < 1 and e == again and e.high - e.low < .5


def slow_sets(valid, labels, probs, level, score, u_valid, u):
    "Class by class, as the papers have it"
    def unlikely(p, k, u): # of class k
        if score == "lac": return 1 - p[k]
        return p[p > p[k]].sum() + p[k] - u*p[k]
    true = sorted(unlikely(p, k, r) for p, k, r in zip(valid, labels, u_valid))
    rank = math.ceil((len(true) + 1)*level)
    limit = true[rank - 1] if rank <= len(true) else math.inf
    return [[unlikely(p, k, r) <= limit for k in range(len(p))] for p, r in zip(probs, u)]


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize("level", [.5, .9, .995])
def test_sets_are_those_of_the_papers(score, level):
    (v, y, _), (z, _, _) = made(150, seed=1), made(60, seed=2)
    got = conformal_sets(v, y, z, level, score, seed=5)
    draws = [torch.rand(n, 1, generator=torch.Generator().manual_seed(10 + k), dtype=torch.float64)
             for k, n in enumerate((150, 60))]
    slow = slow_sets(v.softmax(1).numpy(), y.tolist(), z.softmax(1).numpy(), level, score,
                     *(u[:, 0].numpy() for u in draws))
    assert got.member.tolist() == slow


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize("factor", [.3, 1., 4.])
def test_sets_hold_as_many_as_they_promise_whatever_the_model(score, factor):
    "On average exactly rank/(M + 1), as scores have no ties: 36 of 40 for 39 images and 90%"
    held = []
    for s in range(300):
        z, y = simulate_calibrated(139, seed=s)
        sets = conformal_sets(factor*z[:39], y[:39], factor*z[39:], .9, score, seed=s)
        held.append(evaluate_sets(sets, y[39:])["coverage"].value)
    assert np.mean(held) == pytest.approx(36/40, abs=4*np.std(held)/300**.5)


def test_sets_of_probabilities_and_their_logits_are_the_same():
    (v, y, _), (z, _, _) = made(150, seed=1), made(60, seed=2)
    a, b = conformal_sets(v, y, z), conformal_sets(v.softmax(1), y, z.softmax(1), from_logits=False)
    assert torch.equal(a.member, b.member) and a.threshold == pytest.approx(b.threshold)


def test_sets_have_their_size_with_an_interval():
    z, y = simulate_calibrated(3000)
    sets = conformal_sets(z[:1000], y[:1000], z[1000:])
    size = evaluate_sets(sets, y[1000:])["size"]
    d = estimate_difference(sets.member.double().sum(1).numpy()[None])
    assert size.value == float(sets.member.sum())/2000
    assert (size.low, size.high) == pytest.approx((d.low, d.high))


def test_ends_of_intervals_are_possible_numbers():
    size = evaluate_sets(ConformalSets(torch.tensor([[True, False], [True, True]]), .5), [0, 0])["size"]
    assert (size.low, size.high) == (0, 2)
    e = estimate_aurc(outcomes([.9, .8], [1, 0]), level=.99999)
    assert 0 <= e.low <= e.value <= e.high <= 1 and e.null_high <= 1


def test_the_rank_is_exact_where_a_level_is_no_binary_number():
    z = torch.linspace(0, 1, 99, dtype=torch.float64)[:, None]*torch.tensor([1., 0.])
    sets = conformal_sets(z, [0]*99, z, .55, "lac")
    assert int(sets.member[:, 0].sum()) == 55


def test_sets_of_one_class_each_are_taken_for_no_probabilities(recwarn):
    sets = ConformalSets(torch.eye(4).bool(), .5)
    found = evaluate_sets(sets, [0, 1, 2, 0])
    assert found["coverage"].value == .75 and found["size"].value == found["size"].low == 1 and not recwarn


Z, Y, _ = made(40)
O = compute_outcomes(Z, Y)


@pytest.mark.parametrize("do, message", [
    (lambda: estimate_aurc(outcomes([.9], [1])), "outcomes: got 1 images, expected two or more"),
    (lambda: estimate_aurc(O, n_draws=1), "n_draws: got 1"),
    (lambda: estimate_aurc(O, level=95), "level: got 95"),
    (lambda: aurc_difference([O], []), "b: got 0 seeds"),
    (lambda: aurc_difference([O], [Z]), "a, b: got Tensor in place of Outcomes"),
    (lambda: deferral_curve(O, compute_outcomes(Z[:9], Y[:9])), "images: got 40 and 9"),
    (lambda: share_to_defer(O, O, 1.2), "accuracy: got 1.2"),
    (lambda: share_to_defer(O, O, .5, level=0), "level: got 0"),
    (lambda: conformal_sets(Z, Y, Z[:, :3]), "outputs: got 3 classes, expected 5"),
    (lambda: conformal_sets(Z, Y, Z, 1.), "level: got 1.0"),
    (lambda: conformal_sets(Z, Y, Z, score="raps"), "score: got 'raps'"),
    (lambda: conformal_sets(Z, Y[:9], Z), "labels: got 9 of them"),
    (lambda: conformal_sets(Z, Y, Z, seed="a"), "seed: got"),
    (lambda: evaluate_sets(conformal_sets(Z, Y, Z), Y, 1.), "level: got 1.0"),
    (lambda: evaluate_sets(conformal_sets(Z, Y, Z), Y[:9]), "labels: got 9 of them")])
def test_bad_input_is_told(do, message):
    with pytest.raises(ValueError, match=message): do()
