"""What a diffusion step draws, for its whole batch: each rank takes its share."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..runtime.seeds import generator, normal, uniforms
from ..runtime.stream import BatchPlan, MicroBatch
from .time_sampler import TimeSampler


class StepNoise:
    """Times `t` (B,), noise `eps` (B, *shape) and whose label is dropped (B,): functions of (seed, step), and the times of what
    `times` has learned."""

    def __init__(
        self,
        times: TimeSampler,
        split: BatchPlan,
        shape: Sequence[int],
        *,
        seed: int,
        step: int,
        label_dropout: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        rng = generator(seed, "step", step)
        self.t = times.draw(uniforms(rng, split.batch))
        self.dropped = uniforms(rng, split.batch) < label_dropout
        self._noise = ((split.batch, *shape), seed, "noise", step)
        self._on = {"device": device, "dtype": dtype}

    @cached_property
    def eps(self) -> Tensor:
        shape, *words = self._noise
        return normal(shape, *words, **self._on)

    def condition(self, micro: MicroBatch, here: slice, num_classes: int | None) -> dict[str, Tensor]:
        """The labels of the micro-batch that stands at `here`, the null class where they are dropped or there are none."""
        if num_classes is None:
            return {}
        null = self.dropped[here] | (micro.labels < 0)
        labels = torch.where(null, num_classes, micro.labels)
        return {"labels": labels.to(self._on["device"], non_blocking=True)}
