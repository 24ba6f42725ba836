"""Aspect buckets: a table of sizes, and which image goes where."""

import numpy as np
import pytest

from src.config import UserError
from src.data import ImageConfig
from src.data.buckets import bucket_sizes, cropped_share, make_buckets, nearest_buckets
from src.data.transforms import AspectConfig


@pytest.mark.parametrize(
    ("size", "factor", "max_ratio"), [(64, 8, 2.0), (64, 4, 3.0), (256, 32, 2.0), (512, 64, 1.5), (16, 2, 1.0)]
)
def test_sizes_have_about_one_area_and_suit_the_network(size: int, factor: int, max_ratio: float) -> None:
    sizes = bucket_sizes(size, AspectConfig(max_ratio=max_ratio), factor)
    ratios = [width / height for height, width in sizes]
    assert (size, size) in sizes and ratios == sorted({*ratios})
    assert {(width, height) for height, width in sizes} == {*sizes}  # lying and standing
    for height, width in sizes:
        assert height % factor == width % factor == 0
        assert abs(height * width - size**2) <= 0.25 * size**2 and max(height, width) <= max_ratio * min(height, width)


def test_the_table_of_64_px() -> None:
    table = [(88, 48), (80, 48), (72, 56), (64, 64), (56, 72), (48, 80), (48, 88)]
    assert bucket_sizes(64, AspectConfig(), 8) == table
    assert bucket_sizes(64, AspectConfig(step=16), 8) == [(80, 48), (64, 64), (48, 80)]


def test_steps_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="image.aspect.step 12 is not a multiple of 8, .*; use 8 or 16"):
        bucket_sizes(64, AspectConfig(step=12), 8)
    with pytest.raises(UserError, match="no size in steps of 96 px has about the area of 64 px"):
        bucket_sizes(64, AspectConfig(step=96), 8)


def test_an_image_goes_to_the_nearest_ratio() -> None:
    sizes = [(80, 48), (64, 64), (48, 80)]
    sides = np.array([[300, 500], [100, 101], [170, 100], [1000, 10], [10, 13]])  # width and height
    assert nearest_buckets(sizes, sides).tolist() == [0, 1, 2, 2, 1]


def test_small_buckets_go_to_their_neighbours_whatever_the_batch() -> None:
    sides = np.repeat([[64, 64], [96, 64], [128, 64], [64, 100]], [40, 3, 20, 2], axis=0)
    image = ImageConfig(size=64, aspect=AspectConfig(min_images=10))
    buckets = make_buckets(image, sides, 8)
    assert [spec.size for spec in buckets.specs] == [64, (48, 88)] and buckets.counts == [
        42,
        23,
    ]  # 96 x 64 is nearer to 88 x 48
    assert buckets.most_frequent == ImageConfig(size=64) and buckets.members(1).tolist() == [*range(40, 63)]
    assert buckets.of(np.array([[200, 100], [-1, -1]])).which.tolist() == [1, 0]  # unknown sides: a square
    few = make_buckets(ImageConfig(size=64, aspect=AspectConfig(min_images=100)), sides, 8)
    assert len(few.specs) == 1
    plain = make_buckets(ImageConfig(size=(32, 64)), sides, 8)
    assert plain.specs == (ImageConfig(size=(32, 64)),) and not plain.which.any()


def test_what_is_cut_off() -> None:
    assert cropped_share((64, 64), np.array([[64, 64], [128, 64]])) == pytest.approx(0.25)
    assert cropped_share((64, 128), np.array([[128, 64], [256, 128]])) == pytest.approx(0)
