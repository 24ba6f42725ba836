"""A run's checkpoints in a bucket: which are there, which come back, and what happens where it fails."""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpm_accelerate
import train_iadb
from src.config import UserError, dump, load
from src.runtime.checkpoint import newest, retain, roll_back, spared_steps, step_folder, verify_checkpoint, write_folder
from src.storage.buckets import open_bucket, push
from src.training import background, rehearsal, session
from src.training.entry import run_training
from src.training.run_directory import RunDirectory
from src.training.run_mode import RunMode
from src.training.uploads import Uploads, bring_back, bring_run, place_of
from tests.conftest import ROOT, SMOKE, environment
from tests.storage_server import StorageServer

CONFIG = load(ROOT / SMOKE, ddpm_accelerate.Config)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageServer]:
    """And the project, in which `run` is runs/x."""
    monkeypatch.chdir(tmp_path)
    with StorageServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setattr("src.storage.buckets.client.FIRST_DELAY", 0.01)
        monkeypatch.setattr("src.storage.buckets.client.LAST_DELAY", 0.02)
        yield server


def save(run: Path, step: int, **progress: Any) -> None:
    state = {"step": step, "best": None, **progress}
    tensors = {"ema": {"w": torch.full((4,), float(step))}}
    write_folder(step_folder(run / "checkpoints", step), tensors, {"progress": state, "config": dump(CONFIG)})
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, step + 1)))


def there(server: StorageServer) -> list[int]:
    """The steps of the whole checkpoints in the bucket."""
    names = [name.split("/") for name in server.objects() if name.endswith("MANIFEST.json")]
    return sorted(int(name[-2].removeprefix("step_")) for name in names)


def wait_for(what: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < 30
        time.sleep(0.02)


def test_the_newest_goes_there_and_what_retention_removed_goes_away(server: StorageServer, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    sent = Uploads("gs://bucket/mine", run, keep=2)
    lines = list[str]()
    sent.say = lines.append
    run.mkdir(parents=True)
    (run / "report.html").write_text("<!DOCTYPE html>")
    (run / ".report.html.part").write_text("<!DOC")
    for step in (1, 2, 3, 4):
        save(run, step, best={"step": 1, "held_out_loss": 0.5, "kept": True})
        retain(run / "checkpoints", 2, spared_steps({"best": {"step": 1, "kept": True}}))
        sent.wake(step)
        wait_for(lambda step=step: step in there(server))
    sent.close()
    assert there(server) == [1, 3, 4] and lines == [f"all of {run} is in gs://bucket/mine"]
    assert server.objects()["mine/runs/x/metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    assert server.objects()["mine/runs/x/report.html"] == b"<!DOCTYPE html>" and not any("part" in x for x in server.objects())
    manifests = [name for operation, name in server.requests if operation in ("upload", "start")]
    of_step_4 = [name for name in manifests if "step_00000004" in name]
    assert of_step_4[-1].endswith("MANIFEST.json") and len(of_step_4) == 4

    shutil.rmtree(run)
    line = bring_back("gs://bucket/mine", run, CONFIG)
    assert line == f"brought step_00000001 and step_00000004 of {run} from gs://bucket/mine", "the best, and the newest"
    assert (
        verify_checkpoint(step_folder(run / "checkpoints", 4)) is None
        and verify_checkpoint(step_folder(run / "checkpoints", 1)) is None
    )
    assert not step_folder(run / "checkpoints", 3).exists() and (run / "metrics.jsonl").read_text().count("\n") == 4
    assert bring_back("gs://bucket/mine", run, CONFIG) is None, "the second time, and every other process"


def test_what_is_newer_here_stays_and_what_is_damaged_here_is_brought(server: StorageServer, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    assert bring_back("gs://bucket", run, CONFIG) is None and not run.exists(), "nothing is there yet"
    save(run, 5)
    (run / "latents").mkdir()
    (run / "latents" / "block_00000.npy").write_bytes(b"large")
    sent = Uploads("gs://bucket", run, keep=2)
    sent.wake(5)
    sent.close()
    assert not any("latents" in name for name in server.objects()), "caches are made again"
    (run / "metrics.jsonl").write_text("later")
    assert bring_back("gs://bucket", run, CONFIG) is None and (run / "metrics.jsonl").read_text() == "later"
    save(run, 6)
    assert bring_back("gs://bucket", run, CONFIG) is None
    shutil.rmtree(step_folder(run / "checkpoints", 6))
    (step_folder(run / "checkpoints", 5) / "ema.safetensors").write_bytes(b"cut")
    assert "brought step_00000005" in str(bring_back("gs://bucket", run, CONFIG))
    assert verify_checkpoint(step_folder(run / "checkpoints", 5)) is None


def spoil(server: StorageServer, step: int) -> None:
    server.put(f"runs/x/checkpoints/step_{step:08d}/ema.safetensors", b"cut")


def test_a_damaged_checkpoint_in_the_bucket_is_passed_over(server: StorageServer, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    for step in (4, 8, 9):
        save(run, step)
        with open_bucket("gs://bucket") as bucket:  # the checkpoints alone, without a log
            push(bucket, run / "checkpoints", "runs/x/checkpoints", shown=False)
    spoil(server, 9)
    shutil.rmtree(run)
    line = bring_back("gs://bucket", run, CONFIG)
    reason = "ema.safetensors has 3 bytes instead of 80"
    assert line == (
        f"passed over step_00000009 of gs://bucket/runs/x: {reason}; brought step_00000008 of {run} from gs://bucket"
    )
    assert newest(run / "checkpoints")[0] == step_folder(run / "checkpoints", 8) and there(server) == [4, 8]
    assert bring_back("gs://bucket", run, CONFIG) is None
    shutil.rmtree(run)
    spoil(server, 8)
    spoil(server, 4)
    with pytest.raises(
        UserError, match=r"step_00000008 .*step_00000004 .*none is whole: to start anew, rm -r .*runs/x and gcloud"
    ):
        bring_back("gs://bucket", run, CONFIG)
    assert there(server) == [4, 8], "nor does it start anew the second time"


def test_a_damaged_checkpoint_here_is_not_put_there(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lines = tmp_path / "runs" / "x", list[str]()
    save(run, 2)
    save(run, 4, best={"step": 2})
    for step in (2, 4):
        (step_folder(run / "checkpoints", step) / "ema.safetensors").write_bytes(b"cut")
    sent = Uploads("gs://bucket", run, keep=2)
    sent.say = lines.append
    sent.wake(4)
    wait_for(lambda: len(lines) == 1)
    assert lines == [
        "warning: not uploaded (step_00000004: ema.safetensors has 3 bytes instead of 80); it is tried again, and training "
        "goes on"
    ]
    save(run, 6, best={"step": 2})
    sent.wake(6)
    sent.close()
    assert there(server) == [6] and lines[1:] == ["uploads to the bucket work again", f"all of {run} is in gs://bucket"]


def test_an_upload_slower_than_saves_still_puts_whole_checkpoints(server: StorageServer, tmp_path: Path) -> None:
    """What is on its way is pinned; what came between is passed over."""
    run, lines = tmp_path / "runs" / "x", list[str]()
    sent = Uploads("gs://bucket", run, keep=1)
    sent.say = lines.append
    server.faults.add("slow", "step_", times=40, seconds=0.1)
    for step in range(1, 13):
        save(run, step)
        retain(run / "checkpoints", 1, sent.pinned)
        sent.wake(step)
        time.sleep(0.05)
    wait_for(lambda: len(there(server)) > 0)
    sent.close()
    local_steps = sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())
    assert local_steps[-1] == there(server)[-1] == 12 and {*there(server)} <= {*local_steps} and len(local_steps) <= 3
    assert lines == [f"all of {run} is in gs://bucket"]
    assert len(server.objects()) == 4 * len(there(server)) + 1, "nothing half-put is left"


def test_a_checkpoint_that_was_gone_back_behind_goes_from_the_bucket_too_and_another_machines_stay(
    server: StorageServer, tmp_path: Path
) -> None:
    run, lines = tmp_path / "runs" / "x", list[str]()
    for step in (2, 4):
        save(run, step)
    sent = Uploads("gs://bucket", run, keep=2)
    sent.say = lines.append
    sent.wake(4)
    wait_for(lambda: there(server) == [4])
    server.put("runs/x/checkpoints/step_00000009/MANIFEST.json", b"{}")
    save(run, 5)
    sent.wake(5)
    wait_for(lambda: there(server) == [4, 5, 9])
    wait_for(lambda: lines == ["warning: gs://bucket has later steps of this run: does another machine train it, too?"])
    assert roll_back(run / "checkpoints", 3, {"guard": {"rollbacks": 1}}) == 2
    sent.wake(2, went_back=True)
    wait_for(lambda: there(server) == [2])
    sent.close()


def test_going_back_while_the_void_checkpoint_is_put_removes_it_too(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.05)
    run, lines = tmp_path / "runs" / "x", list[str]()
    for step in (2, 4):
        save(run, step)
    sent = Uploads("gs://bucket", run, keep=2)
    sent.say = lines.append
    server.faults.add("slow", "upload .*step_00000004/MANIFEST", seconds=0.5)
    sent.wake(4)
    wait_for(lambda: any("step_00000004/MANIFEST" in name for operation, name in server.requests if operation == "upload"))
    assert roll_back(run / "checkpoints", 2, {"guard": {"rollbacks": 1}}) == 2
    server.faults.add(403, "upload .*step_00000002/ema")  # and it stays in mind where that fails at first
    sent.wake(2, went_back=True)
    wait_for(lambda: there(server) == [2])
    sent.close()
    assert len(lines) == 3 and "not uploaded" in lines[0], lines


def test_what_a_vanished_machine_left_half_put_is_removed_without_a_word(server: StorageServer, tmp_path: Path) -> None:
    run, lines = tmp_path / "runs" / "x", list[str]()
    server.put("runs/x/checkpoints/step_00000010/ema.safetensors", b"half")
    save(run, 9)
    sent = Uploads("gs://bucket", run, keep=2)
    sent.say = lines.append
    sent.wake(9)
    sent.close()
    assert there(server) == [9] and lines == [f"all of {run} is in gs://bucket"]
    assert not any("step_00000010" in name for name in server.objects())


def test_a_run_lies_where_setup_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "large").mkdir()
    (tmp_path / "way").symlink_to(project)
    monkeypatch.chdir(project)
    assert place_of(Path("runs/a/x")) == place_of(tmp_path / "way" / "runs" / "a" / "x") == "runs/a/x"
    (project / "runs").symlink_to(tmp_path / "large")
    assert place_of(Path("runs/x")) == place_of(project / "runs" / "x") == "runs/x", "on the large disk, which has a link here"
    one, other = place_of(Path("/elsewhere/x")), place_of(Path("/another/x"))
    assert one != other and one.startswith("runs/x-") and other.startswith("runs/x-")


def test_another_run_of_that_name_in_the_bucket_is_refused_before_anything_is_pulled(
    server: StorageServer, tmp_path: Path
) -> None:
    run, other = tmp_path / "runs" / "x", replace(CONFIG, seed=1, workers=1)
    save(run, 5)
    sent = Uploads("gs://bucket/mine", run, keep=2)
    sent.wake(5)
    sent.close()
    shutil.rmtree(run)
    pattern = r"^gs://bucket/mine holds another run as runs/x: .* another seed; .*/mine/runs/x; init_from "
    with pytest.raises(UserError, match=pattern):
        bring_back("gs://bucket/mine", run, other)
    assert not run.exists()
    assert "brought" in str(bring_back("gs://bucket/mine", run, replace(CONFIG, workers=1))), "that changes no step"
    with pytest.raises(UserError, match="holds another run"):
        bring_back("gs://bucket/mine", run, other)


def test_the_weights_that_a_run_starts_from_are_brought(server: StorageServer, tmp_path: Path) -> None:
    whole(tmp_path / "made" / "final")
    for path in (tmp_path / "made" / "final").iterdir():
        server.put(f"runs/vae/final/{path.name}", path.read_bytes())
        server.put(f"runs/young/checkpoints/step_00000002/{path.name}", path.read_bytes())
    server.put("runs/vae/config.json", b"{}")
    server.put("runs/young/checkpoints/step_00000004/ema.safetensors", b"half")
    final = Path("runs/vae/final")
    assert bring_run("gs://bucket", "runs/vae") == "brought runs/vae/final from gs://bucket"
    assert verify_checkpoint(final) is None and {path.name for path in Path("runs/vae").iterdir()} == {"final"}
    server.forget()
    assert bring_run("gs://bucket", "runs/vae") is None is bring_run("gs://bucket", "runs/vae/final") and not server.requests
    (final / "ema.safetensors").write_bytes(b"cut")
    assert (
        bring_run("gs://bucket", "runs/vae/final") == "brought runs/vae/final from gs://bucket"
        and verify_checkpoint(final) is None
    )
    assert bring_run("gs://bucket", "runs/young") == "brought runs/young/checkpoints/step_00000002 from gs://bucket"
    assert bring_run("gs://bucket", "runs/young") is None, "unfinished here, too"
    assert bring_run("gs://bucket", "runs/no") is None and not Path("runs/no").exists()


@pytest.mark.parametrize("trial", ["dry_run", "verify_resume", None])
def test_every_launch_brings_what_it_starts_from(
    server: StorageServer, tmp_path: Path, trial: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(tmp_path / "made")
    for name in ("vae", "old", "first"):
        for path in (tmp_path / "made").iterdir():
            server.put(f"runs/{name}/final/{path.name}", path.read_bytes())
    overrides = ["bucket=gs://bucket", "autoencoder=runs/vae", "pairs=runs/old", "init_from=runs/first"]
    cfg = load(ROOT / "configs/smoke/iadb.json", train_iadb.Config, overrides)
    args = argparse.Namespace(run_dir="runs/x", dry_run=trial == "dry_run", verify_resume=trial == "verify_resume")
    whole_runs = list[list[str]]()

    monkeypatch.setattr(rehearsal.Rehearsal, "_make_caches", lambda *_: {})  # they would be made of what is brought

    def train(*_: Any) -> int:
        whole_runs.append(sorted(path.parent.name for path in Path("runs").glob("*/final") if verify_checkpoint(path) is None))
        return 1

    assert run_training(train, cfg, args) == 1 and whole_runs == [["first", "old", "vae"]]
    save(tmp_path / "runs" / "x", 3)
    shutil.rmtree("runs/first")
    run_training(train, cfg, args)
    assert whole_runs[1] == (["first", "old", "vae"] if trial else ["old", "vae"]), "a run that goes on does not start anew"


def test_a_machine_without_the_checkpoint_is_told_what_it_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "broadcast", lambda _: tmp_path / "step_00000004")
    opened = session.Session.__new__(session.Session)
    opened.run = RunDirectory(tmp_path / "x", writes=False)
    for bucket, words in ((None, "that all see, or set bucket$"), ("gs://bucket", "the bucket does not have it yet$")):
        opened.cfg = replace(CONFIG, bucket=bucket)
        with pytest.raises(UserError, match=words):
            opened._resume(30)


def whole(final: Path) -> None:
    write_folder(final, {"ema": {"w": torch.arange(20_000.0)}}, {"config": {}, "data": {}, "progress": {"step": 3}})


def test_four_processes_bring_an_autoencoder_at_once_and_a_kill_half_way_is_made_good(
    server: StorageServer, tmp_path: Path
) -> None:
    whole(tmp_path / "made" / "final")
    for path in (tmp_path / "made" / "final").iterdir():
        server.put(f"runs/vae/final/{path.name}", path.read_bytes())
    code = "from src.training.uploads import bring_run; from src.runtime.checkpoint import verify_checkpoint; "
    code += "from pathlib import Path; print(bring_run('gs://bucket', 'runs/vae'), verify_checkpoint(Path('runs/vae/final')))"
    words, extra = [sys.executable, "-c", code], environment(PYTHONPATH=str(ROOT), STORAGE_EMULATOR_HOST=server.url)
    server.rate = 100_000  # 0.8 s for the weights
    with subprocess.Popen(words, cwd=tmp_path, env=extra) as first:
        wait_for(lambda: (tmp_path / "runs/vae/final/config.json").exists())
        first.kill()
    assert "missing" in str(verify_checkpoint(tmp_path / "runs/vae/final")) or not (tmp_path / "runs/vae/final").exists()
    four = [
        subprocess.Popen(words, cwd=tmp_path, env=extra, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=120) for process in four]
    assert sorted(out for out, _ in outputs) == ["None None\n"] * 3 + ["brought runs/vae/final from gs://bucket None\n"], (
        outputs
    )


def test_what_fails_is_said_once_and_tried_again(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.05)
    run, lines = tmp_path / "runs" / "x", list[str]()
    save(run, 1)
    server.forbidden.add("bucket")
    sent = Uploads("gs://bucket", run, keep=2)
    sent.say = lines.append
    sent.wake(1)
    wait_for(lambda: len(server.requests) > 4)
    assert len(lines) == 1 and lines[0].startswith("warning: not uploaded (gs://bucket") and "training goes on" in lines[0]
    server.forbidden.clear()
    wait_for(lambda: there(server) == [1])
    wait_for(lambda: len(lines) == 2)
    server.forbidden.add("bucket")
    sent.close()
    assert lines[1] == "uploads to the bucket work again" and lines[-1].startswith(
        f"NOT all of {run} is in gs://bucket; later: "
    )


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_whose_end_is_not_in_the_bucket_does_not_end_well(
    server: StorageServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    """Nor does one that had come to its end before: the same command puts what did not arrive then."""
    run, args = Path("runs/x"), argparse.Namespace(run_dir="runs/x", dry_run=False, verify_resume=False)
    cfg = replace(CONFIG, bucket="gs://bucket")
    (tmp_path / "runs").mkdir()

    def train(_: Any, run_dir: Path, run_mode: RunMode, __: int | None) -> int:
        save(run_dir, 2)
        if not finished:
            run_mode.uploads.append(Uploads("gs://bucket", run_dir, keep=2))
            run_mode.uploads[0].wake(2)
        return 0

    server.faults.add(403, "upload", times=99)
    assert run_training(train, cfg, args) == 1
    assert "NOT all of runs/x is in gs://bucket; later: ./setup.sh push runs/x" in capsys.readouterr().out
    server.faults.waiting.clear()
    finished = True
    assert run_training(train, cfg, args) == 0 and there(server) == [2] and run.exists()


def test_a_bucket_out_of_reach_does_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: StorageServer
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    args = argparse.Namespace(run_dir="runs/x", dry_run=False, verify_resume=False)
    cfg = load(ROOT / SMOKE, ddpm_accelerate.Config, ["bucket=gs://bucket"])
    with pytest.raises(UserError, match=r"no answer .*; with --set bucket=null it .* starts anew, for no checkpoint .* here$"):
        run_training(lambda *_: 0, cfg, args)
    save(tmp_path / "runs" / "x", 3)
    with pytest.raises(UserError, match=r"no answer .*; with --set bucket=null it .* goes on from runs/x/.*/step_00000003$"):
        run_training(lambda *_: 0, cfg, args)
    cfg = load(ROOT / SMOKE, ddpm_accelerate.Config, ["bucket=gs://bucket", "bucket=null"])
    assert run_training(lambda *_: 0, cfg, args) == 0


def test_a_bucket_that_there_is_not_is_said_before_anything_is_made(server: StorageServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such bucket"):
        bring_back("gs://wrong", tmp_path / "runs" / "x", CONFIG)
    assert not (tmp_path / "runs" / "x").exists()
