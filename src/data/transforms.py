"""From a file to the rectangle of uint8 pixels that a network sees, in the colours that the file means.

An ICC profile is converted to sRGB, and deep grey is scaled by the range that the file states.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from ..config import config, config_error
from ..config.sizes import ImageSize, Sides, sides_of
from .colour import Pixels, normalise, read_stated_bits, to_array, to_image
from .formats import open_image

if TYPE_CHECKING:
    from PIL import Image

# The version of what `decode` makes of a file. It goes up when the pixels of some files change; `scan.examine` says of which
# files. Caches remember it. 2: colour profiles are converted, and grey is scaled by the range that the file states.
DECODER = 2
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@config
class AspectConfig:
    """Images keep their shape, as far as a table of sizes allows. The sizes have about `size` squared pixels and sides that
    are multiples of `step` (without it: of the network's factor); no side is more than `max_ratio` times the other. A size
    with fewer than `min_images` images is left out, and its images go to the one whose shape is nearest."""

    kind: Literal["buckets"] = "buckets"
    max_ratio: float = pydantic.Field(2.0, ge=1, le=16)
    step: int | None = pydantic.Field(None, ge=1, le=4096)
    min_images: int = pydantic.Field(16, ge=1)


@config
class ImageConfig:
    """What the network sees: images resized until they just cover `size`, the side of a square or [height, width], and what is
    over cut off in the middle or at random.

    `flip` mirrors half of the images left to right. With `aspect` each image keeps about its own shape.
    """

    size: ImageSize
    channels: Literal[1, 3] = 3
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    aspect: AspectConfig | None = None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "ImageConfig":
        if self.aspect is not None and not isinstance(self.size, int):
            raise config_error("aspect: the sizes of buckets follow from the side of one square; give size as a number")
        return self

    @property
    def sides(self) -> Sides:
        """Height and width; with `aspect` those of the square that the sizes are made from."""
        return sides_of(self.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, *self.sides

    @property
    def plain(self) -> "ImageConfig":
        """The same size, cut from the middle and never mirrored."""
        return ImageConfig(size=self.size, channels=self.channels, aspect=self.aspect)

    def at(self, sides: Sides) -> "ImageConfig":
        """The same of images of this height and width alone."""
        return replace(self, size=sides, aspect=None)


def decode(file: Path | bytes, *, channels: int = 3, at_least: int | None = None) -> "Image.Image":
    """The first frame of an image file, normalised. A JPEG far larger than `at_least` is decoded at a fraction of its size."""
    with open_image(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * at_least, 2 * at_least))
        read_stated_bits(image)
        image.load()
        return normalise(image, channels)


def crop(image: "Image.Image | Pixels", spec: ImageConfig, u: NDArray[np.float64]) -> Pixels:
    """(height, width, channels) uint8 of `spec.size`: the largest part of the image of that shape, resized. `u` are three
    numbers in [0, 1): where to cut across and down, and whether to flip."""
    width, height = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
    rows, columns = spec.sides
    if width * rows <= height * columns:
        cut_height, cut_width = width * rows / columns, width
    else:
        cut_height, cut_width = height, height * columns / rows
    across, down = (u[0], u[1]) if spec.crop == "random" else (0.5, 0.5)
    left, top = across * (width - cut_width), down * (height - cut_height)
    if (cut_height, cut_width) == (rows, columns):
        pixels = image if isinstance(image, np.ndarray) else to_array(image)
        pixels = pixels[int(top) : int(top) + rows, int(left) : int(left) + columns]
    else:
        whole = to_image(image) if isinstance(image, np.ndarray) else image
        box = (left, top, left + cut_width, top + cut_height)  # cut before resizing, so a long thin image costs nothing
        pixels = to_array(whole.resize((columns, rows), _BICUBIC, box=box))
    if pixels.shape[2] != spec.channels:
        pixels = to_array(to_image(pixels).convert("RGB" if spec.channels == 3 else "L"))
    return pixels[:, ::-1] if spec.flip and u[2] < 0.5 else pixels


def is_enlarged(sides: NDArray[np.int64], size: int | Sides) -> NDArray[np.bool_]:
    """Whether images of these `sides` (N, 2), width and height, are enlarged until they cover `size`: (N,)."""
    height, width = sides_of(size)
    return (sides[:, 0] < width) | (sides[:, 1] < height)


def resize_shorter_side(image: "Image.Image", size: int) -> Pixels:
    """The whole image with its shorter side at `size`, (H, W, C) uint8."""
    side = min(image.size)
    width, height = (max(size, round(length * size / side)) for length in image.size)
    return to_array(image if side == size else image.resize((width, height), _BICUBIC))


def position_uniforms(seed: int, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Three numbers in [0, 1) for each position of the stream, a function of (seed, position): (N, 3).

    SplitMix64 (Steele et al. 2014) of a counter: no generator is made per image.
    """
    counter = np.uint64(seed) * np.array([[0x9E3779B97F4A7C15]], np.uint64) + 4 * positions.astype(np.uint64)[:, None]
    z = (counter + np.arange(3, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
