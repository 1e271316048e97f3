"Images of one's own: arrays, folders, Tiny-ImageNet's layout, and what is read from disk."

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import kdc_nb.training.images as ki
from kdc_nb.files import cache_dir, load_tensors
from kdc_nb.training.data import DataSpec, LeaveFoldOut, load_data
from kdc_nb.training.methods import TrainingMethod
from kdc_nb.training.models import MODELS
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.trainer import Trainer, fit
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import Distil, RunSpec
from kdc_nb.experiments.store import Store, build_net
from kdc_nb.experiments.sweeps import sweep
from kdc_nb.experiments.teachers import teacher_from_logits
from kdc_nb.training import streams
from tests.conftest import forget_data


@pytest.fixture(autouse=True)
def forget():
    forget_data()


PHOTOGRAPHS = load_sample_images().images # two, 427 x 640


def save(path, rng, w, h):
    "A piece of a real photograph as a file"
    photo = PHOTOGRAPHS[rng.integers(2)]
    top, left = rng.integers(427 - h), rng.integers(640 - w)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo[top:top + h, left:left + w]).save(path, quality=95)


def pictures(folder, sizes=((40, 30), (9, 9), (8, 20)), classes=("cat", "dog")):
    rng = np.random.default_rng(0)
    for c in classes:
        for k, (w, h) in enumerate(sizes): save(folder/c/f"{k}.png", rng, w, h)


def test_a_folder_is_read_in_torchvisions_order_and_cut_to_squares(tmp_path):
    pictures(tmp_path/"a")
    inputs, labels, classes = ki.read_images(tmp_path/"a", 9)
    assert ((inputs.shape, inputs.dtype, labels.tolist(), classes)
            == ((6, 3, 9, 9), torch.uint8, [0, 0, 0, 1, 1, 1], ("cat", "dog")))
    assert torch.equal(
        inputs[1], torch.from_numpy(np.array(Image.open(tmp_path/"a"/"cat"/"1.png"))).permute(2, 0, 1)
    ), "an image of the right size is left as it is"
    grey = Image.new("L", (50, 20), 77)
    grey.save(tmp_path/"a"/"cat"/"3.png")
    assert torch.equal(ki.read_images(tmp_path/"a", 9)[0][3], torch.full((3, 9, 9), 77, dtype=torch.uint8))


@pytest.mark.parametrize("fault, message", [
    (lambda f: None, r"folder: got .*none with 0 subfolders, expected two or more"),
    (lambda f: (f/"none").mkdir(), "with 0 subfolders"),
    (lambda f: pictures(f/"none", classes=("cat",)), "with 1 subfolder, expected two or more"),
    (lambda f: (pictures(f/"none"), (f/"none"/"dog"/"x.png").write_bytes(b"no picture")),
     r"dog/x.png, which cannot be read"),
    (lambda f: (pictures(f/"none"), (f/"none"/"bird").mkdir()), "bird")])
def test_a_bad_folder_is_told_in_a_sentence(tmp_path, fault, message):
    fault(tmp_path)
    with pytest.raises(ValueError, match=message): ki.read_images(tmp_path/"none")


@pytest.fixture
def own():
    x = torch.randint(0, 256, (12, 3, 8, 9), dtype=torch.uint8)
    return x, torch.arange(12) % 3


def test_given_images_come_back_and_are_found_by_another_process(own):
    x, y = own
    data = ki.register_images("mine", (x, y), (x[:6].numpy(), y[:6].numpy()),
                              (x.permute(0, 2, 3, 1), y), ["a", "b", "c"], ["flip"])
    d = load_data(data)
    assert (torch.equal(d.train.inputs, x) and torch.equal(d.test.inputs, x)
            and torch.equal(d.valid.labels, y[:6]))
    assert ((d.classes, d.augment, d.in_channels, data.title) == (("a", "b", "c"), ("flip",), 3, "mine")
            and d.mean == pytest.approx((x/255.).mean((0, 2, 3)).tolist(), abs=1e-6))
    code = ("from kdc_nb.training.data import *; print(load_data(DataSpec('given', title='mine', "
            f"fingerprint={data.fingerprint!r})).fingerprint)")
    assert (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            .stdout.strip() == d.fingerprint)
    assert ki.register_images("mine", (x, y), (x[:6], y[:6]), (x, y), ["a", "b", "c"],
                              ["flip"]) == data, "the same content is the same data set"
    assert (ki.register_images("mine", (x, y.flip(0)), (x[:6], y[:6]), (x, y), ["a", "b", "c"], ["flip"])
            != data)


@pytest.mark.parametrize("change, message", [
    (lambda x, y: dict(train=(x.float(), y)), "train, valid, test: got float32 and uint8, expected one type"),
    (lambda x, y: dict(train=(x.int(), y)), "train: got inputs of torch.int32"),
    (lambda x, y: dict(train=(x > 9, y)), "train: got inputs of torch.bool"),
    (lambda x, y: dict(train=x), "train: got a Tensor, expected inputs and labels"),
    (lambda x, y: dict(train=(x[0], y)),
     r"train: got labels of int64 and shape \(12,\), expected 3 integers"),
    (lambda x, y: dict(train=(object(), y)), "train: got a object that is no array"),
    (lambda x, y: dict(train=([[1, 2], [3]], y)), "train: got a list that is no array"),
    (lambda x, y: dict(train=("cats and dogs", y)), "train: got a str that is no array"),
    (lambda x, y: dict(test=(x[:, :2], y)), "test: got inputs of shape .*, expected 1 or 3 channels"),
    (lambda x, y: dict(valid=(x, y[:5])),
     r"valid: got labels of int64 and shape \(5,\), expected 12 integers"),
    (lambda x, y: dict(valid=(x, y.float())), "valid: got labels of float32"),
    (lambda x, y: dict(train=(x, y - 1)), "train: got labels"),
    (lambda x, y: dict(test=(x[:, :, :, :8], y)), "train, valid, test: got images of shapes"),
    (lambda x, y: dict(classes=["a", "b"]), "classes: got 2 of them"),
    (lambda x, y: dict(train=(x[y != 1], y[y != 1])),
     "train: got nothing of 1, expected samples of every class"),
    (lambda x, y: dict(augment=["spin"]), "augment: got"),
    (lambda x, y: dict(train=(x[:0], y[:0])), "train: got inputs")])
def test_images_that_are_none_are_refused(own, change, message):
    x, y = own
    with pytest.raises(ValueError, match=message):
        ki.register_images("mine", **{k: (x, y) for k in ("train", "valid", "test")} | change(x, y))
    assert not cache_dir().exists(), "nothing is half-written"


def test_given_images_that_are_elsewhere_are_named(own):
    for fingerprint, message in (("0"*16, "data: got mine, of which"),
                                 ("../../etc/passwd", "fingerprint: got")):
        with pytest.raises(ValueError, match=message):
            load_data(DataSpec("given", title="mine", fingerprint=fingerprint))


@pytest.fixture
def tiny(tmp_path):
    "The layout of the official archive, in small"
    rng, root, ids = np.random.default_rng(0), tmp_path/"tiny-imagenet-200", ["n02", "n01", "n03"]
    def write(path): save(path, rng, 64, 64)
    for c in ids:
        for k in range(10): write(root/"train"/c/"images"/f"{c}_{k}.JPEG")
        (root/"train"/c/f"{c}_boxes.txt").write_text("")
    for k in range(4): write(root/"val"/"images"/f"val_{k}.JPEG")
    (root/"wnids.txt").write_text("\n".join(ids) + "\n")
    (root/"val"/"val_annotations.txt").write_text("".join(
        f"val_{k}.JPEG\t{c}\t0\t0\t62\t57\n" for k, c in enumerate(["n03", "n01", "n01", "n02"])
    ))
    return root


def test_tiny_imagenet_is_read_in_its_official_layout(tiny):
    d = load_data(streams.register_tiny_imagenet(tiny))
    assert ((d.classes, len(d.train), len(d.valid), d.test.labels.tolist(), d.test.inputs.shape)
            == (("n01", "n02", "n03"), 27, 3, [2, 0, 0, 1], (4, 3, 64, 64)))
    assert torch.equal(d.test.inputs[2], torch.from_numpy(
        np.array(Image.open(tiny/"val"/"images"/"val_2.JPEG"))
    ).permute(2, 0, 1))
    assert torch.bincount(d.train.labels).tolist() == [9, 9, 9] and d.augment == ("crop", "flip")


@pytest.mark.parametrize("fault, message", [
    (lambda r: (r/"wnids.txt").unlink(), "without wnids.txt, expected the official archive"),
    (lambda r: (r/"val/images/val_1.JPEG").unlink(), "val_annotations.txt with .*val_1.JPEG"),
    (lambda r: (r/"wnids.txt").write_text("n01\nn02\n"), "val_annotations.txt with .*n03"),
    (lambda r: (r/"val/val_annotations.txt").write_text(""), "val_annotations.txt with nothing"),
    (lambda r: (r/"wnids.txt").write_text("n01\nn02\nn03\nn04\n"),
     "classes: got n04, expected subfolders of"),
    (lambda r: (r/"train/n01/images/n01_3.JPEG").write_bytes(b"x"), "n01_3.JPEG, which cannot be read")])
def test_a_damaged_tiny_imagenet_is_named(tiny, fault, message):
    fault(tiny)
    with pytest.raises(ValueError, match=message): streams.register_tiny_imagenet(tiny)


@pytest.fixture
def imagenet(tmp_path):
    "ImageNet's layout, in small: images of many sizes"
    rng, root = np.random.default_rng(1), tmp_path/"imagenet"
    for part, n in (("train", 10), ("val", 3)):
        for c in ("n03", "n01", "n02"):
            for k in range(n): save(root/part/c/f"{c}_{k}.JPEG", rng, *rng.integers(20, 90, 2))
    (tmp_path/"list.txt").write_text("n03\nn01\n")
    return root


def test_imagenet_100_is_a_folder_and_a_list_of_classes(imagenet):
    data = streams.register_imagenet100(imagenet, imagenet.parent/"list.txt", size=32)
    d = load_data(data)
    assert ((data.title, d.classes, len(d.train), len(d.valid), len(d.test), d.in_channels)
            == ("imagenet-2", ("n01", "n03"), 18, 2, 6, 3))
    assert (d.train.inputs.shape == (18, 3, 32, 32)
            and set(d.train.inputs.names.tolist()).isdisjoint(d.valid.inputs.names.tolist()))
    assert all(d.classes[y] in n for s in (d.train, d.valid, d.test)
               for n, y in zip(s.inputs.names, s.labels))
    assert (streams.register_imagenet100(imagenet, ["n01", "n03"], 32) == data
            and streams.register_imagenet100(imagenet, ["n01", "n02"], 32) != data)
    kept = load_data(streams.register_imagenet100(imagenet, ["n03", "n01"], 32, in_memory=True))
    assert (torch.equal(kept.valid.inputs, d.valid.inputs.to("cpu"))
            and torch.equal(kept.train.labels, d.train.labels)
            and (kept.classes, kept.augment) == (d.classes, d.augment))
    moved = shutil.move(imagenet, imagenet.parent/"elsewhere")
    forget_data()
    with pytest.raises(ValueError,
                       match="data: got imagenet-2, whose .*JPEG is gone, expected the files that"):
        load_data(data)
    assert streams.register_imagenet100(moved, ["n01", "n03"], 32) == data, (
        "the same files elsewhere are the same data set"
    )


def test_what_is_only_looked_at_is_scaled_and_cut_to_the_middle(imagenet):
    files = load_data(streams.register_imagenet100(imagenet, ["n01", "n02", "n03"], 28)).test.inputs
    seen = files.to("cpu")
    for x, name in zip(seen, files.names):
        image = Image.open(imagenet/name).convert("RGB")
        scale = 32/min(image.size)
        w, h = (int(scale*s) if s != min(image.size) else 32 for s in image.size)
        box = round((w - 28)/2), round((h - 28)/2)
        expected = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR)
                              .crop((*box, box[0] + 28, box[1] + 28)))
        assert torch.equal(x, torch.from_numpy(expected.copy()).permute(2, 0, 1)), name
    assert ([len(b) for b in files.split(4)] == [4, 4, 1]
            and torch.equal(torch.cat(list(files.split(4))), seen))
    assert (torch.equal(files[torch.tensor([5, 0])].to("cpu"), seen[[5, 0]])
            and torch.equal(files[1::3].to("cpu"), seen[1::3]))


def test_what_is_done_to_an_image_does_not_depend_on_who_reads_it(imagenet, monkeypatch):
    files = load_data(streams.register_imagenet100(imagenet, ["n01", "n03"], 24)).train.inputs
    index, seen, before = torch.arange(18).view(3, 6), {}, torch.random.get_rng_state()
    for workers in (1, 2):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(workers))
        seen[workers] = torch.cat(list(files.read_augmented(index, ("crop", "flip"), (7, 1))))
    assert torch.equal(seen[1], seen[2]) and torch.equal(before, torch.random.get_rng_state())
    backwards = (torch.cat(list(files.read_augmented(index.flip(0), ("crop", "flip"), (7, 1))))
                 .unflatten(0, (3, 6)).flip(0).flatten(0, 1))
    assert torch.equal(backwards, seen[1])
    assert not torch.equal(seen[1], torch.cat(list(files.read_augmented(index, ("crop", "flip"), (7, 2))))), (
        "another epoch is another view"
    )
    assert torch.equal(torch.cat(list(files.read_augmented(index, (), (7, 1)))), files.to("cpu"))


def test_a_streamed_run_can_be_killed_and_its_teacher_may_see_what_it_sees(imagenet, tmp_path):
    data = streams.register_imagenet100(imagenet, ["n01", "n02", "n03"], 32)
    recipe = Recipe(3, 8, lr=.01, augment=("crop", "flip"), live_teacher=True)
    teacher = RunSpec(data, "resnet8", "nll", recipe)
    student, store = RunSpec(data, "torchvision_resnet18", Distil(teacher), recipe), Store(tmp_path/"s")
    result = run(student, store, "cpu", progress=False)
    assert result.evaluation.n == 9 and len(result.history) == 3
    d, part = load_data(data), tmp_path/"part"
    for left in (2, 1, 0): # killed in the sixth step of each call, twelve to do
        net = build_net(teacher)
        with pytest.raises(KeyboardInterrupt) if left else nullcontext():
            fit(net, d, Killed(), recipe, 0, device="cpu",
                checkpoint=part, checkpoint_every=0., progress=False)
    assert all(torch.equal(a, b)
               for a, b in zip(net.state_dict().values(), store.load_net(teacher).state_dict().values()))


def test_a_streamed_run_killed_after_the_last_step_of_an_epoch_goes_on(imagenet, tmp_path, monkeypatch):
    "The checkpoint of that step leaves no image of the epoch to read"
    data, part = streams.register_imagenet100(imagenet, ["n01", "n02", "n03"], 32), tmp_path/"part"
    d, spec = load_data(data), RunSpec(data, "resnet8", "nll", Recipe(2, 8))
    go = (lambda net, **kw:
              fit(net, d, TrainingMethod(), spec.recipe, device="cpu", progress=False, **kw).history)
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Trainer, "end_epoch", stop)
        go(build_net(spec), checkpoint=part, checkpoint_every=0.)
    assert load_tensors(part)[1]["epochs_done"] == 1 and not load_tensors(part)[1]["history"]
    through, stopped = build_net(spec), build_net(spec)
    assert go(through) == go(stopped, checkpoint=part)
    assert all(torch.equal(a, b)
               for a, b in zip(through.state_dict().values(), stopped.state_dict().values()))


class Killed(TrainingMethod):
    steps = 0
    def forward(self, step):
        self.steps += 1
        if self.steps == 6: raise KeyboardInterrupt
        return super().forward(step)


@pytest.mark.parametrize("fault, message", [
    (lambda r: (r/"train/n01/n01_4.JPEG").write_bytes(b"no image"),
     "folder: got .*n01_4.JPEG, which cannot be read"),
    (lambda r: shutil.rmtree(r/"val/n03"), "classes: got n03, expected subfolders of .*val"),
    (lambda r: shutil.rmtree(r/"val"), "classes: got n01, n03, expected subfolders"),
    (lambda r: (r.parent/"list.txt").unlink(), "classes: got .*list.txt, expected a file"),
    (lambda r: (r.parent/"list.txt").write_text("n01"), "with 1 subfolder")])
def test_a_damaged_imagenet_is_named(imagenet, fault, message):
    fault(imagenet)
    with pytest.raises(ValueError, match=message):
        streams.register_imagenet100(imagenet, imagenet.parent/"list.txt", 32)
    assert not cache_dir().exists()


def test_an_image_that_breaks_later_is_named_too(imagenet):
    data = streams.register_imagenet100(imagenet, ["n01", "n03"], 32)
    path = imagenet/"train/n01/n01_4.JPEG"
    files = load_data(data).train.inputs
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="^folder: got [^\n]*n01_4.JPEG, which cannot be read[^\n]*$"):
        files.to("cpu")
    forget_data()
    with pytest.raises(ValueError, match="data: got imagenet-2, whose .*n01_4.JPEG has changed"):
        load_data(data)


def test_ctrl_c_is_left_to_the_process_that_reads(imagenet):
    "A terminal sends it to all; workers that end by it would turn it into an error of torch's"
    files = load_data(streams.register_imagenet100(imagenet, ["n01", "n02", "n03"], 32)).train.inputs
    batches = files.split(1)
    first = next(batches)
    for worker in multiprocessing.active_children(): os.kill(worker.pid, signal.SIGINT)
    assert torch.equal(torch.cat([first, *batches]), files.to("cpu"))


def test_images_of_one_size_in_bytes_are_told_apart(tmp_path):
    rng, given = np.random.default_rng(0), []
    for folder in "ab":
        for c in "xy":
            for k in range(3):
                (tmp_path/folder/c).mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(
                    tmp_path/folder/c/f"{k}.bmp"
                )
        names, labels, classes = ki.find_images(tmp_path/folder)
        given.append(streams.register_image_folder("mine", tmp_path/folder, *[(names, labels)]*3, classes, 8))
    assert given[0] != given[1]
    for bad, message in (("../b/x/0.bmp", "names: got"), (str(tmp_path/"b/x/0.bmp"), "names: got")):
        with pytest.raises(ValueError, match=message):
            streams.register_image_folder("mine", tmp_path/"a", ([bad, *names[1:]], labels),
                                     (names, labels), (names, labels), classes, 8)
    for size in (0, -3, "32", 7.5, None):
        with pytest.raises(ValueError, match="size: got"):
            streams.register_image_folder("mine", tmp_path/"a", *[(names, labels)]*3, classes, size)


@pytest.mark.parametrize("mode, ok", [("L", True), ("P", True), ("1", True), ("RGBA", True),
                                      ("I;16", False), ("I", False), ("F", False)])
def test_only_eight_bits_a_channel_are_read(tmp_path, mode, ok):
    image = (Image.fromarray((np.arange(256).reshape(16, 16)*257).astype(np.uint16)) if mode == "I;16"
             else Image.new("L", (16, 16), 77).convert(mode))
    image.save(tmp_path/"x.tiff")
    if ok: assert ki.load_images([tmp_path/"x.tiff"], 16).shape == (1, 3, 16, 16)
    else:
        with pytest.raises(ValueError, match="x.tiff of mode [IF].*, expected 8 bits a channel"):
            ki.load_images([tmp_path/"x.tiff"], 16)


def test_streamed_runs_go_in_parallel_and_by_folds(imagenet, tmp_path):
    data = streams.register_imagenet100(imagenet, ["n01", "n02", "n03"], 16)
    runs = [RunSpec(data, "resnet8", "nll", Recipe(1, 8, augment=("flip",)), s) for s in (0, 1)]
    pooled, alone = (sweep(runs, Store(tmp_path/"a"), "cpu", jobs=2, progress=False),
                     sweep(runs, Store(tmp_path/"b"), "cpu", progress=False))
    # a worker has fewer threads, which sum in another order
    assert all(torch.allclose(p.logits["test"], a.logits["test"], atol=1e-4) for p, a in zip(pooled, alone))
    fold, whole_set = load_data(LeaveFoldOut(data, 0, 3)), load_data(data)
    assert len(fold.train) == 18 and fold.fingerprint != whole_set.fingerprint
    said = teacher_from_logits("mine", torch.randn(27, 3), data, Store(tmp_path/"a"))
    with pytest.raises(ValueError, match="with logits of other images"):
        run(replace(runs[0], data=LeaveFoldOut(data, 0, 3), method=Distil(said)),
            Store(tmp_path/"a"), "cpu", progress=False)


def named(folder, counts):
    "Pictures of one colour, as many as are said, in a subfolder for each name"
    for name, n in counts.items():
        (folder/name).mkdir(parents=True)
        for k in range(n): Image.new("RGB", (9, 9), (hash(name) % 200, k, 7)).save(folder/name/f"{k}.png")
    return folder


def litter(folder):
    "What systems and editors leave behind, at every depth"
    for where in (folder, *[p for p in folder.iterdir() if p.is_dir()]):
        for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
            (where/name/"deep").mkdir(parents=True)
            for inside in (where/name, where/name/"deep"): Image.new("RGB", (9, 9)).save(inside/"x.png")
        Image.new("RGB", (9, 9)).save(where/"._0.png")
        (where/".DS_Store").write_bytes(b"x")


def test_labels_follow_names_where_a_part_lacks_a_class(tmp_path):
    "Whether its folder is missing or empty, in memory and streamed: 270 is label 2 everywhere"
    train = named(tmp_path/"data/train", {"0": 3, "180": 3, "270": 3, "90": 3})
    val = named(tmp_path/"data/val", {"0": 2, "270": 1, "90": 1})
    test = named(tmp_path/"data/test", {"0": 1, "180": 0, "270": 2, "90": 1})
    classes = ki.find_images(train)[2]
    assert classes == ("0", "180", "270", "90")
    for folder, labels in ((val, [0, 0, 2, 3]), (test, [0, 2, 2, 3])):
        names, y, same = ki.find_images(folder, classes)
        assert (y.tolist(), same) == (labels, classes)
        assert all(classes[c] == name.split(os.sep)[0] for c, name in zip(y, names))
        assert ki.read_images(folder, 9, classes)[1].tolist() == labels
    with pytest.raises(ValueError, match="test without images of 180, expected images in each"):
        ki.find_images(test)
    below = lambda part, *classes: (lambda names, y, known: (
        np.array([f"{part}/{n}" for n in names]), y, known))(*ki.find_images(tmp_path/"data"/part, *classes))
    in_memory = [ki.read_images(train, 9), ki.read_images(val, 9), ki.read_images(test, 9, classes)]
    streamed = [below("train"), below("val"), below("test", classes)]
    for data in (ki.register_images("turns", *in_memory),
                 streams.register_image_folder("turns", tmp_path/"data", *streamed, size=9)):
        d = load_data(data)
        assert d.classes == classes and d.valid.labels.tolist() == [0, 0, 2, 3], "by their own names, too"
        assert d.test.labels.tolist() == [0, 2, 2, 3]


def test_a_class_that_training_lacks_is_named(tmp_path):
    train = ki.read_images(named(tmp_path/"train", {"cat": 2, "dog": 2}), 9)
    val = ki.read_images(named(tmp_path/"val", {"cat": 1, "mule": 1}), 9)
    with pytest.raises(ValueError,
                       match="valid: got samples of mule, expected classes of training: cat, dog"):
        ki.register_images("pets", train, val, train)
    with pytest.raises(ValueError, match="train: got nothing of mule, expected samples of every class"):
        ki.register_images("pets", train, train, train, ["cat", "dog", "mule"])
    with pytest.warns(UserWarning, match="val: mule left out: not among the classes asked for"):
        assert ki.find_images(tmp_path/"val", train[2])[1].tolist() == [0]
    with pytest.warns(UserWarning), pytest.raises(ValueError,
                                                  match="without images of bird, horse, expected some"):
        ki.find_images(tmp_path/"val", ["bird", "horse"])
    other = ki.register_images("pets", train, train, train, ["dog", "cat"])
    assert load_data(other).train.labels.tolist() == [1, 1, 0, 0], "the order that is asked for"


def test_what_is_left_behind_is_neither_class_nor_image(tmp_path):
    folder = named(tmp_path/"pets", {"cat": 2, "dog": 1})
    (folder/"dog"/"more").mkdir()
    Image.new("RGB", (9, 9)).save(folder/"dog"/"more"/"1.png")
    before = ki.find_images(folder)
    litter(folder)
    after = ki.find_images(folder)
    assert (before[0].tolist() == after[0].tolist()
            == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/more/1.png"])
    assert torch.equal(before[1], after[1]) and before[2] == after[2] == ("cat", "dog")
    hidden = shutil.move(folder, tmp_path/".hidden")
    assert len(ki.find_images(hidden)[0]) == 4, "above the folder names are the user's own"


class Pairs(torch.utils.data.Dataset):
    "Someone's own"
    def __init__(self, inputs, labels): self.inputs, self.labels = inputs, labels
    def __len__(self): return len(self.labels)
    def __getitem__(self, k): return self.inputs[k], self.labels[k]


def test_lists_of_images_and_torch_datasets_are_taken(own):
    x, y = own
    pictures = [Image.fromarray(a.permute(1, 2, 0).numpy()) for a in x]
    expected = ki.register_images("mine", (x, y), (x, y), (x, y))
    pairs = torch.utils.data.TensorDataset(x, y)
    for one in ((pictures, y), (tuple(pictures), y.tolist()), ([*x], y), ([a.numpy() for a in x], y), pairs,
                Pairs(pictures, y.tolist()), Pairs(x, y), torch.utils.data.Subset(pairs, range(12)), [x, y],
                (x.clone().numpy(), [int(c) for c in y])):
        assert ki.register_images("mine", one, pairs, (x, y)) == expected, type(one)
    grey = [p.convert("L") for p in pictures]
    d = load_data(ki.register_images("grey", (grey, y), (grey, y), (grey, y)))
    assert d.in_channels == 1 and torch.equal(d.train.inputs[3, 0], torch.from_numpy(np.array(grey[3])))
    mixed = load_data(ki.register_images("some", *[([pictures[0], *grey[1:]], y)]*3))
    assert torch.equal(mixed.train.inputs[0], x[0]) and mixed.in_channels == 3
    clear = [p.convert("RGBA") for p in pictures]
    assert ki.register_images("mine", (clear, y), pairs, (x, y)) == expected


def test_a_folder_of_torchvision_brings_its_names(tmp_path):
    from torchvision.datasets import ImageFolder
    train = ImageFolder(named(tmp_path/"train", {"0": 3, "180": 3, "270": 3, "90": 3}))
    val = ImageFolder(named(tmp_path/"val", {"0": 2, "270": 1, "90": 1}))
    d = load_data(ki.register_images("turns", train, val, train))
    assert d.classes == ("0", "180", "270", "90") and d.valid.labels.tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize("change, message", [
    (lambda p: [*p[:3], p[3].resize((8, 8)), *p[4:]],
     r"train: got torch.uint8 of shape \(8, 8, 3\) at 3, expected torch.uint8 of shape \(8, 9, 3\), as at 0"),
    (lambda p: [*p[:5], "photo.png", *p[6:]], "train: got 'photo.png' at 5, expected images"),
    (lambda p: [*p[:2], None, *p[3:]], "train: got None at 2"),
    (lambda p: [*p[:7], Image.new("I;16", (9, 8)), *p[8:]], "train: got an image of mode I;16 at 7"),
    (lambda p: [*p[:2], np.zeros((8, 9, 3)), *p[3:]], "train: got torch.float64 of shape .* at 2")])
def test_the_one_image_that_is_odd_is_named(own, change, message):
    x, y = own
    pictures = [Image.fromarray(a.permute(1, 2, 0).numpy()) for a in x]
    with pytest.raises(ValueError, match=message):
        ki.register_images("x", (change(pictures), y), (x, y), (x, y))


def test_datasets_that_are_none_are_told(own):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(())
    with pytest.raises(ValueError, match="valid: got a Stream without a length"):
        ki.register_images("x", own, Stream(), own)
    floats = torch.utils.data.TensorDataset(own[0], own[1].float())
    with pytest.raises(ValueError, match="test: got labels of float32"):
        ki.register_images("x", own, own, floats)


@pytest.mark.parametrize("shape, seen", [
    ((12, 5), (12, 5)), ((12, 6, 7), (12, 1, 6, 7)),
    ((12, 4, 6, 7), (12, 4, 6, 7)), ((12, 6, 7, 3), (12, 3, 6, 7)),
    ((12, 2, 6, 7), (12, 2, 6, 7)), ((12, 1, 1, 9), (12, 1, 1, 9))])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16))
def test_floats_are_normalised_by_the_training_set_alone(shape, seen, dtype):
    g = torch.Generator().manual_seed(0)
    train, other = (
        ((torch.randn(shape, generator=g)*s + 40)*1e3**(torch.rand(shape[1:], generator=g) > 2)).to(dtype)
        for s in (5., 50.)
    )
    y = torch.arange(12) % 2
    d = load_data(ki.register_images("f", (train, y), (other.numpy(), y), (other, y)))
    assert d.train.inputs.shape == seen and d.train.inputs.dtype == torch.float32
    assert torch.equal(d.train.inputs.flatten().sort()[0],
                       train.float().flatten().sort()[0]), "kept as they are"
    axes = [0, *range(2, len(seen))]
    x = d.train.inputs.double().numpy()
    mean, std = x.mean(tuple(axes), keepdims=True), x.std(tuple(axes), keepdims=True)
    assert d.normalise(d.train.inputs).numpy() == pytest.approx((x - mean)/std, abs=1e-4)
    assert (d.normalise(d.test.inputs).numpy()
            == pytest.approx((d.test.inputs.double().numpy() - mean)/std, abs=1e-3))
    assert d.in_channels == seen[1]


def test_a_column_that_never_varies_and_one_of_large_numbers_are_normalised(own):
    x = torch.stack([torch.full((12,), .1), torch.arange(12.)*1e3 + 1e6, torch.arange(12.)*1e-9], 1)
    d = load_data(ki.register_images("columns", *[(x, own[1])]*3))
    z = d.normalise(x)
    assert (z[:, 0] == 0).all() or z[:, 0].abs().max() < 1e-6
    assert (z[:, 1:].mean(0).abs().max() < 1e-3
            and z[:, 1:].std(0, correction=0).numpy() == pytest.approx(1, abs=1e-3))


@pytest.mark.parametrize("change, message", [
    (lambda x: x.index_fill(0, torch.tensor([3, 7]), torch.nan),
     r"train: got NaN or infinity in inputs at \[3, 7\]"),
    (lambda x: x.index_fill(0, torch.tensor([11]), torch.inf), r"at \[11\]"),
    (lambda x: x.double() + 1e300, r"at \[0, 1, 2\]"),
    (lambda x: x.to(torch.complex64), "inputs of torch.complex64"),
    (lambda x: x[:, 0], "train: got inputs of torch.float32 and shape"),
    (lambda x: x[:, :4], "images of shapes")])
def test_features_that_are_none_are_told(own, change, message):
    x = torch.randn(12, 5)
    with pytest.raises(ValueError, match=message):
        ki.register_images("f", (change(x), own[1]), (x, own[1]), (x, own[1]))


def test_a_table_is_trained_on_taught_and_folded(tmp_path):
    """A network of two layers, its student, and one of `LeaveFoldOut`; the kit's own
    networks say that they cannot
    """
    @MODELS.register("mlp")
    def mlp(n_classes, in_channels):
        return torch.nn.Sequential(torch.nn.Linear(in_channels, 32),
                                   torch.nn.ReLU(), torch.nn.Linear(32, n_classes))
    g = torch.Generator().manual_seed(0)
    def split(n):
        y = torch.arange(n) % 3
        return (torch.randn(n, 7, generator=g)*torch.logspace(-3, 3, 7)
                    + 3*y[:, None]*torch.logspace(-3, 3, 7), y)
    data, store = ki.register_images("table", split(120), split(60), split(90)), Store(tmp_path)
    recipe = Recipe(8, 20, lr=.05, augment=("crop", "flip"))
    teacher = RunSpec(data, "mlp", "nll", recipe)
    for spec in (teacher, RunSpec(data, "mlp", Distil(teacher), recipe),
                 replace(teacher, data=LeaveFoldOut(data, 0, 4))):
        result = run(spec, store, "cpu", progress=False)
        assert result.evaluation.raw["top1"].value > .95 and result.evaluation.n == 90
    with pytest.raises(ValueError, match=r"inputs: got shape \(2, 7\), expected images"):
        run(RunSpec(data, "resnet8", "nll", recipe), store, "cpu", progress=False)
    with pytest.raises(ValueError, match="augment: got .'flip',., expected none for a table"):
        ki.register_images("t", split(9), split(9), split(9), augment=("flip",))


def test_a_data_frame_is_a_table(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12) % 3
    frame = pd.DataFrame(x, columns=list("abc"))
    table = load_data(ki.register_images("table", *[(frame, pd.Series(y))]*3))
    assert (np.array_equal(table.train.inputs, x.astype(np.float32))
            and table.train.labels.tolist() == y.tolist())


@pytest.mark.parametrize("change, lost", [
    (lambda x: x + 1.7e9, True), (lambda x: (x + 1.7e9).reshape(12, 1, 1, 3), True),
    (lambda x: x + 100, False),
    (lambda x: 0*x + .1, False), (lambda x: x*1e-30, False), (lambda x: (x + 1.7e9).astype(np.float32), False)
])
def test_numbers_that_32_bits_cannot_tell_apart_are_refused(change, lost):
    "Times in seconds since 1970 lie 128 apart in 32 bits; what came in 32 bits has lost nothing here"
    x, y = change(60*np.random.default_rng(0).random((12, 3))), np.arange(12) % 3
    with pytest.raises(ValueError,
                       match="train: got numbers near 1.7e.09 that differ by") if lost else nullcontext():
        ki.check_image_split("train", x, y)


@pytest.mark.parametrize("given, says", [
    (lambda x, y: [(np.ma.masked_array(x, mask=x > 0), y)]*3, "train: got a masked array"),
    (lambda x, y: [(pd.DataFrame(x), y), (pd.DataFrame(x).iloc[:, ::-1], y), (pd.DataFrame(x), y)],
     "train, valid, test: got other columns"),
    (lambda x, y: [[(a, b, 0) for a, b in zip(x, y)]]*3, "train: got a _Rows of 3 things an item"),
])
def test_splits_that_are_odd_are_told(given, says):
    class _Rows(torch.utils.data.Dataset):
        def __init__(self, rows): self.rows = rows
        def __len__(self): return len(self.rows)
        def __getitem__(self, k): return self.rows[k]
    x, y = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12) % 3
    splits = [_Rows(s) if isinstance(s, list) else s for s in given(x, y)]
    with pytest.raises(ValueError, match=says): ki.register_images("odd", *splits)


@pytest.mark.parametrize("classes", [{"dog": 1, "cat": 0, "eel": 2}, {"cat", "dog", "eel"}])
def test_names_without_an_order_are_told(classes):
    x, y = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12) % 3
    with pytest.raises(ValueError, match="classes: got a (dict|set), expected a list of names, in the order"):
        ki.register_images("odd", *[(x, y)]*3, classes=classes)


def test_arrays_turned_round_and_of_four_channels_are_taken():
    x, y = np.random.default_rng(0).normal(size=(12, 8, 8, 4)).astype(np.float32), np.arange(12) % 3
    for same in (x[..., ::-1][..., ::-1], x.astype(">f4"), x):
        kept = ki.check_image_split("train", same, y).inputs
        assert torch.equal(kept, torch.from_numpy(x).permute(0, 3, 1, 2))
    spectrogram = ki.check_image_split("train", x.reshape(12, 8, 4, 8), y).inputs
    assert spectrogram.shape == (12, 8, 4, 8), "channels first"


def test_names_that_training_lacks_are_told():
    x, y = torch.zeros(6, 8, 8, dtype=torch.uint8), torch.arange(6) % 2
    with pytest.raises(ValueError,
                       match="valid: got labels with names, expected names beside those of training"):
        ki.register_images("half", (x, y), (x, y, ("cat", "dog")), (x, y))
    named = ki.register_images("half", (x, y), (x, y, ("dog", "cat")), (x, y), classes=("cat", "dog"))
    assert load_data(named).valid.labels.tolist() == (1 - y).tolist()


def test_spectrograms_are_shifted_and_mirrored_as_images_are(tmp_path):
    x = torch.randn(12, 1, 8, 8)*3 + 5
    d = load_data(ki.register_images("sound", *[(x, torch.arange(12) % 3)]*3, augment=("crop", "flip")))
    shift, flip = torch.zeros(12, 2, dtype=torch.long), torch.ones(12, dtype=torch.bool)
    assert torch.equal(d.augment_batch(x, shift, flip), d.normalise(x).flip(3))
    result = run(RunSpec(DataSpec("given", title="sound",
                                  fingerprint=ki.register_images(
                                      "sound", *[(x[:, 0], torch.arange(12) % 3)]*3, augment=("crop", "flip")
                                  ).fingerprint), "resnet8", "nll",
                         Recipe(1, 4, augment=("crop", "flip"))),
                 Store(tmp_path), "cpu", progress=False)
    assert result.evaluation.n == 12


def test_the_content_of_bytes_has_the_id_it_always_had():
    x = torch.arange(12*3*8*9).view(12, 3, 8, 9).to(torch.uint8)
    data = ki.register_images("mine", *[(x, torch.arange(12) % 3)]*3, ["a", "b", "c"], ["flip"])
    assert (data.fingerprint, load_data(data).fingerprint) == ("678712d7327b18b8", "623ddcc4f911cd84")


def test_class_names_are_a_list_of_different_ones(tmp_path):
    for name in "09":
        (tmp_path/name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path/name/"a.png")
    for classes in ("09", ["0", "0", "9"]):
        with pytest.raises(ValueError, match="classes: got .*, expected names, each once"):
            ki.find_images(tmp_path, classes)
    assert ki.find_images(tmp_path, [0, 9])[2] == ("0", "9")


def test_a_part_of_a_dataset_keeps_the_names_of_its_classes():
    class Named(torch.utils.data.Dataset):
        def __init__(self, labels, classes): self.labels, self.classes = labels, classes
        def __len__(self): return len(self.labels)
        def __getitem__(self, k): return torch.full((3, 8, 8), 9*k, dtype=torch.uint8), self.labels[k]
    train, other = Named([0, 1, 2]*3, ["a", "b", "c"]), Named([0, 1]*4, ["a", "c"])
    part = torch.utils.data.Subset(torch.utils.data.Subset(other, range(6)), range(4))
    data = load_data(ki.register_images("parts", train, part, other))
    assert data.valid.labels.tolist() == [0, 2, 0, 2] and data.classes == ("a", "b", "c")
