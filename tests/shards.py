"""CIFAR in shards to the kit's cache: `python -m tests.shards cifar10 FOLDER`.

A set is five shards of training images and one of test images, FOLDER/cifar10-train-0.npz to -4.npz and
cifar10-test.npz. Each holds strips of images as lossless WebP, one after the other ("webp", and where each
ends in "offsets"), and labels with their names ("label" and "names"; of CIFAR-100 "fine" and "fine_names").
Nothing is a pickle. Needs neither pytest nor a network.
"""
import argparse
import io
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from kdc_nb.files import cache_dir, save_tensors # before torch, whose threads would spin

import torch


def unpack(
    shard: Path
) -> tuple[np.ndarray, np.ndarray, list[str]]: # (N, 3, 32, 32) uint8, (N,) int64, names of classes
    "Images and labels of a shard"
    from PIL import Image
    with np.load(shard, allow_pickle=False) as z:
        data, ends = z["webp"].tobytes(), z["offsets"]
        labels, names = ("fine", "fine_names") if "fine" in z else ("label", "names")
        labels, classes = z[labels].astype(np.int64), z[names].tolist()
    strips = [np.asarray(Image.open(io.BytesIO(data[a:b])).convert("RGB")) for a, b in zip(ends, ends[1:])]
    return np.concatenate(strips).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).copy(), labels, classes


def write_photos(name: str, source: Path, folder: Path) -> list[Path]: # the shards
    "Write a set in the form of the kit's cache, unless it is there"
    target = folder/"data"/f"{name}.safetensors"
    paths = [*(source/f"{name}-train-{k}.npz" for k in range(5)), source/f"{name}-test.npz"]
    missing = [p.name for p in paths if not p.exists()]
    if missing: raise SystemExit(f"{source}: no {', '.join(missing)}")
    if target.exists(): return paths
    with ProcessPoolExecutor(min(6, os.cpu_count())) as pool: parts = list(pool.map(unpack, paths))
    join = lambda which, k: torch.from_numpy(np.concatenate([p[k] for p in which]))
    tensors = {f"{split}_{what}": join(which, k)
               for split, which in (("train", parts[:5]), ("test", parts[5:]))
               for k, what in enumerate(("inputs", "labels"))}
    save_tensors(target, tensors, classes=parts[-1][2])
    return paths


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=("cifar10", "cifar100"))
    p.add_argument("folder", type=Path)
    args = p.parse_args()
    write_photos(args.name, args.folder, cache_dir())


if __name__ == "__main__": main()
