"""Two processes give what one does: weights, memory and evaluation, of images in memory
and on disk, and of texts.
"""

import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from kdc_nb.files import load_tensors
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.images import find_images
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import Recipe
from kdc_nb.training.steps import predict_logits
from kdc_nb.training.streams import register_image_folder
from kdc_nb.experiments.agenda import write_specs
from kdc_nb.experiments.specs import Distil, RunSpec
from kdc_nb.experiments.store import Store

PROGRAM = '''
import faulthandler, sys
from pathlib import Path
from plain_net import plain # which registers itself
from kdc_nb.training.devices import distributed_session, rank_and_world
from kdc_nb.experiments.agenda import read_specs
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.store import Store

faulthandler.dump_traceback_later(240, exit=True) # so that a process that waits for ever says where
with distributed_session("cpu"):
    for spec in read_specs(sys.argv[1]): run(spec, Store(sys.argv[2]), "cpu", progress=False)
'''
NET = '''
from torch import nn
from kdc_nb.training.models import MODELS

@MODELS.register("plain")
def plain(n_classes, in_channels):
    body = nn.Conv2d(in_channels, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(72, n_classes))
'''
DATA = DataSpec("known", n_train=90, n_valid=31, n_test=203)
RECIPE = Recipe(2, 32, lr=.05)


def launch(tmp_path, n, *args):
    "A program by itself, or in `n` processes of torchrun's"
    address = "--local-addr", "127.0.0.1" # which no name server has to find
    several = ["-m", "torch.distributed.run", "--standalone", *address, "--nproc-per-node", str(n)]
    torchrun = several if n > 1 else []
    return subprocess.run([sys.executable, *torchrun, *map(str, args)], capture_output=True, text=True,
                          timeout=300, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})


def both(tmp_path, specs):
    "Stores of runs done by one process and by two"
    write_specs(specs, tmp_path/"runs.json")
    (tmp_path/"program.py").write_text(PROGRAM)
    (tmp_path/"plain_net.py").write_text(NET)
    for n in (1, 2):
        done = launch(tmp_path, n, "program.py", "runs.json", f"store{n}")
        assert done.returncode == 0, done.stderr[-3000:]
    return Store(tmp_path/"store1"), Store(tmp_path/"store2")


def specs(tmp_path, monkeypatch):
    "Runs with a network of one's own, whose source is in their ids: both programs and this one import it"
    (tmp_path/"plain_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    import_module("plain_net")
    rng = np.random.default_rng(0)
    for c in "ab":
        (tmp_path/"images"/c).mkdir(parents=True)
        for k in range(13):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
                tmp_path/"images"/c/f"{k}.png"
            )
    names, labels, classes = find_images(tmp_path/"images")
    parts = [(names[k::3], labels[k::3]) for k in range(3)]
    disk = register_image_folder("disk", tmp_path/"images", *parts, classes, 16)
    teacher = RunSpec(DATA, "plain", Method("mdca", beta=5), RECIPE)
    shifted = Recipe(2, 4, lr=.01, augment=("crop", "flip"), live_teacher=True)
    seen = RunSpec(disk, "plain", "mmce", shifted)
    text = RunSpec(DataSpec("topics", n_train=64, n_valid=20, n_test=33), "bert_1_32",
                   Method("dca"), Recipe(1, 16, lr=1e-3, optimizer="adamw", warmup=.1))
    return [*(RunSpec(DATA, "plain", m, RECIPE) for m in ("pskd", "crl", "mixup", "adafocal")),
            RunSpec(DATA, "plain", Distil(teacher, 2, .7), RECIPE),
            RunSpec(disk, "plain", Distil(seen), shifted), text]


def test_two_processes_give_what_one_does(tmp_path, monkeypatch):
    made = specs(tmp_path, monkeypatch)
    one, two = both(tmp_path, made)
    for spec in (*made, made[4].method.teacher, made[5].method.teacher):
        (a, _), (b, _) = (load_tensors(s.path(spec, "net")) for s in (one, two))
        ra, rb = one.get(spec), two.get(spec)
        assert (rb.facts["processes"] == 2 and "processes" not in ra.facts
                and ra.logits["test"].shape == rb.logits["test"].shape)
        if spec.model == "bert_1_32": continue # each process drops out other features
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5
        assert float((ra.logits["test"] - rb.logits["test"]).abs().max()) < 1e-4
        for x, y in zip(ra.history, rb.history): assert x == pytest.approx(y, abs=1e-4)


def test_with_batch_statistics_each_process_normalises_its_own_part(tmp_path):
    spec = RunSpec(DATA, "resnet8", "nll", RECIPE)
    one, two = both(tmp_path, [spec])
    said, data = two.get(spec).logits["test"], load_data(DATA)
    assert float((one.get(spec).logits["test"] - said).abs().max()) > 1e-3
    assert torch.allclose(predict_logits(two.load_net(spec), data, data.test.inputs), said,
                          atol=1e-5), "what was judged is the network that was kept"


def test_the_command_speaks_once_and_a_budget_stops_all(tmp_path):
    args = ("-m", "kdc_nb", "runs.json", "--store", "s", "--device", "cpu")
    write_specs([RunSpec(DATA, "resnet8", "nll", Recipe(4000, 32))], tmp_path/"runs.json")
    done = launch(tmp_path, 2, *args, "--budget", "10s")
    assert (done.stdout.count("0 of 1 runs done") == 1 and done.returncode == 0
            and len(list((tmp_path/"s").glob("*.part"))) == 1)
    write_specs([RunSpec(DATA, "resnet8", "nll", RECIPE)], tmp_path/"runs.json")
    done = launch(tmp_path, 2, *args, "--results", "r.npz")
    assert done.stdout.count("1 of 1 runs done") == 1 and done.returncode == 0 and (tmp_path/"r.npz").exists()


def test_what_cannot_be_shared_is_refused(tmp_path):
    args = ("-m", "kdc_nb", "runs.json", "--store", "s", "--device", "cpu")
    write_specs([RunSpec(DATA, "resnet8", "nll", Recipe(1, 33))], tmp_path/"runs.json")
    assert "batch_size: got 33, expected a multiple of 2" in launch(tmp_path, 2, *args).stderr
    stores = ("program.py", "runs.json", "own")
    (tmp_path/"plain_net.py").write_text(NET)
    (tmp_path/"program.py").write_text(PROGRAM.replace("sys.argv[2]",
                                                       "sys.argv[2] + str(rank_and_world()[0])"))
    write_specs([RunSpec(DATA, "resnet8", "nll", Recipe(1, 32))], tmp_path/"runs.json")
    launch(tmp_path, 2, *stores)
    assert ("in which one process finds what another does not, expected a folder that all processes share"
            in launch(tmp_path, 2, *stores).stderr)
    assert ("jobs: got 2, expected 1, as the processes share each run"
            in launch(tmp_path, 2, *args, "--jobs", 2).stderr)
