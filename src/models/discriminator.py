"""The PatchGAN: a small convolutional network that says of every patch of an image whether it looks real."""

import pydantic
from torch import Tensor, nn

from ..config import config
from .layers import check_divides


@config
class DiscriminatorConfig:
    """`layers` strided convolutions, widths doubling from `base_channels` to 8 times it."""

    base_channels: int = pydantic.Field(64, ge=1)
    layers: int = pydantic.Field(3, ge=1)
    norm_groups: int = pydantic.Field(8, ge=1)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "DiscriminatorConfig":
        check_divides("norm_groups", self.norm_groups, [self.base_channels], "base_channels {}")
        return self

    @property
    def smallest_image(self) -> int:
        """The side of the smallest image that has a patch."""
        return 3 * 2**self.layers


class Discriminator(nn.Module):
    """(B, C, H, W) in [-1, 1] -> (B, 1, h, w) logits, one for each patch: above 0 it looks real.

    Isola et al. 2016, arXiv:1611.07004, with group norms in place of batch norms: an image is judged by itself, so the
    result does not depend on how a batch is split.
    """

    def __init__(self, spec: DiscriminatorConfig, channels: int) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = []
        narrow = channels
        for i in range(spec.layers + 1):
            wide = spec.base_channels * 2 ** min(i, 3)
            layers.append(nn.Conv2d(narrow, wide, 4, stride=2 if i < spec.layers else 1, padding=1))
            layers += [nn.GroupNorm(spec.norm_groups, wide)] if i else []
            layers.append(nn.LeakyReLU(0.2))
            narrow = wide
        self.layers = nn.Sequential(*layers, nn.Conv2d(narrow, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
