"""Open what was trained: a run directory, a checkpoint, a final folder, or an export."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import UserError, config, quoted, validate
from ..config.sizes import Sides, describe_size, is_divisible, nearest_sizes, sides_of
from ..data import HeldOutShare, ImageConfig, ImageSet, Share, SourceEnd
from ..data.buckets import nearest_buckets, sort_by_shape
from ..data.conditions import Condition, ConditionConfig, LowCondition, channel_names
from ..data.names import join_names, normal_form, parse_classes, same_names
from ..diffusion import Process, ProcessConfig, build_process
from ..models import ModelConfig, build_model
from ..runtime.checkpoint import load_weights
from ..runtime.stream import Examples
from .autoencoder import LatentCodec, kept_autoencoder, latent_bounds
from .densities import Bound, SourceSampler, Start, open_density
from .folders import read_weights, refuse, run_name

GAUSSIAN, LABELS = {"source": "gaussian"}, "label_embedding.weight"


@config
class _Source:
    source: SourceEnd


@config
class _Model:
    model: ModelConfig


@config
class _Condition:
    condition: ConditionConfig | None = None


@dataclass(frozen=True)
class Run:
    """EMA weights with all that belongs to them, of images or of 2-D points. `facts` is its data.json, `digest` the hash of
    the weights, `shape` what the network sees: (C, H, W), or (2,) of a point."""

    path: Path
    network: nn.Module
    process: Process
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    config: dict[str, Any]
    facts: dict[str, Any]
    step: int
    digest: str

    @property
    def num_classes(self) -> int | None:
        return count_classes(self.config["class_conditional"], self.class_names)

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def folder(self) -> str:
        """The name of the folder that its samples and figures go to by default: that of its directory, since two runs may be of
        one config."""
        return run_name(self.path)

    @property
    def origin(self) -> str:
        """Whose weights these are, in words."""
        return f"{self.path} (step {self.step})"

    @property
    def gaussian(self) -> bool:
        """Whether sampling starts from standard normal noise."""
        return self.config.get("source", GAUSSIAN) == GAUSSIAN

    def starts(self) -> Start | None:
        """What sampling starts from where that is no noise: the source of the run's config, or what was held out of it. A
        UserError where it is gone."""
        if self.gaussian:
            return None
        spec = read_source(self.config, str(self.path))
        share = self.config.get("held_out", 0.0)
        if isinstance(share, dict) and "source" not in share:
            share = validate(HeldOutShare, share, origin=f"held_out of {self.path}")
        try:
            examples = self._source(spec, share if isinstance(share, Share) else 0.0)
        except UserError as error:
            raise UserError(f"{self.path} starts from other data, which is needed: {error}{self._instead}") from None
        return SourceSampler(examples).at_shape(self.shape)

    _instead = ""

    def no_class(self) -> int | None:
        """The label for no class, None of a run without classes; a UserError where it never learned to go without."""
        if self.num_classes is not None and not self.config["label_dropout"]:
            raise UserError(f"{self.path} never learned to go without a class: give --classes, or train with label_dropout")
        return self.num_classes

    def check_classes(self, data: ImageSet) -> None:
        """Give the data's labels the numbers that the classes have in this run; a UserError where it has other classes."""
        names = data.class_names
        if self.num_classes is None or not names or same_names(names, self.class_names):
            return
        if {normal_form(name) for name in names} != {normal_form(name) for name in self.class_names}:
            raise UserError(
                f"the data has other classes ({join_names(names)}) than {self.path} ({join_names(self.class_names)}); "
                "give class subfolders of those names, or, where it was imported, import it with --class-names"
            )
        data.rename_classes(self.class_names)

    def _source(self, spec: Any, held_out: Share) -> Examples:
        """Those of the source, of 2-D points."""
        saved = (self.facts.get("source") or {}).get("density")
        return open_density(spec, held_out, None, base64.b64decode(saved) if saved is not None else None).examples()

    def labels(self, text: str, count: int, class_names: Sequence[str] = ()) -> list[int]:
        """`A/B/C`, names or numbers, dealt to `count` images in equal blocks; an unconditional network guided by a classifier
        takes those of the classifier."""
        names = self.class_names if self.num_classes is not None else tuple(class_names)
        if not names:
            raise UserError(f"{self.path} was trained without classes; leave --classes out")
        chosen = parse_classes(text, names)
        if count % len(chosen):
            near = sorted({count // len(chosen) * len(chosen), -(-count // len(chosen)) * len(chosen)} - {0})
            raise UserError(
                f"{count} images cannot be dealt to {len(chosen)} classes in equal blocks; ask for "
                f"{' or '.join(map(str, near))}"
            )
        return [chosen[i * len(chosen) // count] for i in range(count)]


@dataclass(frozen=True)
class Opened(Run):
    """A run of images of the size that `image` says: `codec` makes them of what a latent run draws. A run on images of several
    shapes is opened at the most frequent one; `buckets` has height, width and number of images of each. Its networks reduce
    images by `factor`."""

    image: ImageConfig
    factor: int = 1
    buckets: tuple[tuple[int, int, int], ...] = ()
    codec: LatentCodec | None = None
    bounds: tuple[Bound, Bound] = (-1.0, 1.0)

    _instead = "; or give --source FOLDER"

    @property
    def null_class(self) -> bool:
        """Whether it was built with a class for no class."""
        return bool(getattr(self.network, "null_class", False))

    def at_size(self, sides: Sides) -> "Opened":
        """The same run for images of another height and width; a UserError where its networks cannot take them."""
        if not is_divisible(sides, self.factor):
            raise UserError(
                f"{self.path} reduces images by {self.factor}, and {describe_size(sides)} is not divisible by it; take "
                f"{nearest_sizes(sides, self.factor)}"
            )
        channels, reduced = self.shape[0], self.image.sides[0] // self.shape[1]
        return replace(self, image=self.image.at(sides), shape=(channels, sides[0] // reduced, sides[1] // reduced))

    def at_nearest(self, width: int, height: int) -> "Opened":
        """The same run for images of the bucket that an image of this shape goes to; itself where it has one size alone."""
        if not self.buckets:
            return self
        (bucket,) = nearest_buckets([(rows, columns) for rows, columns, _ in self.buckets], np.array([[width, height]]))
        return self.at_size(self.buckets[int(bucket)][:2])

    @property
    def shapes(self) -> dict[tuple[int, ...], int]:
        """How many images of each shape, as the network sees it, the run was trained on; empty where they have one size."""
        return {self.at_size((height, width)).shape: count for height, width, count in self.buckets}

    @property
    def bucket_sizes(self) -> tuple[Sides, ...]:
        """Height and width of each of the `buckets`."""
        return tuple((height, width) for height, width, _ in self.buckets)

    @property
    def square(self) -> ImageConfig:
        """What its images are compared at: `image`, or of several shapes the square that their sizes were made from."""
        return self.image.at(sides_of(self.config["image"]["size"])) if self.buckets else self.image

    @property
    def low_resolution(self) -> int | None:
        """Of an upsampler: the size of the images that it starts from."""
        return self.config.get("low_resolution")

    @property
    def condition(self) -> Condition | None:
        """What it draws images from; of an upsampler that was imported, the smaller image."""
        return read_condition(self.config)

    @property
    def condition_names(self) -> list[str]:
        """What each channel of the condition holds that the network sees."""
        return condition_names(self.config, self.image.channels, self.shape[0] if self.codec is not None else None)

    def _source(self, spec: Any, held_out: Share) -> Examples:
        density, codec = open_density(spec, held_out, replace(self.image, flip=False, crop="center")), self.codec
        if self.buckets:
            assert isinstance(density.train, ImageSet)
            density.buckets = sort_by_shape(self.bucket_sizes, self.image, density.train.sides)
        images = density.examples()
        if codec is None:
            return images
        weight, groups = next(codec.network.parameters()), dict(zip(self.shapes, images.groups.values(), strict=False))
        return Examples(images.labels, lambda indices: codec.encode(images.load(indices).to(weight), indices.tolist()), groups)


def count_classes(class_conditional: bool | None, class_names: Sequence[str]) -> int | None:
    """How many classes a network has: None where it learns none. True asks for classes, None takes what the data has."""
    if class_conditional and not class_names:
        raise UserError(
            "class_conditional is true and the data has no classes: use class subfolders or a label_column, or "
            "--set class_conditional=null"
        )
    return len(class_names) if class_names and class_conditional is not False else None


def read_source(run_config: Mapping[str, Any], origin: str = "config") -> Any:
    """What sampling of a run starts from, by its config; `origin` names the run in an error."""
    return validate(_Source, {"source": run_config.get("source", GAUSSIAN)}, origin=origin).source


def read_condition(run_config: Mapping[str, Any]) -> Condition | None:
    """The condition of a run's config; the small image of an imported upsampler is one, too."""
    if run_config.get("low_resolution") is not None:
        return LowCondition(kind="low", size=run_config["low_resolution"])
    return validate(_Condition, {"condition": run_config.get("condition")}).condition


def condition_names(run_config: Mapping[str, Any], image_channels: int, latent_channels: int | None = None) -> list[str]:
    """What each channel of the condition holds that the network of a run sees. That of an imported upsampler has no flag."""
    names = channel_names(read_condition(run_config), image_channels, latent_channels)
    return names[:-1] if run_config.get("low_resolution") is not None else names


def open_trained(path: str | Path, device: torch.device, network: nn.Module | None = None) -> Opened:
    """Open a run of images, a checkpoint, a final folder or a `.pt` export with its EMA weights on the device. Those of a run
    of the caller's own network are put into `network`, built as it was for training. A UserError says what is missing, damaged,
    of another architecture or of 2-D points."""
    opened = open_run(path, device, network)
    if not isinstance(opened, Opened):
        raise UserError(f"{path} is a run of 2-D points, not of images: python sample.py {quoted(path)} draws them")
    return opened


def open_run(path: str | Path, device: torch.device, network: nn.Module | None = None) -> Run:
    """The same of a run of images or of 2-D points."""
    path = Path(path)
    folder, weights, config, data, step, digest = read_weights(path)
    advice = f"give a diffusion run, and --classifier {quoted(path)}"
    reasons = {
        "trained a network that was handed in from Python, which no config builds: open it from Python, with open_run(path, "
        "device, network=...)": network is None and data.get("network") == "python",
        f"is a classifier, which draws nothing by itself: {advice}": "classifier" in config,
        "is an autoencoder, which draws nothing by itself: train_ldm.py trains on its latents": "stages" in config,
        "is no diffusion run of this project": not {"model", "process", "image", "class_conditional"} <= set(config),
    }
    refuse(path, reasons)
    spec, class_names = validate(ProcessConfig, config["process"], origin=f"{path}: process"), tuple(data["class_names"])
    num_classes, shape, of_images = count_classes(config["class_conditional"], class_names), (2,), dict[str, Any]()
    condition = list[str]()
    if config["image"] is not None:
        image = validate(ImageConfig, config["image"], origin=f"{path}: image")
        of_images["buckets"] = buckets = tuple((height, width, count) for height, width, count in data.get("buckets", ()))
        image = of_images["image"] = image.at(max(buckets, key=lambda bucket: bucket[2])[:2]) if buckets else image
        shape = image.shape
        if (facts := data.get("latents")) is not None:
            autoencoder, shape = kept_autoencoder(folder, device), tuple(facts["shape"])
            if autoencoder.digest != facts["autoencoder"]:
                raise UserError(f"{path}: the autoencoder beside it is another than the one it was trained on")
            of_images["codec"] = LatentCodec(autoencoder.network, facts["mean"], facts["std"])
            of_images["bounds"] = latent_bounds(facts, device)
        condition = condition_names(config, image.channels, shape[0] if "codec" in of_images else None)
    model = validate(_Model, {"model": config["model"]}, origin=str(path)).model
    if of_images:
        of_images["factor"] = model.factor * (of_images["image"].sides[0] // list(shape)[1])
    network = network or build_model(
        model,
        shape,
        num_classes,
        learned=spec.variance == "learned",
        null_class=LABELS not in weights or num_classes is None or len(weights[LABELS]) > num_classes,
        condition_channels=len(condition),
        augmented=config.get("augmentation") is not None,
    )
    load_weights(network, weights, path)
    if config.get("cpu_threads") is not None:
        torch.set_num_threads(config["cpu_threads"])  # so that processes agree to the bit, as in training
    return (Opened if of_images else Run)(
        path=path,
        network=network.to(device).eval().requires_grad_(False),
        process=build_process(spec),
        shape=shape,
        class_names=class_names,
        config=config,
        facts=data,
        step=step,
        digest=digest,
        **of_images,
    )
