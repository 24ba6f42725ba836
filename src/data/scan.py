"""Look at every picture once before training: what cannot be read is left out, counted and listed."""

import fcntl
import hashlib
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..config import UserError, config
from .transforms import FORMATS

TOO_SMALL = "smaller than min_file_bytes"
FOR_NOW = "cannot be read now: "  # not remembered: the next scan looks again
VERSION = 1
_large = threading.Lock()  # pictures beyond this many pixels are decoded one at a time, so that memory stays bounded
_LARGE_PIXELS = 25_000_000


@config
class ScanConfig:
    """Which files to leave out. Above `max_broken_fraction` of unreadable files the scan stops (files below
    `min_file_bytes` are left out by choice and do not count as broken)."""

    min_file_bytes: int = pydantic.Field(0, ge=0)
    max_pixels: int = pydantic.Field(200_000_000, gt=0)
    max_broken_fraction: float = pydantic.Field(0.05, ge=0, le=1)


@dataclass
class ScanReport:
    """How many files were looked at, and those left out with their reasons."""

    total: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(reason for _, reason in self.skipped).most_common())


def cache_folder() -> Path:
    """Where scans are remembered: $ATELIER_CACHE, else ~/.cache/atelier."""
    return Path(os.environ.get("ATELIER_CACHE") or Path.home() / ".cache" / "atelier")


def inspect(source: Callable[[], Any], size: int, spec: ScanConfig) -> str | None:
    """Why a picture is left out, or None. `source()` gives a path or an open file; `size` is in bytes."""
    if size < spec.min_file_bytes:
        return TOO_SMALL
    if size == 0:
        return "empty file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source(), formats=FORMATS) as image:
                width, height = image.size
                if width * height > spec.max_pixels:
                    return "more pixels than max_pixels"
                if min(width, height) < 1 or max(width, height) > 100 * min(width, height):
                    return "absurd shape"
                if image.format in ("JPEG", "MPO"):
                    image.draft(None, (64, 64))  # reads the whole file, keeps little of it
                if width * height > _LARGE_PIXELS:
                    with _large:
                        image.load()
                else:
                    image.load()
    except UnidentifiedImageError:
        return "not a picture"
    except MemoryError:
        return f"{FOR_NOW}it needs more memory than there is"
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:
            return f"{FOR_NOW}{error.strerror}"
        if "MAX_TEXT_CHUNK" in str(error) or "MAX_TEXT_MEMORY" in str(error):
            return "more text than 64 MB in a chunk, or 256 MB in all"
        return "truncated" if "truncat" in str(error).lower() else "damaged"
    return None


@contextmanager
def _remembered(key: str):
    """The facts of earlier scans of `key`, under a lock: of several ranks one scans, the others find it done."""
    folder = cache_folder() / "scans"
    path = folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.json"
    with ExitStack() as stack:
        facts: dict[str, Any] = {}
        with suppress(OSError):  # a cache that cannot be used costs time, not the run
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(path.with_suffix(".lock"), "w")), fcntl.LOCK_EX)
        with suppress(OSError, ValueError):
            facts = json.loads(path.read_text())

        def save() -> None:
            staged = path.with_suffix(".part")
            try:
                lasting = {name: fact for name, fact in facts.items() if not str(fact[2]).startswith(FOR_NOW)}
                staged.write_text(json.dumps(lasting))
                staged.replace(path)
            except OSError:
                with suppress(OSError):
                    staged.unlink(missing_ok=True)

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
    """The indices of the good pictures, and the report.

    `stamps[i]` is (bytes, modification time) of `names[i]`; what is known of the same name and stamp under the same `key`
    is not looked at again. A UserError stops a scan with too many broken files.
    """
    options = f"{VERSION}|{spec.min_file_bytes}|{spec.max_pixels}|{key}"
    with _remembered(options) as (facts, save):
        todo = [i for i, name in enumerate(names) if facts.get(name, [None])[:2] != list(stamps[i])]
        if todo:
            block = 2048
            with (
                tqdm(total=len(todo), desc="checking pictures", unit="img", disable=None, leave=False) as bar,
                ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool,
            ):
                for start in range(0, len(todo), block):
                    part = todo[start : start + block]
                    found = pool.map(lambda i: inspect(lambda: source(i), stamps[i][0], spec), part)
                    for i, reason in zip(part, found, strict=True):
                        facts[names[i]] = [*stamps[i], reason]
                        bar.update()
                    save()
        reasons = [facts[name][2] for name in names]
    good = [i for i, reason in enumerate(reasons) if reason is None]
    report = ScanReport(len(names), [(names[i], reason) for i, reason in enumerate(reasons) if reason is not None])
    broken = [(name, reason) for name, reason in report.skipped if reason != TOO_SMALL]
    if len(broken) > spec.max_broken_fraction * len(names):
        first = ", ".join(f"{name!r} ({reason})" for name, reason in broken[:10])
        raise UserError(
            f"{where}: {len(broken)} of {len(names)} pictures cannot be read, more than max_broken_fraction "
            f"{spec.max_broken_fraction:g} allows; mend them or raise it. The first: {first}"
        )
    if not good:
        raise UserError(f"{where}: no readable picture is left ({report.reasons or 'the folder is empty'})")
    return good, report
