"""How much each level counts in training: loss weightings, and the distributions of the times that are trained."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor

from ..config import OpenUnion, config, config_error
from .schedules import Level
from .time_shift import TimeShift


class Gains(NamedTuple):
    """What an error of 1 in the network's output is as an error of the estimates of x0 and of eps: float64, of the shape of
    the times. So the squared error of x0 is `x0**2` times that of the output."""

    x0: Tensor
    eps: Tensor


@config
class Weighting(ABC):
    """The base of all loss weightings."""

    kind: str

    @abstractmethod
    def weight(self, level: Level, gains: Gains) -> Tensor:
        """The weight of the output's squared error at some levels, float64 of their shape."""


WEIGHTINGS = OpenUnion("kind")
LossWeighting = Annotated[Weighting, WEIGHTINGS]


@WEIGHTINGS.add
@config
class ConstantWeighting(Weighting):
    """All levels alike: the squared error of the target as it is."""

    kind: Literal["constant"] = "constant"

    def weight(self, level: Level, gains: Gains) -> Tensor:
        return torch.ones_like(level.alpha)


@WEIGHTINGS.add
@config
class MinSNRWeighting(Weighting):
    """min(SNR, gamma) on the squared error of x0, with SNR = alpha^2 / sigma^2.

    Sec. 3.4, Hang et al. 2023, arXiv:2303.09556.
    """

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = pydantic.Field(5.0, gt=0)

    def weight(self, level: Level, gains: Gains) -> Tensor:
        return ((level.alpha / level.sigma) ** 2).clamp(max=self.gamma) * gains.x0**2


@WEIGHTINGS.add
@config
class P2Weighting(Weighting):
    """1 / (k + SNR)^gamma on the squared error of eps: less weight where hardly any noise is left to remove.

    Eq. 8, Choi et al. 2022, arXiv:2204.00227.
    """

    kind: Literal["p2"] = "p2"
    gamma: float = pydantic.Field(1.0, gt=0)
    k: float = pydantic.Field(1.0, gt=0)

    def weight(self, level: Level, gains: Gains) -> Tensor:
        return gains.eps**2 / (self.k + (level.alpha / level.sigma) ** 2) ** self.gamma


@WEIGHTINGS.add
@config
class EDMWeighting(Weighting):
    """(s^2 + sigma_data^2) / (s sigma_data)^2 on the squared error of x0, where s = sigma / alpha and `sigma_data` is the
    standard deviation of the data.

    Table 1, Karras et al. 2022, arXiv:2206.00364.
    """

    kind: Literal["edm"] = "edm"
    sigma_data: float = pydantic.Field(0.5, gt=0)

    def weight(self, level: Level, gains: Gains) -> Tensor:
        return (gains.x0 / self.sigma_data) ** 2 + gains.eps**2  # since gains.eps = gains.x0 / s


# ---------------------------------------------------------------------------------------------- times


@config
class UniformTimes:
    """All times alike. `shift` moves them to the noise for large images."""

    kind: Literal["uniform"] = "uniform"
    shift: TimeShift | None = None


@config
class LogitNormalTimes:
    """logit(t) ~ N(mean, std^2): more of the middle, or, where `mean` is above 0, of the noisy side. `shift` moves the times
    that this gives.

    Sec. 3.1, Esser et al. 2024, arXiv:2403.03206.
    """

    kind: Literal["logit_normal"]
    mean: float = 0.0
    std: float = pydantic.Field(1.0, gt=0)
    shift: TimeShift | None = None


def _refuse_shift(value: Any) -> None:
    if value is not None:
        raise config_error("second_moment learns how often each time is drawn, and a shift says it: leave one of them out")


@config
class SecondMomentTimes:
    """Each entry of the table is drawn in proportion to the root of the mean square of its last `history` losses, and the loss
    is weighted so that its expectation stays that of uniform times. Times are uniform until each entry has its history, and
    for the share `uniform_share` after that.

    Eq. 18, Nichol & Dhariwal 2021, arXiv:2102.09672; for loss.kind rescaled_kl.
    """

    kind: Literal["second_moment"]
    history: int = pydantic.Field(10, ge=1)
    uniform_share: float = pydantic.Field(0.001, ge=0, le=1)
    shift: Annotated[None, pydantic.BeforeValidator(_refuse_shift)] = None


TimesConfig = Annotated[UniformTimes | LogitNormalTimes | SecondMomentTimes, pydantic.Field(discriminator="kind")]
