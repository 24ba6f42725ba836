"""Lengths of runs and cadences in steps, epochs or images."""

import typing
from typing import Annotated, Any

import pydantic
from pydantic import Discriminator, Field, Tag

from .fields import config, config_error


def kind_of(value: Any) -> str:
    """object, list or plain: what discriminates a union of configs and plain values."""
    return {dict: "object", list: "list", tuple: "list"}.get(type(value), "plain" if _is_plain(value) else "object")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


@config
class Span:
    """A length given in exactly one unit: `{"steps": 100}`, `{"epochs": 1}` or `{"images": 50000}`."""

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    images: int | None = Field(None, gt=0)

    @pydantic.model_validator(mode="after")
    def _one_unit(self) -> "Span":
        if sum(unit is not None for unit in (self.steps, self.epochs, self.images)) != 1:
            raise config_error("give exactly one of steps, epochs, images")
        return self


Length = Annotated[
    Annotated[int, Field(gt=0), Tag("plain")] | Annotated[Span, Tag("object")],
    Discriminator(lambda value: "plain" if _is_plain(value) else "object"),
]
ENDLESS = 10**15  # steps of a run without end


def to_steps(length: int | Span, *, batch_size: int, num_images: int) -> int:
    """Optimiser steps in `length`: a number is steps already; epochs and images are rounded up, to at least 1.

    `batch_size` is images per step, `num_images` those in one epoch.
    """
    if isinstance(length, int):
        return length
    if length.steps is not None:
        return length.steps
    images = length.images if length.images is not None else typing.cast(float, length.epochs) * num_images
    return max(1, -int(-images // batch_size))
