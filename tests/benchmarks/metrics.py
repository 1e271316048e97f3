"""How long the metrics take, beside a bootstrap that scores every resample from the start.

    python tests/benchmarks/metrics.py
"""

import time

import torch

from kdc_nb.calibration.estimates import calibration_estimates
from kdc_nb.calibration.metrics import ece

N, C, DRAWS = 10_000, 100, 1000


def seconds(work, times: int = 3) -> float:
    "The median time of a call"
    spans = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spans.append(time.perf_counter() - began)
    return sorted(spans)[times//2]


def main() -> None:
    g = torch.Generator().manual_seed(0)
    logits = 2*torch.randn(N, C, generator=g)
    labels = torch.multinomial(logits.softmax(1), 1, generator=g).flatten()
    resamples = [torch.randint(N, (N,), generator=g) for _ in range(20)]
    usual = seconds(lambda: [ece(logits[i], labels[i]) for i in resamples], 1)*DRAWS/20
    top = seconds(lambda: calibration_estimates(logits, labels, ("ece", "ace", "mce", "ks"), n_boot=DRAWS))
    every = seconds(lambda: calibration_estimates(logits, labels, n_boot=DRAWS))
    print(f"N = {N:,}, C = {C}, {DRAWS:,} draws, {torch.get_num_threads()} threads")
    for name, t in (("ECE by a plain bootstrap", usual),
                    ("top-label metrics with intervals and null bands", top), ("all metrics", every)):
        print(f"{name:50}{t:8.2f} s{usual/t:8.1f} x")


if __name__ == "__main__": main()
