"""The report: all that a run left is on the page, nothing there comes from the network, and it never ends a run."""

import errno
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.config import dump, load, read_json
from src.report import report
from src.report.charts import Line, chart, log_ticks, short, thinned, ticks
from src.report.report import Images, Reporter, find_samples, make_report, read_lines, spread, write_report
from src.training.run import RunDirectory
from tests.conftest import ROOT, environment, metrics, run_here

VOID = {"meta", "img", "input", "br", "hr", "link"}
BAD = '<script>alert("1")</script>&amp;'


class Page(HTMLParser):
    """A page taken apart: what is not closed in order fails."""

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(content.decode())
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *, of: str | None = None) -> str:
        return "".join(data for tag, data in self.texts if (tag == of if of else tag not in ("script", "style")))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def pictures(self) -> list[str]:
        return [image["alt"] or "" for image in self.all("img")]

    @property
    def charts(self) -> list[dict[str, Any]]:
        """What each chart says below the pointer."""
        return [json.loads(data) for tag, data in self.texts if tag == "script" and data.startswith('{"left"')]


def page_of(run: Path) -> Page:
    page = Page(make_report(run))
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("action", "srcset", "data", "poster"), "no code, no address"
            assert name != "src" or str(value).startswith("data:image/"), tag
            assert name != "href" or str(value).startswith("#"), tag
    assert len(page.all("script")) == len(page.charts) + 1 and not page.all("link") and not page.all("iframe")
    assert "url(" not in page.text(of="style") and "@import" not in page.text(of="style")
    assert not re.search(r"fetch|XMLHttpRequest|import\(|WebSocket|innerHTML|https?:", page.text(of="script"))
    return page


def sheet(path: Path, shade: int = 0, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, 90, 200)).save(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run of diffusion on pixels leaves at step 30 of 60, written here."""
    folder = tmp_path / "x"
    folder.mkdir()
    write(folder, "config", {"name": "x", "process": {"target": "eps"}, "seed": 0})
    write(folder, "data", {"images": 80, "held_out_images": 8, "class_names": ["cat"], "counts": {"cat": 80}, "skipped": {}})
    write(folder, "status", {"state": "running", "step": 30, "steps": 60, "pid": 1, "time": 1.7e9})
    write(folder, "skipped", [])
    (folder / "log.txt").write_text("2026-01-01 00:00:00 x: 80 pictures\n2026-01-01 00:00:01 warning: odd\n")
    lines(folder, [{"step": s, "loss": 1 / s, "epoch": s * 16 / 80, "images_per_second": 32.0} for s in (10, 20, 30)])
    return folder


def write(folder: Path, name: str, document: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(document))


def lines(folder: Path, found: list[dict[str, Any]], end: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found) + end)


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
    assert Page((run / "report.html").read_bytes()).pictures == page_of(run).pictures, "the run wrote it, at its end"
    assert not list(run.glob(".report*"))
    page = page_of(run)
    text = page.text()
    config, data, logged = read_json(run / "config.json"), read_json(run / "data.json"), metrics(run)
    steps = logged[-1]["step"]
    assert config["name"] in text and title in text and "finished" in text and f"{steps} of {steps}" in text
    assert f"{round(logged[-1]['epoch'] * data['images']):,}" in text, "images seen"
    assert all(
        f"step {int(path.stem.removeprefix('step_'))}" in " ".join(page.pictures) for path in (run / "samples").iterdir()
    )
    sheets = list((run / "samples").rglob("*.png"))
    assert len([alt for alt in page.pictures if "step " in alt]) == len(sheets)
    assert {"contact_sheet.png", "blend.png"} & set(page.pictures)
    drawn = [points for found in page.charts for points in found["lines"]]
    for name in {name for line in logged for name in line} - {"step", "epoch"}:
        values = [float(f"{line[name]:.5g}") for line in logged if name in line]
        assert values in [[value for _, value in points] for points in drawn], name
    assert "No file was left out." in text and f'"seed": {config["seed"]}' in text

    # A run that was stopped: the command on its page reads its config, to the same run.
    for name in ("config", "data"):
        shutil.copy(run / f"{name}.json", tmp_path)
    write(tmp_path, "status", {"state": "stopped", "step": 10, "steps": 30, "time": 1.7e9})
    monkeypatch.chdir(tmp_path.parent)
    words = shlex.split(next(data for tag, data in page_of(tmp_path).texts if data.startswith("python ")))
    here = tmp_path.name
    assert words == ["python", f"{script}.py", "-cfg", f"{here}/config.json", "--run-dir", here]
    sys.path.insert(0, str(ROOT))
    assert dump(load(words[3], __import__(script).Config)) == config


def test_a_classifiers_run_and_one_whose_report_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("steps=6", "preview.every=3", "log.every=1", "log.trackers=[]", "preview.num_measured=4")
    told = ["-cfg", "configs/smoke/classifier.json", *(word for one in small for word in ("--set", one))]
    asked = list[bool]()
    before = Reporter.write
    monkeypatch.setattr(Reporter, "write", lambda self, *, now: (asked.append(now), before(self, now=now))[1])
    run_here("train_classifier", *told, "--run-dir", tmp_path / "whole")
    page = page_of(tmp_path / "whole")
    assert asked == [True, False, False, True, False, False, True, True], (
        "the first step, previews, the end; else if it is time"
    )
    text = page.text()
    assert "classifier of noised pictures" in text and "held-out accuracy by noise level" in text and "(noisiest)" in text
    assert "sample.py DIFFUSION_RUN --guidance-method classifier" in text

    def full(*_: Any) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_whole", full)
    run_here("train_classifier", *told, "--run-dir", tmp_path / "full")
    assert not (tmp_path / "full" / "report.html").exists()
    assert read_json(tmp_path / "full" / "status.json")["state"] == "finished"
    warned = [line for line in (tmp_path / "full" / "log.txt").read_text().splitlines() if "report.html" in line]
    assert len(warned) == 1 and "No space left on device" in warned[0], "it is said once"
    kept = [(tmp_path / name / "final" / "ema.safetensors").read_bytes() for name in ("whole", "full")]
    assert kept[0] == kept[1]


def test_points_show_where_they_went(run: Path) -> None:
    names = ["points/trajectories.png", "points/x0.png", "points/x1.png", "points/points.gif"]
    for name in ["contact_sheet.png", "blend.png", "loss.png", "points/frames/000.png", *names[:-1]]:
        sheet(run / name)
    moving = [Image.new("L", (9, 9), shade) for shade in (0, 90, 200)]
    moving[0].save(run / names[-1], save_all=True, append_images=moving[1:])
    page = page_of(run)
    assert page.pictures == ["contact_sheet.png", "blend.png", *names], "loss.png is drawn anew, as charts"
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


def test_gaps_halves_and_strangers(run: Path) -> None:
    found = [{"step": s, "loss": None if s == 20 else 1 / s, "mood": 3.0, "epoch": s / 5} for s in (10, 20, 30)]
    lines(run, found, end='{"step": 40, "lo')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n[1]\n{"loss": 5}\n{"step": 40, "words": "no number", "frechet_distance": NaN}\n')
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [10, 20, 30, 40]
    page = page_of(run)
    assert page.charts[0]["lines"] == [[[10, 0.1], [20, None], [30, 0.033333]]]
    moves = [attributes["d"] or "" for attributes in page.all("path")]
    assert moves[0].count("M") == 2 and moves[0].count("L") == 0, "nothing is drawn across a gap"
    assert "other" in page.text() and [[10, 3.0], [20, 3.0], [30, 3.0]] in page.charts[-1]["lines"]
    assert "words" not in page.text() and "quality" not in page.text(), "nothing to draw, no chart"


def test_loss_by_noise_level_and_quality_against_images(run: Path) -> None:
    levels = {f"held_out_loss_{i}": 0.1 * (i + 1) for i in range(10)}
    first = {"step": 10, "epoch": 2.0, "loss": 1.0, "frechet_distance": 50.0, **{k: 2 * v for k, v in levels.items()}}
    last = {"step": 30, "epoch": 6.0, "loss": 0.5, "held_out_loss": 0.5, "frechet_distance": 20.0, **levels}
    lines(run, [first, last, {"step": 20, "evaluation_frechet_inception": 33.0}])
    page = page_of(run)
    text = page.text()
    assert "held-out loss by noise level" in text and "0 (cleanest)" in text and "9 (noisiest)" in text
    assert [[10, 0.2], [30, 0.1]] in [points for found in page.charts for points in found["lines"]]
    latest = [[i, round(0.1 * (i + 1), 5)] for i in range(10)]
    assert latest in [points for found in page.charts for points in found["lines"]]
    assert [[[160, 50.0], [480, 20.0]]] in [found["lines"] for found in page.charts], "80 images are an epoch"
    assert [[[320, 33.0]]] in [found["lines"] for found in page.charts], "between two lines of the log"
    assert "quality: frechet distance" in text and "quality: frechet inception" in text and "images seen" in text


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
    (run / "samples" / "step_00000030.png").write_bytes(b"no picture")
    (run / "samples" / "step_x.png").write_bytes(b"")
    page = page_of(run)
    assert page.pictures == ["step 10"] and "Pictures that could not be read: 2." in page.text()
    assert [frame for frame in page.all("div") if frame.get("class") == "frame" and "hidden" not in frame]
    for name in ("config", "data", "status", "skipped"):
        (run / f"{name}.json").write_text("{")
    (run / "metrics.jsonl").unlink()
    (run / "log.txt").unlink()
    assert "starting" in page_of(run).text() and page_of(run).pictures == ["step 10"]


def test_skipped_files_are_counted_and_the_first_are_named(run: Path) -> None:
    write(run, "skipped", [{"name": f"{i}.jpg", "reason": "truncated" if i % 3 else "too small"} for i in range(90)])
    text = page_of(run).text()
    assert "90 files left out" in text and "60: truncated" in text and "30: too small" in text
    assert "49.jpg" in text and "50.jpg" not in text and "skipped.json" in text


# ---------------------------------------------------------------------------------------------- many and large


def test_many_previews_are_spread_over_time(run: Path) -> None:
    assert spread(40, 40) == list(range(40)) and spread(0, 40) == []
    assert spread(41, 40) == list(range(0, 41, 2)) and spread(42, 40) == [*range(0, 41, 2), 41]
    for count in range(1, 400):
        assert len(spread(count, 40)) <= 41 and spread(count, 40)[-1] == count - 1
    for step in range(1, 101):
        sheet(run / "samples" / f"step_{step:08d}.png", step, (4, 4))
    page = page_of(run)
    assert page.pictures == [f"step {step}" for step in (*range(1, 101, 4), 100)]
    assert "26 of 100 previews" in page.text()
    (slider,) = page.all("input")
    assert slider["max"] == slider["value"] == "25"


def test_a_sheet_for_each_class(run: Path) -> None:
    for step in (10, 20):
        for name in ("cat_10", "cat_9", "dog"):
            sheet(run / "samples" / f"step_{step:08d}" / f"sample_{name}_4x4.png")
    assert list(find_samples(run / "samples")[20]) == ["cat_10", "cat_9", "dog"]
    page = page_of(run)
    assert page.pictures == [f"{name} at step {step}" for step in (10, 20) for name in ("cat_9", "cat_10", "dog")]
    assert [option["value"] for option in page.all("option")] == ["all", "cat_9", "cat_10", "dog"]


def test_large_pictures_are_made_smaller_and_encoded_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    (run / "samples").mkdir()
    Image.fromarray(noise).save(run / "samples" / "step_00000010.png")
    few = Image.fromarray(noise[:, :, 0] // 64 * 64).convert("RGB")
    few.save(run / "contact_sheet.png", compress_level=0)
    pictures = Images()
    first = make_report(run, pictures)
    assert len(first) < 700_000 and "1 pictures made smaller" in Page(first).text()
    by_name = {image["alt"]: str(image["src"]) for image in Page(first).all("img")}
    assert by_name["step 10"].startswith("data:image/jpeg") and by_name["contact_sheet.png"].startswith("data:image/")
    encoded = list[Path]()
    before = report._encode
    monkeypatch.setattr(report, "_encode", lambda path, most: (encoded.append(path), before(path, most))[1])
    sheet(run / "samples" / "step_00000020.png")
    assert Page(make_report(run, pictures)).pictures[:2] == ["step 10", "step 20"]
    assert encoded == [run / "samples" / "step_00000020.png"], "only what is new"


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


# ---------------------------------------------------------------------------------------------- charts


def test_round_numbers_on_the_axes() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0.118, 0.52) == [0.2, 0.3, 0.4, 0.5]
    assert log_ticks(0.9, 1200) == [1, 10, 100, 1000] and log_ticks(0.03, 0.3) == [0.05, 0.1, 0.2]
    assert [short(value) for value in (0.012345, 1234.0, 25600, 3.072e6, 2e9, 0, 1e-4, -8.12e-9)] == [
        "0.01235",
        "1234",
        "25.6k",
        "3.072M",
        "2G",
        "0",
        "1e-4",
        "-8.12e-9",
    ]
    rng = np.random.default_rng(0)
    for low, size in zip(rng.normal(size=200) * 10.0 ** rng.integers(-6, 7, 200), 10.0 ** rng.uniform(-6, 7, 200), strict=True):
        found = ticks(low, low + size)
        assert 2 <= len(found) <= 7 and all(low - 1e-6 * size <= value <= low + size * (1 + 1e-6) for value in found)


def test_thinning_keeps_spikes_gaps_and_the_end() -> None:
    points: list[tuple[float, float | None]] = [(float(i), 1.0 + 0.001 * (i % 7)) for i in range(5000)]
    points[1234] = (1234.0, 90.0)
    points[3210] = (3210.0, None)
    found = thinned(points)
    assert len(found) <= 410 and (1234.0, 90.0) in found and (3210.0, None) in found and found[-1] == points[-1]
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    assert thinned(points[:400]) == points[:400]


def test_charts_of_little() -> None:
    assert chart("none", [Line("a", [(1, None)]), Line("b", [])], xlabel="step") == ""
    for points in ([(5, 2.0)], [(5, 0.0), (6, 0.0)], [(1, 1e-30), (2, 1e30)], [(1, -1.0), (2, 1e9)]):
        drawn = chart("one", [Line("a", points)], xlabel="step", log=True)
        numbers = [float(word) for word in re.findall(r'(?:cx|cy|x1|y1)="([^"]+)"', drawn)]
        assert all(0 <= number <= 440 for number in numbers) and "nan" not in drawn
    assert "log scale" in chart("x", [Line("a", [(1, 0.1), (2, 10.0)])], xlabel="step", log=True)
    assert "log scale" not in chart("x", [Line("a", [(1, 0.0), (2, 10.0)])], xlabel="step", log=True)
