"""The training script, launched: on one process and on two, killed, stopped, misused."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src.config import load
from src.runtime.checkpoint import newest
from src.runtime.stopping import StepGate
from src.sampling import checkpoints
from tests import kills
from tests.conftest import (
    ROOT,
    SMOKE,
    Finished,
    command,
    environment,
    launch,
    metrics,
    one_line,
    refused,
    run_here,
    run_in_process,
)

SCRIPT = "ddpm_accelerate.py"


def train(run: Path, *arguments: str, processes: int = 1, **extra: Any) -> Finished:
    words = (SCRIPT, "-cfg", SMOKE, "--run-dir", run, *arguments)
    return run_in_process(*words) if processes == 1 and not extra else launch(*words, processes=processes, **extra)


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_what_the_design_says(smoke_run: Path) -> None:
    names = {path.name for path in smoke_run.iterdir() if not path.name.startswith(".")}
    image_files = {"contact_sheet.png", "original.png", "noised.png", "beta_alpha_hat.png", "loss.png"}
    files = {"config.json", "data.json", "metrics.jsonl", "log.txt", "status.json", "skipped.json", "report.html"}
    assert names == image_files | files | {"checkpoints", "final", "samples", "tensorboard"}
    best = json.loads((smoke_run / "checkpoints" / "step_00000030" / "progress.json").read_text())["best"]["step"]
    assert {path.name for path in (smoke_run / "checkpoints").iterdir()} == {f"step_000000{n}" for n in (10, 20, 30, best)}
    inside = {path.name for path in (smoke_run / "checkpoints" / "step_00000030").iterdir()}
    weights = {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert inside == weights | {"progress.json", "config.json", "data.json", "MANIFEST.json"}
    assert {path.name for path in (smoke_run / "samples").iterdir()} == {"step_00000015.png", "step_00000030.png"}
    assert json.loads((smoke_run / "status.json").read_text())["state"] == "finished"
    assert list((smoke_run / "tensorboard").rglob("events.*"))
    lines = metrics(smoke_run)
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25, 30]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and "held_out_loss" in lines[-1]
    data = json.loads((smoke_run / "data.json").read_text())
    assert data["class_names"] == ["circle", "cross", "square", "triangle"] and sum(data["counts"].values()) == data["images"]


def test_the_config_of_a_run_is_whole(smoke_run: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from ddpm_accelerate import Config

    config = load(smoke_run / "config.json", Config)
    assert config.batch_size == 16 and config.optimizer.betas == (0.9, 0.999)


def test_images_before_training(smoke_run: Path) -> None:
    with Image.open(smoke_run / "original.png") as original, Image.open(smoke_run / "noised.png") as noised:
        assert original.width == noised.width == 4 + 12 * (64 + 4)


def test_one_process_and_two_are_equal_to_the_bit(smoke_run: Path, tmp_path: Path) -> None:
    done = train(tmp_path / "two", processes=2)
    assert done.status == 0, done.all
    assert "= 2 x cpu x 1 x 8" in done.out, "there were two processes"
    kills.same_end(smoke_run, tmp_path / "two")
    distances = [
        [line["frechet_distance"] for line in metrics(run) if "frechet_distance" in line]
        for run in (smoke_run, tmp_path / "two")
    ]
    assert len(distances[0]) == 2 and distances[0] == pytest.approx(distances[1], rel=1e-4)


# ---------------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="session")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("long") / "whole"
    done = run_in_process(*kills.arguments(run))
    assert done.status == 0, done.all
    return run


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_killed_and_resumed_is_equal_to_the_bit(long_run: Path, tmp_path: Path, processes: int) -> None:
    rng, run = random.Random(processes), tmp_path / "run"
    assert kills.start_and_kill(run, processes, rng, inside_save=True) != "ended"
    done = launch(*kills.arguments(run), processes=processes)
    assert done.status == 0, done.all
    kills.same_end(long_run, run)


def test_sigterm_saves_and_says_how_to_go_on(long_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(1, *kills.arguments(run)), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 6/"):
            process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait() == 1
    last = lines[-1]
    step = int(last.split("stopped at step ")[1].split()[0])
    assert "run the same command again" in last and 6 <= step < 40
    checkpoint, _ = newest(run / "checkpoints")
    assert checkpoint is not None and checkpoint.name == f"step_{step:08d}"
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    done = run_in_process(*kills.arguments(run))
    assert done.status == 0 and f"going on at step {step} of 40" in done.out
    kills.same_end(long_run, run)


def test_averages_of_any_length_are_made_afterwards(long_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(long_run, run)
    snapshots = sorted(path.name for path in (run / "ema").iterdir())
    assert snapshots == [f"step_{step:08d}" for step in range(5, 41, 5)]
    done = run_in_process("posthoc_ema.py", run, "0.05", "0.15")
    assert done.status == 0 and "sample.py" in done.out and "POORLY" not in done.out, done.all
    short = load_file(run / "ema" / "width_0.05" / "ema.safetensors")
    stored_average = load_file(run / "checkpoints" / "step_00000040" / "ema_0.05.safetensors")  # followed from step to step
    for name, value in short.items():
        torch.testing.assert_close(value, stored_average[name], rtol=2e-3, atol=2e-5)
    assert any((value != short[name]).any() for name, value in load_file(run / "ema/width_0.15/ema.safetensors").items())
    guided = ("sample", run / "ema" / "width_0.15", "--num", "2", "--steps", "2", "--guidance", "2", "--guide-with")
    run_here(*guided, ".05", "--out", tmp_path / "guided")
    assert "4 network calls" in capsys.readouterr().out
    assert "has no average of the width 0.2" in refused(*guided, "0.2")
    run_here("sample", run / "ema" / "width_0.15", "--num", "2", "--steps", "2", "--out", tmp_path / "samples")
    assert "step 40" in capsys.readouterr().out and len(list((tmp_path / "samples").rglob("*.png"))) >= 2

    (run / "ema" / "step_00000035" / "ema_0.1.safetensors").unlink()
    assert "ema_0.1.safetensors is missing" in refused("posthoc_ema", run, "0.1")
    assert "give one from 0.01 to 0.28" in refused("posthoc_ema", run, "0.5")
    shutil.rmtree(run / "ema")
    assert "train it with ema.snapshot_every" in refused("posthoc_ema", run, "0.1")
    assert "there is no such run" in refused("posthoc_ema", tmp_path / "none", "0.1")


def test_a_finished_run_says_so_and_a_damaged_checkpoint_is_passed_over(smoke_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    done = train(run)
    assert done.status == 0 and "is finished (30 steps)" in done.out
    content = bytearray((run / "checkpoints" / "step_00000030" / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (run / "checkpoints" / "step_00000030" / "model.safetensors").write_bytes(content)
    done = train(run)
    assert done.status == 0 and "passed over step_00000030: model.safetensors is damaged" in done.out
    assert "going on at step 20 of 30" in done.out
    for name in ("model.safetensors", "ema.safetensors"):
        resumed, before = (load_file(root / "checkpoints" / "step_00000030" / name) for root in (run, smoke_run))
        assert all(torch.equal(resumed[key], before[key]) for key in before)


def test_a_changed_config_is_sorted(smoke_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    message = refused("ddpm_accelerate", "-cfg", SMOKE, "--run-dir", run, "--set", "optimizer.lr=0.5", "--set", "batch_size=32")
    assert "was started with another batch_size, optimizer.lr" in message
    assert "another steps" in refused("ddpm_accelerate", "-cfg", SMOKE, "--run-dir", run, "--set", "steps=60"), (
        "the cosine would have been another"
    )
    assert json.loads((run / "config.json").read_text())["batch_size"] == 16
    shutil.rmtree(run / "checkpoints" / "step_00000030")
    done = train(run, "--set", "log.every=1", "--set", "checkpoint.keep=1")
    assert done.status == 0 and "changed since the checkpoint: checkpoint.keep," in done.out and "log.every" in done.out
    message = refused("ddpm_accelerate", "-cfg", SMOKE, "--run-dir", run, "--set", "data.count=64")
    assert "another data" in message


def test_more_steps_under_a_constant_rate(tmp_path: Path) -> None:
    constant = ["--set", 'optimizer.schedule={"kind": "constant"}']
    assert train(tmp_path / "run", *constant, "--set", "steps=10").status == 0
    done = train(tmp_path / "run", *constant, "--set", "steps=20")
    assert done.status == 0 and "going on at step 10 of 20" in done.out and "changed since the checkpoint: steps" in done.out


def test_a_second_launch_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        command(1, *kills.arguments(run)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        limit = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < limit:
            time.sleep(0.05)
        message = one_line(run_in_process(*kills.arguments(run)))
        process.kill()
    assert f"in use by process {process.pid}" in message


# ---------------------------------------------------------------------------------------------- other ways to start


def test_a_dry_run_measures_and_writes_nothing(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "--dry-run")
    assert done.status == 0, done.all
    for word in ("114 images", "parameters   0.1", "disk  ", "30 of 16 images", "images/s", "memory", "time"):
        assert word in done.out, done.out
    assert not (tmp_path / "run").exists()


def test_sampling_from_several_checkpoints(smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = next((smoke_run.parent / "models").iterdir())
    run_here("ddpm_accelerate", "--ckpt", export, "--ckpt_sampling", cwd=tmp_path)
    frames = sorted(path.name for path in (tmp_path / "results" / "denoised").iterdir())
    assert frames == [f"denoised_{i:03d}.jpg" for i in range(51)]
    with Image.open(tmp_path / "results" / "denoised.gif") as gif:
        assert gif.info["duration"] == 200, "5 frames/s"
    output = capsys.readouterr().out
    assert "ffmpeg" in output and "-framerate 5" in output
    early = smoke_run / "checkpoints" / "step_00000010"
    two = ("--ckpt", smoke_run, "--ckpt", early, "--ckpt_sampling", "--steps", "2")
    run_here("ddpm_accelerate", *two, cwd=tmp_path)
    for name in ("1_smoke_ddpm_30", "2_smoke_ddpm_10"):
        assert (tmp_path / "results" / f"grid_{name}.png").exists()
        assert (tmp_path / "results" / f"denoised_{name}.gif").exists()
    assert "needs at least one --ckpt" in refused("ddpm_accelerate", "--ckpt_sampling")
    assert "add --ckpt_sampling" in refused("ddpm_accelerate", "--ckpt", export)


def results(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_sampling_from_checkpoints_takes_the_words_of_sample(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--ckpt", smoke_run, "--ckpt_sampling", "--num-samples", "6", "--steps", "3", "--classes", "square/0/triangle")
    words = (*words, "--guidance", "2", "--solver", "heun", "--seed", "7", "--batch-size", "2", "--device", "cpu")
    done = run_in_process(SCRIPT, *words, "--out", tmp_path / "here")
    assert done.status == 0 and f"{tmp_path}/here/grid.png" in done.out, done.all
    with Image.open(tmp_path / "here" / "grid.png") as sheet:
        sheet_images = np.asarray(sheet)[4:, 4:]
    assert len(list((tmp_path / "here" / "denoised").iterdir())) == 4
    sampled = run_in_process("sample.py", smoke_run, *words[3:], "--out", tmp_path / "samples")
    assert sampled.status == 0, sampled.all
    for i in range(6):
        with Image.open(tmp_path / "samples" / f"{i:05d}.png") as image:
            large = np.asarray(image).repeat(4, 0).repeat(4, 1)
        x, y = 68 * (i % 3), (64 + 16 + 4) * (i // 3)
        assert (sheet_images[y : y + 64, x : x + 64] == large).all(), "what sample.py draws with the same words"

    parts = list[Any]()  # what each of two ranks has drawn, one after the other
    for rank in (1, 0):
        with monkeypatch.context() as patch:
            state = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
            patch.setattr(checkpoints, "start_sampling", lambda _: (state, torch.device("cpu")))
            patch.setattr("accelerate.utils.gather_object", lambda local_parts: parts.extend(local_parts) or list(parts))
            done = run_in_process(SCRIPT, *words, "--out", tmp_path / "two")
            assert done.status == 0 and done.out.count("the GIF again") == (rank == 0), done.all
            assert (tmp_path / "two").exists() == (rank == 0)
    assert len(parts) == 3 and results(tmp_path / "two") == results(tmp_path / "here"), "on two processes the same files"


def test_checkpoints_are_sampled_by_default_as_many_as_classes_ask_for(smoke_run: Path, tmp_path: Path) -> None:
    words = ("--ckpt", smoke_run, "--ckpt_sampling", "--steps", "1", "--out", tmp_path / "out")
    assert run_in_process(SCRIPT, *words, "--classes", "0/1/2").status == 0
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert sheet.width == 4 + 5 * 68 and sheet.height > 4 * 68, "18 of them"
    assert "16 images cannot be dealt to 3" in refused("ddpm_accelerate", *words, "--classes", "0/1/2", "--num-samples", "16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-cfg", "missing.json"), "-cfg is about training"),
        (("-cfg", "configs/landscape64_ddpm.json"), "-cfg is about training"),  # its default, and yet it says nothing here
        (("--set", "nonsense=1"), "--set is about training"),
        (("--dry-run",), "--dry-run is about training"),
        (("--verify-resume",), "--verify-resume is about training"),
        (("--run-dir", "runs/x"), "--run-dir is about training"),
        (("--num-samples", "0"), "must be at least 1"),
        (("--seed", "-1"), "--seed from 0"),
        (("--classes", "hexagon"), "'hexagon' is not known"),
        (("--steps", "1000"), "more than the schedule's 100"),
        (("--steps", "few"), "--steps few: give a number"),
        (("--eta", "1", "--solver", "heun"), "eta belongs to the solver ddim"),
        (("--classifier", "x"), "guides only with --guidance-method classifier"),
        (("--guidance-method", "classifier", "--guidance", "2"), "guidance by a classifier needs one"),
        (("--ckpt", "missing"), "there is no such run or checkpoint"),
    ],
)
def test_what_sampling_from_checkpoints_cannot_use(
    smoke_run: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out"
    assert message in refused("ddpm_accelerate", "--ckpt", smoke_run, "--ckpt_sampling", "--out", out, *words)
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    [("--steps", "3"), ("--shift-base", "4096"), ("--seed", "0"), ("--num-samples", "4"), ("--out", "x"), ("--guidance", "2")],
)
def test_training_takes_no_words_of_sampling(words: tuple[str, ...]) -> None:
    assert f"{words[0]} is about drawing from a --ckpt: add --ckpt_sampling" in refused(
        "ddpm_accelerate", "-cfg", SMOKE, *words
    )


def test_unconditional_blend_in_bf16_with_workers_and_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for i in range(40):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (30 + i % 5, 24), (6 * i, 100, 200)).save(tmp_path / "data" / f"{i}.png")
    done = launch(
        ROOT / SCRIPT, "-cfg", ROOT / SMOKE, "--run-dir", tmp_path / "run", "--set", "data.source=folder", "--set",
        f"data.path={tmp_path / 'data'}", "--set", "class_conditional=false", "--set", "label_dropout=0.0", "--set",
        'process={"schedule": {"kind": "blend"}, "target": "blend"}', "--set", "mixed_precision=bf16", "--set", "workers=2",
        "--set", 'log.trackers=["tensorboard", "wandb"]', "--set", "image.crop=random", "--set",
        'preview.sampler={"solver": "heun", "steps": 3}', "--set", "steps=10", "--set", "checkpoint.keep_best=true",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.status == 0, done.all
    assert metrics(tmp_path / "run")[-1]["loss"] < 2 and list(tmp_path.rglob("*.wandb"))
    assert "Traceback" not in done.all


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["model"]["attention"].append("full"), "model: attention has 3 entries and channel_mult 2"),
        (
            lambda raw: raw["model"].update(base_chanels=3),
            "model.base_chanels: unknown key; did you mean 'base_channels'?",
        ),
        (lambda raw: raw.update(batch_size="16"), "batch_size: input should be a valid integer, not '16'"),
        (lambda raw: raw["process"].update(schedule={"kind": "blend"}), "process: target 'eps' cannot be read"),
        (lambda raw: raw.update(data={"source": "folder", "path": "/nowhere"}), "data folder /nowhere does not exist"),
        (lambda raw: raw["image"].update(size=15), "the network sees 15 px, not divisible by 2"),
        (lambda raw: raw.update(micro_batch_size=5), "batch_size 16 is not a multiple"),
        (lambda raw: raw["preview"]["sampler"].update(steps=500), "more than the schedule's 100"),
        (lambda raw: raw["process"].update(variance="learned"), "the simple loss teaches no learned variance; use hybrid"),
        (lambda raw: raw.update(label_dropout=0.0, preview={"sampler": {"guidance": 2.0}}), "label_dropout above 0"),
    ],
)
def test_a_config_that_cannot_be_trained(write_config: Callable, tmp_path: Path, change: object, message: str) -> None:
    assert message in one_line(run_in_process(SCRIPT, "-cfg", write_config(change), "--run-dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_config(tmp_path: Path) -> None:
    assert "there is no such file" in refused("ddpm_accelerate", "-cfg", tmp_path / "none.json")
    (tmp_path / "cut.json").write_text((ROOT / SMOKE).read_text()[:200])
    assert "is the file cut short?" in refused("ddpm_accelerate", "-cfg", tmp_path / "cut.json")
    assert "not a finite number" in refused("ddpm_accelerate", "-cfg", SMOKE, "--set", "optimizer.lr=1e999")


def test_the_default_config_without_its_images(tmp_path: Path) -> None:
    message = one_line(launch(ROOT / SCRIPT, "-cfg", ROOT / "configs" / "landscape64_ddpm.json", cwd=tmp_path))
    assert "data folder datasets/landscape does not exist; set data.path" in message and not list(tmp_path.iterdir())


def test_data_without_classes_or_with_one_broken_file_too_many(tmp_path: Path) -> None:
    for i in range(8):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    folder = ["--set", "data.source=folder", "--set", f"data.path={tmp_path}"]
    words = ("ddpm_accelerate", "-cfg", SMOKE, "--run-dir", tmp_path / "run", *folder, "--set")
    message = refused(*words, "class_conditional=true")
    assert "the data has no classes" in message
    assert "class_conditional=null" in message
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    message = refused(*words, "data.scan.max_broken_fraction=0.1")
    assert "1 of 9 images cannot be read" in message and "'broken.png'" in message and not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    explodes = ["--set", 'optimizer.schedule={"kind": "multistep", "milestones": [12], "gamma": 1e36}']
    message = one_line(train(tmp_path / "run", *explodes, "--set", "max_nonfinite_steps=4"))
    assert "step 17: the loss or its gradient is not finite, the 4th time in a row" in message
    assert "the last checkpoint is of step 10, from before" in message
    checkpoint, passed = newest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "step_00000010" and not passed


EXPLODES = (
    "--set",
    'optimizer.schedule={"kind": "multistep", "milestones": [1], "gamma": 1e36}',
    "--set",
    "preview.every=null",
)


def test_a_loss_that_is_not_finite_before_there_is_a_checkpoint(tmp_path: Path) -> None:
    message = one_line(train(tmp_path / "run", *EXPLODES, "--set", "max_nonfinite_steps=2"))
    assert "there is no checkpoint yet: lower optimizer.lr or set optimizer.clip, and run it again" in message
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_stop_in_a_step_that_is_not_saved_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run that goes on, whose checkpoint is its first one."""
    send = StepGate.send

    def asks(gate: StepGate, step: int, finite: torch.Tensor) -> None:
        gate.request.requested = step >= 6
        send(gate, step, finite)

    monkeypatch.setattr(StepGate, "send", asks)
    for saves, expected in (
        ("null", "there is no checkpoint yet: the same command starts anew"),
        ("1", "the last checkpoint is of step"),
    ):
        words = (SCRIPT, "-cfg", SMOKE, "--run-dir", tmp_path / saves, "--set", f"checkpoint.every={saves}", *EXPLODES)
        with pytest.raises(AssertionError):  # status 1: it was stopped
            run_in_process(*words)
        last_line = (tmp_path / saves / "log.txt").read_text().splitlines()[-1]
        assert ", whose gradients were not finite, so it was not saved" in last_line and expected in last_line
        assert json.loads((tmp_path / saves / "status.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"MASTER_ADDR": "127.0.0.1"}], ids=str)
def test_processes_that_accelerate_did_not_see(tmp_path: Path, variables: dict) -> None:
    message = one_line(train(tmp_path / "run", **variables))
    assert "WORLD_SIZE" in message and not (tmp_path / "run").exists()


def test_accelerate_launch_on_a_cpu_is_refused_when_it_starts_one_of_two(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", SCRIPT, "-cfg", SMOKE,
         "--run-dir", str(tmp_path / "run")], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "error: the launcher set MASTER_ADDR but no WORLD_SIZE" in done.stderr
    assert "python -m torch.distributed.run --standalone --nproc-per-node 2" in done.stderr


def test_a_disk_that_is_full_while_saving(tmp_path: Path) -> None:
    constant = ["--set", 'optimizer.schedule={"kind": "constant"}']
    assert train(tmp_path / "run", *constant, "--set", "steps=10").status == 0
    done = train(tmp_path / "run", *constant, "--set", "steps=20", limit=(resource.RLIMIT_FSIZE, 300_000))
    assert one_line(done).startswith("error: the disk is full")
    checkpoint, passed = newest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "step_00000010" and not passed
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000010"]


def test_out_of_memory(tmp_path: Path) -> None:
    large = [
        "--set",
        "image.size=256",
        "--set",
        "batch_size=256",
        "--set",
        "micro_batch_size=256",
        "--set",
        "data.count=16",
    ]
    done = train(tmp_path / "run", *large, "--set", "held_out=0.0", limit=(resource.RLIMIT_AS, 4_000_000_000))
    assert done.status == 2 and "Traceback" not in done.err, done.err
    assert "error: out of memory at micro_batch_size 256; try --set micro_batch_size=128" in done.err


def test_stopped_as_launchers_do_with_loader_workers(tmp_path: Path) -> None:
    """A launcher sends SIGTERM to the whole group, the loader's workers among it."""
    for i in range(40):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (30, 24), (6 * i, 100, 200)).save(tmp_path / "data" / f"{i}.png")
    folder = ["--set", "data.source=folder", "--set", f"data.path={tmp_path / 'data'}", "--set", "workers=2"]
    with subprocess.Popen(
        command(1, *kills.arguments(tmp_path / "run", *folder)), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("step 6/"):
                os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 1 and "stopped at step" in output and "Traceback" not in output, output
    assert newest(tmp_path / "run" / "checkpoints")[0] is not None


def test_a_run_that_goes_bad_keeps_the_checkpoints_from_before(tmp_path: Path) -> None:
    explodes = ["--set", 'optimizer.schedule={"kind": "multistep", "milestones": [9], "gamma": 1e36}']
    one_line(train(tmp_path / "run", *explodes, "--set", "checkpoint.every=2", "--set", "preview.every=null"))
    checkpoint_names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoint_names == [f"step_{n:08d}" for n in (4, 6, 8, 10)], "step 10 was the last that counted"
    assert all(line["loss"] is None or line["loss"] < 1e30 for line in metrics(tmp_path / "run"))


def test_a_mistake_on_two_processes_is_one_line_of_ours(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "--set", "data.source=folder", "--set", "data.path=/nowhere", processes=2)
    assert done.status != 0
    assert done.err.count("data folder /nowhere does not exist") == 1, done.err


def test_a_flat_folder_turns_a_config_with_classes_into_one_without(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (20, 20), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    quick = ["--set", "steps=2", "--set", "preview.sampler.guidance=2.0", "--set", "preview.num_samples=2"]
    done = train(tmp_path / "run", "--set", "data.source=folder", "--set", f"data.path={tmp_path}", *quick)
    assert done.status == 0 and "in no classes" in done.out, done.all


# ---------------------------------------------------------------------------------------------- the other script


def test_prepare_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "a" / "broken.jpg").write_bytes(b"no")
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "images")
    done = run_in_process("prepare_data.py", "unpack", archive, "--out", tmp_path / "data")
    assert done.status == 0 and "unpacked 7 files" in done.out, done.all
    run_here("prepare_data", "check", tmp_path / "data", "--sheet", tmp_path / "sheet.png")
    output = capsys.readouterr().out
    assert "6 images" in output and "not an image" in output and (tmp_path / "sheet.png").exists()
    run_here("prepare_data", "check", tmp_path / "data", "--json")
    assert json.loads(capsys.readouterr().out)["classes"] == {"a": 3, "b": 3}
    run_here("prepare_data", "pack", tmp_path / "data", "--size", "16", "--out", tmp_path / "packed")
    assert "packed 6 images" in capsys.readouterr().out
    packed = ["--set", "data.source=packed", "--set", f"data.path={tmp_path / 'packed'}", "--set", "held_out=0.0"]
    packed += ["--set", "preview.quality=null"]
    assert "6 images in 2 classes" in train(tmp_path / "run", *packed, "--set", "steps=2").out
    assert "exists" in refused("prepare_data", "pack", tmp_path / "data", "--size", "16", "--out", tmp_path / "packed")
    assert "no such archive" in refused("prepare_data", "unpack", tmp_path / "none.zip")
    assert "1 of 7" in refused("prepare_data", "check", tmp_path / "data", "--max-broken-fraction", "0")
