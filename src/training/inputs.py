"""What a diffusion loop trains on: data (images, latents or 2-D points), coupled with noise or with a source."""

import base64
import itertools
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from ..config import UserError
from ..data import GaussianSource, ImageConfig, ImageSet, PointSet
from ..runs.autoencoder import Autoencoder, latent_bounds
from ..runs.densities import Density, ImageDensity, LatentDensity, PointDensity, Start, given_density, open_density
from ..runs.latents import cache_folder, latents_of
from ..runtime.examples import Examples
from ..runtime.seeds import normal, torch_seed
from ..runtime.stream import BatchPlan, MicroBatch, Order, latent_stream, positions_of, stream, to_network

Batches = Generator[tuple[MicroBatch, Tensor | None], None, None]


def stream_of(
    density: Density,
    batch_plan: BatchPlan,
    *,
    seed: int,
    balanced: bool,
    start_step: int,
    workers: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Generator[MicroBatch, None, None]:
    """This process's micro-batches from `start_step` on, as the network sees them (B, *shape), without end."""
    train = density.train
    if isinstance(density, LatentDensity):
        latents, shape = density.latents, (batch_plan.batch, *density.shape)
        common = {"balanced": balanced, "flip": density.image.flip, "start_step": start_step}
        batches = latent_stream(latents.train, train.labels, batch_plan, seed=seed, **common)
        for step in itertools.count(start_step):
            noise = normal(shape, seed, "posterior", step, device=device, dtype=dtype)  # of the whole batch
            for part in range(batch_plan.accumulation):
                micro_batch = next(batches)
                yield micro_batch._replace(images=latents.draw(micro_batch.images, noise[batch_plan.of_step(part)]))
    elif isinstance(density, ImageDensity):
        assert isinstance(train, ImageSet)
        options = {"balanced": balanced, "start_step": start_step, "workers": workers}
        with closing(stream(train, density.image, batch_plan, seed=seed, device=device, **options)) as batches:
            for micro_batch in batches:
                yield micro_batch._replace(images=to_network(micro_batch.images, device, dtype))
    else:
        assert isinstance(train, PointSet)
        points, order = torch.from_numpy(train.points).to(device, dtype), Order(train.labels, seed, balanced=balanced)
        for positions in positions_of(batch_plan, start_step):
            indices = torch.from_numpy(order(positions))
            yield MicroBatch(points[indices.to(device)], torch.from_numpy(train.labels)[indices], positions.start)


class Coupling:
    """`data`, and the `source` that it is coupled with, which is None for Gaussian noise. A UserError where their shapes
    differ."""

    def __init__(self, data: Density, source: Density | None = None) -> None:
        self.data, self.source, self.shape = data, source, data.shape
        if source is not None and source.shape != data.shape:
            shapes = " and ".join(" x ".join(map(str, density.shape)) for density in (data, source))
            raise UserError(f"data and source have different shapes, {shapes}; blend like with like")

    @property
    def facts(self) -> dict[str, Any]:
        """What travels with the weights: of a source that is a density of points, its drawing too, which sampling starts
        from."""
        if self.source is None:
            return self.data.facts
        drawing = self.source.drawing if isinstance(self.source, PointDensity) else None
        known = {"density": base64.b64encode(drawing).decode()} if drawing is not None else {}
        return self.data.facts | {"source": self.source.facts | known}

    @property
    def num_images(self) -> int:
        """How many there are in an epoch."""
        return len(self.data.train)

    def source_sampler(self) -> Start | None:
        """What sampling starts from, where that is not Gaussian noise."""
        return self.source.source_sampler() if self.source is not None else None

    def held_out_examples(self) -> Examples | None:
        """What the loss can be measured on."""
        return self.data.examples() if self.data.held_out is not None else None

    def codec(self, device: torch.device) -> dict[str, Any]:
        """The codec and the bounds of latents, as a sampler takes them; nothing where there are none."""
        if not isinstance(self.data, LatentDensity):
            return {}
        return {"codec": self.data.latents.codec, "bounds": latent_bounds(self.data.latents.facts, device)}

    def encoded(
        self,
        autoencoder: Autoencoder,
        processes: Accelerator | PartialState,
        folder: str | None,
        run_dir: Path,
        *,
        batch_size: int,
        workers: int,
    ) -> "Coupling":
        """Both as latents, from their caches, which are made where they are missing: in `folder` (the source's beside it), or
        where the autoencoder's run keeps them, else in `run_dir`. The source's are normalised as the data's."""
        encoded: list[LatentDensity] = []
        for images, place in zip((self.data, self.source), self.cache_folders(autoencoder, folder, run_dir), strict=False):
            assert isinstance(images, ImageDensity) and isinstance(images.train, ImageSet)
            assert not isinstance(images.held_out, PointSet)
            options = {"batch_size": batch_size, "workers": workers, "run_dir": run_dir}
            latents = latents_of(autoencoder, images.train, images.held_out, images.image, place, processes, **options)
            if encoded:
                latents.codec = encoded[0].latents.codec
            encoded.append(LatentDensity(images.train, images.held_out, latents, images.image))
        return Coupling(*encoded)

    def cache_folders(self, autoencoder: Autoencoder, folder: str | None, run_dir: Path) -> list[Path]:
        """Where the caches of the data's latents and of the source's are kept."""
        folders = []
        for images, suffix in ((self.data, ""), (self.source, "_source")):
            if images is not None:
                assert isinstance(images, ImageDensity) and isinstance(images.train, ImageSet)
                assert not isinstance(images.held_out, PointSet)
                sets = images.train, images.held_out
                folders.append(Path(folder + suffix) if folder else cache_folder(autoencoder, images.image, *sets, run_dir))
        return folders

    def stream(self, batch_plan: BatchPlan, *, seed: int, balanced: bool, **options: Any) -> Batches:
        """(data with its labels, source or None) of this process, without end, paired at random and anew in each epoch."""
        with closing(stream_of(self.data, batch_plan, seed=seed, balanced=balanced, **options)) as data:
            if self.source is None:
                for micro_batch in data:
                    yield micro_batch, None
                return
            source_seed = torch_seed(seed, "source") % 2**32
            with closing(stream_of(self.source, batch_plan, seed=source_seed, balanced=False, **options)) as sources:
                for micro_batch, source in zip(data, sources, strict=True):
                    yield micro_batch, source.images


def open_coupling(data: Any, source: Any, held_out: Any, image: ImageConfig | None, dataset: Any = None) -> Coupling:
    """What a config names: images or points at both ends, or Gaussian noise as the source. A held-out share is held out
    of both. A `dataset` that was handed in from Python takes the place of `data`."""
    share = held_out if isinstance(held_out, float | int) else 0.0
    density = open_density(data, held_out, image) if dataset is None else given_density(dataset, held_out, image)
    if isinstance(source, GaussianSource):
        return Coupling(density)
    try:
        return Coupling(density, open_density(source, share, image))
    except UserError as error:
        raise UserError(f"source: {error}") from None
