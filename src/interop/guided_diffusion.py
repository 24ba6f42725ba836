"""guided-diffusion's U-Nets (and improved-diffusion's): their flags and state dicts as our network and process."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError, read_json
from ..diffusion import Process, ProcessConfig, TimeInput, build_process
from ..diffusion.schedules import BetaSchedule, CosineSchedule
from ..models import UNet, UNetConfig

RESIDUAL = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",
    "embed": "emb_layers.1",
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}


def module_names(config: UNetConfig) -> dict[str, str]:
    """Our module names -> guided-diffusion's, for every module that holds parameters."""
    names = {"time_in": "time_embed.0", "time_out": "time_embed.2", "label_embedding": "label_emb"}
    names |= {"stem": "input_blocks.0.0", "head_norm": "out.0", "head": "out.2"}

    def residual(ours: str, theirs: str) -> None:
        names.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESIDUAL.items()})

    def block(ours: str, theirs: str, first: int = 0) -> None:
        residual(f"{ours}.residual", f"{theirs}.{first}")
        names.update({f"{ours}.attention.{a}": f"{theirs}.{first + 1}.{b}" for a, b in ATTENTION.items()})

    last = len(config.channel_mult) - 1
    at = 1
    for level in range(last + 1):
        for i in range(config.blocks):
            block(f"down.{level}.blocks.{i}", f"input_blocks.{at}")
            at += 1
        if level < last:
            residual(f"down.{level}.resample", f"input_blocks.{at}.0")
            names[f"down.{level}.resample.conv"] = f"input_blocks.{at}.0.op"
            at += 1
    block("mid.0", "middle_block")
    residual("mid.1.residual", f"middle_block.{1 if config.mid_attention == 'none' else 2}")
    at = 0
    for stage, level in enumerate(reversed(range(last + 1))):
        for i in range(config.blocks + 1):
            block(f"up.{stage}.blocks.{i}", f"output_blocks.{at}")
            at += 1
        if level > 0:
            resample = f"output_blocks.{at - 1}.{1 if config.attention[level] == 'none' else 2}"
            residual(f"up.{stage}.resample", resample)
            names[f"up.{stage}.resample.conv"] = f"{resample}.conv"
    return names


def rename(network: UNet, state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Another project's state dict under our parameter names, reshaped where only trailing 1s differ.

    `names` maps our module names to theirs. A UserError says which keys differ, the first five.
    """
    ours = {key: (names.get(key.rpartition(".")[0], "?") + "." + key.rpartition(".")[2]) for key in network.state_dict()}
    missing = sorted(set(ours.values()) - set(state))
    extra = sorted(set(state) - set(ours.values()))
    if missing or extra:
        parts = [f"{word} {', '.join(keys[:5])}" for word, keys in (("lacks", missing), ("has in excess", extra)) if keys]
        raise UserError(f"the checkpoint is of another architecture: it {' and '.join(parts)}")
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    renamed = {}
    for key, theirs in ours.items():
        tensor = state[theirs]
        if [n for n in tensor.shape if n != 1] != [n for n in shapes[key] if n != 1]:
            raise UserError(
                f"the checkpoint is of another architecture: {theirs} is {tuple(tensor.shape)}, "
                f"this network wants {tuple(shapes[key])}"
            )
        renamed[key] = tensor.reshape(shapes[key]).float()
    return renamed


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def unet_config(flags: dict[str, Any]) -> UNetConfig:
    """guided-diffusion's flags as our architecture."""
    default_mult = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4", 32: "1,2,2,2"}
    size = flags["image_size"]
    mult = _numbers(flags.get("channel_mult") or default_mult.get(size, "1,2,3,4"))
    factors = {size // resolution for resolution in _numbers(flags["attention_resolutions"])}
    if flags.get("num_heads_upsample", -1) not in (-1, flags["num_heads"]):
        raise UserError("num_heads_upsample other than num_heads is not supported")
    by_channels = flags.get("num_head_channels", -1) != -1
    residual = flags.get("resblock_updown", False)
    return UNetConfig(
        base_channels=flags["num_channels"],
        channel_mult=tuple(mult),
        blocks=flags["num_res_blocks"],
        attention=tuple("full" if 2**level in factors else "none" for level in range(len(mult))),
        num_heads=None if by_channels else flags["num_heads"],
        head_channels=flags["num_head_channels"] if by_channels else None,
        split_qkv_first=flags.get("use_new_attention_order", False),
        embedding="scale_shift" if flags.get("use_scale_shift_norm", False) else "add",
        downsample="residual" if residual else "conv",
        upsample="residual" if residual else "conv",
        dropout=float(flags.get("dropout", 0.0)),
    )


def process_from_flags(flags: dict[str, Any]) -> Process:
    """guided-diffusion's flags as our process."""
    steps = flags["diffusion_steps"]
    if flags["noise_schedule"] == "cosine":
        schedule = CosineSchedule(kind="cosine", steps=steps)
    elif flags["noise_schedule"] == "linear":
        schedule = BetaSchedule(kind="linear", steps=steps, rescale_betas=True)
    else:
        raise UserError(f"noise_schedule {flags['noise_schedule']!r} is not known; allowed: linear, cosine")
    fixed = "small" if flags.get("sigma_small", False) else "large"
    return build_process(
        ProcessConfig(
            schedule=schedule,
            target="x0" if flags.get("predict_xstart", False) else "eps",
            variance="learned" if flags.get("learn_sigma", False) else fixed,
            time_input=TimeInput(scale=1000 / steps if flags.get("rescale_timesteps", False) else 1.0),
        )
    )


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Another project's state dict, read without running anything in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a state dict that can be read safely ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict of tensors")
    return state


def load(path: str | Path, flags: dict[str, Any] | str | Path) -> tuple[UNet, Process]:
    """A guided-diffusion U-Net checkpoint as (network, process); `flags` are guided-diffusion's own, or a JSON file of them."""
    if not isinstance(flags, dict):
        found: dict[str, Any] = read_json(flags)
        flags = found.get("flags", found)
    assert isinstance(flags, dict)
    state = read_state(path)
    config = unet_config(flags)
    classes = len(state["label_emb.weight"]) if "label_emb.weight" in state else None
    stem, head = state.get("input_blocks.0.0.weight"), state.get("out.2.weight")
    if stem is None or head is None:
        raise UserError(f"{path}: not a guided-diffusion U-Net: it lacks input_blocks.0.0.weight or out.2.weight")
    network = UNet(config, in_channels=stem.shape[1], out_channels=head.shape[0], num_classes=classes, null_class=False)
    network.load_state_dict(rename(network, state, module_names(config)))
    return network.eval(), process_from_flags(flags)
