"A network and its temperature in one module: saved, exported, run elsewhere"
import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from kdc_nb.calibration.posthoc import fit_temperature
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.images import register_images
from kdc_nb.training.models import build_model
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.deployment import Calibrated, Normalise, load_calibrated
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import RunSpec
from kdc_nb.experiments.store import Store

SPEC = RunSpec(DataSpec("digits", n_train=200, n_valid=200), "resnet8", "nll", Recipe(2, 32, lr=.05))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run, and its network as it is taken home"
    store = Store(tmp_path_factory.mktemp("runs"))
    return run(SPEC, store, "cpu", progress=False), load_calibrated(SPEC, store), store


def images(n=50): return load_data(SPEC.data).test.inputs[:n]


def test_bytes_become_the_scaled_logits_of_the_run(trained):
    result, net, _ = trained
    data = load_data(SPEC.data)
    assert float(net.T) == pytest.approx(fit_temperature(result.logits["valid"], data.valid.labels))
    ours, theirs = net(data.test.inputs).detach(), result.logits["test"]/float(net.T)
    assert torch.allclose(ours, theirs, atol=1e-4) and not net.training


def test_safetensors_keep_the_temperature(trained, tmp_path):
    net = trained[1]
    save_model(net, str(tmp_path/"net.safetensors"))
    other = Calibrated(nn.Sequential(Normalise((0.,), (1.,)), build_model("resnet8", 10, 1)), 1.).eval()
    load_model(other, str(tmp_path/"net.safetensors"))
    assert torch.equal(other(images()), net(images())) and float(other.T) == float(net.T) != 1


def test_no_optimizer_touches_the_temperature(trained):
    net = trained[1]
    assert "T" in dict(net.named_buffers()) and "T" not in dict(net.named_parameters())
    assert net.to(torch.float64).T.dtype == torch.float64 and net.to(torch.float32).T.dtype == torch.float32


def exported(net) -> torch.export.ExportedProgram:
    return torch.export.export(net, (images(4),), dynamic_shapes=(({0: torch.export.Dim("batch", min=2)},),))


def test_torch_export(trained, tmp_path):
    torch.export.save(exported(trained[1]), tmp_path/"net.pt2")
    again = torch.export.load(tmp_path/"net.pt2").module()
    assert torch.allclose(again(images(33)), trained[1](images(33)), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx(trained, tmp_path):
    for name in ("onnxscript", "onnxruntime"): pytest.importorskip(name)
    import onnxruntime
    torch.onnx.export(exported(trained[1]), (), tmp_path/"net.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path/"net.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: images(33).numpy()})[0]
    assert np.allclose(got, trained[1](images(33)).detach().numpy(), atol=1e-4)


class Two(nn.Module):
    "One that takes two inputs"
    def forward(self, x, y): return x + y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(trained, dtype):
    got, expected = copy.deepcopy(trained[1]).to(dtype)(images(5)), trained[1](images(5))
    assert got.dtype == dtype
    assert torch.allclose(got.float(), expected, atol=.3 if dtype == torch.bfloat16 else 1e-4)


def test_any_network():
    x = torch.randn(3, 4)
    assert torch.equal(Calibrated(Two(), 4)(x, y=x), x/2)
    assert torch.equal(Calibrated(Two(), np.float32(4))(x, x), x/2)


@pytest.mark.parametrize("do, message", [
    (lambda: Calibrated(Two(), -1), "T: got -1, expected a finite number above 0"),
    (lambda: Calibrated(Two(), float("nan")), "T: got nan"),
    (lambda: Calibrated(Two(), "2"), "T: got '2'"),
    (lambda: Calibrated(nn.LSTM(4, 4), 2)(torch.zeros(1, 4)), "net: got one that gives a tuple"),
    (lambda: Calibrated(torch.zeros(3), 1), "net: got Tensor, expected a torch.nn.Module"),
    (lambda: load_calibrated(SPEC, Store("/nowhere")), "spec: got .*resnet8.*/nowhere has not")])
def test_bad_input_is_told(do, message):
    with pytest.raises(ValueError, match=message): do()


def test_tables_are_refused(tmp_path):
    x, y = torch.randn(60, 5), torch.arange(60) % 2
    data = register_images("a table", *[(x, y)]*3, ["a", "b"])
    from kdc_nb.training.models import MODELS
    MODELS.register("line")(lambda n_classes, in_channels: nn.Linear(5, n_classes))
    spec, store = RunSpec(data, "line", "nll", Recipe(1, 20)), Store(tmp_path)
    run(spec, store, "cpu", progress=False)
    with pytest.raises(ValueError, match="spec: got a run on texts or tables"): load_calibrated(spec, store)
