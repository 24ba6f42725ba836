"""What a new run that goes on from another one keeps of it, and which keys of the config it may change."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import to_steps
from .autoencoder_stages import StagedConfig
from .config import TrainConfig

MAY_CHANGE = (
    *("name", "steps", "stages", "batch_size", "optimizer", "discriminator_optimizer", "ema"),
    *("process.loss", "loss_reduction", "perceptual", "guard", "times", "label_dropout", "condition_dropout"),
    *("noise.candidates", "preview", "mixed_precision", "deterministic", "cpu_threads"),
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
        one_is_none = (at(before, key) is None) != (at(after, key) is None)
        if key.endswith("optimizer.muon") or (key == "ema.snapshot_every" and one_is_none):
            refused.append(key)
    if any(at(settings, "times.kind") == "second_moment" for settings in (before, after)):
        refused += [key for key in keys if key in ("times", "times.kind", "times.history")]
    return refused


def in_cooldown(progress: Mapping[str, Any]) -> bool:
    """Whether the rate of a run had begun to fall at the checkpoint with this progress.json."""
    return progress.get("step", 0) > progress.get("cooldown", {}).get("start", float("inf"))


def ways_on(
    run: Path,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    keys: Sequence[str],
    progress: Mapping[str, Any] | None = None,
) -> str:
    """How the run, which cannot go on with these changes, is the start of a new one: the rest of a sentence."""
    weights = f"init_from {run} there starts from its weights alone"
    if cannot_change(before, after, keys):
        return f"; {weights}, where the network is the same"
    place = "from here"
    if progress is not None and in_cooldown(progress) and moves_cooldown(keys):
        if (step := progress["cooldown"]["before"]) is None:
            return f"; {weights}"
        place = f"from step {step}, before its cooldown,"
    return f"; to go on with it {place} in a new run, add --continue-as NAME ({weights})"


def moves_cooldown(keys: Sequence[str]) -> bool:
    """Whether a change of these keys of the config asks for another cooldown."""
    return any(key.split(".")[0] == "steps" or key.startswith("optimizer.schedule") for key in keys)


def images_seen(cfg: TrainConfig, step: int, num_images: int) -> int:
    """How many images a run sees in its first `step` steps; an epoch has `num_images`. The last of the stages has no end."""
    if not isinstance(cfg, StagedConfig):
        return step * cfg.batch_size
    count = 0
    for i, stage in enumerate(cfg.stages, 1):
        batch = stage.batch_size or cfg.batch_size
        taken = min(step, to_steps(stage.steps, batch_size=batch, num_images=num_images)) if i < len(cfg.stages) else step
        count, step = count + taken * batch, step - taken
    return count
