"""What all sources of images have in common: how an image is found, read and recognised."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pydantic
from numpy.typing import NDArray

from ...config import UserError, config, config_error
from ...config.sizes import Sides
from ..colour import Pixels
from ..names import normal_form, printable, sorted_classes
from ..scan import ScanReport
from ..transforms import decode

if TYPE_CHECKING:
    from PIL import Image

UNKNOWN = (-1, -1, 0, 1)  # of an image that no scan has measured


class Source(Protocol):
    """What every config of a source has: its name. With a field `subset`, so many of its images are taken (None: all)."""

    @property
    def source(self) -> str: ...


@dataclass
class Images:
    """One opened source: it gives the `encoded` images, or loads their pixels. `labels` are indices into `class_names`, -1
    where an image has no class.

    `named_by_files` says whether `names` are those of files. `only_folder` is the folder that alone holds the images, where it
    is not the data folder itself.
    """

    names: list[str]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    fingerprint: str
    report: ScanReport = field(default_factory=ScanReport)
    named_by_files = False
    only_folder: str | None = None

    def __post_init__(self) -> None:
        if len(self.report.measures) != len(self):
            self.report.measures = np.tile(np.array(UNKNOWN, np.int64), (len(self), 1))

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> "Image.Image | Pixels":
        """The image, mode L or RGB; a JPEG may come at a fraction of its size, but not below `at_least`."""
        file = self.encoded(index)
        assert file is not None
        return decode(file, channels=channels, at_least=at_least)

    def encoded(self, index: int) -> Path | bytes | None:
        """The image's file, or its bytes; None where the source holds pixels."""
        return None

    def content(self, index: int) -> bytes:
        """The bytes that the image is decoded from; where the source holds pixels, those."""
        encoded = self.encoded(index)
        if encoded is None:
            return np.asarray(self.load(index, channels=3)).tobytes()
        return encoded if isinstance(encoded, bytes) else encoded.read_bytes()

    @property
    def uniform(self) -> tuple[Pixels, NDArray[np.int64]] | None:
        """Where all images have one size: an array (M, H, W, C) in memory or in a mapped file, and the index of each in it."""
        return None

    def is_decoded_at(self, sides: Sides) -> bool:
        """Whether the images lie in a mapped file and just cover this height and width, so that a batch costs no decoding."""
        return False


@dataclass(kw_only=True)
class ArrayImages(Images):
    """Images of one size in memory, (N, H, W, C)."""

    pixels: Pixels

    def __post_init__(self) -> None:
        super().__post_init__()
        self.report.measures[:, :2] = self.pixels.shape[2:0:-1]

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Pixels:
        return self.pixels[index]

    @property
    def uniform(self) -> tuple[Pixels, NDArray[np.int64]]:
        return self.pixels, np.arange(len(self.pixels))


def digest(*parts: Any) -> str:
    """The SHA-256 of texts and bytes, each followed by a zero byte."""
    result = hashlib.sha256()
    for part in parts:
        result.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else bytes(part))
        result.update(b"\0")
    return result.hexdigest()


def name_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: it decides which images are held out, in every run alike."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2.0**64


@config
class HeldOutShare:
    """A `fraction` of the images, by the hash of what the regular expression `together` finds in the names of their files:
    images with the same text in their names, such as the number of a person, are on the same side. Where it finds nothing, it
    is the whole path that counts."""

    fraction: float = pydantic.Field(gt=0, lt=1)
    together: str

    @pydantic.field_validator("together")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise config_error(f"it is no regular expression: {error}") from None
        return value

    def key_of(self, name: str) -> str:
        """The text that is hashed for an image of this name."""
        match = re.search(self.together, os.path.basename(name))
        return match[0] if match is not None and match[0] else name


Share = float | int | HeldOutShare  # of the data, as against a source of its own


def hold_out(data_set: Any, names: Sequence[str], held_out: Share, noun: str) -> tuple[Any, Any]:
    """(those to train on, those held out or None) of a set of images or points: a fraction, by the hash of their names. A
    UserError where one side would be empty, or where the names say nothing of what belongs together."""
    if not held_out:
        return data_set, None
    if isinstance(held_out, HeldOutShare):
        keys, fraction = [held_out.key_of(name) for name in names], held_out.fraction
        if not set(keys) - set(names):
            raise UserError(
                f"held_out.together: {held_out.together!r} finds nothing in the name of any file, as in {names[0]!r}"
            )
        if len(set(keys)) == 1:
            raise UserError(f"held_out.together: {held_out.together!r} finds {keys[0]!r} in the name of every file")
    else:
        keys, fraction = names, held_out
    is_held_out = np.array([name_fraction(key) < fraction for key in keys])
    if is_held_out.all() or not is_held_out.any():
        raise UserError(f"held_out {fraction:g} of {len(names)} {noun} leaves one side empty; change it")
    return data_set.only(~is_held_out), data_set.only(is_held_out)


def number_classes(classes: Sequence[str | None]) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
    """The labels of images of these classes, the classes in their order, and remarks on classes written in two forms."""
    spellings = sorted({name for name in classes if name is not None})
    class_names = sorted_classes(spellings)
    number = {None: -1} | {normal_form(name): i for i, name in enumerate(class_names)}
    labels = np.array([number[name and normal_form(name)] for name in classes], dtype=np.int64)
    twice = [name for name in spellings if name not in class_names]
    remarks = [f"{printable(name)!r} is there in two spellings that look the same; they are one class" for name in twice]
    return labels, class_names, remarks


def odd_label_remarks(values: Sequence[Any], class_names: Sequence[str]) -> list[str]:
    """Remarks on labels that may mean something else than a class."""
    remarks = []
    if "-1" in class_names and set(class_names) - {"-1", "1"}:
        remarks.append("the label -1 is read as a class; where it means that there is none, leave it empty")
    if any(isinstance(value, list | dict) for value in values):
        remarks.append("the labels are lists or tables, and each different one is a class of its own")
    return remarks
