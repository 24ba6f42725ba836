"""The U-Net: one network whose options span guided-diffusion's, diffusers' UNet2DModel and the light one for latents."""

from collections.abc import Iterable
from typing import Literal, cast

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import config, free, wrong
from .layers import Attention, AttentionKind, Downsample, ResidualBlock, Upsample, sinusoidal_embedding, zeroed


@config
class TimeEmbedding:
    """Sines and cosines of `scale` times what the process feeds, in this order, then two linear layers.

    `frequency_shift` 1 makes the lowest frequency exactly 1/10000 (diffusers' `freq_shift`).
    """

    order: Literal["cos_sin", "sin_cos"] = "cos_sin"
    frequency_shift: float = 0.0
    scale: float = pydantic.Field(1.0, gt=0)


@config
class UNetConfig:
    """The architecture. `channel_mult` and `attention` have one entry for each resolution, the largest picture first.

    Attention has `num_heads` heads or heads of `head_channels` channels; with neither, one head. `residual` resampling
    happens inside a residual block (guided-diffusion's `resblock_updown`); `conv_right` pads on the right and bottom alone,
    as the DDPM paper's network does.
    """

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
    upsample: Literal["conv", "nearest", "residual"] = "conv"
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    norm_groups: int = pydantic.Field(32, ge=1)
    norm_eps: float = pydantic.Field(1e-5, gt=0)
    time_embedding: TimeEmbedding = TimeEmbedding()
    gradient_checkpointing: bool = free(False)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "UNetConfig":
        if len(self.attention) != len(self.channel_mult):
            raise wrong(
                f"attention has {len(self.attention)} entries and channel_mult {len(self.channel_mult)}; "
                "give one of each for every resolution"
            )
        if self.num_heads is not None and self.head_channels is not None:
            raise wrong("give num_heads or head_channels, not both")
        attended = [width for width, kind in zip(self.widths, self.attention, strict=True) if kind != "none"]
        attended += [self.widths[-1]] if self.mid_attention != "none" else []
        for channels in self.widths:
            if channels < 1 or channels % self.norm_groups:
                raise wrong(f"norm_groups {self.norm_groups} does not divide a width of {channels} channels")
        for channels in attended:
            if channels % (self.num_heads or self.head_channels or 1):
                key = "num_heads" if self.num_heads else "head_channels"
                raise wrong(f"{key} {self.num_heads or self.head_channels} does not divide {channels} channels")
        return self

    @property
    def widths(self) -> list[int]:
        return [int(self.base_channels * mult) for mult in self.channel_mult]

    @property
    def factor(self) -> int:
        """Pictures must be divisible by this."""
        return 2 ** (len(self.channel_mult) - 1)

    def heads(self, channels: int) -> int:
        if self.num_heads is not None:
            return self.num_heads
        return channels // self.head_channels if self.head_channels is not None else 1


class Block(nn.Module):
    """A residual block and, where its resolution has it, attention."""

    def __init__(self, residual: ResidualBlock, attention: Attention | None = None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention if attention is not None else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class Stage(nn.Module):
    """The blocks of one resolution and the way to the next."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks: nn.ModuleList = nn.ModuleList(blocks)
        self.resample: nn.Module | None = resample


class UNet(nn.Module):
    """network(x, time, labels=None): x (B, in_channels, H, W), time (B,), labels (B,) -> (B, out_channels, H, W).

    With `num_classes` the labels are 0 .. num_classes - 1, and num_classes itself is the null class, which `labels=None`
    means; a network imported without one (`null_class=False`) must be given labels.
    Ho et al. 2020, arXiv:2006.11239; Dhariwal & Nichol 2021, arXiv:2105.05233.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        num_classes: int | None = None,
        null_class: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.null_class = null_class
        base, embedding = config.base_channels, 4 * config.base_channels
        self.time_in = nn.Linear(base, embedding)
        self.time_out = nn.Linear(embedding, embedding)
        self.label_embedding = nn.Embedding(num_classes + null_class, embedding) if num_classes is not None else None

        def residual(narrow: int, wide: int, resample: nn.Module | None = None) -> ResidualBlock:
            return ResidualBlock(
                narrow,
                wide,
                embedding,
                scale_shift=config.embedding == "scale_shift",
                dropout=config.dropout,
                groups=config.norm_groups,
                eps=config.norm_eps,
                resample=resample,
            )

        def attention(channels: int, kind: str) -> Attention | None:
            if kind == "none":
                return None
            return Attention(
                channels,
                kind=kind,
                heads=config.heads(channels),
                split_qkv_first=config.split_qkv_first,
                groups=config.norm_groups,
                eps=config.norm_eps,
            )

        def resample(channels: int, down: bool) -> nn.Module:
            if (config.downsample if down else config.upsample) == "residual":
                return residual(channels, channels, Downsample(channels, "average") if down else Upsample(channels, "nearest"))
            return Downsample(channels, config.downsample) if down else Upsample(channels, config.upsample)

        levels = list(zip(config.widths, config.attention, strict=True))
        last = len(levels) - 1
        self.stem = nn.Conv2d(in_channels, levels[0][0], 3, padding=1)
        self.down = nn.ModuleList()
        channels, skips = levels[0][0], [levels[0][0]]
        for level, (width, kind) in enumerate(levels):
            blocks = []
            for _ in range(config.blocks):
                blocks.append(Block(residual(channels, width), attention(width, kind)))
                channels = width
                skips.append(channels)
            self.down.append(Stage(blocks, resample(channels, down=True) if level < last else None))
            if level < last:
                skips.append(channels)

        self.mid = nn.ModuleList(
            [
                Block(residual(channels, channels), attention(channels, config.mid_attention)),
                Block(residual(channels, channels)),
            ]
        )

        self.up = nn.ModuleList()  # the smallest picture first
        for level, (width, kind) in reversed(list(enumerate(levels))):
            blocks = []
            for _ in range(config.blocks + 1):
                blocks.append(Block(residual(channels + skips.pop(), width), attention(width, kind)))
                channels = width
            self.up.append(Stage(blocks, resample(channels, down=False) if level > 0 else None))

        self.head_norm = nn.GroupNorm(config.norm_groups, channels, eps=config.norm_eps)
        self.head = zeroed(nn.Conv2d(channels, out_channels or in_channels, 3, padding=1))

    def _embed(self, time: Tensor, labels: Tensor | None) -> Tensor:
        spec = self.config.time_embedding
        features = sinusoidal_embedding(
            time * spec.scale, self.config.base_channels, order=spec.order, frequency_shift=spec.frequency_shift
        )
        embedding = self.time_out(F.silu(self.time_in(features.to(self.time_in.weight.dtype))))
        if self.label_embedding is not None:
            if labels is None:
                if not self.null_class:
                    raise ValueError("this network has no null class: it must be given labels")
                labels = torch.full(time.shape, self.num_classes or 0, device=time.device)
            embedding = embedding + self.label_embedding(labels)
        elif labels is not None:
            raise ValueError("this network has no classes: labels must be None")
        return F.silu(embedding)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self._embed(time, labels)  # (B, 4 base)

        def run(block: nn.Module, h: Tensor) -> Tensor:
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, h, embedding, use_reentrant=False)  # pyright: ignore[reportReturnType]
            return block(h, embedding)

        def step(resample: nn.Module, h: Tensor) -> Tensor:
            return run(resample, h) if isinstance(resample, ResidualBlock) else resample(h)

        h = self.stem(x)  # (B, widths[0], H, W)
        skips = [h]
        for stage in cast(Iterable[Stage], self.down):
            for block in stage.blocks:
                h = run(block, h)
                skips.append(h)
            if stage.resample is not None:
                h = step(stage.resample, h)
                skips.append(h)
        for block in self.mid:
            h = run(block, h)  # (B, base mult[-1], H / factor, W / factor)
        for stage in cast(Iterable[Stage], self.up):
            for block in stage.blocks:
                h = run(block, torch.cat([h, skips.pop()], dim=1))
            if stage.resample is not None:
                h = step(stage.resample, h)
        return self.head(F.silu(self.head_norm(h)))  # (B, out_channels, H, W)
