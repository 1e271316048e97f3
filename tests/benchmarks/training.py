"""Images a second: the loop that everybody uses, the kit's, and the kit's packed; in turns, on one machine.

    python tests/benchmarks/training.py                                     wrn_40_1, NLL and KD
    python tests/benchmarks/training.py --models wrn_40_2 resnet50 --pack 4 --results nbs/results/benchmark_training.json

The usual loop: PIL transforms in DataLoader workers, eager steps, AMP on CUDA. Beside them what a step needs at least: its
floating-point operations, and its bytes if every operation reads its inputs and writes its outputs once, over the device's peaks.
"""
import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import joblib
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from kdc_nb.calibrators import Distillation, Method
from kdc_nb.core import whole_file
from kdc_nb.data import DataSet, Split
from kdc_nb.losses import cross_entropy, distillation
from kdc_nb.models import build_model
from kdc_nb.runs import environment
from kdc_nb.devices import autocast, best_device
from kdc_nb.training import Recipe, Training, begin_epoch, recorded, train_step

C, BATCH, TEACHER = 100, 128, "wrn_40_2"
PEAKS = {"NVIDIA H100 80GB HBM3": (989e12, 3.35e12), "NVIDIA H200": (989e12, 4.8e12)} # bf16 FLOP/s and bytes/s, from the data sheets


def images(n: int) -> DataSet:
    g = torch.Generator().manual_seed(0)
    split = Split(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), torch.randint(0, C, (n,), generator=g), None)
    return DataSet(split, split, split, tuple(map(str, range(C))), augment=("crop", "flip"))


class Pictures(Dataset):
    "The images as torchvision's CIFAR would give them"
    def __init__(self, data: DataSet):
        self.data = data
        self.transform = transforms.Compose([transforms.ToPILImage(), transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(),
                                             transforms.ToTensor(), transforms.Normalize((.5,)*3, (.25,)*3)])

    def __len__(self): return len(self.data.train.labels)
    def __getitem__(self, i): return self.transform(self.data.train.inputs[i]), self.data.train.labels[i]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda": torch.cuda.synchronize()


def usual(data: DataSet, model: str, kd: bool, device: torch.device):
    "The loop that everybody uses; each call does one step"
    net = build_model(model, C).to(device).train()
    teacher = build_model(TEACHER, C).to(device).eval() if kd else None
    opt = torch.optim.SGD(net.parameters(), .1, .9, weight_decay=5e-4, nesterov=True)
    def batches():
        loader = DataLoader(Pictures(data), BATCH, shuffle=True, num_workers=min(8, os.cpu_count()), drop_last=True, pin_memory=device.type == "cuda", persistent_workers=True)
        while True: yield from loader
    source = batches()
    def step():
        x, y = (t.to(device, non_blocking=True) for t in next(source))
        with autocast(device):
            z = net(x)
            if teacher is not None:
                with torch.no_grad(): said = teacher(x)
        loss = distillation(z, y, said, 1., .9) if kd else cross_entropy(z, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return step


def kit(data: DataSet, model: str, kd: bool, device: torch.device):
    "The kit's loop; each call does one step"
    method, recipe = Distillation(1., .9) if kd else Method("nll").build(), Recipe(1, BATCH, augment=("crop", "flip"), live_teacher=True)
    training = Training(build_model(model, C), data, method, recipe, 0, device)
    net = build_model(TEACHER, C).to(device, memory_format=torch.channels_last).eval()
    begin_epoch(training)
    one, done = recorded(training, (lambda x, index: net(x)) if kd else None), 0
    def step():
        nonlocal done
        assert not net.training # and so keeps it alive: a recorded step reads its weights, and holds nothing
        if done and done % len(training.losses) == 0: begin_epoch(training)
        one()
        done += 1
    return step


def pace(step, device: torch.device, seconds: float) -> float:
    "Images a second, over at least three steps"
    synchronize(device)
    began, n = time.perf_counter(), 0
    while n < 3 or time.perf_counter() - began < seconds:
        step(); n += 1
        if n % 20 == 0: synchronize(device)
    synchronize(device)
    return n*BATCH/(time.perf_counter() - began)


def one_of_a_pack(model: str, kd: bool, device: str, args, k: int, ready: Path) -> float:
    "The pace of one of several processes, from when all of them are ready"
    device = torch.device(device)
    step = kit(images(args.images), model, kd, device)
    pace(step, device, 0.)
    (ready/str(k)).touch()
    while len(list(ready.iterdir())) < args.pack: time.sleep(.01)
    return pace(step, device, args.seconds)


class Bytes(TorchDispatchMode):
    "Sums what every operation that is no view reads and writes"
    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not func.is_view: self.total += sum(t.numel()*t.element_size() for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor))
        return out


def needs(data: DataSet, model: str, kd: bool) -> tuple[float, float]:
    "FLOP and bytes of a step for one image, counted on the CPU in float32; bf16 halves the bytes"
    method = Distillation(1., .9) if kd else Method("nll").build()
    training = Training(build_model(model, C), data, method, Recipe(1, 8, augment=("crop", "flip")), 0, torch.device("cpu"))
    net = build_model(TEACHER, C).eval()
    begin_epoch(training)
    with FlopCounterMode(display=False) as flop, Bytes() as moved: train_step(training, (lambda x, index: net(x)) if kd else None)
    return flop.get_total_flops()/8, moved.total/8


def measure(model: str, kd: bool, device: torch.device, args) -> dict:
    "The three loops in turns, `rounds` times"
    data = images(args.images)
    loops = {"usual": usual(data, model, kd, device), "kit": kit(data, model, kd, device)}
    for step in loops.values(): pace(step, device, 0.)
    rates = {name: [] for name in loops} | {"packed": []}
    for _ in range(args.rounds):
        for name, step in loops.items(): rates[name].append(pace(step, device, args.seconds))
        if args.pack > 1:
            with tempfile.TemporaryDirectory() as ready:
                tasks = [joblib.delayed(one_of_a_pack)(model, kd, str(device), args, k, Path(ready)) for k in range(args.pack)]
                rates["packed"].append(sum(joblib.Parallel(args.pack)(tasks)))
    flop, moved = needs(images(16), model, kd)
    peaks = PEAKS.get(environment(device)["name"])
    roofs = {"FLOP": peaks[0]/flop, "bytes": 2*peaks[1]/moved} if peaks else {}
    return {"model": model, "method": "KD" if kd else "NLL", "rates": rates, "flop": flop, "bytes": moved, "roofs": roofs}


def line(row: dict) -> str:
    rate = {k: statistics.median(v) for k, v in row["rates"].items() if v}
    ratios = [k/u for u, k in zip(row["rates"]["usual"], row["rates"]["kit"])]
    cells = [f"{row['model']:20}{row['method']:5}", f"usual {rate['usual']:9,.0f}/s", f"kit {rate['kit']:9,.0f}/s ({statistics.median(ratios):.2f}x, {min(ratios):.2f} to {max(ratios):.2f})"]
    if "packed" in rate: cells.append(f"packed {rate['packed']:9,.0f}/s ({rate['packed']/rate['usual']:.2f}x)")
    cells.append(f"{row['flop']/1e9:.2f} GFLOP, {row['bytes']/1e6:.0f} MB an image")
    if row["roofs"]: cells.append("roofs " + ", ".join(f"{v:,.0f}/s by {k}" for k, v in row["roofs"].items()))
    return "  ".join(cells)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["wrn_40_1"])
    p.add_argument("--device")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=5., help="of each loop in each round")
    p.add_argument("--images", type=int, default=5000)
    p.add_argument("--pack", type=int, default=1, help="processes at once for the packed loop; 1: none")
    p.add_argument("--results", help="a .json file to write")
    args = p.parse_args()
    warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
    device = best_device(args.device)
    facts = environment(device)
    print(f"{facts['name']}, {facts['threads']} threads, torch {facts['torch']}, batches of {BATCH}, {args.rounds} rounds of {args.seconds:g} s")
    rows = []
    for model in args.models:
        for kd in (False, True):
            rows.append(measure(model, kd, device, args))
            print(line(rows[-1]), flush=True)
            if args.results:
                with whole_file(args.results) as part: part.write_text(json.dumps({"facts": facts, "rows": rows}))


if __name__ == "__main__": main()
