"Losses against plain NumPy, one sample and one class at a time, over random problems."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_nb.losses import cross_entropy, distillation, focal, label_smoothing, mdca


def softmax(z):
    e = np.exp(z - z.max())
    return e/e.sum()


def slow_smoothing(z, y, eps):
    C = len(z[0])
    target = lambda c, label: eps/C + (1 - eps)*(c == label)
    return np.mean([-sum(target(c, label)*np.log(softmax(row)[c]) for c in range(C)) for row, label in zip(z, y)])


def slow_focal(z, y, gamma):
    p = [softmax(row)[label] for row, label in zip(z, y)]
    return np.mean([-(1 - q)**gamma*np.log(q) for q in p])


def slow_mdca(z, y):
    C, p = len(z[0]), [softmax(row) for row in z]
    return sum(abs(np.mean([q[c] for q in p]) - np.mean([label == c for label in y])) for c in range(C))/C


def slow_distillation(z, y, t, T, alpha):
    kl = [sum(a*np.log(a/b) for a, b in zip(softmax(u/T), softmax(row/T))) for u, row in zip(t, z)]
    return alpha*T**2*np.mean(kl) + (1 - alpha)*np.mean([-np.log(softmax(row)[label]) for row, label in zip(z, y)])


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 5), st.floats(.1, 8), st.floats(0, 1), st.floats(1, 10))
def test_values(seed, B, C, scale, share, T):
    rng = np.random.default_rng(seed)
    z, t, y = scale*rng.normal(size=(B, C)), scale*rng.normal(size=(B, C)), rng.integers(C, size=B)
    Z, U, Y = torch.from_numpy(z), torch.from_numpy(t), torch.from_numpy(y)
    for ours, slow in [
        (cross_entropy(Z, Y), slow_smoothing(z, y, 0)), (label_smoothing(Z, Y, share), slow_smoothing(z, y, share)),
        (focal(Z, Y, 3*share), slow_focal(z, y, 3*share)), (mdca(Z, Y), slow_mdca(z, y)),
        (distillation(Z, Y, U, T, share), slow_distillation(z, y, t, T, share)),
    ]: assert float(ours) == pytest.approx(slow, rel=1e-9, abs=1e-9)


def test_no_gradient_reaches_the_teacher():
    z, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    distillation(z, torch.zeros(4, dtype=torch.long), t, 2., .5).backward()
    assert t.grad is None and z.grad.abs().sum() > 0


def test_the_student_of_a_teacher_at_alpha_one_has_its_probabilities():
    "Minimising the loss at any T with alpha = 1 gives the teacher's softmax: KL is 0 only there."
    t = torch.tensor([[2., 0., -1.]])
    for T in (1., 4.):
        z = torch.zeros(1, 3, requires_grad=True)
        opt = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")
        def closure():
            opt.zero_grad()
            loss = distillation(z, torch.tensor([0]), t, T, 1.)
            loss.backward()
            return loss
        opt.step(closure)
        assert torch.allclose(z.softmax(1), t.softmax(1), atol=1e-3)
