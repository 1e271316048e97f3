"""Metrics: by hand, at the edges, against the reference libraries, and on data whose truth is known."""
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from kdc_nb.calibration.comparisons import compare
from kdc_nb.calibration.estimates import calibration_estimates
from kdc_nb.calibration.metrics import (
    METRICS, ace, brier, calibration_error, classwise_ace, ece, ks, mce, nll, sce, top1,
)
from kdc_nb.calibration.predictions import binned_error
from kdc_nb.calibration.truth import kl_to_truth, true_calibration_error
from kdc_nb.calibration.null_bands import null_band
from kdc_nb.calibration.posthoc import (
    Calibrator, _find_temperature, _nll_derivatives, cross_fitted_temperatures, estimate_temperature,
    fit_temperature,
)
from kdc_nb.calibration.outputs import check_outputs_and_labels, softmax64
from kdc_nb.calibration.predictions import (
    BinaryPredictions, equal_mass_bins, equal_width_bins, gaps_and_shares, top_label,
)
from kdc_nb.calibration.reliability import corp_decomposition, reliability_bins
from kdc_nb.calibration.smoothing import _smoothed_l1, fine_bins, smece_norm, smooth_ece

from kdc_nb.calibration.norms import signed_errors
from .conftest import made

BINNED = dict(ece=ece, ace=ace, mce=mce, sce=sce, classwise_ace=classwise_ace)
ALL = BINNED | dict(ks=ks, brier=brier, nll=nll, top1=top1)


def binary(conf, right):
    """Two-class probabilities with these confidences of the top label, and labels
    that make it correct or wrong
    """
    return [[c, 1 - c] for c in conf], [0 if r else 1 for r in right]


# -- by hand ------------------------------------------------------------------

def test_two_bins_by_hand():
    p, y = binary([.9, .9, .9, .9, .6, .6], [1, 1, 0, 0, 1, 1])
    assert ece(p, y, from_logits=False) == pytest.approx(4/6*.4 + 2/6*.4)
    assert mce(p, y, from_logits=False) == pytest.approx(.4)
    assert ks(p, y, from_logits=False) == pytest.approx(.8/6) # -.8/6 after the two .6, +.8/6 at the end
    # two classes mirror each other
    assert sce(p, y, from_logits=False) == pytest.approx(ece(p, y, from_logits=False))
    assert top1(p, y, from_logits=False) == pytest.approx(4/6)
    assert brier(p, y, from_logits=False) == pytest.approx(2*(2*.01 + 2*.81 + 2*.16)/6)
    assert (nll(p, y, from_logits=False)
            == pytest.approx(-(2*math.log(.9) + 2*math.log(.1) + 2*math.log(.6))/6))


def test_ace_by_hand():
    p, y = binary([.6, .7, .8, .9], [0, 1, 1, 1])
    assert ace(p, y, n_bins=2, from_logits=False) == pytest.approx(abs(1.3 - 1)/4 + abs(1.7 - 2)/4)
    assert ace(p, y, n_bins=4, from_logits=False) == pytest.approx((.6 + .3 + .2 + .1)/4)


def test_sce_averages_over_absent_classes():
    p, y = [[.9, .1, 0.], [.2, .8, 0.]], [0, 1]
    assert sce(p, y, from_logits=False) == pytest.approx(((.1 + .2) + (.1 + .2) + 0)/2/3)


# -- bins ---------------------------------------------------------------------

def test_bin_edges_belong_to_the_bin_below():
    edges = torch.arange(16, dtype=torch.float64)[:, None]/15
    assert equal_width_bins(edges, 15).flatten().tolist() == [0, *range(15)]


@pytest.mark.parametrize("n", [1, 2, 14, 15, 16, 100, 1000])
def test_mass_bins_differ_by_one_at_most_and_drop_none(n):
    p = torch.rand(n, 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    counts = torch.bincount(equal_mass_bins(p, 15).flatten(), minlength=15)
    assert counts.sum() == n and counts.max() - counts.min() <= 1


def test_the_smallest_confidence_counts():
    p, y = binary([.7], [0])
    assert ace(p, y, from_logits=False) == ece(p, y, from_logits=False) == pytest.approx(.7)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([.5, .6, .75, .75000001, 1.]), st.booleans()),
                min_size=1, max_size=40),
       st.randoms())
def test_order_of_images_does_not_matter_with_ties(images, rng):
    shuffled = images[:]
    rng.shuffle(shuffled)
    one, two = (binary(*zip(*i)) for i in (images, shuffled))
    for name, f in ALL.items():
        a, b = f(*one, from_logits=False), f(*two, from_logits=False)
        assert a == b or a == pytest.approx(b, abs=1e-12), name


# -- properties ---------------------------------------------------------------

outputs = st.tuples(st.integers(1, 60), st.integers(2, 6), st.integers(0, 10**6)).map(
    lambda a: made(a[0], a[1], 1.5, seed=a[2])[:2]
)


@settings(max_examples=30, deadline=None)
@given(outputs, st.integers(1, 20))
def test_properties(data, n_bins):
    z, y = data
    scores = {k: f(z, y, n_bins) for k, f in BINNED.items()} | {"ks": ks(z, y)}
    gap = abs(float(z.softmax(1).amax(1).mean()) - top1(z, y))
    assert all(0 <= s <= 1 for s in scores.values())
    assert scores["sce"] <= 2/z.shape[1] + 1e-12 # a row of |p - onehot| sums to 2 at most
    assert scores["ece"] <= scores["mce"] + 1e-12
    assert min(scores["ece"], scores["ace"], scores["ks"]) >= gap - 1e-12 # bins can only undo cancelling
    assert 0 <= brier(z, y) <= 2
    assert ece(z, y, 1) == pytest.approx(gap, abs=1e-12)
    for k, f in BINNED.items(): # logits or their probabilities
        assert f(z.softmax(1), y, n_bins, from_logits=False) == pytest.approx(scores[k], abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(outputs)
def test_duplicates_and_permuted_classes_change_nothing(data):
    z, y = data
    order = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(len(y)))
    for name, f in ALL.items():
        assert f(z.repeat(3, 1), y.repeat(3)) == pytest.approx(f(z, y), abs=1e-9), name
        assert f(z[:, order], order.argsort()[y]) == pytest.approx(f(z, y), abs=1e-9), name


@pytest.mark.parametrize("n", [1, 2, 5])
def test_certain_outputs_and_tiny_sets_are_defined(n):
    p = torch.eye(3, dtype=torch.float64)[:n % 3 + 1].repeat(n, 1)[:n]
    for wrong in (False, True):
        y = (p.argmax(1) + wrong) % 3
        for name in BINNED | {"ks": ks}:
            assert ALL[name](p, y, from_logits=False) == pytest.approx(
                0 if not wrong else {"sce": 2/3, "classwise_ace": 2/3}.get(name, 1)
            ), name
        assert nll(p, y, from_logits=False) == (math.inf if wrong else 0)


def test_extreme_logits_are_finite():
    z = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0.]])
    y = [1, 1, 2]
    assert all(math.isfinite(f(z, y)) for f in ALL.values())
    assert nll(z, y) == pytest.approx((2e4 + math.log(3))/3)
    # the labels' logits are -1e4, 1e4 and 0: on average just the mean, no better than chance
    with pytest.warns(UserWarning, match="no better than chance"):
        assert fit_temperature(z, y) == pytest.approx(1e6*1e4) # 1e4: how far the top logit leads


@pytest.mark.parametrize("x, y, from_logits, says", [
    ([[1., 2.]], [0, 1], True, "labels: got 2 of them, expected 1"),
    (np.zeros((0, 3)), [], True, "shape (0, 3)"),
    ([1., 2.], [0], True, "labels: got 1 of them, expected 2"), # two images of two classes
    ([1., 2.], [0, 2], True, "labels: got 0 to 2, expected 0 to 1"),
    (np.array([1, 0]), [0, 1], True, "whole numbers of shape (2,)"), # predicted classes
    (np.zeros((2, 3, 4)), [0, 1], True, "flatten_outputs"),
    ([[-math.inf, -math.inf]], [0], True, "nothing but -inf"),
    ([[1., math.inf]], [0], True, "NaN or infinity"),
    ([[math.nan, 0.]], [0], False, "NaN or infinity"),
    ([[.5, .6]], [0], False, "row 0 with sum 1.1000, expected rows with sum 1 within 0.02"),
    ([[1.5, -.5]], [0], False, "between 0 and 1"),
    ([[1., 2.]], [-1], True, "labels: got -1 to -1, expected 0 to 1"),
    ([[1., 2.]], [.5], True, "integers"),
    ([[1., 2.]], [math.nan], True, "integers"),
    ([[1., 2.]], [[0]], True, "labels: got shape (1, 1), expected (N,); take labels[:, 0]"),
    ([[1., 2.], [0., "cat"]], [0, 1], True, "'cat' at 1, 1"),
    ([["a", "b"]], [0], True, "no table of numbers"),
    ([[1., 2.], [1.]], [0, 0], True, "no table of numbers"),
    ([[1., 2.]], [0], "odds", "from_logits: got 'odds'"),
])
def test_bad_input_is_refused_in_words(x, y, from_logits, says):
    with pytest.raises(ValueError) as error: check_outputs_and_labels(x, y, from_logits)
    assert says in str(error.value)


def test_other_bad_input():
    z, y, _ = made(30)
    with pytest.raises(ValueError, match="n_bins"): ece(z, y, 0)
    with pytest.raises(ValueError, match="posterior"): kl_to_truth(softmax64(z), softmax64(z)[:9])


def test_probabilities_read_as_logits_are_warned_of():
    with pytest.warns(UserWarning, match="from_logits=False"): ece([[.9, .1]], [0])


@pytest.mark.parametrize("as_type", [np.asarray, lambda t: t.tolist(), lambda t: t.float(),
                                     lambda t: t.clone().requires_grad_()])
def test_what_numpy_can_read(as_type):
    z, y, _ = made(40)
    z = z.round(decimals=3)
    assert ece(as_type(z), np.asarray(y)) == pytest.approx(ece(z, y), abs=1e-6)


# -- reference libraries ------------------------------------------------------

# multiples of 15: on others the libraries cut unequal bins in ways of their own
SIZES = [(990, 10), (60, 3), (300, 2)]


@pytest.mark.parametrize("n, c", SIZES)
def test_torchmetrics(n, c):
    "The same on ordinary data, in float32"
    ref = pytest.importorskip("torchmetrics.classification").MulticlassCalibrationError
    z, y, _ = made(n, c, 1.3)
    assert float(ref(c, n_bins=15, norm="l1")(z.softmax(1), y)) == pytest.approx(ece(z, y), abs=1e-5)
    assert float(ref(c, n_bins=15, norm="max")(z.softmax(1), y)) == pytest.approx(mce(z, y), abs=1e-5)


def test_torchmetrics_cuts_at_the_other_side():
    """Its bins are [lo, hi): a confidence of exactly .75 goes up, and 1.0 into a bin of its
    own, where ours keep (lo, hi]
    """
    ref = pytest.importorskip("torchmetrics.classification").MulticlassCalibrationError
    conf, right = [.7, .75, .8, 1.], [1, 0, 1, 0]
    p, y = binary(conf, right)
    theirs = float(ref(2, n_bins=4, norm="l1")(torch.tensor(p), torch.tensor(y)))
    assert ece(p, y, 4, from_logits=False) == pytest.approx((abs(1.45 - 1) + abs(1.8 - 1))/4)
    assert theirs == pytest.approx((.3 + abs(1.55 - 1) + 1.)/4, abs=1e-6)


@pytest.mark.parametrize("n, c", SIZES)
def test_netcal(n, c):
    """ECE, MCE and ECE with equal-mass bins agree for C > 2; its class `ACE` is a third thing, the
    UNWEIGHTED mean of the bins' gaps
    """
    ref = pytest.importorskip("netcal.metrics")
    z, y, _ = made(n, c, 1.3)
    p, labels = z.softmax(1).numpy(), y.numpy()
    if c == 2:
        # else it would score the positive class: see below
        p, labels = p.max(1), (p.argmax(1) == labels).astype(int)
    assert ref.ECE(15).measure(p, labels) == pytest.approx(ece(z, y), abs=1e-6)
    assert ref.MCE(15).measure(p, labels) == pytest.approx(mce(z, y), abs=1e-6)
    b = reliability_bins(z, y, n_draws=2)
    assert (ref.ACE(15).measure(p, labels)
            == pytest.approx(np.nanmean(abs(b.confidence - b.accuracy)), abs=1e-6))


def test_netcal_scores_the_positive_class_of_two():
    "With C = 2 it takes p(class 1) as the claim: the class-wise error, since two classes mirror each other"
    ref = pytest.importorskip("netcal.metrics")
    z, y, _ = made(300, 2, 1.3)
    theirs = ref.ECE(15).measure(z.softmax(1).numpy(), y.numpy())
    assert theirs == pytest.approx(sce(z, y), abs=1e-6) and abs(theirs - ece(z, y)) > 1e-3


@pytest.mark.parametrize("n, c", SIZES)
def test_uncertainty_calibration(n, c):
    "All four agree. Mind its names: `get_equal_prob_bins` has equal WIDTH, `get_equal_bins` has equal mass"
    ref = pytest.importorskip("calibration")
    z, y, _ = made(n, c, 1.3)
    p, labels = z.softmax(1).numpy(), y.numpy()
    def theirs(mode, bins):
        return ref.lower_bound_scaling_ce(p, labels, p=1, debias=False, num_bins=15,
                                          mode=mode, binning_scheme=bins)
    assert ref.get_ece(p, labels) == pytest.approx(ece(z, y), abs=1e-9)
    assert theirs("marginal", ref.get_equal_prob_bins) == pytest.approx(sce(z, y), abs=1e-9)
    assert theirs("top-label", ref.get_equal_bins) == pytest.approx(ace(z, y), abs=1e-9)
    assert theirs("marginal", ref.get_equal_bins) == pytest.approx(classwise_ace(z, y), abs=1e-9)


# -- smooth ECE ---------------------------------------------------------------

# of `relplot` 1.0.3 (Blasiok and Nakkiran's own), with `relplot.config.smECE_mesh_pts = 10001`:
# smECE(c, y, eps=1e-7), which searches the width in steps of 1/1024, and
# smECE_sigma(c, y, .05) and (c, y, .02),
# for the data that `confidences` draws
RELPLOT = {(0, 100, 1.): (.03695890602566893, .03015570256765561, .056178174620729535),
           (1, 1000, 2.): (.09467811844287131, .09467296696908264, .09501369796718717),
           (2, 1000, 1.): (.021835957481038722, .012272929482130561, .02344902986676691),
           (3, 5000, .5): (.054299033499110624, .05429849971148238, .05429464878457009),
           (4, 20000, 1.1): (.010402841477478334, .009754645906325462, .009758616503172111)}


def confidences(seed, n, power):
    rng = np.random.default_rng(seed)
    c = .5 + .5*rng.beta(3, 1, n)
    return c, (rng.random(n) < c**power).astype(float)


@pytest.mark.parametrize("data", RELPLOT)
def test_smooth_ece_is_that_of_its_authors(data):
    c, y = confidences(*data)
    theirs, at_5, at_2 = RELPLOT[data]
    p = np.stack([c, 1 - c], 1)
    assert smooth_ece(p, 1 - y, from_logits=False) == pytest.approx(theirs, abs=4e-4) # half a step
    claims = BinaryPredictions(*(torch.from_numpy(t)[:, None] for t in (c, y)))
    gaps, _ = gaps_and_shares(claims, fine_bins(claims.confidence, 1), 1000)
    norm = _smoothed_l1(gaps, 500)
    for width, value in ((.05, at_5), (.02, at_2)): # a cell is .001 wide
        assert float(norm(torch.tensor([width]).double())) == pytest.approx(value, rel=8e-3)


@pytest.mark.parametrize("data", list(RELPLOT)[:3])
def test_smooth_ece_is_the_fixed_point_of_mirrored_gaussians(data):
    "Image by image, with neither cells nor cosines"
    from scipy.optimize import brentq
    c, y = confidences(*data)
    t = (np.arange(1000)[:, None] + .5)/1000
    def size(s):
        bells = sum(np.exp(-(t - 2*m - sign*c)**2/2/s**2) for m in (-1, 0, 1) for sign in (-1, 1))
        return abs(bells @ (c - y)).mean()/len(c)/s/math.tau**.5
    root = brentq(lambda s: size(s) - s, .01, .3, xtol=1e-6)
    assert smooth_ece(np.stack([c, 1 - c], 1), 1 - y, from_logits=False) == pytest.approx(root, rel=5e-3)


@pytest.mark.parametrize("n, m", [(1, 0), (1, 1), (50, 10), (1000, 300)])
def test_smooth_ece_of_one_confidence_is_its_gap(n, m):
    p, y = binary([.8]*n, [1]*(n - m) + [0]*m)
    assert smooth_ece(p, y, from_logits=False) == pytest.approx(abs(.8 - (n - m)/n), abs=1e-9)


def test_smooth_ece_falls_with_images_and_knows_a_smooth_gap():
    falls = [np.mean([smooth_ece(*made(n, 10, seed=s)[:2]) for s in range(10)]) for n in (300, 3000, 30_000)]
    assert falls[0] > 1.6*falls[1] > 1.6**2*falls[2] # about N^(-1/3): 2.2 each
    z, y, _ = made(20_000, 10, 2.) # overconfident everywhere
    assert smooth_ece(z, y) == pytest.approx(ece(z, y), rel=.02) and ece(z, y) > .2
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    assert smooth_ece(z[order], y[order]) == pytest.approx(smooth_ece(z, y), rel=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from((.3, 1., 4.)))
def test_smooth_ece_lies_between_the_sum_of_all_gaps_and_of_their_sizes(seed, n, factor):
    z, y, _ = made(n, 3, factor, seed=seed)
    p, correct = (t[:, 0] for t in top_label(z, y, True))
    low, high = float((p - correct).mean().abs()), float((p - correct).abs().mean())
    assert low - 1e-9 <= smooth_ece(z, y) <= high + 1e-9


def test_the_smooth_errors_interval_and_null_band_hold():
    inside, band = 0, 0
    for seed in range(60):
        z, y, p = made(500, 10, 1.3, 2.5, seed)
        q, top = z.softmax(1), z.argmax(1, keepdim=True)
        known = BinaryPredictions(q.gather(1, top), p.gather(1, top))
        truth = binned_error(METRICS["smece"], known, 15)
        e = calibration_estimates(z, y, "smece", n_draws=120, seed=seed)["smece"]
        inside += e.low <= truth <= e.high
        calibrated, labels, _ = made(500, 10, 1., 2.5, seed)
        null = null_band(calibrated, "smece", n_draws=120, seed=seed)["smece"]
        band += null.low <= smooth_ece(calibrated, labels) <= null.high
    assert min(inside, band) >= 51, (inside, band) # at 95% fewer have a chance of .1%


def test_the_smooth_error_is_compared():
    z, y, _ = made(2000, 10)
    c = compare(2*z, z, y, metrics=["smece", "ece"])
    assert c.raw["smece"].better == "b"
    assert c.raw["smece"].difference.mean == pytest.approx(c.raw["ece"].difference.mean, abs=.02)


def test_draws_together_are_draws_alone():
    g = torch.Generator().manual_seed(0)
    gaps = torch.randn(1, 1000, generator=g)*10**torch.linspace(-6, -2, 20).view(-1, 1, 1)
    gaps[3] = 0
    together, alone = smece_norm(gaps, None), torch.cat([smece_norm(g[None], None) for g in gaps])
    assert torch.allclose(together, alone, rtol=1e-3) and together[3] == 0 and (together[4:].diff() > 0).all()


# -- temperature --------------------------------------------------------------

@pytest.mark.parametrize("factor", [.3, 1., 2.5, 30.])
def test_temperature_is_the_minimum(factor):
    z, y, _ = made(800, 6, factor)
    T = fit_temperature(z, y)
    found = minimize_scalar(lambda u: nll(u*z, y), bracket=(.5/factor, 1/factor), options=dict(xtol=1e-12))
    # a search by values finds the place to half the digits only
    assert 1/T == pytest.approx(found.x, rel=1e-6)
    assert nll(z/T, y) <= found.fun + 1e-15
    assert fit_temperature(z/T, y) == pytest.approx(1, rel=1e-12)
    assert top1(z/T, y) == top1(z, y)
    assert fit_temperature(z.softmax(1), y, from_logits=False) == pytest.approx(T, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, .01, 1e4, 1e9])
@pytest.mark.parametrize("n, c", [(1, 3), (7, 2), (400, 10)])
def test_the_temperature_goes_with_the_scale_of_the_logits(n, c, scale):
    z = made(n, c)[0]
    z[0] = torch.tensor([3., 2., *[-9.]*(c - 2)])
    y = z.argmax(1)
    y[:1 + n//10] = z[:1 + n//10].topk(2)[1][:, 1] # some are wrong, and all together better than chance
    one, other = estimate_temperature(z, y), estimate_temperature(scale*z + 5*scale, y)
    assert one.note is None and (one.low is None) == (n == 1)
    for a, b in zip(one, other): assert b == (pytest.approx(scale*a, rel=1e-9) if a else None)


def test_distances_and_cosines_are_logits():
    "Classes at the corners of a simplex, images around them: at T = 2 s^2, minus squared distances are exact"
    g, s = torch.Generator().manual_seed(0), 40.
    y = torch.randint(5, (4000,), generator=g)
    x = 60*torch.eye(5).double()[y] + s*torch.randn(4000, 5, generator=g, dtype=torch.float64)
    distances = torch.cdist(x, 60*torch.eye(5).double()).square()
    found = estimate_temperature(-distances, y)
    assert distances.mean() > 9000 and found.low < 2*s**2 < found.high and found.high/found.low < 1.2
    z, labels, _ = made(4000, 10)
    assert fit_temperature(.9 + .003*z, labels) == pytest.approx(.003*fit_temperature(z, labels), rel=1e-9)


SEPARABLE, CHANCE, CONSTANT = "every label is the top label", "no better than chance", "are equal"


@pytest.mark.parametrize("z, y, T, says", [
    ([[0., 2.]], [1], 2e-6, SEPARABLE), ([[0., 2.]], [0], 2e6, CHANCE),
    ([[3., 0.], [0., 1.]], [0, 1], 2e-6, SEPARABLE), ([[3., 0.], [0., 1.]], [1, 0], 2e6, CHANCE),
    ([[0., 0.]]*3, [0, 1, 0], 1, CONSTANT), ([[7.]*4], [2], 1, CONSTANT),
    ([[5., 5., 0.]]*2, [0, 1], 5/3*1e-6, SEPARABLE), # ties for the top: no image has a gap
])
def test_temperature_at_the_ends(z, y, T, says):
    with pytest.warns(UserWarning, match=says) as said: found = estimate_temperature(z, y)
    assert len(said) == 1 and found.T == pytest.approx(T, rel=1e-3)
    assert found.low is None and says in found.note
    with pytest.warns(UserWarning, match=says) as said: assert fit_temperature(z, y) == found.T
    assert len(said) == 1
    with pytest.warns(UserWarning, match=says) as said: scaled = Calibrator("ts").build(z, y)(torch.tensor(z))
    assert len(said) == 1 and scaled.isfinite().all()


def test_masked_classes_and_one_wild_image_do_not_move_the_range():
    z, y, p = made(300, 6, 2.)
    T = fit_temperature(z, y)
    masked = torch.cat([z, torch.full((300, 1), -1e9)], 1)
    assert fit_temperature(masked, y) == pytest.approx(T, rel=1e-9)
    wild = torch.cat([z, z[:1]*0 + torch.tensor([1e8, 0, 0, 0, 0, 0])])
    assert fit_temperature(wild, [*y.tolist(), 0]) == pytest.approx(T, rel=1e-6)


def test_what_is_hardly_better_than_chance_has_a_minimum_far_away():
    z, y = [[0., 1., .5 + 1e-6]], [2]
    # the variance over the label's lead
    assert fit_temperature(z, y) == pytest.approx(1/6/(2/3*1e-6), rel=1e-3)


def test_some_masked_images_are_no_scale():
    rng = np.random.default_rng(2)
    z = 2*rng.normal(size=(1000, 10))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    for i in range(300): z[i, (y[i] + 1) % 10] = -1e9
    T = fit_temperature(z, y)
    assert all(nll(z/T, y) <= nll(z/t, y) for t in np.geomspace(.2, 20, 200))
    alone = np.vstack([z[300:], [1e10] + [0]*9])
    assert fit_temperature(alone, [*y[300:], 0]) == pytest.approx(fit_temperature(z[300:], y[300:]), rel=1e-9)


@pytest.mark.parametrize("factor", [1e-300, 1e-160, 1e160, 1e300])
def test_a_temperature_follows_any_scale(factor):
    z, y, _ = made(300, 6, 2.)
    T, far = estimate_temperature(z, y), estimate_temperature(factor*z, y)
    assert [far.T, far.low, far.high] == pytest.approx([factor*t for t in (T.T, T.low, T.high)], rel=1e-9)


@pytest.mark.parametrize("n, c, factor", [(300, 10, 1.5), (2000, 3, .4), (800, 100, 3.)])
def test_the_temperatures_interval_is_that_of_the_bootstrap(n, c, factor):
    z, y, _ = made(n, c, factor)
    draws = torch.randint(n, (200, n), generator=torch.Generator().manual_seed(1))
    again = np.log([_find_temperature(z[k], y[k]).T for k in draws])
    found = estimate_temperature(z, y)
    assert found.low*found.high == pytest.approx(found.T**2)
    assert np.log(found.high/found.T)/1.96 == pytest.approx(again.std(), rel=.2) # 4 sd of 200 draws' spread


def test_the_temperatures_interval_covers():
    hits = sum(f.low <= 1.7 <= f.high for f in (estimate_temperature(*made(500, 5, 1.7, seed=s)[:2])
                                                for s in range(300)))
    assert hits >= 274, hits # at 95% fewer have a chance of .4%


@pytest.mark.parametrize("n, c", [(5, 2), (40, 3), (3000, 50)])
def test_cross_fitted_temperatures_are_those_of_the_other_four_fifths(n, c):
    z, y, _ = made(n, c, 2., seed=3)
    T = cross_fitted_temperatures(z, y, 1, 2.)
    fold = np.random.default_rng(1).permutation(n) % 5
    for k in range(5):
        rest = torch.from_numpy(fold != k)
        with warnings.catch_warnings(action="ignore"): expected = fit_temperature(z[rest], y[rest])
        assert T[~rest].tolist() == pytest.approx([expected]*int((~rest).sum()), rel=1e-9)


def test_pieces_of_a_large_set_give_the_same_derivatives():
    z, y, _ = made(5000, 40, 1.5)
    first, second = _nll_derivatives(z, y, 1., .8) # in four pieces
    d = z - z.gather(1, y[:, None])
    q = (.8*d).softmax(1)
    assert torch.allclose(first, (q*d).sum(1), rtol=1e-12)
    assert torch.allclose(second, (q*(d - first[:, None]).square()).sum(1), rtol=1e-9, atol=1e-12)


# -- against the truth --------------------------------------------------------

def test_against_the_truth():
    z, _, p = made(20_000, 5, 1.8)
    assert true_calibration_error(p, p) == pytest.approx(0, abs=1e-12) == kl_to_truth(p, p)
    labels = p.multinomial(1, generator=torch.Generator().manual_seed(7)).squeeze(1)
    assert true_calibration_error(softmax64(z), p) == pytest.approx(ece(z, labels), abs=.01)
    assert (kl_to_truth(softmax64(z), p)
            == pytest.approx(nll(z, labels) - float(-(p*p.log()).sum(1).mean()), abs=.03))
    assert kl_to_truth([[1., 0.]], [[.5, .5]]) == math.inf


# -- a score in parts ---------------------------------------------------------

def test_corp_by_hand_with_confidences_in_the_wrong_order():
    """Four of .6, three of them correct, and four of .9, of which two are: pooled to
    5/8, nothing is discriminated
    """
    p, y = binary([.6]*4 + [.9]*4, [1, 1, 1, 0, 1, 1, 0, 0])
    corp = corp_decomposition(p, y, from_logits=False)
    score = (3*.16 + .36 + 2*.01 + 2*.81)/8
    assert corp["brier"] == pytest.approx((score, score - 15/64, 0, 15/64), abs=1e-12)
    entropy = -(5*math.log(5/8) + 3*math.log(3/8))/8
    score = -(3*math.log(.6) + math.log(.4) + 2*math.log(.9) + 2*math.log(.1))/8
    assert corp["log"] == pytest.approx((score, score - entropy, 0, entropy), abs=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 80), st.sampled_from((.3, 1., 4., 60.)))
def test_parts_of_corp_add_up_and_are_never_negative(seed, n, factor):
    z, y, _ = made(n, 3, factor, seed=seed)
    for name, c in corp_decomposition(z, y).items():
        assert min(c) >= -1e-12 and c.uncertainty <= (.25 if name == "brier" else math.log(2)) + 1e-12
        if math.isfinite(c.score):
            assert c.score == pytest.approx(c.miscalibration - c.discrimination + c.uncertainty, abs=1e-9)
    p, correct = top_label(z, y, True)
    assert corp_decomposition(z, y)["brier"].score == pytest.approx(float((p - correct).square().mean()))


def test_what_was_pooled_has_no_miscalibration_and_an_increasing_function_changes_no_other_part():
    z, y, _ = made(500, 2, 2.)
    p, correct = (t[:, 0].numpy() for t in top_label(z, y, True))
    assert corp_decomposition(z, y)["brier"].miscalibration > .01
    from sklearn.isotonic import IsotonicRegression
    pooled = IsotonicRegression().fit_transform(p, correct)
    keep = pooled > .5 # those whose top label stays on top
    q, labels = binary(pooled[keep].tolist(), correct[keep].tolist())
    again = corp_decomposition(q, labels, from_logits=False)
    assert [again[k].miscalibration for k in again] == pytest.approx([0, 0], abs=1e-12)
    one, other = corp_decomposition(z, y), corp_decomposition(5*z, y)
    for k in one: assert one[k][2:] == pytest.approx(other[k][2:]) and other[k].score > one[k].score


def test_a_certain_mistake_has_an_infinite_log_score():
    corp = corp_decomposition([[1., 0.], [.7, .3]], [1, 0], from_logits=False)
    assert corp["log"].score == corp["log"].miscalibration == math.inf
    assert math.isfinite(corp["log"].discrimination) and math.isfinite(corp["brier"].score)


def test_root_mean_square_is_torchmetrics_l2():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    for n, c, factor in ((990, 10, 1.5), (3000, 3, .6)):
        z, y, _ = made(n, c, factor)
        theirs = float(torchmetrics.multiclass_calibration_error(softmax64(z), y, c, n_bins=15, norm="l2"))
        assert calibration_error("rms", z, y, 15, True) == pytest.approx(theirs, abs=1e-6)


@given(st.integers(5, 60), st.integers(2, 5), st.floats(.3, 3), st.integers(0, 10**6))
def test_signed_errors_are_the_parts_of_ece(n, c, factor, seed):
    z, y, _ = made(n, c, factor, seed=seed)
    over, under = signed_errors(z, y)
    assert over + under == pytest.approx(ece(z, y)) and min(over, under) >= 0
    assert over - under == pytest.approx(float(softmax64(z).amax(1).mean()) - top1(z, y))
    assert ece(z, y) <= calibration_error("rms", z, y, 15, True) + 1e-12 <= mce(z, y) + 1e-9


def test_the_root_mean_square_covers():
    hits = 0
    for seed in range(60):
        z, y, p = made(1000, 4, 1.3, seed=seed)
        e = calibration_estimates(z, y, "rms", n_draws=200, seed=seed)["rms"]
        top = z.argmax(1, keepdim=True)
        known = BinaryPredictions(softmax64(z).gather(1, top), p.gather(1, top))
        hits += e.low <= binned_error(METRICS["rms"], known, 15) <= e.high
    assert hits >= 53 # of 60 at 95%, fewer have a chance of 1%
