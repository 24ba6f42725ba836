"""Files and folders that are written whole, or not at all; and what is said where the disk is full."""

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..config import FULL, UserError


def as_json(document: Any) -> bytes:
    """A JSON document as it is written for people, indented and with a last newline."""
    return (json.dumps(document, indent=1) + "\n").encode()


def numpy_bytes(save: Callable[..., None], /, *values: Any, **arrays: Any) -> memoryview:
    """What NumPy's `save` or `savez` writes. Given a file, NumPy goes past Python and loses why it could not write."""
    content = io.BytesIO()
    save(content, *values, **arrays)
    return content.getbuffer()


def write_flushed(path: Path, content: bytes | memoryview) -> None:
    """Write a file, and wait until it is on the disk; an OSError names the file."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it is whole or absent: beside its place, flushed, and then moved there."""
    staged = path.with_name(f".{path.name}.part")
    try:
        write_flushed(staged, content)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` to write into. It takes the place of `folder`, whatever is there, when the block
    ends, and is removed where the block fails; so `folder` is whole or as it was."""
    staged, before = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir()
        yield staged
        flush_folder(staged)
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        staged.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def check_room(folder: Path, needed: int, what: str) -> None:
    """A UserError where the disk of `folder`, or of the first folder above it that exists, has no room for `needed` bytes."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed > free_bytes:
        raise UserError(f"{what} {size(needed)} and {size(free_bytes)} are free; make room")


def remove_leftovers(parts: Iterable[Path], is_dead: Callable[[Path], bool] = lambda part: False) -> None:
    """Remove files that writers which were killed left behind: an hour ago or more, or as `is_dead` knows."""
    for part in parts:
        with suppress(OSError):  # another process removes it, too
            if time.time() - part.stat().st_mtime > 3600 or is_dead(part):
                part.unlink()


def check_is_new(folder: Path) -> None:
    """A UserError where there is something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; give another folder with --out")


@contextmanager
def explain_full_disk(path: Path, note: str = "") -> Iterator[None]:
    """Around the writing of `path`: that the disk is full becomes a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        message = f"the disk is full: {path} was not written{note}; make room and run the same command again"
        raise UserError(message) from None


def link_file(source: str | Path, target: str | Path) -> None:
    """A second name of a file, which nobody writes into again; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
