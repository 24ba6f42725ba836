#!/usr/bin/env python
"""Pixels a second of training on images of every shape, against training on squares of about the same area.

  python benchmarks/shapes.py --data datasets/clothing/train [--size 64] [--batch 16] [--steps 40]

Both are the project's own: the stream of a folder, the U-Net of a config, its loss and AdamW. One step of each is taken in
turns, so that what else the machine does hits both. The first steps of every shape are left out: they make kernels ready.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import ddpm_accelerate
from benchmarks.common import ROOT, goal, machine, wait
from src.config import load, run_script
from src.data import ImageConfig, open_sources
from src.data.buckets import Buckets, make_buckets
from src.data.sources import FolderSource
from src.data.transforms import AspectConfig
from src.diffusion import build_process
from src.models import build_model
from src.runtime.stream import StepOrder, plan_batch, stream, to_network

WARMUP = 2  # steps of each shape


def train(buckets: Buckets, folder: Path, config: Path, batch: int, device: torch.device) -> Generator[tuple[str, int, float]]:
    """The shape, the pixels and the seconds of one training step after the other."""
    cfg, images = load(config, ddpm_accelerate.Config), open_sources(FolderSource(source="folder", path=str(folder)))
    process = build_process(cfg.process)
    network = build_model(cfg.model, buckets.most_frequent.shape, None, learned=cfg.process.variance == "learned").to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    order = StepOrder(buckets, images.labels, plan_batch(batch, None, rank=0, world=1), 0)
    with contextlib.closing(stream(images, order, device=device)) as batches:
        while True:
            began = time.perf_counter()
            x0 = to_network(next(batches).images, device)
            t = process.draw_times(torch.rand(len(x0), dtype=torch.float64))
            process.losses(network, x0, torch.randn_like(x0), t).loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            wait(device)
            yield f"{x0.shape[2]}x{x0.shape[3]}", len(x0) * x0.shape[2] * x0.shape[3], time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of images of many shapes")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "own64_ddpm.json", help="whose network is trained")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="of each, after the warm-up")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image = ImageConfig(size=args.size, flip=True)
    images = open_sources(FolderSource(source="folder", path=str(args.data)))
    factor = load(args.config, ddpm_accelerate.Config).model.factor
    mixed = make_buckets(replace(image, aspect=AspectConfig()), images.sides, factor)
    ways = {"every shape": mixed, "squares": make_buckets(image, images.sides, factor)}
    runs = {name: train(buckets, args.data, args.config, args.batch, device) for name, buckets in ways.items()}
    counts, speeds = Counter[str](), {name: list[tuple[int, float]]() for name in ways}
    while min(map(len, speeds.values())) < args.steps:
        for name, run in runs.items():
            shape, pixels, seconds = next(run)
            counts[f"{name} {shape}"] += 1
            if counts[f"{name} {shape}"] > WARMUP:
                speeds[name].append((pixels, seconds))
    rates = {name: sum(pixels for pixels, _ in each) / sum(seconds for _, seconds in each) for name, each in speeds.items()}
    medians = {name: statistics.median(pixels / seconds for pixels, seconds in each) for name, each in speeds.items()}
    ratio = rates["every shape"] / rates["squares"]
    print(f"{machine()}\n{args.config.stem}, batch {args.batch}, {len(mixed.specs)} sizes of about {args.size} px squared\n")
    print("| | pixels/s | median of the steps |\n| --- | --- | --- |")
    for name in ways:
        print(f"| {name} | {rates[name]:,.0f} | {medians[name]:,.0f} |")
    print("\n" + goal("pixels a second of every shape, as a ratio to squares", ratio, 0.95))


if __name__ == "__main__":
    run_script(main)
