"""The command behind setup.sh: push, pull, status, and its mistakes."""

import os
import shutil
from pathlib import Path

import pytest

from tests.storage.bucket_files import call, mistake, small, tree, write
from tests.storage_server import StorageServer


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
    ("line", "message"),
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
def test_mistakes_on_the_command_line(project: Path, line: str, message: str) -> None:
    assert message in mistake(call, line)


def test_a_misspelt_command(project: Path) -> None:
    line = mistake(call, "psuh x")
    assert "invalid choice: 'psuh'" in line and "did you mean push? (./setup.sh --help lists what there is)" in line


def test_no_bucket_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATELIER_BUCKET", raising=False)
    assert "set ATELIER_BUCKET" in mistake(call, "status")


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
    printed = capsys.readouterr()
    assert ["datasets/mine", "7", "0", "0", "0"] in [
        row.split() for row in printed.out.splitlines()
    ] and "left out: " in printed.err
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
