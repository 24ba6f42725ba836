"""What a converter read from another project's files: a network, and all that sampling needs besides."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import UserError, dump
from ..config.sizes import Sides, describe_size, side_or_sides, sides_of
from ..diffusion import ProcessConfig
from ..models import Classifier, UNet
from ..runs.autoencoder import Autoencoder, open_autoencoder
from ..runs.folders import refuse
from ..runtime.checkpoint import write_folder
from ..storage.files import check_is_new, write_whole

LATENTS = "latents.json"  # ours, in a folder of diffusers: shape, statistics per channel and autoencoder of the latents
GIVE_AUTOENCODER = "give --autoencoder NAME, a diffusers autoencoder as folder or hub name, such as stabilityai/sd-vae-ft-mse"
UNBOUNDED = 1e9  # where the range of latents is not known: a bound that clips nothing, and that JSON can write


@dataclass(frozen=True)
class Imported:
    """`network` holds its weights; it sees images (channels, *image_size), or their latents by `autoencoder`; `image_size` is
    the side of a square, or height and width. `low_resolution` is the size of the images that an upsampler starts from;
    `class_names` are those of the file, if it has any. `notes` say, line by line, which weights were taken, what was left out,
    and where each fact comes from. `latents` is what a latent run knows of its latents: shape, statistics for each channel."""

    network: UNet | Classifier
    process: ProcessConfig
    image_size: int | Sides
    channels: int
    low_resolution: int | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    autoencoder: Autoencoder | None = None
    latents: dict[str, Any] | None = None

    @property
    def script(self) -> str:
        """The script that trains such a network on."""
        if self.process.target == "blend":
            return "train_iadb.py"
        return "ddpm_accelerate.py" if self.autoencoder is None else "train_ldm.py"

    def on_latents_of(self, autoencoder: Autoencoder, facts: dict[str, Any] | None = None) -> "Imported":
        """The same network, whose images are latents of this autoencoder. `facts` normalise them, or else its scaling does,
        which does not say their range."""
        height, width = sides_of(self.image_size)
        size, scaling = side_or_sides(height * autoencoder.factor, width * autoencoder.factor), f"normalised by {LATENTS}"
        if facts is None:
            assert autoencoder.scaling is not None
            mean, std = autoencoder.scaling
            scaling = f"less {mean:g} over {std:g} by its own scaling (the checkpoint says neither this nor their range)"
            bound = 1.0 if self.process.clip else UNBOUNDED  # where their sampler clips, what the network sees is in [-1, 1]
            each = {"mean": mean, "std": std, "low": -bound, "high": bound}
            image, shape = {"size": size, "channels": autoencoder.channels}, [self.channels, height, width]
            facts = {"autoencoder": autoencoder.digest, "image": image, "shape": shape}
            facts |= {key: [value] * self.channels for key, value in each.items()}
        latents = (
            f"latents: {self.channels} x {height} x {width} of {autoencoder.path}, {scaling}; images of {describe_size(size)}"
        )
        changes = {"image_size": size, "channels": autoencoder.channels, "notes": (*self.notes, *autoencoder.notes, latents)}
        return replace(self, autoencoder=autoencoder, latents=facts, **changes)


def open_autoencoder_of(name: str, channels: int, *, with_scaling: bool = True) -> Autoencoder:
    """The autoencoder of a network that sees latents of `channels` channels. A UserError where its latents have others, or,
    `with_scaling`, where it does not say how its latents are normalised."""
    autoencoder = open_autoencoder(name, torch.device("cpu"))
    theirs = autoencoder.latent_channels
    reasons = {
        f"has latents of {theirs} channels, and the network sees {channels}": theirs != channels,
        "has latents that have no scale of their own, and the checkpoint does not say theirs; only a diffusers autoencoder, "
        "with its scaling_factor, can be assumed": with_scaling and autoencoder.scaling is None,
    }
    refuse(f"the autoencoder {autoencoder.path}", reasons)
    return autoencoder


def keep(imported: Imported, out: Path, *, name: str, class_names: Sequence[str] = ()) -> Path | None:
    """Write what was imported into the new folder `out`, as the `final` of a run is, so that everything opens it. Gives the
    path of a config in it that trains on from there, None for a classifier (`init_from` takes its folder). Classes without
    names are numbers. A UserError for another number of names, and for a folder that is there."""
    check_is_new(out)
    network, classes = imported.network, imported.network.num_classes
    numbers = [str(i) for i in range(classes or 0)]
    if class_names and len(class_names) != len(numbers):
        raise UserError(f"{len(class_names)} names are given for {len(numbers)} classes")
    if imported.autoencoder is None and imported.channels not in (1, 3):
        raise UserError(
            f"the network sees {imported.channels} channels, which no image has, so they are latents: name the autoencoder "
            "that makes images of them, as convert.py diffusers and convert.py iadb take it with --autoencoder"
        )
    process, model = dump(imported.process), dump(network.config)
    config = {"name": name, "image": {"size": imported.image_size, "channels": imported.channels}}
    if isinstance(network, Classifier):
        config |= {"noise": {key: process[key] for key in ("schedule", "time_input")}, "classifier": model}
    else:
        config |= {"class_conditional": classes is not None, "label_dropout": 0.1 if classes and network.null_class else 0.0}
        config |= {"process": process, "model": model, "low_resolution": imported.low_resolution}
    names = [*class_names] or [*imported.class_names] or numbers
    data: dict[str, Any] = {"class_names": names, "imported": [*imported.notes]}
    tensors: dict[str, Any] = {"ema": {key: value.detach().cpu() for key, value in network.state_dict().items()}}
    documents = {"config": config, "data": data, "progress": {"step": 0}}
    if imported.autoencoder is not None:
        config["autoencoder"] = imported.autoencoder.path
        weights, described = imported.autoencoder.files()
        tensors, documents = tensors | weights, documents | described
        data["latents"] = imported.latents
    write_folder(out, tensors, documents)
    if isinstance(network, Classifier):
        return None
    del config["low_resolution"]
    if imported.low_resolution is not None:
        config["condition"] = {"kind": "low", "size": imported.low_resolution}
    start = {
        **config,
        "name": f"{name}_finetuned",
        "data": {"source": "folder", "path": "datasets/mine"},
        "class_conditional": None if classes is not None else False,
        "optimizer": {"lr": 1e-5, "betas": [0.9, 0.999], "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup": 500}},
        "steps": 20_000,
        "batch_size": 32,
        "init_from": str(out),
        "preview": {"every": 1000, "num_samples": 16},
        "checkpoint": {"every": 1000},
    }
    write_whole(out / "finetune.json", (json.dumps(start, indent=2) + "\n").encode())
    return out / "finetune.json"
