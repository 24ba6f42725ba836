"""What a diffusion step draws for its whole batch: times, noise, and whose labels are dropped. Each process takes its slice."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ..data.conditions import noised, with_flag
from ..diffusion import Process, TableSchedule
from ..diffusion.contrast import ContrastConfig, find_partners
from ..diffusion.matching import match_noise
from ..diffusion.weightings import LogitNormalTimes, SecondMomentTimes, UniformTimes
from ..runtime.processes import CpuCopy
from ..runtime.seeds import generator, normal, uniforms
from ..runtime.stream import BatchPlan, MicroBatch
from .config import DiffusionConfig, StepsConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

LAG = 2  # steps until a loss enters the history, so that no step waits for the device


class TimeSampler:
    """Draws the times of a step, and weighs its losses for how often their times are drawn. What it has learned from them is
    the same on all ranks, and belongs into the checkpoint; `learns` says whether there is anything."""

    def __init__(self, spec: UniformTimes | LogitNormalTimes | SecondMomentTimes, process: Process) -> None:
        self.spec, self.process = spec, process
        self.learns = isinstance(spec, SecondMomentTimes)
        if isinstance(spec, SecondMomentTimes):
            if not isinstance(process.schedule, TableSchedule):
                raise UserError("times.kind 'second_moment' keeps a history for each entry of a table; the blend has none")
            self._history = np.zeros((process.schedule.num_steps, spec.history))
            self._counts = np.zeros(process.schedule.num_steps, dtype=np.int64)
        self._t = self._weights = torch.empty(0, dtype=torch.float64)
        self._losses: list[Tensor] = []
        self._pending: deque[tuple[Tensor, CpuCopy]] = deque()  # times, losses

    def probabilities(self) -> np.ndarray | None:
        """(T,): how likely each entry is drawn; None while all are alike."""
        if not isinstance(self.spec, SecondMomentTimes) or (self._counts < self.spec.history).any():
            return None
        roots = np.sqrt(np.mean(self._history**2, axis=1))
        share, total = self.spec.uniform_share, roots.sum()
        return (1 - share) * roots / total + share / len(roots) if total > 0 else None

    def draw(self, uniform: Tensor, dimensions: int) -> Tensor:
        """The times (B,) of the next step, from numbers in [0, 1). The network sees images of so many `dimensions` in it
        (C * H * W, or 2 of points), by which times are shifted where the config asks for that."""
        while len(self._pending) >= LAG:
            t, losses = self._pending.popleft()
            self._learn(t, losses.wait())
        chances = self.probabilities()
        self._weights = torch.ones_like(uniform)
        if chances is not None:
            above = np.cumsum(chances)
            entries = np.minimum(np.searchsorted(above / above[-1], uniform.numpy(), side="right"), len(chances) - 1)
            self._t = torch.from_numpy(entries).double()
            self._weights = torch.from_numpy(1 / (len(chances) * chances[entries]))
            return self._t
        if isinstance(self.spec, LogitNormalTimes):
            standard_normal = torch.special.ndtri(uniform.clamp(min=1e-12))
            uniform = torch.sigmoid(self.spec.mean + self.spec.std * standard_normal).clamp(max=1 - 1e-12)
        shift = self.spec.shift.factor(dimensions) if self.spec.shift is not None else None
        self._t = self.process.draw_times(uniform, shift)
        return self._t

    def weigh(self, losses: Tensor, local_slice: slice) -> Tensor:
        """The losses (b,) of the samples that are this slice of the batch, weighted for how often their times are drawn."""
        if not self.learns:
            return losses
        self._losses.append(losses.detach())
        return losses * self._weights[local_slice].to(losses.device, losses.dtype, non_blocking=True)

    def observe(self, accelerator: "Accelerator") -> None:
        """After the last micro-batch of a step, on all ranks: keep what its losses were. They count `LAG` steps later."""
        if not self.learns:
            return
        losses = accelerator.gather(torch.cat(self._losses))  # ranks hold slices of the batch, in their order
        assert isinstance(losses, Tensor)
        self._losses = []
        self._pending.append((self._t, CpuCopy(losses)))

    def _learn(self, t: Tensor, losses: Tensor) -> None:
        size = self._history.shape[1]
        for entry, loss in zip(t.long().tolist(), losses.double().tolist(), strict=True):
            if not np.isfinite(loss):
                continue
            if self._counts[entry] == size:
                self._history[entry] = np.roll(self._history[entry], -1)
            self._counts[entry] = min(self._counts[entry] + 1, size)
            self._history[entry, self._counts[entry] - 1] = loss

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of what is learned."""
        learned = {"history": torch.from_numpy(self._history.copy()), "counts": torch.from_numpy(self._counts.copy())}
        for i, (t, losses) in enumerate(self._pending):
            learned |= {f"pending.{i}.t": t.clone(), f"pending.{i}.losses": losses.wait().clone()}
        return learned

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what a checkpoint kept."""
        self._history, self._counts = tensors["history"].numpy().copy(), tensors["counts"].numpy().copy()
        count = sum(name.endswith(".t") for name in tensors)
        self._pending = deque((tensors[f"pending.{i}.t"], CpuCopy(tensors[f"pending.{i}.losses"])) for i in range(count))


def check_contrast(contrast: ContrastConfig | None, num_classes: int | None, batch_plan: BatchPlan) -> None:
    """A UserError where the loss has a contrast that the data, or the batch, cannot have."""
    if contrast is None:
        return
    if num_classes is None:
        raise UserError("process.loss.contrast needs classes, and the data has none; leave it out, or use class subfolders")
    if batch_plan.micro % contrast.group:
        sizes = [size for size in range(2, batch_plan.micro + 1) if batch_plan.micro % size == 0]
        near = sorted(sorted(sizes, key=lambda size: abs(size - contrast.group))[:2])
        raise UserError(
            f"process.loss.contrast.group {contrast.group} does not divide the {batch_plan.micro} image(s) that a device takes "
            f"at a time; set it to {' or '.join(map(str, near)) if near else '2 or more, and take more images at a time'}"
        )


class StepNoise:
    """Times `t` (B,), noise `eps` (B, *shape), and whose label and whose condition is dropped (B,): functions of (seed, step),
    and the times of the shape and of what `times` has learned."""

    def __init__(
        self, cfg: StepsConfig, times: TimeSampler, batch_plan: BatchPlan, shape: Sequence[int], step: int, device: torch.device
    ) -> None:
        rng = generator(cfg.seed, "step", step)
        self.t = times.draw(uniforms(rng, batch_plan.batch), math.prod(shape))
        self.dropped = uniforms(rng, batch_plan.batch) < getattr(cfg, "label_dropout", 0.0)  # a classifier needs its labels
        self._cfg, self._shape, self._step, self._device = cfg, (batch_plan.batch, *shape), step, device

    @cached_property
    def eps(self) -> Tensor:
        dtype = getattr(torch, self._cfg.dtype)
        return normal(self._shape, self._cfg.seed, "noise", self._step, device=self._device, dtype=dtype)

    @cached_property
    def _candidates(self) -> list[Tensor]:
        """Other noise like `eps`, (B, *shape) each."""
        assert isinstance(self._cfg, DiffusionConfig)
        words, options = (self._cfg.seed, "noise", self._step, "candidate"), {"device": self._device, "dtype": self.eps.dtype}
        return [normal(self._shape, *words, i, **options) for i in range(1, self._cfg.noise.candidates)]

    def match(
        self, micro_batch: MicroBatch, source: Tensor | None, local_slice: slice, mean: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What the images of the micro-batch that is this slice of the batch are coupled with, (b, *shape): the `source` where
        there is one; else the noise `eps`, or of several candidates, of which `eps` is the first, that which suits each image
        best. `mean` gives that of the data like the images, (*shape)."""
        if source is not None:
            return source
        assert isinstance(self._cfg, DiffusionConfig)
        if self._cfg.noise.candidates == 1:
            return self.eps[local_slice]
        x0 = micro_batch.images
        return match_noise(x0 - mean(x0), [eps[local_slice] for eps in (self.eps, *self._candidates)])

    def condition(self, micro_batch: MicroBatch, local_slice: slice, num_classes: int | None) -> dict[str, Tensor]:
        """What belongs to the micro-batch that is this slice of the batch, besides its images: the labels (b,) that the network
        is told, the null class where they are dropped or where there are none (-1); the condition, noised, all 0 where it is
        dropped; the codes of how the images were augmented; and, where the loss has a contrast, the partners (b,)."""
        inputs = dict[str, Tensor]()
        if num_classes is not None:
            null = self.dropped[local_slice] | (micro_batch.labels < 0)
            inputs["labels"] = torch.where(null, num_classes, micro_batch.labels).to(self._device, non_blocking=True)
            process = getattr(self._cfg, "process", None)
            if process is not None and process.loss.contrast is not None:
                labels = torch.where(null, -1, micro_batch.labels)
                inputs["partners"] = find_partners(labels, process.loss.contrast.group).to(self._device, non_blocking=True)
        if micro_batch.condition is not None:
            inputs["condition"] = self._flagged(micro_batch.condition, local_slice)
        if micro_batch.augmentation is not None:
            inputs["augmentation"] = micro_batch.augmentation
        return inputs

    def _flagged(self, condition: Tensor, local_slice: slice) -> Tensor:
        """The condition (b, k, h, w) of a micro-batch with its noise, its flag and its level: (b, k + 1 or 2, h, w)."""
        cfg, batch = self._cfg, self._shape[0]
        assert isinstance(cfg, DiffusionConfig) and cfg.condition is not None
        rng = generator(cfg.seed, "condition", self._step)
        present = uniforms(rng, batch)[local_slice] >= cfg.condition_dropout
        level = None
        if cfg.condition.noise > 0:
            level = cfg.condition.noise * uniforms(rng, batch)[local_slice]
            words = cfg.seed, "condition noise", self._step
            eps = normal((batch, *condition.shape[1:]), *words, device=self._device, dtype=condition.dtype)
            condition = noised(condition, level, eps[local_slice])
        return with_flag(condition, present, level)
