"""An opened density: images, images as latents, or 2-D points; what is learned of it, examples, and where sampling starts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ..data import ImageConfig, ImageSet, PointSet, describe_data, open_data, open_given, open_given_points, open_points
from ..data.points import DensitySource, density_image, is_point_source
from ..runtime.processes import same_on_all
from ..runtime.seeds import generator
from ..runtime.stream import Examples, image_examples
from .latents import Latents

Bound = float | Tensor
Start = Callable[[int, Sequence[int], int], Tensor]  # (seed, indices of images, draw) -> (B, *shape) on the CPU


@dataclass(frozen=True)
class SourceSampler:
    """A Start for sampling: the examples, in an order that is a function of (seed, draw)."""

    examples: Examples

    def __call__(self, seed: int, indices: Sequence[int], draw: int = 0) -> Tensor:
        order = generator(seed, "source", draw).permutation(len(self))
        return self.examples.load(order[np.array(indices, dtype=np.int64) % len(self)]).float().cpu()

    def __len__(self) -> int:
        return len(self.examples.labels)


class Density(ABC):
    """`train` is what a run learns from, `held_out` what it does not, or None; `shape` is what the network sees of one."""

    shape: tuple[int, ...]
    train: ImageSet | PointSet
    held_out: ImageSet | PointSet | None

    @property
    def facts(self) -> dict[str, Any]:
        """What travels with the weights."""
        return describe_data(self.train, self.held_out)

    @abstractmethod
    def _examples(self, data_set: Any) -> Examples: ...

    def examples(self, *, of_train: bool = False) -> Examples:
        """What is held out or, where nothing is (or with `of_train`), what is learned from; always the same for one index."""
        return self._examples(self.train if of_train or self.held_out is None else self.held_out)

    def source_sampler(self, *, of_train: bool = False) -> SourceSampler:
        """What sampling starts from: these examples."""
        return SourceSampler(self.examples(of_train=of_train))


class ImageDensity(Density):
    """Images (C, H, W)."""

    def __init__(self, train: ImageSet, held_out: ImageSet | None, image: ImageConfig) -> None:
        self.train, self.held_out, self.image = train, held_out, image
        self.shape = image.shape

    def _examples(self, data_set: ImageSet) -> Examples:
        return image_examples(data_set, self.image)


class LatentDensity(Density):
    """The cached latents (D, h, w) of images."""

    def __init__(self, train: ImageSet, held_out: ImageSet | None, latents: Latents, image: ImageConfig) -> None:
        self.train, self.held_out, self.latents, self.image = train, held_out, latents, image
        self.shape = tuple(latents.facts["shape"])

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"latents": self.latents.facts}

    def _examples(self, data_set: ImageSet) -> Examples:
        return self.latents.examples(data_set.labels, held_out=data_set is not self.train)


class PointDensity(Density):
    """Points (2,), and the `drawing` of the density, where it is one."""

    def __init__(self, train: PointSet, held_out: PointSet | None, drawing: bytes | None = None) -> None:
        self.train, self.held_out, self.shape, self.drawing = train, held_out, (2,), drawing

    def _examples(self, data_set: PointSet) -> Examples:
        return Examples(data_set.labels, lambda indices: torch.from_numpy(data_set.points[indices]))


def open_density(
    spec: Any, held_out: Any, image: ImageConfig | None, drawing: bytes | None = None
) -> ImageDensity | PointDensity:
    """What a config's `data` or `source` names, images or points; a UserError says what does not fit. `drawing` is that of a
    density of points, where it is known."""
    if is_point_source(spec):
        if image is not None:
            raise UserError(f"{spec.source} is a density of 2-D points: set image to null, or name images at both ends")
        if not isinstance(held_out, float | int):
            raise UserError("held_out of 2-D points is a share of them, such as 0.05")
        if isinstance(spec, DensitySource):
            drawing = drawing or density_image(spec.path)
        return PointDensity(*open_points(spec, held_out, drawing), drawing)
    if image is None:
        raise UserError('images need image, as in {"size": 64}; 2-D points have none')
    return ImageDensity(*open_data(spec, held_out), image)


def given_density(dataset: Any, held_out: Any, image: ImageConfig | None) -> ImageDensity | PointDensity:
    """The data set that was handed in from Python: the same on all processes, or a UserError."""
    if image is None:
        density: PointDensity | ImageDensity = PointDensity(*open_given_points(dataset, held_out))
    else:
        density = ImageDensity(*open_given(dataset, held_out, image), image)
    same_on_all(density.train.fingerprint)
    return density
