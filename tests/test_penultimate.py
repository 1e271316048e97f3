"Penultimate features: geometry against plain loops and known truth, looks that survive the disk."
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdc_nb.files import DamagedFile
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.trainer import Trainer
from kdc_nb.experiments.specs import RunSpec
from kdc_nb.experiments.store import Store
from kdc_nb.analysis.geometry import (
    _centroid_distances, _distance_ratio, _one_hot_float, _summarise_merging, distances_and_overlaps,
    measure_class_merging, similar_classes, triples_with_similar_pair,
)
from kdc_nb.analysis.projections import _class_space_basis
from kdc_nb.analysis.views import (
    _first_per_class, confused_pair_and_distant_class, extract_features, load_feature_images,
    read_features, write_features,
)

SIMILAR = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
CENTRES = torch.tensor([[0., 0, 0], [2, 0, 0], [0, 5, 0], [0, 5, 3]])


def clouds(n, seed=0):
    "n points about each of four centres, two and two alike"
    y = torch.arange(4).repeat_interleave(n)
    return CENTRES[y] + torch.randn(4*n, 3, generator=torch.Generator().manual_seed(seed)), y


def slow_geometry(x, y, n_classes):
    "The same by loops over images and classes, each image left out of its own centroid"
    distance, overlap = np.zeros((n_classes, n_classes)), np.zeros((n_classes, n_classes))
    for a in range(n_classes):
        for b in range(n_classes):
            if a == b: continue
            own, other = x[y == a], x[y == b]
            noise = own.var(0, ddof=1).sum()/len(own) + other.var(0, ddof=1).sum()/len(other)
            distance[a, b] = max(0, ((own.mean(0) - other.mean(0))**2).sum() - noise)**.5
            wrong = 0
            for one, two in ((own, other), (other, own)):
                for i in range(len(one)):
                    rest = np.delete(one, i, 0).mean(0)
                    wrong += ((one[i] - two.mean(0))**2).sum() < ((one[i] - rest)**2).sum()
            overlap[a, b] = wrong/(len(own) + len(other))
    return distance, overlap


@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(2, 9), min_size=2, max_size=4))
def test_geometry_is_what_loops_give(seed, sizes):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.normal(size=(len(y), 4)) + y[:, None]
    found = distances_and_overlaps(torch.tensor(x), torch.tensor(y))
    for ours, slow in zip(found, slow_geometry(x, y, len(sizes))):
        np.testing.assert_allclose(ours.numpy(), slow, atol=1e-9)


@given(seed=st.integers(0, 10_000), scale=st.floats(.01, 100), shift=st.floats(-10, 10))
def test_stretching_turning_and_shifting_changes_no_ratio(seed, scale, shift):
    x, y = clouds(15, seed)
    x = x.double()
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed),
                                          dtype=torch.float64))
    before, after = (_summarise_merging(*distances_and_overlaps(f, y), SIMILAR)
                     for f in (x, scale*(x + shift)@turn))
    assert torch.allclose(before, after, rtol=1e-6)


def test_distances_of_a_drawn_sample_are_corrected_twice():
    "Images drawn twice stand for two: sizes, centroids and spread are those of the repeated sample."
    x, y = clouds(30)
    x = x.double()
    drawn = torch.from_numpy(np.random.default_rng(0).multinomial(120, np.full(120, 1/120)))
    i = torch.arange(120).repeat_interleave(drawn)
    centroid = torch.stack([x[i][y[i] == c].mean(0) for c in range(4)])
    noise = torch.stack([x[i][y[i] == c].var(0).sum()/(y[i] == c).sum() for c in range(4)])
    expected = ((torch.cdist(centroid, centroid).square() - 2*(noise + noise[:, None])).clamp(min=0)
                .sqrt().fill_diagonal_(0))
    assert torch.allclose(_centroid_distances(x, _one_hot_float(y, x)*drawn[:, None], samples=2), expected)


def test_classes_that_are_one_overlap_by_half():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(2).repeat_interleave(40)
    overlaps = [distances_and_overlaps(torch.randn(80, 20, generator=g), y)[1][0, 1] for _ in range(400)]
    assert float(torch.stack(overlaps).mean()) == pytest.approx(.5, abs=.01)


def test_intervals_hold_the_truth():
    "The ratio of clouds whose centres are known lies in 95% of the intervals."
    true = float(_distance_ratio(torch.cdist(CENTRES, CENTRES), triples_with_similar_pair(SIMILAR)))
    found = [measure_class_merging(*clouds(40, seed), SIMILAR, n_boot=100, seed=seed)["ratio"]
             for seed in range(100)]
    assert sum(e.low <= true <= e.high for e in found) >= 88
    assert np.mean([e.value for e in found]) == pytest.approx(true, rel=.02)


def test_an_interval_holds_its_own_estimate_with_many_features_too():
    for seed in range(10):
        x, y = clouds(60, seed)
        wide = torch.cat([x, torch.randn(240, 60, generator=torch.Generator().manual_seed(seed))], 1)
        found = measure_class_merging(wide, y, SIMILAR, n_boot=100)
        assert all(e.low <= e.value <= e.high for e in found.values())


def test_classes_that_are_one_give_numbers():
    "Centroids that cannot be told apart are at distance 0, and no ratio explodes."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat_interleave(5)
    found = measure_class_merging(torch.randn(20, 64, generator=g), y, SIMILAR, n_boot=50)
    assert all(0 <= v < 10 for e in found.values() for v in (e.value, e.low, e.high))
    assert _distance_ratio(torch.zeros(4, 4), triples_with_similar_pair(SIMILAR)) == 1


@pytest.mark.parametrize("spoil, message", [
    (lambda x, y, s: (x.index_fill(0, torch.tensor([0]), float("nan")), y, s), "features: got NaN"),
    (lambda x, y, s: (x[:-3], y[:-3], s), "labels: got a class with fewer than two images"),
    (lambda x, y, s: (x, y, s | True), "similar_mask: got a matrix without a triple"),
    (lambda x, y, s: (x, y, s[:3, :3]), "similar_mask: got a matrix without a triple"),
])
def test_what_cannot_be_measured_is_told(spoil, message):
    with pytest.raises(ValueError, match=message):
        measure_class_merging(*spoil(*clouds(4), SIMILAR), n_boot=2)


def test_half_precision_and_small_labels_will_do():
    x, y = clouds(20)
    assert torch.allclose(distances_and_overlaps(x.half(), y.int())[0],
                          distances_and_overlaps(x.half().double(), y)[0].float(), atol=1e-4)


def test_a_plane_of_dependent_rows_is_refused():
    head = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    head[2] = head[0] + head[1]
    with pytest.raises(ValueError, match="head: got rows that lie in one plane"):
        _class_space_basis(head, (0, 1, 2))
    with pytest.raises(ValueError, match="classes: got .* from 0 to 3"): _class_space_basis(head, (0, 1, 4))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    "A store with one small run, and looks at it and at one of digits"
    store = Store(tmp_path_factory.mktemp("looks"))
    specs = [RunSpec(d, "resnet8", "nll", Recipe(1, 32))
             for d in (DataSpec("known", n_train=100, n_valid=60, n_test=400),
                       DataSpec("digits", n_train=100))]
    return store, [extract_features(s, store, "cpu", per_class=3) for s in specs]


def test_a_look_keeps_what_its_pictures_need(seen):
    store, (known, digits) = seen
    data = load_data(known.result.spec.data)
    assert (known.classes == data.classes and known.superclass == data.superclass
            and digits.superclass is digits.merging is None)
    assert (torch.equal(data.test.labels[known.feature_index["test"]], known.feature_labels["test"])
            and known.feature_labels["test"].bincount().tolist() == [3]*20)
    assert (float((known.pred == known.labels).float().mean())
            == pytest.approx(known.result.evaluation.raw["top1"].value))
    assert float(known.confidence.mean()) == pytest.approx(known.result.raw.confidence, abs=1e-6)
    with pytest.raises(ValueError, match="data: got one without super-classes"): similar_classes(digits)


def test_a_look_trains_nothing_that_is_stored(seen, monkeypatch):
    store, (known, _) = seen
    monkeypatch.setattr(Trainer, "train_epoch", lambda trainer: pytest.fail("trained again"))
    again = extract_features(known.result.spec, store, "cpu", per_class=3)
    assert torch.equal(again.features["train"], known.features["train"]) and again.merging == known.merging


def test_looks_survive_the_disk(seen, tmp_path):
    _, (known, digits) = seen
    for one in (known, digits):
        write_features([one], tmp_path/"looks.npz")
        back = read_features(tmp_path/"looks.npz")[one.result.spec]
        for k in ("labels", "pred"): assert torch.equal(getattr(back, k), getattr(one, k))
        for k in ("confidence", "head_weights", "centroid_distances", "class_overlaps"):
            assert torch.allclose(getattr(back, k), getattr(one, k), atol=1e-3, rtol=1e-3)
        for k in ("train", "test"):
            assert (torch.equal(back.feature_index[k], one.feature_index[k])
                    and torch.allclose(back.features[k], one.features[k], atol=1e-3, rtol=1e-3))
        assert (back.classes == one.classes and back.superclass == one.superclass
                and (back.merging is None) == (one.merging is None))
    with pytest.raises(ValueError, match="views: got 2 data sets"):
        write_features([known, digits], tmp_path/"both.npz")
    assert not (tmp_path/"both.npz").exists()


def test_a_damaged_file_of_looks_is_named(seen, tmp_path):
    _, (known, _) = seen
    write_features([known], path := tmp_path/"looks.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match="looks.npz: damaged"): read_features(path)


def test_looks_at_different_images_are_not_mixed(seen, tmp_path):
    store, (known, _) = seen
    with pytest.raises(ValueError, match="views: got features of different images"):
        write_features([known, extract_features(known.result.spec, store, "cpu", per_class=2)],
                       tmp_path/"two.npz")


def test_where_an_explorer_begins(seen):
    _, (known, digits) = seen
    a, b, c = confused_pair_and_distant_class(known)
    assert known.superclass[a] == known.superclass[b] != known.superclass[c]
    assert known.class_overlaps[a, b] == known.class_overlaps[similar_classes(known)].max()
    assert confused_pair_and_distant_class(digits) == (0, 1, 2)
    data = load_data(known.result.spec.data)
    assert torch.equal(load_feature_images(known, (c, a), "train")[:3],
                       data.train.inputs[known.feature_index["train"][known.feature_labels["train"] == c]])


def test_first_of_each_takes_what_there_is():
    assert _first_per_class(torch.tensor([1, 0, 1, 1, 0]), 2).tolist() == [1, 4, 0, 2]
    assert _first_per_class(torch.tensor([1, 0, 1, 1]), 2).tolist() == [1, 0, 2]


def test_a_class_without_test_images_is_named(tmp_path):
    from kdc_nb.training.images import register_images
    x, y = torch.zeros(12, 1, 8, 8, dtype=torch.uint8), torch.arange(12) % 3
    data = register_images("few", (x, y), (x, y), (x[:8], y[:8] % 2))
    with pytest.raises(ValueError,
                       match="test: got a class with fewer than two samples, expected two or more of each"):
        extract_features(RunSpec(data, "resnet8"), Store(tmp_path), "cpu")
