"""What lies in the directory of a run, as its report needs it: what is missing or damaged is passed over."""

import io
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WARNINGS, LOG_LINES, LOG_BYTES = 10, 40, 1 << 20


class Kind(NamedTuple):
    """A kind of run: the key that only its config has, its script, and what to do when it has finished."""

    key: str
    title: str
    script: str
    next: str = "python sample.py {run} --frames"


KINDS = (
    Kind("stages", "autoencoder", "train_vae.py", "python train_ldm.py -cfg CONFIG --set autoencoder={run}"),
    Kind(
        "classifier",
        "classifier of noised images",
        "train_classifier.py",
        "python sample.py DIFFUSION_RUN --guidance-method classifier --classifier {run}",
    ),
    Kind("source", "blending between two densities", "train_iadb.py"),
    Kind("autoencoder", "diffusion on latents", "train_ldm.py"),
    Kind("process", "diffusion on pixels", "ddpm_accelerate.py"),
)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole: the last one of a run that was killed, or is writing, may not be."""
    metrics = []
    with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                values = json.loads(line)
                if isinstance(values, dict) and isinstance(values.get("step"), int):
                    metrics.append(values)
    return metrics


def read_document(path: Path, kind: type) -> Any:
    """A JSON file, or None where it is missing, damaged or not of this kind: the page shows the rest all the same."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, kind) else None


def read_log(path: Path) -> tuple[list[str], list[str]]:
    """The last warnings of a log, and its last lines."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, io.SEEK_END) - LOG_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return [], []
    return [line for line in lines if " warning: " in line][-WARNINGS:], lines[-LOG_LINES:]


def finite_or_none(value: Any) -> float | None:
    """A number, or None where it is not finite (null in metrics.jsonl) or no number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class Progress:
    """How many images a run had seen at which step, and how many it sees in a second, by the lines of its metrics."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], images_per_epoch: Any) -> None:
        per_epoch = finite_or_none(images_per_epoch)
        self._steps, self._images = [0], [0.0]
        intervals = list[tuple[float, float]]()  # images between two lines, and seconds
        for line in lines:
            epoch, speed = finite_or_none(line.get("epoch")), finite_or_none(line.get("images_per_second"))
            if epoch is None or per_epoch is None or line["step"] <= self._steps[-1]:
                continue
            self._steps.append(line["step"])
            self._images.append(epoch * per_epoch)
            if speed:
                count = self._images[-1] - self._images[-2]
                intervals.append((count, count / speed))
        count, seconds = np.sum([(0.0, 0.0), *intervals[-10:]], axis=0).tolist()
        self.images_per_second = count / seconds if seconds else None

    def images_at(self, step: float) -> float | None:
        """Between two lines in proportion, after the last one as it went last; None where no line says it."""
        if len(self._steps) < 2:
            return None
        i = min(max(1, bisect_left(self._steps, step)), len(self._steps) - 1)
        (first, last), (low, high) = self._steps[i - 1 : i + 1], self._images[i - 1 : i + 1]
        return low + (high - low) * (step - first) / (last - first)

    def seconds_left(self, step: float | None, steps: float | None) -> float | None:
        """To the last step at the speed of the latest lines; None where there is no end, or no line says the speed."""
        images, end = self.images_at(step or 0), self.images_at(steps or 0)
        if not (step and steps and images and end and self.images_per_second):
            return None
        return max(0.0, end - images) / self.images_per_second
