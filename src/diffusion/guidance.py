"""Guidance and clipping: functions that take denoisers and return a denoiser for the solver."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .process import Denoiser, Prediction
from .schedules import BlendSchedule, Level, Schedule, like

Logits = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> (B, K), of a classifier
Gradient = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> scale times the gradient of log p(y | x_t) with respect to x_t


def classifier_free(denoiser: Denoiser, null_denoiser: Denoiser, scale: float) -> Denoiser:
    """null + scale (conditional - null); 1 is the conditional network alone, with one call.

    Eq. 6, Ho & Salimans 2022, arXiv:2207.12598, whose w is our scale - 1. The learned variance is the conditional one's.
    """
    if scale == 1:
        return denoiser

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        conditional, null = denoiser(x_t, t), null_denoiser(x_t, t)
        x0, eps = (b + scale * (a - b) for a, b in ((conditional.x0, null.x0), (conditional.eps, null.eps)))
        return conditional._replace(x0=x0, eps=eps)

    return guided


def two_scales(
    both: Denoiser, image_alone: Denoiser | None, neither: Denoiser, image_scale: float, class_scale: float
) -> Denoiser:
    """neither + image_scale (image_alone - neither) + class_scale (both - image_alone), of a network that draws from an image
    and a class: with both of them, without the class, and without either. It calls what the scales need, one network where
    both scales are 1. Without classes `image_alone` is None, and `both` has the image alone.

    Eq. 3, Brooks et al. 2022, arXiv:2211.09800. The learned variance is that of `both`.
    """
    if image_alone is None or image_scale == class_scale:
        return classifier_free(both, neither, image_scale)
    if image_scale == 1:
        return classifier_free(both, image_alone, class_scale)

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        with_both, with_image, with_neither = both(x_t, t), image_alone(x_t, t), neither(x_t, t)
        x0, eps = (
            c + image_scale * (b - c) + class_scale * (a - b)
            for a, b, c in (
                (with_both.x0, with_image.x0, with_neither.x0),
                (with_both.eps, with_image.eps, with_neither.eps),
            )
        )
        return with_both._replace(x0=x0, eps=eps)

    return guided


def autoguided(
    denoiser: Denoiser, bad_denoiser: Denoiser, bad_schedule: Schedule, schedule: Schedule, scale: float
) -> Denoiser:
    """bad + scale (denoiser - bad), where `bad_denoiser` is a smaller or less trained network; 1 is `denoiser` alone, with one
    call. The bad network was trained along `bad_schedule` and is called at the same noise level; where it was not trained at
    that level, the estimate is that of `denoiser` alone.

    D_w(x; sigma, c) = D_0(x; sigma, c) + w (D_1(x; sigma, c) - D_0(x; sigma, c)), Karras et al. 2024, arXiv:2406.02507.
    """
    if scale == 1:
        return denoiser
    both = classifier_free(denoiser, lambda x_t, t: bad_denoiser(*at_same_level(x_t, t, schedule, bad_schedule)), scale)

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        return (both if is_trained_at(bad_schedule, schedule, t) else denoiser)(x_t, t)

    return guided


def at_same_level(x_t: Tensor, t: Tensor, schedule: Schedule, other: Schedule) -> tuple[Tensor, Tensor]:
    """What a network that was trained along `other` is called with, in place of an image x_t that is noised along `schedule` to
    the times `t`: the image scaled to the level of `other` that has the same ratio of signal and noise, and its time."""
    alpha, sigma = schedule.level(t)
    other_t = other.time(sigma / (alpha + sigma))
    level = other.level(other_t)
    return x_t * like((level.alpha + level.sigma) / (alpha + sigma), x_t), other_t


def is_trained_at(own_schedule: Schedule, schedule: Schedule, t: Tensor) -> bool:
    """Whether a network that was trained along `own_schedule` has seen the ratios of signal and noise that `schedule` has at
    the times `t`. A table has none below its first entry and above its last."""

    def noise_share(level: Level) -> Tensor:
        return level.sigma / (level.alpha + level.sigma)

    u = noise_share(schedule.level(t))
    if isinstance(own_schedule, BlendSchedule):
        return own_schedule.network_at_clean or bool((u > 0).all())
    first, last = noise_share(own_schedule.level(torch.tensor([0, own_schedule.num_steps - 1])))
    return bool(((u >= first) & (u <= last)).all())


def classifier_gradient(logits: Logits, labels: Tensor, scale: float) -> Gradient:
    """scale times the gradient of log p(labels | x_t) with respect to x_t, of a classifier (x_t, t) -> (B, K)."""

    def gradient(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            chosen = F.log_softmax(logits(x, t).float(), dim=1).gather(1, labels[:, None]).sum()
            return scale * torch.autograd.grad(chosen, x)[0]

    return gradient


def on_schedule(logits: Logits, classifier_schedule: Schedule, schedule: Schedule) -> Logits:
    """The logits of a classifier that was trained along `classifier_schedule`, for images that are noised along `schedule`.

    The classifier is called at the time that has the same ratio of signal and noise, with the image scaled to that level.
    """

    def converted(x_t: Tensor, t: Tensor) -> Tensor:
        return logits(*at_same_level(x_t, t, schedule, classifier_schedule))

    return converted


def classifier_guided(denoiser: Denoiser, gradient: Gradient, schedule: Schedule) -> Denoiser:
    """eps - sigma gradient, and the x0 that belongs to it (Alg. 2, Dhariwal & Nichol 2021, arXiv:2105.05233).

    Ancestral sampling does not use it: it adds its variance times the gradient to the mean instead (Alg. 1).
    """

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoiser(x_t, t)
        alpha, sigma = schedule.level(t)
        if not bool((alpha > 0).all()):  # a classifier sees nothing in pure noise
            return prediction
        shift = gradient(x_t, t)
        x0, eps = prediction.x0 + like(sigma**2 / alpha, x_t) * shift, prediction.eps - like(sigma, x_t) * shift
        return prediction._replace(x0=x0, eps=eps)

    return guided


def within(levels: tuple[float, float], inside: Denoiser, outside: Denoiser, schedule: Schedule) -> Denoiser:
    """`inside` where the noise level sigma / alpha lies in `levels` (both ends included), else `outside`.

    Kynkaanniemi et al. 2024, arXiv:2404.07724.
    """

    def chosen(x_t: Tensor, t: Tensor) -> Prediction:
        return (inside if is_within(levels, schedule, t) else outside)(x_t, t)

    return chosen


def is_within(levels: tuple[float, float], schedule: Schedule, t: Tensor) -> bool:
    """Whether the noise level sigma / alpha at `t` lies in `levels`, both ends included."""
    alpha, sigma = schedule.level(t)
    return bool((sigma >= levels[0] * alpha).all() and (sigma <= levels[1] * alpha).all())


def _bound_x0(denoiser: Denoiser, schedule: Schedule, bound: Callable[[Tensor], Tensor]) -> Denoiser:
    """`bound` applied to x0, and the eps that belongs to the result."""

    def bounded(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoiser(x_t, t)
        alpha, sigma = schedule.level(t)
        if not bool((sigma > 0).all()):  # at the clean level x_t says nothing of eps
            return prediction
        x0 = bound(prediction.x0)
        return prediction._replace(x0=x0, eps=(x_t - like(alpha, x_t) * x0) / like(sigma, x_t))

    return bounded


def clip(denoiser: Denoiser, schedule: Schedule, low: float | Tensor, high: float | Tensor) -> Denoiser:
    """Clamp x0 to [low, high] and compute eps again, so that x_t = alpha x0 + sigma eps still holds."""
    return _bound_x0(denoiser, schedule, partial(torch.clamp, min=low, max=high))  # pyright: ignore[reportCallIssue]


def dynamic_threshold(denoiser: Denoiser, schedule: Schedule, quantile: float) -> Denoiser:
    """Clamp the x0 of each sample to [-s, s] and divide it by s, where s is that quantile of its |x0|, at least 1; eps is
    computed again.

    Sec. 2.3, Saharia et al. 2022, arXiv:2205.11487.
    """

    def bound(x0: Tensor) -> Tensor:
        quantiles = [torch.quantile(sample, quantile) for sample in x0.abs().flatten(1)]  # it takes 16 M numbers at most
        s = torch.stack(quantiles).clamp(min=1).reshape(-1, *[1] * (x0.ndim - 1))
        return torch.clamp(x0, -s, s) / s

    return _bound_x0(denoiser, schedule, bound)
