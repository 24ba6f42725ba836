"""Examples with labels, images or points, on which a loss is measured and from which previews are drawn."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import ImageConfig, ImageSet
from .stream import to_network


class Examples(NamedTuple):
    """Labels (N,), -1 for none, and `load(indices)`, which gives x0 (B, C, H, W) on the CPU or the device, always the same for
    an index."""

    labels: NDArray[np.int64]
    load: Callable[[NDArray[np.int64]], Tensor]


def image_examples(held_out: ImageSet, spec: ImageConfig) -> Examples:
    """Images cut from the middle, in [-1, 1]."""
    plain = ImageConfig(size=spec.size, channels=spec.channels)
    held_out.prepare(plain)

    def load(indices: NDArray[np.int64]) -> Tensor:
        pixels = held_out.batch(indices, plain, np.full((len(indices), 3), 0.5))
        return to_network(torch.from_numpy(pixels), torch.device("cpu"))

    return Examples(held_out.labels, load)
