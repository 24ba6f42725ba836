"""The source `python`: a map-style data set that the caller hands in, read once, checked, and recognised by its content."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...config import UserError, config
from ...config.progress import track
from ..colour import Pixels, normalise, to_array
from .images import ArrayImages, Images

IN_MEMORY_BYTES = 1 << 30  # up to here all images of a data set are kept; beyond, each is read when it is needed
RANGES = "give uint8, or floats in [0, 1] or in [-1, 1]"


@config
class PythonSource:
    """A data set that is handed in from Python, as in train(cfg, run_dir, dataset=...): it cannot be opened from a config."""

    source: Literal["python"]
    subset: None = None


GIVEN = PythonSource(source="python")


def open_python(spec: PythonSource) -> Images:
    raise UserError(
        "the data set was handed in from Python, so no config can open it: train on with train(cfg, run_dir, dataset=...) from "
        "Python, or set data to a source on disk"
    )


@dataclass(kw_only=True)
class GivenImages(Images):
    """Images that the data set gives when they are asked for. `signed` says whether its floats are in [-1, 1]."""

    dataset: Any
    signed: bool

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Pixels:
        value, where, _ = _read_item(self.dataset, index)
        return _to_uint8(_item_pixels(value, where, channels), signed=self.signed)


def read_dataset(dataset: Any, channels: int) -> Images:
    """Read a data set whose items are an image or (image, label), each once, for the hash by which a run recognises its data.

    An image is uint8 or float, a tensor (C, H, W), an array (H, W, C), or a PIL image, of any size; a label is a whole number
    from 0, None or -1 for none. `dataset.classes` names the classes. A UserError says which item is not like that.
    """

    def checked_pixels(value: Any, where: str) -> NDArray[Any]:
        pixels = _item_pixels(value, where, channels)
        if pixels.dtype != np.uint8 and not (pixels.min() >= -1 - 1e-5 and pixels.max() <= 1 + 1e-5):  # nor is NaN in there
            raise UserError(f"{where} has values from {pixels.min():g} to {pixels.max():g}; {RANGES}")
        return pixels

    labels, sizes = list[int](), list[tuple[int, int]]()
    in_memory: list[NDArray[Any]] | None = []
    num_bytes, signed, hashed = 0, False, hashlib.sha256()
    for pixels, label in read_items(dataset, checked_pixels):
        signed |= bool(pixels.min() < 0)
        hashed.update(f"{pixels.dtype} {pixels.shape} {label}\0".encode())
        hashed.update(pixels.tobytes())
        labels.append(label)
        sizes.append((pixels.shape[1], pixels.shape[0]))
        if in_memory is not None:
            in_memory.append(pixels)
            num_bytes += pixels.nbytes
            in_memory = None if num_bytes > IN_MEMORY_BYTES or pixels.shape != in_memory[0].shape else in_memory
    classes = dataset_classes(dataset, labels)
    for name in classes:
        hashed.update(name.encode() + b"\0")
    names = [item_name(i) for i in range(len(labels))]
    facts: dict[str, Any] = {"names": names, "labels": np.array(labels, dtype=np.int64), "class_names": classes}
    facts["fingerprint"] = hashed.hexdigest()
    if in_memory is not None:
        return ArrayImages(**facts, pixels=np.stack([_to_uint8(pixels, signed=signed) for pixels in in_memory]))
    images = GivenImages(**facts, dataset=dataset, signed=signed)
    images.report.measures[:, :2] = sizes
    return images


def item_name(i: int) -> str:
    """The name of an item: from it follows whether the item is held out."""
    return f"item/{i:08d}"


def read_items(dataset: Any, to_values: Callable[[Any, str], NDArray[Any]]) -> Iterator[tuple[NDArray[Any], int]]:
    """(values, label or -1) of every item, in order; `to_values(item, words for it in messages)` checks and converts an item.

    Three items are read a second time: a UserError where they are not the same again.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UserError(
            "the data set has no length or no items by number: hand in a map-style one, with __len__ and __getitem__, so that "
            "a run can go on exactly"
        )
    try:
        count = len(dataset)
    except Exception as error:
        raise UserError(f"the length of the data set cannot be read: {type(error).__name__}: {error}") from None
    if count == 0:
        raise UserError("the data set is empty")
    for i in track(range(count), "reading the data set", unit="items"):
        item, where, label = _read_item(dataset, i)
        values = to_values(item, where)
        if i in (0, count // 2, count - 1) and not np.array_equal(values, to_values(*_read_item(dataset, i)[:2])):
            raise UserError(
                f"item {i} of the data set is another one each time it is read, so a run could not go on exactly: hand in the "
                "data set without random transforms; image.flip and image.crop are for that"
            )
        yield values, label


def _read_item(dataset: Any, i: int) -> tuple[Any, str, int]:
    """(image or point, words for the item, label or -1) of the item i."""
    where = f"item {i} of the data set"
    try:
        item = dataset[i]
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{where} cannot be read: {type(error).__name__}: {reason}") from None
    parts = tuple(item) if isinstance(item, tuple | list) else (item,)
    if len(parts) not in (1, 2):
        raise UserError(f"{where} has {len(parts)} parts; give an image, or (image, label)")
    return parts[0], where, _to_label(parts[1], where) if len(parts) == 2 else -1


def _to_label(value: Any, where: str) -> int:
    if value is None:
        return -1
    if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise UserError(f"the label of {where} is {value!r}; give a whole number from 0, or None where it has none")
    return value


def dataset_classes(dataset: Any, labels: Sequence[int]) -> tuple[str, ...]:
    """The names of the classes in the order of the labels: `classes` of the data set (or that below a Subset), or numbers."""
    count, below = max(labels) + 1, dataset
    while not hasattr(below, "classes") and hasattr(below, "dataset"):
        below = below.dataset
    names = getattr(below, "classes", None)
    if isinstance(names, list | tuple) and names and count:
        names = tuple(map(str, names))
        if len(set(names)) == len(names) >= count:
            return names
        raise UserError(f"the data set has labels up to {count - 1} and {len(set(names))} different names in its `classes`")
    if count > max(len(labels), 1000):
        raise UserError(
            f"the data set has {len(labels)} items and labels up to {count - 1}: number the classes from 0, without gaps, or "
            "name them all in its `classes`"
        )
    return tuple(map(str, range(count)))


def item_array(value: Any, where: str) -> NDArray[Any]:
    """A tensor or array as an array; floats as float32."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray):
        raise UserError(f"{where} is a {type(value).__name__}; give a tensor, an array or a PIL image")
    return value.astype(np.float32) if value.dtype.kind == "f" else value


def _item_pixels(value: Any, where: str, channels: int) -> NDArray[Any]:
    """(H, W, C) uint8 or float32 of an image as it was handed in."""
    from PIL import Image

    if isinstance(value, Image.Image):
        return to_array(normalise(value, channels))
    pixels = item_array(value, where)
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise UserError(f"{where} is of {pixels.dtype}; {RANGES}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    channels_first = pixels.ndim == 3 and pixels.shape[0] in (1, 3)
    channels_last = pixels.ndim == 3 and pixels.shape[2] in (1, 3)
    if 0 in pixels.shape or not (channels_first or channels_last):
        layouts = "(C, H, W) tensors or (H, W, C) arrays of 1 or 3 channels"
        raise UserError(f"{where} has the shape {tuple(value.shape)}; give {layouts}")
    if channels_first and (not channels_last or isinstance(value, Tensor)):  # where both are possible, its type decides
        pixels = pixels.transpose(1, 2, 0)
    return np.ascontiguousarray(pixels)


def _to_uint8(pixels: NDArray[Any], *, signed: bool) -> Pixels:
    if pixels.dtype == np.uint8:
        return pixels
    scaled = (pixels + 1) * 127.5 if signed else pixels * 255
    return np.rint(scaled).clip(0, 255).astype(np.uint8)
