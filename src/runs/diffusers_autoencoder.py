"""diffusers' AutoencoderKL behind the interface of our autoencoder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..config import UserError, prefix_errors, quoted
from ..config.packages import ask_for, needed
from ..models.pretrained import import_torchvision
from ..storage.downloads import from_hub
from ..storage.networks import KL, few, find_network, present_names
from ..storage.weight_files import find_files, read_files, read_foreign_json

VERSION = "0.35.0"  # the oldest version of diffusers that reads the folders that we write
WEIGHTS = "diffusion_pytorch_model"
KNOWN = "stabilityai/sd-vae-ft-mse"
PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")  # of an AutoencoderKL: the first words of its names

# The names inside a residual block and an attention: ours -> diffusers'. Its to_q, to_k and to_v count as one `qkv`.
RESIDUAL = {"norm_1": "norm1", "conv_1": "conv1", "embed": "time_emb_proj"}
RESIDUAL |= {"norm_2": "norm2", "conv_2": "conv2", "skip": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "qkv": "qkv", "out": "to_out.0"}


def pair_names(ours: str, theirs: str, inside: Mapping[str, str]) -> dict[str, str]:
    """The names inside one of our modules -> the names inside theirs."""
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inside.items()}


def fuse_qkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of diffusers with to_q, to_k and to_v joined to the one `qkv` that our attention has."""
    fused = present_names(state_dict)
    for key in [key for key in fused if ".to_q." in key]:
        names = [key.replace(".to_q.", f".to_{part}.") for part in "qkv"]
        if all(name in fused for name in names):
            fused[key.replace(".to_q.", ".qkv.")] = torch.cat([fused.pop(name) for name in names])
    return fused


class DiffusersAutoencoder(nn.Module):
    """An AutoencoderKL with our names: moments(images) and decode(z). `scaling` is the mean and the standard deviation of its
    latents, by its shift_factor and scaling_factor; `notes` say in words which weights were taken."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        theirs = network.config
        self.config = {key: value for key, value in dict(theirs).items() if not key.startswith("_")}
        self.channels, self.latent_channels = theirs["in_channels"], theirs["latent_channels"]
        self.factor = 2 ** (len(theirs["block_out_channels"]) - 1)
        scale, shift = theirs["scaling_factor"], theirs.get("shift_factor") or 0.0
        if not isinstance(scale, int | float) or not isinstance(shift, int | float) or scale == 0 or not math.isfinite(scale):
            raise UserError(f"an AutoencoderKL with scaling_factor {scale!r} and shift_factor {shift!r} cannot be used")
        self.scaling = (float(shift), 1.0 / scale)
        self.notes: tuple[str, ...] = ()

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) in [-1, 1] -> mean and logvar (B, D, h, w), not normalised."""
        posterior = self.network.encode(images).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, z: Tensor) -> Tensor:
        """(B, D, h, w), not normalised -> (B, C, H, W)."""
        return self.network.decode(z).sample


def autoencoder_files(network: DiffusersAutoencoder) -> dict[str, bytes]:
    """The files of an AutoencoderKL's folder by name, unchanged."""
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": VERSION, **network.config}
    state_dict = {key: value.detach().cpu().contiguous() for key, value in network.network.state_dict().items()}
    weights = safetensors.torch.save(state_dict, metadata={"format": "pt"})
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode(), f"{WEIGHTS}.safetensors": weights}


def autoencoder_from_config(config: Mapping[str, Any]) -> DiffusersAutoencoder:
    """An AutoencoderKL of this config, with random weights."""
    import_torchvision()
    with needed("a diffusers autoencoder", "diffusers"):
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    return DiffusersAutoencoder(AutoencoderKL.from_config(dict(config)))


def _find_autoencoder(folder: Path, name: str) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder of an AutoencoderKL in `folder`, its config, and notes on what was chosen. A UserError says what is in the
    folder instead."""
    usable = f"an AutoencoderKL, such as {KNOWN}, is what can be used"
    place, notes = folder, list[str]()
    if not (folder / "config.json").is_file() or (folder / "vae" / "config.json").is_file():
        place = folder / "vae"
        notes = [f"the autoencoder is {place}, a part of the pipeline {folder}"]
    if not (place / "config.json").is_file():
        if (folder / "vae").is_dir():
            raise UserError(f"autoencoder {name}: {folder / 'vae'} has no config.json, which says what its weights are")
        configs = {path.parent.name: read_foreign_json(path) for path in sorted(folder.glob("*/config.json"))}
        index = read_foreign_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
        kind = f"a {index['_class_name']}" if "_class_name" in index else "a folder"
        parts = few((f"{sub} ({config.get('_class_name', '?')})" for sub, config in configs.items()), 6)
        contents = parts or few(path.name for path in folder.iterdir()) or "nothing"
        missing = "vae/ with an AutoencoderKL" if configs or index else "config.json"
        raise UserError(f"autoencoder {name} is {kind} without {missing}; it holds {contents}; {usable}")
    config = read_foreign_json(place / "config.json")
    kind = config.get("_class_name")
    if kind is None and not {"block_out_channels", "latent_channels"} <= set(config):
        raise UserError(f"autoencoder {name}: {place / 'config.json'} does not say its _class_name; {usable}")
    if kind not in ("AutoencoderKL", None):
        hint = f"; import a network with: python convert.py diffusers {quoted(name)}" if kind == "UNet2DModel" else ""
        words = "a diffusion network and no autoencoder" if str(kind).startswith("UNet") else "no AutoencoderKL"
        raise UserError(f"autoencoder {name}: {place} is of the class {kind}, which is {words}; {usable}{hint}")
    return place, config, notes


def load_autoencoder(name: str) -> DiffusersAutoencoder:
    """diffusers' AutoencoderKL from a folder or the hub, or from the subfolder `vae` of a whole pipeline.

    Its weights may be in any file, whole or in shards, and no code in them runs. A UserError says why it cannot be loaded:
    what the folder is instead, which weights are missing, or that the hub was not reached.
    """
    ask_for("a diffusers autoencoder", "diffusers")  # before anything is downloaded
    folder = Path(name).expanduser()
    on_hub = not folder.is_dir()
    if on_hub:
        with prefix_errors(f"autoencoder {name} is no folder here"):
            folder = from_hub(name, ["model_index.json", "config.json", "*/config.json"])
    place, config, notes = _find_autoencoder(folder, name)
    with prefix_errors(f"autoencoder {name}"):
        if on_hub:
            inside = "" if place == folder else f"{place.name}/"
            from_hub(name, [f"{inside}{WEIGHTS}.safetensors"])
            if not any(place.glob("*.safetensors")):
                from_hub(name, [f"{inside}{file}" for file in (f"{WEIGHTS}.bin", "*.safetensors", "*.index.json")])
        files, left_out = find_files(place)
        state_dict, weight_notes = find_network(read_files(files), KL, place / files.name)
    try:
        autoencoder = autoencoder_from_config(config)
    except UserError:
        raise
    except Exception as error:  # AutoencoderKL raises errors of many kinds for values that it does not take
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"autoencoder {name}: no AutoencoderKL can be built of {place / 'config.json'}: {reason}") from None
    unused = _load_weights(autoencoder.network, state_dict, f"autoencoder {name}: {place / files.name}")
    first, *others = weight_notes
    autoencoder.notes = (*notes, f"autoencoder: {place}, {first.removeprefix('network: ')}", *others, *unused, *left_out)
    return autoencoder


def _load_weights(network: nn.Module, state_dict: Mapping[str, Tensor], where: str) -> list[str]:
    """Put the weights into the network, and give notes on what was left out. A UserError says what is missing."""
    state_dict, wanted = present_names(state_dict), network.state_dict()
    if "encoder.down.0.block.0.conv1.weight" in state_dict:
        raise UserError(f"{where} has the names of CompVis's latent-diffusion; convert it to diffusers' AutoencoderKL first")
    missing, unknown = set(wanted) - set(state_dict), set(state_dict) - set(wanted)
    beside = {key for key in unknown if key.split(".")[0] not in PARTS}
    shapes = [
        f"{key} is {tuple(state_dict[key].shape)}, the config wants {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state_dict and [n for n in state_dict[key].shape if n != 1] != [n for n in value.shape if n != 1]
    ]
    faults = [f"it lacks {few(missing)}"] if missing else []
    faults += [f"it has in excess {few(unknown - beside)}"] if unknown > beside else []
    if faults := faults + shapes[:1]:
        raise UserError(f"{where} does not hold the weights of a whole AutoencoderKL of its config.json: {'; '.join(faults)}")
    network.load_state_dict({key: state_dict[key].reshape(value.shape).to(value.dtype) for key, value in wanted.items()})
    return [f"left out, tensors of no AutoencoderKL: {few(beside)}"] if beside else []
