"""What a converter read from another project's files: a network, and all that sampling needs besides."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import UserError, dump
from ..diffusion import ProcessConfig
from ..models import ClassifierConfig, UNetConfig
from ..runs.autoencoder import Autoencoder, open_autoencoder
from ..runtime.checkpoint import write_folder
from ..storage.files import check_is_new, write_whole

LATENTS = "latents.json"  # ours, in a folder of diffusers: shape, statistics per channel and autoencoder of the latents
UNBOUNDED = 1e9  # where the range of latents is not known: a bound that clips nothing, and that JSON can write


@dataclass(frozen=True)
class Imported:
    """`network` is built of `model` and holds its weights; it sees images (channels, image_size, image_size), or their latents
    by `autoencoder`.

    `num_classes` is None for a network without classes, `null_class` whether it has a class for no class; `low_resolution` is
    the size of the images that an upsampler starts from; `class_names` are those of the file, if it has any. `notes` say, line
    by line, which weights were taken, what was left out, and where each fact comes from. `latents` is what a latent run knows
    of its latents (shape, statistics for each channel); where it is None, the autoencoder has a scaling.
    """

    network: nn.Module
    model: UNetConfig | ClassifierConfig
    process: ProcessConfig
    image_size: int
    channels: int
    num_classes: int | None
    null_class: bool = False
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
        """The same network, whose images are latents of this autoencoder. `facts` normalise them, or else its scaling does."""
        mean, deviation = autoencoder.scaling or (0.0, 1.0)
        scaling = f"less {mean:g} over {deviation:g} by its own scaling (the checkpoint says neither this nor their range)"
        scaling = f"normalised by {LATENTS}" if facts else scaling
        side, size = self.image_size, self.image_size * autoencoder.factor
        latents = f"latents: {self.channels} x {side} x {side} of {autoencoder.path}, {scaling}; images of {size} px"
        changes = {"image_size": size, "channels": autoencoder.channels, "notes": (*self.notes, *autoencoder.notes, latents)}
        return replace(self, autoencoder=autoencoder, latents=facts, **changes)


def open_autoencoder_of(name: str, channels: int, *, with_scaling: bool = True) -> Autoencoder:
    """The autoencoder of a network that sees latents of `channels` channels. A UserError where its latents have others, or,
    `with_scaling`, where it does not say how its latents are normalised."""
    autoencoder = open_autoencoder(name, torch.device("cpu"))
    if autoencoder.latent_channels != channels:
        raise UserError(
            f"the autoencoder {autoencoder.path} has latents of {autoencoder.latent_channels} channels, and the network sees "
            f"{channels}"
        )
    if with_scaling and autoencoder.scaling is None:
        raise UserError(
            f"the latents of {autoencoder.path} have no scale of their own, and the checkpoint does not say theirs; only a "
            "diffusers AutoencoderKL, with its scaling_factor, can be assumed"
        )
    return autoencoder


def keep(imported: Imported, out: Path, *, name: str, class_names: Sequence[str] = ()) -> Path | None:
    """Write what was imported into the new folder `out`, as the `final` of a run is, so that everything opens it.

    Gives the path of a config in it that trains on from there, None for a classifier (`init_from` takes its folder) and an
    upsampler (nothing trains it on). Classes without names are numbers. A UserError for another number of names, and for a
    folder that is there.
    """
    check_is_new(out)
    numbers = tuple(str(i) for i in range(imported.num_classes or 0))
    if class_names and len(class_names) != len(numbers):
        raise UserError(f"{len(class_names)} names are given for {len(numbers)} classes")
    if imported.autoencoder is None and imported.channels not in (1, 3):
        raise UserError(
            f"the network sees {imported.channels} channels, which no image has, so they are latents: name the autoencoder "
            "that makes images of them, as convert.py diffusers and convert.py iadb take it with --autoencoder"
        )
    names = tuple(class_names) or imported.class_names or numbers
    process, is_classifier = dump(imported.process), isinstance(imported.model, ClassifierConfig)
    config = {"name": name, "image": {"size": imported.image_size, "channels": imported.channels}}
    if is_classifier:
        noise = {"schedule": process["schedule"], "time_input": process["time_input"]}
        config |= {"noise": noise, "classifier": dump(imported.model)}
    else:
        config |= {"class_conditional": imported.num_classes is not None, "label_dropout": 0.1 if imported.null_class else 0.0}
        config |= {"process": process, "model": dump(imported.model), "low_resolution": imported.low_resolution}
    data: dict[str, Any] = {"class_names": list(names), "imported": list(imported.notes)}
    tensors: dict[str, Any] = {"ema": {key: value.detach().cpu() for key, value in imported.network.state_dict().items()}}
    documents = {"config": config, "data": data, "progress": {"step": 0}}
    if imported.autoencoder is not None:
        config["autoencoder"] = imported.autoencoder.path
        weights, described = imported.autoencoder.files()
        tensors, documents = {**tensors, **weights}, {**documents, **described}
        data["latents"] = imported.latents or _latent_facts(imported, imported.autoencoder)
    write_folder(out, tensors, documents)
    if is_classifier or imported.low_resolution is not None:
        return None
    del config["low_resolution"]
    train = out / "finetune.json"
    start = {
        **config,
        "name": f"{name}_finetuned",
        "data": {"source": "folder", "path": "datasets/mine"},
        "class_conditional": None if imported.num_classes is not None else False,
        "optimizer": {"lr": 1e-5, "betas": [0.9, 0.999], "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup": 500}},
        "steps": 20_000,
        "batch_size": 32,
        "init_from": str(out),
        "preview": {"every": 1000, "num_samples": 16},
        "checkpoint": {"every": 1000},
    }
    write_whole(train, (json.dumps(start, indent=2) + "\n").encode())
    return train


def _latent_facts(imported: Imported, autoencoder: Autoencoder) -> dict[str, Any]:
    """What the scaling of an autoencoder says of its latents, as the data.json of a latent run has it; the range of the latents
    is not known."""
    assert autoencoder.scaling is not None
    shape = autoencoder.latent_shape(imported.channels, imported.image_size)
    bound = 1.0 if imported.process.clip else UNBOUNDED  # where their sampler clips, it clips what the network sees to [-1, 1]
    each = {"mean": autoencoder.scaling[0], "std": autoencoder.scaling[1], "low": -bound, "high": bound}
    return {
        "autoencoder": autoencoder.digest,
        "image": {"size": imported.image_size, "channels": imported.channels},
        "shape": list(shape),
        **{key: [value] * shape[0] for key, value in each.items()},
    }
