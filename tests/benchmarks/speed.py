"""One table: how long the kit takes, beside what else there is, in turns in one process.

    python tests/benchmarks/speed.py [--rounds 5] [--compile] [--bf16]

A row is one task on the same data. Times are medians over the rounds; the last column is the median of the
ratios of a round, so that a busy machine changes it little: above 1, the kit is faster. With --compile the
training step is also compared with torch.compile, whose set-up is told apart. With --bf16 it is another
table: steps of the paper's networks on this CPU in bf16, beside those in full precision. Images a second at
full size, on a GPU and beside a data loader are in training.py.
"""
import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from netcal.metrics import ECE
from netcal.scaling import TemperatureScaling
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torchmetrics.functional.classification import multiclass_calibration_error

from kdc_nb.tables import Table
from kdc_nb.calibration.evaluation import evaluate
from kdc_nb.calibration.metrics import ece
from kdc_nb.calibration.posthoc import Calibrator, fit_temperature
from kdc_nb.training.data import DataSpec, Split, load_data
from kdc_nb.training.methods import Method
from kdc_nb.training.models import build_model
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.trainer import Trainer
from kdc_nb.analysis.linear_model import fit_linear_student, tempered_probs
from kdc_nb.analysis.theorems import draw_linear_problem

Work = Callable[[], object]
N, C, DRAWS = 10_000, 100, 1000


def outputs(n_classes: int = C) -> tuple[torch.Tensor, torch.Tensor]: # logits (N, C), labels (N,)
    "Made-up outputs, somewhat overconfident"
    g = torch.Generator().manual_seed(0)
    z = 2*torch.randn(N, n_classes, generator=g)
    return 1.5*z, z.softmax(1).multinomial(1, generator=g)[:, 0]


def metric_tasks() -> dict[str, tuple[Work, dict[str, Work]]]: # ours and the others, by task
    "Calibration errors, temperatures, intervals"
    (z, y), out = outputs(), {}
    p, arrays = z.softmax(1), (z.softmax(1).numpy(), y.numpy())
    out[f"ECE of probabilities, {N:,} x {C}"] = (lambda: ece(p, y, from_logits=False), {
        "torchmetrics": lambda: multiclass_calibration_error(p, y, C, n_bins=15),
        "netcal": lambda: ECE(15).measure(*arrays)})
    out[f"temperature of least NLL, {N:,} x {C}"] = (lambda: fit_temperature(z, y), {
        "netcal": lambda: TemperatureScaling().fit(*arrays)})
    few, own = outputs(10)
    peers = [IsotonicRegression(out_of_bounds="clip") for _ in range(10)]
    out[f"isotonic regression, {N:,} x 10"] = (lambda: Calibrator("isotonic").build(few, own), {
        "scikit-learn": lambda: [r.fit(few.softmax(1)[:, c], own == c) for c, r in enumerate(peers)]})
    picks = [torch.randint(N, (N,)) for _ in range(10)]
    for x, t, c in ((z, y, C), (few, own, 10)):
        out[f"all metrics, raw and scaled, with intervals and null bands, {N:,} x {c}"] = (
            lambda x=x, t=t: evaluate(x, t, n_draws=DRAWS), {
            f"a bootstrap of ECE alone, {DRAWS:,} x torchmetrics": lambda x=x, t=t, c=c: [
                multiclass_calibration_error(x[i], t[i], c, n_bins=15) for i in picks]})
    return out


def theory_tasks() -> dict[str, tuple[Work, dict[str, Work]]]:
    "The exact linear student: a logistic regression on every point with both labels, weighted"
    P = draw_linear_problem(N=2000, d=10, angle=30., overconfidence=2., intercept=1.)
    z_t = P.X.T@P.W_t
    share = .5*P.y + .5*tempered_probs(z_t)
    peer = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-9)
    points = np.hstack([P.X, P.X]).T, np.repeat([1, 0], 2000), np.concatenate([share, 1 - share])
    return {"exact linear student, N = 2,000, d = 10": (lambda: fit_linear_student(P.X, P.y, z_t, 1., .5), {
        "scikit-learn": lambda: peer.fit(*points)})}


def step_tasks(compiled: bool) -> dict[str, tuple[Work, dict[str, Work]]]:
    "An epoch of ResNet8 on images of 8 x 8, batch 64"
    data, recipe = load_data(DataSpec("known", n_train=3200)), Recipe(epochs=1, batch_size=64)
    def kit():
        torch.manual_seed(0)
        net = build_model("resnet8", data.n_classes)
        Trainer(net, data, Method("nll").build(), recipe, 0, torch.device("cpu")).run(progress=False)
    def loop(net):
        x, y = data.normalise(data.train.inputs), data.train.labels
        opt = torch.optim.SGD(net.parameters(), .1, .9, weight_decay=5e-4, nesterov=True)
        for i in torch.randperm(len(y)).split(64):
            loss = torch.nn.functional.cross_entropy(net(x[i]), y[i])
            opt.zero_grad(); loss.backward(); opt.step()
    peers = {"the usual loop": lambda: loop(build_model("resnet8", data.n_classes))}
    if compiled:
        net, began = torch.compile(build_model("resnet8", data.n_classes)), time.perf_counter()
        loop(net)
        peers[f"torch.compile, after {time.perf_counter() - began:.0f} s of set-up"] = lambda: loop(net)
    return {"training, 50 steps of ResNet8 on 8 x 8, batch 64": (kit, peers)}


def bf16_tasks() -> dict[str, tuple[Work, dict[str, Work]]]:
    "Two steps of the paper's networks on images of 32 x 32, batch 128"
    def steps(model, bf16):
        net = build_model(model, data.n_classes)
        trainer = Trainer(net, data, Method("nll").build(), recipe, 0, torch.device("cpu"), bf16=bf16)
        trainer.run(progress=False)
    recipe, known = Recipe(epochs=1, batch_size=128), load_data(DataSpec("known", n_train=256))
    inputs = torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8)
    data = replace(known, train=Split(inputs, known.train.labels))
    return {f"2 steps of {model} in bf16, batch 128": (lambda model=model: steps(model, True), {
        "in full precision": lambda model=model: steps(model, False)})
        for model in ("resnet8", "wrn_40_1", "wrn_40_2", "mobilenet_v2")}


def seconds(work: Work) -> float:
    "How long a call takes"
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rows(name: str, ours: Work, peers: dict[str, Work], rounds: int) -> list[list[str]]:
    "A row for each of the others, measured in turns"
    ours(), [work() for work in peers.values()] # what is done once
    times = [(seconds(ours), *map(seconds, peers.values())) for _ in range(rounds)]
    own, *others = zip(*times)
    factor = {k: DRAWS/10 if "bootstrap" in k else 1 for k in peers} # of which ten draws are measured
    return [[name, k, *(f"{1000*statistics.median(t):.1f}" for t in (own, [f*x for x in other])),
             f"{statistics.median(f*b/a for a, b in zip(own, other)):.2f}"]
            for (k, f), other in zip(factor.items(), others)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--bf16", action="store_true")
    args = p.parse_args()
    tasks = bf16_tasks() if args.bf16 else metric_tasks() | theory_tasks() | step_tasks(args.compile)
    table = [row for name, (ours, peers) in tasks.items() for row in rows(name, ours, peers, args.rounds)]
    print(Table(["task", "beside", "ours, ms", "theirs, ms", "times as fast"], table,
                f"{args.rounds} rounds, {torch.get_num_threads()} threads", []))


if __name__ == "__main__": main()
