"""All random tensors of a diffusion step, drawn for the whole batch: each process takes its slice."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..runtime.seeds import generator, normal, uniforms
from ..runtime.stream import BatchPlan
from .time_sampler import TimeSampler


class StepNoise:
    """Times `t` (B,), noise `eps` (B, *shape) and whose label is dropped (B,): functions of (seed, step), and the times of what
    `times` has learned."""

    def __init__(
        self,
        times: TimeSampler,
        batch_plan: BatchPlan,
        shape: Sequence[int],
        *,
        seed: int,
        step: int,
        label_dropout: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        rng = generator(seed, "step", step)
        self.t = times.draw(uniforms(rng, batch_plan.batch))
        self.dropped = uniforms(rng, batch_plan.batch) < label_dropout
        self._noise = ((batch_plan.batch, *shape), seed, "noise", step)
        self._on = {"device": device, "dtype": dtype}

    @cached_property
    def eps(self) -> Tensor:
        shape, *words = self._noise
        return normal(shape, *words, **self._on)

    def condition(self, labels: Tensor, local_slice: slice, num_classes: int | None) -> dict[str, Tensor]:
        """The labels (b,) of the micro-batch that is this slice of the batch; the null class where they are dropped or where
        there are none (-1)."""
        if num_classes is None:
            return {}
        null = self.dropped[local_slice] | (labels < 0)
        labels = torch.where(null, num_classes, labels)
        return {"labels": labels.to(self._on["device"], non_blocking=True)}
