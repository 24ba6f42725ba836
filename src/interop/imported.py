"""What a converter found in another project's file: a network, and all that sampling needs besides."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import UserError, dump
from ..diffusion import ProcessConfig
from ..models import ClassifierConfig, UNetConfig
from ..runtime.checkpoint import write_folder
from ..storage.files import write_whole

if TYPE_CHECKING:
    from ..runs.autoencoder import Autoencoder

UNKNOWN = 1e9  # where the range of latents is not known: a bound that holds nothing back, and that JSON can write


@dataclass(frozen=True)
class Imported:
    """`network` is built of `model` and holds its weights; it sees pictures (channels, image_size, image_size), or
    their latents by `autoencoder`, which brings its own scaling.

    `num_classes` is None for a network without classes, `null_class` whether it has one for no class; `low_resolution` is the
    size of the pictures that an upsampler starts from; `class_names` are those of the file, if it has any. `told` says, line by
    line, where facts come from, and `taken` which weights were taken and what was left out, where `told` does not; `script` is
    what trains such a network on. `latents` is what a latent run knows of its latents (shape, statistics for each channel),
    where the autoencoder does not bring its own scaling.
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
    told: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    script: str = "ddpm_accelerate.py"
    autoencoder: "Autoencoder | None" = None
    latents: dict[str, Any] | None = None


def keep(found: Imported, out: Path, *, name: str, class_names: Sequence[str] = ()) -> Path | None:
    """Write what was imported into the new folder `out`, as the `final` of a run is: everything opens it. Gives the config
    beside it that trains on from there (a classifier's `init_from` takes the folder itself; nothing trains an upsampler on).

    Classes without names are numbers. A UserError for another number of names, and for a folder that is there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give another --out, or remove it")
    numbers = tuple(str(i) for i in range(found.num_classes or 0))
    if class_names and len(class_names) != len(numbers):
        raise UserError(f"{len(class_names)} names are given for {len(numbers)} classes")
    if found.autoencoder is None and found.channels not in (1, 3):
        raise UserError(
            f"the network sees {found.channels} channels, which no image has, so they are latents: name the autoencoder that "
            "makes images of them, as convert.py diffusers and convert.py iadb take it with --autoencoder"
        )
    names = tuple(class_names) or found.class_names or numbers
    process, image = dump(found.process), {"size": found.image_size, "channels": found.channels}
    if isinstance(found.model, ClassifierConfig):
        noise = {"schedule": process["schedule"], "time_input": process["time_input"]}
        config = {"name": name, "image": image, "noise": noise, "classifier": dump(found.model)}
    else:
        config = {
            "name": name,
            "image": image,
            "class_conditional": found.num_classes is not None,
            "label_dropout": 0.1 if found.null_class else 0.0,
            "process": process,
            "model": dump(found.model),
            "low_resolution": found.low_resolution,
        }
    data: dict[str, Any] = {"class_names": list(names), "imported": [*found.taken, *found.told]}
    tensors: dict[str, Any] = {"ema": {key: value.detach().cpu() for key, value in found.network.state_dict().items()}}
    documents = {"config": config, "data": data, "progress": {"step": 0}}
    if found.autoencoder is not None:
        config["autoencoder"] = found.autoencoder.path
        kept, described = found.autoencoder.files()
        tensors, documents = {**tensors, **kept}, {**documents, **described}
        data["latents"] = found.latents or _latent_facts(found, found.autoencoder)
    write_folder(out, tensors, documents)
    if isinstance(found.model, ClassifierConfig) or found.low_resolution is not None:
        return None
    train = out / "finetune.json"
    start = {
        **{key: value for key, value in config.items() if key != "low_resolution"},
        "name": f"{name}_finetuned",
        "data": {"source": "folder", "path": "datasets/mine"},
        "class_conditional": None if found.num_classes is not None else False,
        "optimizer": {"lr": 1e-5, "betas": [0.9, 0.999], "weight_decay": 0.0, "schedule": {"kind": "constant", "warmup": 500}},
        "steps": 20_000,
        "batch_size": 32,
        "init_from": str(out),
        "preview": {"every": 1000, "num_samples": 16},
        "checkpoint": {"every": 1000},
    }
    write_whole(train, (json.dumps(start, indent=2) + "\n").encode())
    return train


def _latent_facts(found: Imported, autoencoder: "Autoencoder") -> dict[str, Any]:
    """What a latent run knows of its latents, as far as an autoencoder with its own scaling says it; their range is
    not known."""
    assert autoencoder.scaling is not None
    shape = autoencoder.latent_shape(found.channels, found.image_size)
    bound = 1.0 if found.process.clip else UNKNOWN  # where their sampler clips, it clips what the network sees to [-1, 1]
    each = {"mean": autoencoder.scaling[0], "std": autoencoder.scaling[1], "low": -bound, "high": bound}
    return {
        "autoencoder": autoencoder.digest,
        "image": {"size": found.image_size, "channels": found.channels},
        "shape": list(shape),
        **{key: [value] * shape[0] for key, value in each.items()},
    }
