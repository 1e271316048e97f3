"The linter's few rules (pyproject.toml), for notebooks and whatever else is written by hand"

import subprocess
import sys
from pathlib import Path

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
