"""doctor.py as a person runs it: rows, advice, JSON, exit status, and processes that say nothing or end."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from src.doctor import health
from src.doctor.health import Row, Verdict
from src.doctor.proof import STAGES
from tests.conftest import ROOT, SMOKE, launch, one_line, refused

sys.path.insert(0, str(ROOT))
import doctor

CONFIG_ROWS = ["batches", "data", "trackers", "starting weights"]
DISK = ["rename", "flush", "free space", "lock", "file system", "shared memory"]
WEIGHTS = ["weights Inception", "weights VGG16", "weights EfficientNet", "weights Real-ESRGAN"]


def test_two_processes_on_this_machine_train_correctly(tmp_path: Path) -> None:
    done = launch("doctor.py", "-cfg", SMOKE, "--run-dir", tmp_path / "run", "--processes", "2", "--json")
    assert done.status == 0 and done.err == "", done.all
    rows = {row["name"]: row for row in json.loads(done.out)}
    assert list(rows) == ["config", "versions", *CONFIG_ROWS, *DISK, "ffmpeg", *WEIGHTS, "bucket", *STAGES]
    assert all(row.keys() == {"name", "status", "found", "advice", "seconds"} for row in rows.values())
    tried = [name for name in STAGES if name != "compile"]  # for which a machine may lack a compiler
    assert {rows[name]["status"] for name in tried} == {"pass"}, done.out
    assert "2 x CPU" in rows["devices"]["found"] and "the config's network" in rows["gradients"]["found"]
    assert "2 processes" in rows["gradients"]["found"] and "all 2 ranks" in rows["ten steps"]["found"]
    assert list(tmp_path.iterdir()) == [], "it leaves nothing"


@pytest.mark.soak  # the whole proof once more; test_two_processes_on_this_machine_train_correctly has it in `make test`
def test_a_launchers_processes_are_examined_and_rank_0_speaks(tmp_path: Path) -> None:
    lacking = ["--set", "data.source=folder", "--set", f"data.path={tmp_path / 'none'}"]
    done = launch("doctor.py", "-cfg", SMOKE, *lacking, "--run-dir", tmp_path, processes=2)
    assert done.status == 1 and "Traceback (most recent" not in done.out, done.all
    lines = done.out.splitlines()
    assert sum(line.startswith("versions ") for line in lines) == 1, "one table"
    at = next(i for i, line in enumerate(lines) if line.startswith("data "))
    assert " fail  " in lines[at] and lines[at + 1].strip().startswith("> bring it"), done.out
    assert any(line.startswith("gradients            pass  2 processes' equal one's to ") for line in lines), done.out
    assert ", 1 fail, " in lines[-1] and lines[-1].endswith("mend what failed, and run it again")


def sound(*_: object) -> None:
    """Instead of the processes: every stage passes."""
    report = _[-1]
    for name in STAGES:
        report(Row(name, "pass", "well", "", 0.0))  # pyright: ignore[reportCallIssue]


def run(monkeypatch: pytest.MonkeyPatch, *words: str, together: Callable[..., None] = sound) -> int:
    monkeypatch.setattr(doctor, "together", together)
    monkeypatch.setattr(sys, "argv", ["doctor.py", *words])
    return doctor.main()


def test_exit_status_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("ATELIER_BUCKET", raising=False)
    assert run(monkeypatch, "--run-dir", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("versions             pass  ") for line in lines)
    at = next(i for i, line in enumerate(lines) if line.startswith("weights VGG16        warn  "))
    assert lines[at + 1].startswith(" " * 27 + "> mkdir -p ")
    assert any(line.startswith("bucket               skip  ") for line in lines) and " 0 fail," in lines[-1]

    def ill(*_: object) -> None:
        sound(*_)
        _[-1](Row("compile", "fail", "no", "do", 0.0))  # pyright: ignore[reportCallIssue]

    assert run(monkeypatch, "--run-dir", str(tmp_path), "--json", together=ill) == 1
    row = json.loads(capsys.readouterr().out)[-1]
    assert row == {"name": "compile", "status": "fail", "found": "no", "advice": "do", "seconds": 0.0}
    monkeypatch.setenv("ATELIER_BUCKET", "s3://nope")
    assert run(monkeypatch, "--run-dir", str(tmp_path)) == 1
    assert "bucket               fail  's3://nope' is no bucket" in capsys.readouterr().out


def test_the_proof_is_tried_even_where_a_run_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    watch = lambda command, extra, folder, *rest: written.append(folder) or sound(*rest)  # noqa: E731
    assert run(monkeypatch, "--run-dir", str(tmp_path / "run"), together=watch) == 0
    monkeypatch.setattr(health, "rename", lambda _: Verdict("fail", "cannot be written", "elsewhere"))
    assert run(monkeypatch, "--run-dir", str(tmp_path / "run"), together=watch) == 1
    assert [tmp_path in folder.parents for folder in written] == [True, False]


def test_a_config_that_does_not_load_is_one_line(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text((ROOT / SMOKE).read_text()[:100])
    assert "is the file cut short?" in one_line(launch("doctor.py", "-cfg", cut))
    assert "did you mean 'batch_size'" in refused("doctor", "-cfg", write_config(lambda raw: raw.update(batch_sise=3)))
    assert "optimizer.lr" in refused("doctor", "-cfg", SMOKE, "--set", "optimizer.lr=-1")
    assert "no such file" in refused("doctor", "-cfg", tmp_path / "none.json")
    cut.write_text("[]")
    assert "a config is a JSON object" in refused("doctor", "-cfg", cut)
    assert "name one with -cfg" in refused("doctor", "--set", "seed=1")
    assert "--processes at least 1" in refused("doctor", "--processes", "0")


@pytest.mark.parametrize("script", doctor.TRAINING)
def test_a_config_without_schema_is_known_by_its_keys(script: str, tmp_path: Path) -> None:
    name = {"ddpm_accelerate": "ddpm"}.get(script, script.removeprefix("train_"))
    path = ROOT / "configs" / "smoke" / f"{name}.json"
    raw = json.loads(path.read_text())
    assert type(doctor.load_config(str(path), [])).__module__ == script
    del raw["$schema"]
    (tmp_path / "bare.json").write_text(json.dumps(raw))
    assert type(doctor.load_config(str(tmp_path / "bare.json"), ["seed=3"])).__module__ == script


# ---------------------------------------------------------------------------------------------- the processes


def heard(folder: Path, code: str, limit: float) -> list[Row]:
    table = doctor.Table(quiet=False)
    doctor.together([sys.executable, "-SE", "-c", code], {}, folder, limit, table.add)
    table.end()
    assert [row.name for row in table.rows] == list(STAGES)
    return table.rows


def says(folder: Path, *names: str, status: str = "pass") -> str:
    lines = "".join(json.dumps(Row(name, status, "found", "", 0.1)._asdict()) + "\n" for name in names)  # pyright: ignore[reportArgumentType]
    return f"open({str(folder / 'rows')!r}, 'a').write({lines!r}); "


def test_processes_that_hang_are_ended_and_said_to(tmp_path: Path) -> None:
    began = time.monotonic()
    mark = tmp_path / "ended"
    wait = f"import signal, sys, time; signal.signal(15, lambda *_: (open({str(mark)!r}, 'w'), sys.exit(1))); time.sleep(60)"
    first, *others = heard(tmp_path, wait, 1.0)
    assert first.status == "fail" and "nothing was heard for 1 s" in first.found
    assert "NCCL_P2P_DISABLE=1" in first.advice and "firewall" in first.advice
    assert {row.status for row in others} == {"skip"} and {row.found for row in others} == {"not reached"}
    assert mark.exists() and time.monotonic() - began < 20


def test_processes_that_hang_later(tmp_path: Path) -> None:
    *names, last = STAGES
    rows = heard(tmp_path, says(tmp_path, *names[:5]) + "import time; time.sleep(60)", 1.0)
    assert [row.status for row in rows] == ["pass"] * 5 + ["fail"] + ["skip"] * 3
    (tmp_path / "rows").unlink()
    rows = heard(tmp_path, says(tmp_path, *names) + "import time; time.sleep(60)", 1.0)
    assert rows[-1].name == last == "compile" and rows[-1].status == "warn" and "takes long" in rows[-1].advice


def test_processes_that_end(tmp_path: Path) -> None:
    first, *others = heard(tmp_path, "raise RuntimeError('no socket')", 60)
    assert first.status == "fail" and first.found == "the processes ended: RuntimeError: no socket"
    assert {row.status for row in others} == {"skip"}
    broken = says(tmp_path, "first collective") + says(tmp_path, "all-reduce", status="fail") + "raise RuntimeError('so')"
    assert [row.status for row in heard(tmp_path, broken, 60)] == ["pass", "fail"] + ["skip"] * 7
    (tmp_path / "rows").unlink()
    assert {row.status for row in heard(tmp_path, says(tmp_path, *STAGES), 60)} == {"pass"}


def test_a_launchers_process_that_hangs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = doctor.Table(quiet=False)
    table.add(Row("versions", "pass", "well", "", 0.0))
    table.add(Row("first collective", "pass", "well", "", 0.0))
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", lambda status: left.append(status) or sys.exit(status))
    with pytest.raises(SystemExit):
        doctor.give_up(table, 0.2)
    assert left == [1] and "all-reduce           fail  nothing was heard for 0.2 s" in capsys.readouterr().out
    for name in STAGES:
        table.add(Row(name, "pass", "well", "", 0.0))
    doctor.give_up(table, 60)  # all is known: it has nothing to wait for
