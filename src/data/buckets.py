"""Aspect buckets: a table of sizes of about one area, and to which of them each image goes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import UserError
from ..config.sizes import Sides, describe_size
from .transforms import AspectConfig, ImageConfig

AREA = 0.25  # how far the area of a bucket may be from that of the square, as a share of it


def bucket_sizes(size: int, aspect: AspectConfig, factor: int) -> list[Sides]:
    """The sizes (height, width) that images may have, the tallest shape first: for each height the width, and for each width
    the height, whose area is nearest to `size` squared and at most a quarter from it.

    Sides are multiples of `aspect.step`, without it of `factor`, by which the networks reduce images. A UserError says where
    the step is no multiple of the factor, or too large for the size.
    """
    step = aspect.step or factor
    if step % factor:
        near = " or ".join(str(each) for each in sorted({step // factor * factor, -(-step // factor) * factor} - {0}))
        raise UserError(
            f"image.aspect.step {step} is not a multiple of {factor}, by which the networks reduce images; use {near}"
        )
    longest = int(math.sqrt((1 + AREA) * aspect.max_ratio) * size)
    pairs = set[Sides]()
    for side in range(step, longest + 1, step):
        other = min(range(step, longest + 1, step), key=lambda other: abs(side * other - size**2))
        if abs(side * other - size**2) <= AREA * size**2 and max(side, other) <= aspect.max_ratio * min(side, other):
            pairs |= {(side, other), (other, side)}
    by_ratio: dict[float, Sides] = {}
    for height, width in sorted(pairs, key=lambda pair: -abs(pair[0] * pair[1] - size**2)):
        by_ratio[width / height] = (height, width)  # of one shape the size whose area is nearest
    if not by_ratio:
        raise UserError(
            f"image.aspect: no size in steps of {step} px has about the area of {describe_size(size)}; use a smaller step, "
            "or a larger image.size"
        )
    return [by_ratio[ratio] for ratio in sorted(by_ratio)]


def nearest_buckets(sizes: Sequence[Sides], sides: NDArray[np.int64]) -> NDArray[np.int64]:
    """To which of the `sizes` (height, width) images of these `sides` (N, 2), width and height, go: (N,), the one whose ratio
    is nearest, as a factor."""
    of_sizes = np.log([width / height for height, width in sizes])
    of_images = np.log(sides[:, 0] / sides[:, 1])
    return np.abs(of_images[:, None] - of_sizes[None]).argmin(axis=1).astype(np.int64)


def cropped_share(size: Sides, sides: NDArray[np.int64]) -> float:
    """The share of the area of images of these `sides` (N, 2), width and height, that is cut off until they have the shape of
    `size` (height, width)."""
    ratios, ratio = sides[:, 0] / sides[:, 1], size[1] / size[0]
    return float((1 - np.minimum(ratios / ratio, ratio / ratios)).mean()) if len(sides) else 0.0


class Buckets(NamedTuple):
    """The `specs` of the images of each bucket, the tallest first, and in `which` (N,) of them each image is."""

    specs: tuple[ImageConfig, ...]
    which: NDArray[np.int64]

    @property
    def counts(self) -> list[int]:
        """How many images each bucket has."""
        return np.bincount(self.which, minlength=len(self.specs)).tolist()

    @property
    def most_frequent(self) -> ImageConfig:
        """The spec of the bucket with the most images."""
        return self.specs[int(np.argmax(self.counts))]

    @property
    def table(self) -> list[list[int]]:
        """Height, width and number of images of each bucket."""
        return [[*spec.sides, count] for spec, count in zip(self.specs, self.counts, strict=True)]

    def members(self, bucket: int) -> NDArray[np.int64]:
        """The indices of its images."""
        return np.flatnonzero(self.which == bucket)

    def groups(self, shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], NDArray[np.int64]]:
        """Where there are several buckets: the indices of the images of each, by what the network sees of them, `shapes`."""
        if len(self.specs) < 2:
            return {}
        return {shape: self.members(bucket) for bucket, shape in enumerate(shapes)}

    def of(self, sides: NDArray[np.int64]) -> "Buckets":
        """The same buckets of other images, of these `sides` (N, 2)."""
        if len(self.specs) < 2:
            return Buckets(self.specs, np.zeros(len(sides), np.int64))
        return Buckets(self.specs, nearest_buckets([spec.sides for spec in self.specs], known_sides(sides, self.specs[0])))


def known_sides(sides: NDArray[np.int64], image: ImageConfig) -> NDArray[np.int64]:
    """Width and height (N, 2), with those of a square where they are not known."""
    return np.where(sides > 0, sides, max(image.sides))


def make_buckets(image: ImageConfig, sides: NDArray[np.int64], factor: int) -> Buckets:
    """The buckets of training images of these `sides` (N, 2), width and height, for networks that reduce images by `factor`;
    one alone where images have no `aspect`.

    A bucket with fewer than `min_images` images is left out, the smallest first, and its images go to that whose ratio is then
    nearest. So the table depends on data and config alone.
    """
    if image.aspect is None:
        return Buckets((image,), np.zeros(len(sides), np.int64))
    assert isinstance(image.size, int)
    sizes, sides = bucket_sizes(image.size, image.aspect, factor), known_sides(sides, image)
    while True:
        which = nearest_buckets(sizes, sides)
        counts = np.bincount(which, minlength=len(sizes))
        smallest = int(counts.argmin())
        if len(sizes) == 1 or counts[smallest] >= image.aspect.min_images:
            return Buckets(tuple(image.at(each) for each in sizes), which)
        del sizes[smallest]
