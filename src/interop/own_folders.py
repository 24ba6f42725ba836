"""A latent run or an autoencoder as one self-contained folder that can be given away: safetensors, JSON and a README.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UserError, quoted, read_json
from ..models import VAE, UNet
from ..runs.autoencoder import Autoencoder, kept_autoencoder, open_autoencoder
from ..runs.folders import Weights
from ..runs.opened import Opened, open_trained
from ..runtime.checkpoint import write_folder
from .autoencoder_kl import obstacles
from .diffusers import unet2d_config

CPU = torch.device("cpu")


def is_autoencoder(weights: Weights) -> bool:
    return "stages" in weights.config


def is_latent(weights: Weights) -> bool:
    return "latents" in weights.data


def write_own(run: str, weights: Weights, out: Path, *, half: bool = False) -> None:
    """Write the EMA weights of the latent run or autoencoder `run` into the new folder `out`, with all that opens them again.
    The folder opens wherever a run is asked for. It is whole or absent.

    With `half` the weights are in half precision, but for a codebook, and for the autoencoder of a latent run, whose bytes the
    run knows. A UserError where `out` is there already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give another --out")
    documents: dict[str, Any] = {"config": weights.config, "data": weights.data, "progress": {"step": weights.step}}
    ema = _halved(weights.tensors) if half else dict(weights.tensors)
    tensors: dict[str, Mapping[str, Tensor]] = {"ema": ema}
    if is_autoencoder(weights):
        autoencoder = open_autoencoder(run, CPU)
        documents["progress"] |= {"tanh": read_json(weights.folder / "progress.json")["tanh"]}
        readme = autoencoder_card(weights, autoencoder, out.resolve().name)
    else:
        opened = open_trained(run, CPU)
        autoencoder = kept_autoencoder(weights.folder, CPU)
        kept, described = autoencoder.files()
        tensors, documents = {**tensors, **kept}, {**documents, **described}
        readme = latent_card(weights, opened, autoencoder, out.resolve().name)
    write_folder(out.resolve(), tensors, documents, readme=readme)


def _halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: value.half() if value.is_floating_point() and not key.startswith("codebook.") else value
        for key, value in state.items()
    }


# ---------------------------------------------------------------------------------------------- the cards


def _million(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters"


def _head(name: str, *tags: str) -> list[str]:
    return ["---", "tags:", "- atelier", *(f"- {tag}" for tag in tags), "---", "", f"# {name}", ""]


def data_lines(data: Mapping[str, Any], *, classes: bool = True) -> list[str]:
    """What a run knows of its data, as Markdown: counts, classes."""
    lines = []
    if "images" in data:
        held_out = data.get("held_out_images", 0)
        kept = f"; {held_out} more images are held out" if held_out else ""
        lines += [f"Data: the run learned from {data['images']} images{kept}.", ""]
    elif "imported" in data:
        lines += ["Data: the weights were imported, and nothing is known of what they learned from.", ""]
    names, counts = list(data.get("class_names") or []), data.get("counts") or {}
    if names and classes:
        told = [f"{i} {name}" + (f" ({counts[name]} images)" if name in counts else "") for i, name in enumerate(names)]
        lines += [f"Classes: {', '.join(told)}.", ""]
    return lines


def latent_lines(facts: Mapping[str, Any]) -> list[str]:
    """The statistics of latents, as Markdown."""
    rows = zip(facts["mean"], facts["std"], facts["low"], facts["high"], strict=True)
    table = [f"| {i} | {' | '.join(f'{value:.6g}' for value in row)} |" for i, row in enumerate(rows)]
    return [
        "Diffusion sees each channel of the latents normalised, (z - mean) / std; low and high are of the normalised ones.",
        "",
        "| channel | mean | std | low | high |",
        "| --- | --- | --- | --- | --- |",
        *table,
        "",
    ]


def _colours(channels: int) -> str:
    return "RGB" if channels == 3 else "grey"


def autoencoder_card(weights: Weights, autoencoder: Autoencoder, folder: str) -> str:
    """The README.md of an autoencoder's folder."""
    network = autoencoder.network
    assert isinstance(network, VAE)
    sizes = " and ".join(f"{size} px" for size in sorted(autoencoder.sizes or ()))
    bottleneck = "a codebook" if network.vq else "a Gaussian at each position"
    reasons = obstacles(network.spec, tanh=network.tanh)
    theirs = (
        f"diffusers' AutoencoderKL cannot be this network: {'; '.join(reasons)}."
        if reasons
        else f"`python convert.py to-diffusers {quoted(folder)} --out OTHER` makes diffusers' AutoencoderKL of it."
    )
    return _text(
        [
            *_head(weights.config["name"], "autoencoder"),
            f"An autoencoder of {_colours(autoencoder.channels)} images, trained with Atelier at {sizes} for {weights.step} "
            f"steps: {_million(network)}. It makes images {autoencoder.factor} times smaller in height and width, with "
            f"{autoencoder.latent_channels} channels and {bottleneck}.",
            "",
            *data_lines(weights.data),
            f"`ema.safetensors` holds the weights, `config.json` the architecture. {CODE_FREE}",
            "",
            "With Atelier, diffusion on its latents, and another autoencoder that starts from it:",
            "",
            "```bash",
            f"python train_ldm.py -cfg CONFIG.json --set autoencoder={quoted(folder)}",
            f"python train_vae.py -cfg CONFIG.json --set init_from={quoted(folder)}",
            "```",
            "",
            theirs,
        ]
    )


CODE_FREE = "Both are safetensors and JSON: no code runs when they are loaded. Atelier reads the folder as it is."


def latent_card(weights: Weights, opened: Opened, autoencoder: Autoencoder, folder: str) -> str:
    """The README.md of a latent run's folder."""
    facts, image, classes = weights.data["latents"], opened.image, opened.num_classes
    shape = " x ".join(map(str, facts["shape"]))
    spec = opened.process
    kind = f"with {classes} classes" if classes is not None else "without classes"
    chosen = " --classes 0" if classes is not None else ""
    script = "train_iadb.py" if spec.target == "blend" else "train_ldm.py"
    return _text(
        [
            *_head(
                opened.name,
                "latent-diffusion",
                "class-conditional" if classes is not None else "unconditional-image-generation",
            ),
            f"A latent diffusion model of {_colours(image.channels)} images of {image.size} x {image.size} pixels, {kind}, "
            f"trained with Atelier for {weights.step} steps: a U-Net of {_million(opened.network)} on latents of {shape}; it "
            f"predicts {spec.target} on the {weights.config['process']['schedule']['kind']} schedule, and an "
            f"autoencoder of {_million(autoencoder.network)}.",
            "",
            *data_lines(weights.data, classes=classes is not None),
            *latent_lines(facts),
            "`ema.safetensors` holds the U-Net, `autoencoder.safetensors` the autoencoder, `config.json`, `data.json` and "
            f"`autoencoder_config.json` what builds them. {CODE_FREE.replace('Both', 'All')}",
            "",
            "With Atelier, samples, and a run that starts from it:",
            "",
            "```bash",
            f"python sample.py {quoted(folder)} --num-samples 16{chosen}",
            f"python {script} -cfg CONFIG.json --set init_from={quoted(folder)}",
            "```",
            "",
            _theirs(opened, autoencoder, folder),
        ]
    )


def latent_obstacles(opened: Opened, autoencoder: Autoencoder) -> list[str]:
    """Why diffusers cannot have this latent run, a reason for each half; nothing where it can."""
    reasons, network = [], autoencoder.network
    if not opened.gaussian:
        reasons.append("it does not start from Gaussian noise")
    try:
        assert isinstance(opened.network, UNet)
        unet2d_config(opened.network, image_size=opened.shape[1])
    except UserError as error:
        reasons.append(str(error))
    if isinstance(network, VAE) and (found := obstacles(network.spec, tanh=network.tanh)):
        reasons.append(f"AutoencoderKL cannot be its autoencoder: {', '.join(found)}")
    return reasons


def _theirs(opened: Opened, autoencoder: Autoencoder, folder: str) -> str:
    reasons = latent_obstacles(opened, autoencoder)
    if reasons:
        return f"diffusers cannot have it: {'; '.join(reasons)}."
    return f"`python convert.py to-diffusers {quoted(folder)} --out OTHER` writes it as a folder that diffusers loads."


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
