"Data sets: real images, archives, the known truth, augmentation against a plain loop."

import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdc_nb.training.cifar as cifar_room
from kdc_nb.files import cache_dir
from kdc_nb.training.cifar import _fetch_cifar_archive, _load_cifar
from kdc_nb.training.data import DataSpec, _shift_and_flip, channel_stats, draw_shifts_and_flips, load_data
from kdc_nb.training.own_data import stratified_split
from kdc_nb.training.synthetic import _draw_synthetic_split
from tests.conftest import forget_data


@pytest.fixture(autouse=True)
def forget():
    "Data sets are kept per process; each test has a cache folder of its own."
    forget_data(); cifar_room._load_cifar.cache_clear()


def test_real_photographs(photos):
    "The official statistics of the training images, the split by seed, and the fingerprint of the content."
    d = load_data(DataSpec("cifar100"))
    assert (len(d.train), len(d.valid), len(d.test), d.n_classes) == (45_000, 5000, 10_000, 100)
    assert d.mean == pytest.approx((0.5070751592371323, 0.48654887331495095, 0.4409178433670343), abs=1e-12)
    assert d.std == pytest.approx((0.2673342858792406, 0.2564384629170881, 0.27615047132568393), abs=1e-9)
    assert d.test.inputs[:10, 0, 0, 0].tolist() == [199, 113, 61, 93, 80, 168, 37, 175, 233, 182]
    assert [d.classes[c] for c in (10, 61, 96)] == ["bowl", "plate", "willow_tree"]
    small, other = (load_data(DataSpec("cifar100", n_train=5000)),
                    load_data(DataSpec("cifar100", n_train=5000, seed=1)))
    assert (torch.equal(small.train.inputs, d.train.inputs[:5000])
            and torch.equal(small.valid.inputs, d.valid.inputs))
    assert len({d.fingerprint, small.fingerprint, other.fingerprint}) == 3


def test_superclasses_are_the_coarse_labels(photos):
    "Two fine classes share a super-class just where CIFAR-100's own coarse labels say so."
    with np.load(Path(os.environ["KDC_TEST_DATA"])/"cifar100-test.npz", allow_pickle=False) as z:
        coarse = dict(zip(z["fine"].tolist(), z["coarse"].tolist()))
    own = load_data(DataSpec("cifar100")).superclass
    assert all((own[a] == own[b]) == (coarse[a] == coarse[b]) for a in range(100) for b in range(100))


def test_splits_share_no_photograph(photos):
    d = load_data(DataSpec("cifar10", n_train=45_000))
    seen = {hashlib.md5(x.numpy().tobytes()).digest() for x in d.train.inputs}
    assert not any(hashlib.md5(x.numpy().tobytes()).digest() in seen for x in d.valid.inputs)


def tiny_archive(folder, monkeypatch):
    "An archive in the layout of CIFAR-10, with the checksums that torchvision will look for."
    import torchvision.datasets as sets
    rng, parts, sums = np.random.default_rng(0), {}, []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        parts[name] = pickle.dumps({"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
                                    "labels": [0, 1, 0, 1]})
    parts["batches.meta"] = pickle.dumps({"label_names": ["cat", "dog"]})
    (root := folder/"cifar-10-batches-py").mkdir(parents=True)
    for name, data in parts.items():
        (root/name).write_bytes(data)
        sums.append([name, hashlib.md5(data).hexdigest()])
    with tarfile.open(path := folder/"cifar-10-python.tar.gz", "w:gz") as tar: tar.add(root, root.name)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(sets.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(sets.CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(sets.CIFAR10, "meta",
                        {"filename": "batches.meta", "key": "label_names", "md5": sums[6][1]})
    monkeypatch.setattr(sets.CIFAR10, "tgz_md5", md5)
    monkeypatch.setitem(cifar_room._CIFAR_ARCHIVES, "cifar10", ("CIFAR10", path.name, md5))
    return path


def test_an_archive_becomes_a_cache_file(tmp_path, monkeypatch):
    "Read once through torchvision, then from the cache file alone; nothing unpacked stays."
    folder = cache_dir()/"data"
    archive = tiny_archive(tmp_path/"made", monkeypatch)
    folder.mkdir(parents=True); (folder/archive.name).write_bytes(archive.read_bytes())
    first, names = _load_cifar("cifar10", folder)
    (folder/archive.name).unlink(); _load_cifar.cache_clear()
    again, _ = _load_cifar("cifar10", folder)
    assert first["train_inputs"].shape == (20, 3, 32, 32) and names == ["cat", "dog"]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert [p.name for p in folder.iterdir()] == ["cifar10.safetensors"]


def test_an_archive_is_not_read_before_its_md5_is_right(tmp_path, monkeypatch):
    archive = tiny_archive(tmp_path/"made", monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-1])
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz with MD5 .* has another MD5"):
        _load_cifar("cifar10", archive.parent)


def test_a_download_cut_short_leaves_nothing_that_looks_like_an_archive(tmp_path, monkeypatch):
    def cut(url, root, name, md5): Path(root, name).write_bytes(b"half"); raise KeyboardInterrupt
    monkeypatch.setattr("torchvision.datasets.utils.download_url", cut)
    with pytest.raises(KeyboardInterrupt): _fetch_cifar_archive("cifar100", tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    def refuse(*args): raise OSError("no route to host")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    with pytest.raises(
        ValueError,
        match="put cifar-100-python.tar.gz with MD5 eb9058c3a382ffc7106e4002c42a8d85 into .*no route to host"
    ):
        _fetch_cifar_archive("cifar100", tmp_path)


def test_the_known_posterior_is_calibrated():
    """Of 50,000 samples, those given a class with probability near p have it with frequency
    p, within sampling error.
    """
    s = _draw_synthetic_split(50_000, 0, 7)
    hit = torch.nn.functional.one_hot(s.labels, 20).flatten().double()
    p = s.posterior.flatten().double()
    for low in np.arange(.05, .95, .1):
        inside = (p > low) & (p <= low + .1)
        error = (hit[inside].mean() - p[inside].mean()).abs()
        assert error < 4*(p[inside]*(1 - p[inside])).sum().sqrt()/inside.sum(), f"near {low:.2f}"


def slow_augment(x, shift, flip, pad):
    "One image and one pixel at a time."
    out = torch.zeros_like(x)
    b, c, h, w = x.shape
    for n in range(b):
        for i in range(h):
            for j in range(w):
                a, k = i - int(shift[n, 0]), (w - 1 - j if flip[n] else j) - int(shift[n, 1])
                if 0 <= a < h and 0 <= k < w: out[n, :, i, j] = x[n, :, a, k]
    return out


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 2))
def test_augmentation_equals_a_plain_loop(seed, pad):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, 2, 5, 6), generator=g, dtype=torch.uint8)
    shift, flip = draw_shifts_and_flips(3, ("crop", "flip"), pad, g)
    assert torch.equal(_shift_and_flip(x, shift, flip, pad), slow_augment(x, shift, flip, pad))


def test_known_images_are_never_augmented():
    assert load_data(DataSpec("known", n_train=5, n_valid=5, n_test=5)).augment == ()


@pytest.mark.parametrize("make, said", [
    (lambda: DataSpec("cifar10", n_train=50_000), "at most 50,000 together"),
    (lambda: DataSpec("known", n_train=0), "n_train: got 0"),
    (lambda: DataSpec("known", n_train=1.5), "n_train: got 1.5, expected an integer"),
])
def test_bad_sizes_are_refused(make, said):
    with pytest.raises(ValueError, match=said): make().build()


def test_statistics_of_a_constant_image_do_not_divide_by_zero():
    stats = channel_stats(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8))
    assert stats["std"][0] > 0


@given(st.integers(3, 60), st.integers(1, 5), st.integers(0, 9))
def test_a_cut_keeps_every_image_once_and_every_classs_share(n, c, seed):
    labels = torch.arange(n*c) % c
    parts = stratified_split(torch.arange(n*c), labels, (.6, .2, .2), seed)
    assert (sorted(torch.cat([x for x, _ in parts]).tolist()) == list(range(n*c))
            and all(torch.equal(labels[x], y) for x, y in parts))
    for (x, y), share in zip(parts, (.6, .2, .2)):
        assert all(abs(int((y == k).sum()) - share*n) <= 1 for k in range(c))
    with pytest.raises(ValueError, match="fractions: got"):
        stratified_split(torch.arange(n*c), labels, (.6, .3))


def test_data_are_the_same_on_every_machine():
    "The fingerprint is in the id of every run: no sum in it may depend on the processor"
    assert load_data(DataSpec("known", n_train=200, n_valid=50, n_test=50)).fingerprint == "49f3e555c9d2757d"
    assert load_data(DataSpec("digits")).fingerprint == "13de87f1cfe28aa1"
    x = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8).view(1, 1, 2, 2)
    mean, square = 258/4/255, (1 + 4 + 255**2)/4/255**2
    assert channel_stats(x) == {"mean": (mean,), "std": (pytest.approx((square - mean**2)**.5, rel=1e-15),)}
