"""What several tests share: a store of their own, made-up outputs, a browser, and real photographs where they are to be had."""

import io
import os
import shutil
from pathlib import Path

import kdc_nb # before torch, for its threads' sake
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from kdc_nb.core import save_tensors

settings.register_profile("kit", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("kit")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def made(n=600, c=5, factor=1., sharpness=2., seed=0):
    "Logits of a model off by `factor`, labels, and the true posterior"
    g = torch.Generator().manual_seed(seed)
    z = sharpness*torch.randn(n, c, generator=g, dtype=torch.float64)
    return factor*z, z.softmax(1).multinomial(1, generator=g).squeeze(1), z.softmax(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "No test reads or writes the user's cache."
    monkeypatch.setenv("KDC_CACHE", str(tmp_path/"cache"))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    "A Chromium with a profile of its own; tests that ask for it are skipped where there is none."
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium: pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(tmp_path_factory.mktemp("profile"), executable_path=chromium, args=FLAGS,
                                                       viewport={"width": 1280, "height": 1600})
        yield context
        context.close()


@pytest.fixture
def shots(tmp_path):
    "Where screenshots go: `$KDC_SCREENSHOTS`, for those who want to look at them."
    return Path(os.environ.get("KDC_SCREENSHOTS", tmp_path))


def unpack(shard: Path) -> torch.Tensor:
    "The images of one shard: 100 lossless WebP strips of 100 images each, as (10000, 3, 32, 32) uint8."
    from PIL import Image
    with np.load(shard, allow_pickle=False) as z:
        data, ends = z["webp"].tobytes(), z["offsets"]
    strips = [np.asarray(Image.open(io.BytesIO(data[a:b])).convert("RGB")) for a, b in zip(ends, ends[1:])]
    return torch.from_numpy(np.concatenate(strips).reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2).contiguous()


def write_photos(name: str, source: Path, folder: Path) -> None:
    "Write a photo set of the test data in the form of the kit's cache."
    labels, names = ("label", "names") if name == "cifar10" else ("fine", "fine_names")
    shards = {"train": sorted(source.glob(f"{name}-train-*.npz")), "test": [source/f"{name}-test.npz"]}
    tensors = {}
    for split, paths in shards.items():
        tensors[f"{split}_inputs"] = torch.cat([unpack(p) for p in paths])
        tensors[f"{split}_labels"] = torch.cat([torch.from_numpy(np.load(p, allow_pickle=False)[labels].astype(np.int64)) for p in paths])
    classes = np.load(shards["test"][0], allow_pickle=False)[names].tolist()
    save_tensors(folder/"data"/f"{name}.safetensors", tensors, classes=classes)


@pytest.fixture(scope="session")
def photo_cache(tmp_path_factory):
    "A cache folder that holds real CIFAR-10 and CIFAR-100; tests that ask for it are skipped where there are none."
    source = os.environ.get("KDC_TEST_DATA")
    if not source: pytest.skip("real photographs: KDC_TEST_DATA names no folder")
    folder = tmp_path_factory.mktemp("photos")
    for name in ("cifar10", "cifar100"): write_photos(name, Path(source), folder)
    return folder


@pytest.fixture
def photos(photo_cache, monkeypatch):
    "The kit's cache, holding real photographs."
    monkeypatch.setenv("KDC_CACHE", str(photo_cache))
    return photo_cache
