"""The time shift: more noise for images of more dimensions, which hide less under the same noise."""

import math

import torch
from pydantic import Field
from torch import Tensor

from ..config import config
from .schedules import Schedule, TableSchedule


@config
class TimeShift:
    """Times are shifted by the factor s = sqrt(dimensions / `base`): above 1 to more noise, below 1 to less. Dimensions are
    C * H * W of the images or latents that the network sees, and 2 of points.

    Sec. 5.3.2, Esser et al. 2024, arXiv:2403.03206; with `base` 4096, Zheng et al. 2025, arXiv:2510.11690.
    """

    base: int = Field(gt=0, le=10**9)

    def factor(self, dimensions: int) -> float:
        """s for what has so many dimensions."""
        return math.sqrt(dimensions / self.base)


def shift(u: Tensor, s: float) -> Tensor:
    """u' = s u / (1 + (s - 1) u) for u = sigma / (alpha + sigma) in [0, 1]: sigma / alpha becomes s times as large.

    0 and 1 stay, and so does every u for s = 1; 1 / s is the inverse of s.
    """
    return s * u / ((1 - u) + s * u)  # so that no rounding leads out of [0, 1]


def _times_of_shifted_u(schedule: Schedule, t: Tensor, s: float, noisiest: Tensor) -> Tensor:
    """The times at which u is shifted, where u is measured in that of the time `noisiest`, which stays."""
    alpha, sigma = schedule.level(torch.cat([noisiest.reshape(1), t]))
    u = sigma / (alpha + sigma)
    return schedule.time(u[0] * shift(u[1:] / u[0], s))


def shift_times(schedule: Schedule, times: Tensor, s: float) -> Tensor:
    """Sampling times (N + 1,), as `times` gives them, shifted by s: float64, descending from the same noisiest level to the
    clean one.

    On the blend u = t, so t' = s t / (1 + (s - 1) t). A table has entries up to some u_T, often a little below 1, and sampling
    takes the noisiest for pure noise: u / u_T is shifted, so that this level stays. Times between two entries go to the nearer
    one. Entries that fall together are pushed apart, first towards the data and where there is no room left to the noise.
    """
    if not isinstance(schedule, TableSchedule):
        return _times_of_shifted_u(schedule, times.double(), s, times[0])
    entries = _times_of_shifted_u(schedule, times[:-1], s, times[0]).round()
    index = torch.arange(len(entries), dtype=torch.float64)
    distinct = torch.cummin(entries + index, dim=0).values - index
    return torch.cat([torch.maximum(distinct, index.flip(0)), times[-1:]])


def draw_shifted_times(schedule: Schedule, uniform: Tensor, s: float) -> Tensor:
    """Training times (B,), shifted by s, from numbers r in [0, 1) that stand for times without a shift: float64.

    On the blend r is the time t, and t' = s t / (1 + (s - 1) t). On a table of T entries r stands for the time T r - 1, from
    the clean level at -1 up to the last entry, with u linear between entries. There u / u_T is shifted, where u_T is that of
    the last entry, and a time between two entries becomes the upper one: entry k is drawn where u' is at least u_(k-1) and
    below u_k. For s = 1 that is floor(T r), the entry without a shift.
    """
    if not isinstance(schedule, TableSchedule):
        return shift(uniform.double(), s)
    last = torch.tensor(schedule.num_steps - 1, dtype=torch.float64)
    between = _times_of_shifted_u(schedule, uniform.double() * schedule.num_steps - 1, s, last)
    return (between.floor() + 1).clamp(max=float(last))
