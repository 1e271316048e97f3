"""The notebooks' housekeeping: run them and keep what they show, make README.md, test everything.

    python nbs/_build.py jupyter            JupyterLab as the pages want it: kernels with the same sums on
                                            every machine, clean files
    python nbs/_build.py run [NAME ...]     all notebooks, or those whose path starts
                                            with a NAME (06, studies/)
    python nbs/_build.py readme             README.md from index.ipynb
    python nbs/_build.py test [--all]       notebooks, then tests; --all adds the long tests
"""
import argparse
import os
import posixpath
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from xml.etree import ElementTree

import nbformat
from joblib import cpu_count

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/"nbs"
FLAGS = {"slow"} # as in `tst_flags`: cells that nbdev_test runs only when asked
# in which a second run gives the same bytes, also on another machine (x86-64 with AVX2): no hash order,
# no dates, sums in one order
ENV = {
    "PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": "0", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES":
        "X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
    "NUMBA_CPU_NAME": "generic",
}
PROGRESS = re.compile(r"\[\d\d:\d\d[<,]") # how every tqdm bar ends
PRIVATE = re.compile(r"0x7f[0-9a-f]+|(?<![\w.:/])/(?:home|root|Users|tmp|private|var)/[\w.]+")
WIDGET = "application/vnd.jupyter.widget-view+json"


# Notebooks and cells

def notebooks(*names: str) -> list[Path]:
    "The notebooks of the project, or those whose path below nbs/ starts with one of `names`"
    found = [p.relative_to(NBS) for p in sorted(NBS.rglob("*.ipynb"))]
    return [NBS/p
            for p in found if not any(part[0] in "._" for part in p.parts) and str(p).startswith(names or "")]


def directives(cell) -> set[str]:
    "The `#|` lines at the top of a cell, without the mark"
    lines = cell.source.splitlines() if cell.cell_type == "code" else []
    return {" ".join(line[2:].split()) for line in lines if line.startswith("#|")}


def skipped(cell) -> bool:
    "Whether a cell is left out where a page is made: it takes long"
    return bool(directives(cell) & FLAGS)


# Run

def fallback(output):
    "An output without its live widget and its progress bar; None where nothing remains"
    data = output.get("data", {})
    if WIDGET in data: del data[WIDGET]
    if PROGRESS.search("".join(output.get("text", data.get("text/plain", "")))): return None
    return output if data or output["output_type"] in ("stream", "error") else None


def make_static(nb) -> None:
    "Leave of a notebook what is committed: no live widgets, no progress bars, no counts"
    from nbdev.clean import clean_nb
    for cell in nb["cells"]:
        if "outputs" in cell: cell["outputs"] = [o for o in map(fallback, cell["outputs"]) if o]
    nb["metadata"].pop("widgets", None)
    clean_nb(nb)


def leaks(nb) -> list[str]:
    "What no committed output may hold: warnings, memory addresses, paths of one machine"
    found = []
    for i, output in ((i, o) for i, c in enumerate(nb.cells) for o in c.get("outputs", [])):
        texts = ([v for k, v in output.get("data", {}).items() if k.startswith("text/")]
                 + [output.get("text", "")])
        private = [m for t in texts for m in PRIVATE.findall(t) + [str(ROOT)]*(str(ROOT) in t)]
        if private: found.append(f"cell {i} shows {private[0]}")
        if output.get("name") == "stderr": found.append(f"cell {i} writes to stderr: {output.text.strip()}")
    return found


def jupyter() -> int:
    """Make every JupyterLab of this environment start kernels in ENV, with its commands on the path, and save
    and open pages as _jupyter.py says
    """
    from ipykernel.kernelspec import install
    install(prefix=sys.prefix, env=ENV | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}${{PATH}}"})
    config = Path(sys.prefix)/"etc"/"jupyter"/"jupyter_server_config.py"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(f'load_subconfig("_jupyter.py", path={str(NBS)!r})\n')
    return 0


def executed(path: Path):
    """The notebook at `path`, run in a kernel of its own and cleaned; the cells that
    `skipped` names keep their outputs
    """
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells: cell.metadata["tags"] = ["skip-execution"]*skipped(cell)
    NotebookClient(nb, timeout=None, kernel_name="python3", store_widget_state=False, coalesce_streams=True,
                   extra_arguments=["--log-level=ERROR"],
                   resources={"metadata": {"path": str(path.parent)}}).execute(
                       env=os.environ | ENV | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    make_static(nb)
    return nb


def run(names: list[str]) -> int:
    "Run notebooks and keep their outputs; the first that fails stops the run and stays as it was"
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    chosen = notebooks(*names)
    if not chosen: sys.exit(f"no notebook's path starts with {' or '.join(names)}")
    for path in chosen:
        start = time.time()
        try: nb = executed(path)
        except (CellExecutionError, DeadKernelError) as e:
            sys.exit(f"\n{path.relative_to(ROOT)} failed and was left as it was\n{e}")
        if found := leaks(nb):
            sys.exit(f"\n{path.relative_to(ROOT)} was left as it was:\n  " + "\n  ".join(found))
        nbformat.write(nb, path)
        print(f"{path.relative_to(ROOT)}  {time.time() - start:.0f} s", flush=True)
    return 0


# README.md

def from_root(text: str) -> str:
    "Markdown whose relative links start at nbs/, made to start at the root"
    return re.sub(r"(\]\()(?![a-z]+:|[#/])([^)\s]+)",
                  lambda m: m[1] + posixpath.normpath(f"nbs/{m[2]}"), text)


def readme() -> int:
    "README.md from index.ipynb; pictures among its outputs go to nbs/images"
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    nb = nbformat.read(NBS/"index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [c for c in nb.cells if "hide" not in directives(c)]
    for cell in nb.cells:
        cell.metadata["tags"] = ["output alone"]*("echo: false" in directives(cell))
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    config = {"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"output alone"}}}
    text, resources = MarkdownExporter(config=Config(config)).from_notebook_node(
        nb, {"unique_key": "index", "output_files_dir": "images"}
    )
    for old in NBS.glob("images/index_*"): old.unlink()
    for name, data in resources["outputs"].items():
        (NBS/name).parent.mkdir(exist_ok=True)
        (NBS/name).write_bytes(data)
    text = re.sub(r"\n\s*\n(?=\S)", "\n\n", from_root(text)).strip()
    (ROOT/"README.md").write_text(
        f"<!-- made from nbs/index.ipynb: edit that, then `make notebooks` -->\n\n{text}\n"
    )
    return 0


# Test

@dataclass
class Tally:
    "How many passed, failed and were skipped"
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other): return Tally(*map(sum, zip(astuple(self), astuple(other))))
    def __str__(self): return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def stream(*command: str) -> tuple[int, str]:
    """Run a command of this environment, show what it says as it says it; its status and output.

    Of the hundreds of processes that follow, only the first compiles what it imports.
    """
    command = (str(Path(sys.executable).with_name(command[0])), *command[1:])
    env = os.environ | ENV | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": ""}
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=env) as p:
        lines = []
        for line in p.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if p.returncode < 0: print(f"\n{Path(command[0]).name} was ended by signal {-p.returncode}", flush=True)
    return p.returncode, "".join(lines)


def test_notebooks() -> Tally:
    "nbdev_test, a worker for each core"
    status, text = stream("nbdev_test", "--n_workers", str(cpu_count()), "--do_print")
    ran = len(re.findall(r"^- Completed ", text, re.M))
    bad = len(re.findall(r"^\t\S+\.ipynb$", text.partition("Failed On The Following Notebooks")[2], re.M))
    return Tally(ran - bad, len(notebooks()) - ran + bad or int(status != 0))


def test_modules(long: bool) -> Tally:
    "pytest over tests/, a worker for each core, which takes groups of tests as `tests/conftest.py` has them"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/"report.xml"
        status, _ = stream("pytest", f"--junitxml={report}", "--durations=20", "-o", "junit_logging=no",
                           "--numprocesses", str(cpu_count()), "--dist", "loadgroup",
                           *([] if long else ["-m", "not long"]))
        if not report.exists(): return Tally(failed=1)
        suite = ElementTree.parse(report).getroot().find("testsuite")
    tests, failures, errors, skips = (int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped"))
    bad = failures + errors or int(status != 0)
    return Tally(max(0, tests - bad - skips), bad, skips)


def test(long: bool) -> int:
    "Every part, whatever the ones before it gave; one summary; 1 if anything failed"
    total, rows = Tally(), []
    for name, part in {"notebooks": test_notebooks, "tests": lambda: test_modules(long)}.items():
        print(f"\n== {name}", flush=True)
        start = time.time()
        total += (tally := part())
        rows.append(f"{name:<10} {tally}  ({time.time() - start:.0f} s)")
    print("\n== summary", *rows, total, sep="\n", flush=True)
    return total.failed > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("jupyter")
    commands.add_parser("run").add_argument("names", nargs="*", metavar="NAME")
    commands.add_parser("readme")
    commands.add_parser("test").add_argument("--all", action="store_true")
    args = parser.parse_args()
    match args.command:
        case "jupyter": return jupyter()
        case "run": return run(args.names)
        case "readme": return readme()
        case "test": return test(args.all)


if __name__ == "__main__": sys.exit(main())
