"""What the benchmarks share: the machine in words, measuring in turns, goals, two cores for everyone alike."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# The same for all: threads that wait spin for a moment, and glibc keeps the memory of a batch for the next.
QUIET = {"GOMP_SPINCOUNT": "10000", "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
QUIET |= {"MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def environment() -> dict[str, str]:
    """What a process that is measured is started with, the same for all."""
    return {**QUIET, **os.environ}


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(*packages: str) -> str:
    """What the numbers were measured on, with the versions of more packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = [f"{name} {installed(name) or 'missing'}" for name in ("diffusers", *packages)]
    return f"torch {torch.__version__}, {', '.join(versions)}, {model}, {torch.get_num_threads()} threads{device}"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """The seconds of each, round by round, measured in turns, so that what else the machine does falls on all alike."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + warmup):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn >= warmup:
                spent[name].append(time.perf_counter() - began)
    return spent


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each, measured in turns."""
    return {name: statistics.median(times) for name, times in in_turns(calls, rounds).items()}


def goal(what: str, value: float, at_least: float) -> str:
    """A line that says whether a goal is met."""
    return f"{'met' if value >= at_least else 'MISSED'}: {what}: {value:.3f} (goal: at least {at_least:g})"
