"""What several tests share: a store of their own, made-up outputs, a browser, and real photographs
where they are to be had.
"""

import os
import shutil
import sys
from pathlib import Path

import kdc_nb # noqa: F401, before torch, for its threads' sake
import pytest
import torch
from hypothesis import HealthCheck, settings

from kdc_nb.core import Registry
from kdc_nb.training.data import _build_data, _summarise_data
from kdc_nb.experiments.store import Store
from tests.shards import write_photos

settings.register_profile("kit", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("kit")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def pytest_collection_modifyitems(items):
    """Of several workers each takes whole files. The pages in JupyterLab take longest: they come first, and
    any worker may do a quarter of them
    """
    def is_page(item): return item.path.name == "test_lab.py" and hasattr(item, "callspec")
    for k, item in enumerate(items):
        part = f" {k % 4}" if is_page(item) else ""
        item.add_marker(pytest.mark.xdist_group(item.path.stem + part))
    items.sort(key=lambda item: not is_page(item))


def made(n=600, c=5, factor=1., sharpness=2., seed=0):
    "Logits of a model off by `factor`, labels, and the true posterior"
    g = torch.Generator().manual_seed(seed)
    z = sharpness*torch.randn(n, c, generator=g, dtype=torch.float64)
    return factor*z, z.softmax(1).multinomial(1, generator=g).squeeze(1), z.softmax(1)


def patch_name(monkeypatch, name, value):
    "Give a name another value in every module of kdc_nb that has it, until the test is over"
    users = [m for k, m in list(sys.modules.items()) if k.startswith("kdc_nb.") and name in vars(m)]
    assert users, f"nothing is called {name}"
    for m in users: monkeypatch.setattr(m, name, value)


def forget_data():
    "Data sets are loaded anew from here on"
    for remembered in (_build_data, _summarise_data): remembered.cache_clear()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "No test reads or writes the user's cache."
    monkeypatch.setenv("KDC_CACHE", str(tmp_path/"cache"))


@pytest.fixture(autouse=True)
def own_entries_stay_in_their_test():
    "What a test registers is gone afterwards"
    before = {k: dict(r.data) for k, r in Registry.by_kind.items()}
    yield
    for k, r in Registry.by_kind.items():
        r.data = {n: made for n, made in r.data.items() if not r.is_own(n)} | before.get(k, {})


@pytest.fixture
def store(tmp_path):
    "A store of the test's own"
    return Store(tmp_path/"runs")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    "A Chromium with a profile of its own; tests that ask for it are skipped where there is none."
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium: pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(tmp_path_factory.mktemp("profile"),
                                                       executable_path=chromium, args=FLAGS,
                                                       viewport={"width": 1280, "height": 1600})
        yield context
        context.close()


@pytest.fixture
def shots(tmp_path):
    "Where screenshots go: `$KDC_SCREENSHOTS`, for those who want to look at them."
    return Path(os.environ.get("KDC_SCREENSHOTS", tmp_path))


@pytest.fixture(scope="session")
def photo_cache(tmp_path_factory):
    """A cache folder that holds real CIFAR-10 and CIFAR-100; tests that ask for it are
    skipped where there are none.
    """
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
