"The paper's settings: who teaches whom, and chains of self-distillation."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_nb.calibrators import Method, Step
from kdc_nb.data import Data
from kdc_nb.explorers import explore_classes, source_of
from kdc_nb.paper import SETTINGS, Setting, generation_of, self_distilled, table_specs
from kdc_nb.penultimate import look
from kdc_nb.plots import prepare_generations
from kdc_nb.runs import Distil, RunSpec, Scaled, Store, lineage, run
from kdc_nb.sweeps import levels, sweep
from kdc_nb.theory import draw_problem, gap, minimise
from kdc_nb.training import Recipe

METHODS = {"NLL": Method("nll"), "PS-KD": Method("pskd"), "focal + MDCA": Method("mdca", beta=1, gamma=1)}
TINY = Data("known", n_train=100, n_valid=60, n_test=80)
NET = RunSpec(TINY, "resnet8", Method("nll"), Recipe(2, 50))


@pytest.mark.parametrize("name", SETTINGS)
def test_who_teaches_whom(name):
    setting = SETTINGS[name]
    rows = table_specs(setting, METHODS, "smoke", T=2, alpha=.5)
    assert len(set(rows.values())) == len(rows)
    for row, spec in rows.items():
        assert spec.model == (setting.teacher if row.startswith("Teacher") else setting.student), row
        if row.startswith("KD"): assert {r.model for r in lineage(spec)[:-1]} == {setting.teacher} and (spec.method.T, spec.method.alpha) == (2, .5)
    assert rows["KD(UC), from NLL"].method.teacher.method == Method("nll") and isinstance(rows["KD(C), from NLL after TS"].method.teacher, Scaled)


def test_the_rows_train(tmp_path):
    rows = table_specs(Setting(TINY, "resnet8", "resnet8"), METHODS, recipe=Recipe(2, 50))
    assert all(r.evaluation.n == 80 for r in sweep(rows.values(), Store(tmp_path), "cpu", progress=False))


@given(st.integers(0, 8), st.integers(0, 3))
def test_each_generation_is_taught_by_the_one_before(n, seed):
    chain = self_distilled(replace(NET, seed=seed), n, T=2, alpha=.5)
    assert [generation_of(s) for s in chain] == [(chain[0], k) for k in range(n + 1)] and lineage(chain[-1]) == chain
    assert list(levels(chain)) == [[s] for s in chain]


def test_a_chain_begins_where_a_network_was_not_taught_by_a_network():
    scaled = replace(NET, method=Distil(Scaled(NET)))
    assert generation_of(scaled) == (scaled, 0) and source_of(scaled) == ("nll after TS", 1)
    assert source_of(self_distilled(NET, 3)[-1]) == ("nll", 3) and source_of(self_distilled(scaled, 1)[-1])[1] == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(.2, 1), st.integers(2, 5))
def test_generations_at_alpha_are_one_at_its_power(seed, alpha, t):
    "The exact law at T = 1, for a linear student with an intercept."
    p = draw_problem(N=300, d=4, scale=1., angle=40, overconfidence=2, base=.3, seed=seed)
    first = z = p.X.T@p.W_t
    for _ in range(t): z = p.X.T@minimise(p.X, p.y, z, 1., alpha).W
    assert z == pytest.approx(p.X.T@minimise(p.X, p.y, first, 1., alpha**t).W, abs=1e-5)
    assert gap(p.X, z, p.y)[-1] == pytest.approx(alpha**t*gap(p.X, first, p.y)[-1], abs=1e-6)


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("chains"))
    net = replace(NET, data=Data("known", n_train=200, n_valid=60, n_test=400))
    chains = [s for m in ("nll", "focal") for s in self_distilled(replace(net, method=Method(m)), 2)]
    return {s: look(s, store, "cpu", per_class=3) for s in chains}, store


def test_generations_are_measured_from_what_they_say(looks):
    found, store = looks
    rows = prepare_generations(found)
    assert [(r.first, r.number) for r in rows] == [(m, k) for m in ("nll", "focal gamma=3") for k in range(3)]
    chain = list(found)[:3]
    z = [run(s, store, "cpu", progress=False).logits["test"].double() for s in chain]
    assert rows[2].values["agreement"].value == pytest.approx(float((z[2].argmax(1) == z[0].argmax(1)).double().mean()))
    e = rows[2].values["gap"]
    expected = z[2].softmax(1).amax(1).mean() - rows[2].values["top1"].value
    assert e.value == pytest.approx(float(expected), abs=1e-4) and e.low < e.value < e.high
    assert rows[2].values["kl"].value == pytest.approx(run(chain[2], store, "cpu", progress=False).truth["kl"], rel=1e-4)


def test_a_chain_without_its_first_is_refused(looks):
    found = dict(list(looks[0].items())[1:3])
    with pytest.raises(ValueError, match="looks: got no known resnet8 nll, seed 0, expected generation zero"): prepare_generations(found)
    with pytest.raises(ValueError, match="looks: got no student"): prepare_generations({})


def test_only_chains_of_one_kind_are_measured(looks):
    "Another temperature half-way, or another network, would be counted where it does not belong."
    first, second, _ = list(looks[0])[:3]
    l = looks[0][second]
    hot = replace(second, method=Distil(second, 4., .9))
    with pytest.raises(ValueError, match="looks: got .*expected chains as"): prepare_generations({first: l, second: l, hot: l})
    larger = replace(second, model="resnet14")
    with pytest.raises(ValueError, match="expected chains as"): prepare_generations({first: l, larger: l})
    other = self_distilled(replace(first, model="resnet14"), 1)
    with pytest.raises(ValueError, match="expected chains of one network"): prepare_generations(dict.fromkeys([first, second, *other], l))


def test_the_explorer_goes_through_the_generations(looks):
    explorer = explore_classes(looks[0])
    pictures = [bytes(explorer.image.value)]
    assert [v for _, v in explorer.controls["generation"].options] == [1, 2]
    for name, v in (("generation", 2), ("teacher", "focal gamma=3"), ("generation", 1)):
        explorer.controls[name].value = v
        assert not explorer.refusal.value and bytes(explorer.image.value) not in pictures
        pictures.append(bytes(explorer.image.value))
