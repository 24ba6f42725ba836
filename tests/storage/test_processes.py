"""Processes that move the same folder, and are killed while they do."""

import os
import random
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.storage.buckets import Bucket, pull, push
from src.storage.locks import folder_lock
from tests.conftest import ROOT, Finished, command, environment, launch, one_line
from tests.storage.bucket_files import random_bytes, small, tree, write, zipped
from tests.storage_server import StorageServer


def buckets_process(line: str, project: Path, url: str) -> Finished:
    return launch("-m", "src.storage.buckets", *line.split(), cwd=project, STORAGE_EMULATOR_HOST=url, PYTHONPATH=str(ROOT))


def test_a_mistake_is_one_line_and_status_2(server: StorageServer, tmp_path: Path) -> None:
    server.forbidden.add("bucket")
    assert "there are no credentials" in one_line(buckets_process("pull x --bucket gs://bucket", tmp_path, server.url))


def test_the_server_as_a_process(tmp_path: Path) -> None:
    (tmp_path / "kept" / "shelf").mkdir(parents=True)
    write(tmp_path / "runs" / "x", small())
    words = command(1, "-m", "tests.storage_server", "0", tmp_path / "kept")
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        done = buckets_process("push x --bucket gs://shelf", tmp_path, process.stdout.readline().strip())
        process.kill()
    assert done.status == 0 and "push 5 files" in done.out and not done.err, done.all
    assert len(list((tmp_path / "kept" / "shelf").iterdir())) == 5


def kill_often(server: StorageServer, tmp_path: Path, way: str, kills: int) -> None:
    """Kill a slow sync again and again: each file is whole or absent, and the run after it moves the others alone."""
    rng = random.Random(kills)
    files = {f"runs/x/{i % 3}/{i}": random_bytes(60_000, i) for i in range(kills * 16)} | {"runs/x/0/MANIFEST.json": b"{}"}
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
        server.wait_until_idle()  # it may be storing what it has
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
        server.put(f"datasets/{i}", random_bytes(40_000, i))
    server.put("datasets/cats.zip", zipped({f"{i}.png": random_bytes(2000, i) for i in range(50)}))
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
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0] * 3, outputs
    assert sorted("pull 7 files" in out for out, _ in outputs) == [False, False, True], outputs
    assert server.count("download") == 7 and sum("unpacked 50 files" in out for out, _ in outputs) == 1
    assert len(tree(project / "datasets" / "cats")) == 50 and [part.exists() for part in left] == [False, True]


def test_a_lock_goes_with_a_folder_that_never_came(tmp_path: Path) -> None:
    lock, waiting = tmp_path / ".x.bring.lock", tmp_path / "waiting"
    code = "from pathlib import Path; from src.storage.locks import folder_lock; import sys; Path('waiting').touch()\n"
    code += "with folder_lock(Path('x')): print(Path('.x.bring.lock').exists())"
    words, extra = command(1, "-c", code), environment(PYTHONPATH=str(ROOT))
    with folder_lock(tmp_path / "x"):
        other = subprocess.Popen(words, cwd=tmp_path, env=extra, stdout=subprocess.PIPE, text=True)
        while not waiting.exists():
            time.sleep(0.01)
        time.sleep(0.2)  # it has the file open now
    assert other.communicate(timeout=60) == ("True\n", None) and not lock.exists()
    (tmp_path / "x").mkdir()
    with folder_lock(tmp_path / "x"):
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
