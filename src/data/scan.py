"""Reads every image once before training: what cannot be read is left out, counted and listed."""

import hashlib
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from ..config import UserError, config
from ..config.progress import Progress
from ..storage.files import write_whole
from ..storage.locks import take_lock
from .colour import CONVERTED, DARK, SCALED, is_turned, profile_of, read_stated_bits, stated_white
from .formats import describe_content, endings, open_image, with_plugins
from .transforms import DECODER

TOO_SMALL = "smaller than min_file_bytes"
TOO_NARROW = "smaller than min_side"
FOR_NOW = "cannot be read now: "  # not remembered: the next scan reads the file again
VERSION = 3  # of what is measured: files that another version scanned are read again
SAVE_EVERY = 2048  # files
_LARGE_PIXELS = 25_000_000
_one_at_a_time = threading.Lock()  # for images beyond that, so that memory stays bounded


@config
class ScanConfig:
    """Which files to leave out. Above `max_broken_fraction` of unreadable files the scan stops (files below
    `min_file_bytes` are left out by choice and do not count as broken; nor do images whose shorter side has fewer pixels than
    `min_side`)."""

    min_file_bytes: int = pydantic.Field(0, ge=0)
    min_side: int | None = pydantic.Field(None, gt=0)
    max_pixels: int = pydantic.Field(200_000_000, gt=0)
    max_broken_fraction: float = pydantic.Field(0.05, ge=0, le=1)


class Absent(ValueError):
    """There is no image where one should be; the message is the reason for leaving it out."""


@dataclass
class ScanReport:
    """The files that were left out with their reasons, and what was measured of the good ones.

    `measures` (N, 4): width and height of the upright image, -1 where they are not known; when the file was modified, in
    nanoseconds, 0 where the fingerprint of the source changes with the content; and the first version of the decoder that reads
    it as today's does.
    `notes` counts what is odd about some of them but keeps none of them out, and `remarks` are what else a person has to know
    of the source.
    """

    skipped: list[tuple[str, str]] = field(default_factory=list)
    measures: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), np.int64))
    notes: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(reason for _, reason in self.skipped).most_common())


@cache
def reader() -> str:
    """The version of Pillow and the formats here: another one may read what this one cannot."""
    import PIL

    return f"Pillow {PIL.__version__}, {' '.join(sorted(endings()))}"


def cache_folder() -> Path:
    """Where scans are remembered: $ATELIER_CACHE, else ~/.cache/atelier."""
    return Path(os.environ.get("ATELIER_CACHE") or Path.home() / ".cache" / "atelier")


class Measured(NamedTuple):
    """What a scan remembers of a good image: its sides once its EXIF tag has turned it, the first version of the decoder that
    reads it as today's does, and what is odd about it."""

    width: int
    height: int
    decoder: int
    note: str


def examine(source: Callable[[], Any], size: int, spec: ScanConfig) -> Measured | str:
    """What a scan measures of an image, or why the image is left out. `source()` gives a path or an open file; `size` is in
    bytes."""
    from PIL import UnidentifiedImageError

    if size < spec.min_file_bytes:
        return TOO_SMALL
    if size == 0:
        return "empty file"
    file = None
    try:
        with warnings.catch_warnings(action="ignore"), open_image(file := source()) as image:
            width, height = image.size
            if width * height > spec.max_pixels:
                return "more pixels than max_pixels"
            if min(width, height) < 1 or max(width, height) > 100 * min(width, height):
                return "absurd shape"
            note = profile_of(image).note
            read_stated_bits(image)
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (64, 64))  # reads the whole file, keeps little of it
            with _one_at_a_time if width * height > _LARGE_PIXELS else nullcontext():
                image.load()
                if image.mode.startswith("I"):
                    values = np.asarray(image)
                    if stated_white(image, values) is not None:
                        note = SCALED
                    elif image.mode.startswith("I;16") and not note and 0 < values.max() < 4096:
                        note = DARK
                if is_turned(image):
                    width, height = height, width
            return Measured(width, height, DECODER if note in (CONVERTED, SCALED) else 1, note)
    except UnidentifiedImageError:
        return describe_content(file) or "not an image"
    except Absent as error:
        return str(error)
    except MemoryError:
        return f"{FOR_NOW}it needs more memory than there is"
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:
            return f"{FOR_NOW}{error.strerror}"
        if "MAX_TEXT_CHUNK" in str(error) or "MAX_TEXT_MEMORY" in str(error):
            return "more text than 64 MB in a chunk, or 256 MB in all"
        return "truncated" if "truncat" in str(error).lower() else "damaged"


@contextmanager
def _remembered(key: str):
    """The facts of earlier scans of `key`, under a lock: of several ranks one scans, and the others find its facts."""
    folder = cache_folder() / "scans"
    path = folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.json"
    with ExitStack() as stack:
        facts: dict[str, Any] = {}
        with suppress(OSError):  # a cache that cannot be used costs time, not the run
            folder.mkdir(parents=True, exist_ok=True)
            take_lock(stack.enter_context(open(path.with_suffix(".lock"), "w")), wait=True)
        with suppress(OSError, ValueError):
            known = json.loads(path.read_text())
            facts = known if isinstance(known, dict) else {}

        def save() -> None:
            lasting = {name: fact for name, fact in facts.items() if not str(fact[2]).startswith(FOR_NOW)}
            with suppress(OSError):
                write_whole(path, json.dumps(lasting).encode())

        yield facts, save


def scan(
    names: Sequence[str],
    stamps: Sequence[tuple[int, int]],
    source: Callable[[int], Any],
    spec: ScanConfig,
    *,
    key: str,
    where: str,
) -> tuple[list[int], ScanReport]:
    """The indices of the good images, and the report.

    `stamps[i]` is (bytes, modification time) of `names[i]`; a file with the same name and stamp under the same `key` as in an
    earlier scan is not read again, but what could not be read is, by another reader. The sides of an image are remembered, too,
    so that another `min_side` costs nothing. A UserError stops a scan with too many broken files.
    """

    def is_known(i: int) -> bool:
        fact = facts.get(names[i], ())
        return len(fact) == 8 and tuple(fact[:2]) == stamps[i] and (fact[2] is None or fact[7] == reader())

    def read_facts(i: int) -> list[Any]:
        """The stamp, why the file is left out or None, what was measured, and the reader that could not read it."""
        result = examine(lambda: source(i), stamps[i][0], spec)
        return [*stamps[i], *([result, 0, 0, 0, "", reader()] if isinstance(result, str) else [None, *result, ""])]

    options = f"{VERSION}|{spec.min_file_bytes}|{spec.max_pixels}|{with_plugins(key)}"
    with _remembered(options) as (facts, save):
        todo = [i for i in range(len(names)) if not is_known(i)]
        if todo:
            with (
                Progress("checking images", len(todo), leave=False) as bar,
                ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool,
            ):
                for start in range(0, len(todo), SAVE_EVERY):
                    block = todo[start : start + SAVE_EVERY]
                    for i, fact in zip(block, pool.map(read_facts, block), strict=True):
                        facts[names[i]] = fact
                        bar.update()
                    save()
        known = [facts[name] for name in names]
    smallest = spec.min_side or 0
    reasons = [TOO_NARROW if fact[2] is None and min(fact[3:5]) < smallest else fact[2] for fact in known]
    good = [i for i, reason in enumerate(reasons) if reason is None]
    report = ScanReport(
        [(name, reason) for name, reason in zip(names, reasons, strict=True) if reason is not None],
        np.array([[*known[i][3:5], stamps[i][1], known[i][5]] for i in good], np.int64).reshape(-1, 4),
        dict(Counter(known[i][6] for i in good if known[i][6]).most_common()),
    )
    broken = [f"{name!r} ({reason})" for name, reason in report.skipped if reason not in (TOO_SMALL, TOO_NARROW)]
    if len(broken) > spec.max_broken_fraction * len(names):
        raise UserError(
            f"{where}: {len(broken)} of {len(names)} images cannot be read, more than max_broken_fraction "
            f"{spec.max_broken_fraction:g} allows; mend them or raise it. The first: {', '.join(broken[:10])}"
        )
    if not good:
        raise UserError(f"{where}: no readable image is left ({report.reasons or 'the folder is empty'})")
    return good, report
