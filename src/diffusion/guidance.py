"""What stands between a network and a solver: guidance, then clipping. Each takes denoisers and gives a denoiser."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .process import Denoiser, Prediction
from .schedules import Schedule, like

Gradient = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> scale times the gradient of log p(y | x_t) with respect to x_t


def classifier_free(denoiser: Denoiser, null_denoiser: Denoiser, scale: float) -> Denoiser:
    """null + scale (conditional - null); 1 is the conditional network alone, with one call.

    Eq. 6, Ho & Salimans 2022, arXiv:2207.12598, whose w is our scale - 1. The learned variance is the conditional one's.
    """
    if scale == 1:
        return denoiser

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        conditional, null = denoiser(x_t, t), null_denoiser(x_t, t)
        return Prediction(
            null.x0 + scale * (conditional.x0 - null.x0),
            null.eps + scale * (conditional.eps - null.eps),
            conditional.variance_fraction,
        )

    return guided


def classifier_gradient(logits: Callable[[Tensor, Tensor], Tensor], labels: Tensor, scale: float) -> Gradient:
    """scale times the gradient of log p(labels | x_t) with respect to x_t, of a classifier (x_t, t) -> (B, K)."""

    def gradient(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            chosen = F.log_softmax(logits(x, t).float(), dim=1).gather(1, labels[:, None]).sum()
            return scale * torch.autograd.grad(chosen, x)[0]

    return gradient


def on_schedule(
    logits: Callable[[Tensor, Tensor], Tensor], own: Schedule, schedule: Schedule
) -> Callable[[Tensor, Tensor], Tensor]:
    """A classifier of pictures noised along `own`, for pictures noised along `schedule`: asked at the same ratio of signal and
    noise, the picture scaled to its level."""

    def converted(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.level(t)
        there = own.time(sigma / (alpha + sigma))
        level = own.level(there)
        return logits(x_t * like((level.alpha + level.sigma) / (alpha + sigma), x_t), there)

    return converted


def classifier_guided(denoiser: Denoiser, gradient: Gradient, schedule: Schedule) -> Denoiser:
    """eps - sigma gradient, and the x0 that belongs to it (Alg. 2, Dhariwal & Nichol 2021, arXiv:2105.05233).

    For all solvers but ancestral sampling, which adds its variance times the gradient to the mean instead (Alg. 1).
    """

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoiser(x_t, t)
        alpha, sigma = schedule.level(t)
        if not bool((alpha > 0).all()):  # in pure noise there is nothing that a classifier could see
            return prediction
        shift = gradient(x_t, t)
        eps = prediction.eps - like(sigma, x_t) * shift
        return Prediction(prediction.x0 + like(sigma**2 / alpha, x_t) * shift, eps, prediction.variance_fraction)

    return guided


def within(levels: tuple[float, float], inside: Denoiser, outside: Denoiser, schedule: Schedule) -> Denoiser:
    """`inside` where the noise level sigma / alpha lies in `levels`, both ends among them, else `outside`.

    Kynkaanniemi et al. 2024, arXiv:2404.07724.
    """

    def chosen(x_t: Tensor, t: Tensor) -> Prediction:
        return (inside if is_within(levels, schedule, t) else outside)(x_t, t)

    return chosen


def is_within(levels: tuple[float, float], schedule: Schedule, t: Tensor) -> bool:
    alpha, sigma = schedule.level(t)
    return bool((sigma >= levels[0] * alpha).all() and (sigma <= levels[1] * alpha).all())


def _hold(denoiser: Denoiser, schedule: Schedule, bound: Callable[[Tensor], Tensor]) -> Denoiser:
    def held(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoiser(x_t, t)
        alpha, sigma = schedule.level(t)
        if not bool((sigma > 0).all()):  # at the clean level x_t is x0 and says nothing of eps
            return prediction
        x0 = bound(prediction.x0)
        eps = (x_t - like(alpha, x_t) * x0) / like(sigma, x_t)
        return Prediction(x0, eps, prediction.variance_fraction)

    return held


def clip(denoiser: Denoiser, schedule: Schedule, low: float | Tensor, high: float | Tensor) -> Denoiser:
    """Hold x0 inside [low, high] and recompute eps, so that x_t = alpha x0 + sigma eps still holds."""
    return _hold(
        denoiser,
        schedule,
        lambda x0: torch.clamp(x0, low, high),  # pyright: ignore[reportCallIssue, reportArgumentType]
    )


def dynamic_threshold(denoiser: Denoiser, schedule: Schedule, quantile: float) -> Denoiser:
    """Hold the x0 of each sample inside [-s, s] and divide it by s, where s is that quantile of its |x0|, at least 1; eps is
    recomputed.

    Sec. 2.3, Saharia et al. 2022, arXiv:2205.11487.
    """

    def bound(x0: Tensor) -> Tensor:
        each = [torch.quantile(sample, quantile) for sample in x0.abs().flatten(1)]  # of all at once it takes 16 M at most
        s = torch.stack(each).clamp(min=1).reshape(-1, *[1] * (x0.ndim - 1))
        return torch.clamp(x0, -s, s) / s

    return _hold(denoiser, schedule, bound)
