"""Add the results in one file to those in another, and their ids to tests/ids.json:
`python -m tests.gpu.merge INTO FROM`
"""
import json
import sys
from pathlib import Path

from kdc_nb.values import decode, spec_hash
from kdc_nb.files import load_npz
from kdc_nb.experiments.results import read_results, write_results
from tests.test_ids import IDS, ROOT, descriptions

into, new = map(Path, sys.argv[1:])
results = (read_results(into) if into.exists() else {}) | read_results(new)
write_results(results.values(), into)
IDS[into.name] = [spec_hash(decode(d), schema=1) for d in descriptions(load_npz(into)[1])]
(ROOT/"tests/ids.json").write_text(json.dumps(IDS, indent=0, sort_keys=True) + "\n")
print(f"{into}: {len(results)} runs")
