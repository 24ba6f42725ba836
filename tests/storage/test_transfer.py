"""Only what differs moves between a folder and a bucket, and manifests come last."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from src.storage.buckets import Bucket, Moved, client, folders, pull, push, status
from tests.storage.bucket_files import LARGE, MANIFEST, mistake, random_bytes, tree, write
from tests.storage_server import StorageServer


def test_there_and_back_is_the_same_and_only_what_differs_moves(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path
) -> None:
    server.page = 2  # a listing of six files is three answers
    write(run, {"step_1/large": random_bytes(LARGE)})
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
    assert pull(bucket, "x", run, delete=True) == Moved(0, 0, 5, 0)
    moved = push(bucket, run, "x", delete=True)
    assert moved[:4] == (0, 0, 5, 0) and sorted(moved.left_out) == ["__pycache__/", "a.swp", "b~", "x.partial/"]
    assert (run / ".lock").exists() and "mine/x/.log.txt.part" in server.objects()


def test_manifests_go_last_and_not_where_a_file_failed(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path
) -> None:
    write(run, {"a/manifest.json": b"{}", "z": b"z"})
    server.faults.add(400, "upload .*step_1/model", times=99)
    assert "refused it 6 times" in mistake(push, bucket, run, "x")
    assert not any("anifest" in name.lower() for name in server.objects())
    server.faults.waiting.clear()
    push(bucket, run, "x")
    assert {name for _, name in server.requests[-2:]} == {"mine/x/a/manifest.json", "mine/x/step_1/MANIFEST.json"}
    back = tmp_path / "back"
    server.faults.add("corrupt", "download .*step_1/model", times=99)
    assert "arrived damaged 6 times" in mistake(pull, bucket, "x", back)
    files = tree(back)
    assert "step_1/model" not in files and not any("anifest" in name.lower() for name in files)
    assert not any(name.endswith(".part") for name in files)
    server.faults.waiting.clear()
    pull(bucket, "x", back)
    assert tree(back) == tree(run)


def test_an_old_manifest_never_promises_new_files(server: StorageServer, bucket: Bucket, run: Path) -> None:
    push(bucket, run, "x")
    write(run, {"step_1/model": random_bytes(9000, seed=1), "log.txt": b"step 2\n"})
    server.faults.add(400, "upload .*step_1/model", times=99)
    assert "refused it 6 times" in mistake(push, bucket, run, "x")
    assert f"mine/x/{MANIFEST}" not in server.objects() and "mine/x/step_1/model" in server.objects()
    server.faults.waiting.clear()
    push(bucket, run, "x")
    write(run, {"step_1/model": random_bytes(9000)})
    assert push(bucket, run, "x").files == 2, "the same manifest goes anew, too"
    assert server.objects() == {f"mine/x/{name}": content for name, content in tree(run).items()}
    (run / "step_1" / "more").write_bytes(b"which no manifest promised")
    assert push(bucket, run, "x").files == 1


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_manifest_waits_where_its_folder_changes_meanwhile(
    bucket: Bucket, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    put = Bucket.put

    def put_and_change(self: Bucket, path: Path, *arguments: Any) -> None:
        put(self, path, *arguments)
        if path.name == "log.txt":
            with open(path, "ab") as file:
                file.write(b"step 2\n")
            if change == "removed":
                (run / "step_1" / "model").unlink()
            else:
                (run / "new").write_bytes(random_bytes(9000, seed=1))
                (run / "new").replace(run / "step_1" / "model")

    monkeypatch.setattr(Bucket, "put", put_and_change)
    monkeypatch.setattr(folders, "JOBS", 1)
    push(bucket, run, "x")
    assert "MANIFEST.json: its folder changed meanwhile" in capsys.readouterr().err
    monkeypatch.setattr(Bucket, "put", put)
    assert "step_1/MANIFEST.json" in status(bucket, "x", run).only_local
    push(bucket, run, "x")
    assert not status(bucket, "x", run).only_local + status(bucket, "x", run).different


@pytest.mark.parametrize("change", ["grows", "is rewritten", "shrinks", "never rests"])
def test_a_file_that_changes_while_it_is_pushed(
    server: StorageServer, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before, hashed, path = random_bytes(LARGE // 20), client.crc32c_of, tmp_path / "log"
    path.write_bytes(before)
    changes = iter(range(99 if change == "never rests" else 1))

    def hash_and_change(file: Any, size: int) -> str:
        files = hashed(file, size)
        if (seed := next(changes, None)) is not None:
            with open(path, "ab" if change == "grows" else "wb") as log:
                log.write(random_bytes(100 if change == "shrinks" else len(before), seed + 1))
        return files

    monkeypatch.setattr(client, "crc32c_of", hash_and_change)
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
