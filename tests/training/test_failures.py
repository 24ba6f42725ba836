"""What is only to be looked at never ends a run: each of it is made to fail, in the middle and at the end."""

import errno
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.utils
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from PIL import Image

from src import figures
from src.config import UserError
from src.report import report
from src.runtime.checkpoint import verify_checkpoint
from src.runtime.failures import (
    OutOfMemory,
    failed_on_any,
    is_out_of_memory,
    reason_of,
    warn_on_failure,
)
from src.sampling.sampler import Sampler
from src.training import preview
from src.training.run_directory import RunDirectory
from tests.conftest import ROOT, command, environment, metrics, refused, run_in_process

SHORT = ("steps=4", "log.every=1", "preview.every=2", "checkpoint.every=2", "held_out=0.1")
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # script, config, what makes it short
    "ddpm": ("ddpm_accelerate", "configs/smoke/ddpm.json", (*SHORT, "preview.quality=null", "preview.sampler.steps=2")),
    "classes": (
        "ddpm_accelerate",
        "configs/smoke/ddpm.json",
        (*SHORT, "preview.quality=null", "preview.sampler.steps=2", "preview.sheets=class"),
    ),
    "vae": ("train_vae", "configs/smoke/vae.json", ('stages=[{"steps": 4}]', *SHORT[1:])),
    "classifier": ("train_classifier", "configs/smoke/classifier.json", (*SHORT, "preview.num_measured=4")),
    "iadb": ("train_iadb", "configs/smoke/iadb.json", (*SHORT, "preview.calls=[1, 2]")),
    "points": (
        "train_iadb",
        "configs/points2d_iadb.json",
        (*SHORT, "model.width=8", "model.layers=1", "batch_size=16", "preview.num_samples=16", "preview.calls=[1, 2]"),
    ),
}
FULL = OSError(errno.ENOSPC, "No space left on device")


def raising(error: BaseException) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


def run_short(name: str, run: Path, *settings: str) -> str:
    script, config, keys = RUNS[name]
    done = run_in_process(
        script, "-cfg", config, "--run-dir", run, *(word for key in (*keys, *settings) for word in ("--set", key))
    )
    assert done.status == 0, done.all
    return done.out


def all_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Every drawing, the report, and the trackers on their way and at the end."""
    for name in ("save", "curves", "gif", "mp4", "trajectories", "velocity_fields", "scatter"):
        monkeypatch.setattr(figures, name, raising(error))
    monkeypatch.setattr(report, "make_report", raising(error))
    monkeypatch.setattr(TensorBoardTracker, "log", raising(error))
    monkeypatch.setattr(TensorBoardTracker, "log_images", raising(error))
    monkeypatch.setattr(TensorBoardTracker, "finish", raising(error))


WARNED_OF = {
    "ddpm": ("the preview", "the first images", "loss.png", "tensorboard"),
    "classes": ("the preview", "the first images", "loss.png", "tensorboard"),
    "vae": ("the preview", "the first images", "loss.png", "tensorboard"),
    "classifier": ("the accuracy by noise level", "the first images", "loss.png", "tensorboard"),
    "iadb": ("the preview", "blend.png", "loss.png", "tensorboard"),
    "points": ("the preview", "blend.png", "points", "loss.png", "tensorboard"),
}


@pytest.mark.parametrize(("name", "error"), [(name, FULL if name == "vae" else RuntimeError("no\nfont")) for name in RUNS])
def test_a_run_whose_looks_all_fail_is_the_run(
    name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_fails(monkeypatch, error)
    log = run_short(name, tmp_path / "run")
    for what in WARNED_OF[name]:
        lines = [line for line in log.splitlines() if line.startswith(f"warning: {what} failed (")]
        assert len(lines) == 1 and lines[0].endswith("the run goes on, and says this once"), log
        reason = "the disk is full: No space left on device" if error is FULL else "RuntimeError: no font"
        assert reason in lines[0]
    assert log.count("warning: report.html is not written") == 1
    assert verify_checkpoint(tmp_path / "run" / "final") is None
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert not list((tmp_path / "run").rglob("*.png")) and (tmp_path / "run" / "checkpoints" / "step_00000004").is_dir()


def test_failed_looks_change_no_weight_and_no_value_that_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_short("ddpm", tmp_path / "whole", "log.trackers=[]")
    with monkeypatch.context() as patch:
        all_fails(patch, RuntimeError("no font"))
        patch.setattr(Sampler, "draw", raising(RuntimeError("no samples")))
        log = run_short("ddpm", tmp_path / "failed", "log.trackers=[]")
    assert "the preview failed (RuntimeError: no samples)" in log
    one, other = (tmp_path / name / "final" / "ema.safetensors" for name in ("whole", "failed"))
    assert one.read_bytes() == other.read_bytes()
    losses = [[line.get("held_out_loss") for line in metrics(tmp_path / name)] for name in ("whole", "failed")]
    assert losses[0] == losses[1] and losses[0][1] is not None


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("ddpm", "src.training.preview.held_out_loss"),  # keeps the best checkpoint
        ("vae", "src.evaluation.autoencoder.reconstruction_loss"),  # the guard's
        ("classifier", "src.runs.classifier.noise_of"),
    ],
)
def test_a_value_that_decides_is_never_passed_over(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, raising(RuntimeError("no value")))
    with pytest.raises(RuntimeError, match="no value"):
        run_short(name, tmp_path / "run")


def test_nor_is_the_distance_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.evaluation.quality.pixels_of", raising(RuntimeError("no features")))
    quality = 'preview.quality={"every": 2, "num_samples": 16, "features": "random"}'
    with pytest.raises(RuntimeError, match="no features"):
        run_short("ddpm", tmp_path / "run", quality)


def test_stops_mistakes_and_memory_go_on_up(tmp_path: Path) -> None:
    errors = [UserError("no"), KeyboardInterrupt(), SystemExit(1), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
    errors += [OutOfMemory(8, 4, "micro_batch_size"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    errors += [OSError(errno.ENOMEM, "Cannot allocate memory"), torch.distributed.DistBackendError("gone")]
    errors += [RuntimeError("[gloo] Connection closed by peer")]
    for error in errors:
        with pytest.raises(type(error)), warn_on_failure("x", raising(AssertionError("it is not said"))):
            raise error
    warned = list[tuple[str, str]]()
    for error in (FULL, KeyError("a"), ZeroDivisionError(), OSError(errno.EACCES, "Permission denied", "x.png")):
        with warn_on_failure("x", lambda *words: warned.append(words)) as guard:
            raise error
        assert guard.reason
    reasons = ["the disk is full: No space left on device", "KeyError: 'a'", "ZeroDivisionError"]
    assert [reason for _, reason in warned[:3]] == reasons and "Permission denied: 'x.png'" in warned[3][1]
    assert not is_out_of_memory(RuntimeError("shape")) and "\n" not in reason_of(ValueError("a\nb"))


def test_memory_that_runs_out_in_a_preview_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "draw", raising(torch.OutOfMemoryError("CUDA out of memory")))
    script, config, keys = RUNS["ddpm"]
    done = run_in_process(
        script, "-cfg", config, "--run-dir", tmp_path / "run", *(word for key in keys for word in ("--set", key))
    )
    assert done.status == 2 and "error: out of memory at micro_batch_size 8" in done.err


def test_a_warning_on_a_full_disk_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path / "run", writes=True)
    assert run._log is not None
    run._log.close()
    run._log = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    run.warn("the preview", "the disk is full")
    run.warn("the preview", "the disk is full")
    run.close()
    run.warn("tensorboard", "gone")
    assert capsys.readouterr().out.count("warning: the preview failed (the disk is full)") == 1


# ---------------------------------------------------------------------------------------------- ranks


def test_ranks_agree_on_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda message: [*message, "ValueError: no samples"])
    warned = list[tuple[str, str]]()
    two = SimpleNamespace(num_processes=2)
    with warn_on_failure("it") as guard:
        pass
    assert not guard.reason and failed_on_any(guard, "it", two, lambda *words: warned.append(words))
    assert warned == [("it", "rank 1: ValueError: no samples")]
    assert not failed_on_any(guard, "it", SimpleNamespace(num_processes=1), raising(AssertionError()))


def test_with_fsdp_nothing_is_caught() -> None:
    session: Any = SimpleNamespace(accelerator=SimpleNamespace(is_fsdp2=True))
    with pytest.raises(RuntimeError, match="in the network"), preview.looked_at(session):
        raise RuntimeError("in the network")


SABOTAGE = """
import os, sys
sys.path.insert(0, {root!r})
from src import figures
from src.config import run_script
from src.sampling.sampler import Sampler
import ddpm_accelerate
draw, calls = Sampler.draw, []
def fails(self, *given, **more):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 1:
        raise ValueError("no samples")
    return draw(self, *given, **more)
Sampler.draw = fails
def save(image, path):
    if path.name == "step_00000004.png":
        raise ValueError("no sheet")
    image.save(path)
figures.save = save
run_script(ddpm_accelerate.main)
"""


def test_a_preview_that_fails_on_one_of_two_ranks(tmp_path: Path) -> None:
    """On the second rank the sampling fails at step 2, on the first the writing at step 4: neither waits for the other."""
    (tmp_path / "sabotage.py").write_text(SABOTAGE.format(root=str(ROOT)))
    _, config, keys = RUNS["ddpm"]
    words = ["-cfg", config, "--run-dir", tmp_path / "run", *(w for key in (*keys, "log.trackers=[]") for w in ("--set", key))]
    done = subprocess.run(
        command(2, tmp_path / "sabotage.py", *words), cwd=ROOT, env=environment(2), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("warning: the preview failed (rank 1: ValueError: no samples)") == 1
    assert verify_checkpoint(tmp_path / "run" / "final") is None and not list((tmp_path / "run" / "samples").glob("*.png"))


# ---------------------------------------------------------------------------------------------- names that mean something


CLASSES = ('<b>&"a"', "it's $x_{$ 100%", "портрет\n[new] *")


@pytest.mark.usefixtures("real_charts")
def test_names_that_mean_something_to_a_program_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in such a folder, of such classes, to its end; what it prints can be pasted; its report is whole."""
    for number, name in enumerate(CLASSES):
        for i in range(4):
            folder = tmp_path / "my data" / "50% [x]" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (80 * number, 60 * i, 9)).save(folder / f"{i} %d.png")
    run = tmp_path / "my runs" / "100% [new] 'x' #1 <i>"
    data = ("data.source=folder", f"data.path={tmp_path / 'my data' / '50% [x]'}", "held_out=0.0", "log.trackers=[]")
    run_short("ddpm", run, *data, "optimizer.schedule.kind=constant")
    assert (run / "loss.png").exists() and (run / "contact_sheet.png").exists()
    page = (run / "report.html").read_text()
    assert '<b>&"a"' not in page and "&lt;b&gt;&amp;&#34;a&#34;" in page and "#1 <i>" not in page
    last_line = (run / "log.txt").read_text().splitlines()[-1]
    words = shlex.split(last_line.split("draw more: ")[1])
    assert words == ["python", "sample.py", str(run), "--frames"]
    sampling = run_in_process(*words[1:], "--steps", "2", "--classes", "0/1/2", "--batch-size", "6", cwd=tmp_path)
    assert sampling.status == 0, sampling.all
    assert len(list((tmp_path / "samples" / run.name).rglob("denoising.gif"))) == 1
    second_log = run_short("ddpm", run, *data, "optimizer.schedule.kind=constant")
    assert shlex.split(second_log.split("sample from it: ")[1])[:3] == words[:3]


def test_a_sample_that_cannot_be_saved_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_short("ddpm", tmp_path / "run", "log.trackers=[]")
    monkeypatch.setattr(figures, "save", raising(ValueError("no encoder")))
    for script, arguments in (("sample", ["--num-samples", "2"]), ("interpolate", ["--frames", "3"])):
        message = refused(script, tmp_path / "run", "--steps", "2", "--out", tmp_path / "out" / script, *arguments)
        assert re.search(r"\.png was not made \(ValueError: no encoder\)", message), message
