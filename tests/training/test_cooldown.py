"""Warm-up, stable, decay: when the rate falls, which checkpoint is spared, where a run may go on, and `stop`."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from src.config import UserError, load, read_json, validate
from src.runtime.checkpoint import spared_steps
from src.training import preview
from src.training.changed_config import in_cooldown, moves_cooldown, ways_on
from src.training.cooldown import Cooldown
from src.training.optimizer import OptimizerConfig, WarmupStableDecay, learning_rate
from src.training.rehearsal import compare_checkpoints
from tests.conftest import metrics, refused, run_here
from tests.resumes import SCRIPTS

SMALL = ("--set", "preview.quality=null", "--set", "preview.num_samples=1", "--set", "log.every=1")
STOP = 'stop={"kind": "held_out", "every": 2, "patience": 2}'
WSD = 'optimizer.schedule={"kind": "wsd", "cooldown": 0.4}'


def words(run: Path, *changes: str) -> list[str]:
    return ["-cfg", "configs/smoke/ddpm.json", "--run-dir", str(run), *SMALL, *(w for each in changes for w in ("--set", each))]


def train(run: Path, *changes: str, new: str | None = None) -> str:
    run_here("ddpm_accelerate", *words(run, *changes), *(["--continue-as", new] if new is not None else []))
    return (run if new is None else run.with_name(new)).joinpath("log.txt").read_text()


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors."""
    differences, count = compare_checkpoints(one, other)
    return count > 100 and all(line.startswith(("progress.json", "config.json", "data.json")) for line in differences)


# ---------------------------------------------------------------------------------------------- the rate


@pytest.mark.parametrize(
    ("curve", "of_part"),
    [
        ("sqrt", lambda part: 1 - math.sqrt(part)),
        ("linear", lambda part: 1 - part),
        ("cosine", lambda part: (1 + math.cos(math.pi * part)) / 2),
    ],
)
def test_the_rate_is_constant_and_then_falls_along_its_curve(curve: str, of_part: Any) -> None:
    schedule = {"kind": "wsd", "cooldown": 0.25, "curve": curve, "floor": 0.1, "warmup": 4}
    rate = learning_rate(validate(OptimizerConfig, {"lr": 0.2, "schedule": schedule}), lambda length: int(str(length)))
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:4] == pytest.approx([0.04, 0.08, 0.12, 0.16]) and rates[4:76] == [0.2] * 72
    assert rates[75:] == pytest.approx([0.2 * (0.1 + 0.9 * of_part(i / 25)) for i in range(25)])
    assert rate(100, 100) == pytest.approx(0.02) and rate(80, 1000) == 0.2, "a longer run is not there yet"


def test_the_total_is_that_of_a_cooldown_that_begins_now() -> None:
    for share in (0.01, 0.2, 1 / 3, 0.5, 0.9, 0.99):
        schedule = WarmupStableDecay(kind="wsd", cooldown=share)
        for start in (*range(1, 60), 12_345, 10**7):
            total = schedule.total_for(start)
            assert schedule.cooldown_start(total) == start > schedule.cooldown_start(total - 1)


# ---------------------------------------------------------------------------------------------- when it begins


def cooldown_of(patience: int, steps: int = 100, progress: dict[str, Any] | None = None, **changes: Any) -> Cooldown:
    raw = read_json(Path("configs/smoke/ddpm.json"))
    raw["optimizer"]["schedule"] = {"kind": "wsd", "cooldown": 0.5}
    raw |= {"stop": {"kind": "held_out", "every": 1, "patience": patience}, **changes}
    return Cooldown(validate(SCRIPTS["ddpm_accelerate"].Config, raw), steps, progress or {})


def test_the_cooldown_begins_when_the_loss_was_not_lower_for_long_enough() -> None:
    cooldown = cooldown_of(patience=3)
    losses = [0.5, 0.4, 0.41, float("nan"), 0.39, 0.39, 0.4, 0.7, 0.1]
    lines = []
    for step, loss in enumerate(losses, 1):
        cooldown = cooldown_of(3, progress={"step": step - 1, **cooldown.to_save(step - 1)})  # as after a kill
        lines.append(cooldown.watch(step, loss))
    assert [bool(line) for line in lines] == [False] * 7 + [True, False], "and once it falls, the loss says nothing more"
    assert "lowest at step 5 (0.39)" in lines[7] and "begins at step 8, and the run ends at step 16" in lines[7]
    assert (cooldown.start, cooldown.total) == (8, 16)
    saved = cooldown.to_save(9)["cooldown"]
    assert saved["before"] == 8 and spared_steps({"cooldown": saved}) == {8}
    assert cooldown_of(3, progress={"step": 9, "cooldown": saved}, stop=None).total == 16, "what was begun goes on"


def test_what_stop_decided_holds_for_the_same_steps_alone() -> None:
    """Under another share the cooldown begins where it did; with other steps, or another schedule, nothing was decided."""
    saved = {"requested": 100, "total": 16, "start": 8, "before": 8, "lowest": 0.4, "lowest_at": 5, "not_lower": 3}
    progress = {"step": 8, "cooldown": saved}
    assert cooldown_of(3, progress=progress).total == 16
    raw = read_json(Path("configs/smoke/ddpm.json"))
    raw["optimizer"]["schedule"] = {"kind": "wsd", "cooldown": 0.2}
    other = Cooldown(validate(SCRIPTS["ddpm_accelerate"].Config, raw), 100, progress)
    assert (other.start, other.total) == (8, 10)
    raw["optimizer"]["schedule"] = {"kind": "constant"}
    assert Cooldown(validate(SCRIPTS["ddpm_accelerate"].Config, raw), 100, progress).total == 100
    longer = cooldown_of(3, steps=200, progress=progress)
    assert longer.total == 200 and [bool(longer.watch(step, 0.5)) for step in (9, 10, 11)] == [False, False, True]


def test_losses_that_were_never_finite_begin_no_cooldown() -> None:
    cooldown = cooldown_of(patience=1)
    assert [cooldown.watch(step, float("nan")) for step in (1, 2, 3)] == ["", "", ""] and cooldown.total == 100
    assert cooldown.watch(4, 0.5) == "" and "in 1 measurement since" in cooldown.watch(5, float("nan"))


def test_a_cooldown_without_a_checkpoint_before_it_is_said() -> None:
    saved = {"requested": 10, "total": 10, "start": 6, "before": None}
    assert in_cooldown({"step": 7, "cooldown": saved}) and not in_cooldown({"step": 6, "cooldown": saved})
    assert not in_cooldown({"step": 7}) and moves_cooldown(["seed", "steps"]) and not moves_cooldown(["optimizer.lr"])
    raw = read_json(Path("configs/smoke/ddpm.json"))
    words = ways_on(Path("old"), raw, raw | {"steps": 20}, ["steps"], {"step": 7, "cooldown": saved})
    assert words == "; init_from old there starts from its weights alone"


def test_a_run_without_wsd_has_no_cooldown() -> None:
    raw = read_json(Path("configs/smoke/ddpm.json"))
    plain = Cooldown(validate(SCRIPTS["ddpm_accelerate"].Config, raw), 30, {})
    assert (plain.start, plain.total, plain.to_save(3), plain.watch(3, 1.0)) == (None, 30, {}, "")


@pytest.mark.parametrize(
    ("script", "changes", "reason"),
    [
        ("ddpm_accelerate", [STOP], "stop: it begins the cooldown of a schedule that has one; set optimizer.schedule.kind"),
        ("ddpm_accelerate", [STOP, WSD, "held_out=0"], "stop: it measures held-out images; set held_out to 0.05"),
        ("train_iadb", [STOP, WSD, "pairs=runs/x"], "stop: none of the pairs of an earlier run is held out"),
        ("train_iadb", ["steps=null"], "steps: a run without end needs optimizer.schedule.kind constant or wsd"),
    ],
)
def test_what_does_not_go_together(script: str, changes: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        load(f"configs/smoke/{'iadb' if script == 'train_iadb' else 'ddpm'}.json", SCRIPTS[script].Config, changes)


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`short`, whose cooldown of 4 steps begins at step 6, and `constant`, of 6 steps."""
    folder = tmp_path_factory.mktemp("cooldown")
    train(folder / "short", WSD, "steps=10", "checkpoint.every=3", "checkpoint.keep=1")
    train(folder / "constant", "optimizer.schedule.kind=constant", "steps=6")
    return folder


def test_the_checkpoint_before_the_cooldown_is_spared_and_starts_a_longer_run(runs: Path) -> None:
    short = runs / "short"
    assert steps_in(short) == [6, 10] and "of 10 = 1.4 epochs, with the cooldown from step 6" in (short / "log.txt").read_text()
    assert [line["lr"] for line in metrics(short)][5:] == pytest.approx(
        [1e-3 * (1 - math.sqrt(part)) for part in (0, 0, 0.25, 0.5, 0.75)]
    ), "the log has the rate of the step that was taken"
    message = refused("ddpm_accelerate", *words(short, WSD, "steps=15"))
    assert "was started with another steps" in message
    assert "to go on with it from step 6, before its cooldown, in a new run, add --continue-as NAME" in message

    log = train(short, WSD, "steps=15", new="longer")
    assert f"goes on from {short} at step 6" in log and "steps (10 -> 15)" in log and "the cooldown from step 9" in log
    train(runs / "whole", WSD, "steps=15")
    assert same(*(runs / name / "checkpoints" / "step_00000015" for name in ("longer", "whole")))


def test_a_constant_rate_goes_on_with_a_cooldown(runs: Path) -> None:
    """In its own directory, as it is the same rate until then; not where the cooldown would have begun before."""
    shutil.copytree(runs / "constant", runs / "one")
    constant = runs / "constant"
    message = refused("ddpm_accelerate", *words(constant, WSD, "steps=8"))
    assert "the cooldown of a run of 8 steps begins at 5, and this checkpoint is of step 6; set steps to 10" in message
    log = train(constant, WSD, "steps=10")
    assert "changed since the checkpoint: optimizer.schedule.cooldown" in log and "going on at step 6 of 10" in log
    assert same(*(runs / name / "checkpoints" / "step_00000010" for name in ("constant", "short")))
    train(runs / "one", WSD, "steps=10", "checkpoint.keep=1")
    assert steps_in(runs / "one") == [6, 10], "what it came from is the last one before the cooldown"
    assert "goes on from" in train(runs / "one", WSD, "steps=15", new="two") and steps_in(runs / "two")[0] == 6


def rising(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes each held-out loss higher than the one before, and gives how many there were."""
    losses = list[int]()
    original = preview.held_out_loss

    def measure(*args: Any) -> dict[str, float]:
        losses.append(len(losses))
        return original(*args) | {"held_out_loss": 1.0 + len(losses)}

    monkeypatch.setattr(preview, "held_out_loss", measure)
    return losses


def test_stop_ends_a_run_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the checkpoints and the weights of one that was given so few steps."""
    losses = rising(monkeypatch)
    log = train(tmp_path / "run", WSD, STOP, "steps=1000", "preview.every=null")
    assert "lowest at step 2 (2) and has not been lower in 2 measurements since" in log
    assert "the cooldown begins at step 6, and the run ends at step 10" in log and len(losses) == 5
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["step"], status["steps"]) == ("finished", 10, 10)
    assert {6, 10} <= set(steps_in(tmp_path / "run"))
    train(tmp_path / "plain", WSD, "steps=10", "preview.every=null")
    assert same(*(tmp_path / name / "checkpoints" / "step_00000010" for name in ("run", "plain")))
    assert "is finished (10 steps)" in train(tmp_path / "run", WSD, STOP, "steps=1000", "preview.every=null")
