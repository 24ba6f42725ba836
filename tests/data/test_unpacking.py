"""Archives as users have them: links, names that lead out, damage, a full disk."""

import errno
import io
import shutil
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from src.config import UserError
from src.storage.archives import unpack
from tests.data.folders_of_images import folder_set
from tests.data.test_scan import jpeg


def make_zip(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, jpeg())
    return path


def make_tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for member in members:
            content = jpeg() if member.isfile() else b""
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def test_archives_are_unpacked(tmp_path: Path) -> None:
    assert unpack(make_zip(tmp_path / "a.zip", ["x/1.jpg", "x/2.jpg"]), tmp_path / "out") == 2
    assert unpack(make_tar(tmp_path / "a.tar.gz", tarfile.TarInfo("y/1.jpg")), tmp_path / "tar") == 1
    assert len(folder_set(tmp_path / "out")) == 2 and len(folder_set(tmp_path / "tar")) == 1
    with pytest.raises(UserError, match="not empty"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize("evil", ["../out.jpg", "/abs.jpg", "a/../../b.jpg", "C:\\x.jpg", "..\\x.jpg"])
def test_no_name_leaves_the_folder(tmp_path: Path, evil: str) -> None:
    for archive in (
        make_zip(tmp_path / "evil.zip", ["fine.jpg", evil]),
        make_tar(tmp_path / "evil.tar.gz", tarfile.TarInfo(evil)),
    ):
        with pytest.raises(UserError, match="would leave the folder"):
            unpack(archive, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar.gz", "evil.zip"], "nothing is left behind"


def test_links_and_damage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would leave"):
        unpack(make_tar(tmp_path / "link.tar.gz", link("inner", "/etc")), tmp_path / "out")
    whole = make_zip(tmp_path / "cut.zip", ["a.jpg", "b.jpg"]).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.tar.gz").write_bytes(make_tar(tmp_path / "b.tar.gz", tarfile.TarInfo("a.jpg")).read_bytes()[:-200])
    for name, message in [
        ("cut.zip", "neither"),
        ("cut.tar.gz", "cannot be unpacked|neither"),
        ("none.zip", "no such archive"),
    ]:
        with pytest.raises(UserError, match=message):
            unpack(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_disk_without_room_for_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Known before the first byte: of a zip to the byte, of a tar by its own size."""
    names, rng = [f"{i}.png" for i in range(20)], np.random.default_rng(0)
    path, free_bytes = tmp_path / f"a.{kind}", [3_000_000]
    with zipfile.ZipFile(path, "w") if kind == "zip" else tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as file:
        for name in names:
            content = rng.bytes(200_000)
            if isinstance(file, zipfile.ZipFile):
                file.writestr(name, content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes[0]))
    for each in (zipfile.ZipFile, tarfile.TarFile):
        monkeypatch.setattr(each, "extract", lambda *_, **__: pytest.fail("a byte was written"))
    with pytest.raises(UserError, match=r"a\.\S+ unpacks to (at least )?4\.\d MB and 3\.0 MB are free; make room$"):
        unpack(path, tmp_path / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    free_bytes[0] = 10**9
    for each in (zipfile.ZipFile, tarfile.TarFile):
        monkeypatch.setattr(each, "extract", full)
    with pytest.raises(UserError, match=r"MB\) was not unpacked: the disk is full; make room and try again$"):
        unpack(path, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
