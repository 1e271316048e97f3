"""One registry: a name is given once, what is registered is part of a run's id, and
is there in other processes
"""

import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kdc_nb.fingerprints import source_fingerprint
from kdc_nb.core import user_entries
from kdc_nb.values import spec_hash
from kdc_nb.calibration.posthoc import Calibrator
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.losses import cross_entropy
from kdc_nb.training.network_checks import check_network
from kdc_nb.training.methods import Method, TrainingMethod
from kdc_nb.training.models import MODELS
from kdc_nb.training.recipes import RECIPES, Recipe
from kdc_nb.training.trainer import fit
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import Distil, RunSpec, run_id
from kdc_nb.experiments.store import Store
from kdc_nb.analysis.corruptions import corrupt_images, register_corruption

TINY = DataSpec("known", n_train=100, n_valid=60, n_test=80)
OWN = '''
import torch
from kdc_nb.training.data import DataSpec, Dataset, Split
from kdc_nb.training.losses import cross_entropy
from kdc_nb.training.methods import Method, TrainingMethod
from kdc_nb.training.models import MODELS

FACTOR = {factor}

def penalty(z): return FACTOR*z.pow(2).mean()

@Method.register("own_penalty")
def own_penalty(beta=1.): return TrainingMethod(lambda z, y: cross_entropy(z, y) + beta*penalty(z))

@MODELS.register("own_net_{{width}}")
def own_net(n_classes, in_channels, width):
    flat = torch.nn.Linear(64*in_channels, width)
    return torch.nn.Sequential(torch.nn.Flatten(), flat, torch.nn.ReLU(), torch.nn.Linear(width, n_classes))

@DataSpec.register("own_data")
def own_data(n=60):
    g = torch.Generator().manual_seed(0)
    def split():
        y = torch.arange(n) % 4
        x = torch.randint(0, 60, (n, 1, 8, 8), generator=g, dtype=torch.uint8)
        x += (50*y.to(torch.uint8))[:, None, None, None]
        return Split(x, y, torch.nn.functional.one_hot(y, 4).float())
    return Dataset(split(), split(), split(), ("a", "b", "c", "d"), superclass=(0, 0, 1, 1))
'''
SPECS = '''
from kdc_nb.training.recipes import RECIPES, Recipe
from kdc_nb.experiments.agenda import write_specs
from kdc_nb.experiments.specs import Distil, RunSpec
data, recipe = DataSpec("own_data"), Recipe(2, 20)
teacher = RunSpec(data, "own_net_9", Method("own_penalty", beta=.1), recipe)
student = RunSpec(data, "own_net_5", Distil(teacher), recipe)
specs = [teacher, student, RunSpec(data, "own_net_5", Method("own_penalty"), recipe)]
'''


def register(factor: float = 1., layer: str = "ReLU") -> None:
    "What a script or notebook registers, with a constant of a helper and a layer of the network"
    exec(compile(OWN.format(factor=factor).replace("ReLU", layer), "<own>", "exec"), {"__name__": "__main__"})


SPEC = RunSpec(TINY, "resnet8", "nll", Recipe(1, 50))


@pytest.mark.parametrize("registry, name", [
    (Method.registry, "nll"), (MODELS, "densenet121"),
    (MODELS, "resnet{depth}"), (MODELS, "bert-base-uncased"),
    (DataSpec.registry, "known"), (DataSpec.registry, "cifar10"), (Calibrator.registry, "ts"),
    (RECIPES, "cpu"),
])
def test_a_taken_name_is_refused(registry, name):
    def another(): pass
    before = registry[name]
    with pytest.raises(ValueError, match=f"{registry.kind}: got '.*', expected a name that is not taken"):
        registry.register(name)(another)
    with pytest.raises(ValueError, match="not taken"): registry[name] = lambda: None
    assert registry[name] is before


def test_a_cell_run_again_is_no_other_entry():
    for value in (1, 2):
        @Method.register("again")
        def again(x=value): return x
    assert Method("again").x == 2


def test_a_parameter_without_default_is_refused_where_it_is_registered():
    with pytest.raises(ValueError, match=r"Method\('bare'\): got parameters \['beta'\] without default"):
        @Method.register("bare")
        def bare(beta): pass
    assert "bare" not in Method.registry
    @Calibrator.register("given")
    def given(logits, labels, strength=1.): pass
    assert Calibrator("given").strength == 1


def test_the_kits_own_runs_have_no_code_in_their_id():
    spec = RunSpec(TINY, "resnet8", Method("crl"))
    assert (user_entries() == []
            and run_id(spec) == spec_hash(spec, schema=1, data=[load_data(TINY).fingerprint]))


def test_changed_code_is_another_run():
    """The constant of a method's helper, a layer of a network: each is another id, also of a student,
    and the same again the same
    """
    register()
    net = replace(SPEC, model="own_net_3")
    specs = [replace(SPEC, method=Method("own_penalty")), net, replace(SPEC, method=Distil(net))]
    def ids(**kw):
        register(**kw)
        return [run_id(s) for s in specs]
    plain, constant, layer = ids(), ids(factor=-9.), ids(layer="Tanh")
    assert [a == b for a, b in zip(plain, constant)] == [False, True, True]
    assert [a == b for a, b in zip(plain, layer)] == [True, False, False]
    assert ids() == plain


def test_a_result_of_other_code_is_not_taken(tmp_path):
    "A method whose penalty was multiplied by -9 under the same name is trained, not looked up"
    results = []
    for factor in (1., -9.):
        register(factor)
        results.append(run(replace(SPEC, method=Method("own_penalty")),
                           Store(tmp_path), "cpu", progress=False))
    assert len([*tmp_path.glob("*.run")]) == 2
    assert not torch.equal(*(r.logits["test"] for r in results))


def test_what_a_fingerprint_holds():
    def f(x): return x + 1
    def g(x): return x + 2
    class A:
        def act(self): return f(1)
    class B:
        def act(self): return g(1)
    assert len({source_fingerprint(t) for t in (f, g, A, B, cross_entropy)}) == 5
    assert source_fingerprint(f) == source_fingerprint(f)


def test_a_scripts_own_method_network_and_data_in_two_processes(tmp_path):
    "Defined in the script itself: trained by two workers, and found again by a second call"
    (tmp_path/"script.py").write_text(OWN.format(factor=1.) + SPECS + '''
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.store import Store, all_results
from kdc_nb.experiments.sweeps import sweep
if __name__ == "__main__":
    store = Store("store")
    swept = sweep(specs, store, "cpu", jobs=2, progress=False)
    found = [run(s, store, "cpu", progress=False) for s in specs]
    same = [(a.logits["test"] == b.logits["test"]).all() for a, b in zip(swept, found)]
    print(all(same), len(all_results(store)))
''')
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "3"], done.stderr


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_the_command_imports_a_file(tmp_path, jobs):
    (tmp_path/"my_methods.py").write_text(OWN.format(factor=1.))
    (tmp_path/"specs.py").write_text("from my_methods import *" + SPECS + "write_specs(specs, 'runs.json')")
    subprocess.run([sys.executable, "specs.py"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "kdc_nb", "runs.json",
               "--store", "store", "--device", "cpu", "--jobs", jobs]
    told = subprocess.run([*command, "--import", "my_methods.py", "--results", "out.npz"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert len([*(tmp_path/"store").glob("*.run")]) == 3
    without = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert without.returncode == 2 and "own_" in without.stderr


def test_a_file_may_sweep_while_it_is_imported(tmp_path):
    "Its workers take what it registered, and do not import it again, sweep and all"
    sweeping = "from kdc_nb.experiments.store import Store\nfrom kdc_nb.experiments.sweeps import sweep\n"
    (tmp_path/"mine.py").write_text(OWN.format(factor=1.) + SPECS + sweeping
                                    + "write_specs(specs, 'runs.json')\n"
                                    "sweep(specs, Store('store'), 'cpu', jobs=2, progress=False)")
    done = subprocess.run([sys.executable, "-m", "kdc_nb", "runs.json",
                           "--import", "mine.py", "--store", "store",
                           "--device", "cpu"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "3 of 3 runs done" in done.stdout, done.stderr
    assert len([*(tmp_path/"store").glob("*.run")]) == 3


@pytest.mark.parametrize("text, message",
                         [("x = ", "SyntaxError"), ("import nothing_of_this_name", "ModuleNotFoundError"),
                          (None, "a .py file that is there")])
def test_a_file_that_cannot_be_imported(tmp_path, text, message):
    if text is not None: (tmp_path/"mine.py").write_text(text)
    done = subprocess.run([sys.executable, "-m", "kdc_nb", "fig4",
                           "--import", str(tmp_path/"mine.py"), "--plan"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_corruption_of_ones_own_is_like_the_kits():
    @register_corruption(1, 2, 3, 4, 5)
    def darkness(x, strength, rng): return x*(1 - strength/10)
    images = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    assert corrupt_images(images, "darkness", 5).unique().tolist() == [100]
    assert [name for _, name, _ in user_entries()] == ["darkness"]
    with pytest.raises(ValueError, match="strengths: got 2 of them"): register_corruption(1, 2)
    with pytest.raises(ValueError, match="corruption: got 'fog', expected a name that is not taken"):
        @register_corruption(1, 2, 3, 4, 5)
        def fog(x, strength, rng): return x


@pytest.mark.parametrize("name", ["", " a", 3, None])
def test_a_name_is_a_text(name):
    with pytest.raises(ValueError, match="name of a Method: got .* expected a text"):
        Method.register(name)(lambda: 1)
    assert Method("nll").build() is not None


def test_another_files_entry_of_the_same_name_is_refused(monkeypatch):
    source = "from kdc_nb.training.methods import Method\n@Method.register('mine')\ndef mine(): pass"
    def take(module):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        exec(source, vars(sys.modules[module]))
    take("first_file")
    take("first_file") # run again
    with pytest.raises(ValueError, match="Method: got 'mine', expected a name that is not taken"):
        take("second_file")


@pytest.mark.parametrize("taken, name", [
    (None, "resnet8"), (None, "resnet{n}"), (None, "wrn_40_2"),
    ("zz_{a}", "zz_{b}"), ("zz_{a}", "zz_3"),
])
def test_two_networks_cannot_be_meant_by_one_name(taken, name):
    def one(n_classes, in_channels, **numbers): pass
    def other(n_classes, in_channels, **numbers): pass
    if taken: MODELS.register(taken)(one)
    with pytest.raises(ValueError, match="model: got .* expected a name that is not also"):
        MODELS.register(name)(other)
    MODELS.register("resnet{depth}_of_mine")(other)


def test_a_network_with_other_outputs_is_refused_before_it_is_trained(tmp_path):
    @MODELS.register("one_too_many")
    def one_too_many(n_classes, in_channels):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(n_classes + 1))
    with pytest.raises(ValueError,
                       match=r"model: got 'one_too_many', whose outputs are \(2, 21\), expected \(2, 20\)"):
        run(replace(SPEC, model="one_too_many"), Store(tmp_path), "cpu", progress=False)


def test_a_method_that_gives_a_bare_function_is_told(tmp_path):
    @Method.register("bare_loss")
    def bare_loss(): return cross_entropy
    with pytest.raises(ValueError,
                       match=r"method: got a function of Method\('bare_loss'\), expected a `TrainingMethod`"):
        run(replace(SPEC, method=Method("bare_loss")), Store(tmp_path), "cpu", progress=False)


@pytest.mark.parametrize("use, change", [
    ("CFG['k']", "CFG = dict(k=3.)"), ("LST[0]", "LST = [3.]"), ("W.sum()", "W = torch.ones(3)*3"),
    ("OBJ.k", "OBJ.k = 3."), ("NESTED['a'][0].k", "NESTED['a'][0].k = 3."),
    ("helper.SCALE", "SCALE"), ("h(1.)", "SCALE"),
])
def test_whatever_of_ones_own_is_used_is_in_the_fingerprint(use, change, tmp_path, monkeypatch):
    """Dicts, lists, arrays, objects, and another file: changed, they are another id,
    and the same again the same
    """
    file = tmp_path/"helper.py"
    file.write_text("SCALE = 1.\ndef h(x): return x*SCALE")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    space = {"__name__": "__main__"}
    exec(f"""
import torch, helper
from helper import h
class Own: pass
CFG, LST, W, OBJ = dict(k=1.), [1.], torch.ones(3), Own()
OBJ.k = 1.; OBJ.itself = OBJ
NESTED = dict(a=(OBJ,))
def loss(z): return z*{use}
""", space)
    before, again = (source_fingerprint(space["loss"]) for _ in range(2))
    if change == "SCALE": space["helper"].SCALE = 3.
    else: exec(change, space)
    assert before == again != source_fingerprint(space["loss"])


class Answers(torch.nn.Module):
    "A network that gives something else than logits, `wrap` of them"
    def __init__(self, n_classes, wrap, where=(True, False)):
        super().__init__()
        self.body, self.wrap, self.where = torch.nn.Linear(192, n_classes), wrap, where
    def forward(self, x):
        z = self.body(x.flatten(1))
        return self.wrap(z) if self.training in self.where else z


@pytest.mark.parametrize("wrap, message", [
    (lambda z: torch.cat([z]*50, 1),
     r"whose outputs are \(2, 1000\), expected \(2, 20\), a logit for each class"),
    (lambda z: z[:, :1], r"whose outputs are \(2, 1\)"), (lambda z: z[:, 0], r"whose outputs are \(2,\)"),
    (lambda z: z[:, :, None], r"whose outputs are \(2, 20, 1\)"),
    (lambda z: z[:1], r"whose outputs are \(1, 20\)"),
    (lambda z: z.argmax(1), r"whose outputs are torch.int64 \(2,\)"),
    (lambda z: z.round().long(), r"whose outputs are torch.int64 \(2, 20\)"),
    (lambda z: (z, z), r"which returns a tuple, expected a tensor of shape \(2, 20\)"),
    (lambda z: [z], "which returns a list"), (lambda z: {"logits": z}, "which returns a dict"),
    (lambda z: SimpleNamespace(logits=z), "which returns a SimpleNamespace"),
    (lambda z: None, "which returns a NoneType")])
@pytest.mark.parametrize("where", [(True, False), (True,)])
def test_a_network_is_asked_before_it_is_trained(tmp_path, wrap, where, message):
    "By `run` and by `fit`, in evaluation mode and in training mode"
    MODELS.register("answers")(lambda n_classes, in_channels: Answers(n_classes, wrap, where))
    mode = "" if False in where else " in training mode"
    with pytest.raises(ValueError, match=f"model: got 'answers'{mode}, {message}"):
        run(replace(SPEC, model="answers"), Store(tmp_path), "cpu", progress=False)
    with pytest.raises(ValueError, match=f"model: got 'Answers'{mode}, {message}"):
        fit(Answers(20, wrap, where), load_data(TINY), Method("nll").build(), SPEC.recipe, device="cpu")
    assert not [*tmp_path.iterdir()], "nothing was begun"


def test_asking_leaves_a_network_and_the_random_numbers_as_they_were():
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, momentum=None),
                              torch.nn.Dropout(.5), torch.nn.Flatten(), torch.nn.Linear(144, 20),
                              torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(20, 20)))
    net[1].eval()
    state, modes = {k: t.clone() for k, t in net.state_dict().items()}, [m.training for m in net.modules()]
    before = torch.get_rng_state()
    check_network(net, load_data(TINY), "some")
    assert torch.equal(before, torch.get_rng_state()) and modes == [m.training for m in net.modules()]
    assert all(torch.equal(t, state[k]) for k, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_weights_that_are_made_when_an_image_is_seen_follow_the_seed():
    def made(seed, disturb):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(20), torch.nn.LazyBatchNorm1d())
        torch.manual_seed(disturb)
        check_network(net, load_data(TINY), "lazy", seed)
        return net
    a, b, other = made(0, 1), made(0, 2), made(1, 1)
    assert torch.equal(a[1].weight, b[1].weight) and not torch.equal(a[1].weight, other[1].weight)
    assert int(a[2].num_batches_tracked) == 0 and not a[2].running_mean.any()


class Tied(torch.nn.Module):
    "One convolution under two names, and a buffer that is a part of another one"
    def __init__(self, n_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.again, self.first = self.conv, torch.nn.Linear(n_classes, 192, bias=False)
        self.register_buffer("noted", torch.zeros(2)); self.register_buffer("same", self.noted[:1])
    def forward(self, x):
        x = self.again(self.conv(x).relu()).flatten(1)
        return x@self.first.weight


@pytest.mark.parametrize("kind", ("one layer twice", "weights of two layers", "a view"))
def test_tied_weights_are_trained_saved_and_tied_again(tmp_path, kind):
    def net(n_classes, in_channels):
        if kind == "a view": return Tied(n_classes)
        conv, head = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Linear(192, n_classes)
        layers = [conv, torch.nn.ReLU(), conv, torch.nn.Flatten(), torch.nn.Linear(192, 192), head]
        if kind == "weights of two layers":
            layers[2:3] = [torch.nn.Conv2d(3, 3, 3, padding=1)]
            layers[2].weight = conv.weight
        return torch.nn.Sequential(*layers)
    MODELS.register("tied")(net)
    spec, store = replace(SPEC, model="tied"), Store(tmp_path)
    result = run(spec, store, "cpu", progress=False)
    again, d = store.load_net(spec), load_data(TINY)
    with torch.no_grad(): z = again(d.normalise(d.test.inputs))
    assert z.numpy() == pytest.approx(result.logits["test"].numpy(), abs=1e-5)
    shared = [t.untyped_storage().data_ptr() for t in again.state_dict().values()]
    assert len(set(shared)) < len(shared), "tied again"
    assert store.get(spec).evaluation.n == 80 and not [*tmp_path.glob("*.part")]


def test_a_run_of_tied_weights_goes_on_from_its_checkpoint(tmp_path):
    def net():
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        return torch.nn.Sequential(conv, torch.nn.ReLU(), conv, torch.nn.Flatten(), torch.nn.Linear(192, 20))
    whole, part = net(), net()
    fit(whole, load_data(TINY), Method("nll").build(), Recipe(3, 20), device="cpu", progress=False)
    class Stops(TrainingMethod):
        def after_epoch(self, epoch, *valid):
            if epoch == 1: raise KeyboardInterrupt
    saved = dict(device="cpu", progress=False, checkpoint=tmp_path/"part")
    with pytest.raises(KeyboardInterrupt):
        fit(net(), load_data(TINY), Stops(), Recipe(3, 20), checkpoint_every=0, **saved)
    fit(part, load_data(TINY), Method("nll").build(), Recipe(3, 20), **saved)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), part.state_dict().values()))


@pytest.mark.parametrize("buffer, message", [
    (lambda: torch.eye(3, device="cpu").to_sparse(),
     "net/odd: got a tensor that is sparse_coo, expected a dense one"),
    (lambda: torch.ones(3, dtype=torch.complex64), "net/odd: got a tensor that is complex"),
    (lambda: torch.ones(3, device="meta"), "net/odd: got a tensor that is meta"),
    (lambda: torch.zeros(1).expand(3), "model: got weights that cannot be read back")])
def test_what_cannot_be_saved_is_told_before_the_first_step(tmp_path, buffer, message):
    def net(n_classes, in_channels):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, n_classes))
        net.register_buffer("odd", torch.zeros(3))
        net.odd = buffer()
        return net
    MODELS.register("odd")(net)
    @Method.register("counts")
    def counts(): return Counts()
    steps = []
    class Counts(TrainingMethod):
        def forward(self, step): steps.append(1); return super().forward(step)
    with pytest.raises(ValueError, match=message):
        run(replace(SPEC, model="odd", method=Method("counts")), Store(tmp_path), "cpu", progress=False)
    assert not steps


def test_a_state_that_is_no_tensor_is_told(tmp_path):
    class Extra(torch.nn.Linear):
        def get_extra_state(self): return {"a": 1}
        def set_extra_state(self, state): pass
    MODELS.register("extra")(lambda n, c: torch.nn.Sequential(torch.nn.Flatten(), Extra(192, n)))
    with pytest.raises(ValueError, match="net/1._extra_state: got a dict, expected a tensor"):
        run(replace(SPEC, model="extra"), Store(tmp_path), "cpu", progress=False)
