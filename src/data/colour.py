"""Colours as the file means them: its ICC profile is converted to sRGB, and deep grey is scaled by the range that it states."""

import io
import struct
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

CONVERTED = "its colour profile is converted to sRGB"
DAMAGED = "its colour profile is damaged: the colours are taken as they are"
UNFIT = "its colour profile is for another kind of image: the colours are taken as they are"
SCALED = "deep grey that states its range is scaled by it"
DARK = "16-bit grey whose values use 12 bits or fewer, and no range is stated: it will look nearly black"
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # of a profile, and the mode that its transform reads
_GREY = ("L", "LA", "La", "1")
_MAX_DIFFERENCE = 2  # of 255: a transform that moves no value further is that of sRGB to itself
_TAGS = {"bits": 258, "largest": 281, "stated_largest": 341}  # of TIFF: BitsPerSample, MaxSampleValue, SMaxSampleValue


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
    try:
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = _SPACES.get(profile.profile.xcolor_space.strip(), "")
        if not space:
            return Profile(None, UNFIT)
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), space, "RGB")
        if space in ("RGB", "L"):
            probe = _test_colours(space)
            moved = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
            if np.abs(moved).max() <= _MAX_DIFFERENCE:
                return Profile(None)
        return Profile(transform, CONVERTED) if space == mode else Profile(None, UNFIT)
    except Exception:  # the library raises whatever it likes on damaged bytes
        return Profile(None, DAMAGED)


def _test_colours(mode: str) -> Image.Image:
    """Colours from all over the cube, or all greys."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1)
    return Image.fromarray(np.ascontiguousarray(cube.reshape(27, 27, 3)))


def profile_of(image: Image.Image) -> Profile:
    """What the profile of an opened image asks for."""
    content = image.info.get("icc_profile")
    if content:
        return read_profile(bytes(content), _colour_mode(image.mode))
    return Profile(None, DAMAGED if "icc_profile" in image.info and content is None and image.format == "PNG" else "")


def to_srgb(image: Image.Image) -> Image.Image:
    """The image in sRGB where its profile or its mode (LAB) is of other colours; else as it is. Transparency stays."""
    transform = profile_of(image).transform
    if transform is None:
        return image.convert("RGB") if image.mode == "LAB" else image
    mode, alpha = _colour_mode(image.mode), None
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
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
        stated = [tags.get(_TAGS[key]) for key in ("stated_largest", "largest")]
        numbers = [value[0] if isinstance(value, tuple) and len(value) == 1 else value for value in stated]
        known = [int(value) for value in numbers if isinstance(value, int | float) and 0 < value <= 65535]
        depth = tags.get(_TAGS["bits"], (16,))
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


def stated_white(image: Image.Image, values: np.ndarray) -> float | None:
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
