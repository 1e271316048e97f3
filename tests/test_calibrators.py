"""Every method by name: it trains, holds at the edges, keeps its state; what remembers, against plain loops;
what comes after training.
"""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_nb.values import encode, spec_hash
from kdc_nb.calibration.metrics import nll, top1
from kdc_nb.calibration.posthoc import Calibrator
from kdc_nb.calibration.outputs import softmax64
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.methods import Method, TrainingStep, _AdaFocal, _update_gamma
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.trainer import fit
from kdc_nb.experiments.results import read_results, recalibrate, write_results
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import RunSpec
from kdc_nb.experiments.store import Store, build_net
from tests.conftest import made

TINY = DataSpec("known", n_train=200, n_valid=100, n_test=300)
METHODS = sorted(Method.registry)
SWITCHES = [Method("ls", exclude_target=True), Method("mmce", double_normalised=True),
            Method("acls", as_published=True), Method("mdca", gamma=2)]


def test_all_of_the_papers_methods_are_there():
    "Tables 1 and 2; TS comes after training, KD is a student's method."
    assert {"nll", "ls", "mmce", "mixup", "crl", "pskd", "mdca", "adafocal",
            "cpc", "mbls", "acls", "focal", "flsd", "dca"} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_its_calibration_is_reported(tmp_path, name):
    "Better than guessing on new images after a few epochs, and every metric is a number."
    result = run(RunSpec(TINY, "resnet8", name, Recipe(8, 50)), Store(tmp_path), "cpu", progress=False)
    raw, scaled = result.evaluation.raw, result.evaluation.scaled
    assert raw["top1"].value > .2 and result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(np.isfinite([e.value, e.low, e.high, e.null_low, e.null_high]).all()
               for e in (*raw.values(), *scaled.values()))
    assert 0 <= result.raw.metrics["error"].value <= 1


@pytest.mark.parametrize("name", ["pskd", "crl", "adafocal", "mixup"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, name):
    "State and random draws come back with the checkpoint."
    spec, recipe, data = RunSpec(TINY, "resnet8", name, Recipe(5, 50)), Recipe(5, 50), load_data(TINY)
    through, stopped, method = build_net(spec), build_net(spec), Method(name).build()
    a = fit(through, data, method, recipe, device="cpu", progress=False)

    class Stops(type(method)):
        def after_epoch(self, epoch, *valid):
            if epoch == 3: raise KeyboardInterrupt
            super().after_epoch(epoch, *valid)
    with pytest.raises(KeyboardInterrupt):
        fit(build_net(spec), data, Stops(), recipe, device="cpu",
            checkpoint=tmp_path/"x", checkpoint_every=0, progress=False)
    b = fit(stopped, data, Method(name).build(), recipe,
            device="cpu", checkpoint=tmp_path/"x", progress=False)
    assert a.history == b.history
    for there, here in ((through, stopped), (a.method, b.method)):
        assert all(torch.equal(x, y)
                   for x, y in zip(there.state_dict().values(), here.state_dict().values(), strict=True))


def batch(B, C, right, scale=3.):
    "Logits and labels of a batch of which all, none or some are correct."
    z = scale*torch.randn(B, C, generator=torch.Generator().manual_seed(B + C))
    best = z.argmax(1)
    labels = {"all": best, "none": (best + 1) % C,
              "some": torch.where(torch.arange(B) % 2 == 0, best, (best + 1) % C)}[right]
    return z.requires_grad_(), labels


@pytest.mark.parametrize("method", [Method(m) for m in METHODS] + SWITCHES, ids=str)
@pytest.mark.parametrize("right", ["all", "none", "some"])
@pytest.mark.parametrize("B, C", [(1, 2), (1, 5), (6, 2), (6, 5)])
def test_the_edges(method, right, B, C):
    """One sample, two classes, all or none right: a finite loss with a finite gradient, and
    looking back does not fail.
    """
    own, (z, y) = method.build(), batch(B, C, right)
    own.before_fit(B, C, epochs=2)
    for epoch in range(2):
        _, targets = own.mix_batch(torch.randn(B, 3, 8, 8), y,
                                   own.draw_epoch(1, torch.Generator().manual_seed(epoch))[0])
        loss = own(TrainingStep(z, targets, torch.arange(B), torch.tensor(epoch)))
        gradient, = torch.autograd.grad(loss, z)
        assert loss.isfinite() and gradient.isfinite().all()
        own.after_epoch(epoch, z.detach(), y)
    assert all(b.isfinite().all() for b in own.buffers())


@pytest.mark.parametrize("name", METHODS)
def test_a_nan_is_told_and_not_crashed_on(name):
    own, (z, y) = Method(name).build(), batch(6, 5, "some")
    own.before_fit(6, 5, epochs=2)
    z = z.detach().index_fill(0, torch.tensor([2]), float("nan"))
    _, targets = own.mix_batch(torch.randn(6, 3, 8, 8), y, own.draw_epoch(1, torch.Generator())[0])
    assert own(TrainingStep(z, targets, torch.arange(6), torch.tensor(0))).isnan()
    own.after_epoch(0, z, y)


@pytest.mark.parametrize("bad, words", [
    (dict(name="ls", eps=2), "eps: got 2.0"), (dict(name="focal", gamma=-1), "gamma: got -1.0"),
    (dict(name="mdca", beta=-1), "beta: got -1.0"),
    (dict(name="mbls", margin=-1), "margin: got -1.0"),
    (dict(name="cpc", exclusion=-1), "exclusion: got -1.0"), (dict(name="mixup", a=0), "a: got 0.0"),
    (dict(name="adafocal", rate=0), "rate: got 0.0"), (dict(name="pskd", alpha=1.1), "alpha: got 1.1"),
    (dict(name="crl", beta=-1), "beta: got -1.0"),
    (dict(name="mmce", double_normalised=3), "double_normalised: got 3"),
])
def test_a_description_refuses_strengths_that_mean_nothing(bad, words):
    with pytest.raises(ValueError, match=words): RunSpec("known", "resnet8", Method(**bad))


def test_switches_that_are_off_leave_old_descriptions_as_they_were():
    assert encode(Method("ls")) == {"kind": "Method", "name": "ls", "eps": .05}
    assert spec_hash(Method("ls", exclude_target=True)) != spec_hash(Method("ls"))


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(2, 6))
def test_adafocal_looks_back_as_a_plain_loop_does(seed, n, C):
    rng = np.random.default_rng(seed)
    z, y = 3*rng.normal(size=(n, C)), rng.integers(C, size=n)
    own = _AdaFocal(rate=2.)
    own.before_fit(n, C, epochs=1)
    before = torch.from_numpy(rng.choice([-1.5, -.25, .25, 1., 19.5], 15)).float()
    own.gamma.copy_(before)
    own.after_epoch(0, torch.from_numpy(z).float(), torch.from_numpy(y))
    sure, right = torch.from_numpy(z).float().softmax(1).amax(1).numpy(), z.argmax(1) == y
    edges = own.edges.double().numpy()
    assert np.allclose(edges, np.quantile(sure, np.arange(1, 15)/15), atol=1e-6), "equal mass"
    for b in range(15):
        mine = [i for i in range(n) if sum(s < sure[i] for s in own.edges.numpy()) == b]
        gap = np.mean([sure[i] - right[i] for i in mine]) if mine else 0.
        g = float(before[b])*np.exp(2*np.sign(float(before[b]))*gap)
        if abs(g) < .2: g = -np.sign(g)*.2
        assert float(own.gamma[b]) == pytest.approx(min(20, max(-2, g)), abs=2e-4)


@given(st.lists(st.floats(-2, 20).filter(lambda g: abs(g) >= .2), min_size=1, max_size=15),
       st.floats(-1, 1), st.floats(.1, 3))
def test_adafocals_strengths_stay_in_range_and_off_zero(gamma, gap, rate):
    g = torch.tensor(gamma)
    new = _update_gamma(g, torch.full_like(g, gap), rate)
    assert ((new >= -2) & (new <= 20) & (new.abs() >= .2 - 1e-6)).all()
    if gap > 0: assert (new[g > 0] >= g[g > 0]).all(), "overconfident: harder on sure samples"


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 5))
def test_crl_counts_as_a_plain_loop_does(seed, n, epochs):
    rng, own = np.random.default_rng(seed), Method("crl").build()
    own.before_fit(n, 3, epochs)
    times = [0]*n
    for epoch in range(epochs):
        y, z = rng.integers(3, size=n), rng.normal(size=(n, 3))
        order = torch.from_numpy(rng.permutation(n))
        for i in order.split(4): own(TrainingStep(torch.from_numpy(z).float()[i], torch.from_numpy(y)[i], i))
        own.after_epoch(epoch, None, None)
        times = [t + (z[i].argmax() == y[i]) for i, t in enumerate(times)]
        spread = epoch + 1 - min(times)
        expected = [(t - min(times))/spread if spread else 0. for t in times]
        assert own.correctness.tolist() == pytest.approx(expected)


def test_progressive_distillation_learns_from_what_was_said_an_epoch_ago():
    "By a loop over images, in NumPy."
    g = torch.Generator().manual_seed(0)
    method = Method("pskd", alpha=.6).build()
    method.before_fit(6, 3, epochs=3)
    y, said = torch.tensor([0, 1, 2, 0, 1, 2]), {}
    for epoch in range(3):
        now = {}
        for index in torch.randperm(6, generator=g).split(2):
            z = torch.randn(2, 3, generator=g, dtype=torch.float64).float()
            losses = []
            for row, i in zip(z.double().numpy(), index.tolist()):
                p = np.exp(row)/np.exp(row).sum()
                one, a = np.eye(3)[y[i]], .6*(epoch + 1)/3
                losses.append(-(((1 - a)*one + a*said.get(i, one))*np.log(p)).sum())
                now[i] = p
            assert (float(method(TrainingStep(z, y[index], index, torch.tensor(epoch))))
                    == pytest.approx(np.mean(losses), abs=1e-5))
        method.after_epoch(epoch, None, None)
        said = now


@given(st.floats(.1, 4), st.integers(0, 2**31))
def test_mixup_shares(a, seed):
    "From 0 to 1, the same for the same generator; images and targets are blended alike."
    own = Method("mixup", a=a).build()
    own.before_fit(4, 3, epochs=1)
    first, again = (own.draw_epoch(50, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, again) and ((first >= 0) & (first <= 1)).all()
    labels = torch.tensor([0, 1, 2, 0])
    x = torch.eye(3)[labels]
    mixed, targets = own.mix_batch(x, labels, first[0])
    assert torch.equal(mixed, targets)


@pytest.mark.parametrize("how", sorted(Calibrator.registry))
def test_post_hoc_calibrators_lower_the_nll_of_what_they_are_fitted_on(how):
    z, y, _ = made(n=3000, factor=3.)
    after = Calibrator(how).build(z, y)
    assert nll(after(z), y) < nll(z, y) and after(z[:1]).shape == (1, 5), "one image alone is answered too"
    new, labels, _ = made(n=3000, factor=3., seed=1)
    assert nll(after(new), labels) < nll(new, labels) and top1(after(new), labels) > top1(new, labels) - .02


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(2, 5), st.floats(.3, 4))
def test_vector_scaling_is_the_minimum(seed, C, factor):
    "Where the slopes for factors and offsets vanish; the problem is convex, so there is no other."
    z, y, _ = made(n=400, c=C, factor=factor, seed=seed)
    p = softmax64(Calibrator("vector").build(z, y)(z)) - torch.nn.functional.one_hot(y, C)
    assert p.mean(0).abs().max() < 1e-6 and (p*z).mean(0).abs().max() < 1e-6


def test_isotonic_is_scikit_learns():
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.frozen import FrozenEstimator

    class AsIs(ClassifierMixin, BaseEstimator):
        def fit(self, z, y): self.classes_ = np.unique(y); return self
        def predict_proba(self, z): return softmax64(torch.as_tensor(z)).numpy()
        def predict(self, z): return z.argmax(1)
    z, y, _ = made(n=2000, factor=2.)
    theirs = (CalibratedClassifierCV(FrozenEstimator(AsIs().fit(z, y)), method="isotonic")
              .fit(z, y).predict_proba(z))
    ours = softmax64(Calibrator("isotonic").build(z, y)(z)).numpy()
    assert np.abs(ours - theirs).max() < 2e-3, "but for steps at 0 and 1, which are 1/(N+2) here"


def test_a_result_after_any_post_hoc_calibrator(tmp_path):
    result = run(RunSpec(TINY, "resnet8", "nll", Recipe(4, 50)), Store(tmp_path), "cpu", progress=False)
    for how in Calibrator.registry:
        after = recalibrate(result, how)
        assert after.spec == result.spec and after.facts["after"].name == how and after.evaluation.n == 300
        write_results([after], tmp_path/"after.npz")
        (back,) = read_results(tmp_path/"after.npz").values()
        assert back.title() == after.title() and back.title().endswith(f"after {how}")
    with pytest.raises(ValueError, match="Calibrator: got 'beta'"): recalibrate(result, "beta")


def test_isotonic_regression_of_other_classes_is_told():
    r = np.random.default_rng(0)
    after = Calibrator("isotonic").build(r.normal(size=(60, 4)), np.arange(60) % 4)
    for c in (3, 5):
        with pytest.raises(ValueError, match=f"logits: got {c} classes, expected 4, as in the fit"):
            after(r.normal(size=(9, c)))


def test_a_class_that_cannot_be_does_not_stop_vector_scaling():
    "Its logit times 0 has no gradient; far below the others it is the same"
    z, y, _ = made(400, 3)
    z = 1.5*z
    z[(y == 0) & (z[:, 2] < 0), 2] = -torch.inf
    calibrate, like = (Calibrator("vector").build(x, y) for x in (z, z.clamp(min=-60)))
    assert torch.equal(calibrate(z) == -torch.inf, z == -torch.inf)
    assert abs(nll(calibrate(z), y) - nll(like(z.clamp(min=-60)), y)) < 1e-4
    assert nll(calibrate(z), y) < nll(z, y)
    with pytest.raises(ValueError, match=r"logits: got shape \(5, 2\), expected \(N, 3\), as in the fit"):
        calibrate(z[:5, :2])


def test_vector_scaling_warns_of_a_class_that_its_images_tell_apart_perfectly():
    "Nothing holds its offset; of the same images with one label of another class something does"
    z, y, _ = made(400, 3)
    z[:, 2] = torch.where(y == 2, 20., -20.) + z[:, 2]/10
    with pytest.warns(UserWarning, match="vector scaling: 400 images tell class 2 apart perfectly"):
        Calibrator("vector").build(z, y)
    y[(y == 2).nonzero()[0]] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Calibrator("vector").build(z, y)


def test_a_calibrator_that_writes_leaves_the_result_as_it_was(tmp_path):
    @Calibrator.register("halved")
    def halved(logits, labels):
        logits.zero_()
        return lambda z: z.div_(2)
    spec = RunSpec(DataSpec("known", n_train=40, n_valid=20, n_test=20), "resnet8", "nll", Recipe(1, 20))
    result = run(spec, Store(tmp_path), "cpu", progress=False)
    before = {k: z.clone() for k, z in result.logits.items()}
    after = recalibrate(result, "halved")
    for k, z in before.items():
        assert torch.equal(result.logits[k], z) and torch.equal(after.logits[k], z/2)
    assert not result.logits["test"].is_inference(), "gradients can be had of it, as from the store"
