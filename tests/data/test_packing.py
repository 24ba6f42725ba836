"""Packed sets: their images are those of the folder, and packing goes on after a kill."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import UserError, validate
from src.data import ImageConfig, ImageSet, open_data, open_sources
from src.data import packing as packing_module
from src.data.packing import pack
from src.data.sources import FolderSource, PackedSource, ShapesSource
from src.data.transforms import resize_shorter_side
from tests.data.folders_of_images import MIDDLE, classes_folder, folder_set


def packed_set(path: Path, split: str = "all") -> ImageSet:
    return open_sources(validate(PackedSource, {"source": "packed", "path": str(path), "split": split}))


def test_packed_images_are_those_of_the_folder(tmp_path: Path) -> None:
    root = classes_folder(tmp_path / "images", "a", "b")
    image_set = folder_set(root)
    assert pack(image_set, tmp_path / "packed", size=16, channels=3, held_out=0.5) == 6
    packed = packed_set(tmp_path / "packed")
    assert (packed.names, packed.class_names) == (image_set.names, image_set.class_names)
    assert packed.labels.tolist() == image_set.labels.tolist()
    for i in range(6):
        original = image_set.parts[0].load(i, channels=3)
        assert isinstance(original, Image.Image)
        assert np.array_equal(packed.parts[0].load(i, channels=3), resize_shorter_side(original, 16))
    train, held = packed_set(tmp_path / "packed", "train"), packed_set(tmp_path / "packed", "held_out")
    assert sorted(train.names + held.names) == image_set.names and set(held.names) == set(open_data(*_spec(root), 0.5)[1].names)  # pyright: ignore
    with pytest.raises(UserError, match="exists"):
        pack(image_set, tmp_path / "packed", size=16, channels=3)
    (tmp_path / "packed" / "pixels.bin").write_bytes(b"cut")
    with pytest.raises(UserError, match="cut; pack it again"):
        packed_set(tmp_path / "packed")
    with pytest.raises(UserError, match="no manifest"):
        packed_set(root)


def _spec(root: Path) -> tuple[FolderSource]:
    return (validate(FolderSource, {"source": "folder", "path": str(root)}),)


def test_packed_squares_are_one_indexed_copy(tmp_path: Path) -> None:
    pack(open_sources(ShapesSource(source="shapes", count=8, size=16)), tmp_path / "packed", size=16, channels=3)
    image_set = packed_set(tmp_path / "packed")
    image_set.prepare(ImageConfig(size=16))
    assert image_set.ready and image_set._in_memory is not None and isinstance(image_set._in_memory[1], np.memmap)


def test_packing_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_set = folder_set(classes_folder(tmp_path / "images", "a", "b", each=5))
    pack(image_set, tmp_path / "whole", size=16, channels=3)
    monkeypatch.setattr(packing_module, "BLOCK", 2)
    real, count = packing_module.resize_shorter_side, []

    def dies(image: Image.Image, size: int) -> np.ndarray:
        count.append(1)
        if len(count) > 5:
            raise KeyboardInterrupt
        return real(image, size)

    monkeypatch.setattr(packing_module, "resize_shorter_side", dies)
    with pytest.raises(KeyboardInterrupt):
        pack(image_set, tmp_path / "packed", size=16, channels=3)
    assert not (tmp_path / "packed").exists()
    with open(tmp_path / "packed.partial" / "pixels.bin", "ab") as file:
        file.write(b"half an image")
    monkeypatch.setattr(packing_module, "resize_shorter_side", lambda image, size: (count.append(1), real(image, size))[1])
    count.clear()
    pack(image_set, tmp_path / "packed", size=16, channels=3)
    assert 0 < len(count) < 10, "what was packed before the kill was kept"
    for name in ("pixels.bin", "records.npy"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "packed.partial").exists()


def test_a_packed_split_with_gaps_is_one_indexed_copy_too(tmp_path: Path) -> None:
    shapes = open_sources(ShapesSource(source="shapes", count=40, size=16))
    pack(shapes, tmp_path / "packed", size=16, channels=3, held_out=0.3)
    held = packed_set(tmp_path / "packed", "held_out")
    held.prepare(ImageConfig(size=16))
    assert held.ready and 0 < len(held) < 40
    batch = held.batch(np.arange(len(held)), ImageConfig(size=16), np.tile(MIDDLE, (len(held), 1)))
    for name, pixels in zip(held.names, batch, strict=True):
        assert np.array_equal(pixels, shapes.parts[0].load(shapes.names.index(name), channels=3))
    other = packed_set(tmp_path / "packed")
    other.prepare(ImageConfig(size=8))
    assert not other.ready, "resizing is work for the loader's workers"
