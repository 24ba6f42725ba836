"""A run's trackers (TensorBoard, wandb, trackio): its values and images for people. One that fails never ends the run."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import dump
from .failures import Warn, reason_of


def _flatten(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)


def start_trackers(accelerator: Any, project: str, run_dir: Path, settings: Any, step: int, warn: Warn) -> None:
    """Open the trackers under the run's name, to go on at `step`; a tracker that fails to open is left out.

    A run that goes on in its folder is the same run in wandb, by its id, and in trackio, by its name.
    """
    config = dict(_flatten(dump(settings)))
    identity = hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": run_dir.name, "id": identity[:16], "resume": "allow"},
        "trackio": {"name": f"{run_dir.name}-{identity[:8]}", "resume": "allow", "embed": False},
    }
    wanted, opened = accelerator.log_with, []
    for tracker in wanted:
        accelerator.log_with, accelerator.trackers = [tracker], []
        try:
            accelerator.init_trackers(project, config=config, init_kwargs=options)
            opened += accelerator.trackers
        except Exception as error:  # whatever a service or its library raises
            warn(str(getattr(tracker, "value", tracker)), reason_of(error))
    accelerator.log_with, accelerator.trackers = wanted, opened


def for_each_tracker(accelerator: Any, warn: Warn, do: Callable[[], Any]) -> None:
    """Call `do` with one tracker of the accelerator after the other: where one fails, whatever it raises, the others go on."""
    opened = accelerator.trackers
    try:
        for tracker in opened:
            accelerator.trackers = [tracker]
            try:
                do()
            except Exception as error:
                warn(str(tracker.name), reason_of(error))
    finally:
        accelerator.trackers = opened


def log_images(accelerator: Any, images: Mapping[str, Path], step: int, warn: Warn, *, may_leave: bool = True) -> None:
    """Show image files, {name: file}, in all trackers at `step`, on the first process. A file that is not there is left out.
    Images that may not leave this machine are not shown in wandb."""
    if accelerator.is_main_process:
        there = {name: path for name, path in images.items() if path.is_file()}

        def show() -> None:
            if may_leave or accelerator.trackers[0].name != "wandb":
                _show(accelerator.trackers[0], there, step)

        for_each_tracker(accelerator, warn, show)


def _show(tracker: Any, images: Mapping[str, Path], step: int) -> None:
    import numpy as np
    from PIL import Image

    for name, path in images.items():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":  # accelerate's tracker of it takes no images
            import trackio  # pyright: ignore[reportMissingImports]

            tracker.tracker.log({name: trackio.Image(pixels)}, step=step)
        else:
            tracker.log_images({name: [pixels]}, step=step)


def finish_trackers(accelerator: Any, warn: Warn) -> None:
    """Close all trackers; afterwards the accelerator has none."""
    for_each_tracker(accelerator, warn, lambda: accelerator.trackers[0].finish())
    accelerator.trackers = []
