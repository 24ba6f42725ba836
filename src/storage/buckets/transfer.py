"""Make the bucket what a folder is (`push`), or a folder what the bucket has (`pull`); and compare them (`status`).

Manifests come last, after all that they promise, and go first where something is deleted.
"""

import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ...config import UserError
from ...config.progress import Progress
from ..files import check_room, remove_leftovers
from . import folders
from .client import Bucket, Empty, Overwritten
from .folders import (
    Filter,
    folder_of,
    is_manifest,
    is_of_this_machine,
    is_temporary,
    is_untouched,
    join,
    list_files,
    same_files,
)


class Moved(NamedTuple):
    """Files and bytes that moved, files that were the same, and files that were deleted (or would, of a dry run); and names of
    what stays behind and a person may miss."""

    files: int
    bytes: int
    same: int
    deleted: int
    left_out: tuple[str, ...] = ()


class Status(NamedTuple):
    """Names only on this machine, only in the bucket, and in both but different; how many are the same."""

    only_local: list[str]
    only_remote: list[str]
    different: list[str]
    same: int


class _Stopped(Exception):
    """Another file failed, so this one need not go on."""


class _Crew(AbstractContextManager["_Crew"]):
    """Does a thing for each of many names, JOBS at a time, below one bar of bytes; the first failure ends the rest."""

    def __init__(self, label: str, total: int, shown: bool) -> None:
        self.bar = Progress(label, total, unit="B", shown=shown)
        self._pool, self._lock, self._stop = ThreadPoolExecutor(folders.JOBS), threading.Lock(), threading.Event()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self.bar.close()

    def advance(self, count: int) -> None:
        if count > 0 and self._stop.is_set():
            raise _Stopped
        with self._lock:
            self.bar.update(count)

    def do(self, work: Callable[[str], None], names: Iterable[str]) -> None:
        for done in as_completed([self._pool.submit(work, name) for name in names]):
            done.result()


def _split(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names of manifests, and the others."""
    listed = list(names)
    return [name for name in listed if is_manifest(name)], [name for name in listed if not is_manifest(name)]


def push(
    bucket: Bucket,
    folder: Path,
    under: str,
    *,
    delete: bool = False,
    dry_run: bool = False,
    skip: Filter = is_temporary,
    keep: Filter = lambda name: False,
    shown: bool = True,
) -> Moved:
    """Make the bucket's `under/` what the folder is; `delete` removes what is only in the bucket, but for what is to `keep`.

    Manifests follow when all others have arrived, and not where a file of their folder was replaced or removed meanwhile; an
    old one is deleted before what it promises is replaced. `skip` is asked for folders too. Only with `shown` a bar is shown.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder to push")
    files, left_out, links_out = list_files(folder, skip)
    if links_out:
        link = folder / links_out[0]
        raise UserError(f"{link} is a link that leads out of {folder}; put the files there, or push and pull it by itself")
    if not files:
        raise UserError(f"{folder} has no files to push")
    objects = {name: remote for name, remote in bucket.list(under).items() if not skip(name)}
    same = same_files(folder, files, objects, shown=shown)
    listed, others = _split(name for name in files if name in objects)
    void = [name for name in listed if any(other.startswith(folder_of(name)) for other in {*others} - same)]
    sizes = {name: facts.st_size for name, facts in files.items() if name not in same or name in void}
    gone = sorted(name for name in objects.keys() - files.keys() if delete and not keep(name))
    plan = Moved(len(sizes), sum(sizes.values()), len(files) - len(sizes), len(gone), tuple(left_out))
    if dry_run:
        return plan
    sent = list[str]()

    def send(name: str) -> None:
        with suppress(FileNotFoundError):  # a live run has removed it: then no manifest of its folder goes either
            bucket.put(folder / name, join(under, name), objects.get(name), crew.advance)
            sent.append(name)

    def remove(name: str) -> None:
        bucket.delete(join(under, name), objects.pop(name))

    def is_kept_promise(name: str) -> bool:
        return all(is_untouched(folder / other, files[other]) for other in files if other.startswith(folder_of(name)))

    manifests, others = _split(sizes)
    with _Crew(f"push {under}", plan.bytes, shown) as crew:
        crew.do(remove, void)
        crew.do(send, others)
        kept_manifests = [name for name in manifests if is_kept_promise(name)]
        crew.do(send, kept_manifests)
        for names in _split(gone):
            crew.do(remove, names)
    for name in manifests if shown else ():
        if name not in kept_manifests:
            print(f"{folder / name}: its folder changed meanwhile, so it goes with the next push", file=sys.stderr)
    return plan._replace(files=len(sent), bytes=sum(sizes[name] for name in sent))


def pull(
    bucket: Bucket,
    under: str,
    folder: Path,
    *,
    delete: bool = False,
    dry_run: bool = False,
    skip: Filter = is_temporary,
    keep: Filter = lambda name: False,
) -> Moved:
    """Make the folder what the bucket's `under/` is, in the same order as `push`; `delete` removes what is only in the folder,
    but for what is to `keep`.

    Where another process may pull into the folder, the caller holds its `folder_lock`. A disk without room for all that is to
    come is a UserError before the first byte.
    """
    listed = bucket.list(under)
    objects = {name: remote for name, remote in listed.items() if not skip(name)}
    left_out = sorted(name for name in listed if skip(name) and not is_of_this_machine(name))
    if not objects:
        raise Empty(f"{join(bucket.url, under)}/ has no files to pull; is the name right?")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; move it away")
    files, _, links_out = list_files(folder, skip)
    for link in sorted(links_out):
        below = [name for name in objects if name.startswith(f"{link}/")]
        if below:
            print(f"{folder / link} is a link that leads out of {folder}: left as it is", file=sys.stderr)
        objects = {name: remote for name, remote in objects.items() if name not in below}
    for name in objects:
        if (folder / name).is_dir() or any(parent.as_posix() in objects for parent in PurePosixPath(name).parents):
            raise UserError(f"{folder / name} would be a file and a folder; delete or rename one of them")
    same = same_files(folder, files, objects)
    sizes = {name: remote.size for name, remote in objects.items() if name not in same}
    gone = sorted(name for name in files.keys() - objects.keys() if delete and not keep(name))
    plan = Moved(len(sizes), sum(sizes.values()), len(same), len(gone), tuple(left_out))
    if dry_run:
        return plan
    remove_leftovers(folder.rglob(".bring-*-*-*.part"), _is_dead)
    check_room(folder, plan.bytes, f"{folder}: what is to come takes")

    def fetch(name: str) -> None:
        path, whole = folder / name, join(under, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            bucket.get(whole, objects[name], path, crew.advance)
        except Overwritten:  # a log of a live run; a manifest is not taken, for it may promise other files
            now = None if is_manifest(name) else bucket.about(whole)
            if now is None:
                raise
            bucket.get(whole, now, path, crew.advance)

    with _Crew(f"pull {under}", plan.bytes, shown=True) as crew:
        for names in reversed(_split(sizes)):
            crew.do(fetch, names)
    for name in itertools.chain(*_split(gone)):
        (folder / name).unlink(missing_ok=True)
        for parent in PurePosixPath(name).parents[:-1]:
            if any((folder / parent).iterdir()):
                break
            (folder / parent).rmdir()
    return plan


def _is_dead(part: Path) -> bool:
    """Whether the pull that wrote this part was on this machine, and has ended."""
    import psutil

    host, pid, _ = part.stem.removeprefix(".bring-").rsplit("-", 2)
    return host == socket.gethostname() and not psutil.pid_exists(int(pid))


def status(bucket: Bucket, under: str, folder: Path, *, skip: Filter = is_temporary) -> Status:
    """How a folder and the bucket's `under/` differ; either may be missing."""
    objects = {name: remote for name, remote in bucket.list(under).items() if not skip(name)}
    files = list_files(folder, skip).files
    same, both = same_files(folder, files, objects), files.keys() & objects.keys()
    return Status(sorted(files.keys() - both), sorted(objects.keys() - both), sorted(both - same), len(same))
