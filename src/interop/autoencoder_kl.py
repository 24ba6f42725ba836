"""Our autoencoder as diffusers' AutoencoderKL, and back from the folder that we wrote."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..config import UserError
from ..config.sizes import sides_of
from ..models import VAE
from ..runs.autoencoder import Autoencoder
from ..runs.diffusers_autoencoder import NETWORK_KEYS, OURS, VERSION, WEIGHTS, DiffusersAutoencoder, layer_names
from .names import state_under


def obstacles(network: VAE) -> list[str]:
    """The reasons why an AutoencoderKL cannot be this network; none where it can."""
    spec = network.spec
    attended = [*zip(spec.widths, spec.kinds, strict=True), (spec.widths[-1], spec.mid_attention)]
    is_linear = any(kind == "linear" for _, kind in attended)
    several_heads = any(kind == "full" and spec.head_channels not in (None, width) for width, kind in attended)
    is_resampled = len(spec.widths) > 1
    reasons = {
        f"model.bottleneck is {spec.bottleneck.kind} (kl is needed)": spec.bottleneck.kind != "kl",
        "model.attention or model.mid_attention is linear (full or none is needed)": is_linear,
        f"model.head_channels {spec.head_channels} makes several heads (one is needed)": several_heads,
        f"model.downsample is {spec.downsample} (average is needed)": is_resampled and spec.downsample != "average",
        f"model.upsample is {spec.upsample} (nearest is needed)": is_resampled and spec.upsample != "nearest",
        "it ends with tanh": network.tanh,
    }
    return [reason for reason, applies in reasons.items() if applies]


def autoencoder_kl_config(network: VAE, *, sample_size: int) -> dict[str, Any]:
    """Our network as the `config.json` of an AutoencoderKL. Its scaling_factor is 1, since one factor cannot normalise each
    channel by itself: quant_conv and post_quant_conv do that."""
    spec = network.spec
    attention = ["Attn" if kind == "full" else "" for kind in spec.kinds]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": list(spec.widths),
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attention],
        "force_upcast": True,
        "in_channels": network.last.out_channels,
        "latent_channels": spec.latent_channels,
        "layers_per_block": spec.blocks,
        "mid_block_add_attention": spec.mid_attention == "full",
        "norm_num_groups": spec.norm_groups,
        "out_channels": network.last.out_channels,
        "sample_size": sample_size,
        "scaling_factor": 1.0,
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attention)],
    }


def state_for_autoencoder_kl(network: VAE, latents: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The weights of our network under the names of an AutoencoderKL, float32 on the CPU. With the facts of a latent run in
    `latents` (`mean` and `std` for each channel) its latents are the normalised ones that diffusion sees. Average pooling
    becomes a strided convolution of four weights of 1/4. A level of their decoder has one block more than ours, and an
    attention after every block: the additional layers are the identity, the last layer of each being zero."""
    spec, state_dict = network.spec, state_under(layer_names(network.spec), network)
    last = len(spec.widths) - 1
    for i, (width, kind) in enumerate(zip(spec.widths, spec.kinds, strict=True)):
        if i < last:
            pool = torch.zeros(width, width, 3, 3)
            pool[range(width), range(width), :2, :2] = 0.25
            state_dict |= _layer(f"encoder.down_blocks.{i}.downsamplers.0.conv", pool)
        up = f"decoder.up_blocks.{last - i}"
        for k in (1, 2):
            state_dict |= _layer(f"{up}.resnets.{spec.blocks}.norm{k}", torch.ones(width))
            state_dict |= _layer(f"{up}.resnets.{spec.blocks}.conv{k}", torch.zeros(width, width, 3, 3))
        places = [f"encoder.down_blocks.{i}.attentions.{k}" for k in range(spec.blocks - 1)]
        places += [f"{up}.attentions.{k}" for k in range(spec.blocks + 1) if k != spec.blocks - 1]
        for place in places if kind == "full" else []:
            state_dict |= _layer(f"{place}.group_norm", torch.ones(width))
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                state_dict |= _layer(f"{place}.{name}", torch.zeros(width, width))
    facts = latents or {"mean": [0.0] * spec.latent_channels, "std": [1.0] * spec.latent_channels}
    shift, scale = (torch.tensor(facts[key], dtype=torch.float64) for key in ("mean", "std"))
    # (mean - shift) / scale, and as the log of a variance, logvar - 2 log scale
    quant = torch.cat([1 / scale, torch.ones_like(scale)])
    state_dict |= _layer("quant_conv", torch.diag(quant)[:, :, None, None], torch.cat([-shift / scale, -2 * scale.log()]))
    return state_dict | _layer("post_quant_conv", torch.diag(scale)[:, :, None, None], shift)


def _layer(name: str, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    bias = torch.zeros(len(weight)) if bias is None else bias
    return {f"{name}.weight": weight.float(), f"{name}.bias": bias.float()}


def autoencoder_files(autoencoder: Autoencoder, latents: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The files of an AutoencoderKL's folder by name: config, weights, and for ours what brings our network back to the bit.
    With the facts of a latent run in `latents` its latents are the normalised ones. A UserError says why ours cannot be one."""
    network, document = autoencoder.network, autoencoder.document
    if isinstance(network, DiffusersAutoencoder):
        config = {"_class_name": "AutoencoderKL", "_diffusers_version": VERSION, **network.config}
        state_dict = {key: value.detach().cpu().contiguous() for key, value in network.network.state_dict().items()}
    elif reasons := obstacles(network):
        raise UserError(f"diffusers' AutoencoderKL cannot be the autoencoder of {autoencoder.path}: {'; '.join(reasons)}")
    else:
        config = autoencoder_kl_config(network, sample_size=max(sides_of(document["sizes"][-1])))
        state_dict = state_for_autoencoder_kl(network, latents)
    weights, documents = safetensors.torch.save(state_dict, metadata={"format": "pt"}), {"config.json": config}
    if isinstance(network, VAE):
        documents[OURS] = {key: document[key] for key in NETWORK_KEYS}
        documents[OURS] |= {"digest": autoencoder.digest, "weights": hashlib.sha256(weights).hexdigest()}
    files = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in documents.items()}
    return {**files, f"{WEIGHTS}.safetensors": weights}
