"""When the learning rate of a run begins to fall, and how long the run then still takes."""

import math
from collections.abc import Mapping
from typing import Any

from ..config import UserError
from .config import DiffusionConfig, StepsConfig, TrainConfig
from .optimizer import WarmupStableDecay


class Cooldown:
    """The cooldown of a run that was given `requested` steps: it begins at step `start`, as `optimizer.schedule` of kind wsd
    says, or earlier where `stop` begins it; `total` is the steps of the run. With other schedules `start` is None.

    `progress` is the progress.json of the checkpoint that the run goes on from. A UserError where a run is given other `steps`
    whose cooldown would have begun before that checkpoint.
    """

    def __init__(self, cfg: TrainConfig, requested: int, progress: Mapping[str, Any]) -> None:
        schedule = cfg.optimizer.schedule
        self._schedule = schedule if isinstance(schedule, WarmupStableDecay) and isinstance(cfg, StepsConfig) else None
        self._stop = cfg.stop if isinstance(cfg, DiffusionConfig) else None
        self._requested, saved, step = requested, progress.get("cooldown", {}), progress.get("step", 0)
        was_stopped, is_same = bool(saved) and saved["total"] != saved["requested"], saved.get("requested") == requested
        self.total = requested
        if self._schedule is not None and was_stopped and is_same:
            self.total = self._schedule.total_for(saved["start"])
        self._lowest, self._at, self._before = saved.get("lowest"), saved.get("lowest_at", 0), saved.get("before")
        self._count = 0 if was_stopped and not is_same else saved.get("not_lower", 0)
        if self._before is None and self.start is not None and 0 < step <= self.start:  # a run that had no cooldown until now
            self._before = step
        if self._schedule is not None and self.start != saved.get("start") and step > (self.start or 0):
            raise UserError(
                f"the cooldown of a run of {self.total} steps begins at {self.start}, and this checkpoint is of step {step}; "
                f"set steps to {self._schedule.total_for(step)} to begin it there, or to more"
            )

    @property
    def start(self) -> int | None:
        return self._schedule.cooldown_start(self.total) if self._schedule is not None else None

    def watch(self, step: int, held_out_loss: float) -> str:
        """Take in the held-out loss of `step`. Where it was not lower than the lowest one for `stop.patience` measurements,
        begin the cooldown now: `total` is set to what is left. Gives a line that says so, or nothing."""
        if self._stop is None or self._schedule is None or self.start is None or step >= self.start:
            return ""
        if self._lowest is None and not math.isfinite(held_out_loss):
            return ""
        if self._lowest is None or held_out_loss < self._lowest:  # NaN is not lower
            self._lowest, self._at, self._count = held_out_loss, step, 0
            return ""
        self._count += 1
        if self._count < self._stop.patience:
            return ""
        self.total = self._schedule.total_for(step)
        return (
            f"the held-out loss was lowest at step {self._at} ({self._lowest:.4g}) and has not been lower in {self._count} "
            f"measurement{'s' * (self._count > 1)} since, so the cooldown begins at step {step}, and the run ends at step "
            f"{self.total}"
        )

    def to_save(self, step: int) -> dict[str, Any]:
        """What the progress.json of the checkpoint of `step` keeps of it. The last checkpoint before the cooldown is spared."""
        if self.start is None:
            return {}
        self._before = step if step <= self.start else self._before
        watched = {"lowest": self._lowest, "lowest_at": self._at, "not_lower": self._count}
        place = {"requested": self._requested, "total": self.total, "start": self.start, "before": self._before}
        return {"cooldown": place | (watched if self._stop is not None else {})}
