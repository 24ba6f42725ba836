"""Where pictures come from: folders, `datasets`, digits, EMNIST, shapes, packed files; all read through one interface."""

import gzip
import hashlib
import io
import math
import os
import shlex
import string
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Discriminator, Field, Tag

from ..config import UserError, config, kind_of, read_json, resumable_field
from ..config.packages import needed
from ..storage.archives import stem
from ..storage.hub import hub_reason
from . import formats
from .layout import Found, Layout, find_layout, in_words, walk
from .names import by_ending, class_of, few, normal_form, ordered, shown, spelled
from .scan import Absent, ScanConfig, ScanReport, scan
from .tables import LabelTable, read_labels
from .transforms import ImageConfig, Pixels, decode, square

SHAPES = ("circle", "cross", "square", "triangle")

# ---------------------------------------------------------------------------------------------- configs


@config
class FolderSource:
    """A folder of pictures: class subfolders, or flat. `labels` is a table that says the classes instead of the folders.

    `split` is the subfolder to use where there are train/, test/ ...: its name, or train, val or test alone where that is
    clear; "." says that folders of such names are classes.
    """

    source: Literal["folder"]
    path: str = resumable_field()
    split: str | None = None
    labels: LabelTable | None = None
    subset: int | None = Field(None, gt=0)
    scan: ScanConfig = ScanConfig()


@config
class DatasetsSource:
    """A `datasets` data set: `name` on the hub, `imagefolder` (with `data_dir`), or a folder that save_to_disk wrote.

    `transpose` exchanges rows and columns: copies of EMNIST lie on their side as NIST's files do.
    """

    source: Literal["datasets"]
    name: str
    configuration: str | None = None
    data_dir: str | None = None
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = None
    transpose: bool = False
    subset: int | None = Field(None, gt=0)
    scan: ScanConfig = ScanConfig()


@config
class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels. `split` train and test are nine and one tenth of them."""

    source: Literal["digits"]
    split: Literal["all", "train", "test"] = "all"
    subset: int | None = Field(None, gt=0)


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


@config
class ShapesSource:
    """Drawn circles, crosses, squares and triangles in colours: `count` pictures of `size` pixels, for tests."""

    source: Literal["shapes"]
    count: int = Field(512, gt=0)
    size: int = Field(32, ge=8, le=512)
    split: Literal["train", "test"] = "train"
    subset: int | None = Field(None, gt=0)


@config
class PackedSource:
    """A folder that `prepare_data.py pack` wrote. `split` train or held_out as it was packed, or all."""

    source: Literal["packed"]
    path: str = resumable_field()
    split: Literal["all", "train", "held_out"] = "all"
    subset: int | None = Field(None, gt=0)


@config
class PythonSource:
    """A data set that is handed in from Python, as in train(cfg, run_dir, dataset=...): it cannot be opened from a config."""

    source: Literal["python"]
    subset: None = None


Source = FolderSource | DatasetsSource | DigitsSource | EmnistSource | ShapesSource | PackedSource | PythonSource
OneSource = Annotated[Source, Field(discriminator="source")]
Sources = Annotated[
    Annotated[OneSource, Tag("object")] | Annotated[tuple[OneSource, ...], Field(min_length=1), Tag("list")],
    Discriminator(kind_of),
]
HeldOut = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag("plain")]
    | Annotated[OneSource, Tag("object")]
    | Annotated[tuple[OneSource, ...], Field(min_length=1), Tag("list")],
    Discriminator(kind_of),
]

# ---------------------------------------------------------------------------------------------- pictures


@dataclass
class Images(ABC):
    """One opened source. `labels` are indices into `class_names`, -1 where a picture has no class."""

    names: list[str]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    fingerprint: str
    report: ScanReport = field(default_factory=ScanReport)

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Image.Image | Pixels:
        """The picture, mode L or RGB; a JPEG may come at a fraction of its size, but not below `at_least`."""

    def encoded(self, index: int) -> Path | bytes | None:
        """The image's file, or its bytes; None where it is pixels already."""
        return None

    @property
    def uniform(self) -> tuple[Pixels, NDArray[np.int64]] | None:
        """One array (M, H, W, C) in memory or in a mapped file, and where in it each picture stands, if all have one size."""
        return None

    @property
    def sides(self) -> NDArray[np.int64]:
        """(N, 2): the width and the height of each image, as the file has it; -1 where that is not known."""
        known = self.report.sides
        return known if len(known) == len(self) else np.full((len(self), 2), -1, np.int64)

    @property
    def times(self) -> NDArray[np.int64]:
        """(N,): when what each image is read from was modified, in nanoseconds; 0 where `fingerprint` tells each change."""
        return self.report.times if len(self.report.times) == len(self) else np.zeros(len(self), np.int64)

    @property
    def decoders(self) -> NDArray[np.int64]:
        """(N,): the first version of the decoder that makes of each image what today's does."""
        return self.report.decoders if len(self.report.decoders) == len(self) else np.ones(len(self), np.int64)

    def content(self, index: int) -> bytes:
        """What the image is decoded from, or, where there is no such thing, its pixels."""
        return np.ascontiguousarray(self.load(index, channels=3)).tobytes()


@dataclass
class FolderImages(Images):
    """`inside` is the folder that alone holds the images, where it is not the data folder itself."""

    paths: list[str] = field(default_factory=list)
    inside: str | None = None

    def content(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Image.Image:
        return decode(self.encoded(index), channels=channels, at_least=at_least)

    def encoded(self, index: int) -> Path:
        return Path(self.paths[index])


@dataclass
class DatasetsImages(Images):
    rows: Any = None
    indices: list[int] = field(default_factory=list)
    column: str = "image"
    transpose: bool = False

    def content(self, index: int) -> bytes:
        encoded = _encoded(self.rows[self.indices[index]][self.column])
        return encoded if isinstance(encoded, bytes) else encoded.read_bytes()

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Image.Image:
        image = decode(self.encoded(index), channels=channels, at_least=at_least)
        return image.transpose(Image.Transpose.TRANSPOSE) if self.transpose else image

    def encoded(self, index: int) -> Path | bytes:
        return _encoded(self.rows[self.indices[index]][self.column])


@dataclass
class ArrayImages(Images):
    """Pictures of one size in memory, (N, H, W, C)."""

    pixels: Pixels = field(default_factory=lambda: np.zeros((0, 1, 1, 1), np.uint8))

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Pixels:
        return self.pixels[index]

    def content(self, index: int) -> bytes:
        return self.pixels[index].tobytes()

    @property
    def sides(self) -> NDArray[np.int64]:
        return np.tile(np.array(self.pixels.shape[2:0:-1], np.int64), (len(self), 1))

    @property
    def uniform(self) -> tuple[Pixels, NDArray[np.int64]]:
        return self.pixels, np.arange(len(self.pixels))


@dataclass
class PackedImages(Images):
    """Pictures of any size in one mapped file; `records` (N, 3) are byte offset, height and width."""

    pixels: Pixels = field(default_factory=lambda: np.zeros(0, np.uint8))
    records: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    channels: int = 3
    packed: int = 0  # when the file of pixels was written, in nanoseconds
    place: str = ""

    @property
    def sides(self) -> NDArray[np.int64]:
        return self.records[:, 2:0:-1]

    @property
    def times(self) -> NDArray[np.int64]:
        return np.full(len(self), self.packed, np.int64)

    def content(self, index: int) -> bytes:
        return self.load(index, channels=self.channels).tobytes()

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Pixels:
        offset, height, width = self.records[index].tolist()
        size = height * width * self.channels
        return self.pixels[offset : offset + size].reshape(height, width, self.channels)

    @property
    def uniform(self) -> tuple[Pixels, NDArray[np.int64]] | None:
        if len(self.records) == 0 or (self.records[:, 1:] != self.records[0, 1:]).any():
            return None
        height, width = self.records[0, 1:].tolist()
        size = height * width * self.channels
        if (self.records[:, 0] % size).any() or len(self.pixels) % size:
            return None  # pictures of another size lie between
        return self.pixels.reshape(-1, height, width, self.channels), self.records[:, 0] // size


def _digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else bytes(part))
        found.update(b"\0")
    return found.hexdigest()


def _with_plugins(key: str) -> str:
    """Under which key a scan is remembered: with a plugin of Pillow, other files can be read."""
    plugins = formats.plugins_in_use()
    return f"{key}|{plugins}" if plugins else key


# ---------------------------------------------------------------------------------------------- folders


def _open_folder(spec: FolderSource) -> FolderImages:
    path, where = Path(spec.path).expanduser(), f"data folder {shown(spec.path)}"
    if not path.is_dir():
        kind = "is a file, not a folder" if path.exists() else "does not exist"
        if path.is_file() and stem(path.name) is not None:
            file = shown(shlex.quote(spec.path))
            raise UserError(f"{where} is an archive: unpack it first, with python prepare_data.py unpack {file}")
        raise UserError(f"{where} {kind}; set data.path (held_out.path) to your folder of pictures")
    try:
        layout = find_layout(path, spec.split, where)
        found = walk(layout.root)
        keep = [i for i, parts in enumerate(found.parts) if not layout.inner or layout.inner.get(parts[0]) in parts[1:2]]
        keep = [i for i in keep if found.parts[i][:2] not in layout.masks or len(found.parts[i]) < 3]
        stamps = [(state.st_size, state.st_mtime_ns) for state in (found.files[i].stat() for i in keep)]
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error}") from None
    parts, files = [found.parts[i] for i in keep], [found.files[i] for i in keep]
    unread = [*layout.foreign, *(layout.root.joinpath(*name) for name in found.foreign)]
    foreign = [(file, formats.reason_for(file.suffix.lower())) for file in unread]
    if not files:
        if (kind := _other_source(path)) is not None:
            raise UserError(f"{where} {kind}")
        there = ", ".join(f"{count} {reason}" for reason, count in Counter(reason for _, reason in foreign).most_common())
        others = in_words(layout.others + found.others)
        known = f" ({', '.join(sorted(formats.endings()))})"
        raise UserError(
            f"{where} holds no pictures"
            + (f" that can be read here: {there}" if there else f"; it has {others}" if others else known)
        )
    names = [os.path.relpath(entry.path, layout.named_from) for entry in files]
    key = _with_plugins(str(layout.root.resolve()))
    good, report = scan(names, stamps, lambda i: files[i].path, spec.scan, key=key, where=where)
    report.skipped += [(os.path.relpath(file, layout.named_from), reason) for file, reason in foreign]
    names, parts = [names[i] for i in good], [parts[i] for i in good]
    classes = [name[0] if len(name) > 1 else None for name in parts]
    digest = [*names, *(str(stamps[i][0]) for i in good)]
    if spec.labels is not None:
        told = read_labels(spec.labels, path, [os.path.relpath(files[i].path, path) for i in good])
        report.remarks += _odd_labels((), tuple({name for name in told.classes if name is not None}))
        classes, digest = told.classes, [*digest, *("" if name is None else name for name in told.classes)]
        report.remarks += told.remarks
    labels, class_names, merged = _numbered(classes)
    report.remarks = [f"{where}: {remark}" for remark in [*_left_aside(layout, found), *merged, *report.remarks]]
    return FolderImages(
        names=names,
        labels=labels,
        class_names=class_names,
        fingerprint=_digest(*digest),
        report=report,
        paths=[files[i].path for i in good],
        inside=layout.root.name if layout.root != path and spec.labels is None else None,
    )


def _other_source(path: Path) -> str | None:
    """What a folder without image files is, where another kind of source reads it."""
    if (path / "pixels.bin").exists() and (path / "manifest.json").exists():
        return "is a packed set: set data.source=packed"
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return "was written by save_to_disk of datasets: set data.source=datasets and data.name to it"
    if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
        return "holds parquet files: set data.source=datasets and data.name to it"
    if any(path.glob("emnist-*-ubyte*")) or any(path.glob("gzip/emnist-*-ubyte*")):
        return "holds EMNIST's files: set data.source=emnist"
    return None


def _left_aside(layout: Layout, found: Found) -> list[str]:
    """In words, what a folder holds besides the images that are taken."""
    said = []
    if layout.left:
        said.append(f"the folders {few(sorted(layout.left), 10)} beside the images are left aside")
    if layout.masks:
        below = sorted("/".join(parts) for parts in layout.masks)
        said.append(f"the folders {few(below, 10)} beside images of the same class are left aside")
    held = {name[0] for name in found.parts}
    empty = sorted({name for name in found.subfolders if name not in held})
    if empty and held:
        said.append(f"the folders {few(empty, 10)} hold no images")
    if found.links:
        said.append(f"the links {few(found.links, 10)} lead to folders that are here already and are left aside")
    if others := layout.others + found.others:
        said.append(f"other files are left aside: {in_words(others)}")
    return said + layout.notes


def _numbered(classes: Sequence[str | None]) -> tuple[NDArray[np.int64], tuple[str, ...], list[str]]:
    """The labels of images with these classes, the classes in their order, and which were written in two forms."""
    spellings = sorted({name for name in classes if name is not None})
    class_names = ordered(spellings)
    number = {normal_form(name): i for i, name in enumerate(class_names)}
    known = {name: number[normal_form(name)] for name in spellings}
    labels = np.array([-1 if name is None else known[name] for name in classes], dtype=np.int64)
    twice = [name for name in spellings if name not in class_names]
    merged = [f"{shown(name)!r} is there in two spellings that look the same; they are one class" for name in twice]
    return labels, class_names, merged


def _odd_labels(values: Sequence[Any], class_names: Sequence[str]) -> list[str]:
    """What to know of labels that may mean something else than a class."""
    found = []
    if "-1" in class_names and set(class_names) - {"-1", "1"}:
        found.append("the label -1 is read as a class; where it means that there is none, leave it empty")
    if any(isinstance(value, list | dict) for value in values):
        found.append("the labels are lists or tables, and each different one is a class of its own")
    return found


# ---------------------------------------------------------------------------------------------- datasets


def _encoded(cell: Any) -> bytes | Path:
    """The bytes of an image, or where they are; an Absent says why there are none."""
    content, path = (cell.get("bytes"), cell.get("path")) if cell is not None else (None, None)
    if content is not None:
        if not len(content):
            raise Absent("empty file")
        return content
    if not path:
        raise Absent("no image in this row")
    return Path(path)


def _bytes_of(cell: Any) -> int | None:
    """How large an image is, or None where it cannot be had: then the scan says why."""
    try:
        encoded = _encoded(cell)
        return len(encoded) if isinstance(encoded, bytes) else encoded.stat().st_size
    except Absent:
        return 0 if cell is not None and cell.get("bytes") is not None else None
    except OSError:
        return None


def _open_datasets(spec: DatasetsSource) -> DatasetsImages:
    where = f"data set {spec.name!r}"
    with needed(where, "datasets"):
        import datasets
    try:
        if (Path(spec.name).expanduser().is_dir() and (Path(spec.name).expanduser() / "state.json").exists()) or (
            Path(spec.name).expanduser() / "dataset_dict.json"
        ).exists():
            rows = datasets.load_from_disk(str(Path(spec.name).expanduser()))
            if isinstance(rows, datasets.DatasetDict):
                split = spelled(map(str, rows), spec.split)
                if split is None:
                    raise UserError(f"{where} has no split {spec.split!r}; it has: {', '.join(map(str, rows))}")
                rows = rows[split]
            elif rows.split is not None and spelled([str(rows.split)], spec.split) is None:
                raise UserError(f"{where} is the split {str(rows.split)!r} alone, and {spec.split!r} is asked for")
        else:
            rows = datasets.load_dataset(spec.name, spec.configuration, data_dir=spec.data_dir, split=spec.split)
    except UserError:
        raise
    except Exception as error:
        reason = "it has no rows" if isinstance(error, IndexError) else hub_reason(spec.name, error, "dataset")
        raise UserError(f"{where} cannot be loaded: {reason}; for a folder: --set data.source=folder") from None
    assert isinstance(rows, datasets.Dataset)
    features = rows.features
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image_column = spelled(pictures, spec.image_column)
    if image_column is None:
        raise UserError(f"{where} has no image column {spec.image_column!r}; it has: {', '.join(pictures) or 'none'}")
    others = [name for name in features if name not in pictures]
    labels, class_names, remarks = np.full(len(rows), -1, dtype=np.int64), (), list[str]()
    if spec.label_column is not None:
        label_column = spelled(others, spec.label_column)
        if label_column is None:
            raise UserError(f"{where} has no label column {spec.label_column!r}; it has: {', '.join(others) or 'none'}")
        values = rows[label_column][:]
        feature = features[label_column]
        if isinstance(feature, datasets.ClassLabel):
            class_names = tuple(feature.names)
            labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
        else:
            labels, class_names, remarks = _numbered([class_of(value) for value in values])
            remarks += _odd_labels(values, class_names)
    rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    names = [f"{spec.split}/{i:08d}" for i in range(len(rows))]
    fingerprint = rows._fingerprint

    def source(i: int) -> Any:
        encoded = _encoded(rows[i][image_column])
        return io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded

    stamps = [(1, 0)] * len(rows)
    if spec.scan.min_file_bytes:
        sizes = (_bytes_of(row[image_column]) for row in rows)  # pyright: ignore[reportArgumentType, reportCallIssue]
        stamps = [(spec.scan.min_file_bytes if size is None else size, 0) for size in sizes]
    files = [Path(entry["filename"]) for entry in rows.cache_files]
    changed = max((path.stat().st_mtime_ns for path in files if path.exists()), default=0)
    stamps = [(size, changed) for size, _ in stamps]
    key = _with_plugins(f"datasets|{fingerprint}|{spec.split}")
    good, report = scan(names, stamps, source, spec.scan, key=key, where=where)
    turned = ["transposed"] if spec.transpose else []
    without = int((labels[good] < 0).sum())
    if class_names and without:
        remarks.append(f"{without} images have no label in {spec.label_column!r} and are left without a class")
    report.remarks = [f"{where}: {remark}" for remark in remarks]
    return DatasetsImages(
        names=[names[i] for i in good],
        labels=labels[good],
        class_names=class_names,
        fingerprint=_digest(spec.name, fingerprint, np.array(good, dtype=np.int64).tobytes(), *turned),
        report=report,
        rows=rows,
        indices=good,
        column=image_column,
        transpose=spec.transpose,
    )


# ---------------------------------------------------------------------------------------------- EMNIST

_CAPITALS = string.digits + string.ascii_uppercase
EMNIST_CLASSES = {
    "letters": string.ascii_uppercase,
    "digits": string.digits,
    "mnist": string.digits,
    "byclass": _CAPITALS + string.ascii_lowercase,
    "bymerge": _CAPITALS + "abdefghnqrt",
    "balanced": _CAPITALS + "abdefghnqrt",
}


def _read_idx(folders: Sequence[Path], name: str, axes: int) -> tuple[bytes, Pixels]:
    """The bytes of an idx file and what they hold: uint8 of so many axes.

    Two zeros, the type (8 is unsigned bytes), the number of axes, each length in four bytes, big-endian; then the values.
    """
    found = [path for folder in folders for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not found:
        raise UserError(
            f"{folders[0]} has no {name}, plain or .gz; it is in gzip.zip on the EMNIST page of NIST: unpack that there, "
            "or set data.path (held_out.path) to where it is"
        )
    path = found[0]
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
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


def _open_emnist(spec: EmnistSource) -> ArrayImages:
    root = Path(spec.path).expanduser()
    folders = [root, root / "gzip"]  # as the zip unpacks
    stem = f"emnist-{spec.split}-{spec.part}"
    picture_bytes, pictures = _read_idx(folders, f"{stem}-images-idx3-ubyte", 3)
    label_bytes, labels = _read_idx(folders, f"{stem}-labels-idx1-ubyte", 1)
    if len(pictures) != len(labels):
        raise UserError(f"{root}: {stem} has {len(pictures)} pictures and {len(labels)} labels; download both again")
    classes = EMNIST_CLASSES[spec.split]
    first = 1 if spec.split == "letters" else 0  # the letters alone are counted from 1
    if len(labels) and not first <= labels.min() <= labels.max() < first + len(classes):
        raise UserError(
            f"{root}: the labels of {stem} run from {labels.min()} to {labels.max()}, those of EMNIST from {first} to "
            f"{first + len(classes) - 1}; download it again"
        )
    return ArrayImages(
        names=[f"emnist/{spec.split}/{spec.part}/{i:06d}" for i in range(len(labels))],
        labels=labels.astype(np.int64) - first,
        class_names=tuple(classes),
        fingerprint=_digest(picture_bytes, label_bytes),
        pixels=np.ascontiguousarray(pictures.transpose(0, 2, 1))[..., None],  # the files have columns where others have rows
    )


# ---------------------------------------------------------------------------------------------- digits, shapes, packed


def _fraction(name: str) -> float:
    """A number in [0, 1) that is a function of the name alone: what decides who is held out, for ever."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2.0**64


def _open_digits(spec: DigitsSource) -> ArrayImages:
    with needed("data.source digits", "sklearn"):
        from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.rint(digits.images / 16 * 255).astype(np.uint8)[..., None]
    names = [f"digits/{i:04d}" for i in range(len(pixels))]
    keep = [i for i, name in enumerate(names) if spec.split == "all" or (spec.split == "test") == (_fraction(name) < 0.1)]
    return ArrayImages(
        names=[names[i] for i in keep],
        labels=digits.target[keep].astype(np.int64),
        class_names=tuple("0123456789"),
        fingerprint=_digest(pixels[keep].tobytes()),
        pixels=pixels[keep],
    )


def draw_shape(kind: str, size: int, rng: np.random.Generator) -> Pixels:
    """One shape in a colour on a pale ground, (size, size, 3)."""
    scale = 4  # drawn large and reduced, for smooth edges
    pale, strong = rng.integers(200, 256, 3), rng.integers(0, 170, 3)
    image = Image.new("RGB", (size * scale, size * scale), tuple(map(int, pale)))
    draw = ImageDraw.Draw(image)
    radius = rng.uniform(0.22, 0.38) * size * scale
    x, y = rng.uniform(radius, size * scale - radius, 2)
    colour = tuple(map(int, strong))
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif kind == "square":
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif kind == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    else:
        draw.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=colour)
        draw.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill=colour)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _open_shapes(spec: ShapesSource) -> ArrayImages:
    split = 0 if spec.split == "train" else 1
    pixels = [draw_shape(SHAPES[i % len(SHAPES)], spec.size, np.random.default_rng([split, i])) for i in range(spec.count)]
    return ArrayImages(
        names=[f"shapes/{spec.split}/{i:06d}" for i in range(spec.count)],
        labels=np.arange(spec.count, dtype=np.int64) % len(SHAPES),
        class_names=SHAPES,
        fingerprint=_digest("shapes", spec.split, str(spec.size), str(spec.count)),
        pixels=np.stack(pixels),
    )


def _open_packed(spec: PackedSource) -> PackedImages:

    return open_packed(Path(spec.path), spec.split)


def _open_python(spec: PythonSource) -> Images:
    raise UserError(
        "the data set was handed in from Python, so no config can open it: train on with train(cfg, run_dir, dataset=...) from "
        "Python, or set data to a source on disk"
    )


OPENERS: dict[type, Any] = {
    FolderSource: _open_folder,
    DatasetsSource: _open_datasets,
    DigitsSource: _open_digits,
    EmnistSource: _open_emnist,
    ShapesSource: _open_shapes,
    PackedSource: _open_packed,
    PythonSource: _open_python,
}

# ---------------------------------------------------------------------------------------------- one set of pictures


class ImageSet:
    """Pictures of one or several sources, selected and in a fixed order: what training reads.

    `labels` (N,) are indices into `class_names`, -1 for none; `names` are relative paths.
    """

    def __init__(self, parts: Sequence[Images], chosen: Sequence[NDArray[np.int64]]) -> None:
        self.parts = list(parts)
        self.which = np.concatenate([np.full(len(c), i, dtype=np.int32) for i, c in enumerate(chosen)])
        self.index = np.concatenate([np.asarray(c, dtype=np.int64) for c in chosen])
        self.class_names = ordered(name for part in parts for name in part.class_names)
        number = {normal_form(name): i for i, name in enumerate(self.class_names)}
        labels = []
        for part, c in zip(parts, chosen, strict=True):
            own = np.array([*(number[normal_form(name)] for name in part.class_names), -1], dtype=np.int64)  # [-1] is no class
            labels.append(own[part.labels[c]])
        self.labels = np.concatenate(labels)
        self._ready: tuple[Pixels, NDArray[np.int64]] | None = None
        self._light = False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def names(self) -> list[str]:
        return [self.parts[w].names[i] for w, i in zip(self.which.tolist(), self.index.tolist(), strict=True)]

    @property
    def fingerprint(self) -> str:
        """The hash of what is in the set and in which order."""
        return _digest(*(part.fingerprint for part in self.parts), self.which.tobytes(), self.index.tobytes())

    def _each(self, values: Callable[[Images], NDArray[np.int64]]) -> NDArray[np.int64]:
        """A value of each source's images -> those of the images of this set, in its order."""
        found = [values(part) for part in self.parts]
        together = np.zeros((len(self), *found[0].shape[1:]), np.int64)
        for which, value in enumerate(found):
            mine = self.which == which
            together[mine] = value[self.index[mine]]
        return together

    @property
    def sides(self) -> NDArray[np.int64]:
        """(N, 2): the width and the height of each image, as its file has it; -1 where that is not known."""
        return self._each(lambda part: part.sides)

    @property
    def times(self) -> NDArray[np.int64]:
        """(N,): when what each image is read from was modified, in nanoseconds; 0 where the fingerprint tells each change."""
        return self._each(lambda part: part.times)

    @property
    def decoders(self) -> NDArray[np.int64]:
        """(N,): the first version of the decoder that makes of each image what today's does."""
        return self._each(lambda part: part.decoders)

    @property
    def decoder(self) -> int:
        """That of the whole set."""
        return int(self.decoders.max(initial=1))

    @property
    def state(self) -> str:
        """A hash of what may change while `fingerprint` does not: the times of the files, and what decodes them. It says
        whether a cache on this machine is of these files as they are now. What travels, or is compared when a run goes on,
        must not hold it: a bucket or an archive gives a file another time."""
        return _digest(self.times.tobytes(), str(self.decoder))

    def contents(self, indices: Sequence[int]) -> str:
        """The hash of what these images are decoded from. One that cannot be read any more counts as empty."""

        def one(i: int) -> bytes:
            try:
                content = self.parts[self.which[i]].content(int(self.index[i]))
            except (OSError, ValueError):
                content = b""
            return hashlib.sha256(content).digest()

        with ThreadPoolExecutor(8) as pool:
            return hashlib.sha256(b"".join(pool.map(one, indices))).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Pictures by class."""
        counts = {name: int((self.labels == i).sum()) for i, name in enumerate(self.class_names)}
        unlabelled, none = int((self.labels < 0).sum()), "(no class)"
        while none in counts:  # as the name of a class, too
            none = f"({none})"
        return counts | ({none: unlabelled} if unlabelled else {})

    @property
    def endings(self) -> dict[str, int]:
        """How many images of folders have which ending: another version of the project may read other ones."""
        return by_ending(
            self.parts[w].names[i]
            for w, i in zip(self.which.tolist(), self.index.tolist(), strict=True)
            if isinstance(self.parts[w], FolderImages)
        )

    def sequences(self) -> dict[str, int]:
        """{what they are: how many} of files that hold more than the one image that is taken. Opens every file."""

        def look(which: int, index: int) -> str | None:
            file = self.parts[which].encoded(index)
            return formats.sequence_of(io.BytesIO(file) if isinstance(file, bytes) else file) if file is not None else None

        with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
            found = Counter(kind for kind in pool.map(look, self.which.tolist(), self.index.tolist()) if kind is not None)
        return dict(found.most_common())

    def prepare(self, spec: ImageConfig) -> None:
        """Make the batch of small sets in memory, or of a packed file of the right size, one indexed copy."""
        uniform = self.parts[0].uniform if len(self.parts) == 1 else None
        if uniform is not None and uniform[0].shape[1:] == (spec.size, spec.size, spec.channels):
            self._ready = uniform
        elif uniform is not None and isinstance(self.parts[0], ArrayImages):
            plain = ImageConfig(size=spec.size, channels=spec.channels)
            self._ready = np.stack([square(picture, plain, np.full(3, 0.5)) for picture in uniform[0]]), uniform[1]
        cut_alone = [
            isinstance(part, PackedImages) and bool((part.records[:, 1:].min(axis=1) == spec.size).all()) for part in self.parts
        ]
        self._light = self._ready is not None or all(cut_alone)

    @property
    def ready(self) -> bool:
        """Whether, once prepared, a batch is nothing but copies, so that loader workers would only cost."""
        return self._light

    def batch(self, indices: NDArray[np.int64], spec: ImageConfig, u: NDArray[np.float64]) -> Pixels:
        """(B, size, size, channels) uint8 of the pictures `indices` (B,), cut and flipped by `u` (B, 3)."""
        if self._ready is not None:
            everything, where = self._ready
            pixels = everything[where[self.index[indices]]]
            if spec.flip:
                mirrored = u[:, 2] < 0.5
                pixels[mirrored] = pixels[mirrored, :, ::-1]
            return pixels
        return np.stack([self._one(int(i), spec, row) for i, row in zip(indices, u, strict=True)])

    def _one(self, i: int, spec: ImageConfig, u: NDArray[np.float64]) -> Pixels:
        """A picture that broke after the scan is replaced by the next of its class, and said."""
        j = i
        for attempt in range(1, 21):
            part = self.parts[self.which[j]]
            try:
                return square(part.load(int(self.index[j]), channels=spec.channels, at_least=spec.size), spec, u)
            except Exception as error:
                name = part.names[int(self.index[j])]
                print(f"warning: {name!r} can no longer be read ({error}); the next one takes its place", flush=True)
                fellows = np.flatnonzero(self.labels == self.labels[i])
                j = int(fellows[(int(np.searchsorted(fellows, i)) + attempt) % len(fellows)])
        raise UserError(f"twenty pictures in a row, from {self.names[i]!r} on, can no longer be read; is the disk gone?")

    def lowest(self, count: int) -> "ImageSet":
        """The `count` pictures whose names hash lowest, or all where there are no more."""
        keep = np.zeros(len(self), dtype=np.bool_)
        keep[_lowest(self.names, count)] = True
        return _relabel(self.only(keep), self.class_names)

    def rename_classes(self, class_names: Sequence[str]) -> None:
        """Give the labels the numbers of their classes in `class_names`, among which all of them are."""
        _relabel(self, tuple(class_names))

    def only(self, keep: NDArray[np.bool_]) -> "ImageSet":
        chosen = [self.index[(self.which == w) & keep] for w in range(len(self.parts))]
        return ImageSet(self.parts, chosen)


def _lowest(names: Sequence[str], count: int) -> NDArray[np.int64]:
    """Which of the names hash lowest, in their order: by another hash than that of who is held out, or all of them were."""
    return np.array(sorted(sorted(range(len(names)), key=lambda i: (_fraction(f"subset of {names[i]}"), i))[:count]))


def _as_list(sources: Any) -> list[Source]:
    return list(sources) if isinstance(sources, tuple | list) else [sources]


def open_sources(sources: Source | Sequence[Source], *, among: Sequence[str] = ()) -> ImageSet:
    """Open one or several sources as one set; `subset` keeps the pictures whose names hash lowest. A folder in which one of the
    classes `among` alone holds images is of that class."""
    parts, chosen = [], []
    for spec in _as_list(sources):
        part: Images = OPENERS[type(spec)](spec)
        if isinstance(part, FolderImages) and part.inside is not None and not part.class_names:
            name = spelled(among, part.inside)
            if name is not None:
                part.class_names, part.labels = (name,), np.zeros_like(part.labels)
        keep = np.arange(len(part))
        if spec.subset is not None and spec.subset < len(part):
            keep = _lowest(part.names, spec.subset)
        parts.append(part)
        chosen.append(keep)
    found = ImageSet(parts, chosen)
    if len(found) == 0:
        raise UserError("the data has no pictures")
    return found


def open_data(
    data: Source | Sequence[Source] | ImageSet, held_out: float | Source | Sequence[Source]
) -> tuple[ImageSet, ImageSet | None]:
    """The training pictures, and those held out: a fraction by hash of the relative path, or sources of their own."""
    everything = data if isinstance(data, ImageSet) else open_sources(data)
    if not isinstance(held_out, float | int):
        held = open_sources(held_out, among=everything.class_names)
        known = {normal_form(name) for name in everything.class_names}
        unknown = [name for name in held.class_names if normal_form(name) not in known]
        if unknown:
            raise UserError(f"held_out has classes that data lacks: {few(unknown)}")
        return everything, _relabel(held, everything.class_names)
    if held_out == 0:
        return everything, None
    out = np.array([_fraction(name) < held_out for name in everything.names])
    if out.all() or not out.any():
        raise UserError(f"held_out {held_out:g} of {len(everything)} pictures leaves one side empty; change it")
    return everything.only(~out), everything.only(out)


def _relabel(pictures: ImageSet, class_names: tuple[str, ...]) -> ImageSet:
    place = {normal_form(name): i for i, name in enumerate(class_names)}
    number = np.array([*(place[normal_form(name)] for name in pictures.class_names), -1], dtype=np.int64)
    pictures.labels, pictures.class_names = number[pictures.labels], class_names
    return pictures


def open_packed(path: Path, split: str) -> PackedImages:
    """Map a packed folder. `split` is train, held_out or all."""
    path = path.expanduser()
    if not (path / "manifest.json").exists():
        raise UserError(f"{path} is not a packed data set (no manifest.json); make one with prepare_data.py pack")
    manifest = read_json(path / "manifest.json")
    if manifest.get("version") != PACK_VERSION:
        raise UserError(f"{path} was packed by another version; pack it again")
    if not (path / "pixels.bin").exists() or (path / "pixels.bin").stat().st_size != manifest["bytes"]:
        raise UserError(f"{path}/pixels.bin is missing or cut; pack it again")
    table = np.load(path / "records.npy")
    keep = np.ones(len(table), dtype=bool) if split == "all" else (table[:, 4] == (split == "held_out"))
    names = [name for name, kept in zip(manifest["names"], keep, strict=True) if kept]
    return PackedImages(
        names=names,
        labels=table[keep, 3],
        class_names=tuple(manifest["class_names"]),
        fingerprint=_digest("packed", manifest["fingerprint"], str(manifest["size"]), table[keep].tobytes()),
        pixels=np.memmap(path / "pixels.bin", dtype=np.uint8, mode="r"),
        records=table[keep, :3],
        channels=manifest["channels"],
        packed=(path / "pixels.bin").stat().st_mtime_ns,
        place=str(path),
    )


PACK_VERSION = 1
