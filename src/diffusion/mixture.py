"""The best estimate of x0 where the data is known: a mixture of round Gaussians, which no network has to learn."""

import torch
from torch import Tensor


def mixture_estimate(x_t: Tensor, alpha: Tensor, sigma: Tensor, means: Tensor, weights: Tensor, std: float) -> Tensor:
    """E[x0 | x_t] (B, D) for x_t (B, D) = alpha x0 + sigma eps, where x0 is from the Gaussians of `means` (K, D), `weights`
    (K,), which need not sum to 1, and the standard deviation `std`. alpha and sigma are (B, 1) or scalars.

    By Gaussian k, x_t is normal around alpha m_k with the variance v = alpha^2 std^2 + sigma^2, so
    E[x0 | x_t] = sum_k r_k (m_k + alpha std^2 / v (x_t - alpha m_k)), with r_k proportional to w_k N(x_t; alpha m_k, v).
    """
    variance = alpha**2 * std**2 + sigma**2
    squared = (x_t**2).sum(1, keepdim=True) - 2 * alpha * (x_t @ means.T) + alpha**2 * (means**2).sum(1)  # (B, K)
    shares = torch.softmax(weights.log() - squared / (2 * variance), dim=1)
    gain = alpha * std**2 / variance
    return (1 - alpha * gain) * (shares @ means) + gain * x_t
