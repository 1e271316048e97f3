"Explorers without a browser: every control moves the picture, nothing is made or computed twice, bad input is told."
import pytest
import torch
from matplotlib.axes import Axes

import kdc_nb.explorers as explorers
from kdc_nb.data import Data
from kdc_nb.explorers import crowd, explore_classes, explore_method, explore_reliability, explore_transfer
from kdc_nb.penultimate import look
from kdc_nb.runs import Distil, Posterior, RunSpec, Store, from_light, light_of, run
from kdc_nb.training import Recipe

DATA, RECIPE = Data("known", n_train=100, n_valid=60, n_test=300), Recipe(1, 32)
TEACHER = RunSpec(DATA, "resnet8", "nll", RECIPE)
STUDENTS = [RunSpec(DATA, "resnet8", Distil(t, T, a), RECIPE) for t in (TEACHER, Posterior(.5), Posterior(2.)) for T, a in ((1, .5), (4, .5), (1, 1), (4, 1)) if (T, a) != (4, 1)]


@pytest.fixture(scope="module")
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp("explorers"))


@pytest.fixture(scope="module")
def results(store): return {s: run(s, store, "cpu", progress=False) for s in (TEACHER, *STUDENTS)}


@pytest.fixture(scope="module")
def looks(store, results): return {s: look(s, store, "cpu", per_class=4) for s in (TEACHER, *STUDENTS[:3])}


@pytest.fixture
def outputs():
    g = torch.Generator().manual_seed(0)
    return 2*torch.randn(500, 5, generator=g), torch.randint(0, 5, (500,), generator=g)


def every_control(explorer, monkeypatch, **values):
    "Move each control to a value and back: other pictures, then the same; no artist is made"
    for kind in ("plot", "scatter", "bar", "stairs", "fill_between", "vlines", "imshow", "text", "legend"):
        monkeypatch.setattr(Axes, kind, lambda *a, **k: pytest.fail("an artist was made again"))
    first = bytes(explorer.image.value)
    assert first[1:4] == b"PNG"
    for name, value in values.items():
        control = explorer.controls[name]
        before, control.value = control.value, value
        assert bytes(explorer.image.value) != first and not explorer.refusal.value, name
        control.value = before
        assert bytes(explorer.image.value) == first, name


def test_reliability_of_your_own_logits(outputs, monkeypatch):
    explorer = explore_reliability(*outputs)
    every_control(explorer, monkeypatch, T=2., n_bins=7)


def test_nothing_is_computed_twice(outputs, monkeypatch):
    calls, real = [], explorers.prepare_tempered
    monkeypatch.setattr(explorers, "prepare_tempered", lambda *a: calls.append(a[2:]) or real(*a))
    explorer = explore_reliability(*outputs)
    for T in (2., 1., 2., 1.): explorer.controls["T"].value = T
    assert calls == [(1., 15), (2., 15)]


def test_reliability_of_probabilities_is_that_of_their_logits(outputs):
    logits, labels = outputs
    a, b = explore_reliability(logits, labels), explore_reliability(logits.softmax(1), labels, kind="probs")
    for e in (a, b): e.controls["T"].value = 2.
    assert bytes(a.image.value) == bytes(b.image.value)


def test_reliability_of_a_run(results, monkeypatch):
    result = results[TEACHER]
    every_control(explore_reliability(result), monkeypatch, T=.5)
    with pytest.raises(ValueError, match="outputs: got a result from a light file, without logits"): explore_reliability(from_light(light_of(result)))


@pytest.mark.parametrize("spoil, message", [
    (lambda z, y: (z, None), "labels: got none"),
    (lambda z, y: (z, y[:9]), "labels: got 9 of them"),
    (lambda z, y: (z[:, 0], y), r"logits: got shape \(500,\)"),
    (lambda z, y: (z.index_fill(0, torch.tensor([3]), float("nan")), y), "logits: got NaN"),
    (lambda z, y: (z, y + 1), "labels: got 1 to 5, expected 0 to 4"),
    (lambda z, y: (z, y, "odds"), "kind: got 'odds'"),
    (lambda z, y: (z, y.float() + .5), "labels: got numbers with a fraction"),
])
def test_bad_outputs_are_told(outputs, spoil, message):
    with pytest.raises(ValueError, match=message): explore_reliability(*spoil(*outputs))


@pytest.mark.parametrize("family, values", [
    ("targets", dict(eps=.6, alpha=1., teacher=.2)), ("weights", dict(gamma=-1.)),
    ("logits", dict(penalty="BDC of CPC", beta=2., margin=1.)), ("batches", dict(penalty="MMCE", beta=9., overconfidence=.3)),
])
def test_methods_follow_every_control(family, values, monkeypatch): every_control(explore_method(family), monkeypatch, **values)


def test_the_crowd_is_as_wrong_about_itself_as_it_is_said_to_be():
    "Always the same answers; the surer they are by the factor, the fewer are right"
    right = [float((z.argmax(1) == y).float().mean()) for z, y in map(crowd, (.2, 1., 4.))]
    assert torch.equal(crowd(.2)[0], crowd(4.)[0]) and right[0] > right[1] > right[2]


def test_transfer_follows_every_control(results, monkeypatch):
    every_control(explore_transfer(results), monkeypatch, T=4., alpha=1., teacher="the truth at tau=2")


def test_what_is_not_stored_is_said(results):
    explorer = explore_transfer(results)
    explorer.controls["T"].value = 4.
    before = bytes(explorer.image.value)
    explorer.controls["alpha"].value = 1.
    assert "expected those of a stored student" in explorer.refusal.value and bytes(explorer.image.value) == before
    explorer.controls["T"].value = 1.
    assert not explorer.refusal.value and bytes(explorer.image.value) != before


def test_a_grid_with_holes_begins_with_a_student_there_is(results):
    few = {s: r for s, r in results.items() if s == TEACHER or (s.method.T, s.method.alpha) in ((4, .5), (1, 1))}
    explorer = explore_transfer(few)
    assert explorer.image.value and not explorer.refusal.value


def test_looks_of_several_seeds_are_refused(looks):
    other = [RunSpec(DATA, s.model, s.method, s.recipe, 1) for s in looks if s != TEACHER]
    with pytest.raises(ValueError, match="looks: got 2 kinds of students, expected one"): explore_classes({**looks, **{s: looks[STUDENTS[0]] for s in other}})


def test_classes_follow_every_control(looks, monkeypatch):
    explorer = explore_classes(looks)
    other = next(k for k in range(20) if k not in [explorer.controls[c].value for c in "abc"])
    every_control(explorer, monkeypatch, T=4., alpha=1., a=other, b=other, c=other, split="train", images=True)


def test_images_that_are_not_there_are_told(looks, monkeypatch):
    def none(data): raise ValueError("known: put it there")
    explorer = explore_classes(looks)
    monkeypatch.setattr("kdc_nb.penultimate.load_data", none)
    before = bytes(explorer.image.value)
    explorer.controls["images"].value = True
    assert "known: put it there" in explorer.refusal.value and bytes(explorer.image.value) == before
