"""Checkpoints of IADB with networks of diffusers."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.interop.imported import Imported
from tests.conftest import ROOT, randomise

sys.path.insert(0, str(ROOT))


SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}


def unet2d(scale: float = 0.15, **options: Any) -> Any:
    """Diffusers' own network, every weight of it from a normal."""
    from diffusers import UNet2DModel

    return randomise(UNet2DModel(**{**SMALL, **options}), scale).eval()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.clone() for name, tensor in state.items()}


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    """What Lightning's Trainer saves around a state dict."""
    return {
        "epoch": 131,
        "global_step": 415486,
        "pytorch-lightning_version": "2.0.2",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 132}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "best_model_score": None}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"batch_size": 64, "learning_rate": 1e-4},
    }


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def same_output(imported: Imported, theirs: Any, side: int = 8) -> None:
    x, alpha = torch.randn(3, theirs.config.in_channels, side, side), torch.tensor([0.0, 0.3, 1.0])
    labels = torch.tensor([0, 1, 2]) if theirs.config.num_class_embeds else None
    with torch.no_grad():
        reference = theirs(x, alpha, class_labels=labels).sample
        ours = imported.network(x, alpha, labels)
    assert reference.std() > 0.1
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


FULL = """
resolution: 8
channels: [32, 64]
attention: [1]
vae_latents: false
"""


def change(theirs: Any, **changed: Tensor | None) -> dict[str, Any]:
    state = {**theirs.state_dict(), **{name.replace("__", "."): tensor for name, tensor in changed.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}
