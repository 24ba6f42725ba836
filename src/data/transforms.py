"""From a file to the square of uint8 pixels that a network sees, in the colours that the file means.

An ICC profile is converted to sRGB, and deep grey is scaled by the range that the file states.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from ..config import config
from .colour import Pixels, normalise, read_stated_bits, to_array, to_image
from .formats import open_image

if TYPE_CHECKING:
    from PIL import Image

# The version of what `decode` makes of a file. It goes up when the pixels of some files change; `scan.examine` says of which
# files. Caches remember it. 2: colour profiles are converted, and grey is scaled by the range that the file states.
DECODER = 2
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@config
class ImageConfig:
    """What the network sees: the shorter side resized to `size`, then a square cut from the middle or at random.

    `flip` mirrors half of the images left to right.
    """

    size: int = pydantic.Field(ge=2, le=4096)
    channels: Literal[1, 3] = 3
    crop: Literal["center", "random"] = "center"
    flip: bool = False


def decode(file: Path | bytes, *, channels: int = 3, at_least: int | None = None) -> "Image.Image":
    """The first frame of an image file, normalised. A JPEG far larger than `at_least` is decoded at a fraction of its size."""
    with open_image(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * at_least, 2 * at_least))
        read_stated_bits(image)
        image.load()
        return normalise(image, channels)


def square(image: "Image.Image | Pixels", spec: ImageConfig, u: NDArray[np.float64]) -> Pixels:
    """(size, size, channels) uint8. `u` are three numbers in [0, 1): where to cut across and down, and whether to flip."""
    width, height = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
    side = min(width, height)
    across, down = (u[0], u[1]) if spec.crop == "random" else (0.5, 0.5)
    left, top = across * (width - side), down * (height - side)
    if side == spec.size:
        pixels = image if isinstance(image, np.ndarray) else to_array(image)
        pixels = pixels[int(top) : int(top) + side, int(left) : int(left) + side]
    else:
        whole = to_image(image) if isinstance(image, np.ndarray) else image
        box = (left, top, left + side, top + side)  # cut before resizing, so a long thin image costs nothing
        pixels = to_array(whole.resize((spec.size, spec.size), _BICUBIC, box=box))
    if pixels.shape[2] != spec.channels:
        pixels = to_array(to_image(pixels).convert("RGB" if spec.channels == 3 else "L"))
    return pixels[:, ::-1] if spec.flip and u[2] < 0.5 else pixels


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
