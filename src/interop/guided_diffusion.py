"""Checkpoints of guided-diffusion and improved-diffusion as our networks and process.

What the shapes of the weights say is read from them. What they do not say (the heads, the schedule, the size of the images) is
in the flags of the command that trained the checkpoint, or, for a published file, in `guided_flags`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError, prefix_errors
from ..models import Classifier, ClassifierConfig, UNet, build_model
from ..storage.networks import GUIDED, few, find_network
from ..storage.weight_files import read_file
from .guided_flags import model_config, process_config, read_flags, resolve
from .guided_shapes import module_names, read_shapes
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


def read(path: str | Path, flags: Mapping[str, Any] | str | Path | None = None, *, which: str | None = None) -> Imported:
    """A guided- or improved-diffusion checkpoint, U-Net or classifier, with all that sampling needs. `flags` are
    guided-diffusion's, or a JSON file of them; a published file needs none. `which` chooses one of several networks in the
    file, as `find_network` says. A UserError says what is missing, what contradicts the weights, or why the file is no such
    checkpoint."""
    given = None if flags is None else read_flags(flags)
    state_dict, weight_notes = read_weights(path, which)
    with prefix_errors(str(path)):
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        architecture = read_shapes(shapes, (given or {}).get("classifier_depth"))
        size, facts, notes = resolve(architecture, given)
        model = model_config(architecture, facts)
        channels, classes = architecture.channels, architecture.num_classes
        with torch.device("meta"):
            if isinstance(model, ClassifierConfig):
                network = Classifier(model, in_channels=channels, image_size=size, num_classes=classes or 0)
            else:
                options = {"learned": architecture.learn_sigma, "null_class": False, "upsampler": architecture.upsampler}
                network = build_model(model, (channels, size, size), classes, **options)
                assert isinstance(network, UNet)
        network.load_state_dict(rename_state(network, state_dict, module_names(model)), assign=True)
        process = process_config(facts)
    return Imported(
        network=network.eval(),
        process=process,
        image_size=size,
        channels=channels,
        low_resolution=facts.get("small_size"),
        notes=(*weight_notes, *notes),
    )
