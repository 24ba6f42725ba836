"""Which transforms images get: those of a position in the stream, and those of the copies in a latent cache."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from ..diffusion.augmentation import AugmentationConfig, Transforms, draw_transforms
from .seeds import generator


def draw_of_positions(spec: AugmentationConfig, seed: int, positions: Sequence[int], aspect: float) -> Transforms:
    """The transforms of the images at these positions of the stream, a function of (seed, position)."""
    return draw_transforms(spec, [generator(seed, "augmentation", position) for position in positions], aspect)


def draw_copies(spec: AugmentationConfig, numbers: NDArray[Any], versions: NDArray[Any], aspect: float = 1.0) -> Transforms:
    """The transforms of these versions (B,) of the images of these numbers (B,): the same in every cache."""
    words = zip(numbers.tolist(), versions.tolist(), strict=True)
    return draw_transforms(spec, [generator("augmented copy", number, version) for number, version in words], aspect)
