"""The source `folder`: image files in class subfolders, or flat, or with a table of labels."""

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from ...config import UserError, config, resumable_field
from ...storage.archives import stem
from .. import formats
from ..folders import FolderTree, list_endings, walk
from ..layout import Layout, find_layout
from ..names import join_names, printable
from ..scan import ScanConfig, scan
from ..tables import LabelTable, read_labels
from ..transforms import decode
from .images import Images, digest, number_classes, odd_label_remarks


@config
class FolderSource:
    """A folder of images: class subfolders, or flat. `labels` is a table that says the classes instead of the folders.

    `split` is the subfolder to use where there are train/, test/ ...: its name, or train, val or test alone where that is
    clear; "." says that folders of such names are classes.
    """

    source: Literal["folder"]
    path: str = resumable_field()
    split: str | None = None
    labels: LabelTable | None = None
    subset: int | None = Field(None, gt=0)
    scan: ScanConfig = ScanConfig()


@dataclass
class FolderImages(Images):
    paths: list[str] = field(default_factory=list)
    named_by_files = True

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Image.Image:
        return decode(self.encoded(index), channels=channels, at_least=at_least)

    def encoded(self, index: int) -> Path:
        return Path(self.paths[index])


def open_folder(spec: FolderSource) -> FolderImages:
    path, where = Path(spec.path).expanduser(), f"data folder {printable(spec.path)}"
    if not path.is_dir():
        raise UserError(f"{where} {_why_no_folder(path, spec.path)}")
    try:
        layout = find_layout(path, spec.split, where)
        tree = walk(layout.root)
        keep = [i for i, parts in enumerate(tree.parts) if _is_taken(layout, parts)]
        stamps = [(state.st_size, state.st_mtime_ns) for state in (tree.files[i].stat() for i in keep)]
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error}") from None
    parts, paths = [tree.parts[i] for i in keep], [tree.files[i].path for i in keep]
    unreadable = [*layout.unreadable, *(layout.root.joinpath(*name) for name in tree.unreadable)]
    unread = [(os.path.relpath(file, layout.named_from), formats.reason_for(file.suffix.lower())) for file in unreadable]
    if not paths:
        raise UserError(f"{where} {_why_no_images(path, unread, list_endings(layout.others + tree.others))}")
    names = [os.path.relpath(file, layout.named_from) for file in paths]
    key = formats.with_plugins(str(layout.root.resolve()))
    good, report = scan(names, stamps, lambda i: paths[i], spec.scan, key=key, where=where)
    report.skipped += unread
    names, parts, paths = [names[i] for i in good], [parts[i] for i in good], [paths[i] for i in good]
    classes = [name[0] if len(name) > 1 else None for name in parts]
    hashed = [*names, *(str(stamps[i][0]) for i in good)]
    if spec.labels is not None:
        table = read_labels(spec.labels, path, [os.path.relpath(file, path) for file in paths])
        classes = table.classes
        hashed += ["" if name is None else name for name in classes]
        report.remarks += odd_label_remarks((), tuple({name for name in classes if name is not None})) + table.remarks
    labels, class_names, merged = number_classes(classes)
    report.remarks = [f"{where}: {remark}" for remark in [*_left_aside(layout, tree), *merged, *report.remarks]]
    return FolderImages(
        names=names,
        labels=labels,
        class_names=class_names,
        fingerprint=digest(*hashed),
        report=report,
        paths=paths,
        only_folder=layout.root.name if layout.root != path and spec.labels is None else None,
    )


def _is_taken(layout: Layout, parts: Sequence[str]) -> bool:
    """Whether an image, named by the folders on the way to it and its file name, is in the chosen split and no mask."""
    if layout.inner and layout.inner.get(parts[0]) not in parts[1:2]:
        return False
    return len(parts) < 3 or tuple(parts[:2]) not in layout.masks


def _why_no_folder(path: Path, given: str) -> str:
    """What a path is that is no folder, and what to do."""
    if path.is_file() and stem(path.name) is not None:
        file = printable(shlex.quote(given))
        return f"is an archive: unpack it first, with python prepare_data.py unpack {file}"
    kind = "is a file, not a folder" if path.exists() else "does not exist"
    return f"{kind}; set data.path (held_out.path) to your folder of images"


def _why_no_images(path: Path, unread: Sequence[tuple[str, str]], others: str) -> str:
    """What a folder holds that has no image file that can be read: another kind of source, or other files."""
    if (path / "pixels.bin").exists() and (path / "manifest.json").exists():
        return "is a packed set: set data.source=packed"
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return "was written by save_to_disk of datasets: set data.source=datasets and data.name to it"
    if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
        return "holds parquet files: set data.source=datasets and data.name to it"
    if any(path.glob("emnist-*-ubyte*")) or any(path.glob("gzip/emnist-*-ubyte*")):
        return "holds EMNIST's files: set data.source=emnist"
    if unread:
        reasons = Counter(reason for _, reason in unread).most_common()
        return f"holds no images that can be read here: {', '.join(f'{count} {reason}' for reason, count in reasons)}"
    return "holds no images" + (f"; it has {others}" if others else f" ({', '.join(sorted(formats.endings()))})")


def _left_aside(layout: Layout, tree: FolderTree) -> list[str]:
    """Remarks on what a folder holds besides the images that are taken."""
    remarks = []
    if layout.passed:
        remarks.append(f"the folders {join_names(sorted(layout.passed), 10)} beside the images are left aside")
    if layout.masks:
        masks = sorted("/".join(parts) for parts in layout.masks)
        remarks.append(f"the folders {join_names(masks, 10)} beside images of the same class are left aside")
    with_images = {name[0] for name in tree.parts}
    empty = sorted({name for name in tree.subfolders if name not in with_images})
    if empty and with_images:
        remarks.append(f"the folders {join_names(empty, 10)} hold no images")
    if tree.links:
        remarks.append(f"the links {join_names(tree.links, 10)} lead to folders that are here already and are left aside")
    if others := layout.others + tree.others:
        remarks.append(f"other files are left aside: {list_endings(others)}")
    return remarks + layout.notes
