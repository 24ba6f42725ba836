"""Pixels and features of images, batch by batch; those of real images, which each machine computes once."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from .. import figures
from ..config import UserError
from ..config.progress import within
from ..data import ImageConfig, ImageSet
from ..data.scan import cache_folder
from ..metrics.distances import Array
from ..metrics.features import Features
from ..runtime.processes import ranks_of_machine
from ..sampling.batches import in_batches
from ..storage.blocks import in_blocks

FEWEST = 10  # images of each side: of fewer, no number means anything
BLOCK = 512  # images in a file; a kill loses the work on one file


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


def on_screen(words: str) -> str:
    """Words of evaluation.json, which keeps "pictures" from older files, as a person reads them."""
    return words.replace("pictures", "images")


def spread_indices(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` indices, evenly spread."""
    return np.arange(min(count, most)) * count // min(count, most)


def pixel_loader(data: ImageSet, image: ImageConfig) -> Callable[[Sequence[int]], figures.Pixels]:
    """A function of indices that gives (N, H, W, C) uint8 of these images, cut from the middle."""
    plain = ImageConfig(size=image.size, channels=image.channels)
    data.prepare(plain)
    return lambda indices: data.batch(np.array(indices, dtype=np.int64), plain, np.full((len(indices), 3), 0.5))


def pixels_of(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> uint8, as a file holds them."""
    return _channels_first(figures.to_uint8(images))


def _channels_first(pixels: figures.Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rearrange(pixels, "b h w c -> b c h w")))


@torch.no_grad()
def extract_features(network: Features, pixels: Tensor) -> Array:
    """(B, C, H, W) uint8 -> (B, dim) float32."""
    device = next(network.parameters()).device
    return network(pixels.to(device)).cpu().numpy()


def join_batches(batches: Iterable[dict[str, Array]]) -> dict[str, Array]:
    """One array for each name, of the arrays of all batches; the progress counts the images of each batch."""
    parts: list[dict[str, Array]] = []
    for batch in batches:
        parts.append(batch)
        within(len(next(iter(batch.values()))))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def extract_all(networks: Sequence[Features], batches: Iterable[Tensor]) -> dict[str, Array]:
    """{name of a network: (N, dim)} of the pixels of all batches."""
    return join_batches({network.name: extract_features(network, pixels) for network in networks} for pixels in batches)


def real_features(
    network: Features, data: ImageSet, image: ImageConfig, *, batch_size: int = 32, workers: int = 4, read: bool = True
) -> NDArray[np.float32]:
    """(N, dim) of all images, cut from the middle.

    Each machine computes them once, on all its ranks, and keeps them beside its scans of image folders, under a hash of the
    images (with the times of their files and the version of the decoder), their size and the network's weights. Every rank
    that will `read` them gets them, the others get (0, dim).
    """
    key = json.dumps([network.name, network.digest, data.fingerprint, data.state, image.size, image.channels])
    folder = cache_folder() / "features" / hashlib.sha256(key.encode()).hexdigest()[:16]

    def make(block: range) -> dict[str, Array]:
        load = pixel_loader(data, image)
        with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes while Python goes on
            batches = pool.map(lambda part: _channels_first(load(part)), in_batches(block, batch_size))
            return {"features": extract_all([network], batches)[network.name]}

    doing = f"{network.name} features of real images"
    arrays = in_blocks(folder, len(data), BLOCK, make, ranks_of_machine(), doing=doing, read=read)
    return arrays["features"] if read else np.empty((0, network.dim), np.float32)


def labels_like(data: ImageSet, count: int, num_classes: int | None) -> list[int] | None:
    """A class for each sample, in the shares that the real images have; the null class for images without a class."""
    if num_classes is None:
        return None
    ordered = np.sort(np.where(data.labels < 0, num_classes, data.labels))
    return ordered[np.arange(count) * len(ordered) // count].tolist()
