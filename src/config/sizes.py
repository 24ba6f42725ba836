"""The size of an image in a config: the side of a square, or [height, width], in pixels."""

from typing import TYPE_CHECKING, Annotated

import pydantic

from .fields import config_error, kind_of

Sides = tuple[int, int]  # height and width
Side = Annotated[int, pydantic.Field(ge=2, le=4096)]


def _shortest(size: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """A square as one number."""
    if isinstance(size, tuple) and len(size) != 2:
        raise config_error("give the side of a square, or [height, width]")
    return size[0] if isinstance(size, tuple) and size[0] == size[1] else size


if TYPE_CHECKING:
    ImageSize = int | Sides
else:
    ImageSize = Annotated[
        Annotated[Side, pydantic.Tag("plain")] | Annotated[tuple[Side, ...], pydantic.Tag("list")],
        pydantic.Discriminator(kind_of),
        pydantic.AfterValidator(_shortest),
    ]


def sides_of(size: int | Sides) -> Sides:
    """Height and width of an image of this size."""
    return (size, size) if isinstance(size, int) else size


def side_or_sides(height: int, width: int) -> int | Sides:
    """This size as a config has it: a square by one number."""
    return height if height == width else (height, width)


def describe_size(size: int | Sides) -> str:
    """64 px, or 48x88 px, the height first."""
    height, width = sides_of(size)
    return f"{height} px" if height == width else f"{height}x{width} px"


def is_divisible(size: int | Sides, factor: int) -> bool:
    """Whether a network that reduces images by `factor` can take an image of this size."""
    return not any(side % factor for side in sides_of(size))


def nearest_sizes(size: int | Sides, factor: int) -> str:
    """The nearest sizes that are divisible by `factor`, in words for a message."""
    height, width = sides_of(size)
    below = height // factor * factor, width // factor * factor
    above = -(-height // factor) * factor, -(-width // factor) * factor
    return " or ".join(describe_size(each) for each in dict.fromkeys((below, above)) if min(each))
