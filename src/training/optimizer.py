"""AdamW, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import pydantic
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config import Length, Span, config
from .parts import full, on_cpu, part_of


@config
class Constant:
    """The rate, after a linear warm-up."""

    kind: Literal["constant"]
    warmup: Length | None = None


@config
class Annealed:
    """From the rate down to `floor` times it, linearly or along half a cosine, after a linear warm-up."""

    kind: Literal["linear", "cosine"]
    warmup: Length | None = None
    floor: float = pydantic.Field(0.0, ge=0, le=1)


@config
class OneCycle:
    """torch's OneCycleLR with the rate as its max_lr (Smith & Topin 2017, arXiv:1708.07120); the betas are not cycled."""

    kind: Literal["one_cycle"]
    pct_start: float = pydantic.Field(0.3, gt=0, lt=1)
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: float = pydantic.Field(25.0, gt=0)
    final_div_factor: float = pydantic.Field(1e4, gt=0)
    three_phase: bool = False


@config
class MultiStep:
    """The rate times `gamma` for each milestone that is past, after a linear warm-up."""

    kind: Literal["multistep"]
    milestones: tuple[Length, ...]
    gamma: float = pydantic.Field(0.1, gt=0)
    warmup: Length | None = None


Schedule = Annotated[Constant | Annealed | OneCycle | MultiStep, pydantic.Field(discriminator="kind")]
Beta = Annotated[float, pydantic.Field(ge=0, lt=1)]


@config
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) and its schedule; `clip` bounds the gradient's norm."""

    lr: float = pydantic.Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = pydantic.Field(1e-8, gt=0)
    weight_decay: float = pydantic.Field(0.0, ge=0)
    clip: float | None = pydantic.Field(1.0, gt=0)
    schedule: Schedule = pydantic.Field(default_factory=lambda: Constant(kind="constant"))


def adamw(parameters: Iterable[Tensor], spec: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW: one kernel for all parameters, and a step that can be left out without waiting for the device."""
    return torch.optim.AdamW(parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)


def clip_gradients(accelerator: Accelerator, model: nn.Module, spec: OptimizerConfig) -> Tensor:
    """Bound the norm of all gradients together to `clip`, where it is set; gives the norm before, () on the device."""
    norm = accelerator.clip_grad_norm_(model.parameters(), spec.clip or float("inf"))
    assert isinstance(norm, Tensor)
    return full(norm)


def update(optimizer: Any, rate: float, norm: Tensor) -> None:
    """One step at this learning rate, then no gradients. A gradient whose `norm` is not finite changes nothing, neither
    weights nor moments, and the device decides that: nobody waits for it.

    `optimizer` is the one that accelerate prepared; under fp16 its scaler leaves such steps out.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    if optimizer.scaler is None:
        optimizer.optimizer.found_inf = (~torch.isfinite(norm)).float()  # what torch's fused kernels look at
    optimizer.step()
    optimizer.zero_grad()


def _one_cycle(spec: OneCycle, lr: float, step: int, total: int) -> float:
    low, end = lr / spec.div_factor, lr / spec.div_factor / spec.final_div_factor
    up = spec.pct_start * total - 1
    if spec.three_phase:
        phases = [(up, low, lr), (2 * up, lr, low), (total - 1, low, end)]
    else:
        phases = [(up, low, lr), (total - 1, lr, end)]
    begin = 0.0
    for i, (finish, first, last) in enumerate(phases):
        if step <= finish or i == len(phases) - 1:
            part = (step - begin) / (finish - begin) if finish > begin else 1.0
            if spec.anneal_strategy == "linear":
                return first + (last - first) * part
            return last + (first - last) / 2 * (1 + math.cos(math.pi * part))
        begin = finish
    raise AssertionError


def learning_rate(spec: OptimizerConfig, total: int, resolve: Callable[[int | Span], int]) -> Callable[[int], float]:
    """step -> the rate of that optimiser step, counted from 0, in a run of `total`. `resolve` turns lengths into steps."""
    schedule = spec.schedule
    if isinstance(schedule, OneCycle):
        return lambda step: _one_cycle(schedule, spec.lr, step, total)
    warmup = resolve(schedule.warmup) if schedule.warmup is not None else 0
    milestones = [resolve(milestone) for milestone in schedule.milestones] if isinstance(schedule, MultiStep) else []

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup + 1))
        if isinstance(schedule, MultiStep):
            return spec.lr * warm * schedule.gamma ** sum(step >= milestone for milestone in milestones)
        if isinstance(schedule, Annealed):
            part = min(1.0, max(0, step - warmup) / max(1, total - warmup))
            curve = (1 + math.cos(math.pi * part)) / 2 if schedule.kind == "cosine" else 1 - part
            return spec.lr * warm * (schedule.floor + (1 - schedule.floor) * curve)
        return spec.lr * warm

    return rate


def names_of(network: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in network.named_parameters()}


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[Any, str], *, keep: bool = True) -> dict[str, Tensor]:
    """An optimiser's moments on the CPU, keyed `PARAMETER/MOMENT`; nothing where they need not be kept."""
    moments = {
        f"{names[parameter]}/{moment}": value
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
    }
    return on_cpu(moments, keep=keep)


def load_optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[Any, str], state: Mapping[str, Tensor]) -> None:
    """Put moments saved by `optimizer_state` back, on each parameter's device (the step counter as the optimiser keeps it)."""
    for parameter, name in names.items():
        own = {key.rpartition("/")[2]: value for key, value in state.items() if key.rpartition("/")[0] == name}
        if own:
            optimizer.state[parameter] = {
                moment: torch.empty_like(parameter, dtype=value.dtype).copy_(part_of(parameter, value))  # in the parameter's
                if value.shape == parameter.shape  # memory format, which fused kernels take for granted
                else value.to(parameter.device)
                for moment, value in own.items()
            }
