"""Labels of images from a table beside them: CSV, tab-separated, or columns of white space as CelebA has them."""

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..config import UserError, config, resumable_field
from .names import class_of, join_names, normal_form, printable

Number = Annotated[int, Field(ge=0)]
_HEAD_CHARACTERS = 1 << 16  # characters of a table that decide what parts its columns
_DELIMITERS = {"comma": ",", "tab": "\t", "semicolon": ";"}


@config
class LabelTable:
    """A table that names the class of each image, in place of class folders. `file` is found from here or in data.path.

    Columns go by the names in the table's first line, or, in a table without such a line, by their numbers from 0. Without
    `image_column` it is the column whose cells name the most images: by their paths, file names, or file names without an
    ending. A column of -1 and 1, such as CelebA's attributes, makes the classes NAME and `not NAME`.
    """

    file: str = resumable_field()
    label_column: str | Number
    image_column: str | Number | None = None
    delimiter: Literal["comma", "tab", "semicolon", "space"] | None = None


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.labels.file {path} cannot be read: {error.strerror}") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", "replace")
    if b"\0" in content[:_HEAD_CHARACTERS]:
        kind = "an Excel file or another archive" if content[:2] == b"PK" else "no text"
        raise UserError(f"data.labels.file {path} is {kind}, not a table of text; save it as CSV (UTF-8)")
    return content.decode("utf-8-sig", "surrogateescape")  # as file names are read


def _table(text: str, delimiter: str) -> list[list[str]]:
    """The rows of a table with its header. CelebA's first line, the number of rows, is left out, and its header, which does not
    name the first column, gets a name for it."""
    if delimiter == "space":
        rows = [line.split() for line in text.splitlines()]
    else:
        quoting = csv.QUOTE_NONE if delimiter == "tab" else csv.QUOTE_MINIMAL  # a tab in a title is rare, a quote is not
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[delimiter], quoting=quoting)
        rows = [[cell.strip() for cell in row] for row in reader]
    rows = [row for row in rows if any(row)]
    if rows and rows[0][0].lower().startswith("sep="):  # a line that Excel reads
        rows = rows[1:]
    if rows and len(rows[0]) == 1 and rows[0][0].isdecimal() and len(rows) > 1 and len(rows[1]) > 1:
        rows = rows[1:]
    if delimiter in ("space", "tab") and len(rows) > 1 and len(rows[1]) == len(rows[0]) + 1:
        rows[0] = ["image", *rows[0]]
    return rows


def _column_index(column: str | int, header: Sequence[str]) -> int | None:
    """The number of a column that is given by its name or number, or None where the table has no such column."""
    if isinstance(column, int):
        return column if column < len(header) else None
    return next((i for i, name in enumerate(header) if normal_form(name) == normal_form(column)), None)


def _parse(spec: LabelTable, text: str, path: Path) -> tuple[list[list[str]], int | None, int]:
    """The rows, without a header, and the numbers of the columns of images (None where none is given) and of labels."""
    wanted = [column for column in (spec.image_column, spec.label_column) if column is not None]
    best: list[str] = []  # the header of the delimiter that parts most columns
    head = text if len(text) < _HEAD_CHARACTERS else text[: text.find("\n", _HEAD_CHARACTERS)]
    try:
        for delimiter in [spec.delimiter] if spec.delimiter is not None else [*_DELIMITERS, "space"]:
            header = next(iter(_table(head, delimiter)), [])
            numbers = [number for column in wanted if (number := _column_index(column, header)) is not None]
            if len(numbers) == len(wanted) and (len(header) > 1 or spec.delimiter is not None):
                has_header = any(isinstance(column, str) for column in wanted)
                rows = _table(text, delimiter)[1 if has_header else 0 :]
                return rows, numbers[0] if len(wanted) > 1 else None, numbers[-1]
            if len(header) > len(best) and (delimiter != "space" or len(best) < 2):
                best = header
    except csv.Error as error:
        raise UserError(f"data.labels.file {path} is no table: {error}") from None
    if not best:
        raise UserError(f"data.labels.file {path} is empty")
    missing = next((column for column in wanted if _column_index(column, best) is None), None)
    if missing is None:
        raise UserError(f"data.labels.file {path} has one column alone, {join_names(best)}: one has to name the images")
    key = "label_column" if missing == spec.label_column else "image_column"
    raise UserError(f"data.labels.{key}: {path} has no column {missing!r}; it has: {join_names(best, 60)}")


def _paths_meant(cell: str) -> list[str]:
    """How a cell may name an image: its path, and the ends of its path down to the file name."""
    parts = [part for part in normal_form(cell.replace("\\", "/")).split("/") if part not in ("", ".")]
    paths = ["/".join(parts[i:]) for i in range(len(parts))]
    return [*paths, parts[-1].partition("?")[0]] if "://" in cell and "?" in parts[-1] else paths


def _index_by_path(names: Sequence[str]) -> Mapping[str, int]:
    """{each path that may name an image, also without the ending of its file: its number}, -1 where that names several."""
    by_path: dict[str, int] = {}
    by_stem: dict[str, int] = {}
    for i, name in enumerate(names):
        for path in _paths_meant(name):
            for numbers, key in ((by_path, path), (by_stem, re.sub(r"(?<=[^/])\.[^/.]*$", "", path))):
                numbers[key] = i if numbers.setdefault(key, i) == i else -1
    return {**by_stem, **by_path}  # a whole file name goes before one without its ending


def _image_of(cell: str, known: Mapping[str, int]) -> int | None:
    """The number of the image that a cell names, -1 where it may be several, None where there is none."""
    return next((known[path] for path in _paths_meant(cell) if path in known), None)


def _find_image_column(rows: Sequence[Sequence[str]], label: int, known: Mapping[str, int]) -> int:
    """The column whose cells name the most images: the first one, but for an index or a label that stands before it."""
    some = rows[:: max(1, len(rows) // 500)]
    columns = [column for column in range(max(map(len, some), default=1)) if column != label] or [label]

    def count_images(column: int) -> int:
        return sum(len(row) > column and _image_of(row[column], known) is not None for row in some)

    return max(columns, key=count_images)


def read_labels(spec: LabelTable, folder: Path, names: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """The classes of the images `names`, paths in `folder`, and remarks for the person. UserErrors name a file or a column that
    is missing, and the first row where none of them names an image."""
    given = Path(spec.file).expanduser()
    path = next((path for path in (given, folder / given) if path.is_file()), None)
    if path is None:
        raise UserError(f"data.labels.file {spec.file} does not exist, neither from here nor in {folder}")
    rows, image, label = _parse(spec, _read(path), path)
    known = _index_by_path(names)
    image = _find_image_column(rows, label, known) if image is None else image
    class_of_image: dict[int, str | None] = {}
    counts = Counter[str]()
    for row in rows:
        is_short = max(image, label) >= len(row)
        i = None if is_short else _image_of(row[image], known)
        if is_short:
            counts["rows are too short to have a label"] += 1
        elif i is None:
            counts["rows name no image that can be trained on"] += 1
        elif i < 0:
            counts["rows name several images, such as a file name that is in two folders, and are not used"] += 1
        elif class_of_image.setdefault(i, class_of(row[label])) != class_of(row[label]):
            counts["rows name an image again with another label; its first row counts"] += 1
    if not class_of_image:
        first = repr(printable(rows[0][image])) if rows and image < len(rows[0]) else "nothing"
        raise UserError(
            f"data.labels: no row of {path} names an image of {folder}; its first row has {first}, and a file is called "
            f"{printable(names[0])!r}: set data.labels.image_column"
        )
    classes = [class_of_image.get(i) for i in range(len(names))]
    values = {value for value in classes if value is not None}
    if values <= {"-1", "1"} and isinstance(spec.label_column, str):
        named = {"1": spec.label_column, "-1": f"not {spec.label_column}"}
        classes = [named[value] if value is not None else None for value in classes]
    counts["images without a row are left without a class"] = len(names) - len(class_of_image)
    unlabelled = sum(name is None for name in class_of_image.values())
    counts["images with a row and no label are left without a class"] = unlabelled
    remarks = [f"{path.name}: {count} {what}" for what, count in counts.items() if count]
    if any("\udc80" <= c <= "\udcff" for name in classes if name is not None for c in name):
        remarks.append(f"{path.name} is not UTF-8: letters of its labels are shown by their bytes; save it as UTF-8")
    return classes, remarks
