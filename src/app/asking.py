"""What the fields of the page say, as the arguments of the scripts."""

from collections.abc import Sequence
from typing import Any

from ..config import UserError
from ..data.names import parse_classes

MOST_IMAGES = 64  # of one job


def parse_shares(text: str | None, count: int) -> list[int]:
    """`2/1` as whole numbers, one for each of `count` classes; all 1 of an empty text. A UserError for other text."""
    if not text or not text.strip():
        return [1] * count
    words = text.strip().split("/")
    if len(words) != count or not all(word.strip().isdecimal() and 1 <= int(word) <= 100 for word in words):
        example = "/".join(["2", *["1"] * (count - 1)])
        raise UserError(
            f"shares {text.strip()}: give a number from 1 to 100 for each of the {count} classes, such as {example}"
        )
    return [int(word) for word in words]


def join_classes(chosen: Sequence[str], class_names: Sequence[str], shares: str | None = None) -> str | None:
    """The argument --classes of the chosen names: each as often as its share says, so that blocks of images are as large as the
    shares; None of none. Where names could mean two things, their numbers stand there."""
    if not chosen:
        return None
    wanted = [name for name, share in zip(chosen, parse_shares(shares, len(chosen)), strict=True) for _ in range(share)]
    unknown = [name for name in wanted if name not in class_names]
    if unknown:
        raise UserError(f"this run does not know the class {unknown[0]}; choose among those of the run")
    numbers = [list(class_names).index(name) for name in wanted]
    text = "/".join(name.replace("/", "\\/") for name in wanted)
    try:
        if parse_classes(text, class_names) == numbers:
            return text
    except UserError:
        pass
    return "/".join(map(str, numbers))


def divisible(count: int, classes: str | None, class_names: Sequence[str]) -> int:
    """The least number of images from `count` on that can be dealt to the classes in equal blocks; a UserError where that is
    more than one job may draw."""
    blocks = len(parse_classes(classes, class_names)) if classes is not None else 1
    if (number := -(-count // blocks) * blocks) > MOST_IMAGES:
        raise UserError(f"shares of {blocks} in all need {number} images, and {MOST_IMAGES} is the most: give smaller shares")
    return number


def whole(value: Any, name: str, low: int, high: int) -> int:
    """A number of a field of the page as a whole number; a UserError where it is none, or outside."""
    if not isinstance(value, int | float) or not low <= value <= high or value != int(value):
        raise UserError(f"{name}: give a whole number from {low} to {high}")
    return int(value)
