"""Unpack a downloaded archive into a folder that is whole or absent, and that no name in the archive leaves."""

import lzma
import os
import re
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
from .files import check_is_new, check_room, new_folder, size

ENDINGS = (".tar.gz", ".tar.xz", ".tar.bz2", ".zip", ".tar", ".tgz", ".txz", ".tbz2")


# What reading a damaged archive raises: its index, its streams, links without a target, and zips with a password.
ERRORS = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, KeyError, RuntimeError)


class Damaged(UserError):
    """The archive itself is at fault, and has to be made or brought anew."""


def stem(archive: str) -> str | None:
    """`x` of `x.tar.gz`; None of what is no archive."""
    ending = next((ending for ending in ENDINGS if archive.lower().endswith(ending)), archive)
    return archive[: -len(ending)] or None


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


class _Names:
    """The names that were unpacked to the folder `staged`, and the notes about them."""

    def __init__(self, archive: Path, staged: Path) -> None:
        self._archive, self._staged = archive, staged
        self._known, self._contents = dict[str, str](), dict[str, object]()
        self._twice, self._alike, self.garbled, self._of_macos = list[str](), list[str](), list[str](), 0

    def refuse(self, name: str) -> Damaged:
        return Damaged(f"{self._archive}: the name {name!r} would leave the folder; the archive is refused")

    def check(self, name: str, written: str) -> None:
        """A UserError where `name`, `written` in another way, leaves the folder."""
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or re.match("[A-Za-z]:", name):
            raise self.refuse(written)

    def add(self, name: str, *, is_file: bool, content: object = None) -> bool:
        """Note a name, and say whether it is to be unpacked, as files that macOS put beside the others are not. Equal `content`
        under one name is the same. A UserError where the disk takes two names for one."""
        path = PurePosixPath(name)
        if "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store":
            self._of_macos += is_file
            return False
        if is_file:
            known = self._known.setdefault(unicodedata.normalize("NFC", path.as_posix()).casefold(), name)
            place = self._staged / name
            if known != name and place.exists() and not place.is_dir():
                raise Damaged(f"{self._archive}: {known!r} and {name!r} are one file on this disk; unpack it on another one")
            if known != name:
                self._alike.append(f"{known!r} and {name!r}")
            elif name in self._contents and (content is None or self._contents[name] != content):
                self._twice.append(repr(name))
            self._contents[name] = content
        return True

    def print_notes(self) -> int:
        """Print what a person should know; gives the number of files."""
        notes = [
            f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {what}"
            for names, what in (
                (self._twice, "in it more than once, with different contents: the last one was taken"),
                (self._alike, "names that look alike: they are kept apart, and folders of them are different classes"),
            )
            if names
        ]
        if self.garbled:
            notes.append(
                f"{len(self.garbled)} names, such as {self.garbled[0]!r}, do not say in which code page their letters are; if "
                "they read wrongly, unpack with unzip -O CODEPAGE (such as gbk, shift_jis, cp866)"
            )
        if self._of_macos:
            notes.append(f"{self._of_macos} files of macOS (__MACOSX, ._names) are left out")
        for note in notes:
            print(f"note: {self._archive}: {note}", file=sys.stderr)
        return len(self._contents)


def unpack(archive: Path, out: Path) -> int:
    """Unpack a zip or tar (gz, xz, bz2) archive into the new folder `out`; gives the number of files.

    A name or a link that would leave the folder, a damaged archive and a full disk are UserErrors, and nothing is left behind.
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
    except ERRORS as error:
        if isinstance(error, OSError) and error.errno in FULL:
            amount = size(archive.stat().st_size)
            raise UserError(f"{archive} ({amount}) was not unpacked: the disk is full; make room and try again") from None
        raise Damaged(f"{archive}: cannot be unpacked: {' '.join(str(error).split())}") from None


def _unpack_zip(archive: Path, staged: Path) -> int:
    names = _Names(archive, staged)
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            member.filename, guessed = _zip_name(member)
            names.check(member.filename, member.orig_filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise Damaged(f"{archive}: {member.orig_filename!r} is a link, not a file; the archive is refused")
            names.garbled += [member.filename] if guessed else []
        check_room(staged, sum(member.file_size for member in members), f"{archive} unpacks to")
        for member in track(members, "unpacking", unit="files"):
            if names.add(member.filename, is_file=not member.is_dir(), content=(member.CRC, member.file_size)):
                file.extract(member, staged)
    return names.print_notes()


def _unpack_tar(archive: Path, staged: Path) -> int:
    names = _Names(archive, staged)
    # A tar has no index, but images do not get smaller: what comes out is no less than what the archive takes.
    check_room(staged, archive.stat().st_size, f"{archive} unpacks to at least")
    with tarfile.open(archive) as file, Progress("unpacking", unit="files") as bar:
        for member in file:  # one pass: a compressed tar has no index
            written, member.name = member.name, member.name.replace("\\", "/")
            if os.path.normpath(member.name) != ".":
                names.check(member.name, written)
            if not names.add(member.name, is_file=member.isfile()):
                continue
            check_room(staged, member.size, f"{archive}: {member.name} alone is")
            if member.islnk():
                member.linkname = member.linkname.replace("\\", "/")
            try:
                file.extract(member, staged, filter="data")
            except tarfile.SpecialFileError:
                raise Damaged(f"{archive}: {written!r} is a pipe or a device, not a file; the archive is refused") from None
            except tarfile.FilterError:
                raise names.refuse(written) from None
            bar.update()
        while file.fileobj is not None and file.fileobj.read(1 << 20):
            pass  # the sum of what was unpacked is at the end of a gzip, and tarfile stops before it
    return names.print_notes()
