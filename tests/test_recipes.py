"""Recipes: what the page states of them is what the committed results say, and one of one's own is
registered like everything else
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kdc_nb.core import Registry, user_entries
from kdc_nb.values import decode, encode
from kdc_nb.files import load_npz
from kdc_nb.training.processes import call_with_user_code, pack_user_code
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import RECIPES, Recipe
from kdc_nb.experiments.results import Result, read_results
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import RunSpec
from kdc_nb.experiments.store import Store
from kdc_nb.paper.commands import main

ROOT = Path(__file__).parents[1]
RESULTS = ROOT/"nbs/results"
PAGE = nbformat.read(ROOT/"nbs/training/14_recipes.ipynb", as_version=4)
OWN = Recipe(epochs=1, batch_size=20, lr=.02)
MEASURED = { # recipe, whether with eight epochs in place of its own: the file, and a model of it
    ("cpu", False): ("paper_cifar10.npz", ("resnet14", "resnet8")),
    ("text_small", False): ("text_topics.npz", ("bert_2_64", "distilbert_1_64")),
    **{(k, True): ("recipes_cifar10.npz", ("resnet8",)) for k in ("fast", "fast_linear", "fast_512")},
}
ON_A_GPU = {"table2b.npz": "mobilenet_v2", "ablation.npz": "resnet56_bottleneck"} # by `fast`


def table() -> list[list[str]]:
    "The rows of the page's table, cell by cell"
    cell, = (c for c in PAGE.cells if c.cell_type == "markdown" and "not measured yet" in c.source)
    lines = [line for line in cell.source.splitlines() if line.startswith("|")]
    return [[part.strip().replace("`", "") for part in line.strip("|").split("|")] for line in lines[2:]]


def spread(results: list[Result], number: Callable[[Result], float], digits: int) -> str:
    "The mean, and the smallest and largest in brackets"
    numbers = [number(r) for r in results]
    return " ".join(f"{x:.{digits}f}" for x in (sum(numbers)/len(numbers), min(numbers), max(numbers)))


def stated(name: str, short: bool, file: str, model: str) -> list[str]:
    "A row of the table, from the results"
    recipe = replace(RECIPES[name], epochs=8) if short else RECIPES[name]
    found = [r for s, r in read_results(RESULTS/file).items()
             if (s.recipe, s.model, s.method) == (recipe, model, Method("nll"))]
    accuracy, seconds = (spread(found, lambda r: 100*r.raw.metrics["top1"].value, 1),
                         spread(found, lambda r: r.facts["seconds"], 0))
    where, = {f"{r.facts['at_once']} at once on {r.facts['name']}" if r.facts["device"] == "cuda" else
              f"{r.facts['threads']} thread of {r.facts['name']}" for r in found}
    torch_version, = {r.facts["torch"].split("+")[0] for r in found}
    data, = {r.spec.data for r in found}
    return [f"{name}, 8 epochs" if short else name, f"{model}, {data.n_train:,} of {data.name}",
            str(len(found)),
            *(f"{mean} ({low} to {high})" for mean, low, high in map(str.split, (accuracy, seconds))),
            f"{where}, torch {torch_version}", file]


def recipes_in(written: Any) -> set[Recipe]:
    "All recipes in a file's JSON"
    if isinstance(written, Mapping):
        own = {decode(written)} if written.get("kind") == "Recipe" else set()
        return own.union(*map(recipes_in, written.values()))
    return set().union(*map(recipes_in, written)) if isinstance(written, list) else set()


def test_the_page_states_what_the_results_say():
    rows = [stated(name, short, file, model)
            for (name, short), (file, models) in MEASURED.items() for model in models]
    rows += [stated("fast", False, file, model) for file, model in ON_A_GPU.items()]
    said = [row for row in table() if row[1] != "not measured yet"]
    assert sorted(said) == sorted(rows)


def test_what_was_not_measured_is_said_to_be_so():
    "Every recipe has a row; one by which no run in any file was trained says so, and no other does"
    used = set().union(*(recipes_in(load_npz(p)[1]) for p in RESULTS.glob("*.npz")))
    silent = {row[0] for row in table() if row[1] == "not measured yet"}
    assert {row[0].split(",")[0] for row in table()} == {*RECIPES}
    assert silent == {name for name, recipe in RECIPES.items() if recipe not in used}


def test_a_recipe_of_ones_own():
    RECIPES["own"] = OWN
    RECIPES["own"] = Recipe(1, 20, .02) # the cell was run again
    assert RunSpec("known", "resnet8", recipe="own") == RunSpec("known", "resnet8", recipe=OWN)
    assert user_entries() == [("recipe", "own", OWN)] and RECIPES.is_own("own") and not RECIPES.is_own("cpu")
    for name in ("own", "cpu"):
        with pytest.raises(ValueError, match=f"recipe: got '{name}', expected a name that is not taken yet"):
            RECIPES[name] = Recipe(2)
    del RECIPES["own"]
    with pytest.raises(ValueError, match="recipe: got 'own', expected one of cpu, fast, fast_512"):
        RunSpec("known", "resnet8", recipe="own")


def test_a_test_leaves_no_recipe_behind(): assert {*RECIPES} == RECIPES.built_in and user_entries() == []


def test_it_goes_to_other_processes_beside_own_code():
    @Method.register("own_for_recipes")
    def own_for_recipes(): pass
    RECIPES["own"] = OWN
    _, code = pack_user_code()
    del RECIPES["own"]
    assert call_with_user_code((-1, code), lambda: RECIPES["own"]) == OWN
    assert Registry.by_kind["recipe"] is RECIPES


def test_its_name_is_no_part_of_a_run(tmp_path):
    "A run by it is found again where the name is not known: it holds what the recipe says"
    from tests.test_registry import TINY
    RECIPES["own"] = OWN
    spec = RunSpec(TINY, "resnet8", recipe="own")
    first = run(spec, Store(tmp_path), "cpu", progress=False)
    del RECIPES["own"]
    again = Store(tmp_path).get(decode(encode(spec)))
    assert again.spec.recipe == OWN and (again.logits["test"] == first.logits["test"]).all()


def test_the_command_takes_it(tmp_path, capsys):
    (tmp_path/"my_recipes.py").write_text('''
from kdc_nb.training.recipes import RECIPES, Recipe
RECIPES["patient"] = Recipe(epochs=3)
''')
    command = ["fig4", "--small", "digits", "--plan", "--store", str(tmp_path/"store"), "--device", "cpu",
               "--recipe", "patient"]
    assert main(command) == 2 and "recipe: got 'patient'" in capsys.readouterr().err
    command += ["--import", str(tmp_path/"my_recipes.py")]
    done = subprocess.run([sys.executable, "-m", "kdc_nb", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
