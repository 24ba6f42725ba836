"""MP4 and GIF: with and without ffmpeg, and what stays where one of them cannot be made."""

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src import figures
from src.config import UserError
from tests.animations import animate, decoded, frames_of, seconds_of
from tests.conftest import one_line, run_in_process


def test_without_ffmpeg_there_is_still_a_gif(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    printed = animate(smoke_run, tmp_path / "out", "--num-seeds", "2")
    assert printed.startswith("there is no ffmpeg, so no MP4 is made: pip install imageio-ffmpeg, or put ffmpeg on PATH\n")
    assert "animation.gif" in printed and "animation.mp4" not in printed
    assert abs(seconds_of(tmp_path / "out" / "animation.gif", 6) - 6 / 24) <= 0.01
    assert not (tmp_path / "out" / "animation.mp4").exists()
    monkeypatch.undo()
    frames = frames_of(tmp_path / "out")
    assert "animation.mp4" in animate(smoke_run, tmp_path / "out", "--num-seeds", "2"), "the same command again makes it"
    assert frames_of(tmp_path / "out") == frames


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Three frames with odd sides."""
    for i in range(3):
        pixels = np.zeros((15, 17, 3), np.uint8)
        pixels[:, :, i] = 200
        pixels[:, -3:], pixels[-3:] = 255, 255
        Image.fromarray(pixels).save(tmp_path / f"f_{i:05d}.png")
    return tmp_path / "f_%05d.png"


def test_an_mp4_of_odd_sides(odd: Path, tmp_path: Path) -> None:
    command = figures.mp4(odd, tmp_path / "out.mp4", fps=24)
    stream, frames = decoded(tmp_path / "out.mp4")
    assert "Video: h264" in stream and ", 18x16" in stream and " 24 fps" in stream
    assert [int(frame[:12, :14].mean(axis=(0, 1)).argmax()) for frame in frames] == [0, 1, 2]
    assert all(frame[-1].min() > 200 and frame[:, -1].min() > 200 for frame in frames), "the edge is repeated, not padded black"
    assert not (tmp_path / ".out.mp4").exists()
    (tmp_path / "out.mp4").unlink()
    subprocess.run([figures.ffmpeg() or "", *shlex.split(command)[1:]], check=True)
    assert (tmp_path / "out.mp4").exists(), "the command makes it again"


def test_an_ffmpeg_that_cannot(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*given: Any, **options: Any) -> list[str]:
        return ["libx999" if word == "libx264" else word for word in original(*given, **options)]

    original = figures.mp4_command
    monkeypatch.setattr(figures, "mp4_command", without)
    with pytest.raises(UserError, match="was built without libx264, so no MP4 is made"):
        figures.mp4(odd, tmp_path / "out.mp4", fps=24)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="ffmpeg failed"):
        figures.mp4(tmp_path / "none_%05d.png", tmp_path / "out.mp4", fps=24)
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob(".*.mp4"))


# ---------------------------------------------------------------------------------------------- what fails in the end


def broken_ffmpeg(folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "ffmpeg").write_text("not a program")
    (folder / "ffmpeg").chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    figures._warn.cache_clear()


def test_an_ffmpeg_that_does_not_start(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """With the one of imageio-ffmpeg both are made, without it the GIF; sample.py likewise. The folder's name has a %."""
    broken_ffmpeg(tmp_path / "bin", monkeypatch)
    out = tmp_path / "my samples" / "100% [new] %d 'x' #1"
    printed = animate(smoke_run, out / "a", "--num-seeds", "2")
    assert "animation.gif" in printed and "animation.mp4" in printed and (out / "a" / "animation.mp4").exists()
    assert capfd.readouterr().err.count("does not start (Exec format error); another way is taken") == 1
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    printed = animate(smoke_run, out / "b", "--num-seeds", "2")
    assert printed.startswith("there is no ffmpeg, so no MP4 is made") and (out / "b" / "animation.gif").exists()
    sampled = run_in_process("sample.py", smoke_run, "--steps", "2", "--num-samples", "2", "--frames", "--out", out / "c")
    assert sampled.status == 0 and (out / "c" / "denoising.gif").exists(), sampled.all


def test_a_gif_that_was_asked_for_and_fails_leaves_the_rest(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ("sample.py", smoke_run, "--steps", "2", "--num-samples", "3", "--frames", "--npz", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(figures, "gif", full)
        message = one_line(run_in_process(*words))
        assert "denoising.gif was not made (the disk is full: No space left" in message and message.endswith("before it stays")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"00000.png", "00002.png", "grid.png", "samples_3x16x16x3.npz", "metadata.json"} <= names
        with pytest.raises(UserError, match="animation.gif was not made"):
            animate(smoke_run, tmp_path / "a", "--num-seeds", "2")
        assert len(frames_of(tmp_path / "a")) == 6 and (tmp_path / "a" / "animation.mp4").exists()
    written = (tmp_path / "out" / "00002.png").stat().st_mtime_ns
    assert run_in_process(*words).status == 0 and (tmp_path / "out" / "denoising.gif").exists(), (
        "the same command again makes it"
    )
    assert (tmp_path / "out" / "00002.png").stat().st_mtime_ns == written


def test_a_grid_that_fails_leaves_the_samples(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_font(*_: Any, **__: Any) -> Any:
        raise ValueError("no font")

    monkeypatch.setattr(figures, "grid", no_font)
    done = run_in_process("sample.py", smoke_run, "--steps", "2", "--num-samples", "3", "--out", tmp_path / "out")
    assert done.status == 0 and done.err.count("warning: grid.png failed (ValueError: no font)") == 1
    assert "grid.png" not in done.out and len(list((tmp_path / "out").glob("0*.png"))) == 3
