"""Images of every shape: trained on, resumed on two processes, and drawn."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from src.config import read_json
from tests import kills, resumes
from tests.conftest import launch, metrics, refused, run_here

BUCKETS = {(20, 12), (16, 16), (12, 20)}


def job_of(name: str) -> resumes.Job:
    return next(job for job in resumes.jobs() if job.name == name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixels of three shapes, balanced by class, in float64."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "config.json").write_text(json.dumps(job_of("ddpm_1").raw))
    run_here("ddpm_accelerate", "-cfg", folder / "config.json", "--run-dir", folder / "run")
    return folder / "run"


def size_of(path: Path) -> tuple[int, int]:
    """Height and width."""
    with Image.open(path) as image:
        return image.height, image.width


def sizes_of(folder: Path) -> set[tuple[int, int]]:
    """Those of the samples in a folder."""
    return {size_of(path) for path in folder.glob("[0-9]*.png")}


def test_the_run_remembers_its_buckets(run: Path) -> None:
    table = read_json(run / "data.json")["buckets"]
    assert {(height, width) for height, width, _ in table} == BUCKETS
    assert sum(count for _, _, count in table) == read_json(run / "data.json")["images"]
    assert size_of(run / "contact_sheet.png")[0] > 3 * 16  # each shape has its rows


def test_it_goes_on_to_the_bit_on_two_processes(run: Path, tmp_path: Path) -> None:
    kills.go_back(run, tmp_path / "run", 3)
    done = launch("ddpm_accelerate.py", "-cfg", run.parent / "config.json", "--run-dir", tmp_path / "run", processes=2)
    assert done.status == 0, done.all
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "going on at step 3 of 8" in log and "a step is 4 images = 2 x cpu x 1 x 2" in log
    assert [line["step"] for line in metrics(tmp_path / "run")] == [line["step"] for line in metrics(run)]
    kills.same_end(run, tmp_path / "run")


def test_another_micro_batch_sees_the_same_images(run: Path, tmp_path: Path) -> None:
    """Another split of the batch agrees but for rounding; with another image it would not."""
    words = ("--set", "micro_batch_size=4", "--set", "model.dropout=0.0")
    first = tmp_path / "first"
    run_here("ddpm_accelerate", "-cfg", run.parent / "config.json", "--run-dir", first, *words[2:])
    run_here("ddpm_accelerate", "-cfg", run.parent / "config.json", "--run-dir", tmp_path / "second", *words)
    for one, other in zip(metrics(first), metrics(tmp_path / "second"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def draw(run: Path, out: Path, *words: Any) -> dict[str, Any]:
    run_here("sample", run, "--num-samples", "2", "--batch-size", "2", "--steps", "2", "--out", out, *words)
    return read_json(out / "metadata.json")


def test_samples_have_the_size_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    table = read_json(run / "data.json")["buckets"]
    most = max(table, key=lambda bucket: bucket[2])[:2]
    assert draw(run, tmp_path / "default")["size"] == most and sizes_of(tmp_path / "default") == {tuple(most)}
    assert draw(run, tmp_path / "asked", "--size", "14x18")["size"] == [14, 18] and sizes_of(tmp_path / "asked") == {(14, 18)}
    draw(run, tmp_path / "square", "--size", "20")
    assert sizes_of(tmp_path / "square") == {(20, 20)}


def test_an_image_is_edited_at_its_own_shape(run: Path, tmp_path: Path) -> None:
    for name, mode, colour in (("image", "RGB", "red"), ("mask", "L", 255)):
        Image.new(mode, (60, 31), colour).save(tmp_path / f"{name}.png")  # a wide one
    image = ("--image", tmp_path / "image.png")
    draw(run, tmp_path / "from", *image, "--start-at", "1")
    draw(run, tmp_path / "filled", *image, "--mask", tmp_path / "mask.png")
    assert sizes_of(tmp_path / "from") == sizes_of(tmp_path / "filled") == {(12, 20)}
    run_here("sample", run, "--invert", tmp_path / "image.png", "--steps", "2", "--solver", "euler", "--out", tmp_path / "back")
    assert (tmp_path / "back" / "inversion.png").exists()


def test_an_animation_has_the_size_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    words = ("--seeds", "1/2", "--frames-between", "2", "--steps", "2", "--size", "12x22")
    run_here("interpolate", run, *words, "--out", tmp_path / "out")
    assert {size_of(path) for path in (tmp_path / "out" / "frames").glob("*.png")} == {(5 * 12, 5 * 22)}  # enlarged to be seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "15x16"), "reduces images by 2, and 15x16 px is not divisible by it; take 14x16 px or 16 px"),
        (("--size", "tall"), "--size tall: give HEIGHTxWIDTH, such as 48x88, or one number"),
        (("--size", "16x16x3"), "--size 16x16x3: give HEIGHTxWIDTH"),
        (("--size", "0x16"), "sides go from 2 to 4096 px"),
    ],
)
def test_sizes_that_cannot_be_drawn(run: Path, words: tuple[str, ...], message: str) -> None:
    assert message in refused("sample", run, "--steps", "2", *words)
