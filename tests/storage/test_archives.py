"""Archives as other systems make them: separators, code pages, names that meet or look alike, what macOS adds."""

import io
import os
import random
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest

from src.config import UserError
from src.storage.archives import stem, unpack
from tests.conftest import refused, run_in_process


def make(path: Path, *members: tuple[str, bytes], backslashes: bool = False) -> Path:
    """A zip with names as they are: zipfile would turn some of them."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.create_system = 0 if backslashes else 3
            file.writestr(info, content)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def as_bytes(path: Path, name: bytes, extra: bytes = b"") -> Path:
    """A zip of one file whose name is in some code page, and not marked as UTF-8."""
    content, crc = b"png", zlib.crc32(b"png")
    common = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, crc, 3, 3, len(name), len(extra))
    local = b"PK\3\4" + common + name + extra + content
    central = b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name + extra
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    path.write_bytes(local + central + end)
    return path


def test_separators_of_windows(tmp_path: Path) -> None:
    archive = make(tmp_path / "a.zip", ("cats\\a.png", b"1"), ("dogs\\", b""), ("dogs\\deep\\b.png", b"2"), ("c.png", b"3"))
    assert unpack(archive, tmp_path / "out") == 3
    assert names(tmp_path / "out") == ["c.png", "cats/a.png", "dogs/deep/b.png"]
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name in ("cats\\a.png", "dogs\\b.png"):
            member = tarfile.TarInfo(name)
            member.size = 1
            file.addfile(member, io.BytesIO(b"1"))
    assert unpack(tmp_path / "a.tar", tmp_path / "tar") == 2
    assert names(tmp_path / "tar") == ["cats/a.png", "dogs/b.png"]


@pytest.mark.parametrize(
    "evil",
    ["..\\out.png", "a\\..\\..\\out.png", "\\out.png", "C:\\out.png", "c:out.png", "\\\\server\\out.png", "a/..\\../out.png"],
)
def test_separators_of_windows_lead_nowhere(tmp_path: Path, evil: str) -> None:
    with pytest.raises(UserError, match="would leave the folder"):
        unpack(make(tmp_path / "a.zip", ("fine.png", b"1"), (evil, b"2")), tmp_path / "out")
    assert names(tmp_path) == ["a.zip"]


def test_a_colon_is_a_drive_only_behind_one_letter(tmp_path: Path) -> None:
    unpack(make(tmp_path / "a.zip", ("at 10:30.png", b"1")), tmp_path / "out")
    assert names(tmp_path / "out") == ["at 10:30.png"]


def test_utf_8_that_is_not_marked(tmp_path: Path) -> None:
    unpack(as_bytes(tmp_path / "a.zip", "café/ü.png".encode()), tmp_path / "utf8")
    assert names(tmp_path / "utf8") == ["café/ü.png"]
    unpack(as_bytes(tmp_path / "b.zip", "café/ü.png".encode("cp437")), tmp_path / "cp437")
    assert names(tmp_path / "cp437") == ["café/ü.png"]
    raw, encoded = "猫/ü.png".encode("gbk"), "猫/ü.png".encode()
    field = struct.pack("<HHBI", 0x7075, 5 + len(encoded), 1, zlib.crc32(raw)) + encoded
    unpack(as_bytes(tmp_path / "c.zip", raw, field), tmp_path / "field")
    assert names(tmp_path / "field") == ["猫/ü.png"]
    stale = struct.pack("<HHBI", 0x7075, 5 + len(encoded), 1, 1) + encoded
    unpack(as_bytes(tmp_path / "d.zip", b"plain\x81.png", stale), tmp_path / "stale")
    assert names(tmp_path / "stale") == ["plainü.png"]


def test_an_unmarked_name_that_leads_out_is_refused_however_it_is_read(tmp_path: Path) -> None:
    encoded = "../ü.png".encode()
    field = struct.pack("<HHBI", 0x7075, 5 + len(encoded), 1, zlib.crc32(b"\x81.png")) + encoded
    with pytest.raises(UserError, match="would leave the folder"):
        unpack(as_bytes(tmp_path / "a.zip", b"\x81.png", field), tmp_path / "out")


def test_what_macos_adds_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = ["cats/a.png", "__MACOSX/cats/._a.png", "cats/._a.png", "cats/.DS_Store", "__MACOSX/"]
    assert unpack(make(tmp_path / "a.zip", *((name, b"1") for name in members)), tmp_path / "out") == 1
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["a.png", "cats"]
    assert "3 files of macOS (__MACOSX, ._names) are left out" in capsys.readouterr().err
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as file:
        for name in members[:-1]:
            file.addfile(tarfile.TarInfo(name))
    assert unpack(tmp_path / "a.tar.gz", tmp_path / "tar") == 1


def test_names_that_stand_there_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = make(tmp_path / "a.zip", ("a.png", b"1"), ("a.png", b"2"), ("b.png", b"3"), ("b.png", b"3"))
    assert unpack(archive, tmp_path / "out") == 2 and (tmp_path / "out" / "a.png").read_bytes() == b"2"
    notes = capsys.readouterr().err
    assert "'a.png': in it more than once, with different contents: the last one was taken" in notes and "b.png" not in notes
    archive = make(tmp_path / "b.zip", ("cats\\a.png", b"1"), ("cats/a.png", b"2"))
    assert unpack(archive, tmp_path / "both") == 1 and "'cats/a.png': in it more than once" in capsys.readouterr().err


def test_names_that_look_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    pairs = [("Cats/a.png", "cats/a.png"), ("café/b.png", f"{decomposed}/b.png")]
    for i, pair in enumerate(pairs):
        assert unpack(make(tmp_path / f"{i}.zip", *((name, b"1") for name in pair)), tmp_path / f"{i}") == 2
        assert "names that look alike: they are kept apart" in capsys.readouterr().err
        assert len(os.listdir(tmp_path / f"{i}")) == 2


def test_a_disk_that_takes_two_names_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path, **members: real(path.with_name(path.name.lower()), **members))
    with pytest.raises(UserError, match=r"'a\.png' and 'A\.png' are one file on this disk"):
        unpack(make(tmp_path / "a.zip", ("a.png", b"1"), ("A.png", b"2")), tmp_path / "out")


def test_the_folder_of_an_archive(tmp_path: Path) -> None:
    assert [stem(name) for name in ("a.b.zip", "A.ZIP", "x.tar.gz", ".zip", "a.rar")] == ["a.b", "A", "x", None, None]
    archive = make(tmp_path / "my cats#1.v2.zip", ("a.png", b"1"))
    out = run_in_process("prepare_data.py", "unpack", archive).out
    assert names(tmp_path / "my cats#1.v2") == ["a.png"] and f"check '{tmp_path}/my cats#1.v2'" in out
    archive.rename(tmp_path / "archive")
    assert "give the folder with --out" in refused("prepare_data", "unpack", tmp_path / "archive")


def test_letters_of_an_unknown_code_page_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unpack(as_bytes(tmp_path / "a.zip", "кот/1.png".encode("cp866")), tmp_path / "out")
    assert "1 names, such as " in (note := capsys.readouterr().err) and "do not say in which code page" in note
    unpack(as_bytes(tmp_path / "b.zip", "кот/1.png".encode()), tmp_path / "utf8")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "link", "line"), [(tarfile.FIFOTYPE, "", "a pipe or a device"), (tarfile.LNKTYPE, "q.png", "cannot be unpacked")]
)
def test_members_of_a_tar_that_are_no_files(tmp_path: Path, kind: bytes, link: str, line: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        member = tarfile.TarInfo("z.png")
        member.type, member.linkname = kind, link
        file.addfile(member)
    with pytest.raises(UserError, match=line):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_link_in_a_zip_is_called_one(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("l")
    info.external_attr, info.create_system = 0o120777 << 16, 3
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "a.png")
    with pytest.raises(UserError, match="'l' is a link"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["zip", "zip_bzip2", "zip_lzma", "tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_a_damaged_archive_is_one_line_wherever_the_damage_is(tmp_path: Path, kind: str) -> None:
    """Each stream has errors of its own: those of zlib and lzma are no OSErrors."""
    rng, path, refused_ones = random.Random(0), tmp_path / "archive", 0
    contents = {f"{i}.bin": bytes(rng.randrange(256) if j % 3 else 65 for j in range(4000)) for i in range(3)}
    if kind.startswith("zip"):
        how = {"zip": zipfile.ZIP_DEFLATED, "zip_bzip2": zipfile.ZIP_BZIP2, "zip_lzma": zipfile.ZIP_LZMA}[kind]
        with zipfile.ZipFile(path, "w", how) as file:
            for name, content in contents.items():
                file.writestr(name, content)
    else:
        with tarfile.open(path, f"w:{kind.partition('.')[2]}") as file:  # pyright: ignore[reportArgumentType, reportCallIssue]
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    whole = path.read_bytes()
    for number in range(40):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        out, message = tmp_path / f"out{number}", ""
        try:
            unpack(path, out)
        except UserError as error:
            message, refused_ones = str(error), refused_ones + 1
        assert not message or (message.startswith(str(path)) and "\n" not in message and not out.exists())
        if not message and kind != "tar":  # a tar has sums of its headers alone
            assert {file.name: file.read_bytes() for file in out.iterdir()} == contents
    assert refused_ones >= (1 if kind == "tar" else 15)
