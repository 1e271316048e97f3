"Values, ids and files: properties over random descriptions, and faults."

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdc_nb.core import Registry
from kdc_nb.values import decode, encode, frozen_spec, spec_hash
from kdc_nb.files import DamagedFile, atomic_write, load_tensors, save_tensors
from kdc_nb.training.data import DataSpec
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.specs import Distil, RunSpec, Teacher, _walk_specs, reseed_lineage
from kdc_nb.training.data import full_data
from kdc_nb.experiments.teachers import (
    Ensemble, OutOfFold, StoredLogits, TemperatureScaled, TemperedPosterior,
)

methods = st.one_of(
    st.just(Method("nll")),
    st.builds(lambda e: Method("ls", eps=e), st.floats(0, 1)),
    st.builds(lambda b, g: Method("mdca", beta=b, gamma=g), st.floats(0, 20), st.floats(0, 5)),
)
plain = st.builds(RunSpec, st.builds(lambda n: DataSpec("known", n_train=n), st.integers(1, 50)),
                  st.sampled_from(["resnet8", "wrn_40_1"]),
                  methods, st.builds(Recipe, st.integers(1, 300), lr=st.floats(1e-3, 1)), st.integers(0, 9))
temperature, weight = st.floats(.1, 20), st.floats(0, 1)
others = [st.builds(kind, plain, st.integers(2, 5))
          for kind in (Ensemble, OutOfFold)] + [st.builds(StoredLogits, st.text(max_size=5), st.just("0"*16))]
students = st.recursive(plain, lambda inner: st.builds(
    lambda s, t, T, a: RunSpec(full_data(getattr(t.first_run(), "data", s.data)),
                               s.model, Distil(t, T, a), s.recipe, s.seed),
    plain, st.one_of(inner, st.builds(TemperatureScaled, inner), st.builds(TemperedPosterior, temperature),
                     *others), temperature, weight), max_leaves=4)


@given(students)
def test_a_description_survives_json(spec):
    "Nested teachers too: what is read is equal, has the same hash and the same id."
    again = decode(json.loads(json.dumps(encode(spec))))
    assert again == spec and hash(again) == hash(spec) and spec_hash(again) == spec_hash(spec)


@given(students, students)
def test_ids_tell_descriptions_apart(a, b):
    assert (spec_hash(a) == spec_hash(b)) == (a == b)


def test_an_id_does_not_depend_on_how_a_value_was_written():
    assert spec_hash(Method("mdca", beta=5, gamma=0)) == spec_hash(Method("mdca", beta=5.0))
    assert spec_hash(Distil(TemperedPosterior(1), 2, 1)) == spec_hash(Distil(TemperedPosterior(1.), 2., 1.))


def test_ids_stay_as_they_are():
    "Stored results are found by their id, so it must not change from one version to the next."
    assert spec_hash(RunSpec(
        DataSpec("known"), "resnet8", Distil(RunSpec("known", "resnet14", "nll", "smoke"), 2, .5), "smoke"
    )) == "ffe3fdbc7d2dfadf"


def test_a_switch_that_is_on_by_default_is_refused():
    "It would be left out when off, and come back on."
    with pytest.raises(ValueError, match=r"Method\('loud'\): got \['on'\] on by default"):
        Method.register("loud")(lambda on=True: None)
    assert "loud" not in Method.registry


def test_a_damaged_file_is_told_wherever_the_damage_is(tmp_path):
    "One bit flipped at any place of the file is noticed."
    save_tensors(path := tmp_path/"x.safetensors", {"a": torch.arange(5.)}, note="hello")
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        bad = bytearray(whole); bad[at] ^= 1
        path.write_bytes(bad)
        try: tensors, meta = load_tensors(path)
        except DamagedFile: continue
        assert torch.equal(tensors["a"], torch.arange(5.)) and meta == {"note": "hello"}, f"byte {at}"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    (path := tmp_path/"x").write_text("old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as part: part.write_text("new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_registry_whose_import_failed_tries_again():
    "An interrupted import must not leave it empty for good"
    odd = Registry("odd", "kdc_nb.nowhere")
    try:
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError): list(odd)
    finally: del Registry.by_kind["odd"]


def test_runs_in_a_tuple_are_part_of_a_description():
    "Their data and code are in the id, and they get the seed"
    @frozen_spec
    class Committee(Teacher):
        runs: tuple
        def required_runs(self): return self.runs

    first, second = (RunSpec("known", model) for model in ("resnet8", "resnet14"))
    student = RunSpec(first.data, "resnet8", Distil(Committee((first, second))))
    assert [p for p in _walk_specs(student) if isinstance(p, RunSpec)] == [student, first, second]
    seeds = {r.seed for r in (reseed_lineage(student, 5), *reseed_lineage(student, 5).teacher_runs())}
    assert seeds == {5}
