"""Files and folders that are written whole, or not at all; and what is said where the disk is full."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import FULL, UserError


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
