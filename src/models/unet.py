"""The U-Net: one network whose options span guided-diffusion's, diffusers' UNet2DModel and the light one for latents."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Generic, Literal, Self, TypeVar, cast

import pydantic
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import config, config_error, resumable_field
from ..diffusion.augmentation import CODES
from .backbone import BACKBONES, Backbone
from .layers import (
    Attention,
    AttentionKind,
    Downsample,
    ResidualBlock,
    Upsample,
    channels_last,
    check_divides,
    embed_labels,
    sinusoidal_embedding,
    zeroed,
)


@config
class TimeEmbedding:
    """Sines and cosines of `scale` times the network's input for the time, in this order, then two linear layers.

    `frequency_shift` 1 makes the lowest frequency exactly 1/10000 (diffusers' `freq_shift`).
    """

    order: Literal["cos_sin", "sin_cos"] = "cos_sin"
    frequency_shift: float = 0.0
    scale: float = pydantic.Field(1.0, gt=0)


@config
class EncoderConfig:
    """The way down of the U-Net and of the noisy classifier."""

    base_channels: int = pydantic.Field(64, ge=1)
    channel_mult: tuple[float, ...] = pydantic.Field((1, 2, 2, 4), min_length=1)
    blocks: int = pydantic.Field(2, ge=1)
    attention: tuple[AttentionKind, ...] = ("none", "none", "full", "full")
    mid_attention: AttentionKind = "full"
    num_heads: int | None = pydantic.Field(None, ge=1)
    head_channels: int | None = pydantic.Field(None, ge=1)
    split_qkv_first: bool = True
    embedding: Literal["scale_shift", "add"] = "scale_shift"
    downsample: Literal["conv", "conv_right", "average", "max", "residual"] = "conv"
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    norm_groups: int = pydantic.Field(32, ge=1)
    norm_eps: float = pydantic.Field(1e-5, gt=0)
    time_embedding: TimeEmbedding = TimeEmbedding()
    gradient_checkpointing: bool = resumable_field(False)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.attention) != len(self.channel_mult):
            counts = f"attention has {len(self.attention)} entries and channel_mult {len(self.channel_mult)}"
            raise config_error(f"{counts}; give one of each for every resolution")
        if self.num_heads is not None and self.head_channels is not None:
            raise config_error("give num_heads or head_channels, not both")
        check_divides("norm_groups", self.norm_groups, self.widths, "a width of {} channels")
        check_divides(*self.of_heads, self.attended)
        return self

    @property
    def of_heads(self) -> tuple[str, int | None]:
        """The key that says how many heads there are, and its value."""
        return ("num_heads", self.num_heads) if self.num_heads else ("head_channels", self.head_channels)

    @property
    def widths(self) -> list[int]:
        return [int(self.base_channels * mult) for mult in self.channel_mult]

    @property
    def attended(self) -> list[int]:
        """The widths at which there is attention."""
        kinds = zip([*self.widths, self.widths[-1]], [*self.attention, self.mid_attention], strict=True)
        return [width for width, kind in kinds if kind != "none"]

    @property
    def skips(self) -> list[int]:
        """The channels of the outputs of the stem, each block and each resampling on the way down."""
        last = len(self.widths) - 1
        return [self.widths[0], *(width for i, width in enumerate(self.widths) for _ in range(self.blocks + (i < last)))]

    @property
    def factor(self) -> int:
        """The height and width of images must be divisible by this."""
        return 2 ** (len(self.channel_mult) - 1)

    def heads(self, channels: int) -> int:
        return self.num_heads or channels // (self.head_channels or channels)


@BACKBONES.add
@config
class UNetConfig(EncoderConfig, Backbone):
    """The architecture. `channel_mult` and `attention` have one entry for each resolution, the largest image first.

    Attention has `num_heads` heads or heads of `head_channels` channels; with neither, one head. `residual` resampling
    happens inside a residual block (guided-diffusion's `resblock_updown`); `conv_right` pads on the right and bottom alone,
    as the DDPM paper's network does. With `patch` p the network works on squares of p x p pixels as one position of p^2 times
    the channels, which costs a p^2-th: for large images. At 32 px it learned less in the same time than with single pixels.
    """

    kind: Literal["unet"] = "unet"
    upsample: Literal["conv", "nearest", "residual"] = "conv"
    patch: int = pydantic.Field(1, ge=1)

    @property
    def factor(self) -> int:
        return self.patch * super().factor

    @property
    def factor_keys(self) -> str:
        patches = " and model.patch" if self.patch > 1 else ""
        return f"{len(self.channel_mult)} entries of model.channel_mult{patches}"

    takes_augmentation = True

    def build(
        self,
        shape: Sequence[int],
        num_classes: int | None,
        *,
        learned: bool,
        null_class: bool,
        condition_channels: int,
        augmented: bool = False,
    ) -> "UNet":
        """In channels_last, which is faster."""
        channels = shape[0]
        options: dict[str, Any] = {"num_classes": num_classes, "null_class": null_class, "augmented": augmented}
        options |= {"out_channels": 2 * channels if learned else channels, "condition_channels": condition_channels}
        return channels_last(UNet(self, in_channels=channels, **options))


class Block(nn.Module):
    """A residual block and, where its resolution has it, attention."""

    def __init__(self, residual: ResidualBlock, attention: Attention | None = None) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention or nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class Stage(nn.Module):
    """The blocks of one resolution and the way to the next."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.resample = nn.ModuleList(blocks), resample


C = TypeVar("C", bound=EncoderConfig)


class Encoder(nn.Module, Generic[C]):
    """The part that the U-Net and the noisy classifier share: the embedding of the time (and of `num_labels` labels), the
    stem, the stages down and the middle."""

    def __init__(self, config: C, in_channels: int, num_labels: int | None = None) -> None:
        super().__init__()
        self.config: C = config
        self._norm = partial(nn.GroupNorm, config.norm_groups, eps=config.norm_eps)
        embedding = 4 * config.base_channels
        self.time_in, self.time_out = nn.Linear(config.base_channels, embedding), nn.Linear(embedding, embedding)
        self.label_embedding = nn.Embedding(num_labels, embedding) if num_labels is not None else None

        widths, channels = config.widths, config.widths[0]
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (width, kind) in enumerate(zip(widths, config.attention, strict=True)):
            blocks = [self._block(narrow, width, kind) for narrow in (channels, *[width] * (config.blocks - 1))]
            channels = width
            is_last = level == len(widths) - 1
            self.down.append(Stage(blocks, None if is_last else self._resample(Downsample, width, config.downsample)))
        self.mid = nn.ModuleList(self._block(channels, channels, kind) for kind in (config.mid_attention, "none"))

    def _block(self, narrow: int, wide: int, kind: str) -> Block:
        return Block(self._residual(narrow, wide), self._attention(wide, kind))

    def _residual(self, narrow: int, wide: int, resample: nn.Module | None = None) -> ResidualBlock:
        options: dict[str, Any] = {"scale_shift": self.config.embedding == "scale_shift", "dropout": self.config.dropout}
        return ResidualBlock(narrow, wide, 4 * self.config.base_channels, norm=self._norm, resample=resample, **options)

    def _attention(self, channels: int, kind: str) -> Attention | None:
        if kind == "none":
            return None
        spec, norm = self.config, self._norm
        return Attention(channels, kind=kind, heads=spec.heads(channels), split_qkv_first=spec.split_qkv_first, norm=norm)

    def _resample(self, layer: type[Downsample] | type[Upsample], channels: int, kind: str) -> nn.Module:
        if kind != "residual":
            return layer(channels, kind)
        return self._residual(channels, channels, layer(channels, "average" if layer is Downsample else "nearest"))

    def _embed_time(self, time: Tensor) -> Tensor:
        """(B,) -> (B, 4 base), before the SiLU."""
        spec, channels = self.config.time_embedding, self.config.base_channels
        time = time * spec.scale
        features = sinusoidal_embedding(time, channels, order=spec.order, frequency_shift=spec.frequency_shift)
        return self.time_out(F.silu(self.time_in(features.to(self.time_in.weight.dtype))))

    def _run(self, module: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """A block or a resampling; a resampling gets the embedding only where it is a residual block."""
        if not isinstance(module, Block | ResidualBlock):
            return module(h)
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, h, embedding, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return module(h, embedding)

    def _encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """The outputs of the stem, each block and each resampling on the way down (`config.skips` channels), and last that of
        the middle (B, base mult[-1], H / factor, W / factor)."""
        h = self.stem(x)  # (B, widths[0], H, W)
        features = [h]
        for stage in cast(Iterable[Stage], self.down):
            for module in (*stage.blocks, *([] if stage.resample is None else [stage.resample])):
                h = self._run(module, h, embedding)
                features.append(h)
        for block in self.mid:
            h = self._run(block, h, embedding)
        return [*features, h]


class UNet(Encoder[UNetConfig]):
    """network(x, time, labels=None, condition=None, augmentation=None): x (B, in_channels, H, W), time and labels (B,) ->
    (B, out_channels, H, W).

    With `num_classes` the labels are 0 .. num_classes - 1, and num_classes itself is the null class, which `labels=None`
    means; a network imported without one (`null_class=False`) must be given labels. Labels may be weights (B, classes) that
    blend them. With `condition_channels` it sees a `condition` (B, condition_channels, h, w), such as the small image that it
    makes larger, beside `x`, resized to its size; a ValueError says where a condition is missing or not wanted. An
    `augmented` network is told by `augmentation` (B, CODES) what was done to its images; without it, nothing was. Ho et al.
    2020, arXiv:2006.11239; Dhariwal & Nichol 2021, arXiv:2105.05233.
    """

    fsdp_blocks = ("Block", "ResidualBlock")

    def __init__(
        self,
        config: UNetConfig,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        num_classes: int | None = None,
        null_class: bool = True,
        condition_channels: int = 0,
        augmented: bool = False,
    ) -> None:
        area, num_labels = config.patch**2, num_classes + null_class if num_classes is not None else None
        super().__init__(config, area * (in_channels + condition_channels), num_labels)
        self.num_classes, self.null_class, self.condition_channels = num_classes, null_class, condition_channels

        channels, skips = config.widths[-1], config.skips
        self.up = nn.ModuleList()  # the smallest image first
        for level, (width, kind) in reversed(list(enumerate(zip(config.widths, config.attention, strict=True)))):
            blocks = [self._block(narrow + skips.pop(), width, kind) for narrow in (channels, *[width] * config.blocks)]
            channels = width
            self.up.append(Stage(blocks, self._resample(Upsample, width, config.upsample) if level > 0 else None))

        self.head_norm = self._norm(channels)
        self.head = zeroed(nn.Conv2d(channels, area * (out_channels or in_channels), 3, padding=1))
        self.augmentation = nn.Linear(CODES, 4 * config.base_channels, bias=False) if augmented else None

    def _embed(self, time: Tensor, labels: Tensor | None, augmentation: Tensor | None) -> Tensor:
        embedding = self._embed_time(time)
        if self.label_embedding is not None:
            if labels is None:
                if not self.null_class:
                    raise ValueError("this network has no null class: it must be given labels")
                labels = torch.full(time.shape, self.num_classes or 0, device=time.device)
            embedding = embedding + embed_labels(self.label_embedding, labels)
        elif labels is not None:
            raise ValueError("this network has no classes: labels must be None")
        if augmentation is not None:
            if self.augmentation is None:
                raise ValueError("this network is told nothing of augmentation: augmentation must be None")
            embedding = embedding + self.augmentation(augmentation.to(self.augmentation.weight.dtype))
        return F.silu(embedding)

    def _beside(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x and the condition, resized to it: (B, in_channels + condition_channels, H, W)."""
        if condition is None and self.condition_channels:
            raise ValueError("this network draws images from a condition: it must be given one")
        if condition is not None and not self.condition_channels:
            raise ValueError("this network takes no condition: condition must be None")
        if condition is None:
            return x
        if condition.shape[2:] != x.shape[2:]:
            condition = F.interpolate(condition, x.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([x, condition.to(x.dtype)], dim=1)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        embedding = self._embed(time, labels, augmentation)  # (B, 4 base)
        p, x = self.config.patch, self._beside(x, condition)
        x = x if p == 1 else rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        *skips, h = self._encode(x, embedding)
        for stage in cast(Iterable[Stage], self.up):
            for block in stage.blocks:
                h = self._run(block, torch.cat([h, skips.pop()], dim=1), embedding)
            if stage.resample is not None:
                h = self._run(stage.resample, h, embedding)
        out = self.head(F.silu(self.head_norm(h)))
        return out if p == 1 else rearrange(out, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)  # (B, out_channels, H, W)
