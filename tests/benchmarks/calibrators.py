"""What a method costs: its loss alone, and a training step over one of the NLL's, in turns in one process.

    python tests/benchmarks/calibrators.py --results nbs/results/calibrators_cost.json

WRN-40-1, batch 128, 100 classes. Operations are those that torch is asked for by the loss, forward and
backward; on CUDA the kernels too.
"""
import argparse
import json
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import BATCH, C, images, kernels, synchronize # the benchmark beside this one

from kdc_nb.files import atomic_write
from kdc_nb.tables import format_text_table
from kdc_nb.training.devices import best_device
from kdc_nb.training.methods import Method, TrainingMethod, TrainingStep
from kdc_nb.training.distillation import Distillation
from kdc_nb.training.models import build_model
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.trainer import Trainer
from kdc_nb.experiments.runs import describe_environment
from kdc_nb.experiments.specs import method_label


class Count(TorchDispatchMode):
    "How many operations torch is asked for"
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **kwargs or {})


def methods() -> dict[str, TrainingMethod]:
    named = [Method(name) for name in sorted(Method.registry)] + [Method("mdca", gamma=1.)]
    return {"nll": Method("nll").build(), "KD": Distillation(), **{method_label(m): m.build() for m in named}}


def loss_alone(method: TrainingMethod, device: torch.device):
    "Forward and backward of the loss on a batch of logits; each call does both"
    method.before_fit(BATCH, C, 2)
    method.to(device)
    z, y = torch.randn(BATCH, C, device=device, requires_grad=True), torch.randint(C, (BATCH,), device=device)
    index, epoch, said = (torch.arange(BATCH, device=device), torch.ones((), dtype=torch.long, device=device),
                          torch.randn(BATCH, C, device=device))
    targets = torch.randn(BATCH, C, device=device).softmax(1) if type(method).__name__ == "_MixUp" else y
    return lambda: torch.autograd.grad(method(TrainingStep(z, targets, index, epoch, said)), z)


def training_step(method: TrainingMethod, device: torch.device):
    "A whole step; a teacher's answers are at hand"
    teacher = (lambda x, index: said[index]) if isinstance(method, Distillation) else None
    run = Trainer(build_model("wrn_40_1", C), images(BATCH), method,
                  Recipe(2, BATCH, augment=("crop", "flip")), 0, device, teacher)
    said = torch.randn(BATCH, C, device=device)
    run.begin_epoch()
    step = run.capture()
    def once():
        run.step_counter.zero_()
        step()
    return once


def seconds(step, device: torch.device, times: int = 1) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times): step()
    synchronize(device)
    return (time.perf_counter() - start)/times


def cost(method: TrainingMethod, plain, device: torch.device, rounds: int) -> dict[str, float]:
    loss, step = loss_alone(method, device), None
    loss(); loss()
    with Count() as asked: loss()
    row = {"operations": asked.n, "ms": 1000*statistics.median(seconds(loss, device, 10) for _ in range(5))}
    if device.type == "cuda": row["kernels"] = kernels(loss, device)
    step = training_step(method, device)
    step(); plain()
    pairs = [(seconds(step, device), seconds(plain, device)) for _ in range(rounds)]
    ratios = sorted(own/nll for own, nll in pairs)
    low, median, high = statistics.quantiles(ratios, n=4)
    return row | {"ratio": median, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results")
    args = parser.parse_args()
    device = best_device()
    plain, rows = training_step(Method("nll").build(), device), {}
    for name, method in methods().items():
        rows[name] = {k: round(v, 4) for k, v in cost(method, plain, device, args.rounds).items()}
        print(name, rows[name], flush=True)
    print(format_text_table(["", *rows["nll"]], [[k, *map(str, r.values())] for k, r in rows.items()]))
    if args.results:
        with atomic_write(args.results) as part:
            part.write_text(json.dumps(
                {"environment": describe_environment(device), "rounds": args.rounds, "rows": rows}, indent=1
            ) + "\n")


if __name__ == "__main__": main()
