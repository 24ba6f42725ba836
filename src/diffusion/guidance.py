"""What stands between a network and a solver: guidance, then clipping. Each takes denoisers and gives a denoiser."""

import torch
from torch import Tensor

from .process import Denoiser, Prediction, like
from .schedules import Schedule


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


def clip(denoiser: Denoiser, schedule: Schedule, low: float | Tensor, high: float | Tensor) -> Denoiser:
    """Hold x0 inside [low, high] and recompute eps, so that x_t = alpha x0 + sigma eps still holds."""

    def clipped(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoiser(x_t, t)
        alpha, sigma = schedule.level(t)
        if not bool((sigma > 0).all()):  # at the clean level x_t is x0 and says nothing of eps
            return prediction
        x0 = torch.clamp(prediction.x0, low, high)  # pyright: ignore[reportCallIssue, reportArgumentType]
        eps = (x_t - like(alpha, x_t) * x0) / like(sigma, x_t)
        return Prediction(x0, eps, prediction.variance_fraction)

    return clipped
