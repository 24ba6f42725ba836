"""diffusers' UNet2DModel as our U-Net, by a map of key names; its AutoencoderKL behind the interface of ours."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UserError
from ..models import UNet, UNetConfig
from ..models.unet import TimeEmbedding
from ..vision import import_torchvision
from .guided_diffusion import rename

RESIDUAL = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "embed": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "skip": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "qkv", "out": "to_out.0"}


def unet_config(theirs: Mapping[str, Any]) -> UNetConfig:
    """The `config.json` of a UNet2DModel as our architecture; a UserError names what we have no option for."""

    def only(key: str, *allowed: Any) -> Any:
        value = theirs.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"UNet2DModel with {key}={value!r} is not supported; allowed: {allowed}")
        return value

    only("time_embedding_type", "positional")
    only("center_input_sample", False)
    only("mid_block_scale_factor", 1)
    only("act_fn", "silu")
    only("class_embed_type", None)
    only("downsample_type", "conv")
    only("upsample_type", "conv")
    only("attn_norm_num_groups", None)
    if theirs.get("resnet_time_scale_shift", "default") != "default" and theirs.get("add_attention", True):
        raise UserError("UNet2DModel with scale_shift and add_attention has an attention without norm: not supported")
    widths = list(theirs["block_out_channels"])
    down, up = list(theirs["down_block_types"]), list(theirs["up_block_types"])
    attention = {"DownBlock2D": "none", "AttnDownBlock2D": "full"}
    mirrored = [kind.replace("UpBlock2D", "DownBlock2D") for kind in reversed(up)]
    if any(kind not in attention for kind in down) or mirrored != down:
        raise UserError(f"UNet2DModel with blocks {down} and {up} is not supported")
    if any(width % widths[0] for width in widths):
        raise UserError(f"UNet2DModel with widths {widths} is not supported: each must be a multiple of the first")
    head = theirs.get("attention_head_dim", 8)
    return UNetConfig(
        base_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        blocks=theirs["layers_per_block"],
        attention=tuple(attention[kind] for kind in down),  # pyright: ignore[reportArgumentType]
        mid_attention="full" if theirs.get("add_attention", True) else "none",
        head_channels=head,
        embedding="scale_shift" if only("resnet_time_scale_shift", "default", "scale_shift") == "scale_shift" else "add",
        downsample="conv" if only("downsample_padding", 1, 0) == 1 else "conv_right",
        upsample="conv",
        dropout=float(theirs.get("dropout", 0.0)),
        norm_groups=theirs.get("norm_num_groups", 32),
        norm_eps=float(theirs.get("norm_eps", 1e-5)),
        time_embedding=TimeEmbedding(
            order="cos_sin" if theirs.get("flip_sin_to_cos", True) else "sin_cos",
            frequency_shift=float(theirs.get("freq_shift", 0)),
        ),
    )


def module_names(config: UNetConfig) -> dict[str, str]:
    """Our module names -> diffusers'; its to_q, to_k and to_v count as one `qkv`."""
    names = {"time_in": "time_embedding.linear_1", "time_out": "time_embedding.linear_2"}
    names |= {"label_embedding": "class_embedding", "stem": "conv_in", "head_norm": "conv_norm_out", "head": "conv_out"}

    def block(ours: str, theirs: str, i: int) -> None:
        names.update({f"{ours}.residual.{a}": f"{theirs}.resnets.{i}.{b}" for a, b in RESIDUAL.items()})
        names.update({f"{ours}.attention.{a}": f"{theirs}.attentions.{i}.{b}" for a, b in ATTENTION.items()})

    for level in range(len(config.channel_mult)):
        for i in range(config.blocks):
            block(f"down.{level}.blocks.{i}", f"down_blocks.{level}", i)
        for i in range(config.blocks + 1):
            block(f"up.{level}.blocks.{i}", f"up_blocks.{level}", i)
        names[f"down.{level}.resample.conv"] = f"down_blocks.{level}.downsamplers.0.conv"
        names[f"up.{level}.resample.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    block("mid.0", "mid_block", 0)
    block("mid.1", "mid_block", 1)
    return names


def _fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fused = dict(state)
    for key in [key for key in state if ".to_q." in key]:
        parts = [fused.pop(key.replace(".to_q.", f".to_{part}.")) for part in "qkv"]
        fused[key.replace(".to_q.", ".qkv.")] = torch.cat(parts)
    return fused


def unet_from_diffusers(theirs: Mapping[str, Any], state: Mapping[str, Tensor]) -> UNet:
    """A UNet2DModel, by its config and state dict, as our U-Net with the same output."""
    config = unet_config(theirs)
    classes = theirs.get("num_class_embeds")
    network = UNet(
        config,
        in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"],
        num_classes=classes,
        null_class=False,
    )
    network.load_state_dict(rename(network, _fuse_qkv(state), module_names(config)))
    return network.eval()


class DiffusersAutoencoder(nn.Module):
    """An AutoencoderKL with our names: moments(images) and decode(z). `scaling` is the mean and the standard deviation of its
    latents, by its own shift_factor and scaling_factor."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        theirs = network.config
        self.config = {key: value for key, value in dict(theirs).items() if not key.startswith("_")}
        self.channels, self.latent_channels = theirs["in_channels"], theirs["latent_channels"]
        self.factor = 2 ** (len(theirs["block_out_channels"]) - 1)
        self.scaling = (float(theirs.get("shift_factor") or 0.0), 1.0 / theirs["scaling_factor"])

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) in [-1, 1] -> mean and logvar (B, D, h, w), as the network has them."""
        found = self.network.encode(images).latent_dist
        return found.mean, found.logvar

    def decode(self, z: Tensor) -> Tensor:
        """(B, D, h, w) as the network has them -> (B, C, H, W)."""
        return self.network.decode(z).sample


def _autoencoder_class() -> Any:
    import_torchvision()
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError:
        raise UserError("a diffusers autoencoder needs the package diffusers: pip install diffusers") from None
    return AutoencoderKL


def autoencoder_from_config(config: Mapping[str, Any]) -> DiffusersAutoencoder:
    """An AutoencoderKL of this config, its weights still to be loaded."""
    return DiffusersAutoencoder(_autoencoder_class().from_config(dict(config)))


def load_autoencoder(name: str) -> DiffusersAutoencoder:
    """diffusers' AutoencoderKL from a folder or the hub (the subfolder `vae` of a whole pipeline, too); a UserError says why
    it cannot be loaded. Safetensors alone are read."""
    import huggingface_hub.utils.logging

    kind = _autoencoder_class()
    huggingface_hub.utils.logging.set_verbosity_error()  # what it tells of each try, we say once
    try:
        try:
            return DiffusersAutoencoder(kind.from_pretrained(name, use_safetensors=True))
        except OSError as error:
            if "file named" not in str(error):
                raise
            return DiffusersAutoencoder(kind.from_pretrained(name, subfolder="vae", use_safetensors=True))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the diffusers autoencoder {name} cannot be loaded: {reason}") from None
