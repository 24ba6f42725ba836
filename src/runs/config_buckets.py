"""The images of a training config in their buckets, before it is trained: what `prepare_data.py check` shows of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .. import figures
from ..config import UserError, config, read_json, validate
from ..config.sizes import Sides, describe_size
from ..data import HeldOut, ImageConfig, ImageSet, Share, open_data
from ..data.buckets import make_buckets, measure_buckets
from ..data.transforms import AspectConfig
from ..models import ClassifierConfig, ModelConfig, VAEConfig
from .autoencoder import open_autoencoder

_SIDE = 96  # pixels of a square in a sheet
_WIDTH = 8 * (_SIDE + figures.GAP)  # of a sheet of buckets, in pixels


@config
class ModelOnly:
    """The part of the config of a diffusion run that says by what its network reduces what it sees."""

    model: ModelConfig


@config
class _Autoencoder:
    """The same of train_vae.py."""

    model: VAEConfig


@config
class _Classifier:
    """The same of train_classifier.py."""

    classifier: ClassifierConfig


@config
class _Shapes:
    """The part of a training config that says which images are trained on, at which shapes."""

    image: ImageConfig
    held_out: HeldOut = 0.0
    autoencoder: str | None = None


class BucketedImages(NamedTuple):
    """The images that a run would train on, {option or config key: what they are cut to}, and by what the networks reduce
    images."""

    images: ImageSet
    specs: dict[str, ImageConfig]
    factor: int

    def measure(self) -> dict[str, dict[str, Any]]:
        """What `measure_buckets` gives for each option or key."""
        return {key: measure_buckets(spec, self.images.sides, self.factor) for key, spec in self.specs.items()}


def sizes_of_config(raw: dict[str, Any]) -> dict[str, int | Sides]:
    """{key: size} of all sizes at which a training config trains. It may have mistakes: what is no size is left out."""
    image = raw.get("image")
    plain = image.get("size") if isinstance(image, dict) else None
    stages = [stage.get("image_size") for stage in raw.get("stages", ()) if isinstance(stage, dict)]
    sizes = {"image.size": plain} if not stages or None in stages else {}
    sizes |= {f"stages.{i}.image_size": size for i, size in enumerate(stages)}
    read = {key: _as_size(size) for key, size in sizes.items()}
    return {key: size for key, size in read.items() if size is not None}


def _as_size(value: Any) -> int | Sides | None:
    """A size as it stands in a config, which may have mistakes: the side of a square, [height, width], or None of neither."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 1 for side in sides):
        return None
    return (sides[0], sides[1]) if isinstance(value, list) else value


def bucketed_images(
    path: str, images: ImageSet, sizes: Mapping[str, int | Sides], *, max_ratio: float | None = None, step: int | None = None
) -> BucketedImages | None:
    """The images of a training config `path`, or of a folder, at these `sizes` in their buckets: by image.aspect, or
    for a folder by `max_ratio` and `step` (default 8), the options --aspect and --step. None where neither is there."""
    if not path.endswith(".json"):
        if max_ratio is None and step is None:
            return None
        if max_ratio is None or "--size" not in sizes:
            raise UserError("--aspect makes buckets from --size, in steps of --step: give --size and --aspect")
        aspect = validate(AspectConfig, {"max_ratio": max_ratio, "step": 8 if step is None else step}, origin="--aspect")
        specs = {key: ImageConfig(size=size, aspect=aspect) for key, size in sizes.items()}
        return BucketedImages(images, specs, aspect.step or 8)
    if max_ratio is not None or step is not None:
        raise UserError("--aspect and --step are for a folder; a config has its own image.aspect")
    raw = read_json(path)
    if not isinstance(raw.get("image"), dict) or raw["image"].get("aspect") is None:
        return None
    spec = validate(_Shapes, {key: raw[key] for key in ("image", "held_out", "autoencoder") if key in raw}, origin=path)
    train_set, _ = open_data(images, spec.held_out if isinstance(spec.held_out, Share) else 0.0)
    specs = {key: replace(spec.image, size=size) for key, size in sizes.items()}
    return BucketedImages(train_set, specs, _factor_of(raw, spec, path))


def _factor_of(raw: dict[str, Any], spec: _Shapes, origin: str) -> int:
    """By what the networks of a training config reduce images. A UserError says what is missing to know it."""
    assert spec.image.aspect is not None
    step = spec.image.aspect.step
    if "stages" in raw:
        return validate(_Autoencoder, {"model": raw.get("model", {})}, origin=origin).model.factor
    if "classifier" in raw:
        return validate(_Classifier, {"classifier": raw["classifier"]}, origin=origin).classifier.factor
    if "model" not in raw:
        if step is None:
            raise UserError(
                f"{origin}: the sizes of the buckets follow from the network, and it names none; set image.aspect.step"
            )
        return step
    factor = validate(ModelOnly, {"model": raw["model"]}, origin=origin).model.factor
    if spec.autoencoder is None:
        return factor
    try:
        return factor * open_autoencoder(spec.autoencoder, torch.device("cpu")).factor
    except UserError as error:
        if step is not None:
            return step
        raise UserError(
            f"{error}; without it the sizes of the buckets are not known: set image.aspect.step, a multiple of what the "
            "autoencoder and the network reduce images by"
        ) from None


def draw_images(images: ImageSet) -> Any:
    """A sheet of some of the images, cut to squares."""
    chosen = np.random.default_rng(0).choice(len(images), min(64, len(images)), replace=False)
    return _grid_of(images, ImageConfig(size=_SIDE), chosen)


def draw_buckets(bucketed: BucketedImages) -> Any:
    """A sheet with a row of images for each bucket, in its shape, made for the largest of the sizes."""
    images, spec = bucketed.images, max(bucketed.specs.values(), key=lambda spec: spec.sides)
    buckets, rng, rows = make_buckets(spec, images.sides, bucketed.factor), np.random.default_rng(0), []
    table = measure_buckets(spec, images.sides, bucketed.factor)["buckets"]
    for bucket, (shape, row) in enumerate(zip(buckets.specs, table, strict=True)):
        members = buckets.members(bucket)
        height, width = (round(side * _SIDE / spec.sides[0]) for side in shape.sides)
        columns = min(len(members), _WIDTH // (width + figures.GAP))
        chosen = rng.choice(members, columns, replace=False)
        title = f"{describe_size(shape.size)}: {len(members)} images, {row['cropped']:.1%} of their area cropped"
        rows.append(_grid_of(images, shape.at((height, width)), chosen, columns=columns, title=title))
    return figures.in_a_column(rows)


def _grid_of(images: ImageSet, spec: ImageConfig, chosen: NDArray[np.int64], *, columns: int = 8, title: str = "") -> Any:
    """The images `chosen`, cut to `spec`, with the names of their classes."""
    pixels = images.batch(chosen, spec.plain, np.full((len(chosen), 3), 0.5))
    names = [images.class_names[label] if label >= 0 else "" for label in images.labels[chosen]]
    return figures.grid(pixels, columns=columns, labels=names if images.class_names else None, title=title)
