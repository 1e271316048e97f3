"Outputs as people have them: files, rounded numbers, two classes, masks, pixels, several labels"
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

from kdc_nb.calibration import posthoc
from kdc_nb.calibration.comparisons import compare
from kdc_nb.calibration.evaluation import evaluate
from kdc_nb.calibration.inputs import flatten_outputs, load_outputs
from kdc_nb.calibration.metrics import ace, brier, classwise_ace, ece, ks, mce, nll, sce, top1
from kdc_nb.calibration.outputs import check_outputs, softmax64
from kdc_nb.calibration.posthoc import estimate_temperature, fit_temperature
from kdc_nb.calibration.predictions import positive_class
from kdc_nb.calibration.reliability import reliability_bins
from kdc_nb.core import warn
from kdc_nb.training.recipes import Recipe
from kdc_nb.values import decode, encode, spec_hash
from tests.conftest import made


def warned(call) -> list[str]:
    "The warnings of a call"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


# -- files --------------------------------------------------------------------

def test_files_come_back(tmp_path):
    z, y, _ = made(20, 3)
    np.savez(tmp_path/"a.npz", logits=z.numpy(), labels=y.numpy())
    rows = [",".join([*(repr(v) for v in row), str(int(t))]) for row, t in zip(z.tolist(), y)]
    (tmp_path/"a.csv").write_text("\n".join(["a,b,c,label", *rows]))
    (tmp_path/"excel.csv").write_text(
        "\n".join(["label,a,b,c", *(",".join((r.rsplit(",", 1)[1], r.rsplit(",", 1)[0])) for r in rows)]),
        encoding="utf-8-sig"
    )
    for name in ("a.npz", "a.csv", "excel.csv"):
        logits, labels = load_outputs(tmp_path/name)
        torch.testing.assert_close(logits, z, rtol=1e-15, atol=0)
        assert torch.equal(labels, y), name


@pytest.mark.parametrize("name, content", [
    ("none.npz", None), ("none.csv", None), ("odd.txt", b"1"), ("empty.npz", b""),
    ("empty.csv", b""), ("cut.npz", "cut"), ("damaged.npz", "damaged"),
    ("text.npz", b"not a zip file"), ("other.npz", dict(x=np.zeros(3))),
    ("one.npz", dict(logits=np.zeros((2, 2)))),
    ("object.npz", dict(logits=np.array([{}, {}]), labels=np.zeros(2))),
    ("shape.npz", dict(logits=np.zeros((2, 3, 4)), labels=np.zeros(2))),
    ("head.csv", b"a,b\n1,2\n"), ("only.csv", b"label,a,b\n"),
    ("ragged.csv", b"label,a,b\n0,1,2\n1,1\n"), ("words.csv", b"label,a,b\n0,one,2\n"),
    ("label.csv", b"label,a,b\n7,1,2\n"), ("binary.csv", b"\xff\xfe\x00label"),
    ("wide.csv", b"label,a,b\n0,1,2,3\n"), ("twice.csv", b"label,a,a\n0,1.5,2\n"),
    ("alone.csv", b"label,a\n0,1.5\n"), ("names.csv", b"label,a,b\nc,1.5,2\n"),
    ("hole.csv", b"label,logit_0,logit_2\n0,1.5,2\n1,2.5,3\n"),
])
def test_odd_files_are_refused_by_name(tmp_path, name, content):
    path = tmp_path/name
    if isinstance(content, bytes): path.write_bytes(content)
    elif isinstance(content, dict): np.savez(path, **content)
    elif content:
        np.savez_compressed(path, logits=np.random.default_rng(0).normal(size=(99, 3)), labels=np.zeros(99))
        raw = bytearray(path.read_bytes())
        if content == "damaged": raw[300:400] = bytes(100)
        path.write_bytes(raw if content == "damaged" else raw[:len(raw)//2])
    with pytest.raises(ValueError) as error: load_outputs(path)
    assert name in str(error.value)


def test_the_index_of_a_table_is_no_class(tmp_path):
    z, y, _ = made(400, 4)
    table = pd.DataFrame(z.numpy()).assign(label=y.numpy())
    table.to_csv(tmp_path/"mine.csv")
    pd.read_csv(tmp_path/"mine.csv").to_csv(tmp_path/"again.csv") # and again: "" and "Unnamed: 0"
    for name in ("mine.csv", "again.csv"):
        said = warned(lambda: load_outputs(tmp_path/name))
        assert len(said) == 1 and name in said[0] and "the classes are taken to be 0, 1, 2, 3" in said[0]
        with pytest.warns(UserWarning): x, labels = load_outputs(tmp_path/name)
        assert x.shape == (400, 4) and ece(x, labels) == pytest.approx(ece(z, y))
    table.to_csv(tmp_path/"clean.csv", index=False)
    assert not warned(lambda: load_outputs(tmp_path/"clean.csv"))


@pytest.mark.parametrize("extra, why", [
    (dict(id=np.arange(50)), "whole numbers"), (dict(argmax=np.arange(50) % 3), "whole numbers"),
    (dict(confidence=np.linspace(.3, 1, 50)), "a known name"), (dict(file=["a.png"]*50), "texts"),
    (dict(entropy_of_it=np.linspace(0, 1, 50)), "no number where the others have one"),
])
@pytest.mark.parametrize("names", [["z0", "z1", "z2"], ["cat", "dog", "owl"]])
def test_columns_that_are_no_scores_are_refused_or_named(tmp_path, names, extra, why):
    z, y, _ = made(50, 3)
    table = pd.DataFrame(z.numpy(), columns=names).assign(label=y.numpy(), **extra)
    table.to_csv(path := tmp_path/"mine.csv", index=False)
    if "where the others" in why and names[0] == "cat": return # this one could be a class
    with pytest.raises(ValueError, match=re.escape(f"columns: got {[*extra][0]} beside {', '.join(names)}")):
        load_outputs(path)
    x, labels = load_outputs(path, classes=names)
    torch.testing.assert_close(x, z, rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match="classes: got bird"): load_outputs(path, classes=[*names, "bird"])


def test_numbered_columns_are_taken_in_the_order_of_their_numbers(tmp_path):
    z, y, _ = made(30, 12)
    table = pd.DataFrame(z.numpy(), columns=[f"logit_{k}" for k in range(12)])
    # 0, 1, 10, 11, 2, ...
    table[sorted(table)].assign(label=y.numpy()).to_csv(tmp_path/"mine.csv", index=False)
    assert nll(*load_outputs(tmp_path/"mine.csv")) == pytest.approx(nll(z, y))


@pytest.mark.parametrize("names, labels, expected", [
    (["1", "2", "3", "4"], [1, 3, 2], [0, 2, 1]), (["z1", "z2", "z3"], [1, 2, 1], [0, 1, 0]),
    (["z1", "z2", "z3"], [0, 2, 1], [0, 2, 1]), (["0", "1", "2"], [2, 0, 1], [2, 0, 1]),
    (["NA", "null"], ["null", "NA", "NA"], [1, 0, 0]),
    (["true", "false"], ["true", "false", "true"], [0, 1, 0]),
])
def test_labels_by_number_or_name(tmp_path, names, labels, expected):
    z = np.random.default_rng(0).normal(size=(3, len(names)))
    pd.DataFrame(z, columns=names).assign(label=labels).to_csv(path := tmp_path/"mine.csv", index=False)
    assert load_outputs(path, classes=names)[1].tolist() == expected
    turned = load_outputs(path, classes=names[::-1]) # a name stays with its column
    if names[0] != "z1" or 0 not in labels:
        assert turned[1].tolist() == [len(names) - 1 - k for k in expected]


@pytest.mark.parametrize("classes, says",
                         [(["cat", "cat", "dog"], "classes: got cat, cat, dog, expected each once"),
                          ("cat", "classes: got 'cat', expected a list of names")])
def test_classes_are_named_once(tmp_path, classes, says):
    (tmp_path/"mine.csv").write_text("label,cat,dog\n0,1.5,2\n1,.5,3\n")
    with pytest.raises(ValueError, match=says): load_outputs(tmp_path/"mine.csv", classes=classes)


def test_named_columns_are_told_and_numbered_ones_are_not(tmp_path):
    (tmp_path/"mine.csv").write_text("label,cat,dog,margin\n0,1.5,2.5,.5\n1,.5,3.5,2.5\n")
    assert ("the classes are taken to be cat, dog, margin"
            in warned(lambda: load_outputs(tmp_path/"mine.csv"))[0])
    assert not warned(lambda: load_outputs(tmp_path/"mine.csv", classes=["cat", "dog"]))


def test_labels_may_be_names_of_columns(tmp_path):
    z, y, _ = made(30, 3)
    names = np.array(["cat", "dog", "owl"])
    pd.DataFrame(z.numpy(), columns=names).assign(label=names[y]).to_csv(tmp_path/"mine.csv", index=False)
    with pytest.warns(UserWarning, match="taken to be cat, dog, owl"):
        read = load_outputs(tmp_path/"mine.csv")
    assert read[1].tolist() == y.tolist()
    turned = load_outputs(tmp_path/"mine.csv", classes=names[::-1])
    assert nll(*turned) == pytest.approx(nll(z, y))


def test_probabilities_in_a_file(tmp_path):
    z, y, _ = made(30, 3)
    np.savez(tmp_path/"p.npz", logits=z.softmax(1).numpy(), labels=y.numpy())
    p, labels = load_outputs(tmp_path/"p.npz", from_logits=False)
    assert ece(p, labels, from_logits=False) == pytest.approx(ece(z, y))


# -- rounded probabilities ----------------------------------------------------

@pytest.mark.parametrize("rounded", [lambda p: p.numpy().round(3), lambda p: p.half(), lambda p: p.bfloat16(),
                                     lambda p: p.float(), lambda p: p.numpy().round(2).tolist()])
def test_probabilities_are_those_of_their_format(rounded):
    z, y, _ = made(400, 4, 1.5)
    right, p = ece(z, y), rounded(softmax64(z))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ece(p, y, from_logits=False) == pytest.approx(right, abs=.015)
        assert abs(ece(p, y) - right) > .1 # read as logits
    assert any("from_logits=False" in s for s in warned(lambda: ece(p, y)))
    q = (check_outputs(p, False) if not isinstance(p, torch.Tensor) or p.dtype != torch.float32
         else softmax64(z))
    torch.testing.assert_close(q.sum(1), torch.ones(400, dtype=torch.float64))


def test_three_digits_of_many_classes():
    z, y, _ = made(400, 100, 1.3, sharpness=4.)
    p = softmax64(z).numpy().round(3)
    with pytest.warns(UserWarning, match="divided by its sum"):
        assert ece(p, y, from_logits=False) == pytest.approx(ece(z, y), abs=.01)
    assert any("from_logits=False" in s for s in warned(lambda: ece(p, y)))


def test_a_label_that_was_rounded_to_0_is_told_where_a_temperature_is_fitted():
    z, y, _ = made(1000, 5, 2.5, sharpness=4.)
    p = softmax64(z).numpy().round(3)
    assert (p[np.arange(1000), y] == 0).any()
    said = warned(lambda: fit_temperature(p, y, from_logits=False))
    assert any("a label has probability 0" in s for s in said)
    with pytest.warns(UserWarning): e = evaluate(p, y, n_draws=5, from_logits=False)
    assert "a label has probability 0" in e.caption()
    assert not warned(lambda: fit_temperature(softmax64(z), y, from_logits=False))


def test_a_refusal_says_which_row_and_what_mends_it():
    p = softmax64(made(50, 3)[0])
    p[17] *= .8
    with pytest.raises(ValueError, match=r"row 17 with sum 0.8000, .* x/x.sum\(1, keepdims=True\)"):
        check_outputs(p, False)
    with pytest.raises(ValueError, match="probs: got -3, which is none"): check_outputs([[-3., 4.]], False)


@given(st.integers(2, 30), st.integers(0, 10**6))
def test_shares_of_scores_are_taken_as_they_are(c, seed):
    p = torch.rand(20, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p /= p.sum(1, keepdim=True)
    assert torch.equal(check_outputs(p, False), p)


def test_a_warning_points_at_the_callers_line():
    p = softmax64(made(50, 3)[0])
    for call in (lambda: ece(p, [0]*50), lambda: evaluate(p, [0]*50, n_draws=2), lambda: check_outputs(p)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert caught and {w.filename for w in caught} == {__file__}
    with pytest.warns(UserWarning, match="hello"): warn("hello")


# -- numbers of NumPy ---------------------------------------------------------

def test_numbers_of_numpy_are_numbers():
    z, y, _ = made(100, 3)
    for f in (ece, ace, sce): assert f(z, y, np.int64(5)) == f(z, y, 5)
    a, b = (evaluate(z, y, n_bins=k(5), n_draws=k(20), seed=k(1)) for k in (np.int32, int))
    assert a == b and decode(encode(a)) == b and spec_hash(a) == spec_hash(b)
    with pytest.raises(ValueError, match="n_bins: got 5.0"): ece(z, y, np.float64(5))


# -- two classes --------------------------------------------------------------

@given(st.integers(20, 200), st.floats(.3, 3), st.integers(0, 10**6))
def test_one_number_an_image_is_two_classes(n, factor, seed):
    z, y, _ = made(n, 2, factor, seed=seed)
    s = z[:, 1] - z[:, 0]
    for f in (ece, ace, ks, nll, brier, top1):
        two = f(z, y)
        assert f(s, y) == pytest.approx(two) and f(s[:, None], y[:, None]) == pytest.approx(two)
        assert f(s.sigmoid(), y, from_logits=False) == pytest.approx(two)
    if estimate_temperature(z, y).note is None:
        assert fit_temperature(s, y) == pytest.approx(fit_temperature(z, y), rel=1e-6)


def test_the_positive_class_is_what_other_libraries_measure():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    z, y, _ = made(3000, 2, 1.7)
    p = (z[:, 1] - z[:, 0]).sigmoid()
    theirs = float(torchmetrics.binary_calibration_error(p, y, n_bins=15))
    bins = reliability_bins(p, y, from_logits=False, predictions=positive_class)
    ours = np.nansum(bins.count*abs(bins.accuracy - bins.confidence))/3000
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert sce(p, y, from_logits=False) == pytest.approx(theirs, abs=1e-6) # both classes, in mirror image
    assert abs(ece(p, y, from_logits=False) - theirs) > 1e-4 # the top label is another question
    with pytest.raises(ValueError, match="outputs: got 5 classes, expected 2"):
        reliability_bins(*made(50)[:2], predictions=positive_class)


def test_two_classes_everywhere():
    z, y, _ = made(300, 2, 1.5)
    s = z[:, 1] - z[:, 0]
    a, b = evaluate(s, y, n_draws=50), evaluate(z, y, n_draws=50)
    assert {k: e.value for k, e in a.raw.items()} == pytest.approx({k: e.value for k, e in b.raw.items()})
    assert a.T == pytest.approx(b.T) and a.n_classes == 2
    assert compare(s, .5*s, y).raw["nll"].a == pytest.approx(nll(z, y))


def test_rounded_probabilities_are_compared_as_such():
    z, y, _ = made(300, 4, 1.5)
    rounded = softmax64(z).bfloat16()
    with pytest.warns(UserWarning, match="divided by its sum"):
        c = compare(rounded, softmax64(z), y, from_logits=False)
    with pytest.warns(UserWarning): q = check_outputs(rounded, False)
    assert c.raw["brier"].a == pytest.approx(brier(q, y, from_logits=False), rel=1e-12)


def test_single_logits_between_0_and_1_are_suspicious():
    assert any("from_logits=False" in s for s in warned(lambda: ece([.2, .9], [0, 1])))
    assert not warned(lambda: ece([-.2, .9], [0, 1]))


# -- masked classes -----------------------------------------------------------

def test_a_masked_class_has_probability_0():
    z, y, _ = made(500, 4, 1.5)
    wide = torch.cat([z, torch.full((500, 1), -math.inf, dtype=torch.float64)], 1)
    for f in (ece, ace, ks, nll, brier, top1): assert f(wide, y) == pytest.approx(f(z, y)), f
    assert sce(wide, y) == pytest.approx(sce(z, y)*4/5) # the masked class is never off
    assert fit_temperature(wide, y) == pytest.approx(fit_temperature(z, y), rel=1e-9)
    assert fit_temperature(1000*wide, y) == pytest.approx(1000*fit_temperature(z, y), rel=1e-9)
    a, b = evaluate(wide, y, n_draws=50), evaluate(z, y, n_draws=50)
    assert a.scaled["nll"].value == pytest.approx(b.scaled["nll"].value)
    assert [a.raw["ece"].low, a.raw["ece"].high] == pytest.approx([b.raw["ece"].low, b.raw["ece"].high])


def test_masks_that_differ_by_image():
    z, y, _ = made(500, 6, 1.5)
    allowed = torch.rand(500, 6, generator=torch.Generator().manual_seed(0)) < .7
    allowed[torch.arange(500), y] = True
    masked = z.where(allowed, -math.inf)
    rows = [F.cross_entropy(r[m][None], m.cumsum(0)[t:t + 1] - 1) for r, m, t in zip(z, allowed, y)]
    assert nll(masked, y) == pytest.approx(float(torch.stack(rows).mean()))
    T = fit_temperature(masked, y)
    assert all(nll(masked/T, y) < nll(masked/t, y) for t in (.9*T, 1.1*T))


def test_a_label_that_was_masked_is_impossible():
    z, y = [[0., -math.inf], [2., 0.], [0., 1.]], [1, 0, 1]
    assert nll(z, y) == math.inf
    with pytest.warns(UserWarning, match="infinite at every temperature"):
        assert fit_temperature(z, y) == 1.


# -- pixels, words, several labels --------------------------------------------

@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_flat_pixels_have_torchs_loss(n, c, h, w, seed):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, c, h, w, generator=g, dtype=torch.float64)
    y = torch.randint(c, (n, h, w), generator=g)
    y[torch.rand(n, h, w, generator=g) < .3] = 255
    if (y == 255).all():
        with pytest.raises(ValueError, match="labels: got 255 everywhere"): flatten_outputs(z, y, 255)
        return
    theirs = float(F.cross_entropy(z, y, ignore_index=255))
    assert nll(*flatten_outputs(z, y, 255)) == pytest.approx(theirs)
    last = flatten_outputs(z.movedim(1, -1), y, 255, class_axis=-1)
    assert nll(*last) == pytest.approx(theirs)


def test_binary_masks_are_shaped_as_their_labels():
    z, y = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4, 5)
    y[0] = -100
    flat = flatten_outputs(z, y)
    assert flat[0].shape == flat[1].shape == (40,)
    assert nll(*flat) == pytest.approx(float(F.softplus(-z[1:]).mean()))


@pytest.mark.parametrize("z, y, more, says", [
    ((2, 3, 4), (2, 3), {}, "labels: got shape (2, 3), expected (2, 4)"),
    ((2, 3, 4), (2, 3), dict(class_axis=5), "class_axis: got 5"),
    ((2, 3, 4), (2, 4, 1), {}, "labels: got shape (2, 4, 1)"),
])
def test_wrong_shapes_are_told(z, y, more, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        flatten_outputs(torch.zeros(z), torch.zeros(y), **more)


def test_several_labels_are_binary_problems():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(4000, 3, generator=g, dtype=torch.float64)
    y, z = (torch.rand(4000, 3, generator=g) < p).long(), 2*p.logit()
    assert nll(z.flatten(), y.flatten()) == pytest.approx(
        float(F.binary_cross_entropy_with_logits(z, y.double())))
    T = fit_temperature(z.flatten(), y.flatten())
    assert T == pytest.approx(2, abs=.1)
    assert (np.mean([sce(z[:, k]/T, y[:, k]) for k in range(3)]) < .03
            < np.mean([sce(z[:, k], y[:, k]) for k in range(3)]))


# -- weights ------------------------------------------------------------------

@given(st.integers(5, 80), st.integers(2, 6), st.integers(1, 20), st.booleans(), st.integers(0, 10**6))
def test_a_weight_of_k_is_k_images(n, c, n_bins, ties, seed):
    z, y, _ = made(n, c, 1.5, seed=seed)
    if ties: z = z.round()
    k = np.random.default_rng(seed).integers(0, 4, n)
    k[0] = 1
    many = z.repeat_interleave(torch.from_numpy(k), 0), y.repeat_interleave(torch.from_numpy(k))
    for f in (ks, nll, brier, top1): assert f(z, y, sample_weight=.3*k) == pytest.approx(f(*many), abs=1e-12)
    for f in (ece, ace, mce, sce, classwise_ace):
        assert f(z, y, n_bins, sample_weight=.3*k) == pytest.approx(f(*many, n_bins), abs=1e-12), f
    with warnings.catch_warnings(action="ignore"):
        a, b = estimate_temperature(z, y, sample_weight=.3*k), estimate_temperature(*many)
    if a.note or b.note: assert a.note == b.note
    else: assert a.T == pytest.approx(b.T, rel=1e-6)


def test_weights_of_scikit_learn():
    from sklearn.metrics import accuracy_score, log_loss
    z, y, _ = made(300, 4)
    w = np.random.default_rng(0).random(300)
    assert nll(z, y, sample_weight=w) == pytest.approx(log_loss(y, softmax64(z).numpy(), sample_weight=w))
    assert top1(z, y, sample_weight=w) == pytest.approx(accuracy_score(y, z.argmax(1), sample_weight=w))


def test_weights_undo_a_sample_that_is_not_the_world():
    z, y, _ = made(40_000, 3, 1.5)
    z = z + torch.tensor([2., 0., 0.]) # the model is wrong about class 0
    # which is rare here
    kept = (y != 0) | (torch.rand(40_000, generator=torch.Generator().manual_seed(1)) < .2)
    w = torch.where(y == 0, 5., 1.)[kept]
    for f in (ece, sce, nll, top1, fit_temperature):
        world, plain, weighted = f(z, y), f(z[kept], y[kept]), f(z[kept], y[kept], sample_weight=w)
        assert abs(weighted - world) < .02*max(world, 1) and abs(plain - world) > 3*abs(weighted - world), f


def test_a_weighted_diagrams_intervals_and_null_band():
    n = 3000
    w = np.random.default_rng(0).choice([.2, 4.], n)
    inside, covered = [], []
    for seed in range(40): # a calibrated model, weights that have nothing to do with it
        z, y, _ = made(n, 2, seed=seed)
        b = reliability_bins(z, y, 5, 300, sample_weight=w)
        used = b.count > 50
        inside += list(((b.null_low <= b.accuracy) & (b.accuracy <= b.null_high))[used])
        covered += list(((b.low <= b.confidence) & (b.confidence <= b.high))[used])
    assert len(inside) >= 100 and .9 <= np.mean(inside) <= .99 and .9 <= np.mean(covered) <= .99
    narrow = reliability_bins(z, y, 5, 300)
    assert np.all((b.high - b.low)[used] > 1.2*(narrow.high - narrow.low)[used])


@pytest.mark.parametrize("w, says", [
    ([1, 2], r"sample_weight: got shape \(2,\), expected \(3,\)"), ([1, 2, -1], "sample_weight: got -1 to 2"),
    ([0, 0, 0], "sample_weight: got 0 everywhere"), ([1, 2, math.nan], "sample_weight: got"),
    ([1e306]*3 + [1.], r"sample_weight: got shape \(4,\)"),
    (["a", 1, 1], "sample_weight: got a list that is no table of numbers: 'a' at 0"),
])
def test_odd_weights_are_refused(w, says):
    for f in (ece, nll, fit_temperature, reliability_bins):
        with pytest.raises(ValueError, match=says): f(made(3, 2)[0], [0, 1, 0], sample_weight=w)


def test_huge_weights_do_not_overflow():
    z, y, _ = made(400, 4, 1.5)
    assert ece(z, y, sample_weight=np.full(400, 1e306)) == pytest.approx(ece(z, y))


def test_arrays_are_taken_in_descriptions():
    recipe = Recipe(epochs=3, milestones=np.array([.5, .7]), lr=np.array(.1))
    assert recipe == Recipe(epochs=3, milestones=(.5, .7), lr=.1) and spec_hash(recipe)


def test_a_column_of_labels_is_told_what_to_take():
    with pytest.raises(ValueError, match=r"labels: got shape \(2, 1\), expected \(N,\); take labels\[:, 0\]"):
        ece([[1., 0.], [0., 1.]], [[0], [1]])


@pytest.mark.parametrize("call, says", [
    (lambda z, y: flatten_outputs(z, F.one_hot(y, 3).movedim(-1, 1)),
     "labels: got one-hot labels, expected classes"),
    (lambda z, y: flatten_outputs(z, y, None), "ignore_index: got None, expected an integer"),
    (lambda z, y: flatten_outputs(z.to_sparse(), y), "outputs: got a tensor of torch.sparse_coo"),
    (lambda z, y: ece(z[:, :, 0].to(torch.complex64), y[:, 0]), "logits: got a tensor of torch.strided and "),
    (lambda z, y: evaluate(z[:, :, 0], y[:, 0], seed=-1), "seed: got -1, expected an integer from 0"),
    (lambda z, y: evaluate(z[:, :, 0], y[:, 0], seed=1.5), "seed: got 1.5"),
    (lambda z, y: reliability_bins(z[:, :, 0], y[:, 0], seed=-1), "seed: got -1"),
    (lambda z, y: evaluate(z[:, :, 0], y[:, 0], metrics=3), "metrics: got 3, expected a name"),
    (lambda z, y: compare(z[:, :, 0], z[:, :, 1], y[:, 0], metrics=[]), "metrics: got [], expected a name"),
])
def test_other_habits_are_told(call, says):
    g = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=re.escape(says)):
        call(torch.randn(20, 3, 2, generator=g), torch.randint(3, (20, 2), generator=g))


def test_several_labels_of_which_one_is_there_are_told_from_one_hot_ones():
    "A table of several labels has rows without any, or with two; then it is laid flat as it was"
    z, y = torch.randn(5, 3), torch.eye(5, 3).long()
    assert len(flatten_outputs(z, y)[0]) == 15 # the last two rows have none


@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_of_two_classes_are_compared_by_seed(seeds):
    "(N,) for each seed, beside (N, 2) of the other model"
    r = np.random.default_rng(0)
    scores, y = [r.normal(size=200)*2 for _ in range(seeds)], r.integers(0, 2, 200)
    two = [np.stack([np.zeros(200), 1.3*s], 1) for s in scores]
    as_pairs = [np.stack([np.zeros(200), s], 1) for s in scores]
    c = compare(scores if seeds > 1 else scores[0], two if seeds > 1 else two[0], y)
    assert c.seeds == seeds and c.raw == compare(as_pairs, two, y).raw


def test_a_table_in_memory_is_read_as_a_file_is():
    """The index that a file brought, the labels among the scores, rows in another order:
    each would be a wrong number
    """
    r = np.random.default_rng(2)
    z = r.normal(size=(400, 4))*2
    y = pd.Series((softmax64(z/1.5).numpy().cumsum(1) > r.random((400, 1))).argmax(1))
    frame = pd.DataFrame(z)
    assert ece(frame, y) == ece(z, y.to_numpy())
    for odd in (frame.reset_index(), frame.assign(label=y), frame.rename(columns={0: "Unnamed: 0"})):
        with pytest.raises(ValueError, match="logits: got a column"): ece(odd, y)
    shuffled = y.sample(frac=1, random_state=0)
    with pytest.raises(ValueError, match="labels: got another index than that of the outputs"):
        ece(frame, shuffled)
    assert ece(frame, shuffled.to_numpy()) != ece(frame, y) # who takes the numbers alone means their order


@pytest.mark.parametrize("call, says", [
    (lambda z, y: ece(z, np.ma.masked_array(y, mask=y == 0)), "labels: got a masked array, expected numbers"),
    (lambda z, y: ece(np.ma.masked_array(z, mask=z > 1), y), "logits: got a masked array"),
    (lambda z, y: ece(z, y, sample_weight=np.ma.masked_array(y + 1., mask=y == 0)),
     "sample_weight: got a masked"),
    (lambda z, y: ece(z, y.astype("datetime64[s]")), "labels: got a ndarray that is no table of numbers"),
    (lambda z, y: ece(z + 1j, y), "logits: got a ndarray that is no table"),
    (lambda z, y: ece(z, z.argmax(1) == y), "labels: got True and False, expected 0 to 2"),
])
def test_arrays_that_hold_less_than_they_show_are_told(call, says):
    r = np.random.default_rng(0)
    with pytest.raises(ValueError, match=re.escape(says)): call(r.normal(size=(30, 3)), r.integers(0, 3, 30))


def test_other_containers_are_taken():
    "Lists of tensors of any type, objects that give an array but no type, arrays that are turned round"
    r = np.random.default_rng(0)
    z, y = r.normal(size=(30, 3)), r.integers(0, 3, 30)
    class Foreign:
        def __array__(self): return z
    rows = [torch.tensor(row, requires_grad=True) for row in z]
    for same in (Foreign(), rows, z[::-1][::-1], z.astype(">f8")): assert ece(same, y) == ece(z, y)
    assert ece(z[:, 0], y > 0) == ece(z[:, 0], (y > 0).astype(int)), "of two classes truth values are labels"


def test_labels_of_numbered_columns_that_can_be_read_twice_are_told(tmp_path):
    z = np.random.default_rng(0).normal(size=(6, 4))
    table = pd.DataFrame(z, columns=["c1", "c2", "c3", "c4"])
    (path := tmp_path/"x.csv").write_text(table.assign(label=[1, 2, 3, 1, 2, 3]).to_csv(index=False))
    with pytest.warns(UserWarning, match="label: 1 to 3 are read as numbers of the columns, c1 to c4"):
        assert load_outputs(path)[1].tolist() == [0, 1, 2, 0, 1, 2]
    path.write_text(table.assign(label=[1., 2., 3., 4., 2., 3.]).to_csv(index=False)) # 1.0, as beside a gap
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_outputs(path)[1].tolist() == [0, 1, 2, 3, 1, 2]
    path.write_text(table.assign(c2=0., label=[1, 2, 3, 4, 2, 3]).to_csv(index=False))
    assert load_outputs(path)[0].shape == (6, 4), "a class that is never likely is one"


@pytest.mark.parametrize("seed, n, c", [(32, 100, 10), (15, 500, 100), (0, 2000, 1000)])
def test_a_network_that_has_learned_nothing_is_evaluated(seed, n, c):
    "Near chance the least NLL lies far off, and with it each fold's"
    r = np.random.default_rng(seed)
    z, y = r.normal(size=(n, c)), r.integers(0, c, n)
    e = evaluate(z, y, metrics=["nll"], n_draws=2)
    assert math.isfinite(e.scaled["nll"].value) and e.scaled["nll"].value < e.raw["nll"].value


@pytest.mark.parametrize("seed", range(40))
def test_the_least_nll_is_found_from_any_start(seed):
    "Against SciPy's search, in problems near chance; wherever it starts"
    r = np.random.default_rng(seed)
    z, y = torch.tensor(r.normal(size=(60, 5))), torch.tensor(r.integers(0, 5, 60))
    at = lambda log_T: float(F.cross_entropy(z/math.exp(log_T), y))
    found = [posthoc._find_temperature(z, y, start) for start in (None, 1e-3, 1e3)]
    if found[0].note: return # no minimum
    best = scipy.optimize.minimize_scalar(at, bounds=(-8, 14), method="bounded", options=dict(xatol=1e-9))
    assert all(f.T == pytest.approx(found[0].T, rel=1e-6) for f in found)
    assert at(math.log(found[0].T)) <= best.fun + 1e-12


@pytest.mark.parametrize("cell, told", [
    ("", r"logit_1: got '' in row 1, expected a number in each row"),
    ("high", r"logit_1: got 'high' in row 1"),
])
@pytest.mark.parametrize("classes", [None, ["logit_0", "logit_1"]])
def test_the_cell_that_holds_no_number_is_named(tmp_path, cell, told, classes):
    (tmp_path/"x.csv").write_text(f"logit_0,logit_1,label\n1,2,0\n1,{cell},1\n")
    with pytest.raises(ValueError, match=told): load_outputs(tmp_path/"x.csv", classes=classes)


def test_a_table_with_an_index_of_several_levels_is_named(tmp_path):
    index = pd.MultiIndex.from_tuples([("a", 0), ("a", 1)])
    pd.DataFrame([[1., 0.], [0., 1.]], index=index, columns=["x_0", "x_1"]).to_parquet(tmp_path/"x.parquet")
    with pytest.raises(ValueError, match="x.parquet.*index: got one of 2 levels"):
        load_outputs(tmp_path/"x.parquet")
