"""Features of samples and of real images, batch by batch, and what comes of them: a table, evaluation.json, sheets."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import figures
from ..config.progress import within
from ..config.sizes import Sides
from ..data import ImageConfig, ImageSet
from ..data.scan import cache_folder
from ..metrics import distances
from ..metrics.distances import Array
from ..metrics.features import Features
from ..runtime.failures import warn_on_failure
from ..runtime.processes import ranks_of_machine
from ..sampling.files import in_batches
from ..sampling.sampler import Sampler
from ..storage.blocks import Ranks, claim_folder, in_blocks
from ..storage.files import as_json, write_whole
from .registry import METRICS, FeatureSets
from .shapes import Fit, LoadPixels, by_shape, channels_first, pixel_loader

# The images that samples are compared with, as evaluation.json names them: it keeps the word that older files have.
TRAINING, HELD_OUT, GIVEN = "training pictures", "held-out pictures", "given pictures"
PixelsOf = Callable[[Sequence[int]], Tensor]  # indices -> (B, C, H, W) uint8
BLOCK = 512  # images in a file; a kill loses the work on one file
SHOWN = 12  # samples on the sheet of nearest training images


def on_screen(words: str) -> str:
    """Words of evaluation.json, which keeps "pictures" from older files, as a person reads them."""
    return words.replace("pictures", "images")


def pixels_of(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> uint8, as a file holds them."""
    return channels_first(figures.to_uint8(images))


@torch.no_grad()
def extract_features(network: Features, pixels: Tensor) -> Array:
    """(B, C, H, W) uint8 -> (B, dim) float32."""
    parameter = next(network.parameters(), None)  # a network without parameters works where the pixels are
    return network(pixels if parameter is None else pixels.to(parameter.device)).cpu().numpy()


def join_batches(batches: Iterable[dict[str, Array]]) -> dict[str, Array]:
    """One array for each name, of the arrays of all batches; the progress counts the images of each batch."""
    parts: list[dict[str, Array]] = []
    for batch in batches:
        parts.append(batch)
        within(len(next(iter(batch.values()))))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def real_features(
    network: Features, data: ImageSet, image: ImageConfig, sizes: Sequence[Sides] = (), *, read: bool = True
) -> NDArray[np.float32]:
    """(N, dim) of all images, cut from the middle; with the `sizes` of buckets each to the nearest of them, and resized to the
    square of `image`.

    Each machine computes them once, on all its ranks, and keeps them beside its scans of image folders, under a hash of the
    images (with the times of their files and the version of the decoder), their size and the network's weights. Every rank
    that will `read` them gets them, the others get (0, dim).
    """
    key = [network.name, network.digest, data.fingerprint, data.state, image.size, image.channels]
    key += [[*map(list, sizes)]] if sizes else []
    folder = cache_folder() / "features" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def make(block: range) -> dict[str, Array]:
        load = pixel_loader(data, image, sizes)
        with ThreadPoolExecutor(4) as pool:  # Pillow decodes while Python goes on
            batches = pool.map(lambda part: channels_first(load(part)), in_batches(block, 32))
            return join_batches({"features": extract_features(network, pixels)} for pixels in batches)

    doing = f"{network.name} features of real images"
    arrays = in_blocks(folder, len(data), BLOCK, make, ranks_of_machine(), doing=doing, read=read)
    return arrays["features"] if read else np.empty((0, network.dim), np.float32)


def labels_like(data: ImageSet, count: int, num_classes: int | None) -> list[int] | None:
    """A class for each sample, in the shares that the real images have; the null class for images without a class."""
    return samples_like(data, np.zeros(len(data), np.int64), count, num_classes)[0]


def samples_like(
    data: ImageSet, which: NDArray[np.int64], count: int, num_classes: int | None
) -> tuple[list[int] | None, NDArray[np.int64]]:
    """A class (None without classes) and a bucket for each of `count` samples, in the shares in which the real images have
    both together; `which` (N,) are the buckets of the real ones. Samples of one bucket follow each other."""
    labels = np.zeros(len(data), np.int64) if num_classes is None else np.where(data.labels < 0, num_classes, data.labels)
    order = np.lexsort((labels, which))  # by bucket, and within one by class
    chosen = order[np.arange(count) * len(order) // count]
    return labels[chosen].tolist() if num_classes is not None else None, which[chosen]


@dataclass(frozen=True)
class Setup:
    """In which features an evaluation measures, on which ranks, and where the results go (default evaluations/NAME/...)."""

    networks: Sequence[Features]
    out: Path | None
    ranks: Ranks
    device: torch.device
    batch_size: int
    seed: int

    @property
    def computes(self) -> bool:
        """Whether this rank computes the metrics, once all ranks have extracted the features."""
        return self.ranks.rank == 0

    def claim(self, name: str, kind: str, request: dict[str, Any], key: Sequence[Any] = ()) -> Path:
        """The folder for results that depend on `request`, whose hash (or that of a `key`) is in its default name; a UserError
        where it holds other results."""
        if self.networks:
            request = {**request, "features": [[network.name, network.digest] for network in self.networks]}
        tag = hashlib.sha256(json.dumps(key or request).encode()).hexdigest()[:8]
        out = self.out or Path("evaluations") / name / f"{kind}_{tag}"
        claim_folder(out / "request.json", request, self.ranks, holds="figures", newer_keys=("files",))
        return out

    def measure(
        self, out: Path, count: int, measure: Callable[[range], dict[str, Array]], doing: str, *, block: int = BLOCK
    ) -> dict[str, Array]:
        """What `measure` gives of batches of `count` images, joined and kept in files of `block` images in `out`."""

        def make(part: range) -> dict[str, Array]:
            return join_batches(map(measure, in_batches(part, self.batch_size)))

        return in_blocks(out, count, block, make, self.ranks, doing=doing)

    def features(self, pixels: Tensor) -> dict[str, Array]:
        """{name of a network: (B, dim)} of the pixels."""
        return {network.name: extract_features(network, pixels) for network in self.networks}

    def sample_pixels(
        self,
        sampler: Sampler,
        labels: Sequence[int] | None,
        which: NDArray[np.int64] | None = None,
        fit: Fit = lambda pixels: pixels,
    ) -> PixelsOf:
        """A function that draws samples by their indices, of these classes. With `which` sample i has the shape number
        `which[i]` of the sampler's `shapes`, the network sees one shape at a time, and `fit` brings all to one size."""

        def draw(shaped: Sampler, indices: Sequence[int]) -> Tensor:
            classes = [labels[i] for i in indices] if labels is not None else None
            return pixels_of(shaped.draw(self.seed, indices, classes, device=self.device, batch_size=self.batch_size))

        if which is None:
            return partial(draw, sampler)
        shapes = [*sampler.shapes]
        return lambda indices: by_shape(indices, which, lambda bucket, part: fit(draw(sampler.at_shape(shapes[bucket]), part)))

    def sample_features(self, pixels: PixelsOf, count: int, out: Path) -> dict[str, Array]:
        """The features of samples that `pixels` draws on the way."""
        block = self.batch_size * max(1, min(BLOCK, count // 16) // self.batch_size)  # work for 16 ranks, even on fewer
        return self.measure(out, count, lambda part: self.features(pixels(part)), "sampling", block=block)

    def real_features(self, data: ImageSet, image: ImageConfig, sizes: Sequence[Sides] = ()) -> dict[str, Array]:
        """{name of a network: (N, dim)} of all real images; (0, dim) on ranks that compute nothing."""
        return {network.name: real_features(network, data, image, sizes, read=self.computes) for network in self.networks}

    def compare(
        self,
        samples: dict[str, Array],
        data: ImageSet,
        image: ImageConfig,
        held_out: ImageSet | None = None,
        sizes: Sequence[Sides] = (),
        **options: Any,
    ) -> list[FeatureSets]:
        """Samples beside real images, cut to `image` or to the `sizes` of buckets, in the features of each network; nothing on
        ranks that compute no metrics."""
        real = self.real_features(data, image, sizes)
        unseen = self.real_features(held_out, image, sizes) if held_out is not None else {}
        names = [(network, network.name) for network in self.networks if self.computes]
        return [FeatureSets(network, samples[name], real[name], unseen.get(name), **options) for network, name in names]


@dataclass
class Results:
    """`values` for metrics.jsonl, `document` for other programs, `lines` for the screen, `files` to look at."""

    out: Path
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def add_table(self, title: str, comparisons: Sequence[FeatureSets]) -> None:
        """A row for each metric and a column for each network; what the numbers compare with, and notes on them.

        The number of samples (or of held-out images) is a part of a value's name: numbers of other counts do not compare.
        """
        names = [sets.network.name for sets in comparisons]
        width = max(14, *(len(name) + 2 for name in names))
        self.lines += [title, f"  {'':<29}" + "".join(f"{name:>{width}}" for name in names)]
        for key, metric in METRICS.items():
            if metric.label and any(key in sets.values for sets in comparisons):
                cells = [metric.format.format(sets.values[key]) if key in sets.values else "" for sets in comparisons]
                self.lines.append(f"  {metric.label:<29}" + "".join(f"{cell:>{width}}" for cell in cells))
        for sets in comparisons:
            network = sets.network
            self.lines.append(f"  {network.name} compares with {network.comparable}")
            self.lines += [f"  note: {on_screen(note)}" for note in sets.notes]
            for key, value in sets.values.items():
                count = len(sets.comparable if METRICS[key].counted == "held_out" else sets.samples)
                self.values[f"{key}_{network.name}_of_{count}"] = value
            self.document[network.name] = {**sets.values, "compares_with": network.comparable, "notes": sets.notes}

    def write(self, **document: Any) -> None:
        """Write evaluation.json, with `document` at the end of what it has."""
        self.document |= document
        write_whole(self.out / "evaluation.json", as_json({"step": self.step, **self.document}))

    @contextmanager
    def sheet(self, name: str) -> Iterator[Path]:
        """Around the drawing of a sheet: gives its path. Where the drawing fails, a warning says so."""
        with warn_on_failure(name):
            yield self.out / name
            self.files.append(self.out / name)

    def add_nearest(self, sets: FeatureSets, pixels: PixelsOf, load: LoadPixels, reference: str, batch_size: int) -> None:
        """nearest.png: the samples nearest to a real image (`reference` says which those are), and as many of the others, each
        followed by the three real images nearest to it. `pixels` gives samples, `load` real images as (N, H, W, C) uint8."""
        with self.sheet("nearest.png") as path:
            order = np.argsort(sets.nearest, kind="stable")
            usual = order[len(order) // 2 :][:SHOWN] if len(order) >= 2 * SHOWN else order[:0]
            chosen = [*order[:SHOWN].tolist(), *usual.tolist()]
            _, neighbours = distances.nearest(sets.samples[chosen], sets.real, most=3)
            samples = torch.cat([pixels(part) for part in in_batches(chosen, batch_size)]).permute(0, 2, 3, 1).numpy()
            real = load(neighbours.flatten().tolist()).reshape(len(chosen), -1, *samples.shape[1:])
            rows = np.concatenate([samples[:, None], real], axis=1).reshape(-1, *samples.shape[1:])
            captions = [(f"usual #{i}" if i in usual else f"#{i}", f"at {sets.nearest[i]:.3g}", "", "") for i in chosen]
            labels = [word for caption in captions for word in caption]
            first = f"the {min(SHOWN, len(order))} samples nearest to the {reference}"
            title = f"{first}, then usual ones; beside each, its nearest three"
            figures.save(figures.grid(rows, columns=8, labels=labels, title=title), path)
