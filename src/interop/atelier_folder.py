"""A latent run or an autoencoder as one self-contained folder that can be given away: safetensors, JSON and a README.md."""

from pathlib import Path
from typing import Any

import torch

from ..config import UserError, read_json
from ..models import VAE, UNet
from ..runs.autoencoder import Autoencoder, kept_autoencoder, open_autoencoder
from ..runs.diffusers_autoencoder import KL_NAME
from ..runs.folders import Weights
from ..runs.opened import Opened, open_trained
from ..runtime.checkpoint import write_folder
from ..storage.files import check_is_new
from .autoencoder_kl import obstacles
from .cards import render_card
from .unet_2d import unet2d_config

CPU = torch.device("cpu")


def is_autoencoder(weights: Weights) -> bool:
    return "stages" in weights.config


def is_latent(weights: Weights) -> bool:
    return "latents" in weights.data


def write_atelier_folder(run: str, weights: Weights, out: Path, *, half: bool = False) -> None:
    """Write the EMA weights of the latent run or autoencoder `run` into the new folder `out`, with all that opens them again.
    The folder opens wherever a run is asked for. It is whole or absent. With `half` the weights are in half precision, but for
    a codebook, and for the autoencoder of a latent run, whose hash the run knows. A UserError where `out` is there already."""
    check_is_new(out)
    documents: dict[str, Any] = {"config": weights.config, "data": weights.data, "progress": {"step": weights.step}}
    tensors = {"ema": weights.tensors}
    if half:
        whole = {key for key, value in weights.tensors.items() if key.startswith("codebook.") or not value.is_floating_point()}
        tensors["ema"] = {key: value if key in whole else value.half() for key, value in weights.tensors.items()}
    if is_autoencoder(weights):
        documents["progress"] |= {"tanh": read_json(weights.folder / "progress.json")["tanh"]}
        autoencoder = open_autoencoder(run, CPU)
        card, values = "atelier_autoencoder", {"obstacles": obstacles(autoencoder.network)}
    else:
        autoencoder, opened = kept_autoencoder(weights.folder, CPU), open_trained(run, CPU)
        autoencoder_tensors, autoencoder_documents = autoencoder.files()
        tensors, documents = tensors | autoencoder_tensors, documents | autoencoder_documents
        card, values = "atelier_latent", {"opened": opened, "obstacles": latent_obstacles(opened, autoencoder)}
    readme = render_card(card, autoencoder=autoencoder, weights=weights, folder=out.resolve().name, **values)
    write_folder(out.resolve(), tensors, documents, readme=readme)


def latent_obstacles(opened: Opened, autoencoder: Autoencoder) -> list[str]:
    """The reasons why diffusers cannot have this latent run; none where it can."""
    reasons = [] if opened.gaussian else ["it does not start from Gaussian noise"]
    reasons += ["it draws from other images"] if opened.condition is not None else []
    try:
        if not isinstance(opened.network, UNet):
            raise UserError("its network is no U-Net")
        unet2d_config(opened.network, image_size=(opened.shape[1], opened.shape[2]))
    except UserError as error:
        reasons.append(str(error))
    if isinstance(autoencoder.network, VAE) and (faults := obstacles(autoencoder.network)):
        reasons.append(f"AutoencoderKL cannot be its autoencoder: {', '.join(faults)}")
    class_name = getattr(autoencoder.network, "class_name", KL_NAME)
    reasons += [f"its autoencoder is diffusers' {class_name}, and this export has an AutoencoderKL"] * (class_name != KL_NAME)
    return reasons
