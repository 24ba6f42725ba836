"""diffusers' AutoencoderKL behind the interface of our autoencoder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ..config import UserError, quoted
from ..config.packages import ask_for, needed
from ..models.pretrained import import_torchvision
from ..storage.hub import from_hub
from ..storage.networks import KL, few, find_network, present_names
from ..storage.weight_files import find_files, read_files, read_foreign_json

VERSION = "0.35.0"  # of diffusers, the oldest whose folders these are


WEIGHTS = "diffusion_pytorch_model"


RESIDUAL = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "embed": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "skip": "conv_shortcut",
}


ATTENTION = {"norm": "group_norm", "qkv": "qkv", "out": "to_out.0"}


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
        scale, shift = theirs["scaling_factor"], theirs.get("shift_factor") or 0.0
        if not isinstance(scale, int | float) or not isinstance(shift, int | float) or scale == 0 or not math.isfinite(scale):
            raise UserError(f"an AutoencoderKL with scaling_factor {scale!r} and shift_factor {shift!r} cannot be used")
        self.scaling = (float(shift), 1.0 / scale)
        self.notes: tuple[str, ...] = ()

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) in [-1, 1] -> mean and logvar (B, D, h, w), as the network has them."""
        found = self.network.encode(images).latent_dist
        return found.mean, found.logvar

    def decode(self, z: Tensor) -> Tensor:
        """(B, D, h, w) as the network has them -> (B, C, H, W)."""
        return self.network.decode(z).sample


def autoencoder_files(network: DiffusersAutoencoder) -> dict[str, bytes]:
    """The files of an AutoencoderKL's folder by name, as it is."""
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": VERSION, **network.config}
    state = {key: value.detach().cpu().contiguous() for key, value in network.network.state_dict().items()}
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode(), f"{WEIGHTS}.safetensors": weights}


def _autoencoder_class() -> Any:
    import_torchvision()
    with needed("a diffusers autoencoder", "diffusers"):
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    return AutoencoderKL


def autoencoder_from_config(config: Mapping[str, Any]) -> DiffusersAutoencoder:
    """An AutoencoderKL of this config, its weights still to be loaded."""
    return DiffusersAutoencoder(_autoencoder_class().from_config(dict(config)))


KNOWN = "stabilityai/sd-vae-ft-mse"


WHOLE = ("encoder", "decoder", "quant_conv", "post_quant_conv")


def _autoencoder_place(folder: Path, name: str) -> tuple[Path, dict[str, Any], list[str]]:
    """Where an AutoencoderKL is in the folder, its config, and in words what was chosen. A UserError says what is there
    instead."""
    wanted = f"an AutoencoderKL, such as {KNOWN}, is what can be used"
    place, told = folder, list[str]()
    if not (folder / "config.json").is_file() or (folder / "vae" / "config.json").is_file():
        place = folder / "vae"
        told = [f"the autoencoder is {place}, a part of the pipeline {folder}"]
    if not (place / "config.json").is_file():
        inside = {
            path.parent.name: read_foreign_json(path).get("_class_name", "?") for path in sorted(folder.glob("*/config.json"))
        }
        index = read_foreign_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
        what = f"a {index['_class_name']}" if "_class_name" in index else "a folder"
        parts = few((f"{sub} ({kind})" for sub, kind in inside.items()), 6) or few(path.name for path in folder.iterdir())
        if (folder / "vae").is_dir():
            raise UserError(f"autoencoder {name}: {folder / 'vae'} has no config.json, which says what its weights are")
        lacks = "vae/ with an AutoencoderKL" if inside or index else "config.json"
        raise UserError(f"autoencoder {name} is {what} without {lacks}; it holds {parts or 'nothing'}; {wanted}")
    config = read_foreign_json(place / "config.json")
    kind = config.get("_class_name")
    if kind is None and not {"block_out_channels", "latent_channels"} <= set(config):
        raise UserError(f"autoencoder {name}: {place / 'config.json'} does not say its _class_name; {wanted}")
    if kind not in ("AutoencoderKL", None):
        come = f"; a network is brought in by: python convert.py diffusers {quoted(name)}"
        hint = come if kind == "UNet2DModel" else ""
        what = "a diffusion network and no autoencoder" if str(kind).startswith("UNet") else "no AutoencoderKL"
        raise UserError(f"autoencoder {name}: {place} is of the class {kind}, which is {what}; {wanted}{hint}")
    return place, config, told


def load_autoencoder(name: str) -> DiffusersAutoencoder:
    """diffusers' AutoencoderKL from a folder or the hub (the subfolder `vae` of a whole pipeline, too), its weights in any
    file, whole or in shards, read without running anything. A UserError says why it cannot be loaded: what the folder is
    instead, which weights are missing, or that the hub was not reached."""
    ask_for("a diffusers autoencoder", "diffusers")  # before anything is brought
    folder = Path(name).expanduser()
    on_hub = not folder.is_dir()
    if on_hub:
        try:
            folder = from_hub(name, ["model_index.json", "config.json", "*/config.json"])
        except UserError as error:
            raise UserError(f"autoencoder {name} is no folder here: {error}") from None
    place, config, told = _autoencoder_place(folder, name)
    if on_hub:
        inside = "" if place == folder else f"{place.name}/"
        try:
            from_hub(name, [f"{inside}{WEIGHTS}.safetensors"])
            if not any(place.glob("*.safetensors")):
                from_hub(name, [f"{inside}{WEIGHTS}.bin", *(f"{inside}*{end}" for end in (".safetensors", ".index.json"))])
        except UserError as error:
            raise UserError(f"autoencoder {name}: {error}") from None
    try:
        files, left = find_files(place)
        state, taken = find_network(read_files(files), KL, place / files.name)
    except UserError as error:
        raise UserError(f"autoencoder {name}: {error}") from None
    try:
        found = autoencoder_from_config(config)
    except UserError:
        raise
    except Exception as error:  # of values that its class cannot be built of
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"autoencoder {name}: no AutoencoderKL can be built of {place / 'config.json'}: {reason}") from None
    more = _load_autoencoder_weights(found.network, state, f"autoencoder {name}: {place / files.name}")
    found.notes = (*told, f"autoencoder: {place}, {taken[0].removeprefix('network: ')}", *taken[1:], *more, *left)
    return found


def _load_autoencoder_weights(network: nn.Module, state: Mapping[str, Tensor], where: str) -> list[str]:
    """Put the weights into the network; gives, in words, what was left out. A UserError says what is missing."""
    state, own = present_names(state), network.state_dict()
    missing, extra = [key for key in own if key not in state], [key for key in state if key not in own]
    beside = [key for key in extra if key.split(".")[0] not in WHOLE]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, the config wants {tuple(own[key].shape)}"
        for key in own
        if key in state and [n for n in state[key].shape if n != 1] != [n for n in own[key].shape if n != 1]
    ]
    if "encoder.down.0.block.0.conv1.weight" in state:
        raise UserError(f"{where} has the names of CompVis's latent-diffusion; convert it to diffusers' AutoencoderKL first")
    if missing or shapes or len(extra) > len(beside):
        parts = [f"it lacks {few(missing)}"] if missing else []
        parts += [f"it has in excess {few(key for key in extra if key not in beside)}"] if len(extra) > len(beside) else []
        parts += shapes[:1]
        raise UserError(f"{where} does not hold the weights of a whole AutoencoderKL of its config.json: {'; '.join(parts)}")
    network.load_state_dict({key: state[key].reshape(value.shape).to(value.dtype) for key, value in own.items()})
    return [f"left out, tensors of no AutoencoderKL: {few(beside)}"] if beside else []
