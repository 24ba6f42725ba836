#!/usr/bin/env python
"""What the latent cache saves and costs, and what a step of the autoencoder costs besides its networks.

  python benchmarks/latent.py [--rounds 12] [--threads 2]

All steps are those of the real scripts, step by step in turns with what they are compared to. In train_ldm.py every other
batch comes from the cache, and every other one is loaded and encoded in its step; weights are random. Between two steps of
train_vae.py there is one of a bare loop: networks, losses, clipping, AdamW and EMA alone. Pictures lie in memory, so that
nothing is decoded; in a folder of files the cache would save more.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor, nn

import train_ldm
import train_vae
from benchmarks.unet import machine
from src import losses
from src.config import load
from src.models import VAE, Discriminator
from src.models.layers import channels_last
from src.sampling.autoencoder import Autoencoder
from src.sampling.latents import Latents
from src.training.ema import EMA
from src.training.optimizer import adamw
from src.training.stages import StageConfig
from src.training.stream import MicroBatch, stream, to_network
from src.training.trials import Attempt

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WARMUP = 3  # turns that are not counted
QUIET = [
    "held_out=0.0",
    "preview.every=null",
    "preview.num_samples=1",
    "checkpoint.every=null",
    "checkpoint.every_minutes=null",
]
QUIET += ["log.trackers=[]", "log.every=1000000"]
CPU = torch.device("cpu")


class Size(NamedTuple):
    """A pair of configs (NAME_vae.json, NAME_ldm.json), what is changed in both, and how many turns make a round."""

    name: str
    overrides: list[str]
    turns: int


SIZES = {
    "16 px (the demo's)": Size("digits", [], 4),
    "64 px (clothing64's, on drawn shapes)": Size("clothing64", ["data.source=shapes", "data.size=64", "data.count=512"], 1),
}


def run(train: Callable[..., int], cfg: Any) -> None:
    """A script's training in a folder that is thrown away, without a word."""
    silence = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        status = train(cfg, Path(folder) / "run", Attempt())
    assert status == 0, silence.getvalue()


def median_milliseconds(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds[WARMUP:])


# ---------------------------------------------------------------------------------------------- the latent cache


class LatentStep(NamedTuple):
    """Seconds of a step of train_ldm.py: for its latents (next batch and draw), and in all."""

    loading: float
    whole: float


class CacheInTurns:
    """Steps of train_ldm.py whose moments come in turns from the cache and from pictures encoded in the step."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.cached: list[LatentStep] = []
        self.encoded: list[LatentStep] = []
        self._drawing = 0.0

    def train(self, cfg: train_ldm.Config) -> None:
        """The script's training, with the batches and the clock of this object in place of its own."""
        from_cache, own_draw, open_data = train_ldm.latent_stream, Latents.draw, train_ldm.open_data
        pictures = open_data(cfg.data, cfg.held_out)[0]

        def batches(latents: Any, labels: Any, split: Any, **options: Any) -> Iterator[MicroBatch]:
            on_the_fly = stream(pictures, cfg.image, split, seed=cfg.seed, device=CPU)
            return self._in_turns(from_cache(latents, labels, split, **options), map(self._encode, on_the_fly))

        def draw(latents: Latents, moments: Tensor, noise: Tensor) -> Tensor:
            began = time.perf_counter()
            drawn = own_draw(latents, moments, noise)
            self._drawing = time.perf_counter() - began
            return drawn

        with (
            patch.object(train_ldm, "autoencoder_for", lambda *_: self.autoencoder),
            patch.object(train_ldm, "latent_stream", batches),
            patch.object(Latents, "draw", draw),
        ):
            run(train_ldm.train, cfg)

    @torch.no_grad()
    def _encode(self, micro: MicroBatch) -> MicroBatch:
        """A batch of pictures as one of moments."""
        return micro._replace(images=torch.stack(self.autoencoder.network.moments(to_network(micro.images, CPU)), dim=1))

    def _in_turns(self, *streams: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        while True:
            for batches, steps in zip(streams, (self.cached, self.encoded), strict=True):
                began = time.perf_counter()
                micro = next(batches)
                loaded = time.perf_counter()
                yield micro  # and the script makes its step
                steps.append(LatentStep(loaded - began + self._drawing, time.perf_counter() - began))


def random_autoencoder(cfg: train_vae.Config) -> Autoencoder:
    """The autoencoder of a config as it begins, in channels_last as where it is trained."""
    network = channels_last(VAE(cfg.model, cfg.image.channels)).eval().requires_grad_(False)
    document = {"kind": "atelier"}
    return Autoencoder(network, "random", document, "random", cfg.image.channels, cfg.model.latent_channels, cfg.model.factor)


def measure_cache(size: Size, rounds: int) -> tuple[int, float, float, float]:
    """The batch, milliseconds of a step from the cache and of one that encodes, and the loader's share of the former."""
    turns = rounds * size.turns + WARMUP
    quiet = [*QUIET, f"steps={2 * turns + 1}", "preview.sheets=one", "preview.sampler.steps=1"]
    cfg = load(CONFIGS / f"{size.name}_ldm.json", train_ldm.Config, [*size.overrides, *quiet])
    found = CacheInTurns(random_autoencoder(load(CONFIGS / f"{size.name}_vae.json", train_vae.Config, size.overrides)))
    found.train(cfg)
    cached, encoded = (median_milliseconds([step.whole for step in steps]) for steps in (found.cached, found.encoded))
    return cfg.batch_size, cached, encoded, median_milliseconds([step.loading for step in found.cached]) / cached


# ---------------------------------------------------------------------------------------------- the autoencoder's step


class BareLoop:
    """What a step of train_vae.py must compute in stage `number` (from 0), and nothing else: no stream, gate, meter or log."""

    def __init__(self, cfg: train_vae.Config, number: int) -> None:
        self.cfg, self.own = cfg, cfg.stages[number]
        self.network = channels_last(VAE(cfg.model, cfg.image.channels))
        self.network.tanh = tanh_in(cfg.stages, number)
        self.discriminator = channels_last(Discriminator(cfg.discriminator, cfg.image.channels))
        self.perceptual = losses.Perceptual(cfg.perceptual) if self.own.perceptual is not None else None
        self.optimizer = adamw(self.network.parameters(), cfg.optimizer)
        self.judge_optimizer = adamw(self.discriminator.parameters(), cfg.discriminator_optimizer)
        self.ema = EMA(self.network, cfg.ema)
        self.noise = torch.randn(cfg.batch_size, *cfg.model.latent_shape(cfg.image.size))

    def step(self, images: Tensor) -> None:
        """One, on images (B, C, H, W) in [-1, 1]."""
        own, term = self.own, self.own.adversarial
        assert term is not None and term.adaptive
        made = self.network(images, self.noise)
        loss = losses.reconstruction_loss(own.reconstruction, made.images, images).mean()
        if own.perceptual is not None and self.perceptual is not None:
            loss = loss + own.perceptual.weight * self.perceptual(made.images, images).mean()
        self.discriminator.requires_grad_(False)
        verdict = losses.generator_loss(term.loss, self.discriminator(made.images)).mean()
        ours, theirs = (
            torch.autograd.grad(part, self.network.last.weight, retain_graph=True)[0].norm() for part in (loss, verdict)
        )
        loss = loss + term.weight * (ours / theirs.clamp(min=1e-12)).clamp(max=1e4) * verdict
        loss = loss + own.kl_weight * losses.kl_divergence(made.mean, made.logvar).mean()
        loss.backward()

        self.discriminator.requires_grad_(True)
        real, drawn = self.discriminator(torch.cat([images, made.images.detach()])).chunk(2)
        losses.discriminator_loss(term.loss, real, drawn).mean().backward()

        for network, optimizer, spec in (
            (self.network, self.optimizer, self.cfg.optimizer),
            (self.discriminator, self.judge_optimizer, self.cfg.discriminator_optimizer),
        ):
            nn.utils.clip_grad_norm_(network.parameters(), spec.clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.network, 10_000, len(images))


def tanh_in(stages: tuple[StageConfig, ...], number: int) -> bool:
    """Whether tanh is on in a stage: once on, it stays."""
    return any(stage.tanh for stage in stages[: number + 1])


def in_turns(
    batches: Generator[MicroBatch, None, None], bare: BareLoop, spent: list[tuple[float, float]]
) -> Generator[MicroBatch, None, None]:
    """The script's batches, and before each a step of the bare loop, on pictures that are there already; (script, bare)
    seconds of each turn go into `spent`."""
    with contextlib.closing(batches):
        images = to_network(next(batches).images, CPU)
        while True:
            began = time.perf_counter()
            bare.step(images)
            between = time.perf_counter()
            yield next(batches)  # and the script makes its step
            spent.append((time.perf_counter() - between, between - began))


def judged_stages(size: Size, steps: int) -> str:
    """The stages of a config, each of so many steps and judged from its first on, as an override."""
    stages = json.loads((CONFIGS / f"{size.name}_vae.json").read_text())["stages"]
    for stage in stages:
        stage["steps"] = steps
        stage["adversarial"].pop("start_step", None)
    return f"stages={json.dumps(stages)}"


def measure_stages(size: Size, rounds: int) -> list[tuple[str, float, float]]:
    """Of each stage its terms, and milliseconds of a step of train_vae.py and of the bare loop."""
    steps = rounds * size.turns + WARMUP + 1
    overrides = [*size.overrides, *QUIET, "preview.num_measured=1", judged_stages(size, steps)]
    cfg = load(CONFIGS / f"{size.name}_vae.json", train_vae.Config, overrides)
    spent: list[list[tuple[float, float]]] = []

    def batches(*args: Any, **options: Any) -> Generator[MicroBatch, None, None]:
        bare = BareLoop(cfg, len(spent))
        spent.append([])
        return in_turns(stream(*args, **options), bare, spent[-1])

    with patch.object(train_vae, "stream", batches):
        run(train_vae.train, cfg)
    found = []
    for i, turns in enumerate(spent):
        script, bare = (median_milliseconds(list(seconds)) for seconds in zip(*turns, strict=True))
        found.append((f"{i + 1}: {terms(cfg.stages, i)}", script, bare))
    return found


def terms(stages: tuple[StageConfig, ...], number: int) -> str:
    """A stage in words."""
    own = stages[number]
    names = [own.reconstruction, "KL", "adaptive adversary", *(["perceptual"] if own.perceptual is not None else [])]
    return " + ".join(names) + (", tanh" if tanh_in(stages, number) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns at 64 px; at 16 px there are four times as many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    print("| a step of train_ldm.py | batch | latents from the cache | encoded in it | ratio | loader's share with the cache |")
    print("| --- | --- | --- | --- | --- | --- |")
    for title, size in SIZES.items():
        batch, cached, encoded, share = measure_cache(size, args.rounds)
        cells = f"{cached:.1f} ms | {encoded:.1f} ms | {encoded / cached:.2f} | {100 * share:.2f} %"
        print(f"| {title} | {batch} | {cells} |", flush=True)
    print()
    print("| a step of train_vae.py | stage | script | bare loop | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for title, size in SIZES.items():
        for stage, script, bare in measure_stages(size, args.rounds):
            print(f"| {title} | {stage} | {script:.1f} ms | {bare:.1f} ms | {bare / script:.3f} |", flush=True)


if __name__ == "__main__":
    main()
