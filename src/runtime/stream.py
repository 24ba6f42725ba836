"""The endless stream of images: what is at position p is a function of (seed, p), so a run resumes by starting there."""

import itertools
import os
import signal
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import UserError
from ..data import ImageConfig, ImageSet
from ..data.latents import LatentSet
from ..data.transforms import position_uniforms
from .seeds import generator


class MicroBatch(NamedTuple):
    """What a device takes at a time: images (B, H, W, C) uint8, labels (B,), -1 for none, and the position of the first; with
    the condition (B, k, h, w) that they are drawn from, if there is one."""

    images: Tensor
    labels: Tensor
    position: int
    condition: Tensor | None = None


class BatchPlan(NamedTuple):
    """How the images of a step are dealt: to `world` ranks, each taking `accumulation` micro-batches of `micro`.

    Each stage of a run has its own plan, from `first_step` on, when the run has seen `images_before` images.
    """

    batch: int
    micro: int
    accumulation: int
    rank: int
    world: int
    first_step: int = 0
    images_before: int = 0

    def images_at(self, step: int) -> int:
        """Images seen after `step` steps of the run."""
        return self.images_before + (step - self.first_step) * self.batch

    def of_step(self, part: int) -> slice:
        """This rank's micro-batch `part` within the batch of a step; it slices tensors of the whole batch."""
        first = self.rank * self.micro * self.accumulation + part * self.micro
        return slice(first, first + self.micro)

    def positions(self, step: int, part: int) -> range:
        """The positions in the stream of this rank's micro-batch `part`."""
        first = self.images_at(step)
        return range(first + self.of_step(part).start, first + self.of_step(part).stop)


def plan_batch(batch_size: int, micro_batch_size: int | None, *, rank: int, world: int) -> BatchPlan:
    """The plan of a batch. Each rank takes an equal share, divided into micro-batches where it is larger than
    `micro_batch_size`. A UserError names the nearest sizes where the division leaves a rest."""

    def rest(batch: int) -> int:
        share, left = divmod(batch, world)
        return left or share % min(micro_batch_size or share, share) if share else batch

    if rest(batch_size):
        below = (batch for batch in range(batch_size, 0, -1) if not rest(batch))
        above = (batch for batch in itertools.count(batch_size) if not rest(batch))
        sizes = " or ".join(str(size) for size in (next(below, None), next(above)) if size is not None)
        times, hint = "", ""
        if batch_size % world == 0 and micro_batch_size is not None:
            micros = [m for m in range(1, batch_size // world + 1) if batch_size % (m * world) == 0]
            near = sorted(sorted(micros, key=lambda m: abs(m - micro_batch_size))[:2])
            times, hint = f" times micro_batch_size {micro_batch_size}", f", or micro_batch_size {' or '.join(map(str, near))}"
        raise UserError(
            f"batch_size {batch_size} is not a multiple of {world} process(es){times}; set batch_size to {sizes}{hint}"
        )
    share = batch_size // world
    micro = min(micro_batch_size or share, share)
    return BatchPlan(batch_size, micro, share // micro, rank, world)


class Order:
    """Which image is at a position: each epoch is a shuffle of all images, or, balanced, has as many of each class."""

    def __init__(self, labels: NDArray[np.int64], seed: int, *, balanced: bool) -> None:
        self.count, self.labels, self.seed, self.balanced = len(labels), labels, seed, balanced
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            rng = generator(self.seed, "order", epoch)
            self._epochs[epoch] = self._balanced(rng) if self.balanced else rng.permutation(self.count)
        return self._epochs[epoch]

    def _balanced(self, rng: np.random.Generator) -> NDArray[np.int64]:
        classes = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        each = -(-self.count // len(classes))
        rounds = [[rng.permutation(members) for _ in range(-(-each // len(members)))] for members in classes]
        shuffles = [np.concatenate(of_class)[:each] for of_class in rounds]
        return rng.permutation(np.concatenate(shuffles))[: self.count]

    def __call__(self, positions: range) -> NDArray[np.int64]:
        firsts = range(positions.start // self.count * self.count, positions.stop, self.count)  # positions of the epochs
        parts = [self._epoch(i // self.count)[max(0, positions.start - i) : positions.stop - i] for i in firsts]
        return np.concatenate(parts).astype(np.int64)


class _Positions(Dataset[MicroBatch]):
    def __init__(self, images: ImageSet, spec: ImageConfig, order: Order) -> None:
        self.images, self.spec, self.order = images, spec, order

    def __getitem__(self, positions: range) -> MicroBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices = self.order(positions)
        u = position_uniforms(self.order.seed, np.arange(positions.start, positions.stop))
        pixels = torch.from_numpy(np.ascontiguousarray(self.images.batch(indices, self.spec, u)))
        return MicroBatch(pixels, torch.from_numpy(self.images.labels[indices]), positions.start)


def positions_of(split: BatchPlan, start_step: int) -> Iterator[range]:
    """The positions of this rank's micro-batches in the stream, from `start_step` on, without end."""
    for step in itertools.count(start_step):
        for part in range(split.accumulation):
            yield split.positions(step, part)


def _quiet_worker(_: int) -> None:
    # Ctrl-C and a launcher's SIGTERM go to the whole process group. A worker leaves it, so that the main process alone decides.
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
    signal.set_wakeup_fd(-1)  # the main process counts only its own signals
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def stream(
    images: ImageSet,
    spec: ImageConfig,
    split: BatchPlan,
    *,
    seed: int,
    balanced: bool = False,
    start_step: int = 0,
    workers: int = 0,
    device: torch.device,
) -> Generator[MicroBatch, None, None]:
    """This rank's micro-batches from `start_step` on, without end; `close()` ends its workers.

    `workers` processes decode ahead, at most one for each core; none where the images are decoded already.
    """
    images.prepare(spec)
    data = _Positions(images, spec, Order(images.labels, seed, balanced=balanced))
    workers = 0 if images.ready else min(workers, os.cpu_count() or 1)
    batches: Any = iter(
        DataLoader(
            data,
            sampler=positions_of(split, start_step),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=_quiet_worker,
            timeout=600 if workers else 0,
        )
    )
    try:
        yield from batches
    finally:
        if workers:
            batches._shutdown_workers()  # at the interpreter's end they would be killed, and torch would complain


def latent_stream(
    latents: LatentSet, labels: NDArray[np.int64], split: BatchPlan, *, seed: int, balanced: bool, flip: bool, start_step: int
) -> Iterator[MicroBatch]:
    """The stream of a latent cache: `images` are moments (B, 2, D, h, w) on its device. `flip` mirrors half of them."""
    order = Order(labels, seed, balanced=balanced)
    for positions in positions_of(split, start_step):
        indices = order(positions)
        mirrored = position_uniforms(seed, np.arange(positions.start, positions.stop))[:, 2] < (0.5 if flip else 0.0)
        yield MicroBatch(latents.moments(indices, mirrored), torch.from_numpy(labels[indices]), positions.start)


def to_network(images: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) in [-1, 1] on the device."""
    moved = images.to(device, non_blocking=True)
    return rearrange(moved, "b h w c -> b c h w").to(dtype) / 127.5 - 1


class Examples(NamedTuple):
    """Labels (N,), -1 for none, and `load(indices)`: x0 (B, C, H, W) on any device, always the same for an index."""

    labels: NDArray[np.int64]
    load: Callable[[NDArray[np.int64]], Tensor]


def image_examples(held_out: ImageSet, spec: ImageConfig) -> Examples:
    """Images cut from the middle, in [-1, 1]."""
    plain = spec.plain
    held_out.prepare(plain)

    def load(indices: NDArray[np.int64]) -> Tensor:
        pixels = held_out.batch(indices, plain, np.full((len(indices), 3), 0.5))
        return to_network(torch.from_numpy(pixels), torch.device("cpu"))

    return Examples(held_out.labels, load)
