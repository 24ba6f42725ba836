"""What the numbers in an image file mean as colours: colour profiles, deep grey, transparency; images as arrays and back."""

import io
import struct
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
_BITS, _LARGEST, _STATED_LARGEST = 258, 281, 341  # tags of TIFF: BitsPerSample, MaxSampleValue, SMaxSampleValue
_ORIENTATION = 0x0112  # a tag of EXIF
CONVERTED = "its colour profile is converted to sRGB"
DAMAGED = "its colour profile is damaged: the colours are taken as they are"
UNFIT = "its colour profile is for another kind of image: the colours are taken as they are"
SCALED = "deep grey that states its range is scaled by it"
DARK = "16-bit grey whose values use 12 bits or fewer, and no range is stated: it will look nearly black"
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # of a profile, and the mode that its transform reads
_GREY = ("L", "LA", "La", "1")
_MAX_DIFFERENCE = 2  # of 255: a transform that moves no value further is that of sRGB to itself


class Profile(NamedTuple):
    """What a profile asks for: `transform` to sRGB, or None where the pixels stay as they are; `note` is for the person."""

    transform: Any
    note: str = ""


def _colour_mode(mode: str) -> str:
    if mode in ("CMYK", "LAB"):
        return mode
    return "L" if mode in _GREY or mode.startswith(("I", "F")) else "RGB"


@lru_cache(maxsize=32)
def read_profile(content: bytes, mode: str) -> Profile:
    """What the ICC profile `content` asks of images in `mode` (L, RGB, CMYK or LAB). One that is sRGB asks for nothing.

    The transform may be used by several threads at once.
    """
    from PIL import ImageCms

    try:
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = _SPACES.get(profile.profile.xcolor_space.strip(), "")
        if not space:
            return Profile(None, UNFIT)
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), space, "RGB")
        if space in ("RGB", "L"):  # compare colours from all over the cube, or all greys
            steps = np.linspace(0, 255, 256 if space == "L" else 9).astype(np.uint8)
            axes = (steps,) * (1 if space == "L" else 3)
            probe = to_image(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 1, len(axes)))
            moved = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
            if np.abs(moved).max() <= _MAX_DIFFERENCE:
                return Profile(None)
        return Profile(transform, CONVERTED) if space == mode else Profile(None, UNFIT)
    except Exception:  # the library raises whatever it likes on damaged bytes
        return Profile(None, DAMAGED)


def profile_of(image: "Image.Image") -> Profile:
    """What the profile of an opened image asks for."""
    content = image.info.get("icc_profile")
    if content:
        return read_profile(bytes(content), _colour_mode(image.mode))
    return Profile(None, DAMAGED if "icc_profile" in image.info and content is None and image.format == "PNG" else "")


def _is_transparent(image: "Image.Image") -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def to_srgb(image: "Image.Image") -> "Image.Image":
    """The image in sRGB where its profile or its mode (LAB) is of other colours; else as it is. Transparency stays."""
    transform = profile_of(image).transform
    if transform is None:
        return image.convert("RGB") if image.mode == "LAB" else image
    mode, alpha = _colour_mode(image.mode), None
    if _is_transparent(image):
        image = image.convert("LA" if mode == "L" else "RGBA")
        alpha = image.getchannel("A")
    converted = transform.apply(image if image.mode == mode else image.convert(mode))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def read_stated_bits(image: Any) -> None:
    """Keep the number of bits that an opened, not yet loaded file of 16-bit grey states, in its `info`."""
    if not image.mode.startswith("I"):
        return
    tags, bits = getattr(image, "tag_v2", None), 0
    if tags is not None:
        stated = [tags.get(tag) for tag in (_STATED_LARGEST, _LARGEST)]
        numbers = [value[0] if isinstance(value, tuple) and len(value) == 1 else value for value in stated]
        known = [int(value) for value in numbers if isinstance(value, int | float) and 0 < value <= 65535]
        depth = tags.get(_BITS, (16,))
        bits = known[0].bit_length() if known else int(depth[0] if isinstance(depth, tuple) else depth)
    elif image.format == "PNG":
        bits = _significant_bits(image.fp)
    if 8 <= bits < 16:
        image.info["stated_bits"] = bits


def _significant_bits(file: Any) -> int:
    """What the sBIT chunk of an opened grey PNG says, or 0."""
    position = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"PLTE", b"IEND"):
            length = struct.unpack(">I", head[:4])[0]
            if head[4:] == b"sBIT":
                return (file.read(1) or b"\0")[0]
            file.seek(length + 4, 1)
        return 0
    finally:
        file.seek(position)


def stated_white(image: "Image.Image", values: np.ndarray) -> float | None:
    """The value that is white where a file of 16-bit grey states fewer bits than it has, and its `values` agree.

    A PNG should spread its values over all 16 bits and say in sBIT how many there were at first. So a PNG that did so is left
    alone: its low bits are empty.
    """
    bits = image.info.get("stated_bits")
    if bits is None or values.size == 0 or values.min() < 0 or values.max() >= 1 << bits:
        return None
    if image.format == "PNG" and not (values.astype(np.int64) & ((1 << (16 - bits)) - 1)).any():
        return None
    return float((1 << bits) - 1)


def _to_8_bits(image: "Image.Image", white: float | None) -> "Image.Image":
    """16-bit and wider greyscale by its range: 0..`white` where the file states it, 0..65535 where the values fit, else
    smallest..largest."""
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, white or 65535.0
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = (values - low) / max(high - low, 1e-12) * 255
    return to_image(np.rint(scaled).clip(0, 255).astype(np.uint8)[:, :, None])


def is_turned(image: "Image.Image") -> bool:
    """Whether the EXIF tag of a loaded image turns it by a quarter, so that it is as wide as the file says that it is high."""
    with suppress(SyntaxError, ValueError, struct.error):
        return image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    return False


def normalise(image: "Image.Image", channels: int) -> "Image.Image":
    """An opened image as it is meant to be seen: turned by its EXIF tag, in sRGB, transparency over white, mode L or RGB."""
    from PIL import Image, ImageOps

    is_deep = image.mode.startswith(("I", "F"))
    white = stated_white(image, np.asarray(image)) if is_deep else None
    profile = image.info.get("icc_profile")
    with suppress(SyntaxError, ValueError, struct.error):  # notes (EXIF) that cannot be read turn nothing
        image = ImageOps.exif_transpose(image)
    if is_deep:
        image = _to_8_bits(image, white)
        image.info["icc_profile"] = profile
    image = to_srgb(image)
    if _is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def to_array(image: "Image.Image") -> Pixels:
    """(H, W, 1 or 3) uint8 of an image in mode L or RGB."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def to_image(pixels: Pixels) -> "Image.Image":
    """(H, W, 1 or 3) uint8 -> an image in mode L or RGB."""
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
