"""A training config made so small that its own script takes ten steps of it in seconds, on drawn data and without weights."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..config import dump
from ..data.points import GaussianSource, MoonsSource
from ..data.sources import ShapesSource
from ..models import VAE, MLPConfig, VAEConfig
from ..models.unet import EncoderConfig
from ..runtime.checkpoint import write_folder
from ..runtime.launch import MachineConfig
from ..training.config import BlendConfig, LatentConfig, TrainConfig
from ..training.rehearsal import rehearsal_config, short_stages
from ..training.stages import StagedConfig

STEPS = 10


def shrink(cfg: TrainConfig, folder: Path, machine: MachineConfig, batch_size: int, micro_batch_size: int) -> TrainConfig:
    """The config for `STEPS` steps (of an autoencoder as many in all of its stages) with the network's kind, the optimizer and
    the losses as they are, but the perceptual one, which needs weights. An autoencoder that the config names is replaced by a
    random one in `folder`. Its checkpoints are kept all."""
    network = "classifier" if hasattr(cfg, "classifier") else "model"
    small = _small_network(getattr(cfg, network))
    changes: dict[str, Any] = {field.name: getattr(machine, field.name) for field in fields(machine)}
    changes |= {
        "name": "smoke_doctor",
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "max_nonfinite_steps": 3,
    }
    changes |= {
        network: small,
        "held_out": 0.0,
        "init_from": None,
        "compile": False,
        "workers": 0,
        "pairs": None,
        "bucket": None,
    }
    changes["checkpoint"] = replace(cfg.checkpoint, every=1, every_minutes=None, keep=99)
    changes["steps"] = STEPS
    if cfg.image is None:
        changes["data"] = MoonsSource(source="moons", count=64)
        if not _is_gaussian(cfg):
            changes["source"] = MoonsSource(source="moons", count=64)
        return rehearsal_config(cfg, **changes)
    latent = isinstance(cfg, LatentConfig) and cfg.autoencoder is not None
    size = max(16, getattr(small, "factor", 1) * (2 if latent else 1))
    changes["image"] = replace(cfg.image, size=size)
    changes["data"] = ShapesSource(source="shapes", count=24, size=size)
    if isinstance(cfg, BlendConfig) and not _is_gaussian(cfg):
        changes["source"] = ShapesSource(source="shapes", count=24, size=size, split="test")
    if latent:
        vae = VAEConfig(widths=(8, 16), blocks=1, norm_groups=4)
        torch.manual_seed(0)
        document = {"kind": "atelier", "model": dump(vae), "channels": cfg.image.channels, "tanh": False, "sizes": [size]}
        document |= {"path": str(folder / "autoencoder"), "digest": "random"}
        weights = VAE(vae, cfg.image.channels).state_dict()
        write_folder(folder / "autoencoder", {"autoencoder": weights}, {"autoencoder_config": document})
        changes |= {"autoencoder": str(folder / "autoencoder"), "latents": str(folder / "latents"), "encode_batch_size": 4}
    if isinstance(cfg, StagedConfig):
        each = -(-STEPS // len(cfg.stages))
        plain = {"perceptual": None, "image_size": None, "batch_size": None, "micro_batch_size": None}
        changes["stages"] = tuple(replace(stage, **plain) for stage in short_stages(cfg, each))
        changes["image"] = replace(cfg.image, size=max(32, small.factor))
        changes["discriminator"] = replace(cfg.discriminator, base_channels=8, layers=min(2, cfg.discriminator.layers))
    return rehearsal_config(cfg, **changes)


def steps_of(cfg: TrainConfig) -> int:
    """How many steps a config has that was made small."""
    return -(-STEPS // len(cfg.stages)) * len(cfg.stages) if isinstance(cfg, StagedConfig) else STEPS


def _is_gaussian(cfg: TrainConfig) -> bool:
    return isinstance(cfg, BlendConfig) and isinstance(cfg.source, GaussianSource)


def _small_network(network: Any) -> Any:
    """The same kind of network with few channels."""
    if isinstance(network, MLPConfig):
        return replace(network, width=24, layers=2)
    if isinstance(network, VAEConfig):
        bottleneck = replace(network.bottleneck, codes=16) if network.bottleneck.kind == "vq" else network.bottleneck
        widths = (16,) * len(network.widths)
        return replace(network, widths=widths, blocks=1, norm_groups=8, head_channels=None, bottleneck=bottleneck)
    if isinstance(network, EncoderConfig):
        heads = {"head_channels": 16 if network.num_heads is None else None, "num_heads": network.num_heads and 2}
        mult = tuple(1.0 if mult == min(network.channel_mult) else 2.0 for mult in network.channel_mult)
        return replace(network, base_channels=16, channel_mult=mult, blocks=1, norm_groups=8, **heads)
    return network
