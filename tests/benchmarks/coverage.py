"""How often the intervals of `evaluate` hold what they are for, where that is hard.

    python tests/benchmarks/coverage.py --repeats 200 --out coverage.json

Outputs whose true probabilities are known, from two to a hundred classes and 60 to 99.5% accuracy: labels are
drawn anew for each repeat. A share of intervals counts as too small where it is below 93%.
"""
import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdc_nb.calibration.evaluation import _estimates
from kdc_nb.calibration.metrics import METRICS
from kdc_nb.calibration.predictions import binned_error
from kdc_nb.calibration.predictions import BinaryPredictions, top_label
from kdc_nb.files import atomic_write

NAMES = ["top1", "nll", "brier", "ece", "ace", "mce", "ks", "sce", "classwise_ace"]
CLASSES, SIZES = (2, 10, 100), (200, 1_000, 10_000)


def gaussian(sharpness: float, factor: float = 1., tail: float = 0., off: float = 0.) -> Callable:
    """Logits whose true ones are less sharp by `factor`; `tail`: classes get rarer with their number;
    `off`: the true logits of the first class are lower by this
    """
    def draw(n: int, c: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        z = sharpness*torch.randn(n, c, generator=g, dtype=torch.float64)
        z = z - tail*torch.arange(1, c + 1).log()
        truth = z/factor
        truth[:, 0] -= off
        return z.softmax(1), truth.softmax(1)
    return draw


def with_confidence(confidence: Callable, true_confidence: Callable = lambda c: c) -> Callable:
    "The top label's probability as given, the rest shared by the others"
    def draw(n: int, c: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        conf = confidence(torch.rand(n, generator=g, dtype=torch.float64))
        conf = conf.clamp(1/c + .01, 1 - 1e-9)
        def table(p):
            rest = ((1 - p)/(c - 1))[:, None].expand(n, c).clone()
            rest[torch.arange(n), top] = p
            return rest
        top = torch.randint(c, (n,), generator=g)
        return table(conf), table(true_confidence(conf).clamp(1e-9, 1 - 1e-9))
    return draw


CASES = {
    "calibrated, 60 to 80%": gaussian(3), "calibrated, 97 to 99%": gaussian(60),
    "overconfident by 1.3": gaussian(4, 1.3), "overconfident by 2": gaussian(6, 2),
    "one class off": gaussian(4, off=1.5), "long tail": gaussian(4, tail=2),
    "long tail, by 1.3": gaussian(4, 1.3, tail=2),
    "above and below by turns": with_confidence(lambda u: .3 + .075*(9*u).floor(),
                                                lambda c: c + .05*(-1)**((c - .3)/.075).round()),
    "all .75": with_confidence(lambda u: 0*u + .75),
    "99.5%, sure": with_confidence(lambda u: 1 - .004*u, lambda c: c - .003),
    "99%, 1 point off": with_confidence(lambda u: 1 - .02*u**3, lambda c: c - .01),
    "ties at .6 and .9": with_confidence(lambda u: torch.where(u < .5, .6, .9), lambda c: c - .02),
    "one dominant bin": with_confidence(lambda u: torch.where(u < .97, .99, .3 + .6*(u - .97)/.03),
                                        lambda c: torch.where(c > .95, c, c - .2)),
    "one bin 30 points off": with_confidence(lambda u: .55 + .45*u**.5,
                                             lambda c: torch.where((c > .6) & (c <= 2/3), c - .3, c)),
    "30 points off": with_confidence(lambda u: .6 + .4*u**.5, lambda c: c - .3),
}


def truth_of(p: Tensor, posterior: Tensor) -> dict[str, float]:
    "What the intervals are for: metrics with the true probabilities in place of the labels"
    top = p.argmax(1, keepdim=True)
    tops = BinaryPredictions(p.gather(1, top), posterior.gather(1, top))
    return {k: binned_error(m, tops if m.predictions is top_label else BinaryPredictions(p, posterior), 15)
            for k, m in METRICS.items() if k in NAMES and m.norm}


def expected_means(draw: Callable, c: int) -> dict[str, float]:
    "The metrics that are means over images, over all images that there could be: 200,000 of them"
    p, q = draw(200_000, c, torch.Generator().manual_seed(10**6))
    return {"top1": float(q.gather(1, p.argmax(1, keepdim=True)).mean()),
            "nll": float(-(q*p.log()).sum(1).mean()),
            "brier": float((p.square().sum(1) - 2*(p*q).sum(1) + 1).mean())}


def count_cell(case: str, c: int, n: int, repeats: int, n_draws: int) -> dict[str, float]:
    "The share of intervals that hold the truth, by metric"
    torch.set_num_threads(1)
    draw, held = CASES[case], {k: [] for k in NAMES}
    means = expected_means(draw, c)
    for seed in range(repeats):
        g = torch.Generator().manual_seed(seed)
        p, posterior = draw(n, c, g)
        labels = posterior.multinomial(1, generator=g).squeeze(1)
        truth = means | truth_of(p, posterior)
        found = _estimates(p, labels, False, NAMES, n_bins=15, n_draws=n_draws, seed=seed)
        for k, e in found.items(): held[k].append(e.low - 1e-9 <= truth[k] <= e.high + 1e-9)
    return {k: float(np.mean(v)) for k, v in held.items()}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--repeats", type=int, default=200)
    ask.add_argument("--draws", type=int, default=200)
    ask.add_argument("--jobs", type=int, default=1)
    ask.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    ask.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    ask.add_argument("--out", type=Path, help="a JSON file for the table")
    given = ask.parse_args()
    cells = [(case, c, n) for n in given.sizes for c in given.classes for case in CASES]
    rows, began = [], time.time()
    with ProcessPoolExecutor(given.jobs) as pool:
        jobs = [pool.submit(count_cell, *cell, given.repeats, given.draws) for cell in cells]
        for (case, c, n), job in zip(cells, jobs):
            rows.append({"case": case, "C": c, "N": n, "repeats": given.repeats} | job.result())
            low = [k for k in NAMES if rows[-1][k] < .93]
            print(f"{case:24} C={c:<4} N={n:<6}", " ".join(f"{k} {rows[-1][k]:.3f}" for k in NAMES),
                  f"below .93: {', '.join(low)}" if low else "", f"{time.time() - began:.0f} s", flush=True)
            if given.out:
                with atomic_write(given.out) as part: part.write_text(json.dumps(rows))


if __name__ == "__main__": main()
