"""Charts: every metric is drawn, gaps stay gaps, nothing is drawn where there is nothing."""

import re
import sys
from pathlib import Path

import pytest

from src.config.packages import MissingPackage
from src.report.charts import Points, draw_chart, draw_charts, draw_numbered, draw_svg, metric_columns, plain, short, thinned
from src.report.run_files import read_lines
from tests.report.pages import lines, page_of


def test_gaps_halves_and_strangers(run: Path) -> None:
    values = [{"step": s, "loss": None if s == 20 else 1 / s, "mood": 3.0, "epoch": s / 5} for s in (10, 20, 30)]
    lines(run, values, end='{"step": 40, "lo')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n[1]\n{"loss": 5}\n{"step": 40, "words": "no number", "frechet_distance": NaN}\n')
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [10, 20, 30, 40]
    page = page_of(run)
    assert page.charts[0]["lines"] == [[[10, 0.1], [20, None], [30, 0.033333]]]
    (line, *_) = [path["d"] or "" for path in page.all("path") if "stroke: var(--line-0); stroke-width" in str(path["style"])]
    assert line.count("M") == 2 and line.count("L") == 0, "nothing is drawn across a gap"
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
    assert [[10, 0.2], [30, 0.1]] in [points for chart in page.charts for points in chart["lines"]]
    latest = [[i, round(0.1 * (i + 1), 5)] for i in range(10)]
    assert latest in [points for chart in page.charts for points in chart["lines"]]
    assert [[[160, 50.0], [480, 20.0]]] in [chart["lines"] for chart in page.charts], "80 images are an epoch"
    assert [[[320, 33.0]]] in [chart["lines"] for chart in page.charts], "between two lines of the log"
    assert "quality: frechet distance" in text and "quality: frechet inception" in text and "images seen" in text


def test_numbers_in_few_characters() -> None:
    numbers = (0.012345, 1234.0, 25600, 3.072e6, 2e9, 0, 1e-4, -8.12e-9)
    assert [short(value) for value in numbers] == ["0.01235", "1234", "25.6k", "3.072M", "2G", "0", "1e-4", "-8.12e-9"]


def test_thinning_keeps_spikes_gaps_and_the_end() -> None:
    points: Points = [(float(i), 1.0 + 0.001 * (i % 7)) for i in range(5000)]
    points[1234] = (1234.0, 90.0)
    points[3210] = (3210.0, None)
    fewer = thinned(points)
    assert len(fewer) <= 410 and (1234.0, 90.0) in fewer and (3210.0, None) in fewer and fewer[-1] == points[-1]
    assert [x for x, _ in fewer] == sorted(x for x, _ in fewer)
    assert thinned(points[:400]) == points[:400]


def test_charts_of_little() -> None:
    assert draw_chart("none", {"a": [(1, None)], "b": []}) == []
    extremes: list[Points] = [[(5, 2.0)], [(5, 0.0), (6, 0.0)], [(1, 1e-30), (2, 1e30)], [(1, -1.0), (2, 1e9)], [(1, -1e-300)]]
    for points in extremes:
        (chart,) = draw_chart("one", {"a": points}, log=True)
        numbers = [float(word) for pair in re.findall(r'd="M ([-\d.]+) ([-\d.]+) L? ?', chart.svg) for word in pair]
        assert numbers and all(-4 <= number <= 440 for number in numbers) and "nan" not in chart.svg
    assert "log scale" in draw_chart("x", {"a": [(1, 0.1), (2, 10.0)]}, log=True)[0].svg
    assert "log scale" not in draw_chart("x", {"a": [(1, 0.0), (2, 10.0)]}, log=True)[0].svg


def test_svg_is_the_same_for_the_same_lines_and_has_the_colours_of_the_page() -> None:
    points: Points = [(1, 0.5), (2, None), (3, 0.25), (4, None), (5, 1.0), (6, 2.0)]
    svg, limits = draw_svg([points], ["var(--line-0)"], "step", log=False)
    assert svg == draw_svg([points], ["var(--line-0)"], "step", log=False)[0] and limits == (1, 6)
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>") and ">step<" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", svg) and set(re.findall(r"var\(--[a-z]+", svg)) == {
        "var(--line",
        "var(--edge",
        "var(--soft",
    }
    assert svg.count("<use ") == 4, "a dot for each point of a short line"
    svg, _ = draw_svg([[(float(i), None if i in (50, 52) else 1.0) for i in range(99)]], ["red"], "step", log=False)
    assert svg.count("<use ") == 1, "and for one between two gaps of a long line"


def test_columns_and_families() -> None:
    rows = [{"step": 2, "psnr": 1.0, "flag": True, "evaluation_sweep_steps_5": 1.0}, {"step": 1, "psnr": float("inf")}]
    assert metric_columns([*rows, {"step": 2, "psnr": 3}]) == {"psnr": [(1, None), (2, 3.0)]}
    assert plain("held_out_loss") == "held-out loss"
    names = [*(f"held_out_loss_{i}" for i in (0, 2, 9)), "latent_std_0", "latent_std_1", "random_of_16", "random_of_32"]
    columns: dict[str, Points] = {name: [(1, 1.0), (2, 0.5)] for name in names}
    charts = draw_numbered(columns)
    assert list(columns) == names[-2:], "numbers that do not count from 0 are no family, but for noise levels without a value"
    assert [name for _, name, _ in charts[0].legend] == ["0 (cleanest)", "2", "9 (noisiest)"] and len(charts) == 3
    assert charts[2].title == "latent std by channel"
    titles = [
        chart.title for chart in draw_charts([{"step": 1, "mood": 1.0}, {"step": 2, "train_loss": 1.0}], lambda step: None)
    ]
    assert titles == ["loss", "other"]


def test_without_matplotlib_the_page_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage):
        draw_chart("one", {"a": [(1, 1.0)]})
    text = page_of(run).text()
    assert "drawing charts needs the package matplotlib" in text and "30 of 60" in text
