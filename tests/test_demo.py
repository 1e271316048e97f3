"The demo as a command: it finishes, is stopped, goes on, and refuses what it cannot do."

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from kdc_nb.calibration.outcomes import compute_outcomes
from kdc_nb.training.data import DataSpec
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.trainer import Trainer
from kdc_nb.paper.demo import _demo_parts, _format_verdict, _part_specs, run_demo
from kdc_nb.paper.demo import main
from tests.conftest import patch_name
from tests.conftest import made


@pytest.fixture
def small(monkeypatch):
    "The same blocks, a few epochs each."
    few = [b._replace(recipe=Recipe(2, 32), setting=b.setting._replace(data=d))
           for b, d in zip(_demo_parts(),
                           (DataSpec("known", n_train=80, n_valid=60, n_test=90), DataSpec("digits")))]
    patch_name(monkeypatch, "_demo_parts", lambda *args: few)


def test_tables_figures_and_a_page(small, tmp_path, monkeypatch):
    text = run_demo(n_seeds=2, folder=tmp_path, device="cpu", progress=False)
    assert (text.count("KD(C), from NLL after TS") >= 2
            and "Images whose truth is known" in text and "2 seeds" in text)
    assert (sorted(p.name for p in tmp_path.glob("*.png"))
            == [f"{d}_{k}.png" for d in ("digits", "known") for k in ("ece", "reliability")])
    page = (tmp_path/"index.html").read_text()
    assert page.count("<img") == 4 and page.count("<table>") == 2 and "http" not in page
    monkeypatch.setattr(Trainer, "train_epoch", lambda trainer: pytest.fail("trained again"))
    assert run_demo(n_seeds=2, folder=tmp_path, device="cpu", progress=False) == text


def test_every_run_of_the_demo_is_another():
    for block in [*_demo_parts(), *_demo_parts("cifar10"), *_demo_parts("cifar100", gpu=True)]:
        specs = [s for seed in range(3) for s in _part_specs(block, seed).values()]
        assert len(set(specs)) == len(specs)


def test_bad_input_is_told_in_a_sentence(capsys, tmp_path):
    assert main(["--seeds", "0", "--folder", str(tmp_path)]) == 2
    assert "seeds: got 0, expected at least 1" in capsys.readouterr().err
    assert main(["--device", "tpu", "--folder", str(tmp_path)]) == 2
    (tmp_path/"file").write_text("")
    assert main(["--folder", str(tmp_path/"file"/"below")]) == 1 and "file" in capsys.readouterr().err, (
        "before anything is trained"
    )


def test_ctrl_c_keeps_what_is_done(tmp_path):
    "Interrupted after its first run, the command says what to do, and the store holds that run."
    child = subprocess.Popen([sys.executable, "-c",
                              "from kdc_nb import kdc_demo; raise SystemExit(kdc_demo())",
                              "--seeds", "1", "--folder", str(tmp_path), "--device", "cpu"],
                             stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                             # a job in the background would ignore it
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    began = time.monotonic()
    while not list(tmp_path.glob("runs/*.run")) and child.poll() is None and time.monotonic() - began < 240:
        time.sleep(.1)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130 and "the same command goes on" in child.stderr.read()
    assert list(tmp_path.glob("runs/*.run"))


@pytest.mark.parametrize("better, said", [(True, "Calibration passed"), (False, "It cannot be told here")])
def test_the_verdict_is_beyond_chance(monkeypatch, better, said):
    "The student of a calibrated teacher may be better calibrated, or made of the same outputs as the other"
    z, y, _ = made(2000, 10, 2.)
    specs = _part_specs(_demo_parts()[0], 0)
    def of(name, logits):
        return [SimpleNamespace(spec=specs[name], raw=SimpleNamespace(outcomes=compute_outcomes(logits, y)),
                                scaled=SimpleNamespace(outcomes=None))]
    results = {name: of(name, z/2 if better and name == "KD(C), from NLL after TS" else z)
               for name in ("KD(UC), from NLL", "KD(C), from NLL after TS")}
    assert _format_verdict(results).startswith(said)
