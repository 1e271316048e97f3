"""How long a slider waits: the exact student beside scikit-learn's, and a move of the explorer's sliders. `python tests/benchmarks/theory.py`"""
import contextlib
import io
import statistics
import time

import matplotlib
import numpy as np
from sklearn.linear_model import LogisticRegression

matplotlib.use("agg")
from kdc_nb.explorers import explore_theory
from kdc_nb.theory import draw_problem, minimise, probs

MOVES = {"T": np.linspace(.5, 10, 20), "alpha": np.linspace(0, 1, 20), "scale": np.linspace(.1, 6, 20), "overconfidence": np.linspace(.2, 4, 20),
         "d": range(2, 31), "angle": range(0, 180, 10), "N": (10, 20, 50, 100, 200, 500, 1000, 2000)}


def seconds(f, *args, **kw) -> float:
    start = time.perf_counter()
    f(*args, **kw)
    return time.perf_counter() - start


def beside_scikit_learn() -> None:
    "T = 1, where the student is a logistic regression on every point with both labels, weighted"
    P = draw_problem(N=2000, d=10, angle=30., overconfidence=2., base=1.)
    z_t = P.X.T@P.W_t
    target = .5*P.y + .5*probs(z_t)
    peer = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-9)
    points, labels, weights = np.hstack([P.X, P.X]).T, np.repeat([1, 0], 2000), np.concatenate([target, 1 - target])
    ours, theirs = zip(*((seconds(minimise, P.X, P.y, z_t, 1., .5), seconds(peer.fit, points, labels, weights)) for _ in range(50)))
    print(f"exact student, d = 10 and an intercept, N = 2,000: median {1000*statistics.median(ours):.1f} ms, "
          f"{statistics.median(b/a for a, b in zip(ours, theirs)):.1f} times as fast as scikit-learn's Newton")


def moves_of_the_sliders() -> None:
    with contextlib.redirect_stdout(io.StringIO()): explorer = explore_theory()
    for name, values in MOVES.items():
        with contextlib.redirect_stdout(io.StringIO()): waits = [seconds(setattr, explorer.controls[name], "value", v) for v in values]
        print(f"slider {name}: median {1000*statistics.median(waits):.0f} ms, longest {1000*max(waits):.0f} ms")
        explorer.controls[name].value = values[len(values)//2]


if __name__ == "__main__":
    beside_scikit_learn()
    moves_of_the_sliders()
