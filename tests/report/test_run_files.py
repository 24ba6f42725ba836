"""What a report reads of a run directory: whole files, what is damaged is as what is missing."""

from pathlib import Path

from src.report.run_files import KINDS, Progress, finite_or_none, read_document, read_lines, read_log


def test_documents_lines_and_logs(run: Path) -> None:
    assert read_document(run / "status.json", dict)["steps"] == 60 and read_document(run / "status.json", list) is None
    assert read_document(run / "missing.json", dict) is None
    (run / "status.json").write_text("{")
    assert read_document(run / "status.json", dict) is None
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [10, 20, 30] and read_lines(run / "missing") == []
    warnings, last = read_log(run / "log.txt")
    assert warnings == last[1:] and len(last) == 2 and read_log(run / "missing") == ([], [])
    assert [finite_or_none(value) for value in (1, 0.5, float("nan"), None, "3")] == [1.0, 0.5, None, None, None]


def test_progress_by_the_log() -> None:
    rows = [{"step": s, "epoch": s / 10, "images_per_second": 50.0} for s in (10, 20)]
    progress = Progress([*rows, {"step": 15, "epoch": 9.0}, {"step": 30}], 100)
    assert [progress.images_at(step) for step in (0, 5, 20, 40)] == [0.0, 50.0, 200.0, 400.0]
    assert progress.images_per_second == 50.0
    assert progress.seconds_left(20, 40) == 4.0 and progress.seconds_left(20, None) is None
    empty = Progress(rows, None)
    assert empty.images_at(10) is None and empty.images_per_second is None
    assert empty.seconds_left(10, 20) is None


def test_each_kind_has_a_key_that_the_kinds_before_it_lack() -> None:
    assert len({kind.key for kind in KINDS}) == len({kind.script for kind in KINDS}) == 5
