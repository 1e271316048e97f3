"Ids outlive names: each description in nbs/results has the id that it had when it was written"

import json
from pathlib import Path

import pytest

from kdc_nb.values import decode, encode, spec_hash
from kdc_nb.files import load_npz
from kdc_nb.experiments.results import read_results
from kdc_nb.experiments.specs import run_id
from kdc_nb.experiments.teachers import Ensemble

ROOT = Path(__file__).parents[1]
IDS = json.loads((ROOT/"tests/ids.json").read_text())


def descriptions(o) -> list[dict]:
    "The descriptions of runs in a file's JSON, without those inside them"
    if isinstance(o, dict):
        return [o] if o.get("kind") == "RunSpec" else [d for v in o.values() for d in descriptions(v)]
    return [d for v in o for d in descriptions(v)] if isinstance(o, list) else []


def test_every_file_is_here():
    assert {p.name for p in (ROOT/"nbs/results").glob("*.npz")} == {*IDS}
    assert Ensemble, "whose class must be known before it can be read"


@pytest.mark.parametrize("name", IDS)
def test_descriptions_have_their_ids(name):
    written = descriptions(load_npz(ROOT/"nbs/results"/name)[1])
    assert [json.loads(json.dumps(encode(decode(d))))
            for d in written] == written, "written as they were read"
    assert [spec_hash(decode(d), schema=1) for d in written] == IDS[name]


@pytest.mark.parametrize("name, first", [("calibrators_known.npz", "7d5b128e845cc492"),
                                         ("text_topics.npz", "8d01e8c935783a36")])
def test_ids_with_the_data_in_them(name, first):
    assert run_id(next(iter(read_results(ROOT/"nbs/results"/name)))) == first
