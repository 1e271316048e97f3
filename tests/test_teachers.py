"""Teachers beyond one network: what they say, whom they ask about what, and that they
are values like all others.
"""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from kdc_nb.files import DamagedFile
from kdc_nb.training.data import DataSpec, LeaveFoldOut, load_data
from kdc_nb.training.images import register_images
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.agenda import read_specs, write_specs
from kdc_nb.experiments.runs import RunContext, has_live_teacher, run, teacher_train_logits
from kdc_nb.experiments.specs import Distil, RunSpec, lineage, reseed_lineage, teacher_label
from kdc_nb.experiments.sweeps import sweep
from kdc_nb.experiments.teachers import (
    Ensemble, OutOfFold, StoredLogits, TemperatureScaled, TemperedPosterior, log_mean_probs,
    teacher_from_logits,
)
from tests.conftest import forget_data, patch_name

TINY = DataSpec("known", n_train=100, n_valid=60, n_test=80)
NET = RunSpec(TINY, "resnet8", Method("nll"), Recipe(2, 50))


def go(spec, store): return run(spec, store, "cpu", progress=False)
def softmax(z):
    return np.exp(z - z.max(-1, keepdims=True))/np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 9999))
def test_the_mean_is_that_of_the_probabilities(n, c, seed):
    z = torch.randn(n, 3, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)*20
    assert log_mean_probs(list(z)).exp().numpy() == pytest.approx(softmax(z.numpy()).mean(0), abs=1e-12)


def test_an_ensemble_says_the_mean_of_what_its_networks_say(store):
    ensemble = Ensemble(NET, 3)
    for r in ensemble.required_runs(): go(r, store)
    alone = [teacher_train_logits(r, TINY, RunContext(store, "cpu")).double().numpy()
             for r in ensemble.required_runs()]
    assert not np.allclose(alone[0], alone[1]), "other seeds, other networks"
    together = teacher_train_logits(ensemble, TINY, RunContext(store, "cpu")).double().numpy()
    assert softmax(together) == pytest.approx(np.mean([softmax(z) for z in alone], 0), abs=1e-5)


def test_an_ensemble_is_scaled_by_the_temperature_of_its_mean(store):
    ensemble = Ensemble(NET, 2)
    p = np.mean([softmax(go(r, store).logits["valid"].double().numpy()) for r in ensemble.required_runs()], 0)
    y = load_data(TINY).valid.labels.numpy()
    nll = lambda u: -np.log(softmax(u*np.log(p))[range(len(y)), y]).mean()
    u = minimize_scalar(nll, bounds=(.01, 100), method="bounded", options={"xatol": 1e-8}).x
    plain, scaled = (teacher_train_logits(t, TINY, RunContext(store, "cpu"))
                     for t in (ensemble, TemperatureScaled(ensemble)))
    assert (scaled/plain).numpy() == pytest.approx(u, rel=1e-3)


def test_networks_that_teach_alone_are_scaled_alone(store):
    "An out-of-fold teacher's temperature suits single networks, not their mean, which is less confident."
    folds = OutOfFold(replace(NET, recipe=Recipe(8, 50)), 2)
    z = np.concatenate([go(r, store).logits["valid"].double().numpy() for r in folds.required_runs()])
    y = np.tile(load_data(TINY).valid.labels.numpy(), 2)
    nll = lambda u: -np.log(softmax(u*z)[range(len(y)), y]).mean()
    u = minimize_scalar(nll, bounds=(.01, 100), method="bounded", options={"xatol": 1e-8}).x
    plain, scaled = (teacher_train_logits(t, TINY, RunContext(store, "cpu"))
                     for t in (folds, TemperatureScaled(folds)))
    assert (scaled/plain).numpy() == pytest.approx(u, rel=1e-3)


def test_nobody_is_asked_about_an_image_that_he_has_seen(store):
    "Each image's answer is that of a network in whose training set it is not."
    folds, data = OutOfFold(NET, 3), load_data(TINY)
    for r in folds.required_runs(): go(r, store)
    said = teacher_train_logits(folds, TINY, RunContext(store, "cpu"))
    seen = [{x.numpy().tobytes() for x in load_data(r.data).train.inputs} for r in folds.required_runs()]
    alone = [teacher_train_logits(r, TINY, RunContext(store, "cpu")) for r in folds.required_runs()]
    for i, x in enumerate(data.train.inputs):
        strangers = [k for k in range(3) if x.numpy().tobytes() not in seen[k]]
        assert len(strangers) == 1 and torch.allclose(said[i], alone[strangers[0]][i], atol=1e-5)


def test_folds_are_cut_out_of_everything_that_is_known_of_an_image():
    whole, part = load_data(TINY), load_data(LeaveFoldOut(TINY, 1, 4))
    keep = [i for i in range(100) if i % 4 != 1]
    for name, t in vars(whole.train).items(): assert torch.equal(getattr(part.train, name), t[keep]), name
    assert (part.valid is whole.valid and part.test is whole.test
            and (part.mean, part.std) == (whole.mean, whole.std))


def test_folds_and_members_are_trained_once_and_first(store):
    student = replace(NET, method=Distil(OutOfFold(NET, 2)))
    twice = replace(NET, method=Distil(TemperatureScaled(OutOfFold(NET, 2)), alpha=.5))
    assert [r.data for r in lineage(student)] == [LeaveFoldOut(TINY, 0, 2), LeaveFoldOut(TINY, 1, 2), TINY]
    results = sweep([student, twice, student], store, "cpu", progress=False)
    assert ([r.spec for r in results] == [student, twice, student]
            and len(list(store.folder.glob("*.run"))) == 4)


@pytest.mark.parametrize("kind", [Ensemble, OutOfFold])
def test_they_teach_live_too(store, kind, monkeypatch):
    "Asked at every step about the augmented images."
    data = DataSpec("digits", n_train=60, n_valid=40)
    net = RunSpec(data, "resnet8", "nll", Recipe(1, 30, augment=("crop",), live_teacher=True))
    student = replace(net, method=Distil(kind(net, 2)))
    assert has_live_teacher(student)
    patch_name(monkeypatch, "_predict_train",
               lambda *a: pytest.fail("looked up what was said of the plain images"))
    assert go(student, store).evaluation.n == len(load_data(data).test)


def test_folds_of_another_set_are_refused(store):
    "A position names another fold there."
    student = replace(NET, data=LeaveFoldOut(TINY, 0, 2), method=Distil(OutOfFold(NET, 2)))
    with pytest.raises(ValueError, match="teacher: got one whose folds are of Data"): go(student, store)


def test_what_was_given_teaches_in_other_processes(store):
    "The store holds what was said, so that workers find it."
    z = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    teacher = teacher_from_logits("random", z.numpy(), TINY, store)
    students = [replace(NET, method=Distil(teacher, T, 1.)) for T in (1, 4)]
    assert all(r.evaluation.n == 80 for r in sweep(students, store, "cpu", jobs=2, progress=False))
    assert (torch.equal(teacher_train_logits(teacher, TINY, RunContext(store, "cpu")), z)
            and teacher_label(students[0].method) == "random")


def test_a_function_is_asked_about_every_image_and_about_two_of_them_again(store):
    asked_about = []
    def teacher(x, index):
        asked_about.extend(index.tolist())
        assert x.dtype == torch.float32 and x.shape == (len(index), 3, 8, 8)
        return torch.zeros(len(index), 20) + index[:, None]
    given_ = teacher_from_logits("counts", teacher, TINY, store)
    assert (asked_about == [*range(100), 0, 1]
            and teacher_train_logits(given_, TINY, RunContext(store, "cpu"))[:, 0].tolist() == [*range(100)])


def test_other_words_are_another_teacher(store):
    z = torch.zeros(100, 20)
    assert (teacher_from_logits("a", z, TINY, store).fingerprint == teacher_from_logits("b", z, TINY, store)
            .fingerprint != teacher_from_logits("a", z + 1, TINY, store).fingerprint)


@pytest.mark.parametrize("said, message", [
    (torch.zeros(99, 20), r"logits: got shape \(99, 20\), expected \(100, 20\)"),
    (torch.full((100, 20), torch.nan), "NaN or infinity"),
    ("words", "no table of numbers"), (lambda x, index: torch.zeros(len(x), 3), r"shape \(100, 3\)"),
])
def test_what_is_no_teacher_is_refused(store, said, message):
    with pytest.raises(ValueError, match=message): teacher_from_logits("odd", said, TINY, store)
    assert not store.folder.exists()


def test_what_was_said_of_other_images_is_refused(store):
    teacher = teacher_from_logits("a", torch.zeros(100, 20), TINY, store)
    for other in (replace(NET, data=DataSpec("known", n_train=100, n_valid=60, n_test=80, seed=1)),
                  replace(NET, data=LeaveFoldOut(TINY, 0, 2))):
        with pytest.raises(ValueError, match="teacher: got a, with logits of other images"):
            go(replace(other, method=Distil(teacher)), store)


def test_a_damaged_or_foreign_file_is_told(store):
    teacher = teacher_from_logits("a", torch.zeros(100, 20), TINY, store)
    (path := next(store.folder.glob("*.said"))).write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DamagedFile, match=path.name): teacher.predictor(TINY, RunContext(store, "cpu"))
    for bad in ("../../secret", "", "0"*15):
        with pytest.raises(ValueError, match="16 hexadecimal digits"):
            StoredLogits("a", bad).predictor(TINY, RunContext(store, "cpu"))


@pytest.mark.parametrize("make", [
    lambda: Ensemble(NET, 1), lambda: OutOfFold(NET, 1),
    lambda: OutOfFold(replace(NET, data=LeaveFoldOut(TINY, 0, 2))),
    lambda: LeaveFoldOut(TINY, 2, 2), lambda: LeaveFoldOut(TINY, 0, 2.5),
    lambda: LeaveFoldOut(LeaveFoldOut(TINY, 0, 2), 0, 2),
    lambda: Ensemble(NET, 2.5), lambda: Ensemble(TemperatureScaled(NET)),
    lambda: OutOfFold(NET, "3"), lambda: OutOfFold(replace(NET, method=Distil(NET))),
    lambda: TemperatureScaled(TemperedPosterior()), lambda: TemperatureScaled(StoredLogits("a", "0"*16)),
    lambda: TemperatureScaled(TemperatureScaled(NET)), lambda: TemperatureScaled("net"),
    lambda: replace(NET, method=Distil(Ensemble(replace(NET, data=DataSpec("known")))))
])
def test_what_cannot_be_is_refused_where_it_is_written(make):
    said = "^(n_networks|n_folds|fold|run|data|teacher): got .* expected "
    with pytest.raises(ValueError, match=said): make()


def test_descriptions_survive_a_file(tmp_path):
    teachers = [Ensemble(NET, 2), TemperatureScaled(OutOfFold(NET, 3)),
                StoredLogits("a", "0"*16), TemperedPosterior(.5)]
    specs = [replace(NET, method=Distil(t)) for t in teachers]
    write_specs(specs, tmp_path/"x.json")
    assert read_specs(tmp_path/"x.json") == specs


def test_another_seed_is_one_all_the_way_down():
    spec = reseed_lineage(replace(NET, method=Distil(TemperatureScaled(Ensemble(NET, 2)))), 7)
    assert (spec.seed, [r.seed for r in spec.method.teacher.required_runs()]) == (7, [7, 1007])


def test_votes_of_people_teach(photos, store, tmp_path, monkeypatch):
    "CIFAR-10H's real votes: their majority is mostly the label, and they are distilled as any posterior is."
    data = DataSpec("cifar10h", n_train=60, n_valid=60)
    cache = tmp_path/"votes"
    (cache/"data").mkdir(parents=True)
    os.symlink(photos/"data/cifar10.safetensors", cache/"data/cifar10.safetensors")
    monkeypatch.setenv("KDC_CACHE", str(cache))
    forget_data()
    with pytest.raises(ValueError, match="put there by hand"): load_data(data)
    with np.load(Path(os.environ["KDC_TEST_DATA"])/"cifar-human-labels.npz", allow_pickle=False) as z:
        votes = z["cifar10h_counts"]
    np.save(cache/"data/cifar10h-counts.npy", votes)
    test = load_data(data).test
    agree = (test.posterior.argmax(1) == test.labels).float().mean()
    assert (len(test) == 9880 and .98 < agree < 1
            and torch.allclose(test.posterior.sum(1), torch.ones(len(test)), atol=1e-6))
    result = go(RunSpec(data, "resnet8", Distil(TemperedPosterior(), alpha=1), Recipe(1, 30)), store)
    assert 0 < result.raw.metrics["kl"].value < 10


class Foreign(torch.nn.Module):
    "A network as it comes out of someone's training, in training mode"
    def __init__(self, n_classes=20, wrap=lambda z: z):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
                                        torch.nn.Dropout(.5), torch.nn.Flatten(),
                                        torch.nn.Linear(144, n_classes))
        self.wrap = wrap
        self.body[0].eval() # frozen, as some layers are
    def forward(self, x, mask=None): # a second argument that is no index
        assert mask is None and not torch.is_grad_enabled()
        return self.wrap(self.body(x))


def said_by(teacher, store): return teacher_train_logits(teacher, TINY, RunContext(store, "cpu"))


@pytest.fixture
def foreign():
    torch.manual_seed(0)
    return Foreign()


def test_a_network_teaches_in_evaluation_mode_and_is_left_as_it_was(store, foreign):
    "Whatever mode it comes in; its statistics, and the modes of its layers, stay"
    before, modes = ({k: t.clone() for k, t in foreign.state_dict().items()},
                     [m.training for m in foreign.modules()])
    first, again = (teacher_from_logits("foreign", foreign, TINY, store) for _ in range(2))
    assert (first == again
            and [m.training for m in foreign.modules()] == modes == [True, True, False] + [True]*5)
    assert all(torch.equal(t, before[k]) for k, t in foreign.state_dict().items())
    d = load_data(TINY)
    with torch.no_grad(): expected = foreign.eval()(d.normalise(d.train.inputs))
    assert said_by(first, store).numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_logits_and_probabilities_teach_the_same(store, foreign):
    logits = teacher_from_logits("a", foreign, TINY, store)
    net = Foreign(wrap=lambda z: z.softmax(1))
    net.load_state_dict(foreign.state_dict())
    probs = teacher_from_logits("b", net, TINY, store, from_logits=False)
    assert (said_by(probs, store).softmax(1).numpy()
            == pytest.approx(said_by(logits, store).softmax(1).numpy(),
                             abs=1e-6))
    with pytest.warns(UserWarning, match="say from_logits=False"): teacher_from_logits("c", net, TINY, store)


def test_a_certain_probability_teaches_in_finite_numbers(store):
    hot = torch.nn.functional.one_hot(load_data(TINY).train.labels, 20).double()
    teacher = teacher_from_logits("sure", hot.numpy(), TINY, store, from_logits=False)
    assert said_by(teacher, store).isfinite().all()
    result = go(replace(NET, method=Distil(teacher, 2., .9)), store)
    assert np.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize("teacher", [
    lambda x: x.flatten(1)[:, :20], lambda x, index: x.flatten(1)[:, :20],
    lambda x, scale=1.: scale*x.flatten(1)[:, :20], lambda *both: both[0].flatten(1)[:, :20],
    lambda x, *, temperature=1.: x.flatten(1)[:, :20]/temperature,
    lambda x: x.flatten(1)[:, :20].numpy(), lambda x: x.flatten(1)[:, :20].clone().requires_grad_(),
    torch.nn.Sequential(torch.nn.Flatten(), torch.nn.AdaptiveAvgPool1d(20))])
def test_functions_of_one_and_two_arguments_teach(store, teacher):
    d = load_data(TINY)
    expected = d.normalise(d.train.inputs).flatten(1)
    expected = expected[:, :20] if not isinstance(teacher, torch.nn.Module) else teacher(expected)
    assert torch.equal(said_by(teacher_from_logits("some", teacher, TINY, store), store), expected)


@pytest.mark.parametrize("teacher, message", [
    # other weights each time
    (lambda x: Foreign()(x), "logits: got answers that differ by .*% when asked again"),
    (lambda x, net=Foreign(): net(x), "when asked again"), # in training mode: dropout
    (lambda x, net=Foreign(): net.body[:3](x).flatten(1)[:, :20], "when asked again"), # only BatchNorm
    (lambda x: x.flatten(1)[:, :20] - x.flatten(1)[:, :20].mean(0), "when asked again"), # others count
    (Foreign(wrap=lambda z: torch.nn.functional.dropout(z)), "when asked again"), # in evaluation mode, too
    (Foreign(wrap=lambda z: (z, z)),
     "logits: got a function that returns a tuple, expected one that returns"),
    (Foreign(wrap=lambda z: {"logits": z}), "returns a dict"), (lambda x: None, "returns a NoneType"),
    (Foreign(19), r"logits: got shape \(100, 19\), expected \(100, 20\)"),
    (lambda x: torch.zeros(len(x)), r"logits: got shape \(100,\), expected \(100, 20\)"),
    (lambda x: torch.zeros(len(x) - 1, 20), r"logits: got shape \(99, 20\)"),
    (lambda x: torch.full((len(x), 20), torch.inf), "NaN or infinity"),
    (lambda x: torch.full((len(x), 20), torch.nan), "NaN or infinity"),
    (lambda x: torch.where(torch.arange(20) < 3, -torch.inf, torch.ones(len(x), 20)),
     "logits: got infinity, expected finite numbers"),
    (np.full((100, 20), 1e300)*np.arange(20), "logits: got infinity, expected finite numbers in 32 bits"),
])
def test_a_teacher_that_cannot_be_meant_is_told(store, teacher, message):
    torch.manual_seed(0)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        teacher_from_logits("odd", teacher, TINY, store)
    assert not store.folder.exists()


def test_two_classes_may_be_taught_by_one_number(store):
    "A sigmoid's output, in a row or a column, is the probability of class 1"
    x = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    binary = register_images("binary", *[(x, torch.arange(40) % 2)]*3)
    p = x.float().mean((1, 2, 3))/255
    for shaped in (lambda x: (x*.25 + .5).mean((1, 2, 3)), lambda x: (x*.25 + .5).mean((1, 2, 3))[:, None]):
        d = load_data(binary)
        mean, std = (torch.tensor(s).view(3, 1, 1) for s in (d.mean, d.std))
        ask = lambda x: shaped((x*std + mean - .5)/.25) # noqa: B023
        z = teacher_train_logits(teacher_from_logits("one", ask, binary, store, from_logits=False), binary,
                                 RunContext(store, "cpu"))
        assert z.softmax(1)[:, 1].numpy() == pytest.approx(p.numpy(), abs=1e-5)
