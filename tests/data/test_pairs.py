"""Pairs of images: partners by name, side by side and by column; what is left out; the same cut and flip for both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.config import UserError, validate
from src.data import ImageConfig, ImageSet
from src.data.conditions import PairedCondition
from src.data.pairs import find_partners, half_of, open_pairs
from src.data.sources import DatasetsSource, DigitsSource, FolderSource
from src.data.transforms import position_uniforms
from tests.data.test_formats import content

SIDE = (24, 20)  # width and height


def noise_image(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (SIDE[1], SIDE[0], 3), dtype=np.uint8)


def save_pairs(root: Path, names: list[str]) -> dict[str, Any]:
    """Images in B and their negatives in A, as other files; the data's source."""
    for i, name in enumerate(names):
        for folder, ending, pixels in (("B", ".png", noise_image(i)), ("A", ".bmp", 255 - noise_image(i))):
            path = (root / folder / name).with_suffix(ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return {"source": "folder", "path": str(root / "B")}


def opened(source: dict[str, Any], held_out: Any = 0.0, **condition: Any) -> tuple[ImageSet, ImageSet | None]:
    kinds: dict[str, Any] = {"folder": FolderSource, "datasets": DatasetsSource, "digits": DigitsSource}
    sources = [validate(kinds[each["source"]], each) for each in (source, held_out) if isinstance(each, dict)]
    held_out = sources[1] if len(sources) > 1 else held_out
    return open_pairs(sources[0], held_out, validate(PairedCondition, {"kind": "paired", **condition}))


def check_negatives(images: ImageSet, size: int = 16) -> None:
    """Each partner is the negative of its image, cut and flipped in the same way."""
    spec = ImageConfig(size=size, crop="random", flip=True)
    images.prepare(spec)
    u = position_uniforms(3, np.arange(len(images)))
    batch = images.batch(np.arange(len(images)), spec, u, partners=True)
    assert batch.shape == (len(images), size, size, 6) and np.array_equal(
        batch[..., :3], images.batch(np.arange(len(images)), spec, u)
    )
    assert np.abs(batch[..., :3].astype(int) + batch[..., 3:] - 255).max() <= 1


def test_partners_have_the_same_name_and_are_cut_alike(tmp_path: Path) -> None:
    names = [f"{name}/{i}" for name in ("cat", "dog") for i in range(8)]
    source = save_pairs(tmp_path, names)
    images, _ = opened(source, path=str(tmp_path / "A"))
    assert len(images) == 16 and images.class_names == ("cat", "dog") and images.partner is not None
    check_negatives(images)
    train, held_out = opened(source, 0.3, path=str(tmp_path / "A"))
    assert held_out is not None and 0 < len(held_out) < 16 and len(train) + len(held_out) == 16
    for part in (train, held_out, images.lowest(5), images.only(np.arange(16) % 3 == 0)):
        check_negatives(part)
    _, others = opened(source, source, path=str(tmp_path / "A"))
    assert others is not None
    check_negatives(others)
    plain, _ = open_pairs(validate(FolderSource, source), 0.0, None)
    assert plain.partner is None and plain.fingerprint != images.fingerprint
    assert plain.batch(np.arange(2), ImageConfig(size=16), np.full((2, 3), 0.5), partners=True).shape[3] == 3


def test_one_swapped_partner_is_noticed(tmp_path: Path) -> None:
    source = save_pairs(tmp_path, [str(i) for i in range(8)])
    images, _ = opened(source, path=str(tmp_path / "A"))
    before = images.fingerprint, images.contents(range(8))
    assert images.partner is not None
    images.partner.index[[2, 5]] = images.partner.index[[5, 2]]
    with pytest.raises(AssertionError):
        check_negatives(images)
    assert images.fingerprint != before[0]
    for one, other in (("2.bmp", "swap"), ("5.bmp", "2.bmp"), ("swap", "5.bmp")):
        (tmp_path / "A" / one).rename(tmp_path / "A" / other)
    swapped, _ = opened(source, path=str(tmp_path / "A"))
    with pytest.raises(AssertionError):
        check_negatives(swapped)
    assert swapped.contents(range(8)) != before[1] and swapped.state != images.state


def test_a_partner_may_have_other_channels(tmp_path: Path) -> None:
    images, _ = opened(save_pairs(tmp_path, ["a", "b"]), path=str(tmp_path / "A"), channels=1)
    batch = images.batch(np.arange(2), ImageConfig(size=16), np.full((2, 3), 0.5), partners=True)
    assert batch.shape == (2, 16, 16, 4)


def test_images_without_a_partner_of_their_shape_are_left_out(tmp_path: Path) -> None:
    source = save_pairs(tmp_path, [str(i) for i in range(8)])
    (tmp_path / "A" / "3.bmp").unlink()
    Image.new("RGB", (24, 21)).save(tmp_path / "A" / "6.bmp")
    Image.new("RGB", (48, 40)).save(tmp_path / "A" / "7.bmp")  # another size of the same shape
    with pytest.raises(UserError, match=r"2 of 8 images have no partner.*'3.png' \(no partner\), '6.png' \(a partner of anoth"):
        opened(source, path=str(tmp_path / "A"))
    source["scan"] = {"max_broken_fraction": 0.25}
    images, _ = opened(source, path=str(tmp_path / "A"))
    assert images.names == ["0.png", "1.png", "2.png", "4.png", "5.png", "7.png"]
    assert images.parts[0].report.skipped == [("3.png", "no partner"), ("6.png", "a partner of another shape")]
    with pytest.raises(UserError, match="data folder .* does not exist"):
        opened(source, path=str(tmp_path / "C"))


def test_a_pair_that_cannot_be_read_any_more_is_replaced_as_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, _ = opened(save_pairs(tmp_path, [str(i) for i in range(4)]), path=str(tmp_path / "A"))
    (tmp_path / "A" / "1.bmp").write_bytes(b"broken")
    check_negatives_of_all = images.batch(np.arange(4), ImageConfig(size=20), np.full((4, 3), 0.5), partners=True)
    assert "can no longer be read" in capsys.readouterr().out
    assert np.abs(check_negatives_of_all[..., :3].astype(int) + check_negatives_of_all[..., 3:] - 255).max() <= 1
    assert np.array_equal(check_negatives_of_all[1], check_negatives_of_all[2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_halves_of_one_file(tmp_path: Path, side: str) -> None:
    for i in range(4):
        halves = [noise_image(i), 255 - noise_image(i)]
        Image.fromarray(np.hstack(halves)).save(tmp_path / f"{i}.png")
    images, _ = opened({"source": "folder", "path": str(tmp_path)}, side=side)
    check_negatives(images)
    wanted = [255 - noise_image(1), noise_image(1)] if side == "left" else [noise_image(1), 255 - noise_image(1)]
    assert images.partner is not None and images.sides.tolist() == [list(SIDE)] * 4 and images.endings == {".png": 4}
    for part, pixels in zip((images.parts[0], images.partner.parts[0]), wanted, strict=True):
        assert np.array_equal(np.array(part.load(1, channels=3)), pixels)
    odd = half_of(images.parts[0], "right")
    assert odd.report.measures[:, 0].tolist() == [12] * 4 and odd.content(0) == (tmp_path / "0.png").read_bytes()
    digits = half_of(validate_digits(), "left")
    assert digits.load(0, channels=1).shape[:2] == (8, 4)  # pyright: ignore[reportAttributeAccessIssue]


def validate_digits() -> Any:
    return open_pairs(validate(DigitsSource, {"source": "digits", "subset": 3}), 0.0, None)[0].parts[0]


def test_a_column_of_a_data_set(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "negative": datasets.Image()})
    cell = [{"bytes": content("PNG"), "path": None}] * 3
    datasets.Dataset.from_dict({"image": cell, "negative": [cell[0], None, cell[0]]}, features=kinds).save_to_disk(
        str(tmp_path / "rows")
    )
    loose = {"scan": {"max_broken_fraction": 0.5}}
    source = {"source": "datasets", "name": str(tmp_path / "rows"), **loose}
    images, _ = opened(source, column="negative")
    assert images.names == ["train/00000000", "train/00000002"]
    batch = images.batch(np.arange(2), ImageConfig(size=8), np.full((2, 3), 0.5), partners=True)
    assert np.array_equal(batch[..., :3], batch[..., 3:])
    with pytest.raises(UserError, match="has no image column 'edges'; it has: image, negative"):
        opened(source, column="edges")
    with pytest.raises(UserError, match="'image' is the column of the images themselves"):
        opened(source, column="image")
    with pytest.raises(UserError, match="is for the source datasets, and the data's source is digits"):
        opened({"source": "digits"}, column="edges")


def test_partners_by_name() -> None:
    assert find_partners(["a/x.jpg", "b.png", "c.png"], ["c.gif", "a/x.png", "x.png"]).tolist() == [1, -1, 0]
    assert find_partners(["t/1", "t/2"], ["t/2"], by_stem=False).tolist() == [-1, 0]
    assert find_partners(["v1.2.png"], ["v1.3.png", "v1.2.gif"]).tolist() == [1]
    with pytest.raises(UserError, match="has several partners, x.png, x.jpg; leave one of them there"):
        find_partners(["x.bmp"], ["x.png", "x.jpg"])
