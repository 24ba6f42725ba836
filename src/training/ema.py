"""An exponential moving average of the weights."""

import copy
from typing import Any

import pydantic
import torch
from torch import nn

from ..config import config
from .parts import shard_as


@config
class EMAConfig:
    """`half_life_images`: after so many images a weight counts half; early on, `ramp_up` times the images seen."""

    half_life_images: float = pydantic.Field(500_000, gt=0)
    ramp_up: float | None = pydantic.Field(0.05, gt=0)


class EMA:
    """A float32 copy of a network (float64 for a float64 one) whose weights follow: `network` is what previews use.

    Eq. (App. F), Karras et al. 2022, arXiv:2206.00364: beta = 0.5^(batch / half life).
    """

    def __init__(self, network: nn.Module, spec: EMAConfig) -> None:
        self.spec = spec
        self.network: Any = copy.deepcopy(network).eval().requires_grad_(False)
        self._own: list[torch.Tensor] = list(self.network.parameters())

    def shard_as(self, network: nn.Module) -> None:
        """Cut it as FSDP has cut `network`: the same values, each process with its part."""
        shard_as(self.network, network)
        self._own = list(self.network.parameters())

    def decay(self, images_seen: int, batch_size: int) -> float:
        """How much of the old average is kept by the update after `images_seen` images, the last `batch_size` of them new."""
        half_life = self.spec.half_life_images
        if self.spec.ramp_up is not None:
            half_life = min(half_life, max(1.0, images_seen * self.spec.ramp_up))
        return 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move towards the weights of `network`, which have seen `images_seen` images, the last `batch_size` in one step."""
        theirs: list[torch.Tensor] = list(network.parameters())
        weight = 1 - self.decay(images_seen, batch_size)
        torch._foreach_lerp_(self._own, theirs, weight)  # pyright: ignore[reportPrivateImportUsage]
        for own, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            own.copy_(buffer)
