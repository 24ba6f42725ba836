"""Our scripts, trained by the clock: how fast one is, then as many steps as fit, and the weights at fractions of the time."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import ROOT, environment
from src.config import UserError, read_json
from src.runtime.precision import native_precision


def launch(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process whose words go into a file."""
    with open(log, "wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)


def shown(command: Sequence[str]) -> str:
    """A command in words, its paths as seen from this folder."""
    return shlex.join(["python", *(os.path.relpath(word, ROOT) if word.startswith("/") else word for word in command[1:])])


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(command: list[str], log: Path, what: str) -> None:
    """Run a command to its end; a UserError with its last words where it fails."""
    process = launch(command, log)
    try:
        process.wait()
    finally:
        end(process)
    if process.returncode:
        raise UserError(f"{what} failed: {log.read_text()[-2000:]}")


def our_command(script: str, config: Path, run: Path, overrides: Sequence[str]) -> list[str]:
    """What a user types, in the repository's folder."""
    words = [word for one in overrides for word in ("--set", one)]
    return [sys.executable, script, "-cfg", str(config), "--run-dir", str(run), *words]


def value_of(key: str, config: Path, overrides: Sequence[str]) -> Any:
    """What a number of the config's first level will be."""
    override = next((one.partition("=")[2] for one in reversed(overrides) if one.startswith(f"{key}=")), None)
    return json.loads(override) if override is not None else read_json(config)[key]


def precision_of(wanted: str) -> str:
    """bf16 or no, as a config says or, for `auto`, as this processor has units for bf16 or not."""
    return native_precision(torch.device("cpu")) if wanted == "auto" else wanted


class Speed(NamedTuple):
    """Seconds of a training that are no steps (from the launch to the first of them), and images/s of its steps."""

    start: float
    rate: float

    def steps(self, seconds: float, batch: int) -> int:
        """So many steps end within the seconds, from the launch."""
        return max(10, int((0.97 * seconds - self.start) * self.rate / batch))


def measure_speed(
    script: str, config: Path, run: Path, overrides: Sequence[str], seconds: float | None = None, *, keep: bool = False
) -> Speed:
    """How fast a recipe is, watched for so many seconds from its first steps on, or to its end. Without `keep`,
    `run` is removed."""
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    every, log = 2 if seconds is not None else 5, run.with_name(f"{run.name}.txt")
    endless = ["steps=1000000"] if seconds is not None else []
    command = our_command(script, config, run, [*overrides, *endless, f"log.every={every}", "preview.every=null"])
    began, first, process = time.time(), None, launch(command, log)
    metrics, rates, known = run / "metrics.jsonl", list[float](), list[dict[str, Any]]()
    try:
        while seconds is None or first is None or time.time() - first < seconds or len(rates) < 3:
            time.sleep(0.2)
            over = process.poll() is not None
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            known = [json.loads(line) for line in (lines[1:] if over else lines[1:-1])]  # the last may be half written
            rates = [line["images_per_second"] for line in known if "images_per_second" in line]
            if len(lines) > 1 and first is None:
                first = time.time()
            if over and (seconds is not None or process.returncode or not rates):
                raise UserError(f"our training ended in its probe: {log.read_text()[-2000:]}")
            if over:
                break
    finally:
        end(process, signal.SIGKILL)
    rate, batch = len(rates) / sum(1 / each for each in rates), read_json(run / "config.json")["batch_size"]
    spent, images = (first or began) - began, 2 * every * batch
    if seconds is None:  # what it did at the end of its stages counts as its start
        spent, images = time.time() - began, known[-1]["step"] * batch
    if not keep:
        shutil.rmtree(run)
    return Speed(max(0.0, spent - images / rate), rate)


def train_for(
    script: str,
    config: Path,
    run: Path,
    overrides: Sequence[str],
    speed: Speed,
    seconds: float,
    fractions: Sequence[float],
    weights: Path,
) -> dict[str, Any]:
    """Train as many steps as the seconds from now hold, keep in `weights` the newest checkpoint there was at each fraction of
    them, and end what is still running at the limit. Gives the images and seconds at the fractions, what was kept last, and the
    command."""
    batch = value_of("batch_size", config, overrides)
    steps = speed.steps(seconds, batch)
    timed = [f"steps={steps}", f"checkpoint.every_minutes={seconds / 60 / 40:.4g}", "preview.every=null"]
    shutil.rmtree(run, ignore_errors=True)
    command, log = our_command(script, config, run, [*overrides, *timed]), run.with_name(f"{run.name}.txt")
    began, process, known, used = time.time(), launch(command, log), dict[str, Any](), ""
    ended: float | None = None
    try:
        for fraction in fractions:
            while time.time() - began < fraction * seconds and process.poll() is None:
                time.sleep(0.05)
            if process.poll() is not None:
                if process.returncode:
                    raise UserError(f"our training failed: {log.read_text()[-2000:]}")
                ended = ended or time.time() - began
            checkpoint = run / "final" if ended else max((run / "checkpoints").glob("step_*"), default=None)
            if checkpoint is None:
                continue
            keep(checkpoint, weights / str(fraction))
            images = read_json(checkpoint / "progress.json")["step"] * batch
            known[str(fraction)] = {"images": images, "seconds": round(ended or fraction * seconds, 1)}
            used = "the finished run" if ended else f"{checkpoint.name} of {steps}, the last checkpoint before the limit"
    finally:
        end(process)
    if str(fractions[-1]) not in known:
        raise UserError("our training had no checkpoint at the limit; give it more minutes")
    return {"fractions": known, "used": used, "command": shown(command)}


def keep(checkpoint: Path, place: Path, copy: Callable[[str, str], object] = os.link) -> None:
    """A checkpoint in another place too, where no rotation removes it."""
    shutil.copytree(checkpoint, place, copy_function=copy, dirs_exist_ok=True)
