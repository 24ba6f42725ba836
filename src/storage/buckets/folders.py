"""A folder on this machine, beside what a bucket has of it: its files, what stays behind, what is the same."""

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ...config.progress import Progress
from .client import Remote, file_crc32c
from .names import check_name, is_of_this_machine, join

JOBS = 8  # files at a time
LocalFacts = dict[str, os.stat_result]  # of files by name
Filter = Callable[[str], bool]  # of the name of a file or folder


class LocalFiles(NamedTuple):
    """The files below a folder by name, in order; names that a person may miss among them, with the reason; and the linked
    folders that lead out of it."""

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
        for below in list(folders):
            name = join(inside, below)
            if skip(name):
                folders.remove(below)
                left_out += [] if is_of_this_machine(name) else [f"{name}/"]
            elif (folder / name).is_symlink():
                if (folder / name).resolve().is_relative_to(root):
                    left_out.append(f"{name} (a link to a folder that is pushed anyway)")
                else:
                    links_out.append(name)
        for name in (join(inside, file) for file in names):
            if skip(name):
                left_out += [] if is_of_this_machine(name) else [name]
                continue
            check_name(name, str(folder))
            try:
                facts = (folder / name).stat()
            except FileNotFoundError:
                left_out += [f"{name} (a link that leads nowhere)"] if (folder / name).is_symlink() else []
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
