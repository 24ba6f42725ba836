"""diffusers' UNet2DModel and its folders, both ways, by a map of key names; its AutoencoderKL behind the interface of ours."""

import difflib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor

from ..config import UserError, dump, validate
from ..data.names import shown
from ..diffusion import ProcessConfig
from ..diffusion.process import time_input_for
from ..diffusion.schedules import BetaSchedule, BlendScheduleConfig
from ..models import UNet, UNetConfig
from ..models.layers import Attention
from ..runs.diffusers_autoencoder import ATTENTION, RESIDUAL, VERSION, WEIGHTS
from ..storage.files import write_flushed
from ..storage.weights import (
    UNET_2D,
    few,
    find_files,
    find_network,
    from_hub,
    hub_name_of_url,
    is_hub_name,
    present_names,
    rank,
    read_files,
    read_foreign_json,
)
from .guided_diffusion import multiple, rename
from .imported import Imported

# ---------------------------------------------------------------------------------------------- the network


# The attention of a block, and how it resamples: None is what downsample_type and upsample_type say.
DOWN = {"DownBlock2D": ("none", "conv"), "AttnDownBlock2D": ("full", None), "ResnetDownsampleBlock2D": ("none", "resnet")}
UP = {"UpBlock2D": ("none", "conv"), "AttnUpBlock2D": ("full", None), "ResnetUpsampleBlock2D": ("none", "resnet")}


def unet_config(theirs: Mapping[str, Any]) -> UNetConfig:
    """The `config.json` of a UNet2DModel as our architecture; a UserError names what we have no option for."""

    def only(key: str, *allowed: Any) -> Any:
        value = theirs.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"UNet2DModel with {key}={value!r} is not supported; allowed: {allowed}")
        return value

    only("time_embedding_type", "positional")
    only("center_input_sample", False)
    only("mid_block_type", "UNetMidBlock2D")
    only("mid_block_scale_factor", 1)
    only("act_fn", "silu", "swish")
    only("class_embed_type", None)
    widths, groups = list(theirs["block_out_channels"]), theirs.get("norm_num_groups", 32)
    only("time_embedding_dim", None, 4 * widths[0])
    scale_shift = only("resnet_time_scale_shift", "default", "scale_shift") == "scale_shift"
    mid_attention = theirs.get("add_attention", True)
    if mid_attention and scale_shift and theirs.get("attn_norm_num_groups") is None:
        raise UserError("UNet2DModel with scale_shift and add_attention has an attention without norm: not supported")
    if mid_attention:
        only("attn_norm_num_groups", None, groups)

    down, up = list(theirs["down_block_types"]), list(reversed(theirs["up_block_types"]))
    last = len(widths) - 1
    if any(kind not in DOWN for kind in down) or any(kind not in UP for kind in up) or not len(down) == len(up) == last + 1:
        raise UserError(f"UNet2DModel with blocks {down} and {up[::-1]} is not supported; allowed: {', '.join([*DOWN, *UP])}")
    attention = [DOWN[kind][0] for kind in down]
    if attention != [UP[kind][0] for kind in up]:
        raise UserError(f"UNet2DModel with blocks {down} and {up[::-1]} is not supported: attention differs down and up")
    type_down, type_up = only("downsample_type", "conv", "resnet"), only("upsample_type", "conv", "resnet")
    ways_down = {DOWN[kind][1] or type_down for kind in down[:last]} or {type_down}
    ways_up = {UP[kind][1] or type_up for kind in up[1:]} or {type_up}
    if len(ways_down) > 1 or len(ways_up) > 1:
        raise UserError(f"UNet2DModel with blocks {down} and {up[::-1]} is not supported: they resample in different ways")
    downsample = "conv" if only("downsample_padding", 1, 0) == 1 else "conv_right"
    return validate(
        UNetConfig,
        {
            "base_channels": widths[0],
            "channel_mult": [multiple(widths[0], width) for width in widths],
            "blocks": theirs["layers_per_block"],
            "attention": attention,
            "mid_attention": "full" if mid_attention else "none",
            "head_channels": theirs.get("attention_head_dim", 8),
            "embedding": "scale_shift" if scale_shift else "add",
            "downsample": "residual" if ways_down == {"resnet"} else downsample,
            "upsample": "residual" if ways_up == {"resnet"} else "conv",
            "dropout": float(theirs.get("dropout", 0.0)),
            "norm_groups": groups,
            "norm_eps": float(theirs.get("norm_eps", 1e-5)),
            "time_embedding": {
                "order": "cos_sin" if theirs.get("flip_sin_to_cos", True) else "sin_cos",
                "frequency_shift": float(theirs.get("freq_shift", 0)),
            },
        },
        origin="this UNet2DModel as model",
    )


def unet2d_config(network: UNet, *, image_size: int) -> dict[str, Any]:
    """Our network as the `config.json` of a UNet2DModel for pictures of `image_size`: the inverse of `unet_config`.

    What UNet2DModel has not is a UserError that names the option. It has residual resampling (its blocks `Resnet...`) and,
    with `attn_norm_num_groups`, a middle attention beside scale_shift.
    """
    config = network.config
    assert isinstance(config, UNetConfig)

    def only(option: str, value: Any, *allowed: Any) -> None:
        if value not in allowed:
            words = " or ".join(str(word) for word in allowed)
            raise UserError(f"UNet2DModel has no model.{option} {value}; what can be exported has {words}")

    for kind in config.attention:
        only("attention", kind, "none", "full")
    only("mid_attention", config.mid_attention, "none", "full")
    only("downsample", config.downsample, "conv", "conv_right", "residual")
    only("upsample", config.upsample, "conv", "residual")
    only("time_embedding.scale", config.time_embedding.scale, 1.0)
    only("channel_mult[0]", config.channel_mult[0], 1)
    only("patch", config.patch, 1)
    sizes = sorted({width // config.heads(width) for width in config.attended})
    one_head = all(config.heads(width) == 1 for width in config.attended)
    if len(sizes) > 1 and not one_head:
        raise UserError(
            f"model.num_heads {config.num_heads} makes heads of {', '.join(map(str, sizes))} channels, and UNet2DModel has one "
            "size for all; what can be exported has model.head_channels"
        )
    scale_shift = config.embedding == "scale_shift"
    residual_down, residual_up = config.downsample == "residual", config.upsample == "residual"
    down = {"full": "AttnDownBlock2D", "none": "ResnetDownsampleBlock2D" if residual_down else "DownBlock2D"}
    up = {"full": "AttnUpBlock2D", "none": "ResnetUpsampleBlock2D" if residual_up else "UpBlock2D"}
    rows = network.label_embedding.num_embeddings if network.label_embedding is not None else None
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "add_attention": config.mid_attention == "full",
        "attention_head_dim": None if one_head else sizes[0],
        "attn_norm_num_groups": config.norm_groups if scale_shift and config.mid_attention == "full" else None,
        "block_out_channels": config.widths,
        "center_input_sample": False,
        "class_embed_type": None,
        "down_block_types": [down[kind] for kind in config.attention],
        "downsample_padding": 0 if config.downsample == "conv_right" else 1,
        "downsample_type": "resnet" if residual_down else "conv",
        "dropout": config.dropout,
        "flip_sin_to_cos": config.time_embedding.order == "cos_sin",
        "freq_shift": config.time_embedding.frequency_shift,
        "in_channels": network.stem.in_channels,
        "layers_per_block": config.blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_groups,
        "num_class_embeds": rows,
        "num_train_timesteps": None,
        "out_channels": network.head.out_channels,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "sample_size": image_size,
        "time_embedding_type": "positional",
        "up_block_types": [up[kind] for kind in reversed(config.attention)],
        "upsample_type": "resnet" if residual_up else "conv",
    }


def module_names(config: UNetConfig) -> dict[str, str]:
    """Our module names -> diffusers'; its to_q, to_k and to_v count as one `qkv`."""
    names = {"time_in": "time_embedding.linear_1", "time_out": "time_embedding.linear_2"}
    names |= {"label_embedding": "class_embedding", "stem": "conv_in", "head_norm": "conv_norm_out", "head": "conv_out"}

    def residual(ours: str, theirs: str) -> None:
        names.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESIDUAL.items()})

    def block(ours: str, theirs: str, i: int) -> None:
        residual(f"{ours}.residual", f"{theirs}.resnets.{i}")
        names.update({f"{ours}.attention.{a}": f"{theirs}.attentions.{i}.{b}" for a, b in ATTENTION.items()})

    for level in range(len(config.channel_mult)):
        for i in range(config.blocks):
            block(f"down.{level}.blocks.{i}", f"down_blocks.{level}", i)
        for i in range(config.blocks + 1):
            block(f"up.{level}.blocks.{i}", f"up_blocks.{level}", i)
        for ours, theirs in (("down", f"down_blocks.{level}.downsamplers.0"), ("up", f"up_blocks.{level}.upsamplers.0")):
            residual(f"{ours}.{level}.resample", theirs)
            names[f"{ours}.{level}.resample.conv"] = f"{theirs}.conv"
    block("mid.0", "mid_block", 0)
    block("mid.1", "mid_block", 1)
    return names


def _fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fused = present_names(state)
    for key in [key for key in fused if ".to_q." in key]:
        names = [key.replace(".to_q.", f".to_{part}.") for part in "qkv"]
        if all(name in fused for name in names):
            fused[key.replace(".to_q.", ".qkv.")] = torch.cat([fused.pop(name) for name in names])
    return fused


def unet_from_diffusers(theirs: Mapping[str, Any], state: Mapping[str, Tensor], *, null_class: bool = False) -> UNet:
    """A UNet2DModel, by its config and state dict, as our U-Net with the same output; with `null_class` the last of its
    classes is the one for no class."""
    config = unet_config(theirs)
    classes = theirs.get("num_class_embeds")
    network = UNet(
        config,
        in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"],
        num_classes=classes - null_class if classes is not None else None,
        null_class=null_class,
    )
    network.load_state_dict(rename(network, _fuse_qkv(state), module_names(config)))
    return network.eval()


def state_for_diffusers(network: UNet) -> dict[str, Tensor]:
    """The weights of our network under UNet2DModel's names, float32 on the CPU: the inverse of `unet_from_diffusers`."""
    assert isinstance(network.config, UNetConfig)
    names, state = module_names(network.config), {}
    attentions = {f"{name}.qkv": module for name, module in network.named_modules() if isinstance(module, Attention)}
    for key, value in network.state_dict().items():
        module, _, kind = key.rpartition(".")
        value = value.detach().to("cpu", torch.float32)
        if module in attentions:  # the order of its rows, (three heads d) or (heads three d), is a layout and no option
            layer = attentions[module]
            parts = rearrange(value, f"{layer.layout} ... -> three (heads d) ...", three=3, heads=layer.heads)
            owner = names[module].removesuffix("qkv")
            state |= {f"{owner}to_{name}.{kind}": part.contiguous() for name, part in zip("qkv", parts, strict=True)}
        else:
            state[f"{names[module]}.{kind}"] = value.contiguous()
    return state


# ---------------------------------------------------------------------------------------------- the process

BETAS = {"linear": "linear", "scaled_linear": "quadratic", "sigmoid": "sigmoid", "squaredcos_cap_v2": "cosine"}
TARGETS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}
DDPM_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
# How their sampler goes through the levels, which is no part of the process; `tensor_format` is a word of diffusers 0.1.
SAMPLING = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True, "tensor_format": "pt"}
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_SAMPLING = {
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}


def _named(table: Mapping[str, str], ours: str) -> str:
    return next(theirs for theirs, name in table.items() if name == ours)


def process_config(theirs: Mapping[str, Any], *, learned: bool) -> ProcessConfig:
    """A `scheduler_config.json` of DDPMScheduler, DDIMScheduler or FlowMatchEulerDiscreteScheduler as our process; `learned`
    says whether the network's output has channels for the variance. A UserError names key and value that we have nothing for.

    How the network was trained is not in it: a learned variance has the hybrid loss here. With the last of them a network
    predicts eps - x0: our `blend` is what its head gives negated.
    """
    if theirs.get("_class_name") == FLOW:
        return _flow_process(theirs, learned=learned)
    found = {**DDPM_DEFAULTS, **theirs}

    def refuse(key: str, allowed: str) -> UserError:
        return UserError(f"a scheduler with {key}={found[key]!r} is not supported; allowed: {allowed}")

    def ours(key: str, table: Mapping[str, str]) -> str:
        if found[key] not in list(table):
            raise refuse(key, ", ".join(table))
        return table[found[key]]

    if found.get("_class_name", "DDPMScheduler") not in ("DDPMScheduler", "DDIMScheduler"):
        raise refuse(
            "_class_name",
            f"DDPMScheduler, DDIMScheduler, {FLOW}; save the pipeline with the scheduler that it was trained with, such as "
            "DDPMScheduler.from_config(pipeline.scheduler.config)",
        )
    for key in found:
        if key not in DDPM_DEFAULTS and key not in SAMPLING and not key.startswith("_") and found[key] is not None:
            raise refuse(key, "to leave it out")
    if found["trained_betas"] is not None:
        raise refuse("trained_betas", "null, and a beta_schedule")
    if found["thresholding"]:
        raise refuse("thresholding", "false")
    if found["clip_sample"] and found["clip_sample_range"] != 1:
        raise refuse("clip_sample_range", "1.0")
    variance = ours("variance_type", VARIANCES)
    if (variance == "learned") != learned:
        raise refuse("variance_type", "learned_range with twice as many channels out as in, else fixed_small or fixed_large")
    kind = ours("beta_schedule", BETAS)
    betas = {} if kind == "cosine" else {"beta_start": found["beta_start"], "beta_end": found["beta_end"]}
    return validate(
        ProcessConfig,
        {
            "schedule": {
                "kind": kind,
                "steps": found["num_train_timesteps"],
                "zero_terminal_snr": found["rescale_betas_zero_snr"],
                **betas,
            },
            "target": ours("prediction_type", TARGETS),
            "variance": variance,
            "clip": found["clip_sample"],
            "loss": {"kind": "hybrid" if variance == "learned" else "simple"},
        },
        origin="this scheduler as process",
    )


def _flow_process(theirs: Mapping[str, Any], *, learned: bool) -> ProcessConfig:
    """That of a FlowMatchEulerDiscreteScheduler: x_t = (1 - t) x0 + t eps, and the network is fed t times its timesteps."""
    for key, value in theirs.items():
        known = key in FLOW_SAMPLING or key.startswith("_") or key == "num_train_timesteps"
        if not known and value is not None and not (key == "invert_sigmas" and value is False):
            raise UserError(f"a {FLOW} with {key}={value!r} is not supported; allowed: to leave it out")
    if learned:
        raise UserError(f"a {FLOW} with twice as many channels out as in is not supported; the blend learns no variance")
    return validate(
        ProcessConfig,
        {
            "schedule": {"kind": "blend"},
            "target": "blend",
            "clip": False,
            "time_input": {"kind": "t", "scale": theirs.get("num_train_timesteps", 1000)},
        },
        origin="this scheduler as process",
    )


def scheduler_config(spec: ProcessConfig) -> dict[str, Any] | None:
    """Our process as the `scheduler_config.json` of a DDPMScheduler, or of a FlowMatchEulerDiscreteScheduler for the blend: the
    inverse of `process_config`. None of a blend whose network is fed another time than that, which is 1000 t.

    A UserError names the option that they have not.
    """
    schedule = spec.schedule
    if isinstance(schedule, BlendScheduleConfig):
        if spec.target != "blend":
            raise UserError(
                f"diffusers has no process.schedule blend with process.target {spec.target}; what can be exported has blend"
            )
        time = time_input_for(schedule, spec.time_input)
        if (time.kind, time.scale) != ("t", 1000.0):
            return None
        return {"_class_name": FLOW, "_diffusers_version": VERSION, "num_train_timesteps": 1000, **FLOW_SAMPLING}
    if spec.target not in TARGETS.values():
        raise UserError(
            f"DDPMScheduler has no process.target {spec.target}; what can be exported has {', '.join(TARGETS.values())}"
        )
    time = spec.time_input
    if time is not None and (time.kind, time.scale) != ("index", 1.0):
        raise UserError(
            f"UNet2DModel is told the index of the level and has no process.time_input {time.kind} times {time.scale:g}; what "
            "can be exported has index times 1"
        )
    changed: dict[str, Any] = {
        "num_train_timesteps": schedule.steps,
        "beta_schedule": _named(BETAS, schedule.kind),
        "variance_type": _named(VARIANCES, spec.variance),
        "prediction_type": _named(TARGETS, spec.target),
        "clip_sample": spec.clip,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }
    if isinstance(schedule, BetaSchedule):
        scale = 1000 / schedule.steps if schedule.rescale_betas else 1.0
        changed |= {"beta_start": scale * schedule.beta_start, "beta_end": scale * schedule.beta_end}
    return {"_class_name": "DDPMScheduler", "_diffusers_version": VERSION, **DDPM_DEFAULTS, **changed}


# ---------------------------------------------------------------------------------------------- folders

LATENTS = "latents.json"  # ours: shape, statistics per channel and autoencoder of the latents that a U-Net sees


@dataclass(frozen=True)
class LatentPart:
    """What a folder has besides where its U-Net sees latents: `facts` are those of the run (shape, and mean, std, low, high for
    each channel), and `autoencoder` the files of an AutoencoderKL whose latents, by its scaling_factor and shift_factor, are
    the normalised ones that the U-Net sees."""

    facts: Mapping[str, Any]
    autoencoder: Mapping[str, bytes]

    @property
    def size(self) -> int:
        return self.facts["shape"][1]


def local_folder(name: str | Path) -> Path:
    """A folder as it is, or what the hub has under this name: its JSON and the weights of full precision."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        hint = f"give {folder.parent}" if (folder.parent / "config.json").is_file() else "with config.json and the weights"
        raise UserError(
            f"{name} is a file, and convert.py diffusers takes a folder of diffusers: {hint}; a checkpoint in one file is read "
            "by convert.py iadb (diffusers' names) or convert.py guided-diffusion (OpenAI's names)"
        )
    no_folder = f"{name} is no folder, and the hub does not give it"
    if (named := hub_name_of_url(str(name))) is not None:
        raise UserError(f"{name} is an address; give the name on the hub: {named}")
    if not is_hub_name(str(name)):
        beside = [other.name for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, 1)
        hint = f"; did you mean {folder.with_name(near[0])}?" if near else ""
        raise UserError(f"{no_folder}: it is a path, and a name there is OWNER/NAME{hint}")
    files = [f"{place}{WEIGHTS}.safetensors" for place in ("", "unet/", "unet_ema/")]
    files += ["model_index.json", "config.json", "*/config.json", "classes.json", "process.json"]
    files += ["scheduler_config.json", "scheduler/scheduler_config.json", LATENTS, "vae/*.json", "vae/*.safetensors"]
    try:
        folder = from_hub(str(name), files)
        places = [place for place in ("unet/", "unet_ema/") if (folder / place / "config.json").is_file()] or [""]
        if not any((folder / place / f"{WEIGHTS}.safetensors").is_file() for place in places):
            ends = (f"{WEIGHTS}.bin", "*.safetensors", "*.bin", "*.index*.json")
            folder = from_hub(str(name), [f"{place}{end}" for place in places for end in ends])
    except UserError as error:
        raise UserError(f"{no_folder}: {error}") from None
    return folder


def _place(folder: Path, name: str | Path, which: str | None) -> tuple[Path, list[str], str | None]:
    """Where the network is in the folder, which others are there, in words, and what `which` is left to say of its files.

    An average of weights, as `unet_ema` of diffusers' training scripts, is taken before raw ones. A UserError says that there
    is no network, or that there are several.
    """
    inside = {path.parent.name: path for path in sorted(folder.glob("*/config.json"))}
    found = [
        sub for sub, path in inside.items() if sub == "unet" or read_foreign_json(path).get("_class_name") == "UNet2DModel"
    ]
    if not found:
        if (folder / "config.json").is_file():
            named = folder.resolve()
            beside = [str(path.parent) for path in named.parent.glob("unet*/config.json") if rank(path.parent.name) == 2]
            raw = beside and rank(named.name) == 1
            return folder, [f"these are raw weights; an average (EMA) is in {beside[0]}"] if raw else [], which
        steps = sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir())
        there = few((f"{path.name}/" if path.is_dir() else path.name) for path in folder.iterdir())
        hint = f"; it holds {there}" if there else "; it is empty"
        hint = f"; it holds {few(steps)}: name one of them" if steps else hint
        kinds = [f"{sub} ({read_foreign_json(path).get('_class_name', '?')})" for sub, path in inside.items()]
        hint = f"; it holds {few(kinds)}" if kinds else hint
        raise UserError(f"{name} holds no diffusers U-Net: it has neither unet/config.json nor config.json{hint}")
    wanted = [sub for sub in found if which == sub or (which in ("ema", "raw") and (rank(sub) == 2) == (which == "ema"))]
    which = None if wanted else which
    wanted = sorted(wanted or found, key=lambda sub: -rank(sub))
    best = [sub for sub in wanted if rank(sub) == rank(wanted[0])]
    if len(best) > 1:
        raise UserError(f"{name} holds several networks, {few(best, 6)}; choose one with --which, such as --which {best[-1]}")
    others = [sub for sub in found if sub != best[0]]
    told = [f"left out, other networks: {few(others, 6)}"] if others else []
    if rank(best[0]) == 2:
        told.insert(0, f"these weights, of {best[0]}, are an average (EMA); --which raw takes the others" if others else "")
    return folder / best[0], [line for line in told if line], which


def _beside(folder: Path, subfolder: str, file: str) -> Path | None:
    """The file in its subfolder, or in the folder itself, as the first folders of diffusers have it."""
    return next((path for path in (folder / subfolder / file, folder / file) if path.is_file()), None)


def read(name: str | Path, *, which: str | None = None) -> Imported:
    """A folder of diffusers with a UNet2DModel, of a DDPMPipeline, of a training script's checkpoint, or the model's alone, or
    its name on the hub.

    What `export` wrote comes back as it was. Weights are safetensors, or a .bin that is read without running anything in it,
    whole or in shards; an average of weights is taken before raw ones. `which` chooses otherwise: `ema`, `raw`, or the name of
    a folder or file inside. Of a network on latents size and channels are those of the latents. A UserError says which file is
    missing, and names each option that we have nothing for.
    """
    folder = local_folder(name)
    place, others, which = _place(folder, name, which)
    path = place / "config.json"
    theirs = read_foreign_json(path)
    if (kind := theirs.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise UserError(f"{path} is of a {kind}; a UNet2DModel is what can be read")
    needed = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "in_channels", "out_channels")
    missing = [key for key in (*needed, "sample_size") if theirs.get(key) is None]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    size, channels, outputs = theirs["sample_size"], theirs["in_channels"], theirs["out_channels"]
    _check_types(theirs, path)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"{path}: sample_size {size} is no square, which is what can be read")
    if outputs not in (channels, 2 * channels):
        raise UserError(f"{path}: {channels} channels in and {outputs} out is no network of a diffusion process")
    process, told, negated = _read_process(folder, learned=outputs == 2 * channels)

    try:
        files, left = find_files(place, which)
        which = None if which in (files.name, *files.name.split(".")) else which
        state, taken = find_network(read_files(files), UNET_2D, place / files.name, which=which)
    except UserError as error:
        raise UserError(str(error) if str(name) in str(error) else f"{name}: {error}") from None
    if negated:
        state = _negated(state)
    classes = read_foreign_json(folder / "classes.json") if (folder / "classes.json").is_file() else {}
    null_class = classes.get("null_class") is True and theirs.get("num_class_embeds") is not None
    try:
        model, network = unet_config(theirs), unet_from_diffusers(theirs, state, null_class=null_class)
    except UserError as error:
        raise UserError(f"{path.parent}: {error}") from None
    names = classes.get("class_names")
    return Imported(
        network=network,
        model=model,
        process=process,
        image_size=sides.pop(),
        class_names=tuple(map(str, names)) if isinstance(names, list) and len(names) == network.num_classes else (),
        channels=channels,
        num_classes=network.num_classes,
        null_class=null_class,
        told=(f"network: {path}, weights {taken[0].removeprefix('network: ')}", *taken[1:], *others, *left, *told),
        script="train_iadb.py" if process.target == "blend" else "ddpm_accelerate.py",
    )


def _check_types(theirs: Mapping[str, Any], path: Path) -> None:
    """A UserError for a value of a UNet2DModel's config that is of a type which it never has."""

    def whole(value: Any) -> bool:
        return type(value) is int and value > 0

    def several(value: Any, of: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(of(entry) for entry in value)

    good = {
        **{key: whole(theirs[key]) for key in ("in_channels", "out_channels", "layers_per_block")},
        "sample_size": whole(theirs["sample_size"]) or several(theirs["sample_size"], whole),
        "block_out_channels": several(theirs["block_out_channels"], whole),
        **{key: several(theirs[key], lambda entry: isinstance(entry, str)) for key in ("down_block_types", "up_block_types")},
        **{
            key: theirs.get(key) is None or whole(theirs[key])
            for key in ("num_class_embeds", "norm_num_groups", "attention_head_dim", "attn_norm_num_groups")
        },
        **{key: type(theirs.get(key, 0)) in (int, float) for key in ("dropout", "norm_eps", "freq_shift")},
    }
    if wrong := next((key for key, fine in good.items() if not fine), None):
        raise UserError(f"{path}: {wrong} is {json.dumps(theirs[wrong])}, which no UNet2DModel can be built of")


def _negated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the UNet2DModel that gives minus what this one gives."""
    return {key: -value if key.startswith("conv_out.") else value for key, value in state.items()}


def _read_process(folder: Path, *, learned: bool) -> tuple[ProcessConfig, list[str], bool]:
    """What the folder's process.json (which is ours) or scheduler_config.json says, or else DDPMScheduler's defaults; where it
    is from, in words; and whether the network gives minus its target, as a FlowMatchEulerDiscreteScheduler wants it."""
    path, ours = _beside(folder, "scheduler", "scheduler_config.json"), folder / "process.json"
    if path is None and re.fullmatch(
        r"checkpoint-\d+", folder.resolve().name
    ):  # of a training script, which saves it at its end
        path = _beside(folder.resolve().parent, "scheduler", "scheduler_config.json")
    index = read_foreign_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if path is None and isinstance(index.get("scheduler"), list) and not ours.is_file():
        raise UserError(
            f"{folder}: model_index.json names a scheduler ({index['scheduler'][-1]}), and scheduler/scheduler_config.json, "
            "which says how the network was trained, is missing; bring it"
        )
    settings = read_foreign_json(path) if path is not None else {}
    negated = settings.get("_class_name") == FLOW
    if ours.is_file():
        return validate(ProcessConfig, read_foreign_json(ours), origin=str(ours)), [f"process: {ours}"], negated
    try:
        process = process_config(settings, learned=learned)
    except UserError as error:
        raise UserError(f"{path or folder}: {error}") from None
    told = [f"process: {path}"]
    if path is None:
        told = [
            "process: there is no scheduler_config.json, so DDPMScheduler's defaults: linear betas, 1000 steps, eps, clipped"
        ]
    usual = FLOW_SAMPLING if negated else SAMPLING
    left = [f"{key} {settings[key]}" for key in usual if settings.get(key, usual[key]) != usual[key]]
    if left:
        told.append(f"left out, since sampling has settings of its own: {', '.join(left)}")
    if learned:
        told.append("loss: hybrid of weight 1, of which the folder says nothing")
    return process, told, negated


def export(
    network: UNet,
    spec: ProcessConfig,
    *,
    image_size: int,
    out: Path,
    name: str,
    class_names: Sequence[str] = (),
    card: str = "",
    latents: LatentPart | None = None,
) -> None:
    """Write the new folder `out`, which diffusers' DDPMPipeline.from_pretrained loads and samples from; whole or absent.

    With `latents` the network sees latents of images of `image_size`: the folder has the autoencoder in `vae`, no index of a
    pipeline, and a loop in its README.md. Without, `network` sees images (1 or 3 channels, image_size, image_size) in [-1, 1].
    DDIMPipeline loads it too, but for what its scheduler has not: a learned variance, and the sigmoid schedule. Of the blend
    there is no pipeline: the folder has the UNet2DModel, its head negated, and a FlowMatchEulerDiscreteScheduler; where the
    network is fed another time than 1000 t, the UNet2DModel alone. Its README.md has the loop that samples, and process.json
    brings it back. `card` is Markdown for the end of that README.md; of a class-conditional network `classes.json` keeps
    `class_names` and whether the last class is the null class. What a UNet2DModel or their schedulers have not is a UserError
    that names the option, before anything is written.
    """
    theirs = unet2d_config(network, image_size=image_size if latents is None else latents.size)
    scheduler = scheduler_config(spec)
    if latents is not None and scheduler is not None and "clip_sample" in scheduler:
        scheduler["clip_sample"] = False  # theirs holds all channels inside one number, the card's loop each in its own range
    channels, outputs = theirs["in_channels"], theirs["out_channels"]
    if latents is None and channels not in (1, 3):
        raise UserError(
            f"the network sees {channels} channels; a DDPMPipeline draws pictures of 1 or 3, and decodes no latents"
        )
    if outputs != channels * (2 if spec.variance == "learned" else 1):
        raise UserError(
            f"a network of {channels} channels in and {outputs} out does not go with process.variance {spec.variance}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give another folder with --out")
    blend, place = (
        isinstance(spec.schedule, BlendScheduleConfig),
        "unet/" if scheduler is not None or latents is not None else "",
    )
    documents: dict[str, Any] = {f"{place}config.json": theirs}
    if scheduler is not None:
        documents["scheduler/scheduler_config.json"] = scheduler
    if blend or latents is not None:
        documents["process.json"] = dump(spec)
    if latents is not None:
        documents[LATENTS] = dict(latents.facts)
    elif not blend:
        index = {"_class_name": "DDPMPipeline", "_diffusers_version": VERSION}
        index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        documents["model_index.json"] = index
    if network.num_classes is not None:
        documents["classes.json"] = {"class_names": list(class_names), "null_class": network.null_class}
    state = state_for_diffusers(network)
    if blend and scheduler is not None:
        state = _negated(state)
    files = {path: (json.dumps(document, indent=2) + "\n").encode() for path, document in documents.items()}
    in_code = json.dumps(out.name, ensure_ascii=False)[1:-1]  # inside double quotes of Python
    more = {"folder": in_code, "name": name, "class_names": class_names, "card": card, "latents": latents}
    files["README.md"] = _card(network, spec, theirs, image_size=image_size, **more).encode()
    files[f"{place}{WEIGHTS}.safetensors"] = safetensors.torch.save(state, metadata={"format": "pt"})
    if latents is not None:
        files |= {f"vae/{file}": content for file, content in latents.autoencoder.items()}
    write_files(out, files)


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` by their paths into the new folder `out`; whole or absent."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        for path, content in files.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            write_flushed(staged / path, content)
        if out.exists():
            out.rmdir()
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _card(
    network: UNet,
    spec: ProcessConfig,
    theirs: Mapping[str, Any],
    *,
    image_size: int,
    folder: str,
    name: str,
    class_names: Sequence[str],
    card: str,
    latents: LatentPart | None,
) -> str:
    """The README.md of an exported folder: what it is, and how to draw from it."""
    classes, size = network.num_classes, image_size
    channels = theirs["in_channels"] if latents is None else json.loads(latents.autoencoder["config.json"])["out_channels"]
    colours = "RGB" if channels == 3 else "grey"
    kind = f"with {classes} classes" if classes is not None else "without classes"
    if latents is not None:
        kind += (
            f", on latents of {theirs['in_channels']} x {latents.size} x {latents.size}, which the autoencoder in vae decodes"
        )
    of = _blend_card if isinstance(spec.schedule, BlendScheduleConfig) else _ddpm_card
    what, code = of(network, spec, theirs, folder, latents)
    lines = [
        "---",
        "library_name: diffusers",
        "tags:",
        "- class-conditional" if classes is not None else "- unconditional-image-generation",
        "---",
        "",
        f"# {name}",
        "",
        f"A diffusion model of {colours} pictures of {size} x {size} pixels, {kind}: a UNet2DModel with "
        f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters. {what} "
        "Trained with Atelier.",
        "",
        "```python",
        *code,
        "```",
        "",
    ]
    if class_names and classes is not None:
        lines += [f"Classes: {', '.join(f'{i} {shown(class_name)}' for i, class_name in enumerate(class_names))}.", ""]
    if classes is not None and network.null_class:
        lines += [f"Class {classes} is no class, for classifier-free guidance.", ""]
    return "\n".join(lines) + (f"{card.strip()}\n" if card else "")


def _latent_code(spec: ProcessConfig, folder: str) -> list[str]:
    """The Python that loads the autoencoder of a latent folder, and the bounds of its latents where they are clipped."""
    code = [f'vae = AutoencoderKL.from_pretrained("{folder}", subfolder="vae")']
    if spec.clip:
        code += [
            f'facts = json.loads(Path("{folder}/{LATENTS}").read_text())',
            'low, high = (torch.tensor(facts[key])[:, None, None] for key in ("low", "high"))',
        ]
    return code


DECODE = "    images = vae.decode(x / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample"


def _latent_ddpm_code(network: UNet, spec: ProcessConfig, folder: str, noise: str) -> list[str]:
    """The Python that draws latents on a table of levels and decodes them."""
    clip: list[str] = []
    if spec.clip:  # as a scheduler of theirs would, but each channel to its own range
        split = ["        y, variance = y.chunk(2, dim=1)"] if spec.variance == "learned" else []
        joined = ["        y = torch.cat([y, variance], dim=1)"] if spec.variance == "learned" else []
        levels = "        a, s = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5"
        inside = {
            "eps": [levels, "        y = (x - a * ((x - s * y) / a).clamp(low, high)) / s"],
            "v": [levels, "        y = (a * x - (a * x - s * y).clamp(low, high)) / s"],
            "x0": ["        y = y.clamp(low, high)"],
        }
        clip = [*split, *inside[spec.target], *joined]
    labelled = network.num_classes is not None
    return [
        *(["import json", "from pathlib import Path", ""] if spec.clip else []),
        "import torch",
        "from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel",
        "",
        f'unet = UNet2DModel.from_pretrained("{folder}", subfolder="unet")',
        *_latent_code(spec, folder),
        f'scheduler = DDPMScheduler.from_pretrained("{folder}", subfolder="scheduler")',
        *([f"labels = torch.arange(4) % {network.num_classes}"] if labelled else []),
        noise,
        "with torch.no_grad():",
        "    for t in scheduler.timesteps:",
        f"        y = unet(x, t{', class_labels=labels' if labelled else ''}).sample",
        *clip,
        "        x = scheduler.step(y, t, x).prev_sample",
        DECODE,
        "images = (images / 2 + 0.5).clamp(0, 1)",
    ]


def _ddpm_card(
    network: UNet, spec: ProcessConfig, theirs: Mapping[str, Any], folder: str, latents: LatentPart | None
) -> tuple[str, list[str]]:
    """What a network with a table of levels predicts, and the Python that draws from it."""
    assert not isinstance(spec.schedule, BlendScheduleConfig)
    classes, size, channels, steps = network.num_classes, theirs["sample_size"], theirs["in_channels"], spec.schedule.steps
    what = (
        f"It predicts {spec.target} on the {spec.schedule.kind} schedule of {steps} steps; the variance of its steps is "
        f"{spec.variance}."
    )
    if latents is not None:
        return what, _latent_ddpm_code(network, spec, folder, f"x = torch.randn(4, {channels}, {size}, {size})")
    if classes is not None:
        return what, [
            "import torch",
            "from diffusers import DDPMScheduler, UNet2DModel",
            "",
            f'unet = UNet2DModel.from_pretrained("{folder}", subfolder="unet")',
            f'scheduler = DDPMScheduler.from_pretrained("{folder}", subfolder="scheduler")',
            f"labels = torch.arange(4) % {classes}",
            f"x = torch.randn(4, {channels}, {size}, {size})",
            "with torch.no_grad():",
            "    for t in scheduler.timesteps:",
            "        x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample",
            "images = (x / 2 + 0.5).clamp(0, 1)",
        ]
    ddim = spec.variance != "learned" and spec.schedule.kind != "sigmoid"
    code = [
        "from diffusers import DDPMPipeline" if not ddim else "from diffusers import DDIMPipeline, DDPMPipeline",
        "",
        f'images = DDPMPipeline.from_pretrained("{folder}")(batch_size=4, num_inference_steps={steps}).images',
    ]
    if ddim:  # our samplers recompute eps where x0 was clipped
        code += [
            f'pipeline = DDIMPipeline.from_pretrained("{folder}")',
            f"images = pipeline(batch_size=4, num_inference_steps={min(50, steps)}, use_clipped_model_output=True).images",
        ]
    return what, code


def _blend_card(
    network: UNet, spec: ProcessConfig, theirs: Mapping[str, Any], folder: str, latents: LatentPart | None
) -> tuple[str, list[str]]:
    """The same on the blend, where a loop draws."""
    classes, time = network.num_classes, time_input_for(spec.schedule, spec.time_input)
    condition = ", class_labels=labels" if classes is not None else ""
    labels = [f"labels = torch.arange(4) % {classes}"] if classes is not None else []
    noise = f"x = torch.randn(4, {theirs['in_channels']}, {theirs['sample_size']}, {theirs['sample_size']})"
    images = ["images = (x / 2 + 0.5).clamp(0, 1)"]
    start, alone = ["import torch"], ""
    load, names, bounds, where = [], "", "-1, 1", "[-1, 1]"
    if latents is not None:
        images, names = [DECODE, "images = (images / 2 + 0.5).clamp(0, 1)"], "AutoencoderKL, "
        alone = ', subfolder="unet"'
        load, bounds, where = _latent_code(spec, folder), "low, high", "its range"
        start = ["import json", "from pathlib import Path", "", *start] if spec.clip else start
    if scheduler_config(spec) is not None:
        what = "It predicts noise minus data on the straight blend x_t = (1 - t) data + t noise, and is fed 1000 t."
        inside = f"        v = (x - (x - t / 1000 * v).clamp({bounds})) / (t / 1000)  # data inside {where}"
        clipped = [inside] if spec.clip else []
        return what, [
            *start,
            f"from diffusers import {names}{FLOW}, UNet2DModel",
            "",
            f'unet = UNet2DModel.from_pretrained("{folder}", subfolder="unet")',
            *load,
            f'scheduler = {FLOW}.from_pretrained("{folder}", subfolder="scheduler")',
            "scheduler.set_timesteps(sigmas=[1 - i / 50 for i in range(50)])",
            *labels,
            noise,
            "with torch.no_grad():",
            "    for t in scheduler.timesteps:",
            f"        v = unet(x, t{condition}).sample",
            *clipped,
            "        x = scheduler.step(v, t, x).prev_sample",
            *images,
        ]
    shown = "alpha" if time.kind == "alpha" else "(1 - alpha)"
    shown = shown if time.scale == 1 else f"{str(time.scale).removesuffix('.0')} * {shown}"
    what = (
        "It predicts data minus noise on the straight blend x_alpha = (1 - alpha) noise + alpha data (iterative "
        f"alpha-(de)blending, arXiv:2305.03486), and is fed {shown}, which no scheduler of diffusers does: this loop does."
    )
    inside = f"        d = ((x + (1 - alpha) * d).clamp({bounds}) - x) / (1 - alpha)  # data inside {where}"
    clipped = [inside] if spec.clip else []
    return what, [
        *start,
        f"from diffusers import {names}UNet2DModel",
        "",
        f'unet = UNet2DModel.from_pretrained("{folder}"{alone})',
        *load,
        *labels,
        noise,
        "alphas = torch.linspace(0, 1, 51)",
        "with torch.no_grad():",
        "    for alpha, after in zip(alphas, alphas[1:]):",
        f"        d = unet(x, {shown}{condition}).sample",
        *clipped,
        "        x = x + (after - alpha) * d",
        *images,
    ]


# ---------------------------------------------------------------------------------------------- autoencoders
