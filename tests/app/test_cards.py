"""The cards of the gallery: what they say of a run, and of files that are damaged or gone."""

import json
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from src.app.cards import describe_state, is_inside, last_preview, read_card, read_cards, render_cards, report_address
from src.app.places import Places


def test_a_card_says_what_the_files_of_a_run_say(place: Path, real_charts: None) -> None:
    card = read_card("runs/shapes")
    lines = [json.loads(line) for line in (place / "runs/shapes/metrics.jsonl").read_text().splitlines()]
    assert card.kind == "diffusion on pixels" and card.state == "finished, step 30 of 30" and not card.is_running
    numbers = dict(card.numbers)
    assert float(numbers["held-out loss"]) == pytest.approx(lines[-1]["held_out_loss"], rel=1e-3)
    assert float(numbers["frechet distance"]) == pytest.approx(lines[-1]["frechet_distance"], rel=1e-3)
    assert card.preview is not None and card.preview.address.startswith("data:image/")
    assert last_preview(Path("runs/shapes")) == Path("runs/shapes/samples/step_00000030.png")
    assert card.curve.startswith("<svg") and [name for _, name, _ in card.legend] == ["loss", "held-out loss"]
    html = render_cards(read_cards(Places()))
    assert html.count("<article") == 4 and f'href="{report_address("runs/shapes")}"' in html
    assert "http" not in html.replace("http://www.w3.org", ""), "the gallery asks nothing of other machines"
    assert 'alt="the last preview of runs/shapes"' in html


def test_a_card_is_read_anew_where_its_files_change(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "live"
    shutil.copytree(workplace / "runs" / "shapes", run)
    monkeypatch.chdir(tmp_path)
    before = read_card("runs/live")
    assert read_card("runs/live").numbers is before.numbers, "nothing is read twice"
    status = {"state": "running", "step": 31, "steps": 40, "pid": 1, "time": time.time()}
    (run / "status.json").write_text(json.dumps(status))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 31, "held_out_loss": 0.125}) + "\n")
    Image.new("RGB", (8, 8), "red").save(run / "samples" / "step_00000031.png")
    card = read_card("runs/live")
    assert card.is_running and card.state == "running, step 31 of 40" and dict(card.numbers)["held-out loss"] == "0.125"
    assert card.preview is not None and (card.preview.width, card.preview.height) == (8, 8)
    assert 'class="running"' in render_cards([card])


def test_states() -> None:
    status = {"state": "running", "step": 3, "steps": 1000, "time": 1000.0}
    assert describe_state(status, 1010.0) == ("running, step 3 of 1,000", True)
    assert describe_state(status, 1000.0 + 7200) == ("running, step 3 of 1,000, and silent for 2.0 h", False)
    assert describe_state({**status, "state": "stopped"}, 1e9) == ("stopped, step 3 of 1,000", False)
    assert describe_state({}, 0.0) == ("ready to draw", False) and describe_state({"state": 3}, 0.0)[0] == "ready to draw"


def test_damaged_files_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "There is no run yet" in render_cards(read_cards(Places()))
    run = tmp_path / "runs" / '<b onclick="x">'
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model": {}, "process": {}, "image": {}, "name": "x"}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step"')
    (run / "status.json").write_text("[]")
    (run / "samples" / "step_00000001.png").write_bytes(b"no image")
    html = render_cards(read_cards(Places()))
    assert "<b onclick" not in html and "&lt;b onclick=&quot;x&quot;&gt;" in html and "no preview" in html


def test_a_link_out_of_a_run_is_not_followed(tmp_path: Path) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret.png"
    (run / "samples").mkdir(parents=True)
    secret.write_bytes(b"")
    (run / "contact_sheet.png").symlink_to(secret)
    (run / "report.html").symlink_to(secret)
    assert not is_inside(run, run / "report.html") and is_inside(run, run / "samples") and last_preview(run) is None
