"""How far samples are from the training images while a run trains, by the Fréchet distance."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import Length, UserError, config, resumable_field
from ..config.progress import Progress
from ..data import ImageConfig, ImageSet, PointSet
from ..metrics import distances
from ..metrics.features import FeatureOptions, Features, open_features
from ..runtime.processes import broadcast
from ..sampling.sampler import Sampler
from ..storage.finite import is_finite
from .registry import FEWEST, check_count, flag
from .results import extract_features, labels_like, pixels_of, real_features

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
    images once they are known."""

    spec: QualityConfig
    train_set: ImageSet
    image: ImageConfig
    accelerator: "Accelerator"
    network: Features
    labels: list[int] | None
    real: distances.Moments | None = None

    @torch.no_grad()
    def measure(self, sampler: Sampler, batch_size: int, say: Callable[[str], None]) -> dict[str, float]:
        """{"frechet_distance"}, lower is better; what is to be known of it is said once."""
        accelerator, count, first = self.accelerator, self.spec.num_samples, self.accelerator.is_main_process
        each = -(-count // accelerator.num_processes // batch_size) * batch_size  # all ranks as often: FSDP asks for that
        if self.real is None:
            self.real = distances.moments(real_features(self.network, self.train_set, self.image, read=first))  # else of none
            for note in flag(count, len(self.train_set), self.network.dim):
                say(f"frechet_distance: {note}")
        finite, features = True, list[Tensor]()
        with Progress("drawing samples to measure", each, shown=first, leave=False) as progress:
            for start in range(accelerator.process_index * each, (accelerator.process_index + 1) * each, batch_size):
                indices = [i % count for i in range(start, start + batch_size)]  # beyond the last come the first again
                labels = [self.labels[i] for i in indices] if self.labels is not None else None
                images = sampler.draw(0, indices, labels, device=accelerator.device)
                finite &= is_finite(images)
                features.append(self.network(pixels_of(images).to(accelerator.device)))
                progress.update(batch_size)
        if not finite:
            say("warning: frechet_distance: samples are not finite (NaN or infinity), and count as grey images")
        gathered = accelerator.gather(torch.cat(features))
        assert isinstance(gathered, Tensor)
        return {"frechet_distance": broadcast(distances.frechet(gathered[:count].cpu().numpy(), self.real) if first else 0.0)}


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
    spec: QualityConfig | None,
    train_set: ImageSet | PointSet,
    image: ImageConfig | None,
    num_classes: int | None,
    accelerator: "Accelerator",
) -> Quality | None:
    """What a config asks for, or None. Opened before anything is written; missing weights are a UserError."""
    if spec is None:
        return None
    if not isinstance(train_set, ImageSet) or image is None:
        raise UserError("preview.quality measures images, and this run has 2-D points; leave it out")
    check_count(len(train_set), "training images")
    key = "preview.quality.weights"
    network = open_features(spec.features, spec.weights, FeatureOptions("preview.quality.features", key, key))
    labels = labels_like(train_set, spec.num_samples, num_classes)
    return Quality(spec, train_set, image, accelerator, network.to(accelerator.device), labels)
