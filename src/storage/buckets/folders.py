"""A folder on this machine, beside what a bucket has of it: the names of its files, what stays behind, what is the same."""

import base64
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ...config import UserError
from ...config.progress import Progress

# Hidden files with these endings belong to a process of this project that runs or was killed, or are notes for this machine.
PROJECT_ENDINGS = (".lock", ".part", ".partial", ".old", ".trial", ".unpacked")
HALF_WRITTEN = (".part", ".partial", ".swp", ".swx", "~")  # of this project and of editors
JUNK = ("__pycache__", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db")
CACHES = ("latents", "pairs")  # folders of a run that are large, and are made anew where they are missing
JOBS = 8  # files at a time
BLOCK = 1 << 20  # bytes that are read at a time
LocalFacts = dict[str, os.stat_result]  # of files by name
Filter = Callable[[str], bool]  # of the name of a file or folder


def is_manifest(name: str) -> bool:
    """Whether a file promises that the others in its folder are whole."""
    return name.endswith(("MANIFEST.json", "manifest.json"))


def is_of_this_machine(name: str) -> bool:
    """Whether the project keeps a file, or a folder that the file is in, for this machine alone: nobody misses it elsewhere."""
    parts = name.split("/")
    return any((part.startswith(".") and part.endswith(PROJECT_ENDINGS)) or part.startswith(".doctor-") for part in parts)


def is_temporary(name: str) -> bool:
    """Whether a file, or a folder that it is in, is of this machine alone, half-written, or an editor's."""
    return is_of_this_machine(name) or any(part.endswith(HALF_WRITTEN) or part in JUNK for part in name.split("/"))


def join(*names: str) -> str:
    return "/".join(name for name in names if name)


def folder_of(name: str) -> str:
    """The part of a name before the file's, with its slash."""
    return name[: name.rfind("/") + 1]


def is_unsafe(name: str) -> bool:
    """Whether a name could lead out of its folder, or cannot be a file's."""
    parts = set(name.split("/"))
    return bool(parts & {"", ".", ".."} or re.search(r"^[A-Za-z]:|[\x00-\x1f\\\ud800-\udfff]", name))


def check_name(name: str, where: str) -> None:
    """A UserError where a name is unsafe."""
    if is_unsafe(name):
        raise UserError(f"{where}: the name {name!r} could lead out of the folder, or cannot be a file's; rename or delete it")


class Remote(NamedTuple):
    """An object: bytes, crc32c (base64, big-endian), and the generation, which changes with each write."""

    size: int
    crc32c: str
    generation: int


def crc32c_of(file: BinaryIO, size: int) -> str:
    """The crc32c of the first `size` bytes, or of all where there are fewer."""
    import google_crc32c

    checksum = google_crc32c.Checksum()
    while size > 0 and (block := file.read(min(BLOCK, size))):
        checksum.update(block)
        size -= len(block)
    return base64.b64encode(checksum.digest()).decode()


def file_crc32c(path: Path) -> str:
    """The crc32c of a file. While a file does not change, a process reads it once, however often a run is pushed."""
    facts = path.stat()
    return _known_crc32c(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _known_crc32c(path: Path, _inode: int, size: int, _time: int) -> str:
    with open(path, "rb") as file:
        return crc32c_of(file, size)


class LocalFiles(NamedTuple):
    """The files below a folder by name; names that a person may miss, with the reason; linked folders that lead out of it."""

    files: LocalFacts
    left_out: list[str]
    links_out: list[str]


def list_files(folder: Path, skip: Filter) -> LocalFiles:
    """What is below a folder, but for what `skip` names (files and whole folders)."""
    files: LocalFacts = {}
    left_out, links_out = list[str](), list[str]()
    root = folder.resolve()

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a live run removes its old checkpoints
            raise error

    for top, folders, names in os.walk(folder, onerror=refuse):
        inside = "/".join(Path(top).relative_to(folder).parts)
        for below in [*folders, *names]:
            name, ending = join(inside, below), "/" if below in folders else ""
            path = folder / name
            if skip(name):
                left_out += [] if is_of_this_machine(name) else [f"{name}{ending}"]
                if ending:
                    folders.remove(below)
            elif ending:
                if path.is_symlink() and path.resolve().is_relative_to(root):
                    left_out.append(f"{name} (a link to a folder that is pushed anyway)")
                elif path.is_symlink():
                    links_out.append(name)
            else:
                check_name(name, str(folder))
                try:
                    facts = path.stat()
                except FileNotFoundError:
                    left_out += [f"{name} (a link that leads nowhere)"] if path.is_symlink() else []
                    continue
                if stat.S_ISREG(facts.st_mode):
                    files[name] = facts
                else:
                    left_out.append(f"{name} (no file that has an end)")
    return LocalFiles(dict(sorted(files.items())), left_out, links_out)


def same_files(folder: Path, files: LocalFacts, objects: dict[str, Remote], *, shown: bool = True) -> set[str]:
    """The names whose sizes and then whose crc32c agree, here and in the bucket."""

    def is_same(name: str) -> bool:
        try:
            return file_crc32c(folder / name) == objects[name].crc32c
        except FileNotFoundError:
            return False

    names = [name for name in files if name in objects and files[name].st_size == objects[name].size]
    total, same = sum(files[name].st_size for name in names), set[str]()
    with ThreadPoolExecutor(JOBS) as pool, Progress("comparing files", total, unit="B", shown=shown, leave=False) as bar:
        for name, agrees in zip(names, pool.map(is_same, names), strict=True):
            same |= {name} if agrees else set()
            bar.update(files[name].st_size)
    return same


def is_untouched(path: Path, before: os.stat_result) -> bool:
    """Whether a file is still there, not replaced and not rewritten. (A log that only grew is untouched.)"""
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return now.st_ino == before.st_ino and (now.st_size > before.st_size or now.st_mtime_ns == before.st_mtime_ns)
