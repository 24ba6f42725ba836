"""Conditions that images are drawn from: another image, a smaller copy, the luminance, edges, or what a mask leaves."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..config import OpenUnion, config, config_error, dump, renamed_field, resumable_field
from ..config.sizes import Sides

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601: the L of an image file
LEAST, MOST = 0.1, 0.44  # of the image is hidden when the last box or stroke of a mask is added


@config
class Condition(ABC):
    """The base of all conditions. A latent run encodes a condition with the autoencoder of its images, or sees its pixels,
    resized to the latents: `space` (the key may also be called `as`) is latents or pixels; without it edges are pixels and
    everything else is latents. A mask is always pixels."""

    kind: str
    space: Literal["latents", "pixels"] | None = renamed_field("as", None)

    @abstractmethod
    def count_channels(self, image_channels: int) -> int:
        """How many channels the condition of images with `image_channels` has."""

    @abstractmethod
    def make(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The condition (B, channels, h, w) of images (B, C, H, W) in [-1, 1]; `mask` (B, 1, H, W) is 1 where they are hidden,
        for a condition that `needs_masks`. A network resizes a smaller condition to its input."""

    def show(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """The condition (B, k, h, w), or the pixels that a network is told, as images (B, C, H, W) of the shape (C, H, W),
        to be looked at."""
        channels = shape[0] if self.count_channels(shape[0]) >= shape[0] else 1
        return F.interpolate(values[:, :channels].float(), tuple(shape[1:]), mode="nearest").expand(-1, shape[0], -1, -1)

    @property
    def contract(self) -> dict[str, Any]:
        """What the latents of a condition depend on, besides the images: not the noise, which is added later, nor where it
        is."""
        return {key: value for key, value in dump(self).items() if key not in ("noise", "path") and value is not None}

    needs_masks = False
    noise = 0.0  # the largest level of noise that is added while training

    @property
    def is_encoded(self) -> bool:
        """Whether a latent run encodes it."""
        return self.space != "pixels"

    @property
    def extra_channels(self) -> int:
        """How many channels `with_flag` adds: whether the condition is there and, where noise is added, its level."""
        return 2 if self.noise > 0 else 1


CONDITIONS = OpenUnion("kind")
ConditionConfig = Annotated[Condition, CONDITIONS]


@CONDITIONS.add
@config
class PairedCondition(Condition):
    """Another image, its partner. One of three keys says where it is: `path`, a folder whose files have the same names (but
    for their endings) as those of the data; `side`, the half of each file that is the condition while the other half is the
    image; `column`, another image column of a `datasets` set. It has `channels`, without
    that as many as the images."""

    kind: Literal["paired"]
    path: str | None = resumable_field(None)
    side: Literal["left", "right"] | None = None
    column: str | None = None
    channels: Literal[1, 3] | None = None

    @pydantic.model_validator(mode="after")
    def _one_place(self) -> "PairedCondition":
        if (self.path, self.side, self.column).count(None) != 2:
            raise config_error("say where the other image is: give exactly one of path, side, column")
        return self

    def count_channels(self, image_channels: int) -> int:
        return self.channels or image_channels

    def make(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        raise AssertionError("the partner of an image is read, not made")


@CONDITIONS.add
@config
class LowCondition(Condition):
    """The image reduced until its shorter side has `size` pixels: the network makes it larger. `noise` is the largest level of
    noise that is added to it in training, and the network is told the level: then it also makes images of another network
    larger, which have other faults than reduced ones (Sec. 4.2, Ho et al. 2021, arXiv:2106.15282)."""

    kind: Literal["low"]
    size: int = pydantic.Field(ge=1)
    noise: float = pydantic.Field(0.0, ge=0, le=1)  # pyright: ignore[reportIncompatibleVariableOverride]

    def count_channels(self, image_channels: int) -> int:
        return image_channels

    def make(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        return reduced(images, self.size)


@CONDITIONS.add
@config
class GreyCondition(Condition):
    """The luminance: the network colours it."""

    kind: Literal["grey"]

    def count_channels(self, image_channels: int) -> int:
        return 1

    def make(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        return luminance(images)


@CONDITIONS.add
@config
class EdgesCondition(Condition):
    """The edges of the luminance, by Sobel's filter."""

    kind: Literal["edges"]

    @property
    def is_encoded(self) -> bool:
        return self.space == "latents"

    def count_channels(self, image_channels: int) -> int:
        return 1

    def make(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        return edges(images)


@CONDITIONS.add
@config
class MaskCondition(Condition):
    """The image without what boxes and strokes hide, and the mask: the network fills it in. A latent run encodes each image
    with `copies` masks, since a mask of clean latents would show what lies under it."""

    kind: Literal["mask"]
    copies: int = pydantic.Field(4, ge=1, le=64)

    needs_masks = True

    def count_channels(self, image_channels: int) -> int:
        return image_channels + 1

    def make(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return masked(images, mask)


def split_condition(
    pixels: Tensor, channels: int, condition: Condition | None, seed: int, numbers: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """The images (B, channels, H, W) in the first channels of `pixels`, in [-1, 1], and what they are drawn from, (B, k, h, w):
    the partners in the other channels, or what is made of the images. Masks are those of (`seed`, `numbers`)."""
    images = pixels[:, :channels]
    if condition is None:
        return pixels if pixels.shape[1] == channels else images, None
    if isinstance(condition, PairedCondition):
        return images, pixels[:, channels:]
    height, width = images.shape[2:]
    mask = draw_masks(seed, numbers, (height, width)).to(images) if condition.needs_masks else None
    return images, condition.make(images, mask)


def flagged(values: Tensor, condition: Condition, level: float = 0.0) -> Tensor:
    """`with_flag` of a condition that is there for all of (B, k, h, w), with this level of noise where levels are told."""
    present = torch.ones(len(values), dtype=torch.bool, device=values.device)
    return with_flag(values, present, torch.full((len(values),), level) if condition.extra_channels > 1 else None)


def channel_names(condition: Condition | None, image_channels: int, latent_channels: int | None = None) -> list[str]:
    """What each channel holds that a network sees beside its input; two runs of which one starts from the other's weights share
    those of the same name. `latent_channels` are those of a latent run."""
    if condition is None:
        return []
    word, count = "pixels", condition.count_channels(image_channels)
    if latent_channels is not None and condition.is_encoded:
        word, count = "latents", latent_channels + condition.needs_masks
    names = [f"{condition.kind} {word} {i}" for i in range(count)]
    return names + ["level", "flag"][-condition.extra_channels :]


def reduced(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) whose shorter side is reduced to `size`, each pixel the mean of the area that it covers."""
    height, width = images.shape[2:]
    ratio = size / min(height, width)
    return F.interpolate(images, (max(1, round(height * ratio)), max(1, round(width * ratio))), mode="area")


def luminance(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, 1, H, W) in [-1, 1]: 0.299 R + 0.587 G + 0.114 B."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(LUMINANCE, device=images.device, dtype=images.dtype)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def edges(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, 1, H, W) in [-1, 1]: the gradient of the luminance by Sobel's filter, -1 where it is 0 and
    1 where black and white meet along a row or column."""
    step = torch.tensor([-0.5, 0.0, 0.5], device=images.device, dtype=images.dtype)
    smooth = torch.tensor([0.25, 0.5, 0.25], device=images.device, dtype=images.dtype)
    kernels = torch.stack([smooth[:, None] * step, step[:, None] * smooth])[:, None]  # (2, 1, 3, 3): across and down
    gradient = F.conv2d(F.pad(luminance(images), (1, 1, 1, 1), mode="replicate"), kernels)  # at most 1 in each direction
    return 2 * gradient.square().sum(1, keepdim=True).sqrt().clamp(max=1) - 1


def masked(images: Tensor, mask: Tensor) -> Tensor:
    """(B, C + 1, H, W): the images, 0 (mid grey) where the `mask` (B, 1, H, W) is 1, and the mask."""
    return torch.cat([images * (1 - mask), mask.expand(-1, 1, *images.shape[2:])], dim=1)


def noised(condition: Tensor, level: Tensor, eps: Tensor) -> Tensor:
    """sqrt(1 - s^2) condition + s eps with the levels s (B,) in [0, 1], which keeps a variance of 1."""
    s = level.to(condition)[:, None, None, None]
    return (1 - s.square()).sqrt() * condition + s * eps.to(condition)


def with_flag(condition: Tensor, present: Tensor, level: Tensor | None = None) -> Tensor:
    """(B, k, h, w) -> (B, k + 1 or 2, h, w): beside the condition the `level` (B,) of its noise, if there is one, and a channel
    of 1. Where `present` (B,) is false, all of it is 0."""
    constants = [torch.ones_like(present, dtype=condition.dtype)] if level is None else [level, torch.ones_like(level)]
    planes = [value.to(condition)[:, None, None, None].expand(-1, 1, *condition.shape[2:]) for value in constants]
    return torch.cat([condition, *planes], dim=1) * present.to(condition)[:, None, None, None]


def draw_masks(seed: int, positions: Sequence[int], sides: Sides) -> Tensor:
    """(B, 1, height, width) float32, 1 where boxes and strokes hide 10 to 60 % or so of an image: a function of (seed,
    position)."""
    keys = (np.array([seed, position], dtype=np.uint64) for position in positions)
    generators = [np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 2 << 32, 0])) for key in keys]
    return torch.from_numpy(np.stack([_draw_mask(generator, *sides) for generator in generators])[:, None])


def _draw_mask(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Boxes alone, strokes alone or both, until a random share is hidden."""
    share, of_boxes = rng.uniform(LEAST, MOST), (0.0, 0.5, 1.0)[rng.integers(3)]
    mask = np.zeros((height, width), dtype=bool)
    while mask.mean() < share:
        if rng.random() < of_boxes:
            tall, wide = (max(1, round(side * rng.uniform(0.1, 0.4))) for side in (height, width))
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            mask[top : top + tall, left : left + wide] = True
        else:
            mask |= _draw_stroke(rng, height, width)
    return mask.astype(np.float32)


def _draw_stroke(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """A line of three pieces, each turned a little from the one before, 3 to 10 % of the shorter side thick."""
    row, column = np.mgrid[:height, :width] + 0.5
    side, angle = min(height, width), rng.uniform(0, 2 * math.pi)
    y, x, radius = rng.uniform(0, height), rng.uniform(0, width), max(0.7, side * rng.uniform(0.015, 0.05))
    hidden = np.zeros((height, width), dtype=bool)
    for _ in range(3):
        length, angle = side * rng.uniform(0.1, 0.4), angle + rng.uniform(-1, 1)
        down, across = math.sin(angle), math.cos(angle)
        along = ((row - y) * down + (column - x) * across).clip(0, length)  # where on the piece the nearest point lies
        hidden |= (row - y - along * down) ** 2 + (column - x - along * across) ** 2 <= radius**2
        y, x = y + length * down, x + length * across
    return hidden
