"""A training step by each distillation loss over one by Hinton's, in the same process and round.

`python tests/benchmarks/losses.py`: ResNet8 on one thread, 128 images of 32 by 32
"""
import statistics
import time

import torch

from kdc_nb.training.distillation import Distillation, DistilLoss
from kdc_nb.training.methods import TrainingStep
from kdc_nb.training.models import build_model

N, ROUNDS = 128, 12


def seconds(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor,
            teacher: torch.Tensor, method: Distillation) -> float:
    "One step, forward and backward, without the optimiser's part"
    start = time.perf_counter()
    method(TrainingStep(net(x), y, epoch=torch.tensor(3), teacher_logits=teacher)).backward()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    losses = {"Hinton's": None} | {k: DistilLoss(k).build() for k in DistilLoss.registry}
    for classes in (10, 100):
        net = build_model("resnet8", classes).to(memory_format=torch.channels_last)
        x = torch.randn(N, 3, 32, 32).to(memory_format=torch.channels_last)
        y, teacher = torch.randint(classes, (N,)), 3*torch.randn(N, classes)
        took = [{k: seconds(net, x, y, teacher, Distillation(4., .9, loss)) for k, loss in losses.items()}
                for _ in range(ROUNDS)]
        for k in losses:
            ratio = statistics.median(t[k]/t["Hinton's"] for t in took[1:])
            print(f"{classes:3} classes  {k:14}{ratio:.2f} of Hinton's")


if __name__ == "__main__": main()
