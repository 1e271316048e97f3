"""Corruptions against one-image implementations and the published numbers, published files and their
faults, and runs under drift.
"""
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage

from kdc_nb.values import decode, encode
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import RunSpec
from kdc_nb.experiments.store import Store
from kdc_nb.analysis.corruptions import (
    CORRUPTIONS, corrupt_images, elastic_transform, fog, glass_blur, snow, zoom_blur,
)
from kdc_nb.analysis.drift import (
    DriftResult, _evaluate_with_noise, average_by_severity, evaluate_drift, read_corrupted_images,
    read_drifts, write_drifts,
)
from kdc_nb.analysis.filters import defocus_kernel, motion_filter, plasma_fractal
from tests.conftest import patch_name

# ImageNet-C/create_c/make_cifar_c.py; the elastic ones there are times 32, the zooms
# the ends of steps of 0.01
STRENGTHS = {
    "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
    "shot_noise": [500, 250, 100, 75, 50],
    "impulse_noise": [0.01, 0.02, 0.03, 0.05, 0.07],
    "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    "zoom_blur": [1.06, 1.11, 1.16, 1.21, 1.26],
    "snow": [(0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
             (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
             (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)],
    "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
    "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
    "elastic_transform": [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06),
                          (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
    "jpeg_compression": [80, 65, 58, 50, 40],
    "speckle_noise": [0.06, 0.1, 0.12, 0.16, 0.2],
    "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1],
    "saturate": [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
}
# without noise
ALONE = ("defocus_blur", "zoom_blur", "brightness", "contrast",
         "pixelate", "jpeg_compression", "gaussian_blur", "saturate")
TINY = DataSpec("known", n_train=100, n_valid=60, n_test=80)
NET = RunSpec(TINY, "resnet8", Method("nll"), Recipe(2, 50))
each_severity = pytest.mark.parametrize("severity", range(1, 6))


def images(n=3, channels=3, h=32, w=None, seed=0):
    "Smooth random images, as images are, with some black, white and grey"
    z = np.random.default_rng(seed).normal(size=(n, channels, h, w or h))
    x = np.clip(128 + 250*ndimage.gaussian_filter(z, (0, 0, 1.5, 1.5)), 0, 255).astype(np.uint8)
    x[:, :, :2, :3], x[:, :, 2:4, :3], x[:, :, 4:6, :3] = 0, 255, 90
    return torch.from_numpy(x)


def floats(x): return x.numpy()/np.float32(255)
def rng(seed=5): return np.random.default_rng(seed)
def picture(x): return Image.fromarray(x.permute(1, 2, 0).squeeze(2).numpy())
def as_bytes(p): return torch.from_numpy(np.array(p)).view(*p.size[::-1], -1).permute(2, 0, 1)


def assert_cut(got, wanted):
    """Bytes are these numbers from 0 to 1, times 255 and cut off; rounding may decide
    where a number is nearly whole
    """
    wanted = 255*np.clip(wanted, 0, 1)
    assert (got.numpy() <= wanted + .02).all() and (got.numpy() > wanted - 1.02).all()


# The numbers

def test_strengths_are_the_published_ones():
    assert {k: list(c.by_severity) for k, c in CORRUPTIONS.items()} == STRENGTHS
    assert {k: c.__name__ for k, c in CORRUPTIONS.items()} == {k: k for k in STRENGTHS}


@given(st.integers(105, 140), st.sampled_from([1, 3]), st.integers(1, 5))
@settings(max_examples=10)
def test_noise_has_the_moments_of_its_formula(level, channels, severity):
    x, v = torch.full((300, channels, 16, 16), level, dtype=torch.uint8), level/255
    # half a step was cut off
    moved = {k: corrupt_images(x, k, severity).double()/255 + .5/255 - v
             for k in ("gaussian_noise", "shot_noise", "speckle_noise")}
    c = {k: STRENGTHS[k][severity - 1] for k in moved}
    wanted = {"gaussian_noise": c["gaussian_noise"],
              "shot_noise": (v/c["shot_noise"])**.5, "speckle_noise": v*c["speckle_noise"]}
    for k, s in wanted.items():
        assert float(moved[k].std()) == pytest.approx(s, rel=.03) and abs(float(moved[k].mean())) < .003


@each_severity
def test_impulses_are_black_or_white_as_often(severity):
    y = corrupt_images(torch.full((400, 3, 16, 16), 77, dtype=torch.uint8), "impulse_noise", severity)
    share = STRENGTHS["impulse_noise"][severity - 1]
    assert set(y.unique().tolist()) == {0, 77, 255}
    for v in (0, 255): assert float((y == v).double().mean()) == pytest.approx(share/2, rel=.06)


# One image at a time

@each_severity
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 32)])
def test_gaussian_blur(severity, channels, size):
    x, sigma = images(channels=channels, h=size), STRENGTHS["gaussian_blur"][severity - 1]
    wanted = [[ndimage.gaussian_filter(c, sigma, mode="nearest") for c in i.numpy()/255] for i in x]
    assert_cut(corrupt_images(x, "gaussian_blur", severity), np.array(wanted))


@each_severity
def test_defocus_blur(severity):
    radius, rim = STRENGTHS["defocus_blur"][severity - 1]
    sharp = np.array([[float(a*a + b*b <= radius*radius) for a in range(-8, 9)] for b in range(-8, 9)])
    line = np.array([np.exp(-1/(2*rim**2)), 1, np.exp(-1/(2*rim**2))])
    line /= line.sum()
    kernel = sum(line[a + 1]*line[b + 1]*np.roll(sharp/sharp.sum(), (a, b), (0, 1))
                 for a in (-1, 0, 1) for b in (-1, 0, 1))
    assert (defocus_kernel(radius, rim) == pytest.approx(kernel[5:12, 5:12], abs=1e-12)
            and kernel[5:12, 5:12].sum() == pytest.approx(1))
    x = images(1)
    padded = np.pad(x[0].numpy()/255, ((0, 0), (8, 8), (8, 8)), mode="reflect")
    wanted = sum(kernel[a, b]*padded[:, a:a + 32, b:b + 32] for a in range(17) for b in range(17))
    assert_cut(corrupt_images(x, "defocus_blur", severity)[0], wanted)


@pytest.mark.parametrize("size, strength", [(8, (.4, 1, 1)), (32, (.25, 1, 2))])
def test_glass_blur_is_the_published_loop(size, strength):
    "Pixel by pixel, from the last to the first, with both sides of the assignment views of one array."
    x, (sigma, reach, times), draws = floats(images(1, h=size)), strength, rng()
    blur = lambda z: np.stack(
        [ndimage.gaussian_filter(c, sigma, mode="nearest") for c in np.moveaxis(z, -1, 0)], -1
    )
    z = np.uint8(blur(x[0].transpose(1, 2, 0))*255 + 1e-3)
    for _ in range(times):
        down, right = draws.integers(-reach, reach, (2, 1, size - 2, size - 2))
        for h in range(size - reach, reach, -1):
            for w in range(size - reach, reach, -1):
                a, b = h + down[0, h - 2, w - 2], w + right[0, h - 2, w - 2]
                z[h, w], z[a, b] = z[a, b], z[h, w]
    assert (glass_blur(x, strength, rng())[0]
            == pytest.approx(blur(z/np.float32(255)).transpose(2, 0, 1), abs=1e-6))


def smeared(x, radius, sigma, angle):
    "One channel, pixel by pixel"
    h, w = x.shape
    weights = [np.exp(-i*i/(2*sigma*sigma)) for i in range(2*radius + 1)]
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    steps = [(int(np.ceil(i*sin - .5)), int(np.ceil(i*cos - .5))) for i in range(2*radius + 1)]
    value = lambda r, c: sum(k*x[min(max(r + a, 0), h - 1), min(max(c + b, 0), w - 1)]
                             for k, (a, b) in zip(weights, steps))/sum(weights)
    return np.rint(255*np.array([[value(r, c) for c in range(w)] for r in range(h)]))/255


@pytest.mark.parametrize("angle", [-134.2, -90, -45, -13.7, 0, 31.3, 45])
def test_motion(angle):
    x = floats(images(2, 1, 8, 12))
    got = motion_filter(x, 6, 2., np.array([20., angle]))
    assert (got[1, 0] == pytest.approx(smeared(x[1, 0], 6, 2., angle), abs=1.01/255)
            and abs(got[1, 0] - smeared(x[1, 0], 6, 2., angle)).mean() < 1e-4)
    assert got[0, 0] == pytest.approx(motion_filter(x[:1], 6, 2., np.array([20.]))[0, 0])


def zoomed_alone(x, factor):
    "The middle of one image (C, H, W), enlarged by SciPy and cut to size"
    size = x.shape[1]
    kept = int(np.ceil(size/factor))
    top = (size - kept)//2
    grown = ndimage.zoom(x[:, top:top + kept, top:top + kept], (1, factor, factor), order=1)
    trim = (grown.shape[1] - size)//2
    return grown[:, trim:trim + size, trim:trim + size]


@each_severity
@pytest.mark.parametrize("size", [8, 32])
def test_zoom_blur(severity, size):
    x, end = floats(images(1, h=size)), STRENGTHS["zoom_blur"][severity - 1]
    factors = np.arange(1, end, .01)
    assert len(factors) == [7, 12, 16, 21, 26][severity - 1], (
        "the published number of pictures, rounding errors included"
    )
    wanted = (x[0] + sum(zoomed_alone(x[0].astype(float), f) for f in factors))/(len(factors) + 1)
    assert zoom_blur(x, end, None)[0] == pytest.approx(wanted, abs=1e-5)


@each_severity
@pytest.mark.parametrize("channels, side", [(1, 8), (3, 32)])
def test_snow(severity, channels, side):
    x, strength, draws = floats(images(1, channels, side)), STRENGTHS["snow"][severity - 1], rng()
    mean, spread, size, least, radius, sigma, keep = strength
    layer = zoomed_alone(draws.normal(mean, spread, (1, side, side)), size)[0]
    layer[layer < least] = 0
    layer = smeared(np.uint8(np.clip(layer, 0, 1)*255)/255, radius, sigma, draws.uniform(-135, -45))
    light = x[0, 0] if channels == 1 else .299*x[0, 0] + .587*x[0, 1] + .114*x[0, 2]
    wanted = keep*x[0] + (1 - keep)*np.maximum(x[0], light*1.5 + .5) + layer + np.rot90(layer, 2)
    # a byte of either flake may round the other way
    assert snow(x, strength, rng())[0] == pytest.approx(wanted, abs=2.02/255)
    assert abs(snow(x, strength, rng())[0] - wanted).mean() < 1e-3


@given(st.sampled_from([8, 16]), st.floats(1.5, 3), st.integers(0, 99))
@settings(max_examples=10)
def test_clouds_square_by_square(size, decay, seed):
    z, draws, step, noise = np.zeros((size, size)), rng(seed), size, 100.
    while step >= 2:
        half, k = step//2, size//step
        for down, right, corners in [(half, half,
                                      [(-half, -half), (-half, half), (half, -half), (half, half)]),
                                     (0, half, [(0, -half), (0, half), (-half, 0), (half, 0)]),
                                     (half, 0, [(0, -half), (0, half), (-half, 0), (half, 0)])]:
            wobble = draws.uniform(-noise, noise, (1, k, k))[0]
            for i in range(k):
                for j in range(k):
                    r, c = i*step + down, j*step + right
                    z[r, c] = (sum(z[(r + a) % size, (c + b) % size] for a, b in corners)/4
                               + noise*wobble[i, j])
        step, noise = half, noise/decay
    assert (plasma_fractal(1, size, decay, rng(seed))[0]
            == pytest.approx((z - z.min())/(z.max() - z.min()), abs=1e-5))


@each_severity
def test_fog(severity):
    x, (thick, decay) = (floats(images(2, h=12))*np.array([.5, .9, .7], np.float32)[:, None, None],
                         STRENGTHS["fog"][severity - 1])
    cloud = plasma_fractal(2, 16, decay, rng())[:, :12, :12]
    wanted = np.stack([(i + thick*c)*i.max()/(i.max() + thick) for i, c in zip(x, cloud)])
    assert fog(x, (thick, decay), rng()) == pytest.approx(wanted, abs=1e-6)


@each_severity
@pytest.mark.parametrize("name", ["brightness", "saturate"])
def test_steps_in_hsv(name, severity):
    x, c = images(), STRENGTHS[name][severity - 1]
    z = rgb_to_hsv(x.permute(0, 2, 3, 1).numpy()/255)
    if name == "brightness": z[..., 2] = np.clip(z[..., 2] + c, 0, 1)
    else: z[..., 1] = np.clip(z[..., 1]*c[0] + c[1], 0, 1)
    assert_cut(corrupt_images(x, name, severity), hsv_to_rgb(z).transpose(0, 3, 1, 2))


@each_severity
@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_and_grey_brightness(severity, channels):
    x = images(channels=channels)
    mean = np.array([[c.mean() for c in i] for i in x.numpy()/255])[:, :, None, None]
    assert_cut(corrupt_images(x, "contrast", severity),
               (x.numpy()/255 - mean)*STRENGTHS["contrast"][severity - 1] + mean)
    if channels == 1:
        assert_cut(corrupt_images(x, "brightness", severity),
                   x.numpy()/255 + STRENGTHS["brightness"][severity - 1])


@each_severity
@pytest.mark.parametrize("size", [8, 32])
def test_elastic(severity, size):
    x, draws = floats(images(2, h=size)), rng()
    far, sigma, lean = (size*c for c in STRENGTHS["elastic_transform"][severity - 1])
    three = np.array([[1, 1], [1, -1], [-1, -1]])*(size//3) + size//2
    moved, field = three + draws.uniform(-lean, lean, (2, 3, 2)), draws.uniform(-1, 1, (2, 2, size, size))
    got = elastic_transform(x, STRENGTHS["elastic_transform"][severity - 1], rng())
    for i in range(2):
        # (right, down, 1) of the result to (right, down) of the image
        M = np.linalg.lstsq(np.c_[moved[i], np.ones(3)], three, rcond=None)[0].T
        matrix, offset = M[::-1, 1::-1], M[::-1, 2]
        right, down = (far*(ndimage.gaussian_filter(f, sigma, mode="reflect", truncate=3) if sigma else f)
                       for f in field[i])
        r, c = np.mgrid[:size, :size]
        for channel, y in zip(x[i], got[i]):
            leaned = ndimage.affine_transform(channel.astype(float), matrix, offset, order=1, mode="mirror")
            assert y == pytest.approx(
                ndimage.map_coordinates(leaned, [r + down, c + right], order=1, mode="reflect"), abs=1e-4
            )


def test_elastic_without_displacement_is_the_image():
    x = floats(images(2, 3, 8, 12))
    assert elastic_transform(x, (0, 0, 0), rng()) == pytest.approx(x, abs=1e-5)


@each_severity
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 32)])
def test_pixels_and_jpeg(severity, channels, size):
    x, share, quality = (images(channels=channels, h=size), STRENGTHS["pixelate"][severity - 1],
                         STRENGTHS["jpeg_compression"][severity - 1])
    small = int(size*share)
    for i, pixels, jpeg in zip(x, corrupt_images(x, "pixelate", severity),
                               corrupt_images(x, "jpeg_compression", severity)):
        assert torch.equal(pixels, as_bytes(picture(i).resize((small, small), Image.BOX)
                                            .resize((size, size), Image.BOX)))
        picture(i).save(file := io.BytesIO(), "JPEG", quality=quality)
        assert torch.equal(jpeg, as_bytes(Image.open(file)))


# All of them

@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels, h, w", [(1, 8, 8), (3, 8, 8), (1, 32, 32), (3, 32, 32), (3, 9, 14)])
def test_bytes_of_the_same_shape(name, channels, h, w):
    x = images(4, channels, h, w)
    if name == "saturate" and channels == 1:
        with pytest.raises(ValueError, match="inputs: got images of one channel, expected three"):
            corrupt_images(x, name, 1)
        return
    before, ys = x.clone(), [corrupt_images(x, name, s) for s in range(1, 6)]
    assert all(y.dtype == torch.uint8 and y.shape == x.shape for y in ys)
    assert not torch.equal(ys[4], x) and not torch.equal(ys[4], ys[0])
    assert torch.equal(x, before)
    assert torch.equal(ys[2], corrupt_images(x, name, 3)), "a seed is one result"
    assert torch.equal(ys[2], corrupt_images(x, name, 3, seed=1)) == (name in ALONE)


@pytest.mark.parametrize("name", ALONE)
def test_images_do_not_see_each_other(name):
    x = images(5)
    assert torch.equal(corrupt_images(x, name, 4)[3:4], corrupt_images(x[3:4], name, 4))


def test_batches_have_noise_of_their_own():
    y = corrupt_images(torch.full((1001, 1, 8, 8), 128, dtype=torch.uint8), "gaussian_noise", 3)
    assert len(y) == 1001 and not torch.equal(y[0], y[500]) and not torch.equal(y[0], y[1000])


def test_severities_and_corruptions_have_noise_of_their_own():
    x = torch.full((50, 1, 8, 8), 128, dtype=torch.uint8)
    noise = np.corrcoef([corrupt_images(x, k, s).double().flatten()
                         for k, s in [("gaussian_noise", 4), ("gaussian_noise", 5), ("speckle_noise", 5)]])
    assert abs(noise - np.eye(3)).max() < .1


@pytest.mark.parametrize("change, message", [
    (dict(corruption="rain"), "corruption: got 'rain', expected one of brightness"),
    (dict(severity=0), "severity: got 0, expected 1, 2"),
    (dict(severity=6), "severity: got 6"), (dict(severity=2.), "severity: got 2.0"),
    (dict(seed=-1), "seed: got -1"), (dict(seed=.5), "seed: got 0.5"),
    (dict(inputs=images().float()), "inputs: got torch.float32 of shape"),
    (dict(inputs=images()[0]), r"inputs: got torch.uint8 of shape \(3, 32, 32\)"),
    (dict(inputs=images(channels=2)), r"of shape \(3, 2, 32, 32\)"),
    (dict(inputs=images(h=8)[:, :, 1:]), r"of shape \(3, 3, 7, 8\)"),
    (dict(inputs=images().numpy()), "inputs: got a ndarray, expected a tensor"),
])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        corrupt_images(**dict(inputs=images(), corruption="fog", severity=1) | change)


# Published files

def write_folder(folder: Path, n=4, size=8, name="frost", labels=None):
    folder.mkdir(exist_ok=True)
    np.save(folder/f"{name}.npy", np.random.default_rng(0).integers(0, 256, (5*n, size, size, 3), np.uint8))
    np.save(folder/"labels.npy", np.tile(np.arange(n, dtype=np.uint8), 5) if labels is None else labels)
    return folder


@given(st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=10)
def test_the_block_of_a_severity(tmp_path, n, severity):
    folder = write_folder(tmp_path, n)
    x, y = read_corrupted_images(str(folder), "frost", severity)
    raw = np.load(folder/"frost.npy")[n*(severity - 1):n*severity]
    assert x.dtype == torch.uint8 and x.is_contiguous() and x.numpy() == pytest.approx(np.moveaxis(raw, 3, 1))
    assert y.dtype == torch.int64 and y.tolist() == list(range(n))


def test_files_of_the_published_size(tmp_path):
    # a file with holes
    big = np.lib.format.open_memmap(tmp_path/"spatter.npy", "w+", np.uint8, (50_000, 32, 32, 3))
    big[30_000, 1, 2], big[39_999, 31, 30] = (1, 2, 3), (4, 5, 6)
    big.flush()
    np.save(tmp_path/"labels.npy", np.tile(np.arange(10_000, dtype=np.uint8) % 100, 5))
    x, y = read_corrupted_images(tmp_path, "spatter", 4)
    assert x.shape == (10_000, 3, 32, 32) and y.shape == (10_000,) and int(x.sum()) == 21
    assert x[0, :, 1, 2].tolist() == [1, 2, 3] and x[-1, :, 31, 30].tolist() == [4, 5, 6] and y[99] == 99


class Bomb:
    def __reduce__(self): return pytest.fail, ("a pickle was run",)


def spoil(folder, fault):
    path = folder/"frost.npy"
    match fault:
        case "no images": path.unlink()
        case "a folder": path.unlink(), path.mkdir()
        case "no labels": (folder/"labels.npy").unlink()
        case "empty": path.write_bytes(b"")
        case "cut": path.write_bytes(path.read_bytes()[:-1])
        case "cut header": path.write_bytes(path.read_bytes()[:40])
        case "pickle": path.write_bytes(pickle.dumps(Bomb()))
        case "objects": np.save(path, np.array([Bomb()]*5), allow_pickle=True)
        case "zip": np.savez(folder/"a.npz", a=np.zeros(3)), (folder/"a.npz").replace(path)
        case "floats": np.save(path, np.zeros((20, 8, 8, 3), np.float32))
        case "channels first": np.save(path, np.zeros((20, 3, 8, 8), np.uint8))
        case "one severity": np.save(path, np.zeros((4, 8, 8, 3), np.uint8))
        case "none": np.save(path, np.zeros((0, 8, 8, 3), np.uint8))
        case "fewer labels": np.save(folder/"labels.npy", np.zeros(4, np.uint8))
        case "labels with fractions": np.save(folder/"labels.npy", np.zeros(20))
        case "label 100": np.save(folder/"labels.npy", np.full(20, 100))
        case "label -1": np.save(folder/"labels.npy", np.full(20, -1))


@pytest.mark.parametrize("fault, message", {
    "no images": "no .*frost.npy, expected the .npy files of CIFAR-10-C",
    "a folder": "no .*frost.npy", "no labels": "no .*labels.npy",
    "empty": "frost.npy, which cannot be read", "cut": "frost.npy, which cannot be read",
    "cut header": "frost.npy, which cannot be read",
    "pickle": "frost.npy, which cannot be read",
    "objects": "frost.npy, which cannot be read", "zip": "frost.npy with several arrays",
    "floats": r"float32 of shape \(20, 8, 8, 3\), expected uint8 of shape \(5 N, H, W, 3\)",
    "channels first": r"uint8 of shape \(20, 3, 8, 8\)",
    "one severity": r"shape \(4, 8, 8, 3\)", "none": r"shape \(0, 8, 8, 3\)",
    "fewer labels": r"labels.npy with uint8 of shape \(4,\), expected integers of shape \(20,\)",
    "labels with fractions": "float64 of shape",
    "label 100": "labels 100 to 100, expected labels from 0 to 99", "label -1": "labels -1 to -1",
}.items())
def test_faults_of_files(tmp_path, fault, message):
    spoil(write_folder(tmp_path/"c"), fault)
    with pytest.raises(ValueError, match=f"folder: got .*{message}"):
        read_corrupted_images(tmp_path/"c", "frost", 1)


@given(st.integers(0, 127), st.integers(0, 255))
@settings(max_examples=150)
def test_a_damaged_header_is_a_value_error_or_harmless(tmp_path, place, byte):
    folder = write_folder(tmp_path)
    raw = bytearray((folder/"frost.npy").read_bytes())
    raw[place] = byte
    (folder/"frost.npy").write_bytes(raw)
    try: x, y = read_corrupted_images(folder, "frost", 1)
    except ValueError as e: assert "frost.npy" in str(e) or "labels.npy" in str(e)
    else: assert x.dtype == torch.uint8 and len(x) == len(y)


@pytest.mark.parametrize("severity", [0, 6, "1"])
def test_severity_of_a_file(tmp_path, severity):
    with pytest.raises(ValueError, match="severity: got"):
        read_corrupted_images(write_folder(tmp_path), "frost", severity)


# Runs

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("runs"))
    run(NET, store, "cpu", progress=False)
    return store


def go(store, names=("contrast",), severities=(1, 5), **kw):
    return evaluate_drift(NET, store, names, severities, device="cpu", **kw)


def by_hand(z, y, n_bins=15):
    "Accuracy, NLL and ECE of logits, in NumPy"
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    conf, right = p.max(1), p.argmax(1) == y
    bins = np.ceil(conf*n_bins)
    ece = sum(abs(conf[bins == b].sum() - right[bins == b].sum()) for b in np.unique(bins))/len(y)
    return [right.mean(), -np.log(p[range(len(y)), y]).mean(), ece]


def test_rows_are_those_of_the_network_and_the_temperature_that_of_clean_images(store):
    found, data, net = go(store, ("contrast", "gaussian_noise"), n=50), load_data(TINY), store.load_net(NET)
    assert (list(found.rows) == ["clean", "contrast/1", "contrast/5", "gaussian_noise/1", "gaussian_noise/5"]
            and not found.published)
    assert found.T == store.get(NET).evaluation.T != 1 and found.n == 50
    for key, row in found.rows.items():
        x = data.test.inputs[:50]
        if key != "clean": x = corrupt_images(x, key.split("/")[0], int(key[-1]))
        with torch.no_grad(): z = net(data.normalise(x)).double().numpy()
        for which, T in (("raw", 1), ("scaled", found.T)):
            assert ([row[which][k] for k in ("top1", "nll", "ece")]
                    == pytest.approx(by_hand(z/T, data.test.labels[:50].numpy()), abs=1e-5))
            assert (row[which]["low"] <= row[which]["high"]
                    and row[which]["null_low"] < row[which]["null_high"])


def test_all_corruptions_and_all_test_images_are_the_default(store, monkeypatch):
    patch_name(monkeypatch, "_evaluate_with_noise", lambda logits, labels: {"n": len(logits)})
    found = evaluate_drift(NET, store, device="cpu")
    assert set(found.rows) == {"clean"} | {f"{k}/{s}" for k in STRENGTHS for s in range(1, 6)}
    assert {row["scaled"]["n"] for row in found.rows.values()} == {found.n} == {80}


def test_a_run_that_is_not_there(store, tmp_path):
    with pytest.raises(ValueError, match="spec: got known resnet8 nll, seed 7, which is not in .*, "
                                         "expected a finished run: `run` it first"):
        evaluate_drift(replace(NET, seed=7), store)
    with pytest.raises(ValueError, match="`run` it first"): evaluate_drift(NET, Store(tmp_path))
    with pytest.raises(ValueError, match="`run` it first"): evaluate_drift(NET)


@pytest.mark.parametrize("change, message", [
    (dict(names=("contrast", "rain")), "corruption: got 'rain'"),
    (dict(names=("frost",)), "corruption: got 'frost'"), (dict(severities=(1, 9)), "severity: got 9"),
    (dict(n=0), "n: got 0, expected 1 to 80"), (dict(n=81), "n: got 81"), (dict(n=2.5), "n: got 2.5"),
    (dict(folder="nowhere"), "folder: got no .*contrast.npy"),
])
def test_what_is_wrong_is_said_before_the_network_is_asked(store, monkeypatch, change, message):
    patch_name(monkeypatch, "predict_logits", lambda *a: pytest.fail("asked"))
    with pytest.raises(ValueError, match=message): go(store, **change)


def test_published_files_are_asked_about(store, tmp_path):
    test = load_data(TINY).test
    made = torch.cat([corrupt_images(test.inputs, "contrast", s) for s in range(1, 6)])
    folder = write_folder(tmp_path/"c", labels=test.labels.repeat(5).numpy().astype(np.uint8))
    np.save(folder/"frost.npy", made.permute(0, 2, 3, 1).numpy())
    ours, theirs = go(store), go(store, ("frost",), folder=folder)
    assert theirs.published and theirs.rows["clean"] == ours.rows["clean"]
    for s in (1, 5): assert theirs.rows[f"frost/{s}"] == ours.rows[f"contrast/{s}"]
    few = go(store, ("frost",), (5,), n=30, folder=folder)
    assert few.rows["frost/5"] == go(store, n=30).rows["contrast/5"]


@pytest.mark.parametrize("n, size, shift", [(80, 8, 1), (80, 32, 0), (79, 8, 0)])
def test_files_of_other_images_are_refused(store, tmp_path, n, size, shift):
    labels = load_data(TINY).test.labels[:n].roll(shift).repeat(5).numpy()
    folder = write_folder(tmp_path/"c", n, size, labels=labels)
    with pytest.raises(
        ValueError, match="folder: got .*, whose images or labels are others, expected the 80 test images"
    ):
        go(store, ("frost",), folder=folder)


def test_json(store, tmp_path):
    ours = go(store, ("contrast", "snow"))
    assert decode(json.loads(json.dumps(encode(ours)))) == ours
    other = replace(ours, spec=replace(NET, seed=3), published=True)
    write_drifts([ours, other], tmp_path/"sub"/"d.npz")
    read = read_drifts(tmp_path/"sub"/"d.npz")
    assert (list(read) == [ours.spec, other.spec]
            and read[other.spec].published and not read[ours.spec].published)
    for key, row in ours.rows.items():
        for which in row: assert read[NET].rows[key][which] == pytest.approx(row[which], rel=1e-5)
    nll = [d.rows["clean"]["raw"]["nll"] for d in (read[NET], ours)]
    assert nll[0] == float(f"{nll[1]:.6g}") != nll[1]
    with pytest.raises(ValueError, match="drift_results: got two of one run"):
        write_drifts([ours, replace(ours, published=True)], tmp_path/"e.npz")
    assert not (tmp_path/"e.npz").exists()


def test_means_by_severity():
    row = lambda v: {"raw": {"top1": v, "ece": 1 - v}, "scaled": {"top1": v, "ece": v/2}}
    found = DriftResult(NET, 80, 1.5,
                        {"clean": row(.9), "fog/2": row(.6), "snow/2": row(.4), "snow/5": row(.1)})
    assert (average_by_severity(found, "raw")["ece"]
            == pytest.approx([.1, np.nan, .5, np.nan, np.nan, .9], nan_ok=True))
    assert (average_by_severity(found, "scaled")["ece"]
            == pytest.approx([.45, np.nan, .25, np.nan, np.nan, .05], nan_ok=True))
    with pytest.raises(ValueError, match="output: got 'both', expected 'raw' or 'scaled'"):
        average_by_severity(found, "both")


def test_a_network_that_is_always_right_and_sure_has_no_error():
    row = _evaluate_with_noise(torch.eye(3).repeat(5, 1)*50, torch.arange(3).repeat(5))
    assert (row["top1"] == 1 and row["ece"] == pytest.approx(0, abs=1e-9)
            and row["nll"] == pytest.approx(0, abs=1e-9))
