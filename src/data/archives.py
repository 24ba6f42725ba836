"""Unpack a downloaded archive: staged, and no name leaves the folder."""

import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from ..config import FULL, UserError
from ..progress import Progress, track


class Damaged(UserError):
    """The archive itself is at fault, and has to be made or brought anew."""


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _inside(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return bool(parts) and not name.startswith(("/", "\\")) and ".." not in parts and ":" not in parts[0]


def unpack(archive: Path, out: Path) -> int:
    """Unpack a zip or tar (gz, xz, bz2) archive into the new folder `out`; gives the number of files.

    A name or a link that would leave the folder, a damaged archive, and a disk too small for it are UserErrors, and nothing
    is left behind.
    """
    if not archive.is_file():
        raise UserError(f"{archive}: there is no such archive")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give another folder with --out")
    staged = out.with_name(out.name + ".partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            count = _unpack_zip(archive, staged)
        elif tarfile.is_tarfile(archive):
            count = _unpack_tar(archive, staged)
        else:
            raise Damaged(f"{archive}: neither a zip nor a tar archive (or its beginning is damaged)")
        if out.exists():
            out.rmdir()
        staged.replace(out)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            made = size(archive.stat().st_size)
            raise UserError(f"{archive} ({made}) was not unpacked: the disk is full; make room and try again") from None
        raise Damaged(f"{archive}: cannot be unpacked: {' '.join(str(error).split())}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return count


def _refuse(archive: Path, name: str) -> Damaged:
    return Damaged(f"{archive}: the name {name!r} would leave the folder; the archive is refused")


def _room(staged: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(staged).free
    if needed > free:
        raise UserError(f"{what} {size(needed)} and {size(free)} are free; make room")


def _unpack_zip(archive: Path, staged: Path) -> int:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            if not _inside(member.filename) or stat.S_ISLNK(member.external_attr >> 16):
                raise _refuse(archive, member.filename)
        _room(staged, sum(member.file_size for member in members), f"{archive} unpacks to")
        for member in track(members, "unpacking", unit="files"):
            file.extract(member, staged)
        return sum(not member.is_dir() for member in members)


def _unpack_tar(archive: Path, staged: Path) -> int:
    count = 0
    # A tar has no index, but pictures do not get smaller: what comes out is no less than what the archive takes.
    _room(staged, archive.stat().st_size, f"{archive} unpacks to at least")
    with tarfile.open(archive) as file, Progress("unpacking", unit="files") as bar:
        for member in file:  # one pass: a compressed tar has no index
            if not _inside(member.name) and os.path.normpath(member.name) != ".":
                raise _refuse(archive, member.name)
            _room(staged, member.size, f"{archive}: {member.name} alone is")
            try:
                file.extract(member, staged, filter="data")
            except tarfile.FilterError:
                raise _refuse(archive, member.name) from None
            count += member.isfile()
            bar.update()
    return count
