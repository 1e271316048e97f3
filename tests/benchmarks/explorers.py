"""From a control's callback to the picture: every control of every explorer, moved over all it has.

`python tests/benchmarks/explorers.py`
"""
import contextlib
import io
import statistics
import time
from pathlib import Path

import ipywidgets as widgets
import matplotlib
import numpy as np
import torch

matplotlib.use("agg")
from kdc_nb.experiments.results import read_results
from kdc_nb.analysis.views import read_features
from kdc_nb.controls import Explorer
from kdc_nb.explorers import (
    _METHOD_FAMILIES, explore_loss_gradients, explore_penultimate, explore_reliability, explore_theory,
    explore_transfer,
)

RESULTS = Path(__file__).parents[2]/"nbs/results"


def outputs(n: int, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, c, (n,), generator=g)
    return 2*torch.randn(n, c, generator=g) + 4*torch.nn.functional.one_hot(labels, c), labels


def values(control) -> list:
    "Values from end to end, 30 at most; those of a choice twice, so that what is kept is met again"
    if isinstance(control, widgets.Checkbox): return [True, False]*2
    if hasattr(control, "options"): return [o[1] if isinstance(o, tuple) else o for o in control.options]*2
    return control.steps[np.linspace(0, len(control.steps) - 1, 30).astype(int)].tolist()


def waits(explorer, name: str) -> list[float]:
    "Seconds from each new value of a control to the picture"
    out, control = [], explorer.controls[name]
    before = control.value
    for v in values(control):
        if v == control.value: continue
        start = time.perf_counter()
        control.value = v
        if not explorer.refusal.value: out.append(time.perf_counter() - start)
    control.value = before
    return out


def explorers() -> dict[str, Explorer]:
    looks = {s: l for s, l in read_features(RESULTS/"systematic_diffusion_cifar10.npz").items()
             if s.seed == 0}
    return {"explore_theory": explore_theory(),
            "explore_transfer": explore_transfer(read_results(RESULTS/"transfer_curve.npz")),
            "explore_reliability, N = 10,000, C = 10": explore_reliability(*outputs(10_000, 10)),
            "explore_reliability, N = 10,000, C = 100": explore_reliability(*outputs(10_000, 100)),
            "explore_penultimate": explore_penultimate(looks),
            **{f"explore_loss_gradients, {f}": explore_loss_gradients(f) for f in _METHOD_FAMILIES}}


def main() -> None:
    print(f"{torch.get_num_threads()} threads; ms from callback to picture")
    with contextlib.redirect_stdout(io.StringIO()): # without a kernel, ipywidgets clears its outputs there
        # images need their data set
        found = {name: {k: waits(e, k) for k in e.controls if k != "images"}
                 for name, e in explorers().items()}
    for name, own in found.items():
        together = [t for v in own.values() for t in v]
        print(f"{name}: median {1000*statistics.median(together):.0f}, longest {1000*max(together):.0f}; " +
              ", ".join(f"{k} {1000*statistics.median(v):.0f}" for k, v in own.items() if v))


if __name__ == "__main__": main()
