"The quarter of an hour on a GPU, rehearsed on a CPU at a tiny size: what travels, the calls, what comes home"
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdc_nb.files import load_tensors
from kdc_nb.training.methods import Method
from kdc_nb.experiments.results import read_results
from kdc_nb.experiments.specs import Distil
from kdc_nb.experiments.store import Store
from kdc_nb.paper.settings import paper_specs
from tests.gpu.pack import into_folders, teachers_at_home

ROOT = Path(__file__).parents[1]


def strips(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Images (N, 3, 32, 32) as lossless WebP, up to 500 to a strip, and where each strip ends"
    from PIL import Image
    files = []
    for some in np.split(images, range(500, len(images), 500)):
        Image.fromarray(some.transpose(0, 2, 3, 1).reshape(-1, 32, 3)).save(buffer := io.BytesIO(),
                                                                            "webp", lossless=True)
        files.append(buffer.getvalue())
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


@pytest.fixture
def shards(tmp_path):
    "Made-up shards in the form of the real ones, those of CIFAR-10 as many images of one colour each"
    rng, kept = np.random.default_rng(0), {}
    (tmp_path/"data").mkdir()
    for name, (labels, names) in {"cifar10": ("label", "names"), "cifar100": ("fine", "fine_names")}.items():
        for part in (*(f"train-{k}" for k in range(5)), "test"):
            n, side = (10_000, 1) if name == "cifar10" else (20, 32)
            images = rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8)
            images = images.repeat(32//side, 2).repeat(32//side, 3)
            y = rng.integers(0, 10, n, dtype=np.uint8)
            webp, offsets = strips(images)
            np.savez(tmp_path/"data"/f"{name}-{part}.npz", webp=webp, offsets=offsets,
                     **{labels: y, names: np.array([f"class {k}" for k in range(10)])})
            kept[name, part] = images, y
    return tmp_path/"data", kept


@pytest.fixture
def checkout(tmp_path):
    "A repository with the files of this one"
    files = (subprocess.run(["git", "ls-files", "-co", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True, check=True)
             .stdout.split("\n"))
    for f in filter(None, files):
        if (ROOT/f).exists() and not f.startswith("nbs/results") or f.endswith("transfer_curve.npz"):
            (tmp_path/"here"/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/f, tmp_path/"here"/f)
    git = lambda *args: subprocess.run(["git", "-C", tmp_path/"here", "-c", "user.name=a", "-c",
                                        "user.email=a@b", *args], check=True, capture_output=True)
    git("init")
    git("add", "-A")
    git("commit", "-m", "as it is")
    return tmp_path/"here"


def call(folder: Path, *args, **env) -> str:
    "What calls.sh prints"
    done = subprocess.run(["bash", "tests/gpu/calls.sh", *map(str, args)],
                          cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_the_calls_rehearsed(tmp_path, checkout, shards):
    data, kept = shards
    home = dict(KDC_CACHE=str(tmp_path/"home"))
    said = call(checkout, "prepare", data, "table2b", **home)
    packed = [f.relative_to(checkout/".gpu") for f in (checkout/".gpu").glob("*/*.*")]
    assert {f.name for f in packed} == {"joblib.zip", *(f"{n}-{part}.npz" for n, part in kept
                                                        if n == "cifar10")}
    there_is = {f.name for f in checkout.iterdir()}
    assert "KiB" in said and there_is == {".git", ".gpu", "kdc_nb", "settings.ini", "tests"}
    commit = (checkout/".gpu/1/COMMIT").read_text().strip()

    def there(*args): # only the work tree and .gpu travel
        shutil.copytree(checkout, tmp_path/"there", ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
        benchmark = "--models resnet8 resnet14 --batch 32 --slots 1 2 --images 300 --seconds .1"
        out = tmp_path/f"out_{'_'.join(map(str, args))}"
        said = call(tmp_path/"there", *args, DEVICE="cpu", KDC_WORK=str(tmp_path/"work"), OUT=str(out),
                    SLOTS="2", BENCHMARK=benchmark, SMALL="known", RECIPE="smoke", LIMIT="600")
        shutil.rmtree(tmp_path/"there")
        return out, said

    there("bring")
    brought = {p.name for p in (tmp_path/"work/shards").iterdir()}
    assert brought == {f.name for f in packed if f.suffix == ".npz"}
    out, said = there("check")
    speed = json.loads((out/"benchmark_training.json").read_text())
    assert "All is well." in said and speed["slots"] in (1, 2) and speed["facts"]["commit"] == commit
    first, said = there("more", "table2b", 60)
    results = read_results(first/"table2b.npz")
    assert len(results) >= 2 and {r.facts["commit"] for r in results.values()} == {commit}, said
    nll = next(s for s in [*results][:3] if s.method == Method("nll")) # on a CPU two or more at a time
    assert Distil(nll) in [s.method for s in [*results][:8]], "the uncalibrated teacher, and soon its student"
    tars = {p.name for p in first.glob("store_*.tar")}
    second, _ = there("more", "table1", 40)
    assert tars and {p.name for p in second.glob("store_*.tar")} - tars, "of what is new"

    for folder in (out, second, second): call(checkout, "home", folder, **home)
    assert (set(read_results(checkout/"nbs/results/table1.npz"))
            and (checkout/"nbs/results/gpu_benchmark_training.json").exists())
    weights = {f.stem for f in (tmp_path/"home/runs").glob("*.net")}
    assert weights == {p.stem.removeprefix("store_") for p in second.glob("store_*.tar")}
    assert (checkout/"nbs/index.ipynb").exists()


def test_shards_unpacked(tmp_path, shards):
    data, kept = shards
    subprocess.run([sys.executable, "-m", "tests.shards", "cifar100", data],
                   cwd=ROOT, check=True, env=os.environ | {"KDC_CACHE": str(tmp_path/"cache")})
    tensors, meta = load_tensors(tmp_path/"cache/data/cifar100.safetensors")
    assert (torch.equal(tensors["test_inputs"], torch.from_numpy(kept["cifar100", "test"][0]))
            and meta["classes"][3] == "class 3")
    assert torch.equal(tensors["train_labels"][40:60],
                       torch.from_numpy(kept["cifar100", "train-2"][1]).long())


def test_what_travels(tmp_path):
    "Teachers that are at home travel with their weights; no folder is larger than one call may bring"
    specs = list(paper_specs("table2b", "smoke", small="known").values())
    store = Store(tmp_path)
    nll = next(s for s in specs if s.method == Method("nll"))
    student = next(s for s in specs if s.teacher_runs())
    assert student.teacher_runs() == (nll,) and teachers_at_home(specs, store) == []
    for spec in (nll, student):
        for kind in ("run", "net"): store.path(spec, kind).write_bytes(b"x")
    assert teachers_at_home(specs, store) == [store.path(nll, "run"), store.path(nll, "net")]
    store.path(nll, "net").unlink()
    assert teachers_at_home(specs, store) == [], "of no use without weights"
    for name, size in {"a": 3, "b": 6, "c": 5, "joblib.zip": 2, "d": 4}.items():
        (tmp_path/name).write_bytes(bytes(size))
    names = lambda limit: [[f.name for f in folder] for folder in into_folders(
        [tmp_path/k for k in ("a", "b", "c", "joblib.zip", "d")], limit)]
    assert names(10) == [["joblib.zip", "b"], ["c", "d"], ["a"]]
    assert names(20) == [["joblib.zip", "b", "c", "d", "a"]]


def test_missing_shards_are_named(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.shards", "cifar10", str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no cifar10-train-0.npz" in done.stderr and not list(tmp_path.iterdir())
