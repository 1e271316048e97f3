"""What has to travel to a GPU machine, in folders that each fit into one call.

    python -m tests.gpu.pack DATA table1 --limit 64000

DATA is a folder of CIFAR in shards (`tests/shards.py`). Into .gpu/1, .gpu/2, ... go the shards of the table's
data set, joblib, and those runs of the table that the store at home has with their weights: the teachers.
"""
import argparse
import shutil
import zipfile
from pathlib import Path

import joblib

from kdc_nb.files import cache_dir
from kdc_nb.experiments.specs import RunSpec, lineage
from kdc_nb.training.data import full_data
from kdc_nb.experiments.store import Store
from kdc_nb.paper.settings import paper_specs
from tests.shards import write_photos


def teachers_at_home(specs: list[RunSpec], store: Store) -> list[Path]:
    "Weights and results of the runs that teach others"
    teachers = dict.fromkeys(t for s in specs for t in lineage(s)[:-1])
    files = [[store.path(t, suffix) for suffix in ("run", "net")] for t in teachers]
    return [f for both in files if all(f.exists() for f in both) for f in both]


def zip_joblib(path: Path) -> Path: # the same
    "The package without its tests; such machines have none"
    home = Path(joblib.__file__).parent
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for f in home.rglob("*.py"):
            if "test" not in f.parts: z.write(f, f.relative_to(home.parent))
    return path


def into_folders(files: list[Path], limit: int) -> list[list[Path]]: # limit in bytes
    "Each file to the first folder with room, large ones first; before them joblib, which all calls need"
    folders = []
    for f in sorted(files, key=lambda f: (f.name != "joblib.zip", -f.stat().st_size)):
        size = lambda folder: sum(g.stat().st_size for g in folder)
        room = next((folder for folder in folders if size(folder) + f.stat().st_size <= limit), None)
        if room is None: folders.append(room := [])
        room.append(f)
    return folders


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", type=Path)
    p.add_argument("what", help="a table or figure of the paper")
    p.add_argument("--recipe", default="fast")
    p.add_argument("--store", help="folder of the runs at home (the cache folder's)")
    p.add_argument("--limit", type=int, required=True, help="KiB of a folder")
    args = p.parse_args()
    specs = list(paper_specs(args.what, args.recipe).values())
    name = full_data(specs[0].data).name
    shards = write_photos(name, args.data, cache_dir())
    to = Path(".gpu")
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    files = [zip_joblib(to/"joblib.zip"), *shards, *teachers_at_home(specs, Store(args.store))]
    for k, folder in enumerate(into_folders(files, 1024*args.limit), 1):
        (to/str(k)).mkdir()
        for f in folder: shutil.copy(f, to/str(k))
        print(f".gpu/{k}: {sum(f.stat().st_size for f in folder)//1024} KiB,", *(f.name for f in folder))
    (to/"joblib.zip").unlink()


if __name__ == "__main__": main()
