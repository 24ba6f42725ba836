"""What a new run that goes on from another one keeps of it, and which keys of the config it may change."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Span, to_steps

MAY_CHANGE = (
    "name",
    "optimizer",
    "discriminator_optimizer",
    "steps",
    "stages",
    "ema",
    "process.loss",
    "loss_reduction",
    "perceptual",
    "guard",
    "times",
    "label_dropout",
    "preview",
    "mixed_precision",
    "deterministic",
    "cpu_threads",
    "batch_size",
)


def at(settings: Any, key: str) -> Any:
    """What stands in the plain config `settings` under a dotted key; None where there is nothing."""
    for part in key.split("."):
        if isinstance(settings, list):
            settings = settings[int(part)] if int(part) < len(settings) else None
        else:
            settings = (settings or {}).get(part)
    return settings


def cannot_change(before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Those of the `keys` in which two plain configs differ that would change what a checkpoint's tensors are, or which images
    come next. Moments of Muon and AdamW are different ones, as are what times learn from losses and how many averages there
    are."""
    refused = [key for key in keys if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)]
    for key in keys:
        was, now = at(before, key), at(after, key)
        one_is_none = (was is None) != (now is None)
        if key.endswith("optimizer.muon") or (key == "ema.snapshot_every" and one_is_none):
            refused.append(key)
    learned = [at(settings, "times.kind") == "second_moment" for settings in (before, after)]
    if any(learned):
        refused += [key for key in keys if key in ("times", "times.kind", "times.history")]
    return refused


def ways_on(run: Path, before: Mapping[str, Any], after: Mapping[str, Any], keys: Sequence[str]) -> str:
    """How the run, which cannot go on with these changes, is the start of a new one: the rest of a sentence."""
    weights = f"init_from {run} there starts from its weights alone"
    if cannot_change(before, after, keys):
        return f"; {weights}, where the network is the same"
    return f"; to go on with it from here in a new run, add --continue-as NAME ({weights})"


def images_seen(settings: Mapping[str, Any], step: int, num_images: int) -> int:
    """How many images a run of this plain config sees in its first `step` steps; an epoch has `num_images`."""
    stages = settings.get("stages")
    if not stages:
        return step * settings["batch_size"]
    count = 0
    for i, stage in enumerate(stages):
        batch, length = stage.get("batch_size") or settings["batch_size"], stage["steps"]
        span = length if isinstance(length, int) else Span(**length)
        steps = to_steps(span, batch_size=batch, num_images=num_images)
        taken = step if i == len(stages) - 1 else min(step, steps)
        count, step = count + taken * batch, step - taken
    return count
