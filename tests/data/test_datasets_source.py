"""The source `datasets`: rows without images or labels, saved sets, folders of images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import UserError, validate
from src.data import ImageConfig, open_sources
from src.data.sources import DatasetsSource
from tests.data.folders_of_images import classes_folder
from tests.data.test_formats import SIDE, content


@pytest.mark.parametrize("least", [0, 20])
def test_rows_without_an_image(tmp_path: Path, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for name in ("there", "gone"):
        Image.new("RGB", SIDE).save(tmp_path / f"{name}.png")
    gone, there = ({"bytes": None, "path": str(tmp_path / f"{name}.png")} for name in ("gone", "there"))
    good, empty, text = ({"bytes": cell, "path": None} for cell in (content("PNG"), b"", b"text that is no image"))
    columns = {"image": [good, None, gone, empty, there, text], "style": ["a", "b", "b", "b", "", "b"]}
    kinds = datasets.Features({"image": datasets.Image(), "style": datasets.Value("string")})
    table = datasets.Dataset.from_dict(columns, features=kinds)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    (tmp_path / "gone.png").unlink()
    scan = {"min_file_bytes": least, "max_broken_fraction": 1.0}
    spec = {"source": "datasets", "name": "x", "label_column": "style", "scan": scan}
    image_set = open_sources(validate(DatasetsSource, spec))
    assert image_set.names == ["train/00000000", "train/00000004"] and image_set.labels.tolist() == [0, -1]
    assert dict(image_set.parts[0].report.skipped) == {
        "train/00000001": "no image in this row",
        "train/00000002": "cannot be read now: No such file or directory",
        "train/00000003": "smaller than min_file_bytes" if least else "empty file",
        "train/00000005": "not an image",
    }
    assert "1 images have no label in 'style' and are left without a class" in image_set.parts[0].report.remarks[0]
    assert image_set.batch(np.array([0, 1]), ImageConfig(size=8), np.full((2, 3), 0.5)).shape == (2, 8, 8, 3)


def test_labels_that_are_missing_are_no_class(tmp_path: Path) -> None:
    import datasets

    good = {"bytes": content("PNG"), "path": None}
    words = {"number": datasets.Value("float32"), "caf\u00e9": datasets.Value("string")}
    kinds = datasets.Features({"image": datasets.Image(), **words})
    columns = {"number": [1.0, float("nan"), None, 2.0], "caf\u00e9": ["nan", "", "é", "e\u0301"]}
    datasets.Dataset.from_dict({"image": [good] * 4, **columns}, features=kinds).save_to_disk(str(tmp_path / "rows"))
    for column, names, labels in (("number", ("1.0", "2.0"), [0, -1, -1, 1]), ("cafe\u0301", None, [-1, -1, 0, 0])):
        spec = {"source": "datasets", "name": str(tmp_path / "rows"), "label_column": column}
        image_set = open_sources(validate(DatasetsSource, spec))
        assert image_set.labels.tolist() == labels and (names is None or image_set.class_names == names)


def test_datasets_from_disk_and_imagefolder(tmp_path: Path) -> None:
    import datasets

    root = classes_folder(tmp_path / "images", "cat", "dog")
    by_folder = {"source": "datasets", "name": "imagefolder", "data_dir": str(root), "label_column": "label"}
    image_set = open_sources(validate(DatasetsSource, by_folder))
    assert image_set.counts == {"cat": 3, "dog": 3}
    loaded = image_set.parts[0].load(4, channels=3)
    assert isinstance(loaded, Image.Image) and loaded.getpixel((0, 0)) == (0, 128, 0)

    files = sorted(str(path) for path in root.rglob("*.png"))
    rows = datasets.Dataset.from_dict({"picture": files, "style": ["x", "y", "x", "y", "x", None], "n": list(range(6))})
    rows = rows.cast_column("picture", datasets.Image())
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    saved = {"source": "datasets", "name": str(tmp_path / "saved"), "image_column": "picture", "label_column": "style"}
    image_set = open_sources(validate(DatasetsSource, saved))
    assert image_set.counts == {"x": 3, "y": 2, "(no class)": 1}
    for change, message in [
        ({"label_column": "stile"}, "no label column 'stile'; it has: style, n"),
        ({"image_column": "image"}, "no image column 'image'; it has: picture"),
        ({"split": "test"}, "no split 'test'; it has: train"),
        ({"name": str(tmp_path / "absent")}, "cannot be loaded"),
    ]:
        with pytest.raises(UserError, match=message):
            open_sources(validate(DatasetsSource, {**saved, **change}))


def test_a_transposed_set_has_the_sides_of_its_images(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.Features({"image": datasets.Image()})
    files = [{"bytes": content("PNG"), "path": None}] * 2
    datasets.Dataset.from_dict({"image": files}, features=kinds).save_to_disk(str(tmp_path / "rows"))
    spec = {"source": "datasets", "name": str(tmp_path / "rows")}
    for transpose in (False, True):
        image_set = open_sources(validate(DatasetsSource, {**spec, "transpose": transpose}))
        width, height = SIDE[::-1] if transpose else SIDE
        assert image_set.sides.tolist() == [[width, height]] * 2 and width != height
        loaded = image_set.parts[0].load(0, channels=3)
        assert isinstance(loaded, Image.Image) and loaded.size == (width, height)
