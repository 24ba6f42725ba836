"""Files that are written whole, or not at all."""

import os
import shutil
from pathlib import Path


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


def link_file(source: str | Path, target: str | Path) -> None:
    """A second name of a file, which nobody writes into again; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
