"""Images of several shapes, cut to their buckets, measured one shape at a time, and brought to one size to be compared."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from .. import figures
from ..config.sizes import Sides, describe_size
from ..data import ImageConfig, ImageSet
from ..data.buckets import sort_by_shape
from ..metrics.distances import Array

Fit = Callable[[Tensor], Tensor]  # (B, C, H, W) uint8 -> the same of one size for all
LoadPixels = Callable[[Sequence[int]], figures.Pixels]  # indices -> (B, H, W, C) uint8


def pixel_loader(data: ImageSet, image: ImageConfig, sizes: Sequence[Sides] = (), fit: Fit | None = None) -> LoadPixels:
    """A function of indices that gives (N, H, W, C) uint8 of these images, cut from the middle. With the `sizes` of buckets
    each image is cut to the nearest of them, and then brought to one size with the others by `fit` (default: `to_squares` of
    `image`)."""
    plain = image.plain
    if not sizes:
        data.prepare(plain)
        return lambda indices: data.batch(np.array(indices, dtype=np.int64), plain, np.full((len(indices), 3), 0.5))
    buckets, fit = sort_by_shape(sizes, plain, data.sides), fit or to_squares(image)
    data.prepare(buckets.most_frequent)

    def load(indices: Sequence[int]) -> figures.Pixels:
        def cut(bucket: int, part: Sequence[int]) -> Tensor:
            pixels = data.batch(np.array(part, dtype=np.int64), buckets.specs[bucket], np.full((len(part), 3), 0.5))
            return fit(channels_first(pixels))

        return by_shape(indices, buckets.which, cut).permute(0, 2, 3, 1).numpy()

    return load


def by_shape(indices: Sequence[int], which: NDArray[np.int64], make: Callable[[int, list[int]], Tensor]) -> Tensor:
    """(len(indices), ...): what `make(bucket, part of the indices)` gives of those of each bucket, in the order of the indices;
    image i is in the bucket `which[i]`."""
    groups, order = split_by_shape(indices, which)
    return torch.cat([make(int(which[group[0]]), group.tolist()) for group in groups])[torch.from_numpy(order)]


def split_by_shape(indices: Sequence[int], which: NDArray[np.int64]) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """The indices of each bucket, where image i is in the bucket `which[i]`; and what brings the groups, joined, back into the
    order of the indices."""
    numbers = np.array(indices, dtype=np.int64)
    places = [np.flatnonzero(which[numbers] == bucket) for bucket in np.unique(which[numbers])]
    return [numbers[group] for group in places], np.argsort(np.concatenate(places), kind="stable")


def measure_by_shape(
    indices: Sequence[int], which: NDArray[np.int64], measure: Callable[[NDArray[np.int64]], dict[str, Array]]
) -> dict[str, Array]:
    """What `measure` gives of the indices of each bucket, (n, ...) for each name, joined in the order of the indices."""
    groups, order = split_by_shape(indices, which)
    parts = [measure(group) for group in groups]
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def to_squares(image: ImageConfig) -> Fit:
    """A function that resizes pixels (B, C, H, W) uint8 to the size of `image`, a square, whatever their shape, as FID does."""

    def fit(pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[2:]) == image.sides:
            return pixels
        resized = F.interpolate(pixels.float(), size=image.sides, mode="bicubic", antialias=True, align_corners=False)
        return resized.round().clamp(0, 255).to(torch.uint8)

    return fit


def on_white(sizes: Sequence[Sides]) -> Fit:
    """A function that puts pixels (B, C, H, W) uint8 of any of the `sizes` in the middle of white that holds all of them."""
    rows, columns = (max(sides) for sides in zip(*sizes, strict=True))

    def fit(pixels: Tensor) -> Tensor:
        height, width = rows - pixels.shape[2], columns - pixels.shape[3]
        return F.pad(pixels, (width // 2, width - width // 2, height // 2, height - height // 2), value=255)

    return fit


def channels_first(pixels: figures.Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rearrange(pixels, "b h w c -> b c h w")))


def describe_squares(image: ImageConfig, which: str = "") -> str:
    """A note on images of several shapes."""
    return f"{which}all are resized to squares of {describe_size(image.size)} for the features, as for FID"
