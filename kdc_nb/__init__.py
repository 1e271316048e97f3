"""Calibration transfer via knowledge distillation.

`from kdc_nb import evaluate` and so on; the rest is in the modules that the notebooks export
"""

import os
import signal
import sys
import warnings
from importlib import import_module

__version__ = "0.1.0"

# What most people come for, and the module that holds it; nothing is imported before somebody asks
_PUBLIC = {
    "evaluate": "calibration.evaluation", "compare": "calibration.comparisons",
    "compare_students": "calibration.compare_students",
    "explore_students": "student_explorer", "write_report": "reports",
    "plot_reliability": "calibration.diagrams",
    "explore_reliability": "explorers", "load_outputs": "calibration.inputs",
    "DataSpec": "training.data", "Method": "training.methods",
    "Recipe": "training.recipes", "RunSpec": "experiments.specs",
    "Distil": "experiments.specs", "run": "experiments.runs", "sweep": "experiments.sweeps",
    "read_results": "experiments.results", "results_file": "files",
}
__all__ = [*_PUBLIC]


def __getattr__(name):
    if name not in _PUBLIC: raise AttributeError(f"module 'kdc_nb' has no attribute {name!r}")
    return getattr(import_module(f"kdc_nb.{_PUBLIC[name]}"), name)


def __dir__(): return sorted([*globals(), *_PUBLIC])


def _no_spinning() -> None:
    """Let torch's threads sleep while they wait for one another: spinning, they slow training down up to
    seven times beside another program.

    OpenMP reads this when torch is loaded; where torch was there first, a warning says what to set.
    """
    if any(k in os.environ for k in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")): return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    torch = sys.modules.get("torch")
    if torch and torch.get_num_threads() > 1:
        warnings.warn("torch was imported before kdc_nb, so its threads spin while they wait, "
                      "which makes a busy machine up to seven times slower. "
                      "Import kdc_nb first, or set OMP_WAIT_POLICY=PASSIVE before Python starts",
                      RuntimeWarning, stacklevel=3)


def _stop_before_it_began(*signal_and_frame) -> None:
    "At once: a `KeyboardInterrupt` within an import may be swallowed, or become another error"
    print("\nStopped before it began; the same command starts again.", file=sys.stderr, flush=True)
    os._exit(130)


def _command(module: str) -> int:
    "Import a command and run it; Ctrl-C is told in a sentence also while torch is being imported"
    handler = signal.signal(signal.SIGINT, _stop_before_it_began)
    command = import_module(f"kdc_nb.{module}")
    signal.signal(signal.SIGINT, handler)
    if (status := command.main()) == 130:
        # once more, while Python cleans up for seconds, ends it without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


def kdc_sweep() -> int:
    "The command: many runs, or a table of the paper"
    return _command("paper.commands")


def kdc_demo() -> int:
    "The command behind `make demo`"
    os.environ["MPLBACKEND"] = "agg" # it draws into files
    print("Loading PyTorch takes a few seconds.", file=sys.stderr)
    return _command("paper.demo")


def kdc_compare() -> int:
    "The command: does a small model keep its teacher's calibration?"
    os.environ["MPLBACKEND"] = "agg" # it draws into a file
    return _command("reports")


_no_spinning()
