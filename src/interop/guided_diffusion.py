"""Checkpoints of guided-diffusion and improved-diffusion as our networks and process.

What the shapes of the weights say is read from them. What they do not say (the heads, the schedule, the size of the images) is
in the flags of the command that trained the checkpoint, or, for a published file, in `guided_published`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError, prefix_errors
from ..models import Classifier, ClassifierConfig, UNet, UNetConfig
from ..storage.networks import GUIDED, few, find_network
from ..storage.weight_files import read_file
from .guided_flags import (
    DIFFUSION,
    FLAGS_OF_COMMAND,
    HEADS,
    check_flags,
    find_published,
    image_size,
    model_config,
    process_config,
    read_flags,
)
from .guided_shapes import Architecture, module_names, read_shapes
from .imported import Imported
from .names import rename_state


def read_weights(path: str | Path, which: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of the network in a file, and notes on what was taken and left out; see `find_network`. A note says, too,
    where by the file's name an average of its weights is beside it."""
    state_dict, notes = find_network(read_file(path), GUIDED, path, which=which)
    if any(".transformer_blocks." in name for name in state_dict):
        raise UserError(
            f"{path}: the network is a U-Net of latent-diffusion, whose attention reads a text; what can be read is one of "
            "guided- or improved-diffusion, with labels or without"
        )
    raw = re.fullmatch(r"model(\d+)\.pt", Path(path).name)
    averages = sorted(other.name for other in Path(path).parent.glob(f"ema_*_{raw[1]}.pt")) if raw is not None else []
    if averages:
        notes.append(f"these are raw weights; an average (EMA) is beside them: {few(averages)}")
    return state_dict, notes


def _resolve(architecture: Architecture, flags: Mapping[str, Any] | None) -> tuple[int, dict[str, Any], list[str]]:
    """The size of the images, the flags that say what the weights do not, and notes on where each fact comes from."""
    defaults = DIFFUSION if architecture.kind == "classifier" else HEADS | DIFFUSION
    sizes = ("image_size",) if architecture.image_size is None else ()
    sizes = ("large_size", "small_size") if architecture.upsampler else sizes
    source = "from the flags"
    if flags is None:
        if (known := find_published(architecture)) is None:
            raise UserError(
                f"this is no published architecture, and the weights do not say {', '.join([*sizes, *defaults])}: give "
                f"{FLAGS_OF_COMMAND}"
            )
        name, flags = known
        source = f"from the published {name}, whose architecture this is (another run of it needs its own flags)"
    size = image_size(architecture, flags)
    check_flags(architecture, flags, size)
    if flags.get("diffusion_steps", 1000) != 1000 and "rescale_timesteps" not in flags:
        raise UserError(
            f"the flags say diffusion_steps {flags['diffusion_steps']} and not rescale_timesteps, whose default is true in "
            f"improved-diffusion and false in guided-diffusion: give {FLAGS_OF_COMMAND}"
        )
    given = {name: flags[name] for name in (*sizes, *defaults) if name in flags}
    assumed = {name: value for name, value in defaults.items() if name not in given}
    by_shapes = architecture.flags(size)
    by_shapes |= {"image channels": architecture.channels, "classes": architecture.num_classes or "none"}
    origins = {"from the weights": by_shapes, source: given, "guided-diffusion's defaults": assumed}
    lists = {origin: ", ".join(f"{name} {value}" for name, value in facts.items()) for origin, facts in origins.items()}
    notes = [f"{origin}: {facts}" for origin, facts in lists.items() if facts]
    return size, assumed | given | {"learn_sigma": architecture.learn_sigma}, notes


def _build(architecture: Architecture, model: UNetConfig | ClassifierConfig, size: int) -> UNet | Classifier:
    """The network, with random weights."""
    channels, classes = architecture.channels, architecture.num_classes
    if isinstance(model, ClassifierConfig):
        return Classifier(model, in_channels=channels, image_size=size, num_classes=classes or 0)
    outputs, low_channels = channels * (2 if architecture.learn_sigma else 1), channels if architecture.upsampler else 0
    options = {"num_classes": classes, "null_class": False, "low_channels": low_channels}
    return UNet(model, in_channels=channels, out_channels=outputs, **options)


def read(path: str | Path, flags: Mapping[str, Any] | str | Path | None = None, *, which: str | None = None) -> Imported:
    """A guided- or improved-diffusion checkpoint, U-Net or classifier, with all that sampling needs.

    `flags` are guided-diffusion's, or a JSON file of them; a published file needs none. `which` chooses one of several
    networks in the file, as `find_network` says. A UserError says what is missing, what contradicts the weights, or why the
    file is no such checkpoint.
    """
    given = None if flags is None else read_flags(flags)
    state_dict, weight_notes = read_weights(path, which)
    with prefix_errors(str(path)):
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        architecture = read_shapes(shapes, (given or {}).get("classifier_depth"))
        size, facts, notes = _resolve(architecture, given)
        model = model_config(architecture, facts)
        with torch.device("meta"):
            network = _build(architecture, model, size)
        network.load_state_dict(rename_state(network, state_dict, module_names(model)), assign=True)
        process = process_config(facts)
    return Imported(
        network=network.eval(),
        model=model,
        process=process,
        image_size=size,
        channels=architecture.channels,
        num_classes=architecture.num_classes,
        low_resolution=facts.get("small_size"),
        notes=(*weight_notes, *notes),
    )
