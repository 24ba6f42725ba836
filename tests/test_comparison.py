"""What tests/compare_commits.py must notice: a changed tensor, number or pixel, and a file that is missing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.comparison.files import compare_folders


def write_run(folder: Path, *, weight: float = 1.0, loss: float = 0.5, speed: float = 3.0, pixel: int = 7) -> Path:
    """A folder with one file of each kind."""
    (folder / "samples").mkdir(parents=True)
    save_file({"layer.weight": torch.tensor([weight, 2.0]), "step": torch.tensor(3)}, folder / "model.safetensors")
    torch.save({"weights": {"bias": torch.tensor([weight])}, "config": {"speed": speed}, "step": 4}, folder / "export.pt")
    lines = [{"step": 1, "loss": loss, "images_per_second": speed}, {"step": 2, "loss": float("nan")}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "log.txt").write_text(f"{speed} images a second")
    np.savez(folder / "samples.npz", arr_0=np.full((2, 2), pixel, np.uint8))
    Image.new("RGB", (4, 4), (pixel, 0, 0)).save(folder / "samples" / "0.png")
    return folder


def test_equal_results_are_counted_and_the_clock_is_not(tmp_path: Path) -> None:
    result = compare_folders(write_run(tmp_path / "old"), write_run(tmp_path / "new", speed=9.0))
    assert result.differences == []
    assert result.counts == {"tensors": 4, "numbers": 4, "arrays": 1, "images": 1}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weight": 1.0000001}, ["export.pt: weights.bias: differs by up to 1.19e-07", "model.safetensors: layer.weight"]),
        ({"loss": 0.5000000000000001}, ["metrics.jsonl: 0.loss: 0.5 became 0.5000000000000001"]),
        ({"pixel": 8}, ["samples.npz: arr_0: 4 of 4 values differ", "samples/0.png: frame 0: 16 of 64 values differ"]),
    ],
)
def test_a_changed_tensor_number_or_pixel_is_named(tmp_path: Path, change: dict[str, float], expected: list[str]) -> None:
    differences = compare_folders(write_run(tmp_path / "old"), write_run(tmp_path / "new", **change)).differences
    assert len(differences) == len(expected)
    for line, start in zip(differences, expected, strict=True):
        assert line.startswith(start)


def test_a_missing_file_and_an_empty_folder_are_differences(tmp_path: Path) -> None:
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new")
    (new / "samples" / "0.png").unlink()
    assert compare_folders(old, new).differences == ["samples/0.png is in the reference alone"]
    assert compare_folders(new, old).differences == ["samples/0.png is in the other commit alone"]
    assert compare_folders(tmp_path / "no", tmp_path / "nothing").differences == ["there is nothing to compare"]
