"""Solvers as plain functions, each with its entry in the registry SOLVERS.

With u = sigma / (alpha + sigma) and x' = x / (alpha + sigma) every schedule is the straight blend x' = (1 - u) x0 + u eps,
and dx'/du = eps - x0 (the blend of arXiv:2305.03486 read at any schedule). So the deterministic samplers are ODE solvers on the
blend path. `times` descend (N + 1,), usually to the clean level; into a level where the network must not be called the last
interval is one Euler step. No solver changes its arguments.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import UserError
from .process import Denoiser, Prediction
from .schedules import Schedule, like
from .variance import Transitions, log_variance, transitions

Callback = Callable[[int, Tensor, Tensor, Prediction], None]  # (step, t, x_t, the prediction)
Noise = Callable[[int, Tensor], Tensor]  # (step, a tensor of the wanted shape) -> standard normal
Slope = Callable[[Tensor, float], Tensor]
Step = Callable[[Slope, Tensor, float, float, Tensor], Tensor]  # (slope, x', u, h, the slope there) -> x' at u + h
S = TypeVar("S", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Solver:
    """A solver, and what the sampler has to know of it.

    `function` is called as function(denoiser, x, times, schedule, callback=..., ...). The sampler hands in those of its other
    arguments that the function names: noise, source, eta, variance, mean_shift, steps. `calls_per_step` counts network calls.
    A `stochastic` solver draws noise at each step. A `gaussian` one is right only where sampling starts from Gaussian noise. A
    `multistep` one remembers the step before. `inverse` is the solver that goes its way back, from the data to the noise, or
    None.
    """

    function: Callable[..., Tensor]
    calls_per_step: int = 1
    stochastic: bool = False
    gaussian: bool = False
    multistep: bool = False
    inverse: Callable[..., Tensor] | None = None

    def takes(self, argument: str) -> bool:
        """Whether the function has an argument of this name."""
        return argument in inspect.signature(self.function).parameters


def predict(denoiser: Denoiser, x: Tensor, times: Tensor, i: int, callback: Callback | None) -> Prediction:
    """The prediction of the denoiser for x at times[i]; the callback gets it, too."""
    prediction = denoiser(x, times[i])
    if callback is not None:
        callback(i, times[i], x, prediction)
    return prediction


SOLVERS: dict[str, Solver] = {}


def register_solver(*, invertible: bool = False, **facts: Any) -> Callable[[S], S]:
    """Decorator: the function becomes the solver of its name, for configs, command lines and the sampler.

    `facts` are fields of Solver. An `invertible` solver goes its way back when it is called with the times in the other order;
    where another function does that, give it as `inverse`. A ValueError where the name is taken.
    """

    def register(function: S) -> S:
        if function.__name__ in SOLVERS:
            raise ValueError(f"a solver {function.__name__} is registered already; give this one another name")
        SOLVERS[function.__name__] = Solver(function, **{"inverse": function if invertible else None, **facts})
        return function

    return register


def invertible_solvers() -> list[str]:
    """The names of the solvers whose way can be gone back."""
    return [name for name, solver in SOLVERS.items() if solver.inverse is not None]


def _blend_path(
    denoiser: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, callback: Callback | None, step: Step | None
) -> Tensor:
    """An Euler step where there is no `step`, and into a level at which the network must not be called."""
    alpha, sigma = schedule.level(times)
    scale = alpha + sigma
    u = sigma / scale

    def slope(x_blend: Tensor, at: float) -> Tensor:
        t = schedule.time(torch.tensor(at, dtype=torch.float64))
        level = schedule.level(t)
        prediction = denoiser(x_blend * like(level.alpha + level.sigma, x_blend), t)
        return prediction.eps - prediction.x0

    for i in range(len(times) - 1):
        prediction = predict(denoiser, x, times, i, callback)
        reachable = schedule.network_at_clean or float(times[i + 1]) != schedule.clean
        if step is None or not reachable:
            x = like(alpha[i + 1], x) * prediction.x0 + like(sigma[i + 1], x) * prediction.eps
        else:
            first = prediction.eps - prediction.x0
            x_blend = step(slope, x / like(scale[i], x), float(u[i]), float(u[i + 1] - u[i]), first)
            x = x_blend * like(scale[i + 1], x)
    return x


@register_solver(invertible=True)
def euler(denoiser: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, *, callback: Callback | None = None) -> Tensor:
    """x_s = alpha_s x0 + sigma_s eps: DDIM with eta 0 (Eq. 12, arXiv:2010.02502) and the IADB iteration. Order 1."""
    return _blend_path(denoiser, x, times, schedule, callback, None)


def runge_kutta(calls_per_step: int) -> Callable[[Step], Callable[..., Tensor]]:
    """Decorator: a rule for one step of h in u, whose first slope is known, becomes the solver of its name."""

    def make(step: Step) -> Callable[..., Tensor]:
        def solve(
            denoiser: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, *, callback: Callback | None = None
        ) -> Tensor:
            return _blend_path(denoiser, x, times, schedule, callback, step)

        solve.__name__, solve.__doc__ = step.__name__, step.__doc__
        return register_solver(calls_per_step=calls_per_step, invertible=True)(solve)

    return make


@runge_kutta(calls_per_step=2)
def midpoint(slope: Slope, x: Tensor, u: float, h: float, first: Tensor) -> Tensor:
    """The explicit midpoint rule in u, two network calls a step. Order 2."""
    return x + h * slope(x + h / 2 * first, u + h / 2)


@runge_kutta(calls_per_step=2)
def heun(slope: Slope, x: Tensor, u: float, h: float, first: Tensor) -> Tensor:
    """Heun's rule in u, two network calls a step. Order 2."""
    return x + h / 2 * (first + slope(x + h * first, u + h))


@runge_kutta(calls_per_step=4)
def rk4(slope: Slope, x: Tensor, u: float, h: float, first: Tensor) -> Tensor:
    """The classical Runge-Kutta rule in u, four network calls a step. Order 4."""
    second = slope(x + h / 2 * first, u + h / 2)
    third = slope(x + h / 2 * second, u + h / 2)
    fourth = slope(x + h * third, u + h)
    return x + h / 6 * (first + 2 * second + 2 * third + fourth)


@register_solver(multistep=True)
def dpmpp_2m(denoiser: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, *, callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M) in lambda = log(alpha / sigma) (Alg. 2, Lu et al. 2022, arXiv:2211.01095). One call a step.

    First order into sigma = 0 and out of alpha = 0, where lambda is infinite.
    """
    alpha, sigma = schedule.level(times)
    logsnr_half = alpha.log() - sigma.log()
    previous: Tensor | None = None
    for i in range(len(times) - 1):
        prediction = predict(denoiser, x, times, i, callback)
        x0 = prediction.x0
        h = logsnr_half[i + 1] - logsnr_half[i]
        if previous is not None and bool(torch.isfinite(h)):
            h_before = logsnr_half[i] - logsnr_half[i - 1]
            weight = h / (2 * h_before)  # 0 where h_before is infinite
            x0 = like(1 + weight, x) * x0 - like(weight, x) * previous
        ratio = sigma[i + 1] / sigma[i]
        x = like(ratio, x) * x + like(alpha[i + 1] - alpha[i] * ratio, x) * x0
        previous = prediction.x0
    return x


@register_solver(inverse=euler)  # with eta 0 they are the same
def ddim(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    *,
    noise: Noise,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Eqs. 12 and 16, Song et al. 2020, arXiv:2010.02502): eta 0 is deterministic, eta 1 has the posterior's variance."""
    if eta < 0:
        raise UserError("eta must be at least 0")
    alpha, sigma = schedule.level(times)
    spread = eta * transitions(schedule, times).beta_tilde.sqrt()
    for i in range(len(times) - 1):
        prediction = predict(denoiser, x, times, i, callback)
        sigma_rest = (sigma[i + 1] ** 2 - spread[i] ** 2).clamp(min=0).sqrt()
        following = like(alpha[i + 1], x) * prediction.x0 + like(sigma_rest, x) * prediction.eps
        if spread[i] > 0:
            following = following + like(spread[i], x) * noise(i, x)
        x = following
    return x


@register_solver(stochastic=True, gaussian=True)
def ancestral(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    *,
    noise: Noise,
    variance: str,
    mean_shift: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    callback: Callback | None = None,
    steps: Transitions | None = None,
) -> Tensor:
    """Ancestral sampling of the chain along `times` (Alg. 2, Ho et al. 2020, arXiv:2006.11239).

    `variance` is small, large or learned; `mean_shift(x_t, t, variance)` is added to each mean (classifier guidance). Where
    `times` are a part of a longer chain, `steps` are the transitions of that part.
    """
    steps = transitions(schedule, times) if steps is None else steps
    for i in range(len(times) - 1):
        prediction = predict(denoiser, x, times, i, callback)
        log_var = log_variance(steps, i, variance, prediction.variance_fraction)
        log_var = like(log_var, x) if log_var.ndim == 0 else log_var
        mean = steps.mean(i, prediction.x0, x)
        if mean_shift is not None:  # of the small variance, which is 0 into the clean level, as published
            mean = mean + mean_shift(x, times[i], like(steps.beta_tilde[i], x) if variance == "small" else log_var.exp())
        into_clean = float(times[i + 1]) == schedule.clean
        x = mean if into_clean else mean + torch.exp(0.5 * log_var) * noise(i, x)
    return x


@register_solver(stochastic=True)
def redraw(
    denoiser: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, *, source: Noise, callback: Callback | None = None
) -> Tensor:
    """x_s = alpha_s x0 + sigma_s eps', where eps' is drawn from the source anew at each step: source(step, x) -> (B, ...).

    The stochastic variant of iterative alpha-(de)blending (Heitz et al. 2023, arXiv:2305.03486); one call a step.
    """
    alpha, sigma = schedule.level(times)
    for i in range(len(times) - 1):
        prediction = predict(denoiser, x, times, i, callback)
        x = like(alpha[i + 1], x) * prediction.x0
        if sigma[i + 1] > 0:
            x = x + like(sigma[i + 1], x) * source(i, x)
    return x
