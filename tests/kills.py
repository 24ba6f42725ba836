"""Killing a run and starting it again, for the short test and the soak."""

import json
import random
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from src.runtime.checkpoint import newest
from tests.conftest import ROOT, command, environment, metrics


@dataclass(frozen=True)
class Job:
    """A script with a config that is slow enough to be hit, with many saves."""

    script: str
    config: str
    extra: tuple[str, ...] = ()

    def arguments(self, run: Path, *extra: str) -> list[str]:
        return [self.script, "-cfg", self.config, "--run-dir", str(run), *self.extra, *extra]


def settings(**values: object) -> tuple[str, ...]:
    """--set KEY=VALUE ..., dots in keys written as two underscores."""
    pairs = [
        f"{key.replace('__', '.')}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()
    ]
    return tuple(word for pair in pairs for word in ("--set", pair))


PIXELS = Job(
    "ddpm_accelerate.py",
    "configs/smoke/ddpm.json",
    settings(steps=40, checkpoint__every=4, log__every=1, preview__every=20, ema__snapshot_every=5),
)
# The smoke run's four stages, longer; a kill comes before, after and across their boundaries.
AUTOENCODER = Job(
    "train_vae.py",
    "configs/smoke/vae.json",
    settings(
        checkpoint__every=4,
        log__every=1,
        preview__every=20,
        stages=[
            {"steps": 22, "adversarial": {"weight": 0.1, "start_step": 11}},
            {"steps": 22, "adversarial": {"weight": 0.1, "adaptive": True}, "tanh": True},
            {"steps": 22, "adversarial": {"weight": 0.1, "adaptive": True}, "perceptual": {"weight": 0.5}, "tanh": True},
            {
                "steps": 10,
                "image_size": 24,
                "batch_size": 8,
                "micro_batch_size": 4,
                "perceptual": {"weight": 0.5},
                "adversarial": {"weight": 0.1},
                "tanh": True,
            },
        ],
    ),
)
LATENTS = Job(
    "train_ldm.py", "configs/smoke/ldm.json", settings(steps=80, checkpoint__every=4, log__every=1, preview__every=40)
)
# Learned variance, and times whose history is in the checkpoint.
GUIDED = Job(
    PIXELS.script,
    PIXELS.config,
    (
        *PIXELS.extra,
        *settings(process__variance="learned", process__loss={"kind": "hybrid"}, times={"kind": "second_moment", "history": 2}),
    ),
)
CLASSIFIER = Job(
    "train_classifier.py",
    "configs/smoke/classifier.json",
    settings(steps=80, checkpoint__every=4, log__every=1, preview__every=40),
)
CODEBOOK = Job(
    AUTOENCODER.script,
    AUTOENCODER.config,
    (*AUTOENCODER.extra, *settings(model__bottleneck={"kind": "vq", "codes": 32})),
)


POINTS = Job(
    "train_iadb.py",
    "configs/points2d_iadb.json",
    settings(
        steps=200,
        model={"kind": "mlp", "width": 24, "layers": 2},
        batch_size=64,
        micro_batch_size=32,
        preview={"every": 100, "num_samples": 32, "calls": [1, 2]},
        checkpoint__every=10,
        log__every=1,
        log__trackers=[],
    ),
)
BLEND = Job(
    "train_iadb.py", "configs/smoke/iadb.json", settings(steps=80, checkpoint__every=4, log__every=1, preview__every=40)
)


def go_back(run: Path, out: Path, step: int = 10) -> None:
    """A copy of a run as if it had been killed after its checkpoint of this step."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "final")
    for path in (out / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


def arguments(run: Path, *extra: str) -> list[str]:
    return PIXELS.arguments(run, *extra)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and every process below it, at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.suspend()
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def saving(run: Path, since: float) -> bool:
    """Whether a save is half-written that began after `since`: what earlier kills left does not count."""
    try:
        return any(path.stat().st_mtime > since for path in (run / "checkpoints").glob(".step_*.partial"))
    except FileNotFoundError:  # it was just finished
        return False


def start_and_kill(run: Path, processes: int, rng: random.Random, *, inside_save: bool, job: Job = PIXELS) -> str:
    """Start the run and kill it up to ten steps after its first, at any moment or inside a save. (Steps, not seconds: on a slow
    machine it would come no further.)

    Gives `ended` if it was done before, `inside` if the kill left a save half-written, else `killed`. Asserts that the run
    went on at the newest checkpoint that is whole.
    """
    expected, _ = newest(run / "checkpoints") if (run / "checkpoints").exists() else (None, [])
    went_on = json.loads((expected / "progress.json").read_text())["step"] if expected is not None else 0
    before = len((run / "log.txt").read_text()) if (run / "log.txt").exists() else 0
    began = time.time()
    process = subprocess.Popen(
        command(processes, *job.arguments(run)), cwd=ROOT, env=environment(processes), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    steps, wanted, moment, reached = list[str](), rng.randint(1, 11), rng.uniform(0, 0.2), 0.0
    while process.poll() is None:
        if len(steps) < wanted:
            log = (run / "log.txt").read_text()[before:] if (run / "log.txt").exists() else ""
            steps = re.findall(r" step (\d+)/", log)
            reached = time.monotonic() + moment
        elif time.monotonic() > reached and (saving(run, began) or not inside_save):
            kill_all(process)
            break
        time.sleep(0.001)
    first = int(steps[0]) if steps else None
    if first is not None:
        assert first == went_on + 1, f"the first step after {expected} was {first}"
    if process.returncode == 0:
        return "ended"
    return "inside" if saving(run, began) else "killed"


def same_end(one: Path, other: Path) -> None:
    """Weights, moments and EMA of the last checkpoint to the bit, and the losses of every logged step."""
    checkpoints = [newest(run / "checkpoints")[0] for run in (one, other)]
    assert checkpoints[0] is not None and checkpoints[1] is not None and checkpoints[0].name == checkpoints[1].name
    files = sorted(path.name for path in checkpoints[0].glob("*.safetensors"))
    assert files == sorted(path.name for path in checkpoints[1].glob("*.safetensors")) and len(files) >= 3
    for name in files:
        left, right = (load_file(end / name) for end in checkpoints)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name} {key}"
    left, right = (json.loads((end / "progress.json").read_text()) for end in checkpoints)
    assert left.get("adaptive_weight") == right.get("adaptive_weight") and left.get("tanh") == right.get("tanh")
    assert {**left.get("guard", {}), "best": 0} == {**right.get("guard", {}), "best": 0}  # its best is a sum over ranks
    for left, right in zip(metrics(one), metrics(other), strict=True):
        for name in (
            "step",
            "loss",
            "held_out_loss",
            "held_out_l1",
        ):  # what is only logged is summed in another order by two processes
            assert (name in left) == (name in right)
            assert name not in left or left[name] == pytest.approx(right[name], rel=1e-5)
