"""A data set that the caller hands in from Python: any map-style one, read once, checked, and known by its content."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..config import UserError
from ..config.progress import track
from .points import PointSet
from .sources import ArrayImages, Images, ImageSet, PythonSource, _fraction, open_data
from .transforms import ImageConfig, Pixels, normalise

IN_MEMORY_BYTES = 1 << 30  # up to here all images of a data set are kept; beyond, each is read when it is needed
GIVEN = PythonSource(source="python")
LAYOUTS = "give (C, H, W) tensors or (H, W, C) arrays of 1 or 3 channels"
RANGES = "give uint8, or floats in [0, 1] or in [-1, 1]"


@dataclass
class GivenImages(Images):
    """Images that the data set gives when they are asked for. `signed` says whether its floats are in [-1, 1]."""

    dataset: Any = None
    signed: bool = False

    sizes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def sides(self) -> NDArray[np.int64]:
        return np.array(self.sizes, np.int64).reshape(-1, 2)

    def content(self, index: int) -> bytes:
        value, where, _ = _item(self.dataset, index)
        pixels = np.asarray(value) if isinstance(value, Image.Image) else _array(value, where)
        return pixels.tobytes()

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Pixels:
        value, where, _ = _item(self.dataset, index)
        return _to_uint8(_pixels(value, where, channels), signed=self.signed)


def open_given(dataset: Any, held_out: Any, image: ImageConfig) -> tuple[ImageSet, ImageSet | None]:
    """What `open_data` gives, of a data set whose items are an image or (image, label).

    An image is uint8 or float, a tensor (C, H, W), an array (H, W, C), or a PIL image, of any size; a label is a whole number
    from 0, None or -1 for none. `dataset.classes` names the classes. Every item is read once, for the content hash by which a
    run knows its data. A UserError says which item is not like that.
    """
    labels, sizes = list[int](), list[tuple[int, int]]()
    kept: list[NDArray[Any]] | None = []
    held_bytes, low, found = 0, 0.0, hashlib.sha256()
    for i, value, where, label in _items(dataset):
        pixels = _pixels(value, where, image.channels)
        if pixels.dtype != np.uint8:
            smallest, largest = float(pixels.min()), float(pixels.max())
            if not (smallest >= -1 - 1e-5 and largest <= 1 + 1e-5):  # not a number, too
                raise UserError(f"{where} has values from {smallest:g} to {largest:g}; {RANGES}")
            low = min(low, smallest)
        _again(dataset, i, len(dataset), lambda value, where: _pixels(value, where, image.channels), pixels)
        _hash(found, pixels, label)
        labels.append(label)
        sizes.append((pixels.shape[1], pixels.shape[0]))
        if kept is not None:
            kept.append(pixels)
            held_bytes += pixels.nbytes
            kept = None if held_bytes > IN_MEMORY_BYTES or pixels.shape != kept[0].shape else kept
    names = [_name(i) for i in range(len(labels))]
    classes = _classes(dataset, labels)
    for name in classes:
        found.update(name.encode() + b"\0")
    known = {"names": names, "labels": np.array(labels, dtype=np.int64), "class_names": classes}
    known["fingerprint"] = found.hexdigest()
    signed = low < 0
    part: Images
    if kept is not None:
        part = ArrayImages(**known, pixels=np.stack([_to_uint8(pixels, signed=signed) for pixels in kept]))
    else:
        part = GivenImages(**known, dataset=dataset, signed=signed, sizes=sizes)
    return open_data(ImageSet([part], [np.arange(len(part))]), held_out)


def open_given_points(dataset: Any, held_out: Any) -> tuple[PointSet, PointSet | None]:
    """The same of 2-D points: items are (2,) floats, or (point, label)."""
    if not isinstance(held_out, float | int):
        raise UserError("held_out of 2-D points is a share of them, such as 0.05")
    points, labels = [], []
    for i, value, where, label in _items(dataset):
        point = _array(value, where)
        if point.shape != (2,) or point.dtype.kind != "f":
            raise UserError(f"{where} is no 2-D point of two floats: {point.dtype} of shape {point.shape}; images need `image`")
        if not np.isfinite(point).all():
            raise UserError(f"{where} is not finite: {point}")
        _again(dataset, i, len(dataset), _array, point)
        points.append(point)
        labels.append(label)
    numbers, classes = np.array(labels, dtype=np.int64), _classes(dataset, labels)
    out = np.array([_fraction(_name(i)) < held_out for i in range(len(labels))])
    everything = PointSet(np.stack(points), numbers, classes)
    if not held_out:
        return everything, None
    if out.all() or not out.any():
        raise UserError(f"held_out {held_out:g} of {len(everything)} points leaves one side empty; change it")
    train, held = (PointSet(everything.points[part], numbers[part], classes) for part in (~out, out))
    return train, held


# ---------------------------------------------------------------------------------------------- items


def _name(i: int) -> str:
    """Of an item: its number, from which follows whether it is held out."""
    return f"item/{i:08d}"


def _again(dataset: Any, i: int, count: int, read: Callable[[Any, str], NDArray[Any]], first: NDArray[Any]) -> None:
    """Read three items of the data set a second time: a UserError where one has changed."""
    if i not in (0, count // 2, count - 1):
        return
    second = read(*_item(dataset, i)[:2])
    if first.shape != second.shape or not np.array_equal(first, second):
        raise UserError(
            f"item {i} of the data set is another one each time it is read, so a run could not go on exactly: hand in the data "
            "set without random transforms; image.flip and image.crop are for that"
        )


def _items(dataset: Any) -> Iterator[tuple[int, Any, str, int]]:
    """(i, image or point, words for it, label) of every item, in order."""
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
        yield i, *_item(dataset, i)


def _item(dataset: Any, i: int) -> tuple[Any, str, int]:
    """(image or point, words for it, label or -1) of the item i."""
    where = f"item {i} of the data set"
    try:
        item = dataset[i]
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{where} cannot be read: {type(error).__name__}: {reason}") from None
    parts = tuple(item) if isinstance(item, tuple | list) else (item,)
    if len(parts) not in (1, 2):
        raise UserError(f"{where} has {len(parts)} parts; give an image, or (image, label)")
    return parts[0], where, _label(parts[1], where) if len(parts) == 2 else -1


def _label(value: Any, where: str) -> int:
    if value is None:
        return -1
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise UserError(f"the label of {where} is {value!r}; give a whole number from 0, or None where it has none")
    return value


def _classes(dataset: Any, labels: list[int]) -> tuple[str, ...]:
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


def _array(value: Any, where: str) -> NDArray[Any]:
    """As NumPy has it; floats are float32."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray):
        raise UserError(f"{where} is a {type(value).__name__}; give a tensor, an array or a PIL image")
    return value.astype(np.float32) if value.dtype.kind == "f" else value


def _pixels(value: Any, where: str, channels: int) -> NDArray[Any]:
    """(H, W, C) uint8 or float32 of an image as it was handed in."""
    if isinstance(value, Image.Image):
        pixels = np.asarray(normalise(value, channels), dtype=np.uint8)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]
    pixels = _array(value, where)
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise UserError(f"{where} is of {pixels.dtype}; {RANGES}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise UserError(f"{where} has the shape {tuple(value.shape)}; {LAYOUTS}")
    first, last = pixels.shape[0] in (1, 3), pixels.shape[2] in (1, 3)
    if not first and not last:
        raise UserError(f"{where} has the shape {tuple(value.shape)}; {LAYOUTS}")
    if first and (not last or isinstance(value, Tensor)):  # the layout is what its kind usually has, where both are possible
        pixels = pixels.transpose(1, 2, 0)
    return np.ascontiguousarray(pixels)


def _to_uint8(pixels: NDArray[Any], *, signed: bool) -> Pixels:
    if pixels.dtype == np.uint8:
        return pixels
    scaled = (pixels + 1) * 127.5 if signed else pixels * 255
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _hash(found: Any, values: NDArray[Any], label: int) -> None:
    found.update(f"{values.dtype} {values.shape} {label}\0".encode())
    found.update(values.tobytes())
