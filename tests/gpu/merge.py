"Add the results in one file to those in another: `python -m tests.gpu.merge INTO FROM`"
import sys
from pathlib import Path

from kdc_nb.experiments.results import read_results, write_results

into, new = map(Path, sys.argv[1:])
results = (read_results(into) if into.exists() else {}) | read_results(new)
write_results(results.values(), into)
print(f"{into}: {len(results)} runs")
