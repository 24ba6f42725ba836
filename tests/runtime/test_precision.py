"""mixed_precision auto: what the first process decides by the features of its device, and a run keeps on every machine."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import ddpm_accelerate
from src.config import UserError, load
from src.runs.opened import open_run
from src.runtime.checkpoint import newest, read_tensors
from src.runtime.launch import MachineConfig, decide_precision, start
from src.runtime.precision import (
    explain_precision,
    has_bf16_units,
    kept_precision,
    native_precision,
    precision_for,
    recorded_precision,
)
from tests.conftest import ROOT, environment, refused, run_in_process

CPU, UNITS, NO_UNITS = torch.device("cpu"), {"avx512_bf16": True}, {"avx512_bf16": False, "amx_bf16": False}
SMOKE = ROOT / "configs/smoke/ddpm.json"
AUTO = MachineConfig(mixed_precision="auto")


def set_units(monkeypatch: pytest.MonkeyPatch, known: dict[str, bool]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)


def train(run: Path, precision: str, steps: int, *arguments: str, script: str = "ddpm_accelerate") -> str:
    quick = {"steps": steps, "checkpoint.every": 1, "preview.num_samples": 1, "preview.sampler.steps": 1}
    quick |= {"batch_size": 4, "micro_batch_size": 4, "optimizer.schedule.kind": "constant", "log.trackers": "[]"}
    quick |= {"preview.quality": "null", "mixed_precision": precision, "held_out": 0.0}
    words = [word for key, value in quick.items() for word in ("--set", f"{key}={value}")]
    done = run_in_process(f"{script}.py", "-cfg", SMOKE, "--run-dir", run, *words, *arguments)
    assert done.status == 0, done.all
    return done.out


def document(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint, _ = newest(run / "checkpoints")
    assert checkpoint is not None
    return read_tensors(checkpoint, "model")


# ---------------------------------------------------------------------------------------------- decided by features


@pytest.mark.parametrize(
    ("known", "auto", "units"),
    [
        (UNITS, "bf16", True),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16", True),
        (NO_UNITS, "no", False),
        ({"neon": True}, "no", True),  # torch does not say: auto takes what is right everywhere, and nobody is warned
    ],
)
def test_the_features_of_a_processor_decide(
    known: dict[str, bool], auto: str, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_units(monkeypatch, known)
    assert native_precision(CPU) == auto and has_bf16_units() == units
    assert native_precision(CPU, "float64") == "no" and native_precision(torch.device("mps")) == "no"
    assert decide_precision(AUTO) == auto == start(AUTO).mixed_precision
    AcceleratorState._reset_state(True)
    assert start(replace(AUTO, dtype="float64")).mixed_precision == "no"
    assert explain_precision("no", CPU, "float64").endswith("no in this run: its dtype is float64")
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("has_units", "auto", "explicit"), [(True, "bf16", "bf16"), (False, "no", "fp16")])
def test_the_features_of_a_gpu_decide(
    has_units: bool, auto: str, explicit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    emulation_counts = list[bool]()

    def is_supported(including_emulation: bool = True) -> bool:
        emulation_counts.append(including_emulation)
        return has_units

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    gpu = torch.device("cuda", 0)
    assert native_precision(gpu) == auto and precision_for("bf16") == explicit and emulation_counts == [False, False]
    words = "this GPU has units for bf16" if has_units else "torch knows of no units for bf16 in this GPU"
    assert explain_precision(auto, gpu) == f"mixed_precision auto is {auto} in this run: {words}"


TWO = """
import os, torch
torch.cpu.get_capabilities = lambda: {"avx512_bf16": os.environ["RANK"] == "0"}
from src.runtime.launch import MachineConfig, start
from src.runtime.precision import native_precision
accelerator = start(MachineConfig(mixed_precision="auto"))
words = accelerator.process_index, native_precision(accelerator.device), accelerator.mixed_precision
os.write(1, (" ".join(map(str, words)) + "\\n").encode())
torch.distributed.destroy_process_group()
"""


def test_the_first_process_decides_for_all(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text(TWO)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    done = subprocess.run(words, env=environment(2, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == ["0 bf16 bf16", "1 no bf16"], done.stderr


@pytest.mark.parametrize("launched", ["bf16", "fp16"])
def test_a_launcher_that_asks_for_a_precision_is_refused(launched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine, whatever auto would be there."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(UserError, match=f"asks for mixed_precision {launched} and the config for auto; leave it out"):
        start(AUTO)


# ---------------------------------------------------------------------------------------------- kept by a run


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`auto`, which was begun where there are units, and `bf16`, of a config that says so; two steps each, read only."""
    folder = tmp_path_factory.mktemp("precision")
    with pytest.MonkeyPatch.context() as patch:
        set_units(patch, UNITS)
        out = train(folder / "auto", "auto", 2)
        train(folder / "bf16", "bf16", 2)
    assert "mixed_precision auto is bf16 in this run: this processor has units for bf16" in out
    return folder


@pytest.fixture
def runs(begun: Path, tmp_path: Path) -> Path:
    return shutil.copytree(begun, tmp_path / "runs")


def test_a_run_says_what_auto_was(begun: Path) -> None:
    run, plain = begun / "auto", begun / "bf16"
    step = run / "checkpoints/step_00000002"
    for folder in (run, step, run / "final"):
        assert document(folder, "config")["mixed_precision"] == "auto"
        assert document(folder, "data")["mixed_precision"] == "bf16"
    assert kept_precision(run) == recorded_precision(step) == "bf16" == kept_precision(plain)
    assert "mixed_precision" not in document(plain, "data"), "nothing is added where the config decides"
    assert kept_precision(begun) is None and recorded_precision(begun) is None
    for name, tensor in last_weights(plain).items():
        assert torch.equal(tensor, last_weights(run)[name]), name
    assert open_run(run, CPU).network is not None, "sampling needs no precision"


def test_a_run_keeps_its_precision_on_another_machine(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_units(monkeypatch, NO_UNITS)
    out = train(runs / "auto", "auto", 3)
    assert "auto is bf16 in this run, which was begun so and keeps it; a new one would take no here" in out
    assert "going on at step 2" in out and "warning" not in out
    train(runs / "bf16", "bf16", 3)
    assert document(runs / "auto", "data")["mixed_precision"] == "bf16"
    weights, plain = last_weights(runs / "auto"), last_weights(runs / "bf16")
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    assert kept_precision(runs / "auto") == "bf16" and start_of_a_new_run() == "no"


def start_of_a_new_run() -> str:
    AcceleratorState._reset_state(True)
    return decide_precision(AUTO)


def test_auto_goes_on_with_what_a_config_said_and_the_other_way_round(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_units(monkeypatch, NO_UNITS)
    assert "auto is bf16 in this run, which was begun so" in train(runs / "bf16", "auto", 3)
    assert document(runs / "bf16", "data")["mixed_precision"] == "bf16"
    train(runs / "auto", "bf16", 3)
    weights, plain = last_weights(runs / "auto"), last_weights(runs / "bf16")
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    words = ["-cfg", SMOKE, "--run-dir", runs / "auto", "--set", "mixed_precision=no"]
    message = refused("ddpm_accelerate", *words)
    assert "started with another" in message and "mixed_precision" in message


def test_a_run_that_goes_on_from_another_one(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps what auto was, and decides anew where the config says something else."""
    set_units(monkeypatch, NO_UNITS)
    assert "keeps it; a new one would take no here" in train(runs / "auto", "auto", 3, "--continue-as", "kept")
    train(runs / "auto", "no", 3, "--continue-as", "plain")
    newest_of = {name: newest(runs / name / "checkpoints")[0] for name in ("kept", "plain")}
    assert all("mixed_precision" not in document(runs / "plain" / part, "data") for part in (".", "final"))
    assert newest_of["kept"] is not None and recorded_precision(newest_of["kept"]) == "bf16"
    assert "auto is no in this run" in train(runs / "bf16", "auto", 3, "--continue-as", "anew")
    assert document(runs / "anew", "data")["mixed_precision"] == "no"


@pytest.mark.parametrize(("name", "precision"), [("auto", "bf16"), ("fresh", "no")])
def test_a_dry_run_trains_in_the_precision_of_the_run(
    name: str, precision: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_units(monkeypatch, NO_UNITS)
    names = list[str]()
    monkeypatch.setattr("src.training.dry_run.STEPS", 2)
    monkeypatch.setattr("src.training.dry_run._more_steps", lambda costs: names.append(costs.precision) or 0)
    out = train(runs / name, "auto", 3, "--dry-run")
    assert f"precision    mixed_precision auto is {precision}" in out and names == [precision]


def test_two_optimisers_that_were_begun_in_bf16_on_a_gpu_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    for name, words in {"config": {"mixed_precision": "auto"}, "data": {"mixed_precision": "bf16"}}.items():
        (tmp_path / "checkpoints" / "step_00000001" / f"{name}.json").write_text(json.dumps(words))
    (tmp_path / "checkpoints" / "step_00000002").mkdir()  # it cannot be read
    monkeypatch.setattr("src.runtime.launch.precision_for", lambda wanted: {"bf16": "fp16"}.get(wanted, wanted))
    with pytest.raises(UserError, match="not for two optimisers; go on with this run where there is bf16"):
        start(AUTO, folder=tmp_path, fp16=False)


@pytest.mark.parametrize("known", [UNITS, NO_UNITS])
def test_the_doctor_says_what_auto_is_and_proves_that(
    known: dict[str, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from src.doctor import proof

    set_units(monkeypatch, known)
    cfg, rows, names = load(SMOKE, ddpm_accelerate.Config, ["mixed_precision=auto"]), list[Any](), list[str]()
    stages = {"bf16": proof.half, "words": lambda bench: names.append(bench.script.name) or proof.ONE_PROCESS}
    monkeypatch.setattr(proof, "STAGES", stages)
    AcceleratorState._reset_state(True)
    proof.prove(cfg, cfg, tmp_path, rows.append)
    AcceleratorState._reset_state(True)
    precision = native_precision(CPU)
    assert rows[0].status == "pass" and rows[0].found.endswith(f"mixed_precision auto is {precision} here")
    assert names == [f"ddpm_accelerate.py, shrunk, in {'bf16' if precision == 'bf16' else 'float64'}"]


def test_a_gpu_without_units_is_no_reason_to_warn_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    from src.doctor import proof

    bench: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), cfg=SimpleNamespace(mixed_precision="bf16"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *to: tensor)
    assert proof.half(bench).status == "warn"
    bench.cfg = SimpleNamespace(mixed_precision="auto", dtype="float32")
    verdict = proof.half(bench)
    assert verdict.status == "pass" and verdict.found.endswith("mixed_precision auto is no here")
