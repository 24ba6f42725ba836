#!/usr/bin/env python
"""What the latent cache saves and costs.

  python benchmarks/latent.py [--rounds 12] [--threads 2]

Steps of the real train_ldm.py: every other batch comes from the cache, and every other one is loaded and encoded in its step;
weights are random. Images lie in memory, so that nothing is decoded; in a folder of files the cache would save more.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor

import train_ldm
import train_vae
from benchmarks.common import machine
from benchmarks.speed import CONFIGS, QUIET, SIZES, WARMUP, Size, random_autoencoder, run
from src.config import load
from src.runs.autoencoder import Autoencoder
from src.runs.latents import Latents
from src.runtime.stream import MicroBatch, StepOrder, stream, to_network
from src.training import inputs


def median_milliseconds(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds[WARMUP:])


class LatentStep(NamedTuple):
    """Seconds of a step of train_ldm.py: for its latents (next batch and draw), and in all."""

    loading: float
    whole: float


class CacheInTurns:
    """Steps of train_ldm.py whose moments come in turns from the cache and from images encoded in the step."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder, self.device = autoencoder, next(autoencoder.network.parameters()).device
        self.cached: list[LatentStep] = []
        self.encoded: list[LatentStep] = []
        self._drawing = 0.0

    def train(self, cfg: train_ldm.Config) -> None:
        """The script's training, with the batches and the clock of this object in place of its own."""
        from_cache, own_draw, open_data = inputs.latent_stream, Latents.draw, train_ldm.open_pairs
        image_set = open_data(cfg.data, cfg.held_out, cfg.condition)[0]

        def batches(latents: Any, order: StepOrder, **options: Any) -> Iterator[MicroBatch]:
            on_the_fly = stream(image_set, order, device=self.device)
            return self._in_turns(from_cache(latents, order, **options), map(self._encode, on_the_fly))

        def draw(latents: Latents, moments: Tensor, noise: Tensor) -> Tensor:
            began = time.perf_counter()
            latents_drawn = own_draw(latents, moments, noise)
            self._drawing = time.perf_counter() - began
            return latents_drawn

        with (
            patch.object(train_ldm, "autoencoder_for", lambda *_: self.autoencoder),
            patch.object(inputs, "latent_stream", batches),
            patch.object(Latents, "draw", draw),
        ):
            run(train_ldm.train, cfg)

    @torch.no_grad()
    def _encode(self, micro: MicroBatch) -> MicroBatch:
        """A batch of images as one of moments."""
        images = to_network(micro.images, self.device)
        return micro._replace(images=torch.stack(self.autoencoder.network.moments(images), dim=1))

    def _in_turns(self, *streams: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            for batches, steps in zip(streams, (self.cached, self.encoded), strict=True):
                began = time.perf_counter()
                micro = next(batches)
                loaded = time.perf_counter()
                yield micro  # and the script makes its step
                steps.append(LatentStep(loaded - began + self._drawing, time.perf_counter() - began))


def measure_cache(size: Size, rounds: int) -> tuple[int, float, float, float]:
    """The batch, milliseconds of a step from the cache and of one that encodes, and the loader's share of the former."""
    turns = rounds * size.turns + WARMUP
    quiet = [*QUIET, f"steps={2 * turns + 1}", "preview.sheets=one", "preview.sampler.steps=1"]
    cfg = load(CONFIGS / f"{size.name}_ldm.json", train_ldm.Config, [*size.overrides, *quiet])
    comparison = CacheInTurns(random_autoencoder(load(CONFIGS / f"{size.name}_vae.json", train_vae.Config, size.overrides)))
    comparison.train(cfg)
    cached, encoded = (median_milliseconds([step.whole for step in steps]) for steps in (comparison.cached, comparison.encoded))
    return cfg.batch_size, cached, encoded, median_milliseconds([step.loading for step in comparison.cached]) / cached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns at 64 px; at 16 px there are four times as many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    print("| a step of train_ldm.py | batch | latents from the cache | encoded in it | ratio | loader's share with the cache |")
    print("| --- | --- | --- | --- | --- | --- |")
    shares: dict[str, float] = {}
    for title, size in SIZES.items():
        batch, cached, encoded, share = measure_cache(size, args.rounds)
        shares[title] = share
        cells = f"{cached:.1f} ms | {encoded:.1f} ms | {encoded / cached:.2f} | {100 * share:.2f} %"
        print(f"| {title} | {batch} | {cells} |", flush=True)
    print()
    for title, share in shares.items():
        print(
            f"{'met' if share < 0.01 else 'MISSED'}: {title}: the loader takes {100 * share:.2f} % of a step (goal: under 1 %)"
        )


if __name__ == "__main__":
    main()
