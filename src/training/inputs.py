"""What a diffusion loop trains on: data (images, latents or 2-D points), coupled with noise or with a source."""

import base64
import itertools
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import UserError, dump, prefix_errors
from ..data import GaussianSource, ImageConfig, Share
from ..data.conditions import Condition, split_condition
from ..data.pairs import open_matched
from ..diffusion.augmentation import CODES, AugmentationConfig, transform_images
from ..runs.autoencoder import Autoencoder, latent_bounds
from ..runs.densities import Density, ImageDensity, PointDensity, given_density, open_density
from ..runs.latents import LatentDensity, cache_folder, latents_of
from ..runs.opened import count_classes
from ..runtime.augmentation import draw_of_positions
from ..runtime.seeds import normal, torch_seed
from ..runtime.stream import BatchPlan, Examples, MicroBatch, StepOrder, latent_stream, stream, to_network
from ..sampling.autoguidance import Guided, open_guide
from .config import DiffusionConfig, LatentConfig, PreviewConfig, StepsConfig

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Batches = Generator[tuple[MicroBatch, Tensor | None], None, None]


def order_of(density: Density, cfg: StepsConfig, batch_plan: BatchPlan, following: StepOrder | None = None) -> StepOrder:
    """Which of what is learned each step shows."""
    balanced = cfg.balance_classes
    return StepOrder(density.buckets, density.train.labels, batch_plan, cfg.seed, balanced=balanced, following=following)


def stream_of(
    density: Density, order: StepOrder, cfg: StepsConfig, start_step: int, device: torch.device
) -> Generator[MicroBatch, None, None]:
    """This process's micro-batches from `start_step` on, as the network sees them (B, *shape), without end."""
    train: Any = density.train
    dtype, batch_plan, mask_seed = getattr(torch, cfg.dtype), order.plan, torch_seed(cfg.seed, "masks")
    if isinstance(density, LatentDensity):
        latents = density.latents
        options = {"flip": density.image.flip, "start_step": start_step, "conditions": latents.train_conditions}
        options["augmentation"] = density.augmentation
        batches = latent_stream(latents.train, order, **options)
        for step in itertools.count(start_step):
            shape = batch_plan.batch, *density.shape_at(order, step)
            noise = normal(shape, cfg.seed, "posterior", step, device=device, dtype=dtype)  # of the whole batch
            for part in range(batch_plan.accumulation):
                micro_batch, condition = next(batches), None
                if micro_batch.condition is not None:
                    uniforms = order.uniforms(step, part)[:, 0]  # no image of a cache is cut at random
                    condition = latents.draw_condition(micro_batch.condition.to(device, dtype), uniforms)
                images, codes = latents.draw(micro_batch.images, noise[batch_plan.of_step(part)]), micro_batch.augmentation
                codes = codes.to(device, dtype) if codes is not None else None
                yield micro_batch._replace(images=images, condition=condition, augmentation=codes)
    elif isinstance(density, ImageDensity):
        with closing(stream(train, order, start_step=start_step, workers=cfg.workers, device=device)) as batches:
            for micro_batch in batches:
                numbers = range(micro_batch.position, micro_batch.position + len(micro_batch.labels))
                pixels, channels = to_network(micro_batch.images, device, dtype), density.image.channels
                if density.augmentation is not None:
                    aspect = pixels.shape[3] / pixels.shape[2]
                    transforms = draw_of_positions(density.augmentation, cfg.seed, numbers, aspect)
                    pixels = transform_images(pixels, transforms)
                    micro_batch = micro_batch._replace(augmentation=torch.from_numpy(transforms.codes).to(device, dtype))
                images, condition = split_condition(pixels, channels, density.condition, mask_seed, numbers)
                yield micro_batch._replace(images=images, condition=condition)
    else:
        points = torch.from_numpy(train.points).to(device, dtype)
        for step, part in order.parts(start_step):
            indices, position = torch.from_numpy(order(step, part)), batch_plan.positions(step, part).start
            yield MicroBatch(points[indices.to(device)], torch.from_numpy(train.labels)[indices], position)


class Coupling:
    """`data`, and the `source` that it is coupled with, which is None for Gaussian noise: at random, or `paired`, image i with
    image i. A UserError where their shapes differ."""

    def __init__(self, data: Density, source: Density | None = None, *, paired: bool = False) -> None:
        self.data, self.source, self.shape, self.paired = data, source, data.shape, paired
        self._means: dict[tuple[int, ...], Tensor] = {}
        if isinstance(data, ImageDensity) and isinstance(source, ImageDensity):
            source.take_buckets(data, paired=paired)
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
    def shapes(self) -> list[tuple[int, ...]]:
        """What the network sees of images of each size."""
        return self.data.shapes

    @property
    def num_images(self) -> int:
        """How many there are in an epoch."""
        return len(self.data.train)

    @property
    def densities(self) -> list[Any]:
        """The data and, where it is no noise, the source."""
        return [self.data] if self.source is None else [self.data, self.source]

    def shape_at(self, step: int) -> tuple[int, ...]:
        """What the network sees of one of the images of a step of `stream`."""
        return self.data.shape_at(self._order, step)

    def mean(self, x0: Tensor) -> Tensor:
        """The mean of the data that is learned from and has the shape of x0 (b, *shape), like x0: (*shape)."""
        shape = tuple(x0.shape[1:])
        if shape not in self._means:
            self._means[shape] = self.data.mean(shape).to(x0)
        return self._means[shape]

    def held_out_examples(self) -> Examples | None:
        """What the loss can be measured on."""
        return self.data.examples() if self.data.held_out is not None else None

    def sampler_options(self, cfg: DiffusionConfig, device: torch.device) -> dict[str, Any]:
        """What `Sampler` takes of the config and the data: of latents their codec and bounds, and what sampling starts from,
        where that is not Gaussian noise; and the guide of the previews."""
        options: dict[str, Any] = {"clip_x0": (-1.0, 1.0) if cfg.process.clip else None, "guidable": cfg.label_dropout > 0}
        if isinstance(cfg.preview, PreviewConfig) and cfg.preview.sampler.guide_with is not None:
            options["guide"] = open_guide(self._guided(cfg), cfg.preview.sampler.guide_with, device)
        options["shapes"] = dict(zip(self.data.shapes, self.data.buckets.counts, strict=False)) or None
        if cfg.condition is not None:
            options |= {"condition": cfg.condition, "conditioned": self.data.examples()}
        if self.source is not None:
            options["source"] = self.source.source_sampler(shuffled=not self.paired)
        if isinstance(self.data, LatentDensity):
            latents = self.data.latents
            options["codec"] = latents.codec
            if cfg.process.clip:
                options["clip_x0"] = latent_bounds(latents.facts, device)
        return options

    def _guided(self, cfg: DiffusionConfig) -> Guided:
        """What a guide of the previews has to fit."""
        class_names, sizes = self.data.train.class_names, [bucket.sides for bucket in self.data.buckets.specs]
        num_classes = count_classes(cfg.class_conditional, class_names)
        return Guided("this run", dump(cfg), self.facts, num_classes, class_names, sizes)

    def encoded(
        self, cfg: LatentConfig, autoencoder: Autoencoder, processes: "Accelerator | PartialState", run_dir: Path
    ) -> "Coupling":
        """Both as latents, from their caches, which are made where they are missing. The source's are normalised as the
        data's."""
        encoded: list[LatentDensity] = []
        options = {"batch_size": cfg.encode_batch_size, "workers": cfg.workers, "run_dir": run_dir}
        for images, folder in zip(self.densities, self.cache_folders(autoencoder, cfg.latents, run_dir), strict=True):
            latents = latents_of(autoencoder, images, folder, processes, **options)
            if encoded:
                latents.codec = encoded[0].latents.codec
            encoded.append(LatentDensity(images, latents))
        return Coupling(*encoded, paired=self.paired)

    def cache_folders(self, autoencoder: Autoencoder, folder: str | None, run_dir: Path) -> list[Path]:
        """Where the caches of the data's latents and of the source's are kept: in `folder` and beside it, or where the
        autoencoder's run keeps them, else in `run_dir`."""
        if folder:
            return [Path(folder + suffix) for suffix in ("", "_source")[: len(self.densities)]]
        return [cache_folder(autoencoder, each, run_dir) for each in self.densities]

    def stream(self, cfg: StepsConfig, batch_plan: BatchPlan, start_step: int, device: torch.device) -> Batches:
        """(data with its labels, source or None) of this process, without end, paired at random and anew in each epoch."""
        self._order = order_of(self.data, cfg, batch_plan)
        return self._pair(cfg, start_step, device)

    def _pair(self, cfg: StepsConfig, start_step: int, device: torch.device) -> Batches:
        with closing(stream_of(self.data, self._order, cfg, start_step, device)) as data:
            if self.source is None:
                for micro_batch in data:
                    yield micro_batch, None
                return
            source_cfg = replace(cfg, seed=torch_seed(cfg.seed, "source") % 2**32, balance_classes=False)
            order = self._order if self.paired else order_of(self.source, source_cfg, self._order.plan, self._order)
            with closing(stream_of(self.source, order, source_cfg, start_step, device)) as sources:
                for micro_batch, source in zip(data, sources, strict=True):
                    yield micro_batch, source.images


def blank_inputs(
    cfg: DiffusionConfig, shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """What a network is called with once before training: x, time and, where it draws from a condition or is told how images
    were augmented, no labels, an empty condition and no augmentation."""
    x, time = torch.zeros(1, *shape, device=device, dtype=dtype), torch.zeros(1, device=device)
    channels, codes = len(cfg.condition_names(shape)), x.new_zeros(1, CODES) if cfg.augmentation is not None else None
    if not channels and codes is None:
        return x, time
    return x, time, None, x.new_zeros(1, channels, *shape[1:]) if channels else None, codes


def open_coupling(
    data: Any,
    source: Any,
    held_out: Any,
    image: ImageConfig | None,
    dataset: Any = None,
    *,
    factor: int = 1,
    condition: Condition | None = None,
    augmentation: AugmentationConfig | None = None,
    paired: bool = False,
) -> Coupling:
    """What a config names: images or points at both ends, or Gaussian noise as the source. A held-out share is held out
    of both. A `dataset` that was handed in from Python takes the place of `data`. The networks reduce images by `factor`, and
    may draw them from a `condition`; data may be augmented. `paired` couples images of the same names; those without a
    partner are left out."""
    if paired:
        assert image is not None
        if dataset is not None:
            raise UserError("coupling 'paired' is for data that the config names, and this data set was handed in from Python")
        train, held_out_set = open_matched(data, held_out, source)
        assert train.partner is not None
        partners = train.partner, held_out_set.partner if held_out_set is not None else None
        held_out_set = held_out_set.without_partners() if held_out_set is not None else None
        density = ImageDensity(train.without_partners(), held_out_set, image, factor, condition)
        return Coupling(density, ImageDensity(*partners, image, factor), paired=True)
    if dataset is None:
        options = {"factor": factor, "condition": condition, "augmentation": augmentation}
        density = open_density(data, held_out, image, **options)
    else:
        density = given_density(dataset, held_out, image, factor, condition, augmentation)
    if isinstance(source, GaussianSource):
        return Coupling(density)
    with prefix_errors("source"):
        source_density = open_density(source, held_out if isinstance(held_out, Share) else 0.0, image, factor=factor)
        return Coupling(density, source_density)
