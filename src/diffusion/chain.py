"""The Gaussian steps of a (respaced) chain: posterior means, the variances that the model's step may have, and the variational
bound on the likelihood in bits per dimension (Sec. 3, Nichol & Dhariwal 2021, arXiv:2102.09672).

-log2 p(x0) <= prior + sum of L_t, each divided by the number of elements: L_t is a KL divergence of two Gaussians, and at
the step into the clean level the negative log-likelihood of the 256 values that a pixel may have.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .schedules import Schedule, like


class Transitions(NamedTuple):
    """For each step of a chain from times[i] to times[i + 1], float64 (len(times) - 1,).

    The posterior q(x_s | x_t, x0) has mean `from_x_t` x_t + `from_x0` x0 and variance `beta_tilde` (Eqs. 6-7,
    arXiv:2006.11239); `beta` is the variance of q(x_t | x_s). `log_beta_tilde` is the logarithm, that of the step into
    the clean level replaced by the one before it, where beta_tilde would be 0.
    """

    from_x_t: Tensor
    from_x0: Tensor
    beta: Tensor
    beta_tilde: Tensor
    log_beta_tilde: Tensor

    @property
    def into_clean(self) -> Tensor:
        """Whether a step ends at the clean level, (N,)."""
        return self.beta_tilde == 0

    def mean(self, index: int | Tensor, x0: Tensor, x_t: Tensor) -> Tensor:
        """The posterior's mean of step `index`, one for all or (B,)."""
        return like(self.from_x_t[index], x_t) * x_t + like(self.from_x0[index], x_t) * x0


def transitions(schedule: Schedule, times: Tensor) -> Transitions:
    """The Gaussian steps along descending `times` (N + 1,)."""
    alpha, sigma = schedule.level(times)
    alpha_t, sigma_t, alpha_s, sigma_s = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    ratio = alpha_t / alpha_s
    beta = sigma_t**2 - ratio**2 * sigma_s**2
    beta_tilde = beta * sigma_s**2 / sigma_t**2
    floor = beta_tilde.clone()
    if floor[-1] == 0:
        floor[-1] = floor[-2] if len(floor) > 1 else beta[-1]
    return Transitions(ratio * sigma_s**2 / sigma_t**2, alpha_s * beta / sigma_t**2, beta, beta_tilde, floor.log())


def log_variance(steps: Transitions, index: int | Tensor, kind: str, fraction: Tensor | None) -> Tensor:
    """The log variance of the model's step `index`, one for all or (B,): of that shape for `small` and `large`, and of the
    shape of `fraction` for `learned`.

    Learned: f log beta + (1 - f) log beta_tilde (Eq. 15, Nichol & Dhariwal 2021, arXiv:2102.09672).
    """
    small, log_beta = steps.log_beta_tilde[index], steps.beta[index].log()
    if kind == "learned":
        if fraction is None:
            raise ValueError("the network's output has no learned variance")
        return fraction * like(log_beta, fraction) + (1 - fraction) * like(small, fraction)
    # The step into the clean level uses beta_tilde of the one before it in both fixed choices.
    return small if kind == "small" else torch.where(steps.into_clean[index], small, log_beta)


# ---------------------------------------------------------------------------------------------- the bound


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
