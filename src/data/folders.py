"""What is in a folder: which entries are folders and images, and all files below it, each once whatever links there are."""

import errno
import heapq
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import formats
from .names import printable, sorted_by_count

_LEADS_NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)  # of a link


def ending_of(name: str) -> str:
    """The ending of a file's name with its dot, in small letters."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether a file has the ending of an image that can be read here."""
    return ending_of(name) in formats.endings()


def is_unreadable_image(name: str) -> bool:
    """Whether a file has the ending of an image that cannot be read here."""
    return ending_of(name) in formats.unreadable()


def identity(path: Path | str) -> tuple[int, int]:
    """What is the same for a folder and for all links to it."""
    state = os.stat(path)
    return state.st_dev, state.st_ino


def entries(folder: Path | str) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """(entry, whether it is a folder) of what is in a folder, in no order; hidden ones and links to nowhere are left out."""
    with os.scandir(folder) as found_entries:
        for entry in found_entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            try:
                if not entry.is_symlink() or os.path.exists(entry.path):
                    yield entry, entry.is_dir()
            except OSError as error:
                if error.errno not in _LEADS_NOWHERE:
                    raise


@dataclass
class FolderTree:
    """The `images` below a folder, in the order of their names: (the names from there down to the file, the file) of each.

    `subfolders` are those of the first level. `unreadable` are images that cannot be read here, `others` the number of other
    files by their endings, and `links` the links to folders that are in the tree already.
    """

    images: list[tuple[tuple[str, ...], os.DirEntry[str]]] = field(default_factory=list)
    subfolders: list[str] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)


def _files_below(root: Path, tree: FolderTree) -> Iterator[tuple[tuple[str, ...], os.DirEntry[str]]]:
    """(names down to it, entry) of each file below `root`; the subfolders and links that are passed are noted in `tree`."""
    visited, has_images = set[tuple[int, int]](), False
    waiting: list[tuple[bool, tuple[str, ...], str]] = [(False, (), str(root))]  # (whether it is a link, its names, its path)
    while waiting:
        is_link, above, place = heapq.heappop(waiting)  # a link when every folder was visited under its own name
        folder = identity(place)
        leads_back = is_link and has_images and folder in map(identity, root.resolve().parents)
        if leads_back or folder in visited:
            if is_link:
                tree.links.append("/".join(above))
            continue
        visited.add(folder)
        for entry, is_folder in entries(place):
            if is_folder:
                heapq.heappush(waiting, (entry.is_symlink(), (*above, entry.name), entry.path))
                if not above and not entry.is_symlink():
                    tree.subfolders.append(entry.name)
            else:
                has_images |= is_image(entry.name)
                yield (*above, entry.name), entry


def holds_images(folder: Path, *, also_unreadable: bool = False) -> bool:
    """Whether there are images in a folder, at any depth (`also_unreadable`: those that cannot be read here, too)."""
    names = (entry.name for _, entry in _files_below(folder, FolderTree()))
    return any(is_image(name) or (also_unreadable and is_unreadable_image(name)) for name in names)


def walk(root: Path, tree: FolderTree | None = None) -> FolderTree:
    """All files below `root`, added to `tree`. A folder is visited once, under its own name before that of a link to it."""
    tree, unreadable = tree or FolderTree(), list[Path]()
    for parts, entry in _files_below(root, tree):
        if is_image(entry.name):
            tree.images.append((parts, entry))
        elif is_unreadable_image(entry.name):
            unreadable.append(Path(entry.path))
        else:
            tree.others[ending_of(entry.name)] += 1
    tree.images.sort(key=lambda image: image[0])
    tree.unreadable += sorted(unreadable)
    return tree


def list_endings(counts: Counter[str]) -> str:
    """The number of files by ending, in words: `3 .json, 1 without an ending`."""
    by_count = sorted_by_count(counts)
    words = [f"{count} {printable(ending) or 'without an ending'}" for ending, count in by_count[:8]]
    rest = sum(count for _, count in by_count[8:])
    return ", ".join(words + ([f"{rest} others"] if rest else []))
