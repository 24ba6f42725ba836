"""Unpack a downloaded archive: staged, and no name leaves the folder."""

import os
import re
import shutil
import stat
import struct
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from ..config import FULL, UserError
from ..config.progress import Progress, track
from .files import check_is_new, new_folder


class Damaged(UserError):
    """The archive itself is at fault, and has to be made or brought anew."""


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")


def stem(archive: str) -> str | None:
    """`x` of `x.tar.gz`; None of what is no archive."""
    ending = next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if archive.lower().endswith(ending)), None)
    return archive[: -len(ending)] or None if ending else None


def _inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not re.match("[A-Za-z]:", name)


def _zip_name(member: zipfile.ZipInfo) -> str:
    """The name as whoever packed it saw it: Windows' separators, and UTF-8 that is not marked as such, are understood."""
    name, marked = member.orig_filename.partition("\0")[0], member.flag_bits & 0x800
    if not marked and not name.isascii():
        raw = name.encode("cp437", "replace")
        for told in (_unicode_field(member.extra, raw), raw):
            try:
                name = told.decode("utf-8")
                break
            except UnicodeDecodeError:
                continue
    return name.replace("\\", "/")


def _is_garbled(member: zipfile.ZipInfo) -> bool:
    """Whether the letters of a name are guessed: it has some outside ASCII, and nothing says in which code page."""
    name = member.orig_filename.partition("\0")[0]
    return not member.flag_bits & 0x800 and not name.isascii() and _zip_name(member) == name.replace("\\", "/")


def _unicode_field(extra: bytes, raw: bytes) -> bytes:
    """The UTF-8 name that some programs keep beside one of an old code page (field 0x7075), where it is of this name."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        content, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 0x7075 and len(content) > 5 and content[0] == 1 and content[1:5] == struct.pack("<I", zlib.crc32(raw)):
            return content[5:]
    return raw


def _of_macos(name: str) -> bool:
    """Whether macOS put it beside the files: what it shows of folders, and what other systems cannot keep of files."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or (bool(parts) and (parts[-1].startswith("._") or parts[-1] == ".DS_Store"))


class _Names:
    """The names that were unpacked, and what is to be said of them."""

    def __init__(self, archive: Path) -> None:
        self._archive, self._seen = archive, dict[str, str]()
        self._twice, self._alike, self.left = list[str](), list[str](), 0
        self.garbled: list[str] = []

    def add(self, name: str, place: Path, *, same: bool = False) -> None:
        """A file comes to `place`; `same` says that it is what is there already under this name. A UserError where the disk
        takes it for another one."""
        key = unicodedata.normalize("NFC", PurePosixPath(name).as_posix()).casefold()
        known = self._seen.get(key)
        if known is None:
            self._seen[key] = name
        elif known == name:
            self._twice += [] if same else [name]
        elif place.exists() and not place.is_dir():
            raise Damaged(f"{self._archive}: {known!r} and {name!r} are one file on this disk; unpack it on another one")
        else:
            self._alike.append(f"{known!r} and {name!r}")

    def tell(self) -> None:
        for found, what in (
            (self._twice, "in it more than once, with different contents: the last one was taken"),
            (self._alike, "names that look alike: they are kept apart, and folders of them are different classes"),
        ):
            if found:
                first = f"{found[0]!r}" if found is self._twice else found[0]
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                print(f"note: {self._archive}: {first}{more}: {what}", file=sys.stderr)
        if self.garbled:
            print(
                f"note: {self._archive}: {len(self.garbled)} names, such as {self.garbled[0]!r}, do not say in which code page "
                "their letters are; if they read wrongly, unpack with unzip -O CODEPAGE (such as gbk, shift_jis, cp866)",
                file=sys.stderr,
            )
        if self.left:
            print(f"note: {self._archive}: {self.left} files of macOS (__MACOSX, ._names) are left out", file=sys.stderr)


def unpack(archive: Path, out: Path) -> int:
    """Unpack a zip or tar (gz, xz, bz2) archive into the new folder `out`; gives the number of files.

    A name or a link that would leave the folder, a damaged archive, and a disk too small for it are UserErrors, and nothing
    is left behind.
    """
    if not archive.is_file():
        raise UserError(f"{archive}: there is no such archive")
    check_is_new(out)
    try:
        with new_folder(out) as staged:
            if zipfile.is_zipfile(archive):
                return _unpack_zip(archive, staged)
            if tarfile.is_tarfile(archive):
                return _unpack_tar(archive, staged)
            raise Damaged(f"{archive}: neither a zip nor a tar archive (or its beginning is damaged)")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, KeyError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            bytes_in_words = size(archive.stat().st_size)
            raise UserError(
                f"{archive} ({bytes_in_words}) was not unpacked: the disk is full; make room and try again"
            ) from None
        raise Damaged(f"{archive}: cannot be unpacked: {' '.join(str(error).split())}") from None


def _refuse(archive: Path, name: str) -> Damaged:
    return Damaged(f"{archive}: the name {name!r} would leave the folder; the archive is refused")


def _room(staged: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(staged).free
    if needed > free:
        raise UserError(f"{what} {size(needed)} and {size(free)} are free; make room")


def _unpack_zip(archive: Path, staged: Path) -> int:
    names, count, sums = _Names(archive), 0, dict[str, tuple[int, int]]()
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            name = _zip_name(member)
            if not _inside(name):
                raise _refuse(archive, member.orig_filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise Damaged(f"{archive}: {member.orig_filename!r} is a link, not a file; the archive is refused")
            names.garbled += [name] if _is_garbled(member) else []
        _room(staged, sum(member.file_size for member in members), f"{archive} unpacks to")
        for member in track(members, "unpacking", unit="files"):
            member.filename = _zip_name(member)
            if _of_macos(member.filename):
                names.left += not member.is_dir()
                continue
            if not member.is_dir():
                told = (member.CRC, member.file_size)
                names.add(member.filename, staged / member.filename, same=sums.get(member.filename) == told)
                count += member.filename not in sums
                sums[member.filename] = told
            file.extract(member, staged)
    names.tell()
    return count


def _unpack_tar(archive: Path, staged: Path) -> int:
    names, files = _Names(archive), set[str]()
    # A tar has no index, but pictures do not get smaller: what comes out is no less than what the archive takes.
    _room(staged, archive.stat().st_size, f"{archive} unpacks to at least")
    with tarfile.open(archive) as file, Progress("unpacking", unit="files") as bar:
        for member in file:  # one pass: a compressed tar has no index
            told, member.name = member.name, member.name.replace("\\", "/")
            if not _inside(member.name) and os.path.normpath(member.name) != ".":
                raise _refuse(archive, told)
            if _of_macos(member.name):
                names.left += member.isfile()
                continue
            _room(staged, member.size, f"{archive}: {member.name} alone is")
            if member.isfile():
                names.add(member.name, staged / member.name)
                files.add(member.name)
            if member.islnk():
                member.linkname = member.linkname.replace("\\", "/")
            try:
                file.extract(member, staged, filter="data")
            except tarfile.SpecialFileError:
                raise Damaged(f"{archive}: {told!r} is a pipe or a device, not a file; the archive is refused") from None
            except tarfile.FilterError:
                raise _refuse(archive, told) from None
            bar.update()
    names.tell()
    return len(files)
