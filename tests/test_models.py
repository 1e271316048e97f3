"The models: published parameter counts, shapes, both parts, repeatable and storable"
import pytest
import torch

from kdc_nb.training.models import MODELS, build_model, count_parameters
from tests.conftest import forget_data

# for 10 and 100 classes; where only one is published (resnet56, mobilenet_v2_plain), the head gives the other
PUBLISHED = {
    "resnet8": (78_042, 83_892), "resnet56": (855_770, 861_620), "resnet56_bottleneck": (591_322, 614_452),
    "wrn_40_1": (563_930, 569_780), "wrn_40_2": (2_243_546, 2_255_156),
    "mobilenet_v2": (2_254_090, 2_369_380), "mobilenet_v2_plain": (2_237_770, 2_353_060),
    "densenet121": (6_956_298, 7_048_548), "resnet50": (23_520_842, 23_705_252),
}
every = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(autouse=True)
def one_thread():
    """Deep nets on tiny images are thousands of small steps, at each of which a second
    thread would be waited for
    """
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def build(name: str, n_classes: int = 10, in_channels: int = 3):
    "A net from seed 0"
    torch.manual_seed(0)
    return build_model(name, n_classes, in_channels)


@every
def test_counts(name):
    assert tuple(count_parameters(build(name, c)) for c in (10, 100)) == PUBLISHED[name]


@every
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (3, 32, 32), (3, 24, 40)])
def test_shapes(name, shape):
    net = build(name, 7, shape[0]).eval()
    with torch.no_grad(): h = net.features(torch.zeros(2, *shape))
    assert h.shape == (2, net.head.in_features)
    assert net.head(h).shape == (2, 7)


@every
def test_parts_repetition_storage(name):
    net, twin, x = build(name), build(name), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        net(x) # moves the running statistics, which must be stored too
        twin.load_state_dict(net.state_dict())
        z = net.eval()(x)
        assert torch.equal(net.head(net.features(x)), z)
        assert torch.equal(twin.eval()(x), z)
    assert z.isfinite().all()


def test_one_seed_one_net():
    first, again = build("resnet8").state_dict(), build("resnet8").state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.weight"], build_model("resnet8", 10).head.weight)


@every
def test_gradient_reaches_every_parameter(name):
    net = build(name)
    net(torch.randn(4, 3, 16, 16)).square().sum().backward()
    normalised = {f"{k}.bias" for k, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert all(p.grad is not None and (k in normalised or p.grad.any()) for k, p in net.named_parameters())


@every
def test_companions_do_not_matter_in_evaluation(name):
    net, x = build(name).eval(), torch.randn(4, 3, 16, 16)
    with torch.no_grad(): torch.testing.assert_close(net(x)[:2], net(x[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet8", "resnet11_bottleneck", "wrn_10_2", "mobilenet_v2"])
def test_channels_last_and_bfloat16(name):
    net, x = build(name).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        z = net(x)
        fast = net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(x.to(memory_format=torch.channels_last)), z, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16): half = fast(x)
    assert (half.float() - z).norm() < .05*z.norm()


@pytest.mark.parametrize("name", ["", "resnet", "resnet08", "wrn_40", "wrn-40-2",
                                  "wrn_40_0", "WRN_40_2", "vgg16", "resnet8\n"])
def test_unknown_names_list_the_known(name):
    with pytest.raises(ValueError,
                       match=r"model: got .* expected one of .*densenet121, .*, wrn_\{depth\}_\{width\}"):
        build_model(name, 10)


@pytest.mark.parametrize("name, rule", [("resnet9", "6n.2"), ("resnet2", "6n.2"),
                                        ("resnet8_bottleneck", "9n.2"), ("wrn_41_2", "6n.4")])
def test_depths_that_cannot_be(name, rule):
    with pytest.raises(ValueError, match=rf"depth: got \d+, expected {rule}"): build_model(name, 10)


def test_a_name_of_ones_own(monkeypatch):
    made = []
    monkeypatch.setitem(MODELS, "Mine.{a}x{b}",
                        lambda n_classes, in_channels, a, b:
                            made.append((n_classes, in_channels, a, b)) or torch.nn.Identity())
    monkeypatch.setitem(MODELS, "mine_8",
                        lambda n_classes, in_channels: made.append("exact") or torch.nn.Identity())
    monkeypatch.setitem(MODELS, "mine_{n}",
                        lambda n_classes, in_channels, n: made.append(n) or torch.nn.Identity())
    for name in ("Mine.3x14", "mine_8", "mine_9"): build_model(name, 5, 1)
    assert made == [(5, 1, 3, 14), "exact", 9]
    with pytest.raises(ValueError, match="model: got 'resnet8', expected a name that is not also"):
        MODELS["resnet8"] = lambda n_classes, in_channels: torch.nn.Identity()


@pytest.mark.parametrize("depth, published", [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_torchvisions_resnets_have_their_published_size(depth, published):
    with torch.device("meta"):
        assert count_parameters(build_model(f"torchvision_resnet{depth}", 1000)) == published
    with pytest.raises(ValueError, match="in_channels: got 1, expected 3"):
        build_model(f"torchvision_resnet{depth}", 10, 1)


def test_torchvisions_resnets_train_on_larger_images_and_show_their_penultimate_layer(tmp_path, monkeypatch):
    from kdc_nb.training.images import register_images
    from kdc_nb.training.recipes import Recipe
    from kdc_nb.experiments.runs import run
    from kdc_nb.experiments.specs import RunSpec
    from kdc_nb.experiments.store import Store
    from kdc_nb.analysis.views import extract_features
    monkeypatch.setenv("KDC_CACHE", str(tmp_path))
    pair = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8), torch.arange(12) % 3
    spec = RunSpec(register_images("large", pair, pair, pair), "torchvision_resnet18", "nll", Recipe(1, 6))
    assert (run(spec, Store(), "cpu", progress=False).evaluation.n == 12
            and extract_features(spec, Store(), "cpu").features["test"].shape == (12, 512))
    forget_data()
