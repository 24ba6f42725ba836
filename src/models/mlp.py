"""The small network of 2-D points."""

import math
from collections.abc import Sequence
from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import config
from .backbone import BACKBONES, Backbone
from .layers import embed_labels, zeroed


@BACKBONES.add
@config
class MLPConfig(Backbone):
    """`layers` hidden layers of `width`, each with the time added; the inputs are positions and time, and their sines and
    cosines at `frequencies` wavelengths, the longest 8 across."""

    kind: Literal["mlp"]
    takes_points = True
    width: int = pydantic.Field(192, ge=1)
    layers: int = pydantic.Field(3, ge=1)
    frequencies: int = pydantic.Field(8, ge=1)

    def build(
        self, shape: Sequence[int], num_classes: int | None, *, learned: bool, null_class: bool, condition_channels: int
    ) -> "MLP":
        return MLP(self, channels=shape[0], num_classes=num_classes)


class MLP(nn.Module):
    """network(x, time, labels=None): x (B, channels), time (B,) in [0, 1], labels as in the U-Net -> (B, channels)."""

    def __init__(self, config: MLPConfig, *, channels: int = 2, num_classes: int | None = None) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.first = nn.Linear(channels * (2 * config.frequencies + 1), config.width)
        self.time = nn.Linear(2 * config.frequencies + 1, config.width)
        self.label_embedding = nn.Embedding(num_classes + 1, config.width) if num_classes is not None else None
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers - 1))
        self.head = zeroed(nn.Linear(config.width, channels))

    def _features(self, values: Tensor, period: float) -> Tensor:
        """(B, n) -> (B, n (2 frequencies + 1)): the values, and sines and cosines of them."""
        k = torch.arange(1, self.config.frequencies + 1, device=values.device, dtype=values.dtype)
        angles = (values[:, :, None] * (2 * math.pi / period * k)).flatten(1)  # (B, n frequencies)
        return torch.cat([values, angles.sin(), angles.cos()], dim=1)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self.time(self._features(time[:, None].to(x.dtype), 2.0))  # (B, width)
        if self.label_embedding is not None:
            if labels is None:
                labels = torch.full(time.shape, self.num_classes or 0, device=time.device)
            embedding = embedding + embed_labels(self.label_embedding, labels)
        h = F.silu(self.first(self._features(x, 8.0)) + embedding)  # (B, width)
        for layer in self.hidden:
            h = h + F.silu(layer(h) + embedding)
        return self.head(h)  # (B, channels)
