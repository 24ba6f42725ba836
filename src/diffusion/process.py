"""The one process behind DDPM, DDIM and IADB: add noise, make a target, read a network's output.

Every target is linear in the clean picture and the noise, y = p x0 + q eps, so reading an output is one 2x2 solve of
{x_t = alpha x0 + sigma eps, y = p x0 + q eps}.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import pydantic
import torch
from torch import Tensor

from ..config import config, wrong
from .schedules import BlendSchedule, BlendScheduleConfig, Level, ScheduleConfig, TableSchedule, build_schedule

Target = Literal["eps", "x0", "v", "blend"]
Variance = Literal["small", "large", "learned"]

# p and q of each target at a level. v: Eq. (App. D), Salimans & Ho 2022, arXiv:2202.00512; blend: x0 - eps.
COEFFICIENTS: dict[str, Callable[[Level], tuple[Tensor, Tensor]]] = {
    "eps": lambda level: (torch.zeros_like(level.alpha), torch.ones_like(level.alpha)),
    "x0": lambda level: (torch.ones_like(level.alpha), torch.zeros_like(level.alpha)),
    "v": lambda level: (-level.sigma, level.alpha),
    "blend": lambda level: (torch.ones_like(level.alpha), -torch.ones_like(level.alpha)),
}


class Prediction(NamedTuple):
    """What a network's output says: x0 and eps (B, ...), and the learned variance's fraction in [0, 1] or None."""

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None


class Losses(NamedTuple):
    """Per sample, (B,): `loss` is what is trained."""

    loss: Tensor


class Denoiser(Protocol):
    """All that a solver sees of a network."""

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction: ...


def like(values: Tensor, x: Tensor) -> Tensor:
    """Float64 values () or (B,), made ready to multiply `x` (B, ...): its device, at least float32, broadcastable."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (
        values.to(dtype)
        .to(x.device, non_blocking=True)
        .reshape(values.shape + (1,) * (x.ndim - values.ndim if values.ndim else 0))
    )


@config
class TimeInput:
    """What the network is told of the time, times `scale`: the table's `index`, the signal coefficient `alpha`, or `t`
    in [0, 1] (index / steps on a table)."""

    kind: Literal["index", "alpha", "t"] = "index"
    scale: float = pydantic.Field(1.0, gt=0)


@dataclass(frozen=True, kw_only=True)
class Process:
    """Schedule, target, variance and what the network is fed; it holds no network.

    Times `t` are float64 or integer tensors on the CPU, () or (B,); pictures are (B, C, ...) on any device.
    """

    schedule: TableSchedule | BlendSchedule
    target: Target
    variance: Variance = "large"
    time_input: TimeInput = TimeInput()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps (Eq. 4, arXiv:2006.11239)."""
        alpha, sigma = self.schedule.level(t)
        return like(alpha, x0) * x0 + like(sigma, x0) * eps

    def make_target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """y = p x0 + q eps, what the network is asked for."""
        p, q = COEFFICIENTS[self.target](self.schedule.level(t))
        return like(p, x0) * x0 + like(q, x0) * eps

    def read(self, y: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Solve for x0 and eps in at least float32: x0 = (q x_t - sigma y) / d, eps = (alpha y - p x_t) / d,
        d = alpha q - sigma p. With learned variance `y` is (B, 2C, ...), the second half v in [-1, 1]."""
        fraction = None
        if self.variance == "learned":
            y, v = y.chunk(2, dim=1)
            fraction = (v.to(torch.promote_types(v.dtype, torch.float32)) + 1) / 2
        level = self.schedule.level(t)
        p, q = COEFFICIENTS[self.target](level)
        d = level.alpha * q - level.sigma * p
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        y = y.to(x_t.dtype)
        x0 = like(q / d, x_t) * x_t - like(level.sigma / d, x_t) * y
        eps = like(level.alpha / d, x_t) * y - like(p / d, x_t) * x_t
        return Prediction(x0, eps, fraction)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is fed at times `t`, float64 of the same shape, on the CPU."""
        kind = self.time_input.kind
        if kind == "alpha":
            value = self.schedule.level(t).alpha
        elif kind == "t" and isinstance(self.schedule, TableSchedule):
            value = (t.double() + 1) / self.schedule.num_steps
        else:
            value = t.double()
        return value * self.time_input.scale

    def _call(self, network: Callable[..., Tensor], x_t: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        time = self.network_time(t.expand(len(x_t)) if t.ndim == 0 else t)
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        return network(x_t, time.to(dtype).to(x_t.device, non_blocking=True), **condition)

    def losses(self, network: Callable[..., Tensor], x0: Tensor, eps: Tensor, t: Tensor, **condition: Any) -> Losses:
        """The mean over a sample's elements of (network(x_t) - y)^2, for each sample (Eq. 14, arXiv:2006.11239)."""
        y = self._call(network, self.add_noise(x0, eps, t), t, condition)
        target = self.make_target(x0, eps, t)
        return Losses((y.to(target.dtype) - target).square().flatten(1).mean(1))

    def denoiser(self, network: Callable[..., Tensor], **condition: Any) -> Denoiser:
        """The network as solvers see it, with its condition (labels) bound."""

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            return self.read(self._call(network, x_t, t, condition), x_t, t)

        return denoise

    def draw_times(self, uniform: Tensor) -> Tensor:
        """Training times from numbers in [0, 1): entries of a table, or the numbers themselves on the blend."""
        if isinstance(self.schedule, TableSchedule):
            return (uniform.double() * self.schedule.num_steps).floor()
        return uniform.double()


@config
class ProcessConfig:
    """Schedule, target, the variance of ancestral sampling, and what the network is told of the time.

    `clip` holds the x0 estimate inside [-1, 1] while sampling; needed where reading the output amplifies its error.
    """

    schedule: ScheduleConfig
    target: Target
    variance: Variance = "large"
    clip: bool = True
    time_input: TimeInput | None = None

    @pydantic.model_validator(mode="after")
    def _gain(self) -> "ProcessConfig":
        process = build_process(self)
        if process.time_input.kind == "index" and isinstance(process.schedule, BlendSchedule):
            raise wrong("time_input.kind: the blend has no table to index; use t or alpha")
        schedule = process.schedule
        if isinstance(schedule, TableSchedule):
            used = torch.arange(schedule.num_steps)
        else:
            used = torch.linspace(0 if schedule.network_at_clean else 1e-3, 1, 1001, dtype=torch.float64)
        largest = float(gain(process, used).max())
        if largest == float("inf"):
            raise wrong(
                f"target {self.target!r} cannot be read at one end of the {self.schedule.kind!r} schedule; use v or blend"
            )
        if largest > 1000 and not self.clip:
            raise wrong(
                f"reading {self.target!r} on this schedule amplifies errors {largest:.0f} times; set clip to true, or use v"
            )
        return self


def _trainable(spec: ProcessConfig) -> ProcessConfig:
    if spec.variance == "learned":
        raise wrong("variance: 'learned' cannot be trained here (it is for imported networks); use small or large")
    return spec


TrainableProcess = Annotated[ProcessConfig, pydantic.AfterValidator(_trainable)]


def gain(process: Process, t: Tensor) -> Tensor:
    """1 / |alpha q - sigma p|: by how much reading an output at times `t` amplifies its error."""
    level = process.schedule.level(t)
    p, q = COEFFICIENTS[process.target](level)
    return 1 / (level.alpha * q - level.sigma * p).abs()


def build_process(spec: ProcessConfig) -> Process:
    """The process that a config names. Without `time_input` a table feeds its index, the blend 1000 t."""
    blend = isinstance(spec.schedule, BlendScheduleConfig)
    return Process(
        schedule=build_schedule(spec.schedule, network_at_clean=spec.target != "x0"),
        target=spec.target,
        variance=spec.variance,
        time_input=spec.time_input or (TimeInput(kind="t", scale=1000.0) if blend else TimeInput()),
    )
