"""The guide of autoguidance, a smaller or less trained run whose faults are subtracted: open it, and see that it fits."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UserError, quoted
from ..config.sizes import Sides, describe_size, sides_of
from ..data.names import join_names, same_names
from ..diffusion import Denoiser, Process
from ..runs.folders import run_directory
from ..runs.opened import Opened, open_trained, read_condition, read_source


@dataclass(frozen=True)
class Guide:
    """The bad network of autoguidance with its process. `num_classes` is None where it has no classes, `guidable` says whether
    it learned to go without one, `origin` names it (its run and step) and `digest` is the hash of its weights."""

    network: Callable[..., Tensor]
    process: Process
    num_classes: int | None = None
    guidable: bool = True
    origin: str = "network"
    digest: str = ""

    def denoiser(self, labels: Tensor | None, condition: Tensor | None) -> Denoiser:
        """The network as a denoiser along its own schedule. If it has classes it is given the labels, (B,) or weights
        (B, classes and null class), or where there are none no class. A UserError where it never learned to go without."""
        inputs, classes = {"condition": condition} if condition is not None else {}, self.num_classes
        if classes is None:
            return self.process.denoiser(self.network, **inputs)
        if not self.guidable and (labels is None or _has_no_class(labels, classes)):
            raise UserError(f"the guide {self.origin} never learned to go without a class: give --classes, or another guide")
        if labels is not None and labels.is_floating_point():
            known = classes + bool(getattr(self.network, "null_class", False))
            labels = F.pad(labels, (0, known - labels.shape[1]))

        def network(x: Tensor, time: Tensor, **others: Tensor) -> Tensor:
            given = torch.full((len(x),), classes, device=x.device) if labels is None else labels
            return self.network(x, time, labels=given, **others)

        return self.process.denoiser(network, **inputs)


def _has_no_class(labels: Tensor, classes: int) -> bool:
    """Whether an image of these labels or weights has no class, wholly or in part."""
    return bool((labels[:, classes:] > 0).any() if labels.is_floating_point() else (labels == classes).any())


class Guided(NamedTuple):
    """What a guide has to fit: a run, by its `name`, its config and its data.json, its classes and the sizes of its images.
    `path` is where its own post-hoc averages are looked for; None of a run that is trained now."""

    name: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    num_classes: int | None
    class_names: Sequence[str]
    sizes: Sequence[Sides]
    path: Path | None = None


def guided_run(run: Opened) -> Guided:
    """What a guide of an opened run has to fit."""
    sizes = (*run.bucket_sizes, run.image.sides)
    return Guided(str(run.path), run.config, run.facts, run.num_classes, run.class_names, sizes, run.path)


def open_guide(guided: Guided, guide_with: str | float, device: torch.device) -> Guide:
    """The guide that `guide_with` names: a run, a checkpoint, a final folder, an export, or the width of a post-hoc average of
    the run itself. A UserError where there is none, or where it does not fit."""
    threads = torch.get_num_threads()
    try:
        guide = open_trained(find_guide(guided.path, guide_with), device)
    finally:
        torch.set_num_threads(threads)  # those of the run that is guided: else its own estimate would change by rounding
    return make_guide(guided, guide)


def find_guide(run: Path | None, guide_with: str | float) -> Path:
    """The path that `guide_with` names; of a plain number the post-hoc average of that width of the `run`. A UserError where
    that was not made."""
    if isinstance(guide_with, str) and not re.fullmatch(r"\d*\.?\d+", guide_with):
        return Path(guide_with)
    if run is None:
        raise UserError(f"guide_with {guide_with}: a run that is trained now has no post-hoc averages yet; name an earlier run")
    directory, width = run_directory(run), float(guide_with)
    folder = directory / "ema" / f"width_{width:g}"
    if not folder.is_dir():
        raise UserError(
            f"{directory} has no average of the width {width:g}: python posthoc_ema.py {quoted(directory)} {width:g} makes it"
        )
    return folder


def make_guide(guided: Guided, guide: Opened) -> Guide:
    """The guide that an opened run is. A UserError says why it does not fit the run that is `guided`."""
    configs = guide.config, guided.config
    images, conditions = [describe_images(config) for config in configs], [describe_condition(config) for config in configs]
    sources = [read_source(config) for config in configs]
    reasons = {
        f"draws {images[0]}, and {guided.name} {images[1]}; name a run of the same images": images[0] != images[1],
        f"draws other latents than {guided.name}, or pixels; name a run on latents of the same autoencoder and data": (
            not have_same_latents(guide.facts, guided.facts)
        ),
        f"knows other classes ({join_names(guide.class_names)}) than {guided.name} ({join_names(guided.class_names)})": (
            guide.num_classes is not None
            and guided.num_classes is not None
            and not same_names(guide.class_names, guided.class_names)
        ),
        f"draws from {conditions[0]}, and {guided.name} from {conditions[1]}; name a run that draws from the same": (
            conditions[0] != conditions[1]
        ),
        f"starts from another source than {guided.name}; name a run with the same": sources[0] != sources[1],
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"the guide {guide.path} {reason}")
    for sides in guided.sizes:
        guide.at_size(sides)  # a UserError where its network cannot take them
    guidable = guide.config["label_dropout"] > 0
    return Guide(guide.network, guide.process, guide.num_classes, guidable, guide.origin, guide.digest)


def describe_images(config: Mapping[str, Any]) -> str:
    """The images of a run's config in words: their size and channels, and whether they have several shapes."""
    image = config["image"]
    of_shapes = " of several shapes" if image.get("aspect") is not None else ""
    return f"{describe_size(sides_of(image['size']))}{of_shapes} in {image.get('channels', 3)} channel(s)"


def have_same_latents(facts: Mapping[str, Any], other_facts: Mapping[str, Any]) -> bool:
    """Whether two runs, of which these are the data.json, see the same latents: of one autoencoder, normalised alike (to 1 % of
    their standard deviation); or both pixels."""
    latents, others = facts.get("latents"), other_facts.get("latents")
    if latents is None or others is None:
        return latents is others
    means, stds = ([np.asarray(each[key]) for each in (latents, others)] for key in ("mean", "std"))
    if latents["autoencoder"] != others["autoencoder"] or means[0].shape != means[1].shape:
        return False
    return bool((abs(means[0] - means[1]) < 0.01 * stds[1]).all() and (abs(stds[0] - stds[1]) < 0.01 * stds[1]).all())


def describe_condition(config: Mapping[str, Any]) -> str:
    """The condition of a run's config in words: all that its network is told depends on; an imported upsampler has no flag."""
    condition = read_condition(config)
    if condition is None:
        return "no image"
    settings = {**condition.contract, "noise": condition.noise, "flag": config.get("low_resolution") is None}
    return f"images ({', '.join(f'{key} {value}' for key, value in settings.items())})"
