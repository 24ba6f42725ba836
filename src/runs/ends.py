"""The two ends of the blend, opened: pictures, latents, 2-D points, or pairs that an earlier run made."""

import base64
import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from ..config import UserError
from ..data import (
    GaussianSource,
    ImageConfig,
    ImageSet,
    PointSet,
    describe_data,
    open_data,
    open_given,
    open_given_points,
    open_points,
)
from ..data.points import DensitySource, density_image, is_point_source
from ..runtime.examples import Examples, image_examples
from ..runtime.processes import same_on_all
from ..runtime.seeds import normal, torch_seed
from ..runtime.stream import BatchPlan, MicroBatch, Order, latent_stream, positions_of, stream, to_network
from .autoencoder import Autoencoder, LatentCodec
from .latents import Latents, cache_folder, latents_of
from .starts import SourceSampler, Start, latent_bounds

if TYPE_CHECKING:
    from ..training.trials import Attempt


class End(ABC):
    """One end: `train` is what is learned from, `held_out` what is not, or None; `shape` what the network sees of one."""

    shape: tuple[int, ...]
    train: ImageSet | PointSet
    held_out: ImageSet | PointSet | None

    @property
    def facts(self) -> dict[str, Any]:
        """What travels with the weights."""
        return describe_data(self.train, self.held_out)

    @abstractmethod
    def stream(
        self,
        split: BatchPlan,
        *,
        seed: int,
        balanced: bool,
        start_step: int,
        workers: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Generator[MicroBatch, None, None]:
        """This rank's micro-batches from `start_step` on, as the network sees them (B, *shape), for ever."""

    @abstractmethod
    def _examples(self, chosen: Any) -> Examples: ...

    def examples(self, *, trained: bool = False) -> Examples:
        """What is held out, or, where nothing is (or with `trained`), what is learned from; always the same for one index."""
        return self._examples(self.train if trained or self.held_out is None else self.held_out)

    def starts(self, *, trained: bool = False) -> SourceSampler:
        """What sampling starts from: these examples."""
        return SourceSampler(self.examples(trained=trained))


class ImageEnd(End):
    """Pictures (C, H, W)."""

    def __init__(self, train: ImageSet, held_out: ImageSet | None, image: ImageConfig) -> None:
        self.train, self.held_out, self.image = train, held_out, image
        self.shape = (image.channels, image.size, image.size)

    def stream(
        self, split: BatchPlan, *, device: torch.device, dtype: torch.dtype, **more: Any
    ) -> Generator[MicroBatch, None, None]:
        assert isinstance(self.train, ImageSet)
        with closing(stream(self.train, self.image, split, device=device, **more)) as batches:
            for micro in batches:
                yield micro._replace(images=to_network(micro.images, device, dtype))

    def _examples(self, chosen: ImageSet) -> Examples:
        return image_examples(chosen, self.image)


class LatentEnd(End):
    """The latents (D, h, w) of pictures."""

    def __init__(self, train: ImageSet, held_out: ImageSet | None, latents: Latents, image: ImageConfig) -> None:
        self.train, self.held_out, self.latents, self.image = train, held_out, latents, image
        self.shape = tuple(latents.facts["shape"])

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"latents": self.latents.facts}

    def stream(
        self,
        split: BatchPlan,
        *,
        seed: int,
        start_step: int,
        device: torch.device,
        dtype: torch.dtype,
        balanced: bool,
        **_: Any,
    ) -> Generator[MicroBatch, None, None]:
        more = {"balanced": balanced, "flip": self.image.flip, "start_step": start_step}
        batches = latent_stream(self.latents.train, self.train.labels, split, seed=seed, **more)
        for step in itertools.count(
            start_step
        ):  # the posterior's noise is drawn for the whole batch: each rank takes its share
            noise = normal((split.batch, *self.shape), seed, "posterior", step, device=device, dtype=dtype)
            for part in range(split.accumulation):
                micro = next(batches)
                yield micro._replace(images=self.latents.draw(micro.images, noise[split.of_step(part)]))

    def _examples(self, chosen: ImageSet) -> Examples:
        return self.latents.examples(chosen.labels, held_out=chosen is not self.train)


class PointEnd(End):
    """Points (2,) of a density, and its `picture`, where it is one."""

    def __init__(self, train: PointSet, held_out: PointSet | None, picture: bytes | None = None) -> None:
        self.train, self.held_out, self.shape, self.picture = train, held_out, (2,), picture

    def stream(
        self,
        split: BatchPlan,
        *,
        seed: int,
        start_step: int,
        device: torch.device,
        dtype: torch.dtype,
        balanced: bool,
        **_: Any,
    ) -> Generator[MicroBatch, None, None]:
        assert isinstance(self.train, PointSet)
        points = torch.from_numpy(self.train.points).to(device, dtype)
        order = Order(self.train.labels, seed, balanced=balanced)
        for positions in positions_of(split, start_step):
            chosen = order(positions)
            labels = torch.from_numpy(self.train.labels[chosen])
            yield MicroBatch(points[torch.from_numpy(chosen).to(device)], labels, positions.start)

    def _examples(self, chosen: PointSet) -> Examples:
        return Examples(chosen.labels, lambda indices: torch.from_numpy(chosen.points[indices]))


class EncodedEnd(End):
    """Pictures whose latents are wanted now and then: nothing is cached, and nothing trains on it."""

    def __init__(self, pictures: End, codec: LatentCodec) -> None:
        self.pictures, self.codec = pictures, codec
        self.train, self.held_out = pictures.train, pictures.held_out

    def stream(self, split: BatchPlan, **_: Any) -> Generator[MicroBatch, None, None]:
        raise AssertionError("a run trains on cached latents")

    @torch.no_grad()
    def _examples(self, chosen: ImageSet) -> Examples:
        pictures, own = self.pictures._examples(chosen), next(self.codec.network.parameters())
        return Examples(pictures.labels, lambda indices: self.codec.encode(pictures.load(indices).to(own), indices.tolist()))


def open_end(spec: Any, held_out: Any, image: ImageConfig | None, picture: bytes | None = None) -> "ImageEnd | PointEnd":
    """What a config's `data` or `source` names, pictures or points; a UserError says what does not fit. `picture` is that of a
    density, where it is known."""
    if is_point_source(spec):
        if image is not None:
            raise UserError(f"{spec.source} is a density of 2-D points: set image to null, or name pictures at both ends")
        if not isinstance(held_out, float | int):
            raise UserError("held_out of 2-D points is a share of them, such as 0.05")
        if isinstance(spec, DensitySource):
            picture = picture or density_image(spec.path)
        return PointEnd(*open_points(spec, held_out, picture), picture)
    if image is None:
        raise UserError('pictures need image, as in {"size": 64}; 2-D points have none')
    return ImageEnd(*open_data(spec, held_out), image)


def _given_end(dataset: Any, held_out: Any, image: ImageConfig | None) -> End:
    if image is None:
        end: PointEnd | ImageEnd = PointEnd(*open_given_points(dataset, held_out))
    else:
        end = ImageEnd(*open_given(dataset, held_out, image), image)
    same_on_all(end.train.fingerprint)
    return end


class Coupling:
    """Both: `data`, and `source`, which is None for Gaussian noise. A UserError where their shapes differ."""

    def __init__(self, data: End, source: End | None) -> None:
        self.data, self.source, self.shape = data, source, data.shape
        if source is not None and source.shape != data.shape:
            shapes = " and ".join(" x ".join(map(str, end.shape)) for end in (data, source))
            raise UserError(f"data and source have different shapes, {shapes}; blend like with like")

    @property
    def facts(self) -> dict[str, Any]:
        """What travels with the weights: of a source that is a density, its picture too, for sampling to start from."""
        if self.source is None:
            return self.data.facts
        picture = self.source.picture if isinstance(self.source, PointEnd) else None
        kept = {"density": base64.b64encode(picture).decode()} if picture is not None else {}
        return self.data.facts | {"source": self.source.facts | kept}

    @property
    def num_images(self) -> int:
        """Those of an epoch."""
        return len(self.data.train)

    def starts(self) -> Start | None:
        """What sampling starts from, where that is not Gaussian noise."""
        return self.source.starts() if self.source is not None else None

    def held_out(self) -> Examples | None:
        """What a loss can be measured on."""
        return self.data.examples() if self.data.held_out is not None else None

    def codec(self, device: torch.device) -> dict[str, Any]:
        """The codec and the bounds of latents, as a sampler takes them; nothing where there are none."""
        if not isinstance(self.data, LatentEnd):
            return {}
        return {"codec": self.data.latents.codec, "bounds": latent_bounds(self.data.latents.facts, device)}

    def encoded(
        self,
        autoencoder: Autoencoder,
        processes: Accelerator | PartialState,
        folder: str | None,
        otherwise: Path,
        *,
        batch_size: int,
        workers: int,
        attempt: "Attempt",
    ) -> "Coupling":
        """Both ends as latents, from their caches, which are made where they are missing: in `folder` (the source's beside
        it), or where the autoencoder's run keeps them, else in `otherwise`. The source's are normalised as the data's."""
        found: list[LatentEnd] = []
        for end, suffix in ((self.data, ""), (self.source, "_source")):
            if end is None:
                continue
            assert isinstance(end, ImageEnd) and isinstance(end.train, ImageSet) and not isinstance(end.held_out, PointSet)
            own = Path(folder + suffix) if folder else cache_folder(autoencoder, end.image, end.train, end.held_out, otherwise)
            more = {"batch_size": batch_size, "workers": workers, "attempt": attempt, "run_dir": otherwise}
            latents = latents_of(autoencoder, end.train, end.held_out, end.image, own, processes, **more)
            if found:
                latents.codec = found[0].latents.codec
            found.append(LatentEnd(end.train, end.held_out, latents, end.image))
        return Coupling(found[0], found[1] if len(found) > 1 else None)

    def stream(
        self, split: BatchPlan, *, seed: int, balanced: bool, **more: Any
    ) -> Generator[tuple[MicroBatch, Tensor | None], None, None]:
        """(data with its labels, source or None) of this rank, for ever, paired at random and anew in each epoch."""
        with closing(self.data.stream(split, seed=seed, balanced=balanced, **more)) as data:
            if self.source is None:
                for micro in data:
                    yield micro, None
                return
            own = torch_seed(seed, "source") % 2**32
            with closing(self.source.stream(split, seed=own, balanced=False, **more)) as source:
                for micro, start in zip(data, source, strict=True):
                    yield micro, start.images


def open_coupling(data: Any, source: Any, held_out: Any, image: ImageConfig | None, dataset: Any = None) -> Coupling:
    """What a config names: pictures or points at both ends, or Gaussian noise as the source. A held-out share is held out
    of both. A `dataset` that was handed in from Python takes the place of `data`."""
    share = held_out if isinstance(held_out, float | int) else 0.0
    opened = open_end(data, held_out, image) if dataset is None else _given_end(dataset, held_out, image)
    if isinstance(source, GaussianSource):
        return Coupling(opened, None)
    try:
        return Coupling(opened, open_end(source, share, image))
    except UserError as error:
        raise UserError(f"source: {error}") from None
