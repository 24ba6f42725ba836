"""The stages of the autoencoder: what each trains on, where in the run it lies, and the guard that watches its adversary."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from ..config import Length, Span, UserError, config, prefix_errors, resumable_field, to_steps
from ..config.sizes import ImageSize, Sides, describe_size, is_divisible, nearest_sizes, sides_of
from ..data import ImageConfig
from ..data.buckets import Buckets, make_buckets
from ..models import DiscriminatorConfig, VAEConfig
from ..runtime.stream import BatchPlan, plan_batch
from .config import TrainConfig
from .latent_terms import SHORTEST, AlignmentTerm, EquivarianceTerm, Transform, check_scales, draw_transform
from .optimizer import OptimizerConfig, Schedule, learning_rate


@config
class AdversarialTerm:
    """The PatchGAN's verdict, times `weight`, from `start_step` of the stage on (from its start without one). `adaptive`
    multiplies it by the ratio of the reconstruction's and the verdict's gradients at the decoder's last layer."""

    weight: float = pydantic.Field(0.5, gt=0)
    start_step: Length | None = None
    adaptive: bool = False
    loss: Literal["hinge", "vanilla"] = "hinge"


@config
class PerceptualTerm:
    """The perceptual distance, times `weight`."""

    weight: float = pydantic.Field(1.0, gt=0)


@config
class StageConfig:
    """One stage. What is left out is as at the top of the config, but that a stage with its own `batch_size` has its own
    `micro_batch_size` too (all of it at once without one); `tanh`, once on, stays on in the stages that follow."""

    steps: Length
    image_size: ImageSize | None = None
    batch_size: int | None = pydantic.Field(None, gt=0)
    micro_batch_size: int | None = resumable_field(None, gt=0)
    reconstruction: Literal["l1", "mse"] = "l1"
    kl_weight: float = pydantic.Field(1e-4, ge=0)
    adversarial: AdversarialTerm | None = None
    perceptual: PerceptualTerm | None = None
    equivariance: EquivarianceTerm | None = None
    alignment: AlignmentTerm | None = None
    tanh: bool = False
    lr: float | None = pydantic.Field(None, gt=0)
    schedule: Schedule | None = None


@config
class StagedConfig(TrainConfig):
    """The keys of a run in `stages`, which follow each other: `image`, `batch_size` and `optimizer` hold where a stage says
    nothing else."""

    image: ImageConfig
    model: VAEConfig
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    stages: tuple[StageConfig, ...] = pydantic.Field(min_length=1)

    @property
    def uses_classes(self) -> bool:
        return False


@dataclass(frozen=True)
class Stage:
    """A stage in steps of the run: `first` up to `end`; its adversary begins at step `adversary_from`, if at all. Latents that
    are scaled for its equivariance have sides of at least `smallest`."""

    config: StageConfig
    number: int
    first: int
    end: int
    adversary_from: int | None
    image: ImageConfig
    batch_plan: BatchPlan
    resolve: Callable[[int | Span], int]
    smallest: int

    def rate(self, spec: OptimizerConfig) -> Callable[[int], float]:
        """step of the run -> the autoencoder's learning rate: the schedule starts anew in each stage."""
        return self._rate_from(self.first, replace(spec, lr=self.config.lr or spec.lr))

    def adversary_rate(self, spec: OptimizerConfig) -> Callable[[int], float]:
        """The same of the discriminator, whose schedule starts where it does."""
        return self._rate_from(self.first if self.adversary_from is None else self.adversary_from, spec)

    def _rate_from(self, first: int, spec: OptimizerConfig) -> Callable[[int], float]:
        at = learning_rate(replace(spec, schedule=self.config.schedule or spec.schedule), self.resolve)
        return lambda step: at(step - first, self.end - first)

    def adversary_at(self, step: int) -> AdversarialTerm | None:
        """The adversarial term of this step, if it has begun."""
        has_begun = self.adversary_from is not None and step >= self.adversary_from
        return self.config.adversarial if has_begun else None

    def transform_at(self, step: int, sides: Sides, seed: int) -> Transform | None:
        """What this step does to its latents of these `sides` (height, width), and to its images, if anything."""
        term = self.config.equivariance
        return draw_transform(term, sides, self.smallest, seed, step) if term is not None else None

    def describe(self, stages: int) -> str:
        """stage 2 of 4: steps 100 to 200, 256 px, l1 + 0.0001 KL + ..."""
        perceptual, adversarial = self.config.perceptual, self.config.adversarial
        terms = f"{self.config.reconstruction} + {self.config.kl_weight:g} KL"
        if perceptual is not None:
            terms += f" + {perceptual.weight:g} perceptual"
        if adversarial is not None:
            adaptive = " adaptive" if adversarial.adaptive else ""
            terms += f" + {adversarial.weight:g}{adaptive} adversarial from step {self.adversary_from}"
        if self.config.alignment is not None:
            terms += f" + {self.config.alignment.weight:g}{' adaptive' * self.config.alignment.adaptive} alignment"
        if self.config.equivariance is not None:
            terms += f", {self.config.equivariance.probability:g} of the steps transformed"
        place = f"stage {self.number} of {stages}: steps {self.first} to {self.end}, {describe_size(self.image.size)}"
        return f"{place}, {terms}{', tanh' if self.config.tanh else ''}; "


def plan_stages(cfg: StagedConfig, num_images: int, *, rank: int, world: int) -> list[Stage]:
    """The `stages` of the autoencoder's config `cfg`, one after the other.

    A UserError says which does not fit: an image that the autoencoder cannot reduce or the discriminator not judge, an
    adversary that would start after its stage's end, a codebook larger than the data.
    """
    planned: list[Stage] = []
    step = images = 0
    for i, stage_cfg in enumerate(cfg.stages):
        batch, size = stage_cfg.batch_size or cfg.batch_size, stage_cfg.image_size or cfg.image.size
        _check_size(cfg, stage_cfg, f"stages.{i}", size, num_images)
        resolve = partial(to_steps, batch_size=batch, num_images=num_images)
        steps, adversary_from = resolve(stage_cfg.steps), None
        if stage_cfg.adversarial is not None:
            start = resolve(stage_cfg.adversarial.start_step) if stage_cfg.adversarial.start_step is not None else 0
            if start >= steps:
                raise UserError(
                    f"stages.{i}.adversarial.start_step is {start} and the stage has {steps} steps; start it earlier, or leave "
                    "adversarial out"
                )
            adversary_from = step + start
        micro = stage_cfg.micro_batch_size or (cfg.micro_batch_size if stage_cfg.batch_size is None else None)
        with prefix_errors(f"stages.{i}"):
            batch_plan = plan_batch(batch, micro, rank=rank, world=world)._replace(first_step=step, images_before=images)
        image, end = replace(cfg.image, size=size), step + steps
        smallest = _smallest_latent(cfg, stage_cfg)
        planned.append(Stage(stage_cfg, i + 1, step, end, adversary_from, image, batch_plan, resolve, smallest))
        step, images = end, images + steps * batch
    return planned


def _smallest_latent(cfg: StagedConfig, stage_cfg: StageConfig) -> int:
    """The shortest side that scaled latents may have: that of images which all networks of the stage's loss take."""
    pixels = SHORTEST if stage_cfg.perceptual is not None or stage_cfg.adversarial is not None else 1
    if stage_cfg.adversarial is not None:
        pixels = max(pixels, cfg.discriminator.smallest_image)
    return -(-pixels // cfg.model.factor)


def _check_size(cfg: StagedConfig, stage_cfg: StageConfig, where: str, size: int | Sides, num_images: int) -> None:
    factor, smallest, bottleneck = cfg.model.factor, cfg.discriminator.smallest_image, cfg.model.bottleneck
    words, (height, width) = describe_size(size), sides_of(size)
    if cfg.image.aspect is None and not is_divisible(size, factor):
        raise UserError(
            f"{where}: images of {words} cannot be reduced {factor} times; use {nearest_sizes(size, factor)}, or fewer "
            "model.widths"
        )
    if stage_cfg.adversarial is not None and min(height, width) < smallest:
        raise UserError(
            f"{where}: images of {words} leave the discriminator no patch; use {smallest} px or more, or fewer "
            "discriminator.layers"
        )
    vectors = num_images * (height // factor) * (width // factor)
    if bottleneck.kind == "vq" and bottleneck.codes > vectors:
        raise UserError(
            f"model.bottleneck.codes: {bottleneck.codes} codes are more than the {vectors} latent vectors of {num_images} "
            f"images at {words}; use fewer"
        )


def bucket_stages(cfg: StagedConfig, stages: Sequence[Stage], sides: NDArray[np.int64]) -> list[Buckets]:
    """The buckets of each stage for images of these `sides` (N, 2), width and height. A UserError names one that leaves the
    discriminator no patch, or that has no transform."""
    all_buckets = [make_buckets(stage.image, sides, cfg.model.factor) for stage in stages]
    for stage, buckets in zip(stages, all_buckets, strict=True):
        smallest = min(buckets.specs, key=lambda spec: min(spec.sides))
        if stage.config.adversarial is not None and min(smallest.sides) < cfg.discriminator.smallest_image:
            raise UserError(
                f"stages.{stage.number - 1}: images of {describe_size(smallest.size)}, a bucket, leave the discriminator no "
                "patch; use a larger size, a smaller image.aspect.max_ratio, or fewer discriminator.layers"
            )
        if stage.config.equivariance is not None:
            where = f"stages.{stage.number - 1}.equivariance"
            check_scales(stage.config.equivariance, where, smallest.sides, stage.smallest, cfg.model.factor)
    return all_buckets


def stage_warnings(stages: Sequence[StageConfig], model: VAEConfig, *, from_scratch: bool) -> list[str]:
    """What is allowed and seldom wanted, in the stages and in the autoencoder."""
    lines, tanh, ways = list[str](), False, {"downsample": model.downsample, "upsample": model.upsample}
    legacy = [f"model.{key} {value}" for key, value in ways.items() if value in ("conv", "transposed")]
    if legacy and len(model.widths) > 1:
        lines.append(
            f"{' and '.join(legacy)} leave{'s' * (len(legacy) == 1)} checkerboards in images or gradients (Odena et al. 2016, "
            "distill.pub/2016/deconv-checkerboard); average and nearest do not"
        )
    for i, stage in enumerate(stages):
        tanh |= stage.tanh
        if stage.perceptual is not None and not tanh:
            lines.append(f"stages.{i}: perceptual without tanh lets colours run out of their range; set tanh")
    if stages[0].tanh and from_scratch:
        lines.append("stages.0: tanh in a first stage from scratch leaves blobs; turn it on in a later one")
    return lines


@config
class GuardConfig:
    """In adversarial stages: when held-out reconstruction is worse than the stage's best by `worse_factor`, say so; with
    `rollback` go back to the checkpoint before, with the adversary's weight times `shrink`, at most `max_rollbacks` times."""

    worse_factor: float = pydantic.Field(1.5, gt=1)
    rollback: bool = False
    shrink: float = pydantic.Field(0.25, gt=0, lt=1)
    max_rollbacks: int = pydantic.Field(3, ge=1)


@dataclass
class Guard:
    """Watches one run: the stage's best reconstruction so far, its start included, the last healthy step, the rollbacks; and
    the step of the last checkpoint before the stage's adversary began, where a rollback goes when no step was healthy.

    All of it is in the checkpoint; `rollbacks` enters every seed and the adversary's weight.
    """

    stage: int = 0
    best: float = float("inf")
    healthy_step: int | None = None
    rollbacks: int = 0
    before_step: int | None = None

    def saved(self) -> dict[str, Any]:
        return {**asdict(self), "best": self.best if self.best < float("inf") else None}

    @classmethod
    def load(cls, saved: dict[str, Any] | None) -> "Guard":
        return cls(**{key: value for key, value in (saved or {}).items() if key != "best" or value is not None})

    def enter_stage(self, stage: int) -> bool:
        """Begin a stage; gives whether it is new, so that its start must be measured."""
        is_new = stage != self.stage
        if is_new:
            self.stage, self.best, self.healthy_step, self.before_step = stage, float("inf"), None, None
        return is_new

    def saved_before(self, step: int) -> None:
        """There is a checkpoint of `step`, and the stage's adversary has not begun there."""
        self.before_step = step or None  # nothing is saved at step 0

    @property
    def back_to(self) -> int | None:
        """The step that a rollback goes to, or None where there is none."""
        return self.healthy_step if self.healthy_step is not None else self.before_step

    def watch(self, spec: GuardConfig, step: int, value: float, *, adversary: bool = True) -> bool:
        """Whether the held-out reconstruction loss `value` is one to go on from; remembers the best and the step. A stage may
        begin with a dip (a higher learning rate, fresh moments): before its `adversary` has begun this is no fault of it, and
        the best is counted from there."""
        if not adversary and value > spec.worse_factor * self.best:
            self.best = value
        healthy = value <= spec.worse_factor * self.best  # False for NaN
        if healthy:
            self.best, self.healthy_step = min(self.best, value), step or None  # nothing is saved at step 0
        return healthy

    def explain(self, spec: GuardConfig, step: int, value: float, values: dict[str, float]) -> str:
        state = f"step {step}: held-out reconstruction is {value:.4g}, {value / self.best:.2f} times the stage's best"
        for name in ("discriminator_accuracy", "adaptive_weight"):
            if name in values:
                state += f", {name.replace('_', ' ')} {values[name]:.3g}"
        if not spec.rollback:
            return f"{state}: the adversary is too strong; lower its weight, or set guard.rollback"
        if self.rollbacks >= spec.max_rollbacks:
            return f"{state}: rolled back {self.rollbacks} times already (guard.max_rollbacks), so the run goes on as it is"
        if self.back_to is None:
            return f"{state}: there is no checkpoint of this stage from before it, so the run goes on as it is"
        weight = spec.shrink ** (self.rollbacks + 1)
        return f"{state}: going back to step {self.back_to}, with {weight:g} times the adversary's weight"

    def rolls_back(self, spec: GuardConfig) -> bool:
        return spec.rollback and self.rollbacks < spec.max_rollbacks and self.back_to is not None
