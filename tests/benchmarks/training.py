"""Images a second in training: the usual loop, the kit's step eager and recorded, and runs side by side.

    python tests/benchmarks/training.py --results nbs/results/benchmark_training.json
    python tests/benchmarks/training.py --models wrn_40_1 resnet50 --batch 128 --rounds 1 --budget 90

The usual loop: PIL transforms in DataLoader workers, eager steps, AMP on CUDA. Recorded: as a CUDA graph;
where there is no CUDA, recorded is eager. Runs side by side share one process, each on a CUDA stream of its
own; without CUDA they take turns. cuDNN chooses its algorithms by benchmark, for the usual loop too.

Beside each row: on CUDA the peak of the memory that torch reserves, beyond what it held before; FLOP for an
image (`flop`); what an eager step asks of torch, in operations that are no views and in bytes for an image,
if each reads its inputs and writes its outputs. The kernels of the kit's steps are counted at the end,
because a process that was profiled may stay slower.

The most telling measurements come first, and the results are written after each. With a budget, one begins
only if as much time is left as the last of its kind took, or the last of all if it is the first of its kind;
on CUDA the last tenth is for the kernels. The exit status is 1 if a measurement failed; what was left out is
no failure.
"""
import argparse
import gc
import json
import os
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

BEGAN = time.perf_counter() # before torch is imported, which takes seconds

from kdc_nb.files import atomic_write # before torch, whose threads would spin

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from kdc_nb.training.data import Dataset, Split
from kdc_nb.training.devices import best_device
from kdc_nb.training.losses import cross_entropy, distillation
from kdc_nb.training.methods import Method
from kdc_nb.training.distillation import Distillation
from kdc_nb.training.models import build_model
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.steps import predict_logits
from kdc_nb.training.trainer import Trainer
from kdc_nb.experiments.runs import describe_environment

C, BATCH, TEACHER = 100, 128, "wrn_40_2"
METHODS, WORKERS = ("NLL", "KD"), min(8, os.cpu_count())
MODELS = ["wrn_40_1", "mobilenet_v2", "wrn_40_2", "resnet8", "resnet56_bottleneck"]


# --- What is measured -------------------------------------------------------------------------------------

class Case(NamedTuple):
    "What a row is about"
    model: str
    loop: str # a key of `LOOPS`, or "kernels"
    batch: int
    slots: int = 1 # runs side by side
    method: str | None = "NLL" # or "KD"; None: no training
    layout: str = "NHWC" # of images and weights, where the kit decides; or "NCHW"


class Loop(NamedTuple):
    "A case ready to go"
    step: Callable[[], Any] # a step of each of the runs side by side
    eager: Callable[[], Any] # a step of one of them, not recorded
    size: int # images of a step of one of them
    renew: Callable[[], Any] = lambda: None # call it before `eager`: then no epoch begins in it


Row = dict[str, Any] # a case, and what was measured; or its error
Rows = dict[Case, Row]


def plan(models: list[str], batches: list[int], slots: list[int], device: torch.device) -> list[Case]:
    "All cases, the most telling first"
    (first, *others), (small, *large) = models, batches
    cases = [Case(first, "eager", small), *(Case(first, "recorded", small, s) for s in slots)]
    cases += [Case(m, "recorded", small) for m in others] + [Case(first, "recorded", small, method="KD")]
    cases += [Case(m, "recorded", b) for some in ([first], others) for b in large for m in some]
    cases += [Case(first, "usual", small)]
    cases += [Case(m, "recorded", small, layout="NCHW") for m in models if m.startswith("mobilenet")]
    cases += [Case(TEACHER, "predict", Dataset.eval_batch_size, method=None)]
    ways = ("eager", "usual", "recorded")
    cases += [Case(first, way, b, method=k) for k in METHODS for b in batches for way in ways]
    cases += [Case(m, "recorded", small, method="KD") for m in others]
    if device.type == "cuda": cases += [Case(m, "kernels", small, method=k) for k in METHODS for m in models]
    return list(dict.fromkeys(cases))


def classes_of(model: str) -> int:
    "MobileNetV2 is used on CIFAR-10, the others on CIFAR-100"
    return 10 if model.startswith("mobilenet") else C


@lru_cache
def images(n: int, classes: int = C) -> Dataset:
    "Noise in the shape of CIFAR"
    g = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
    split = Split(inputs, torch.randint(0, classes, (n,), generator=g), None)
    return Dataset(split, split, split, tuple(map(str, range(classes))), augment=("crop", "flip"))


def teacher_of(case: Case, data: Dataset, device: torch.device) -> nn.Module | None:
    "The network that a student asks at each step; its weights are random, which costs the same"
    if case.method != "KD": return None
    net = build_model(TEACHER, data.n_classes).to(device, memory_format=torch.channels_last).eval()
    synchronize(device) # its weights will be read on other streams
    return net


# --- The loops --------------------------------------------------------------------------------------------

class Pictures(torch.utils.data.Dataset):
    "The images as torchvision's CIFAR would give them"
    def __init__(self, data: Dataset):
        self.data = data
        self.transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize((.5,)*3, (.25,)*3)])

    def __len__(self) -> int: return len(self.data.train.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.data.train.inputs[i]), self.data.train.labels[i]


def loaded(data: Dataset, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    "Batches without end, by workers"
    loader = DataLoader(Pictures(data), size, shuffle=True, num_workers=WORKERS, drop_last=True, timeout=30,
                        pin_memory=device.type == "cuda", persistent_workers=True)
    while True: yield from loader


def usual(case: Case, data: Dataset, device: torch.device) -> Loop:
    "The loop that everybody uses"
    net, teacher = build_model(case.model, data.n_classes).to(device).train(), teacher_of(case, data, device)
    opt = torch.optim.SGD(net.parameters(), .1, .9, weight_decay=5e-4, nesterov=True)
    size = min(case.batch, len(data.train))
    source = loaded(data, size, device)
    def step() -> None:
        x, y = (t.to(device, non_blocking=True) for t in next(source))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = net(x)
            if teacher:
                with torch.no_grad(): said = teacher(x)
        loss = distillation(z, y, said, 1., .9) if teacher else cross_entropy(z, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    for _ in range(2*WORKERS): step() # on the batches that were made ahead
    return Loop(step, step, size)


class Run:
    "A run of the kit on a CUDA stream of its own, epoch after epoch"
    def __init__(self, case: Case, data: Dataset, device: torch.device, teacher: nn.Module | None):
        method = Distillation(1., .9) if teacher else Method("nll").build()
        recipe = Recipe(1, case.batch, augment=data.augment, live_teacher=True)
        asked = (lambda x, index: teacher(x).float()) if teacher else None
        self.done = 0 # steps of the epoch
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(self.stream): # None: nothing happens
            net = build_model(case.model, data.n_classes)
            self.training = Trainer(net, data, method, recipe, 0, device, asked,
                                    use_cuda_graph=case.loop == "recorded")
            self.training.begin_epoch()
            self.fast = self.training.capture()
        synchronize(device)

    def slow(self) -> None: self.training.step()

    def renew(self) -> None:
        "Begin the next epoch if this one is over"
        if self.done < len(self.training.losses): return
        with torch.cuda.stream(self.stream): self.training.begin_epoch()
        self.done = 0

    def advance(self, step: Callable[[], None]) -> None:
        "Do a step of the epoch"
        with torch.cuda.stream(self.stream): step()
        self.done += 1


def kit(case: Case, data: Dataset, device: torch.device) -> Loop:
    "The kit's steps, of each run in turn"
    teacher = teacher_of(case, data, device)
    runs = [Run(case, data, device, teacher) for _ in range(case.slots)]
    def step() -> None:
        for run in runs:
            run.renew()
            run.advance(run.fast)
    one = runs[0]
    return Loop(step, lambda: one.advance(one.slow), one.training.batch_size, one.renew)


def prediction(case: Case, data: Dataset, device: torch.device) -> Loop:
    "Logits in evaluation mode, in full precision"
    net = build_model(case.model, data.n_classes).to(device, memory_format=torch.channels_last)
    inputs = data.test.inputs[:4*case.batch]
    def step() -> None: predict_logits(net, data, inputs)
    return Loop(step, step, len(inputs))


LOOPS = {"usual": usual, "eager": kit, "recorded": kit, "predict": prediction}


# --- How it is measured -----------------------------------------------------------------------------------

def synchronize(device: torch.device) -> None:
    "Wait for the device"
    if device.type == "cuda": torch.cuda.synchronize(device)


def pace(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    "Steps a second"
    synchronize(device)
    began, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - began < seconds:
        step()
        n += 1
        if n % 20 == 0: synchronize(device) # so that the clock is not far ahead of the device
    synchronize(device)
    return n/(time.perf_counter() - began)


def copy_bandwidth(device: torch.device) -> float: # TB/s
    "What a copy of 1 GiB reads and writes in a second"
    x = torch.empty(2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2*x.nbytes*pace(lambda: y.copy_(x), device, .1)/1e12


class Asked(TorchDispatchMode):
    "Operations that torch is asked for and are no views, and the bytes of what they are given and give"
    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not func.is_view:
            self.operations += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


@lru_cache
def forward_flop(model: str) -> int:
    "Floating-point operations of convolutions and matrix products for one image, forward"
    net = build_model(model, classes_of(model)).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as seen: net(torch.zeros(1, 3, 32, 32))
    return seen.get_total_flops()


def flop(case: Case) -> int:
    """FLOP for an image: three forward passes for a step of the student, one for its teacher.

    Backward is the gradient by the inputs and that by the weights, each as much as forward. It is not
    counted, because torch counts it for a grouped convolution as if that had no groups.
    """
    own = forward_flop(case.model)
    return own if case.loop == "predict" else 3*own + (forward_flop(TEACHER) if case.method == "KD" else 0)


def kernels(step: Callable[[], Any], device: torch.device) -> Row:
    "How many times a step has the GPU compute, copy or fill, how long in all, and what takes longest"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
        step()
        synchronize(device)
    events = [e for e in seen.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    if not events: raise RuntimeError("the profiler saw no kernels")
    times = Counter()
    for e in events: times[e.name] += e.time_range.elapsed_us()
    calls = Counter(e.name for e in events)
    busiest = [[name[:80], calls[name], round(us)] for name, us in times.most_common(8)]
    return {"kernels": len(events), "kernels_us": round(sum(times.values())), "busiest": busiest}


@contextmanager
def in_layout(layout: str) -> Iterator[None]:
    "For NCHW, what the kit calls channels_last is the usual order as long as the block lasts"
    kept = torch.channels_last
    if layout == "NCHW": torch.channels_last = torch.contiguous_format
    try: yield
    finally: torch.channels_last = kept


@contextmanager
def noted(row: Row) -> Iterator[None]:
    "An error of the block goes into the row"
    try: yield
    except Exception as e: row["error"] = f"{type(e).__name__}: {e}"


def reserved_memory(device: torch.device) -> int: # bytes
    "What torch cannot give back, from which the next peak is counted; 0 without CUDA"
    gc.collect() # runs and their graphs
    if device.type != "cuda": return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_reserved(device)


def fill(row: Row, case: Case, device: torch.device, args: Namespace) -> None:
    "Measure a case; what is done before an error is in the row"
    held, began = reserved_memory(device), time.perf_counter()
    loop = LOOPS[case.loop](case, images(args.images, classes_of(case.model)), device)
    loop.step() # cuDNN chooses, workers begin
    synchronize(device)
    row["setup_s"] = round(time.perf_counter() - began, 2)
    paces = [pace(loop.step, device, args.seconds) for _ in range(args.rounds)]
    row["rates"] = [round(case.slots*loop.size*p, 1) for p in paces]
    row["rate"] = round(statistics.median(row["rates"]), 1)
    if device.type == "cuda": row["memory_GiB"] = (torch.cuda.max_memory_reserved(device) - held)/2**30
    row["flop"] = flop(case)
    loop.renew()
    with Asked() as asked: loop.eager()
    row |= {"operations": asked.operations, "bytes": round(asked.bytes/loop.size)}


def count_kernels(row: Row, case: Case, device: torch.device, args: Namespace) -> None:
    "The kernels of an eager step of the kit"
    gc.collect() # graphs, which do not go well with a profiler
    loop = kit(case, images(args.images, classes_of(case.model)), device)
    loop.step() # cuDNN chooses
    loop.renew()
    row |= kernels(loop.eager, device)


def measure(case: Case, device: torch.device, args: Namespace) -> Row:
    "A row"
    row, began = case._asdict(), time.perf_counter()
    with noted(row), in_layout(case.layout), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        (count_kernels if case.loop == "kernels" else fill)(row, case, device, args)
    return row | {"seconds": round(time.perf_counter() - began, 2)}


# --- What is said and written -----------------------------------------------------------------------------

def title(case: Case) -> str:
    "A case in words"
    layout = None if case.layout == "NHWC" else case.layout
    words = [case.model, case.method, case.loop, layout, f"batch {case.batch}"]
    return " ".join(filter(None, words)) + (f" x {case.slots}" if case.slots > 1 else "")


def line(case: Case, row: Row) -> str:
    "A row in words"
    cells = [f"{title(case) + ':':45}"]
    if "rate" in row:
        cells.append(f"{row['rate']:,.0f} images/s ({min(row['rates']):,.0f} to {max(row['rates']):,.0f})")
        cells.append(f"set up in {row['setup_s']:.1f} s")
    if "memory_GiB" in row: cells.append(f"{row['memory_GiB']:.2f} GiB")
    if "bytes" in row:
        cells.append(f"an image: {row['flop']/1e9:.2f} GFLOP ({row['rate']*row['flop']/1e12:.3g} TFLOP/s)")
        cells.append(f"{row['bytes']/1e6:.1f} MB ({row['rate']*row['bytes']/1e12:.3g} TB/s)")
        cells.append(f"{row['operations']:,} operations")
    if "kernels" in row: cells.append(f"{row['kernels']:,} kernels")
    if "busiest" in row: cells.append(f"{row['kernels_us']:,} us, of these {row['busiest'][0]}")
    if "error" in row: cells.append("ERROR " + row["error"].splitlines()[0][:300])
    return cells[0] + " " + ", ".join(cells[1:])


def fastest(rows: Rows, args: Namespace) -> int | None:
    "How many runs side by side give the most images a second: first model, first batch size, NLL"
    cases = {s: Case(args.models[0], "recorded", args.batch[0], s) for s in args.slots}
    rates = {s: rows[c]["rate"] for s, c in cases.items() if "rate" in rows.get(c, {})}
    return max(rates, key=rates.get, default=None)


def with_kernels(rows: Rows) -> list[Row]:
    "The rows, those of the kit with the kernels of their model and method"
    counts = {(c.model, c.method): row["kernels"] for c, row in rows.items() if "kernels" in row}
    def found(c: Case) -> dict[str, int]:
        there = c.loop in ("eager", "recorded") and c.layout == "NHWC" and (c.model, c.method) in counts
        return {"kernels": counts[c.model, c.method]} if there else {}
    return [row | found(c) for c, row in rows.items()]


def write(facts: Row, rows: Rows, left: list[Case], args: Namespace) -> None:
    "All that there is so far, and what is not yet measured"
    if not args.results: return
    left_out = [c._asdict() for c in left]
    found = {"facts": facts, "slots": fastest(rows, args), "rows": with_kernels(rows), "left_out": left_out}
    with atomic_write(args.results) as part: part.write_text(json.dumps(found, indent=1) + "\n")


def options() -> Namespace:
    "The command line"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=MODELS)
    p.add_argument("--batch", nargs="+", type=int, default=[BATCH, 512, 1024], help="images of a step")
    p.add_argument("--slots", nargs="+", type=int, default=[1, 2, 4, 8], help="runs side by side")
    p.add_argument("--seconds", type=float, default=1., help="of each measurement in each round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--budget", type=float, default=float("inf"), help="seconds for everything")
    p.add_argument("--images", type=int, default=50_000, help="of an epoch")
    p.add_argument("--device")
    p.add_argument("--results", help="a .json file to write")
    return p.parse_args()


def everything(facts: Row, device: torch.device, args: Namespace) -> Rows:
    "Measure what there is time for"
    cases, rows, took = plan(args.models, args.batch, args.slots, device), {}, {}
    last = args.rounds*args.seconds
    write(facts, rows, cases, args)
    for case in cases:
        share = .9 if device.type == "cuda" and case.loop != "kernels" else 1.
        needs = took.get(case.loop, last)
        if time.perf_counter() - BEGAN + needs > share*args.budget: continue
        rows[case] = measure(case, device, args)
        took[case.loop] = last = rows[case]["seconds"]
        print(line(case, rows[case]), flush=True)
        write(facts, rows, [c for c in cases if c not in rows], args)
    left = [title(c) for c in cases if c not in rows]
    if left: print("left out for want of time:", "; ".join(left))
    return rows


def main() -> int: # exit status
    args = options()
    device = best_device(args.device)
    facts = describe_environment(device)
    if device.type == "cuda":
        with noted(facts): facts["copy_TB_s"] = round(copy_bandwidth(device), 3)
    print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
    rows = everything(facts, device, args)
    print(f"runs side by side with the most images a second: {fastest(rows, args)}")
    return int(any("error" in row for row in (facts, *rows.values())))


if __name__ == "__main__": sys.exit(main())
