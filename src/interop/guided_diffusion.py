"""Checkpoints of guided-diffusion and improved-diffusion as our networks and process, and the names of their modules.

What the shapes of the weights say is read from them. What they do not say (the heads, the schedule, the size of the images) is
in the flags of the command that trained the checkpoint, or, for a published file, in `guided_flags`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError, prefix_errors
from ..models import Classifier, ClassifierConfig, UNet, UNetConfig, build_model
from ..runs.diffusers_autoencoder import names_inside
from ..storage.networks import GUIDED, few, find_network
from ..storage.weight_files import read_file
from .guided_flags import model_config, process_config, read_flags, resolve
from .guided_shapes import read_shapes
from .imported import Imported
from .names import rename_state

# The names inside a residual block, an attention and a resampling: ours -> guided-diffusion's.
INSIDE = {"norm_1": "in_layers.0", "conv_1": "in_layers.2", "embed": "emb_layers.1", "norm_2": "out_layers.0"}
INSIDE |= {"conv_2": "out_layers.3", "skip": "skip_connection", "norm": "norm", "qkv": "qkv", "out": "proj_out", "conv": "op"}
OUTSIDE = {"time_in": "time_embed.0", "time_out": "time_embed.2", "label_embedding": "label_emb", "stem": "input_blocks.0.0"}
POOLS = {
    "adaptive": {"head_norm": "out.0", "head": "out.3"},
    "attention": {"head_norm": "out.0", "head": "out.2", "head.qkv": "out.2.qkv_proj", "head.out": "out.2.c_proj"},
    "spatial": {"head.0": "out.0", "head.2": "out.2"},
}


def module_names(config: UNetConfig | ClassifierConfig) -> dict[str, str]:
    """Our module names -> guided-diffusion's, for every module that holds parameters."""
    levels, per_level = range(len(config.channel_mult)), [f"blocks.{i}" for i in range(config.blocks + 1)]
    blocks = {"mid.0": "middle_block"}
    down = (f"down.{level}.{part}" for level in levels for part in (*per_level[:-1], "resample"))
    blocks |= {ours: f"input_blocks.{k}" for k, ours in enumerate(down, 1)}
    up = (f"up.{level}.{part}" for level in levels for part in per_level)
    blocks |= {ours: f"output_blocks.{k}" for k, ours in enumerate(up)}
    places = {"mid.1.residual": f"middle_block.{1 if config.mid_attention == 'none' else 2}"}
    for ours, theirs in blocks.items():
        is_block = not ours.endswith("resample")
        places |= {f"{ours}.residual": f"{theirs}.0", f"{ours}.attention": f"{theirs}.1"} if is_block else {ours: f"{theirs}.0"}
    names = OUTSIDE | names_inside(places, INSIDE)
    if isinstance(config, ClassifierConfig):
        return names | POOLS[config.pool]
    resampling = {}
    for level, kind in enumerate(reversed(config.attention)):  # the last block of a level resamples, too
        block = f"output_blocks.{(level + 1) * (config.blocks + 1) - 1}"
        resampling[f"up.{level}.resample"] = f"{block}.{1 if kind == 'none' else 2}"
    return names | {"head_norm": "out.0", "head": "out.2"} | names_inside(resampling, INSIDE | {"conv": "conv"})


def read_weights(path: str | Path, which: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of the network in a file, and notes on what was taken and left out; see `find_network`. A note says, too,
    where by the file's name an average of its weights is beside it."""
    state_dict, notes = find_network(read_file(path), GUIDED, path, which=which)
    if any(".transformer_blocks." in name for name in state_dict):
        raise UserError(
            f"{path}: the network is a U-Net of latent-diffusion, whose attention reads a text; what can be read is one of "
            "guided- or improved-diffusion, with labels or without"
        )
    raw = re.fullmatch(r"model(\d+)\.pt", Path(path).name)
    averages = sorted(other.name for other in Path(path).parent.glob(f"ema_*_{raw[1]}.pt")) if raw is not None else []
    if averages:
        notes.append(f"these are raw weights; an average (EMA) is beside them: {few(averages)}")
    return state_dict, notes


def read(path: str | Path, flags: Mapping[str, Any] | str | Path | None = None, *, which: str | None = None) -> Imported:
    """A guided- or improved-diffusion checkpoint, U-Net or classifier, with all that sampling needs. `flags` are
    guided-diffusion's, or a JSON file of them; a published file needs none. `which` chooses one of several networks in the
    file, as `find_network` says. A UserError says what is missing, what contradicts the weights, or why the file is no such
    checkpoint."""
    given = None if flags is None else read_flags(flags)
    state_dict, weight_notes = read_weights(path, which)
    with prefix_errors(str(path)):
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        architecture = read_shapes(shapes, (given or {}).get("classifier_depth"))
        size, facts, notes = resolve(architecture, given)
        model = model_config(architecture, facts)
        channels, classes = architecture.channels, architecture.num_classes
        with torch.device("meta"):
            if isinstance(model, ClassifierConfig):
                network = Classifier(model, in_channels=channels, image_size=size, num_classes=classes or 0)
            else:
                options = {"learned": architecture.learn_sigma, "null_class": False}
                beside = channels if architecture.upsampler else 0
                network = build_model(model, (channels, size, size), classes, condition_channels=beside, **options)
                assert isinstance(network, UNet)
        network.load_state_dict(rename_state(network, state_dict, module_names(model)), assign=True)
        process = process_config(facts)
    return Imported(
        network=network.eval(),
        process=process,
        image_size=size,
        channels=channels,
        low_resolution=facts.get("small_size"),
        notes=(*weight_notes, *notes),
    )
