"""The folder datasets/: archives that were unpacked here, beside themselves, and what of them travels.

Where an archive and its folder are here, the archive travels and the folder stays. `.NAME.unpacked` beside an archive says
what both were.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from ...config import UserError
from ..archives import Damaged, stem, unpack
from ..files import write_whole
from .client import file_crc32c
from .folders import Filter
from .names import CACHES, is_temporary


class Unpacked(NamedTuple):
    """An archive that was unpacked here, whether it is still here or not, and its folder, which is here."""

    archive: Path
    folder: Path


def find_unpacked(place: str = "datasets") -> list[Unpacked]:
    """Those in datasets/; none for another place."""
    markers = sorted(Path(place).glob(".*.unpacked")) if place == "datasets" else []
    archives = [marker.with_name(marker.name.removeprefix(".").removesuffix(".unpacked")) for marker in markers]
    pairs = [Unpacked(archive, archive.with_name(stem(archive.name) or archive.name)) for archive in archives]
    return [pair for pair in pairs if pair.folder.is_dir()]


def folders_that_stay(place: str) -> set[str]:
    """The names of folders in a place whose archives are here and travel instead."""
    return {folder.name for archive, folder in find_unpacked(place) if archive.exists()}


def skipped_in(place: str) -> Filter:
    """What neither moves nor counts: of datasets the folders that stay, of a run its caches."""
    level = 1 if place == "runs" else 0
    if place.split("/")[0] == "runs":
        return lambda name: is_temporary(name) or any(part in CACHES for part in name.split("/")[level : level + 1])
    staying = folders_that_stay(place)
    return lambda name: is_temporary(name) or name.split("/")[0] in staying


def kept_in(place: str, *, pull: bool) -> Filter:
    """What `--delete` keeps of datasets: a pull keeps the unpacked folders; a push keeps the archives in the bucket that were
    unpacked here, which may be the only copies of archives that are not here any more."""
    kept_names = {(pair.folder if pull else pair.archive).name for pair in find_unpacked(place)}
    return lambda name: name.split("/")[0] in kept_names


def print_unpacked(place: str) -> None:
    """A line for each folder of datasets that a push treats in another way than its name says."""
    for archive, folder in find_unpacked(place):
        before = json.loads(_marker(archive).read_text())
        if not archive.exists():
            line = f"{archive} is not here any more, {folder} was unpacked from it"
            print(f"{line}: a push leaves it in the bucket, and sends the folder")
        elif any(before.get(key, count) != count for key, count in _tally(folder).items()):  # older ones do not know all of it
            line = f"{folder} was unpacked from {archive.name} and has changed"
            print(f"{line}: push {place} leaves it out, push {folder} sends it")


def _marker(archive: Path) -> Path:
    return archive.with_name(f".{archive.name}.unpacked")


def _tally(folder: Path) -> dict[str, int]:
    """How many files a folder has, how many bytes, and when the newest was modified: other numbers mean a change."""
    files = [path for path in folder.rglob("*") if not is_temporary(path.relative_to(folder).as_posix()) and not path.is_dir()]
    facts = [path.lstat() for path in files]
    newest = max((fact.st_mtime_ns for fact in facts), default=0)
    return {"files": len(facts), "files_bytes": sum(fact.st_size for fact in facts), "newest_ns": newest}


def unpack_beside(archive: Path) -> str | None:
    """Unpack `datasets/x.zip` to `datasets/x`, once; gives a line about it, or None where there was nothing to do."""
    name = stem(archive.name) or ""
    folder, marker = archive.with_name(name), _marker(archive)
    facts = {"bytes": archive.stat().st_size, "crc32c": file_crc32c(archive)}
    if folder.exists():
        if not marker.exists():
            return f"{folder} is here already and not from {archive.name}: left as it is"
        if not json.loads(marker.read_text()).items() >= facts.items():
            return f"{archive} has changed since {folder} was unpacked: left as it is; remove {folder} and bring it again"
        return None
    staged = archive.with_name(f".{name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        count = unpack(archive, staged)
        top = list(staged.iterdir())
        only_folder = len(top) == 1 and top[0].name == name and top[0].is_dir()
        whole = staged / name if only_folder else staged
        write_whole(marker, json.dumps({**facts, **_tally(whole)}).encode())
        whole.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return f"unpacked {count} files into {folder}"


def unpack_all(place: Path) -> int:
    """Unpack the archives of a place, with a line for each; gives 2 where one could not be unpacked, which does not keep the
    others back, else 0."""
    status = 0
    for archive in sorted(path for path in place.iterdir() if stem(path.name) and path.is_file()):
        try:
            if line := unpack_beside(archive):
                print(line)
        except UserError as error:
            anew = "; push it anew from where it is whole, or remove it, here and in the bucket"
            print(f"error: {error}{anew if isinstance(error, Damaged) else ''}", file=sys.stderr)
            status = 2
    return status
