"""Unpack a downloaded archive into a folder that is whole or absent, and that no name in the archive leaves."""

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
from contextlib import suppress
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


def _zip_name(member: zipfile.ZipInfo) -> tuple[str, bool]:
    """The name as its author saw it, and whether its letters are guessed, because nothing says in which code page they are.

    Windows' separators, and UTF-8 that is not marked as such, are understood.
    """
    name, marked = member.orig_filename.partition("\0")[0], member.flag_bits & 0x800
    guessed = not marked and not name.isascii()
    if guessed:
        raw = name.encode("cp437", "replace")
        for encoded in (_unicode_field(member.extra, raw), raw):
            with suppress(UnicodeDecodeError):
                name, guessed = encoded.decode("utf-8"), False
                break
    return name.replace("\\", "/"), guessed


def _unicode_field(extra: bytes, raw: bytes) -> bytes:
    """The UTF-8 name that some programs keep beside one of an old code page (field 0x7075), where it is of this name."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        content, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 0x7075 and len(content) > 5 and content[0] == 1 and content[1:5] == struct.pack("<I", zlib.crc32(raw)):
            return content[5:]
    return raw


def _of_macos(name: str) -> bool:
    """Whether macOS put the file beside the others, to show folders or to keep what other systems cannot."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or (bool(parts) and (parts[-1].startswith("._") or parts[-1] == ".DS_Store"))


class _Names:
    """The names that were unpacked, and the notes about them."""

    def __init__(self, archive: Path) -> None:
        self._archive, self._known = archive, dict[str, str]()
        self._twice, self._alike = list[str](), list[str]()
        self.garbled, self.of_macos = list[str](), 0

    def add(self, name: str, place: Path, *, same: bool = False) -> None:
        """Note that a file is unpacked to `place`; `same` says that its content is there already under this name. A UserError
        where the disk takes two names for one."""
        key = unicodedata.normalize("NFC", PurePosixPath(name).as_posix()).casefold()
        known = self._known.setdefault(key, "")
        if not known:
            self._known[key] = name
        elif known == name:
            self._twice += [] if same else [repr(name)]
        elif place.exists() and not place.is_dir():
            raise Damaged(f"{self._archive}: {known!r} and {name!r} are one file on this disk; unpack it on another one")
        else:
            self._alike.append(f"{known!r} and {name!r}")

    def print_notes(self) -> None:
        notes = []
        for names, what in (
            (self._twice, "in it more than once, with different contents: the last one was taken"),
            (self._alike, "names that look alike: they are kept apart, and folders of them are different classes"),
        ):
            if names:
                notes.append(f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {what}")
        if self.garbled:
            notes.append(
                f"{len(self.garbled)} names, such as {self.garbled[0]!r}, do not say in which code page their letters are; if "
                "they read wrongly, unpack with unzip -O CODEPAGE (such as gbk, shift_jis, cp866)"
            )
        if self.of_macos:
            notes.append(f"{self.of_macos} files of macOS (__MACOSX, ._names) are left out")
        for note in notes:
            print(f"note: {self._archive}: {note}", file=sys.stderr)


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


def _check_room(staged: Path, needed: int, what: str) -> None:
    free_bytes = shutil.disk_usage(staged).free
    if needed > free_bytes:
        raise UserError(f"{what} {size(needed)} and {size(free_bytes)} are free; make room")


def _unpack_zip(archive: Path, staged: Path) -> int:
    names, contents = _Names(archive), dict[str, tuple[int, int]]()  # of each name its checksum and size
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            name, guessed = _zip_name(member)
            if not _inside(name):
                raise _refuse(archive, member.orig_filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise Damaged(f"{archive}: {member.orig_filename!r} is a link, not a file; the archive is refused")
            names.garbled += [name] if guessed else []
            member.filename = name
        _check_room(staged, sum(member.file_size for member in members), f"{archive} unpacks to")
        for member in track(members, "unpacking", unit="files"):
            if _of_macos(member.filename):
                names.of_macos += not member.is_dir()
                continue
            if not member.is_dir():
                content = (member.CRC, member.file_size)
                names.add(member.filename, staged / member.filename, same=contents.get(member.filename) == content)
                contents[member.filename] = content
            file.extract(member, staged)
    names.print_notes()
    return len(contents)


def _unpack_tar(archive: Path, staged: Path) -> int:
    names, files = _Names(archive), set[str]()
    # A tar has no index, but images do not get smaller: what comes out is no less than what the archive takes.
    _check_room(staged, archive.stat().st_size, f"{archive} unpacks to at least")
    with tarfile.open(archive) as file, Progress("unpacking", unit="files") as bar:
        for member in file:  # one pass: a compressed tar has no index
            written_name, member.name = member.name, member.name.replace("\\", "/")
            if not _inside(member.name) and os.path.normpath(member.name) != ".":
                raise _refuse(archive, written_name)
            if _of_macos(member.name):
                names.of_macos += member.isfile()
                continue
            _check_room(staged, member.size, f"{archive}: {member.name} alone is")
            if member.isfile():
                names.add(member.name, staged / member.name)
                files.add(member.name)
            if member.islnk():
                member.linkname = member.linkname.replace("\\", "/")
            try:
                file.extract(member, staged, filter="data")
            except tarfile.SpecialFileError:
                message = f"{archive}: {written_name!r} is a pipe or a device, not a file; the archive is refused"
                raise Damaged(message) from None
            except tarfile.FilterError:
                raise _refuse(archive, written_name) from None
            bar.update()
    names.print_notes()
    return len(files)
