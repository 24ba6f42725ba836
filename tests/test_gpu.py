"""What only a GPU shows; skipped without one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from src.data.latents import LatentSet
from src.runtime.seeds import normal
from tests import kills
from tests.conftest import SMOKE, launch, metrics
from tests.kills import settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_smoke_run_learns_in_each_precision(tmp_path: Path, precision: str) -> None:
    done = launch("ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", tmp_path / "run", "--set", f"mixed_precision={precision}")
    assert done.status == 0 and "x cuda x" in done.out, done.all
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.85 * lines[0]["loss"]


def test_a_deterministic_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    arguments = ["--set", "deterministic=true", "--set", 'optimizer.schedule={"kind": "constant"}']
    weights = []
    for stops in ([20], [10, 20]):
        run = tmp_path / str(len(stops))
        for steps in stops:
            done = launch("ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", run, *arguments, "--set", f"steps={steps}")
            assert done.status == 0, done.all
        weights.append(load_file(run / "checkpoints" / "step_00000020" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_noise_on_the_device_is_a_function_of_its_words() -> None:
    device = torch.device("cuda")
    one, two = (normal((1000,), 0, "noise", step, device=device, dtype=torch.float32) for step in (1, 2))
    assert torch.equal(one, normal((1000,), 0, "noise", 1, device=device, dtype=torch.float32))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_latent_pipeline_learns_and_keeps_its_cache_on_the_device(tmp_path: Path, precision: str) -> None:
    arguments = ["--set", f"mixed_precision={precision}"]
    done = launch("train_vae.py", "-cfg", "configs/smoke/vae.json", "--run-dir", tmp_path / "vae", *arguments)
    assert done.status == 0 and "x cuda x" in done.out, done.all
    lines = [line for line in metrics(tmp_path / "vae") if "held_out_l1" in line]
    assert lines[-1]["held_out_l1"] < 0.8 * lines[0]["held_out_l1"]
    named = ["--set", f"autoencoder={tmp_path / 'vae'}"]
    done = launch("train_ldm.py", "-cfg", "configs/smoke/ldm.json", "--run-dir", tmp_path / "ldm", *named, *arguments)
    assert done.status == 0 and "x cuda x" in done.out, done.all
    assert metrics(tmp_path / "ldm")[-1]["loss"] < 0.95 * metrics(tmp_path / "ldm")[0]["loss"]
    latents = LatentSet([torch.randn(5, 2, 2, 4, 8, 8).numpy()], torch.device("cuda"))
    latents.load_to_device()
    indices, mirrored = np.array([4, 0]), np.array([True, False])
    assert latents.resident is not None and latents.moments(indices, mirrored).is_cuda
    mapped = LatentSet(latents.blocks, torch.device("cuda"))
    assert torch.equal(latents.moments(indices, mirrored), mapped.moments(indices, mirrored))


def test_learned_variance_times_by_the_second_moment_and_a_classifier_that_guides(tmp_path: Path) -> None:
    for job in (kills.GUIDED, kills.CLASSIFIER):
        arguments = settings(mixed_precision="bf16", compile=True, checkpoint__every=40)
        done = launch(*job.arguments(tmp_path / job.script), *arguments, timeout=900)
        assert done.status == 0 and "x cuda x" in done.out, done.all
        lines = metrics(tmp_path / job.script)
        assert lines[-1]["loss"] < lines[0]["loss"]
    guided = ("--guidance-method", "classifier", "--classifier", tmp_path / kills.CLASSIFIER.script, "--guidance", "2")
    run, out = tmp_path / kills.GUIDED.script, tmp_path / "out"
    done = launch("sample.py", run, *guided, "--solver", "ancestral", "--steps", "10", "--out", out)
    assert done.status == 0 and (out / "grid.png").exists(), done.all
    done = launch("evaluate.py", run, "--likelihood", "--steps", "10", "--out", tmp_path / "bits")
    assert done.status == 0 and "bits per dimension" in done.out, done.all
    words = ("--features", "efficientnet_lite0", "--num-samples", "64", "--num-images", "64", "--steps", "5")
    done = launch("evaluate.py", run, *words, "--out", tmp_path / "quality")
    assert done.status == 0 and "Fréchet distance" in done.out, done.all


def test_blending_images_points_and_pairs_on_a_gpu(tmp_path: Path) -> None:
    for job, arguments in ((kills.BLEND, settings(mixed_precision="bf16", checkpoint__every=40)), (kills.POINTS, ())):
        done = launch(*job.arguments(tmp_path / job.config), *arguments, timeout=900)
        assert done.status == 0 and "x cuda x" in done.out, done.all
        lines = metrics(tmp_path / job.config)
        assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["straightness"] >= 0
    first = str(tmp_path / kills.POINTS.config)
    pairs = settings(pairs={"run": first, "count": 2000, "sampler": {"solver": "heun", "steps": 8}}, init_from=first)
    done = launch(*kills.POINTS.arguments(tmp_path / "straight"), *pairs, timeout=900)
    assert done.status == 0, done.all
    assert metrics(tmp_path / "straight")[-1]["straightness"] < metrics(Path(first))[-1]["straightness"]


def test_the_doctor_finds_these_gpus_sound() -> None:
    done = launch("doctor.py", "--json")
    rows = {row["name"]: row for row in json.loads(done.out)}
    assert rows["devices"]["status"] in ("pass", "warn") and "CPU" not in rows["devices"]["found"]
    proof = ("arithmetic", "gradients", "ten steps", "resume")
    together = {"pass"} if torch.cuda.device_count() > 1 else {"pass", "skip"}
    assert {rows[name]["status"] for name in proof} <= together, done.out


def test_a_dry_run_looks_for_the_largest_micro_batch_and_a_run_verifies_that_it_resumes(tmp_path: Path) -> None:
    words = ("ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", tmp_path / "run")
    done = launch(*words, "--dry-run")
    assert done.status == 0 and "micro_batch_size up to 16 = batch_size" in done.out, done.all
    done = launch("train_vae.py", "-cfg", "configs/smoke/vae.json", "--run-dir", tmp_path / "run", "--dry-run")
    assert done.status == 0 and "stages.3.micro_batch_size up to 8 = batch_size" in done.out, done.all
    done = launch(*words, "--verify-resume")
    assert done.status == 0 and "bit-equal" in done.out, done.all
    assert not list(tmp_path.iterdir())
