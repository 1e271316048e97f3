"The linter's few rules (pyproject.toml), for notebooks and whatever else is written by hand"

import ast
import doctest
import importlib
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_are_short():
    "Made modules are not linted; none has more than 300 lines"
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines())
             for p in ROOT.glob("kdc_nb/**/*.py") if p.name != "_modidx.py"}
    assert not {k: n for k, n in lines.items() if n > 300}


EXAMPLES = {"calibration.metrics.ece", "calibration.posthoc.fit_temperature",
            "calibration.null_bands.null_band",
            "calibration.null_bands.simulate_calibrated", "calibration.evaluation.evaluate",
            "calibration.differences.holm", "calibration.comparisons.compare",
            "calibration.diagrams.plot_reliability", "explorers.explore_reliability",
            "analysis.corruptions.corrupt_images", "analysis.linear_model.fit_linear_student"}


def documented() -> dict[str, Path]: # by name below the package
    "The exported modules, whose public names are documented"
    paths = {str(p.relative_to(ROOT/"kdc_nb")): p for p in sorted(ROOT.glob("kdc_nb/**/*.py"))}
    return {k.removesuffix(".py").replace("/", "."): p for k, p in paths.items()
            if not p.name.startswith("_")}


def comments(source: str) -> dict[int, str]:
    "The comment of each line that has one"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT}


def says_something(text: str, name: str) -> bool:
    "Whether a comment is more than a line of dots, or the name once more"
    return bool(re.search(r"\w", text)) and text.strip("`. ").lower() != name.lower()


def docment(source: str, lines: dict[int, str], node: ast.AST, siblings: list[ast.AST], name: str) -> bool:
    "Whether a parameter or field has a comment of its own: after it on its last line, or on a line above it"
    first, last = node.lineno, node.end_lineno
    others = [s for s in siblings if s is not node]
    if not any(s.lineno <= last <= s.end_lineno
               for s in others) and says_something(lines.get(last, ""), name):
        return True
    alone = source.splitlines()[first - 2].lstrip().startswith("#")
    shared = any(s.lineno <= first <= s.end_lineno for s in others)
    return alone and not shared and says_something(lines.get(first - 1, ""), name)


def parameters(f: ast.FunctionDef) -> list[tuple[str, ast.AST]]:
    "Parameters of a function with where they are, from the name to the default; `**kw` is left out"
    a = f.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
    pairs = [*zip(plain, defaults), *zip(a.kwonlyargs, a.kw_defaults),
             *([(a.vararg, None)] if a.vararg else [])]
    for p, default in pairs: p.end_lineno = max(p.end_lineno, default.end_lineno if default else 0)
    return [(p.arg, p) for p, _ in pairs if p.arg not in ("self", "cls")]


def undocumented(source: str) -> list[str]:
    "Public functions and classes without docstring; their parameters and fields without docment"
    tree, lines, found = ast.parse(source), comments(source), []
    public = {k.value for n in tree.body
              if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
              for k in n.value.elts if isinstance(k, ast.Constant)}

    def visit(node, name):
        if not says_something(ast.get_docstring(node) or "", node.name) and node.name != "__init__":
            found.append(f"{name}: docstring")
        if isinstance(node, ast.ClassDef):
            inside = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            for n in inside:
                if n.name == "__init__" or not n.name.startswith("_"): visit(n, f"{name}.{n.name}")
            named = [(n.target.id, n) for n in node.body if isinstance(n, ast.AnnAssign)]
            named = [(k, n) for k, n in named if not k.startswith("_")]
        else:
            named = parameters(node)
            # what stands on the line of `def` or of the result is about the result
            body = [n for _, n in named] + [ast.Pass(lineno=node.lineno, end_lineno=node.lineno)]
            if node.returns: body.append(node.returns)
            found.extend(f"{name}: {k}" for k, n in named if not docment(source, lines, n, body, k))
            return
        found.extend(f"{name}: {k}" for k, n in named
                     if not docment(source, lines, n, [m for _, m in named], k))

    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public:
            visit(node, node.name)
    return found


@pytest.mark.parametrize("path", documented().values(), ids=documented())
def test_public_names_are_documented(path):
    assert not undocumented(path.read_text())


def test_examples_are_true():
    "Those that docstrings show; the most used functions have one"
    shown = set()
    for name in documented():
        module = importlib.import_module(f"kdc_nb.{name}".removesuffix(".__init__"))
        for example in doctest.DocTestFinder(exclude_empty=True).find(module):
            if not example.examples: continue
            shown.add(example.name.removeprefix("kdc_nb."))
            assert not doctest.DocTestRunner(verbose=False).run(example, out=print).failed, example.name
    assert shown >= EXAMPLES


@pytest.mark.parametrize("source, missing", [
    ('def f(\n    n: int, # images\n):\n    "Doubles it"', []),
    ('def f(\n    # images\n    n: int,\n):\n    "Doubles it"', []),
    ('def f(\n    n: int, # images\n) -> int: # twice as many\n    pass', ["f: docstring"]),
    ('def f(\n    n: int,\n) -> int: # twice as many\n    "Doubles it"', ["f: n"]),
    ('def f(n: int) -> int: # twice as many\n    "Doubles it"', ["f: n"]),
    ('def f(\n    n: int, #\n    m: int, # ...\n    k: int, # `k`\n):\n    "Adds"', ["f: n", "f: m", "f: k"]),
    ('def f(\n    n: int, m: int, # images\n):\n    "Adds"', ["f: n", "f: m"]),
    ('def f(\n    n: int, # images\n    *rest: int, **kw\n):\n    "Adds"', ["f: rest"]),
    ('class f:\n    "A pair"\n    n: int # images\n    m: int\n    def g(self, k): "Adds"',
     ["f.g: k", "f: m"]),
    ('class f:\n    "A pair"\n    def __init__(self, k): pass\n    def _g(self, k): pass', ["f.__init__: k"]),
    ('def g(n): pass', []),
])
def test_what_is_undocumented(source, missing):
    assert undocumented(f'__all__ = ["f"]\n{source}\n') == missing
