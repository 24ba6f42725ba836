"""The metrics of samples. A new one is a function of `FeatureSets` and an entry in METRICS.

An entry's name is its key in evaluation.json, and, with the name of the network and the number of images, in metrics.jsonl.
Its label is the row of the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import UserError
from ..metrics import distances
from ..metrics.distances import Array
from ..metrics.features import Features

FEWEST = 10  # images of each side: of fewer, no number means anything
Need = Literal["features", "neighbours", "held_out", "labels"]  # what a metric is computed from, beside features of both sides


def check_count(count: int, what: str) -> None:
    """A UserError where there are fewer than FEWEST images."""
    if count < FEWEST:
        raise UserError(f"{count} {what} are too few to measure anything; at least {FEWEST}")


def flag(samples: int, real: int, dim: int) -> list[str]:
    """Notes on a Fréchet distance in `dim` features where one side has too few images for it, or none."""
    return [
        f"{count} {what} for {dim} features: the distance is too large, and compares only at that number"
        for count, what in ((samples, "samples"), (real, "real pictures"))
        if count <= dim
    ]


def spread_indices(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` indices, evenly spread."""
    return np.arange(min(count, most)) * count // min(count, most)


@dataclass
class FeatureSets:
    """Features of one network, (N, dim): of samples, of real images, and of images that training held out, if any; the metrics
    of the samples.

    `labels` are the classes of "samples", "real" and "held_out", numbers below `num_classes` for images that have one; without
    them, no metric reads classes. `neighbours` says whether metrics that count neighbours are wanted.
    """

    network: Features
    samples: Array
    real: Array
    held_out: Array | None = None
    labels: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    num_classes: int = 0
    neighbours: bool = True

    def has(self, need: Need) -> bool:
        """Whether metrics with this need can be computed."""
        if need == "neighbours":
            return self.neighbours and min(len(self.samples), len(self.real)) > distances.NEIGHBOURS
        return need == "features" or (self.held_out is not None if need == "held_out" else bool(self.labels))

    @cached_property
    def moments(self) -> distances.Moments:
        return distances.moments(self.real)

    @cached_property
    def kernel(self) -> tuple[float, float]:
        """The kernel distance, and its standard deviation."""
        return distances.kernel_distance(self.samples, self.real)

    @cached_property
    def inception_score(self) -> tuple[float | None, float | None]:
        """The Inception Score and its standard deviation; None of a network without logits."""
        logits = self.network.logits(torch.from_numpy(self.samples))
        return distances.inception_score(logits.cpu().numpy()) if logits is not None else (None, None)

    @cached_property
    def manifold(self) -> distances.Manifold:
        """Precision, recall, density and coverage, of `distances.MAX_IMAGES` images of each side at most."""
        sides = self.samples, self.real
        return distances.manifold(*(side[spread_indices(len(side), distances.MAX_IMAGES)] for side in sides))

    @cached_property
    def nearest(self) -> Array:
        """(N,): the distance of each sample from the nearest real image."""
        return distances.nearest(self.samples, self.real)[0][:, 0]

    @cached_property
    def copying(self) -> distances.Copying:
        """Whether samples are nearer to real images than held-out images are."""
        assert self.held_out is not None
        return distances.copying(self.nearest, distances.nearest(self.held_out, self.real)[0][:, 0])

    @cached_property
    def comparable(self) -> Array:
        """As many held-out images as there are samples, or all of them."""
        assert self.held_out is not None
        return self.held_out[spread_indices(len(self.held_out), len(self.samples))]

    @cached_property
    def class_accuracy(self) -> dict[str, NDArray[np.float64]] | None:
        """Of "samples" and "held_out", for each class the share of its images that a logistic regression on the real images'
        features assigns to it; NaN of a class without images. A set whose images have no class is left out. None where the
        real images are of one class alone."""
        labels, classes = self.labels["real"], range(self.num_classes)
        labelled = np.flatnonzero(labels >= 0)
        labelled = labelled[spread_indices(len(labelled), distances.MAX_IMAGES)]
        if len(np.unique(labels[labelled])) < 2:
            return None
        classify = distances.fit_reader(self.real[labelled], labels[labelled])
        sets = {"samples": self.samples, "held_out": self.held_out}
        return {
            name: distances.accuracy_by_class(classify(features), self.labels[name], self.num_classes)
            for name, features in sets.items()
            if features is not None and np.isin(self.labels.get(name, []), classes).any()
        }

    def mean_accuracy(self, name: str) -> float | None:
        """The mean of `class_accuracy` over the classes, of "samples" or of "held_out"."""
        shares = (self.class_accuracy or {}).get(name)
        return float(np.nanmean(shares)) if shares is not None else None

    @cached_property
    def values(self) -> dict[str, float]:
        """All metrics that these features allow, by name."""
        return {
            name: value
            for need in get_args(Need)
            for name, metric in METRICS.items()
            if metric.needs == need and self.has(need) and (value := metric.compute(self)) is not None
        }

    @cached_property
    def notes(self) -> list[str]:
        """How far to trust the values. evaluation.json keeps these notes, so it keeps the word "pictures", too."""
        samples, real = len(self.samples), len(self.real)
        notes = flag(samples, real, self.network.dim)
        covering, covered = (min(count, distances.MAX_IMAGES) for count in (samples, real))
        if self.has("neighbours") and covering < covered:
            notes.append(f"{covering} samples cannot cover {covered} real pictures: recall and coverage are low for that alone")
        if self.has("held_out") and FEWEST <= len(self.comparable) < samples:
            notes.append(
                f"the held-out pictures are {len(self.comparable)}: compare the distance of as many samples with theirs"
            )
        if self.has("labels") and "samples" not in (self.class_accuracy or {}):
            reason = "one class alone" if self.class_accuracy is None else "no sample has a class"
            notes.append(f"{reason}: nothing to read")
        return notes


class Metric(NamedTuple):
    """A number about samples: `compute` gives None where it has no value. It is called where the feature sets have what it
    `needs`. `label` and `format` make its row in the table; without a label it has none. Its name in metrics.jsonl has the
    number of the images that are `counted`."""

    compute: Callable[[FeatureSets], float | None]
    label: str = ""
    format: str = "{:.3f}"
    needs: Need = "features"
    counted: Literal["samples", "held_out"] = "samples"


def _frechet_held_out(sets: FeatureSets) -> float | None:
    return distances.frechet(sets.comparable, sets.moments) if len(sets.comparable) >= FEWEST else None


def _kernel_std(sets: FeatureSets) -> float | None:
    return sets.kernel[1] if sets.kernel[1] > 1e-12 else None  # 0 where each subset was the whole of both sides


METRICS = {
    "frechet": Metric(lambda sets: distances.frechet(sets.samples, sets.moments), "Fréchet distance"),
    "frechet_held_out": Metric(_frechet_held_out, "  of the held-out images", needs="held_out", counted="held_out"),
    "kernel": Metric(lambda sets: sets.kernel[0], "kernel distance", "{:.5f}"),
    "kernel_std": Metric(_kernel_std),
    "inception_score": Metric(lambda sets: sets.inception_score[0], "Inception Score"),
    "inception_score_std": Metric(lambda sets: sets.inception_score[1]),
    "precision": Metric(lambda sets: sets.manifold.precision, "precision", needs="neighbours"),
    "recall": Metric(lambda sets: sets.manifold.recall, "recall", needs="neighbours"),
    "density": Metric(lambda sets: sets.manifold.density, "density", needs="neighbours"),
    "coverage": Metric(lambda sets: sets.manifold.coverage, "coverage", needs="neighbours"),
    "accuracy": Metric(lambda sets: sets.mean_accuracy("samples"), "read as their class", "{:.1%}", needs="labels"),
    "accuracy_held_out": Metric(lambda sets: sets.mean_accuracy("held_out"), "  held-out images", "{:.1%}", needs="labels"),
    "nearer": Metric(lambda sets: sets.copying.nearer, "nearer to training images", needs="held_out"),
    "copied": Metric(lambda sets: sets.copying.copied, "copied", "{:.1%}", needs="held_out"),
}
