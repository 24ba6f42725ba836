"""How far samples are from the training images while a run trains, by the Fréchet distance."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import Length, UserError, config, resumable_field
from ..config.progress import Progress
from ..config.sizes import Sides, describe_size
from ..data import ImageConfig, ImageSet
from ..metrics import distances
from ..metrics.features import FeatureOptions, Features, open_features
from ..runs.densities import Density
from ..runtime.processes import broadcast
from ..sampling.files import in_batches
from ..sampling.sampler import Sampler
from ..storage.finite import is_finite
from .registry import FEWEST, check_count, flag
from .results import extract_features, pixels_of, real_features, samples_like
from .shapes import to_squares

if TYPE_CHECKING:
    from accelerate import Accelerator


@config
class QualityConfig:
    """While training, every `every` steps and at the end: the Fréchet distance of `num_samples` images of the EMA weights
    from the training images, in the `features` of evaluate.py (`weights` is their file). The best checkpoint is kept."""

    every: Length = resumable_field()
    num_samples: int = resumable_field(2048, ge=FEWEST)
    features: str = resumable_field("efficientnet_lite0")
    weights: str | None = resumable_field(None)


@dataclass
class Quality:
    """Measures a run while it trains, on all ranks. `labels` are the classes of the samples, `real` the moments of the training
    images once they are known. Where images have the `sizes` of several buckets, `which` says in which of them each sample is,
    and all are resized to squares of `image`."""

    spec: QualityConfig
    train_set: ImageSet
    image: ImageConfig
    accelerator: "Accelerator"
    network: Features
    labels: list[int] | None
    which: NDArray[np.int64]
    sizes: tuple[Sides, ...] = ()
    real: distances.Moments | None = None

    @torch.no_grad()
    def measure(self, sampler: Sampler, batch_size: int, say: Callable[[str], None]) -> dict[str, float]:
        """{"frechet_distance"}, lower is better; what is to be known of it is said once."""
        accelerator, first = self.accelerator, self.accelerator.is_main_process
        if self.real is None:
            features = real_features(self.network, self.train_set, self.image, self.sizes, read=first)
            self.real = distances.moments(features)  # else of none
            for note in flag(self.spec.num_samples, len(self.train_set), self.network.dim):
                say(f"frechet_distance: {note}")
            if self.sizes:
                say(f"frechet_distance: images of all shapes are resized to squares of {describe_size(self.image.size)}")
        shapes = [*sampler.shapes] if self.sizes else [sampler.shape]
        fit, finite, features, order = to_squares(self.image), True, list[Tensor](), list[int]()
        batches = self.batches(batch_size)
        with Progress("drawing samples to measure", len(batches) * batch_size, shown=first, leave=False) as progress:
            for indices in batches:
                labels = [self.labels[i] for i in indices] if self.labels is not None else None
                shaped = sampler.at_shape(shapes[self.which[indices[0]]])
                images = shaped.draw(0, indices, labels, device=accelerator.device)
                finite &= is_finite(images)
                features.append(self.network(fit(pixels_of(images)).to(accelerator.device)))
                order += indices
                progress.update(batch_size)
        if not finite:
            say("warning: frechet_distance: samples are not finite (NaN or infinity), and count as grey images")
        gathered: Any = accelerator.gather((torch.cat(features), torch.tensor(order, device=accelerator.device)))
        samples, indices = (tensor.cpu().numpy() for tensor in gathered)
        samples = samples[np.unique(indices, return_index=True)[1]]  # each once, in their order
        return {"frechet_distance": broadcast(distances.frechet(samples, self.real) if first else 0.0)}

    def batches(self, batch_size: int) -> list[list[int]]:
        """The samples that this rank draws, batch by batch, each of one shape. All ranks draw as many batches: FSDP asks for
        that. Where there are too few samples, some are drawn twice."""
        count, rank, world = self.spec.num_samples, self.accelerator.process_index, self.accelerator.num_processes
        if not self.sizes:
            each = -(-count // world // batch_size) * batch_size
            first = rank * each
            return [[i % count for i in range(k, k + batch_size)] for k in range(first, first + each, batch_size)]
        groups = [np.flatnonzero(self.which == bucket) for bucket in np.unique(self.which)]
        batches = [np.resize(part, batch_size).tolist() for group in groups for part in in_batches(group.tolist(), batch_size)]
        return [batches[i % len(batches)] for i in range(rank, -(-len(batches) // world) * world, world)]


def quality_seconds(
    spec: QualityConfig, sampler: Sampler, batch_size: int, num_classes: int | None, *, device: torch.device, processes: int
) -> float:
    """The seconds that measuring the quality once will take on so many processes, judged by one batch of samples."""
    network = open_features(spec.features, spec.weights).to(device)
    labels = [i % num_classes for i in range(batch_size)] if num_classes is not None else None
    began = time.monotonic()
    extract_features(network, pixels_of(sampler.draw(0, range(batch_size), labels, device=device)))
    return (time.monotonic() - began) * -(-spec.num_samples // processes // batch_size)


def open_quality(
    spec: QualityConfig | None, density: Density, num_classes: int | None, accelerator: "Accelerator"
) -> Quality | None:
    """What a config asks for, of the data that a run learns from, or None. Opened before anything is written; missing weights
    are a UserError."""
    if spec is None:
        return None
    train_set, image = density.train, getattr(density, "image", None)
    if not isinstance(train_set, ImageSet) or image is None:
        raise UserError("preview.quality measures images, and this run has 2-D points; leave it out")
    check_count(len(train_set), "training images")
    key = "preview.quality.weights"
    network = open_features(spec.features, spec.weights, FeatureOptions("preview.quality.features", key, key))
    labels, which = samples_like(train_set, density.buckets.which, spec.num_samples, num_classes)
    sizes = tuple(bucket.sides for bucket in density.buckets.specs) if image.aspect is not None else ()
    square = image.at(image.sides) if sizes else image
    return Quality(spec, train_set, square, accelerator, network.to(accelerator.device), labels, which, sizes)
