"""The distributions of the times that are trained: uniform, logit-normal, or by the second moment of the loss."""

from typing import Annotated, Literal

import pydantic

from ..config import config


@config
class UniformTimes:
    """All times alike."""

    kind: Literal["uniform"] = "uniform"


@config
class LogitNormalTimes:
    """logit(t) ~ N(mean, std^2): more of the middle, or, where `mean` is above 0, of the noisy side.

    Sec. 3.1, Esser et al. 2024, arXiv:2403.03206.
    """

    kind: Literal["logit_normal"]
    mean: float = 0.0
    std: float = pydantic.Field(1.0, gt=0)


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


TimesConfig = Annotated[UniformTimes | LogitNormalTimes | SecondMomentTimes, pydantic.Field(discriminator="kind")]
