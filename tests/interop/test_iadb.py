"""IADB checkpoints: the weights, what their shapes say, and what cannot be read."""

import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from src.config import validate
from src.diffusion import ProcessConfig
from src.interop.iadb import PROCESS, architecture, read
from src.interop.iadb_yaml import YamlFacts
from src.interop.unet_2d import unet_config
from src.models import UNet
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))
from tests.interop.iadb_checkpoints import lightning, same_output, saved, under, unet2d

OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for new, old in OLD.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize(
    "how", ["bare", "old", "lightning", "ema", "old_ema", "module", "compiled", "safetensors", "half", "nested"]
)
def test_a_checkpoint_gives_the_same_output_as_in_diffusers(tmp_path: Path, how: str) -> None:
    theirs = unet2d()
    state, path = theirs.state_dict(), tmp_path / "last.ckpt"
    other = {name: tensor + 1 for name, tensor in state.items()}
    averaged = under("model.", other) | under("ema.online_model.", other)
    if how in ("old_ema", "old"):
        state = old_names(state)
    averaged |= under("ema.ema_model.", state) | {"ema.initted": torch.tensor(True), "ema.step": torch.tensor(7)}
    frozen = {"vae.encoder.conv_in.weight": torch.zeros(2), "loss.weight": torch.ones(1), "vae.decoder.x": torch.zeros(1)}
    content: Any = {
        "bare": state,
        "old": state,
        "lightning": lightning(under("model.", state) | frozen),
        "ema": lightning(averaged),
        "old_ema": lightning(averaged),
        "module": under("module.", state),
        "compiled": lightning(under("model._orig_mod.module.", state)),
        "safetensors": state,
        "half": {name: tensor.half() for name, tensor in state.items()},
        "nested": {"model": other, "model_ema": state, "step": 3},
    }[how]
    if how == "safetensors":
        path = tmp_path / "cats64.safetensors"
        safetensors.torch.save_file(content, path)
    else:
        saved(path, content)
    imported = read(path, image_size=8)
    if how == "half":
        theirs.load_state_dict({name: tensor.float() for name, tensor in content.items()})
    same_output(imported, theirs)
    assert (imported.image_size, imported.channels, imported.network.num_classes, imported.autoencoder) == (8, 3, None, None)
    assert imported.process == validate(ProcessConfig, PROCESS) and imported.script == "train_iadb.py"
    notes = "\n".join(imported.notes)
    count = len(state)
    expected = {
        "lightning": [f"{count} tensors under model.", "vae (2)", "loss (1)"],
        "ema": ["under ema.ema_model., an average (EMA), and not those under model.", f"model ({count})", "ema (2)"],
        "compiled": [f"{count} tensors under model._orig_mod.module."],
        "nested": ["under model_ema., an average (EMA), and not those under model.", f"model ({count})"],
    }.get(how, [])
    assert all(words in notes for words in expected), notes
    assert ("left out" in notes) == (how in ("lightning", "ema", "old_ema", "nested")), notes


NETWORKS: dict[str, dict[str, Any]] = {
    "grey": {"in_channels": 1, "out_channels": 1},
    "classes": {"num_class_embeds": 3},
    "no_mid_attention": {"add_attention": False},
    "residual": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
    },
    "deeper": {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    },
    "one_level": {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_shapes_say_the_architecture(tmp_path: Path, name: str) -> None:
    theirs = unet2d(**NETWORKS[name])
    imported = read(saved(tmp_path / "a.pt", theirs.state_dict()), image_size=8)
    same_output(imported, theirs)
    assert imported.network.num_classes == theirs.config.num_class_embeds and imported.channels == theirs.config.in_channels


def test_the_network_of_the_paper_by_its_shapes() -> None:
    from diffusers import UNet2DModel

    down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
    down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    with torch.device("meta"):
        theirs = UNet2DModel(
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            add_attention=True,
        )
        config, notes = architecture({name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}, YamlFacts())
        ours = UNet(unet_config(config), in_channels=3, out_channels=3)
    assert (config["down_block_types"], config["up_block_types"]) == (down, up)
    assert "attention_head_dim 8, norm_num_groups 32, norm_eps 1e-05" in notes[-1]
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (ours, theirs)]
    assert counts[0] == counts[1] and 113e6 < counts[0] < 114e6
    assert ours.config.factor == 32
