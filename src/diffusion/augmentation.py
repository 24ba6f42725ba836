"""Augmentation that does not leak: images are transformed at random, and the network is told how (EDM, App. F.2).

At sampling time the network is told that nothing was done, so it draws images like those of the data.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..config import config

CODES = 11  # numbers that say what was done to an image, all 0 where nothing was
Array = NDArray[np.float64]


@config
class AugmentationConfig:
    """Each of these transforms is applied to an image with `probability`, independently of the others: two `flips`, left to
    right and upside down; quarter `turns`; a `scale` and a `stretch`, standard deviations of log2 of a factor; a `rotation` by
    at most this share of half a turn; a `shift` in both directions, whose standard deviation is a share of the sides. false
    or 0 leaves one out. Of latents the cache holds `copies` of each image, the first of which is plain.

    App. F.2, Karras et al. 2022, arXiv:2206.00364.
    """

    probability: float = pydantic.Field(0.12, gt=0, le=1)
    flips: bool = True
    turns: bool = False
    scale: float = pydantic.Field(0.2, ge=0, le=1)
    rotation: float = pydantic.Field(1.0, ge=0, le=1)
    stretch: float = pydantic.Field(0.2, ge=0, le=1)
    shift: float = pydantic.Field(0.125, ge=0, le=0.5)
    copies: int = pydantic.Field(8, ge=2, le=256)


class Transforms(NamedTuple):
    """What is done to images: `matrices` (B, 2, 3) give for each point of the result the point of the original, both from -1
    to 1 across and down; `codes` (B, CODES) say it to the network."""

    matrices: Array
    codes: Array


def draw_transforms(spec: AugmentationConfig, generators: Sequence[np.random.Generator], aspect: float = 1.0) -> Transforms:
    """The transforms of images, a function of the generator of each; `aspect` is the width of the images over their height.

    A point of the original goes to A = shift stretch rotation scale turn flips of it.
    """
    u = np.stack([rng.random(10) for rng in generators])  # (B, 10)
    normal = np.stack([rng.standard_normal(4) for rng in generators])  # (B, 4)
    flip_across, flip_down, turned, scaled, rotated, stretched, shifted = (u[:, :7] < spec.probability).astype(np.float64).T
    across, down = spec.flips * flip_across, spec.flips * flip_down
    quarters = spec.turns * turned * (1 + np.floor(3 * u[:, 7]))
    log_scale, log_stretch = spec.scale * scaled * normal[:, 0], spec.stretch * stretched * normal[:, 1]
    angle = spec.rotation * rotated * math.pi * (2 * u[:, 8] - 1)
    direction = math.pi * u[:, 9]  # of the stretch; half a turn later it is the same
    shift_x, shift_y = spec.shift * shifted * normal[:, 2:].T

    aspects = np.full(len(u), aspect)
    flips = _diagonal(1 - 2 * across, 1 - 2 * down)
    turn = _rotation(quarters * math.pi / 2)
    scale = _diagonal(2**log_scale, 2**log_scale)
    stretch = _rotation(direction) @ _diagonal(2**log_stretch, 2**-log_stretch) @ _rotation(-direction)
    way = _shift(2 * shift_x * aspects, 2 * shift_y) @ stretch @ _rotation(angle) @ scale @ turn @ flips
    to_sides = _diagonal(aspects, np.ones(len(u)))  # lengths are measured in half the height while images are turned
    matrices = np.linalg.inv(to_sides) @ np.linalg.inv(way) @ to_sides
    codes = [across, down, np.isin(quarters, (1, 2)), np.isin(quarters, (2, 3)), log_scale, np.cos(angle) - 1, np.sin(angle)]
    codes += [log_stretch * np.cos(2 * direction), log_stretch * np.sin(2 * direction), shift_x, shift_y]
    return Transforms(matrices[:, :2], np.stack(codes, axis=1).astype(np.float64))


def transform_images(images: Tensor, transforms: Transforms) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] after their transforms, bicubic, mirrored beyond their edges; those without one stay as
    they are."""
    rows = np.flatnonzero(transforms.codes.any(axis=1))
    if not len(rows):
        return images
    some = images[torch.from_numpy(rows).to(images.device)]
    grid = F.affine_grid(torch.from_numpy(transforms.matrices[rows]).to(some), list(some.shape), align_corners=False)
    moved = F.grid_sample(some, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)
    return images.index_copy(0, torch.from_numpy(rows).to(images.device), moved)


def _matrices(entries: Sequence[Sequence[Array | float]], count: int) -> Array:
    """(count, 3, 3) of entries that are numbers or (count,)."""
    return np.stack([np.stack([np.broadcast_to(entry, count) for entry in row], axis=1) for row in entries], axis=1)


def _diagonal(x: Array, y: Array) -> Array:
    return _matrices([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]], len(x))


def _rotation(angle: Array) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    return _matrices([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], len(angle))


def _shift(x: Array, y: Array) -> Array:
    return _matrices([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]], len(x))
