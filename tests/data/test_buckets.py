"""Buckets, against a server that cuts, corrupts and refuses: files are whole or absent, and only what differs moves."""

import errno
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import google.auth
import pytest
from google.auth.exceptions import DefaultCredentialsError

from src.config import UserError
from src.storage import buckets
from src.storage.buckets import Bucket, Moved, open_bucket, pull, push, status
from tests.conftest import ROOT, Finished, command, environment, launch, one_line
from tests.storage import StorageServer

LARGE = 20_000_000  # bytes: two chunks of an upload
MANIFEST = "step_1/MANIFEST.json"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageServer]:
    with StorageServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setattr(buckets, "FIRST_DELAY", 0.01)
        monkeypatch.setattr(buckets, "LAST_DELAY", 0.05)
        yield server


@pytest.fixture
def bucket(server: StorageServer) -> Iterator[Bucket]:
    with open_bucket("gs://bucket/mine") as bucket:
        yield bucket


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def drawn(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def small() -> dict[str, bytes]:
    return {"log.txt": b"step 1\n", "empty": b"", "a b/ü?#%.txt": b"x", "step_1/model": drawn(9000), MANIFEST: b"{}"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "run", small())


def mistake(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------- what moves


def test_there_and_back_is_the_same_and_only_what_differs_moves(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path
) -> None:
    server.page = 2  # a listing of six files is three answers
    write(run, {"step_1/large": drawn(LARGE)})
    total = sum(map(len, tree(run).values()))
    assert push(bucket, run, "runs/x") == Moved(6, total, 0, 0)
    assert server.objects() == {f"mine/runs/x/{name}": content for name, content in tree(run).items()}
    assert server.count("list") == 1 and server.count("chunk") == 2 and server.count("about", "download", "delete") == 0

    back = tmp_path / "back" / "deep"
    assert pull(bucket, "runs/x", back) == Moved(6, total, 0, 0)
    assert tree(back) == tree(run)

    server.forget()
    assert push(bucket, run, "runs/x") == Moved(0, 0, 6, 0) == pull(bucket, "runs/x", back)
    assert server.count() == server.count("list") == 6

    (run / "log.txt").write_bytes(b"step 2\n")  # the same size
    (run / "empty").write_bytes(b"no more")
    server.forget()
    assert status(bucket, "runs/x", run) == ([], [], ["empty", "log.txt"], 4)
    assert push(bucket, run, "runs/x") == Moved(2, 14, 4, 0) == pull(bucket, "runs/x", back)
    assert server.count("upload", "start") == server.count("download") == 2
    assert tree(back) == tree(run)


def test_nothing_is_deleted_unasked_and_manifests_go_first(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path
) -> None:
    push(bucket, run, "x")
    back = tmp_path / "back"
    pull(bucket, "x", back)
    shutil.rmtree(run / "step_1")
    assert push(bucket, run, "x").deleted == 0 and len(server.objects()) == 5
    server.forget()
    assert push(bucket, run, "x", delete=True, dry_run=True) == Moved(0, 0, 3, 2) and server.count("delete") == 0
    assert push(bucket, run, "x", delete=True) == Moved(0, 0, 3, 2) and len(server.objects()) == 3
    assert [name for operation, name in server.requests if operation == "delete"] == [
        "mine/x/step_1/MANIFEST.json",
        "mine/x/step_1/model",
    ]
    assert pull(bucket, "x", back).deleted == 0 and (back / MANIFEST).exists()
    assert pull(bucket, "x", back, delete=True) == Moved(0, 0, 3, 2)
    assert tree(back) == tree(run) and not (back / "step_1").exists(), "nor is an empty folder left"


def test_a_dry_run_moves_nothing(server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path) -> None:
    assert push(bucket, run, "x", dry_run=True) == Moved(5, 9010, 0, 0) and not server.objects()
    push(bucket, run, "x")
    server.forget()
    assert pull(bucket, "x", tmp_path / "back", dry_run=True) == Moved(5, 9010, 0, 0)
    assert server.count() == server.count("list") == 1 and not (tmp_path / "back").exists()


def test_what_is_only_of_a_live_process_stays(server: StorageServer, bucket: Bucket, run: Path) -> None:
    names = (".lock", ".log.txt.part", ".step_2.partial/model", ".step_0.old/MANIFEST.json", "x.partial/y/z", "a.swp", "b~")
    write(run, dict.fromkeys((*names, "__pycache__/c.pyc"), b"?"))
    assert push(bucket, run, "x").files == 5
    server.put("mine/x/.log.txt.part", b"of another")
    assert pull(bucket, "x", run, delete=True) == Moved(0, 0, 5, 0) == push(bucket, run, "x", delete=True)
    assert (run / ".lock").exists() and "mine/x/.log.txt.part" in server.objects()


def test_manifests_go_last_and_not_where_a_file_failed(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path
) -> None:
    write(run, {"a/manifest.json": b"{}", "z": b"z"})
    server.faults.add(400, "upload .*step_1/model", times=99)
    assert "not taken 6 times" in mistake(push, bucket, run, "x")
    assert not any("anifest" in name.lower() for name in server.objects())
    server.faults.waiting.clear()
    push(bucket, run, "x")
    assert {name for _, name in server.requests[-2:]} == {"mine/x/a/manifest.json", "mine/x/step_1/MANIFEST.json"}
    back = tmp_path / "back"
    server.faults.add("corrupt", "download .*step_1/model", times=99)
    assert "came damaged 6 times" in mistake(pull, bucket, "x", back)
    found = tree(back)
    assert "step_1/model" not in found and not any("anifest" in name.lower() for name in found)
    assert not any(name.endswith(".part") for name in found)
    server.faults.waiting.clear()
    pull(bucket, "x", back)
    assert tree(back) == tree(run)


def test_an_old_manifest_never_promises_new_files(server: StorageServer, bucket: Bucket, run: Path) -> None:
    push(bucket, run, "x")
    write(run, {"step_1/model": drawn(9000, seed=1), "log.txt": b"step 2\n"})
    server.faults.add(400, "upload .*step_1/model", times=99)
    assert "not taken 6 times" in mistake(push, bucket, run, "x")
    assert f"mine/x/{MANIFEST}" not in server.objects() and "mine/x/step_1/model" in server.objects()
    server.faults.waiting.clear()
    push(bucket, run, "x")
    write(run, {"step_1/model": drawn(9000)})
    assert push(bucket, run, "x").files == 2, "the same manifest goes anew, too"
    assert server.objects() == {f"mine/x/{name}": content for name, content in tree(run).items()}
    (run / "step_1" / "more").write_bytes(b"which no manifest promised")
    assert push(bucket, run, "x").files == 1


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_manifest_waits_where_its_folder_changes_meanwhile(
    bucket: Bucket, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    put = Bucket.put

    def put_and_change(self: Bucket, path: Path, *more: Any) -> None:
        put(self, path, *more)
        if path.name == "log.txt":
            with open(path, "ab") as file:
                file.write(b"step 2\n")
            if change == "removed":
                (run / "step_1" / "model").unlink()
            else:
                (run / "new").write_bytes(drawn(9000, seed=1))
                (run / "new").replace(run / "step_1" / "model")

    monkeypatch.setattr(Bucket, "put", put_and_change)
    push(bucket, run, "x", jobs=1, last=lambda name: name.endswith(("MANIFEST.json", "empty")))
    assert "MANIFEST.json: its folder changed meanwhile" in capsys.readouterr().err
    monkeypatch.setattr(Bucket, "put", put)
    assert "step_1/MANIFEST.json" in status(bucket, "x", run).here
    push(bucket, run, "x")
    assert not status(bucket, "x", run).here + status(bucket, "x", run).different


@pytest.mark.parametrize("change", ["grows", "is rewritten", "shrinks", "never rests"])
def test_a_file_that_changes_while_it_is_pushed(
    server: StorageServer, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before, hashed, path = drawn(LARGE // 20), buckets._crc32c, tmp_path / "log"
    path.write_bytes(before)
    changes = iter(range(99 if change == "never rests" else 1))

    def hash_and_change(file: Any, size: int) -> str:
        found = hashed(file, size)
        if (seed := next(changes, None)) is not None:
            with open(path, "ab" if change == "grows" else "wb") as log:
                log.write(drawn(100 if change == "shrinks" else len(before), seed + 1))
        return found

    monkeypatch.setattr(buckets, "_crc32c", hash_and_change)
    if change == "never rests":
        assert "is it rewritten all the time?" in mistake(bucket.put, path, "log", None)
    else:
        bucket.put(path, "log", None)
        assert server.objects()["mine/log"] == (before if change == "grows" else path.read_bytes())


def test_a_log_that_is_pushed_again_while_it_is_pulled(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path
) -> None:
    push(bucket, run, "x")
    listed, get = bucket.list("x"), bucket.get
    server.put("mine/x/log.txt", b"step 1\nstep 2\n")
    assert "was overwritten or deleted since" in mistake(get, "x/log.txt", listed["log.txt"], tmp_path / "log.txt")
    bucket.list = lambda under: listed
    pull(bucket, "x", tmp_path / "back")
    assert (tmp_path / "back" / "log.txt").read_bytes() == b"step 1\nstep 2\n"
    server.put("mine/x/step_1/MANIFEST.json", b"{1}")  # but a new manifest may promise other files
    assert "was overwritten or deleted since" in mistake(pull, bucket, "x", tmp_path / "again")


# ---------------------------------------------------------------------------------------------- what goes wrong on the way


@pytest.mark.parametrize("kind", [429, 503, "cut", "corrupt", "lost"])
def test_faults_of_a_push_are_overcome(server: StorageServer, bucket: Bucket, run: Path, kind: int | str) -> None:
    write(run, {"step_1/large": drawn(LARGE)})
    server.faults.add(kind, "(upload|start|chunk) .*(model|large|log)", times=4)
    push(bucket, run, "x")
    assert server.faults.met[kind] == 4 or (kind == "lost" and server.faults.met[kind] >= 3)
    assert server.objects() == {f"mine/x/{name}": content for name, content in tree(run).items()}


@pytest.mark.parametrize("kind", [429, 503, "cut", "corrupt"])
def test_faults_of_a_pull_are_overcome(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path, kind: int | str
) -> None:
    for name, content in (tree(run) | {"step_1/large": drawn(2_000_000)}).items():
        server.put(f"mine/x/{name}", content)
    server.faults.add(kind, "", times=5)
    server.faults.add("cut", "download .*large", times=12)  # it goes on where it was: each try brings half of the rest
    server.faults.add("corrupt", "download .*(model|large)", times=2)
    pull(bucket, "x", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(run) | {"step_1/large": drawn(2_000_000)}
    assert server.faults.met["corrupt"] >= 2 and server.faults.met["cut"] >= 12


def test_faults_by_chance(server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path) -> None:
    write(run, {f"pictures/{i}": drawn(3000, i) for i in range(40)})
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
    said = mistake(pull, bucket, "x", tmp_path / "back")
    assert "gs://bucket/mine/x/a: no answer after 6 tries" in said and "run it again later" in said
    assert server.count("download") == 6 and not tree(tmp_path / "back")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(buckets, "FIRST_DELAY", 0.01)
    with open_bucket("gs://bucket") as bucket:
        said = mistake(pull, bucket, "a_folder_with_a_name_that_is_as_long_as_that_of_some_runs", tmp_path)
        assert "no answer after 6 tries" in said and "Connection refused" in said and "Max retries" not in said


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

    class Usage(NamedTuple):
        free: int = 9000

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage())
        server.forget()
        assert "9.0 kB are to come and 9.0 kB are free" in mistake(pull, bucket, "x", back)
        assert server.count("download") == 0 and not back.exists()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "the disk is full: " in mistake(pull, bucket, "x", back) and not tree(back)
    pull(bucket, "x", back)
    assert tree(back) == tree(run)


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/a", "a//b", "a\\b", "C:/a", "c:a", "./a", "..", "a/\x01", "\x00"])
def test_names_that_would_leave_the_folder(server: StorageServer, bucket: Bucket, tmp_path: Path, name: str) -> None:
    server.put("mine/x/good", b"good")
    server.put(f"mine/x/{name}", b"bad")
    for call in (pull, status):
        assert repr(name) in mistake(call, *((bucket, "x", tmp_path / "x")))
    assert [path.name for path in tmp_path.iterdir()] == []


def test_links_that_lead_out_and_names_that_clash(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("mine/x/way/a", b"a")
    (tmp_path / "away").mkdir()
    (run / "way").symlink_to(tmp_path / "away")
    server.put("mine/x/beside", b"b")
    assert "is a link that leads out" in mistake(push, bucket, run, "x")
    assert pull(bucket, "x", run).files == 1 and "is a link that leads out" in capsys.readouterr().err
    assert not tree(tmp_path / "away") and (run / "beside").read_bytes() == b"b"
    (run / "way").unlink()
    (run / "way").symlink_to(tmp_path / "nowhere")  # a link to nothing is no folder, and none is made behind it
    with pytest.raises(OSError, match="exists"):
        pull(bucket, "x", run)
    assert not (tmp_path / "nowhere").exists()
    server.put("mine/y/a/", b"")  # the console's folder
    server.put("mine/y/a/b", b"")
    assert pull(bucket, "y", tmp_path / "y").files == 1
    server.put("mine/y/a", b"")
    assert "would be a file and a folder" in mistake(pull, bucket, "y", tmp_path / "new")
    assert "would be a file and a folder" in mistake(pull, bucket, "y", tmp_path / "y")
    write(tmp_path / "bad", {"a\\b": b""})
    assert "rename it" in mistake(push, bucket, tmp_path / "bad", "bad")


@pytest.mark.parametrize(
    "url", ["bucket", "gs://", "gs://B", "gs://a", "s3://bucket", "gs://buck et", "gs://bucket/../x", "gs://-bad-"]
)
def test_urls_that_are_none(url: str) -> None:
    assert url in mistake(open_bucket, url)


def test_what_is_wrong_with_a_url_is_said() -> None:
    for url in ("gs://Bucket", "gs://b2"):
        assert "a NAME is of lower-case letters, digits" in mistake(open_bucket, url)
    assert mistake(open_bucket, "gs://bucket/../x").startswith("'gs://bucket/../x': '../x' is no folder in the bucket; write")


def test_buckets_and_places_that_are_none(server: StorageServer, bucket: Bucket, tmp_path: Path) -> None:
    assert "gs://bucket/mine/runs/x/ has no files" in mistake(pull, bucket, "runs/x", tmp_path)
    assert "there is no such folder" in mistake(push, bucket, tmp_path / "none", "x")
    server.put("mine/x/a", b"")
    (tmp_path / "empty").mkdir()
    assert "has no files to push" in mistake(push, bucket, tmp_path / "empty", "x", delete=True)
    assert status(bucket, "x", tmp_path / "none") == ([], ["a"], [], 0)
    for url in ("gs://nobodys", "gs://nobodys/x"):
        with open_bucket(url) as other:
            assert "there is no such bucket" in mistake(other.list, "x")
    for closed, otherwise in ((server.forbidden, "may not use it"), (server.private, "are not valid")):
        closed.add("bucket")
        said = mistake(bucket.list, "x")
        assert "there are no credentials" in said and "gcloud auth application-default login" in said
        bucket.anonymous = False
        assert otherwise in mistake(bucket.list, "x")
        bucket.anonymous = True
        closed.clear()


def test_a_key_file_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    write(tmp_path, {"bad.json": b"nonsense", "part.json": b'{"type": "service_account"}', "folder/a": b""})
    for name, why in (("bad", "Expecting value"), ("part", "missing fields"), ("folder", "Is a directory")):
        path = tmp_path / (f"{name}.json" if name != "folder" else name)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
        said = mistake(open_bucket, "gs://bucket")
        assert why in said and str(path) in said and "('" not in said and "Error" not in said, said


def test_without_credentials_a_bucket_is_read_as_anybody_may(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> None:
        raise DefaultCredentialsError("File nothing.json was not found.")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setattr(google.auth, "default", none)
    with open_bucket("gs://bucket/a/b/") as bucket:
        assert bucket.anonymous and bucket.url == "gs://bucket/a/b"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "nothing.json")
    assert "GOOGLE_APPLICATION_CREDENTIALS: File nothing.json was not found" in mistake(open_bucket, "gs://bucket")


# ---------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def project(server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATELIER_BUCKET", "gs://bucket")
    return tmp_path


def call(line: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["buckets", *line.split()])
        return buckets.main()


def test_runs_travel_under_their_names(server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(project / "runs" / "x", small())
    call("push runs/x --dry-run")
    assert "runs/x: would push 5 files, 0.0 MB; 0 are the same" in capsys.readouterr().out and not server.objects()
    call("push x")
    assert set(server.objects()) == {f"runs/x/{name}" for name in small()}
    shutil.rmtree(project / "runs")
    call("pull x")
    assert tree(project / "runs" / "x") == small()
    (project / "runs" / "x" / "log.txt").unlink()
    (project / "runs" / "y").mkdir()
    server.put("datasets/d.zip", b"")
    capsys.readouterr()
    call("status")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["same", "only", "here", "only", "there", "different"]
    assert ["runs/x", "4", "0", "1", "0"] in lines and ["runs/y", "0", "0", "0", "0"] in lines
    assert ["datasets", "0", "0", "1", "0"] in lines and ["checkpoints", "0", "0", "0", "0"] in lines
    call("status x")
    assert "only there  runs/x/log.txt" in capsys.readouterr().out


def test_caches_of_a_run_are_neither_moved_nor_counted(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project / "runs" / "x", small() | {"latents/block_00000.npy": b"large", "pairs/shard.npy": b"large"})
    write(project / "runs" / "pairs", {"log.txt": b"a run of that name"})
    server.put("runs/x/latents/block_00001.npy", b"of before")
    call("push x --delete")
    call("push runs/pairs")
    assert {name for name in server.objects() if name.endswith(".npy")} == {"runs/x/latents/block_00001.npy"}
    for line in ("status", "status x"):
        call(line)
        assert ["runs/x", "5", "0", "0", "0"] in [row.split() for row in capsys.readouterr().out.splitlines()]
    call("status runs")
    assert capsys.readouterr().out.splitlines()[1].split() == ["runs", "6", "0", "0", "0"]
    call("pull x --delete")
    assert (project / "runs" / "x" / "latents" / "block_00000.npy").exists()
    call("push runs/x/latents")  # asked for by its name
    assert "runs/x/latents/block_00000.npy" in server.objects()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("push ../x", "leaves the project folder"),
        ("pull /x", "leaves the project folder"),
        ("push .", "leaves the project folder"),
        ("push", "needs a PLACE"),
        ("bring x", "takes no PLACE"),
        ("bring --delete", "--delete is for push and pull"),
        ("push runs/x", "there is no such folder"),
        ("pull x", "gs://bucket/runs/x/ has no files"),
        ("pull x --bucket bucket", "gs://NAME"),
        ("status runs/nope", "runs/nope is neither here nor in gs://bucket; is the name right?"),
    ],
)
def test_mistakes_on_the_command_line(project: Path, line: str, said: str) -> None:
    assert said in mistake(call, line)


def test_a_misspelt_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("psuh x")
    assert capsys.readouterr().err.startswith("usage: ./setup.sh ")


def test_no_bucket_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATELIER_BUCKET", raising=False)
    assert "set ATELIER_BUCKET" in mistake(call, "status")


def zipped(contents: dict[str, bytes]) -> bytes:
    with io.BytesIO() as held:
        with zipfile.ZipFile(held, "w") as file:
            for name, content in contents.items():
                file.writestr(name, content)
        return held.getvalue()


def test_data_sets_are_brought_and_unpacked_once(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with io.BytesIO() as held:
        with tarfile.open(fileobj=held, mode="w:gz") as file:
            for name in ("birds/1.png", "birds/2.png"):
                member = tarfile.TarInfo(name)
                member.size = 3
                file.addfile(member, io.BytesIO(b"png"))
        server.put("datasets/birds.tar.gz", held.getvalue())
    server.put("datasets/cats.zip", zipped({"1.png": b"png", "cats/2.png": b"png"}))
    server.put("datasets/mine.zip", zipped({"1.png": b"png"}))
    write(project / "datasets" / "mine", {"0.png": b"png"})
    call("bring --dry-run")
    assert "datasets: would pull 3 files" in capsys.readouterr().out and not list(project.glob("datasets/*.zip"))
    call("bring")
    out = capsys.readouterr().out
    assert "checkpoints: the bucket has none" in out and "unpacked 2 files into datasets/birds" in out
    assert "datasets/mine is here already and not from mine.zip: left as it is" in out
    assert set(tree(project / "datasets" / "birds")) == {"1.png", "2.png"}
    assert set(tree(project / "datasets" / "cats")) == {"1.png", "cats/2.png"}
    assert set(tree(project / "datasets" / "mine")) == {"0.png"}

    server.forget()
    server.put("datasets/cats.zip", zipped({"3.png": b"png"}))
    server.put("checkpoints/big.pt", b"weights")
    (project / "datasets" / "cats" / "1.png").unlink()
    call("bring")
    out = capsys.readouterr().out
    assert "datasets/cats.zip has changed since datasets/cats was unpacked: left as it is" in out and "birds" not in out
    assert set(tree(project / "datasets" / "cats")) == {"cats/2.png"}
    assert server.count("download") == 2 and (project / "checkpoints" / "big.pt").read_bytes() == b"weights"
    call("push datasets")  # what was unpacked stays here
    assert not any(name.startswith(("datasets/birds/", "datasets/.")) for name in server.objects())
    server.remove("datasets/mine/0.png")
    call("pull datasets --delete")
    assert (project / "datasets" / "birds" / "1.png").exists() and not (project / "datasets" / "mine").exists()


def test_the_only_copy_of_an_archive_that_was_unpacked_here_is_not_deleted(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zipped({"1.png": b"png"})
    server.put("datasets/hats.zip", archive)
    server.put("datasets/old.zip", archive)
    call("bring")
    (project / "datasets" / "hats.zip").unlink()
    (project / "datasets" / "old.zip").unlink()
    shutil.rmtree(project / "datasets" / "old")  # nothing is left here of that one
    capsys.readouterr()
    for line in ("push datasets --delete --dry-run", "push datasets --delete"):
        call(line)
        out = capsys.readouterr().out
        assert (
            "datasets/hats.zip is not here any more, datasets/hats was unpacked from it: a push leaves it in the bucket" in out
        )
        assert out.count("\n") == 2 and "push 1 files" in out and ": 1\n" in out, out
    assert server.objects() == {"datasets/hats.zip": archive, "datasets/hats/1.png": b"png"}
    server.remove("datasets/hats/1.png")
    call("pull datasets --delete")  # nor is what was unpacked
    assert (project / "datasets" / "hats" / "1.png").exists() and (project / "datasets" / "hats.zip").exists()


def test_changes_in_what_was_unpacked_are_told(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("datasets/hats.zip", zipped({"hats/1.png": b"png", "hats/2.png": b"png"}))
    call("bring")
    write(project / "datasets" / "hats", {".DS_Store": b"junk"})
    call("push datasets")
    assert "has changed" not in capsys.readouterr().out
    write(project / "datasets" / "hats", {"2.png": b"another"})
    for line in ("status", "status datasets", "push datasets --dry-run", "push datasets"):
        call(line)
        told = (
            "datasets/hats was unpacked from hats.zip and has changed: push datasets leaves it out, push datasets/hats sends it"
        )
        assert capsys.readouterr().out.splitlines().count(told) == 1
    assert set(server.objects()) == {"datasets/hats.zip"}
    call("push datasets/hats")
    assert server.objects()["datasets/hats/2.png"] == b"another"
    marker = project / "datasets" / ".hats.zip.unpacked"
    marker.write_text("{" + ", ".join(marker.read_text()[1:-1].split(", ")[:2]) + "}")  # of before it was noted
    capsys.readouterr()
    call("bring")
    call("push datasets")
    assert "changed" not in capsys.readouterr().out


def test_an_archive_that_leads_out_is_refused(server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with io.BytesIO() as held:
        with tarfile.open(fileobj=held, mode="w") as file:
            member = tarfile.TarInfo("out")
            member.type, member.linkname = tarfile.SYMTYPE, "../../.."
            file.addfile(member)
        server.put("datasets/bad.tar", held.getvalue())
    assert call("bring") == 2 and "would leave the folder" in capsys.readouterr().err
    assert [path.name for path in (project / "datasets").iterdir()] == ["bad.tar"]


def test_a_damaged_archive_does_not_keep_back_the_others(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = zipped({"1.png": drawn(9000)})
    for name in ("cats", "emus"):
        server.put(f"datasets/{name}.zip", whole)
    server.put("datasets/ants.tar", b"nonsense")
    server.put("datasets/dogs.zip", whole[:4000] + b"?" + whole[4001:])
    assert call("bring") == 2
    told = capsys.readouterr()
    anew = "; push it anew from where it is whole, or remove it, here and in the bucket"
    lines = told.err.splitlines()
    assert [line.split(":")[1] for line in lines] == [" datasets/ants.tar", " datasets/dogs.zip"], told
    assert all(line.startswith("error: ") and line.endswith(anew) for line in lines)
    assert "into datasets/cats\n" in told.out and "into datasets/emus\n" in told.out
    assert not list(project.glob("datasets/.*partial"))
    (project / "datasets" / "ants.tar").unlink()
    (project / "datasets" / "dogs.zip").write_bytes(whole)
    server.remove("datasets/ants.tar")
    call("push datasets")
    assert call("bring") == 0 and len(tree(project / "datasets" / "dogs")) == 1


def test_what_is_left_out_is_said(server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = ["cars.old/1.png", "yard.lock", "a.trial/1.png", "50%.png", "a#b?.png", "with space/[1].png", ".hidden/1.png"]
    left = ["half.partial/1.png", "b~", "notes.swp", "cars.old/.DS_Store"]
    write(project / "datasets" / "mine", dict.fromkeys([*odd, *left, ".x.lock", ".y.part"], b"png"))
    (project / "datasets" / "mine" / "away").symlink_to(project / "nowhere")
    (project / "datasets" / "mine" / "same").symlink_to(project / "datasets" / "mine" / "cars.old")
    os.mkfifo(project / "datasets" / "mine" / "pipe")
    call("push datasets/mine")
    assert set(server.objects()) == {f"datasets/mine/{name}" for name in odd}
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("datasets/mine: left out: ") and " and 2 more; to move it, name its folder" in line
    assert "half.partial/" in line and ".lock" not in line.replace("yard.lock", "") and ".part," not in line
    call("status datasets/mine")
    told = capsys.readouterr()
    assert ["datasets/mine", "7", "0", "0", "0"] in [row.split() for row in told.out.splitlines()] and "left out: " in told.err
    call("push datasets/mine/half.partial")
    assert "datasets/mine/half.partial/1.png" in server.objects()
    shutil.rmtree(project / "datasets")
    capsys.readouterr()
    call("pull datasets/mine")
    assert set(tree(project / "datasets" / "mine")) == set(odd)
    assert "datasets/mine: left out: half.partial/1.png; to move it" in capsys.readouterr().err


def test_the_caches_of_a_run_are_said_to_stay(server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(project / "runs" / "x", small() | {"latents/block.npy": b"large", ".lock": b""})
    call("push x")
    assert "runs/x: left out: latents/; to move it, name its folder as the place" in capsys.readouterr().err


def test_an_unpacked_file_that_is_overwritten_by_one_of_the_same_size(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("datasets/hats.zip", zipped({"hats/1.png": b"png"}))
    call("bring")
    call("push datasets")
    assert "has changed" not in capsys.readouterr().out
    path = project / "datasets" / "hats" / "1.png"
    path.write_bytes(b"gnp")
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    call("push datasets")
    assert "datasets/hats was unpacked from hats.zip and has changed" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- processes


def buckets_process(line: str, project: Path, url: str) -> Finished:
    return launch("-m", "src.storage.buckets", *line.split(), cwd=project, STORAGE_EMULATOR_HOST=url, PYTHONPATH=str(ROOT))


def test_a_mistake_is_one_line_and_status_2(server: StorageServer, tmp_path: Path) -> None:
    server.forbidden.add("bucket")
    assert "there are no credentials" in one_line(buckets_process("pull x --bucket gs://bucket", tmp_path, server.url))


def test_the_server_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "kept" / "shelf").mkdir(parents=True)
    write(tmp_path / "runs" / "x", small())
    words = command(1, "-m", "tests.storage", "0", tmp_path / "kept")
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        done = buckets_process("push x --bucket gs://shelf", tmp_path, process.stdout.readline().strip())
        process.kill()
    assert done.status == 0 and "push 5 files" in done.out and not done.err, done.all
    assert len(list((tmp_path / "kept" / "shelf").iterdir())) == 5


def kill_often(server: StorageServer, tmp_path: Path, way: str, kills: int) -> None:
    """Kill a slow sync again and again: each file is whole or absent, and the run after it moves the others alone."""
    rng = random.Random(kills)
    files = {f"runs/x/{i % 3}/{i}": drawn(60_000, i) for i in range(kills * 16)} | {"runs/x/0/MANIFEST.json": b"{}"}
    for name, content in files.items():
        if way == "pull":
            server.put(name, content)
        else:
            write(tmp_path, {name: content})
    operation = "download" if way == "pull" else "upload"

    def arrived() -> dict[str, bytes]:
        if way == "push":
            return server.objects()
        return {name: content for name, content in tree(tmp_path).items() if not name.endswith((".part", ".lock"))}

    server.rate = 100_000  # 0.6 s for a file
    line = ["-m", "src.storage.buckets", way, "x", "--bucket", "gs://bucket"]
    extra = environment(STORAGE_EMULATOR_HOST=server.url, PYTHONPATH=str(ROOT))
    for _ in range(kills):
        server.forget()
        process = subprocess.Popen(command(1, *line), cwd=tmp_path, env=extra, stderr=subprocess.DEVNULL)
        wanted = rng.randint(1, 9)
        while server.count(operation) < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        assert process.poll() is None, "it came to its end before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.settle()  # it may be storing what it has
        assert arrived().items() <= files.items() and "runs/x/0/MANIFEST.json" not in arrived()
    before, server.rate = len(arrived()), float("inf")
    assert before > 0
    server.forget()
    done = buckets_process(" ".join(line[2:]), tmp_path, server.url)
    assert done.status == 0 and f"{way} {len(files) - before} files" in done.out and f"; {before} are the same" in done.out
    assert server.count(operation) == len(files) - before and arrived() == files
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("way", ["pull", "push"])
def test_three_kills(server: StorageServer, tmp_path: Path, way: str) -> None:
    kill_often(server, tmp_path, way, 3)


@pytest.mark.soak
@pytest.mark.parametrize("way", ["pull", "push"])
def test_twenty_kills(server: StorageServer, tmp_path: Path, way: str) -> None:
    kill_often(server, tmp_path, way, 20)


def test_two_syncs_of_one_folder_at_once_wait_for_each_other(server: StorageServer, project: Path) -> None:
    """As of jobs on one disk that start together; what a killed one left is swept, what a live one writes is not."""
    for i in range(6):
        server.put(f"datasets/{i}", drawn(40_000, i))
    server.put("datasets/cats.zip", zipped({f"{i}.png": drawn(2000, i) for i in range(50)}))
    (project / "datasets").mkdir()
    host = socket.gethostname()
    left = [project / "datasets" / f".bring-{host}-{pid}-1.part" for pid in (2**22 + 1, os.getpid())]
    for part in left:
        part.write_bytes(b"half")
    server.rate = 200_000
    words, extra = command(1, "-m", "src.storage.buckets", "bring"), environment(PYTHONPATH=str(ROOT))
    both = [
        subprocess.Popen(words, cwd=project, env=extra, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0] * 3, said
    assert sorted("pull 7 files" in out for out, _ in said) == [False, False, True], said
    assert server.count("download") == 7 and sum("unpacked 50 files" in out for out, _ in said) == 1
    assert len(tree(project / "datasets" / "cats")) == 50 and [part.exists() for part in left] == [False, True]


def test_a_lock_goes_with_a_folder_that_never_came(tmp_path: Path) -> None:
    lock, waiting = tmp_path / ".x.bring.lock", tmp_path / "waiting"
    code = "from pathlib import Path; from src.storage.buckets import alone; import sys; Path('waiting').touch()\n"
    code += "with alone(Path('x')): print(Path('.x.bring.lock').exists())"
    words, extra = command(1, "-c", code), environment(PYTHONPATH=str(ROOT))
    with buckets.alone(tmp_path / "x"):
        other = subprocess.Popen(words, cwd=tmp_path, env=extra, stdout=subprocess.PIPE, text=True)
        while not waiting.exists():
            time.sleep(0.01)
        time.sleep(0.2)  # it has the file open now
    assert other.communicate(timeout=60) == ("True\n", None) and not lock.exists()
    (tmp_path / "x").mkdir()
    with buckets.alone(tmp_path / "x"):
        pass
    assert lock.exists()


def test_two_machines_without_a_common_lock_do_not_break_each_others_files(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path
) -> None:
    push(bucket, run, "x")
    server.faults.add("slow", "download", times=8, seconds=0.3)
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(pull, bucket, "x", tmp_path / "back") for _ in range(2)]
        assert [one.result().files for one in done] == [5, 5]
    assert tree(tmp_path / "back") == tree(run)
