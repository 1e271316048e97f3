"""How often the tests of the verdicts err where nothing differs, and how often they find what they say they
can find, with the noise of the stored runs on CIFAR images.

    python tests/benchmarks/verdicts.py [TRIALS]
"""

import sys
from collections import Counter
from typing import NamedTuple

import numpy as np

from kdc_nb.calibration.contributions import debiased_contributions
from kdc_nb.calibration.differences import estimate_contrast, holm
from kdc_nb.experiments.results import read_results, result_outcomes
from kdc_nb.experiments.tables import collect_by_row
from kdc_nb.files import results_file
from kdc_nb.paper.claims import table_claims
from kdc_nb.paper.settings import paper_specs

SEEDS, IMAGES = 3, 200 # of a trial; the noise of images is scaled to that of the test images
OUTPUTS = "raw", "scaled"


class Noise(NamedTuple):
    "What varies in the students of a table; both outputs of a network vary together"
    rows: list[str]
    row: np.ndarray # (2, 2) covariance of the outputs of one row in one seed
    seed: np.ndarray # (2, 2) covariance of what a seed does to all rows
    images: np.ndarray # (2, rows, test images) what else is in the contributions, means over seeds


def load_students(metric: str) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, list]]:
    "Contributions of each student row and output (seeds, images), and the pairs of each claim"
    specs = [paper_specs("table1", seed=s, small="cifar10") for s in range(SEEDS)]
    rows = collect_by_row(specs, read_results(results_file("paper_cifar10.npz")))
    stored = {(k, which): debiased_contributions([result_outcomes(r)[which] for r in own], metric)
              for which in OUTPUTS for k, own in rows.items() if specs[0][k].model == "resnet8"}
    return stored, table_claims(specs[0])


def measure_noise(stored: dict[tuple[str, str], np.ndarray]) -> Noise:
    "The parts of the noise"
    rows = list(dict.fromkeys(k for k, _ in stored))
    table = np.array([[stored[k, o] for k in rows] for o in OUTPUTS]) # outputs, rows, seeds, images
    y, images = table.mean(3), table.mean(2)
    seeds = y.mean(1, keepdims=True)
    rest = y - y.mean(2, keepdims=True) - seeds + seeds.mean(2, keepdims=True)
    row = np.einsum("irs,jrs->ij", rest, rest)/(len(rows) - 1)/(SEEDS - 1)
    values, vectors = np.linalg.eigh(np.cov(seeds[:, 0]) - row/len(rows))
    seed = vectors*values.clip(min=0) @ vectors.T # no variance below 0
    return Noise(rows, row, seed, images - images.mean(2, keepdims=True))


def draw_table(noise: Noise, rng: np.random.Generator) -> dict[tuple[str, str], np.ndarray]:
    "Rows (seeds, images) of which none differs from another, as `estimate_contrast` takes them"
    n = noise.images.shape[2]
    images = noise.images[:, :, rng.integers(n, size=IMAGES)]*(IMAGES/n)**.5
    luck = rng.multivariate_normal(np.zeros(2), noise.row, (len(noise.rows), SEEDS))
    luck = luck + rng.multivariate_normal(np.zeros(2), noise.seed, SEEDS)
    return {(k, o): luck[i, :, j, None] + images[j, i]
            for i, k in enumerate(noise.rows) for j, o in enumerate(OUTPUTS)}


def contrasts(pairs: list) -> list[dict]:
    "Weights of the mean of all pairs, then of each pair"
    mean = Counter()
    for a, b in pairs: mean.update({a: 1/len(pairs), b: -1/len(pairs)})
    return [dict(mean), *({a: 1., b: -1.} for a, b in pairs)]


def simulate(stored: dict, pairs: list, trials: int, level: float = .05, seed: int = 0) -> dict[str, float]:
    "Shares of trials: wrong, and found at the difference that is stated to be found in 80 of 100"
    noise, weights, rng = measure_noise(stored), contrasts(pairs), np.random.default_rng(seed)
    stated = [estimate_contrast(stored, w).detectable(level) for w in weights]
    wrong, found, family = [], [], []
    for _ in range(trials):
        table = draw_table(noise, rng)
        each = [estimate_contrast(table, w) for w in weights]
        wrong.append([d.p < level for d in each])
        found.append([abs(d.mean + true) > d.reach(level) for d, true in zip(each, stated)])
        family.append(min(holm([d.p for d in each[1:]])) < level)
    wrong, found = np.mean(wrong, 0), np.mean(found, 0)
    return {"mean wrong": wrong[0], "pairs wrong": wrong[1:].mean(), "worst pair wrong": wrong[1:].max(),
            "any pair wrong": np.mean(family), "mean found": found[0], "pairs found": found[1:].mean()}


def main(trials: int) -> None:
    chosen = ("KD(C) beats direct calibration", "KD(C) beats KD(UC)",
              "KD(C) beats temperature scaling of the plain student")
    print(f"{trials:,} trials each, {SEEDS} seeds, noise as in paper_cifar10.npz; percent of trials")
    for metric in ("ece", "nll"):
        stored, claims = load_students(metric)
        for claim in chosen:
            shares = simulate(stored, claims[claim], trials)
            told = ", ".join(f"{k} {100*v:.1f}" for k, v in shares.items())
            print(f"{metric.upper()}, {claim}: {told}", flush=True)


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
