"""benchmarks/gpu.py at toy size on a CPU: each part, what is skipped, and what a limit or a kill leaves."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import ddpm_accelerate
from benchmarks import gpu, gpu_cifar10, gpu_runs, gpu_steps, photos, race
from benchmarks.common import ROOT
from src.config import UserError, load, read_json
from src.data.packing import pack
from tests.conftest import run_in_process

FOR_LATER = 1e9  # seconds


class Ended:
    """A process that ran in this one, and is over."""

    pid = 0

    def __init__(self, status: int) -> None:
        self.returncode = status

    def poll(self) -> int:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        return self.returncode


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Trainings run in this process; what was to be started, and with which variables."""
    started = list[tuple[list[str], dict[str, str]]]()

    def start(words: list[str], log: Path, extra: dict[str, str] | None = None) -> Ended:
        started.append((words, extra or {}))
        script = next(i for i, word in enumerate(words) if word == "ddpm_accelerate.py")
        done = run_in_process(words[script], *words[script + 1 :])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.all)
        return Ended(done.status)

    monkeypatch.setattr(gpu_runs, "start", start)
    return started


# ---------------------------------------------------------------------------------------------- trainings


def test_a_run_that_is_killed_and_resumed_is_compared(commands: list[Any], tmp_path: Path) -> None:
    result = gpu_runs.run_resumed(tmp_path / "resumed.json", time.monotonic() + FOR_LATER, small=True)
    (row,) = result["rows"]
    assert row["is_equal"] and row["went_on"] and row["tensors"] > 100 and row["state"] == "done"
    assert len(commands) == 3 and "deterministic=true" in commands[0][0] and read_json(tmp_path / "resumed.json") == result
    assert "| plain | 2 of 4 steps |" in gpu_runs.resumed_table(result)
    row |= {"is_equal": False, "differences": ["model: x differs by up to 1"]}
    assert "NO: model: x differs" in gpu_runs.resumed_table(result)


def test_ddp_and_fsdp_are_held_to_the_plain_run(commands: list[Any], tmp_path: Path) -> None:
    """The launchers' processes are left out here; make soak has them, and so have the tests of FSDP."""
    result = gpu_runs.run_parallel(tmp_path / "parallel.json", time.monotonic() + FOR_LATER, small=True)
    assert [(row["way"], row["state"], row["difference"]) for row in result["rows"]] == [
        (way, "done", 0.0) for way in ("plain", "DDP", "FSDP")
    ]
    launchers = [words[1 : words.index("ddpm_accelerate.py")] for words, _ in commands]
    assert launchers[0] == [] and "torch.distributed.run" in launchers[1] and "torch.distributed.run" in launchers[2]
    assert gpu_runs.FSDP.items() <= commands[2][1].items() and "ACCELERATE_USE_FSDP" not in commands[1][1]
    assert "| DDP | a step is 4 images" in gpu_runs.parallel_table(result)


@pytest.mark.soak
def test_ddp_fsdp_and_a_kill_in_processes_of_their_own(tmp_path: Path) -> None:
    rows = gpu_runs.run_parallel(tmp_path / "parallel.json", time.monotonic() + 600, small=True)["rows"]
    assert all(row["difference"] < 1e-5 for row in rows) and "2 x cpu" in rows[2]["plan"]
    (row,) = gpu_runs.run_resumed(tmp_path / "resumed.json", time.monotonic() + 600, small=True)["rows"]
    assert row["is_equal"]


def test_tests_are_listed_as_they_end_and_a_limit_ends_them(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import time, pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n"
        "@pytest.mark.skip\ndef test_left(): pass\ndef test_slow(): time.sleep(60)\n"
    )
    result = gpu_runs.run_tests(tmp_path / "tests.json", time.monotonic() + 3, tests=str(file))
    assert result["state"] == "stopped at its limit" and read_json(tmp_path / "tests.json") == result
    assert [(row["name"], row["outcome"]) for row in result["tests"]] == [
        ("test_good", "passed"), ("test_bad", "failed"), ("test_left", "skipped"),
    ]  # fmt: skip
    assert "| test_bad | failed |" in gpu_runs.tests_table(result)


def test_a_process_is_killed_once_its_checkpoint_is_there(tmp_path: Path) -> None:
    place = tmp_path / "step"
    code = f"import pathlib, time; pathlib.Path({str(place)!r}).mkdir(); time.sleep(60)"
    process = gpu_runs.start([sys.executable, "-c", code], tmp_path / "log.txt")
    assert gpu_runs.kill_each({place: process}, time.monotonic() + 60) == {place: True}
    assert process.returncode == -signal.SIGKILL
    process = gpu_runs.start([sys.executable, "-c", "import time; print('on'); time.sleep(60)"], tmp_path / "log.txt")
    assert gpu_runs.wait_until(process, time.monotonic() + 1) is None
    assert gpu_runs.say_end(None, tmp_path / "log.txt") == "stopped at its limit"
    assert gpu_runs.say_end(1, tmp_path / "log.txt") == "failed: on" and gpu_runs.last_words(tmp_path / "no") == "no word why"
    gpu_runs.end_all()


# ---------------------------------------------------------------------------------------------- a training step


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[float], dict[str, Any]]:
    """The table of steps of one image in three ways, the last one through torch's compiler up to its graphs."""
    names = ("float32", "bf16, channels_last", "bf16, channels_last, compile, CUDA graphs")
    monkeypatch.setattr(gpu_steps, "WAYS", {name: gpu_steps.WAYS[name] for name in names})

    def measure(seconds_left: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds_left
        return gpu_steps.measure_steps(tmp_path / "steps.json", deadline, small=True, seconds=0.0)

    return measure


def test_each_training_step_is_measured(steps: Callable[[float], dict[str, Any]], tmp_path: Path) -> None:
    table = steps(FOR_LATER)
    assert read_json(tmp_path / "steps.json") == table and len(table["rows"]) == 9
    for row in table["rows"]:
        if "graphs" in row["way"]:
            assert row["state"] == "skipped: it needs a GPU"
            continue
        assert row["state"] == "done" and row["step_seconds"] > 0 and row["batch"] == 2, row
        assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
        assert row["operations_per_second"] == pytest.approx(row["operations"] / row["step_seconds"])
    operations = {row["subject"]: row["operations"] for row in table["rows"] if row["way"] == "float32"}
    bf16 = {row["subject"]: row["operations"] for row in table["rows"] if row["way"] == "bf16, channels_last"}
    assert operations == bf16 and min(operations.values()) > 1e7
    text = gpu_steps.table_of({**table, "peak": 1e15})
    assert "| pixels (`digits_ddpm`) | float32 |" in text and text.count("it needs a GPU") == 3
    assert "of the card's 1e+03" in text or "of the card's 1000" in text
    assert all(row["state"].startswith("skipped: it takes") for row in steps(-1)["rows"] if "graphs" not in row["way"])


def test_a_step_that_fails_says_why_and_the_next_is_measured(
    steps: Callable[[float], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "SMALL", gpu_steps.SMALL[:1])
    build = gpu_steps.build_loop

    def broken(*args: Any) -> Any:
        monkeypatch.setattr(gpu_steps, "build_loop", build)
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    monkeypatch.setattr(gpu_steps, "build_loop", broken)
    table = steps(FOR_LATER)
    assert [row["state"] for row in table["rows"][:2]] == ["failed: OutOfMemoryError: CUDA out of memory", "done"]
    assert "failed: OutOfMemoryError" in gpu_steps.table_of(table)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
@pytest.mark.parametrize("subject", gpu_steps.SMALL, ids=lambda subject: subject.name)
def test_the_compiler_takes_each_network(subject: gpu_steps.Subject) -> None:
    loop = gpu_steps.build_loop(subject, ["batch_size=2"])
    way = gpu_steps.WAYS["bf16, channels_last, compile"]
    gpu_steps.set_way(loop, way, torch.device("cpu"), "eager")()
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    for part, count in (("train", 24), ("held_out", 16)):
        (folder / part / "cat").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (race.SIZE, race.SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / part / "cat" / f"{i:02d}.png")
    pack(photos.open_folder(folder / "train"), folder / "packed", size=race.SIZE, channels=3)
    return folder


def test_a_training_in_pieces_goes_on_and_each_is_measured(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of two steps, as a stop ends them; after two of four a kill, and the same call goes on."""
    out, stops, settings = tmp_path / "out", [2, 4, 6], gpu_cifar10.SMALL

    def train_piece(words: list[str], log: Path, deadline: float) -> None:
        AcceleratorState._reset_state(True)
        sets = [word for word, before in zip(words[1:], words, strict=False) if before == "--set"]
        cfg = load(ROOT / words[words.index("-cfg") + 1], ddpm_accelerate.Config, [*sets, "checkpoint.every=2"])
        ddpm_accelerate.train(cfg, Path(words[words.index("--run-dir") + 1]), stop_at=stops.pop(0))
        AcceleratorState._reset_state(True)

    def is_killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_cifar10, "train_piece", train_piece)
    monkeypatch.setattr(gpu_cifar10, "probe", lambda *_: {"images_per_second": 1.0, "start_seconds": 0.0})
    monkeypatch.setattr(gpu_cifar10, "plan_steps", lambda *_: 6)
    monkeypatch.setattr(gpu_cifar10, "BATCH", 8)
    monkeypatch.setattr(gpu_cifar10.SamplerConfig, "__init__", _with_two_steps(gpu_cifar10.SamplerConfig.__init__))
    options: dict[str, Any] = {"samples": 8, "features": "random", "settings": settings, "pieces": 3}
    with monkeypatch.context() as patch:
        patch.setattr(gpu_cifar10, "draw_curve", is_killed)
        with pytest.raises(KeyboardInterrupt):
            gpu_cifar10.train_cifar10(out, images, time.monotonic() + FOR_LATER, **options)
    begun = read_json(out / "cifar10.json")
    assert begun["steps"] == 6 and [piece["step"] for piece in begun["pieces"]] == [2]
    result = gpu_cifar10.train_cifar10(out, images, time.monotonic() + FOR_LATER, **options)
    assert result == read_json(out / "cifar10.json") and result["state"] == "done" and not stops
    assert [(piece["step"], piece["images"]) for piece in result["pieces"]] == [(2, 16), (4, 32), (6, 48)]
    for piece in result["pieces"]:
        with Image.open(out / piece["image"]) as sheet:
            assert piece["frechet_distance"] > 0 and sheet.size[0] > 8 * race.SIZE
    assert (out / "distance.png").exists()
    text = gpu_cifar10.table_of(result)
    assert "| 6 of 6 | 48 |" in text and "| held-out images |" in text
    with pytest.raises(UserError, match="begun with other settings or samples"):
        gpu_cifar10.train_cifar10(out, images, time.monotonic(), **{**options, "samples": 9})


def _with_two_steps(init: Callable[..., None]) -> Callable[..., None]:
    return lambda self, **options: init(self, **{**options, "steps": 2})


def test_the_recipe_is_a_config_and_its_speed_is_read_from_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = gpu_cifar10.words_of(tmp_path / "run", ROOT / "datasets" / "x", {"batch_size": 64}, steps=100)
    sets = [word for word, before in zip(words[1:], words, strict=False) if before == "--set"]
    cfg = load(ROOT / words[words.index("-cfg") + 1], ddpm_accelerate.Config, sets)
    assert cfg.batch_size == 64 and cfg.steps == 100 and cfg.mixed_precision == "auto" and not cfg.log.trackers
    lines = [json.dumps({"step": 20 * i, "images_per_second": 100.0 * i}) for i in (1, 2, 3, 4)]
    (tmp_path / "probe").mkdir()

    def start(words: list[str], log: Path) -> Any:
        (tmp_path / "probe").mkdir()
        (tmp_path / "probe" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"half')
        return SimpleNamespace(poll=lambda: None)

    monkeypatch.setattr(gpu_runs, "start", start)
    monkeypatch.setattr(gpu_runs, "end", lambda process, number: None)
    measured = gpu_cifar10.probe(tmp_path, ROOT / "datasets" / "x", {}, 0.0)
    assert measured["images_per_second"] == 300.0 and not (tmp_path / "probe").exists()
    assert gpu_cifar10.plan_steps(100.0, 256.0, 256, 3) == 90 and gpu_cifar10.plan_steps(0.0, 256.0, 256, 3) == 3
    lines.clear()
    monkeypatch.setattr(gpu_runs, "start", lambda words, log: log.write_text("error: no data\n") and Ended(2))
    with pytest.raises(UserError, match="ended in its probe: error: no data"):
        gpu_cifar10.probe(tmp_path, ROOT / "datasets" / "x", {}, 0.0)


def test_a_piece_is_asked_to_stop(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('on', flush=True); time.sleep(60)"
    gpu_cifar10.train_piece([sys.executable, "-c", code], tmp_path / "log.txt", time.monotonic() + 2)
    assert (tmp_path / "log.txt").read_text() == "on\n" and gpu_runs._started[-1].returncode == 7


# ---------------------------------------------------------------------------------------------- the commands


def test_parts_without_time_are_skipped_and_one_that_fails_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(file: Path, deadline: float, *, small: bool) -> dict[str, Any]:
        raise RuntimeError("no card")

    def runs(file: Path, deadline: float, *, small: bool) -> dict[str, Any]:
        assert deadline - time.monotonic() <= 60
        file.write_text(json.dumps({"rows": [{"way": "plain", "state": "done", "difference": 0.0, "plan": ""}]}))
        return {}

    parts = {"resumed": gpu.PARTS["resumed"]._replace(run=fails), "parallel": gpu.PARTS["parallel"]._replace(run=runs)}
    monkeypatch.setattr(gpu, "PARTS", {**gpu.PARTS, **parts})
    gpu.run_first(tmp_path, 1.0, ["resumed", "parallel"])
    gpu.run_first(tmp_path, 0.5, ["tests"])
    page = (tmp_path / "gpu.md").read_text()
    assert "failed: RuntimeError: no card" in page and "skipped: it takes 40 s, and 30 s are left" in page
    assert "| plain |  | 0.0e+00 |" in page and "skipped: it takes 40 s" in capsys.readouterr().out


def test_the_table_of_steps_is_made_apart_and_ended_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"subject": "pixels", "config": "x", "way": "float32", "state": "running"}]

    def start(words: list[str], log: Path) -> Ended:
        assert words[1:3] == ["benchmarks/gpu.py", "steps"] and words[-1] == "--small"
        table = {"machine": "", "peak": None, "product": 1e12, "rows": rows}
        (tmp_path / "steps.json").write_text(json.dumps(table))
        return Ended(0)

    monkeypatch.setattr(gpu_runs, "start", start)
    monkeypatch.setattr(gpu_runs, "wait_until", lambda process, deadline: None)
    gpu.run_first(tmp_path, 1.0, ["steps"], small=True)
    assert "| float32 | stopped at its limit |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["first", "--minutes", "0"], "--minutes must be above 0"),
        (["second", "--set", "steps"], "--set steps: write KEY=VALUE"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=message):
        gpu.main()
