"""The source `datasets`: data sets of the library datasets, from the hub, from image folders or from its own files."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ...config import UserError, config
from ...config.packages import needed
from ...storage.downloads import hub_reason
from ..names import class_of, find_spelling
from ..scan import Absent, ScanConfig, scan
from .images import Images, digest, number_classes, odd_label_remarks


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


@dataclass(kw_only=True)
class DatasetsImages(Images):
    rows: Any
    indices: list[int]
    column: str
    transpose: bool

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Any:
        from PIL import Image

        image: Any = super().load(index, channels=channels, at_least=at_least)
        return image.transpose(Image.Transpose.TRANSPOSE) if self.transpose else image

    def encoded(self, index: int) -> Path | bytes:
        return _encoded(self.rows[self.indices[index]][self.column])


def _encoded(cell: Any) -> bytes | Path:
    """The bytes of an image, or where they are; an Absent says that there is neither."""
    cell = cell or {}
    if cell.get("bytes") is not None:
        return cell["bytes"]
    if not cell.get("path"):
        raise Absent("no image in this row")
    return Path(cell["path"])


def open_datasets(spec: DatasetsSource) -> DatasetsImages:
    where = f"data set {spec.name!r}"
    with needed(where, "datasets"):
        import datasets

    rows = _load_rows(spec, where)
    image_columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    image_column = _find_name(spec.image_column, image_columns, "image column", where)
    labels, class_names, remarks = np.full(len(rows), -1, dtype=np.int64), (), list[str]()
    if spec.label_column is not None:
        other_columns = [name for name in rows.features if name not in image_columns]
        label_column = _find_name(spec.label_column, other_columns, "label column", where)
        values, feature = rows[label_column][:], rows.features[label_column]
        if isinstance(feature, datasets.ClassLabel):
            labels, class_names = np.array([-1 if value is None else value for value in values], np.int64), tuple(feature.names)
        else:
            labels, class_names, remarks = number_classes([class_of(value) for value in values])
            remarks += odd_label_remarks(values, class_names)
    rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    def open_row(i: int) -> Any:
        encoded = _encoded(rows[i][image_column])
        if encoded == b"":
            raise Absent("empty file")
        return io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded

    def size_in_bytes(cell: Any) -> int:
        try:
            encoded = _encoded(cell)
            return len(encoded) if isinstance(encoded, bytes) else encoded.stat().st_size
        except (Absent, OSError):  # the scan says why
            return spec.scan.min_file_bytes

    sizes = [size_in_bytes(row[image_column]) for row in rows] if spec.scan.min_file_bytes else [1] * len(rows)
    files = [Path(entry["filename"]) for entry in rows.cache_files]
    changed = max((path.stat().st_mtime_ns for path in files if path.exists()), default=0)
    names = [f"{spec.split}/{i:08d}" for i in range(len(rows))]
    key = f"datasets|{rows._fingerprint}|{spec.split}"
    good, report = scan(names, [(size, changed) for size in sizes], open_row, spec.scan, key=key, where=where)
    without = int((labels[good] < 0).sum())
    if class_names and without:
        remarks.append(f"{without} images have no label in {spec.label_column!r} and are left without a class")
    report.remarks = [f"{where}: {remark}" for remark in remarks]
    transposed = ["transposed"] if spec.transpose else []
    if spec.transpose:
        report.measures[:, :2] = report.measures[:, 1::-1]
    return DatasetsImages(
        names=[names[i] for i in good],
        labels=labels[good],
        class_names=class_names,
        fingerprint=digest(spec.name, rows._fingerprint, np.array(good, dtype=np.int64).tobytes(), *transposed),
        report=report,
        rows=rows,
        indices=good,
        column=image_column,
        transpose=spec.transpose,
    )


def _load_rows(spec: DatasetsSource, where: str) -> Any:
    import datasets

    folder = Path(spec.name).expanduser()
    try:
        if not (folder / "state.json").exists() and not (folder / "dataset_dict.json").exists():
            return datasets.load_dataset(spec.name, spec.configuration, data_dir=spec.data_dir, split=spec.split)
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        reason = "it has no rows" if isinstance(error, IndexError) else hub_reason(spec.name, error, "dataset")
        raise UserError(f"{where} cannot be loaded: {reason}; for a folder: --set data.source=folder") from None
    if isinstance(saved, Mapping):
        return saved[_find_name(spec.split, list(map(str, saved)), "split", where)]
    if saved.split is not None and find_spelling([str(saved.split)], spec.split) is None:
        raise UserError(f"{where} is the split {str(saved.split)!r} alone, and {spec.split!r} is asked for")
    return saved


def _find_name(wanted: str, names: Sequence[str], kind: str, where: str) -> str:
    name = find_spelling(names, wanted)
    if name is None:
        raise UserError(f"{where} has no {kind} {wanted!r}; it has: {', '.join(names) or 'none'}")
    return name
