"""The latent cache: mean and log-variance of every image in all its versions, in blocks that are whole or absent.

A folder holds `train/` and `held_out/` with `block_00000.npy`, (n, versions, 2, D, h, w) float32 each (plain, mirrored, and
both again for each augmented copy; mean and log-variance), and last of all `manifest.json`: what it was made of, and the
statistics of the training latents, which are those of plain and mirrored images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import UserError, read_json
from ..storage.blocks import blocks_of

Moments = NDArray[np.float32]
WORDS = {
    "autoencoder": "another autoencoder",
    "pictures": "other images",
    "held_out": "other held-out images",
    "image": "another image (size, channels or flip)",
    "buckets": "another table of sizes (image.aspect)",
    "paired_with": "images with other partners",
    "condition": "another condition",
    "augmentation": "another augmentation",
}


def describe_differences(manifest: Mapping[str, Any], contract: Mapping[str, Any]) -> list[str]:
    """What a cache was made of, in words, that is not what `contract` says."""
    return [WORDS[key] for key in WORDS if manifest.get(key) != contract.get(key)]


FILES = "files"  # the key of a manifest that says which files, read by which decoder, a cache is of; no part of the contract
STATISTICS = ("mean", "std", "low", "high")


def same_latents(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Whether a run that was trained on latents of `before` may go on with those of `now`: the same contract, and statistics
    that agree to rounding, for a cache that is made again on another machine differs by that much."""
    if before is None or now is None:
        return before is now
    if any(before.get(key) != now.get(key) for key in {*before, *now} - {*STATISTICS}):
        return False
    scale = np.abs(np.array(before.get("std", 1.0), dtype=np.float64))
    for key in STATISTICS:
        one, other = (np.array(facts.get(key, ()), dtype=np.float64) for facts in (before, now))
        if one.shape != other.shape:
            return False
        if (np.abs(one - other) > 1e-3 * np.maximum(np.abs(one), scale if key == "mean" else 1.0)).any():
            return False
    return True


def sums_of(moments: Moments) -> dict[str, Any]:
    """What `statistics` needs to know of a block, each a list with one entry per channel."""
    mean, logvar = moments[:, :, 0].astype(np.float64), moments[:, :, 1].astype(np.float64)
    over = (0, 1, 3, 4)  # all but the channels
    return {
        "count": int(mean.size // mean.shape[2]),
        "sum": mean.sum(over).tolist(),
        "square": (mean**2 + np.exp(logvar)).sum(over).tolist(),
        "low": mean.min(over).tolist(),
        "high": mean.max(over).tolist(),
    }


def statistics(sums: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """mean, std, low and high per channel over all latents z ~ N(mean, exp logvar), by the law of total variance."""
    count = sum(entry["count"] for entry in sums)
    mean = np.sum([entry["sum"] for entry in sums], axis=0) / count
    square = np.sum([entry["square"] for entry in sums], axis=0) / count
    return {
        "mean": mean.tolist(),
        "std": np.sqrt(np.maximum(square - mean**2, 1e-12)).tolist(),
        "low": np.min([entry["low"] for entry in sums], axis=0).tolist(),
        "high": np.max([entry["high"] for entry in sums], axis=0).tolist(),
    }


@dataclass
class LatentSet:
    """Moments of images, in the order of their set: blocks in mapped files, or all on one device."""

    blocks: list[Moments]
    device: torch.device
    resident: Tensor | None = field(default=None, repr=False)  # all blocks, once they are loaded to the device

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    def load_to_device(self) -> None:
        """Load all blocks to the device if they take no more than 0.3 of the memory that is free there."""
        if self.device.type == "cuda":
            free_bytes = torch.cuda.mem_get_info(self.device)[0]
        else:
            import psutil

            free_bytes = psutil.virtual_memory().available
        if sum(block.nbytes for block in self.blocks) <= 0.3 * free_bytes:
            self.resident = torch.cat([torch.from_numpy(np.array(block)).to(self.device) for block in self.blocks])

    def moments(self, indices: NDArray[np.int64], versions: NDArray[Any]) -> Tensor:
        """(B, 2, D, h, w) float32 on the device: mean and log-variance of these versions (B,) of these images."""
        if self.resident is not None:
            rows = torch.from_numpy(indices).to(self.device, non_blocking=True)
            return self.resident[rows, torch.from_numpy(versions.astype(np.int64)).to(self.device, non_blocking=True)]
        size = len(self.blocks[0])
        rows = np.stack([self.blocks[i // size][i % size, int(v)] for i, v in zip(indices, versions, strict=True)])
        moments = torch.from_numpy(rows)
        return (moments.pin_memory() if self.device.type == "cuda" else moments).to(self.device, non_blocking=True)


@dataclass
class BucketLatents:
    """Moments of images in several buckets: the LatentSet of each that has images, and which of them each image is in."""

    sets: list[LatentSet | None]
    which: NDArray[np.int64]

    def __post_init__(self) -> None:
        self._rows = np.zeros(len(self.which), np.int64)
        for bucket in range(len(self.sets)):
            members = self.which == bucket
            self._rows[members] = np.arange(members.sum())

    def __len__(self) -> int:
        return len(self.which)

    def load_to_device(self) -> None:
        """Load those of the sets to the device that fit."""
        for latents in self.sets:
            if latents is not None:
                latents.load_to_device()

    def moments(self, indices: NDArray[np.int64], versions: NDArray[Any]) -> Tensor:
        """(B, 2, D, h, w) float32 on the device: mean and log-variance of these images, which are of one bucket."""
        latents = self.sets[self.which[indices[0]]]
        assert latents is not None
        return latents.moments(self._rows[indices], versions)


def open_latents(
    folder: Path, contract: Mapping[str, Any], counts: Mapping[str, int], device: torch.device
) -> tuple[dict[str, Any], dict[str, LatentSet]]:
    """A whole cache: its manifest and its sets. A UserError says what it was made of that is not what `contract` says."""
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} is no latent cache (it has no manifest.json); name another, or remove it")
    try:
        manifest = read_json(folder / "manifest.json")
    except UserError as error:
        raise UserError(
            f"the latent cache {folder} is damaged, or its latents are not finite ({error}); remove it, and it is made again"
        ) from None
    others = describe_differences(manifest, contract)
    if others:
        raise UserError(f"the latent cache {folder} was made of {' and '.join(others)}; remove it, or give another `latents`")
    return manifest, {split: open_blocks(folder, split, count, device) for split, count in counts.items()}


def open_blocks(folder: Path, split: str, count: int, device: torch.device, name: str = "latent cache") -> LatentSet:
    """The blocks of a cache that holds `count`; a UserError where they are damaged or too few."""
    try:
        blocks = [np.load(block.path.with_suffix(".npy"), mmap_mode="r") for block in blocks_of(folder, split, count)]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the {name} {folder} is damaged ({error}); remove it, and it is made again") from None
    if sum(map(len, blocks)) != count:
        raise UserError(f"the {name} {folder} is cut short; remove it, and it is made again")
    return LatentSet(blocks, device)
