"""What a latent run sees of a condition: its latents, by the autoencoder of the images, or its pixels, resized to them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.conditions import Condition, luminance
from .autoencoder import LatentCodec


@torch.no_grad()
def latent_condition(condition: Condition, network: Any, values: Tensor, image: Sequence[int], latent: Sequence[int]) -> Tensor:
    """(B, k, ...) of images of the shape `image` (C, H, W) -> (B, K, h, w) of latents of the shape `latent` (D, h, w).

    What is encoded has the D channels of the posterior's mean, which `normalised` brings to those of the latents; all else is
    pixels. `network` is the autoencoder.
    """
    sides = latent[1], latent[2]
    if not condition.is_encoded:
        return _resized(values, sides)
    shown, mask = (values[:, :-1], values[:, -1:]) if condition.needs_masks else (values, values[:, :0])
    images = _resized(shown, (image[1], image[2]))
    if images.shape[1] != image[0]:
        images = luminance(images).expand(-1, image[0], -1, -1)
    weight = next(network.parameters())
    mean = network.moments(images.to(weight))[0].to(values)
    return torch.cat([mean, _resized(mask, sides)], dim=1) if condition.needs_masks else mean


def normalised(condition: Condition, codec: LatentCodec, values: Tensor) -> Tensor:
    """What `latent_condition` gives, with the latents in it normalised."""
    if not condition.is_encoded:
        return values
    channels = len(codec.mean)
    return torch.cat([codec.normalise(values[:, :channels]), values[:, channels:]], dim=1)


def _resized(values: Tensor, sides: tuple[int, int]) -> Tensor:
    """Means of areas where it becomes smaller, and blends of neighbours where it becomes larger."""
    if values.shape[2:] == sides:
        return values
    if values.shape[2] >= sides[0]:
        return F.interpolate(values, sides, mode="area")
    return F.interpolate(values, sides, mode="bilinear", align_corners=False)
