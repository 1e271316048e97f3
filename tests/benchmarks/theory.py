"""The exact student beside scikit-learn's. `python tests/benchmarks/theory.py`"""
import statistics
import time

import numpy as np
from sklearn.linear_model import LogisticRegression

from kdc_nb.analysis.linear_model import fit_linear_student, tempered_probs
from kdc_nb.analysis.theorems import draw_linear_problem


def seconds(f, *args, **kw) -> float:
    start = time.perf_counter()
    f(*args, **kw)
    return time.perf_counter() - start


def beside_scikit_learn() -> None:
    "T = 1, where the student is a logistic regression on every point with both labels, weighted"
    P = draw_linear_problem(N=2000, d=10, angle=30., overconfidence=2., intercept=1.)
    z_t = P.X.T@P.W_t
    target = .5*P.y + .5*tempered_probs(z_t)
    peer = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky", tol=1e-9)
    points, labels, weights = (np.hstack([P.X, P.X]).T, np.repeat([1, 0], 2000),
                               np.concatenate([target, 1 - target]))
    ours, theirs = zip(*((seconds(fit_linear_student, P.X, P.y, z_t, 1., .5),
                          seconds(peer.fit, points, labels, weights)) for _ in range(50)))
    print(
        f"exact student, d = 10 and an intercept, N = 2,000: median {1000*statistics.median(ours):.1f} ms, "
        f"{statistics.median(b/a for a, b in zip(ours, theirs)):.1f} times as fast as scikit-learn's Newton"
    )


if __name__ == "__main__": beside_scikit_learn()
