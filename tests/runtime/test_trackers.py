"""Values and images of a run in its trackers: they are there, change nothing, and a tracker that fails never ends the run."""

import errno
import io
import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import TensorBoardTracker
from PIL import Image

from src.config import UserError
from src.config.packages import is_installed
from src.runtime.checkpoint import verify_checkpoint
from src.runtime.trackers import finish_trackers, for_each_tracker, log_images
from tests.conftest import ROOT, command, environment, launch, metrics
from tests.training.test_failures import RUNS, raising, run_short


class Tracker:
    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error, self.logged, self.finished = name, error, 0, False

    def log(self, values: dict) -> None:
        if self.error is not None:
            raise self.error
        self.logged += 1

    def log_images(self, images: dict[str, Any], step: int, **_: Any) -> None:
        self.log(images)

    def finish(self) -> None:
        self.finished = True
        self.log({})


ERRORS = (
    ConnectionError("no network"),
    RuntimeError("[Errno 32] Broken pipe"),
    UserError("no"),
    MemoryError(),
    KeyError("run"),
)


@pytest.mark.parametrize("error", ERRORS, ids=[type(error).__name__ for error in ERRORS])
def test_one_tracker_that_fails_leaves_the_other(error: Exception, tmp_path: Path) -> None:
    """Whatever it raises: at log, at log_images, and at finish."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    one, other = Tracker("wandb", error), Tracker("tensorboard")
    accelerator, warned = SimpleNamespace(trackers=[one, other], is_main_process=True), list[str]()

    def warn(what: str, why: str) -> None:
        warned.append(what)

    for _ in range(2):
        for_each_tracker(accelerator, warn, lambda: accelerator.trackers[0].log({"loss": 1.0}))
    assert other.logged == 2 and accelerator.trackers == [one, other] and warned == ["wandb"] * 2
    log_images(accelerator, {"a": tmp_path / "a.png", "not_drawn": tmp_path / "b.png"}, 3, warn)
    assert other.logged == 3 and warned == ["wandb"] * 3
    finish_trackers(accelerator, warn)
    assert one.finished and other.finished and accelerator.trackers == [] and warned == ["wandb"] * 4


def test_only_the_first_process_logs_images(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    tracker = Tracker("tensorboard")
    log_images(SimpleNamespace(trackers=[tracker], is_main_process=False), {"a": tmp_path / "a.png"}, 1, raising(OSError()))
    assert tracker.logged == 0


def test_an_image_that_cannot_be_read_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"cut short")
    tracker, warned = Tracker("tensorboard"), list[str]()
    accelerator = SimpleNamespace(trackers=[tracker], is_main_process=True)
    log_images(accelerator, {"a": tmp_path / "a.png"}, 1, lambda what, why: warned.append(f"{what}: {why}"))
    assert len(warned) == 1 and warned[0].startswith("tensorboard: ") and "a.png" in warned[0]


def test_a_tracker_that_does_not_open_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorBoardTracker, "start", raising(OSError(errno.EACCES, "Permission denied")))
    log = run_short("ddpm", tmp_path / "run")
    assert log.count("warning: tensorboard failed ([Errno 13] Permission denied)") == 1
    assert verify_checkpoint(tmp_path / "run" / "final") is None and (tmp_path / "run" / "loss.png").exists()


def images_of(run: Path) -> dict[tuple[str, int], np.ndarray]:
    """{(name, step): pixels} of the images in a run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    images = dict[tuple[str, int], np.ndarray]()
    for file in sorted((run / "tensorboard").rglob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "images":
                    content = value.tensor.string_val[2]  # after the width and the height
                    images[value.tag, event.step] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return images


def same_image(shown: np.ndarray, file: Path) -> None:
    with Image.open(file) as image:
        np.testing.assert_array_equal(shown, np.asarray(image.convert("RGB")))


def test_images_are_in_tensorboard_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first images, each preview and the charts are those of the run's files; weights and values are those of a run without
    a tracker, and of one whose tracker fails at every image and at its end."""
    run_short("classes", tmp_path / "shown")
    images, samples = images_of(tmp_path / "shown"), tmp_path / "shown" / "samples"
    steps = {int(path.name.removeprefix("step_")) for path in samples.iterdir()}
    assert {step for tag, step in images if tag.startswith("preview/")} == steps and {2, 4} <= steps
    (sheet,) = (samples / "step_00000004").glob("sample_circle_*.png")
    same_image(images["preview/circle", 4], sheet)
    same_image(images["first_images/contact_sheet", 0], tmp_path / "shown" / "contact_sheet.png")
    same_image(images["charts/loss", 4], tmp_path / "shown" / "loss.png")

    run_short("classes", tmp_path / "plain", "log.trackers=[]")
    for what in ("log_images", "finish"):
        monkeypatch.setattr(TensorBoardTracker, what, raising(RuntimeError("[Errno 32] Broken pipe")))
    log = run_short("classes", tmp_path / "failed")
    assert log.count("warning: tensorboard failed (RuntimeError: [Errno 32] Broken pipe); the run goes on") == 1
    weights = [(tmp_path / run / "final" / "ema.safetensors").read_bytes() for run in ("shown", "plain", "failed")]
    assert weights[0] == weights[1] == weights[2]
    losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in ("shown", "plain", "failed")]
    assert losses[0] == losses[1] == losses[2]


def test_points_that_moved_are_charts(tmp_path: Path) -> None:
    run_short("points", tmp_path / "run")
    images = images_of(tmp_path / "run")
    same_image(images["preview", 4], tmp_path / "run" / "samples" / "step_00000004.png")
    assert ("first_images/blend", 0) in images
    moved = {tag.removeprefix("charts/points/") for tag, step in images if tag.startswith("charts/points/") and step == 4}
    assert moved == {path.stem for path in (tmp_path / "run" / "points").glob("*.png")} != set()


def words_of(run: Path, tracker: str, *keys: str) -> list[str | Path]:
    script, config, short = RUNS["ddpm"]
    every = (*short, f'log.trackers=["{tracker}"]', "optimizer.schedule.kind=constant", *keys)
    return [ROOT / f"{script}.py", "-cfg", ROOT / config, "--run-dir", run, *(w for key in every for w in ("--set", key))]


def test_a_run_that_was_killed_is_the_same_run_in_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run, wandb_dir = tmp_path / "run", tmp_path / "wandb_files"
    wandb_dir.mkdir()
    words = words_of(run, "wandb", "steps=60", "preview.every=30")
    process = subprocess.Popen(
        command(1, *words),
        cwd=tmp_path,
        env=environment(WANDB_DIR=str(wandb_dir)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 200
        while not list((run / "checkpoints").glob("step_*[0-9]")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = launch(*words, cwd=tmp_path, WANDB_DIR=str(wandb_dir))
    assert done.status == 0 and "going on at step " in done.out and "warning: wandb" not in done.all, done.all
    folders = sorted(path for path in (wandb_dir / "wandb").glob("offline-run-*") if path.is_dir())
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1, folders
    images = [{path.stem.rsplit("_", 2)[0] for path in folder.rglob("media/**/*.png")} for folder in folders]
    assert "loss" not in images[0], "it was killed before its end"
    assert images[1] >= {"preview", "loss"} and not any("contact_sheet" in names for names in images), "images of the data stay"


@pytest.mark.skipif(not is_installed("trackio"), reason="trackio is not installed (pip install trackio)")
def test_trackio_keeps_the_run_on_this_machine(tmp_path: Path) -> None:
    """Values and images are in its folder, and a run that goes on is the same run."""
    for steps in (4, 6):
        words = words_of(tmp_path / "run", "trackio", f"steps={steps}")
        done = launch(*words, cwd=tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
        assert done.status == 0 and "warning: trackio" not in done.all, done.all
    with sqlite3.connect(tmp_path / "trackio" / "atelier.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert len({name for name, _, _ in rows}) == 1 and rows[0][0].startswith("run-")
    values = [(step, json.loads(text)) for _, step, text in rows]
    assert {step for step, each in values if "loss" in each} == {1, 2, 3, 4, 5, 6}
    previews = {step: each["preview"] for step, each in values if "preview" in each}
    assert {2, 4, 6} <= previews.keys() and previews[6]["_type"] == "trackio.image"
    file = tmp_path / "trackio" / "media" / previews[6]["file_path"]
    with Image.open(file) as shown, Image.open(tmp_path / "run" / "samples" / "step_00000006.png") as sheet:
        np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), np.asarray(sheet.convert("RGB")))


def test_images_that_may_not_leave_are_not_shown_in_wandb(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    trackers = [Tracker(name) for name in ("tensorboard", "wandb")]
    accelerator = SimpleNamespace(trackers=trackers, is_main_process=True)
    log_images(accelerator, {"a": tmp_path / "a.png"}, 1, lambda what, why: pytest.fail(f"{what}: {why}"), may_leave=False)
    assert [tracker.logged for tracker in trackers] == [1, 0]
