"""The size of an image in a config: a number or [height, width]."""

from typing import Any

import pytest

from src.config import UserError, dump, validate
from src.config.sizes import describe_size, is_divisible, nearest_sizes, side_or_sides, sides_of
from src.data import ImageConfig


def test_a_size_is_a_side_or_height_and_width() -> None:
    assert validate(ImageConfig, {"size": [48, 88]}).sides == (48, 88) == sides_of((48, 88))
    assert validate(ImageConfig, {"size": [64, 64]}) == validate(ImageConfig, {"size": 64})
    assert sides_of(64) == (64, 64) and side_or_sides(64, 64) == 64 and side_or_sides(48, 88) == (48, 88)
    assert dump(validate(ImageConfig, {"size": [48, 88]}))["size"] == [48, 88]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"size": [48]}, r"size: give the side of a square, or \[height, width\]"),
        ({"size": [48, 88, 3]}, r"size: give the side of a square, or \[height, width\]"),
        ({"size": [48, 5000]}, "size.1: input should be less than or equal to 4096, not 5000"),
        ({"size": {"height": 4}}, r"size: an object {...} is not allowed here; write a plain value or a list \[...\]"),
        ({"size": [48, 88], "aspect": {}}, "aspect: .* give size as a number"),
        ({"size": 48, "aspect": {"kind": "bucket"}}, "aspect.kind: 'bucket' is not known; .*did you mean 'buckets'"),
        ({"size": 48, "aspect": {"max_ratio": 0.5}}, "aspect.max_ratio: input should be greater than or equal to 1"),
    ],
)
def test_sizes_that_are_none(image: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(ImageConfig, image)


def test_sizes_in_words() -> None:
    assert describe_size(64) == describe_size((64, 64)) == "64 px"
    assert describe_size((48, 88)) == "48x88 px"
    assert is_divisible((48, 88), 8) and not is_divisible((48, 84), 8) and is_divisible(64, 8)
    assert nearest_sizes(17, 4) == "16 px or 20 px"
    assert nearest_sizes((18, 40), 4) == "16x40 px or 20x40 px"
    assert nearest_sizes(3, 4) == "4 px"
    assert nearest_sizes(16, 4) == "16 px"
