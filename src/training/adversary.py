"""The adversary's weight: as the gradients say, and smaller after a rollback; and the guard that asks for one."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pydantic
import torch
from torch import Tensor

from ..config import config

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST = 1e4  # the largest adaptive weight


class AdaptiveWeight:
    """The ratio |gradient of the reconstruction| / |gradient of the verdict| at the decoder's last layer (Eq. 7, Esser et al.
    2020, arXiv:2012.09841), over the global batch.

    `value` () is used by the step after the one that measured it, so that no step needs a collective in its middle; it is
    0 until then.
    """

    def __init__(self, last_layer: Tensor, accelerator: "Accelerator", saved: float = 0.0) -> None:
        self.last_layer, self.accelerator = last_layer, accelerator
        self.value = torch.tensor(saved, device=accelerator.device, dtype=last_layer.dtype)
        self._sums: Tensor | None = None

    def measure(self, reconstruction: Tensor, verdict: Tensor) -> None:
        """Add a micro-batch: two losses (), sums over its images, whose graphs are kept."""
        losses = reconstruction, verdict
        pair = torch.stack([torch.autograd.grad(loss, self.last_layer, retain_graph=True)[0] for loss in losses])
        self._sums = pair if self._sums is None else self._sums + pair

    def update(self, finite: Tensor) -> None:
        """All micro-batches are measured: set the next step's value, unless this step was not `finite`, () bool."""
        if self._sums is None:  # nothing was measured: what was known is of another stage
            self.value = torch.zeros_like(self.value)
            return
        sums: Any = self.accelerator.reduce(self._sums)
        ours, theirs = sums.flatten(1).norm(dim=1)
        ratio = (ours / theirs.clamp(min=1e-12)).clamp(max=MOST)
        self.value = torch.where(finite & torch.isfinite(ratio), ratio, self.value)
        self._sums = None


def winner_warnings(values: dict[str, float]) -> list[str]:
    """A warning where, by what was logged, one of the two networks has won."""
    lines = []
    if values.get("discriminator_accuracy", 0.5) > 0.98:
        lines.append(
            f"the discriminator has won (accuracy {values['discriminator_accuracy']:.3f}), so its verdict says nothing; lower "
            "discriminator_optimizer.lr, or start it later"
        )
    if values.get("adaptive_weight", 0.0) >= MOST:
        lines.append("the adaptive weight is at its limit: the discriminator's gradient is as good as 0")
    return lines


@config
class GuardConfig:
    """In adversarial stages: when held-out reconstruction is worse than the stage's best by `worse_factor`, say so; with
    `rollback` go back to the checkpoint before, with the adversary's weight times `shrink`, at most `max_rollbacks` times."""

    worse_factor: float = pydantic.Field(1.5, gt=1)
    rollback: bool = False
    shrink: float = pydantic.Field(0.25, gt=0, lt=1)
    max_rollbacks: int = pydantic.Field(3, ge=1)


@dataclass
class Guard:
    """Watches one run: the stage's best reconstruction so far, its start included, the last healthy step, the rollbacks; and
    the step of the last checkpoint before the stage's adversary began, where a rollback goes when no step was healthy.

    All of it is in the checkpoint; `rollbacks` enters every seed and the adversary's weight.
    """

    stage: int = 0
    best: float = float("inf")
    healthy_step: int | None = None
    rollbacks: int = 0
    before_step: int | None = None

    def saved(self) -> dict[str, Any]:
        return {**asdict(self), "best": self.best if self.best < float("inf") else None}

    @classmethod
    def load(cls, saved: dict[str, Any] | None) -> "Guard":
        return cls(**{key: value for key, value in (saved or {}).items() if key != "best" or value is not None})

    def enter_stage(self, stage: int) -> bool:
        """Begin a stage; gives whether it is new, so that its start must be measured."""
        is_new = stage != self.stage
        if is_new:
            self.stage, self.best, self.healthy_step, self.before_step = stage, float("inf"), None, None
        return is_new

    def saved_before(self, step: int) -> None:
        """There is a checkpoint of `step`, and the stage's adversary has not begun there."""
        self.before_step = step or None  # nothing is saved at step 0

    @property
    def back_to(self) -> int | None:
        """The step that a rollback goes to, or None where there is none."""
        return self.healthy_step if self.healthy_step is not None else self.before_step

    def watch(self, spec: GuardConfig, step: int, value: float, *, adversary: bool = True) -> bool:
        """Whether the held-out reconstruction loss `value` is one to go on from; remembers the best and the step. A stage may
        begin with a dip (a higher learning rate, fresh moments): before its `adversary` has begun this is no fault of it, and
        the best is counted from there."""
        if not adversary and value > spec.worse_factor * self.best:
            self.best = value
        healthy = value <= spec.worse_factor * self.best  # False for NaN
        if healthy:
            self.best, self.healthy_step = min(self.best, value), step or None  # nothing is saved at step 0
        return healthy

    def explain(self, spec: GuardConfig, step: int, value: float, values: dict[str, float]) -> str:
        state = f"step {step}: held-out reconstruction is {value:.4g}, {value / self.best:.2f} times the stage's best"
        for name in ("discriminator_accuracy", "adaptive_weight"):
            if name in values:
                state += f", {name.replace('_', ' ')} {values[name]:.3g}"
        if not spec.rollback:
            return f"{state}: the adversary is too strong; lower its weight, or set guard.rollback"
        if self.rollbacks >= spec.max_rollbacks:
            return f"{state}: rolled back {self.rollbacks} times already (guard.max_rollbacks), so the run goes on as it is"
        if self.back_to is None:
            return f"{state}: there is no checkpoint of this stage from before it, so the run goes on as it is"
        weight = spec.shrink ** (self.rollbacks + 1)
        return f"{state}: going back to step {self.back_to}, with {weight:g} times the adversary's weight"

    def rolls_back(self, spec: GuardConfig) -> bool:
        return spec.rollback and self.rollbacks < spec.max_rollbacks and self.back_to is not None
