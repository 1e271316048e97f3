"Data sets: real photographs, archives, the known truth, augmentation against a plain loop."

import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdc_nb.data as kd
from kdc_nb.data import Data, augment, cache_dir, channel_stats, draw_views, fetch_archive, known_split, load_data, photos


@pytest.fixture(autouse=True)
def forget():
    "Data sets are kept per process; each test has a cache folder of its own."
    load_data.cache_clear(); kd.photos.cache_clear()


def test_real_photographs(photos):
    "The official statistics of the training photographs, the split by seed, and the fingerprint of the content."
    d = load_data(Data("cifar100"))
    assert (len(d.train), len(d.valid), len(d.test), d.n_classes) == (45_000, 5000, 10_000, 100)
    assert d.mean == pytest.approx((0.5070751592371323, 0.48654887331495095, 0.4409178433670343), abs=1e-12)
    assert d.std == pytest.approx((0.2673342858792406, 0.2564384629170881, 0.27615047132568393), abs=1e-9)
    assert d.test.inputs[:10, 0, 0, 0].tolist() == [199, 113, 61, 93, 80, 168, 37, 175, 233, 182]
    assert [d.classes[c] for c in (10, 61, 96)] == ["bowl", "plate", "willow_tree"]
    small, other = load_data(Data("cifar100", n_train=5000)), load_data(Data("cifar100", n_train=5000, seed=1))
    assert torch.equal(small.train.inputs, d.train.inputs[:5000]) and torch.equal(small.valid.inputs, d.valid.inputs)
    assert len({d.fingerprint, small.fingerprint, other.fingerprint}) == 3


def test_superclasses_are_the_coarse_labels(photos):
    "Two fine classes share a super-class just where CIFAR-100's own coarse labels say so."
    with np.load(Path(os.environ["KDC_TEST_DATA"])/"cifar100-test.npz", allow_pickle=False) as z: coarse = dict(zip(z["fine"].tolist(), z["coarse"].tolist()))
    own = load_data(Data("cifar100")).superclass
    assert all((own[a] == own[b]) == (coarse[a] == coarse[b]) for a in range(100) for b in range(100))


def test_splits_share_no_photograph(photos):
    d = load_data(Data("cifar10", n_train=45_000))
    seen = {hashlib.md5(x.numpy().tobytes()).digest() for x in d.train.inputs}
    assert not any(hashlib.md5(x.numpy().tobytes()).digest() in seen for x in d.valid.inputs)


def tiny_archive(folder, monkeypatch):
    "An archive in the layout of CIFAR-10, with the checksums that torchvision will look for."
    import torchvision.datasets as sets
    rng, parts, sums = np.random.default_rng(0), {}, []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        parts[name] = pickle.dumps({"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 0, 1]})
    parts["batches.meta"] = pickle.dumps({"label_names": ["cat", "dog"]})
    (root := folder/"cifar-10-batches-py").mkdir(parents=True)
    for name, data in parts.items(): (root/name).write_bytes(data); sums.append([name, hashlib.md5(data).hexdigest()])
    with tarfile.open(path := folder/"cifar-10-python.tar.gz", "w:gz") as tar: tar.add(root, root.name)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(sets.CIFAR10, "train_list", sums[:5]); monkeypatch.setattr(sets.CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(sets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums[6][1]})
    monkeypatch.setattr(sets.CIFAR10, "tgz_md5", md5)
    monkeypatch.setitem(kd.ARCHIVES, "cifar10", ("CIFAR10", path.name, md5))
    return path


def test_an_archive_becomes_a_cache_file(tmp_path, monkeypatch):
    "Read once through torchvision, then from the cache file alone; nothing unpacked stays."
    folder = cache_dir()/"data"
    archive = tiny_archive(tmp_path/"made", monkeypatch)
    folder.mkdir(parents=True); (folder/archive.name).write_bytes(archive.read_bytes())
    first, names = photos("cifar10", folder)
    (folder/archive.name).unlink(); photos.cache_clear()
    again, _ = photos("cifar10", folder)
    assert first["train_inputs"].shape == (20, 3, 32, 32) and names == ["cat", "dog"]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert [p.name for p in folder.iterdir()] == ["cifar10.safetensors"]


def test_an_archive_is_not_read_before_its_md5_is_right(tmp_path, monkeypatch):
    archive = tiny_archive(tmp_path/"made", monkeypatch)
    archive.write_bytes(archive.read_bytes()[:-1])
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("a pickle was read"))
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz with MD5 .* has another MD5"): photos("cifar10", archive.parent)


def test_a_download_cut_short_leaves_nothing_that_looks_like_an_archive(tmp_path, monkeypatch):
    def cut(url, root, name, md5): Path(root, name).write_bytes(b"half"); raise KeyboardInterrupt
    monkeypatch.setattr("torchvision.datasets.utils.download_url", cut)
    with pytest.raises(KeyboardInterrupt): fetch_archive("cifar100", tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    def refuse(*args): raise OSError("no route to host")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
    with pytest.raises(ValueError, match="put cifar-100-python.tar.gz with MD5 eb9058c3a382ffc7106e4002c42a8d85 into .*no route to host"):
        fetch_archive("cifar100", tmp_path)


def test_the_known_posterior_is_calibrated():
    "Of 50,000 samples, those given a class with probability near p have it with frequency p, within sampling error."
    s = known_split(50_000, 0, 7)
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
    shift, flip = draw_views(3, ("crop", "flip"), pad, g)
    assert torch.equal(augment(x, shift, flip, pad), slow_augment(x, shift, flip, pad))


def test_known_images_are_never_augmented():
    assert load_data(Data("known", n_train=5, n_valid=5, n_test=5)).augment == ()


@pytest.mark.parametrize("make, said", [
    (lambda: Data("cifar10", n_train=50_000), "at most 50,000 together"),
    (lambda: Data("known", n_train=0), "n_train: got 0"),
    (lambda: Data("known", n_train=1.5), "n_train: got 1.5, expected a int"),
])
def test_bad_sizes_are_refused(make, said):
    with pytest.raises(ValueError, match=said): make().build()


def test_statistics_of_a_constant_image_do_not_divide_by_zero():
    stats = channel_stats(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8))
    assert stats["std"][0] > 0


def pictures(folder, sizes=((40, 30), (9, 9), (8, 20)), classes=("cat", "dog")):
    from PIL import Image
    rng = np.random.default_rng(0)
    for c in classes:
        (folder/c).mkdir(parents=True)
        for k, (w, h) in enumerate(sizes): Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder/c/f"{k}.png")


def test_a_folder_is_read_in_torchvisions_order_and_cut_to_squares(tmp_path):
    pictures(tmp_path/"a")
    inputs, labels, classes = kd.read_images(tmp_path/"a", 9)
    assert (inputs.shape, inputs.dtype, labels.tolist(), classes) == ((6, 3, 9, 9), torch.uint8, [0, 0, 0, 1, 1, 1], ("cat", "dog"))
    from PIL import Image
    assert torch.equal(inputs[1], torch.from_numpy(np.array(Image.open(tmp_path/"a"/"cat"/"1.png"))).permute(2, 0, 1)), "an image of the right size is left as it is"
    grey = Image.new("L", (50, 20), 77)
    grey.save(tmp_path/"a"/"cat"/"3.png")
    assert torch.equal(kd.read_images(tmp_path/"a", 9)[0][3], torch.full((3, 9, 9), 77, dtype=torch.uint8))


@pytest.mark.parametrize("fault, message", [
    (lambda f: None, r"folder: got .*none with 0 subfolders, expected two or more"), (lambda f: (f/"none").mkdir(), "with 0 subfolders"),
    (lambda f: pictures(f/"none", classes=("cat",)), "with 1 subfolder, expected two or more"),
    (lambda f: (pictures(f/"none"), (f/"none"/"dog"/"x.png").write_bytes(b"no picture")), r"dog/x.png, which cannot be read"),
    (lambda f: (pictures(f/"none"), (f/"none"/"bird").mkdir()), "bird")])
def test_a_bad_folder_is_told_in_a_sentence(tmp_path, fault, message):
    fault(tmp_path)
    with pytest.raises(ValueError, match=message): kd.read_images(tmp_path/"none")


@given(st.integers(3, 60), st.integers(1, 5), st.integers(0, 9))
def test_a_cut_keeps_every_image_once_and_every_classs_share(n, c, seed):
    labels = torch.arange(n*c) % c
    parts = kd.cut(torch.arange(n*c), labels, (.6, .2, .2), seed)
    assert sorted(torch.cat([x for x, _ in parts]).tolist()) == list(range(n*c)) and all(torch.equal(labels[x], y) for x, y in parts)
    for (x, y), share in zip(parts, (.6, .2, .2)): assert all(abs(int((y == k).sum()) - share*n) <= 1 for k in range(c))
    with pytest.raises(ValueError, match="parts: got"): kd.cut(torch.arange(n*c), labels, (.6, .3))


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("KDC_CACHE", str(tmp_path/"cache"))
    x = torch.randint(0, 256, (12, 3, 8, 9), dtype=torch.uint8)
    return x, torch.arange(12) % 3


def test_given_images_come_back_and_are_found_by_another_process(own):
    x, y = own
    data = kd.give_images("mine", (x, y), (x[:6].numpy(), y[:6].numpy()), (x.permute(0, 2, 3, 1), y), ["a", "b", "c"], ["flip"])
    d = load_data(data)
    assert torch.equal(d.train.inputs, x) and torch.equal(d.test.inputs, x) and torch.equal(d.valid.labels, y[:6])
    assert (d.classes, d.augment, d.in_channels, data.title) == (("a", "b", "c"), ("flip",), 3, "mine") and d.mean == pytest.approx((x/255.).mean((0, 2, 3)).tolist(), abs=1e-6)
    code = f"from kdc_nb.data import *; print(load_data(Data('given', title='mine', fingerprint={data.fingerprint!r})).fingerprint)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == d.fingerprint
    assert kd.give_images("mine", (x, y), (x[:6], y[:6]), (x, y), ["a", "b", "c"], ["flip"]) == data, "the same content is the same data set"
    assert kd.give_images("mine", (x, y.flip(0)), (x[:6], y[:6]), (x, y), ["a", "b", "c"], ["flip"]) != data


@pytest.mark.parametrize("change, message", [
    (lambda x, y: dict(train=(x.float(), y)), "train: got inputs of torch.float32"), (lambda x, y: dict(test=(x[:, :2], y)), "test: got 2 channels, expected 1 or 3"),
    (lambda x, y: dict(valid=(x, y[:5])), r"valid: got labels of torch.int64 and shape \(5,\), expected 12 whole numbers"),
    (lambda x, y: dict(valid=(x, y.float())), "valid: got labels of torch.float32"), (lambda x, y: dict(train=(x, y - 1)), "train: got labels"),
    (lambda x, y: dict(test=(x[:, :, :, :8], y)), "train, valid, test: got images of shapes"), (lambda x, y: dict(classes=["a", "b"]), "classes: got 2 of them"),
    (lambda x, y: dict(train=(x[y != 1], y[y != 1])), "train: got classes without an image"), (lambda x, y: dict(augment=["spin"]), "augment: got"),
    (lambda x, y: dict(train=(x[:0], y[:0])), "train: got inputs")])
def test_images_that_are_none_are_refused(own, change, message):
    x, y = own
    with pytest.raises(ValueError, match=message): kd.give_images("mine", **{k: (x, y) for k in ("train", "valid", "test")} | change(x, y))
    assert not cache_dir().exists(), "nothing is half-written"


def test_given_images_that_are_elsewhere_are_named(own):
    for fingerprint, message in (("0"*16, "data: got mine, of which"), ("../../etc/passwd", "fingerprint: got")):
        with pytest.raises(ValueError, match=message): load_data(Data("given", title="mine", fingerprint=fingerprint))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "The layout of the official archive, in small"
    from PIL import Image
    monkeypatch.setenv("KDC_CACHE", str(tmp_path/"cache"))
    rng, root, ids = np.random.default_rng(0), tmp_path/"tiny-imagenet-200", ["n02", "n01", "n03"]
    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, quality=95)
    for c in ids:
        for k in range(10): write(root/"train"/c/"images"/f"{c}_{k}.JPEG")
        (root/"train"/c/f"{c}_boxes.txt").write_text("")
    for k in range(4): write(root/"val"/"images"/f"val_{k}.JPEG")
    (root/"wnids.txt").write_text("\n".join(ids) + "\n")
    (root/"val"/"val_annotations.txt").write_text("".join(f"val_{k}.JPEG\t{c}\t0\t0\t62\t57\n" for k, c in enumerate(["n03", "n01", "n01", "n02"])))
    return root


def test_tiny_imagenet_is_read_in_its_official_layout(tiny):
    from PIL import Image
    d = load_data(kd.tiny_imagenet(tiny))
    assert (d.classes, len(d.train), len(d.valid), d.test.labels.tolist(), d.test.inputs.shape) == (("n01", "n02", "n03"), 27, 3, [2, 0, 0, 1], (4, 3, 64, 64))
    assert torch.equal(d.test.inputs[2], torch.from_numpy(np.array(Image.open(tiny/"val"/"images"/"val_2.JPEG"))).permute(2, 0, 1))
    assert torch.bincount(d.train.labels).tolist() == [9, 9, 9] and d.augment == ("crop", "flip")


@pytest.mark.parametrize("fault, message", [
    (lambda r: (r/"wnids.txt").unlink(), "without wnids.txt, expected the official archive"), (lambda r: (r/"val/images/val_1.JPEG").unlink(), "val_annotations.txt with .*val_1.JPEG"),
    (lambda r: (r/"wnids.txt").write_text("n01\nn02\n"), "val_annotations.txt with .*n03"), (lambda r: (r/"val/val_annotations.txt").write_text(""), "val_annotations.txt with nothing"),
    (lambda r: (r/"wnids.txt").write_text("n01\nn02\nn03\nn04\n"), "classes: got n04, expected subfolders of"),
    (lambda r: (r/"train/n01/images/n01_3.JPEG").write_bytes(b"x"), "n01_3.JPEG, which cannot be read")])
def test_a_damaged_tiny_imagenet_is_named(tiny, fault, message):
    fault(tiny)
    with pytest.raises(ValueError, match=message): kd.tiny_imagenet(tiny)
