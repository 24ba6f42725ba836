"""The endless stream of images: what is at position p is a function of (seed, p), so a run resumes by starting there."""

import itertools
import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import UserError
from ..data import ImageConfig, ImageSet
from ..data.buckets import Buckets
from ..data.conditions import Condition, flagged, split_condition
from ..data.latents import BucketLatents, LatentSet
from ..data.transforms import position_uniforms
from ..diffusion.augmentation import AugmentationConfig
from .augmentation import draw_copies
from .order import BucketOrder, Order

CPU = torch.device("cpu")


class MicroBatch(NamedTuple):
    """What a device takes at a time: images (B, H, W, C) uint8, labels (B,), -1 for none, and the position of the first; where
    there are any, with the condition (B, k, h, w) that they are drawn from, and how they were augmented (B, CODES)."""

    images: Tensor
    labels: Tensor
    position: int
    condition: Tensor | None = None
    augmentation: Tensor | None = None


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


class StepOrder:
    """Which images each step of a stage shows: all of one bucket of `buckets`, a function of (seed, step). A rank's
    micro-batches are its slices of them.

    Where there is one bucket alone, epochs are shuffles of all images. The steps of several are counted from the start of the
    stage. `following` is the order of the data that these images, which are a source for it, are paired with: then each step is
    of the bucket that the data's is of.
    """

    def __init__(
        self,
        buckets: Buckets,
        labels: NDArray[np.int64],
        plan: BatchPlan,
        seed: int,
        *,
        balanced: bool = False,
        following: "StepOrder | None" = None,
    ) -> None:
        self.buckets, self.labels, self.plan, self.seed = buckets, labels, plan, seed
        self._epochs = Order(labels, seed, balanced=balanced)
        self._leader = following or self
        self._buckets: BucketOrder | None = None
        if len(buckets.specs) > 1:
            self._buckets = BucketOrder(buckets.which, labels, seed, plan.batch, balanced=balanced)

    def _place(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps before it were of this bucket."""
        return self._buckets.place(step - self.plan.first_step) if self._buckets is not None else (0, step)

    def spec_at(self, step: int) -> ImageConfig:
        """What the images of a step are cut to."""
        return self.buckets.specs[self._leader._place(step)[0]]

    def __call__(self, step: int, part: int) -> NDArray[np.int64]:
        """The images of this rank's micro-batch `part` of a step, (micro,)."""
        if self._buckets is None:
            return self._epochs(self.plan.positions(step, part))
        return self._buckets.images(*self._leader._place(step))[self.plan.of_step(part)]

    def uniforms(self, step: int, part: int) -> NDArray[np.float64]:
        """The random numbers (micro, 3) that say how those images are cut and mirrored."""
        positions = self.plan.positions(step, part)
        return position_uniforms(self.seed, np.arange(positions.start, positions.stop))

    def parts(self, start_step: int) -> Iterator[tuple[int, int]]:
        """(step, part) of this rank's micro-batches, from `start_step` on, without end."""
        return ((step, part) for step in itertools.count(start_step) for part in range(self.plan.accumulation))


class _MicroBatches(Dataset[MicroBatch]):
    def __init__(self, images: ImageSet, order: StepOrder) -> None:
        self.images, self.order = images, order

    def __getitem__(self, place: tuple[int, int]) -> MicroBatch:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, order = self.order(*place), self.order
        pixels = self.images.batch(indices, order.spec_at(place[0]), order.uniforms(*place), partners=True)
        labels = torch.from_numpy(order.labels[indices])
        return MicroBatch(torch.from_numpy(np.ascontiguousarray(pixels)), labels, order.plan.positions(*place).start)


def _quiet_worker(_: int) -> None:
    # Ctrl-C and a launcher's SIGTERM go to the whole process group. A worker leaves it, so that the main process alone decides.
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()
    signal.set_wakeup_fd(-1)  # the main process counts only its own signals
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def stream(
    images: ImageSet, order: StepOrder, *, start_step: int = 0, workers: int = 0, device: torch.device
) -> Generator[MicroBatch, None, None]:
    """This rank's micro-batches from `start_step` on, without end; `close()` ends its workers.

    `workers` processes decode ahead, at most one for each core; none where the images are decoded already.
    """
    images.prepare(order.buckets.most_frequent)
    workers = 0 if images.ready else min(workers, os.cpu_count() or 1)
    batches: Any = iter(
        DataLoader(
            _MicroBatches(images, order),
            sampler=order.parts(start_step),  # pyright: ignore[reportArgumentType]
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
    latents: LatentSet | BucketLatents,
    order: StepOrder,
    *,
    flip: bool,
    start_step: int,
    conditions: LatentSet | BucketLatents | None = None,
    augmentation: AugmentationConfig | None = None,
) -> Iterator[MicroBatch]:
    """The stream of a latent cache: `images` are moments (B, 2, D, h, w) on its device, and `condition` the copies
    (B, n, K, h, w) of the `conditions`. `flip` mirrors half of them, and of augmented ones a copy is chosen."""
    plain, copies = 1 + flip, augmentation.copies if augmentation is not None else 1
    for step, part in order.parts(start_step):
        indices = order(step, part)
        uniforms, codes = order.uniforms(step, part), None  # no image of a cache is cut at random
        versions = (uniforms[:, 2] < (0.5 if flip else 0.0)) + plain * (uniforms[:, 1] * copies).astype(np.int64)
        if augmentation is not None:
            is_copy = (versions >= plain)[:, None]
            codes = torch.from_numpy(draw_copies(augmentation, indices, versions).codes * is_copy)
        labels, position = torch.from_numpy(order.labels[indices]), order.plan.positions(step, part).start
        condition = conditions.moments(indices, versions) if conditions is not None else None
        yield MicroBatch(latents.moments(indices, versions), labels, position, condition, codes)


def to_network(images: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) in [-1, 1] on the device."""
    moved = images.to(device, non_blocking=True)
    return rearrange(moved, "b h w c -> b c h w").to(dtype) / 127.5 - 1


class Examples(NamedTuple):
    """Labels (N,), -1 for none, and `load(indices)`: x0 (B, C, H, W) on any device, always the same for an index. Where not all
    have one shape, `groups` has the indices of those of each shape (C, H, W), and what is loaded together is of one. Where they
    are drawn from a condition, `condition(indices)` is what a network is told of it, (B, k, h, w)."""

    labels: NDArray[np.int64]
    load: Callable[[NDArray[np.int64]], Tensor]
    groups: Mapping[tuple[int, ...], NDArray[np.int64]] = MappingProxyType({})
    condition: Callable[[NDArray[np.int64]], Tensor] | None = None

    def split(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """These indices by shape."""
        parts = [indices[np.isin(indices, group)] for group in self.groups.values()] if self.groups else [indices]
        return [part for part in parts if len(part)]

    def batches(self, indices: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
        """These indices in batches of at most `size`, each of one shape."""
        return [part[start : start + size] for part in self.split(indices) for start in range(0, len(part), size)]


def image_examples(images: ImageSet, buckets: Buckets, condition: Condition | None = None) -> Examples:
    """Images cut from the middle, in [-1, 1], and what they are drawn from; `buckets` are theirs."""
    specs, channels = [spec.plain for spec in buckets.specs], buckets.specs[0].channels
    images.prepare(buckets.most_frequent.plain)

    def load_both(indices: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        spec, middle = specs[buckets.which[indices[0]]], np.full((len(indices), 3), 0.5)
        pixels = images.batch(indices, spec, middle, partners=condition is not None)
        return split_condition(to_network(torch.from_numpy(pixels), CPU), channels, condition, 0, indices.tolist())

    def load_condition(indices: NDArray[np.int64]) -> Tensor:
        values = load_both(indices)[1]
        assert condition is not None and values is not None
        return flagged(values, condition)

    groups = buckets.groups([spec.shape for spec in specs])
    return Examples(images.labels, lambda indices: load_both(indices)[0], groups, load_condition if condition else None)
