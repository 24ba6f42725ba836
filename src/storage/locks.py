"""Locks on files, POSIX's or those of native Windows. The system drops one when the process that holds it ends.

filelock is not used, because loader workers inherit its locks and would hold them after a kill of their run.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # native Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None

_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_FAR = 1 << 30  # Windows keeps others from reading what is locked, so a byte behind the end is


def take_lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file that can be written, and say whether this process has the lock now; with `wait`, wait for it.

    Loader workers do not inherit it. Without either kind of lock nobody is kept out. An OSError where the disk takes no locks.
    """
    while True:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            elif msvcrt is not None:
                _lock_far_byte(file)
            return True
        except OSError as error:
            if error.errno not in _HELD:
                raise
            if not wait or fcntl is not None:
                return False
            time.sleep(0.1)


def _lock_far_byte(file: IO[Any]) -> None:
    windows: Any = msvcrt
    file.flush()
    place = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    try:
        os.lseek(file.fileno(), _FAR, os.SEEK_SET)
        windows.locking(file.fileno(), windows.LK_NBLCK, 1)
    finally:
        os.lseek(file.fileno(), place, os.SEEK_SET)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of this folder, then hold it. Its file lies beside the folder, and is removed
    where there is no such folder afterwards."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.bring.lock")
    while True:
        with open(path, "a+") as lock:
            try:
                take_lock(lock, wait=True)
            except OSError as error:
                from ..config import UserError  # here, since the doctor runs `take_lock` of this file outside the package

                raise UserError(f"{folder.parent} cannot be locked ({error.strerror}); put it on another disk") from None
            if not _is_at(path, lock):
                continue  # the process before removed the file meanwhile, and others lock a new one
            try:
                yield
            finally:
                if not folder.exists():
                    path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
