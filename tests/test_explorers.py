"""Explorers without a browser: every control moves the picture, nothing is made or computed
twice, bad input is told.
"""
import re
from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import nbformat
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from nbclient import NotebookClient
from PIL import Image

import kdc_nb.calibration.diagrams as explorers
from kdc_nb.calibration.posthoc import fit_temperature
from kdc_nb.calibration.outputs import check_outputs_and_labels
from kdc_nb.training.data import DataSpec
from kdc_nb.training.images import register_images
from kdc_nb.training.loss_fields import _batch_context
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.results import result_from_json, result_to_json
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import Distil, RunSpec
from kdc_nb.experiments.store import Store
from kdc_nb.experiments.teachers import TemperedPosterior
from kdc_nb.experiments.transfer import TransferPlot, prepare_transfer
from kdc_nb.analysis.views import extract_features
from kdc_nb.bin_images import explore_bin_images
from kdc_nb.explorers import (
    explore_loss_gradients, explore_penultimate, explore_reliability, explore_transfer,
)
from tests.conftest import made, patch_name

DATA, RECIPE = DataSpec("known", n_train=100, n_valid=60, n_test=300), Recipe(1, 32)
TEACHER = RunSpec(DATA, "resnet8", "nll", RECIPE)
STUDENTS = [RunSpec(DATA, "resnet8", Distil(t, T, a), RECIPE)
            for t in (TEACHER, TemperedPosterior(.5), TemperedPosterior(2.))
            for T, a in ((1, .5), (4, .5), (1, 1), (4, 1)) if (T, a) != (4, 1)]


@pytest.fixture(scope="module")
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp("explorers"))


@pytest.fixture(scope="module")
def results(store): return {s: run(s, store, "cpu", progress=False) for s in (TEACHER, *STUDENTS)}


@pytest.fixture(scope="module")
def looks(store, results):
    return {s: extract_features(s, store, "cpu", per_class=4) for s in (TEACHER, *STUDENTS[:3])}


@pytest.fixture
def outputs():
    g = torch.Generator().manual_seed(0)
    return 2*torch.randn(500, 5, generator=g), torch.randint(0, 5, (500,), generator=g)


def every_control(explorer, monkeypatch, **values):
    "Move each control to a value and back: other pictures, then the same; no artist is made"
    for kind in ("plot", "scatter", "bar", "stairs", "fill_between", "vlines", "imshow", "text", "legend"):
        monkeypatch.setattr(Axes, kind, lambda *a, **k: pytest.fail("an artist was made again"))
    first = explorer.picture.value
    assert "<svg" in first
    for name, value in values.items():
        control = explorer.controls[name]
        before, control.value = control.value, value
        assert explorer.picture.value != first and not explorer.refusal.value, name
        control.value = before
        assert explorer.picture.value == first, name


def test_reliability_of_your_own_logits(outputs, monkeypatch):
    explorer = explore_reliability(*outputs)
    every_control(explorer, monkeypatch, T=2., n_bins=7, predicted=3)
    explorer.controls["predicted"].value = 3
    assert explorer.drawing.figure.axes[0].get_title().startswith("Is it class 3? T = 1, N = 500")


def test_a_second_model_beside_it(outputs, monkeypatch):
    logits, labels = outputs
    explorer = explore_reliability(logits, labels, other=logits/3)
    every_control(explorer, monkeypatch, T=2., n_bins=7, predicted=3, other_T=.5)
    explorer.move(T=3., other_T=1.)
    first, second = (dots.get_xydata() for dots in explorer.drawing.figure.axes[0].get_lines()[1:3])
    assert np.allclose(first, second), "one model at two temperatures"
    own, own_ece, beside, its_ece = explorer.drawing.figure.axes[0].get_title().split("\n")
    assert own.removeprefix("T = 3") == beside.removeprefix("The other: T = 1") and own_ece == its_ece


@pytest.mark.parametrize("spoil, message", [
    (lambda z, y: z[:9], "other: labels: got 500 of them, expected 9"),
    (lambda z, y: torch.cat([z, z], 1), r"other: got \(500, 10\) logits, expected .* \(500, 5\)"),
    (lambda z, y: z[:, :3], "other: labels: got 0 to 4, expected 0 to 2")])
def test_a_model_of_other_samples_is_refused(outputs, spoil, message):
    with pytest.raises(ValueError, match=message): explore_reliability(*outputs, other=spoil(*outputs))


def test_images_of_a_bin(results, monkeypatch):
    explorer = explore_bin_images(results[TEACHER])
    number = explorer.controls["number"]
    others = [{"number": v} for _, v in number.options if v != number.value]
    every_control(explorer, monkeypatch, kind="wrong", **(others or [{}])[0])


def test_floats_are_no_images(tmp_path):
    x = torch.rand(60, 3, 8, 8)
    spec = RunSpec(register_images("floats", *[(x, torch.arange(60) % 2)]*3, ["a", "b"]), "resnet8", "nll",
                   Recipe(1, 20))
    result = run(spec, Store(tmp_path), "cpu", progress=False)
    with pytest.raises(ValueError, match="result: got one of texts or of floats"): explore_bin_images(result)


def test_nothing_is_computed_twice(outputs, monkeypatch):
    calls, real = [], explorers.evaluate_at_temperature
    patch_name(monkeypatch, "evaluate_at_temperature", lambda *a: calls.append(a[2:]) or real(*a))
    explorer = explore_reliability(*outputs)
    for T in (2., 1., 2., 1.): explorer.controls["T"].value = T
    assert calls == [(1., 15, None), (2., 15, None)]


def test_reliability_of_probabilities_is_that_of_their_logits(outputs):
    logits, labels = outputs
    a, b = (explore_reliability(logits, labels),
            explore_reliability(logits.softmax(1), labels, from_logits=False))
    for e in (a, b): e.controls["T"].value = 2.
    numbers = [np.array(re.findall(r"-?\d+\.\d+", e.picture.value), float) for e in (a, b)]
    assert len(numbers[0]) > 200 and np.allclose(*numbers, atol=1e-3)


def test_reliability_of_a_run(results, monkeypatch):
    result = results[TEACHER]
    every_control(explore_reliability(result), monkeypatch, T=.5)
    with pytest.raises(ValueError, match="outputs: got a result from a light file, without logits"):
        explore_reliability(result_from_json(result_to_json(result)))


@pytest.mark.parametrize("spoil, message", [
    (lambda z, y: (z, None), "labels: got none"),
    (lambda z, y: (z, y[:9]), "labels: got 9 of them"),
    (lambda z, y: (z[:, 0], y), "labels: got 0 to 4, expected 0 to 1"), # one logit an image is of two classes
    (lambda z, y: (z.argmax(1), y), r"logits: got whole numbers of shape \(500,\)"),
    (lambda z, y: (z.index_fill(0, torch.tensor([3]), float("nan")), y), "logits: got NaN"),
    (lambda z, y: (z.scatter(1, y[:, None], -torch.inf), y), "labels: got 500 whose class is masked"),
    (lambda z, y: (z, y + 1), "labels: got 1 to 5, expected 0 to 4"),
    (lambda z, y: (z, y, "odds"), "from_logits: got 'odds'"),
    (lambda z, y: (z, y.float() + .5), "labels: got numbers with a fraction"),
])
def test_bad_outputs_are_told(outputs, spoil, message):
    with pytest.raises(ValueError, match=message): explore_reliability(*spoil(*outputs))


@pytest.mark.parametrize("shape", [
    lambda z, y: (z[:, 0], (y == 0).long()), # one number an image
    lambda z, y: (torch.cat([z, torch.full((len(z), 1), -torch.inf)], 1), y), # a masked class
])
def test_other_shapes_are_explored(outputs, shape, monkeypatch):
    every_control(explore_reliability(*shape(*outputs)), monkeypatch, T=.5)


@pytest.mark.parametrize("family, values", [
    ("targets", dict(eps=.6, alpha=1., teacher=.2)), ("weights", dict(gamma=-1.)),
    ("logits", dict(penalty="BDC of CPC", beta=2., margin=1.)),
    ("batches", dict(penalty="MMCE", beta=9., overconfidence=.3)),
])
def test_methods_follow_every_control(family, values, monkeypatch):
    every_control(explore_loss_gradients(family), monkeypatch, **values)


def test_the_crowd_is_as_wrong_about_itself_as_it_is_said_to_be():
    "Always the same answers; the more confident they are by the factor, the fewer are correct"
    right = [float((z.argmax(1) == y).float().mean()) for z, y in map(_batch_context, (.2, 1., 4.))]
    assert torch.equal(_batch_context(.2)[0], _batch_context(4.)[0]) and right[0] > right[1] > right[2]


def test_transfer_follows_every_control(results, monkeypatch):
    every_control(explore_transfer(results), monkeypatch, T=4., alpha=1., teacher="the truth at tau=2")


def test_what_is_not_stored_is_said(results):
    explorer = explore_transfer(results)
    explorer.controls["T"].value = 4.
    before = explorer.picture.value
    explorer.controls["alpha"].value = 1.
    assert ("expected those of a stored student: this teacher&#x27;s have T = 1 with alpha = 0.5, "
            "1; T = 4 with alpha = 0.5" in explorer.refusal.value)
    assert explorer.picture.value == before and "kdc-stale" in explorer.picture._dom_classes
    explorer.controls["T"].value = 1.
    assert (not explorer.refusal.value and explorer.picture.value != before
            and "kdc-stale" not in explorer.picture._dom_classes)


def test_a_grid_with_holes_begins_with_a_student_there_is(results):
    few = {s: r for s, r in results.items()
           if s == TEACHER or (s.method.T, s.method.alpha) in ((4, .5), (1, 1))}
    explorer = explore_transfer(few)
    assert explorer.picture.value and not explorer.refusal.value


def of_seed(spec, seed):
    "The same run with another seed, and its teacher's too"
    method = replace(
        spec.method, teacher=of_seed(spec.method.teacher, seed)
    ) if isinstance(spec.method, Distil) and isinstance(spec.method.teacher, RunSpec) else spec.method
    return replace(spec, method=method, seed=seed)


def test_a_seed_is_chosen_where_there_are_several(results, looks, monkeypatch):
    "Only then; the ring is around the student of that seed"
    assert "seed" not in explore_transfer(results).controls
    assert "seed" not in explore_penultimate(looks).controls
    changed = {of_seed(s, 3): results[STUDENTS[1] if s == STUDENTS[0] else s] for s in (TEACHER, *STUDENTS)}
    two = explore_transfer(results | changed)
    assert two.controls["seed"].options == (0, 3)
    every_control(two, monkeypatch, seed=3, alpha=1.)
    students = {s: l for s, l in looks.items() if s != TEACHER}
    monkeypatch.undo()
    classes = explore_penultimate(looks | {
        of_seed(s, 3): l for s, l in zip((TEACHER, *students), (looks[TEACHER], *reversed(students.values())))
    })
    every_control(classes, monkeypatch, seed=3)


def test_looks_at_several_networks_are_refused(looks):
    other = {replace(s, model="resnet14"): l for s, l in looks.items() if s != TEACHER}
    with pytest.raises(ValueError, match="views: got 2 kinds of students, expected one"):
        explore_penultimate({**looks, **other})


def test_the_chosen_student_has_a_ring(results):
    transfer, pairs = TransferPlot(), prepare_transfer(results)
    for chosen in STUDENTS[:2]:
        transfer.show(pairs, chosen.method.T, chosen.method.alpha, chosen)
        (pair,) = [p for p in pairs if p.spec == chosen]
        assert transfer.chosen.get_xydata().tolist() == [[pair.teacher.ece, pair.student.ece]]
    assert not len(transfer.show(pairs, 1, .5).chosen.get_xydata())


def test_buttons_set_several_controls_and_draw_once(outputs, monkeypatch):
    logits, labels = outputs
    outputs = logits + 3*torch.nn.functional.one_hot(labels, 5), labels
    explorer = explore_reliability(*outputs)
    first, drawn, show = explorer.picture.value, [], explorer.show
    buttons = {b.description: b for b in explorer.children[2].children if hasattr(b, "click")}
    monkeypatch.setattr(explorer, "show", lambda **values: drawn.append(values) or show(**values))
    buttons["go to the fitted T"].click()
    assert drawn == [{"T": pytest.approx(fit_temperature(*check_outputs_and_labels(*outputs)), rel=1e-3),
                      "n_bins": 15, "predicted": "top"}]
    explorer.controls["n_bins"].value = 7
    buttons["reset"].click()
    assert explorer.controls["predicted"].label == "top label"
    assert drawn[2:] == [{"T": 1., "n_bins": 15, "predicted": "top"}] and explorer.picture.value == first
    with pytest.raises(ValueError, match="values: got 'bins', expected one of T, n_bins"):
        explorer.move(bins=7)


def test_a_temperature_without_end_is_said_and_has_no_button():
    z = made(60, 3)[0]
    with pytest.warns(UserWarning, match="every label is the top label"):
        explorer = explore_reliability(z, z.argmax(1))
    assert not [b for b in explorer.children[2].children if b.description == "go to the fitted T"]
    title = "N = 60; no least NLL,\nend of its range: every label is the top label, T goes to 0"
    assert title in [ax.get_title() for ax in explorer.drawing.figure.axes]


@pytest.mark.parametrize("name, typed, message",
                         [("T", 9., "T: got 9, expected a number from 0.125 to 8"),
                          ("n_bins", 2.5, "n_bins: got 2.5, expected an integer from 2 to 50")])
def test_typed_values_are_taken_or_refused(outputs, name, typed, message):
    explorer = explore_reliability(*outputs)
    box, slider = explorer.controls[name].box, explorer.controls[name].slider
    explorer.controls["T"].box.value = 1.03
    assert (explorer.values()["T"] == 1.03
            and explorer.controls["T"].steps[explorer.controls["T"].slider.value] == 1.04)
    box.value = typed
    assert message in explorer.refusal.value and box.value == typed
    slider.value = 5
    assert not explorer.refusal.value and box.value == explorer.controls[name].steps[5]


def test_pictures_are_saved_as_they_are_and_over_nothing(outputs, tmp_path, monkeypatch):
    "Not after a refusal, whose picture is of the values before"
    monkeypatch.chdir(tmp_path)
    explorer = explore_reliability(*outputs)
    assert ([explorer.save().name for _ in range(3)]
            == ["reliability.svg", "reliability_2.svg", "reliability_3.svg"])
    assert "reliability_3.svg" in explorer.saved.value
    explorer.controls["T"].value = 99.
    with pytest.raises(ValueError, match="controls: got values without a picture"): explorer.save("now.png")
    explorer._save("svg")
    assert explorer.saved.value.startswith("not saved: controls") and not (tmp_path/"now.png").exists()
    explorer.move(T=1.)
    explorer.save("now.png")
    with pytest.raises(ValueError, match="path: got now.png, expected a file that does not exist"):
        explorer.save("now.png")
    with pytest.raises(ValueError, match="values: got some, expected none for .pdf"):
        explorer.save("now.pdf", values={"T": [1, 2]})
    with pytest.raises(ValueError, match="expected one that ends in .html, .svg, .pdf or .png"):
        explorer.save("now.gif")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".png", ".svg", ".svg", ".svg"]


def test_the_fallback_is_the_picture(outputs, tmp_path):
    explorer = explore_reliability(*outputs)
    data, metadata = explorer._repr_mimebundle_()
    explorer.save(tmp_path/"now.png")
    fallback, saved = (np.asarray(Image.open(f))
                       for f in (BytesIO(b64decode(data["image/png"])), tmp_path/"now.png"))
    assert np.array_equal(fallback, saved) and metadata["image/png"]["width"] == 840 == fallback.shape[1]/2
    assert data["text/plain"] == "reliability: T = 1.0, n_bins = 15, predicted = top"


def test_classes_follow_every_control(looks, monkeypatch):
    explorer = explore_penultimate(looks)
    other = next(k for k in range(20) if k not in [explorer.controls[c].value for c in "abc"])
    every_control(explorer, monkeypatch, T=4., alpha=1., a=other,
                  b=other, c=other, split="train", images=True)


def test_images_that_are_not_there_are_told(looks, monkeypatch):
    def none(data): raise ValueError("known: put it there")
    explorer = explore_penultimate(looks)
    patch_name(monkeypatch, "load_data", none)
    before = explorer.picture.value
    explorer.controls["images"].value = True
    assert "known: put it there" in explorer.refusal.value and explorer.picture.value == before


def test_figures_are_shown_after_an_explorer():
    "An explorer that is the first to draw in a kernel leaves pyplot as Jupyter has it"
    code = [("from kdc_nb import explore_reliability\nfrom kdc_nb.explorers import explore_theory, "
             "explore_loss_gradients\nimport numpy as np, matplotlib.pyplot as plt"),
            ("explore_reliability(np.eye(4)[[0, 1, 2, 3]*5], [0, 1, 2, 0]*5); explore_theory(); "
             "explore_loss_gradients('targets');"),
            "plt.plot([0, 1]);"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    NotebookClient(nb, kernel_name="python3").execute()
    assert any("image/png" in o.get("data", {}) for o in nb.cells[-1].outputs)


def test_a_loss_is_chosen_where_there_are_several(results, monkeypatch):
    "The dots are of that loss alone; what is not stored is said"
    other = {replace(s, method=replace(s.method, loss="dkd")): results[r]
             for s, r in zip(STUDENTS, reversed(STUDENTS))}
    assert "loss" not in explore_transfer(results).controls
    both = explore_transfer(results | other)
    assert both.controls["loss"].options == ("Hinton's", "dkd beta=8")
    every_control(both, monkeypatch, loss="dkd beta=8", alpha=1.)
    monkeypatch.undo()
    few = explore_transfer(results | {s: r for s, r in other.items() if s.method.teacher == TEACHER})
    few.move(loss="dkd beta=8")
    with pytest.raises(ValueError, match="this teacher's have the loss Hinton's$"):
        few.show(**few.values() | {"teacher": "the truth at tau=2"})
    shown = []
    monkeypatch.setattr("kdc_nb.explorers.TransferPlot.show", lambda _, pairs, *a, **k: shown.append(pairs))
    explore_transfer(results | other)
    assert {p.spec.method.loss for p in shown[0]} == {None} and len(shown[0]) > 1
