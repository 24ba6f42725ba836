#!/usr/bin/env python
"""Images a second from a folder, a packed file, `datasets` imagefolder and LMDB, with a network of zero cost.

  python benchmarks/data.py [--pictures datasets/clothing/train] [--size 64] [--workers 0 2] [--keep-memory]

The first three are the project's own sources in the training scripts' own stream; the fourth is the usual peer, encoded
images in LMDB in a plain DataLoader. All end as float batches on the device; the last row moves one and the same batch. They
are measured in turns, a fresh stream each turn, after a warm-up: the files lie in the page cache. The table has medians over
the rounds, and medians of the ratio to the folder in the same round. On a CPU the faster rows are partly the kernel's page
faults, where glibc gives memory back after each batch; --keep-memory tells it not to. Without --pictures a folder of JPEGs is
made; what is written goes into a temporary folder. LMDB comes with `pip install -e '.[bench]'`.
"""

import argparse
import contextlib
import ctypes
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.common import goal, installed, machine, wait
from src.config import UserError, run_script
from src.data import ImageConfig, ImageSet, open_sources
from src.data.buckets import make_buckets
from src.data.packing import pack
from src.data.sources import DatasetsSource, FolderSource, PackedSource
from src.data.sources.folder import FolderImages
from src.data.transforms import crop, decode
from src.runtime.stream import StepOrder, _quiet_worker, plan_batch, stream, to_network

FOLDER, PACKED, DATASETS, LMDB, NOTHING = (
    "folder",
    "packed file",
    "`datasets` imagefolder",
    "LMDB",
    "one batch, again and again",
)
Batches = Generator[tuple[Tensor, Tensor], None, None]
Way = tuple[Callable[[int], Batches], int]  # batches with so many workers, bytes on the disk


def make_images(folder: Path, count: int, side: int) -> None:
    """JPEGs of ten classes about as hard to decode as photos, the shorter side at `side`, of several aspect ratios."""
    rng = np.random.default_rng(0)
    for i in range(count):
        (folder / f"class_{i % 10}").mkdir(parents=True, exist_ok=True)
        long = round(side * rng.uniform(1, 1.5))
        width, height = (long, side) if rng.random() < 0.5 else (side, long)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(coarse) + rng.normal(0, 8, (height, width, 1))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"class_{i % 10}" / f"{i:06d}.jpg", quality=90)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


class EncodedInLMDB(Dataset[tuple[np.ndarray, int]]):
    """Encoded images by index; each process opens the file on its own."""

    def __init__(self, path: Path, labels: np.ndarray, spec: ImageConfig) -> None:
        self.path, self.labels, self.spec, self.begun = path, labels, spec, None

    @staticmethod
    def write(path: Path, files: list[str]) -> None:
        import lmdb  # pyright: ignore[reportMissingImports]

        room = 2 * sum(os.path.getsize(file) + 8192 for file in files)
        with lmdb.open(str(path), map_size=room) as environment, environment.begin(write=True) as transaction:
            for i, file in enumerate(files):
                transaction.put(f"{i:08d}".encode(), Path(file).read_bytes())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        if self.begun is None:
            import lmdb  # pyright: ignore[reportMissingImports]

            self.begun = lmdb.open(str(self.path), readonly=True, lock=False, readahead=False, meminit=False).begin()
        encoded = self.begun.get(f"{i:08d}".encode())
        assert isinstance(encoded, bytes)
        image = decode(encoded, channels=self.spec.channels, at_least=max(self.spec.sides))
        return crop(image, self.spec, torch.rand(3).numpy()).copy(), int(self.labels[i])


def peer(data: EncodedInLMDB, batch: int, workers: int, device: torch.device) -> Batches:
    """An endless shuffle of it, with the settings of the project's own stream."""
    workers = min(workers, os.cpu_count() or 1)
    ways = {"num_workers": workers, "prefetch_factor": 4 if workers else None, "worker_init_fn": _quiet_worker}
    order = RandomSampler(data, num_samples=1 << 40)
    batches: Any = iter(DataLoader(data, batch, sampler=order, pin_memory=device.type == "cuda", **ways))
    try:
        yield from batches
    finally:
        if workers:
            batches._shutdown_workers()


def ours(images: ImageSet, spec: ImageConfig, batch: int, workers: int, device: torch.device) -> Batches:
    split = plan_batch(batch, None, rank=0, world=1)
    order = StepOrder(make_buckets(spec, images.sides, 1), images.labels, split, 0)
    with contextlib.closing(stream(images, order, workers=workers, device=device)) as batches:
        for micro in batches:
            yield micro.images, micro.labels


def images_per_second(batches: Batches, device: torch.device, seconds: float, warmup: float) -> float:
    with contextlib.closing(batches):
        images, began = 0, 0.0
        for length in (warmup, seconds):
            images, began = 0, time.perf_counter()
            while time.perf_counter() - began < length:
                pixels, labels = next(batches)
                to_network(pixels, device)  # and the network does nothing
                labels.to(device, non_blocking=True)
                images += len(pixels)
            wait(device)
        return images / (time.perf_counter() - began)


def open_ways(folder: Path, work: Path, spec: ImageConfig, batch: int, device: torch.device) -> tuple[dict[str, Way], int]:
    """Every way there is (LMDB only where it is installed), and the number of images."""
    images = open_sources(FolderSource(source="folder", path=str(folder)))
    pack(images, work / "packed", size=max(spec.sides), channels=spec.channels)
    imagefolder = DatasetsSource(source="datasets", name="imagefolder", data_dir=str(folder), label_column="label")
    sets = {
        FOLDER: (images, on_disk(folder)),
        PACKED: (open_sources(PackedSource(source="packed", path=str(work / "packed"))), on_disk(work / "packed")),
        DATASETS: (open_sources(imagefolder), on_disk(folder) + on_disk(work / "datasets")),  # rows point at the files
    }
    if any(len(opened) != len(images) for opened, _ in sets.values()):
        raise UserError(f"{folder}: the sources disagree on the images in it; give a folder of class subfolders, whole files")
    ways: dict[str, Way] = {name: (lambda w, p=p: ours(p, spec, batch, w, device), size) for name, (p, size) in sets.items()}
    if installed("lmdb"):
        part = images.parts[0]
        assert isinstance(part, FolderImages)
        EncodedInLMDB.write(work / "lmdb", part.paths)
        encoded = EncodedInLMDB(work / "lmdb", images.labels, spec)
        ways[LMDB] = (lambda w: peer(encoded, batch, w, device), on_disk(work / "lmdb"))
    first = next(ways[PACKED][0](0))
    ways[NOTHING] = (lambda _: (first for _ in itertools.count()), 0)
    return ways, len(images)


def measure(args: argparse.Namespace, folder: Path, work: Path) -> None:
    spec, device = ImageConfig(size=args.size, crop="random", flip=True), torch.device(args.device)
    ways, count = open_ways(folder, work, spec, args.batch, device)
    rates_of: dict[tuple[str, int], list[float]] = {(name, workers): [] for workers in args.workers for name in ways}
    for _ in range(args.rounds):
        for (name, workers), rates in rates_of.items():
            rates.append(images_per_second(ways[name][0](workers), device, args.seconds, args.warmup))
    libraries = ", ".join(f"{name} {installed(name) or 'missing'}" for name in ("pillow", "datasets", "lmdb"))
    print(f"{machine()}, {libraries}")
    memory = ", memory kept" if args.keep_memory else ""
    print(f"{count} images, {args.size} px, random crop and flip, batch {args.batch}, {args.rounds} rounds, {device}{memory}")
    print("| source | on disk |" + "".join(f" {w} workers: images/s | against the folder |" for w in args.workers))
    print("| --- | --- |" + " --- | --- |" * len(args.workers))
    for name in (FOLDER, PACKED, DATASETS, LMDB, NOTHING):
        if name not in ways:
            print(f"| {name}: not installed (`pip install -e '.[bench]'`) | |" + " | |" * len(args.workers))
            continue
        cells = [f"{ways[name][1] / 1e6:.1f} MB" if name != NOTHING else ""]
        for w in args.workers:
            ratio = statistics.median(a / b for a, b in zip(rates_of[name, w], rates_of[FOLDER, w], strict=True))
            cells += [f"{statistics.median(rates_of[name, w]):,.0f}", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    for w in args.workers:
        rivals = [rates for (name, workers), rates in rates_of.items() if workers == w and name not in (PACKED, NOTHING)]
        ratio = statistics.median(a / max(others) for a, *others in zip(rates_of[PACKED, w], *rivals, strict=True))
        print(goal(f"{w} workers: the packed file over the fastest other", ratio, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="a folder of class subfolders (default: one of JPEGs is made)")
    parser.add_argument("--count", type=int, default=2000, help="JPEGs to make")
    parser.add_argument("--side", type=int, default=176, help="shorter side of the JPEGs to make")
    parser.add_argument("--size", type=int, default=64, help="pixels that the network sees")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn that is counted")
    parser.add_argument("--warmup", type=float, default=1.5, help="seconds before each turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-memory", action="store_true", help="no page faults for memory that was given back (glibc)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.keep_memory:
        for name in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            if not ctypes.CDLL(None).mallopt(name, 1 << 25):
                raise UserError("--keep-memory: this C library takes no such setting")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ |= {"ATELIER_CACHE": f"{work}/scans", "HF_DATASETS_CACHE": f"{work}/datasets"}
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        if args.pictures is None:
            make_images(work / "pictures", args.count, args.side)
        measure(args, args.pictures or work / "pictures", work)


if __name__ == "__main__":
    run_script(main)
