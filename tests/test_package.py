"The package's own door: names, threads, commands"
import os
import signal
import subprocess
import sys

import pytest

import kdc_nb
from kdc_nb.files import save_tensors
from kdc_nb.training.data import DataSpec
from kdc_nb.training.models import MODELS, build_model
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.agenda import format_plan, plan_sweep
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import RunSpec, _check_model
from kdc_nb.experiments.store import Store, all_results
from tests.conftest import patch_name

SPINS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    "A program in an environment that says nothing of threads"
    plain = {k: v for k, v in os.environ.items() if k not in SPINS}
    return subprocess.run([sys.executable, "-c", code], env=plain | env,
                          capture_output=True, text=True, check=True)


@pytest.mark.parametrize("name", kdc_nb._PUBLIC)
def test_public_names(name):
    assert callable(getattr(kdc_nb, name)) and name in dir(kdc_nb)


def test_a_star_takes_the_public_names():
    assert (python("from kdc_nb import *; print(evaluate.__name__, 'os' in globals())").stdout
            == "evaluate False\n")


CLEANING = """
import atexit, sys, time, types
import kdc_nb
kdc_nb.import_module = lambda name: types.SimpleNamespace(main=lambda: 130)
atexit.register(lambda: print("cleaning", flush=True) or time.sleep(60))
sys.exit(kdc_nb.kdc_sweep())
"""


def test_ctrl_c_once_more_while_python_cleans_up():
    child = subprocess.Popen([sys.executable, "-c", CLEANING], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "cleaning\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[1] == "" and child.returncode == -signal.SIGINT


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'kdc_nb' has no attribute 'evaluat'"): kdc_nb.evaluat


def test_nothing_heavy_is_imported_before_somebody_asks():
    assert (python("import sys, kdc_nb; print({'torch', 'numpy', 'matplotlib'} & {*sys.modules})").stdout
            == "set()\n")


def test_threads_sleep_while_they_wait():
    assert python("import kdc_nb, os, torch; print(os.environ['OMP_WAIT_POLICY'])").stdout == "PASSIVE\n"
    assert (python("import kdc_nb, os; print(os.environ['OMP_WAIT_POLICY'])", OMP_WAIT_POLICY="ACTIVE").stdout
            == "ACTIVE\n"), "whoever says so has a reason"


def test_where_torch_was_first_it_is_said_what_to_set():
    code = "import torch; torch.set_num_threads({}); import kdc_nb"
    assert "set OMP_WAIT_POLICY=PASSIVE before Python starts" in python(code.format(2)).stderr
    assert not python(code.format(1)).stderr and not python(code.format(2), GOMP_SPINCOUNT="0").stderr


def test_a_plan_fetches_nothing(tmp_path, monkeypatch):
    "On a machine that has no CIFAR-100, what there is to do is said, and which file will be needed"
    spec = RunSpec("cifar100", "resnet8", "nll", "fast")
    patch_name(monkeypatch, "_fetch_cifar_archive", lambda *args: pytest.fail("fetched"))
    planned = plan_sweep([spec], Store(tmp_path), "cpu")
    assert [(p.spec, p.epochs, p.seconds) for p in planned] == [(spec, 40, None)]
    assert format_plan(planned).endswith(
        f"cifar-100-python.tar.gz will be downloaded first, or taken from {os.environ['KDC_CACHE']}/data"
    )


def test_a_persons_own_runs_are_left_out_and_not_said_to_be_trained_again(tmp_path, monkeypatch):
    "A run with a network that is not registered here is no damaged run"
    store = Store(tmp_path)
    with monkeypatch.context() as m:
        m.setitem(MODELS, "mine",
                  lambda n_classes, in_channels: build_model("resnet8", n_classes, in_channels))
        run(RunSpec(DataSpec("known", n_train=40, n_valid=20, n_test=20), "mine", "nll", Recipe(1, 20)),
            store, "cpu", progress=False)
    _check_model.cache_clear()
    with pytest.warns(UserWarning, match="'mine'.*left out") as said: assert all_results(store) == []
    assert "trained again" not in str(said[0].message)


def test_a_whole_file_that_is_no_result_is_left_out(tmp_path):
    "Such as weights under another name"
    save_tensors(tmp_path/"x.run", {})
    with pytest.warns(UserWarning, match="x.run: no 'evaluation' in it; left out"):
        assert all_results(Store(tmp_path)) == []


def test_help_tells_the_exit_status():
    text = subprocess.run([sys.executable, "-m", "kdc_nb", "--help"],
                          capture_output=True, text=True, check=True).stdout
    assert all(f"{k} " in text.partition("Exit status:")[2] for k in (0, 75, 130, 2, 1))
