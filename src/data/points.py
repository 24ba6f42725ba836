"""Sets of 2-D points drawn from densities: an image, mixtures of Gaussians, two moons, a spiral, a checkerboard.

A density is a config class with a method `draw(rng)` of its points; configs know those that are in POINT_SOURCES.
"""

import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag, model_validator

from ..config import OpenUnion, UserError, config, config_error, dump, kind_of
from .sources.images import Source, hold_out
from .sources.python import dataset_classes, item_array, item_name, read_items
from .sources.registry import SOURCES, SeveralSources
from .transforms import decode

Count = Annotated[int, Field(ge=2)]
RawPoints = tuple[NDArray[Any], NDArray[np.int64] | None, int]  # points (N, 2), labels (N,) or None, number of classes
EXTENT = 2.0  # densities lie in about [-2, 2] x [-2, 2], so that their spread is near that of a standard normal


@config
class DensitySource:
    """Points where a greyscale image is bright (`invert`: dark); its longer side is 4 wide, its middle is 0."""

    source: Literal["density"]
    path: str
    invert: bool = False
    count: Count = 131072

    def draw(self, rng: np.random.Generator, image: bytes | None = None) -> RawPoints:
        density = density_of(self, image)
        height, width = density.shape
        cell = np.searchsorted(np.cumsum(density), rng.random(self.count) * density.sum(), side="right")
        row, column = np.divmod(cell.clip(max=density.size - 1), width)
        within = rng.random((self.count, 2))  # anywhere in the pixel
        x, y = column + within[:, 0] - width / 2, height / 2 - row - within[:, 1]
        return np.stack([x, y], axis=1) * (2 * EXTENT / max(height, width)), None, 0


@config
class MixtureSource:
    """A mixture of round Gaussians: a mean, a standard deviation and a weight for each, which is its class."""

    source: Literal["mixture"]
    means: tuple[tuple[float, float], ...] = Field(min_length=1)
    stds: tuple[Annotated[float, Field(gt=0)], ...]
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    count: Count = 131072

    @model_validator(mode="after")
    def _one_each(self) -> "MixtureSource":
        if not len(self.means) == len(self.stds) == len(self.weights or self.means):
            raise config_error("give as many stds (and weights) as means")
        return self

    def draw(self, rng: np.random.Generator) -> RawPoints:
        weights = np.array(self.weights or [1.0] * len(self.means))
        chosen = rng.choice(len(weights), self.count, p=weights / weights.sum())
        points = np.array(self.means)[chosen] + np.array(self.stds)[chosen, None] * rng.standard_normal((self.count, 2))
        return points, chosen, len(weights)


@config
class MoonsSource:
    """Two half circles, each a class, blurred by `noise`."""

    source: Literal["moons"]
    noise: float = Field(0.08, ge=0)
    count: Count = 131072

    def draw(self, rng: np.random.Generator) -> RawPoints:
        lower = rng.integers(0, 2, self.count)
        angle = np.pi * rng.random(self.count)
        arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        arc = np.where(lower[:, None], [1.0, 0.5] - arc, arc) - [0.5, 0.25]
        return 1.2 * arc + self.noise * rng.standard_normal((self.count, 2)), lower, int(lower.max()) + 1


@config
class SpiralSource:
    """A spiral of `turns`, blurred by `noise`."""

    source: Literal["spiral"]
    turns: float = Field(2.0, gt=0)
    noise: float = Field(0.05, ge=0)
    count: Count = 131072

    def draw(self, rng: np.random.Generator) -> RawPoints:
        radius = np.sqrt(rng.random(self.count) * 0.97 + 0.03)  # as much of it per length everywhere, nearly
        angle = 2 * np.pi * self.turns * radius
        line = 1.8 * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return line + self.noise * rng.standard_normal((self.count, 2)), None, 0


@config
class CheckerboardSource:
    """The dark squares of a board of `cells` by `cells`."""

    source: Literal["checkerboard"]
    cells: int = Field(4, ge=2)
    count: Count = 131072

    def draw(self, rng: np.random.Generator) -> RawPoints:
        dark = np.array([(i, j) for i in range(self.cells) for j in range(self.cells) if (i + j) % 2 == 0])
        corner = dark[rng.integers(0, len(dark), self.count)]
        return ((corner + rng.random((self.count, 2))) / self.cells - 0.5) * 2 * EXTENT * 0.9, None, 0


@config
class GaussianSource:
    """Standard normal noise of the shape of the data."""

    source: Literal["gaussian"]


POINT_SOURCES = OpenUnion("source", DensitySource, MixtureSource, MoonsSource, SpiralSource, CheckerboardSource)
_DataSource = Annotated[Source, OpenUnion("source", SOURCES, POINT_SOURCES), Tag("object")]
_AnySource = Annotated[Source, OpenUnion("source", GaussianSource, SOURCES, POINT_SOURCES), Tag("object")]
DataEnd = Annotated[_DataSource | SeveralSources, Discriminator(kind_of)]
SourceEnd = Annotated[_AnySource | SeveralSources, Discriminator(kind_of)]


def is_point_source(spec: Any) -> bool:
    """Whether a source is a density of 2-D points."""
    return isinstance(spec, tuple(POINT_SOURCES.classes))


@dataclass(eq=False)
class PointSet:
    """`points` (N, 2) float32 with their labels (N,), indices into `class_names` or -1: what training reads."""

    points: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...] = ()
    parts = ()  # no files, so none was left out

    def __len__(self) -> int:
        return len(self.points)

    @property
    def counts(self) -> dict[str, int]:
        """How many points each class has."""
        return {name: int((self.labels == i).sum()) for i, name in enumerate(self.class_names)}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.points.tobytes() + self.labels.tobytes()).hexdigest()

    def only(self, keep: Any) -> "PointSet":
        """The points of a mask (N,) or a slice."""
        return PointSet(self.points[keep], self.labels[keep], self.class_names)


def density_image(path: str) -> bytes:
    """A density's image as a greyscale PNG; a UserError where the image cannot be read."""
    try:
        image, content = decode(Path(path).expanduser(), channels=1), io.BytesIO()
    except FileNotFoundError:
        raise UserError(f"the density image {path} does not exist") from None
    except Exception as error:
        raise UserError(f"the density image {path} cannot be read: {error}") from None
    image.save(content, "PNG")
    return content.getvalue()


def density_of(spec: DensitySource, image: bytes | None = None) -> NDArray[np.float64]:
    """The probability (H, W) of each pixel of the density's image (`image`, where its file is known), the first row at the top;
    a UserError where the image is empty."""
    weight = np.asarray(decode(image or density_image(spec.path), channels=1), dtype=np.float64)
    weight = 255 - weight if spec.invert else weight
    if not weight.any():
        colour, change = ("white", "true to false") if spec.invert else ("black", "false to true")
        advice = f"draw on it, or change invert from {change}"
        raise UserError(f"the density image {spec.path} is empty: all of it is {colour}; {advice}")
    return weight / weight.sum()


def draw_points(spec: Any, image: bytes | None = None) -> PointSet:
    """`count` points of a density, always the same ones; a UserError where an image cannot be read or is empty. `image` is the
    content of a DensitySource's file, where it is known."""
    words = repr(sorted((key, value) for key, value in dump(spec).items() if key != "path")).encode()
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(words).digest()[:8], "little"))
    points, labels, num_classes = spec.draw(rng, image) if isinstance(spec, DensitySource) else spec.draw(rng)
    numbers = np.full(spec.count, -1, dtype=np.int64) if labels is None else labels.astype(np.int64)
    return PointSet(np.ascontiguousarray(points, dtype=np.float32), numbers, tuple(map(str, range(num_classes))))


def open_points(spec: Any, held_out: float, image: bytes | None = None) -> tuple[PointSet, PointSet | None]:
    """The points to train on, and the share of them that is held out."""
    points = draw_points(spec, image)
    first = len(points) - math.ceil(len(points) * held_out)
    return (points, None) if first == len(points) else (points.only(slice(0, first)), points.only(slice(first, None)))


def open_given_points(dataset: Any, held_out: Any) -> tuple[PointSet, PointSet | None]:
    """The points of a data set that was handed in from Python, whose items are (2,) floats, or (point, label)."""
    if not isinstance(held_out, float | int):
        raise UserError("held_out of 2-D points is a share of them, such as 0.05")

    def checked_point(value: Any, where: str) -> NDArray[Any]:
        point = item_array(value, where)
        if point.shape != (2,) or point.dtype.kind != "f":
            raise UserError(f"{where} is no 2-D point of two floats: {point.dtype} of shape {point.shape}; images need `image`")
        if not np.isfinite(point).all():
            raise UserError(f"{where} is not finite: {point}")
        return point

    items, labels = zip(*read_items(dataset, checked_point), strict=True)
    points = PointSet(np.stack(items), np.array(labels, dtype=np.int64), dataset_classes(dataset, labels))
    return hold_out(points, [item_name(i) for i in range(len(points))], held_out, "points")
