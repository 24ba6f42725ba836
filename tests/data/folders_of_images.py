"""Small folders of images for the tests of data."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import UserError, validate
from src.data import ImageSet, open_sources
from src.data.sources import FolderSource

MIDDLE = np.full(3, 0.5)


def save_image(path: Path, size: tuple[int, int] = (40, 30), colour: str = "red", **save: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **save)  # pyright: ignore[reportArgumentType]
    return path


def folder_set(path: Path, **options: object) -> ImageSet:
    return open_sources(validate(FolderSource, {"source": "folder", "path": str(path), **options}))


def classes_folder(root: Path, *names: str, each: int = 3) -> Path:
    for i, name in enumerate(names):
        for j in range(each):
            save_image(root / name / f"{j}.png", colour=["red", "green", "blue"][i % 3], size=(40 + i, 30 + j))
    return root


def image(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour % 256, 40, 90)).save(path, "PNG")
    return path


def tree(root: Path, *paths: str) -> Path:
    """Files below `root`: images, or text where their ending is of none; a folder where a path ends in /."""
    for i, path in enumerate(paths):
        if path.endswith("/"):
            (root / path).mkdir(parents=True)
        elif path.endswith((".png", ".jpg")):
            image(root / path, i)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text("x")
    return root


def opened(path: Path, **options: object) -> ImageSet:
    return open_sources(validate(FolderSource, {"source": "folder", "path": str(path), **options}))


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(UserError) as raised:
        opened(path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def remarks(image_set: ImageSet) -> str:
    return "; ".join(remark for part in image_set.parts for remark in part.report.remarks)
