"""What torch's threads cost on a quiet and on a busy machine: training, evaluation and the exact linear
student, each way in a process of its own.

    python tests/benchmarks/threads.py [--rounds 3] [--busy N]

`kdc_nb first` is what a person gets who imports kdc_nb before torch; the last column is how much longer that
takes than the best other way.
With --busy, N other processes compute all the while; compare only ways of one call.
"""
import argparse
import os
import statistics
import subprocess
import sys
import time

WAYS = { # what is set, and what is imported first
    "torch first": ({}, "torch"), "kdc_nb first": ({}, "kdc_nb"),
    "GOMP_SPINCOUNT=0": ({"GOMP_SPINCOUNT": "0"}, "torch"),
    "OMP_WAIT_POLICY=PASSIVE": ({"OMP_WAIT_POLICY": "PASSIVE"}, "torch"),
    "one thread": ({"OMP_NUM_THREADS": "1"}, "torch"),
}
WORK = """
import warnings; warnings.simplefilter("ignore")
import {first}
import time, torch
from kdc_nb.calibration.evaluation import evaluate
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.methods import Method
from kdc_nb.training.models import build_model
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.steps import predict_logits
from kdc_nb.training.trainer import fit
from kdc_nb.analysis.linear_model import fit_linear_student
from kdc_nb.analysis.theorems import draw_linear_problem
data = load_data(DataSpec("known", n_train=800, n_valid=1000, n_test=4000))
net = build_model("resnet8", data.n_classes)
X, y, _, W_t = draw_linear_problem(N=2000, d=30)
z_t = X.T@W_t
recipe = Recipe(epochs=6, batch_size=64)
def train(): fit(net, data, Method("nll").build(), recipe, device="cpu", progress=False)
def judge(): evaluate(predict_logits(net, data, data.test.inputs), data.test.labels)
def solve(): [fit_linear_student(X, y, z_t, 2., alpha) for alpha in (.1, .5, .9)]
for f in (train, judge, solve):
    began = time.perf_counter(); f(); print(time.perf_counter() - began)
"""


def seconds(way: str) -> list[float]: # of training, evaluation and the linear student
    "One process"
    settings, first = WAYS[way]
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run([sys.executable, "-c", WORK.format(first=first)],
                          env=plain | settings, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--busy", type=int, default=0)
    a = p.parse_args()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(a.busy)]
    try:
        time.sleep(1)
        rows = {way: [] for way in WAYS}
        for _ in range(a.rounds): # in turns, since what else the machine does changes
            for way in WAYS: rows[way].append(seconds(way))
    finally:
        for o in others: o.kill()
    medians = {way: [statistics.median(column) for column in zip(*own)] for way, own in rows.items()}
    print(f"{os.cpu_count()} cores, {a.busy} other processes, median of {a.rounds}")
    for k, name in enumerate(("training", "evaluation", "linear student")):
        best = min(m[k] for way, m in medians.items() if way != "kdc_nb first")
        print(f"{name:15}", "  ".join(f"{way} {m[k]:.2f} s" for way, m in medians.items()),
              f"  {medians['kdc_nb first'][k]/best:.2f}")


if __name__ == "__main__": main()
