"A metric of one's own: one declaration, and it is everywhere, with intervals and null bands that hold"
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_nb.calibration.comparisons import compare
from kdc_nb.calibration.contributions import debiased_contributions, signed_gaps
from kdc_nb.calibration.diagrams import axis_label
from kdc_nb.calibration.differences import paired_difference, rank_intervals
from kdc_nb.calibration.estimates import calibration_estimates
from kdc_nb.calibration.evaluation import evaluate
from kdc_nb.calibration.metric_labels import format_metric, metric_label, metric_unit
from kdc_nb.calibration.metrics import (
    BUILT_IN, METRICS, ON_REQUEST, Metric, ece, label_moments, register_metric, select_metrics,
    unregister_metric,
)
from kdc_nb.calibration.predictions import binned_error
from kdc_nb.calibration.null_bands import null_band, null_draws
from kdc_nb.calibration.outcomes import compute_outcomes, metrics_from_outcomes
from kdc_nb.calibration.outputs import to_log_probs, to_probs
from kdc_nb.calibration.predictions import (
    BinaryPredictions, classwise, equal_mass_bins, equal_width_bins, l1_norm, top_label,
    unique_bins,
)

from .conftest import made


def rms_norm(gaps, share): return (gaps.square()/share.clamp(min=1e-30)).sum(-1).sqrt().mean(-1)


def spherical(x, y, from_logits):
    p = to_probs(x, from_logits)
    return p.gather(1, y[:, None]).squeeze(1)/p.norm(dim=1)


L2 = dict(label="l2 ECE", unit="%", limits=(0, 1),
          predictions=top_label, bins=equal_width_bins, norm=rms_norm)
SPHERICAL = dict(label="spherical score", higher_is_better=True, limits=(0, 1), per_sample=spherical)


@pytest.fixture(autouse=True)
def registered():
    "Both metrics for the time of a test; nothing that a test registers outlives it"
    before = dict(METRICS)
    register_metric("l2_ece", **L2)
    register_metric("spherical", **SPHERICAL)
    yield
    for k in [k for k in METRICS if k not in before]: unregister_metric(k)
    assert METRICS == before


# -- everywhere ---------------------------------------------------------------

def test_own_metrics_are_in_evaluate_its_table_and_its_frame():
    z, y, _ = made(500, 5, 2.)
    names = ["spherical", "l2_ece", "ece", "top1"]
    e = evaluate(z, y, n_draws=50, metrics=names)
    assert list(e.raw) == list(e.scaled) == names
    assert [r[0] for r in e.table().rows[::2]] == ["Top-1, %", "ECE, %", "l2 ECE, %", "spherical score"]
    frame = e.to_frame().set_index(["metric", "output"])
    assert frame.value["l2_ece", "raw"] == pytest.approx(100*e.raw["l2_ece"].value)
    assert frame.value["spherical", "raw"] == pytest.approx(float(spherical(z, y, True).mean()))
    assert (frame.unit["l2_ece", "raw"], frame.unit["spherical", "raw"]) == ("%", "")
    b = equal_width_bins(top_label(z, y, True).confidence, 15)[:, 0]
    p, hit = (t[:, 0] for t in top_label(z, y, True))
    by_hand = math.sqrt(sum(float((b == k).double().mean()*(p - hit)[b == k].mean()**2) for k in b.unique()))
    assert e.raw["l2_ece"].value == pytest.approx(by_hand)
    assert e.raw["ece"] == evaluate(z, y, n_draws=50).raw["ece"] # whatever else is asked


def test_what_nobody_asks_for_is_not_reported():
    z, y, _ = made(100)
    assert tuple(evaluate(z, y, n_draws=2).raw) == BUILT_IN
    assert list(compare(z, 2*z, y).raw) == ["top1", "nll", "brier", "ece", "ace", "ks"]
    binned = ["ece", "ace", "mce", "ks", "sce", "classwise_ace"]
    assert list(null_band(z, n_draws=2)) == list(calibration_estimates(z, y, n_draws=2)) == binned


def test_own_metrics_are_compared_and_their_direction_is_known():
    z, y, _ = made(2000, 10, 1.)
    more, labels, _ = made(2000, 10, seed=1)
    c = compare(2*z, z, y, 2*more, more, labels, metrics=["l2_ece", "spherical"])
    assert c.raw["l2_ece"].better == c.raw["spherical"].better == "b"
    assert c.raw["l2_ece"].difference.mean > 0 > c.raw["spherical"].difference.mean
    assert list(c.raw) == list(c.scaled) == ["l2_ece", "spherical"]
    assert list(c.to_frame().unit) == ["%", "%", "", ""]
    assert "l2 ECE is debiased" in repr(c) and "debiased" not in repr(compare(2*z, z, y, metrics="spherical"))
    assert compare(z, 2*z, y, metrics="l2_ece").raw["l2_ece"].better == "a"
    e = calibration_estimates(2*z, y, "l2_ece", n_draws=200)["l2_ece"]
    assert c.raw["l2_ece"].a == pytest.approx(e.debiased)


def test_own_metrics_have_ranks_labels_and_a_part_in_outcomes():
    z, y, _ = made(2000, 10)
    o = {str(f): [compute_outcomes(f*z, y)] for f in (1., 1.5, 2.5)}
    assert list(rank_intervals(o, "l2_ece").values()) == [(1, 1), (2, 2), (3, 3)]
    e = evaluate(2.5*z, y, n_draws=2, metrics="l2_ece").raw["l2_ece"]
    assert metrics_from_outcomes(o["2.5"][0])["l2_ece"] == pytest.approx(e.value)
    assert paired_difference(o["2.5"], o["1.0"], "l2_ece").low > 0
    assert (metric_label("l2_ece"), axis_label("l2_ece")) == ("l2 ECE, %", "l2 ECE")
    assert (metric_unit("spherical"), format_metric("spherical", .5)) == ("", "0.500")
    with pytest.raises(ValueError,
                       match="metric: got 'spherical', expected top1, nll, ece, ace, ks, smece, rms, l2_ece"):
        debiased_contributions(o["1.0"], "spherical")


def test_a_class_wise_metric_of_ones_own():
    register_metric("l2_sce", **L2 | dict(label="l2 SCE", predictions=classwise))
    z, y, _ = made(1000, 5, 2.)
    l2, l1 = evaluate(z, y, n_draws=100, metrics=["l2_sce", "sce"]).raw.values()
    assert l2.value >= l1.value and l2.low > 0 and l2.value > l2.null_high
    with pytest.raises(ValueError, match="metrics: got 'l2_sce', expected one of ace, brier, ece"):
        compare(z, z, y, metrics="l2_sce")


def test_more_bins_than_asked_for_are_all_counted():
    "Each distinct confidence a bin of its own: the noise is drawn in all of them, not in the first 15"
    register_metric("unbinned", **L2 | dict(label="unbinned", bins=unique_bins, norm=l1_norm))
    z, y, _ = made(200, 3)
    d = null_draws(z, "unbinned", n_draws=200)["unbinned"]
    g = torch.Generator().manual_seed(1)
    labels = [z.softmax(1).multinomial(1, generator=g)[:, 0] for _ in range(200)]
    slow = [binned_error(METRICS["unbinned"], top_label(z, y, True), 15) for y in labels]
    assert float(d.mean()) == pytest.approx(np.mean(slow), rel=.03)
    e = evaluate(z, y, n_draws=100, metrics="unbinned").raw["unbinned"]
    assert e.null_low <= e.value <= e.null_high and e.low <= e.debiased <= e.high


def test_a_score_below_zero_keeps_its_ends_in_order():
    "Minus the NLL: more is better, it may be minus infinity, and nothing is cut at 0"
    def log_score(x, y, from_logits): return to_log_probs(x, from_logits).gather(1, y[:, None])[:, 0]
    register_metric("log_score", label="log score", unit="nats", higher_is_better=True, per_sample=log_score)
    z, y, _ = made(300)
    own, nll = (evaluate(z, y, n_draws=2, metrics=k).raw[k] for k in ("log_score", "nll"))
    assert own.low < own.value < own.high < 0 and own.null_low < own.null_high < 0
    assert [own.value, own.low, own.high] == pytest.approx([-nll.value, -nll.high, -nll.low])
    assert [own.null_low, own.null_high] == pytest.approx([-nll.null_high, -nll.null_low])
    frame = (evaluate([[1., 0.]]*6, [0, 1]*3, n_draws=2, from_logits=False, metrics=["nll", "log_score"])
             .to_frame())
    assert frame[frame.output == "raw"].value.tolist() == [math.inf, -math.inf]


# -- numbers that hold --------------------------------------------------------

def test_null_bands_have_their_level():
    inside = dict.fromkeys(("l2_ece", "spherical"), 0)
    for seed in range(200):
        z, y, _ = made(300, 4, seed=seed)
        error = binned_error(METRICS["l2_ece"], top_label(z, y, True), 15)
        values = error, spherical(z, y, True).mean()
        for (k, b), v in zip(null_band(z, list(inside), n_draws=200, seed=seed).items(), values):
            inside[k] += b.low <= float(v) <= b.high
    assert min(inside.values()) >= 182, inside # at 95% fewer have a chance of 1% each


@pytest.mark.parametrize("factor", [1., 1.032, 1.137, 1.716])
def test_the_l2_errors_interval_covers_the_truth(factor):
    "The truth: the same bins with the chance of being correct, known here, in place of whether it was"
    hits = 0
    for seed in range(60):
        z, y, p = made(1000, 10, factor, 2.5, seed)
        top = z.argmax(1, keepdim=True)
        known = BinaryPredictions(z.softmax(1).gather(1, top), p.gather(1, top))
        truth = binned_error(METRICS["l2_ece"], known, 15)
        e = calibration_estimates(z, y, "l2_ece", n_draws=120, seed=seed)["l2_ece"]
        hits += e.low <= truth + 1e-9 and truth <= e.high
    assert hits >= 51, hits # at 95% fewer than 51 of 60 have a chance of .1%


@pytest.mark.parametrize("factor", [1., 2.])
def test_the_spherical_scores_interval_covers_the_truth(factor):
    z, _, p = made(200_000, 4, factor, seed=99)
    values = torch.stack([spherical(z, torch.full((len(z),), c), True) for c in range(4)], 1)
    truth = float((p*values).sum(1).mean()) # of all images there could be
    def found(seed):
        z, y, _ = made(300, 4, factor, seed=seed)
        return evaluate(z, y, *made(9, 4)[:2], n_draws=2, metrics="spherical").raw["spherical"]
    inside = sum(e.low <= truth <= e.high for e in map(found, range(200)))
    assert inside >= 181, inside # at 95% fewer have a chance of .5%


def test_the_comparisons_interval_covers_the_truth_and_equals_are_seldom_told_apart():
    "Both models see the same logits with noise of their own: the true difference is 0"
    told, covered = 0, dict.fromkeys(("l2_ece", "spherical"), 0)
    for seed in range(60):
        z, y, _ = made(500, 5, seed=seed)
        g = torch.Generator().manual_seed(seed + 1000)
        noise = .5*torch.randn(2, *z.shape, generator=g, dtype=torch.float64)
        c = compare(z + noise[0], z + noise[1], y, metrics=list(covered))
        told += any(m.better for m in c.raw.values())
        for k in covered: covered[k] += c.raw[k].difference.low <= 0 <= c.raw[k].difference.high
    assert told <= 8 and min(covered.values()) >= 49, (told, covered)


# -- what the table says ------------------------------------------------------

@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(2, 6), st.sampled_from((.1, 1., 5.)),
       st.sampled_from(("nll", "brier", "top1")))
def test_closed_null_moments_are_those_summed_over_the_labels(seed, n, c, scale, name):
    x = made(n, c, scale, seed=seed)[0]
    for from_logits, outputs in ((True, x), (False, x.softmax(1))):
        both = METRICS[name], replace(METRICS[name], moments=None)
        closed, summed = (label_moments(m, outputs, from_logits) for m in both)
        for a, b in zip(closed, summed): assert torch.allclose(a, b, atol=1e-9)


def test_null_moments_are_what_they_were():
    p = torch.tensor([[.7, .2, .1], [1., 0., 0.]], dtype=torch.float64)
    log, square = p.clamp(min=torch.finfo(p.dtype).tiny).log(), p.square().sum(1)
    expected = {"nll": (-(p*log).sum(1), (p*log.square()).sum(1) - (p*log).sum(1).square()),
                "brier": (1 - square, 4*((p**3).sum(1) - square.square())),
                "top1": (p.amax(1), p.amax(1)*(1 - p.amax(1)))}
    for k, two in expected.items():
        assert all(map(torch.equal, label_moments(METRICS[k], p, False), two))


@given(st.integers(0, 999), st.integers(1, 200), st.sampled_from((.3, 1., 3.)),
       st.sampled_from(("ece", "ace", "ks", "smece", "l2_ece")), st.integers(1, 20))
def test_slopes_of_a_norm_give_it_back(seed, n, factor, name, n_bins):
    "What images contribute has the metric as its mean, for every norm (Euler)"
    z, y, _ = made(n, 4, factor, seed=seed)
    claims = top_label(z, y, True)
    error = binned_error(METRICS[name], claims, n_bins)
    assert float(signed_gaps(claims, name, n_bins).mean()) == pytest.approx(error, abs=1e-9)


def test_contributions_where_there_is_no_gap_and_without_gradients():
    sure = BinaryPredictions(torch.ones(3, 1).double(), torch.ones(3, 1).double())
    for k in ("ece", "ks", "l2_ece"): assert signed_gaps(sure, k).tolist() == [0, 0, 0]
    z, y, _ = made(50)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(): found = compare(z, 2*z, y, metrics="l2_ece").raw
        assert found == compare(z, 2*z, y, metrics="l2_ece").raw


@given(st.lists(st.sampled_from(sorted([*BUILT_IN, "l2_ece", "spherical"])), min_size=1, max_size=6))
def test_metrics_come_in_the_order_asked_for(names):
    z, y, _ = made(40, 3)
    once = list(dict.fromkeys(names))
    assert list(evaluate(z, y, n_draws=2, metrics=names).raw) == list(select_metrics(names)) == once
    assert list(null_band(z, names, n_draws=2)) == once


# -- refusals -----------------------------------------------------------------

@pytest.mark.parametrize("name", [*BUILT_IN, *ON_REQUEST, "error", "kl", "l2_ece"])
def test_a_taken_name_is_refused(name):
    before = dict(METRICS)
    for declared in (SPHERICAL, L2 | dict(norm=l1_norm)):
        with pytest.raises(ValueError, match=f"metric: got '{name}', expected a name that is not taken"):
            register_metric(name, **declared)
    assert METRICS == before


def test_a_cell_may_be_run_again_and_another_function_may_not_take_the_name():
    def scaled(x, y, from_logits): return spherical(x, y, from_logits)/2
    register_metric("halved", **SPHERICAL | dict(per_sample=scaled))
    def scaled(x, y, from_logits): return spherical(x, y, from_logits)/3
    register_metric("halved", **SPHERICAL | dict(per_sample=scaled))
    for other in (SPHERICAL,
                  SPHERICAL | dict(per_sample=lambda x, y, from_logits: scaled(x, y, from_logits)), L2):
        with pytest.raises(ValueError, match="metric: got 'halved', expected a name that is not taken"):
            register_metric("halved", **other)
    register_metric("sum", **L2 | dict(norm=l1_norm))
    with pytest.raises(ValueError, match="metric: got 'sum'"):
        register_metric("sum", **L2 | dict(norm=l1_norm, bins=equal_mass_bins))
    assert METRICS["halved"].per_sample is scaled


@pytest.mark.parametrize("name", [*BUILT_IN, *ON_REQUEST, "nothing"])
def test_only_ones_own_are_taken_out(name):
    with pytest.raises(ValueError, match=f"metric: got '{name}', expected one of l2_ece, spherical"):
        unregister_metric(name)


def plain(x, y, from_logits): return x.softmax(1).gather(1, y[:, None]).squeeze(1)


@pytest.mark.parametrize("declared, says", [
    (SPHERICAL | dict(label=""), "label: got ''"),
    ({k: v for k, v in SPHERICAL.items() if k != "label"}, "label: got ''"),
    (SPHERICAL | dict(unit="percent"), "unit: got 'percent', expected '%', 'nats' or ''"),
    (SPHERICAL | dict(limits=(1, 0)), r"limits: got \(1, 0\)"),
    (SPHERICAL | dict(direction="up"), "got 'direction', expected one of axis, bins"),
    (dict(label="neither"), "kind: got both, none or a part"),
    (SPHERICAL | L2, "kind: got both, none or a part"),
    (dict(label="a part", predictions=top_label, norm=rms_norm), "kind: got both, none or a part"),
    (SPHERICAL | dict(per_sample=lambda x, y, from_logits: spherical(x, y, from_logits).mean()),
     r"per_sample: got tensor\(.*, expected a float for each"),
    (SPHERICAL | dict(per_sample=lambda x, y, from_logits: x.argmax(1) == y), r"per_sample: got tensor\(\["),
    (SPHERICAL | dict(per_sample=lambda x, y, from_logits: x.amax(1).numpy()), r"per_sample: got array\("),
    (SPHERICAL | dict(per_sample=plain), "per_sample: got not from logits"),
    (SPHERICAL | dict(moments=lambda p: (p.amax(1), p.amax(1))), "moments: got"),
    (L2 | dict(norm=lambda gaps, share: gaps.square().sum((-2, -1))), "norm: got"),
    (L2 | dict(norm=lambda gaps, share: gaps.sum((-2, -1)).abs().sum()), "norm: got"),
    (L2 | dict(bins=lambda p, n_bins: n_bins - 1 - equal_width_bins(p, n_bins)), "bins: got"),
    (L2 | dict(bins=lambda p, n_bins: p*n_bins), "bins: got"),
    (L2 | dict(predictions=lambda x, y, from_logits: top_label(x, y, from_logits)), "predictions: got"),
    (L2 | dict(predictions=classwise, walk=lambda w: w.abs().amax(1)), "walk: got class-wise"),
])
def test_a_declaration_that_would_give_wrong_numbers_is_refused(declared, says):
    before = dict(METRICS)
    with pytest.raises(ValueError, match=f"metric 'mine'.*{says}"): register_metric("mine", **declared)
    assert METRICS == before


def test_a_value_beyond_its_limits_is_an_error_and_no_odd_interval():
    register_metric("doubled",
                    **SPHERICAL | dict(per_sample=lambda x, y, from_logits: 2*spherical(x, y, from_logits)))
    with pytest.raises(ValueError, match="metric 'doubled': got 1.* within its limits, 0 to 1"):
        evaluate(*made(50, 2, 9.)[:2], n_draws=2, metrics="doubled")


def test_a_file_of_another_who_had_more_metrics_is_read_and_shown_as_it_is():
    e = evaluate(*made(60)[:2], n_draws=2, metrics=["ece", "l2_ece"])
    unregister_metric("l2_ece")
    row = e.table().rows[2]
    assert row[0] == "l2_ece" and row[1].startswith(f"{e.raw['l2_ece'].value:.3f}")
    assert e.to_frame().unit.tolist() == ["%", "%", "", ""]
    register_metric("l2_ece", **L2)


@pytest.mark.parametrize("metrics, says", [
    ([], r"metrics: got \[\], expected a name"), ("l2", "metrics: got 'l2', expected one of ace"),
    (["ece", "l2"], "metrics: got 'l2'"),
])
def test_unknown_metrics_are_refused(metrics, says):
    z, y, _ = made(30)
    for call in (lambda: evaluate(z, y, metrics=metrics), lambda: compare(z, z, y, metrics=metrics),
                 lambda: null_band(z, metrics), lambda: calibration_estimates(z, y, metrics)):
        with pytest.raises(ValueError, match=says): call()
    with pytest.raises(ValueError, match="metrics: got 'mce', expected one of ace, brier"):
        compare(z, z, y, metrics="mce")
    assert isinstance(METRICS["ece"], Metric)
    assert ece(z, y) == evaluate(z, y, n_draws=2, metrics="ece").raw["ece"].value


def test_own_equal_mass_bins_and_bounds_are_used():
    bounds = lambda contents, level: (0., None, .5)
    register_metric("bounded", **L2 | dict(bins=equal_mass_bins, interval=bounds, debiases=False))
    e = evaluate(*made(60)[:2], n_draws=2, metrics="bounded").raw["bounded"]
    assert (e.low, e.high, e.debiased) == (0., .5, None)
