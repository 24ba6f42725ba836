"""2-D densities: where their points lie."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import UserError, validate
from src.data.points import (
    CheckerboardSource,
    DensitySource,
    MixtureSource,
    MoonsSource,
    SpiralSource,
    density_image,
    density_of,
    draw_points,
    open_points,
)


def test_the_points_of_each_density() -> None:
    for spec in (
        MoonsSource(source="moons"),
        SpiralSource(source="spiral"),
        CheckerboardSource(source="checkerboard"),
        MixtureSource(source="mixture", means=((-1.0, 0.0), (1.0, 0.5)), stds=(0.1, 0.2)),
    ):
        point_set = draw_points(spec)
        assert point_set.points.shape == (131072, 2) and point_set.points.dtype == np.float32 and len(point_set) == 131072
        assert np.abs(point_set.points).max() < 3 and 0.3 < point_set.points.std() < 1.3, "about as wide as a standard normal"
        assert np.array_equal(point_set.points, draw_points(spec).points), "always the same"
    other = draw_points(SpiralSource(source="spiral", turns=3.0))
    assert other.fingerprint != draw_points(SpiralSource(source="spiral")).fingerprint


def test_a_checkerboard_is_empty_where_it_is_white() -> None:
    points = draw_points(CheckerboardSource(source="checkerboard", cells=4)).points
    cell = np.floor((points / 1.8 + 1) / 2 * 4).astype(int)
    assert cell.min() == 0 and cell.max() == 3 and ((cell.sum(1) % 2) == 0).mean() > 0.9999


def test_a_mixture_has_its_means_spreads_weights_and_classes() -> None:
    spec = MixtureSource(source="mixture", means=((-1.0, 0.0), (1.0, 0.5)), stds=(0.1, 0.3), weights=(3.0, 1.0))
    point_set = draw_points(spec)
    assert point_set.class_names == ("0", "1") and abs((point_set.labels == 0).mean() - 0.75) < 0.01
    for label, (mean, std) in enumerate(zip(spec.means, spec.stds, strict=True)):
        of_class = point_set.points[point_set.labels == label]
        assert np.abs(of_class.mean(0) - mean).max() < 0.01 and np.abs(of_class.std(0) - std).max() < 0.01
    with pytest.raises(UserError, match="as many stds"):
        validate(MixtureSource, {"source": "mixture", "means": [[0, 0]], "stds": [1.0, 2.0]})


def test_moons_are_two_classes_and_a_spiral_turns() -> None:
    moons = draw_points(MoonsSource(source="moons", noise=0.0))
    assert sorted(moons.counts) == ["0", "1"] and sum(moons.counts.values()) == len(moons)
    upper = moons.points[moons.labels == 0] / 1.2 + [0.5, 0.25]
    assert np.allclose(np.linalg.norm(upper, axis=1), 1, atol=1e-5) and upper[:, 1].min() > -1e-5
    spiral = draw_points(SpiralSource(source="spiral", turns=2.0, noise=0.0)).points
    radius, angle = np.linalg.norm(spiral, axis=1) / 1.8, np.arctan2(spiral[:, 1], spiral[:, 0])
    turned = (radius * 2 * 2 * np.pi - angle) / (2 * np.pi)
    assert np.abs(turned - turned.round()).max() < 1e-3, "the angle grows with the radius"


def test_an_image_is_dense_where_it_is_bright(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40), dtype=np.uint8)
    pixels[:5, :10] = 240  # upper left, four times as bright as
    pixels[15:, 30:] = 60  # lower right
    Image.fromarray(pixels).save(tmp_path / "density.png")
    points = draw_points(DensitySource(source="density", path=str(tmp_path / "density.png"))).points
    left = points[:, 0] < 0
    assert abs(left.mean() - 0.8) < 0.01, "as bright, as dense"
    assert points[left, 1].min() > 0.4999 and points[left, 0].max() < -0.9999, "the first row is at the top"
    assert np.abs(points).max() <= 2 and points[:, 0].min() < -1.99, "the longer side is 4 wide"
    inverted = draw_points(DensitySource(source="density", path=str(tmp_path / "density.png"), invert=True)).points
    assert not ((inverted[:, 0] < -1.01) & (inverted[:, 1] > 0.51)).mean() > 0.02, "what was bright is nearly empty"
    spec = DensitySource(source="density", path=str(tmp_path / "density.png"))
    assert density_of(spec).sum() == pytest.approx(1)
    png = density_image(spec.path)
    (tmp_path / "density.png").unlink()
    assert np.array_equal(draw_points(spec, png).points, points), "the image travels with the weights"


def test_a_density_image_that_is_empty_missing_or_none(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no image")

    def spec(name: str, *, invert: bool = False) -> DensitySource:
        return DensitySource(source="density", path=str(tmp_path / name), invert=invert)

    with pytest.raises(UserError, match=r"black.png is empty: all of it is black; draw on it, or change invert"):
        density_of(spec("black.png"))
    with pytest.raises(UserError, match="all of it is white"):
        density_of(spec("white.png", invert=True))
    with pytest.raises(UserError, match="does not exist"):
        density_of(spec("none.png"))
    with pytest.raises(UserError, match=r"text.png cannot be read"):
        density_of(spec("text.png"))


def test_points_are_held_out() -> None:
    train, held_out = open_points(MoonsSource(source="moons", count=1000), 0.1)
    assert held_out is not None and (len(train), len(held_out)) == (900, 100)
    assert held_out.class_names == train.class_names and len(held_out.labels) == 100
    assert open_points(MoonsSource(source="moons", count=1000), 0.0)[1] is None
