"""Our autoencoder as diffusers' AutoencoderKL, and back from the folder that we wrote."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..config import UserError
from ..models import VAE, VAEConfig
from ..runs.diffusers_autoencoder import VERSION, WEIGHTS
from ..runs.exported_autoencoder import KEPT, OURS, _layer_names


def obstacles(spec: VAEConfig, *, tanh: bool) -> list[str]:
    """Why an AutoencoderKL cannot be this network, a reason for each; nothing where it can."""
    found = []
    if spec.bottleneck.kind != "kl":
        found.append(f"model.bottleneck is {spec.bottleneck.kind} (kl is needed)")
    attended = [*zip(spec.widths, spec.kinds, strict=True), (spec.widths[-1], spec.mid_attention)]
    if any(kind == "linear" for _, kind in attended):
        found.append("model.attention or model.mid_attention is linear (full or none is needed)")
    if any(kind == "full" and spec.head_channels not in (None, width) for width, kind in attended):
        found.append(f"model.head_channels {spec.head_channels} makes several heads (one is needed)")
    if len(spec.widths) > 1 and spec.downsample != "average":
        found.append(f"model.downsample is {spec.downsample} (average is needed)")
    if len(spec.widths) > 1 and spec.upsample != "nearest":
        found.append(f"model.upsample is {spec.upsample} (nearest is needed)")
    if tanh:
        found.append("it ends with tanh")
    return found


def check_expressible(network: VAE, name: str) -> None:
    """A UserError with every reason why an AutoencoderKL cannot be this network."""
    reasons = obstacles(network.spec, tanh=network.tanh)
    if reasons:
        raise UserError(f"diffusers' AutoencoderKL cannot be the autoencoder of {name}: {'; '.join(reasons)}")


def autoencoder_kl_config(network: VAE, *, sample_size: int) -> dict[str, Any]:
    """Our network as the `config.json` of an AutoencoderKL. Its scaling_factor is 1: what diffusion needs is in quant_conv and
    post_quant_conv, since one factor cannot normalise each channel by itself."""
    spec = network.spec
    down = ["AttnDownEncoderBlock2D" if kind == "full" else "DownEncoderBlock2D" for kind in spec.kinds]
    up = ["AttnUpDecoderBlock2D" if kind == "full" else "UpDecoderBlock2D" for kind in reversed(spec.kinds)]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": list(spec.widths),
        "down_block_types": down,
        "force_upcast": True,
        "in_channels": network.last.out_channels,
        "latent_channels": spec.latent_channels,
        "layers_per_block": spec.blocks,
        "mid_block_add_attention": spec.mid_attention == "full",
        "norm_num_groups": spec.norm_groups,
        "out_channels": network.last.out_channels,
        "sample_size": sample_size,
        "scaling_factor": 1.0,
        "up_block_types": up,
    }


def state_for_autoencoder_kl(
    network: VAE, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The weights of our network under AutoencoderKL's names, float32 on the CPU. With the latents' `mean` and `std` for each
    channel its latents are the normalised ones that diffusion sees.

    Average pooling becomes a strided convolution of four weights of 1/4. Their decoder has one block a level more than ours and
    an attention after every block: what we have not is the identity, whose last layer is zero.
    """
    spec, state = network.spec, {}
    own, names = network.state_dict(), dict(_layer_names(spec))
    for key, value in own.items():
        module, _, kind = key.rpartition(".")
        value, theirs = value.detach().to("cpu", torch.float32).contiguous(), names[module]
        if theirs.endswith(".qkv"):
            owner = theirs.removesuffix("qkv")
            state |= {f"{owner}to_{part}.{kind}": rows.clone() for part, rows in zip("qkv", value.chunk(3), strict=True)}
        else:
            state[f"{theirs}.{kind}"] = value
    last = len(spec.widths) - 1
    for i, (width, kind) in enumerate(zip(spec.widths, spec.kinds, strict=True)):
        if i < last:
            pool = torch.zeros(width, width, 3, 3)
            pool[range(width), range(width), :2, :2] = 0.25
            state |= _layer(f"encoder.down_blocks.{i}.downsamplers.0.conv", pool)
        up = f"decoder.up_blocks.{last - i}"
        for norm in ("norm1", "norm2"):
            state |= _layer(f"{up}.resnets.{spec.blocks}.{norm}", torch.ones(width))
        for conv in ("conv1", "conv2"):
            state |= _layer(f"{up}.resnets.{spec.blocks}.{conv}", torch.zeros(width, width, 3, 3))
        if kind == "full":
            there = [f"encoder.down_blocks.{i}.attentions.{k}" for k in range(spec.blocks - 1)]
            there += [f"{up}.attentions.{k}" for k in range(spec.blocks + 1) if k != spec.blocks - 1]
            for place in there:
                state |= _layer(f"{place}.group_norm", torch.ones(width))
                for name in ("to_q", "to_k", "to_v", "to_out.0"):
                    state |= _layer(f"{place}.{name}", torch.zeros(width, width))
    depth = spec.latent_channels
    shift = torch.zeros(depth, dtype=torch.float64) if mean is None else torch.tensor(mean, dtype=torch.float64)
    scale = torch.ones(depth, dtype=torch.float64) if std is None else torch.tensor(std, dtype=torch.float64)
    # (mean - shift) / scale, and as the log of a variance, logvar - 2 log scale
    quant = torch.cat([1 / scale, torch.ones_like(scale)])
    state |= _layer("quant_conv", torch.diag(quant)[:, :, None, None], torch.cat([-shift / scale, -2 * scale.log()]))
    state |= _layer("post_quant_conv", torch.diag(scale)[:, :, None, None], shift)
    return state


def _layer(name: str, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    bias = torch.zeros(len(weight)) if bias is None else bias
    return {f"{name}.weight": weight.float(), f"{name}.bias": bias.float()}


def autoencoder_kl_files(
    network: VAE,
    document: Mapping[str, Any],
    digest: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, bytes]:
    """The files of an AutoencoderKL's folder by name: config, weights, and what brings our own network back to the bit.
    `document` and `digest` are those of the Autoencoder that holds the network; it has to be expressible."""
    assert not obstacles(network.spec, tanh=network.tanh)
    weights = safetensors.torch.save(state_for_autoencoder_kl(network, mean, std), metadata={"format": "pt"})
    known = {key: document[key] for key in KEPT}
    ours = {**known, "digest": digest, "weights": hashlib.sha256(weights).hexdigest()}
    config = autoencoder_kl_config(network, sample_size=max(document["sizes"]))
    files = {
        name: (json.dumps(content, indent=2) + "\n").encode() for name, content in {"config.json": config, OURS: ours}.items()
    }
    return {**files, f"{WEIGHTS}.safetensors": weights}
