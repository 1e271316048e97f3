"The committed notebooks: sound, readable, and in step with the modules and README.md made from them"
import ast
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
build = runpy.run_path(str(ROOT/"nbs/_build.py"))
PAGES = {str(p.relative_to(ROOT/"nbs")): nbformat.read(p, as_version=4) for p in build["notebooks"]()}
HEAVY = {"matplotlib", "seaborn", "ipywidgets", "sklearn", "scipy", "pandas",
         "PIL", "umap", "nbdev", "fastcore", "torchvision.datasets"}
page = pytest.mark.parametrize("nb", PAGES.values(), ids=PAGES)


def code(nb): return [c.source for c in nb.cells if c.cell_type == "code"]
def exported(nb) -> str: return "\n".join(c.source for c in nb.cells if "export" in build["directives"](c))


def only_imports(source: str) -> bool:
    "Whether a cell is nothing but imports, which nobody reads"
    body = ast.parse(re.sub(r"^(%|#\|).*", "", source, flags=re.M)).body
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


FLOORS = ("fingerprints", "core", "values", "interrupts", "files", "tables", "calibration", "training",
          "experiments", "analysis", "paper", "drawings", "controls", "bin_images", "explorers",
          "student_explorer", "reports", "all")


def modules() -> dict[str, str]:
    """The code of each exported module's notebook, from the ground up: floor by
    floor, within a floor by number
    """
    named = {re.search(r"default_exp (\S+)", "\n".join(code(nb))): nb for nb in PAGES.values()}
    found = {m[1]: exported(nb) for m, nb in named.items() if m}
    return dict(sorted(found.items(), key=lambda p: FLOORS.index(p[0].split(".")[0])))


def snapshot(root: Path) -> dict[str, bytes]:
    "The files that are made from notebooks, and the notebooks"
    made = [root/"README.md", *root.glob("kdc_nb/**/*.py"),
            *root.glob("nbs/**/*.ipynb"), *root.glob("nbs/images/*")]
    return {str(p.relative_to(root)): p.read_bytes() for p in made if p.exists()}


@page
def test_format(nb): nbformat.validate(nb)


@page
def test_outputs(nb):
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    assert outputs, "no outputs: run `make notebooks`"
    assert not [o for o in outputs if o.output_type == "error" or build["WIDGET"] in o.get("data", {})]
    assert "widgets" not in nb.metadata
    assert not build["leaks"](nb)


@page
def test_reads_as_a_chapter(nb):
    first = next(c.source for c in nb.cells if c.cell_type == "markdown")
    assert re.match(r"# \S.*\n\n> \S", first), (
        "the first text of a page is `# Title`, an empty line, `> subtitle`"
    )
    assert statistics.median(len(c.splitlines()) for c in code(nb) if not only_imports(c)) <= 8


@pytest.mark.parametrize("command, mend", [
    ("nbdev_clean", "nbdev_clean"),
    ("nbdev_export", "nbdev_export"),
    ("python nbs/_build.py readme", "make notebooks"),
])
def test_in_step(command, mend, tmp_path):
    copy = tmp_path/"copy"
    shutil.copytree(ROOT, copy,
                    ignore=shutil.ignore_patterns(".*", "results", "tests", "__pycache__", "*.egg-info"))
    before = snapshot(copy)
    program, *args = command.split()
    subprocess.run([BIN/program, *args], cwd=copy, check=True)
    after = snapshot(copy)
    differ = [f for f in sorted(before.keys() | after.keys()) if before.get(f) != after.get(f)]
    assert not differ, f"{', '.join(differ)}: run `{mend}`"


@pytest.mark.parametrize("module", modules())
def test_imports_only_from_below(module):
    rooms = list(modules())
    tree = ast.walk(ast.parse(re.sub(r"^%.*", "", modules()[module], flags=re.M)))
    used = [n.module.removeprefix("kdc_nb.")
            for n in tree if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("kdc_nb.")]
    assert not [m for m in used if rooms.index(m) >= rooms.index(module)]
    assert not [n for n in tree if isinstance(n, ast.ImportFrom) for a in n.names if a.name == "*"]


def test_calibration_stands_alone():
    """Its rooms need those of the ground floor and nothing else of kdc_nb, and until pictures are drawn
    neither matplotlib, pandas nor tqdm
    """
    rooms = [m for m in modules() if m.startswith("calibration.")]
    assert len(rooms) == 24
    rooms.remove("calibration.diagrams")
    code = f"""
import sys
class Gone:
    def find_spec(self, name, *args):
        above = name.startswith("kdc_nb.") and name.split(".")[1] not in {FLOORS[:7]}
        if above or name.split(".")[0] in gone: raise ImportError(f"{{name}} is not there")
sys.meta_path.insert(0, Gone())
gone = {{"matplotlib", "pandas", "tqdm", "seaborn", "sklearn", "joblib", "torchvision"}}
for room in {rooms}: __import__(f"kdc_nb.{{room}}")
gone -= {{"matplotlib"}}
import kdc_nb.calibration.diagrams
from kdc_nb.calibration.evaluation import evaluate
assert "ECE" in repr(evaluate([[2., 0.], [0., 1.]]*20, [0, 1]*20, n_draws=10))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def draws(module: str) -> bool:
    "Whether a module makes pictures, so that it needs matplotlib"
    draw = ("controls", "explorers", "reports", "all")
    return module in draw or bool(re.search(r"^(import|from) matplotlib|calibration\.diagrams import",
                                            modules()[module], flags=re.M))


def test_what_draws_nothing_is_light():
    adapter = "experiments.torchmetric" # whose library draws
    light = [m for m in modules() if not draws(m) and m not in ("all", adapter)]
    assert {"paper.settings", "paper.commands", "experiments.sweeps", "training.trainer"} <= {*light}
    lines = [f"import kdc_nb.{m}; bad = {HEAVY} & set(sys.modules); assert not bad, ('kdc_nb.{m}', bad)"
             for m in light]
    subprocess.run([sys.executable, "-c", "\n".join(["import sys", *lines])], cwd=ROOT, check=True)


def test_the_readmes_code_runs_from_any_folder(tmp_path):
    "As somebody pastes it: block after block, in a folder that is not the checkout"
    blocks = re.findall(r"^```python\n(.*?)^```",
                        (ROOT/"README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) >= 3
    (tmp_path/"readme.py").write_text("\n".join(blocks), encoding="utf-8")
    subprocess.run([sys.executable, "-W", "error", "-W", "ignore::ImportWarning", "readme.py"],
                   cwd=tmp_path, check=True)


@page
def test_nothing_runs_for_the_asking_alone(nb):
    """JupyterLab's Run All knows no `eval: false`: what trains is behind a switch, results are found from any
    folder and never written over
    """
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        assert ("eval: false" not in build["directives"](cell)
                and not re.search(r"^!", cell.source, flags=re.M))
        assert not re.search(r"[\"'](\.\./)*results/", cell.source), "results_file(name)"
        assert not re.search(r"write_\w+\([^)]*results_file", cell.source)
