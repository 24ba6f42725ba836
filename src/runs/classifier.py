"""Classifiers of noised images: open one, and measure it by noise level."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import figures
from ..config import Length, UserError, config_error, resumable_field, validate
from ..config import config as settings
from ..config.sizes import describe_size, is_divisible, nearest_sizes
from ..data import ImageConfig
from ..data.names import same_names
from ..diffusion import Process, Schedule, TimeInput, build_schedule
from ..diffusion.process import time_input_for
from ..diffusion.schedules import BlendScheduleConfig, ScheduleConfig
from ..models import Classifier, ClassifierConfig
from ..models.layers import channels_last
from ..runtime.checkpoint import load_weights
from ..runtime.seeds import noise_of
from ..runtime.stream import Examples
from .folders import read_weights

if TYPE_CHECKING:
    from accelerate import Accelerator


@settings
class NoiseConfig:
    """How images are noised for a classifier, and which time it is fed: with the same keys as the process of a diffusion model.
    Without `time_input` a table feeds its index, the blend 1000 t."""

    schedule: ScheduleConfig
    time_input: TimeInput | None = None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "NoiseConfig":
        if isinstance(self.schedule, BlendScheduleConfig) and self.time_input is not None and self.time_input.kind == "index":
            raise config_error("time_input.kind: the blend has no table to index; use t or alpha")
        return self


def noise_process(spec: NoiseConfig) -> Process:
    """The process that noises; its target is not used."""
    time_input = time_input_for(spec.schedule, spec.time_input)
    return Process(schedule=build_schedule(spec.schedule), target="v", time_input=time_input)


@dataclass(frozen=True)
class OpenedClassifier:
    """A classifier with its EMA weights, its process, images and classes."""

    path: Path
    network: Classifier
    process: Process
    image: ImageConfig
    class_names: tuple[str, ...]
    step: int
    digest: str

    @property
    def schedule(self) -> Schedule:
        return self.process.schedule

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, K) for images noised by its schedule to the times `t`, one for all or (B,)."""
        time = self.process.network_time(t.expand(len(x_t)) if t.ndim == 0 else t)
        return self.network(x_t, time.to(torch.float32).to(x_t.device, non_blocking=True))


def open_classifier(path: str | Path, device: torch.device) -> OpenedClassifier:
    """Open a run of train_classifier.py, its checkpoint or final folder, or an imported classifier."""
    path = Path(path)
    _, weights, config, data, step, digest = read_weights(path)
    if "classifier" not in config:
        raise UserError(f"{path} is no classifier: give a run of train_classifier.py, or what convert.py made of one")
    image = validate(ImageConfig, config["image"], origin=f"{path}: image")
    spec = validate(ClassifierConfig, config["classifier"], origin=f"{path}: classifier")
    network = build_classifier(spec, image, len(data["class_names"]))
    load_weights(network, weights, path)
    return OpenedClassifier(
        path=path,
        network=network.to(device).eval().requires_grad_(False),
        process=noise_process(validate(NoiseConfig, config["noise"], origin=f"{path}: noise")),
        image=image,
        class_names=tuple(data["class_names"]),
        step=step,
        digest=digest,
    )


def build_classifier(spec: ClassifierConfig, image: ImageConfig, num_classes: int) -> Classifier:
    """The classifier of such images, in channels_last, which is faster."""
    if image.aspect is not None and spec.pool == "attention":
        raise UserError("classifier.pool attention learns one size; with image.aspect use adaptive or spatial")
    if image.aspect is None and not is_divisible(image.sides, spec.factor):
        raise UserError(
            f"images of {describe_size(image.size)} are not divisible by {spec.factor}, what {len(spec.channel_mult)} entries "
            f"of classifier.channel_mult ask for; change them, or set image.size to {nearest_sizes(image.size, spec.factor)}"
        )
    return channels_last(Classifier(spec, in_channels=image.channels, image_size=image.size, num_classes=num_classes))


def start_classifier_from(name: str, class_names: Sequence[str], *networks: Any) -> str:
    """Put the EMA weights of the classifier `name` into networks of the same architecture; where its classes are others, all
    but the last layer, which makes logits of features. Gives a line about it."""
    start = open_classifier(name, torch.device("cpu"))
    weights, line = start.network.state_dict(), f"starting from the weights of {name} (step {start.step})"
    last = start.network.last_layer
    if not same_names(start.class_names, class_names):
        weights = {key: value for key, value in weights.items() if not key.startswith(last)}
        line += "; its classes are others, so its last layer is new"
    for network in networks:
        new = {key: value for key, value in network.state_dict().items() if key.startswith(last)}
        load_weights(network, {**new, **weights}, Path(name))
    return line


@settings
class MeasureConfig:
    """Every `every` steps and at the end, measure the accuracy on `num_measured` held-out images (where none are held out, on
    images that it trains on), each noised to `levels` levels from clean to noise."""

    every: Length | None = resumable_field(None)
    num_measured: int = resumable_field(512, ge=1)
    levels: int = resumable_field(10, ge=2)


@torch.no_grad()
def accuracy_by_level(
    network: nn.Module, process: Process, examples: Examples, spec: MeasureConfig, batch_size: int, accelerator: "Accelerator"
) -> tuple[float, list[float]]:
    """The mean cross entropy in nats over all levels, and the accuracy at each, shared by all ranks; always of the same images
    and noise."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    labelled = np.flatnonzero(examples.labels >= 0)
    if not len(labelled):
        raise UserError("none of the images to measure on has a class; hold out others, or set held_out to 0")
    count = min(spec.num_measured, len(labelled))
    chosen = labelled[np.linspace(0, len(labelled) - 1, count).astype(np.int64)]
    dtype = next(network.parameters()).dtype
    sums = torch.zeros(2, spec.levels, device=device)
    for indices in examples.batches(chosen, batch_size)[rank::world]:
        x0 = examples.load(indices).to(device, dtype)
        labels = torch.from_numpy(examples.labels[indices]).to(device)
        eps = noise_of(0, indices.tolist(), x0.shape[1:]).to(x0)
        for i, t in enumerate(levels_of(process, spec.levels)):
            times = t.expand(len(x0))
            logits = network(process.add_noise(x0, eps, times), process.network_time(times).to(dtype).to(device)).float()
            sums[0, i] += F.cross_entropy(logits, labels, reduction="sum")
            sums[1, i] += (logits.argmax(1) == labels).sum()
    summed = accelerator.reduce(sums)
    assert isinstance(summed, Tensor)
    loss, right = (summed / count).tolist()
    return sum(loss) / len(loss), right


def levels_of(process: Process, count: int) -> Tensor:
    """`count` times from the cleanest that is trained to pure noise, float64."""
    return process.draw_times(torch.linspace(0, 1 - 1e-9, count, dtype=torch.float64))


def draw_accuracy(path: Path, process: Process, accuracy: list[float], num_classes: int, where: str) -> None:
    """Plot the accuracy by noise level, beside that of guessing."""
    t = levels_of(process, len(accuracy)).tolist()
    shown = {where.replace("_", " "): (t, accuracy), "guessing": (t, [1 / num_classes] * len(t))}
    figures.curves(path, {"accuracy": shown}, xlabel="t")
