"""Imported networks that see latents: the autoencoder that makes images of them."""

from dataclasses import replace
from pathlib import Path

import torch

from ..config import UserError
from ..runs.autoencoder import Autoencoder, open_autoencoder
from .imported import Imported


def open_scaled(name: str, channels: int) -> Autoencoder:
    """The autoencoder of an imported network that sees latents of `channels` channels. A UserError where it makes others, or
    where its latents have no scale of their own, which no checkpoint says."""
    found = open_autoencoder(name, torch.device("cpu"))
    if found.latent_channels != channels:
        raise UserError(
            f"the autoencoder {found.path} has latents of {found.latent_channels} channels, and the network sees {channels}"
        )
    if found.scaling is None:
        raise UserError(
            f"the latents of {found.path} have no scale of their own, and the checkpoint does not say theirs; only a diffusers "
            "AutoencoderKL, with its scaling_factor, can be assumed"
        )
    return found


def with_autoencoder(found: Imported, origin: str, name: str | None) -> Imported:
    """An imported network together with the autoencoder `name`, or, where that is None and the network sees latents, with the
    one in the folder `origin` that it came from. A network on images is given back as it is.

    A UserError where the network sees latents and no autoencoder is named or there, or the other way round.
    """
    latent = found.channels not in (1, 3)
    inside = next((Path(origin) / sub for sub in ("vae", "vqvae", "movq") if (Path(origin) / sub).is_dir()), None)
    if found.autoencoder is not None or (name is None and not latent and inside is None):
        return found
    if not latent and name is None:
        raise UserError(
            f"{origin} holds the autoencoder {inside}, and its network sees {found.channels} channels, as images have: give "
            "--autoencoder if these are latents, else the folder of the network alone"
        )
    if name is None and inside is None:
        raise UserError(
            f"{origin}: the network sees {found.channels} channels, which no image has, so they are latents: give "
            "--autoencoder NAME, a diffusers AutoencoderKL as folder or hub name, such as stabilityai/sd-vae-ft-mse"
        )
    autoencoder = open_scaled(name if name is not None else str(inside), found.channels)
    mean, deviation = autoencoder.scaling or (0.0, 1.0)
    side, size = found.image_size, found.image_size * autoencoder.factor
    told = (
        *found.told,
        *autoencoder.notes,
        f"latents: {found.channels} x {side} x {side} of {autoencoder.path}, less {mean:g} over {deviation:g} by its own "
        f"scaling; images of {size} px",
    )
    script = "train_ldm.py" if found.script == "ddpm_accelerate.py" else found.script
    more = {"autoencoder": autoencoder, "channels": autoencoder.channels, "image_size": size, "script": script}
    return replace(found, told=told, **more)
