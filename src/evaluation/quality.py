"""How far samples are from the training images while a run trains, by the Fréchet distance."""

import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import Length, UserError, config, resumable_field
from ..config.progress import Progress
from ..data import ImageConfig, ImageSet, PointSet
from ..metrics import distances
from ..metrics.distances import Moments
from ..metrics.features import FeatureOptions, open_features
from ..runtime.processes import broadcast
from ..sampling.sampler import Sampler
from ..storage.finite import is_finite
from .features import FEWEST, check_count, extract_features, flag, labels_like, pixels_of, real_features


@config
class QualityConfig:
    """While training, every `every` steps and at the end: the Fréchet distance of `num_samples` images of the EMA weights
    from the training images, in the `features` of evaluate.py (`weights` is their file). The best checkpoint is kept."""

    every: Length = resumable_field()
    num_samples: int = resumable_field(2048, ge=FEWEST)
    features: str = resumable_field("efficientnet_lite0")
    weights: str | None = resumable_field(None)


class Quality:
    """Measures a run while it trains, on all ranks. Opened before anything is written; missing weights are a UserError."""

    def __init__(
        self,
        spec: QualityConfig,
        train_set: ImageSet | PointSet,
        image: ImageConfig | None,
        num_classes: int | None,
        accelerator: Accelerator,
    ) -> None:
        if not isinstance(train_set, ImageSet) or image is None:
            raise UserError("preview.quality measures images, and this run has 2-D points; leave it out")
        check_count(len(train_set), "training images")
        self._spec, self._train_set, self._image = spec, train_set, image
        self._accelerator = accelerator
        key = "preview.quality.weights"
        network = open_features(spec.features, spec.weights, FeatureOptions("preview.quality.features", key, key))
        self._network = network.to(accelerator.device)
        self._labels = labels_like(train_set, spec.num_samples, num_classes)
        self._real: Moments | None = None
        self._finite = True

    def measure(self, sampler: Sampler, batch_size: int, say: Callable[[str], None]) -> dict[str, float]:
        """{"frechet_distance"}, lower is better; what is to be known of it is said once."""
        accelerator, count = self._accelerator, self._spec.num_samples
        each = -(-count // accelerator.num_processes // batch_size) * batch_size  # all ranks as often: FSDP asks for that
        local_indices = range(accelerator.process_index * each, (accelerator.process_index + 1) * each)
        if self._real is None:
            real = real_features(self._network, self._train_set, self._image, read=accelerator.is_main_process)
            self._real = distances.moments(real)  # of none on the other ranks
            for note in flag(count, len(self._train_set), self._network.dim):
                say(f"frechet_distance: {note}")
        self._finite, features = True, list[Tensor]()
        with Progress("drawing samples to measure", each, shown=accelerator.is_main_process, leave=False) as progress:
            for i in range(0, each, batch_size):
                features.append(self._draw(sampler, local_indices[i : i + batch_size]))
                progress.update(batch_size)
        if not self._finite:
            say("warning: frechet_distance: samples are not finite (NaN or infinity), and count as grey images")
        gathered = accelerator.gather(torch.cat(features))
        assert isinstance(gathered, Tensor)
        first = accelerator.is_main_process
        return {"frechet_distance": broadcast(distances.frechet(gathered[:count].cpu().numpy(), self._real) if first else 0.0)}

    @torch.no_grad()
    def _draw(self, sampler: Sampler, part: range) -> Tensor:
        """Features of the samples `part`, those beyond the last being the first again."""
        indices = [i % self._spec.num_samples for i in part]
        labels = [self._labels[i] for i in indices] if self._labels is not None else None
        images = sampler.draw(0, indices, labels, device=self._accelerator.device)
        self._finite &= is_finite(images)
        return self._network(pixels_of(images).to(self._accelerator.device))


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
    accelerator: Accelerator,
) -> Quality | None:
    """What a config asks for, or None."""
    return Quality(spec, train_set, image, num_classes, accelerator) if spec is not None else None
