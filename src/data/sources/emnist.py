"""The source `emnist`: handwritten letters and digits from the files that NIST gives away."""

import gzip
import math
import string
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from ...config import UserError, config, resumable_field
from ..colour import Pixels
from .images import ArrayImages, digest

_CAPITALS = string.digits + string.ascii_uppercase
EMNIST_CLASSES = {
    "letters": string.ascii_uppercase,
    "digits": string.digits,
    "mnist": string.digits,
    "byclass": _CAPITALS + string.ascii_lowercase,
    "bymerge": _CAPITALS + "abdefghnqrt",
    "balanced": _CAPITALS + "abdefghnqrt",
}


@config
class EmnistSource:
    """EMNIST's own files (Cohen et al. 2017, arXiv:1702.05373) in `path`, plain or .gz, as NIST's gzip.zip has them.

    28x28 pixels, grey, turned upright here. The classes of `letters` are A-Z, each of both cases; those of `digits` and `mnist`
    0-9; of `byclass` 0-9, A-Z and a-z; of `balanced` and `bymerge` the same but for 15 small letters that look like the large.
    """

    source: Literal["emnist"]
    path: str = resumable_field()
    split: Literal["letters", "digits", "balanced", "byclass", "bymerge", "mnist"]
    part: Literal["train", "test"] = "train"
    subset: int | None = Field(None, gt=0)


def open_emnist(spec: EmnistSource) -> ArrayImages:
    root = Path(spec.path).expanduser()
    folders = [root, root / "gzip"]  # as the zip unpacks
    name = f"emnist-{spec.split}-{spec.part}"
    image_bytes, images = _read_idx(folders, f"{name}-images-idx3-ubyte", 3)
    label_bytes, labels = _read_idx(folders, f"{name}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise UserError(f"{root}: {name} has {len(images)} images and {len(labels)} labels; download both again")
    classes = EMNIST_CLASSES[spec.split]
    first = 1 if spec.split == "letters" else 0  # the letters alone are counted from 1
    if len(labels) and not first <= labels.min() <= labels.max() < first + len(classes):
        raise UserError(
            f"{root}: the labels of {name} run from {labels.min()} to {labels.max()}, those of EMNIST from {first} to "
            f"{first + len(classes) - 1}; download it again"
        )
    return ArrayImages(
        names=[f"emnist/{spec.split}/{spec.part}/{i:06d}" for i in range(len(labels))],
        labels=labels.astype(np.int64) - first,
        class_names=tuple(classes),
        fingerprint=digest(image_bytes, label_bytes),
        pixels=np.ascontiguousarray(images.transpose(0, 2, 1))[..., None],  # the files have columns where others have rows
    )


def _read_idx(folders: Sequence[Path], name: str, axes: int) -> tuple[bytes, Pixels]:
    """The bytes of an idx file and the array in them: uint8 of so many axes.

    Two zeros, the type (8 is unsigned bytes), the number of axes, each length in four bytes, big-endian; then the values.
    """
    paths = [path for folder in folders for path in (folder / name, folder / f"{name}.gz")]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        raise UserError(
            f"{folders[0]} has no {name}, plain or .gz; it is in gzip.zip on the EMNIST page of NIST: unpack that there, "
            "or set data.path (held_out.path) to where it is"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    start = 4 + 4 * axes
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) < start:
        raise UserError(f"{path} is not an idx file of bytes with {axes} axes (its first bytes are {content[:4].hex(' ')})")
    shape = np.frombuffer(content, ">u4", count=axes, offset=4).tolist()
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes, and has {len(content) - start}; download it again"
        )
    return content, np.frombuffer(content, np.uint8, offset=start).reshape(shape)
