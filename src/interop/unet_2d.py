"""Our U-Net as diffusers' UNet2DModel and back: the config and the weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import UserError, validate
from ..config.sizes import Sides, sides_of
from ..models import UNet, UNetConfig, build_model
from ..runs.diffusers_autoencoder import VERSION, fuse_qkv, names_inside
from .names import multiple, rename_state, state_under

# The attention of each type of block, and how the block resamples: where that is None, downsample_type and upsample_type say.
DOWN = {"DownBlock2D": ("none", "conv"), "AttnDownBlock2D": ("full", None), "ResnetDownsampleBlock2D": ("none", "resnet")}
UP = {"UpBlock2D": ("none", "conv"), "AttnUpBlock2D": ("full", None), "ResnetUpsampleBlock2D": ("none", "resnet")}

# Options that our U-Net has in one way alone.
FIXED = {"time_embedding_type": ("positional",), "center_input_sample": (False,), "mid_block_scale_factor": (1,)}
FIXED |= {"act_fn": ("silu", "swish"), "class_embed_type": (None,)}


def unet_config(theirs: Mapping[str, Any]) -> UNetConfig:
    """The `config.json` of a UNet2DModel as the config of our U-Net; a UserError names the option that ours lacks."""

    def only(key: str, *allowed: Any) -> Any:
        value = theirs.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"UNet2DModel with {key}={value!r} is not supported; allowed: {allowed}")
        return value

    for key, allowed in {**FIXED, "mid_block_type": ("UNetMidBlock2D",)}.items():
        only(key, *allowed)
    widths, groups = list(theirs["block_out_channels"]), theirs.get("norm_num_groups", 32)
    only("time_embedding_dim", None, 4 * widths[0])
    scale_shift = only("resnet_time_scale_shift", "default", "scale_shift") == "scale_shift"
    mid_attention = theirs.get("add_attention", True)
    if mid_attention and only("attn_norm_num_groups", None, groups) is None and scale_shift:
        raise UserError("UNet2DModel with scale_shift and add_attention has an attention without norm: not supported")

    down, up = list(theirs["down_block_types"]), list(reversed(theirs["up_block_types"]))
    blocks = f"UNet2DModel with blocks {down} and {up[::-1]} is not supported"
    if not {*down} <= {*DOWN} or not {*up} <= {*UP} or not len(down) == len(up) == len(widths):
        raise UserError(f"{blocks}; allowed: {', '.join([*DOWN, *UP])}")
    attention = [DOWN[kind][0] for kind in down]
    if attention != [UP[kind][0] for kind in up]:
        raise UserError(f"{blocks}: attention differs down and up")
    residual = {}
    for way, resampled in (("down", [DOWN[kind] for kind in down[:-1]]), ("up", [UP[kind] for kind in up[1:]])):
        default = only(f"{way}sample_type", "conv", "resnet")
        kinds = {kind or default for _, kind in resampled} or {default}
        if len(kinds) > 1:
            raise UserError(f"{blocks}: they resample in different ways")
        residual[way] = kinds == {"resnet"}
    convolution = "conv" if only("downsample_padding", 1, 0) == 1 else "conv_right"
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
            "downsample": "residual" if residual["down"] else convolution,
            "upsample": "residual" if residual["up"] else "conv",
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


def unet2d_config(network: UNet, *, image_size: int | Sides) -> dict[str, Any]:
    """Our network as the `config.json` of a UNet2DModel for images of `image_size`: the inverse of `unet_config`. A UserError
    names the option that UNet2DModel lacks. UNet2DModel has residual resampling (its blocks `Resnet...`) and, with
    `attn_norm_num_groups`, an attention in the middle beside scale_shift."""
    config, (height, width) = network.config, sides_of(image_size)
    options = [
        *(("attention", kind, ("none", "full")) for kind in config.attention),
        ("mid_attention", config.mid_attention, ("none", "full")),
        ("downsample", config.downsample, ("conv", "conv_right", "residual")),
        ("upsample", config.upsample, ("conv", "residual")),
        ("time_embedding.scale", config.time_embedding.scale, (1.0,)),
        ("channel_mult[0]", config.channel_mult[0], (1,)),
        ("patch", config.patch, (1,)),
    ]
    for option, value, allowed in options:
        if value not in allowed:
            words = " or ".join(map(str, allowed))
            raise UserError(f"UNet2DModel has no model.{option} {value}; what can be exported has {words}")
    sizes = sorted({width // config.heads(width) for width in config.attended})
    one_head = all(config.heads(width) == 1 for width in config.attended)
    if len(sizes) > 1 and not one_head:
        raise UserError(
            f"model.num_heads {config.num_heads} makes heads of {', '.join(map(str, sizes))} channels, and UNet2DModel has one "
            "size for all; what can be exported has model.head_channels"
        )
    scale_shift, mid_attention = config.embedding == "scale_shift", config.mid_attention == "full"
    residual_down, residual_up = config.downsample == "residual", config.upsample == "residual"
    down = {"full": "AttnDownBlock2D", "none": "ResnetDownsampleBlock2D" if residual_down else "DownBlock2D"}
    up = {"full": "AttnUpBlock2D", "none": "ResnetUpsampleBlock2D" if residual_up else "UpBlock2D"}
    theirs = {
        **{key: allowed[0] for key, allowed in FIXED.items()},
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "add_attention": mid_attention,
        "attention_head_dim": None if one_head else sizes[0],
        "attn_norm_num_groups": config.norm_groups if scale_shift and mid_attention else None,
        "block_out_channels": config.widths,
        "down_block_types": [down[kind] for kind in config.attention],
        "downsample_type": "resnet" if residual_down else "conv",
        "up_block_types": [up[kind] for kind in reversed(config.attention)],
        "upsample_type": "resnet" if residual_up else "conv",
        "downsample_padding": 0 if config.downsample == "conv_right" else 1,
        "dropout": config.dropout,
        "flip_sin_to_cos": config.time_embedding.order == "cos_sin",
        "freq_shift": config.time_embedding.frequency_shift,
        "in_channels": network.stem.in_channels,
        "layers_per_block": config.blocks,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_groups,
        "num_class_embeds": network.label_embedding.num_embeddings if network.label_embedding is not None else None,
        "num_train_timesteps": None,
        "out_channels": network.head.out_channels,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "sample_size": height if height == width else [height, width],
    }
    return dict(sorted(theirs.items()))


def module_names(config: UNetConfig) -> dict[str, str]:
    """Our module names -> those of a UNet2DModel; its to_q, to_k and to_v count as one `qkv`."""
    places = {"time_in": "time_embedding.linear_1", "time_out": "time_embedding.linear_2", "label_embedding": "class_embedding"}
    places |= {"stem": "conv_in", "head_norm": "conv_norm_out", "head": "conv_out"}
    levels = [(way, level) for way in ("down", "up") for level in range(len(config.channel_mult))]
    blocks = [("mid", "mid_block", i) for i in range(2)]
    for way, level in levels:
        places[f"{way}.{level}.resample"] = f"{way}_blocks.{level}.{way}samplers.0"
        count = config.blocks + (way == "up")
        blocks += [(f"{way}.{level}.blocks", f"{way}_blocks.{level}", i) for i in range(count)]
    for ours, theirs, i in blocks:
        places |= {f"{ours}.{i}.residual": f"{theirs}.resnets.{i}", f"{ours}.{i}.attention": f"{theirs}.attentions.{i}"}
    return names_inside(places)


def unet_from_diffusers(theirs: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, null_class: bool = False) -> UNet:
    """A UNet2DModel, by its config and state dict, as our U-Net with the same output; with `null_class` the last of its
    classes is the one for no class."""
    config, channels, classes = unet_config(theirs), theirs["in_channels"], theirs.get("num_class_embeds")
    height, width = sides_of(theirs.get("sample_size") or config.factor)
    num_classes = classes - null_class if classes is not None else None
    learned = theirs["out_channels"] == 2 * channels
    network = build_model(config, (channels, height, width), num_classes, learned=learned, null_class=null_class)
    assert isinstance(network, UNet)
    network.load_state_dict(rename_state(network, fuse_qkv(state_dict), module_names(config)))
    return network.eval()


def state_for_diffusers(network: UNet) -> dict[str, Tensor]:
    """The weights of our network under the names of UNet2DModel: the inverse of `unet_from_diffusers`."""
    return state_under(module_names(network.config), network)
