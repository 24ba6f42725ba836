"""Two-dimensional densities: from a picture, mixtures of Gaussians, two moons, a spiral, a checkerboard; as sets of points."""

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag, model_validator

from ..config import UserError, config, config_error, dump, kind_of
from .sources import OneSource, Source
from .transforms import decode

Count = Annotated[int, Field(ge=2)]
Points = NDArray[np.float32]
EXTENT = 2.0  # densities lie in about [-2, 2] x [-2, 2], so that their spread is near that of a standard normal


@config
class DensitySource:
    """Points where a greyscale picture is bright (`invert`: dark); its longer side is 4 wide, its middle is 0."""

    source: Literal["density"]
    path: str
    invert: bool = False
    count: Count = 131072


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


@config
class MoonsSource:
    """Two half circles, each a class, blurred by `noise`."""

    source: Literal["moons"]
    noise: float = Field(0.08, ge=0)
    count: Count = 131072


@config
class SpiralSource:
    """A spiral of `turns`, blurred by `noise`."""

    source: Literal["spiral"]
    turns: float = Field(2.0, gt=0)
    noise: float = Field(0.05, ge=0)
    count: Count = 131072


@config
class CheckerboardSource:
    """The dark squares of a board of `cells` by `cells`."""

    source: Literal["checkerboard"]
    cells: int = Field(4, ge=2)
    count: Count = 131072


@config
class GaussianSource:
    """Standard normal noise of the shape of the data."""

    source: Literal["gaussian"]


PointSource = DensitySource | MixtureSource | MoonsSource | SpiralSource | CheckerboardSource
_Several = Annotated[tuple[OneSource, ...], Field(min_length=1), Tag("list")]
DataEnd = Annotated[
    Annotated[Annotated[Source | PointSource, Field(discriminator="source")], Tag("object")] | _Several, Discriminator(kind_of)
]
SourceEnd = Annotated[
    Annotated[Annotated[GaussianSource | Source | PointSource, Field(discriminator="source")], Tag("object")] | _Several,
    Discriminator(kind_of),
]


class PointSet:
    """`points` (N, 2) float32 with their labels (N,), indices into `class_names` or -1: what training reads."""

    parts: tuple[Any, ...] = ()  # no files, so none was left out

    def __init__(self, points: Points, labels: NDArray[np.int64], class_names: Sequence[str] = ()) -> None:
        self.points, self.labels, self.class_names = points, labels, tuple(class_names)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def counts(self) -> dict[str, int]:
        """Points by class."""
        return {name: int((self.labels == i).sum()) for i, name in enumerate(self.class_names)}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.points.tobytes() + self.labels.tobytes()).hexdigest()


def density_image(path: str) -> bytes:
    """A density's picture as a greyscale PNG; one that cannot be read is a UserError."""
    try:
        image, content = decode(Path(path).expanduser(), channels=1), io.BytesIO()
    except FileNotFoundError:
        raise UserError(f"the density picture {path} does not exist") from None
    except Exception as error:
        raise UserError(f"the density picture {path} cannot be read: {error}") from None
    image.save(content, "PNG")
    return content.getvalue()


def density_of(spec: DensitySource, picture: bytes | None = None) -> NDArray[np.float64]:
    """The probability (H, W) of each pixel of its picture (`picture`, where that is known), the first row at the top; a
    UserError where there is none."""
    weight = np.asarray(decode(picture or density_image(spec.path), channels=1), dtype=np.float64)
    weight = 255 - weight if spec.invert else weight
    if not weight.any():
        colour, other = ("white", "true to false") if spec.invert else ("black", "false to true")
        raise UserError(
            f"the density picture {spec.path} is empty: all of it is {colour}; draw on it, or change invert from {other}"
        )
    return weight / weight.sum()


def _from_density(spec: DensitySource, rng: np.random.Generator, picture: bytes | None = None) -> tuple[NDArray[Any], None]:
    density = density_of(spec, picture)
    height, width = density.shape
    cell = np.searchsorted(np.cumsum(density), rng.random(spec.count) * density.sum(), side="right").clip(max=density.size - 1)
    row, column = np.divmod(cell, width)
    within = rng.random((spec.count, 2))  # anywhere in the pixel
    x, y = column + within[:, 0] - width / 2, height / 2 - row - within[:, 1]
    return np.stack([x, y], axis=1) * (2 * EXTENT / max(height, width)), None


def _from_mixture(spec: MixtureSource, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[np.int64]]:
    weights = np.array(spec.weights or [1.0] * len(spec.means))
    chosen = rng.choice(len(weights), spec.count, p=weights / weights.sum())
    return np.array(spec.means)[chosen] + np.array(spec.stds)[chosen, None] * rng.standard_normal((spec.count, 2)), chosen


def _from_moons(spec: MoonsSource, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[np.int64]]:
    lower = rng.integers(0, 2, spec.count)
    angle = np.pi * rng.random(spec.count)
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    arc = np.where(lower[:, None], [1.0, 0.5] - arc, arc) - [0.5, 0.25]
    return 1.2 * arc + spec.noise * rng.standard_normal((spec.count, 2)), lower


def _from_spiral(spec: SpiralSource, rng: np.random.Generator) -> tuple[NDArray[Any], None]:
    radius = np.sqrt(rng.random(spec.count) * 0.97 + 0.03)  # as much of it per length everywhere, nearly
    angle = 2 * np.pi * spec.turns * radius
    line = 1.8 * radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return line + spec.noise * rng.standard_normal((spec.count, 2)), None


def _from_checkerboard(spec: CheckerboardSource, rng: np.random.Generator) -> tuple[NDArray[Any], None]:
    dark = np.array([(i, j) for i in range(spec.cells) for j in range(spec.cells) if (i + j) % 2 == 0])
    corner = dark[rng.integers(0, len(dark), spec.count)]
    return ((corner + rng.random((spec.count, 2))) / spec.cells - 0.5) * 2 * EXTENT * 0.9, None


DRAWN_BY: dict[type, Any] = {
    DensitySource: _from_density,
    MixtureSource: _from_mixture,
    MoonsSource: _from_moons,
    SpiralSource: _from_spiral,
    CheckerboardSource: _from_checkerboard,
}


def draw_points(spec: PointSource, picture: bytes | None = None) -> PointSet:
    """`count` points of a density, always the same ones; a UserError where a picture cannot be read or is empty. `picture` is
    what a DensitySource's path held, where that is known."""
    words = repr(sorted((key, value) for key, value in dump(spec).items() if key != "path")).encode()
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(words).digest()[:8], "little"))
    known = (picture,) if isinstance(spec, DensitySource) else ()
    points, labels = DRAWN_BY[type(spec)](spec, rng, *known)
    names = () if labels is None else tuple(str(i) for i in range(int(labels.max()) + 1))
    if isinstance(spec, MixtureSource):
        names = tuple(str(i) for i in range(len(spec.means)))
    found = np.full(spec.count, -1, dtype=np.int64) if labels is None else labels.astype(np.int64)
    return PointSet(np.ascontiguousarray(points, dtype=np.float32), found, names)


def open_points(spec: PointSource, held_out: float, picture: bytes | None = None) -> tuple[PointSet, PointSet | None]:
    """The points to train on, and the share of them that is held out."""
    everything = draw_points(spec, picture)
    first = len(everything) - math.ceil(len(everything) * held_out)
    if first == len(everything):
        return everything, None
    parts = [
        PointSet(everything.points[part], everything.labels[part], everything.class_names)
        for part in (slice(0, first), slice(first, None))
    ]
    return parts[0], parts[1]
