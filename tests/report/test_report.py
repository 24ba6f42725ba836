"""The report: all that a run left is on the page, nothing there comes from the network, and it never ends a run."""

import errno
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from src.config import dump, load, read_json
from src.report import report
from src.report.report import Reporter, duration, write_report
from src.training.run_directory import RunDirectory
from tests.conftest import ROOT, environment, metrics, run_here
from tests.report.pages import BAD, Page, lines, page_of, sheet, write

# ---------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("fixture", "script", "title"),
    [
        ("smoke_run", "ddpm_accelerate", "diffusion on pixels"),
        ("vae_run", "train_vae", "autoencoder"),
        ("ldm_run", "train_ldm", "diffusion on latents"),
        ("iadb_run", "train_iadb", "blending between two densities"),
    ],
)
def test_all_that_a_run_left_is_on_its_page(
    fixture: str, script: str, title: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = request.getfixturevalue(fixture)
    assert Page((run / "report.html").read_bytes()).images == page_of(run).images, "the run wrote it, at its end"
    assert not list(run.glob(".report*"))
    page = page_of(run)
    text = page.text()
    config, data, logged = read_json(run / "config.json"), read_json(run / "data.json"), metrics(run)
    steps = logged[-1]["step"]
    assert config["name"] in text and title in text and "finished" in text and f"{steps} of {steps}" in text
    assert f"{round(logged[-1]['epoch'] * data['images']):,}" in text, "images seen"
    assert all(f"step {int(path.stem.removeprefix('step_'))}" in " ".join(page.images) for path in (run / "samples").iterdir())
    sheets = list((run / "samples").rglob("*.png"))
    assert len([alt for alt in page.images if "step " in alt]) == len(sheets)
    assert {"contact_sheet.png", "blend.png"} & set(page.images)
    drawn_lines = [points for chart in page.charts for points in chart["lines"]]
    for name in {name for line in logged for name in line} - {"step", "epoch"}:
        values = [float(f"{line[name]:.5g}") for line in logged if name in line]
        assert values in [[value for _, value in points] for points in drawn_lines], name
    assert "No file was left out." in text and f'"seed": {config["seed"]}' in text

    # A run that was stopped: the command on its page reads its config, to the same run.
    for name in ("config", "data"):
        shutil.copy(run / f"{name}.json", tmp_path)
    write(tmp_path, "status", {"state": "stopped", "step": 10, "steps": 30, "time": 1.7e9})
    monkeypatch.chdir(tmp_path.parent)
    words = shlex.split(next(data for tag, data in page_of(tmp_path).texts if data.startswith("python ")))
    folder = tmp_path.name
    assert words == ["python", f"{script}.py", "-cfg", f"{folder}/config.json", "--run-dir", folder]
    sys.path.insert(0, str(ROOT))
    assert dump(load(words[3], __import__(script).Config)) == config


def test_a_classifiers_run_and_one_whose_report_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("steps=6", "preview.every=3", "log.every=1", "log.trackers=[]", "preview.num_measured=4")
    arguments = ["-cfg", "configs/smoke/classifier.json", *(word for one in small for word in ("--set", one))]
    calls = list[bool]()
    before = Reporter.write
    monkeypatch.setattr(Reporter, "write", lambda self, *, now: (calls.append(now), before(self, now=now))[1])
    run_here("train_classifier", *arguments, "--run-dir", tmp_path / "whole")
    page = page_of(tmp_path / "whole")
    assert calls == [True, False, False, True, False, False, True, True], (
        "the first step, previews, the end; else if it is time"
    )
    text = page.text()
    assert "classifier of noised images" in text and "held-out accuracy by noise level" in text and "(noisiest)" in text
    assert "sample.py DIFFUSION_RUN --guidance-method classifier" in text

    def full(*_: Any) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_whole", full)
    run_here("train_classifier", *arguments, "--run-dir", tmp_path / "full")
    assert not (tmp_path / "full" / "report.html").exists()
    assert read_json(tmp_path / "full" / "status.json")["state"] == "finished"
    warned = [line for line in (tmp_path / "full" / "log.txt").read_text().splitlines() if "report.html" in line]
    assert len(warned) == 1 and "No space left on device" in warned[0], "it is said once"
    weights = [(tmp_path / name / "final" / "ema.safetensors").read_bytes() for name in ("whole", "full")]
    assert weights[0] == weights[1]


def test_points_show_where_they_went(run: Path) -> None:
    names = ["points/trajectories.png", "points/x0.png", "points/x1.png", "points/points.gif"]
    for name in ["contact_sheet.png", "blend.png", "loss.png", "points/frames/000.png", *names[:-1]]:
        sheet(run / name)
    moving = [Image.new("L", (9, 9), shade) for shade in (0, 90, 200)]
    moving[0].save(run / names[-1], save_all=True, append_images=moving[1:])
    page = page_of(run)
    assert page.images == ["contact_sheet.png", "blend.png", *names], "loss.png is drawn anew, as charts"
    assert str(page.all("img")[-1]["src"]).startswith("data:image/gif")


def test_a_trial_and_a_rank_that_does_not_write_have_none(tmp_path: Path) -> None:
    for name, how in (("quiet", {"writes": True, "quiet": True}), ("other", {"writes": False})):
        directory = RunDirectory(tmp_path / name, **how)
        directory.report(now=True)
        directory.close()
        assert not (tmp_path / name / "report.html").exists()


# ---------------------------------------------------------------------------------------------- the page


def test_what_users_name_is_text(run: Path) -> None:
    counts = {BAD: 3, "</script>": 4}
    write(run, "config", {"name": BAD, "process": {}, "data": {"path": "</pre><img src=x>"}})
    write(run, "data", {"images": 7, "class_names": list(counts), "counts": counts})
    write(run, "skipped", [{"name": f"{BAD}.jpg", "reason": "</li>truncated"}, {"name": "b.jpg", "reason": "</li>truncated"}])
    write(run, "status", {"state": '"><b>', "step": 1, "steps": 2, "time": 1.7e9})
    lines(run, [{"step": 1, "</script><script>": 1.0, "loss": 2.0}])
    (run / "log.txt").write_text(f"{BAD} warning: {BAD}\n")
    sheet(run / "samples" / "step_00000001" / "sample_<script>alert(1)<_4x4.png".replace("/", ""))
    sheet(run / "samples" / "step_00000001" / 'sample_"onload="x_4x4.png')
    page = page_of(run)
    text = page.text()
    assert text.count(BAD) >= 6 and "</script>: 4" in text and "2: </li>truncated" in text and "</pre><img src=x>" in text
    names = {option["value"] for option in page.all("option")}
    assert names == {"all", "<script>alert(1)<", '"onload="x'}
    assert {figure["data-name"] for figure in page.all("figure") if "data-name" in figure} == names - {"all"}


def test_the_head_says_how_far_and_how_long(run: Path) -> None:
    text = page_of(run).text()
    assert "30 of 60" in text and "images seen480" in text and "epochs6.0" in text
    assert "images per second32" in text and "time left, at this speed15 s" in text, "30 steps of 16 images"
    assert "2026-01-01 00:00:01 warning: odd" in text
    assert f"python ddpm_accelerate.py -cfg {run}/config.json --run-dir {run}" in text
    write(run, "status", {"state": "stopped", "step": 30, "steps": None, "time": 1.7e9})
    assert "30, without end" in page_of(run).text() and "time left" not in page_of(run).text()


def test_what_is_missing_or_damaged_is_passed_over(run: Path) -> None:
    for step in (10, 20, 30):
        sheet(run / "samples" / f"step_{step:08d}.png", step)
    content = (run / "samples" / "step_00000020.png").read_bytes()
    (run / "samples" / "step_00000020.png").write_bytes(content[: len(content) // 2])
    (run / "samples" / "step_00000030.png").write_bytes(b"no image")
    (run / "samples" / "step_x.png").write_bytes(b"")
    page = page_of(run)
    assert page.images == ["step 10"] and "Images that could not be read: 2." in page.text()
    assert [frame for frame in page.all("div") if frame.get("class") == "frame" and "hidden" not in frame]
    for name in ("config", "data", "status", "skipped"):
        (run / f"{name}.json").write_text("{")
    (run / "metrics.jsonl").unlink()
    (run / "log.txt").unlink()
    assert "starting" in page_of(run).text() and page_of(run).images == ["step 10"]


def test_skipped_files_are_counted_and_the_first_are_named(run: Path) -> None:
    write(run, "skipped", [{"name": f"{i}.jpg", "reason": "truncated" if i % 3 else "too small"} for i in range(90)])
    text = page_of(run).text()
    assert "90 files left out" in text and "60: truncated" in text and "30: too small" in text
    assert "49.jpg" in text and "50.jpg" not in text and "skipped.json" in text


def test_the_report_is_rarer_where_it_takes_long(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, wrote = [0.0], list[float]()

    def slow(*_: Any) -> None:
        wrote.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(report, "write_report", slow)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    reporter = Reporter(run, print)
    for seconds in (0, 100, 150, 210):
        now[0] = max(now[0], float(seconds))
        reporter.write(now=False)
    assert wrote == [0.0, 210.0], "a hundredth of the time"
    reporter.write(now=True)
    assert len(wrote) == 3


# ---------------------------------------------------------------------------------------------- by hand


def test_by_hand(run: Path, tmp_path: Path) -> None:
    def make(folder: Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "src.report.report", str(folder)]
        return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)

    done = make(run)
    assert done.returncode == 0 and done.stdout == f"{run}/report.html\n", done.stderr
    assert Page((run / "report.html").read_bytes()) and not list(run.glob(".report*"))
    done = make(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path} is no run") and done.stderr.count("\n") == 1


def test_it_is_whole_or_not_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(run)
    before = (run / "report.html").read_bytes()

    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("src.storage.files.write_flushed", fails)
    with pytest.raises(OSError, match="full"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before and not list(run.glob(".report*"))


def test_words_of_the_head_and_of_the_end(run: Path) -> None:
    assert [duration(seconds) for seconds in (5, 120, 7200, 259200)] == ["5 s", "2.0 min", "2.0 h", "3.0 days"]
    write(run, "data", {"images": 8000, "class_names": ["cat"], "continued": [{"run": "runs/a", "step": 1000}]})
    text = page_of(run).text()
    assert "continued fromruns/a, step 1,000" in text and "classes1" in text and "images8,000" in text and "held out0" in text
    write(run, "status", {"state": "finished", "step": 60, "steps": 60, "time": 1.7e9})
    text = page_of(run).text()
    assert f"The run is finished. Next:python sample.py {run} --frames" in text and "time left" not in text
    write(run, "config", {"name": "x"})
    text = page_of(run).text()
    assert "a run, in " in text and "The same command as before goes on" in text and "python " not in text.replace("Python", "")


def test_nothing_heavy_is_imported_for_a_report_that_is_not_written() -> None:
    code = "import sys, src.report.report; print({'matplotlib', 'PIL', 'jinja2', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
