"""Killing a run and starting it again, for the short test and the soak."""

import json
import random
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from src.training.checkpoint import newest
from tests.conftest import ROOT, command, environment, metrics

# Slow enough to be hit, with many saves.
LONG = ["--set", "steps=80", "--set", "checkpoint.every=4", "--set", "log.every=1", "--set", "preview.every=40"]


def arguments(run: Path, *more: str) -> list[str]:
    return ["ddpm_accelerate.py", "-cfg", "configs/smoke/ddpm.json", "--run-dir", str(run), *LONG, *more]


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and every process below it, at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.suspend()
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.partial"))


def start_and_kill(run: Path, processes: int, rng: random.Random, *, inside_save: bool) -> str:
    """Start the run and kill it at a moment drawn between its first logged step and its end, or inside a save.

    Gives `ended` if it was done before, `inside` if the kill left a save half-written, else `killed`. Asserts that the run
    went on at the newest checkpoint that is whole.
    """
    expected, _ = newest(run / "checkpoints") if (run / "checkpoints").exists() else (None, [])
    went_on = json.loads((expected / "progress.json").read_text())["step"] if expected is not None else 0
    before = len((run / "log.txt").read_text()) if (run / "log.txt").exists() else 0
    process = subprocess.Popen(
        command(processes, *arguments(run)), cwd=ROOT, env=environment(processes), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    first, waited = None, time.monotonic() + rng.uniform(0, 2.0)
    while process.poll() is None:
        if first is None:
            log = (run / "log.txt").read_text()[before:] if (run / "log.txt").exists() else ""
            steps = re.findall(r" step (\d+)/", log)
            if steps:
                first, waited = int(steps[0]), time.monotonic() + rng.uniform(0, 2.0)
        elif saving(run) if inside_save else time.monotonic() > waited:
            kill_all(process)
            break
        time.sleep(0.001)
    if first is not None:
        assert first == went_on + 1, f"the first step after {expected} was {first}"
    if process.returncode == 0:
        return "ended"
    return "inside" if saving(run) else "killed"


def same_end(one: Path, other: Path) -> None:
    """Weights, moments and EMA of the last checkpoint to the bit, and the losses of every logged step."""
    ends = [newest(run / "checkpoints")[0] for run in (one, other)]
    assert ends[0] is not None and ends[1] is not None and ends[0].name == ends[1].name
    for name in ("model", "ema", "optimizer"):
        left, right = (load_file(end / f"{name}.safetensors") for end in ends)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name} {key}"
    for left, right in zip(metrics(one), metrics(other), strict=True):
        for name in (
            "step",
            "loss",
            "held_out_loss",
        ):  # what is only logged is summed in another order by two processes
            assert (name in left) == (name in right)
            assert name not in left or left[name] == pytest.approx(right[name], rel=1e-5)
