"""The variational bound on the likelihood in bits per dimension (Sec. 3, Nichol & Dhariwal 2021, arXiv:2102.09672).

-log2 p(x0) <= prior + sum of L_t, each divided by the number of elements: L_t is a KL divergence of two Gaussians, and at
the step into the clean level the negative log-likelihood of the 256 values that a pixel may have.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .schedules import Schedule, like
from .variance import Transitions, log_variance, transitions


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL(N(mean_1, exp log_variance_1) || N(mean_2, exp log_variance_2)) in nats, element by element."""
    gap = (mean_1 - mean_2).square() * torch.exp(-log_variance_2)
    return 0.5 * (log_variance_2 - log_variance_1 + torch.exp(log_variance_1 - log_variance_2) - 1 + gap)


def _normal_cdf(x: Tensor) -> Tensor:
    """The standard normal's distribution function, by the tanh approximation (Page 1977) that published numbers used."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x0: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """The log-probability, in nats, that a Gaussian gives the bin of width 2/255 around `x0`, element by element; the bins at
    -1 and 1 reach to infinity (Eq. 13, Ho et al. 2020, arXiv:2006.11239)."""
    scale = torch.exp(-log_scale)
    upper = _normal_cdf(scale * (x0 - mean + 1 / 255))
    lower = _normal_cdf(scale * (x0 - mean - 1 / 255))
    probability = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def bits(nats: Tensor) -> Tensor:
    """Nats of each element (B, ...) as bits per dimension (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def variational_term(
    steps: Transitions, index: Tensor, x0: Tensor, x_t: Tensor, estimate: Tensor, kind: str, fraction: Tensor | None
) -> Tensor:
    """L_t in bits per dimension, (B,), of the steps `index` (B,) of a chain.

    `x0` is the image, `estimate` the model's estimate of it; `kind` and `fraction` give the variance of the model's step.
    """
    log_var = log_variance(steps, index, kind, fraction)
    log_var = like(log_var, x0) if kind != "learned" else log_var
    true_log_var, mean = like(steps.log_beta_tilde[index], x0), steps.mean(index, estimate, x_t)
    divergence = bits(normal_kl(steps.mean(index, x0, x_t), true_log_var, mean, log_var))
    decoder = bits(-discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_var.expand_as(mean)))
    return torch.where(steps.into_clean[index].to(x0.device), decoder, divergence)


def prior_term(schedule: Schedule, t: Tensor, x0: Tensor) -> Tensor:
    """KL(q(x_T | x0) || N(0, I)) in bits per dimension, (B,), where `t` () is the noisiest level."""
    alpha, sigma = schedule.level(t)
    zero = x0.new_zeros(())
    return bits(normal_kl(like(alpha, x0) * x0, like((sigma**2).log(), x0), zero, zero))


class BitsPerDimension(NamedTuple):
    """Bits per dimension of images: `prior` (B,), `terms` (B, N) from the noisiest step to the decoder's, and the mean
    squared errors of the estimates of eps and x0 at each, (B, N)."""

    prior: Tensor
    terms: Tensor
    eps_mse: Tensor
    x0_mse: Tensor

    @property
    def total(self) -> Tensor:
        return self.prior + self.terms.sum(1)


def bits_per_dimension(
    denoiser: Callable, x0: Tensor, times: Tensor, schedule: Schedule, *, noise: Callable[[int, Tensor], Tensor], variance: str
) -> BitsPerDimension:
    """The variational bound of the images `x0` (B, ...) on the chain along `times`; its step i uses noise(i, x0).

    Published figures were made with a denoiser that clips.
    """
    steps = transitions(schedule, times)
    rows = []
    for i in range(len(times) - 1):
        eps = noise(i, x0)
        alpha, sigma = schedule.level(times[i])
        x_t = like(alpha, x0) * x0 + like(sigma, x0) * eps
        prediction = denoiser(x_t, times[i])
        index = torch.full((len(x0),), i)
        term = variational_term(steps, index, x0, x_t, prediction.x0, variance, prediction.variance_fraction)
        rows.append((term, *((a - b).square().flatten(1).mean(1) for a, b in ((prediction.eps, eps), (prediction.x0, x0)))))
    stacked = (torch.stack(column, dim=1) for column in zip(*rows, strict=True))
    return BitsPerDimension(prior_term(schedule, times[0], x0), *stacked)
