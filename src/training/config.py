"""What the configs of the training scripts have in common; each script's own config extends it."""

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from pydantic import Discriminator, Tag

from ..config import Length, config, config_error, kind_of, resumable_field
from ..data import DataEnd, GaussianSource, HeldOut, ImageConfig, SourceEnd
from ..data.conditions import ConditionConfig, GreyCondition, LowCondition, MaskCondition, PairedCondition, channel_names
from ..diffusion import SOLVERS, ProcessConfig, TimeShift
from ..diffusion.augmentation import AugmentationConfig
from ..diffusion.matching import NoiseConfig
from ..diffusion.weightings import TimesConfig, UniformTimes
from ..evaluation.autoencoder import ReconstructConfig
from ..evaluation.quality import QualityConfig
from ..models import ModelConfig
from ..runs.classifier import MeasureConfig
from ..runtime.checkpoint import CheckpointConfig
from ..runtime.launch import MachineConfig
from ..sampling.config import SamplerConfig
from ..storage.blocks import BLOCK
from ..storage.hub import HubConfig
from .ema import EMAConfig
from .optimizer import OptimizerConfig


@config
class LogConfig:
    """A line in metrics.jsonl, and in the trackers of `project`, every `every` steps; previews and charts go there, too."""

    every: Length = resumable_field(50)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = resumable_field(("tensorboard",))
    project: str = resumable_field("atelier")


@config
class PreviewConfig:
    """Images from the EMA weights every `every` steps and at the end, always from the same noise.

    `sheets` one is a sheet of `num_samples` images; class is one of so many for each class. `quality` measures more of them.
    """

    every: Length | None = resumable_field(None)
    num_samples: int = resumable_field(16, ge=1)
    batch_size: int = resumable_field(16, ge=1)
    sheets: Literal["one", "class"] = resumable_field("one")
    quality: QualityConfig | None = resumable_field(None)
    sampler: SamplerConfig = resumable_field(SamplerConfig())


@config
class PathPreviewConfig:
    """`num_samples` sources from the EMA weights every `every` steps and at the end, always the same ones, after so many
    network `calls`, side by side; `batch_size` at a time. `shift` moves the steps to the noise for large images. `quality`
    measures more images, after the most calls."""

    every: Length | None = resumable_field(None)
    num_samples: int = resumable_field(8, ge=1)
    batch_size: int = resumable_field(16, ge=1)
    calls: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = resumable_field((1, 4, 16, 64), min_length=1)
    guidance: float = resumable_field(1.0)
    shift: TimeShift | None = resumable_field(None)
    quality: QualityConfig | None = resumable_field(None)

    def sampler_of(self, calls: int) -> SamplerConfig:
        """The sampler of the column after so many calls."""
        return SamplerConfig(solver="euler", steps=calls, guidance=self.guidance, shift=self.shift)

    @property
    def most_calls(self) -> SamplerConfig:
        """The sampler of the last column."""
        return self.sampler_of(max(self.calls))


@config
class TrainConfig(MachineConfig):
    """The keys of every training script. `batch_size` counts the images of an optimizer step, on all devices together; one
    device takes at most `micro_batch_size` of them at a time. `init_from` is a run whose weights are the start, by its path or
    its name on the hub. The weights are shown on the `hub`."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = pydantic.Field(0, ge=0, lt=2**32)
    data: DataEnd
    held_out: HeldOut = 0.0
    image: ImageConfig | None
    optimizer: OptimizerConfig
    batch_size: int = pydantic.Field(gt=0)
    micro_batch_size: int | None = resumable_field(None, gt=0)
    init_from: str | None = None
    ema: EMAConfig = EMAConfig()
    preview: PreviewConfig | PathPreviewConfig | ReconstructConfig | MeasureConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    hub: HubConfig | None = resumable_field(None)
    max_nonfinite_steps: int = resumable_field(10, ge=1)

    @property
    def quality(self) -> QualityConfig | None:
        """How the quality of samples is measured while the run trains; None where it is not."""
        return self.preview.quality if isinstance(self.preview, PreviewConfig | PathPreviewConfig) else None

    @property
    def cadences(self) -> dict[str, Length | None]:
        """How often is done what a run does now and then; None: at the end alone, or never."""
        lengths = {"log": self.log.every, "preview": self.preview.every, "save": self.checkpoint.every}
        lengths["export"] = getattr(self, "export_every", None)
        lengths["quality"] = self.quality.every if self.quality is not None else None
        lengths["held_out"] = getattr(getattr(self, "stop", None), "every", None)
        return lengths | {"snapshot": self.ema.snapshot_every}

    @property
    def uses_classes(self) -> bool:
        """Whether what the run learns depends on the classes of its data."""
        return True


@config
class StopConfig:
    """The loss of the EMA weights on held-out images, always with the same noise, is measured every `every` steps; where it has
    not been lower for `patience` measurements, the cooldown begins."""

    kind: Literal["held_out"]
    every: Length
    patience: int = pydantic.Field(3, ge=1)


@config
class StepsConfig(TrainConfig):
    """The keys of a script that trains one network for `steps` on noised data: which `times` it draws, and whether it shows
    each class equally often. `compile` is torch's: minutes at the start, for faster steps."""

    balance_classes: bool = False
    times: TimesConfig = UniformTimes()
    steps: Length | None
    compile: bool = resumable_field(False)


@config
class DiffusionConfig(StepsConfig):
    """The keys of the three diffusion scripts. Without `class_conditional` the data decides, and previews are guided where it
    has classes; `label_dropout` is how often a label is left out. `noise` may be matched to the images. With a `condition` each
    image is drawn from another image, and `condition_dropout` is how often that is left out. With an `augmentation` images are
    transformed at random, and the network is told how. `stop` begins the cooldown of optimizer.schedule early."""

    class_conditional: bool | None = None
    label_dropout: float = pydantic.Field(0.0, ge=0, le=1)
    condition: ConditionConfig | None = None
    condition_dropout: float = pydantic.Field(0.0, ge=0, le=1)
    noise: NoiseConfig = NoiseConfig()
    augmentation: AugmentationConfig | None = None
    stop: StopConfig | None = resumable_field(None)
    process: ProcessConfig
    model: ModelConfig

    @property
    def sample_options(self) -> str:
        """What sample.py must be given to draw from the run."""
        return " --condition FOLDER" if self.condition is not None else ""

    def condition_names(self, shape: Sequence[int]) -> list[str]:
        """What each channel of the condition holds that the network sees, which sees images or latents of this shape."""
        latent_channels = shape[0] if getattr(self, "autoencoder", None) is not None else None
        return channel_names(self.condition, self.image.channels if self.image is not None else 0, latent_channels)

    @pydantic.model_validator(mode="after")
    def _conditioned(self) -> "DiffusionConfig":
        condition, image, is_latent = self.condition, self.image, getattr(self, "autoencoder", None) is not None
        if condition is None:
            if self.condition_dropout:
                raise config_error("condition_dropout: there is no condition to leave out; set condition, or leave it out")
            return self
        if image is None:
            raise config_error("condition: 2-D points are drawn from no image; leave it out")
        shortest = min(image.sides) if image.aspect is None else int(min(image.sides) * (0.75 / image.aspect.max_ratio) ** 0.5)
        is_one_sheet = not isinstance(self.preview, PreviewConfig) or self.preview.sheets == "one"
        problems = {
            "kind: grey images have no colours to add; give image.channels 3, or another kind": isinstance(
                condition, GreyCondition
            )
            and image.channels == 1,
            f"size: it must be less than the shorter side of the images, {shortest}": isinstance(condition, LowCondition)
            and condition.size >= shortest,
            "as: a run on pixels has no latents; leave it out": condition.space is not None and not is_latent,
            "copies: a run on pixels draws a new mask each time; leave it out": isinstance(condition, MaskCondition)
            and condition.copies != MaskCondition(kind="mask").copies
            and not is_latent,
        }
        for problem, is_there in problems.items():
            if is_there:
                raise config_error(f"condition.{problem}")
        if self.quality is not None:
            raise config_error("preview.quality: it draws images from noise alone; leave it out where there is a condition")
        if not is_one_sheet:
            raise config_error("preview.sheets: images with a condition are shown on one sheet; leave it out")
        return self

    @pydantic.model_validator(mode="after")
    def _augmented(self) -> "DiffusionConfig":
        if self.augmentation is None:
            return self
        if self.image is None:
            raise config_error("augmentation: 2-D points are no images; leave it out")
        if getattr(self, "autoencoder", None) is None and self.augmentation.copies != AugmentationConfig().copies:
            raise config_error("augmentation.copies: a run on pixels transforms its images anew each time; leave it out")
        if self.augmentation.turns and (self.image.aspect is not None or self.image.sides[0] != self.image.sides[1]):
            raise config_error(
                "augmentation.turns: a quarter turn changes the shape of an image that is no square; leave it out"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _contrasted(self) -> "DiffusionConfig":
        if self.process.loss.contrast is not None and self.class_conditional is False:
            raise config_error("process.loss.contrast: it needs classes, and class_conditional is false; leave one of both out")
        return self

    @pydantic.model_validator(mode="after")
    def _stopped(self) -> "DiffusionConfig":
        if self.stop is not None and self.optimizer.schedule.kind != "wsd":
            raise config_error("stop: it begins the cooldown of a schedule that has one; set optimizer.schedule.kind to wsd")
        if self.stop is not None and self.held_out == 0:
            raise config_error("stop: it measures held-out images; set held_out to 0.05, say, or leave stop out")
        return self

    @property
    def uses_classes(self) -> bool:
        return self.class_conditional is not False or self.balance_classes


@config
class LatentConfig(DiffusionConfig):
    """The keys of a script that may train on latents of an `autoencoder`: a finished run of train_vae.py, or an autoencoder of
    diffusers (of both a folder, or a name on the hub). `latents` is the folder of the latent cache, which is made if it is
    missing (without it: in the autoencoder's run)."""

    autoencoder: str | None = resumable_field(None)
    latents: str | None = resumable_field(None)
    encode_batch_size: int = pydantic.Field(16, gt=0)


@config
class PairsConfig:
    """`count` pairs (source, sample) of the finished run `run` (at most one for each source that is learned from), made once,
    on all ranks, by `sampler`: its calls cost their time once, and what it draws is what is learned.

    Sec. 2.2, Liu et al. 2022, arXiv:2209.03003.
    """

    run: str
    count: int = pydantic.Field(20_000, ge=2)
    seed: int = pydantic.Field(1, ge=0, lt=2**32)
    sampler: SamplerConfig = SamplerConfig(solver="heun", steps=32)
    batch_size: int = pydantic.Field(64, ge=1, le=BLOCK)

    @pydantic.model_validator(mode="after")
    def _paired(self) -> "PairsConfig":
        if SOLVERS[self.sampler.solver].stochastic or self.sampler.eta:
            names = ", ".join(name for name, solver in SOLVERS.items() if not (solver.stochastic or solver.gaussian))
            raise config_error(f"sampler: noise on the way parts a source from its sample; use one of {names}, with eta 0")
        if self.sampler.stop_at is not None or self.sampler.double_sampling is not None:
            raise config_error("sampler: pairs are of a source and the end of its way; leave stop_at and double_sampling out")
        return self


Pairs = Annotated[Annotated[str | None, Tag("plain")] | Annotated[PairsConfig, Tag("object")], Discriminator(kind_of)]


@config
class BlendConfig(LatentConfig):
    """The keys of a run that blends a `source` with its data, or trains on the `pairs` of an earlier run. Images of the source
    are coupled with those of the data at random, or with `coupling` paired with those of the same names."""

    source: SourceEnd = GaussianSource(source="gaussian")
    coupling: Literal["random", "paired"] = "random"
    pairs: Pairs = None

    @pydantic.model_validator(mode="after")
    def _paired(self) -> "BlendConfig":
        if self.pairs is not None and self.condition is not None:
            raise config_error("condition: pairs of an earlier run have no condition; leave one of both out")
        if self.pairs is not None and self.stop is not None:
            raise config_error("stop: none of the pairs of an earlier run is held out; leave one of both out")
        if self.coupling == "paired" and (isinstance(self.source, GaussianSource) or self.image is None):
            raise config_error("coupling: only images of a source have partners of the same names; name a source of them")
        if self.noise.candidates > 1 and (self.pairs is not None or not isinstance(self.source, GaussianSource)):
            raise config_error("noise.candidates: only Gaussian noise is matched to images; leave it out with another source")
        if self.augmentation is not None and (self.pairs is not None or self.coupling == "paired"):
            raise config_error("augmentation: pairs would be torn apart; leave it out, or couple at random")
        if self.coupling == "paired" and self.pairs is not None:
            raise config_error("coupling: pairs of an earlier run are coupled already; leave one of both out")
        if self.coupling == "paired" and isinstance(self.condition, PairedCondition):
            raise config_error("coupling: data has the partners of its source, and cannot have those of a condition, too")
        return self
