"""AdamW and Muon, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from ..config import Length, Span, UserError, config
from ..runtime.sharding import full, on_cpu, part_of
from ..storage.networks import list_differences

if TYPE_CHECKING:
    from accelerate import Accelerator


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


@config
class WarmupStableDecay:
    """The rate, after a linear warm-up, and then the cooldown: over the last `cooldown` (a share) of the steps down to `floor`
    times the rate, along 1 - sqrt(part), linearly or along half a cosine. Where the cooldown begins is decided late: a run that
    has not come to it may be given other `steps`, and `stop` may begin it.

    Hu et al. 2024, arXiv:2404.06395; 1 - sqrt and how long: Hägele et al. 2024, arXiv:2405.18392.
    """

    kind: Literal["wsd"]
    cooldown: float = pydantic.Field(0.2, gt=0, lt=1)
    curve: Literal["sqrt", "linear", "cosine"] = "sqrt"
    floor: float = pydantic.Field(0.0, ge=0, le=1)
    warmup: Length | None = None

    def cooldown_start(self, total: int) -> int:
        """The first step of the cooldown in a run of `total` steps."""
        return total - round(total * self.cooldown)

    def total_for(self, start: int) -> int:
        """The steps of the shortest run whose cooldown begins at step `start`."""
        total = max(start, int((start - 0.5) / (1 - self.cooldown)) - 1)
        while self.cooldown_start(total) < start:
            total += 1
        return total


Schedule = Annotated[Constant | Annealed | OneCycle | MultiStep | WarmupStableDecay, pydantic.Field(discriminator="kind")]
Beta = Annotated[float, pydantic.Field(ge=0, lt=1)]


@config
class MuonConfig:
    """`momentum` (Nesterov's) of the gradients, and how many `iterations` make its matrix orthogonal, roughly: five are usual,
    three took a CPU further in the same time."""

    momentum: Beta = 0.95
    iterations: int = pydantic.Field(3, ge=1)


@config
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) and its schedule; `clip` bounds the gradient's norm. With `muon` the
    matrices of the network move by Muon, at the same rate, and AdamW moves the rest."""

    lr: float = pydantic.Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = pydantic.Field(1e-8, gt=0)
    weight_decay: float = pydantic.Field(0.0, ge=0)
    clip: float | None = pydantic.Field(1.0, gt=0)
    muon: MuonConfig | None = None
    schedule: Schedule = pydantic.Field(default_factory=lambda: Constant(kind="constant"))


def build_optimizer(network: nn.Module, spec: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW, or Muon for the weights of convolutions and linear layers that have at least 16 inputs and outputs, and AdamW for
    the rest. torch's fused AdamW: one kernel for all parameters, and a step that can be left out without waiting for the
    device."""
    options = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay, "fused": True}
    if spec.muon is None:
        return torch.optim.AdamW(network.parameters(), **options)
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    matrices = [layer.weight for layer in layers if min(len(layer.weight), layer.weight[0].numel()) >= 16]
    chosen = {id(weight) for weight in matrices}
    return Muon(matrices, [weight for weight in network.parameters() if id(weight) not in chosen], spec.muon, **options)


class Muon(torch.optim.AdamW):
    """Each of `matrices` (out, in, ...) moves along its averaged gradient, made orthogonal: of the singular value decomposition
    U S V^T to U V^T, times 0.2 sqrt(max(out, in)), which is about as far as AdamW goes; `others` by AdamW.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(self, matrices: Sequence[Tensor], others: Sequence[Tensor], muon: MuonConfig, **options: Any) -> None:
        super().__init__(others, **options)
        if matrices:  # the group holds the settings, since torch copies and loads an optimizer by its groups alone
            self.add_param_group({"params": list(matrices), "muon": True, **asdict(muon)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state that `load_state_dict` and `deepcopy` give. torch's AdamW reads a step count of each of its
        parameters, and the matrices have only a momentum, so AdamW is shown its own groups alone."""
        groups = state["param_groups"]
        super().__setstate__({**state, "param_groups": [group for group in groups if not group.get("muon")]})
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Where `found_inf` () is set and not 0, nothing changes, as with torch's fused optimisers."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._move([weight for weight in group["params"] if weight.grad is not None], group)

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        for weight in matrices:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [weight.grad for weight in matrices if weight.grad is not None]
        momenta = [self.state[weight]["momentum_buffer"] for weight in matrices]
        rate: Any = group["lr"]
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            gone = found_inf > 0  # then each momentum moves towards itself, and nothing else moves
            gradients = [torch.where(gone, old, new) for old, new in zip(momenta, gradients, strict=True)]
            rate = rate * ~gone
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        if group["weight_decay"]:
            torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for weight, step in zip(matrices, map(_rows, ahead), strict=True):
            alike.setdefault((step.shape[0], step.shape[1]), []).append((weight, step))
        for shape, members in alike.items():
            ways = orthogonal(torch.stack([step for _, step in members]), group["iterations"])
            ways *= 0.2 * math.sqrt(max(shape)) * rate
            for (weight, _), way in zip(members, ways, strict=True):
                weight.sub_(_as(way, weight))


def _rows(tensor: Tensor) -> Tensor:
    """(out, ...) -> (out, in); without a copy for convolutions in channels_last."""
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).flatten(1)


def _as(rows: Tensor, weight: Tensor) -> Tensor:
    """What `_rows` made, in the weight's shape again."""
    if weight.ndim != 4:
        return rows.view(weight.shape)
    return rows.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)


def orthogonal(matrices: Tensor, iterations: int) -> Tensor:
    """(N, out, in) -> the same with singular values near 1 (after five iterations between 0.7 and 1.2), by Newton and Schulz's
    X <- a X + b X X^T X + c (X X^T)^2 X.

    As each step is X <- P X with P = a + b G + c G^2, G = X X^T, the product of all P is made first, of small matrices
    (G <- P G P), and only then times X: half of the work. For float32 the two products with X are in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.dtype == torch.float32 else x
    gram, step, whole = (x @ x.transpose(1, 2)).to(matrices.dtype), None, None
    for _ in range(iterations):
        gram = gram if step is None else step @ gram @ step
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        whole = step if whole is None else step @ whole
    assert whole is not None
    x = whole.to(x.dtype) @ x
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)


def clip_gradients(accelerator: "Accelerator", model: nn.Module, spec: OptimizerConfig) -> Tensor:
    """Bound the norm of all gradients together to `clip`, where it is set; gives the norm before, () on the device."""
    norm: Any = accelerator.clip_grad_norm_(model.parameters(), spec.clip or float("inf"))
    return full(norm)


def update(optimizer: Any, rate: float, norm: Tensor) -> None:
    """One step at this learning rate, then no gradients. A gradient whose `norm` is not finite changes nothing, neither
    weights nor moments, and a GPU decides that itself: nobody waits for it.

    `optimizer` is the one that accelerate prepared; under fp16 its scaler leaves such steps out.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    finite = torch.isfinite(norm)
    if optimizer.scaler is None and not norm.is_cpu:
        optimizer.optimizer.found_inf = (~finite).float()  # what torch's fused kernels look at
    if not norm.is_cpu or finite:
        optimizer.step()
    optimizer.zero_grad()


def _one_cycle(spec: OneCycle, lr: float, step: int, total: int) -> float:
    low, end = lr / spec.div_factor, lr / spec.div_factor / spec.final_div_factor
    up = spec.pct_start * total - 1
    phases = [(0.0, up, low, lr), (up, total - 1, lr, end)]
    if spec.three_phase:
        phases = [(0.0, up, low, lr), (up, 2 * up, lr, low), (2 * up, total - 1, low, end)]
    begin, finish, first, last = next((phase for phase in phases if step <= phase[1]), phases[-1])
    part = (step - begin) / (finish - begin) if finish > begin else 1.0
    if spec.anneal_strategy == "linear":
        return first + (last - first) * part
    return last + (first - last) / 2 * (1 + math.cos(math.pi * part))


def learning_rate(spec: OptimizerConfig, resolve: Callable[[int | Span], int]) -> Callable[[int, int], float]:
    """(step, total) -> the rate of that optimiser step, counted from 0, in a run of `total`. `resolve` turns lengths into
    steps."""
    schedule = spec.schedule
    if isinstance(schedule, OneCycle):
        return lambda step, total: _one_cycle(schedule, spec.lr, step, total)
    warmup = resolve(schedule.warmup) if schedule.warmup is not None else 0
    milestones = [resolve(milestone) for milestone in schedule.milestones] if isinstance(schedule, MultiStep) else []

    def rate(step: int, total: int) -> float:
        warm = spec.lr * min(1.0, (step + 1) / (warmup + 1))
        if isinstance(schedule, MultiStep):
            return warm * schedule.gamma ** sum(step >= milestone for milestone in milestones)
        if isinstance(schedule, Annealed):
            return warm * _annealed(schedule.kind, schedule.floor, step, warmup, total)
        if isinstance(schedule, WarmupStableDecay):
            return warm * _annealed(schedule.curve, schedule.floor, step, schedule.cooldown_start(total), total)
        return warm

    return rate


def _annealed(curve: Literal["sqrt", "linear", "cosine"], floor: float, step: int, first: int, total: int) -> float:
    """1 up to step `first`, and from there down to `floor` at the end of `total` steps."""
    part = min(1.0, max(0, step - first) / max(1, total - first))
    left = {"sqrt": 1 - math.sqrt(part), "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}
    return floor + (1 - floor) * left[curve]


_MOMENTS = {False: ("step", "exp_avg", "exp_avg_sq"), True: ("momentum_buffer",)}  # by whether Muon moves the parameter


def optimizer_state(optimizer: torch.optim.Optimizer, network: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """An optimiser's moments on the CPU, keyed `PARAMETER/MOMENT`; nothing where they need not be kept."""
    states = [(name, optimizer.state.get(parameter, {})) for name, parameter in network.named_parameters()]
    return on_cpu({f"{name}/{moment}": value for name, moments in states for moment, value in moments.items()}, keep=keep)


def load_optimizer_state(optimizer: torch.optim.Optimizer, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put moments saved by `optimizer_state` back, on each parameter's device (the step counter as the optimiser keeps it).

    An optimizer that has taken no step yet keeps no moments, so an empty `state` changes nothing. Moments of what it trains
    besides this network stay as they are. A UserError where a parameter
    lacks a moment, where one has another shape, or where the moments are of other parameters or of another optimizer.
    """
    if not state:
        return
    names = {parameter: name for name, parameter in network.named_parameters()}
    expected = {
        f"{names[parameter]}/{moment}": parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in names
        for moment in _MOMENTS[bool(group.get("muon"))]
    }
    mistakes = list_differences(expected.keys() - state.keys(), state.keys() - expected.keys())
    mistakes += [
        f"{key} has the shape {tuple(state[key].shape)} and not {tuple(parameter.shape)}"
        for key, parameter in expected.items()
        if key in state and state[key].shape not in ((), parameter.shape)
    ][:3]
    if mistakes:
        raise UserError(
            f"the optimizer's state does not fit this network and optimizer: {'; '.join(mistakes)}; go on from another "
            "checkpoint, or start anew with init_from"
        )
    for key, parameter in expected.items():
        value = state[key]
        loaded = value.to(parameter.device, copy=True)
        if value.shape == parameter.shape and not key.endswith("/step"):
            # in the parameter's memory format, which fused kernels take for granted
            loaded = torch.empty_like(parameter, dtype=value.dtype).copy_(part_of(parameter, value))
        optimizer.state[parameter][key.rpartition("/")[2]] = loaded
