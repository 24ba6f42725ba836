"""Sheets, curves and GIFs."""

import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src import pictures
from src.config import UserError


def test_to_uint8_covers_the_range() -> None:
    x = torch.tensor([-2.0, -1, 0, 1, 2]).reshape(1, 1, 1, 5)
    assert pictures.to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255]
    assert pictures.to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_a_grid_has_its_pictures_row_by_row() -> None:
    cells = np.zeros((5, 64, 64, 3), np.uint8)
    for i in range(5):
        cells[i] = 40 * i
    sheet = np.asarray(pictures.grid(cells, columns=3))
    assert sheet.shape == (4 + 2 * 68, 4 + 3 * 68, 3)
    assert [sheet[36, 36 + 68 * i, 0] for i in range(3)] == [0, 40, 80] and sheet[104, 36, 0] == 120
    assert sheet[104, 172].tolist() == [255] * 3, "the empty place is white"
    labelled = pictures.grid(cells, columns=3, labels=["a very long label indeed"] * 5, title="t")
    assert labelled.height > sheet.shape[0]
    assert pictures.grid(np.zeros((1, 16, 16, 1), np.uint8), columns=1).width == 64 + 8, "small pictures are enlarged"


def test_beside_and_save(tmp_path: Path) -> None:
    both = pictures.beside(Image.new("RGB", (3, 5)), Image.new("RGB", (4, 2)))
    assert both.size == (7, 5) and both.getpixel((6, 4)) == (255, 255, 255)
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG")):
        pictures.save(both, tmp_path / "new" / name)
        with Image.open(tmp_path / "new" / name) as image:
            assert image.format == kind
    assert not list((tmp_path / "new").glob("*.part"))


def test_curves(tmp_path: Path) -> None:
    pictures.curves(tmp_path / "c.png", {"y": {"a": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}}, xlabel="x", log={"y"})
    with Image.open(tmp_path / "c.png") as image:
        assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 20) or []) > 10


@pytest.mark.parametrize("ffmpeg", [True, False])
def test_gif_with_and_without_ffmpeg(tmp_path: Path, ffmpeg: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ffmpeg:
        monkeypatch.setattr(pictures, "ffmpeg", lambda: None)
    elif pictures.ffmpeg() is None:
        pytest.skip("no ffmpeg here")
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"f_{i:03d}.png")
        pictures.save(Image.new("RGB", (8, 8), (80 * i, 0, 0)), paths[-1])
    command = pictures.gif(paths, tmp_path / "f_%03d.png", tmp_path / "out.gif", fps=5)
    with Image.open(tmp_path / "out.gif") as image:
        assert getattr(image, "n_frames", 1) == 3 and image.info["duration"] == 200 and image.info.get("loop") == 0
    assert command.startswith("ffmpeg ") and "-framerate 5" in command
    if ffmpeg:
        (tmp_path / "out.gif").unlink()
        subprocess.run([pictures.ffmpeg() or "", *shlex.split(command)[1:]], check=True)
        assert (tmp_path / "out.gif").exists()
    with pytest.raises(UserError, match="no frames"):
        pictures.gif([], tmp_path / "f_%03d.png", tmp_path / "none.gif", fps=5)
