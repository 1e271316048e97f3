"Comparisons: against scipy's tests, by hand, and by what must hold for any numbers"
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.stats import ttest_1samp, ttest_rel

from kdc_nb.comparisons import contributions, difference_of, holm, paired, rank_intervals, split_score, spread_difference, verdict
from kdc_nb.estimates import evaluate
from kdc_nb.metrics import outcomes, scores

numbers = st.lists(st.floats(-5, 5), min_size=2, max_size=6, unique=True)


def seen(seed, n=300, c=5, scale=2., sure=1.):
    rng = np.random.default_rng(seed)
    z = scale*rng.normal(size=(n, c))
    y = [rng.choice(c, p=p) for p in np.exp(z)/np.exp(z).sum(1, keepdims=True)]
    return outcomes(sure*z, y)


@given(seed=st.integers(0, 999), n=st.integers(1, 200), metric=st.sampled_from(("top1", "nll", "ece", "ace", "ks")), sure=st.sampled_from((.3, 1., 3.)))
def test_contributions_have_the_metric_as_their_mean(seed, n, metric, sure):
    o = seen(seed, n, sure=sure)
    assert float(contributions(o, metric).mean()) == pytest.approx(scores(o)[metric], abs=1e-12)


def test_contributions_by_hand():
    "Two bins: .94 and .95, one right of two, the gap is positive; .6 right, the gap is negative"
    o = outcomes(np.log([[.94, .06], [.95, .05], [.6, .4]]), [0, 1, 0])
    assert contributions(o, "ece").tolist() == pytest.approx([-.06, .95, .4])


@given(numbers)
def test_one_image_is_the_t_test_over_seeds(d):
    ours, theirs = difference_of(np.array(d)[:, None]), ttest_1samp(d, 0)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6) and (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-6, abs=1e-9)


def test_one_seed_is_the_paired_t_test_over_images():
    z, y = torch.randn(2, 300, 5), torch.arange(300) % 5
    a, b = outcomes(z[0], y), outcomes(z[1], y)
    ours, theirs = paired([a], [b], "nll"), ttest_rel(a.nll.numpy(), b.nll.numpy())
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6) and (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-6)


@given(st.integers(0, 99), st.integers(2, 4), st.integers(2, 30))
def test_both_kinds_of_chance_make_an_interval_wider_than_either(seed, s, n):
    d = np.random.default_rng(seed).normal(size=(s, n))
    both = difference_of(d)
    assert both.high - both.low >= max(difference_of(x).high - difference_of(x).low for x in (d.mean(1, keepdims=True), d.mean(0, keepdims=True))) - 1e-12
    turned = difference_of(-d)
    assert (turned.mean, turned.low, turned.p) == pytest.approx((-both.mean, -both.high, both.p))
    assert (both.p < .05) == (not both.low <= 0 <= both.high)


def test_exact_differences_and_none():
    same, off = difference_of(np.zeros((3, 4))), difference_of(np.ones((3, 4)))
    assert (same.p, same.low, same.high) == (1, 0, 0) and off.p == pytest.approx(1e-30) and off.low == 1
    for bad in (np.ones((1, 1)), np.ones(3), np.array([[np.nan], [1.]])):
        with pytest.raises(ValueError, match="d: got shape"): difference_of(bad)


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="images: got 300 and 200 of them"): paired([seen(0)], [seen(0, n=200)], "ece")
    z, y = torch.randn(50, 3), torch.arange(50) % 3
    with pytest.raises(ValueError, match="images: got some with other labels"): rank_intervals({"a": [outcomes(z, y)], "b": [outcomes(z, y.roll(1))]}, "nll")
    with pytest.raises(ValueError, match="rows: got rows with other numbers of seeds"): rank_intervals({"a": [seen(0)], "b": [seen(0)]*3}, "nll")
    with pytest.raises(ValueError, match="b: got 0 seeds"): paired([], [], "ece")


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
    assert all(lo <= k <= hi for k, (lo, hi) in enumerate(few.values(), 1)) and any(hi > lo for lo, hi in few.values())


def test_the_most_accurate_has_the_first_rank():
    z, y = torch.randn(2, 500, 4), torch.arange(500) % 4
    good, bad = outcomes(z[0] + 3*torch.nn.functional.one_hot(y, 4), y), outcomes(z[1], y)
    assert rank_intervals({"bad": [bad], "good": [good]}, "top1") == {"bad": (2, 2), "good": (1, 1)}


def test_spreads_are_compared_in_pairs():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 3))
    r, theirs = spread_difference(a, 3*b), ttest_1samp(np.log(a.std(1, ddof=1)/(3*b.std(1, ddof=1))), 0)
    assert r.p == pytest.approx(theirs.pvalue) and spread_difference(3*b, a).mean == pytest.approx(-r.mean)
    with pytest.raises(ValueError, match="a, b: got a row of one seed"): spread_difference([[1.], [2., 1.]], [[2., 3.], [3., 4.]])
    with pytest.raises(ValueError, match="b: got 0 rows"): spread_difference([], [])


def test_spreads_of_rows_that_vary_very_differently_are_covered():
    "Pooled variances would be ruled by the row that varies most"
    rng, scales = np.random.default_rng(0), np.geomspace(.2, 3, 11)[:, None]
    found = [spread_difference(scales*rng.normal(size=(11, 3)), scales*rng.normal(size=(11, 3))) for _ in range(300)]
    assert .92 < np.mean([d.low <= 0 <= d.high for d in found]) < .985


def test_a_split_adds_up_and_a_temperature_changes_only_calibration():
    z = torch.randn(400, 4, dtype=torch.float64)
    e = [evaluate(k*z, z.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(0)).squeeze(1), n_boot=2) for k in (.2, 3.)]
    for metric in ("nll", "brier"):
        a, b = (split_score(x, metric) for x in e)
        assert sum(a) == pytest.approx(e[0].raw[metric].value) and a.refinement == pytest.approx(b.refinement, abs=1e-3)
    with pytest.raises(ValueError, match="evaluation: got one without temperature scaling"): split_score(evaluate(z[:3], [0, 1, 2], n_boot=2))


@given(st.lists(st.tuples(st.sampled_from((-1., 1.)), st.sampled_from((1e-9, .5))), min_size=1, max_size=8))
def test_a_verdict_counts_and_turns_with_its_sign(pairs):
    one = difference_of(np.array([[1.], [2.]]))
    ds = [one._replace(mean=m, p=p) for m, p in pairs]
    v, turned = verdict(ds, -1), verdict(ds, 1)
    assert (v.agree, v.contradict) == (turned.contradict, turned.agree) and v.total == len(ds)
    assert v.agree == sum(m < 0 and p < .01 for m, p in pairs)
    assert (v.word == "not resolvable") == (v.agree + v.contradict == 0) and (v.word == "not reproduced") == (v.agree == 0 and 2*v.contradict >= len(ds))
    assert {v.word, turned.word} in ({"reproduced", "not reproduced"}, {"mixed"}, {"not resolvable"}) and v.seeds == 2
    with pytest.raises(ValueError, match="sign: got 0"): verdict(ds, 0)
