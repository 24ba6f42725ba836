"""What a diffusion loop trains on: data (images, latents or 2-D points), coupled with noise or with a source."""

import base64
import itertools
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import UserError, prefix_errors
from ..data import GaussianSource, ImageConfig, ImageSet, PointSet
from ..runs.autoencoder import Autoencoder
from ..runs.densities import Density, ImageDensity, LatentDensity, PointDensity, given_density, open_density
from ..runs.latents import cache_folder, latents_of
from ..runs.starts import Start, latent_bounds
from ..runtime.examples import Examples
from ..runtime.seeds import normal, torch_seed
from ..runtime.stream import BatchPlan, MicroBatch, Order, latent_stream, positions_of, stream, to_network
from .config import LatentConfig, StepsConfig

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Batches = Generator[tuple[MicroBatch, Tensor | None], None, None]


def stream_of(
    density: Density, cfg: StepsConfig, batch_plan: BatchPlan, start_step: int, device: torch.device
) -> Generator[MicroBatch, None, None]:
    """This process's micro-batches from `start_step` on, as the network sees them (B, *shape), without end."""
    train, dtype = density.train, getattr(torch, cfg.dtype)
    options: dict[str, Any] = {"seed": cfg.seed, "balanced": cfg.balance_classes, "start_step": start_step}
    if isinstance(density, LatentDensity):
        latents = density.latents
        batches = latent_stream(latents.train, train.labels, batch_plan, flip=density.image.flip, **options)
        for step in itertools.count(start_step):
            shape = batch_plan.batch, *density.shape
            noise = normal(shape, cfg.seed, "posterior", step, device=device, dtype=dtype)  # of the whole batch
            for part in range(batch_plan.accumulation):
                micro_batch = next(batches)
                yield micro_batch._replace(images=latents.draw(micro_batch.images, noise[batch_plan.of_step(part)]))
    elif isinstance(density, ImageDensity):
        assert isinstance(train, ImageSet)
        with closing(stream(train, density.image, batch_plan, workers=cfg.workers, device=device, **options)) as batches:
            for micro_batch in batches:
                yield micro_batch._replace(images=to_network(micro_batch.images, device, dtype))
    else:
        assert isinstance(train, PointSet)
        points = torch.from_numpy(train.points).to(device, dtype)
        order = Order(train.labels, cfg.seed, balanced=cfg.balance_classes)
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

    @property
    def densities(self) -> list[Any]:
        """The data and, where it is no noise, the source."""
        return [self.data] if self.source is None else [self.data, self.source]

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
        self, cfg: LatentConfig, autoencoder: Autoencoder, processes: "Accelerator | PartialState", run_dir: Path
    ) -> "Coupling":
        """Both as latents, from their caches, which are made where they are missing. The source's are normalised as the
        data's."""
        encoded: list[LatentDensity] = []
        options = {"batch_size": cfg.encode_batch_size, "workers": cfg.workers, "run_dir": run_dir}
        for images, folder in zip(self.densities, self.cache_folders(autoencoder, cfg.latents, run_dir), strict=True):
            latents = latents_of(autoencoder, images.train, images.held_out, images.image, folder, processes, **options)
            if encoded:
                latents.codec = encoded[0].latents.codec
            encoded.append(LatentDensity(images.train, images.held_out, latents, images.image))
        return Coupling(*encoded)

    def cache_folders(self, autoencoder: Autoencoder, folder: str | None, run_dir: Path) -> list[Path]:
        """Where the caches of the data's latents and of the source's are kept: in `folder` and beside it, or where the
        autoencoder's run keeps them, else in `run_dir`."""
        if folder:
            return [Path(folder + suffix) for suffix in ("", "_source")[: len(self.densities)]]
        return [cache_folder(autoencoder, each.image, each.train, each.held_out, run_dir) for each in self.densities]

    def stream(self, cfg: StepsConfig, batch_plan: BatchPlan, start_step: int, device: torch.device) -> Batches:
        """(data with its labels, source or None) of this process, without end, paired at random and anew in each epoch."""
        with closing(stream_of(self.data, cfg, batch_plan, start_step, device)) as data:
            if self.source is None:
                for micro_batch in data:
                    yield micro_batch, None
                return
            source_cfg = replace(cfg, seed=torch_seed(cfg.seed, "source") % 2**32, balance_classes=False)
            with closing(stream_of(self.source, source_cfg, batch_plan, start_step, device)) as sources:
                for micro_batch, source in zip(data, sources, strict=True):
                    yield micro_batch, source.images


def open_coupling(data: Any, source: Any, held_out: Any, image: ImageConfig | None, dataset: Any = None) -> Coupling:
    """What a config names: images or points at both ends, or Gaussian noise as the source. A held-out share is held out
    of both. A `dataset` that was handed in from Python takes the place of `data`."""
    density = open_density(data, held_out, image) if dataset is None else given_density(dataset, held_out, image)
    if isinstance(source, GaussianSource):
        return Coupling(density)
    with prefix_errors("source"):
        return Coupling(density, open_density(source, held_out if isinstance(held_out, float | int) else 0.0, image))
