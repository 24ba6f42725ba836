"""Folders of diffusers whose U-Net sees latents: a latent run written as one, and read back with its autoencoder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import UserError, quoted, read_json
from ..models import VAE
from ..runs import diffusers_autoencoder
from ..runs.autoencoder import Autoencoder, open_autoencoder
from ..runs.diffusers_autoencoder import DiffusersAutoencoder
from ..runs.folders import Weights
from ..storage.weight_files import read_foreign_json
from . import diffusers
from .autoencoder_kl import autoencoder_kl_files, check_expressible
from .diffusers import LATENTS, LatentPart
from .imported import Imported
from .own_folders import data_lines

CPU = torch.device("cpu")


def autoencoder_files(autoencoder: Autoencoder, facts: dict[str, Any] | None = None) -> dict[str, bytes]:
    """The files of the AutoencoderKL that an autoencoder is, ours or diffusers'; with the `facts` of a latent run its latents
    are the normalised ones. A UserError says why ours cannot be one."""
    network = autoencoder.network
    if isinstance(network, DiffusersAutoencoder):
        return diffusers_autoencoder.autoencoder_files(network)
    assert isinstance(network, VAE)
    check_expressible(network, autoencoder.path)
    mean, std = (facts["mean"], facts["std"]) if facts is not None else (None, None)
    return autoencoder_kl_files(network, autoencoder.document, autoencoder.digest, mean, std)


def latent_part(autoencoder: Autoencoder, facts: dict[str, Any]) -> LatentPart:
    """What `diffusers.export` writes of a latent run besides its U-Net."""
    return LatentPart(facts=facts, autoencoder=autoencoder_files(autoencoder, facts))


def read(name: str | Path, *, which: str | None = None) -> Imported:
    """What `diffusers.read` gives of `which` network, and, where the folder has an autoencoder in `vae`, with it: the U-Net
    sees its latents."""
    folder = diffusers.local_folder(name)
    refuse_what_needs_no_conversion(folder, str(name))
    return with_latents(diffusers.read(name, which=which), folder)


def refuse_what_needs_no_conversion(folder: Path, name: str) -> None:
    """A UserError for an AutoencoderKL by itself, and for a folder that Atelier opens as it is."""
    kind = read_foreign_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if isinstance(kind, dict) and kind.get("_class_name") == "AutoencoderKL":
        raise UserError(
            f"{name} is an AutoencoderKL, which needs no conversion: name it as it is, as in train_ldm.py --set "
            f"autoencoder={name}"
        )
    if (folder / "MANIFEST.json").is_file() and (folder / "ema.safetensors").is_file():
        raise UserError(f"{name} is a folder of Atelier's own, which needs no conversion: name it where a run is asked for")


def with_latents(found: Imported, folder: Path) -> Imported:
    """An imported U-Net with the autoencoder in `vae` of the folder that it came from, whose latents it sees; as it is where
    there is none. A UserError where the two do not fit, or nothing says how the latents are normalised."""
    if not (folder / "vae" / "config.json").is_file():
        return found
    autoencoder = open_autoencoder(str(folder / "vae"), CPU)
    size = found.image_size
    if autoencoder.latent_channels != found.channels:
        raise UserError(
            f"{folder}: the autoencoder in vae has latents of {autoencoder.latent_channels} channels, and the U-Net sees "
            f"{found.channels}"
        )
    facts = _facts(folder, autoencoder, [found.channels, size, size])
    told = [f"autoencoder: {folder / 'vae'}", f"latents: {folder / LATENTS if facts is not None else 'by its own scaling'}"]
    return replace(
        found,
        autoencoder=autoencoder,
        latents=facts,
        image_size=size * autoencoder.factor,
        channels=autoencoder.channels,
        told=(*found.told, *told),
        script="train_iadb.py" if found.process.target == "blend" else "train_ldm.py",
    )


def _facts(folder: Path, autoencoder: Autoencoder, shape: list[int]) -> dict[str, Any] | None:
    """What our latents.json says; None where the autoencoder's own scaling says it. A UserError where neither does."""
    path = folder / LATENTS
    facts = read_json(path) if path.is_file() else None
    if facts is None or not isinstance(facts, dict) or facts.get("autoencoder") != autoencoder.digest:
        if autoencoder.scaling is None:
            raise UserError(f"{path} is missing or belongs to another autoencoder: it says how the latents are normalised")
        return None
    each = [facts.get(key) for key in ("mean", "std", "low", "high")]
    good = all(isinstance(values, list) and len(values) == shape[0] for values in each) and facts.get("shape") == shape
    numbers = good and all(type(value) in (int, float) for values in each for value in values or [])
    if not numbers or not all(value > 0 for value in facts["std"]):
        raise UserError(f"{path}: it needs the shape {shape} of the latents, and mean, std, low, high of {shape[0]} channels")
    return facts


def autoencoder_card(autoencoder: Autoencoder, weights: Weights, folder: str) -> str:
    """The README.md of an autoencoder's folder of diffusers."""
    sizes = " and ".join(f"{size} px" for size in sorted(autoencoder.sizes or ()))
    size, channels = min(autoencoder.sizes or (64,)), autoencoder.channels
    lines = [
        "---",
        "library_name: diffusers",
        "tags:",
        "- autoencoder",
        "- atelier",
        "---",
        "",
        f"# {weights.config['name']}",
        "",
        f"An AutoencoderKL that was trained with Atelier at {sizes} for {weights.step} steps. It makes images "
        f"{autoencoder.factor} times smaller in height and width, with {autoencoder.latent_channels} channels.",
        "",
        "```python",
        "import torch",
        "from diffusers import AutoencoderKL",
        "",
        f"vae = AutoencoderKL.from_pretrained({json.dumps(folder, ensure_ascii=False)})",
        f"images = torch.rand(1, {channels}, {size}, {size}) * 2 - 1",
        "with torch.no_grad():",
        "    z = vae.encode(images).latent_dist.mean",
        "    images = vae.decode(z).sample",
        "```",
        "",
        "Its latents are as the network has them: `scaling_factor` is 1. Measure their mean and standard deviation before you "
        "train diffusion on them; Atelier does that itself:",
        "",
        "```bash",
        f"python train_ldm.py -cfg CONFIG.json --set autoencoder={quoted(folder)}",
        "```",
        "",
        *data_lines(weights.data),
    ]
    return "\n".join(lines)
