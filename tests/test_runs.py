"Runs and the store: nothing lost, nothing half-written, nothing read that is damaged."

import subprocess
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from hypothesis import given, strategies as st

import kdc_nb.experiments.runs as kr
from kdc_nb.values import encode
from kdc_nb.files import DamagedFile, load_npz, load_tensors, save_npz
from kdc_nb.calibration.metrics import nll
from kdc_nb.calibration.outcomes import compute_outcomes, metrics_from_outcomes
from kdc_nb.calibration.posthoc import fit_temperature
from kdc_nb.calibration.predictions import equal_width_bins
from kdc_nb.training.data import DataSpec
from kdc_nb.training.methods import Method
from kdc_nb.training.models import MODELS
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.trainer import Trainer
from kdc_nb.experiments.results import (
    _compress_outcomes, _decompress_outcomes, read_results, recalibrate, result_outcomes, write_results,
)
from kdc_nb.experiments.agenda import write_specs
from kdc_nb.experiments.runs import RunContext, run, teacher_train_logits
from kdc_nb.experiments.specs import Distil, RunSpec, lineage, run_id, run_label
from kdc_nb.experiments.store import Store, all_results, remove_unfinished_runs
from kdc_nb.experiments.teachers import TemperatureScaled, TemperedPosterior
from tests.conftest import patch_name

TINY = DataSpec("known", n_train=100, n_valid=60, n_test=80)
TEACHER = RunSpec(TINY, "resnet8", Method("focal"), Recipe(2, 50))
STUDENT = RunSpec(TINY, "resnet8", Distil(TEACHER, 2, .5), Recipe(2, 50))


def go(spec, store): return run(spec, store, "cpu", progress=False)


def test_a_second_call_trains_nothing(store, monkeypatch):
    first = go(STUDENT, store)
    monkeypatch.setattr(Trainer, "train_epoch", lambda trainer: pytest.fail("trained again"))
    again = go(STUDENT, store)
    assert (torch.equal(first.logits["test"], again.logits["test"])
            and encode(first.evaluation) == encode(again.evaluation))


def test_a_result_is_shown_in_short(store):
    "One line in a list, a table of a page's width in a cell or printed, and every field is still there"
    result = go(STUDENT, store)
    assert ("\n" not in repr(result) and len(repr(result)) < 200
            and f"ECE {100*result.evaluation.raw['ece'].value:.2f}%" in repr(result))
    head, rows = result.table()
    assert [r[0] for r in rows] == ["Top-1, %", "  after TS", "NLL, nats", "  after TS",
                                    "ECE, %", "  after TS", "true error, %",
                                    "  after TS", "KL to truth, nats", "  after TS"]
    by = {(rows[i - i % 2][0], ("raw", "after TS")[i % 2]): value for i, (_, value, *_) in enumerate(rows)}
    assert (by["true error, %", "after TS"] == f"{100*result.scaled.metrics['error'].value:.2f}"
            and by["KL to truth, nats", "raw"] == f"{result.raw.metrics['kl'].value:.3f}")
    assert by["NLL, nats", "after TS"] == f"{result.evaluation.scaled['nll'].value:.3f}"
    title, images, facts = str(result).splitlines()[:3]
    assert title == run_label(STUDENT) and images.startswith("80 images")
    e = result.evaluation
    assert facts.startswith(f"T = {e.T:.4g} [{e.T_low:.3g}, {e.T_high:.3g}]; 2 epochs, ")
    assert facts.endswith("s on cpu")
    assert ("<br>" in result._repr_html_()
            and result._repr_html_().count("<tr>") == 1 + 10 + len(result.table().notes))
    def forget(output): return output._replace(metrics={k: output.metrics[k] for k in result.evaluation.raw})
    photos = replace(result, raw=forget(result.raw), scaled=forget(result.scaled))
    assert len(photos.table().rows) == 6 and len(str(photos).splitlines()) == 10 + len(photos.table().notes)
    assert "after ts" in str(recalibrate(result, "ts")).splitlines()[0]


def test_chains_train_the_first_teacher_first(store):
    third = replace(STUDENT, method=Distil(STUDENT))
    assert lineage(third) == [TEACHER, STUDENT, third]
    go(third, store)
    assert [r.spec for r in all_results(store)] == [TEACHER, STUDENT, third]


def test_a_seed_is_a_run_of_its_own(store):
    a, b, again = (go(replace(TEACHER, seed=s), Store(store.folder/str(i))) for i, s in enumerate((0, 1, 0)))
    assert (torch.equal(a.logits["test"], again.logits["test"])
            and not torch.equal(a.logits["test"], b.logits["test"]))


@pytest.mark.parametrize("kind", ["run", "net"])
@pytest.mark.parametrize("hurt", [lambda b: b[:len(b)//2],
                                  lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:], lambda b: b""])
def test_a_damaged_file_is_named_and_made_again(store, kind, hurt):
    "Cut short, one bit flipped, empty: the file is named, and what comes back is what was there."
    before = go(TEACHER, store)
    path = store.path(TEACHER, kind)
    tensors, _ = load_tensors(path)
    path.write_bytes(hurt(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"{path.name}.*trained again"): go(STUDENT, store)
    assert all(torch.equal(t, tensors[k]) for k, t in load_tensors(path)[0].items())
    assert torch.equal(go(TEACHER, store).logits["test"], before.logits["test"])


def test_a_listing_names_a_damaged_file_and_shows_the_others(store):
    go(STUDENT, store)
    store.path(TEACHER, "run").write_bytes(b"half")
    with pytest.warns(UserWarning, match="damaged"): assert [r.spec for r in all_results(store)] == [STUDENT]


def test_a_teacher_without_weights_is_trained_and_that_is_said(store):
    go(TEACHER, store)
    store.path(TEACHER, "net").unlink()
    with pytest.warns(UserWarning, match="no weights of known resnet"): go(STUDENT, store)


def test_a_full_disk_leaves_no_result(store, monkeypatch):
    "The error comes through, and the next call, with room again, finishes the job."
    monkeypatch.setattr("os.replace",
                        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"): go(TEACHER, store)
    monkeypatch.undo()
    assert store.get(TEACHER) is None and not list(store.folder.iterdir())
    assert go(TEACHER, store).evaluation.n == 80


def test_no_file_of_the_store_is_a_pickle(store):
    go(STUDENT, store)
    for path in store.folder.iterdir():
        load_tensors(path)
        assert path.read_bytes()[8:9] == b"{", "a safetensors file: the header's length, then JSON"


def test_what_temperature_scaling_teaches(store):
    "The scaled teacher's logits are its own divided by the T that is best on its validation images."
    teacher = go(TEACHER, store)
    from kdc_nb.training.data import load_data
    T = fit_temperature(teacher.logits["valid"], load_data(TINY).valid.labels)
    raw, scaled = (teacher_train_logits(t, STUDENT.data, RunContext(store, "cpu"))
                   for t in (TEACHER, TemperatureScaled(TEACHER)))
    assert torch.allclose(scaled*T, raw, rtol=1e-5, atol=1e-5)


def test_what_the_tempered_truth_teaches():
    from kdc_nb.training.data import load_data
    p = load_data(TINY).train.posterior.double()
    said = (teacher_train_logits(TemperedPosterior(.5), STUDENT.data, RunContext(None, "cpu"))
            .double().softmax(1))
    assert torch.allclose(said, p**2/(p**2).sum(1, keepdim=True), atol=1e-5)


def test_the_same_description_of_other_images_is_another_run(monkeypatch):
    before = run_id(TEACHER)
    patch_name(monkeypatch, "summarise_data", lambda data: SimpleNamespace(fingerprint="of other images"))
    assert run_id(TEACHER) != before


def test_light_files_come_back_equal(store, tmp_path):
    r = go(STUDENT, store)
    write_results([r], tmp_path/"x.npz")
    back = read_results(tmp_path/"x.npz")[STUDENT]
    assert (back.spec == STUDENT
            and back.raw.metrics["error"].value == pytest.approx(r.raw.metrics["error"].value, rel=1e-5))
    assert [h["loss"] for h in back.history] == pytest.approx([h["loss"] for h in r.history], rel=1e-5)
    assert (torch.equal(back.scaled.outcomes.correct, result_outcomes(r)["scaled"].correct)
            and result_outcomes(back)["raw"] is back.raw.outcomes)


@given(n=st.integers(1, 300), c=st.sampled_from((2, 10, 300)),
       scale=st.sampled_from((.1, 3., 40.)), seed=st.integers(0, 99))
def test_what_light_files_keep_of_images_is_near_and_in_its_bin(n, c, scale, seed):
    rng = np.random.default_rng(seed)
    z, y = scale*rng.normal(size=(n, c)), rng.integers(0, c, n)
    before = {"raw": compute_outcomes(z, y), "scaled": compute_outcomes(z/2.5, y)}
    for which, o in _decompress_outcomes(_compress_outcomes(before)).items():
        b = before[which]
        assert torch.equal(o.pred, b.pred) and torch.equal(o.correct, b.correct)
        bins = [equal_width_bins(x.predictions.confidence, 15) for x in (o, b)]
        assert torch.equal(*bins)
        assert ((o.log_odds - b.log_odds.clamp(-256, 256)).abs().max() <= 1.5/128 + 1e-9
                and (o.nll - b.nll.clamp(max=256)).abs().max() <= 1.5/128 + 1e-9)
        old, new = metrics_from_outcomes(b), metrics_from_outcomes(o)
        assert (all(new[k] == pytest.approx(old[k], abs=2e-3) for k in ("top1", "ece", "sce"))
                and old["nll"] == pytest.approx(nll(z/(1 if which == "raw" else 2.5), y)))


def test_log_odds_are_those_of_the_confidence():
    """By hand: logits 2, 0, 0 give e^2/2 to 1; at 40 no confidence in floats differs
    from 1, but its log-odds do
    """
    assert compute_outcomes([[2., 0., 0.]], [0]).log_odds.item() == pytest.approx(2 - np.log(2))
    assert (compute_outcomes([[0., 40.]], [0]).log_odds.item() == 40
            and compute_outcomes([[0., 40.]], [0]).nll.item() == pytest.approx(40))


def test_a_light_file_is_fifty_kilobytes_at_most(tmp_path):
    "10,000 images of ten classes, Gaussian logits that are correct half of the time"
    z = 2*torch.randn(10_000, 10)
    y = z.double().softmax(1).multinomial(1).squeeze(1)
    save_npz(tmp_path/"x.npz",
             _compress_outcomes({"raw": compute_outcomes(1.4*z, y), "scaled": compute_outcomes(z, y)}))
    assert (tmp_path/"x.npz").stat().st_size < 50_000


def test_a_light_file_with_a_pickle_is_refused(tmp_path):
    np.savez(tmp_path/"x.npz", meta=np.array([{"runs": []}], dtype=object))
    with pytest.raises(DamagedFile, match="pickle"): load_npz(tmp_path/"x.npz")
    with pytest.raises(FileNotFoundError): read_results(tmp_path/"none.npz")


def test_cleaning_an_empty_store_is_no_error(tmp_path):
    assert remove_unfinished_runs(Store(tmp_path/"none")) == []


def test_a_teacher_of_other_data_is_refused():
    "It could have been trained on the student's test images."
    other = replace(TEACHER, data=DataSpec("known", n_train=100, n_valid=60, n_test=81))
    for teacher in (other, TemperatureScaled(other)):
        with pytest.raises(ValueError,
                           match="teacher: got one trained on Data.*n_test=81.*expected the student's data"):
            replace(STUDENT, method=Distil(teacher))


@pytest.mark.parametrize("bad, words", [
    (dict(data=3), "data: got 3, expected a description of a data"),
    (dict(method={"name": "nll"}), "method: got {'name': 'nll'}"),
    (dict(recipe={"epochs": 2}), "recipe: got {'epochs': 2}"), (dict(model=8), "model: got 8"),
    (dict(seed=-1), "seed: got -1"), (dict(model="resnet7"), "depth: got 7"),
])
def test_a_description_of_the_wrong_kind_is_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        RunSpec(**dict(data="known", model="resnet8", method="nll", recipe="smoke") | bad)


@pytest.mark.parametrize("bad", [dict(epochs=2.5), dict(epochs="2"), dict(batch_size=64.5)])
def test_a_recipe_counts_in_whole_numbers(bad):
    with pytest.raises(ValueError, match="expected an integer"): Recipe(**dict(epochs=2) | bad)
    assert Recipe(epochs=2.) == Recipe(epochs=2) and type(Recipe(epochs=2.).epochs) is int


def test_a_file_of_a_method_unknown_here_is_named(store):
    "Another notebook registered a method of its own and trained with it."
    Method.register("own")(lambda: Method("nll").build())
    go(replace(TEACHER, method=Method("own")), store)
    go(TEACHER, store)
    del Method.registry["own"]
    with pytest.warns(UserWarning, match="Method: got 'own'"):
        assert [r.spec for r in all_results(store)] == [TEACHER]


def test_a_warning_free_run(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(STUDENT, store)


def test_real_photographs_train_and_are_judged(photos, store):
    "Sixty images and one epoch teach little, and every part turns: the cache, flips, 10,000 test images."
    r = go(RunSpec(DataSpec("cifar10", n_train=60, n_valid=60), "resnet8",
                   "nll", Recipe(1, 30, augment=("flip",))), store)
    assert (r.evaluation.n == 10_000 and "error" not in r.raw.metrics
            and 0 < r.evaluation.raw["top1"].value < .5)


def test_a_copy_is_told_its_commit(monkeypatch):
    kr._git_commit.cache_clear()
    monkeypatch.setenv("KDC_COMMIT", "abc")
    assert kr.describe_environment(torch.device("cpu"))["commit"] == "abc"
    kr._git_commit.cache_clear()


def test_a_result_names_the_commit_of_its_checkout(store, tmp_path, monkeypatch):
    git = lambda *args: subprocess.run(
        ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *args],
        capture_output=True, text=True, check=True
    ).stdout.strip()
    monkeypatch.setattr("kdc_nb.__file__", str(tmp_path/"kdc_nb"/"__init__.py"))
    assert kr._git_commit.__wrapped__() is None, "installed, not a checkout"
    git("init", "-q")
    assert kr._git_commit.__wrapped__() is None, "no commit yet"
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert kr._git_commit.__wrapped__() == git("rev-parse", "HEAD")
    assert "commit" in go(TEACHER, store).facts


def test_a_file_of_another_run_is_not_taken_for_its_own(store):
    "Its digest is right, and its name is not"
    first, second = (replace(TEACHER, seed=k) for k in (0, 1))
    result = run(first, store, "cpu", progress=False)
    store.path(second, "run").write_bytes(store.path(first, "run").read_bytes())
    with pytest.warns(UserWarning, match="it holds .*seed 0; the run is to be trained again"):
        assert store.get(second) is None
    assert store.get(first).spec == result.spec


def test_weights_of_another_run_are_not_taken_for_its_own(store):
    first, second = (replace(TEACHER, seed=k) for k in (0, 1))
    for spec in (first, second): run(spec, store, "cpu", progress=False)
    store.path(second, "net").write_bytes(store.path(first, "net").read_bytes())
    with pytest.warns(UserWarning, match="holds the weights of .*; the run is to be trained again"):
        assert store.load_net(second) is None
    assert store.load_net(first) is not None


def test_a_network_that_is_registered_anew_is_tried_anew(monkeypatch):
    monkeypatch.setitem(MODELS.data, "mine", lambda *sizes: nn.Linear(8, 2))
    replace(TEACHER, model="mine")
    monkeypatch.setitem(MODELS.data, "mine", lambda *sizes: "no network")
    with pytest.raises(ValueError, match="'mine', which gives a str"): replace(TEACHER, model="mine")


def test_lists_of_other_things_are_named(tmp_path):
    result = run(TEACHER, Store(tmp_path), "cpu", progress=False)
    with pytest.raises(ValueError, match="results: got a single one"): write_results(result, tmp_path/"x.npz")
    with pytest.raises(ValueError, match="specs: got 3"): write_specs([TEACHER, 3], tmp_path/"x.json")
    assert not [*tmp_path.glob("x.*")]
