"""Encode a data set once, on all ranks, a block of images at a time; after a kill the encoding goes on."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from numpy.typing import NDArray
from torch import Tensor

from ..config import UserError, read_json
from ..config.progress import track, within
from ..data import ImageConfig, ImageSet
from ..data.latents import (
    FILES,
    LatentSet,
    Moments,
    cache_sums,
    open_latents,
    same_latents,
    statistics,
    sums_of,
)
from ..data.transforms import DECODER
from ..runtime.processes import broadcast
from ..runtime.stream import Examples, to_network
from ..storage.blocks import BLOCK, Block, Ranks, blocks_of, make_cache, write_block
from ..storage.files import link_file, write_whole
from ..storage.finite import is_finite
from .autoencoder import Autoencoder, LatentCodec

CONTENT = "content"  # key of a block's .json: the hash of the files that the block was made of
DOUBTED = 512  # images at most that are encoded once more to check an old cache


class Latents:
    """A data set as its latents: `train` and, where images are held out, `held_out`; `facts` is the contract and the
    statistics, which travel with the weights; `codec` makes images of them."""

    def __init__(self, autoencoder: Autoencoder, facts: dict[str, Any], sets: dict[str, LatentSet]) -> None:
        self.autoencoder, self.facts = autoencoder, facts
        self.train, self._held_out = sets["train"], sets.get("held_out")
        self.codec = LatentCodec(autoencoder.network, facts["mean"], facts["std"])

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments (B, 2, D, h, w) -> normalised latents (B, D, h, w) drawn from the posterior with this noise."""
        mean, logvar = moments.unbind(1)
        return self.codec.draw(mean, logvar, noise)

    def examples(self, labels: np.ndarray, *, held_out: bool = True) -> Examples:
        """The held-out latents (or those for training), one draw of each, with the labels of their images."""
        latents = self._held_out if held_out else self.train
        assert latents is not None

        def load(indices: np.ndarray) -> Tensor:
            mean, logvar = latents.moments(indices, np.zeros(len(indices), dtype=bool)).unbind(1)
            return self.codec.examples(mean, logvar, indices.tolist())

        return Examples(labels, load)


def contract_of(autoencoder: Autoencoder, image: ImageConfig, train_set: ImageSet, held_out: ImageSet | None) -> dict[str, Any]:
    """All that latents depend on: where any of it changes, they are others."""
    if image.crop != "center":
        raise UserError("image.crop 'random' gives an image other latents each time; use center")
    return {
        "autoencoder": autoencoder.digest,
        "pictures": train_set.fingerprint,
        "held_out": held_out.fingerprint if held_out is not None else None,
        "image": {"size": image.size, "channels": image.channels, "flip": image.flip},
        "shape": list(autoencoder.latent_shape(image.channels, image.size)),
    }


def cache_folder(
    autoencoder: Autoencoder, image: ImageConfig, train_set: ImageSet, held_out: ImageSet | None, otherwise: Path
) -> Path:
    """Where a cache is kept by default: in the run of the autoencoder, else in the folder `otherwise`."""
    contract, run = contract_of(autoencoder, image, train_set, held_out), Path(autoencoder.path)
    name = f"{contract['image']['size']}px_{hashlib.sha256(json.dumps(contract).encode()).hexdigest()[:8]}"
    return (run if (run / "checkpoints").is_dir() else otherwise) / "latents" / name


@torch.no_grad()
def _encode(
    autoencoder: Autoencoder,
    images: ImageSet,
    image: ImageConfig,
    indices: Sequence[int],
    flip: bool,
    batch: int,
    workers: int,
) -> Moments:
    """(n, 1 or 2, 2, D, h, w) float32 of the images `indices`, in batches of always the same size."""
    device = next(autoencoder.network.parameters()).device
    plain = ImageConfig(size=image.size, channels=image.channels)
    starts = range(0, len(indices), batch)

    def load(start: int) -> Tensor:
        part = np.array(indices[start : start + batch], dtype=np.int64)
        return torch.from_numpy(np.ascontiguousarray(images.batch(part, plain, np.full((len(part), 3), 0.5))))

    blocks = []
    with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes beside Python
        for start, pixels in zip(starts, pool.map(load, starts), strict=True):
            count = len(pixels)
            padded = to_network(torch.cat([pixels, pixels[-1:].expand(batch - count, -1, -1, -1)]), device)
            sides = []
            for side in (padded, padded.flip(3)) if flip else (padded,):
                mean, logvar = autoencoder.network.moments(side)
                sides.append(torch.stack([mean, torch.full_like(mean, -30.0) if logvar is None else logvar], dim=1))
            moments = torch.stack(sides, dim=1)[:count].float().cpu()
            blocks.append(_finite(moments, autoencoder, images, indices[start:]).numpy())
            within(count)
    return np.concatenate(blocks)


def _finite(moments: Tensor, autoencoder: Autoencoder, images: ImageSet, indices: Sequence[int]) -> Tensor:
    """The moments (n, ...) of the images `indices`; a UserError that names the first image whose moments are not finite."""
    if is_finite(moments):
        return moments
    each = torch.isfinite(moments.flatten(1)).all(1)
    where = indices[int((~each).nonzero()[0])]
    name = images.parts[images.which[where]].names[int(images.index[where])]
    raise UserError(
        f"the latents of the autoencoder {autoencoder.path} are not finite (NaN or infinity), first of the image {name}, and "
        "no latent cache was kept; use another autoencoder, or an earlier checkpoint of this one"
    )


def encode_latents(
    autoencoder: Autoencoder,
    train_set: ImageSet,
    held_out: ImageSet | None,
    image: ImageConfig,
    folder: Path,
    *,
    batch_size: int,
    workers: int,
    rank: int,
    world: int,
    barrier: Callable[[], None],
) -> None:
    """Make the cache `folder`, which is missing. After a kill the same call goes on."""
    sets = {"train": train_set} | ({"held_out": held_out} if held_out is not None else {})
    contract = contract_of(autoencoder, image, train_set, held_out)
    for images in sets.values():
        images.prepare(ImageConfig(size=image.size, channels=image.channels))

    def encode(split: str, block: Block) -> None:
        flip = image.flip and split == "train"
        content = sets[split].contents(block.items)  # before they are decoded: a file that is overwritten meanwhile differs
        moments = _encode(autoencoder, sets[split], image, block.items, flip, batch_size, workers)
        write_block(block, moments, {**sums_of(moments), CONTENT: content})

    def finish(staged: Path) -> dict[str, Any]:
        return _statistics(autoencoder, cache_sums(staged, len(train_set)))

    counts = {split: len(images) for split, images in sets.items()}
    words = {"name": "latent cache", "doing": "encoding latents"}
    make_cache(folder, contract, counts, encode, finish, Ranks(rank, world, barrier), **words, notes={FILES: files_of(sets)})


def write_sample_cache(
    autoencoder: Autoencoder,
    train_set: ImageSet,
    held_out: ImageSet | None,
    image: ImageConfig,
    folder: Path,
    *,
    batch_size: int,
    workers: int,
) -> float:
    """Make a cache for a rehearsal: the first block stands for all, as links of one file. Gives the seconds that one process
    would need for the rest."""
    train_set.prepare(ImageConfig(size=image.size, channels=image.channels))
    began = time.monotonic()
    block = _encode(autoencoder, train_set, image, range(min(BLOCK, len(train_set))), image.flip, batch_size, workers)
    seconds = time.monotonic() - began
    sets = {"train": train_set} | ({"held_out": held_out} if held_out is not None else {})
    counts = {split: len(images) for split, images in sets.items()}
    for split, count in counts.items():
        values = block if split == "train" else block[:, :1]
        write_sample_blocks(folder, split, count, values)
    manifest = {**contract_of(autoencoder, image, train_set, held_out), FILES: files_of(sets), "counts": counts}
    manifest |= _statistics(autoencoder, [sums_of(block)])
    write_whole(folder / "manifest.json", json.dumps(manifest).encode())
    return seconds * (sum(counts.values()) / len(block) - 1)


def write_sample_blocks(
    folder: Path, split: str, count: int, values: NDArray[np.float32], facts: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """The blocks of `count` entries, each of them a link of the first one; of `values` (n, ...), which are repeated where they
    are fewer than a block has. `facts` has lists of n entries, likewise."""

    def part(size: int) -> tuple[NDArray[np.float32], dict[str, Any]]:
        indices = np.arange(size) % len(values)
        return values[indices], {key: [entries[i] for i in indices] for key, entries in facts.items()}

    blocks = blocks_of(folder, split, count)
    for block in blocks:
        if block in (blocks[0], blocks[-1]):
            write_block(block, *part(len(block.items)))
            continue
        for suffix in (".npy", ".json"):
            link_file(blocks[0].path.with_suffix(suffix), block.path.with_suffix(suffix))


def files_of(sets: Mapping[str, ImageSet]) -> dict[str, Any]:
    """What a cache notes of the files that it is made of, besides its contract."""
    return {"decoder": DECODER, "state": {split: images.state for split, images in sets.items()}}


def check_files(
    folder: Path,
    manifest: dict[str, Any],
    sets: Mapping[str, ImageSet],
    latents: Mapping[str, LatentSet],
    encode: Callable[[str, Sequence[int]], Moments],
    *,
    processes: Accelerator | PartialState,
    goes_on: bool,
) -> None:
    """Refuse a whole cache whose files have another content now, though the same names and sizes, or are decoded otherwise.

    Where the times of the files changed, their contents are compared. An old cache has no note of them: then some of the files
    that changed after it was made are encoded once more and compared. All processes share the work, and the first one says
    whether there is any. A run that `goes_on` with this cache keeps it where only the decoder changed.
    """
    files = manifest.get(FILES, {})
    decoder = files.get("decoder", 1)
    changed = [images for images in sets.values() if images.decoder > decoder]
    if changed and not goes_on:
        count = sum(int((images.decoders > decoder).sum()) for images in changed)
        raise UserError(
            f"the latent cache {folder} was made by an earlier version of the decoder, and {count} of its images look "
            "different now (colour profiles, deep grey); remove it, or give another `latents`"
        )
    if changed and processes.is_main_process:
        print(f"the latent cache {folder} is of an earlier version of the decoder; the run goes on with it", flush=True)
    now = files_of(sets)
    if broadcast(bool(files) and all(files["state"].get(split) == state for split, state in now["state"].items())):
        return
    rank, world = processes.process_index, processes.num_processes
    made_at = (folder / "manifest.json").stat().st_mtime_ns
    for split, images in sets.items():
        if files:
            blocks = blocks_of(folder, split, len(images))[rank::world]
            compared = track(blocks, "comparing images with the latent cache", unit="blocks") if rank == 0 else blocks
            same = all(read_json(block.path).get(CONTENT) == images.contents(block.items) for block in compared)
        else:
            later = np.flatnonzero((images.times > made_at) & (images.decoders <= decoder))
            later = later[np.arange(min(len(later), DOUBTED)) * len(later) // max(1, min(len(later), DOUBTED))]
            later = later[rank::world]
            same = len(later) == 0 or _is_close(latents[split], encode(split, later.tolist()), later)
        if not same:
            raise UserError(
                f"the latent cache {folder} was made of other images (files of the same names and sizes have another content "
                "now); remove it, or give another `latents`"
            )
    processes.wait_for_everyone()
    if files and processes.is_main_process:
        with suppress(OSError):  # a cache that cannot be written costs time, not the run
            document = {**manifest, FILES: {**files, "state": now["state"]}}
            write_whole(folder / "manifest.json", json.dumps(document, indent=1).encode())


def _is_close(latents: LatentSet, encoded: Moments, indices: NDArray[np.int64]) -> bool:
    """Whether images encoded once more have the means of the cache, but for what another device or precision changes."""
    cached = latents.moments(indices, np.zeros(len(indices), dtype=bool))[:, 0].float().cpu().numpy()
    return bool(np.abs(cached - encoded[:, 0, 0]).mean((1, 2, 3)).max() <= 0.05 * max(float(cached.std()), 1e-6))


def _statistics(autoencoder: Autoencoder, sums: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The statistics of the latents; mean and std are the autoencoder's own scaling where it brings one; low and high are those
    of normalised latents."""
    values = statistics(sums)
    if autoencoder.scaling is not None:
        channels = len(values["mean"])
        values |= {key: [value] * channels for key, value in zip(("mean", "std"), autoencoder.scaling, strict=True)}
    mean, std = np.array(values["mean"]), np.array(values["std"])
    return values | {key: ((np.array(values[key]) - mean) / std).tolist() for key in ("low", "high")}


def latents_of(
    autoencoder: Autoencoder,
    train_set: ImageSet,
    held_out: ImageSet | None,
    image: ImageConfig,
    folder: Path,
    processes: Accelerator | PartialState,
    *,
    batch_size: int,
    workers: int = 4,
    run_dir: Path | None = None,
) -> Latents:
    """The latents in the cache `folder`, which is made if it is missing; on the device where they fit. A cache of something
    else is a UserError. `run_dir` is where the run that learns from them may have begun before."""
    contract, device = contract_of(autoencoder, image, train_set, held_out), next(autoencoder.network.parameters()).device
    counts = {"train": len(train_set)} | ({"held_out": len(held_out)} if held_out is not None else {})
    if not folder.exists():
        encode_latents(
            autoencoder,
            train_set,
            held_out,
            image,
            folder,
            batch_size=batch_size,
            workers=workers,
            rank=processes.process_index,
            world=processes.num_processes,
            barrier=processes.wait_for_everyone,
        )
    manifest, sets = open_latents(folder, contract, counts, device)
    facts = {key: value for key, value in manifest.items() if key not in ("counts", FILES)}
    image_sets = {"train": train_set} | ({"held_out": held_out} if held_out is not None else {})

    def encode(split: str, indices: Sequence[int]) -> Moments:
        return _encode(autoencoder, image_sets[split], image, indices, False, batch_size, workers)

    check_files(folder, manifest, image_sets, sets, encode, processes=processes, goes_on=_goes_on(run_dir, facts))
    processes.wait_for_everyone()
    for latents in sets.values():
        latents.load_to_device()
    return Latents(autoencoder, facts, sets)


def _goes_on(run_dir: Path | None, facts: Mapping[str, Any]) -> bool:
    """Whether the run in `run_dir` began with these latents."""
    if run_dir is None or not (run_dir / "data.json").exists():
        return False
    known = read_json(run_dir / "data.json")
    return any(same_latents(end.get("latents"), facts) for end in (known, known.get("source") or {}))
