"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, with t = 0 at the data and t = 1 (or the last entry) at the noise.

Levels live in float64 on the CPU; whoever uses them casts last.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, get_args

import torch
from pydantic import Field
from torch import Tensor

from ..config import UserError, config


class Level(NamedTuple):
    """Signal and noise at some times: float64 tensors on the CPU, of the shape of the times."""

    alpha: Tensor
    sigma: Tensor


def like(values: Tensor, x: Tensor) -> Tensor:
    """Float64 values () or (B,), made ready to multiply `x` (B, ...): its device, at least float32, broadcastable."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (
        values.to(dtype)
        .to(x.device, non_blocking=True)
        .reshape(values.shape + (1,) * (x.ndim - values.ndim if values.ndim else 0))
    )


@dataclass(frozen=True, eq=False)
class TableSchedule:
    """A discrete schedule: levels 0 .. T-1 from `betas` (T,), float64, and the clean level (alpha 1, sigma 0) at t = -1, which
    no network sees.

    `level(t)` gives alpha and sigma at times, `time(u)` the times at which sigma / (alpha + sigma) is u. Between entries u is
    linear in t and alpha^2 + sigma^2 = 1.
    alpha_t^2 = prod_{s <= t} (1 - beta_s) (Eq. 4, Ho et al. 2020, arXiv:2006.11239).
    """

    betas: Tensor
    clean: float = -1.0
    network_at_clean: bool = False

    def __post_init__(self) -> None:
        inner = self.betas[:-1]  # the last may be 1: then the noisiest level has no signal
        if self.betas.ndim != 1 or not bool(((inner > 0) & (inner < 1)).all()) or not 0 < self.betas[-1] <= 1:
            raise UserError("the schedule's betas must lie between 0 and 1; use more steps or smaller betas")

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_bar(self) -> Tensor:
        """alpha_t^2, (T,)."""
        return torch.cumprod(1 - self.betas.double(), dim=0)

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and u at t = -1, 0, .. T-1."""
        one = torch.ones(1, dtype=torch.float64)
        squares = torch.cat([one, self.alphas_bar])
        alpha, sigma = squares.sqrt(), (1 - squares).sqrt()
        return alpha, sigma, sigma / (alpha + sigma)

    def level(self, t: Tensor) -> Level:
        alpha, sigma, u_table = self._table
        t = t.detach().to("cpu", torch.float64)
        if t.numel() and (t.min() < self.clean or t.max() > self.num_steps - 1):
            raise ValueError(f"times must lie in [-1, {self.num_steps - 1}]")
        below = t.floor()
        index = below.long() + 1
        if bool((t == below).all()):
            return Level(alpha[index], sigma[index])
        above = (index + 1).clamp(max=self.num_steps)
        u = torch.lerp(u_table[index], u_table[above], t - below)
        norm = torch.sqrt((1 - u) ** 2 + u**2)
        entry = t == below
        return Level(torch.where(entry, alpha[index], (1 - u) / norm), torch.where(entry, sigma[index], u / norm))

    def time(self, u: Tensor) -> Tensor:
        table = self._table[2]
        u = u.detach().to("cpu", torch.float64)
        above = torch.searchsorted(table, u).clamp(1, self.num_steps)
        low, high = table[above - 1], table[above]
        t = above - 2 + ((u - low) / (high - low)).clamp(0, 1)
        entry = t.round()
        return torch.where((t - entry).abs() < 1e-9, entry, t)  # rounding must not make an entry a time between two


@dataclass(frozen=True)
class BlendSchedule:
    """The straight blend, continuous: alpha = 1 - t, sigma = t. `network_at_clean` says whether a network may see t = 0.

    Eq. 1, Heitz et al. 2023, arXiv:2305.03486 (their alpha is our 1 - t); Eq. 1, Liu et al. 2022, arXiv:2209.03003.
    """

    network_at_clean: bool = True
    clean: float = 0.0

    def level(self, t: Tensor) -> Level:
        t = t.detach().to("cpu", torch.float64)
        if t.numel() and (t.min() < 0 or t.max() > 1):
            raise ValueError("times of the blend must lie in [0, 1]")
        return Level(1 - t, t.clone())

    def time(self, u: Tensor) -> Tensor:
        return u.detach().to("cpu", torch.float64)


Schedule = TableSchedule | BlendSchedule

# ---------------------------------------------------------------------------------------------- configs


@config
class BetaSchedule:
    """betas from `beta_start` to `beta_end`: linearly, linearly in their root, or along a sigmoid from -6 to 6.

    `rescale_betas` multiplies both ends by 1000 / steps, as guided-diffusion does, so that few steps end in noise too.
    `zero_terminal_snr` leaves no signal in the noisiest level (for the targets v and x0).
    """

    kind: Literal["linear", "quadratic", "sigmoid"]
    steps: int = Field(1000, ge=2)
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    rescale_betas: bool = False
    zero_terminal_snr: bool = False

    def betas(self) -> Tensor:
        """Float64 (steps,), without `zero_terminal_snr`."""
        scale = 1000 / self.steps if self.rescale_betas else 1.0
        start, end = scale * self.beta_start, scale * self.beta_end
        if self.kind == "quadratic":
            return torch.linspace(math.sqrt(start), math.sqrt(end), self.steps, dtype=torch.float64) ** 2
        if self.kind == "linear":
            return torch.linspace(start, end, self.steps, dtype=torch.float64)
        return torch.sigmoid(torch.linspace(-6, 6, self.steps, dtype=torch.float64)) * (end - start) + start


@config
class CosineSchedule:
    """alpha_bar(t) = cos^2((t + 0.008) / 1.008 * pi / 2), betas capped at 0.999 (Eq. 17, Nichol & Dhariwal 2021).

    `zero_terminal_snr` leaves no signal in the noisiest level (for the targets v and x0).
    """

    kind: Literal["cosine"]
    steps: int = Field(1000, ge=2)
    zero_terminal_snr: bool = False

    def betas(self) -> Tensor:
        """Float64 (steps,), without `zero_terminal_snr`: beta_t = min(1 - alpha_bar(t + 1) / alpha_bar(t), 0.999)."""
        alphas_bar = [math.cos((i / self.steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(self.steps + 1)]
        return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(alphas_bar)], dtype=torch.float64)


@config
class BlendScheduleConfig:
    """alpha = 1 - t, sigma = t: IADB and rectified flow."""

    kind: Literal["blend"]


ScheduleConfig = Annotated[BetaSchedule | CosineSchedule | BlendScheduleConfig, Field(discriminator="kind")]


def build_schedule(spec: ScheduleConfig, *, network_at_clean: bool = True) -> Schedule:
    """The schedule that a config names. `network_at_clean` says whether the target can be read at t = 0 of the blend.

    With `zero_terminal_snr` alpha is shifted and scaled so that the first level stays and the last has no signal, beta 1
    (Alg. 1, Lin et al. 2023, arXiv:2305.08891).
    """
    if isinstance(spec, BlendScheduleConfig):
        return BlendSchedule(network_at_clean)
    betas = spec.betas()
    if spec.zero_terminal_snr:
        alpha = torch.cumprod(1 - betas, dim=0).sqrt()
        squares = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        betas = 1 - torch.cat([squares[:1], squares[1:] / squares[:-1]])
    return TableSchedule(betas)


# ---------------------------------------------------------------------------------------------- sampling times

Spacing = Literal["even", "strided", "trailing", "dense_clean", "dense_noise"]
SPACINGS: tuple[str, ...] = get_args(Spacing)


def _even_section(start: int, size: int, count: int) -> list[int]:
    """`count` entries of [start, start + size), both ends among them, as guided-diffusion rounds them."""
    if count > size:
        raise UserError(f"cannot take {count} steps out of a section of {size}; ask for at most {size}")
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    taken, at = [], 0.0
    for _ in range(count):
        taken.append(start + round(at))
        at += stride
    return taken


def _sections(total: int, counts: list[int]) -> list[int]:
    """Split `total` entries into len(counts) parts, the longer ones first, and take counts[i] evenly from each."""
    size, longer = divmod(total, len(counts))
    starts = [i * size + min(i, longer) for i in range(len(counts))]
    return [entry for i, count in enumerate(counts) for entry in _even_section(starts[i], size + (i < longer), count)]


def _table_times(total: int, steps: int, spacing: str) -> list[int]:
    if spacing == "strided":
        strided = {len(range(0, total, stride)): stride for stride in range(total, 0, -1)}  # the smallest stride for a number
        if steps in strided:
            return list(range(0, total, strided[steps]))
        near = ", ".join(map(str, sorted(sorted(strided, key=lambda n: (abs(n - steps), n))[:2])))
        raise UserError(f"no whole stride through {total} entries gives {steps} steps; the nearest are {near}")
    if spacing == "even" and steps > 1:
        return _even_section(0, total, steps)
    if spacing == "trailing":
        return sorted(round(total - i * total / steps) - 1 for i in range(steps))
    if steps == 1:
        return [total - 1]
    # A square: DDIM's "quad" (App. D.2, Song et al. 2020, arXiv:2010.02502) over all levels; entries that would fall
    # together are pushed apart.
    square = [int(i * i * (total - 1) / (steps - 1) ** 2) for i in range(steps)]
    for i in range(1, steps):
        square[i] = max(square[i], square[i - 1] + 1)
    return square if spacing == "dense_clean" else sorted(total - 1 - entry for entry in square)


def times(schedule: Schedule, steps: int | list[int], spacing: str = "even") -> Tensor:
    """The sampling times: float64 (steps + 1,), descending, ended by the clean level.

    `even` has both ends of the schedule; `strided` is DDIM's whole stride from 0; `trailing` counts down from the last
    entry; `dense_clean` and `dense_noise` crowd towards one end as squares do. A list of counts takes `counts[i]` evenly
    from the i-th of equal sections of a table, the first the cleanest (guided-diffusion's "100,50,25"). Two of these are not as
    published, since sampling starts from noise: one step is that from the last entry (guided-diffusion's: from entry 0), and
    dense_clean reaches the last entry as DDIM's paper has it (its code ends at 0.8 of the table).
    """
    if spacing not in SPACINGS:
        raise UserError(f"spacing {spacing!r} is not known; allowed: {', '.join(SPACINGS)}")
    counts = [steps] if isinstance(steps, int) else list(steps)
    if not counts or min(counts) < 1:
        raise UserError("the number of sampling steps must be at least 1")
    if isinstance(schedule, TableSchedule):
        if sum(counts) > schedule.num_steps:
            raise UserError(f"{sum(counts)} sampling steps are more than the schedule's {schedule.num_steps}")
        if isinstance(steps, int):
            taken = _table_times(schedule.num_steps, steps, spacing)
        elif spacing == "even":
            taken = _sections(schedule.num_steps, counts)
        else:
            raise UserError(f"sections of steps go with the spacing 'even', not {spacing!r}")
        return torch.tensor([*reversed(taken), schedule.clean], dtype=torch.float64)
    if not isinstance(steps, int) or spacing == "strided":
        raise UserError("sections and strides belong to a table; on the blend use even, dense_clean or dense_noise")
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    curves = {"dense_clean": grid**2, "dense_noise": 1 - (1 - grid) ** 2}
    return curves.get(spacing, grid)


def inversion_times(times: Tensor, schedule: Schedule) -> Tensor:
    """Sampling times (N + 1,) the other way, from the data to the noise.

    Where the network may not be called at the clean level they begin at the first trained one, (N,): what is inverted counts as
    being there.
    """
    way = times.flip(0)
    return way if schedule.network_at_clean or float(way[0]) != schedule.clean else way[1:]
