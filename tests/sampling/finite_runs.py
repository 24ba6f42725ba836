"""Runs whose weights or samples are not finite, for several tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from src.config import read_json, validate
from src.diffusion import ProcessConfig
from src.interop.imported import Imported, keep
from src.models import UNet, UNetConfig
from src.runtime.checkpoint import read_tensors, write_folder
from tests.conftest import Finished, randomise, run_in_process

CPU = torch.device("cpu")
MODEL = {"base_channels": 8, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "none"], "norm_groups": 4}
MODEL |= {"mid_attention": "none"}
PROCESS = {"schedule": {"kind": "linear", "steps": 100, "rescale_betas": True}, "target": "eps", "clip": False}


def a_run(folder: Path, change: Callable[[dict[str, Tensor]], Any] = lambda weights: None, **process: Any) -> Path:
    """The final folder of a small run of 8 px, its weights changed."""
    model = validate(UNetConfig, MODEL)
    network = UNet(model, in_channels=3)
    randomise(network)
    keep(Imported(network, validate(ProcessConfig, {**PROCESS, **process}), 8, 3), folder, name="small")
    weights = read_tensors(folder, "ema")
    change(weights)
    documents = {name: read_json(folder / f"{name}.json") for name in ("config", "data")}
    write_folder(folder, {"ema": weights}, {**documents, "progress": {"step": 70}})
    return folder


def holes(name: str, value: float = float("nan")) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[0] = value

    return change


def blown(weights: dict[str, Tensor]) -> None:
    """Weights that are finite, and outputs that are not."""
    weights["head.weight"].fill_(3e38)


def images(folder: Path, count: int = 12, size: int = 8) -> Path:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def smoke(run: Path, *changes: str) -> Finished:
    sets = ["steps=4", "checkpoint.every=2", "preview.every=2", "log.every=1", "preview.num_samples=2", "preview.quality=null"]
    arguments = [word for key in (*sets, *changes) for word in ("--set", key)]
    return run_in_process("ddpm_accelerate.py", "-cfg", "configs/smoke/ddpm.json", "--run-dir", run, *arguments)
