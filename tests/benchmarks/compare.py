"""How often a comparison of two models' calibration errs, and how often it finds
what is there, with one seed.

    python tests/benchmarks/compare.py [DATA_SETS] [IMAGES ...]

Labels come from known probabilities, so that the true difference is known. "before" is the paired t test of
the contributions, which takes the debiasing for exact; "now" is what `compare` does.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kdc_nb.calibration.comparisons import EQUIVALENCE_MARGINS
from kdc_nb.calibration.contributions import pair_contributions
from kdc_nb.calibration.differences import Difference, difference_from_contributions, estimate_difference
from kdc_nb.calibration.metrics import METRICS
from kdc_nb.calibration.predictions import binned_error
from kdc_nb.calibration.predictions import BinaryPredictions

METRICS_COMPARED = "ece", "ace", "ks"
# factors of the logits, and the noise in them, of a and of b
PAIRS = {"times 1": (1., 1., 0., 0.), "times 1.001": (1.001, 1., 0., 0.), "times 1.02": (1.02, 1., 0., 0.),
         "times 1.1": (1.1, 1., 0., 0.), "times 1.3": (1.3, 1., 0., 0.),
         "times 1.5 and 1.3": (1.5, 1.3, 0., 0.), "two noisy": (1., 1., .5, .5)}


def draw_models(pair: str, n: int, c: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    "Logits of both models and the true probabilities, (n, c) each"
    noise = lambda: torch.randn(n, c, generator=g, dtype=torch.float64)
    z, (factor_a, factor_b, noise_a, noise_b) = 2*noise(), PAIRS[pair]
    return factor_a*(z + noise_a*noise()), factor_b*(z + noise_b*noise()), z.softmax(1)


def true_difference(pair: str, c: int, metric: str, n: int = 400_000) -> float:
    "The difference of the true errors on so many images; 0 where both models are of one kind"
    factor_a, factor_b, noise_a, noise_b = PAIRS[pair]
    if (factor_a, noise_a) == (factor_b, noise_b): return 0.
    *models, p = draw_models(pair, n, c, torch.Generator().manual_seed(10**6))
    tops = [z.argmax(1, keepdim=True) for z in models]
    known = [BinaryPredictions(z.softmax(1).gather(1, k), p.gather(1, k)) for z, k in zip(models, tops)]
    one, other = (binned_error(METRICS[metric], x, 15) for x in known)
    return one - other


def compare_sets(pair: str, n: int, c: int, sets: int) -> Iterator[dict[str, tuple[Difference, Difference]]]:
    "By metric, the difference as it was estimated before and as it is now, of one data set after the other"
    for seed in range(sets):
        g = torch.Generator().manual_seed(seed)
        a, b, p = draw_models(pair, n, c, g)
        y = p.multinomial(1, generator=g).squeeze(1)
        found = pair_contributions([a], [b], y, True, METRICS_COMPARED)
        yield {k: (estimate_difference(x.a - x.b), difference_from_contributions(x, k))
               for k, x in found.items()}


def shares(found: list[Difference], true: float, margin: float) -> dict[str, float]:
    "Shares of the data sets"
    better = [np.sign(d.mean)*(d.p < .05) for d in found]
    alike = [not named and d.is_within(margin) for named, d in zip(better, found)]
    return {"wrong": np.mean([named != 0 and named != np.sign(true) for named in better]),
            "right": np.mean([named != 0 and named == np.sign(true) for named in better]),
            "falsely equivalent": np.mean(alike)*(abs(true) >= margin), "equivalent": np.mean(alike),
            "covered": np.mean([d.low - 1e-12 <= true <= d.high + 1e-12 for d in found])}


def main(sets: int, images: list[int]) -> None:
    print(f"{sets} data sets each; percent of them, before / now; p < .05 of each metric by itself")
    for n in images:
        for c in (2, 10):
            for pair in PAIRS:
                found = list(compare_sets(pair, n, c, sets))
                for k in METRICS_COMPARED:
                    true, margin = true_difference(pair, c, k), EQUIVALENCE_MARGINS[k]
                    old, new = (shares([x[k][i] for x in found], true, margin) for i in range(2))
                    told = ", ".join(f"{name} {100*old[name]:.1f} / {100*new[name]:.1f}" for name in old)
                    print(f"N={n}, C={c}, {pair}, {METRICS[k].label}, {100*true:+.2f} points: {told}",
                          flush=True)


if __name__ == "__main__":
    sets, *images = map(int, sys.argv[1:]) if len(sys.argv) > 1 else (300,)
    main(sets, images or [500, 2000, 10_000])
