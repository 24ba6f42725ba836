"""What is said of long jobs, on a terminal and without one; that a signal ends them; and that early previews only look."""

import ast
import hashlib
import io
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from src.config import progress
from src.config.progress import Phases, Progress, track, within
from src.data.scan import ScanConfig, scan
from src.runtime.stopping import StopRequest
from src.runtime.stream import plan_batch
from src.storage.blocks import Ranks, in_blocks
from src.training import dry_run
from src.training.clock import Cadence, Clock
from src.training.rehearsal import compare_checkpoints
from tests.conftest import ROOT, metrics, run_here, run_in_process


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every 50 ms instead of every half minute."""
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.05)


def test_a_line_says_how_much_is_done_how_fast_and_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    job = Progress("checking images", 40_000, shown=False)
    now[0] += 30
    assert job.line() == "checking images 0/40000, 30 s so far"
    job.update(9_300)
    now[0] += 30
    assert job.line() == "checking images 9300/40000, 155 images/s, 3 min left"
    for _ in range(progress.STRETCHES + 2):  # by now the speed is that of the last few minutes
        job.update(60)
        now[0] += 30
        line = job.line()
    assert line == "checking images 9780/40000, 2 images/s, 4.2 h left"
    endless = Progress("unpacking", unit="files", shown=False)
    endless.update(5)
    now[0] += 10
    assert endless.line() == "unpacking 5 files, 0.5 files/s"
    endless.set_total(15)
    now[0] += 10
    assert endless.line() == "unpacking 5/15, 0.25 files/s, 40 s left", "once it is known how many there are"
    moved = Progress("pull runs/x", 3 * 10**9, unit="B", shown=False)
    moved.update(10**9)
    now[0] += 10
    assert moved.line() == "pull runs/x 1.00 GB/3.00 GB, 100.0 MB/s, 20 s left"
    parts = Progress("encoding latents", 1000, shown=False, processes=2)
    within(30)
    now[0] += 10
    assert "60/1000, 6 images/s" in parts.line(), "two processes, within the first block"
    parts.update(512)
    assert "512/1000" in parts.line(), "not 30 twice"
    for one in (job, endless, moved, parts):
        one.close()


@pytest.mark.usefixtures("soon")
def test_without_a_terminal_there_are_lines_and_a_last_word(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("packing", 4) as job:
        for _ in range(4):
            time.sleep(0.06)
            job.update()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) >= 3 and lines[0].startswith("packing ") and lines[-1].startswith("packing 4 images, done in")
    with Progress("packing", 4, shown=False):  # on another rank
        time.sleep(0.12)
    with Progress("packing", 4) as job:  # what is short needs no word
        job.update(4)
    assert capsys.readouterr() == ("", "")
    job = Progress("packing", 4)
    job.update()
    time.sleep(0.12)
    job.__exit__(RuntimeError, RuntimeError(), None)
    assert "done in" not in capsys.readouterr().err


@pytest.mark.usefixtures("soon")
def test_of_jobs_inside_jobs_the_innermost_speaks_and_who_spoke_is_silent_for_a_while(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress("outer", 2), Progress("inner", 3):
        time.sleep(0.17)
    err = capsys.readouterr().err
    assert "inner 0/3" in err and "outer" not in err
    with Progress("outer", 2):
        for _ in range(8):
            time.sleep(0.02)
            progress.say("a line of the log")
    assert not capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("soon")
def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in track([1, 2], "drawing frames", unit="frames"):
        time.sleep(0.06)
    shown = sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "drawing frames" in shown and "2/2" in shown and "frames/s" in shown and "left" not in shown
    clock = Clock(3, 30, 100, shown=True)
    assert clock.bar_shown
    clock.tick(10)
    clock.show(4, {"epoch": 1.5, "loss": 0.25})
    clock.close()
    assert not Clock(3, 30, 100, shown=False).bar_shown


@pytest.mark.usefixtures("soon")
def test_scans_blocks_and_runs_speak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def slow(i: int) -> io.BytesIO:
        time.sleep(0.1)
        return io.BytesIO((ROOT / "docs" / "images" / "nothing").name.encode())

    with pytest.raises(Exception, match="cannot be read"):
        scan([f"{i}.png" for i in range(8)], [(9, 1)] * 8, slow, ScanConfig(), key=str(tmp_path), where="here")
    assert re.search(r"^checking images \d/8, ", capsys.readouterr().err, re.M)

    def make(block: range) -> dict[str, Any]:
        for _ in block:
            time.sleep(0.04)
            within(1)
        return {"a": list(block)}

    assert in_blocks(tmp_path, 6, 4, make, Ranks(), doing="features")["a"].tolist() == list(range(6))
    assert re.search(r"^features [123]/6, [\d.]+ images/s, \d+ s left", capsys.readouterr().err, re.M), "inside a block"
    clock = Clock(7, 70, 100, shown=True)
    clock.tick(10)
    time.sleep(0.08)
    clock.enter("a preview")
    time.sleep(0.08)
    clock.close()
    err = capsys.readouterr().err
    assert "step 8, images 80/100" in err and "step 8, a preview, images 80/100" in err


def test_there_is_one_place_for_bars() -> None:
    for path in [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py")]:
        names = {
            alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert "tqdm" not in names or path.name == "progress.py", (
            f"{path}: use src/config/progress.py, which speaks without a terminal, too"
        )


# ---------------------------------------------------------------------------------------------- dry runs


@pytest.mark.usefixtures("soon")
def test_a_phase_is_said_at_once_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases("dry run: ", at_once=True)
    phases.enter("looking at the data")
    assert capsys.readouterr().out == "dry run: looking at the data\n"
    time.sleep(0.12)
    phases.enter("step 3 of 8", at_once=False)
    time.sleep(0.12)
    phases.close()
    out = capsys.readouterr().out
    assert "dry run: looking at the data, 0 s so far" in out and "dry run: step 3 of 8, 0 s so far" in out
    time.sleep(0.12)
    assert not capsys.readouterr().out


STAGES = 'stages=[{"steps": 4, "adversarial": {"weight": 0.1}}, {"steps": 3, "adversarial": {"weight": 0.1}, "tanh": true}]'


def test_a_dry_run_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "ENOUGH_SECONDS", 0.0)
    done = run_in_process(
        "train_vae.py", "-cfg", "configs/smoke/vae.json", "--run-dir", tmp_path / "x", "--dry-run", "--set", STAGES
    )
    phases = [line.removeprefix("dry run: ") for line in done.out.splitlines() if line.startswith("dry run: ")]
    begins = [f"stage {number} of 2, 12 steps" for number in (1, 2)]
    stages = [line for begin in begins for line in (begin, "a preview", "saving a checkpoint")]
    assert done.status == 0 and phases == ["looking at the data", "building the networks", *stages]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_does_not_go_on_to_measure_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they are measured, that is no longer said; the fixture `nothing_left_open` looks whether it is."""
    monkeypatch.setattr(dry_run, "ENOUGH_SECONDS", 0.0)
    done = run_in_process("ddpm_accelerate.py", "-cfg", "configs/smoke/ddpm.json", "--run-dir", tmp_path / "x", "--dry-run")
    assert done.status == 0 and done.out.count("measuring samples") == 1


def test_a_stop_ends_a_dry_run_after_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ddpm_accelerate

    steps, original = list[int](), ddpm_accelerate.update

    def update(*args: Any) -> None:
        original(*args)
        steps.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ddpm_accelerate, "update", update)
    with pytest.raises(AssertionError):  # the status is 1
        run_here("ddpm_accelerate", "-cfg", ROOT / "configs/smoke/ddpm.json", "--run-dir", tmp_path / "x", "--dry-run")
    out = capsys.readouterr().out
    assert len(steps) == 1 and "training, 12 steps" in out and "a preview" not in out and not list(tmp_path.iterdir())


def in_a_step(number: int, left: Path) -> int:
    """The status of a child that gets this signal twice inside one instruction of Python that takes minutes."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            StopRequest(before_exit=left.touch)
            os.write(writing, b"ready")
            hashlib.pbkdf2_hmac("sha256", b"a step", b"of torch", 2_000_000_000)
        finally:
            os._exit(77)
    assert os.read(reading, 5) == b"ready"
    time.sleep(0.2)
    os.kill(child, number)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0) and not left.exists(), "one is a request"
    os.kill(child, number)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.timeout(30)
def test_the_second_signal_ends_a_process_inside_a_step(number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert in_a_step(number, tmp_path / "left") == 1 and (tmp_path / "left").exists()
    assert capfd.readouterr().err.count("stopping after this step; once more ends at once") == 1


def test_a_closed_request_reads_no_signals(capfd: pytest.CaptureFixture[str]) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.set_wakeup_fd(-1)  # of a request that an earlier test left open
    first = StopRequest()
    second = StopRequest()  # as after a rollback
    second.close()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    assert first.requested and capfd.readouterr().err.count("stopping") == 1
    first.close()
    first.close()
    assert signal.set_wakeup_fd(-1) == -1
    for number, handler in before.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------- previews


def due(cadence: Cadence, first: int, end: int) -> list[int]:
    return [step for step in range(first + 1, end + 1) if cadence(step)]


@pytest.mark.parametrize(
    ("every", "first", "end", "expected"),
    [
        (2000, 0, 4000, [100, 200, 400, 800, 1600, 2000, 4000]),
        (800, 0, 1700, [100, 200, 400, 800, 1600]),
        (801, 0, 1700, [100, 200, 400, 800, 801, 1602]),
        (1000, 1500, 3500, [1600, 1700, 1900, 2000, 2300, 3000]),  # of a stage; what is regular stays where it was
        (100, 0, 350, [100, 200, 300]),
        (15, 0, 30, [15, 30]),
    ],
)
def test_previews_come_early_and_then_ever_more_rarely(every: int, first: int, end: int, expected: list[int]) -> None:
    cadence = Cadence("preview", every, early=range(first, end))
    assert due(cadence, first, end) == expected
    assert cadence.count(first, end) == len([step for step in expected if step < end]) + 1 or first, "and at the end"
    assert [step for step in expected if cadence.regular(step)] == due(Cadence("preview", every), first, end)
    assert due(Cadence("preview", None, early=range(1000)), 0, 1000) == []


def test_the_costs_of_a_dry_run_have_the_early_previews() -> None:
    cadences = {word: Cadence(word, None) for word in ("save", "export", "quality", "snapshot")}
    for first in (0, 5000):
        plan = plan_batch(16, 8, rank=0, world=1)._replace(first_step=first)
        cadences["preview"] = Cadence("preview", 2000, early=range(first, first + 5000))
        assert dry_run.MeasuredStage("", plan, first, first + 5000, cadences).count("preview") == 3 + 5
    assert str(cadences["preview"]) == "preview every 2000 (the first ones after 100, 200, 400, 800, 1600)"
    assert str(Cadence("preview", 50, early=range(5000))) == "preview every 50"
    assert str(Cadence("preview", 2000, early=range(7000, 7500))) == "preview every 2000 (the first ones after 100, 200, 400)"


@pytest.mark.parametrize(
    ("script", "config", "changes", "steps", "last_steps"),
    [
        ("train_vae", "vae", ["guard.rollback=true", "checkpoint.keep_best=true", STAGES], [2, 4, 6, 7], [4, 7]),
        ("ddpm_accelerate", "ddpm", ["preview.quality=null", "checkpoint.keep_best=true", "steps=5"], [2, 4, 5], [5]),
        ("train_classifier", "classifier", ["checkpoint.keep_best=true", "steps=5"], [2, 4, 5], [5]),
    ],
)
def test_early_previews_only_look(
    script: str,
    config: str,
    changes: list[str],
    steps: list[int],
    last_steps: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run is to the bit the one that has none, and so are its guard and its best checkpoint."""
    folders = []
    for first in (2, 10**6):
        monkeypatch.setattr(Cadence, "FIRST", first)
        run = tmp_path / f"first_{first}"
        sets = [word for change in ["preview.every=1000", "checkpoint.every=1000", *changes] for word in ("--set", change)]
        run_here(script, "-cfg", ROOT / f"configs/smoke/{config}.json", "--run-dir", run, *sets, cwd=tmp_path)
        preview_steps = [int(path.stem.removeprefix("step_")) for path in sorted((run / "samples").iterdir())]
        assert preview_steps == (steps if first == 2 else last_steps)
        folders.append(sorted((run / "checkpoints").iterdir())[-1])
    assert compare_checkpoints(*folders)[0] == []
    where = {line["step"] for line in metrics(tmp_path / "first_2") if any(key.startswith("held_out") for key in line)}
    assert where == set(steps) or where == set(), "they are measured like the others"
