"""How good a run's pictures are against real ones: features of both, and what is computed of them."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from .. import figures
from ..config import Length, UserError, config, resumable_field
from ..config.progress import Progress, within
from ..data import ImageConfig, ImageSet, PointSet
from ..data.scan import cache_folder
from ..metrics import distances
from ..metrics.distances import Array, Moments
from ..metrics.features import Asked, Features, open_features
from ..runtime.launch import broadcast, ranks_here
from ..sampling.sampler import Sampler
from ..storage.blocks import Ranks, in_blocks
from ..storage.finite import is_finite

FEWEST = 10  # pictures of each side, under which no number says anything
BLOCK = 512  # pictures in a file, and what a kill costs at most
SHOWN = 12  # samples on the sheet of nearest training pictures


def pixels_of(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> uint8, as a file holds them."""
    return torch.from_numpy(np.ascontiguousarray(rearrange(figures.to_uint8(images), "b h w c -> b c h w")))


@torch.no_grad()
def see(network: Features, pixels: Tensor) -> Array:
    """(B, C, H, W) uint8 -> (B, dim) float32."""
    device = next(network.parameters()).device
    return network(pixels.to(device)).cpu().numpy()


def real_features(
    network: Features, data: ImageSet, image: ImageConfig, *, batch_size: int = 32, workers: int = 4, read: bool = True
) -> NDArray[np.float32]:
    """(N, dim) of all pictures, cut from the middle: each machine makes them once, on all its ranks, and keeps them with its
    scans under a hash of pictures (the times of their files, and what decodes them, too), size and weights. Gives them on
    every rank that will `read` them, (0, dim) on others."""
    plain = ImageConfig(size=image.size, channels=image.channels)
    contract = json.dumps([network.name, network.digest, data.fingerprint, data.state, image.size, image.channels])
    folder = cache_folder() / "features" / hashlib.sha256(contract.encode()).hexdigest()[:16]

    def make(block: range) -> dict[str, Array]:
        data.prepare(plain)

        def load(start: int) -> Tensor:
            indices = np.arange(start, min(start + batch_size, block.stop))
            features = data.batch(indices, plain, np.full((len(indices), 3), 0.5))
            return torch.from_numpy(np.ascontiguousarray(rearrange(features, "b h w c -> b c h w")))

        with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes beside Python
            features = list[Array]()
            for pixels in pool.map(load, range(block.start, block.stop, batch_size)):
                features.append(see(network, pixels))
                within(len(pixels))
        return {"features": np.concatenate(features)}

    doing = f"{network.name} features of real pictures"
    parts = in_blocks(folder, len(data), BLOCK, make, ranks_here(), doing=doing, read=read)
    return parts["features"] if read else np.empty((0, network.dim), np.float32)


def labels_like(data: ImageSet, count: int, num_classes: int | None) -> list[int] | None:
    """A class for each sample, in the shares that the real pictures have; the null class for those of none."""
    if num_classes is None:
        return None
    ordered = np.sort(np.where(data.labels < 0, num_classes, data.labels))
    return ordered[np.arange(count) * len(ordered) // count].tolist()


def drawn_features(
    sampler: Sampler,
    networks: Sequence[Features],
    labels: Sequence[int] | None,
    out: Path,
    *,
    count: int,
    seed: int,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, Array]:
    """{name of a network: (count, dim)} of samples drawn on the way, in files of `out`; on every rank."""

    def make(block: range) -> dict[str, Array]:
        features: dict[str, list[Array]] = {network.name: [] for network in networks}
        for start in range(block.start, block.stop, batch_size):
            part = range(start, min(start + batch_size, block.stop))
            chosen = [labels[i] for i in part] if labels is not None else None
            pixels = pixels_of(sampler.draw(seed, part, chosen, device=device, batch_size=batch_size))
            for network in networks:
                features[network.name].append(see(network, pixels))
            within(len(part))
        return {name: np.concatenate(parts) for name, parts in features.items()}

    size = batch_size * max(1, min(BLOCK, count // 16) // batch_size)  # enough for 16 ranks, however many there are
    return in_blocks(out, count, size, make, ranks, doing="sampling")


def check_count(count: int, what: str) -> None:
    if count < FEWEST:
        raise UserError(f"{count} {what} are too few to measure anything; at least {FEWEST}")


def flag(samples: int, real: int, dim: int) -> list[str]:
    """What to know of a Fréchet distance where either side has so few pictures, or nothing."""
    return [
        f"{count} {what} for {dim} features: the distance is too large, and compares only at that number"
        for count, what in ((samples, "samples"), (real, "real pictures"))
        if count <= dim
    ]


class Compared(NamedTuple):
    """Numbers by name, and what to know of them."""

    values: dict[str, float]
    notes: list[str]


def compare(samples: Array, real: Array, network: Features, *, neighbours: bool = True) -> Compared:
    """frechet, kernel (KID, and kernel_std), inception_score where there are logits; precision, recall, density, coverage."""
    values = {"frechet": distances.frechet(samples, distances.moments(real))}
    values["kernel"], spread = distances.kernel_distance(samples, real)
    if spread > 1e-12:  # else every subset was the whole of both
        values["kernel_std"] = spread
    logits = network.logits(torch.from_numpy(samples))
    if logits is not None:
        values["inception_score"], values["inception_score_std"] = distances.inception_score(logits.cpu().numpy())
    notes = flag(len(samples), len(real), network.dim)
    most = distances.MOST
    if neighbours and min(len(samples), len(real)) > distances.NEIGHBOURS:
        few = [side[np.arange(min(most, len(side))) * len(side) // min(most, len(side))] for side in (samples, real)]
        values |= distances.manifold(*few)._asdict()
        if len(few[0]) < len(few[1]):
            words = f"{len(few[0])} samples cannot cover {len(few[1])} real pictures"
            notes.append(f"{words}: recall and coverage are low for that alone")
    return Compared(values, notes)


def draw_nearest(
    out: Path,
    samples: Array,
    real: Array,
    distance: Array,
    draw: Callable[[Sequence[int]], NDArray[np.uint8]],
    load: Callable[[Sequence[int]], NDArray[np.uint8]],
    which: str,
) -> None:
    """The sheet: the samples nearest to a real picture (`told` says which those are), and as many of the others, each followed
    by the three real pictures nearest to it; `draw` and `load` give (N, H, W, C) uint8."""
    order = np.argsort(distance, kind="stable")
    others = order[len(order) // 2 :][:SHOWN] if len(order) >= 2 * SHOWN else order[:0]
    chosen = np.concatenate([order[:SHOWN], others])
    _, first = distances.nearest(samples[chosen], real, most=3)
    samples_shown, known = draw(chosen.tolist()), load(first.flatten().tolist())
    rows = [np.concatenate([samples_shown[i : i + 1], known[3 * i : 3 * i + 3]]) for i in range(len(chosen))]
    usual = set(others.tolist())
    names = [word for i in chosen for word in (f"usual #{i}" if i in usual else f"#{i}", f"at {distance[i]:.3g}", "", "")]
    title = f"the {min(SHOWN, len(order))} samples nearest to the {which}, then usual ones; beside each, its nearest three"
    sheet = figures.grid(np.concatenate(rows), columns=8, labels=names, title=title)
    figures.save(sheet, out)


# ---------------------------------------------------------------------------------------------- while training


@config
class QualityConfig:
    """While training, every `every` steps and at the end: the Fréchet distance of `num_samples` pictures of the EMA weights
    from the training pictures, in the `features` of evaluate.py (`weights` is their file). The best checkpoint is kept."""

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
            raise UserError("preview.quality measures pictures, and this run has 2-D points; leave it out")
        check_count(len(train_set), "training pictures")
        self._spec, self._train_set, self._image = spec, train_set, image
        self._accelerator = accelerator
        key = "preview.quality.weights"
        network = open_features(spec.features, spec.weights, Asked("preview.quality.features", key, key))
        self._network = network.to(accelerator.device)
        self._labels = labels_like(train_set, spec.num_samples, num_classes)
        self._real: Moments | None = None
        self._finite = True

    def measure(self, sampler: Sampler, batch_size: int, say: Callable[[str], None]) -> dict[str, float]:
        """{"frechet_distance"}, lower is better; what is to be known of it is said once."""
        accelerator, count = self._accelerator, self._spec.num_samples
        each = -(-count // accelerator.num_processes // batch_size) * batch_size  # all ranks as often: FSDP asks for that
        indices = range(accelerator.process_index * each, (accelerator.process_index + 1) * each)
        if self._real is None:
            real = real_features(self._network, self._train_set, self._image, read=accelerator.is_main_process)
            self._real = distances.moments(real)  # of none on the other ranks
            for note in flag(count, len(self._train_set), self._network.dim):
                say(f"frechet_distance: {note}")
        self._finite, features = True, list[Tensor]()
        with Progress("drawing samples to measure", each, shown=accelerator.is_main_process, leave=False) as progress:
            for i in range(0, each, batch_size):
                features.append(self._draw(sampler, indices[i : i + batch_size]))
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
        samples = sampler.draw(0, indices, labels, device=self._accelerator.device)
        self._finite &= is_finite(samples)
        return self._network(pixels_of(samples).to(self._accelerator.device))


def quality_seconds(
    spec: QualityConfig, sampler: Sampler, batch_size: int, num_classes: int | None, *, device: torch.device, processes: int
) -> float:
    """The seconds that measuring the quality once will take on so many processes, judged by one batch of samples."""
    network = open_features(spec.features, spec.weights).to(device)
    labels = [i % num_classes for i in range(batch_size)] if num_classes is not None else None
    began = time.monotonic()
    see(network, pixels_of(sampler.draw(0, range(batch_size), labels, device=device)))
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
