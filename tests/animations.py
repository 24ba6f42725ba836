"""Animations in this process, and what their files hold, for several tests."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from PIL import Image

from src import figures
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))
import interpolate

QUICK = ("--steps", "4", "--batch-size", "4", "--frames-between", "5")


def animate(run: Path, out: Path, *words: str | Path) -> str:
    """What the script says, run in this process."""
    AcceleratorState._reset_state(True)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["interpolate.py", *map(str, (run, *QUICK, "--out", out, *words))])
        interpolate.main()
    AcceleratorState._reset_state(True)
    return printed.getvalue()


def frames_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "frames").iterdir())}


def shown(out: Path) -> NDArray[np.float64]:
    """(frames, H, W, 3)."""
    return np.stack([np.asarray(Image.open(path).convert("RGB"), float) for path in sorted((out / "frames").iterdir())])


def decoded(video: Path) -> tuple[str, NDArray[np.float64]]:
    """What ffmpeg says of a video's stream, and its frames (N, H, W, 3)."""
    command = [figures.ffmpeg() or "", "-hide_banner", "-i", str(video), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    stream = next(line for line in done.stderr.decode().splitlines() if "Video: " in line)
    width, height = map(int, re.findall(r", (\d+)x(\d+)", stream)[0])
    return stream, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3).astype(float)


def seconds_of(path: Path, count: int) -> float:
    """How long a GIF of so many frames lasts."""
    with Image.open(path) as gif:
        assert getattr(gif, "n_frames", 1) == count and gif.info["loop"] == 0
        lasting = []
        for i in range(count):
            gif.seek(i)
            lasting.append(gif.info["duration"])
    return sum(lasting) / 1000
