"What a student is asked to take from its teacher: every loss against plain NumPy, one image at a time"

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_nb.values import decode, encode, spec_hash
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.distillation import Distillation, DistilLoss
from kdc_nb.training.losses import cross_entropy, distillation
from kdc_nb.training.methods import Method, TrainingStep
from kdc_nb.training.recipes import Recipe, training_fingerprint
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import Distil, RunSpec, describe_run, method_label, run_id, training_label
from kdc_nb.experiments.store import Store


def softmax(z):
    e = np.exp(z - z.max())
    return e/e.sum()


def kl(p, q): return sum(a*math.log(a/b) for a, b in zip(p, q))


def mean_of(each): # of one image: student's and teacher's logits, label, temperature
    return lambda z, t, y, T, **more: np.mean([each(*row, T, **more) for row in zip(z, t, y)])


def softened(f): return lambda z, t, y, T, **more: f(softmax(z/T), softmax(t/T), y, T, **more)


def slow_js(q, p, y, T): return T**2*(kl(p, (p + q)/2) + kl(q, (p + q)/2))/2


def slow_dkd(q, p, y, T, beta=8.):
    def two(x): return np.array([x[y], np.delete(x, y).sum()])
    def others(x): return np.delete(x, y)/np.delete(x, y).sum()
    return T**2*(kl(two(p), two(q)) + beta*kl(others(p), others(q)))


def slow_ats(z, t, y, T, label_T=2.):
    t = t.copy()
    t[y] /= label_T
    return T**2*kl(softmax(t/T), softmax(z/T))


def slow_swapped(z, t, y, T):
    t = t.copy()
    top = t.argmax()
    t[[top, y]] = t[[y, top]]
    return T**2*kl(softmax(t/T), softmax(z/T))


def slow_corrected(q, p, y, T, share=.5):
    if p.argmax() != y: p = (1 - share)*p + share*np.eye(len(p))[y]
    return T**2*kl(p, q)


def slow_standardised(z, t, y, T):
    z, t = ((x - x.mean())/x.std() for x in (z, t))
    return T**2*kl(softmax(t/T), softmax(z/T))


def slow_dist(z, t, y, T, beta=2., gamma=2.):
    q, p = (np.array([softmax(row/T) for row in x]) for x in (z, t))
    over_classes = np.mean([1 - np.corrcoef(*rows)[0, 1] for rows in zip(q, p)])
    over_images = np.mean([1 - np.corrcoef(*columns)[0, 1] for columns in zip(q.T, p.T)])
    return T**2*(beta*over_classes + gamma*over_images)


SLOW = {
    "mse": mean_of(lambda z, t, y, T: np.mean((z - t)**2)),
    "reverse_kl": mean_of(softened(lambda q, p, y, T: T**2*kl(q, p))),
    "js": mean_of(softened(slow_js)), "tv": mean_of(softened(lambda q, p, y, T: T*np.abs(p - q).sum()/2)),
    "dkd": mean_of(softened(slow_dkd)), "dist": slow_dist, "standardised": mean_of(slow_standardised),
    "ats": mean_of(slow_ats), "swapped": mean_of(slow_swapped),
    "corrected": mean_of(softened(slow_corrected)),
}
STRENGTHS = {"dkd": dict(beta=3.), "dist": dict(beta=1., gamma=.5), "ats": dict(label_T=3.),
             "corrected": dict(share=.2)}
NAMES = [*DistilLoss.registry]
RESTS = {"mse", "reverse_kl", "js", "tv", "dkd", "dist", "standardised", "ctkd"} # where student = teacher


def problem(seed, n=8, c=5, scale=3.):
    g = torch.Generator().manual_seed(seed)
    z, t = (scale*torch.randn(n, c, generator=g, dtype=torch.float64) for _ in range(2))
    return z, t, torch.randint(c, (n,), generator=g)


def loss_of(name, z, t, y, T=2., **strengths):
    step = TrainingStep(z, y, epoch=torch.tensor(3), teacher_logits=t)
    return DistilLoss(name, **strengths).build()(step, T)


def test_all_have_a_second_implementation(): assert {*SLOW, "ctkd"} == {*NAMES}


@pytest.mark.parametrize("name", SLOW)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), T=st.sampled_from([.5, 1., 4.]), own=st.booleans())
def test_as_one_image_at_a_time(name, seed, T, own):
    z, t, y = problem(seed)
    strengths = STRENGTHS.get(name, {}) if own else {}
    expected = SLOW[name](z.numpy(), t.numpy(), y.numpy(), T, **strengths)
    assert float(loss_of(name, z, t, y, T, **strengths)) == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("name", sorted(RESTS))
def test_a_student_that_is_its_teacher_rests(name):
    z, _, y = problem(1)
    z.requires_grad_()
    loss = loss_of(name, z, z.detach(), y)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-12) and float(z.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", sorted({*NAMES} - RESTS))
def test_a_teacher_that_is_put_right_leaves_no_student_as_it_is(name):
    z, _, y = problem(1)
    assert float(loss_of(name, z, z, y)) > .01


@pytest.mark.parametrize("name", NAMES)
def test_what_a_student_may_add_to_its_logits(name):
    z, t, y = problem(2)
    shift = torch.arange(8.).double()[:, None]
    same = float(loss_of(name, z + shift, t, y)) == pytest.approx(float(loss_of(name, z, t, y)))
    assert same == (name != "mse")
    louder = float(loss_of(name, 3*z, t, y)) == pytest.approx(float(loss_of(name, z, t, y)))
    assert louder == (name == "standardised")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_small_steps(name):
    z, t, y = problem(3, n=3, c=4)
    assert torch.autograd.gradcheck(lambda z: loss_of(name, z, t, y), z.requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0., 1e-4, 300.])
def test_finite_for_logits_of_any_size(name, scale):
    z, t, y = (x.float() if x.is_floating_point() else x for x in problem(4, scale=scale))
    z = z.bfloat16().requires_grad_()
    loss = loss_of(name, z, t.bfloat16(), y)
    loss.backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite()) and bool(z.grad.isfinite().all())


def test_curriculum_climbs_and_is_saved():
    z, t, y = problem(5)
    loss = DistilLoss("ctkd").build()
    def at(w):
        T = 1 + 20*torch.sigmoid(w)
        return T**2*((t/T).softmax(1)*((t/T).log_softmax(1) - (z/T).log_softmax(1))).sum(1).mean()
    w = torch.tensor(1., dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(at(w), w)
    step = TrainingStep(z, y, epoch=torch.tensor(5), teacher_logits=t)
    assert float(loss(step, 7.)) == pytest.approx(float(at(torch.tensor(1.)).detach()), rel=1e-5)
    assert float(loss.w) == pytest.approx(1 + .05*.5*float(slope), rel=1e-5) # after half of ten epochs
    again = DistilLoss("ctkd").build()
    again.load_state_dict(loss.state_dict())
    assert float(again(step, 7.)) == float(loss(step, 7.))
    with pytest.raises(ValueError, match="^epoch: got None"): loss(step._replace(epoch=None), 1.)


@pytest.mark.parametrize("name, bad", [
    ("dkd", dict(beta=-1)), ("dist", dict(gamma=-1)), ("ats", dict(label_T=.5)),
    ("corrected", dict(share=2)), ("ctkd", dict(epochs=0)), ("ctkd", dict(rate=-1))])
def test_strengths_out_of_range(name, bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got"): DistilLoss(name, **bad).build()
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got"):
        Distil(RunSpec("known", "resnet8"), loss=DistilLoss(name, **bad))


@pytest.mark.parametrize("name", NAMES)
def test_teachers_that_are_none(name):
    z, t, y = problem(6)
    with pytest.raises(ValueError, match="^teacher_logits: got None"): loss_of(name, z, None, y)
    with pytest.raises(ValueError, match="^teacher_logits: got shape"): loss_of(name, z, t[:, :3], y)


def test_the_method_weighs_teacher_and_labels():
    z, t, y = problem(7)
    step = TrainingStep(z, y, teacher_logits=t)
    own = Distillation(2., .3, DistilLoss("tv").build())
    assert float(own(step)) == pytest.approx(float(.3*loss_of("tv", z, t, y) + .7*cross_entropy(z, y)))
    assert float(Distillation(2., .3)(step)) == float(distillation(z, y, t, 2., .3))


# -- descriptions and runs ----------------------------------------------------

DATA, RECIPE = DataSpec("known", n_train=100, n_valid=50, n_test=50), Recipe(epochs=2, batch_size=50)
TEACHER = RunSpec(DATA, "resnet8", "nll", RECIPE)


def test_descriptions():
    plain, own = Distil(TEACHER, 4, .5), Distil(TEACHER, 4, .5, DistilLoss("dkd", beta=2))
    assert "loss" not in encode(plain), "older descriptions, and their ids, stay as they were"
    assert decode(encode(own)) == own and spec_hash(own) != spec_hash(plain)
    assert Distil(TEACHER, loss="dkd") == Distil(TEACHER, loss=DistilLoss("dkd"))
    student = RunSpec(DATA, "resnet8", own, RECIPE)
    assert training_label(student) == "KD(T=4, alpha=0.5, dkd beta=2) from nll"
    assert describe_run(student)["method"] == "KD, dkd beta=2"
    assert method_label(plain).startswith("KD(T=4, alpha=0.5) from [")
    assert describe_run(replace(student, method=plain))["method"] == "KD"
    for bad in ("none", 3, Method("nll")):
        with pytest.raises(ValueError, match="none|loss: got"): Distil(TEACHER, loss=bad)


def test_a_loss_of_ones_own_is_in_the_id():
    @DistilLoss.register("own")
    def own(): return lambda step, T: (step.logits - step.teacher_logits).abs().mean()
    first = run_id(RunSpec(DATA, "resnet8", Distil(TEACHER, loss="own"), RECIPE))
    del DistilLoss.registry.data["own"]
    @DistilLoss.register("own")
    def other(): return lambda step, T: (step.logits - step.teacher_logits).square().mean()
    assert run_id(RunSpec(DATA, "resnet8", Distil(TEACHER, loss="own"), RECIPE)) != first


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_trains_a_student_and_resumes(name, tmp_path):
    student = RunSpec(DATA, "resnet8", Distil(TEACHER, T=2, alpha=.9, loss=name), RECIPE)
    whole = run(student, Store(tmp_path/"a"), "cpu", progress=False)
    assert whole.history[-1]["loss"] < 1e3 and torch.isfinite(whole.logits["test"]).all()
    plain = run(replace(student, method=Distil(TEACHER, T=2)), Store(tmp_path/"a"), "cpu", progress=False)
    assert not torch.equal(whole.logits["test"], plain.logits["test"])


def test_a_checkpoint_of_another_strength_is_of_another_training():
    "Also where the loss is a module with a state"
    data = load_data(DataSpec("known", n_train=40, n_valid=20, n_test=20))
    made = [Distillation(2., .5, DistilLoss("ctkd", **own).build())
            for own in ({}, {"rate": .5}, {"epochs": 3}, {})]
    prints = {training_fingerprint(data, method, Recipe(1), 0) for method in made}
    assert len(prints) == 3


@pytest.mark.parametrize("made", [None, 3])
def test_a_loss_that_was_not_returned_is_named(made):
    "None would else be Hinton's"
    DistilLoss.register("forgot")(lambda: made)
    with pytest.raises(ValueError, match=rf"loss: got a {type(made).__name__} of DistilLoss\('forgot'\)"):
        Distil(RunSpec("known", "resnet8"), loss=DistilLoss("forgot")).build()
