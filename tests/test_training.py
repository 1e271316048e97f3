"Training: the same bits after a kill, state that is kept, devices, faults."

import gc
import itertools
import random
import signal
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdc_nb.files import load_tensors, save_tensors
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.own_data import stratified_split
from kdc_nb.training.devices import mark_cuda_broken, seeded_rng
from kdc_nb.training.methods import Method, TrainingMethod, TrainingStep
from kdc_nb.training.distillation import Distillation
from kdc_nb.training.models import MODELS, build_model
from kdc_nb.training.recipes import Recipe
import kdc_nb.experiments.runs as kr
from kdc_nb.training.steps import (
    CheckpointWriter, GraphCaptureError, TeacherCache, _epoch_generator, match_grad_strides, predict_logits,
)
from kdc_nb.training.trainer import OutOfTime, Trainer, fit
from kdc_nb.experiments.specs import Distil, RunSpec, run_id, self_distillation_chain
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.store import Store, build_net, remove_unfinished_runs
from kdc_nb.experiments.sweeps import sweep
from kdc_nb.experiments.teachers import TemperedPosterior
from tests.conftest import patch_name

TINY = DataSpec("known", n_train=200, n_valid=50, n_test=100)
SPEC = RunSpec(TINY, "resnet8", Distil(TemperedPosterior(.5), 2, .5), Recipe(60, 32))
CHILD = """
import sys, functools, kdc_nb.experiments.runs as r
from kdc_nb.training.trainer import Trainer
from tests.test_training import SPEC
Trainer.run = functools.partialmethod(Trainer.run, checkpoint_every=0)
r.run(SPEC, r.Store(sys.argv[1]), "cpu", progress=False)
"""


def start_child(folder):
    "A process that trains SPEC and keeps a checkpoint of every epoch."
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder)])


def killed_until_done(folder, kills, rng):
    """Kill the process `kills` times, each time at any moment after it has written a checkpoint of
    its own, then let it finish.
    """
    stamp = lambda: max((p.stat().st_mtime_ns for p in folder.glob("*.part") if not p.name.startswith(".")),
                        default=0)
    for _ in range(kills):
        before, child, began = stamp(), start_child(folder), time.monotonic()
        while stamp() == before and child.poll() is None and time.monotonic() - began < 120: time.sleep(.001)
        time.sleep(rng.uniform(0, .05))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL and not list(folder.glob("*.run")), "killed before it was done"
    assert start_child(folder).wait(timeout=300) == 0


def check_killed(tmp_path, kills, seed):
    "The killed run's logits and weights are those of one that ran through, and nothing else is left."
    whole, broken = Store(tmp_path/"whole"), Store(tmp_path/"broken")
    broken.folder.mkdir()
    assert start_child(whole.folder).wait(timeout=300) == 0, (
        "in a process like the others, as threads change the last digits"
    )
    expected = whole.get(SPEC)
    killed_until_done(broken.folder, kills, random.Random(seed))
    got = broken.get(SPEC)
    assert torch.equal(got.logits["test"], expected.logits["test"]) and got.history == expected.history
    weights = [s.load_net(SPEC).state_dict().values() for s in (broken, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    assert {
        p.suffix for p in broken.folder.iterdir() if not p.name.startswith(".tmp")
    } <= {".run", ".net", ".part"}, "but for what safetensors was writing"
    remove_unfinished_runs(broken)
    assert {p.name for p in broken.folder.iterdir()} == {f"{run_id(SPEC)}.{k}" for k in ("run", "net")}


def test_a_killed_run_goes_on_bit_for_bit(tmp_path): check_killed(tmp_path, 2, seed=0)


@pytest.mark.long
def test_killed_many_times(tmp_path): check_killed(tmp_path, 12, seed=1)


class Counts(TrainingMethod):
    "A method with state: how often each sample was correct; the loss depends on it."
    needs_valid = True

    def before_fit(self, n_train, n_classes, epochs):
        self.register_buffer("right", torch.zeros(n_train)); self.register_buffer("valid", torch.zeros(()))

    def forward(self, step: TrainingStep):
        self.right[step.index] += (step.logits.argmax(1) == step.targets).float()
        weight = 1/(1 + self.right[step.index] + self.valid)
        return (weight*torch.nn.functional.cross_entropy(step.logits, step.targets, reduction="none")).mean()

    def after_epoch(self, epoch, valid_logits, valid_labels):
        self.seen = [*getattr(self, "seen", []), epoch]
        self.valid += (valid_logits.argmax(1) == valid_labels).float().mean()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_nobody_hears_stops_at_the_next_step():
    "As in the callback of a weak reference, whose errors Python only prints"
    class Swallows(Counts):
        def after_epoch(self, epoch, *valid):
            super().after_epoch(epoch, *valid)
            weakref.finalize(thing := (lambda: None), signal.raise_signal, signal.SIGINT)
            del thing
    method = Swallows()
    with pytest.raises(KeyboardInterrupt):
        fit(build_net(SPEC), load_data(TINY), method, Recipe(6, 32), device="cpu", progress=False)
    assert method.seen == [0]


@pytest.mark.parametrize("keep", ["last", "best"])
def test_state_and_best_weights_survive_a_stop(tmp_path, keep):
    "A method with state per sample, and the best weights so far, come back with the checkpoint."
    data, recipe, path = load_data(TINY), Recipe(6, 32, select=keep), tmp_path/"x"
    through, stopped = build_net(SPEC), build_net(SPEC)
    a = fit(through, data, Counts(), recipe, device="cpu", progress=False).history

    class Stops(Counts):
        def after_epoch(self, epoch, *valid):
            super().after_epoch(epoch, *valid)
            if epoch == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fit(build_net(SPEC), data, Stops(), recipe, device="cpu",
            checkpoint=path, checkpoint_every=0, progress=False)
    rest = Counts()
    b = fit(stopped, data, rest, recipe, device="cpu", checkpoint=path, progress=False).history
    assert rest.seen == [3, 4, 5], "only what was missing"
    assert a == b and all(torch.equal(x, y)
                          for x, y in zip(through.state_dict().values(), stopped.state_dict().values()))


def dropping(seed=0):
    "A network without BatchNorm that drops out"
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(.5), torch.nn.Linear(3*8*8, 20))


def interrupt_at(monkeypatch, n):
    "Ctrl-C after n steps"
    calls, step = itertools.count(), Trainer.step
    def interrupted(trainer):
        if next(calls) == n: raise KeyboardInterrupt
        step(trainer)
    monkeypatch.setattr(Trainer, "step", interrupted)


@pytest.mark.parametrize("net, method",
                         [*((lambda: build_net(SPEC), m)
                            for m in ("nll", "crl", "pskd", "adafocal", "mixup")), (dropping, "nll")],
                         ids=["nll", "crl", "pskd", "adafocal", "mixup", "drop-out"])
@pytest.mark.parametrize("n", [1, 7, 12]) # in the first epoch, at its end, in the second
def test_stopped_in_the_middle_of_an_epoch(tmp_path, monkeypatch, net, method, n):
    "The steps that a checkpoint holds are not done again, and the end is the same bit for bit"
    data, recipe, path = load_data(TINY), Recipe(3, 32), tmp_path/"x"
    go = (lambda net, **kw:
              fit(net, data, Method(method).build(), recipe, device="cpu", progress=False, **kw).history)
    through, stopped = net(), net()
    a = go(through)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        interrupt_at(m, n)
        go(net(), checkpoint=path, checkpoint_every=0)
    assert load_tensors(path)[1]["epochs_done"] == pytest.approx(n/7)
    steps = []
    with monkeypatch.context() as m:
        step = Trainer.step
        m.setattr(Trainer, "step", lambda trainer: steps.append(1) or step(trainer))
        b = go(stopped, checkpoint=path)
    assert len(steps) == 21 - n
    assert a == b and all(torch.equal(x, y)
                          for x, y in zip(through.state_dict().values(), stopped.state_dict().values()))


def test_recording_a_step_draws_nothing_from_its_drop_out(monkeypatch):
    "Whoever goes on at the start of an epoch records there, and drops the same units out"
    def go():
        net = dropping()
        fit(net, load_data(TINY), TrainingMethod(), Recipe(1, 32), device="cpu", progress=False)
        return net[2].weight
    plain, capture = go(), Trainer.capture
    # as the steps before a recording draw
    monkeypatch.setattr(Trainer, "capture", lambda trainer: torch.rand(5) is not None and capture(trainer))
    assert torch.equal(plain, go())


def test_an_epoch_longer_than_ten_seconds_is_saved_within(tmp_path, monkeypatch):
    "By the clock, whatever the epoch: two steps of six seconds each"
    clock = SimpleNamespace(time=lambda: clock.now, now=0.)
    def slow(trainer, step=Trainer.step): step(trainer); clock.now += 6
    patch_name(monkeypatch, "time", clock)
    monkeypatch.setattr(Trainer, "step", slow)
    saved = []
    patch_name(monkeypatch, "save_tensors",
               lambda path, tensors, **meta: saved.append((meta["epochs_done"], meta["seconds"])))
    fit(build_net(SPEC), load_data(TINY), TrainingMethod(), Recipe(1, 32),
        device="cpu", checkpoint=tmp_path/"x", progress=False)
    assert saved == [(pytest.approx(k/7), 6*k) for k in (2, 4, 6)]


def test_an_epoch_of_which_a_resumed_student_cached_a_part_does_not_count_as_cached(tmp_path, monkeypatch):
    "Another student of the same teacher queries it again in the epoch that the first began elsewhere"
    data, path, cache, net = load_data(TINY), tmp_path/"x", TeacherCache(), build_net(SPEC).eval()
    student = lambda cache: Trainer(build_net(SPEC), data, Distillation(), Recipe(3, 32), 0,
                                    torch.device("cpu"), lambda x, index: net(x), teacher_cache=cache)
    go = lambda cache=None, **kw: student(cache).run(progress=False, **kw)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        interrupt_at(m, 10)
        go(checkpoint=path, checkpoint_every=0)
    resumed = go(checkpoint=path, cache=cache)
    assert cache.cached_epochs == {2} and resumed.history == go().history == go(cache=cache).history


def test_best_keeps_the_epoch_with_the_best_validation_accuracy():
    data, net = load_data(TINY), build_net(SPEC)
    history = fit(net, data, Method("nll").build(), Recipe(6, 32, select="best"),
                  device="cpu", progress=False).history
    accuracy = float((predict_logits(net, data, data.valid.inputs).argmax(1) == data.valid.labels).float()
                     .mean())
    assert accuracy == pytest.approx(max(h["valid_accuracy"] for h in history))


@pytest.mark.parametrize("n, size", [(200, 32), (64, 64), (5, 32)])
def test_every_image_is_seen_in_batches_of_one_size(n, size):
    data = load_data(DataSpec("known", n_train=n, n_valid=5, n_test=5))
    trainer = Trainer(build_net(SPEC), data, TrainingMethod(), Recipe(1, size), 0, torch.device("cpu"))
    trainer.begin_epoch()
    index, shift, flip, *_ = trainer.epoch_plan
    assert index.shape == flip.shape == shift.shape[:2] and index.shape[1] == min(n, size)
    assert set(index.flatten().tolist()) == set(range(n)) and not shift.any() and not flip.any()


def test_epochs_and_seeds_differ_and_repeat():
    draw = lambda *key: torch.randperm(50, generator=_epoch_generator(*key)).tolist()
    assert draw(0, 1) == draw(0, 1) and draw(0, 1) != draw(0, 2) and draw(0, 1) != draw(1, 1)


def test_the_teacher_is_asked_for_the_right_samples():
    "A teacher that knows the labels by index is correct about every batch."
    data, seen = load_data(TINY), []
    teacher = (lambda x, index: seen.append(index)
                                or 9*torch.nn.functional.one_hot(data.train.labels[index], 20).float())

    class Looks(Distillation):
        def forward(self, step):
            assert torch.equal(step.teacher_logits.argmax(1), step.targets)
            return super().forward(step)
    fit(build_net(SPEC), data, Looks(), Recipe(1, 32), teacher=teacher, device="cpu", progress=False)
    assert len(seen) == 2 + 7 # asked twice before the first step, and seven batches


def test_nan_names_the_step():
    class Breaks(TrainingMethod):
        def forward(self, step): return super().forward(step)*(float("nan") if step.epoch == 1 else 1.)
    with pytest.raises(FloatingPointError, match="loss: got nan at step 0 of epoch 1"):
        fit(build_net(SPEC), load_data(TINY), Breaks(), Recipe(3, 32), device="cpu", progress=False)


class Watch(TorchDispatchMode):
    "Notes every operation that torch is asked for"
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name().split("::")[1].split(".")[0])
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "method, recording",
    [*((Method(m).build(), None) for m in sorted(Method.registry)), (Method("mdca", gamma=1).build(), None),
     *((Distillation(2., .5), recording) for recording in (None, True, False))],
    ids=[*sorted(Method.registry), "focal + MDCA", "KD", "KD, the first student", "KD, a later one"]
)
def test_a_step_reads_nothing_back_from_the_device(method, recording):
    """What a CUDA graph cannot record: reading a value back, making a tensor from one of Python's,
    sizes that depend on values
    """
    net = build_net(SPEC).eval()
    teacher = (lambda x, index: net(x)) if isinstance(method, Distillation) else None
    cache = None if recording is None else TeacherCache()
    trainer = Trainer(build_net(SPEC), load_data(TINY), method, Recipe(2, 32),
                      0, torch.device("cpu"), teacher, 1.5, cache)
    trainer.recording = bool(recording)
    trainer.begin_epoch()
    trainer.step()
    before = {k: t.data_ptr() for k, t in trainer.state_dict().items()}
    with Watch() as watch: trainer.step()
    assert ("convolution_backward" in watch.seen
            and not watch.seen & {"_local_scalar_dense", "lift_fresh", "nonzero", "bincount", "_unique2"})
    trainer.begin_epoch()
    trainer.load_state_dict({k: t.clone() for k, t in trainer.state_dict().items()}, 0, [])
    assert before == {k: t.data_ptr() for k, t in trainer.state_dict().items()}, (
        "a captured step writes to the same memory for ever"
    )


@pytest.mark.parametrize("spoil", [
    lambda tensors, meta: ({k.replace("net/", "nets/"): t for k, t in tensors.items()}, meta),
    lambda tensors, meta: (tensors, meta | {"mood": 1}),
    lambda tensors, meta: ({k: t[:1] for k, t in tensors.items() if t.ndim}
                               | {k: t for k, t in tensors.items() if not t.ndim}, meta),
])
def test_a_checkpoint_of_another_version_is_named_and_left(tmp_path, spoil):
    data, path = load_data(TINY), tmp_path/"x"
    with pytest.raises(OutOfTime):
        fit(build_net(SPEC), data, Late(), Recipe(9, 32), device="cpu", checkpoint=path,
            checkpoint_every=0, deadline=time.time() + 1, progress=False)
    tensors, meta = spoil(*load_tensors(path))
    save_tensors(path, tensors, **meta)
    with pytest.warns(UserWarning, match="got a checkpoint of another version.*starting again"):
        done = fit(build_net(SPEC), data, TrainingMethod(), Recipe(2, 32),
                   device="cpu", checkpoint=path, progress=False)
    assert len(done.history) == 2


class Late(TrainingMethod):
    "A method whose second epoch ends after the time is over"
    def after_epoch(self, epoch, *valid): time.sleep(.6)


def test_a_full_device_is_not_taken_for_a_step_that_cannot_be_recorded(pretended_cuda, monkeypatch):
    def full(g, stream): raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(torch.cuda, "graph", full)
    with pytest.raises(torch.OutOfMemoryError):
        pretended_cuda(Trainer(build_net(SPEC), load_data(TINY), TrainingMethod(),
                               Recipe(2, 32), 0, torch.device("cpu")))


def test_pieces_of_time_shorter_than_an_epoch_add_up(tmp_path):
    "Also after a kill in the middle of the first epoch, which tells how long one takes"
    data, path = load_data(TINY), tmp_path/"x"
    class Slow(TrainingMethod):
        def forward(self, step): time.sleep(.1); return super().forward(step)
    go = lambda **kw: fit(build_net(SPEC), data, Slow(), Recipe(2, 32),
                          device="cpu", checkpoint=path, progress=False, **kw).history
    through = fit(build_net(SPEC), data, TrainingMethod(),
                  Recipe(2, 32), device="cpu", progress=False).history
    done = [0.]
    while True:
        try: history = go(deadline=time.time() + .35); break
        except OutOfTime: done.append(load_tensors(path)[1]["epochs_done"])
    assert done == sorted(set(done)) and len(done) > 3 and any(d % 1 for d in done) and history == through


def test_time_that_is_over_stops_a_run(tmp_path):
    with pytest.raises(OutOfTime, match="0 of 3"):
        fit(build_net(SPEC), load_data(TINY), TrainingMethod(), Recipe(3, 32),
            device="cpu", deadline=time.time() - 1, progress=False)
    path = tmp_path/"x"
    class Slow(TrainingMethod):
        def after_epoch(self, epoch, *valid): time.sleep(.3)
    with pytest.raises(OutOfTime):
        fit(build_net(SPEC), load_data(TINY), Slow(), Recipe(40, 32),
            device="cpu", checkpoint=path, deadline=time.time() + 2, progress=False)
    _, meta = load_tensors(path)
    assert (0 < meta["epochs_done"] <= len(meta["history"]) + 1 <= 40
            and .3*meta["epochs_done"] < meta["seconds"] < 3)


@pytest.fixture
def pretended_cuda(monkeypatch):
    "CUDA's streams and graphs, pretended: what is recorded runs, and a replay runs the step again"
    class Graph: pass
    @contextmanager
    def graph(g, stream): yield
    stream = SimpleNamespace(wait_stream=lambda other: None)
    same = lambda device: stream
    for name, fake in dict(Stream=same, stream=lambda s: nullcontext(), current_stream=same,
                           default_stream=same, CUDAGraph=Graph, graph=graph).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    def record(trainer):
        Graph.replay = lambda self: trainer.step()
        trainer.begin_epoch()
        trainer.device = torch.device("cuda")
        try: step = trainer.capture()
        finally: mark_cuda_broken(False)
        trainer.device = torch.device("cpu")
        return step
    return record


def test_recording_leaves_no_trace(pretended_cuda):
    """Warm-up steps and the recording itself change weights, momentum and BatchNorm: all of it is
    put back, to the same places
    """
    plain, recording = (Trainer(build_net(SPEC), load_data(TINY), Method("mdca").build(),
                                Recipe(2, 32), 0, torch.device("cpu")) for _ in range(2))
    before = {k: (t.data_ptr(), t.clone()) for k, t in recording.state_dict().items()}
    recording.run_step = pretended_cuda(recording)
    assert all(t.data_ptr() == before[k][0] and torch.equal(t, before[k][1])
               for k, t in recording.state_dict().items())
    for run in (plain, recording, plain, recording): list(run.train_epoch())
    assert plain.history == recording.history and len(plain.history) == 2


def test_what_cannot_be_recorded_ends_in_a_sentence_unless_nobody_wants_it_recorded(
    pretended_cuda, monkeypatch
):
    def refuse(g, stream): raise RuntimeError("operation not permitted when stream is capturing")
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    make = lambda **kw: Trainer(build_net(SPEC), load_data(TINY), TrainingMethod(),
                                Recipe(2, 32), 0, torch.device("cpu"), **kw)
    with pytest.raises(GraphCaptureError, match="cannot be recorded as a CUDA graph.*not permitted"):
        pretended_cuda(make())
    plain, eager = make(), make(use_cuda_graph=False)
    eager.run_step = pretended_cuda(eager)
    for run in (plain, eager): list(run.train_epoch())
    assert plain.history == eager.history


def test_what_is_wrong_with_a_step_is_no_matter_of_recording(pretended_cuda):
    class Breaks(TrainingMethod):
        def forward(self, step): raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit") as error:
        pretended_cuda(Trainer(build_net(SPEC), load_data(TINY), Breaks(),
                               Recipe(2, 32), 0, torch.device("cpu")))
    assert not isinstance(error.value, GraphCaptureError)


def test_logits_keep_their_precision_where_the_body_is_in_16_bits():
    "bf16 knows steps of 1/16 between 8 and 16: that would round confidences"
    for name, x in (("resnet8", torch.randn(64, 3, 8, 8)),
                    ("torchvision_resnet18", torch.randn(2, 3, 64, 64))):
        net = build_model(name, 10).eval()
        head = next(m for m in reversed([*net.modules()]) if isinstance(m, torch.nn.Linear))
        with torch.no_grad(): head.weight *= 20
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): z = net(x)
        assert z.dtype == torch.float32 and (z*16 % 1 != 0).float().mean() > .9 and z.abs().max() > 8, name
    assert net.double()(x.double()).dtype == torch.float64


def test_bf16_on_a_cpu_is_for_steps_alone(tmp_path):
    """Where the caller's autocast is on, training is in bf16; what is kept of it, predictions and what
    the teacher says of plain images, is in full precision
    """
    stores = {wanted: Store(tmp_path/str(wanted)) for wanted in (False, True)}
    results = {}
    for wanted, store in stores.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=wanted):
            results[wanted] = run(SPEC, store, progress=False)
    assert [r.facts.get("precision") for r in results.values()] == [None, "bf16"]
    losses = [r.history[-1]["loss"] for r in results.values()]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < .1*losses[0]
    data = load_data(SPEC.data)
    for wanted, store in stores.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=not wanted):
            again = predict_logits(store.load_net(SPEC), data, data.test.inputs)
        torch.testing.assert_close(again, results[wanted].logits["test"], rtol=0, atol=1e-4) # in bf16 .1


def test_logits_of_a_scaled_teacher_are_divided_by_its_temperature_whichever_student_cached_them():
    data, net = load_data(TINY), build_net(SPEC).eval()
    cache = TeacherCache()
    class Looks(Distillation):
        seen = []
        def forward(self, step):
            self.seen.append(step.teacher_logits.clone())
            return super().forward(step)
    for T in (1., 4.):
        Trainer(build_net(SPEC), data, Looks(), Recipe(1, 100), 0,
                torch.device("cpu"), lambda x, i: net(x), T, cache).run(progress=False)
    first, second, again_first, again_second = Looks.seen # two steps of each
    assert torch.equal(again_first, first/4) and torch.equal(again_second, second/4)


def test_a_finished_run_keeps_no_memory():
    "Nothing goes round in a circle through it"
    gc.collect()
    gc.disable()
    try:
        run = Trainer(build_net(SPEC), load_data(TINY), TrainingMethod(),
                      Recipe(1, 100), 0, torch.device("cpu"))
        run.run(progress=False)
        alive = weakref.ref(run)
        del run
        assert alive() is None
    finally: gc.enable()


class OddStrides(torch.nn.Module):
    """A layer whose gradient is laid out in memory in another way than its weight (pytorch issue
    106951), and one whose is not
    """
    def __init__(self, d):
        super().__init__()
        self.w, self.v = (torch.nn.Parameter(torch.ones(2, d, 100)) for _ in range(2))

    def forward(self, x):
        return torch.bmm(x.transpose(0, 1), self.w.transpose(1, 2)).sum() + (self.v**2).sum()


@pytest.mark.parametrize("d", [1, 3])
def test_gradients_are_laid_out_as_their_parameters(d):
    net, x = OddStrides(d), torch.randn(10, 2, 100, generator=torch.Generator().manual_seed(0))
    net(x).backward()
    before = [p.grad.clone() for p in net.parameters()]
    odd = [p.grad.stride() != p.stride() for p in net.parameters()]
    match_grad_strides(net)
    assert odd[0] == (d == 1) and not odd[1]
    assert all(p.grad.stride() == p.stride() and torch.equal(p.grad, g)
               for p, g in zip(net.parameters(), before))


def test_gradients_that_are_transposed_in_memory_are_copied():
    net = torch.nn.Linear(3, 2)
    net.weight.grad = torch.arange(6.).view(3, 2).T
    match_grad_strides(net)
    assert (net.weight.grad.stride() == net.weight.stride()
            and net.weight.grad.tolist() == [[0, 2, 4], [1, 3, 5]])


def test_numpys_numbers_are_pythons(tmp_path):
    "Wherever a number is given that is no part of a description"
    def trained(i, f):
        with seeded_rng(i(3)): net = build_model("resnet8", i(20), i(3))
        method = Method("mdca", beta=i(2)).build()
        history = fit(net, load_data(TINY), method, Recipe(1, 50), seed=i(3), device="cpu", progress=False,
                      checkpoint=tmp_path/f.__name__, checkpoint_every=f(1), deadline=f(2e9)).history
        d = load_data(TINY).train
        parts = stratified_split(d.inputs, d.labels, [f(.5), f(.25), f(.25)], i(1))
        return history, net.state_dict(), [y.tolist() for _, y in parts]
    with pytest.MonkeyPatch.context() as m:
        m.setattr("time.time", lambda: 1e9)
        (a, net, parts), (b, same, likewise) = trained(int, float), trained(np.int64, np.float64)
    assert a == b and parts == likewise and all(torch.equal(t, same[k]) for k, t in net.items())
    chain = self_distillation_chain(SPEC, np.int64(2), np.float32(2), np.float32(.5))
    assert chain == self_distillation_chain(SPEC, 2, 2, .5) and run_id(chain[1]) == run_id(
        self_distillation_chain(SPEC, 1, 2, .5)[1])
    assert len(sweep([replace(SPEC, recipe=Recipe(1, 50))], Store(tmp_path), "cpu", jobs=np.int64(1),
                     progress=False)) == 1
    with pytest.raises(ValueError, match="jobs: got True"): sweep([SPEC], Store(tmp_path), "cpu", jobs=True)
    with pytest.raises(TypeError), seeded_rng(.5): pass


def test_a_network_teaches_fit_as_it_is():
    """In evaluation mode, whatever mode it comes in, in a function of one argument or
    as it is: the same student
    """
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 20), torch.nn.BatchNorm1d(20),
                              torch.nn.Dropout(.5))
    before = {k: t.clone() for k, t in net.state_dict().items()}
    def student(teacher):
        return fit(build_net(SPEC), load_data(TINY), Distillation(2., .9), Recipe(2, 50), teacher=teacher,
                   device="cpu", progress=False).history
    as_it_is, modes = student(net), [m.training for m in net.modules()]
    assert all(modes) and all(torch.equal(t, before[k]) for k, t in net.state_dict().items())
    net.eval()
    assert as_it_is == student(lambda x, index: net(x).detach()) == student(lambda x: net(x).detach())


@pytest.mark.parametrize("teacher, message", [
    (lambda x: (x.flatten(1)[:, :20],)*2, "teacher: got one, which returns a tuple, expected a tensor"),
    (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 7)), 
     r"teacher: got one, whose outputs are \(8, 7\), expected \(8, 20\), a logit for each class"),
    (lambda x: 1., "teacher: got one, which returns a float"),
    (lambda x: x.flatten(1)[:, :20].round().int(), "teacher: got one, whose outputs are torch.int32"),
    (lambda x: x.flatten(1)[:, :20]*torch.nan, "teacher: got one, whose outputs are NaN or infinity"),
    (lambda x: torch.randn(len(x), 20), "teacher: got answers that differ by .*% when asked again"),
    (lambda x: torch.nn.functional.batch_norm(x, None, None, training=True).flatten(1)[:, :20], # train mode
     "teacher: got answers that differ"),
    (torch.zeros(100, 20), "teacher: got a Tensor, expected a network, or a function of inputs"),
    (None, "teacher_logits: got None, expected the logits of a teacher")])
def test_a_teacher_of_fit_that_is_none_is_told(teacher, message):
    with pytest.raises(ValueError, match=message):
        fit(build_net(SPEC), load_data(TINY), Distillation(2., .9),
            Recipe(2, 50), teacher=teacher, device="cpu",
            progress=False)



def test_probabilities_of_a_teacher_are_suspicious():
    with pytest.warns(UserWarning, match="the outputs look like probabilities"):
        fit(build_net(SPEC), load_data(TINY), Distillation(2., .9), Recipe(1, 50), device="cpu",
            progress=False, teacher=lambda x: x.flatten(1)[:, :20].softmax(1))


@pytest.mark.parametrize("change, message", [
    (dict(method=Method("mdca")), r"method: got Method\('mdca'.*expected what its `build\(\)` gives"),
    (dict(method=Method("mdca").build(), teacher=lambda x: x),
     "teacher: got one, expected none beside a method"),
    (dict(net=torch.nn.Linear(7, 20)), r"model: got 'Linear', which fails on inputs \(2, 3, 8, 8\)"),
    (dict(net=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 20)).double()), "which fails on"),
])
def test_what_fit_cannot_use_is_told_before_the_first_step(change, message):
    given = dict(net=build_net(SPEC), data=load_data(TINY),
                 method=Method("nll").build(), recipe=Recipe(1, 50))
    with pytest.raises(ValueError, match=message): fit(**given | change, device="cpu", progress=False)


@pytest.mark.parametrize("forward, message", [
    (lambda z: z.detach(), "whose outputs have no gradient"),
    (lambda z: z/0, "whose outputs are NaN or infinity"),
    (lambda z: z.new_zeros(z.shape), "no gradient")])
def test_outputs_that_nothing_can_be_learned_from_are_told(forward, message):
    class Odd(torch.nn.Linear):
        def forward(self, x): return forward(super().forward(x.flatten(1)))
    with pytest.raises(ValueError, match=f"model: got 'Odd'.*{message}"):
        fit(Odd(192, 20), load_data(TINY), Method("nll").build(), Recipe(1, 50), device="cpu", progress=False)


def test_a_factory_that_gives_no_network_is_told(tmp_path):
    MODELS["nothing"] = lambda n_classes, in_channels: None
    try:
        with pytest.raises(ValueError, match="model: got 'nothing', which gives a NoneType"):
            run(replace(SPEC, model="nothing"), Store(tmp_path), "cpu", progress=False)
    finally: del MODELS["nothing"]


def test_a_frozen_backbone_may_be_shared_and_a_trained_network_may_not(store):
    backbone = torch.nn.Linear(192, 16).requires_grad_(False)
    MODELS["frozen"] = lambda n, c: torch.nn.Sequential(torch.nn.Flatten(), backbone, torch.nn.Linear(16, n))
    whole = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 20))
    MODELS["whole"] = lambda n, c: whole
    first, second = (replace(SPEC, recipe=Recipe(1, 50), seed=s) for s in (0, 1))
    for spec in (first, second): run(replace(spec, model="frozen"), store, "cpu", progress=False)
    run(replace(first, model="whole"), store, "cpu", progress=False)
    with pytest.raises(ValueError, match="model: got 'whole', which gives parameters that another run has"):
        run(replace(second, model="whole"), store, "cpu", progress=False)


class Notes(TrainingMethod):
    "A method that changes as it trains; `strength` is what it was made with"
    def __init__(self, strength=1.): super().__init__(); self.strength, self.epochs = strength, 0
    def after_epoch(self, epoch, *valid): self.epochs += 1; self.last = float(epoch)


def test_a_checkpoint_is_of_one_training(tmp_path):
    "Goes on with the same method, made anew or used again; with another number, recipe, seed or data not"
    def go(method=None, data=TINY, recipe=Recipe(2, 50), seed=0): # noqa: B008
        return fit(build_net(SPEC), load_data(data), method or Notes(), recipe, seed, device="cpu",
                   checkpoint=tmp_path/"x", checkpoint_every=0, progress=False).history
    used = Notes()
    history = go(used)
    assert history == go(used) == go(Notes(np.float64(1))) == go(Notes(1)) == go(seed=np.int64(0))
    before = (tmp_path/"x").read_bytes()
    for other in (dict(method=Notes(2.)), dict(seed=1), dict(recipe=Recipe(2, 50, lr=.05)),
                  dict(method=Method("mdca").build()), dict(data=replace_seed(TINY))):
        with pytest.raises(ValueError, match="checkpoint: got .*, of another training"): go(**other)
    assert (tmp_path/"x").read_bytes() == before, "it may still be needed"


def replace_seed(data): return DataSpec(data.name, **data.params | {"seed": 1})


def test_a_fit_in_bf16_leaves_no_old_weights_behind():
    "Torch keeps casts of weights until the caller's block ends"
    data, net = load_data(TINY), build_net(SPEC)
    x = data.normalise(data.test.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        fit(net, data, TrainingMethod(), Recipe(3, 32), device="cpu", progress=False)
        with torch.no_grad(): within = net(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): assert torch.equal(net(x), within)


def test_all_precisions_of_a_run_are_told(tmp_path):
    "Also where it stopped in one and went on in the other; what no step was taken in is not"
    store, recipe = Store(tmp_path), Recipe(4, 32)
    spec = replace(SPEC, method=Method("nll"), recipe=recipe)
    with pytest.raises(OutOfTime), torch.autocast("cpu", torch.bfloat16):
        fit_spec(spec, store, stop_after=2)
    assert run(spec, store, "cpu", progress=False).facts["precision"] == "bf16 and float32"


def fit_spec(spec, store, stop_after):
    "Train a run until so many epochs are done"
    trainer = kr.build_trainer(spec, kr.RunContext(store, "cpu", bf16=torch.is_autocast_enabled("cpu")))
    path = store.path(spec, "part")
    for _ in trainer.chunks(path, checkpoint_every=0):
        if trainer.epoch == stop_after: trainer.stop_if(True, CheckpointWriter(trainer, path))
