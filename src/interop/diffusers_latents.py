"""Folders of diffusers whose U-Net sees latents: the network together with its autoencoder."""

from pathlib import Path
from typing import Any

from ..config import UserError, read_json
from ..runs.autoencoder import Autoencoder
from .diffusers_folder import local_folder, read, read_if_there
from .imported import LATENTS, Imported, open_autoencoder_of


def read_whole(name: str | Path, autoencoder: str | None = None, *, which: str | None = None) -> Imported:
    """What `read` gives, and, for a network on latents, with it the autoencoder of this name or of the folder.

    A UserError for a folder that needs no conversion, and for what `add_autoencoder` refuses.
    """
    folder = local_folder(name)
    if read_if_there(folder / "config.json").get("_class_name") == "AutoencoderKL":
        raise UserError(
            f"{name} is an AutoencoderKL, which needs no conversion: name it as it is, as in train_ldm.py --set "
            f"autoencoder={name}"
        )
    if (folder / "MANIFEST.json").is_file() and (folder / "ema.safetensors").is_file():
        raise UserError(f"{name} is a folder of Atelier's own, which needs no conversion: give it where a run is wanted")
    return add_autoencoder(read(name, which=which), folder, autoencoder, origin=name)


def add_autoencoder(imported: Imported, folder: Path, name: str | None = None, *, origin: str | Path | None = None) -> Imported:
    """An imported network on latents together with the autoencoder `name`, or with the one in its `folder`. A network on
    images is given back as it is. Messages name the `origin`, which may be a name on the hub.

    A UserError where the network sees latents and there is no autoencoder, or the other way round; where the two do not fit;
    and where nothing says how the latents are normalised.
    """
    side, channels, origin = imported.image_size, imported.channels, origin or folder
    inside = next((folder / sub for sub in ("vae", "vqvae", "movq") if (folder / sub).is_dir()), None)
    if name is None and inside is None:
        if channels in (1, 3):
            return imported
        raise UserError(
            f"{origin}: the network sees {channels} channels, which no image has, so they are latents: give --autoencoder NAME,"
            " a diffusers AutoencoderKL as folder or hub name, such as stabilityai/sd-vae-ft-mse"
        )
    facts_file = folder / LATENTS
    try:
        autoencoder = open_autoencoder_of(name or str(inside), channels, with_scaling=name is not None)
        facts = _read_facts(facts_file, autoencoder, [channels, side, side]) if name is None else None
    except UserError as error:
        if name is None and channels in (1, 3) and not facts_file.is_file():
            raise UserError(
                f"{origin} holds the autoencoder {inside}, and its network sees {channels} channels, as images have: give "
                f"--autoencoder if these are latents, else the folder of the network alone ({error})"
            ) from None
        raise
    return imported.on_latents_of(autoencoder, facts)


def _read_facts(path: Path, autoencoder: Autoencoder, shape: list[int]) -> dict[str, Any] | None:
    """What our latents.json says of the latents; None where the scaling of the autoencoder says it. A UserError where neither
    does."""
    facts = read_json(path) if path.is_file() else None
    if not isinstance(facts, dict) or facts.get("autoencoder") != autoencoder.digest:
        if autoencoder.scaling is None:
            raise UserError(f"{path} is missing or belongs to another autoencoder: it says how the latents are normalised")
        return None
    each = [facts.get(key) for key in ("mean", "std", "low", "high")]
    fits = all(isinstance(values, list) and len(values) == shape[0] for values in each) and facts.get("shape") == shape
    numbers = fits and all(type(value) in (int, float) for values in each for value in values or [])
    if not numbers or not all(value > 0 for value in facts["std"]):
        raise UserError(f"{path}: it needs the shape {shape} of the latents, and mean, std, low, high of {shape[0]} channels")
    return facts
