"""The source `folder`: image files in class subfolders, or flat, or with a table of labels."""

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from ...config import UserError, config, resumable_field
from ...storage.archives import stem
from .. import formats
from ..folders import list_endings
from ..layout import Layout, find_layout
from ..names import join_names, printable
from ..scan import ScanConfig, scan
from ..tables import LabelTable, read_labels
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


@dataclass(kw_only=True)
class FolderImages(Images):
    paths: list[str]
    named_by_files = True

    def encoded(self, index: int) -> Path:
        return Path(self.paths[index])


def open_folder(spec: FolderSource) -> FolderImages:
    path, where = Path(spec.path).expanduser(), f"data folder {printable(spec.path)}"
    if not path.is_dir():
        raise UserError(f"{where} {_why_no_folder(path, spec.path)}")
    try:
        layout = find_layout(path, spec.split, where)
        images = [(parts, entry) for parts, entry in layout.images if _is_taken(layout, parts)]
        stamps = [(entry.stat().st_size, entry.stat().st_mtime_ns) for _, entry in images]
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error}") from None
    root, where_from = layout.folder.path, layout.named_from
    unread = [(os.path.relpath(file, where_from), formats.reason_for(file.suffix.lower())) for file in layout.unreadable]
    if not images:
        raise UserError(f"{where} {_why_no_images(path, unread, list_endings(layout.others))}")
    names = [os.path.relpath(entry.path, where_from) for _, entry in images]
    good, report = scan(names, stamps, lambda i: images[i][1].path, spec.scan, key=str(root.resolve()), where=where)
    report.skipped += unread
    names, images = [names[i] for i in good], [images[i] for i in good]
    classes = [parts[0] if len(parts) > 1 else None for parts, _ in images]
    hashed = [*names, *(str(stamps[i][0]) for i in good)]
    if spec.labels is not None:
        classes, table_remarks = read_labels(spec.labels, path, [os.path.relpath(entry.path, path) for _, entry in images])
        hashed += [name or "" for name in classes]
        report.remarks += odd_label_remarks((), tuple({name for name in classes if name is not None})) + table_remarks
    labels, class_names, merged = number_classes(classes)
    report.remarks = [f"{where}: {remark}" for remark in [*_left_aside(layout), *merged, *report.remarks]]
    return FolderImages(
        names=names,
        labels=labels,
        class_names=class_names,
        fingerprint=digest(*hashed),
        report=report,
        paths=[entry.path for _, entry in images],
        only_folder=root.name if root != path and spec.labels is None else None,
    )


def _is_taken(layout: Layout, parts: Sequence[str]) -> bool:
    """Whether an image, named by the folders on the way to it and its file name, is in the chosen split and no mask."""
    if layout.inner and layout.inner.get(parts[0]) not in parts[1:2]:
        return False
    return len(parts) < 3 or tuple(parts[:2]) not in layout.masks


def _why_no_folder(path: Path, given: str) -> str:
    if path.is_file() and stem(path.name) is not None:
        file = printable(shlex.quote(given))
        return f"is an archive: unpack it first, with python prepare_data.py unpack {file}"
    kind = "is a file, not a folder" if path.exists() else "does not exist"
    return f"{kind}; set data.path (held_out.path) to your folder of images"


def _why_no_images(path: Path, unread: Sequence[tuple[str, str]], others: str) -> str:
    if (path / "pixels.bin").exists() and (path / "manifest.json").exists():
        return "is a packed set: set data.source=packed"
    advice = "set data.source=datasets and data.name to it"
    sources = {
        f"was written by save_to_disk of datasets: {advice}": ("state.json", "dataset_dict.json"),
        f"holds parquet files: {advice}": ("*.parquet", "data/*.parquet"),
        "holds EMNIST's files: set data.source=emnist": ("emnist-*-ubyte*", "gzip/emnist-*-ubyte*"),
    }
    for words, patterns in sources.items():
        if any(any(path.glob(pattern)) for pattern in patterns):
            return words
    if unread:
        reasons = Counter(reason for _, reason in unread).most_common()
        return f"holds no images that can be read here: {', '.join(f'{count} {reason}' for reason, count in reasons)}"
    return "holds no images" + (f"; it has {others}" if others else f" ({', '.join(sorted(formats.endings()))})")


def _left_aside(layout: Layout) -> list[str]:
    with_images = {parts[0] for parts, _ in layout.images}
    lists = {
        "the folders {} beside the images are left aside": sorted(layout.passed),
        "the folders {} beside images of the same class are left aside": sorted("/".join(parts) for parts in layout.masks),
        "the folders {} hold no images": sorted({*layout.subfolders} - with_images) if with_images else [],
        "the links {} lead to folders that are here already and are left aside": layout.links,
    }
    remarks = [line.format(join_names(names, 10)) for line, names in lists.items() if names]
    if layout.others:
        remarks.append(f"other files are left aside: {list_endings(layout.others)}")
    return remarks + layout.notes
