"""The source `shapes`: images of geometric shapes, drawn by a program, for tests and for trying out."""

from typing import Literal

import numpy as np
import pydantic
from pydantic import Field

from ...config import config, config_error
from ...config.sizes import ImageSize, Sides, describe_size, sides_of
from ..colour import Pixels
from .images import ArrayImages, digest

SHAPES = ("circle", "cross", "square", "triangle")


@config
class ShapesSource:
    """Circles, crosses, squares and triangles in colours, for tests: `count` images of `size` pixels, the side of a square
    or [height, width]."""

    source: Literal["shapes"]
    count: int = Field(512, gt=0)
    size: ImageSize = 32
    split: Literal["train", "test"] = "train"
    subset: int | None = Field(None, gt=0)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "ShapesSource":
        if not all(8 <= side <= 512 for side in sides_of(self.size)):
            raise config_error(f"size: shapes are drawn in images of 8 to 512 px, not of {describe_size(self.size)}")
        return self


def open_shapes(spec: ShapesSource) -> ArrayImages:
    split = 0 if spec.split == "train" else 1
    pixels = [draw_shape(SHAPES[i % len(SHAPES)], spec.size, np.random.default_rng([split, i])) for i in range(spec.count)]
    return ArrayImages(
        names=[f"shapes/{spec.split}/{i:06d}" for i in range(spec.count)],
        labels=np.arange(spec.count, dtype=np.int64) % len(SHAPES),
        class_names=SHAPES,
        fingerprint=digest("shapes", spec.split, str(spec.size), str(spec.count)),
        pixels=np.stack(pixels),
    )


def draw_shape(kind: str, size: int | Sides, rng: np.random.Generator) -> Pixels:
    """One shape in a colour on a pale ground, (height, width, 3) uint8 of this size."""
    from PIL import Image, ImageDraw

    scale, (height, width) = 4, sides_of(size)  # drawn large and reduced, for smooth edges
    pale, strong = rng.integers(200, 256, 3), rng.integers(0, 170, 3)
    image = Image.new("RGB", (width * scale, height * scale), tuple(map(int, pale)))
    draw = ImageDraw.Draw(image)
    radius = rng.uniform(0.22, 0.38) * min(height, width) * scale
    x, y = rng.uniform(radius, (width * scale - radius, height * scale - radius))
    colour = tuple(map(int, strong))
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif kind == "square":
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif kind == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    else:
        draw.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=colour)
        draw.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill=colour)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))
