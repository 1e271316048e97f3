"""The quarter of an hour on a GPU, rehearsed on a CPU at a tiny size: what travels,
three calls, what comes home
"""
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

ROOT = Path(__file__).parents[1]


def strips(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Images (N, 3, 32, 32) as lossless WebP, ten to a strip, and where each strip ends"
    from PIL import Image
    files = []
    for some in images.reshape(-1, 10, 3, 32, 32):
        Image.fromarray(some.transpose(0, 2, 3, 1).reshape(-1, 32, 3)).save(buffer := io.BytesIO(),
                                                                            "webp", lossless=True)
        files.append(buffer.getvalue())
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


@pytest.fixture
def shards(tmp_path):
    "Made-up shards in the form of the real ones, and what is in them"
    rng, kept = np.random.default_rng(0), {}
    (tmp_path/"data").mkdir()
    for name, (labels, names) in {"cifar10": ("label", "names"), "cifar100": ("fine", "fine_names")}.items():
        for part in (*(f"train-{k}" for k in range(5)), "test"):
            images, y = (rng.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8),
                         rng.integers(0, 10, 20, dtype=np.uint8))
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
    sizes = call(checkout, "prepare", data).split()
    assert sizes.count("KiB") == 3 and not (checkout/"nbs").exists() and (checkout/"tests").exists()
    commit = (checkout/".gpu/a/COMMIT").read_text().strip()

    def there(folder, *args): # only the work tree and one folder of .gpu travel
        shutil.copytree(checkout, tmp_path/"there", ignore=lambda at, names: {".git"} | (
            {"a", "b", "c"} - {folder} if at.endswith(".gpu") else set()
        ), dirs_exist_ok=True)
        benchmark = "--models resnet8 resnet14 --batch 32 --slots 1 2 --images 300 --seconds .1"
        small = dict(DEVICE="cpu", KDC_WORK=str(tmp_path/"work"),
                     OUT=str(tmp_path/f"out_{args[-2] if args[1:] else args[0]}"),
                     BENCHMARK=benchmark, SMALL="known", RECIPE="smoke", LIMIT="600")
        said = call(tmp_path/"there", *args, **small)
        shutil.rmtree(tmp_path/"there")
        return Path(small["OUT"]), said

    out, said = there("a", "one")
    speed = json.loads((out/"benchmark_training.json").read_text())
    assert "All is well." in said and speed["slots"] in (1, 2) and speed["facts"]["commit"] == commit
    out, said = there("b", "more", "table2b", 60)
    results = read_results(out/"table2b.npz")
    assert len(results) >= 2 and {r.facts["commit"] for r in results.values()} == {commit}, said
    first = next(s for s in [*results][:3] if s.method == Method("nll")) # on a CPU two or more at a time
    assert Distil(first) in [s.method for s in [*results][:8]], (
        "the uncalibrated teacher, and soon its student"
    )
    tars = {p.name for p in out.glob("store_*.tar")}
    out, _ = there("c", "more", "table1", 40)
    assert tars and {p.name for p in out.glob("store_*.tar")} - tars, "the first runs of each"
    assert ({p.name for p in (tmp_path/"work/shards").iterdir()}
            == {f"{name}-{part}.npz" for name, part in kept})

    subprocess.run([sys.executable, "-m", "tests.shards", "cifar100", tmp_path/"work/shards"],
                   cwd=checkout, check=True, env=os.environ | {"KDC_CACHE": str(tmp_path/"cache")})
    tensors, meta = load_tensors(tmp_path/"cache/data/cifar100.safetensors")
    assert (torch.equal(tensors["test_inputs"], torch.from_numpy(kept["cifar100", "test"][0]))
            and meta["classes"][3] == "class 3")
    assert torch.equal(tensors["train_labels"][40:60],
                       torch.from_numpy(kept["cifar100", "train-2"][1]).long())

    call(checkout, "home", tmp_path/"out_one")
    call(checkout, "home", out)
    call(checkout, "home", out)
    assert (set(read_results(checkout/"nbs/results/gpu_table1.npz"))
            and (checkout/"nbs/results/gpu_benchmark_training.json").exists())
    assert (checkout/"nbs/index.ipynb").exists()


def test_missing_shards_are_named(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tests.shards", "cifar10", str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no cifar10-train-0.npz" in done.stderr and not list(tmp_path.iterdir())
