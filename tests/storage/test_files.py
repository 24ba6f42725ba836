"""Files and folders that are whole or absent, and the one line where the disk is full."""

import errno
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest

from src.config import UserError
from src.storage.files import (
    as_json,
    check_is_new,
    check_room,
    explain_full_disk,
    new_folder,
    numpy_bytes,
    remove_leftovers,
    size,
    write_flushed,
    write_whole,
)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_flushed(path, b"first")

    def fail(path: Path, content: bytes) -> None:
        path.write_bytes(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("src.storage.files.write_flushed", fail)
        with pytest.raises(OSError, match="space"):
            write_whole(path, b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"


def test_an_error_names_the_file_that_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:  # noqa: PT011
        write_flushed(tmp_path / "missing" / "a", b"")
    assert raised.value.filename == str(tmp_path / "missing" / "a")


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "x"
    with new_folder(folder) as staged:
        (staged / "a").write_text("first")
        assert not folder.exists()
    with pytest.raises(IsADirectoryError), new_folder(folder) as staged:
        write_flushed(staged, b"that is the folder")
    assert (folder / "a").read_text() == "first"
    (folder.parent / ".x.partial").mkdir()
    (folder.parent / ".x.partial" / "left by a kill").touch()
    with new_folder(folder) as staged:
        (staged / "c").write_text("second")
    assert [path.name for path in folder.iterdir()] == ["c"] and list(folder.parent.iterdir()) == [folder]


def test_only_a_new_or_an_empty_folder_is_new(tmp_path: Path) -> None:
    check_is_new(tmp_path / "none")
    check_is_new(tmp_path)
    (tmp_path / "a").touch()
    for path in (tmp_path, tmp_path / "a"):
        with pytest.raises(UserError, match="exists and is not empty"):
            check_is_new(path)


def test_a_full_disk_is_one_line_and_other_errors_stay() -> None:
    line = "the disk is full: x was not written, and y stays; make room and run the same command again"
    with pytest.raises(UserError, match=line), explain_full_disk(Path("x"), ", and y stays"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(PermissionError), explain_full_disk(Path("x")):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_json_is_indented_and_ends_with_a_newline() -> None:
    assert as_json({"a": [1]}) == b'{\n "a": [\n  1\n ]\n}\n'


def test_bytes_are_said_in_words_and_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    assert [size(count) for count in (9000, 2.5e6, 3e9)] == ["9.0 kB", "2.5 MB", "3.0 GB"]
    check_room(tmp_path / "is" / "made" / "later", 1, "this takes")
    with pytest.raises(UserError, match=r"this takes 1,000,000\.0 GB and .* are free; make room"):
        check_room(tmp_path, 10**15, "this takes")


def test_what_killed_writers_left_is_removed_an_hour_later_or_where_they_are_dead(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in ("old", "dead", "new")]
    for part in parts:
        part.touch()
    os.utime(parts[0], (time.time() - 4000,) * 2)
    remove_leftovers([*parts, tmp_path / "gone"], lambda part: part.name == "dead")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_arrays_in_memory_are_what_numpy_reads() -> None:
    one, two = np.arange(6).reshape(2, 3), np.ones(4, np.float32)
    assert np.array_equal(np.load(io.BytesIO(numpy_bytes(np.save, one))), one)
    with np.load(io.BytesIO(numpy_bytes(np.savez, save=one, file_2=two))) as arrays:
        assert sorted(arrays) == ["file_2", "save"] and np.array_equal(arrays["file_2"], two)
