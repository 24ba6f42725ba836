"""A frozen autoencoder, ours or diffusers': open it for latent diffusion, keep it in a run, encode and decode with it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError, prefix_errors, quoted, read_json, validate
from ..config.sizes import Sides, describe_size, is_divisible, nearest_sizes, sides_of
from ..data import ImageConfig
from ..models import VAE, VAEConfig
from ..models.layers import channels_last
from ..runtime.checkpoint import check_whole, digest_of, load_weights, newest, read_tensors, verify_checkpoint, write_folder
from ..runtime.seeds import normal
from ..storage.downloads import hub_name_of_url, is_on_hub
from ..storage.hub import is_run, local_path
from ..storage.networks import few
from .diffusers_autoencoder import KL_NAME, autoencoder_from_config, exported_autoencoder, load_autoencoder
from .folders import finished, read_if_there, refuse

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Autoencoder:
    """`network` has moments(images) -> (mean, logvar or None) and decode(z). `document` builds it again, with the weights;
    `digest` is the hash of the weights. `scaling` is the (mean, std) of its latents where it brings its own, `sizes` the sides
    in pixels that it was trained at, where they are known; `notes` say which weights were taken, where several were there."""

    network: Any
    path: str
    document: dict[str, Any]
    digest: str
    channels: int
    latent_channels: int
    factor: int
    sizes: tuple[int | Sides, ...] | None = None
    scaling: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def files(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The files of it that a latent run keeps: autoencoder.safetensors and autoencoder_config.json."""
        tensors = {name: value.detach().cpu() for name, value in self.network.state_dict().items()}
        document = {**self.document, "path": self.path, "digest": self.digest}
        return {"autoencoder": tensors}, {"autoencoder_config": document}

    def keep(self, folder: Path) -> None:
        """Write those files, unless they are there, so that the latent run no longer needs the run of the autoencoder."""
        if verify_checkpoint(folder) is not None or read_json(folder / "autoencoder_config.json")["digest"] != self.digest:
            write_folder(folder, *self.files())

    def latent_shape(self, image: ImageConfig) -> tuple[int, int, int]:
        """(D, h, w) of such images; a UserError where it cannot take them: it was trained at another size, or, where the shapes
        differ, at an area that is more than a quarter away."""
        channels, size = image.channels, image.size
        known, area = self.sizes or (size,), math.prod(image.sides)
        shapes = [sides_of(each) for each in known if not (isinstance(each, int) and isinstance(size, int))]
        is_near = any(abs(area / (height * width) - 1) <= 0.25 for height, width in shapes)
        words, near = describe_size(size), nearest_sizes(size, self.factor)
        reasons = {
            f"has images of {self.channels} channels; set image.channels, which is {channels}": channels != self.channels,
            f"reduces images by {self.factor}, and image.size {words.removesuffix(' px')} is not divisible by {self.factor}; "
            f"set it to {near}": not is_divisible(size, self.factor),
            f"was trained at {' and '.join(map(describe_size, known))}, and images are {words}; set image.size": (
                size not in known and not is_near
            ),
        }
        refuse(f"the autoencoder {self.path}", reasons)
        height, width = image.sides
        return self.latent_channels, height // self.factor, width // self.factor


class LatentCodec:
    """Between images and latents of mean 0 and standard deviation 1 per channel: `mean` and `std` are (D,)."""

    def __init__(self, network: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        self.network = network
        self.mean, self.std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))

    def normalise(self, z: Tensor) -> Tensor:
        """Latents (B, D, h, w) of the autoencoder -> the normalised ones that diffusion takes."""
        return (z - self.mean.to(z)) / self.std.to(z)

    def draw(self, mean: Tensor, logvar: Tensor | None, noise: Tensor) -> Tensor:
        """Normalised latents z = mean + exp(logvar / 2) noise, all (B, D, h, w): draws from the posterior, from which a run
        learns (the mean itself is no such draw)."""
        return self.normalise(mean.to(noise) if logvar is None else mean.to(noise) + (0.5 * logvar.to(noise)).exp() * noise)

    def examples(self, mean: Tensor, logvar: Tensor | None, indices: Sequence[int]) -> Tensor:
        """`draw` with noise that belongs to the indices (B,) of the images: always the same."""
        noise = [normal(mean.shape[1:], "posterior of", int(i), device=CPU, dtype=mean.dtype) for i in indices]
        return self.draw(mean, logvar, torch.stack(noise).to(mean.device))

    def encode(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> the `examples` of these indices: normalised latents (B, D, h, w)."""
        mean, logvar = self.network.moments(images)
        return self.examples(mean, logvar, indices)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) normalised -> (B, C, H, W)."""
        dtype = next(self.network.parameters()).dtype
        return self.network.decode((latents * self.std.to(latents) + self.mean.to(latents)).to(dtype))


def latent_bounds(facts: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The lowest and highest value of each channel over all latents, from the facts of a latent run: (D, 1, 1) each."""
    low, high = (torch.tensor(facts[key], device=device)[:, None, None] for key in ("low", "high"))
    return low, high


def _rebuild(document: dict[str, Any], weights: dict[str, Tensor], path: str, digest: str, device: torch.device) -> Autoencoder:
    """The autoencoder of a document of `files`, or of a run of train_vae.py."""
    if document["kind"] == "diffusers":
        network = autoencoder_from_config(document["config"], document.get("class", KL_NAME))
        facts = {key: getattr(network, key) for key in ("channels", "latent_channels", "factor", "scaling")}
    else:
        spec = validate(VAEConfig, document["model"], origin=f"{path}: model")
        network = VAE(spec, document["channels"])
        network.tanh = document["tanh"]
        facts = {"channels": document["channels"], "latent_channels": spec.latent_channels, "factor": spec.factor}
        facts["sizes"] = tuple(size if isinstance(size, int) else tuple(size) for size in document["sizes"])
    load_weights(network, weights, Path(path))
    frozen = channels_last(network).to(device).eval().requires_grad_(False)
    return Autoencoder(network=frozen, path=path, document=document, digest=digest, **facts)


def autoencoder_folder(folder: Path) -> Path:
    """Where a latent run keeps its autoencoder, whole: in `folder`, or in the run that the checkpoint `folder` belongs to."""
    for place in (folder, folder.parent.parent / "autoencoder", folder / "autoencoder"):
        if (place / "autoencoder_config.json").exists():
            check_whole(place)
            return place
    raise UserError(f"{folder}: its autoencoder is not there; give the run, or its final folder")


def kept_autoencoder(folder: Path, device: torch.device) -> Autoencoder:
    """The autoencoder that a latent run keeps: in `folder`, or in the run that the checkpoint `folder` belongs to."""
    place = autoencoder_folder(folder)
    document = read_json(place / "autoencoder_config.json")
    return _rebuild(document, read_tensors(place, "autoencoder"), document["path"], document["digest"], device)


def autoencoder_for(name: str, run_dir: Path, device: torch.device) -> Autoencoder:
    """The autoencoder that a config names; where it is gone, the one that the latent run `run_dir` keeps. Where the hub has it,
    the run keeps to the one that it began with, whatever is pushed there meanwhile."""
    kept_document = run_dir / "autoencoder" / "autoencoder_config.json"
    if is_on_hub(name) and kept_document.exists() and read_json(kept_document)["path"] == name:
        return kept_autoencoder(run_dir, device)
    try:
        autoencoder = open_autoencoder(name, device)
        if autoencoder.notes and os.environ.get("RANK", "0") == "0":
            print("\n".join(autoencoder.notes), flush=True)
        return autoencoder
    except UserError:
        if not kept_document.exists():
            raise
        return kept_autoencoder(run_dir, device)


def _is_of_diffusers(path: Path) -> bool:
    """Whether a folder is a model or a pipeline of diffusers, whole or not: a message then says what is missing."""
    configs = [read_if_there(config) for config in (path / "config.json", *path.glob("*/config.json"))]
    is_named = any("_class_name" in config for config in configs) or (path / "model_index.json").is_file()
    has_weights = any(file.suffix in (".safetensors", ".bin") for file in path.glob("vae/*"))
    return is_named or has_weights or {"block_out_channels", "latent_channels"} <= configs[0].keys()


def open_autoencoder(name: str, device: torch.device) -> Autoencoder:
    """Open a finished run of train_vae.py (or one of its checkpoints), or an autoencoder of diffusers: a folder or a hub name.
    A UserError says what is missing, unfinished or of another kind."""
    path = Path(name).expanduser()
    on_hub = is_on_hub(name)
    if on_hub:
        with prefix_errors(f"autoencoder {name} is no folder here"):
            path = local_path(name) if is_run(name) else path
    if _is_of_diffusers(path) or (on_hub and not path.exists()):
        return _of_diffusers(name, device)
    if any((place / "autoencoder_config.json").exists() for place in (path, path / "autoencoder")):
        return kept_autoencoder(path, device)  # of a latent run, or of a folder that convert.py made of one
    has_final = not (path / "ema.safetensors").exists()
    folder, hub_name, status = path / "final" if has_final else path, hub_name_of_url(name), read_if_there(path / "status.json")
    at = f" (step {status['step']} of {status['steps']})" if status else ""
    contents = few(file.name for file in path.iterdir()) if path.is_dir() else ""
    reasons = {
        f"is an address; give the name on the hub: {hub_name}": hub_name is not None and not path.exists(),
        "does not exist; train one (train_vae.py), or name a diffusers autoencoder": not path.exists(),
        "is a file; name a folder: a run of train_vae.py, or a diffusers autoencoder with its config.json and weights": (
            path.is_file()
        ),
        "is neither a run of train_vae.py nor a diffusers autoencoder, which have a config.json; it holds "
        f"{contents or 'nothing'}": not (folder.is_dir() or (path / "config.json").exists()),
        f"has not finished{at}; run its command again, or name one of its checkpoints to take it as it is": (
            has_final and finished(path, newest(path / "checkpoints")[0]) is None
        ),
    }
    refuse(f"the autoencoder {name}", reasons)
    check_whole(folder)
    config, progress = read_json(folder / "config.json"), read_json(folder / "progress.json")
    if "stages" not in config:
        raise UserError(f"{name} is no autoencoder but a diffusion run; name a run of train_vae.py")
    document = {
        "kind": "atelier",
        "model": config["model"],
        "channels": config["image"]["channels"],
        "tanh": progress["tanh"],
        "sizes": _sizes_of(config),
    }
    digest = read_json(folder / "MANIFEST.json")["files"]["ema.safetensors"]["sha256"]
    return _rebuild(document, read_tensors(folder, "ema"), name, digest, device)


def _sizes_of(config: dict[str, Any]) -> list[Any]:
    """The sizes at which a run of train_vae.py was trained, the smallest first."""
    sizes = [stage["image_size"] or config["image"]["size"] for stage in config["stages"]]
    return sorted((size for i, size in enumerate(sizes) if size not in sizes[:i]), key=lambda size: math.prod(sides_of(size)))


def start_from(name: str, *networks: Any) -> bool:
    """Put the weights of a run of train_vae.py into networks of the same architecture; gives whether tanh was on in it."""
    autoencoder = open_autoencoder(name, CPU)
    if autoencoder.document["kind"] == "diffusers":
        raise UserError(
            f"{name} is diffusers' {autoencoder.network.class_name}, and train_vae.py starts from autoencoders of its own "
            f"alone; diffusion takes it as it is: train_ldm.py --set autoencoder={quoted(name)}"
        )
    for network in networks:
        load_weights(network, autoencoder.network.state_dict(), Path(name))
    return autoencoder.document.get("tanh", False)


def _of_diffusers(name: str, device: torch.device) -> Autoencoder:
    exported = exported_autoencoder(Path(name).expanduser())
    if exported is not None:  # to_diffusers wrote it: our own network, to the bit
        document, weights, digest = exported
        return _rebuild(document, weights, name, digest, device)
    loaded = load_autoencoder(name)
    weights = {key: value.detach().cpu() for key, value in loaded.state_dict().items()}
    document = {"kind": "diffusers", "config": loaded.config}
    document |= {"class": loaded.class_name} if loaded.class_name != KL_NAME else {}
    autoencoder = _rebuild(document, weights, name, digest_of(weights), device)
    return replace(autoencoder, notes=loaded.notes)
