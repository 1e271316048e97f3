"Several runs in one process: each as if it were alone, on a stream of its own, whatever fails beside it"
import gc
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import kdc_nb.interrupts as interrupts_room
import kdc_nb.experiments.runs as runs_room
import kdc_nb.experiments.specs as specs_room
import kdc_nb.experiments.sweeps as sweeps_room
from kdc_nb.training.data import DataSpec
from kdc_nb.training.devices import cuda_is_broken, mark_cuda_broken
from kdc_nb.training.methods import Method
from kdc_nb.training.models import MODELS, build_model
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.steps import GraphCaptureError
from kdc_nb.training.trainer import Trainer
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.side_by_side import SideBySideRunner, TeacherCachePool
from kdc_nb.experiments.specs import Distil, RunSpec
from kdc_nb.experiments.store import Store, all_results
from kdc_nb.experiments.sweeps import sweep
from kdc_nb.experiments.teachers import TemperatureScaled
from tests.conftest import patch_name

DIGITS = DataSpec("digits", n_train=100, n_valid=60)
RECIPE = Recipe(2, 50, augment=("crop",), live_teacher=True)
TEACHER = RunSpec(DIGITS, "resnet8", Method("nll"), RECIPE)
STUDENTS = [replace(TEACHER, method=Distil(t, T, .5))
            for t, T in ((TEACHER, 1), (TemperatureScaled(TEACHER), 1), (TEACHER, 4))]
OTHERS = [replace(TEACHER, method=Method(m), seed=1) for m in ("crl", "pskd", "adafocal", "mixup")]
ALL = [*STUDENTS, *OTHERS]


def go(specs, store, **kw): return sweep(specs, store, "cpu", progress=False, **kw)
def same(a, b):
    assert all(torch.equal(x.logits["test"], y.logits["test"]) and x.history == y.history
               for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = Store(tmp_path_factory.mktemp("alone"))
    return [run(s, folder, "cpu", progress=False) for s in ALL]


@pytest.fixture(autouse=True)
def sound():
    yield
    mark_cuda_broken(False)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_each_comes_out_as_if_alone(store, alone, slots):
    results = go(ALL, store, slots=slots)
    same(results, alone)
    assert {r.facts.get("at_once", 1) for r in results} == {slots}


class Device:
    """A device that does what it is asked, but is behind: a mark is reached when it
    was asked about three times
    """
    def __init__(self): # by stream
        self.stream, self.order, self.marks, self.steps = None, [], defaultdict(list), defaultdict(list)

    @contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try: yield
        finally: self.stream = before

    def mark(self, device):
        mark = Mark()
        self.marks[self.stream].append(mark)
        return mark

    def step(self, training, step):
        self.steps[self.stream].append(training)
        self.order.append(training)
        ahead = sum(m.left > 0 for m in self.marks[self.stream])
        assert ahead < 2, "the host is two pieces ahead at most"
        step(training)


class Mark:
    left = 3
    def query(self):
        self.left -= 1
        return self.left <= 0
    def synchronize(self): self.left = 0


@pytest.fixture
def device(monkeypatch):
    "Streams, pretended; a piece is of two steps"
    it, step = Device(), Trainer.step
    class Pretended(SideBySideRunner):
        def __init__(self, agenda, *rest):
            super().__init__(agenda, *rest)
            self.streams = [f"stream {k}" for k in range(agenda.context.n_parallel)]
    patch_name(monkeypatch, "SideBySideRunner", Pretended)
    monkeypatch.setattr(torch.cuda, "stream", it.on)
    patch_name(monkeypatch, "_record_event", it.mark)
    patch_name(monkeypatch, "STEPS_PER_CHUNK", {"cpu": 2})
    monkeypatch.setattr(Trainer, "step", lambda trainer: it.step(trainer, step))
    return it


def test_each_run_is_on_a_stream_of_its_own(store, alone, device):
    same(go(ALL, store, slots=3), alone)
    assert set(device.steps) == {"stream 0", "stream 1", "stream 2"}
    on = [set(map(id, several)) for several in device.steps.values()]
    assert sum(map(len, on)) == len(set.union(*on)) == len(ALL) + 1, "none changes its stream"
    turns = {name: [i for i, t in enumerate(several) if i and t is not several[i - 1]]
             for name, several in device.steps.items()}
    assert all(len(set(map(id, several))) == len(turns[name]) + 1
               for name, several in device.steps.items()), "and each has it to itself"


class Dropping(torch.nn.Module):
    def __init__(self, n_classes, in_channels):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(.5),
                                          torch.nn.Linear(in_channels*8*8, n_classes))

    def forward(self, x): return self.layers(x)


def test_those_that_drop_out_share_a_stream_and_come_out_as_if_alone(store, device, monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "dropping", Dropping)
    runs = [replace(TEACHER, model="dropping", seed=s) for s in (0, 1)]
    together = go([*runs, TEACHER], store, slots=3)
    dropping = {stream for stream, several in device.steps.items() for t in several if t.draws}
    assert dropping == {"stream 0"} and len(device.steps) == 2
    order = [t.draws for t in device.order]
    assert sum(a != b for a, b in zip(order, order[1:])) == 1, "and others wait until they are done"
    same(together[:2], [run(s, Store(tmp_path/"alone"), "cpu", progress=False) for s in runs])


def refusing(monkeypatch, error, which=lambda run: True):
    "Recording fails in this process; another process knows nothing of that"
    capture = Trainer.capture
    def refuse(trainer):
        if not (trainer.use_cuda_graph and which(trainer)): return capture(trainer)
        mark_cuda_broken()
        raise error
    monkeypatch.setattr(Trainer, "capture", refuse)


def test_after_a_recording_that_failed_the_rest_goes_on_in_a_fresh_process(store, alone, monkeypatch):
    refusing(monkeypatch, GraphCaptureError("the step cannot be recorded: why"),
             lambda run: type(run.method).__name__ == "_CorrectnessRanking")
    seen = []
    with pytest.warns(UserWarning,
                      match="crl beta=1, seed 1: the step cannot be recorded: why; it is trained without"):
        same(go(ALL, store, slots=2, on_result=seen.append), alone)
    assert len(seen) == len({r.spec for r in seen}) == len(ALL) + 1, "each is told once, the teacher too"
    assert cuda_is_broken()
    monkeypatch.setattr(sweeps_room.SideBySideRunner, "work", None) # of no use in this process any more
    assert go([replace(TEACHER, seed=7)], store)[0].spec.seed == 7


def test_a_single_run_that_cannot_be_recorded_is_trained_in_a_fresh_process(store, alone, monkeypatch):
    refusing(monkeypatch, GraphCaptureError("the step cannot be recorded: why"))
    with pytest.warns(
        UserWarning,
        match="cannot be recorded: why; it is trained without, which costs speed, in a fresh process"
    ):
        same([run(OTHERS[0], store, "cpu", progress=False)], [alone[3]])


def test_a_full_device_is_given_fewer_runs_in_a_fresh_process(store, alone, monkeypatch):
    refusing(monkeypatch, torch.OutOfMemoryError("full"))
    with pytest.warns(UserWarning, match="out of memory; 7 runs start again, 2 at a time"):
        results = go(OTHERS + [replace(o, seed=2) for o in OTHERS[:3]], store, slots=4)
    same(results[:4], alone[3:])
    assert {r.facts["at_once"] for r in results} == {2}


def test_a_full_device_with_one_run_is_told(store, monkeypatch):
    refusing(monkeypatch, torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError): go(OTHERS[:1], store)


def dies(*args): os.kill(os.getpid(), signal.SIGKILL)


def test_what_nobody_else_looks_at_is_looked_at_here(store, alone, monkeypatch):
    "The process that was to look is killed"
    class Killed(SideBySideRunner):
        def __init__(self, *args):
            super().__init__(*args)
            self.pool.submit(dies)
    patch_name(monkeypatch, "SideBySideRunner", Killed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # of joblib
        same(go(ALL, store, slots=2), alone)


def test_a_failure_beside_others_stops_none_of_them(store, alone):
    wild = replace(TEACHER, recipe=replace(RECIPE, lr=1e20))
    with pytest.raises(FloatingPointError, match="try a smaller lr"):
        go([replace(wild, method=Distil(wild)), *OTHERS], store, slots=3)
    same(go(OTHERS, store, slots=3), alone[3:])
    assert len(all_results(store)) == len(OTHERS)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_network_that_ends_without_numbers_is_told_by_name_and_stops_no_other(store, alone, slots):
    "Its losses are finite, its last step is not"
    wild = replace(TEACHER, recipe=replace(RECIPE, epochs=1, batch_size=100, lr=1e30))
    with pytest.raises(FloatingPointError, match="logits: not all are numbers after training") as error:
        go([wild, *OTHERS], store, slots=slots)
    assert error.value.__notes__ == ["This was digits resnet8 nll, seed 0."]
    same(go(OTHERS, store), alone[3:])


def test_a_student_that_cannot_begin_blocks_no_other_of_its_teacher(store, alone, monkeypatch):
    class Broken(Dropping):
        def pretrain(self, data): raise OSError("no such weights")
    monkeypatch.setitem(MODELS, "broken", Broken)
    with pytest.raises(OSError, match="no such weights"):
        go([replace(STUDENTS[0], model="broken"), *STUDENTS], store)
    assert len(all_results(store)) == 4
    same(go(STUDENTS, store), alone[:3])


@pytest.mark.parametrize("slots", [1, 2])
def test_a_network_that_fails_on_images_stops_no_other(store, alone, monkeypatch, slots):
    class Broken(Dropping):
        def forward(self, x): raise RuntimeError("no such layer")
    monkeypatch.setitem(MODELS, "broken", Broken)
    with pytest.raises(ValueError, match="model: got 'broken', which fails .*no such layer") as error:
        go([replace(TEACHER, model="broken"), *OTHERS], store, slots=slots)
    assert error.value.__notes__ == ["This was digits broken nll, seed 0."]
    same(go(OTHERS, store), alone[3:])


def test_a_network_that_is_defined_again_with_dropout_is_asked_again(store, monkeypatch):
    runners = []
    class Noted(SideBySideRunner):
        def __init__(self, *args, **kw): super().__init__(*args, **kw); runners.append(self)
    patch_name(monkeypatch, "SideBySideRunner", Noted)
    for constructor in (lambda *sizes: build_model("resnet8", *sizes), Dropping):
        monkeypatch.setitem(MODELS.data, "mine", constructor)
        go([replace(TEACHER, model="mine")], store)
    assert [r.draws_random_numbers("mine", DIGITS) for r in runners] == [False, True]


@pytest.mark.parametrize("kw", [dict(), dict(slots=2), dict(jobs=2)])
def test_an_error_of_the_caller_waits_until_all_is_done(store, kw):
    def fails(result): raise OSError("the caller's")
    with pytest.raises(OSError, match="the caller's"): go(OTHERS[:2], store, on_result=fails, **kw)
    assert len(all_results(store)) == 2


def test_failed_runs_free_their_memory(store, monkeypatch):
    made = []
    class Noted(Trainer):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            made.append(weakref.ref(self))
    patch_name(monkeypatch, "Trainer", Noted)
    alive = []
    def counting(*args, there=runs_room.store_result):
        gc.collect()
        alive.append(sum(m() is not None for m in made))
        return there(*args)
    patch_name(monkeypatch, "store_result", counting)
    with pytest.raises(FloatingPointError):
        go([*(replace(TEACHER, seed=s, recipe=replace(RECIPE, lr=1e20)) for s in range(3)), OTHERS[0]], store)
    assert len(made) == 4 and alive == [0]


def test_evaluation_that_is_slow_holds_back_what_could_not_be_evaluated_in_time(store, monkeypatch):
    waiting = []
    class Slow(SideBySideRunner):
        def has_room(self):
            waiting.append(len(self.evaluated) - self.n_workers)
            return super().has_room()
        def collect(self):
            if len(self.evaluated) <= self.n_workers and self.slots: return False # as if none were done
            return super().collect()
    patch_name(monkeypatch, "SideBySideRunner", Slow)
    go([replace(TEACHER, seed=s, recipe=Recipe(1, 100)) for s in range(8)], store, slots=2)
    assert len(all_results(store)) == 8 and max(waiting) <= 2, "what was running when there was no more room"


def test_a_device_that_was_full_while_it_recorded_one_of_one_leaves_the_rest_to_a_fresh_process(
    store, alone, monkeypatch
):
    refusing(monkeypatch, torch.OutOfMemoryError("full"),
             lambda run: type(run.method).__name__ == "_CorrectnessRanking")
    with pytest.raises(torch.OutOfMemoryError): go(OTHERS, store)
    same([store.get(s) for s in OTHERS[1:]], alone[4:])


def test_a_damaged_result_is_trained_again_in_the_fresh_process_too(store, alone):
    go(OTHERS[:1], store)
    path = store.path(OTHERS[0], "run")
    path.write_bytes(path.read_bytes()[:-7])
    mark_cuda_broken()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(go(OTHERS[:2], store), alone[3:5])


ORPHANS = """
import sys, kdc_nb
from dataclasses import replace
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.store import Store
from kdc_nb.experiments.sweeps import sweep
from tests.test_side_by_side import TEACHER
specs = [replace(TEACHER, recipe=Recipe(5000, 50), seed=s) for s in range(2)]
sweep(specs, Store(sys.argv[1]), "cpu", progress=False, **eval(sys.argv[2]))
"""


@pytest.mark.parametrize("how", ["dict(jobs=2)", "dict(slots=2)"])
def test_no_process_outlives_the_one_that_was_killed(tmp_path, how):
    child = subprocess.Popen([sys.executable, "-c", ORPHANS, tmp_path/"s", how], start_new_session=True)
    began = time.monotonic()
    while not list(tmp_path.glob("s/*.part")) and child.poll() is None and time.monotonic() - began < 240:
        time.sleep(.1)
    child.kill()
    child.wait()
    began = time.monotonic()
    group = (lambda: subprocess.run(["pgrep", "-g", str(child.pid)], capture_output=True, text=True)
                     .stdout.split())
    while group() and time.monotonic() - began < 60: time.sleep(.2)
    assert not group()


def test_ctrl_c_keeps_what_is_done(store, alone, monkeypatch):
    calls, step = [], Trainer.step
    def interrupted(trainer):
        calls.append(1)
        if len(calls) == 18: raise KeyboardInterrupt
        step(trainer)
    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", interrupted)
        with pytest.raises(interrupts_room.Stopped): go(ALL, store, slots=2)
    same(go(ALL, store, slots=2), alone)


def test_an_answer_is_kept_only_while_somebody_may_ask_and_no_more_than_fits(monkeypatch):
    specs = [specs_room.reseed_lineage(s, k) for k in range(3) for s in STUDENTS]
    caches = TeacherCachePool(specs)
    first = [caches.take(s) for s in specs[::3]]
    assert len(set(map(id, first))) == 3 and not any(map(caches.can_begin, specs))
    for s, cache in zip(specs[::3], first):
        cache.cached_epochs = {0, 1} # all of them
        caches.give_back(s)
    assert all(map(caches.can_begin, specs))
    monkeypatch.setattr(TeacherCachePool, "size", staticmethod(lambda spec: 1.5e9))
    assert caches.take(specs[1]) is first[0], "and is now the one last used"
    assert len(caches.caches) == 3
    caches.sizes = dict.fromkeys(caches.sizes, 1.5e9)
    assert (caches.take(specs[7]) is first[2] and len(caches.caches) == 2
            and caches.key(specs[3]) not in caches.caches)
    caches.take(specs[2])
    for s in (specs[1], specs[2], specs[2]): caches.give_back(s)
    assert caches.key(specs[0]) not in caches.caches, "nobody is left to ask"
