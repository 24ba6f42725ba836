"""Terms of a stage about its latents: they turn with the image, or are aligned to the features of a frozen network."""

import math
from dataclasses import dataclass

import pydantic
from torch import Tensor

from ..config import UserError, config, config_error
from ..config.sizes import Sides, describe_size
from ..models.layers import area_means
from ..runtime.seeds import generator

SHORTEST = 32  # px: the shortest side that the perceptual networks and the discriminator are given


@config
class EquivarianceTerm:
    """In a share `probability` of the steps the stage's loss is that of D(tau(E(x))) and tau(x) in place of D(E(x)) and x. tau
    is one transform for all images of a step: a scale between `min_scale` and 1, or, with `turns`, a quarter, half or three
    quarter turn. A `min_scale` of 1 leaves turns alone.

    EQ-VAE: Kouzelis et al. 2025, arXiv:2502.09509. Scales alone: Skorokhodov et al. 2025, arXiv:2502.14831.
    """

    probability: float = pydantic.Field(0.5, gt=0, le=1)
    min_scale: float = pydantic.Field(0.25, gt=0, le=1)
    turns: bool = True

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "EquivarianceTerm":
        if self.min_scale == 1 and not self.turns:
            raise config_error("min_scale 1 without turns leaves no transform; set turns, or a smaller min_scale")
        return self

    def shorter_sides(self, side: int, smallest: int) -> range:
        """What the shorter side of the latents, `side`, may become by a scale below 1, if it may not be below `smallest`."""
        return range(max(math.ceil(self.min_scale * side), smallest), side)


@config
class AlignmentTerm:
    """The distance of the latents to the features of config.teacher, times `weight`; cosines above 1 - `margin`, and distances
    of pairs below `distance_margin`, cost nothing. `adaptive` multiplies it by the ratio of the reconstruction's and its own
    gradients at the encoder's last layer, as the paper does, for one more pass back through the decoder.

    VA-VAE: Yao et al. 2025, arXiv:2501.01423.
    """

    weight: float = pydantic.Field(0.1, gt=0)
    margin: float = pydantic.Field(0.5, ge=0, lt=2)
    distance_margin: float = pydantic.Field(0.25, ge=0, lt=2)
    adaptive: bool = False


@dataclass(frozen=True)
class Transform:
    """tau: `turns` quarter turns to the left or, without, what makes latents of the sides `old` (height, width) ones of the
    sides `new`. Called with latents or images (B, C, H, W), whose sides are multiples of `old`, it gives them transformed."""

    turns: int
    old: Sides
    new: Sides

    def __call__(self, x: Tensor) -> Tensor:
        if self.turns:
            return x.rot90(self.turns, (2, 3))
        height, width = (side * new // old for side, old, new in zip(x.shape[2:], self.old, self.new, strict=True))
        return area_means(x, (height, width))


def draw_transform(term: EquivarianceTerm, sides: Sides, smallest: int, seed: int, step: int) -> Transform | None:
    """The transform of a step, for latents of these `sides` (height, width), whose scaled sides are at least `smallest`; None
    for a step without one. It is a function of (seed, step) and the sides.

    The shorter side becomes any whole number that the scales allow, and the other one the nearest whole number to its share.
    """
    rng, choices = generator(seed, "equivariance", step), term.shorter_sides(min(sides), smallest)
    kinds = ["scale"] * (len(choices) > 0) + ["turn"] * term.turns
    if rng.random() >= term.probability or not kinds:
        return None
    if kinds[rng.integers(len(kinds))] == "turn":
        return Transform(int(rng.integers(1, 4)), sides, sides)
    side = int(rng.integers(choices.start, choices.stop))
    height, width = (round(each * side / min(sides)) for each in sides)
    return Transform(0, sides, (height, width))


def check_scales(term: EquivarianceTerm, where: str, sides: Sides, smallest: int, factor: int) -> None:
    """A UserError where images of these `sides` (height, width) have no transform: turns are off, and no scale leaves latents,
    `factor` times smaller, sides of `smallest`."""
    if not term.turns and not term.shorter_sides(min(sides) // factor, smallest):
        raise UserError(
            f"{where}: images of {describe_size(sides)} have no scale from {term.min_scale:g} to below 1 that leaves sides of "
            f"{smallest * factor} px; set turns, or use larger images"
        )
