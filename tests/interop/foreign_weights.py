"""Weights and folders as other programs leave them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.config import UserError
from tests.conftest import randomise

CPU = torch.device("cpu")
THEIRS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
WEIGHTS = "diffusion_pytorch_model"


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.clone() for name, tensor in state.items()}


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def message(what: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        what(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def plus(state: dict[str, Tensor], offset: float = 1.0) -> dict[str, Tensor]:
    return {name: tensor + offset for name, tensor in state.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(4.0)}}, "param_groups": [{"lr": 1e-4}]}


def unet_folder(folder: Path, **options: Any) -> dict[str, Tensor]:
    from diffusers import UNet2DModel

    theirs = UNet2DModel(**{**THEIRS, **options})
    randomise(theirs)
    theirs.save_pretrained(folder)
    return theirs.state_dict()


def stem(imported: Any) -> Tensor:
    return imported.network.state_dict()["stem.weight"]
