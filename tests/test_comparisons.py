"Comparisons: against scipy's tests, by hand, and by what must hold for any numbers"
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.stats import nct, t, ttest_1samp, ttest_rel

from kdc_nb.calibration.comparisons import EQUIVALENCE_MARGINS, compare, judge_claims
from kdc_nb.calibration.evaluation import decompose_score
from kdc_nb.calibration.contributions import (
    PairedContributions, contributions_per_image, paired_fractions_interval,
)
from kdc_nb.calibration.differences import (
    SeedVariance, bartlett_p, contrast_seed_variance, difference_from_contributions, estimate_contrast,
    estimate_difference, holm, paired_difference, rank_intervals, spread_log_ratio,
)
from kdc_nb.calibration.estimates import calibration_estimates
from kdc_nb.calibration.evaluation import evaluate
from kdc_nb.calibration.outcomes import compute_outcomes, metrics_from_outcomes
from kdc_nb.calibration.posthoc import fit_temperature

from .benchmarks.compare import compare_sets, shares, true_difference
from .benchmarks.verdicts import load_students, simulate
from .conftest import made

# squares of smaller numbers have no digits left
numbers = st.lists(st.floats(-5, 5).map(lambda x: round(x, 9)), min_size=2, max_size=6, unique=True)


def seen(seed, n=300, c=5, scale=2., sure=1.):
    rng = np.random.default_rng(seed)
    z = scale*rng.normal(size=(n, c))
    y = [rng.choice(c, p=p) for p in np.exp(z)/np.exp(z).sum(1, keepdims=True)]
    return compute_outcomes(sure*z, y)


@given(seed=st.integers(0, 999), n=st.integers(1, 200),
       metric=st.sampled_from(("top1", "nll", "ece", "ace", "ks")), sure=st.sampled_from((.3, 1., 3.)))
def test_contributions_have_the_metric_as_their_mean(seed, n, metric, sure):
    o = seen(seed, n, sure=sure)
    assert (float(contributions_per_image(o, metric).mean())
            == pytest.approx(metrics_from_outcomes(o)[metric], abs=1e-12))


def test_contributions_by_hand():
    "Two bins: .94 and .95, one right of two, the gap is positive; .6 right, the gap is negative"
    o = compute_outcomes(np.log([[.94, .06], [.95, .05], [.6, .4]]), [0, 1, 0])
    assert contributions_per_image(o, "ece").tolist() == pytest.approx([-.06, .95, .4])


@given(numbers)
def test_one_image_is_the_t_test_over_seeds(d):
    ours, theirs = estimate_difference(np.array(d)[:, None]), ttest_1samp(d, 0)
    assert (ours.p == pytest.approx(theirs.pvalue, rel=1e-6) and (ours.low, ours.high)
            == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-6, abs=1e-9))


def test_one_seed_is_the_paired_t_test_over_images():
    z, y = torch.randn(2, 300, 5), torch.arange(300) % 5
    a, b = compute_outcomes(z[0], y), compute_outcomes(z[1], y)
    ours, theirs = paired_difference([a], [b], "nll"), ttest_rel(a.nll.numpy(), b.nll.numpy())
    assert (ours.p == pytest.approx(theirs.pvalue, rel=1e-6)
            and (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-6))


@given(st.integers(0, 99), st.integers(2, 4), st.integers(2, 30))
def test_both_kinds_of_chance_make_an_interval_wider_than_either(seed, s, n):
    d = np.random.default_rng(seed).normal(size=(s, n))
    both = estimate_difference(d)
    assert both.high - both.low >= max(estimate_difference(x).high - estimate_difference(x).low
                                       for x in (d.mean(1, keepdims=True), d.mean(0, keepdims=True))) - 1e-12
    turned = estimate_difference(-d)
    assert (turned.mean, turned.low, turned.p) == pytest.approx((-both.mean, -both.high, both.p))
    assert (both.p < .05) == (not both.low <= 0 <= both.high)


def test_exact_differences_and_none():
    same, off = estimate_difference(np.zeros((3, 4))), estimate_difference(np.ones((3, 4)))
    assert (same.p, same.low, same.high) == (1, 0, 0) and off.p == pytest.approx(1e-30) and off.low == 1
    for bad in (np.ones((1, 1)), np.ones(3), np.array([[np.nan], [1.]])):
        with pytest.raises(ValueError, match="differences: got shape"): estimate_difference(bad)


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="images: got 300 and 200 of them"):
        paired_difference([seen(0)], [seen(0, n=200)], "ece")
    z, y = torch.randn(50, 3), torch.arange(50) % 3
    with pytest.raises(ValueError, match="images: got some with other labels"):
        rank_intervals({"a": [compute_outcomes(z, y)], "b": [compute_outcomes(z, y.roll(1))]}, "nll")
    with pytest.raises(ValueError, match="outcomes_by_name: got rows with other numbers of seeds"):
        rank_intervals({"a": [seen(0)], "b": [seen(0)]*3}, "nll")
    with pytest.raises(ValueError, match="b: got 0 seeds"): paired_difference([], [], "ece")


# -- two models' logits --------------------------------------------------------

def two(n=300, c=5, seed=0):
    "Logits of an overconfident and of a noisy model, and labels"
    z, y, _ = made(n, c, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    return 1.5*z, z + .8*torch.randn(z.shape, generator=g, dtype=torch.float64), y


def test_compare_is_paired_metric_by_metric():
    a, b, y = two()
    c = compare(a, b, y)
    assert (list(c.raw) == ["top1", "nll", "brier", "ece", "ace", "ks"]
            and (c.n, c.seeds, c.scaled, c.names) == (300, 1, {}, ("a", "b")))
    for k in ("top1", "nll", "ece", "ace", "ks"):
        theirs = paired_difference([compute_outcomes(a, y)], [compute_outcomes(b, y)], k)
        assert c.raw[k].difference[:4] == pytest.approx(theirs[:4], rel=1e-6, abs=1e-12), k
    assert c.raw["ece"].a == pytest.approx(calibration_estimates(a, y, "ece", n_draws=200)["ece"].debiased)
    assert [m.p_holm for m in c.raw.values()] == holm([m.difference.p for m in c.raw.values()]).tolist()


def test_compare_by_hand():
    """Probabilities .8 and .6 of the first of two classes, labels 0, 0, 0, 1: NLLs, Brier
    scores and paired t tests
    """
    p = np.array([[.8, .2]]*4), np.array([[.6, .4]]*4)
    c = compare(*p, [0, 0, 0, 1], from_logits=False)
    nll = np.log([[.6/.8]*3 + [.4/.2]]).squeeze()
    assert (c.raw["nll"].difference.mean == pytest.approx(nll.mean())
            and c.raw["nll"].difference.p == pytest.approx(ttest_1samp(nll, 0).pvalue))
    assert ((c.raw["brier"].a, c.raw["brier"].b)
            == (pytest.approx((3*.08 + 1.28)/4), pytest.approx((3*.32 + .72)/4)))
    # none of four images is decided by one alone: so may be up to 60.2 of 100, of which
    # that has a chance of 2.5%
    reach = 1 - .025**.25
    assert c.raw["top1"].difference[:6] == (0, pytest.approx(-reach), pytest.approx(reach), 1, (0,), 4)
    # a line each, and the footnote
    assert all(m.better is None for m in c.raw.values()) and repr(c).count("cannot be told") == 7
    assert c.winner("top1", c.raw["top1"]) == "cannot be told", "four images are few"


def test_the_better_is_named_whichever_comes_first():
    a, b, y = two(4000)
    c, turned = compare(a, b, y, names=("bold", "noisy")), compare(b, a, y)
    assert ((c.raw["top1"].better, c.raw["ece"].better) == ("a", "b")
            == (turned.raw["top1"].better.replace("b", "a"), turned.raw["ece"].better.replace("a", "b")))
    for k, m in c.raw.items():
        assert (m.difference.mean, m.difference.low, m.p_holm) == pytest.approx((
            -turned.raw[k].difference.mean, -turned.raw[k].difference.high, turned.raw[k].p_holm
        ))
    assert [r[-1] for r in c.table().rows][:2] == ["bold", "noisy" if c.raw["nll"].better == "b" else "bold"]
    assert c.table().head[1:3] == ["bold", "noisy"] and {"bold", "noisy"} < set(c.to_frame())


def test_any_framework_and_both_kinds():
    a, b, y = two(60)
    first = compare(a, b, y)
    for x, z, labels in ((a.numpy(), b.tolist(), y.tolist()),
                         (a.float().requires_grad_(), b.float(), y.float()),
                         (pd.DataFrame(a.numpy()), b.numpy(), pd.Series(y.numpy()))):
        for k, m in compare(x, z, labels).raw.items():
            assert m.a == pytest.approx(first.raw[k].a, abs=1e-4), k
    for k, m in compare(a.softmax(1), b.softmax(1), y, from_logits=False).raw.items():
        assert m[:2] == pytest.approx(first.raw[k][:2]), k


def test_seeds_are_compared_in_pairs():
    (a, b, y), noise = two(), .2*torch.randn(3, 300, 5, generator=torch.Generator().manual_seed(5))
    c = compare([a + e for e in noise], [b - e for e in noise], y)
    theirs = paired_difference([compute_outcomes(a + e, y) for e in noise],
                               [compute_outcomes(b - e, y) for e in noise], "nll")
    assert (c.seeds == 3 and c.raw["nll"].difference[:4] == pytest.approx(theirs[:4])
            and c.raw["nll"].difference.each == pytest.approx(theirs.each)
            and len(c.raw["ece"].difference.each) == 3)
    assert compare(a + noise, (b - noise).numpy(), y).raw == c.raw, "as one table (seeds, N, C)"
    assert ("other training runs and other images" in repr(c)
            and "not of other training runs" in repr(compare(a, b, y)))


def test_after_temperature_scaling_each_model_has_its_own_temperature():
    (a, b, y), (va, vb, vy) = two(), two(200, seed=9)
    c = compare(a, b, y, va, vb, vy)
    T = [fit_temperature(v, vy) for v in (va, vb)]
    theirs = paired_difference([compute_outcomes(a/T[0], y)], [compute_outcomes(b/T[1], y)], "nll")
    assert (c.scaled["nll"].difference[:4] == pytest.approx(theirs[:4])
            and set(c.scaled) == set(c.raw) - {"top1"})
    found = [*c.raw.values(), *c.scaled.values()]
    assert sorted(m.p_holm for m in found) == pytest.approx(sorted(holm([m.difference.p for m in found]))), (
        "corrected for all that is shown"
    )
    assert [r[0] for r in c.table().rows][:4] == ["Top-1, %", "NLL, nats", "  after TS", "Brier"]


def test_a_comparison_goes_to_pandas_in_its_unit():
    a, b, y = two(2000)
    frame = compare(a, b, y).to_frame()
    assert list(frame) == ["output", "metric", "unit", "a", "b", "difference",
                           "low", "high", "detectable", "p", "p_holm", "better", "n", "seeds"]
    row = frame.set_index("metric").loc["top1"]
    assert (row.a == pytest.approx(100*metrics_from_outcomes(compute_outcomes(a, y))["top1"])
            and row.unit == "%" and row.n == 2000)
    assert (frame[["a", "b", "difference", "low", "high", "p", "p_holm"]].dtypes.eq(float).all()
            and frame.p.between(0, 1).all())


def test_an_infinite_nll_is_not_tested():
    p = np.array([[1., 0.], [0., 1.], [.7, .3], [.4, .6]])
    c = compare(p, np.full((4, 2), .5), [0, 0, 0, 1], from_logits=False)
    assert (c.raw["nll"] == (np.inf, pytest.approx(np.log(2)), None, None, None, None, None)
            and c.raw["brier"].difference is not None)
    assert "infinite" in repr(c) and "nan" not in repr(c) and "for 5 comparisons" in repr(c)
    assert np.isnan(c.to_frame().set_index("metric").loc["nll", "difference"])


# -- where little chance is left ------------------------------------------------

def calibrated(n, c=10, seed=0):
    "Logits whose softmax is the chance of each class, and labels drawn from it"
    r = np.random.default_rng(seed)
    z = 2*r.normal(size=(n, c))
    return z, (z + r.gumbel(size=z.shape)).argmax(1)


def test_the_worse_of_two_alike_is_not_named():
    "Logits 2% too large are .66 points of ECE, which 2,000 images cannot show"
    z, y = calibrated(2000)
    c = compare(1.02*z, z, y, metrics=["ece", "ace", "ks"])
    for k, m in c.raw.items():
        d = m.difference
        assert m.better is None and c.winner(k, m) == "cannot be told" and d.low < .0066 < d.high
        assert (m.a - m.b) == pytest.approx(d.mean)


@pytest.mark.parametrize("n, c", [(500, 2), (2000, 10)])
@pytest.mark.parametrize("pair", ["times 1.001", "times 1.02", "two noisy"])
def test_errors_of_models_alike_are_seldom_told_apart_and_covered(n, c, pair):
    "40 data sets; tests/benchmarks/compare.py has more of both"
    found = list(compare_sets(pair, n, c, 40))
    for k in ("ece", "ace", "ks"):
        true = true_difference(pair, c, k, 100_000)
        now = shares([x[k][1] for x in found], true, .005)
        # at 5% more than 6 of 40, at 95% fewer than 34, have a chance of .4%
        assert now["wrong"] <= .15 and now["falsely equivalent"] <= .15 and now["covered"] >= .85, (k, now)


def test_the_old_standard_error_named_the_worse():
    "So that the test above tests something: by images alone intervals miss, and winners are named"
    found = list(compare_sets("times 1.001", 500, 10, 40))
    before = shares([x["ks"][0] for x in found], .0003, .005)
    assert before["covered"] < .6 and before["wrong"] > .1


def test_what_truly_differs_is_still_found():
    found = list(compare_sets("times 1.3", 2000, 10, 20))
    for k in ("ece", "ace", "ks"):
        now = shares([x[k][1] for x in found], true_difference("times 1.3", 10, k, 100_000), .005)
        assert now["right"] >= .7 and now["wrong"] == 0, (k, now) # of 300: see the page


def test_the_same_probabilities_are_one_model():
    z, y = calibrated(300)
    for other in (z, z + .1):
        c = compare(z, other, y)
        for k, m in c.raw.items():
            assert (m.difference[:4], m.better) == ((0, 0, 0, 1), None)
            assert c.winner(k, m) == f"equivalent within {dict(top1=1, nll=.02, brier=0).get(k, .5):g}"
        assert "cannot be told" not in repr(c)
    single = z.astype("float32") # rounded to seven digits: not the same, and as good as
    c = compare(single, single + np.float32(.1), y)
    assert all(m.better is None for m in c.raw.values())
    assert {c.winner(k, c.raw[k]) for k in ("ece", "ace", "ks")} == {"equivalent within 0.5"}


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60))
def test_accuracies_are_compared_by_the_exact_test(only_a, only_b, rest):
    n = only_a + only_b + rest
    if n < 2: return
    a, b = np.zeros((2, n))
    a[:only_a], b[only_a:only_a + only_b] = 1, 1
    d = difference_from_contributions(PairedContributions(a[None], b[None], [], False), "top1")
    tosses = only_a + only_b
    p = min(1., 2*sum(math.comb(tosses, i) for i in range(min(only_a, only_b) + 1))/2**tosses)
    assert d.p == pytest.approx(max(p, 1e-30), rel=1e-9) and d.mean == pytest.approx((only_a - only_b)/n)
    assert -1 <= d.low <= d.mean <= d.high <= 1 and d.high - d.low > 1/n
    assert (p < .05) == (d.low > 0 or d.high < 0)


def test_two_images_never_decide():
    c = compare([[3., 0]]*2, [[0, 3.]]*2, [0, 0])
    assert c.raw["top1"].difference.p == .5 and c.raw["top1"].difference.low < 0
    assert all(m.better is None and m.difference.p >= .5 - 1e-9 for m in c.raw.values())
    # six equal signs have a chance of 2/2^6
    six = compare([[3., 0]]*6, [[0, 3.]]*6, [0]*6, metrics=["top1", "nll"])
    assert [m.difference.p for m in six.raw.values()] == pytest.approx([2/2**6]*2)


def test_equal_accuracies_are_called_equivalent_by_images_enough():
    "None of n images decided by one model alone: that has a chance of 5% if a share 1 - .05^(1/n) is"
    z, y = calibrated(400)
    winner = lambda n: (c := compare(1.5*z[:n], z[:n], y[:n], metrics="top1")).winner("top1", c.raw["top1"])
    assert 1 - .05**(1/400) < .01 < 1 - .05**(1/290)
    assert (winner(400), winner(290)) == ("equivalent within 1", "cannot be told")


def test_intervals_of_accuracies_cover_the_truth():
    r = np.random.default_rng(0)
    for n, p, q in ((10, .3, .1), (100, .02, .01), (1000, .004, .004)):
        drawn = r.multinomial(n, [p, q, 1 - p - q], 1000)
        ends = [paired_fractions_interval(int(i), int(j), n) for i, j, _ in drawn]
        assert np.mean([low <= p - q <= high for low, high in ends]) > .93, (n, p, q) # .95, and .007


def test_seeds_that_are_alike_do_not_hide_the_noise_of_their_labels():
    "Three seeds of nearly one network: a seed's luck is small, and labels are the same for all"
    wrong, r = [], np.random.default_rng(7)
    for seed in range(25):
        z, y = calibrated(500, seed=seed)
        seeds = [z + .01*r.normal(size=z.shape) for _ in range(3)]
        c = compare([1.02*x for x in seeds], seeds, y, metrics=["ece", "ace", "ks"])
        wrong.append([m.better == "a" for m in c.raw.values()])
        assert c.seeds == 3
    assert np.mean(wrong, 0).max() <= .12


def test_a_contrast_names_a_row_that_is_not_there():
    rows = {("a", "raw"): np.ones((2, 3))}
    with pytest.raises(ValueError,
                       match=r"weights: got \[\('b', 'raw'\)\], expected some of \[\('a', 'raw'\)\]"):
        estimate_contrast(rows, {("b", "raw"): 1.})
    with pytest.raises(ValueError, match="weights: got none"): estimate_contrast(rows, {})


a, b, y = two(60)


@pytest.mark.parametrize("call, message", [
    (lambda: compare(a, b, y[:50]), "labels: got 50 of them, expected 60"),
    (lambda: compare(a, b[:50], y),
     "logits_b: got 50 images, 5 classes, expected 60 images, 5 classes, as logits_a has"),
    (lambda: compare(a, b[:, :4], y), "logits_b: got 60 images, 4 classes"),
    (lambda: compare(y, a, b), r"logits_a: got shape \(60,\) of whole numbers, expected \(N, C\)"),
    (lambda: compare(a, y, b), r"logits_b: got shape \(60,\) of whole numbers, expected \(N, C\)"),
    (lambda: compare(a, b, torch.eye(5)[y]), r"labels: got shape \(60, 5\), expected \(N,\)"),
    (lambda: compare(a, b, y + .5), "labels: got numbers with a fraction"),
    (lambda: compare(a, b, y + 1), "labels: got 1 to 5, expected 0 to 4"),
    (lambda: compare(a, b.clone().fill_(np.nan), y), "logits_b: got NaN or infinity"),
    (lambda: compare(a.softmax(1), b, y, from_logits=False),
     "logits_b: got .*, which is none, expected numbers between 0 and 1"),
    (lambda: compare(a[:, 0], b, y.clamp(max=1)),
     "logits_b: got 60 images, 5 classes, expected 60 images, 2"),
    (lambda: compare(a, b, y, from_logits="prob"), "from_logits: got 'prob'"),
    (lambda: compare("a.npz", b, y), "logits_a: got a str that is no table of numbers"),
    (lambda: compare([a, a], [b], y), "logits_b: got 1 seeds, expected 2, as logits_a has"),
    (lambda: compare([a, a[:50]], [b, b], y), "logits_a: got 50 images"),
    (lambda: compare([], b, y), "logits_a: got shape"),
    (lambda: compare(a[:1], b[:1], y[:1]), "labels: got 1 of them, expected two images or more"),
    (lambda: compare(a, b, y, a, b), "valid_labels: got not all of"),
    (lambda: compare(a, b, y, a, b, y[:9]), "valid_labels: got 9 of them"),
    (lambda: compare(a, b, y, a, y, y), "valid_logits_b: got shape"),
    (lambda: compare(a, b, y, a[:, :3], b[:, :3], y.clamp(max=2)),
     "valid_logits_a: got 1 seeds, 3 classes, expected 1 seeds, 5 classes"),
    (lambda: compare([a, a], [b, b], y, a, b, y),
     "valid_logits_a: got 1 seeds, 5 classes, expected 2 seeds, 5 classes"),
    (lambda: compare(a, b, y, a, b, y + 1), "valid_labels: got 1 to 5, expected 0 to 4"),
    (lambda: compare(a, b, y, a, b, ["x"]*60), "valid_labels: got a list that is no table of numbers"),
    (lambda: compare(a, b, y, a.clone().fill_(np.nan), b, y), "valid_logits_a: got NaN or infinity"),
    (lambda: compare(a, b, y, a, b.clone().fill_(np.nan), y), "valid_logits_b: got NaN or infinity"),
    (lambda: compare(a, b, y, metrics=5), "metrics: got 5, expected a name, a list of names"),
    (lambda: compare(a, b, y, metrics=[["ece"]]), r"metrics: got \[\['ece'\]\], expected a name"),
    (lambda: compare(a, b, y, metrics=["ece", None]), r"metrics: got \['ece', None\], expected a name"),
    (lambda: compare(a, b, y, metrics=[]), r"metrics: got \[\], expected a name"),
    (lambda: compare(a, b, y, names=5), "names: got 5, expected two texts"),
    (lambda: compare(a, b, y, names=("x", "x")), "names: got"),
    (lambda: compare(a, b, y, names=(1, 2)), r"names: got \(1, 2\), expected two texts"),
    (lambda: compare(a, b, y, names=None), "names: got None"),
    (lambda: compare(a, b, y, from_logits="("), r"from_logits: got '\('"),
    (lambda: compare(a[None][:0], b[None][:0], y), r"logits_a: got shape \(0, 60, 5\)"),
])
def test_compare_names_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=f"^{message}"): call()


@pytest.mark.parametrize("call",
                         [lambda: paired_difference(a, b, "ece"),
                          lambda: paired_difference(a.numpy(), b.numpy()[:9], "ece"),
                          lambda: paired_difference([a], [b], "nll"),
                          lambda: paired_difference(compute_outcomes(a, y), compute_outcomes(b, y), "nll"),
                          lambda: rank_intervals({"a": [a], "b": [b]}, "nll")])
def test_outcomes_are_asked_for_where_logits_came(call):
    with pytest.raises(ValueError, match="in place of Outcomes, expected .* call `compare`"): call()


def test_two_models_as_good_as_each_other_are_seldom_told_apart():
    """Both see the same logits with noise of their own; 100 comparisons of six metrics,
    of which 5 should be wrong
    """
    wrong = 0
    for seed in range(100):
        z, y, _ = made(500, 10, seed=seed)
        noise = .5*torch.randn(2, *z.shape, generator=torch.Generator().manual_seed(seed + 1000),
                               dtype=torch.float64)
        wrong += any(m.better for m in compare(z + noise[0], z + noise[1], y).raw.values())
    assert wrong <= 12 # at 5% more than 12 have a chance of .2%


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_p_and_bonferroni(p):
    h = holm(p)
    assert (h >= np.array(p)).all()
    assert (np.diff(h[np.argsort(p, kind="stable")]) >= 0).all() and h.max() <= 1
    assert h.min() == pytest.approx(min(1, len(p)*min(p)))


def test_holm_by_hand(): assert holm([.04, .001, .02, .5]).tolist() == pytest.approx([.08, .004, .06, .5])


def test_ranks_hold_the_true_order_and_shrink_with_images():
    rows = lambda n: {str(s): [seen(3, n, sure=s)] for s in (1., 1.6, 2.5)}
    few, many = rank_intervals(rows(30), "nll"), rank_intervals(rows(3000), "nll")
    assert list(many.values()) == [(1, 1), (2, 2), (3, 3)]
    assert (all(lo <= k <= hi for k, (lo, hi) in enumerate(few.values(), 1))
            and any(hi > lo for lo, hi in few.values()))


def test_the_most_accurate_has_the_first_rank():
    z, y = torch.randn(2, 500, 4), torch.arange(500) % 4
    good, bad = compute_outcomes(z[0] + 3*torch.nn.functional.one_hot(y, 4), y), compute_outcomes(z[1], y)
    assert rank_intervals({"bad": [bad], "good": [good]}, "top1") == {"bad": (2, 2), "good": (1, 1)}


def test_spreads_are_compared_in_pairs():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 3))
    r, theirs = spread_log_ratio(a, 3*b), ttest_1samp(np.log(a.std(1, ddof=1)/(3*b.std(1, ddof=1))), 0)
    assert r.p == pytest.approx(theirs.pvalue) and spread_log_ratio(3*b, a).mean == pytest.approx(-r.mean)
    with pytest.raises(ValueError, match="a, b: got a row of one seed"):
        spread_log_ratio([[1.], [2., 1.]], [[2., 3.], [3., 4.]])
    with pytest.raises(ValueError, match="b: got 0 rows"): spread_log_ratio([], [])


def test_spreads_of_rows_that_vary_very_differently_are_covered():
    "Pooled variances would be ruled by the row that varies most"
    rng, scales = np.random.default_rng(0), np.geomspace(.2, 3, 11)[:, None]
    found = [spread_log_ratio(scales*rng.normal(size=(11, 3)), scales*rng.normal(size=(11, 3)))
             for _ in range(300)]
    assert .92 < np.mean([d.low <= 0 <= d.high for d in found]) < .985


def test_a_split_adds_up_and_a_temperature_changes_only_calibration():
    z = torch.randn(400, 4, dtype=torch.float64)
    e = [evaluate(k*z, z.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(0)).squeeze(1),
                  n_draws=2) for k in (.2, 3.)]
    for metric in ("nll", "brier"):
        a, b = (decompose_score(x, metric) for x in e)
        assert (sum(a) == pytest.approx(e[0].raw[metric].value)
                and a.refinement == pytest.approx(b.refinement, abs=1e-3))
    with pytest.raises(ValueError, match="evaluation: got one without temperature scaling"):
        decompose_score(evaluate(z[:3], [0, 1, 2], n_draws=2))


# -- seeds, pooled over rows ------------------------------------------------

def two_way(rows, seeds, seed=0, scale=1.):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 1)) + rng.normal(size=seeds) + scale*rng.normal(size=(rows, seeds))


@given(st.integers(0, 999), st.integers(2, 6), st.integers(2, 5))
def test_the_pooled_variance_is_that_of_the_two_way_layout(seed, rows, seeds):
    "The residual mean square, from an independent least-squares fit of row and seed effects"
    y = two_way(rows, seeds, seed)
    design = np.array([[*np.eye(rows)[r], *np.eye(seeds)[s]] for r in range(rows) for s in range(seeds)])
    rest = y.ravel() - design @ np.linalg.lstsq(design, y.ravel(), rcond=None)[0]
    pooled = contrast_seed_variance([y], [np.eye(rows)[0] - np.eye(rows)[1]])
    if not bartlett_p(y) < .05:
        assert pooled == pytest.approx((2*(rest @ rest)/(rows - 1)/(seeds - 1), (rows - 1)*(seeds - 1)))


def test_rows_that_vary_otherwise_keep_their_own_variance():
    y = two_way(12, 3, 1)
    y[:2] *= 30
    w = np.eye(12)[2] - np.eye(12)[3] # two of the quiet ones
    assert bartlett_p(y) < .05 and bartlett_p(y[2:]) > .05
    loud = contrast_seed_variance([y], [np.eye(12)[0] - np.eye(12)[1]])
    quiet = contrast_seed_variance([y], [w])
    assert loud.variance > 20*quiet.variance and 2 <= loud.df <= 4


def test_one_row_of_each_table_is_the_paired_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 1, 4))
    found = contrast_seed_variance([a, b], [np.ones(1), -np.ones(1)])
    assert found == pytest.approx(((a - b).var(ddof=1), 3))


def test_two_tables_do_not_cancel_what_a_seed_does_to_one_of_them():
    "All rows of one table move together from seed to seed: that is no noise of rows"
    y, z = two_way(10, 3, 0, .01), two_way(10, 3, 1, .01)
    w = np.eye(10)[0]
    within = contrast_seed_variance([y], [w - np.eye(10)[1]])
    across = contrast_seed_variance([y, z], [w, -w])
    shift = (y.mean(0) - z.mean(0)).var(ddof=1)
    assert across.variance == pytest.approx(shift, rel=.01) and across.df < 2.1
    assert shift > 100*within.variance


def test_a_row_that_stands_in_all_pairs_counts_in_all():
    "Three rows against one: 1/3 each and -1, so 4/3 of the variance of a row"
    y = {(str(k), ""): row[:, None] for k, row in enumerate(two_way(6, 3))}
    d = estimate_contrast(y, {("0", ""): 1/3, ("1", ""): 1/3, ("2", ""): 1/3, ("3", ""): -1.})
    pair = estimate_contrast(y, {("0", ""): 1., ("3", ""): -1.})
    assert d.parts[0] == pytest.approx((pair.parts[0][0]*(4/3)/2, 10))
    assert d.mean == pytest.approx(np.mean([y[str(k), ""].mean() - y["3", ""].mean() for k in range(3)]))


def test_ranks_are_pooled_over_all_models():
    z, y, _ = made(400, 5)
    luck = .15*torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    models = {str(k): [compute_outcomes((1.2 + .6*(k == 7) + luck[k, s])*z, y) for s in range(3)]
              for k in range(8)}
    ranks, pair = rank_intervals(models, "nll"), rank_intervals({k: models[k] for k in "07"}, "nll")
    assert ranks["7"] == (8, 8) and pair["7"] == (1, 2), "two rows by themselves know nothing of their luck"


# -- what could have been seen ------------------------------------------------

@given(st.integers(2, 8), st.floats(.001, .05))
def test_the_detectable_difference_is_that_of_the_noncentral_t(m, level):
    d = estimate_difference(np.random.default_rng(m).normal(size=(m, 1)))
    se, limit = d.parts[0][0]**.5, t.isf(level/2, m - 1)
    assert nct.sf(limit, m - 1, d.detectable(level)/se) == pytest.approx(.8, abs=1e-3)
    assert d.detectable(level/2) > d.detectable(level) > d.reach(level)*.9


def test_a_pooled_variance_with_many_degrees_is_a_z_test():
    d = estimate_difference(np.array([[1.], [2.], [3.]]), SeedVariance(3., 1e6))
    assert (d.reach(.05), d.detectable()) == pytest.approx((1.95996, 1.95996 + .84162), rel=1e-4)


def test_two_one_sided_tests_by_hand():
    "Mean .2, standard error .1 with 9 degrees of freedom: t of 5% is 1.8331, so .2 + .1833 must lie below"
    x = np.linspace(-1, 1, 10)
    d = estimate_difference((.2 + x*.1*10**.5/x.std(ddof=1))[:, None])
    assert d.is_within(.384) and not d.is_within(.383)
    higher, lower = (ttest_1samp(np.array(d.each), m, alternative=a).pvalue
                     for m, a in ((-.384, "greater"), (.384, "less")))
    assert max(higher, lower) < .05 < ttest_1samp(np.array(d.each), .383, alternative="less").pvalue


def test_margins_are_those_of_every_page():
    assert EQUIVALENCE_MARGINS == {"ece": .005, "ace": .005, "ks": .005,
                                   "error": .005, "top1": .01, "nll": .02,
                                   "kl": .02}


def test_equal_models_are_called_equivalent_when_there_are_images_enough():
    z, y, _ = made(4000, 5)
    noise = .02*torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    many, few = compare(z, z + noise, y), compare(z[:40], z[:40] + 40*noise[:40], y[:40])
    assert many.winner("nll", many.raw["nll"]) == "equivalent within 0.02" and many.raw["nll"].better is None
    assert few.winner("nll", few.raw["nll"]) == "cannot be told" and "equivalent:" not in repr(few)
    assert "equivalent:" in repr(many) and many.raw["brier"].margin is None
    assert few.raw["nll"].detectable == few.raw["nll"].difference.detectable(.05/6)


# -- verdicts -----------------------------------------------------------------

@given(st.lists(st.tuples(st.sampled_from((-1., 1.)), st.sampled_from((1e-9, .5)), st.sampled_from((.5, 9.))),
                min_size=1, max_size=8))
def test_a_verdict_turns_with_its_sign(tests):
    one = estimate_difference(np.array([[1.], [1.1]]))
    ds = [one._replace(mean=m, p=p) for m, p, _ in tests]
    ours, turned = (judge_claims([(d, sign, m) for d, (*_, m) in zip(ds, tests)]) for sign in (-1, 1))
    swap = {"reproduced": "contradicted", "contradicted": "reproduced"}
    assert [v.word for v in turned] == [swap.get(v.word, v.word) for v in ours]
    for v, (m, p, margin) in zip(ours, tests):
        if p < .01:
            assert v.word == ("reproduced" if m < 0 else "contradicted") and v.is_small == (margin == 9)
        else: assert v.word == ("equivalent" if margin == 9 else "cannot be told") and not v.is_small
    for bad, message in (([(one, 0, .1)], "sign: got 0"), ([], "tests: got none")):
        with pytest.raises(ValueError, match=message): judge_claims(bad)


def test_all_claims_of_a_page_are_one_family():
    "p .02: significant alone, and not as one of three whose others are worse"
    one = estimate_difference(np.array([[1.], [1.1]]))._replace(p=.02)
    claims = [(one, 1, None), (one._replace(p=.5), 1, None), (one._replace(p=.9), 1, None)]
    assert [v.word for v in judge_claims(claims)] == ["cannot be told"]*3
    (alone,) = judge_claims(claims[:1])
    assert alone.word == "reproduced" and alone.detectable == one.detectable(.05)
    assert judge_claims(claims)[0].p_holm == pytest.approx(.06)
    assert judge_claims(claims)[0].detectable == one.detectable(.05/3), "at the strictest step"


@pytest.mark.parametrize("claim", ["KD(C) beats direct calibration",
                                   "KD(C) beats temperature scaling of the plain student"])
def test_verdicts_err_as_seldom_and_find_as_much_as_they_say(claim):
    "With the noise of the stored runs at three seeds; 300 trials. tests/benchmarks/verdicts.py has more"
    stored, claims = load_students("nll")
    shares = simulate(stored, claims[claim], 300)
    assert shares["mean wrong"] < .09 and shares["pairs wrong"] < .07 # 5%, and an error of 1.3 of the first
    assert .73 < shares["mean found"] < .87 and .74 < shares["pairs found"] < .86 # 80%, and 2.3


def test_tables_in_another_order_are_named():
    "The same model by other names would be another one"
    z = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)), columns=[*"abc"])
    y = [0, 1, 2]*10
    for other, what in ((z[["b", "a", "c"]], "columns"), (z[::-1], "index")):
        with pytest.raises(ValueError, match=f"logits_b: got {what} .* as logits_a has"): compare(z, other, y)
        with pytest.raises(ValueError, match=f"valid_logits_b: got {what}"): compare(z, z, y, z, other, y)
