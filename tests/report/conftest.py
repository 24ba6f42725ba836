"""A run directory for the tests of the report."""

from pathlib import Path

import pytest

from tests.report.pages import lines, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run of diffusion on pixels leaves at step 30 of 60, written here."""
    folder = tmp_path / "x"
    folder.mkdir()
    write(folder, "config", {"name": "x", "process": {"target": "eps"}, "seed": 0})
    write(folder, "data", {"images": 80, "held_out_images": 8, "class_names": ["cat"], "counts": {"cat": 80}, "skipped": {}})
    write(folder, "status", {"state": "running", "step": 30, "steps": 60, "pid": 1, "time": 1.7e9})
    write(folder, "skipped", [])
    (folder / "log.txt").write_text("2026-01-01 00:00:00 x: 80 images\n2026-01-01 00:00:01 warning: odd\n")
    lines(folder, [{"step": s, "loss": 1 / s, "epoch": s * 16 / 80, "images_per_second": 32.0} for s in (10, 20, 30)])
    return folder
