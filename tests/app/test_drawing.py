"""What the page draws is what the scripts draw, to the bit; what it shows on the way; and how it is stopped."""

import shlex
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.app.between_tab import Way, copy_images, draw_between, read_way
from src.app.compare_tab import list_weights, parse_sweep, read_panels
from src.app.controls import Page, explain, in_one_line, read_sampler, show_job
from src.app.device import OPEN_RUNS, Device, Stopped, stamp_of, stream
from src.app.draw_tab import read_request
from src.app.drawing import Progress, Result, compare_images, draw_images, pack
from src.app.edit_tab import HINTS, given_files, named, paint_of, read_edit, save_image
from src.app.places import Places
from src.config import UserError, validate
from src.sampling import SamplerConfig
from src.sampling.plan import DrawRequest
from tests.conftest import run_here

SAMPLER = ("ddim", 3, "even", 1.0, None)


@pytest.fixture
def page(place: Path, tmp_path: Path) -> Page:
    return Page(Places(), Device(torch.device("cpu"), threads=1), tmp_path, "cpu")


def draw(page: Page, request: DrawRequest, folder: Path) -> tuple[Result, list[Any]]:
    """What was drawn, and what was shown on the way."""
    shown = list[Any]()
    return draw_images(page.device, request, folder, shown.append), shown


def pixels_below(folder: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)) for path in sorted(folder.rglob("[0-9]*.png"))}


def assert_same_as_script(command: str, folder: Path, out: Path, cwd: Path) -> None:
    """The images of a folder are those that the command draws, with the same names."""
    program, script, *words = shlex.split(command)
    assert program == "python"
    run_here(script.removesuffix(".py"), *words, "--out", out, cwd=cwd)
    ours, theirs = pixels_below(folder), pixels_below(out)
    assert ours.keys() == theirs.keys() and ours
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_page_and_the_command_line_draw_the_same_pixels(page: Page, place: Path, tmp_path: Path) -> None:
    request = read_request(
        page,
        "runs/shapes",
        "step_00000020",
        ["circle", "cross"],
        "2/1",
        5,
        3,
        " 16x24 ",
        True,
        None,
        "heun",
        3,
        "even",
        2.0,
        None,
    )
    assert request.num_samples == 6 and request.classes == "circle/circle/cross", "a few more, for equal blocks"
    result, shown = draw(page, request, tmp_path / "ours")
    assert_same_as_script(request.command("cpu"), tmp_path / "ours", tmp_path / "theirs", place)
    assert [path.name for path in result.files] == ["grid.png", "denoising.gif", "images.zip"]
    assert (tmp_path / "theirs" / "grid.png").read_bytes() == result.sheet.read_bytes()
    assert "6 images of runs/shapes/checkpoints/step_00000020 (step 20), 10 network calls a batch" in result.words
    sheets = [value for value in shown if value is not None]
    assert sheets and sheets[-1][1] == "images 1 to 6 of 6 done" and sheets[-1][0].width > 64
    assert shown.count(None) >= 3, "each step asks whether the job is stopped"


def test_autoguidance_and_a_larger_image_are_the_same(page: Page, place: Path, tmp_path: Path) -> None:
    sampler = ("ddim", 3, "trailing", 1.5, "models/shapes.pt")
    request = read_request(page, "runs/shapes", None, [], None, 2, 1, "", False, None, *sampler)
    draw(page, request, tmp_path / "guided")
    assert_same_as_script(request.command("cpu"), tmp_path / "guided", tmp_path / "guided_too", place)
    request = read_request(page, "runs/shapes", None, [], None, 2, 1, "8", False, "runs/larger", *SAMPLER)
    result, _ = draw(page, request, tmp_path / "cascade")
    assert "larger/00000.png" in pixels_below(tmp_path / "cascade") and result.sheet.parent.name == "larger"
    assert_same_as_script(request.command("cpu"), tmp_path / "cascade", tmp_path / "cascade_too", place)


def editor_of(painted: bool, size: int = 16) -> dict[str, Any]:
    """What gradio's editor gives: an image, and a layer that is painted in its upper left part."""
    background = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 4), dtype=np.uint8))
    layer = np.zeros((size, size, 4), dtype=np.uint8)
    layer[: size // 2, : size // 2] = (255, 59, 48, 255) if painted else 0
    return {"background": background, "layers": [Image.fromarray(layer)], "composite": background}


@pytest.mark.parametrize(("run", "painted"), [("runs/shapes", False), ("runs/shapes", True), ("runs/larger", False)])
def test_an_edit_is_the_same(run: str, painted: bool, page: Page, place: Path, tmp_path: Path) -> None:
    request = read_edit(page, tmp_path, editor_of(painted), run, None, 0.6, 2, 1.5, [], 2, 0, *SAMPLER)
    assert (request.condition is None) == (run == "runs/shapes")
    assert request.start_at == (1 if run == "runs/shapes" and not painted else 0)
    result, _ = draw(page, request, tmp_path / "ours")
    assert result.sheet.name == ("side_by_side.png" if request.condition else "grid.png")
    command, files = named(request).command("cpu"), given_files(request)
    assert f" {'--condition' if request.condition else '--image'} image.png" in command
    assert [file.name for file in files] == (["image.png", "mask.png"] if painted else ["image.png"])
    for file in files:  # a visitor saves them beside the command
        shutil.copy(file, place)
    assert_same_as_script(command, tmp_path / "ours", tmp_path / "theirs", place)
    if painted:
        pixels = np.asarray(Image.open(tmp_path / "ours" / "00000.png"), dtype=int)
        assert abs(pixels - np.asarray(Image.open(tmp_path / "image.png"), dtype=int))[8:, 8:].max() <= 1, "the rest stays"


def test_an_animation_is_the_same(page: Page, place: Path, tmp_path: Path) -> None:
    way = read_way(page, "runs/shapes", None, 0, 1, ["cross", "circle"], 5, True, (None, None), *SAMPLER)
    assert way == Way("runs/shapes", validate(SamplerConfig, {"steps": 3}), (0, 1), "cross/circle", 5, True)
    shown = list[Any]()
    result = draw_between(page.device, way, tmp_path / "ours", shown.append)
    run_here("interpolate", *way.words, "--device", "cpu", "--out", tmp_path / "theirs", cwd=place)
    ours, theirs = (
        [path.read_bytes() for path in sorted((tmp_path / name).glob("frames/*.png"))] for name in ("ours", "theirs")
    )
    assert ours == theirs and len(ours) == 10 and shown[-1][1] == "10 of 10 frames"
    assert [path.name for path in result.files][:1] == ["animation.gif"] and result.files[-1].name == "images.zip"
    assert read_way(page, "runs/shapes", None, 0, 1, [], 5, False, (), *SAMPLER).words[-4:] == [
        "--solver",
        "ddim",
        "--steps",
        "3",
    ]
    with pytest.raises(UserError, match="choose one class, or two"):
        read_way(page, "runs/shapes", None, 0, 1, ["cross"] * 3, 5, True, (), *SAMPLER)
    with pytest.raises(UserError, match="give two images, or none"):
        read_way(page, "runs/shapes", None, 0, 1, [], 5, True, ("x.png", None), *SAMPLER)
    with pytest.raises(UserError, match="does not draw images from noise"):
        draw_between(page.device, way._replace(run="runs/larger"), tmp_path / "larger", shown.append)


def test_an_animation_between_images_is_the_same(page: Page, place: Path, tmp_path: Path) -> None:
    samples = sorted((place / "runs" / "shapes" / "samples").glob("*.png"))
    way = read_way(page, "runs/shapes", None, 7, 8, [], 2, False, (str(samples[0]), str(samples[-1])), *SAMPLER)
    short, files = copy_images(way, tmp_path)
    assert short.images == ("first.png", "second.png") and files[1].read_bytes() == samples[-1].read_bytes()
    result = draw_between(page.device, way, tmp_path / "ours", lambda _: None)
    short = short._replace(images=tuple(map(str, files)))
    run_here("interpolate", *short.words, "--device", "cpu", "--out", tmp_path / "theirs", cwd=place)
    ours, theirs = (sorted((tmp_path / name).glob("frames/*.png")) for name in ("ours", "theirs"))
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs] and len(ours) == 3
    assert result.words.startswith("3 frames of runs/shapes")


def test_panels_are_the_images_of_their_settings(page: Page, tmp_path: Path) -> None:
    runs = ["runs/shapes", "runs/shapes @ step_00000010"]
    assert set(runs) <= set(list_weights(page))
    requests, titles = read_panels(page, runs, "cross", 2, 0, "euler", "2, 3", "1 2.5")
    assert [len(row) for row in requests] == [2, 2, 2, 2]
    assert titles[3] == [f"runs/shapes/checkpoints/step_00000010, 3 steps, guidance {scale}" for scale in ("1", "2.5")]
    result = compare_images(page.device, requests[3:], titles[3:], tmp_path / "both", lambda _: None)
    single, _ = draw(page, requests[3][1], tmp_path / "single")
    panel = tmp_path / "both" / "02"
    assert [path.read_bytes() for path in sorted(panel.glob("0*.png"))] == [
        path.read_bytes() for path in sorted((tmp_path / "single").glob("0*.png"))
    ]
    assert result.words == "2 panels of the same seed, 4 images"
    with Image.open(result.sheet) as sheet:
        assert sheet.width > 2 * 128
    with zipfile.ZipFile(result.files[1]) as file:
        assert file.namelist() == ["01/00000.png", "01/00001.png", "02/00000.png", "02/00001.png"]
    assert single.sheet.exists()
    for text in ("", "x", "1,30", "-1"):
        with pytest.raises(UserError, match="give numbers from 0 to 20"):
            parse_sweep(text, "guidance", 0, 20)
    with pytest.raises(UserError, match="at most 36 fit"):
        read_panels(page, runs, "", 2, 0, "euler", "1,2,3,4,5", "1,2,3,4")
    with pytest.raises(UserError, match="choose a run"):
        read_panels(page, [], "", 2, 0, "euler", "1", "1")


def test_a_job_is_stopped_at_its_next_step(page: Page, tmp_path: Path) -> None:
    request = DrawRequest(run="runs/shapes", spec=validate(SamplerConfig, {"steps": 100}), num_samples=1, batch_size=1)
    ended, steps = threading.Event(), list[Any]()

    def job(show: Any) -> None:
        def count(value: Any) -> None:
            steps.append(value)
            show(value)

        try:
            draw_images(page.device, request, tmp_path / "x", count)
        except Stopped:
            ended.set()
            raise

    messages = stream(page.device, job)
    next(messages)
    messages.close()  # type: ignore[attr-defined]
    assert ended.wait(30) and len(steps) < 100
    with page.device.held():  # the device is there for the next one
        assert not (tmp_path / "x" / "00000.png").exists()


def test_jobs_have_the_device_one_after_the_other() -> None:
    device, inside = Device(torch.device("cpu")), list[int]()

    def job(show: Any) -> int:
        inside.append(1)
        time.sleep(0.05)
        show("half")
        inside.append(-1)
        return sum(inside)

    results = list[Any]()
    threads = [threading.Thread(target=lambda: results.append(list(stream(device, job)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [["half", 0]] * 3 and np.cumsum(inside).max() == 1


def test_errors_of_a_job_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    gr = pytest.importorskip("gradio", reason="the extra `app` is not installed")

    def failing(error: Exception) -> Iterator[Any]:
        def job(show: Any) -> None:
            raise error

        yield from stream(Device(torch.device("cpu")), job)

    for error, line in (
        (UserError("say what to do"), "say what to do"),
        (FileNotFoundError(2, "No such file", "runs/x/final"), "runs/x/final is gone: was the run moved or removed?"),
        (RuntimeError("odd\nthing"), "that failed (RuntimeError: odd thing); the terminal where app.py runs says more"),
    ):
        with pytest.raises(gr.Error) as raised:
            list(in_one_line(failing)(error))
        assert line in raised.value.message and "\n" not in raised.value.message and not raised.value.print_exception
    assert capsys.readouterr().err.count("Traceback") == 1, "only what nobody foresaw is printed in full"
    assert list(in_one_line(failing)(Stopped())) == []
    assert explain(UserError("x")) == "x"


def test_runs_stay_open_until_their_weights_change(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(workplace / "runs" / "points", tmp_path / "points")
    monkeypatch.chdir(tmp_path)
    device = Device(torch.device("cpu"))
    run = device.open("points")
    assert device.open("points") is run and stamp_of("points")
    manifest = tmp_path / "points" / "final" / "MANIFEST.json"
    manifest.touch()
    assert device.open("points") is not run
    for i in range(OPEN_RUNS):
        shutil.copytree(workplace / "runs" / "points" / "final", tmp_path / f"final{i}")
        device.open(f"final{i}")
    assert len(device.runs) == OPEN_RUNS and "points" not in device.runs
    shutil.rmtree(tmp_path / "final1")
    with pytest.raises(UserError, match="there is no such run"):
        device.open("final1")


def test_what_a_tab_refuses(page: Page, tmp_path: Path) -> None:
    gr = pytest.importorskip("gradio", reason="the extra `app` is not installed")
    with pytest.raises(UserError, match="draws 2-D points: go to the tab Points"):
        draw(page, DrawRequest(run="runs/points"), tmp_path / "a")
    with pytest.raises(UserError, match=r"draws from images \(low\): go to the tab Edit"):
        draw(page, DrawRequest(run="runs/larger"), tmp_path / "b")
    with pytest.raises(UserError, match="steps: give a whole number"):
        read_sampler(page, "ddim", 0, "even", 1, "")
    with pytest.raises(UserError, match="is none of the runs on this page"):
        read_sampler(page, "ddim", 5, "even", 1, "/etc/passwd")
    with pytest.raises(UserError, match="give an image first"):
        save_image(None, tmp_path)
    with pytest.raises(UserError, match="of so few steps none can be left out"):
        read_edit(page, tmp_path, editor_of(False), "runs/shapes", None, 0.95, 1, 1, [], 1, 0, *SAMPLER)
    with pytest.raises(UserError, match="is not divisible"):
        draw(page, DrawRequest(run="runs/shapes", size="15"), tmp_path / "c")
    assert set(HINTS) >= {None, "mask", "low", "grey", "edges", "paired"} and gr


def test_paint_is_what_covers_the_image() -> None:
    layer = editor_of(True, 8)["layers"][0]
    assert paint_of([], (3, 2)).shape == (2, 3) and not paint_of([], (3, 2)).any()
    assert paint_of([layer], (8, 8)).sum() == 16 and paint_of([layer], (16, 16))[:8, :8].all()


def test_what_the_page_shows_of_a_job(tmp_path: Path) -> None:
    gr = pytest.importorskip("gradio", reason="the extra `app` is not installed")
    file = tmp_path / "grid.png"
    Image.new("L", (4, 4)).save(file)
    result = Result(file, [file, pack(tmp_path, [file])], "1 image")
    shown, done = show_job(iter([("sheet", "half"), result]), "python sample.py x")
    assert shown[:2] == ["sheet", "half"] and done[:2] == [str(file), "1 image"]
    assert done[2]["value"] == [str(file), str(tmp_path / "images.zip")] and done[3]["value"] == "python sample.py x"
    values = list[Any]()
    progress = Progress(values.append, 3)
    progress.put([1], torch.ones(1, 1, 8, 8), "one")
    sheet, line = values[0]
    assert line == "one" and np.unique(np.asarray(sheet)).tolist() == [225, 255] and gr
