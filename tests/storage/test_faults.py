"""A server that cuts, corrupts and refuses, and a full disk: files are whole or absent."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.storage.buckets import Bucket, client, open_bucket, pull, push
from tests.storage.bucket_files import LARGE, mistake, random_bytes, tree, write
from tests.storage_server import StorageServer


@pytest.mark.parametrize("kind", [429, 503, "cut", "corrupt", "lost"])
def test_faults_of_a_push_are_overcome(server: StorageServer, bucket: Bucket, run: Path, kind: int | str) -> None:
    write(run, {"step_1/large": random_bytes(LARGE)})
    server.faults.add(kind, "(upload|start|chunk) .*(model|large|log)", times=4)
    push(bucket, run, "x")
    assert server.faults.met[kind] == 4 or (kind == "lost" and server.faults.met[kind] >= 3)
    assert server.objects() == {f"mine/x/{name}": content for name, content in tree(run).items()}


@pytest.mark.parametrize("kind", [429, 503, "cut", "corrupt"])
def test_faults_of_a_pull_are_overcome(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path, kind: int | str
) -> None:
    for name, content in (tree(run) | {"step_1/large": random_bytes(2_000_000)}).items():
        server.put(f"mine/x/{name}", content)
    server.faults.add(kind, "", times=5)
    server.faults.add("cut", "download .*large", times=12)  # it goes on where it was: each try brings half of the rest
    server.faults.add("corrupt", "download .*(model|large)", times=2)
    pull(bucket, "x", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(run) | {"step_1/large": random_bytes(2_000_000)}
    assert server.faults.met["corrupt"] >= 2 and server.faults.met["cut"] >= 12


def test_faults_by_chance(server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path) -> None:
    write(run, {f"images/{i}": random_bytes(3000, i) for i in range(40)})
    server.faults.seed = 1
    for kind in (429, 503, "cut", "lost", "corrupt"):
        server.faults.add(kind, "", times=1000, chance=0.06)
    push(bucket, run, "x")
    pull(bucket, "x", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(run) and sum(server.faults.met.values()) > 10


@pytest.mark.parametrize("kind", [503, "cut"])
def test_tries_end(server: StorageServer, bucket: Bucket, tmp_path: Path, kind: int | str) -> None:
    server.put("mine/x/a", b"")
    server.faults.add(kind, "download", times=99)
    if kind == "cut":
        server.put("mine/x/a", b"1")  # half of one byte is none
    message = mistake(pull, bucket, "x", tmp_path / "back")
    assert "gs://bucket/mine/x/a: no answer after 6 tries" in message and "run it again later" in message
    assert server.count("download") == 6 and not tree(tmp_path / "back")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(client, "FIRST_DELAY", 0.01)
    with open_bucket("gs://bucket") as bucket:
        message = mistake(pull, bucket, "a_folder_with_a_name_that_is_as_long_as_that_of_some_runs", tmp_path)
        assert "no answer after 6 tries" in message and "Connection refused" in message and "Max retries" not in message


def test_somebody_elses_write_stands(server: StorageServer, bucket: Bucket, run: Path) -> None:
    push(bucket, run, "x")
    listed = bucket.list("x")["log.txt"]
    server.put("mine/x/log.txt", b"theirs")
    for known in (listed, None):
        assert "somebody else has written it" in mistake(bucket.put, run / "log.txt", "x/log.txt", known)
    assert "not deleted" in mistake(bucket.delete, "x/log.txt", listed)
    assert server.objects()["mine/x/log.txt"] == b"theirs"
    server.put("mine/x/log.txt", (run / "log.txt").read_bytes())
    bucket.put(run / "log.txt", "x/log.txt", listed)  # they wrote the same
    server.faults.add("lost", "delete")
    bucket.delete("x/log.txt", bucket.list("x")["log.txt"])
    assert "mine/x/log.txt" not in server.objects()
    server.faults.add(412, "upload")
    assert "somebody else has written it" in mistake(bucket.put, run / "log.txt", "x/log.txt", None)


def test_a_disk_that_is_too_small_or_fills(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bucket, run, "x")
    back = tmp_path / "back"

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9000))
        server.forget()
        assert "back: what is to come takes 9.0 kB and 9.0 kB are free; make room" in mistake(pull, bucket, "x", back)
        assert server.count("download") == 0 and not back.exists()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "the disk is full: " in mistake(pull, bucket, "x", back) and not tree(back)
    pull(bucket, "x", back)
    assert tree(back) == tree(run)
