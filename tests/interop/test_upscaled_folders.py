"""Folders of images, upscaled."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from src.config import UserError
from src.sampling.upscaling import Upscaler, upscale_folder
from tests.interop.upscalers import directly


def save_image(path: Path, *size: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)
    return path


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    for i in range(5):
        save_image(folder / f"{i}.png", 6, 8, 3, seed=i)
    save_image(folder / "sub" / "grey.png", 6, 8)
    save_image(folder / "sub" / "wide.jpg", 5, 44, 3)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    save_image(folder / ".hidden" / "x.png", 6, 8, 3)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def upscale(folder: Path, out: Path, upscaler: Upscaler, *, batch_size: int = 3, rank: int = 0, world: int = 1) -> list[Path]:
    return upscale_folder(folder, out, upscaler, batch_size=batch_size, rank=rank, world=world, barrier=lambda: None)


def test_a_folder_becomes_pngs_of_the_same_names(
    folder: Path, tmp_path: Path, upscaler: Upscaler, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "large"
    written = upscale(folder, out, replace(upscaler, tile=40))
    names = [*(f"{i}.png" for i in range(5)), "sub/grey.png", "sub/wide.png"]
    assert written == [out / name for name in names]
    assert {path for path in out.rglob("[!.]*") if path.is_file()} == set(written)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and str(folder / "broken.jpg") in lines[0]
    assert pixels(out / "sub" / "grey.png").shape == (24, 32), "grey stays grey"
    assert pixels(out / "sub" / "wide.png").shape == (20, 176, 3)

    x = torch.from_numpy(pixels(folder / "2.png")).permute(2, 0, 1)[None] / 127.5 - 1
    written = pixels(out / "2.png").astype(float)
    wanted = (directly(upscaler.network, x)[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(written - wanted).max() <= 0.51


def test_what_was_overwritten_is_made_again(folder: Path, tmp_path: Path, upscaler: Upscaler) -> None:
    first = {path: path.read_bytes() for path in upscale(folder, tmp_path / "a", upscaler)}
    times = (folder / "1.png").stat()
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes())
    later = (tmp_path / "a" / "2.png").stat().st_mtime_ns + 1
    os.utime(folder / "2.png", ns=(times.st_atime_ns, later))
    upscale(folder, tmp_path / "a", upscaler)
    changed = [path.name for path, content in first.items() if path.read_bytes() != content]
    assert changed == ["2.png"], changed


def test_what_is_there_is_kept_and_the_rest_comes_out_the_same(folder: Path, tmp_path: Path, upscaler: Upscaler) -> None:
    written = upscale(folder, tmp_path / "a", upscaler)
    first = {path: path.read_bytes() for path in written}
    for path in written[1::2]:
        path.unlink()
    Image.new("RGB", (3, 3)).save(written[0])
    first_bytes = written[0].read_bytes()
    calls = []
    upscaler.network.register_forward_hook(lambda *_: calls.append(1))
    assert upscale(folder, tmp_path / "a", upscaler) == written
    assert calls and {path: path.read_bytes() for path in written} == {**first, written[0]: first_bytes}
    calls.clear()
    upscale(folder, tmp_path / "a", upscaler)
    assert not calls, "nothing is drawn twice, the batch with the broken file neither"


def test_ranks_share_the_images_and_give_the_same_bytes(folder: Path, tmp_path: Path, upscaler: Upscaler) -> None:
    whole = upscale(folder, tmp_path / "one", upscaler)
    first = upscale(folder, tmp_path / "two", upscaler, rank=0, world=2)
    assert tmp_path / "two" / "3.png" not in first, "the second batch of three is the other's, with the broken file"
    both = upscale(folder, tmp_path / "two", upscaler, rank=1, world=2)
    assert [path.relative_to(tmp_path / "two") for path in both] == [path.relative_to(tmp_path / "one") for path in whole]
    assert [path.read_bytes() for path in both] == [path.read_bytes() for path in whole]


def test_large_images_go_one_at_a_time(tmp_path: Path, upscaler: Upscaler) -> None:
    shapes = []
    upscaler.network.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    for i in range(4):
        save_image(tmp_path / "in" / f"{i}.png", 6, 30 if i < 2 else 8, 3)
    upscale(tmp_path / "in", tmp_path / "out", replace(upscaler, tile=20, overlap=4), batch_size=4)
    assert shapes == [(1, 3, 6, 20)] * 4 + [(2, 3, 6, 8)]


def test_folders_that_cannot_be_upscaled(folder: Path, tmp_path: Path, upscaler: Upscaler) -> None:
    out = tmp_path / "out"

    def refuse(source: Path, out: Path = out, **options: Any) -> str:
        with pytest.raises(UserError) as raised:
            upscale(source, out, upscaler, **options)
        assert "\n" not in str(raised.value) and not out.exists()
        return str(raised.value)

    assert "does not exist" in refuse(tmp_path / "nowhere")
    assert "not a folder" in refuse(folder / "1.png")
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refuse(tmp_path / "empty")
    assert "lies in" in refuse(folder, folder / "large")
    assert "batch_size" in refuse(folder, batch_size=0)
    save_image(folder / "2.bmp", 6, 8, 3)
    message = refuse(folder)
    assert "2.bmp" in message and "2.png" in message and "rename" in message
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"nothing")
    assert "none of its 1 pictures" in refuse(tmp_path / "broken")
    save_image(tmp_path / "broken" / "b.png", 6, 8, 3)
    paths = upscale(tmp_path / "broken", out, upscaler)
    (tmp_path / "broken" / "b.png").unlink()
    with pytest.raises(UserError, match="none of its 1 pictures"):
        upscale(tmp_path / "broken", out, upscaler)
    assert len(paths) == 1 and paths[0].exists(), "what an earlier run made is not lost"
