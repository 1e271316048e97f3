"Losses against plain NumPy, one sample, one class and one pair at a time, over random problems."

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kdc_nb.calibration.metrics import brier
from kdc_nb.training.data import DataSpec
from kdc_nb.training.losses import (
    acls, cpc_discrimination, cpc_exclusion, crl, cross_entropy, dca, distillation,
    effective_target, flsd, focal, label_smoothing, mbls, mdca, mmce, one_hot, upcast,
)
from kdc_nb.training.methods import Method, TrainingMethod, TrainingStep
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import Distil, RunSpec
from kdc_nb.experiments.store import Store


def softmax(z):
    e = np.exp(z - z.max())
    return e/e.sum()


def softplus(x): return np.logaddexp(0, x)


def slow_smoothing(z, y, eps, others=False):
    C = len(z[0])
    def target(c, label):
        if others: return 1 - eps if c == label else eps/(C - 1)
        return eps/C + (1 - eps)*(c == label)
    return np.mean([-sum(target(c, label)*np.log(softmax(row)[c]) for c in range(C))
                    for row, label in zip(z, y)])


def slow_focal(z, y, gamma):
    p = [softmax(row)[label] for row, label in zip(z, y)]
    return np.mean([-(1 - np.sign(g)*q)**abs(g)*np.log(q) for q, g in zip(p, np.broadcast_to(gamma, len(p)))])


def slow_flsd(z, y):
    return slow_focal(z, y, [5 if softmax(row)[label] < .2 else 3 for row, label in zip(z, y)])


def slow_mdca(z, y):
    C, p = len(z[0]), [softmax(row) for row in z]
    return sum(abs(np.mean([q[c] for q in p]) - np.mean([label == c for label in y])) for c in range(C))/C


def slow_dca(z, y):
    return abs(np.mean([softmax(row).max() for row in z])
               - np.mean([row.argmax() == label for row, label in zip(z, y)]))


def slow_mmce(z, y, ported=False):
    r = [softmax(row).max() for row in z]
    right = [i for i in range(len(z)) if z[i].argmax() == y[i]]
    wrong = [i for i in range(len(z)) if z[i].argmax() != y[i]]
    m, n = len(right), len(wrong)
    if m == 0 or n == 0: return 0.
    k = lambda i, j: np.exp(-abs(r[i] - r[j])/.4)
    rr = sum((1 - r[i])*(1 - r[j])*k(i, j) for i in right for j in right)/m**2
    ww = sum(r[i]*r[j]*k(i, j) for i in wrong for j in wrong)/n**2
    rw = sum((1 - r[i])*r[j]*k(i, j) for i in right for j in wrong)/(m*n)
    if ported: rr, ww, rw = rr/m**2, ww/n**2, rw/(m*n)
    return np.sqrt(rr + ww - 2*rw + 1e-10)


def slow_mbls(z, margin):
    return np.mean([max(0, max(row) - row[c] - margin) for row in z for c in range(len(row))])


def slow_acls(z, margin, published, still):
    (B, C), first, others = z.shape, 0, 0
    for row, kept in zip(z, still):
        top = row.argmax()
        first += max(0, row[top] - (kept.min() if published else 0) - margin)**2
        others += sum(max(0, kept.max() - row[c] - margin)**2 for c in range(C) if c != top)
    return first/B + .1*others/(B*(C - 1))


def slow_bdc(z, y):
    B, C = z.shape
    return sum(softplus(-(z[i][y[i]] - z[i][j])) for i in range(B) for j in range(C) if j != y[i])/(B*(C - 1))


def slow_bec(z, y):
    B, C = z.shape
    if C == 2: return 0.
    pairs = [(i, j, k) for i in range(B) for j in range(C)
             for k in range(C) if j != y[i] and k != y[i] and j != k]
    return sum(.5*softplus(-(z[i][j] - z[i][k])) for i, j, k in pairs)/(B*(C - 1)*(C - 2))


def slow_crl(z, q):
    B, conf, total = len(z), [softmax(row).max() for row in z], 0
    for i in range(B):
        j = (i + 1) % B
        s, d = np.sign(q[i] - q[j]), abs(q[i] - q[j])
        if s: total += max(0, -s*(conf[i] - conf[j] - d/s))
    return total/B


def slow_distillation(z, y, t, T, alpha):
    kl = [sum(a*np.log(a/b) for a, b in zip(softmax(u/T), softmax(row/T))) for u, row in zip(t, z)]
    return (alpha*T**2*np.mean(kl)
            + (1 - alpha)*np.mean([-np.log(softmax(row)[label]) for row, label in zip(z, y)]))


def most(z, share):  # of `eps` to the others: more would make the label the least likely class
    return share*(z.shape[1] - 1)/z.shape[1]


# each loss and its transcription, of the logits and what else a problem holds
CASES = {
    "cross_entropy": (lambda z, o: cross_entropy(z, o.y), lambda z, o: slow_smoothing(z, o.y, 0)),
    "label_smoothing": (lambda z, o: label_smoothing(z, o.y, o.share),
                        lambda z, o: slow_smoothing(z, o.y, o.share)),
    "label_smoothing others": (lambda z, o: label_smoothing(z, o.y, most(z, o.share), exclude_target=True),
                               lambda z, o: slow_smoothing(z, o.y, most(z, o.share), others=True)),
    "distillation": (lambda z, o: distillation(z, o.y, o.t, o.T, o.share),
                     lambda z, o: slow_distillation(z, o.y, o.t, o.T, o.share)),
    "focal": (lambda z, o: focal(z, o.y, 3*o.share), lambda z, o: slow_focal(z, o.y, 3*o.share)),
    "focal inverse": (lambda z, o: focal(z, o.y, -2*o.share), lambda z, o: slow_focal(z, o.y, -2*o.share)),
    "focal each": (lambda z, o: focal(z, o.y, o.g), lambda z, o: slow_focal(z, o.y, o.g)),
    "flsd": (lambda z, o: flsd(z, o.y), lambda z, o: slow_flsd(z, o.y)),
    "mdca": (lambda z, o: mdca(z, o.y), lambda z, o: slow_mdca(z, o.y)),
    "dca": (lambda z, o: dca(z, o.y), lambda z, o: slow_dca(z, o.y)),
    "mmce": (lambda z, o: mmce(z, o.y), lambda z, o: slow_mmce(z, o.y)),
    "mmce ported": (lambda z, o: mmce(z, o.y, double_normalised=True),
                    lambda z, o: slow_mmce(z, o.y, ported=True)),
    "mbls": (lambda z, o: mbls(z, o.margin), lambda z, o: slow_mbls(z, o.margin)),
    "acls": (lambda z, o: acls(z, o.margin), lambda z, o: slow_acls(z, o.margin, False, o.still)),
    "acls published": (lambda z, o: acls(z, o.margin, as_published=True),
                       lambda z, o: slow_acls(z, o.margin, True, o.still)),
    "cpc_discrimination": (lambda z, o: cpc_discrimination(z, o.y), lambda z, o: slow_bdc(z, o.y)),
    "cpc_exclusion": (lambda z, o: cpc_exclusion(z, o.y), lambda z, o: slow_bec(z, o.y)),
    "crl": (lambda z, o: crl(z, o.q), lambda z, o: slow_crl(z, o.q)),
}
each_loss = pytest.mark.parametrize("name", CASES)


def problem(seed, B, C, scale=2., **given):
    "Logits, and the rest; `still` is where the quantities without a gradient are taken"
    rng = np.random.default_rng(seed)
    z = scale*rng.normal(size=(B, C))
    made = dict(y=rng.integers(C, size=B), t=scale*rng.normal(size=(B, C)),
                q=rng.integers(4, size=B)/3, g=rng.uniform(-2, 5, B))
    return z, SimpleNamespace(**dict(made, share=.3, T=2., margin=1.5, still=z) | given)


def tensors(z, o, dtype=torch.float64):
    "The same in torch"
    cast = (lambda v: torch.from_numpy(v).to(dtype if v.dtype.kind == "f" else torch.long)
                      if isinstance(v, np.ndarray) else v)
    return cast(z), SimpleNamespace(**{k: cast(v) for k, v in vars(o).items()})


def close(x): return pytest.approx(x, rel=1e-9, abs=1e-9)


def rows(*p):
    "Logits of two classes with these probabilities of the first"
    return torch.tensor([[q, 1 - q] for q in p], dtype=torch.float64).log()


@each_loss
@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 5),
       st.floats(.1, 8), st.floats(0, 1), st.floats(1, 10), st.floats(0, 12))
def test_values(name, seed, B, C, scale, share, T, margin):
    z, o = problem(seed, B, C, scale, share=share, T=T, margin=margin)
    ours, slow = CASES[name]
    assert ours(*tensors(z, o)).item() == close(slow(z, o))


def test_mmce_divides_by_the_number_of_pairs_once_and_the_ports_twice():
    """All at confidence 3/4, one right, two wrong: 1/16 + 9/16 - 2*3/16 = 1/4; divided again,
    1/16 + 9/64 - 2*3/32 = 1/64
    """
    z, y = rows(.75, .25, .75), torch.tensor([0, 0, 1])
    assert (mmce(z, y).item() == pytest.approx(1/2, abs=1e-8)
            and mmce(z, y, double_normalised=True).item() == pytest.approx(1/8, abs=1e-8))
    for right in (z.argmax(1), 1 - z.argmax(1)):
        assert mmce(z, right).item() == mmce(z, right, double_normalised=True).item() == 0


def test_the_kernel_of_mmce_halves_over_a_distance_of_two_fifths_of_ln_2():
    low, y = .9 - .4*np.log(2), torch.tensor([0, 1])
    assert (mmce(rows(.9, low), y).item() == close(np.sqrt(.1**2 + low**2 - .1*low + 1e-10))
            and mmce(rows(.5, .5), y).item() == close(1e-5))


def test_flsd_changes_its_gamma_at_a_fifth():
    for p, gamma in ((.2 - 1e-7, 5), (.2 + 1e-7, 3)):
        assert flsd(rows(p), torch.tensor([0])).item() == close(-(1 - p)**gamma*np.log(p))


def test_crl_wants_the_confidences_apart_by_the_difference_of_correctness():
    """Confidences .9 and .6: in the wrong order, .3 too far and .5 missing; in the right one, .2
    missing; far enough; no order
    """
    for q, loss in (((.5, 1.), .8), ((1., .5), .2), ((.6, .5), 0.), ((.5, .5), 0.)):
        assert crl(rows(.9, .4), torch.tensor(q, dtype=torch.float64)).item() == close(loss)


@pytest.mark.parametrize("C", [3, 4, 7])
def test_the_constraints_of_equal_logits(C):
    z, y = torch.randn(5, C, dtype=torch.float64), torch.arange(5) % C
    assert cpc_discrimination(0*z, y).item() == close(np.log(2))
    assert cpc_exclusion(0*z, y).item() == close(.5*np.log(2))


def test_bec_of_two_classes_is_zero():
    assert cpc_exclusion(rows(.9, .4), torch.tensor([0, 0])).item() == 0


def test_dca_is_the_gap_of_the_batch():
    "Confidences .9 and .6: one of them right, both, none"
    for y, gap in (([0, 0], .25), ([0, 1], .25), ([1, 0], .75)):
        assert dca(rows(.9, .4), torch.tensor(y)).item() == close(gap)


def test_mbls_and_acls_beyond_the_margin():
    """Logits 3, 0, -1 and a margin of 2: the others are 1 and 2 beyond it, the largest by its level 1, by its
    distance from the smallest 2
    """
    z = torch.tensor([[3., 0., -1.]], dtype=torch.float64)
    assert mbls(z, 2.).item() == close((1 + 2)/3)
    assert (acls(z, 2.).item() == close(1 + .1*(1 + 4)/2)
            and acls(z, 2., as_published=True).item() == close(4 + .1*(1 + 4)/2))


@each_loss
def test_gradients(name):
    """Against differences of the slow formula, the stopped quantities held still; autograd's own
    check where nothing is stopped
    """
    # no kink is near: logits of a row are multiples of .7 apart, the margin lies halfway, the
    # other differences are asserted
    z = .7*np.array([[5, 0, 2, 3], [1, 4, 0, 2], [0, 2, 6, 1], [1, 4, -1, 0], [1, 0, -1, -2]])
    o = problem(0, 5, 4, y=np.array([0, 0, 2, 3, 1]),
                q=np.array([1, .6, .6, .55, .1]), margin=1.05, still=z)[1]
    p, hit = np.array([softmax(row) for row in z]), z.argmax(1) == o.y
    conf, order = p.max(1), np.sign(o.q - np.roll(o.q, -1))
    kinks = [p.mean(0) - np.eye(4)[o.y].mean(0), conf.mean() - hit.mean(),
             np.diff(np.sort(conf)), p[range(5), o.y] - .2,
             (order*(conf - np.roll(conf, -1)) - abs(o.q - np.roll(o.q, -1)))[order != 0]]
    assert all(np.abs(k).min() > 1e-2 for k in kinks)
    ours, slow = CASES[name]
    Z, O = tensors(z, o)
    grad, = torch.autograd.grad(ours(Z.requires_grad_(), O), Z)
    steps = 1e-6*np.eye(z.size).reshape(-1, *z.shape)
    assert (grad.numpy().ravel()
            == pytest.approx([(slow(z + h, o) - slow(z - h, o))/2e-6 for h in steps], abs=1e-7))
    assert grad.abs().max() > 1e-3
    if not name.startswith("acls"): assert torch.autograd.gradcheck(lambda x: ours(x, O), Z)


def extremes():
    "One sample of two classes, then batches: all correct, all wrong, mixed, of equal logits"
    large, rng = [0., 1e4, -1e4], np.random.default_rng(0)
    for row, label in product(product(large, large), (0, 1)): yield np.array([row]), np.array([label])
    for C in (2, 3, 5):
        z = rng.choice(large, size=(7, C))
        for label in (z.argmax(1), (z.argmax(1) + 1) % C, rng.integers(C, size=7)): yield z, label
        yield 0*z, np.arange(7) % C


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_stay_finite(name, dtype):
    for z, y in extremes():
        B = len(z)
        o = problem(0, *z.shape, y=y, t=-z, q=np.arange(B) % 3/2,
                    g=np.resize([-2, .5, 0, 5, -.5], B), margin=10.)[1]
        Z, O = tensors(z, o, torch.float32)
        Z, O.t = Z.to(dtype).requires_grad_(), O.t.to(dtype)
        loss = CASES[name][0](Z, O)
        loss.backward()
        assert loss.isfinite() and Z.grad.isfinite().all()


def test_mmce_survives_the_rounding_of_its_own_difference():
    "At confidence 1/2 its three terms cancel, and float32 may leave less than -1e-10 for the root"
    for B, one, ported in product(range(2, 60), (False, True), (False, True)):
        z, y = (torch.zeros(B, 2, requires_grad=True),
                torch.arange(B).clamp_max(1) if one else torch.arange(B) % 2)
        loss = mmce(z, y, ported)
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


@each_loss
def test_a_level_added_to_the_logits_of_a_sample_changes_nothing(name):
    """Except ACLS by default: its first term looks at the level of the largest logit, where
    that is beyond the margin
    """
    z, o = problem(1, 6, 4)
    Z, O = tensors(z, o)
    level = torch.arange(1, 7, dtype=torch.float64)[:, None]
    ours = lambda z: CASES[name][0](z, O).item()
    assert ours(Z) > .01
    if name != "acls": assert ours(Z + level) == close(ours(Z))
    else: assert ours(Z + level) > ours(Z) + 1 and ours(Z - 20) == close(ours(Z - 20 - level))


@each_loss
def test_the_order_of_the_classes_changes_nothing(name):
    z, o = problem(2, 6, 4)
    order = np.array([2, 0, 3, 1])
    moved = SimpleNamespace(**vars(o) | dict(y=np.argsort(order)[o.y], t=o.t[:, order]))
    ours = CASES[name][0]
    assert ours(*tensors(z[:, order], moved)).item() == close(ours(*tensors(z, o)).item())


@pytest.mark.parametrize("p, y", [((.75, .25), (0, 0, 0, 1)), ((.5, .25, .25), (0, 1, 2, 0))])
def test_a_calibrated_batch_costs_nothing(p, y):
    z, y = torch.tensor([p]*4, dtype=torch.float64).log(), torch.tensor(y)
    assert dca(z, y).item() == close(0) and mdca(z, y).item() == close(0)


def test_focal_at_zero_is_the_cross_entropy():
    Z, O = tensors(*problem(3, 6, 4))
    for gamma in (0., torch.zeros(6, dtype=torch.float64)):
        assert focal(Z, O.y, gamma).item() == close(cross_entropy(Z, O.y).item())


def test_the_two_conventions_of_label_smoothing_differ_by_a_factor_of_eps():
    for C, eps in product((2, 3, 10), (0., .05, .3)):
        Z, O = tensors(*problem(4, 6, C))
        assert (label_smoothing(Z, O.y, eps, exclude_target=True).item()
                == close(label_smoothing(Z, O.y, eps*C/(C - 1)).item()))


@pytest.mark.parametrize("name", ["cross_entropy", "label_smoothing",
                                  "label_smoothing others", "distillation", "mdca"])
def test_targets_may_be_probabilities(name):
    z, o = problem(5, 6, 4)
    onehot = SimpleNamespace(**vars(o) | dict(y=np.eye(4)[o.y]))
    ours = CASES[name][0]
    assert ours(*tensors(z, onehot)).item() == close(ours(*tensors(z, o)).item())


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(name, dtype):
    Z, O = tensors(*problem(6, 6, 4), torch.float32)
    Z, O.t = Z.to(dtype), O.t.to(dtype)
    half = CASES[name][0](Z, O)
    O.t = O.t.float()
    assert half.dtype == torch.float32 and half == CASES[name][0](Z.float(), O)


@each_loss
def test_nan_gives_nan(name):
    z, o = problem(7, 6, 4, q=np.arange(6)/5)
    o.y = (z.argmax(1) + np.arange(6) % 2) % 4  # some right and some wrong: else MMCE is 0
    for c in range(4):
        if name.startswith("cpc_exclusion") and c == o.y[0]: continue  # the label's logit is not in it
        broken = z.copy()
        broken[0, c] = np.nan
        assert CASES[name][0](*tensors(broken, o)).isnan()


class Notes(TorchDispatchMode):
    "Every operation that torch is asked for, in order"
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **kwargs or {})


@each_loss
def test_no_loss_loops_or_waits(name):
    "The same operations whatever the size, forward and backward, and none that reads a value back"
    seen = []
    for B, C in ((4, 3), (64, 50)):
        Z, O = tensors(*problem(8, B, C), torch.float32)
        with Notes() as notes: CASES[name][0](Z.requires_grad_(), O).backward()
        seen.append(notes.seen)
    assert seen[0] == seen[1] and not {"_local_scalar_dense", "nonzero"} & set(seen[0])


def test_no_gradient_reaches_the_teacher():
    z, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    distillation(z, torch.zeros(4, dtype=torch.long), t, 2., .5).backward()
    assert t.grad is None and z.grad.abs().sum() > 0


def test_the_student_of_a_teacher_at_alpha_one_has_its_probabilities():
    "Minimising the loss at any T with alpha = 1 gives the teacher's softmax: KL is 0 only there."
    t = torch.tensor([[2., 0., -1.]])
    for T in (1., 4.):
        z = torch.zeros(1, 3, requires_grad=True)
        opt = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-10,
                                tolerance_change=1e-14, line_search_fn="strong_wolfe")
        def closure():
            opt.zero_grad()
            loss = distillation(z, torch.tensor([0]), t, T, 1.)
            loss.backward()
            return loss
        opt.step(closure)
        assert torch.allclose(z.softmax(1), t.softmax(1), atol=1e-3)


def test_the_pages_own_loss_is_trained_with(tmp_path):
    "The page's cell and the two lines below it, as somebody copies them: a teacher, and a student of it"
    page = nbformat.read(Path(__file__).parents[1]/"nbs/training/08_losses.ipynb", as_version=4)
    cell, = (c.source for c in page.cells if c.cell_type == "code" and c.source.startswith("def brier_loss"))
    lines = page.cells[-1].source.split("```python\n")[1].split("```")[0]
    exec(compile(cell + "\n" + lines, "<page>", "exec"),
         {"__name__": "__main__", "upcast": upcast, "one_hot": one_hot, "Method": Method,
          "TrainingMethod": TrainingMethod})
    data, recipe = DataSpec("known", n_train=100, n_valid=60, n_test=80), Recipe(1, 50)
    teacher = RunSpec(data, "resnet8", Method("brier_loss"), recipe)
    student = run(RunSpec(data, "resnet8", Distil(teacher), recipe), Store(tmp_path), "cpu", progress=False)
    assert 0 <= student.raw.metrics["top1"].value <= 1 and len([*tmp_path.glob("*.run")]) == 2
    z, y = torch.tensor([[2., 0., -1.], [0., 1., .5]]), torch.tensor([0, 2])
    assert float(Method("brier_loss").build().loss(z, y)) == pytest.approx(brier(z, y), rel=1e-6)


BAD_LABELS = { # what a batch of labels may be like, and what is said of it
    "of another numbering": (lambda y: y + 10, "labels: got 10 to 13, expected 0 to 3"),
    "from one": (lambda y: y + 1, "labels: got 1 to 4"),
    "with an ignored one": (lambda y: torch.where(y == 2, -100, y), "labels: got -100 to 3"),
    "with a fraction": (lambda y: y.double(), "labels: got torch.float64"),
    "too few": (lambda y: y[:3],
                r"labels: got torch.int64 of shape \(3,\), expected integers of shape \(8,\)"),
    "in a column": (lambda y: y[:, None], r"shape \(8, 1\)"),
    "true or false": (lambda y: y > 1, "labels: got torch.bool"),
}
LABELLED = [name for name in CASES if name not in ("mbls", "acls", "acls published", "crl")]


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("fault", BAD_LABELS)
def test_labels_that_are_none_are_told(name, fault):
    z, o = tensors(*problem(3, 8, 4))
    o.y = torch.arange(8) % 4
    change, message = BAD_LABELS[fault]
    o.y = change(o.y)
    with pytest.raises(ValueError, match=message): CASES[name][0](z, o)


@each_loss
@pytest.mark.parametrize("change, message", [
    (lambda z: z[0], r"logits: got torch.float64 of shape \(4,\), expected floats of shape \(B, C\)"),
    (lambda z: z[:, :1], r"shape \(8, 1\)"), (lambda z: z.long(), "logits: got torch.int64"),
    (lambda z: z[None], r"shape \(1, 8, 4\)"), (lambda z: z[:0], "B above 0")])
def test_logits_that_are_none_are_told(name, change, message):
    z, o = tensors(*problem(3, 8, 4))
    if "others" in name and change(z).ndim == 1: return # the test's own strength needs the classes
    with pytest.raises(ValueError, match=message): CASES[name][0](change(z), o)


@pytest.mark.parametrize("rounded", [
    lambda p: p.bfloat16(), lambda p: p.half(), lambda p: (100*p).round()/100, lambda p: p - 1e-8])
def test_rounded_targets_are_taken(rounded):
    z, _ = tensors(*problem(3, 8, 10))
    cross_entropy(z, rounded(z.softmax(1)))


def test_excluded_classes_leave_the_loss_of_the_others():
    "A logit of -inf: each loss that asks nothing of the class is that over the rest, with finite gradients"
    z, o = tensors(*problem(3, 8, 5))
    y = o.y % 4
    masked = z.index_fill(1, torch.tensor([4]), -torch.inf).requires_grad_()
    mixed = .3*one_hot(y, 5).double() + .7*one_hot((y + 1) % 4, 5).double()
    for loss in (lambda z, c: cross_entropy(z, mixed[:, :c]), lambda z, c: label_smoothing(z, y, 0.),
                 lambda z, c: distillation(z, mixed[:, :c], z.detach()*.7, T=2., alpha=.5)):
        value = loss(masked, 5)
        assert value.item() == pytest.approx(loss(z[:, :4], 4).item())
        assert torch.autograd.grad(value, masked)[0].isfinite().all()


@given(st.integers(0, 99), st.integers(2, 6), st.sampled_from([1., 4.]), st.booleans())
def test_a_class_that_the_teacher_excludes_costs_nothing(seed, c, T, student_too):
    "The KL is over the classes that are left, for the student as it is; and gradients are finite"
    z, o = tensors(*problem(seed, 5, c))
    t, y = o.t, o.y
    excluded = torch.zeros(5, c, dtype=torch.bool)
    excluded[:3, seed % c] = True
    y = torch.where(excluded[torch.arange(5), y], (y + 1) % c, y)
    z, t = (z.masked_fill(excluded & student_too, -torch.inf).requires_grad_(),
            t.masked_fill(excluded, -torch.inf))
    loss = distillation(z, y, t, T, .9)
    kl = scipy.special.rel_entr((t/T).softmax(1).numpy(), (z.detach()/T).softmax(1).numpy()).sum(1).mean()
    assert loss.item() == pytest.approx(.9*T**2*kl + .1*cross_entropy(z, y).item())
    loss.backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("call, message", [
    (lambda z, y: distillation(z, y, z, T=0), "T: got 0, expected a temperature above 0"),
    (lambda z, y: distillation(z, y, z, T=-1.), "T: got -1"),
    (lambda z, y: distillation(z, 2*z.softmax(1), z), "targets: got a row"),
    (lambda z, y: cross_entropy(z, -z.softmax(1)), "targets: got a row"),
    (lambda z, y: focal(z, None), "labels: got None"),
    (lambda z, y: focal(z, y, torch.ones(8, 1)), r"gamma: got shape \(8, 1\), expected a number, or \(8,\)"),
    (lambda z, y: distillation(z, y, z, T="4"), "T: got 4, expected a temperature"),
    (lambda z, y: cross_entropy(z, z*torch.nan), "targets: got a row"),
    (lambda z, y: mdca(z, None), "targets: got None"),
    (lambda z, y: distillation(z, y, z, T=float("nan")), "T: got nan"),
    (lambda z, y: distillation(z, y, z, T=np.float32("inf")), "T: got inf"),
    (lambda z, y: distillation(z, y, z, alpha=2), "alpha: got 2, expected a weight from 0 to 1"),
    (lambda z, y: distillation(z, y, None), "teacher_logits: got None"),
    (lambda z, y: distillation(z, y, z[:, :3]), r"teacher_logits: got shape \(8, 3\), expected \(8, 4\)"),
    (lambda z, y: distillation(z, y, z[:1]), r"teacher_logits: got shape \(1, 4\), expected \(8, 4\)"),
    (lambda z, y: label_smoothing(z, y, 1.5), "eps: got 1.5"),
    (lambda z, y: mbls(z, -1.), "margin: got -1"), (lambda z, y: acls(z, float("nan")), "margin: got nan"),
    (lambda z, y: crl(z, z[:3, 0]), r"correctness: got shape \(3,\)"),
    (lambda z, y: cross_entropy(z, z[:, :3]), r"targets: got .*\(8, 3\), expected probabilities"),
    (lambda z, y: mdca(z, z[:1]), "targets: got"),
    (lambda z, y: effective_target(dca, z, y + 4), "labels: got 4 to 7")])
def test_numbers_and_shapes_that_mean_nothing_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(8, 4), torch.arange(8) % 4)


@each_loss
@pytest.mark.parametrize("kind", (np.int32, np.uint8, np.int64))
def test_arrays_are_taken_as_tensors_are(name, kind):
    z, o = problem(5, 8, 4)
    arrays = SimpleNamespace(**vars(o) | {"y": o.y.astype(kind)})
    expected = CASES[name][0](*tensors(z, o))
    if name == "focal each": arrays.g = torch.from_numpy(o.g)
    got = CASES[name][0](z, arrays)
    assert got.dtype == torch.float64 and got == expected
    assert CASES[name][0](z.astype(np.float16), arrays).dtype in (torch.float32, torch.float64)


@each_loss
def test_off_the_cpu_no_number_is_looked_at(name):
    "Tensors without any numbers, as a GPU's would be for the host: only shapes and types can be checked"
    Z, O = tensors(*problem(8, 6, 4), torch.float32)
    there = SimpleNamespace(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v
                               for k, v in vars(O).items()})
    assert CASES[name][0](Z.to("meta"), there).shape == ()


@each_loss
def test_a_loss_compiles_whole(name):
    "Without a break, which a look at a number would be"
    torch._dynamo.reset()
    Z, O = tensors(*problem(8, 16, 5), torch.float32)
    compiled = torch.compile(lambda z: CASES[name][0](z, O), backend="eager", fullgraph=True)
    assert torch.equal(compiled(Z), CASES[name][0](Z, O))


def filled(name, dtype, index=torch.arange(8)):
    "A step and the method of it, started"
    method = Method(name).build()
    method.before_fit(8, 4, epochs=3)
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    return method, TrainingStep(z, torch.arange(8) % 4, index, torch.tensor(1), z.flip(0))


@pytest.mark.parametrize("name", sorted(Method.registry))
def test_every_method_takes_every_float_type(name):
    "Float64 gives what float32 does, to its precision; what is remembered is in float32 either way"
    losses = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        method, step = filled(name, dtype)
        for epoch in range(2):
            x, targets = method.mix_batch(step.logits, step.targets, torch.tensor(.5, dtype=dtype))
            step = step._replace(epoch=torch.tensor(epoch))
            losses.append(float(method(step._replace(logits=x, targets=targets))))
            method.after_epoch(epoch, step.logits, step.targets)
    assert (losses[:2] == pytest.approx(losses[2:4], rel=1e-5)
            and losses[4:] == pytest.approx(losses[:2], rel=.05))


@pytest.mark.parametrize("name", ("pskd", "crl", "adafocal", "mixup"))
def test_a_method_that_was_not_started_is_told(name):
    method, step = Method(name).build(), filled(name, torch.float32)[1]
    with pytest.raises(ValueError,
                       match="method: got .*not started, expected `before_fit` to be called first"):
        method.mix_batch(step.logits, step.targets, torch.tensor(.5)); method(step)


@pytest.mark.parametrize("name, missing", [("pskd", "index"), ("pskd", "epoch"), ("crl", "index")])
def test_a_step_that_lacks_what_a_method_needs_is_told(name, missing):
    method, step = filled(name, torch.float32)
    with pytest.raises(ValueError, match=f"{missing}: got None"): method(step._replace(**{missing: None}))


@pytest.mark.parametrize("name", sorted(Method.registry))
def test_a_methods_labels_are_checked_too(name):
    method, step = filled(name, torch.float32)
    labels = step.targets + 4
    with pytest.raises(ValueError, match="labels: got 4 to 7, expected 0 to 3"):
        x, targets = method.mix_batch(step.logits, labels, torch.tensor(.5))
        method(step._replace(logits=x, targets=targets))


def test_validation_that_is_missing_is_told():
    with pytest.raises(ValueError, match="valid_logits: got None"):
        filled("adafocal", torch.float32)[0].after_epoch(0, None, None)
