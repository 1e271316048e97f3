"The command: the check of a machine, results that are written while runs go on"
import os
import signal
import subprocess
import sys
import time

import pytest

import kdc_nb.training.processes as processes_room
import kdc_nb.paper.selfcheck as selfcheck_room
from kdc_nb.training.data import DataSpec
from kdc_nb.training.devices import mark_cuda_broken
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.steps import GraphCaptureError
from kdc_nb.training.trainer import Trainer
from kdc_nb.experiments.agenda import write_specs
from kdc_nb.experiments.results import read_results
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import RunSpec
from kdc_nb.experiments.store import Store
from kdc_nb.paper.commands import _ResultsFile
from kdc_nb.paper.commands import main
from tests.conftest import patch_name

TINY = RunSpec(DataSpec("known", n_train=100, n_valid=60, n_test=80),
               "resnet8", Method("focal"), Recipe(1, 50))


@pytest.fixture
def few(monkeypatch):
    "Three methods and two losses of a teacher instead of all"
    patch_name(monkeypatch, "_CHECKED_METHODS",
               {k: selfcheck_room._CHECKED_METHODS[k] for k in ("nll", "crl", "mdca")})
    patch_name(monkeypatch, "_TEACHER_LOSSES",
               {k: selfcheck_room._TEACHER_LOSSES[k] for k in ("distillation", "distillation, ctkd")})
    yield
    mark_cuda_broken(False)


def test_the_check_passes_here(few, capsys):
    assert main(["--check", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device cpu, ") and lines[-1] == "All is well."
    assert ([line.split("  ")[0] for line in lines[2:-1]]
            == ["nll", "distillation", "distillation, ctkd", "crl", "mdca",
                "stopped and resumed", "side by side"])


def test_a_method_that_trains_otherwise_the_second_time_is_a_fault(few, capsys, monkeypatch):
    learn, times = selfcheck_room._epoch_losses, []
    def drifting(training, *rest):
        if type(training.method).__name__ == "_CorrectnessRanking": times.append(1)
        return [x*(1 + .2*(len(times) == 1)) for x in learn(training, *rest)]
    patch_name(monkeypatch, "_epoch_losses", drifting)
    assert main(["--check", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert ("crl                         FAULT   the second time is 20% off the first" in out
            and "nll                         well" in out)
    assert out.splitlines()[-1] == "Faults: crl"


def test_after_a_recording_that_failed_the_others_are_checked_in_fresh_processes(few, capsys, monkeypatch):
    capture = Trainer.capture
    def refuse(trainer):
        if type(trainer.method).__name__ == "_CorrectnessRanking":
            mark_cuda_broken()
            raise GraphCaptureError("the step cannot be recorded: why")
        return capture(trainer)
    monkeypatch.setattr(Trainer, "capture", refuse)
    asked, elsewhere = [], processes_room.call_in_fresh_process
    patch_name(monkeypatch, "call_in_fresh_process",
               lambda f, *args: asked.append(args) or elsewhere(f, *args))
    assert main(["--check", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert ("crl                         FAULT   GraphCaptureError: the step cannot be recorded: why" in out
            and out.splitlines()[-1] == "Faults: crl")
    assert len(asked) == 3


@pytest.mark.parametrize("args, message", [
    ([], "what: got None"), (["table1", "--check"], "what: got table1, expected nothing with --check"),
    (["--check", "--device", "tpu"], "device: got tpu"),
    (["table1", "--small", "known", "--slots", "0"], "slots: got 0"),
    (["table1", "--small", "known", "--slots", "2", "--jobs", "2"], "slots: got 2, expected 1 beside 2 jobs")
])
def test_what_makes_no_sense_is_told_in_a_sentence(capsys, args, message, tmp_path):
    assert main([*args, "--store", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_results_are_written_while_runs_go_on(tmp_path):
    "After half a minute, here none; what another machine left in the file stays"
    store, path = Store(tmp_path/"store"), tmp_path/"r.npz"
    first, second = (run(RunSpec(TINY.data, "resnet8", Method(m), TINY.recipe), store, "cpu", progress=False)
                     for m in ("nll", "ls"))
    _ResultsFile(None, True).add(first) # nowhere to write to
    file = _ResultsFile(str(path), keep_outcomes=True, every=0.)
    file.add(first)
    assert set(read_results(path)) == {first.spec}
    later = _ResultsFile(str(path), keep_outcomes=False)
    later.add(second)
    assert set(read_results(path)) == {first.spec}
    later.close()
    kept = read_results(path)
    assert (set(kept) == {first.spec, second.spec} and kept[first.spec].raw.outcomes
            and not kept[second.spec].raw.outcomes)
    before = path.stat().st_mtime_ns
    later.close()
    assert path.stat().st_mtime_ns == before, "there was nothing new"


def test_two_commands_share_a_file(tmp_path):
    store, path = Store(tmp_path/"store"), str(tmp_path/"deeper"/"r.npz")
    results = [run(RunSpec(TINY.data, "resnet8", Method(m), TINY.recipe), store, "cpu", progress=False)
               for m in ("nll", "ls")]
    files = [_ResultsFile(path, keep_outcomes=True) for _ in results]
    for file, r in zip(files, results): file.add(r)
    for file in files: file.close()
    assert set(read_results(path)) == {r.spec for r in results}


def test_a_results_file_that_cannot_be_is_told_first(capsys, tmp_path):
    (tmp_path/"file").write_text("")
    assert main(["table1", "--small", "known", "--results",
                 str(tmp_path/"file"/"r.npz"), "--store", str(tmp_path)]) == 2
    assert str(tmp_path/"file") in capsys.readouterr().err
    assert not list(tmp_path.glob("*.run"))


def test_a_failed_run_is_told_below_the_table_and_what_was_there_is_in_the_file(
    tmp_path, capsys, monkeypatch
):
    wild = RunSpec(TINY.data, "resnet8", "nll", Recipe(1, 50, lr=1e20))
    write_specs([TINY, wild], tmp_path/"runs.json")
    run(TINY, Store(tmp_path/"s"), "cpu", progress=False)
    assert main([str(tmp_path/"runs.json"), "--store", str(tmp_path/"s"),
                 "--results", str(tmp_path/"r.npz"), "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert "1 of 2 runs done" in shown.out and "not time enough" not in shown.out
    assert "FloatingPointError: loss: got" in shown.err and "This was known resnet8 nll, seed 0." in shown.err
    assert set(read_results(tmp_path/"r.npz")) == {TINY}


def test_ctrl_c_leaves_the_results_of_what_was_done(tmp_path):
    args = ["table1", "--small", "known", "--recipe", "smoke", "--seeds", "1",
            "--device", "cpu", "--store", tmp_path/"s", "--results", tmp_path/"r.npz", "--jobs", "1"]
    child = subprocess.Popen([sys.executable, "-m", "kdc_nb", *map(str, args)],
                             stderr=subprocess.PIPE, text=True, start_new_session=True)
    began = time.monotonic()
    while len(list(tmp_path.glob("s/*.run"))) < 3 and child.poll() is None and time.monotonic() - began < 240:
        time.sleep(.1)
    os.killpg(child.pid, signal.SIGINT)
    assert "Stopped. What is done is kept" in child.communicate(timeout=60)[1] and child.returncode == 130
    names = {r.title() for r in read_results(tmp_path/"r.npz").values()}
    assert {
        "known resnet14 nll, seed 0",
        "known resnet8 KD(T=1, alpha=0.9) from [known resnet14 nll, seed 0], seed 0"
    } <= names, "a teacher and its student"


def test_a_file_that_leaves_is_named(tmp_path, capsys):
    (tmp_path/"leaves.py").write_text("import sys; sys.exit(3)")
    assert main(["fig2", "--small", "known", "--plan", "--import", str(tmp_path/"leaves.py")]) == 2
    assert "leaves.py: SystemExit: 3" in capsys.readouterr().err
