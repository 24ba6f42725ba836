"""What is encoded for a latent cache: images and conditions, bucket by bucket, a batch at a time."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import UserError, dump
from ..config.progress import within
from ..data import ImageConfig, ImageSet
from ..data.conditions import MaskCondition, split_condition
from ..data.latents import Moments, statistics
from ..data.transforms import DECODER
from ..diffusion.augmentation import transform_images
from ..runtime.augmentation import draw_copies
from ..runtime.stream import to_network
from ..storage.finite import is_finite
from .autoencoder import Autoencoder
from .conditions import latent_condition
from .densities import ImageDensity

CONDITION = "condition_"  # the start of the names of the folders that hold what images are drawn from


class Split(NamedTuple):
    """Images that are encoded together: a set, the one size that they are cut to, and the `numbers` (n,) that they have among
    all images that are learned from, or held out."""

    images: ImageSet
    spec: ImageConfig
    numbers: NDArray[np.int64]


@dataclass(frozen=True)
class Encoding:
    """What is encoded: images by an autoencoder, `batch_size` at a time, which `workers` threads load."""

    autoencoder: Autoencoder
    density: ImageDensity
    batch_size: int = 1
    workers: int = 1

    @property
    def sets(self) -> dict[str, ImageSet]:
        sets = {"train": self.density.train, "held_out": self.density.held_out}
        return {name: images for name, images in sets.items() if images is not None}

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The folders of a cache, and what each holds: `train` and `held_out`, of several buckets one for each."""
        splits = dict[str, Split]()
        for name, images in self.sets.items():
            buckets = self.density.buckets_of(images)
            for b, spec in enumerate(buckets.specs):
                height, width = spec.sides
                part = images if len(buckets.specs) == 1 else images.only(buckets.which == b)
                key = name if len(buckets.specs) == 1 else f"{name}_{height}x{width}"
                splits |= {key: Split(part, spec.plain, np.flatnonzero(buckets.which == b))} if len(part) else {}
        return splits

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many images each folder of a cache has, and each beside it with their conditions."""
        counts = {key: len(split.images) for key, split in self.splits.items()}
        return counts | ({CONDITION + key: n for key, n in counts.items()} if self.density.condition is not None else {})

    @property
    def contract(self) -> dict[str, Any]:
        """All that latents depend on: where any of it changes, they are others."""
        image, sets, buckets = self.density.image, self.sets, self.density.buckets
        if image.crop != "center":
            raise UserError("image.crop 'random' gives an image other latents each time; use center")
        contract: dict[str, Any] = {
            "autoencoder": self.autoencoder.digest,
            "pictures": self.density.train.fingerprint,
            "held_out": sets["held_out"].fingerprint if "held_out" in sets else None,
            "image": {"size": image.size, "channels": image.channels, "flip": image.flip},
            "shape": list(self.autoencoder.latent_shape(buckets.most_frequent)),
        }
        contract |= {"buckets": [list(spec.sides) for spec in buckets.specs]} if image.aspect is not None else {}
        contract |= {"augmentation": dump(self.density.augmentation)} if self.density.augmentation is not None else {}
        contract |= {"paired_with": self.density.paired_with} if self.density.paired_with is not None else {}
        return contract | ({"condition": self.density.condition.contract} if self.density.condition is not None else {})

    @property
    def files(self) -> dict[str, Any]:
        """What a cache notes of the files that it is made of, besides its contract."""
        return {"decoder": DECODER, "state": {split: images.state for split, images in self.sets.items()}}

    @property
    def plain_versions(self) -> int:
        """How many versions of an image that is learned from are not augmented: itself and, where images are mirrored, that."""
        return 1 + self.density.image.flip

    def _versions(self, pixels: Tensor, numbers: NDArray[np.int64], *, of_train: bool) -> list[Tensor]:
        """What is encoded of images (B, C, H, W) of these numbers: themselves and, of those that are learned from, their mirror
        images and the augmented copies of both."""
        if not of_train:
            return [pixels]
        versions, augmentation = [pixels, pixels.flip(3)][: self.plain_versions], self.density.augmentation
        for version in range(self.plain_versions, self.plain_versions * (augmentation.copies if augmentation else 1)):
            assert augmentation is not None
            transforms = draw_copies(augmentation, numbers, np.full(len(numbers), version), pixels.shape[3] / pixels.shape[2])
            versions.append(transform_images(versions[version % self.plain_versions], transforms))
        return versions

    @torch.no_grad()
    def encode(self, split: str, indices: Sequence[int], *, of_train: bool = False) -> Moments:
        """(n, versions, 2, D, h, w) float32 of the images `indices`, in batches of always the same size, with all versions of
        images `of_train`. A UserError names the first image whose moments are not finite."""
        network, (images, plain, numbers), batch = self.autoencoder.network, self.splits[split], self.batch_size
        device, starts, blocks = next(network.parameters()).device, range(0, len(indices), batch), []

        def load(start: int) -> Tensor:
            part = np.array(indices[start : start + batch], dtype=np.int64)  # with partners, which are replaced together
            pixels = images.batch(part, plain, np.full((len(part), 3), 0.5), partners=self.density.condition is not None)
            return torch.from_numpy(np.ascontiguousarray(pixels[..., : plain.channels]))

        with ThreadPoolExecutor(max(1, self.workers)) as pool:  # Pillow decodes beside Python
            for start, pixels in zip(starts, pool.map(load, starts), strict=True):
                count = len(pixels)
                padded = to_network(torch.cat([pixels, pixels[-1:].expand(batch - count, -1, -1, -1)]), device)
                sides = []
                known = numbers[np.resize(np.array(indices[start : start + batch], dtype=np.int64), batch)]
                for side in self._versions(padded, known, of_train=of_train):
                    mean, logvar = network.moments(side)
                    sides.append(torch.stack([mean, torch.full_like(mean, -30.0) if logvar is None else logvar], dim=1))
                moments = torch.stack(sides, dim=1)[:count].float().cpu()
                if not is_finite(moments):
                    bad = indices[start + int((~torch.isfinite(moments.flatten(1)).all(1)).nonzero()[0])]
                    part, index = images.locate(bad)
                    raise UserError(
                        f"the latents of the autoencoder {self.autoencoder.path} are not finite (NaN or infinity), first of "
                        f"the image {part.names[index]}, and no latent cache was kept; use another autoencoder, or an earlier "
                        "checkpoint of this one"
                    )
                blocks.append(moments.numpy())
                within(count)
        return np.concatenate(blocks)

    @torch.no_grad()
    def encode_conditions(self, split: str, indices: Sequence[int], *, of_train: bool = False) -> Moments:
        """(n, versions, copies, K, h, w) float32, what a network sees of the condition of each of the images `indices`, but for
        their normalisation."""
        condition, (images, plain, known), blocks = self.density.condition, self.splits[split], list[NDArray[np.float32]]()
        assert condition is not None
        copies = condition.copies if isinstance(condition, MaskCondition) else 1
        device = next(self.autoencoder.network.parameters()).device
        latent = self.autoencoder.latent_shape(plain)
        for start in range(0, len(indices), self.batch_size):
            part = [*indices[start : start + self.batch_size]]
            padded = np.array([*part, *part[-1:] * (self.batch_size - len(part))], dtype=np.int64)
            pixels = images.batch(padded, plain, np.full((len(padded), 3), 0.5), partners=True)
            batch = to_network(torch.from_numpy(np.ascontiguousarray(pixels)), device)
            sides = []
            for side in self._versions(batch, known[padded], of_train=of_train):
                each = []
                for copy in range(copies):
                    numbers = [int(i) * copies + copy for i in padded]
                    values = split_condition(side, plain.channels, condition, 0, numbers)[1]
                    assert values is not None
                    each.append(latent_condition(condition, self.autoencoder.network, values, plain.shape, latent))
                sides.append(torch.stack(each, dim=1))
            blocks.append(torch.stack(sides, dim=1)[: len(part)].float().cpu().numpy())
            within(len(part))
        return np.concatenate(blocks)

    def statistics(self, sums: list[dict[str, Any]]) -> dict[str, list[float]]:
        """The statistics of the latents; mean and std are the autoencoder's own scaling where it brings one; low and high are
        those of normalised latents."""
        values = statistics(sums)
        if self.autoencoder.scaling is not None:
            channels = len(values["mean"])
            values |= {key: [value] * channels for key, value in zip(("mean", "std"), self.autoencoder.scaling, strict=True)}
        mean, std = np.array(values["mean"]), np.array(values["std"])
        return values | {key: ((np.array(values[key]) - mean) / std).tolist() for key in ("low", "high")}
