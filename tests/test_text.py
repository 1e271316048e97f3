"""Texts: the generated truth, tokenizers, newsgroups' archive, pretrained weights, dropout that resumes,
AdamW against torch's own loop.
"""

import hashlib
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import kdc_nb.training.text as text_room
from kdc_nb.values import derive_seed
from kdc_nb.files import cache_dir
from kdc_nb.training.data import DataSpec, load_data, missing_download
from kdc_nb.training.methods import TrainingMethod
from kdc_nb.training.models import MODELS, build_model
from kdc_nb.training.recipes import Recipe, learning_rate
from kdc_nb.training.steps import draw_epoch_plan
from kdc_nb.training.trainer import fit
from kdc_nb.experiments.agenda import plan_sweep
from kdc_nb.experiments.results import read_results
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import RunSpec, _check_model
from kdc_nb.experiments.store import Store, build_net
from kdc_nb.training import text_models
from tests.conftest import forget_data, patch_name

TINY = DataSpec("topics", n_train=40, n_valid=20, n_test=30)
RECIPE = Recipe(3, 16, lr=2e-3, weight_decay=.05, optimizer="adamw", warmup=.2)


@pytest.fixture(autouse=True)
def forget():
    forget_data()


def test_the_posterior_of_topics_is_true_and_the_same_everywhere():
    d = load_data(DataSpec("topics", n_train=30, n_valid=30, n_test=6000))
    p, y = d.test.posterior.double(), d.test.labels
    assert torch.allclose(p.sum(1), torch.ones(len(p)).double(), atol=1e-5)
    for c in range(12): # every class's share is what its probabilities say
        miss = (y == c).double() - p[:, c]
        assert stats.norm.sf(abs(float(miss.sum()))/float((p[:, c]*(1 - p[:, c])).sum())**.5) > 1e-4
    code = ("from kdc_nb.training.data import *; print(load_data(DataSpec('topics', n_train=40, "
            "n_valid=20, n_test=30)).fingerprint)")
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            .stdout.strip() for _ in range(2)}
    assert said == {load_data(TINY).fingerprint}, "the tokenizer is learnt alike in every process"
    assert torch.equal(load_data(TINY).test.inputs[:, :10], d.test.inputs[:30, :10])


def bpe_folder(folder, texts):
    "A tokenizer as the hub keeps one"
    from transformers import PreTrainedTokenizerFast
    PreTrainedTokenizerFast(tokenizer_object=text_room._train_tokenizer(texts, 60)).save_pretrained(folder)
    return str(folder)


def test_texts_are_cut_and_filled_up():
    cutter = text_room._train_tokenizer(["ab ba ab", "ba"], 12)
    rows = text_room._tokenise(cutter, ["ab ba ab ba", "ba", ""], 4)
    assert rows.shape == (3, 4) and rows[2].tolist()[2:] == [-1, -1] and (rows[0] >= 0).all()
    assert rows[0].tolist()[0] == 2 and rows[0].tolist()[-1] == 3, "the end token is kept"
    with pytest.raises(ValueError, match="length: got 2, expected 3 tokens or more"):
        text_room._tokenise(cutter, ["ab"], 2)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    "20 Newsgroups' archive in small: three groups, some posts"
    import sklearn.datasets._twenty_newsgroups as sk
    for part, n in (("train", 10), ("test", 4)):
        for group in ("rec.autos", "rec.sport", "sci.space"):
            (tmp_path/"raw"/f"20news-bydate-{part}"/group).mkdir(parents=True)
            for k in range(n):
                (tmp_path/"raw"/f"20news-bydate-{part}"/group/str(k)).write_bytes(
                    f"From: me\nSubject: {group}\n\n> quoted\nbody {k} of {group} caf\xe9\n".encode("latin1")
                )
    path = cache_dir()/"data"/"20news-bydate.tar.gz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as t:
        for folder in sorted((tmp_path/"raw").iterdir()): t.add(folder, folder.name)
    monkeypatch.setattr(sk, "ARCHIVE",
                        sk.ARCHIVE._replace(checksum=hashlib.sha256(path.read_bytes()).hexdigest(),
                                            url="file:///nowhere"))
    return path


def test_newsgroups_come_from_the_official_archive(archive, tmp_path):
    name = bpe_folder(tmp_path/"tok", ["From: me Subject: rec.autos body of sci.space quoted"])
    data = DataSpec("newsgroups", tokenizer=name, n_train=20, n_valid=6, length=16)
    d = load_data(data)
    assert ((len(d.train), len(d.valid), len(d.test), d.classes, d.superclass)
            == (20, 6, 12, ("rec.autos", "rec.sport", "sci.space"), (0, 0, 1)))
    assert d.train.inputs.shape[1] == 16 and d.in_channels == len(d.tokens) <= 60
    words = lambda row: d.text(row).replace(" ", "")
    assert all("Subject:".lower() in words(r).lower() for r in d.test.inputs), "headers are kept"
    bare = load_data(DataSpec("newsgroups", tokenizer=name, n_train=20, n_valid=6, bare=True))
    assert not any("subject" in bare.text(r).replace(" ", "").lower()
                   or "quoted" in bare.text(r).replace(" ", "") for r in bare.test.inputs)
    archive.unlink()
    forget_data()
    assert load_data(data).fingerprint == d.fingerprint, "the posts are in the cache"
    assert run(RunSpec(data, "bert_1_32", "nll", RECIPE), Store(), "cpu", progress=False).evaluation.n == 12


def test_newsgroups_that_are_not_to_be_had_are_named(archive, tmp_path):
    name = bpe_folder(tmp_path/"tok", ["body of rec"])
    archive.write_bytes(b"another file")
    with (pytest.warns(UserWarning, match="SHA256"),
          pytest.raises(ValueError, match="newsgroups: got no archive .*expected 20news-bydate.tar.gz in")):
        load_data(DataSpec("newsgroups", tokenizer=name, n_train=2, n_valid=2))
    with pytest.raises(ValueError, match="nowhere/bert: neither in the Hugging Face cache nor"):
        load_data(DataSpec("newsgroups", tokenizer=f"{tmp_path}/nowhere/bert"))
    with pytest.raises(ValueError, match="newsgroups n_train . n_valid: got"):
        load_data(DataSpec("newsgroups", n_train=11_314))


def own_bert(folder, data, pickled=False):
    "Pretrained weights and tokenizer, as the hub keeps them, and a model that begins with them"
    from transformers import BertConfig, BertForSequenceClassification, BertModel
    config = BertConfig(vocab_size=data.in_channels, hidden_size=32,
                        num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
    torch.manual_seed(9)
    body = BertModel(config)
    body.save_pretrained(folder)
    if pickled:
        (folder/"model.safetensors").unlink()
        torch.save(body.state_dict(), folder/"pytorch_model.bin")
    config.num_labels = data.n_classes
    @MODELS.register("own_bert")
    def build(n_classes, in_channels):
        return text_models.TextClassifier(BertForSequenceClassification(config), str(folder))
    return body


def test_a_pretrained_network_begins_with_its_weights_and_a_head_of_the_seed(tmp_path, monkeypatch, capfd):
    patch_name(monkeypatch, "MODELS", MODELS)
    monkeypatch.setitem(MODELS, "own_bert", None)
    texts, labels = ["good and kind", "bad and mean"]*4, [1, 0]*4
    name = bpe_folder(tmp_path/"bert", texts)
    data = text_room.register_texts("mine", *[(texts, labels)]*3, tokenizer=name)
    body = own_bert(tmp_path/"bert", load_data(data))
    nets = [build_net(RunSpec(data, "own_bert", "nll", RECIPE, s)) for s in (0, 0, 1)]
    assert all(torch.equal(a, b) for net in nets
               for a, b in zip(net.net.bert.state_dict().values(), body.state_dict().values()))
    heads = [net.net.classifier.weight for net in nets]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    spec, store = RunSpec(data, "own_bert", "nll", RECIPE), Store(tmp_path/"s")
    run(spec, store, "cpu", progress=False)
    (tmp_path/"bert"/"model.safetensors").unlink()
    assert store.load_net(spec) is not None, "a trained network needs no pretrained weights"
    said = capfd.readouterr()
    assert "unexpected" not in (said.out + said.err).lower()
    other = text_room.register_texts("mine", *[(["other words", "than those"]*4, labels)]*3)
    own_bert(tmp_path/"bert", load_data(data))
    with pytest.raises(ValueError, match="whose tokenizer has another vocabulary"):
        build_net(RunSpec(other, "own_bert", "nll", RECIPE))


def test_weights_of_another_network_are_refused(tmp_path, monkeypatch):
    from transformers import DistilBertConfig, DistilBertModel
    monkeypatch.setitem(MODELS, "own_bert", None)
    texts, labels = ["good and kind", "bad and mean"]*4, [1, 0]*4
    data = text_room.register_texts("mine", *[(texts, labels)]*3,
                                    tokenizer=bpe_folder(tmp_path/"bert", texts))
    own_bert(tmp_path/"bert", load_data(data))
    DistilBertModel(
        DistilBertConfig(vocab_size=load_data(data).in_channels, dim=32, n_layers=1, n_heads=1, hidden_dim=64)
    ).save_pretrained(tmp_path/"bert")
    with pytest.raises(
        ValueError, match="model: got .*bert without .*, expected weights for all of the network but its head"
    ):
        build_net(RunSpec(data, "own_bert", "nll", RECIPE))


def test_images_and_texts_are_not_taken_for_each_other(tmp_path):
    for spec, said in ((RunSpec(TINY, "resnet8", "nll", RECIPE),
                        r"inputs: got shape \(2, \d+\), expected images"),
                       (RunSpec("digits", "bert_1_32", "nll", RECIPE),
                        "inputs: got shape .*, expected texts")):
        with pytest.raises(ValueError, match=said): run(spec, Store(tmp_path), "cpu", progress=False)


def test_threads_do_not_disturb_each_others_dropout(tmp_path):
    specs = [RunSpec(TINY, "bert_1_32", "nll", RECIPE, s) for s in (0, 1)]
    alone = [run(s, Store(tmp_path/"a"), "cpu", progress=False) for s in specs]
    with ThreadPoolExecutor(2) as pool:
        beside = list(pool.map(lambda s: run(s, Store(tmp_path/"b"), "cpu", progress=False), specs))
    assert all(torch.equal(a.logits["test"], b.logits["test"]) for a, b in zip(alone, beside))


def test_pickled_weights_are_never_read(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "own_bert", None)
    texts, labels = ["good and kind", "bad and mean"]*4, [1, 0]*4
    data = text_room.register_texts("mine", *[(texts, labels)]*3,
                                    tokenizer=bpe_folder(tmp_path/"bert", texts))
    own_bert(tmp_path/"bert", load_data(data), pickled=True)
    with pytest.raises(ValueError, match="neither in the Hugging Face cache"):
        build_net(RunSpec(data, "own_bert", "nll", RECIPE))


class Killed(TrainingMethod):
    "Dies in the fifth step of a call"
    steps = 0
    def forward(self, step):
        self.steps += 1
        if self.steps == 5: raise KeyboardInterrupt
        return super().forward(step)


def test_dropout_resumes_exactly_and_leaves_the_users_numbers_alone(tmp_path):
    spec, d = RunSpec(TINY, "bert_1_32", "nll", RECIPE), load_data(TINY)
    before = torch.random.get_rng_state()
    whole, again = build_net(spec), build_net(spec)
    for net in (whole, again): fit(net, d, TrainingMethod(), RECIPE, 0, device="cpu", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    for left in (2, 1, 0): # four steps, in the second epoch, four, in the third, and the last of nine
        net = build_net(spec)
        try:
            fit(net, d, Killed(), RECIPE, 0, device="cpu",
                checkpoint=tmp_path/"part", checkpoint_every=0., progress=False)
        except KeyboardInterrupt: assert left
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), net.state_dict().values()))
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_loop_is_torchs_adamw_with_linear_warmup():
    d, nets = load_data(TINY), [build_model("distilbert_1_32", 12, load_data(TINY).in_channels)
                                for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    done = fit(nets[0], d, TrainingMethod(), RECIPE, 5, device="cpu", progress=False)
    named = dict(nets[1].named_parameters())
    opt = torch.optim.AdamW([{"params": [p for p in named.values() if p.ndim > 1]},
                             {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0}],
                            1., (.9, .999), weight_decay=.05, foreach=False)
    for epoch in range(3):
        torch.manual_seed(derive_seed(5, epoch, 0))
        nets[1].train()
        for k, index in enumerate(draw_epoch_plan(d, TrainingMethod(), RECIPE, 5, epoch).index):
            loss = torch.nn.functional.cross_entropy(nets[1](d.train.inputs[index].long()),
                                                     d.train.labels[index])
            opt.zero_grad()
            loss.backward()
            t = (epoch + k/3)/3
            for g in opt.param_groups: g["lr"] = learning_rate(RECIPE, t)
            assert g["lr"] == pytest.approx(2e-3*(t/.2 if t < .2 else (1 - t)/.8))
            opt.step()
    assert len(done.history) == 3
    # a key's bias moves no logit: its gradient is rounding, made large by AdamW
    for (k, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values()):
        assert torch.allclose(a, b, atol=2e-6) or k.endswith("k_lin.bias"), k


def test_without_its_libraries_text_is_refused_and_images_are_not(monkeypatch):
    patch_name(monkeypatch, "find_spec", lambda name: None)
    for call in (lambda: load_data(TINY), lambda: build_model("bert_1_32", 2, 9),
                 lambda: build_model("distilbert-base-uncased", 2, 9)):
        with pytest.raises(
            ValueError,
            match=r"text: got no library transformers, expected it, by pip install 'kdc_nb\[text\]'"
        ):
            call()
    build_model("resnet8", 2)
    _check_model.cache_clear()
    assert all(r.spec.data.name == "topics"
               for r in read_results(Path(__file__).parents[1]/"nbs/results/text_topics.npz").values()), (
                   "results can be looked at"
               )


@pytest.mark.parametrize("change, message", [
    (dict(optimizer="adam"), "optimizer: got 'adam', expected None or 'adamw'"),
    (dict(warmup=0.), "warmup: got 0.0"), (dict(warmup=1.), "warmup: got 1.0"),
    (dict(warmup=.1, milestones=(.5,)), "warmup: got 0.1, expected .* no milestones")])
def test_recipes_that_mean_nothing(change, message):
    with pytest.raises(ValueError, match=message): Recipe(1, **change)


def test_old_descriptions_keep_their_ids():
    from kdc_nb.values import encode
    assert {"optimizer", "warmup"}.isdisjoint(encode(Recipe(1)))


WORDS, RUDE = ["good and kind", "bad and mean", "kind and good", "mean and bad"], [1, 0, 1, 0]


def test_columns_arrays_and_lists_are_the_same_texts():
    expected = text_room.register_texts("mine", *[(WORDS, RUDE)]*3)
    table = pd.DataFrame({"text": WORDS, "label": RUDE}, index=[7, 3, 5, 1]) # as after a shuffle
    named = (WORDS, [0, 1, 0, 1], ("1", "0"))
    for texts, labels in ((table.text, table.label), (table["text"].astype("string"), table.label.to_numpy()),
                          (pd.Series(WORDS, dtype="category"), RUDE),
                          (np.array(WORDS), np.array(RUDE, np.int8)),
                          (np.array(WORDS, dtype=object), torch.tensor(RUDE)), (tuple(WORDS), tuple(RUDE))):
        assert text_room.register_texts("mine", (texts, labels), (WORDS, RUDE), (WORDS, RUDE)) == expected
    assert text_room.register_texts("mine", (WORDS, RUDE), named, (WORDS, RUDE), ["0", "1"],
                                    length=np.int64(512)) == expected, "labels by their names"


@pytest.mark.parametrize("texts, message", [
    (lambda: [*WORDS[:3], float("nan")], "train: got nan at 3, expected texts"),
    (lambda: pd.Series([WORDS[0], None, *WORDS[2:]]), "train: got (None|nan) at 1, expected texts"),
    (lambda: pd.Series([WORDS[0], pd.NA, *WORDS[2:]], dtype="string"), "train: got <NA> at 1"),
    (lambda: np.array([*WORDS[:2], 5, WORDS[3]], dtype=object), "train: got 5 at 2"),
    (lambda: [*WORDS[:2], b"bytes", WORDS[3]], "train: got b'bytes' at 2"),
    (lambda: [*WORDS[:2], ["a", "b"], WORDS[3]], r"train: got \['a', 'b'\] at 2"),
    (lambda: "one text", "train: got a str, expected a row of texts"), (lambda: [], "train: got a list"),
    (lambda: {"a": "b"}, "train: got a dict"), (lambda: iter(WORDS), "train: got a list_iterator"),
    (lambda: None, "train: got a NoneType"), (lambda: torch.zeros(4, 2), "train: got .* at 0, expected texts")
])
def test_the_one_that_is_no_text_is_named(texts, message):
    with pytest.raises(ValueError, match=message):
        text_room.register_texts("x", (texts(), RUDE), (WORDS, RUDE), (WORDS, RUDE))


def test_a_plan_fetches_no_posts(tmp_path, monkeypatch):
    "Neither the archive nor a tokenizer, until the file is there"
    monkeypatch.setattr(text_room, "load_hub_tokenizer", lambda name: pytest.fail("the hub was asked"))
    spec = RunSpec("newsgroups", "bert_1_32")
    assert missing_download(spec.data) == "20news-bydate.tar.gz"
    assert [p.seconds for p in plan_sweep([spec], Store(tmp_path/"s"), "cpu")] == [None]
    (cache_dir()/"data").mkdir(parents=True)
    (cache_dir()/"data"/"20news-bydate.tar.gz").touch()
    assert missing_download(spec.data) == ""
