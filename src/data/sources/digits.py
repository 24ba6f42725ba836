"""The source `digits`: scikit-learn's handwritten digits."""

from typing import Any, Literal

import numpy as np
from pydantic import Field

from ...config import config
from ...config.packages import needed
from .images import ArrayImages, digest, name_fraction


@config
class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels. `split` train and test are nine and one tenth of them."""

    source: Literal["digits"]
    split: Literal["all", "train", "test"] = "all"
    subset: int | None = Field(None, gt=0)


def open_digits(spec: DigitsSource) -> ArrayImages:
    with needed("data.source digits", "sklearn"):
        from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.rint(digits.images / 16 * 255).astype(np.uint8)[..., None]
    names = [f"digits/{i:04d}" for i in range(len(pixels))]
    keep = [i for i, name in enumerate(names) if spec.split == "all" or (spec.split == "test") == (name_fraction(name) < 0.1)]
    return ArrayImages(
        names=[names[i] for i in keep],
        labels=digits.target[keep].astype(np.int64),
        class_names=tuple("0123456789"),
        fingerprint=digest(pixels[keep].tobytes()),
        pixels=pixels[keep],
    )
