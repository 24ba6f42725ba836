"""An opened density: images, images as latents, or 2-D points; what is learned of it, examples, and where sampling starts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import UserError
from ..config.sizes import describe_size
from ..data import ImageConfig, ImageSet, PointSet, describe_data, open_given, open_given_points, open_points
from ..data.buckets import Buckets, make_buckets
from ..data.conditions import Condition
from ..data.pairs import open_pairs, refuse_pairs
from ..data.points import DensitySource, density_image, is_point_source
from ..diffusion.augmentation import AugmentationConfig
from ..runtime.processes import same_on_all
from ..runtime.seeds import generator
from ..runtime.stream import Examples, StepOrder, image_examples

Bound = float | Tensor
MOST = 1024  # images that the mean of the data is measured on
Start = Callable[[int, Sequence[int], int], Tensor]  # (seed, indices of images, draw) -> (B, *shape) on the CPU


@dataclass(frozen=True)
class SourceSampler:
    """A Start for sampling: the examples, in an order that is a function of (seed, draw), or, where they are not `shuffled`, in
    their own, which the draw moves on. Where they have several shapes, those of `shape`."""

    examples: Examples
    shape: tuple[int, ...] | None = None
    shuffled: bool = True

    def at_shape(self, shape: tuple[int, ...]) -> "SourceSampler":
        """The same of examples of another shape; a UserError where there are none."""
        if self.examples.groups and not len(self.examples.groups.get(shape, ())):
            raise UserError(
                f"no image of the source has about the shape {' x '.join(map(str, shape[1:]))}; ask for another --size"
            )
        return replace(self, shape=shape)

    @property
    def _members(self) -> NDArray[np.int64]:
        groups = self.examples.groups
        return groups[self.shape or next(iter(groups))] if groups else np.arange(len(self.examples.labels))

    def __call__(self, seed: int, indices: Sequence[int], draw: int = 0) -> Tensor:
        members = self._members
        shuffle = generator(seed, "source", draw).permutation
        order = members[shuffle(len(members))] if self.shuffled else np.roll(members, -draw)
        return self.examples.load(order[np.array(indices, dtype=np.int64) % len(members)]).float().cpu()

    def __len__(self) -> int:
        return len(self._members)


class Density(ABC):
    """`train` is what a run learns from, `held_out` what it does not, or None; `shape` is what the network sees of one, or of
    most of them: `shapes` are those of the `buckets`."""

    shape: tuple[int, ...]
    shapes: list[tuple[int, ...]]
    buckets: Buckets
    train: ImageSet | PointSet
    held_out: ImageSet | PointSet | None

    @property
    def facts(self) -> dict[str, Any]:
        """What travels with the weights."""
        return describe_data(self.train, self.held_out)

    def shape_at(self, order: StepOrder, step: int) -> tuple[int, ...]:
        """What the network sees of one of the images of a step."""
        return self.shapes[self.buckets.specs.index(order.spec_at(step))] if len(self.shapes) > 1 else self.shape

    @abstractmethod
    def _examples(self, data_set: Any) -> Examples: ...

    def examples(self, *, of_train: bool = False) -> Examples:
        """What is held out or, where nothing is (or with `of_train`), what is learned from; always the same for one index."""
        return self._examples(self.train if of_train or self.held_out is None else self.held_out)

    def mean(self, shape: tuple[int, ...]) -> Tensor:
        """The mean (*shape), in float64, of at most `MOST` of what is learned from and has this shape, spread over all."""
        examples = self.examples(of_train=True)
        members = examples.groups[shape] if examples.groups else np.arange(len(examples.labels))
        chosen = members[np.arange(min(MOST, len(members))) * len(members) // min(MOST, len(members))]
        sums = [examples.load(batch).double().sum(0) for batch in examples.batches(chosen, 64)]
        return torch.stack(sums).sum(0) / len(chosen)

    def source_sampler(self, *, of_train: bool = False, shuffled: bool = True) -> SourceSampler:
        """What sampling starts from: these examples."""
        return SourceSampler(self.examples(of_train=of_train), self.shape, shuffled)


class ImageDensity(Density):
    """Images (C, H, W). Where they have several shapes (`image.aspect`), each is in one of the `buckets`, whose sides are
    multiples of `factor`, by which the networks reduce images; `shape` is that of the most frequent one. They may be drawn from
    a `condition`, and what is learned from may be augmented."""

    def __init__(
        self,
        train: ImageSet,
        held_out: ImageSet | None,
        image: ImageConfig,
        factor: int = 1,
        condition: Condition | None = None,
        augmentation: AugmentationConfig | None = None,
    ) -> None:
        self.train, self.held_out, self.image, self.condition = train, held_out, image, condition
        self.augmentation = augmentation
        self._partner: ImageDensity | None = None  # of pairs, the data whose buckets each image shares
        self._sides, self.buckets = train.sides, make_buckets(image, train.sides, factor)
        self.shapes = [spec.shape for spec in self.buckets.specs]
        self.shape = self.buckets.most_frequent.shape

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | ({"buckets": self.buckets.table} if self.image.aspect is not None else {})

    def _examples(self, data_set: ImageSet) -> Examples:
        return image_examples(data_set, self.buckets_of(data_set), self.condition)

    @property
    def paired_with(self) -> str | None:
        """The hash of the data whose buckets these images share, where they are its partners."""
        return self._partner.train.fingerprint if self._partner is not None else None

    def buckets_of(self, data_set: ImageSet) -> Buckets:
        """Those of the training images, or of those held out."""
        if data_set is self.train:
            return self.buckets
        if self._partner is not None and data_set is self.held_out:
            assert isinstance(self._partner.held_out, ImageSet)
            return self._partner.buckets_of(self._partner.held_out)
        return self.buckets.of(data_set.sides)

    def take_buckets(self, data: "ImageDensity", *, paired: bool = False) -> None:
        """Put the images into the buckets of the `data` whose source they are: each into that of its own shape, or, `paired`,
        into that of its partner. A UserError names a bucket that stays empty."""
        if data.image.aspect is None:
            return
        self._partner, self.shapes, self.shape = data if paired else None, data.shapes, data.shape
        self.buckets = data.buckets if paired else data.buckets.of(self._sides)
        if 0 in self.buckets.counts:
            size = describe_size(self.buckets.specs[self.buckets.counts.index(0)].size)
            raise UserError(f"the source has no image of about the shape {size}, which the data has; add some to it")


class PointDensity(Density):
    """Points (2,), and the `drawing` of the density, where it is one."""

    def __init__(self, train: PointSet, held_out: PointSet | None, drawing: bytes | None = None) -> None:
        self.train, self.held_out, self.shape, self.drawing = train, held_out, (2,), drawing
        self.shapes, self.buckets = [self.shape], Buckets((), np.zeros(len(train), np.int64))

    def _examples(self, data_set: PointSet) -> Examples:
        return Examples(data_set.labels, lambda indices: torch.from_numpy(data_set.points[indices]))


def open_density(
    spec: Any,
    held_out: Any,
    image: ImageConfig | None,
    drawing: bytes | None = None,
    factor: int = 1,
    condition: Condition | None = None,
    augmentation: AugmentationConfig | None = None,
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
    return ImageDensity(*open_pairs(spec, held_out, condition), image, factor, condition, augmentation)


def given_density(
    dataset: Any,
    held_out: Any,
    image: ImageConfig | None,
    factor: int = 1,
    condition: Condition | None = None,
    augmentation: AugmentationConfig | None = None,
) -> ImageDensity | PointDensity:
    """The data set that was handed in from Python: the same on all processes, or a UserError."""
    if image is None:
        density: PointDensity | ImageDensity = PointDensity(*open_given_points(dataset, held_out))
    else:
        refuse_pairs(condition)
        density = ImageDensity(*open_given(dataset, held_out, image), image, factor, condition, augmentation)
    same_on_all(density.train.fingerprint)
    return density
