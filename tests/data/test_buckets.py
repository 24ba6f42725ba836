"""Aspect buckets: a table of sizes, which image goes where, and what `prepare_data.py check` shows of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.config import UserError
from src.data import ImageConfig
from src.data.buckets import (
    bucket_sizes,
    cropped_share,
    describe_buckets,
    make_buckets,
    measure_buckets,
    nearest_buckets,
)
from src.data.sources.images import name_fraction
from src.data.transforms import AspectConfig
from tests.conftest import ROOT, refused, run_in_process
from tests.data.folders_of_images import save_image


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
    assert bucket_sizes(64, AspectConfig(step=16), 8) == [(96, 48), (80, 48), (64, 64), (48, 80), (48, 96)]


def test_steps_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="image.aspect.step 12 is not a multiple of 8, .*; use 8 or 16"):
        bucket_sizes(64, AspectConfig(step=12), 8)
    with pytest.raises(UserError, match="no size in steps of 96 px has about the area of 64 px"):
        bucket_sizes(64, AspectConfig(step=96), 8)


def test_an_image_goes_to_the_nearest_ratio() -> None:
    sizes = [(80, 48), (64, 64), (48, 80)]
    sides = np.array([[300, 500], [100, 101], [170, 100], [1000, 10], [10, 12]])  # width and height
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


def test_the_table_says_what_is_cropped_and_what_was_left_out() -> None:
    sides = np.repeat([[64, 64], [128, 64], [72, 56]], [40, 20, 3], axis=0)
    measured = measure_buckets(ImageConfig(size=64, aspect=AspectConfig(min_images=10)), sides, 8)
    assert [[row["height"], row["width"], row["images"]] for row in measured["buckets"]] == [[64, 64, 43], [48, 88, 20]]
    assert measured["left_out"] == [
        {"height": height, "width": width, "images": count}
        for height, width, count in [(88, 48, 0), (80, 48, 0), (72, 56, 0), (56, 72, 3), (48, 80, 0)]
    ]
    of_square, of_wide = (row["cropped"] for row in measured["buckets"])
    assert of_square == pytest.approx(3 / 43 * (1 - 56 / 72)) and of_wide == pytest.approx(1 - (88 / 48) / 2)
    assert measured["cropped"] == pytest.approx((43 * of_square + 20 * of_wide) / 63)
    assert measured["cropped_to_squares"] == pytest.approx((20 / 2 + 3 * (1 - 56 / 72)) / 63)
    lines = describe_buckets(measured)
    assert lines[0] == "2 buckets of about 64 x 64 px, with sides that are multiples of 8 px, for 63 training images"
    assert lines[3].split() == ["48", "x", "88", "1.83", "20", "8.3%"] and lines[4].split() == ["all", "63", "3.7%"]
    assert "lose 16.9% of their area" in lines[5] and "fewer than min_images 10" in lines[6] and "56x72 px (3)" in lines[6]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """20 tall and 30 square images."""
    for i in range(50):
        save_image(tmp_path / "data" / "ab"[i % 2] / f"{i}.png", size=(30, 40) if i < 20 else (40, 40))
    return tmp_path / "data"


def test_check_shows_the_buckets_of_a_folder(shapes: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    out = run_in_process("prepare_data.py", "check", shapes, "--size", "32", "--aspect", "--step", "4", "--sheet", sheet).out
    assert "--size: 2 buckets of about 32 x 32 px, with sides that are multiples of 4 px" in out and sheet.exists()
    assert ["36", "x", "28", "0.78", "20", "3.6%"] in [line.split() for line in out.splitlines()]
    arguments = ("check", shapes, "--size", "32", "--aspect", "1.1", "--step", "4", "--json")
    tables = json.loads(run_in_process("prepare_data.py", *arguments).out)["buckets"]
    assert [row["images"] for row in tables["--size"]["buckets"]] == [50], "no shape but the square is below 1.1"
    assert "buckets" not in json.loads(run_in_process("prepare_data.py", "check", shapes, "--json").out)
    for words, message in [
        (["--aspect"], "--aspect makes buckets from --size"),
        (["--size", "32", "--step", "4"], "give --size and --aspect"),
        (["--size", "32", "--aspect", "0.5"], "--aspect: max_ratio: input should be greater than or equal to 1"),
        (["--size", "32", "--aspect", "--step", "48"], "no size in steps of 48 px has about the area of 32 px"),
    ]:
        assert message in refused("prepare_data", "check", shapes, *words)


def test_check_takes_the_factor_from_the_networks_of_a_config(shapes: Path, tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "data": {"source": "folder", "path": str(shapes)},
        "image": {"size": 32, "aspect": {"min_images": 3}},
        "held_out": 0.2,
    }
    unet = {"base_channels": 8, "channel_mult": [1, 2, 2], "attention": ["none", "none", "none"], "norm_groups": 8}
    smoke = {name: json.loads((ROOT / "configs" / "smoke" / f"{name}.json").read_text()) for name in ("vae", "classifier")}

    def config(**changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(raw | changes))
        return tmp_path / "config.json"

    def check(**changes: Any) -> str:
        return run_in_process("prepare_data.py", "check", config(**changes)).out

    out = check(model=unet)
    images = len([path for path in shapes.rglob("*.png") if not name_fraction(f"{path.parent.name}/{path.name}") < 0.2])
    assert f"image.size: 2 buckets of about 32 x 32 px, with sides that are multiples of 4 px, for {images} training" in out
    assert "multiples of 2 px" in check(classifier=smoke["classifier"]["classifier"])
    stages = check(model=smoke["vae"]["model"], stages=[{"image_size": 16}, {}])
    assert "stages.0.image_size: " in stages and "image.size: 2 buckets" in stages and "multiples of 2 px" in stages
    gone = {"model": unet, "autoencoder": str(tmp_path / "gone")}
    line = refused("prepare_data", "check", config(**gone))
    assert "gone does not exist" in line and "set image.aspect.step" in line
    assert "multiples of 16 px" in check(**gone, image={"size": 32, "aspect": {"step": 16, "min_images": 3}})
    assert "it names none; set image.aspect.step" in refused("prepare_data", "check", config())
    too_fine = config(model=unet, image={"size": 32, "aspect": {"step": 6}})
    assert "step 6 is not a multiple of 4" in refused("prepare_data", "check", too_fine)
    assert "a config has its own image.aspect" in refused("prepare_data", "check", config(model=unet), "--aspect")
    assert "buckets" not in check(image={"size": [24, 32]})
