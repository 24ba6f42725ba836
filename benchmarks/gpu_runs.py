"""Trainings as a person starts them on a GPU, for benchmarks/gpu.py: the GPU's tests, a killed run, DDP and FSDP."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from benchmarks.common import ROOT, environment
from src.runtime.checkpoint import newest, read_tensors, step_folder
from src.storage.files import as_json, write_whole
from src.training.rehearsal import compare_checkpoints

CONFIG = "configs/smoke/ddpm.json"
STEPS, HALF = 120, 60  # of the run that is killed
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Block,ResidualBlock"}
SMALL = {"batch_size": 4, "micro_batch_size": 2, "held_out": 0.0, "preview.sampler.steps": 1}  # for trying it out on a CPU
QUIET = {"log.trackers": "[]", "preview.every": "null", "preview.quality": "null", "preview.num_samples": "1"}


# ---------------------------------------------------------------------------------------------- processes

_started = list["subprocess.Popen[bytes]"]()


def start(words: Sequence[str | Path], log: Path, extra: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own; what it says goes into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {**environment(), "PYTHONUNBUFFERED": "1", **(extra or {})}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    _started.append(process)
    return process


def end(process: "subprocess.Popen[bytes]", number: int = signal.SIGTERM, patience: float = 10.0) -> None:
    """Send a signal to a process and all of its group, and wait for it; after `patience` seconds they are killed. A launcher,
    whose processes are in sessions of their own, ends them where it is asked to stop."""
    for sent in (number, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sent)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        return


def end_all() -> None:
    """End all that was started here and still runs."""
    for process in _started:
        end(process)


def wait_until(process: "subprocess.Popen[bytes]", deadline: float) -> int | None:
    """The exit status of a process; None of one that was ended at the deadline."""
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        end(process)
        return None


def train_words(run: Path, *settings: Mapping[str, Any], launcher: Sequence[str] = ()) -> list[str]:
    """The command of a training in a run directory, with settings of the config."""
    merged = {key: value for one in (QUIET, *settings) for key, value in one.items()}
    sets = [word for key, value in merged.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, *launcher, "ddpm_accelerate.py", "-cfg", CONFIG, "--run-dir", str(run), *sets]


def last_words(log: Path) -> str:
    """The last line that a process said."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no word why")


def say_end(status: int | None, log: Path) -> str:
    return "done" if status == 0 else "stopped at its limit" if status is None else f"failed: {last_words(log)}"


# ---------------------------------------------------------------------------------------------- the GPU's tests


def run_tests(file: Path, deadline: float, *, small: bool = False, tests: str = "tests/test_gpu.py") -> dict[str, Any]:
    """Each test of a file with its outcome and seconds, written into `file` as they end. On a CPU these tests are skipped."""
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--no-header", tests]
    log, began = file.with_suffix(".txt"), time.monotonic()
    process, known = start(words, log), dict[str, Any]()
    result: dict[str, Any] = {"tests": [], "state": "running"}
    while True:
        ended = process.poll() is not None
        for line in log.read_text(errors="replace").split("\n"):
            name, _, outcome = line.partition(" ")
            outcome = outcome.strip().partition(" ")[0]
            if "::" in name and outcome in ("PASSED", "FAILED", "SKIPPED", "ERROR") and name not in known:
                known[name] = {"name": name.partition("::")[2], "outcome": outcome.lower()}
                known[name]["seconds"] = round(time.monotonic() - began, 1)
                began = time.monotonic()
        is_over = ended or time.monotonic() >= deadline
        if is_over:
            status = process.returncode if ended else wait_until(process, 0)
            result["state"] = "stopped at its limit" if status is None else "done" if status in (0, 1) else say_end(status, log)
        result["tests"] = [*known.values()]
        write_whole(file, as_json(result))
        if is_over:
            return result
        time.sleep(0.2)


# ---------------------------------------------------------------------------------------------- killed and resumed


def kill_each(processes: Mapping[Path, "subprocess.Popen[bytes]"], deadline: float) -> dict[Path, bool]:
    """Kill each training as soon as its checkpoint is there; gives whether it was still running."""
    was_running = dict[Path, bool]()
    while len(was_running) < len(processes):
        for checkpoint, process in processes.items():
            is_due = checkpoint.exists() or process.poll() is not None or time.monotonic() >= deadline
            if checkpoint not in was_running and is_due:
                was_running[checkpoint] = process.poll() is None
                end(process, signal.SIGKILL)
        time.sleep(0.01)
    return was_running


def drop_after(run: Path, step: int) -> None:
    """Leave a run as if it had been killed right after its checkpoint of a step."""
    shutil.rmtree(run / "final", ignore_errors=True)
    for folder in (run / "checkpoints").glob("step_*"):
        if folder > step_folder(run / "checkpoints", step):
            shutil.rmtree(folder)


def run_resumed(file: Path, deadline: float, *, small: bool = False) -> dict[str, Any]:
    """Runs with `deterministic` in bf16, compiled and not: one is left alone, one is killed in the middle and resumed. Are the
    last checkpoints the same to the bit? All of them run at the same time."""
    steps, half = (4, 2) if small else (STEPS, HALF)
    common = {"deterministic": "true", "mixed_precision": "bf16", "steps": steps, "checkpoint.every": half // 2}
    common |= SMALL if small else {}
    folder, ways = file.with_suffix(""), ("plain",) if small else ("plain", "compiled")
    shutil.rmtree(folder, ignore_errors=True)
    words, processes = dict[str, list[str]](), dict[str, Any]()
    for way in ways:
        settings = {**common, "checkpoint.keep": 9, "compile": str(way == "compiled").lower()}
        for name in (f"{way}_whole", f"{way}_killed"):
            words[name] = train_words(folder / name, settings)
            processes[name] = start(words[name], folder / f"{name}.txt")
    rows = [{"way": way, "state": "running", "steps": steps, "killed_after": half} for way in ways]
    write_whole(file, as_json({"rows": rows}))
    checkpoint_of = {way: step_folder(folder / f"{way}_killed" / "checkpoints", half) for way in ways}
    was_running = kill_each({checkpoint_of[way]: processes[f"{way}_killed"] for way in ways}, deadline)
    for way in ways:
        name = f"{way}_killed"
        drop_after(folder / name, half)
        processes[name] = start(words[name], folder / f"{name}_resumed.txt")
    for row, way in zip(rows, ways, strict=True):
        logs = folder / f"{way}_whole.txt", folder / f"{way}_killed_resumed.txt"
        names = f"{way}_whole", f"{way}_killed"
        states = [say_end(wait_until(processes[name], deadline), log) for name, log in zip(names, logs, strict=True)]
        row |= {"was_running": was_running[checkpoint_of[way]], "state": next((one for one in states if one != "done"), "done")}
        if row["state"] == "done":
            row |= _compared(folder / names[0], folder / names[1], logs[1], half, steps)
        write_whole(file, as_json({"rows": rows}))
    return {"rows": rows}


def _compared(whole: Path, resumed: Path, log: Path, half: int, steps: int) -> dict[str, Any]:
    lines, count = compare_checkpoints(*(step_folder(run / "checkpoints", steps) for run in (whole, resumed)))
    went_on = f"going on at step {half}" in log.read_text(errors="replace")
    return {"went_on": went_on, "tensors": count, "differences": lines[:5], "is_equal": went_on and count > 0 and not lines}


# ---------------------------------------------------------------------------------------------- DDP and FSDP


def run_parallel(file: Path, deadline: float, *, small: bool = False) -> dict[str, Any]:
    """The same deterministic run in float32 plain, by DDP of one process and by FSDP of one process: how far the last weights
    are from the plain ones. On a CPU, where these take two processes, FSDP is that of tests/fsdp_on_cpu.py."""
    cuda, folder = torch.cuda.is_available(), file.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"deterministic": "true", "mixed_precision": "no", "steps": 2 if small else 40, "checkpoint.every": "null"}
    settings |= SMALL if small else {}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1" if cuda else "2"]
    extra = {} if cuda else {"ACCELERATE_USE_CPU": "true"}
    ways: dict[str, tuple[list[str], dict[str, str]]] = {
        "plain": ([], {}),
        "DDP": (torchrun, extra),
        "FSDP": ([*torchrun, *([] if cuda else ["tests/fsdp_on_cpu.py"])], {**extra, **FSDP}),
    }
    rows = [{"way": way, "processes": 1 if way == "plain" or cuda else 2, "state": "running"} for way in ways]
    started = [
        start(train_words(folder / way, settings, launcher=launcher), folder / f"{way}.txt", variables)
        for way, (launcher, variables) in ways.items()
    ]
    plain: dict[str, torch.Tensor] = {}
    for row, process in zip(rows, started, strict=True):
        log = folder / f"{row['way']}.txt"
        row["state"] = say_end(wait_until(process, deadline), log)
        checkpoint = newest(folder / row["way"] / "checkpoints")[0]
        if row["state"] == "done" and checkpoint is not None:
            weights = read_tensors(checkpoint, "model")
            plain = plain or weights
            row["difference"] = max(float((weights[name] - plain[name]).abs().max()) for name in plain)
            row["plan"] = next((line.strip() for line in log.read_text().split("\n") if line.startswith("a step is")), "")
        write_whole(file, as_json({"rows": rows}))
    return {"rows": rows}


# ---------------------------------------------------------------------------------------------- in Markdown


def tests_table(tests: dict[str, Any]) -> str:
    lines = [f"{len(tests['tests'])} tests ended, the file {tests['state']}", "", "| test | | seconds |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {row['name']} | {row['outcome']} | {row['seconds']} |" for row in tests["tests"])])


def resumed_table(resumed: dict[str, Any]) -> str:
    lines = ["| | killed after | tensors | equal to the bit |", "| --- | --- | --- | --- |"]
    for row in resumed["rows"]:
        same = row["state"] if "is_equal" not in row else "yes" if row["is_equal"] else f"NO: {'; '.join(row['differences'])}"
        after = f"{row['killed_after']} of {row['steps']} steps" if "killed_after" in row else ""
        lines.append(f"| {row['way']} | {after} | {row.get('tensors', '')} | {same} |")
    return "\n".join(lines)


def parallel_table(parallel: dict[str, Any]) -> str:
    lines = ["| | | largest difference of a weight from the plain run's |", "| --- | --- | --- |"]
    for row in parallel["rows"]:
        value = f"{row['difference']:.1e}" if "difference" in row else row["state"]
        lines.append(f"| {row['way']} | {row.get('plan', '')} | {value} |")
    return "\n".join(lines)
