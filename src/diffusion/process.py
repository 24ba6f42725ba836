"""The one process behind DDPM, DDIM and IADB: add noise, make a target, read a network's output.

Every target is linear in the clean image and the noise, y = p x0 + q eps, so reading an output is one 2x2 solve of
{x_t = alpha x0 + sigma eps, y = p x0 + q eps}.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor

from ..config import config, config_error, renamed_field
from .contrast import ContrastConfig, contrast
from .likelihood import variational_term
from .schedules import BlendSchedule, BlendScheduleConfig, Level, Schedule, ScheduleConfig, TableSchedule, build_schedule, like
from .time_shift import draw_shifted_times
from .variance import Transitions, transitions
from .weightings import ConstantWeighting, Gains, LossWeighting

Target = Literal["eps", "x0", "v", "blend"]
Variance = Literal["small", "large", "learned"]


class Prediction(NamedTuple):
    """The estimates of x0 and eps (B, ...) in a network's output, and the learned variance's fraction in [0, 1] or None."""

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None


Denoiser = Callable[[Tensor, Tensor], Prediction]  # (x_t, t): all that a solver knows of a network


class Losses(NamedTuple):
    """Of each sample, (B,): `loss` is trained; `mse` is the squared error of the output, `vb` the variational term of the step
    in bits per dimension, and `contrast` the squared distance to the target of a partner, where the loss has them."""

    loss: Tensor
    mse: Tensor | None = None
    vb: Tensor | None = None
    contrast: Tensor | None = None

    @property
    def terms(self) -> dict[str, Tensor]:
        """For the log: the parts of the loss, where it has more than one."""
        terms = {"mse": self.mse, "vb": self.vb, "contrast": self.contrast}
        terms = {name: term for name, term in terms.items() if term is not None}
        return terms if len(terms) > 1 else {}


@config
class TimeInput:
    """The network's input for the time, times `scale`: the table's `index`, the signal coefficient `alpha`, or `t` in [0, 1]
    (index / steps on a table)."""

    kind: Literal["index", "alpha", "t"] = "index"
    scale: float = pydantic.Field(1.0, gt=0)


def _weighting_of_gamma(gamma: Any) -> dict[str, Any]:
    """The weighting that older versions wrote as the key `min_snr_gamma`."""
    return {"kind": "constant"} if gamma is None else {"kind": "min_snr", "gamma": gamma}


@config
class LossConfig:
    """What is trained: `simple`, the squared error of the target; `hybrid`, that plus `variational_weight` times the step's
    variational term in bits per dimension, which teaches the learned variance alone; `kl`, the variational term; `rescaled_kl`,
    the same times the number of steps.

    Guided-diffusion's hybrid loss has the weight 1, its rescaled one (improved-diffusion's L_hybrid) steps / 1000. `weighting`
    says how much the squared error counts at each level. A `contrast` pushes outputs away from the targets of other classes; it
    is weighted as the squared error is. The variational term of the last step is that of pixels of 256 values, on latents too
    (as DiT has it).
    """

    kind: Literal["simple", "hybrid", "kl", "rescaled_kl"] = "simple"
    variational_weight: float = pydantic.Field(1.0, gt=0)
    weighting: LossWeighting = renamed_field("min_snr_gamma", ConstantWeighting(), new_value=_weighting_of_gamma)
    contrast: ContrastConfig | None = None

    @pydantic.model_validator(mode="after")
    def _used(self) -> "LossConfig":
        if self.kind != "hybrid" and self.variational_weight != 1.0:
            raise config_error(
                f"variational_weight weighs a part of the hybrid loss, which {self.kind!r} has not; leave it out"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Process:
    """Schedule, target, variance, loss and the network's input for the time; it holds no network.

    Times `t` are float64 or integer tensors on the CPU, () or (B,); images are (B, C, ...) on any device.
    """

    schedule: Schedule
    target: Target
    variance: Variance = "large"
    time_input: TimeInput = TimeInput()
    loss: LossConfig = LossConfig()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps (Eq. 4, arXiv:2006.11239)."""
        alpha, sigma = self.schedule.level(t)
        return like(alpha, x0) * x0 + like(sigma, x0) * eps

    def _coefficients(self, t: Tensor) -> tuple[Level, Tensor, Tensor, Tensor]:
        """The level at times `t`, p and q of the target there, and d = alpha q - sigma p.

        v: App. D, Salimans & Ho 2022, arXiv:2202.00512; blend: x0 - eps.
        """
        level = alpha, sigma = self.schedule.level(t)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        p, q = {"eps": (zero, one), "x0": (one, zero), "v": (-sigma, alpha), "blend": (one, -one)}[self.target]
        return level, p, q, alpha * q - sigma * p

    def make_target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """y = p x0 + q eps, which the network learns to predict."""
        _, p, q, _ = self._coefficients(t)
        return like(p, x0) * x0 + like(q, x0) * eps

    def read(self, y: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Solve for x0 and eps in at least float32: x0 = (q x_t - sigma y) / d, eps = (alpha y - p x_t) / d,
        d = alpha q - sigma p. With learned variance `y` is (B, 2C, ...), the second half v in [-1, 1]."""
        fraction = None
        if self.variance == "learned":
            y, v = y.chunk(2, dim=1)
            fraction = (v.to(torch.promote_types(v.dtype, torch.float32)) + 1) / 2
        level, p, q, d = self._coefficients(t)
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        y = y.to(x_t.dtype)
        x0 = like(q / d, x_t) * x_t - like(level.sigma / d, x_t) * y
        eps = like(level.alpha / d, x_t) * y - like(p / d, x_t) * x_t
        return Prediction(x0, eps, fraction)

    def network_time(self, t: Tensor) -> Tensor:
        """The network's input for times `t`, float64 of the same shape, on the CPU."""
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

    @cached_property
    def chain(self) -> Transitions:
        """The steps of the whole table; the step from level t has the index T - 1 - t."""
        if not isinstance(self.schedule, TableSchedule):
            raise ValueError("the variational bound and learned variances need a table; the blend has none")
        return transitions(self.schedule, torch.arange(self.schedule.num_steps - 1, -2, -1, dtype=torch.float64))

    def losses(
        self,
        network: Callable[..., Tensor],
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        *,
        partners: Tensor | None = None,
        **condition: Any,
    ) -> Losses:
        """The loss of each sample; times (B,) are entries of the table where the loss has a variational term. `partners` (B,)
        are the rows whose targets outputs are pushed away from, -1 for none.

        simple: the mean over a sample's elements of (network(x_t) - y)^2 (Eq. 14, arXiv:2006.11239). hybrid: Eq. 16,
        arXiv:2102.09672, the mean of the model's step detached.
        """
        x_t = self.add_noise(x0, eps, t)
        output = self._call(network, x_t, t, condition)
        kind, vb = self.loss.kind, None
        if kind != "simple":
            y, *rest = output.chunk(2, dim=1) if self.variance == "learned" else (output,)
            frozen = torch.cat([y.detach(), *rest], dim=1) if kind == "hybrid" else output
            prediction = self.read(frozen, x_t, t)
            index = len(self.chain.beta) - 1 - t.long()
            vb = variational_term(self.chain, index, x0, x_t, prediction.x0, self.variance, prediction.variance_fraction)
            if kind != "hybrid":
                return Losses(vb * (len(self.chain.beta) if kind == "rescaled_kl" else 1.0), vb=vb)
            output = y
        target = self.make_target(x0, eps, t)
        loss = mse = (output.to(target.dtype) - target).square().flatten(1).mean(1)
        apart = None
        if self.loss.contrast is not None and partners is not None:
            apart = contrast(output, self.make_target(x0[partners], eps[partners], t), partners)  # at the time of each row
            loss = mse - self.loss.contrast.weight * apart
        if not isinstance(self.loss.weighting, ConstantWeighting):
            loss = loss * like(self.loss_weight(t), mse)
        return Losses(loss if vb is None else loss + self.loss.variational_weight * vb, mse, vb, apart)

    def loss_weight(self, t: Tensor) -> Tensor:
        """The weight of the output's squared error at times `t`, float64 of their shape: 0 at a level of which the output says
        nothing."""
        level, _, _, d = self._coefficients(t)
        weight = self.loss.weighting.weight(level, Gains(level.sigma / d, level.alpha / d))
        return torch.where(weight.isfinite(), weight, torch.zeros_like(weight))

    def gain(self, t: Tensor) -> Tensor:
        """1 / |alpha q - sigma p|: by how much reading an output at times `t` amplifies its error."""
        return 1 / self._coefficients(t)[-1].abs()

    def denoiser(self, network: Callable[..., Tensor], **condition: Any) -> Denoiser:
        """The network as a denoiser for solvers, with its condition (labels) bound."""

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            return self.read(self._call(network, x_t, t, condition), x_t, t)

        return denoise

    def draw_times(self, uniform: Tensor, shift: float | None = None) -> Tensor:
        """Training times from numbers in [0, 1): entries of a table, or the numbers themselves on the blend. With a factor
        `shift` they are those of `draw_shifted_times`."""
        if shift is not None:
            return draw_shifted_times(self.schedule, uniform, shift)
        if isinstance(self.schedule, TableSchedule):
            return (uniform.double() * self.schedule.num_steps).floor()
        return uniform.double()


@config
class ProcessConfig:
    """Schedule, target, the variance of ancestral sampling (`learned`: the network's second output), the loss, and the
    network's input for the time.

    `clip` clamps the estimate of x0 to [-1, 1] while sampling, which is needed where reading the output amplifies its error.
    """

    schedule: ScheduleConfig
    target: Target
    variance: Variance = "large"
    clip: bool = True
    time_input: TimeInput | None = None
    loss: LossConfig = LossConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "ProcessConfig":
        process = build_process(self)
        schedule, learned = process.schedule, self.variance == "learned"
        loss, weighting = self.loss.kind, self.loss.weighting.kind
        if isinstance(schedule, BlendSchedule):
            if process.time_input.kind == "index":
                raise config_error("time_input.kind: the blend has no table to index; use t or alpha")
            if learned or loss != "simple":
                raise config_error("the blend has no chain of steps: loss.kind is simple there, and variance small or large")
            used = torch.linspace(0 if schedule.network_at_clean else 1e-3, 1, 1001, dtype=torch.float64)
        else:
            used = torch.arange(schedule.num_steps)
        if learned and loss == "simple":
            raise config_error("loss.kind: the simple loss teaches no learned variance; use hybrid, kl or rescaled_kl")
        if not learned and loss == "hybrid":
            raise config_error("loss.kind: the hybrid loss teaches a learned variance; set variance to learned, or use simple")
        if self.loss.contrast is not None and loss not in ("simple", "hybrid"):
            raise config_error("loss.contrast belongs to a squared error, which kl and rescaled_kl have not; leave it out")
        if weighting != "constant" and loss not in ("simple", "hybrid"):
            raise config_error("loss.weighting weighs a squared error, which kl and rescaled_kl have not; leave it out")
        if isinstance(schedule, TableSchedule) and float(process.loss_weight(used[-1])) == 0:
            raise config_error(
                f"loss.weighting: {weighting} gives a level without signal no weight, and zero_terminal_snr starts there; "
                "leave one out"
            )
        largest = float(process.gain(used).max())
        if largest == float("inf"):
            other = "x0" if isinstance(schedule, TableSchedule) else "blend"
            raise config_error(
                f"target {self.target!r} cannot be read at one end of the {self.schedule.kind!r} schedule; use v or {other}"
            )
        if largest > 1000 and not self.clip:
            raise config_error(
                f"reading {self.target!r} on this schedule amplifies errors {largest:.0f} times; set clip to true, or use v"
            )
        return self


def time_input_for(schedule: ScheduleConfig, chosen: TimeInput | None) -> TimeInput:
    """The network's input for the time: the one that a config has chosen, or else a table's index, and 1000 t of the blend."""
    return chosen or (TimeInput(kind="t", scale=1000.0) if isinstance(schedule, BlendScheduleConfig) else TimeInput())


def build_process(spec: ProcessConfig) -> Process:
    """The process that a config names."""
    return Process(
        schedule=build_schedule(spec.schedule, network_at_clean=spec.target != "x0"),
        target=spec.target,
        variance=spec.variance,
        loss=spec.loss,
        time_input=time_input_for(spec.schedule, spec.time_input),
    )
