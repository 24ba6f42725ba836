"""Sets of images: sources together, subsets, who is held out, batches."""

from pathlib import Path

import numpy as np
import pytest

from src.config import UserError, validate
from src.data import ImageConfig, open_data, open_sources
from src.data.sources import SHAPES, DigitsSource, FolderSource, ShapesSource, draw_shape
from src.data.transforms import position_uniforms
from tests.data.folders_of_images import MIDDLE, classes_folder, folder_set, save_image


def test_digits_and_shapes() -> None:
    digits = open_sources(DigitsSource(source="digits"))
    assert len(digits) == 1797 and digits.class_names == tuple("0123456789")
    train, test = (open_sources(DigitsSource(source="digits", split=split)) for split in ("train", "test"))
    assert len(train) + len(test) == 1797 and not set(train.names) & set(test.names) and 120 < len(test) < 240
    shapes = open_sources(ShapesSource(source="shapes", count=8, size=16))
    assert shapes.class_names == SHAPES and shapes.labels.tolist() == [0, 1, 2, 3] * 2
    same = open_sources(ShapesSource(source="shapes", count=8, size=16))
    assert same.fingerprint == shapes.fingerprint
    assert np.array_equal(same.parts[0].load(3, channels=3), shapes.parts[0].load(3, channels=3))
    shape = draw_shape("circle", 32, np.random.default_rng(0))
    assert shape.shape == (32, 32, 3) and len(np.unique(shape.reshape(-1, 3), axis=0)) > 2


def test_held_out_images_are_a_function_of_the_name(tmp_path: Path) -> None:
    for i in range(60):
        save_image(tmp_path / "a" / f"{i}.png", size=(12, 10 + i % 3))
    spec = validate(FolderSource, {"source": "folder", "path": str(tmp_path / "a")})
    train, held = open_data(spec, 0.3)
    assert held is not None and len(train) + len(held) == 60 and not set(train.names) & set(held.names)
    before = set(held.names)
    for i in range(60, 90):
        save_image(tmp_path / "a" / f"{i}.png", size=(12, 10))
    _, later = open_data(spec, 0.3)
    assert later is not None and before < set(later.names), "more images move nobody from one side to the other"
    assert open_data(spec, 0.0)[1] is None
    with pytest.raises(UserError, match="leaves one side empty"):
        open_data(validate(FolderSource, {"source": "folder", "path": str(tmp_path / "a"), "subset": 1}), 0.1)


def test_several_sources_and_subsets(tmp_path: Path) -> None:
    one = classes_folder(tmp_path / "one", "dog", "cat")
    two = classes_folder(tmp_path / "two", "cat", "emu")
    specs = [validate(FolderSource, {"source": "folder", "path": str(path)}) for path in (one, two)]
    both = open_sources(specs)
    assert both.counts == {"cat": 6, "dog": 3, "emu": 3}
    assert [both.class_names[label] for label in both.labels] == [name.split("/")[0] for name in both.names]
    few = open_sources(validate(FolderSource, {"source": "folder", "path": str(one), "subset": 4}))
    fewer = open_sources(validate(FolderSource, {"source": "folder", "path": str(one), "subset": 2}))
    digits, held_out = open_data(validate(DigitsSource, {"source": "digits", "subset": 100}), 0.1)
    assert len(digits) > 80 and held_out is not None and len(held_out) > 3, "a subset is not all held out"
    assert len(few) == 4 and set(fewer.names) < set(few.names)
    held = open_data(specs[1], specs[1])[1]
    assert held is not None and len(held) == 6
    with pytest.raises(UserError, match="classes that data lacks: emu"):
        open_data(specs[0], specs[1])


def test_an_image_that_breaks_after_the_scan_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, colour in enumerate(("red", "green", "blue")):
        save_image(tmp_path / f"{i}.png", colour=colour)
    image_set = folder_set(tmp_path)
    (tmp_path / "1.png").write_bytes(b"gone")
    batch = image_set.batch(np.array([0, 1]), ImageConfig(size=8), np.tile(MIDDLE, (2, 1)))
    assert batch[1, 0, 0].tolist() == [0, 0, 255]
    assert "'1.png' can no longer be read" in capsys.readouterr().out


def test_a_batch_of_a_ready_set_is_the_same_as_one_by_one() -> None:
    spec = ImageConfig(size=16, channels=3, flip=True)
    indices, u = np.array([5, 0, 5, 7]), position_uniforms(0, np.arange(4))
    slow = open_sources(ShapesSource(source="shapes", count=8, size=16))
    fast = open_sources(ShapesSource(source="shapes", count=8, size=16))
    fast.prepare(spec)
    assert fast.ready
    assert np.array_equal(fast.batch(indices, spec, u), slow.batch(indices, spec, u))


def test_a_replaced_image_is_of_the_same_class(tmp_path: Path) -> None:
    image_set = folder_set(classes_folder(tmp_path, "a", "b", each=2))
    (tmp_path / "a" / "1.png").write_bytes(b"gone")
    batch = image_set.batch(np.array([1]), ImageConfig(size=8), MIDDLE[None])
    assert batch[0, 0, 0].tolist() == [255, 0, 0], "the other red one, not the next in the list"
