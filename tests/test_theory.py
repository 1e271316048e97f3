"The linear student: exact laws over random problems, hand-worked cases, independent solvers"
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.strategies import booleans, floats, integers
from scipy.optimize import minimize
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression

from kdc_nb.training.losses import distillation
from kdc_nb.analysis.linear_model import (
    _grad_logits, _gradient_descent, _total_loss, fit_linear_student, tempered_probs,
)
from kdc_nb.analysis.theorems import (
    calibration_gap, draw_linear_problem, fit_intercept, project_to_span, theorem1_student_weights,
)


@st.composite
def problems(draw, classes=2):
    """X, y, z_t, T, alpha: more or fewer points than features, with and without an intercept, a
    teacher that is not linear
    """
    rng = np.random.default_rng(draw(integers(0, 2**32)))
    d, N, intercept = draw(integers(1, 6)), draw(integers(1, 40)), draw(booleans())
    X = np.vstack([rng.normal(size=(d, N))*draw(floats(.01, 100)), np.ones((int(intercept), N))])
    z_t = draw(floats(.1, 4))*rng.uniform(-1, 1, size=(N, classes))
    y = np.eye(classes)[rng.integers(0, classes, N)]
    if classes == 2: y, z_t = y[:, 1], z_t[:, 1]
    return X, y, z_t, draw(floats(.5, 8)), draw(floats(.02, 1))


def close(a, b, X): np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9*(1 + np.linalg.norm(X)))


@given(problems())
def test_the_tempered_law(problem):
    X, y, z_t, T, alpha = problem
    z = X.T@fit_linear_student(*problem).W
    close((1 - alpha)*X@(expit(z) - y) + alpha*T*X@(expit(z/T) - expit(z_t/T)), 0, X)


@given(problems())
def test_the_students_gap_is_alpha_times_the_teachers(problem):
    X, y, z_t, _, alpha = problem
    z = X.T@fit_linear_student(X, y, z_t, 1., alpha).W
    close(X@(expit(z) - y), alpha*X@(expit(z_t) - y), X)
    close(calibration_gap(X, z, y), alpha*calibration_gap(X, z_t, y), X)


@given(problems(classes=4))
def test_both_laws_for_four_classes(problem):
    X, y, z_t, T, alpha = problem
    W = fit_linear_student(*problem).W
    q = softmax(X.T@W/T, axis=1) - softmax(z_t/T, axis=1)
    close((1 - alpha)*X@(softmax(X.T@W, axis=1) - y) + alpha*T*X@q, 0, X)
    np.testing.assert_allclose(W.sum(1), 0, atol=1e-8*(1 + abs(W).max()))
    close(calibration_gap(X, X.T@fit_linear_student(X, y, z_t, 1., alpha).W, y),
          alpha*calibration_gap(X, z_t, y), X)


@given(problems(), integers(0, 1000))
def test_no_other_student_has_less_loss(problem, seed):
    X, y, z_t, T, alpha = problem
    z, q_t = X.T@fit_linear_student(*problem).W, tempered_probs(z_t, T)
    least = _total_loss(z, y, q_t, T, alpha)
    for size in (1e-3, .1, 3.):
        other = z + size*X.T@np.random.default_rng(seed).normal(size=len(X))
        assert _total_loss(other, y, q_t, T, alpha) >= least*(1 - 1e-12)


@given(problems(), st.randoms())
def test_what_must_not_matter(problem, random):
    X, y, z_t, T, alpha = problem
    W, order = fit_linear_student(*problem).W, np.array(random.sample(range(len(y)), len(y)))
    for name, other in {"order": fit_linear_student(X[:, order], y[order], z_t[order], T, alpha).W,
                        "every point twice":
                            fit_linear_student(np.hstack([X, X]), np.tile(y, 2), np.tile(z_t, 2), T, alpha).W,
                        "which class is called 1": -fit_linear_student(X, 1 - y, -z_t, T, alpha).W}.items():
        np.testing.assert_allclose(X.T@other, X.T@W, rtol=1e-6, atol=1e-7, err_msg=name)
    two = fit_linear_student(X, np.stack([1 - y, y], 1), np.stack([0*z_t, z_t], 1), T, alpha).W
    np.testing.assert_allclose(X.T@(two[:, 1] - two[:, 0]), X.T@W, rtol=1e-6, atol=1e-7)


def test_a_small_loss_is_minimised_to_the_end():
    "One confident point: the loss is .0003, and its own rounding must not be taken for a step too far"
    X, y, z_t = np.array([[-.12], [1.18], [1.79], [-1.42]]), np.array([0.]), np.array([4.50769746])
    for factor in np.linspace(.5, 1.5, 101):
        z = X.T@fit_linear_student(X, y, factor*z_t, .5, 1.).W
        np.testing.assert_allclose(z, factor*z_t, rtol=1e-9)


@given(problems(), integers(0, 1000))
def test_the_students_place(problem, seed):
    X, y, _, T, alpha = problem
    W_t = np.random.default_rng(seed).normal(size=len(X))/np.linalg.norm(X, axis=1)
    W = fit_linear_student(X, y, X.T@W_t, T, alpha).W
    np.testing.assert_allclose(project_to_span(X, W), W, rtol=1e-7, atol=1e-9*abs(W).max())
    np.testing.assert_allclose(fit_linear_student(X, y, X.T@W_t, T, 1.).W,
                               project_to_span(X, W_t), rtol=1e-5, atol=1e-7*abs(W_t).max())
    np.testing.assert_allclose(theorem1_student_weights(X, y, W_t, 1.), W_t)


@given(problems())
def test_the_best_fit_to_the_labels_is_its_own_student(problem):
    X, y, _, T, alpha = problem
    try: best = fit_linear_student(X, y, np.zeros(len(y)), 1., 0.).W
    except ValueError: assume(False)
    np.testing.assert_allclose(X.T@fit_linear_student(X, y, X.T@best, T, alpha).W,
                               X.T@best, rtol=1e-5, atol=1e-6)


@given(problems())
def test_gradient_descent_never_climbs(problem):
    X, y, z_t, T, alpha = problem
    losses = [_total_loss(X.T@W, y, tempered_probs(z_t, T), T, alpha)
              for W in islice(_gradient_descent(*problem), 20)]
    assert all(b <= a*(1 + 1e-12) for a, b in zip(losses, losses[1:]))


@pytest.mark.parametrize("N, d, classes", [(200, 4, 2), (5, 12, 2), (200, 4, 3), (5, 12, 3)])
def test_gradient_descent_arrives(N, d, classes):
    rng = np.random.default_rng(0)
    X, y, z_t = (rng.normal(size=(d, N)), np.eye(classes)[rng.integers(0, classes, N)],
                 rng.normal(size=(N, classes)))
    if classes == 2: y, z_t = y[:, 1], z_t[:, 1]
    last = next(islice(_gradient_descent(X, y, z_t, 2., .6), 4000, None))
    np.testing.assert_allclose(last, fit_linear_student(X, y, z_t, 2., .6).W, atol=1e-9)


def test_two_points_by_hand():
    X, y, z_t = np.array([[1., 1.]]), np.array([1., 0.]), np.full(2, 2*np.log(3))
    for alpha in (.1, .5, 1.): # T = 2: .5(1-alpha)(2p - 1) = alpha (3 - 4q)/2, p and q of one logit w
        w = fit_linear_student(X, y, z_t, 2., alpha).W[0]
        assert (1 - alpha)*(2*expit(w) - 1) + 2*alpha*(2*expit(w/2) - 1.5) == pytest.approx(0, abs=1e-12)
    assert w == pytest.approx(2*np.log(3))


@given(problems())
def test_the_shift_that_balances(problem):
    _, y, z_t, _, _ = problem
    assume(0 < y.mean() < 1)
    assert expit(z_t + fit_intercept(z_t, y)).sum() == pytest.approx(y.sum(), rel=1e-9)


def draw(seed=0):
    return draw_linear_problem(N=300, d=5, angle=50., overconfidence=2., intercept=.7, seed=seed)


def test_labels_alone_against_scikit_learn():
    P = draw()
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky",
                                tol=1e-12, max_iter=1000).fit(P.X.T, P.y)
    np.testing.assert_allclose(fit_linear_student(P.X, P.y, 0*P.y, 1., 0.).W, theirs.coef_[0], rtol=1e-6)


def test_soft_labels_are_weighted_points():
    """At T = 1 the student is a logistic regression on every point with both labels,
    weighted with the mixed target
    """
    P, alpha = draw(), .6
    target = (1 - alpha)*P.y + alpha*expit(P.X.T@P.W_t)
    theirs = LogisticRegression(C=np.inf, fit_intercept=False,
                                solver="newton-cholesky", tol=1e-12, max_iter=1000)
    theirs.fit(np.hstack([P.X, P.X]).T, np.repeat([1, 0], 300),
               sample_weight=np.concatenate([target, 1 - target]))
    np.testing.assert_allclose(fit_linear_student(P.X, P.y, P.X.T@P.W_t, 1., alpha).W,
                               theirs.coef_[0], rtol=1e-6)


def test_equation_1_as_printed_under_a_general_optimiser():
    P, T, alpha = draw(), 3., .6
    q_t = expit(P.X.T@P.W_t/T)
    def printed(W):
        p, q = expit(W@P.X), expit(W@P.X/T)
        bce, kd = (-np.sum(P.y*np.log(p) + (1 - P.y)*np.log(1 - p)),
                   -T**2*np.sum(q_t*np.log(q) + (1 - q_t)*np.log(1 - q)))
        return (1 - alpha)*bce + alpha*kd
    ours, theirs = (fit_linear_student(P.X, P.y, P.X.T@P.W_t, T, alpha),
                    minimize(printed, np.zeros(6), method="BFGS", options={"gtol": 1e-6}))
    np.testing.assert_allclose(ours.W, theirs.x, atol=1e-5)
    assert printed(ours.W) == pytest.approx(_total_loss(P.X.T@ours.W, P.y, q_t, T, alpha), rel=1e-12)


def test_the_loss_that_trains_nets_is_flat_there():
    "The gradient of kdc_nb.training.losses.distillation, by torch, vanishes at the exact student"
    P, T, alpha = draw(), 3., .6
    W = torch.tensor(fit_linear_student(P.X, P.y, P.X.T@P.W_t, T, alpha).W, requires_grad=True)
    def both(W): return torch.stack([torch.zeros(300, dtype=torch.float64), torch.tensor(P.X.T)@W], 1)
    student, teacher = both(W), both(torch.tensor(P.W_t))
    distillation(student, torch.tensor(P.y).long(), teacher, T, alpha).backward()
    assert W.grad.norm() < 1e-12


def test_a_constant_feature_and_useless_ones():
    X = np.vstack([np.ones(6), np.zeros(6), np.ones(6)]) # rank 1 of 3
    W = fit_linear_student(X, np.array([1., 1, 1, 0, 0, 1]), np.zeros(6), 1., 0.).W
    np.testing.assert_allclose(W, [np.log(2)/2, 0, np.log(2)/2], atol=1e-12)


@pytest.mark.parametrize("kw", [{}, {"intercept": .5}, {"N": 5, "d": 9}, {"features": "sparse"}, {"d": 1}])
def test_drawn_problems(kw):
    P = draw_linear_problem(**kw)
    assert P.X.shape == (len(P.W), len(P.y)) and P.W.shape == P.W_t.shape and set(P.y) <= {0., 1.}
    assert all(np.array_equal(a, b) for a, b in zip(P, draw_linear_problem(**kw)))


@pytest.mark.parametrize("scales", [(1e-8, 1, 1e8), (1, 1, 1e14), (1e8, 1e8, 1e8)])
def test_features_of_any_scale(scales):
    rng = np.random.default_rng(0)
    X, scales = rng.normal(size=(3, 200)), np.array(scales)[:, None]
    y, z_t = (rng.random(200) < .5).astype(float), rng.normal(size=200)
    ours = fit_linear_student(scales*X, y, z_t, 2., .5)
    np.testing.assert_allclose(ours.W*scales[:, 0], fit_linear_student(X, y, z_t, 2., .5).W, rtol=1e-7)


def test_what_is_returned_is_what_is_certified():
    "Half precision, lists and integers are as good as float64; two features that are nearly one are refused"
    rng = np.random.default_rng(0)
    X, y, z_t = rng.normal(size=(3, 200)).astype(np.float32), rng.integers(0, 2, 200), rng.normal(size=200)
    X = np.vstack([X, X[0] + X[1]]).astype(np.float32)
    for given in (X, X.tolist()):
        m = fit_linear_student(given, y.tolist(), list(z_t), 2., .5)
        assert np.linalg.norm(X.astype(float)@_grad_logits(X.astype(float).T@m.W, y,
                                                           tempered_probs(z_t, 2.), 2., .5)) < 1e-6
    near = X[:3].astype(float)
    with pytest.raises(ValueError, match="nearly one"):
        fit_linear_student(np.vstack([near, near[0] + 1e-13*rng.normal(size=200)]), y, z_t, 2., .5)


def test_as_many_features_as_points_fit_each_point():
    """For N <= d the slope vanishes at every point: at T = 1 the student's probability
    is the mixed target itself
    """
    P = draw_linear_problem(N=12, d=20, angle=40., overconfidence=2.)
    z_t = P.X.T@P.W_t
    np.testing.assert_allclose(tempered_probs(P.X.T@fit_linear_student(P.X, P.y, z_t, 1., .4).W),
                               .6*P.y + .4*tempered_probs(z_t), atol=1e-12)


BAD = {"X: got shape (2, 3), expected features (d, N), all finite and not all zero": dict(X=np.zeros((2, 3))),
       "X: got shape": dict(X=np.ones(3)), "y, z_t: got shapes": dict(z_t=np.zeros((3, 2))),
       "X: got shape (2, 3)": dict(X=np.full((2, 3), np.nan)),
       "z_t: got infinite": dict(z_t=np.array([0, np.inf, 0])),
       "y: got values from 0 to 2": dict(y=np.array([0., 2, 1])),
       "T: got 0": dict(T=0), "T: got inf": dict(T=np.inf), "alpha: got -0.1": dict(alpha=-.1),
       "y: got rows": dict(y=np.full((3, 2), .2), z_t=np.zeros((3, 2)))}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = dict(X=np.arange(6.).reshape(2, 3), y=np.array([0., 1, 1]), z_t=np.zeros(3), T=1., alpha=.5)
    with pytest.raises(ValueError) as e: fit_linear_student(**good | BAD[message])
    assert message in str(e.value)
    with pytest.raises(ValueError): next(_gradient_descent(**good | BAD[message]))
