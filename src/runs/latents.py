"""Encode a data set once, on all ranks, a block of images at a time; after a kill the encoding goes on."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import UserError, read_json
from ..config.progress import track
from ..config.sizes import describe_size
from ..data import ImageSet
from ..data.conditions import Condition, flagged
from ..data.latents import FILES, BucketLatents, LatentSet, Moments, open_latents, same_latents, sums_of
from ..runtime.processes import broadcast, ranks_of
from ..runtime.stream import Examples
from ..storage.blocks import BLOCK, Block, Ranks, blocks_of, make_cache, write_block
from ..storage.files import link_file, write_whole
from .autoencoder import Autoencoder, LatentCodec
from .conditions import normalised
from .densities import Density, ImageDensity
from .encoding import CONDITION, Encoding

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

CONTENT = "content"  # key of a block's .json: the hash of the files that the block was made of
DOUBTED = 512  # images at most that are encoded once more to check an old cache


AnyLatents = LatentSet | BucketLatents


class Latents:
    """A data set as its latents: `train` and, where images are held out, `held_out`; `facts` is the contract and the
    statistics, which travel with the weights; `codec` makes images of them. Where they are drawn from a `condition`,
    `train_conditions` are what a network sees of it."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        facts: dict[str, Any],
        train: AnyLatents,
        held_out: AnyLatents | None = None,
        condition: Condition | None = None,
        conditions: Sequence[AnyLatents] = (),
    ) -> None:
        self.autoencoder, self.facts = autoencoder, facts
        self.train, self._held_out, self.condition = train, held_out, condition
        self.train_conditions, self._held_out_conditions = [*conditions, None, None][:2]
        self.codec = LatentCodec(autoencoder.network, facts["mean"], facts["std"])

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments (B, 2, D, h, w) -> normalised latents (B, D, h, w) drawn from the posterior with this noise."""
        mean, logvar = moments.unbind(1)
        return self.codec.draw(mean, logvar, noise)

    def examples(
        self, labels: np.ndarray, groups: Mapping[tuple[int, ...], Any] = MappingProxyType({}), *, held_out: bool = True
    ) -> Examples:
        """The held-out latents (or those for training), one draw of each, with the labels of their images and the `groups` of
        one shape."""
        latents = self._held_out if held_out else self.train
        assert latents is not None

        def load(indices: np.ndarray) -> Tensor:
            mean, logvar = latents.moments(indices, np.zeros(len(indices), dtype=bool)).unbind(1)
            return self.codec.examples(mean, logvar, indices.tolist())

        conditions = self._held_out_conditions if held_out else self.train_conditions

        def load_condition(indices: np.ndarray) -> Tensor:
            assert conditions is not None and self.condition is not None
            copies = conditions.moments(indices, np.zeros(len(indices), dtype=bool))  # (B, copies, K, h, w)
            return flagged(self.draw_condition(copies, indices / max(1, len(labels))), self.condition)

        return Examples(labels, load, groups, load_condition if conditions is not None else None)

    def draw_condition(self, copies: Tensor, uniforms: NDArray[np.float64]) -> Tensor:
        """Of the copies (B, n, K, h, w) of each condition the one that a number in [0, 1) chooses, normalised: (B, K, h, w)."""
        assert self.condition is not None
        chosen = torch.from_numpy((uniforms * copies.shape[1]).astype(np.int64)).to(copies.device)
        return normalised(self.condition, self.codec, copies[torch.arange(len(copies), device=copies.device), chosen])


class LatentDensity(Density):
    """The cached latents (D, h, w) of `images`."""

    def __init__(self, images: ImageDensity, latents: Latents) -> None:
        self.train, self.held_out, self.image, self.buckets = images.train, images.held_out, images.image, images.buckets
        self.images, self.latents, self.condition, self.augmentation = images, latents, images.condition, images.augmentation
        self.shapes = [latents.autoencoder.latent_shape(spec) for spec in self.buckets.specs]
        self.shape = self.shapes[self.buckets.specs.index(self.buckets.most_frequent)]

    @property
    def facts(self) -> dict[str, Any]:
        return self.images.facts | {"latents": self.latents.facts}

    def _examples(self, data_set: ImageSet) -> Examples:
        groups = self.images.buckets_of(data_set).groups(self.shapes)
        return self.latents.examples(data_set.labels, groups, held_out=data_set is not self.train)


def cache_folder(autoencoder: Autoencoder, density: ImageDensity, otherwise: Path) -> Path:
    """Where a cache is kept by default: in the run of the autoencoder, else in the folder `otherwise`."""
    contract, run = Encoding(autoencoder, density).contract, Path(autoencoder.path)
    size = describe_size(density.image.size).replace(" ", "")
    name = f"{size}_{hashlib.sha256(json.dumps(contract).encode()).hexdigest()[:8]}"
    return (run if (run / "checkpoints").is_dir() else otherwise) / "latents" / name


def write_sample_cache(
    autoencoder: Autoencoder, density: ImageDensity, folder: Path, *, batch_size: int, workers: int
) -> float:
    """Make a cache for a rehearsal: the first block of each bucket stands for all, as links of one file. Gives the seconds that
    one process would need for the rest."""
    encoding = Encoding(autoencoder, density, batch_size, workers)
    sums, encoded, seconds = list[dict[str, Any]](), 0, 0.0
    for key, count in encoding.counts.items():
        if not key.startswith("train"):
            continue
        encoding.splits[key].images.prepare(encoding.splits[key].spec)
        began, first = time.monotonic(), range(min(BLOCK, count))
        block = encoding.encode(key, first, of_train=True)
        conditions = encoding.encode_conditions(key, first, of_train=True) if CONDITION + key in encoding.counts else None
        seconds, encoded = seconds + time.monotonic() - began, encoded + len(block)
        sums.append(sums_of(block[:, : encoding.plain_versions]))
        write_sample_blocks(folder, key, count, block)
        if conditions is not None:
            encoded += len(conditions)
            write_sample_blocks(folder, CONDITION + key, count, conditions)
        held_out = key.replace("train", "held_out", 1)
        if held_out in encoding.counts:
            write_sample_blocks(folder, held_out, encoding.counts[held_out], block[:, :1])
            if conditions is not None:
                write_sample_blocks(folder, CONDITION + held_out, encoding.counts[held_out], conditions[:, :1])
    manifest = {**encoding.contract, FILES: encoding.files, "counts": encoding.counts}
    write_whole(folder / "manifest.json", json.dumps(manifest | encoding.statistics(sums)).encode())
    return seconds * (sum(encoding.counts.values()) / encoded - 1)


def write_sample_blocks(
    folder: Path, split: str, count: int, values: NDArray[np.float32], facts: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """The blocks of `count` entries, each of them a link of the first one; of `values` (n, ...), which are repeated where they
    are fewer than a block has. `facts` has lists of n entries, likewise."""
    blocks = blocks_of(folder, split, count)
    for block in blocks:
        if block in (blocks[0], blocks[-1]):
            indices = np.arange(len(block.items)) % len(values)
            write_block(block, values[indices], {key: [entries[i] for i in indices] for key, entries in facts.items()})
            continue
        for suffix in (".npy", ".json"):
            link_file(blocks[0].path.with_suffix(suffix), block.path.with_suffix(suffix))


def _check_files(
    folder: Path, manifest: dict[str, Any], encoding: Encoding, latents: Mapping[str, LatentSet], ranks: Ranks, goes_on: bool
) -> None:
    """Refuse a whole cache whose files have another content now, though the same names and sizes, or are decoded otherwise.
    Where the times of the files changed, their contents are compared. An old cache has no note of them: then some of the files
    that changed after it was made are encoded once more and compared. All processes share the work, and the first one says
    whether there is any. A run that `goes_on` with this cache keeps it where only the decoder changed."""
    files, state = manifest.get(FILES, {}), encoding.files["state"]
    decoder = files.get("decoder", 1)
    count = sum(int((images.decoders > decoder).sum()) for images in encoding.sets.values())
    if count and not goes_on:
        raise UserError(
            f"the latent cache {folder} was made by an earlier version of the decoder, and {count} of its images look "
            "different now (colour profiles, deep grey); remove it, or give another `latents`"
        )
    if count and ranks.rank == 0:
        print(f"the latent cache {folder} is of an earlier version of the decoder; the run goes on with it", flush=True)
    if broadcast(bool(files) and all(files["state"].get(split) == now for split, now in state.items())):
        return
    made_at = (folder / "manifest.json").stat().st_mtime_ns
    for split, (images, _, _) in encoding.splits.items():
        if files:
            blocks = blocks_of(folder, split, len(images))[ranks.rank :: ranks.world]
            compared = track(blocks, "comparing images with the latent cache", unit="blocks") if ranks.rank == 0 else blocks
            same = all(read_json(block.path).get(CONTENT) == images.contents(block.items) for block in compared)
        else:
            later = np.flatnonzero((images.times > made_at) & (images.decoders <= decoder))
            doubted = min(len(later), DOUBTED)
            later = later[np.arange(doubted) * len(later) // max(1, doubted)][ranks.rank :: ranks.world]
            same = len(later) == 0 or _is_close(latents[split], encoding.encode(split, later.tolist()), later)
        if not same:
            raise UserError(
                f"the latent cache {folder} was made of other images (files of the same names and sizes have another content "
                "now); remove it, or give another `latents`"
            )
    ranks.barrier()
    if files and ranks.rank == 0:
        with suppress(OSError):  # a cache that cannot be written costs time, not the run
            document = {**manifest, FILES: {**files, "state": state}}
            write_whole(folder / "manifest.json", json.dumps(document, indent=1).encode())


def _is_close(latents: LatentSet, encoded: Moments, indices: NDArray[np.int64]) -> bool:
    """Whether images encoded once more have the means of the cache, but for what another device or precision changes."""
    cached = latents.moments(indices, np.zeros(len(indices), dtype=bool))[:, 0].float().cpu().numpy()
    return bool(np.abs(cached - encoded[:, 0, 0]).mean((1, 2, 3)).max() <= 0.05 * max(float(cached.std()), 1e-6))


def latents_of(
    autoencoder: Autoencoder,
    density: ImageDensity,
    folder: Path,
    processes: "Accelerator | PartialState",
    *,
    batch_size: int,
    workers: int = 4,
    run_dir: Path | None = None,
) -> Latents:
    """The latents in the cache `folder`, which is made if it is missing (after a kill the same call goes on); on the device
    where they fit. A cache of something else is a UserError. `run_dir` is where the run that learns from them may have begun
    before."""
    encoding, ranks = Encoding(autoencoder, density, batch_size, workers), ranks_of(processes)
    contract, device, splits = encoding.contract, next(autoencoder.network.parameters()).device, encoding.splits

    def make(split: str, block: Block) -> None:
        of_train = split.removeprefix(CONDITION).startswith("train")
        if split.startswith(CONDITION):
            write_block(block, encoding.encode_conditions(split.removeprefix(CONDITION), block.items, of_train=of_train), {})
            return
        content = splits[split].images.contents(block.items)  # before they are decoded: a file may be overwritten meanwhile
        moments = encoding.encode(split, block.items, of_train=of_train)
        write_block(block, moments, {**sums_of(moments[:, : encoding.plain_versions]), CONTENT: content})

    def finish(staged: Path) -> dict[str, Any]:
        of_train = [(split, count) for split, count in encoding.counts.items() if split.startswith("train")]
        blocks = [block for split, count in of_train for block in blocks_of(staged, split, count)]
        return encoding.statistics([read_json(block.path) for block in blocks])

    if not folder.exists():
        for images, spec, _ in splits.values():
            images.prepare(spec)
        words = {"name": "latent cache", "doing": "encoding latents"}
        make_cache(folder, contract, encoding.counts, make, finish, ranks, **words, notes={FILES: encoding.files})
    manifest, sets = open_latents(folder, contract, encoding.counts, device)
    facts = {key: value for key, value in manifest.items() if key not in ("counts", FILES)}
    before = read_json(run_dir / "data.json") if run_dir is not None and (run_dir / "data.json").exists() else {}
    goes_on = any(same_latents(end.get("latents"), facts) for end in (before, before.get("source") or {}))
    _check_files(folder, manifest, encoding, sets, ranks, goes_on)
    ranks.barrier()
    for latents in sets.values():
        latents.load_to_device()
    joined = [_join_buckets(name, images, density, sets) for name, images in encoding.sets.items()]
    held_out = joined[1] if len(joined) > 1 else None
    conditions = list[AnyLatents]()
    if density.condition is not None:
        conditions = [_join_buckets(CONDITION + name, images, density, sets) for name, images in encoding.sets.items()]
    return Latents(autoencoder, facts, joined[0], held_out, density.condition, conditions)


def _join_buckets(name: str, images: ImageSet, density: ImageDensity, sets: Mapping[str, LatentSet]) -> AnyLatents:
    """The latents of all images of a set, or of their conditions, whichever bucket they are in."""
    buckets = density.buckets_of(images)
    if len(buckets.specs) == 1:
        return sets[name]
    keys = [f"{name}_{height}x{width}" for height, width in (spec.sides for spec in buckets.specs)]
    return BucketLatents([sets.get(key) for key in keys], buckets.which)
