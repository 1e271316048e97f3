"Sweeps: the same answer in one process and in many, whatever dies, and no longer than told"
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from joblib import cpu_count

import kdc_nb.experiments.runs as kr
import kdc_nb.training.steps as steps_room
import kdc_nb.experiments.sweeps as sweeps_room
from kdc_nb.interrupts import explain_interrupt
from kdc_nb.files import save_tensors
from kdc_nb.training.data import DataSpec
from kdc_nb.training.processes import worker_processes
from kdc_nb.training.losses import cross_entropy
from kdc_nb.training.methods import Method, TrainingMethod
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.agenda import plan_sweep, read_specs, write_specs
from kdc_nb.experiments.clusters import cluster_pool
from kdc_nb.experiments.results import read_results
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import Distil, RunSpec, lineage, run_label
from kdc_nb.experiments.store import Store, all_results, remove_unfinished_runs
from kdc_nb.experiments.sweeps import default_jobs, sweep
from kdc_nb.experiments.teachers import TemperatureScaled
from kdc_nb.paper.commands import main
from tests.conftest import patch_name

TINY = DataSpec("known", n_train=100, n_valid=60, n_test=80)
TEACHER = RunSpec(TINY, "resnet8", Method("focal"), Recipe(2, 50))
STUDENTS = [RunSpec(TINY, "resnet8", Distil(TEACHER, T, .5), Recipe(2, 50)) for T in (1, 2, 4)]
LONG = [replace(TEACHER, recipe=Recipe(200, 50), seed=s) for s in range(3)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Workers have a thread each; sums by two threads differ in the last digits, and training makes more of it"
    n, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(n)
    patch.undo()


def go(specs, store, jobs=1, **kw): return sweep(specs, store, "cpu", jobs, progress=False, **kw)
def same(a, b, within=0.):
    assert all((x.logits["test"] - y.logits["test"]).abs().max() <= within for x, y in zip(a, b, strict=True))


def test_each_run_once_and_teachers_first(store):
    third = replace(STUDENTS[0], method=Distil(STUDENTS[0]))
    assert lineage(third, TEACHER, third) == [TEACHER, STUDENTS[0], third]
    assert [r.spec for r in go([third, TEACHER, third], store)] == [third, TEACHER, third]
    assert [r.spec for r in all_results(store)] == [TEACHER, STUDENTS[0], third]


@pytest.fixture(scope="module")
def alone(tmp_path_factory): return go(STUDENTS, Store(tmp_path_factory.mktemp("alone")))


def test_a_pool_gives_the_same_answer(store, alone):
    same(go(STUDENTS, store, jobs=2), alone, 1e-3)
    assert len(all_results(store)) == 4


def test_a_sweep_takes_a_process_for_each_core_by_itself(store, alone):
    "Where it pays; to the bit the runs of one process and one thread, whatever torch would take"
    torch.set_num_threads(2)
    same(sweep(STUDENTS, store, "cpu", progress=False), alone)
    assert torch.get_num_threads() == 2 and store.get(TEACHER).facts["threads"] == 1
    longer = [replace(TEACHER, recipe=Recipe(400, 50), seed=s) for s in range(3)]
    n = min(3, cpu_count())
    assert [default_jobs(specs, store, "cpu") for specs in (LONG, longer, longer[:1])] == [1, n, 1]
    apart = sweep(longer, store, "cpu", progress=False)
    torch.set_num_threads(1)
    same(apart, go(longer, Store(store.folder.parent/"one")))
    assert {r.facts.get("at_once", 1) for r in apart} == {n} and default_jobs(longer, store, "cpu") == 1


def test_the_users_own_pool_is_asked(store, alone):
    with ThreadPoolExecutor(2) as pool: same(go(STUDENTS, store, jobs=2, pool=pool), alone, 1e-3)


def killed_once(spec, where, until):
    "A worker whose process is killed during its second run, once"
    if spec == STUDENTS[1] and not (mark := where.store.folder/"killed").exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return attempt(spec, where, until)


attempt = sweeps_room._run_in_worker


def test_a_killed_worker_costs_only_its_run(store, alone, monkeypatch):
    patch_name(monkeypatch, "_run_in_worker", killed_once)
    with pytest.warns(UserWarning, match="a worker died; the . runs that are not finished start again"):
        same(go(STUDENTS, store, jobs=2), alone, 1e-3)
    assert (store.folder/"killed").exists()


@pytest.mark.long
@pytest.mark.parametrize("on", ["dask", "ray", "slurm"])
def test_a_cluster_does_what_this_process_does(store, alone, monkeypatch, on):
    "One of its workers is killed, and another run's method is registered here alone"
    @Method.register("own")
    def _own(strength=2.): return TrainingMethod(lambda z, y: strength*cross_entropy(z, y))
    patch_name(monkeypatch, "_run_in_worker", killed_once)
    own = replace(TEACHER, method=Method("own"))
    with cluster_pool(on, 2, store.folder) as pool:
        results = go([*STUDENTS, own], store, jobs=2, pool=pool)
    same(results[:3], alone, 1e-3)
    same(results[3:], [run(own, Store(store.folder.parent/"here"), "cpu", progress=False)], 1e-3)
    assert (store.folder/"killed").exists()


@pytest.mark.long
def test_a_run_that_fails_on_a_cluster_is_told_as_here(store):
    wild = replace(TEACHER, recipe=Recipe(2, 50, lr=1e20))
    with cluster_pool("slurm", 2, store.folder) as pool, pytest.raises(FloatingPointError, match="try a"):
        go([wild, TEACHER], store, jobs=2, pool=pool)
    assert [r.spec for r in all_results(store)] == [TEACHER]


def always_killed(spec, where, until): os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_always_kills_its_worker_is_given_up(store, monkeypatch):
    patch_name(monkeypatch, "_run_in_worker", always_killed)
    with warnings.catch_warnings(), pytest.raises(Exception, match="terminated"):
        warnings.simplefilter("ignore")
        go([TEACHER, replace(TEACHER, seed=1)], store, jobs=2)


def test_one_failure_stops_no_other_run(store):
    wild = replace(TEACHER, recipe=Recipe(2, 50, lr=1e20))
    for kw in ({}, {"slots": 2}):
        with pytest.raises(FloatingPointError, match="try a smaller lr"):
            go([replace(TEACHER, method=Distil(wild)), TEACHER, replace(TEACHER, seed=1)], store, **kw)
        assert {r.spec.seed for r in all_results(store)} == {0, 1} and len(all_results(store)) == 2
        for f in store.folder.iterdir(): f.unlink()
    with ThreadPoolExecutor(2) as pool, pytest.raises(FloatingPointError, match="try a smaller lr"):
        go([wild, TEACHER, replace(TEACHER, seed=1)], store, jobs=2, pool=pool)
    assert {r.spec.seed for r in all_results(store)} == {0, 1}


def test_a_full_gpu_is_given_fewer_runs(store, monkeypatch):
    at_once = []
    def full_above_one(spec, *rest):
        at_once.append(spec)
        time.sleep(.3)
        crowd = len(at_once) > 1
        at_once.remove(spec)
        return torch.OutOfMemoryError("CUDA out of memory") if crowd else attempt(spec, *rest)
    patch_name(monkeypatch, "_run_in_worker", full_above_one)
    with ThreadPoolExecutor(4) as pool, pytest.warns(UserWarning,
                                                     match="out of memory; . runs start again, 2 at a time"):
        results = go([TEACHER, *(replace(TEACHER, seed=s) for s in (1, 2, 3))], store, jobs=4, pool=pool)
    assert all(results)


def test_a_grid_asks_its_live_teacher_once(store, monkeypatch):
    """The second student of a teacher who sees augmented images hears what was said to the first, to the bit;
    one that was stopped asks again
    """
    recipe = Recipe(2, 50, augment=("crop",), live_teacher=True)
    master = RunSpec(DataSpec("digits", n_train=100, n_valid=60), "resnet8", Method("nll"), recipe)
    pupils = [replace(master, method=Distil(t, T, .5))
              for t, T in ((master, 1), (master, 2), (TemperatureScaled(master), 1))]
    asked, make = [], kr._build_teacher
    def counting(*args):
        teacher, T = make(*args)
        return teacher and (lambda x, index: asked.append(len(x)) or teacher(x, index)), T
    patch_name(monkeypatch, "_build_teacher", counting)
    shared = go(pupils, store)
    assert asked == [8, 2, 50, 50, 50, 50, 8, 2, 8, 2], (
        "each at the door, and only the first in each of four steps, scaled or not"
    )
    same(shared, [run(p, Store(store.folder.parent/"alone"), "cpu", progress=False) for p in pupils])
    heard, where = steps_room.TeacherCache(), kr.RunContext(Store(store.folder.parent/"alone"), "cpu")
    first, second = (kr.build_trainer(p, where, heard) for p in pupils[:2])
    for _ in first.chunks():
        if first.epoch == 1: break
    assert heard.cached_epochs == {0}
    assert torch.equal(kr.collect_trained_run(pupils[1], where, second.run(progress=False)).logits["test"],
                       shared[1].logits["test"])


def test_a_budget_is_kept_and_nothing_of_it_lost(store):
    began = time.time()
    assert go(LONG, store, budget=3) != [None]*3 or list(store.folder.glob("*.part"))
    assert time.time() - began < 6
    calls = 1
    while None in (results := go(LONG, store, budget="3s")): calls += 1
    whole = go(LONG, Store(store.folder.parent/"whole"))
    assert calls > 1 and [r.history for r in results] == [r.history for r in whole]
    same(results, whole)


def test_the_plan(store):
    assert [p.seconds for p in plan_sweep(STUDENTS, store, "cpu")] == [None]*4
    go(LONG, store, budget=2)
    go([TEACHER], store)
    planned = {p.spec: p for p in plan_sweep([*STUDENTS, *LONG], store, "cpu")}
    assert planned[TEACHER].epochs == 0 and all(0 < planned[s].seconds < 60 for s in STUDENTS)
    assert min(planned[s].epochs for s in LONG) < 200, "the checkpoint is looked at"


def test_the_plan_where_a_checkpoint_is_of_an_older_version(store):
    "As `fit` takes it: the run starts again"
    save_tensors(store.path(TEACHER, "part"), {}, epoch=1, history=[], seconds=1.)
    assert ([(p.epochs, p.seconds) for p in plan_sweep([TEACHER], store, "cpu")]
            == [(TEACHER.recipe.epochs, None)])


COMMAND = [sys.executable, "-m", "kdc_nb"]


def command(*args):
    return subprocess.run([*COMMAND, *map(str, args), "--device", "cpu"], capture_output=True, text=True)


def test_the_command(tmp_path):
    write_specs(STUDENTS[:2], file := tmp_path/"runs.json")
    assert read_specs(file) == STUDENTS[:2]
    out = command(file, "--store", tmp_path/"s", "--plan").stdout
    assert "3 runs to do" in out and run_label(STUDENTS[1]) in out and not (tmp_path/"s").exists()
    assert command(file, "--store", tmp_path/"s", "--budget", "0s").returncode == 75
    done = command(file, "--store", tmp_path/"s", "--results", tmp_path/"light.npz")
    assert (done.returncode == 0 and "2 of 2 runs done" in done.stdout
            and set(read_results(tmp_path/"light.npz")) == set(STUDENTS[:2]))
    assert "0 runs to do" in command(file, "--store", tmp_path/"s", "--plan").stdout


@pytest.mark.parametrize("text, message", [
    (None, "a file that is there"), ("{", "a JSON list of descriptions"),
    ("[3]", "descriptions of runs only"), ("3", "a JSON list"),
    ('[{"kind": "RunSpec", "data": {"kind": "Data", "name": "mnist"}, "model": "resnet8"}]', "'mnist'"),
    ('[{"kind": "Run"}]', "'Run'"),
    ('[{"kind": "RunSpec"}]', "a JSON list of descriptions")])
def test_a_bad_file_is_told_in_a_sentence(tmp_path, capsys, text, message):
    if text is not None: (tmp_path/"runs.json").write_text(text)
    assert main([str(tmp_path/"runs.json")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["9 minutes", "-3s", "", "min"])
def test_a_bad_budget(store, budget):
    with pytest.raises(ValueError, match="budget: got"): go([TEACHER], store, budget=budget)


@pytest.mark.long
def test_killed_thirty_times_at_random(tmp_path):
    """SIGKILL at any moment: what is finished stays, what is not goes on, and the end
    is what it would have been
    """
    runs = [replace(s, recipe=Recipe(8, 50)) for s in (TEACHER, replace(TEACHER, seed=1))]
    write_specs(runs, file := tmp_path/"runs.json")
    store, kills, finished, rng, kept = Store(tmp_path/"s"), 0, 0, random.Random(0), {}
    clean = multiprocessing.get_context("forkserver") # has imported what takes long; else a new process
    clean.set_forkserver_preload(["kdc_nb.paper.commands", "torch._dynamo", "scipy.special"])
    def start(folder):
        p = clean.Process(target=main, args=([str(file), "--store", str(folder), "--device", "cpu"],))
        p.start()
        return p
    for k in range(2): # the first starts the server
        began = time.monotonic()
        start(tmp_path/f"timed {k}").join()
    whole = time.monotonic() - began
    while kills < 30:
        p = start(store.folder)
        p.join(rng.uniform(0, 1.5*whole))
        if p.is_alive(): p.kill(); p.join(); kills += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            now = ({f.name: f.read_bytes() for f in store.folder.glob("*.run")}
                   if store.folder.exists() else {})
            assert (all(now.get(k) == v for k, v in kept.items())
                    and all(store.read(store.folder/k) for k in now))
        kept = now
        if p.exitcode == 0: kept = {}; finished += 1; [f.unlink() for f in store.folder.iterdir()]
    results = go(runs, store)
    same(results, go(runs, Store(tmp_path/"whole")))
    remove_unfinished_runs(store)
    assert {f.suffix for f in store.folder.iterdir()} == {".run", ".net"} and finished


SCRIPT = """
import sys
from kdc_nb import DataSpec, Distil, Recipe, RunSpec, run, sweep
from kdc_nb.experiments.store import Store
teacher = RunSpec(DataSpec("known", n_train=200, n_valid=50, n_test=100), "resnet8", "nll", Recipe(1, 50))
specs = [RunSpec(teacher.data, "resnet8", Distil(teacher), Recipe(4000, 50), s) for s in range(2)]
if sys.argv[2] == "run": run(specs[0], Store(sys.argv[1]), "cpu", progress=False)
else: sweep(specs, Store(sys.argv[1]), "cpu", jobs=int(sys.argv[2]))
"""


@pytest.mark.parametrize("kill", [os.killpg, os.kill], ids=["a terminal, to all", "a notebook, to one"])
@pytest.mark.parametrize("how", ["run", "1", "2"])
def test_ctrl_c_is_told_in_a_sentence(tmp_path, how, kill):
    """A script's traceback is its own line and ours, not torch's; no worker goes on (it
    would hold the pipe open)
    """
    (tmp_path/"script.py").write_text(SCRIPT)
    child = subprocess.Popen([sys.executable, tmp_path/"script.py", tmp_path/"s", how],
                             stderr=subprocess.PIPE, text=True, start_new_session=True)
    began = time.monotonic()
    while not list(tmp_path.glob("s/*.run")) and child.poll() is None and time.monotonic() - began < 240:
        time.sleep(.1)
    kill(child.pid, signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert f"Stopped. In {tmp_path/'s'} are all finished runs" in said and "the same call goes on" in said
    assert "torch" not in said and said.count("Traceback") == 1, said


def test_a_pool_that_is_stopped_begins_nothing_more(monkeypatch):
    "What waited is given up without a word: no thread of the pool fails over it"
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))
    with pytest.raises(KeyboardInterrupt), worker_processes(1) as pool:
        pool.submit(int).result() # it has started
        for _ in range(6): last = pool.submit(time.sleep, 60)
        raise KeyboardInterrupt
    assert last.done() and seen == []


def workers_of(pid: int) -> int:
    "How many processes of a pool a process has started"
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "popen_loky"], capture_output=True, text=True)
    return len(found.stdout.split())


def test_ctrl_c_while_workers_start(tmp_path):
    "They import for seconds, and must not answer with a traceback of whatever they import"
    (tmp_path/"script.py").write_text(SCRIPT.replace("Distil(teacher)", "'nll'"))
    child = subprocess.Popen([sys.executable, tmp_path/"script.py", tmp_path/"s", "2"],
                             stderr=subprocess.PIPE, text=True, start_new_session=True)
    began = time.monotonic()
    while workers_of(child.pid) < 2 and child.poll() is None and time.monotonic() - began < 240:
        time.sleep(.02)
    time.sleep(.5)
    os.killpg(child.pid, signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert "Stopped. In" in said and said.count("Traceback") == 1 and "import" not in said, (
        child.returncode, said)


def test_ctrl_c_before_anything_began():
    child = subprocess.Popen([sys.executable, "-m", "kdc_nb", "table1"],
                             stderr=subprocess.PIPE, text=True, start_new_session=True)
    time.sleep(.5) # torch takes seconds to import
    os.killpg(child.pid, signal.SIGINT)
    assert (child.communicate(timeout=60)[1] == "\nStopped before it began; the same command starts again.\n"
            and child.returncode == 130)


def test_jupyter_shows_the_sentence_alone(capsys):
    from IPython.core.interactiveshell import InteractiveShell
    def interrupted():
        with explain_interrupt(Path("store")): raise KeyboardInterrupt
    shell = InteractiveShell.instance()
    shell.user_ns["interrupted"] = interrupted
    shell.run_cell("interrupted()")
    InteractiveShell.clear_instance()
    assert (capsys.readouterr().out
            == "Stopped. In store are all finished runs, and the others as they were at most ten seconds "
               "ago; the same call goes on.\n")


def test_two_processes_on_one_store(tmp_path, alone):
    write_specs(STUDENTS, file := tmp_path/"runs.json")
    both = [subprocess.Popen([*COMMAND, str(file), "--store", str(tmp_path/"s"), "--device", "cpu"],
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(p.communicate()[1].count("damaged"), p.returncode) for p in both] == [(0, 0)]*2
    same(go(STUDENTS, Store(tmp_path/"s")), alone, 1e-3)


def test_a_full_disk_loses_nothing(tmp_path, alone):
    "No file may grow beyond 200 kB: the run fails in a sentence, and goes on when there is room"
    write_specs(STUDENTS[:1], file := tmp_path/"runs.json")
    limited = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
               "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
               "from kdc_nb.paper.commands import main; sys.exit(main(sys.argv[1:]))")
    args = [str(file), "--store", str(tmp_path/"s"), "--device", "cpu"]
    full = subprocess.run([sys.executable, "-c", limited, *args], capture_output=True, text=True)
    assert full.returncode == 1 and "File too large" in full.stderr and "Traceback" not in full.stderr
    assert not list((tmp_path/"s").glob("*.run")) and not list((tmp_path/"s").glob("*.net"))
    assert command(*args[:3]).returncode == 0
    same(go(STUDENTS[:1], Store(tmp_path/"s")), alone[:1], 1e-3)


def test_real_photographs_with_a_live_teacher(photos, store):
    """CIFAR-100, cropped and mirrored, the teacher by MDCA asked about every view, the epoch
    with the best validation kept
    """
    recipe = Recipe(2, 50, augment=("crop", "flip"), live_teacher=True, select="best")
    teacher = RunSpec(DataSpec("cifar100", n_train=100, n_valid=100),
                      "resnet8", Method("mdca", beta=5), recipe)
    for r in go([replace(teacher, method=Distil(teacher, T, .9)) for T in (1, 4)], store):
        assert (r.evaluation.n == 10_000 and len(r.history) == 2
                and all(0 <= h["valid_ece"] <= 1 for h in r.history))


@pytest.mark.parametrize("how", [{}, {"jobs": 2}, {"slots": 2}])
def test_the_callers_bf16_goes_along(tmp_path, how):
    "Whichever process trains"
    specs = [RunSpec(DataSpec("known", n_train=40, n_valid=20, n_test=20), "resnet8", "nll", Recipe(1, 20), k)
             for k in (0, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        done = sweep(specs, Store(tmp_path), "cpu", progress=False, **how)
    assert [r.facts["precision"] for r in done] == ["bf16"]*2
