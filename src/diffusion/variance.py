"""The Gaussian steps of a (respaced) chain: posterior means, and the variances that the model's step may have."""

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
