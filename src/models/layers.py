"""The layers that the networks are built of."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import config_error

M = TypeVar("M", bound=nn.Module)
AttentionKind = Literal["none", "full", "linear"]
Norm = Callable[[int], nn.Module]  # the normalisation of a number of channels


def check_divides(key: str, number: int | None, channels: Iterable[int], what: str = "{} channels") -> None:
    """An error of a config where the `number` of its `key` (None is 1) does not divide one of these numbers of channels."""
    for count in channels:
        if count < 1 or count % (number or 1):
            raise config_error(f"{key} {number} does not divide {what.format(count)}")


def zeroed(module: nn.Module) -> nn.Module:
    """The module with its parameters set to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def embed_labels(embedding: nn.Embedding, labels: Tensor) -> Tensor:
    """(B,) class numbers, or (B, rows) weights of the embedding's rows -> (B, channels): weights blend classes."""
    return labels @ embedding.weight if labels.is_floating_point() else embedding(labels)


def channels_last(module: M) -> M:
    """The module with its weights laid out for images whose channels lie side by side in memory, which is faster."""
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def sinusoidal_embedding(time: Tensor, channels: int, *, order: str, frequency_shift: float) -> Tensor:
    """(B,) -> (B, channels): cosines and sines of time at frequencies 10000^(-k / (channels / 2 - frequency_shift)).

    Sec. 3.5, Vaswani et al. 2017, arXiv:1706.03762.
    """
    half = channels // 2
    k = torch.arange(half, dtype=torch.float32, device=time.device)
    frequencies = torch.exp(-math.log(10000) * k / (half - frequency_shift))
    angles = time[:, None] * frequencies.to(time.dtype)  # (B, channels / 2)
    parts = (angles.cos(), angles.sin()) if order == "cos_sin" else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


class Downsample(nn.Module):
    """Halve height and width: a strided convolution (padded on both sides, or on the right and bottom), or pooling."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("conv", "conv_right"):
            self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if kind == "conv" else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("conv", "conv_right"):
            return self.conv(x if self.kind == "conv" else F.pad(x, (0, 1, 0, 1)))
        return F.max_pool2d(x, 2) if self.kind == "max" else F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Double height and width by repeating pixels (`mode` nearest) or between them (bilinear), then, where `kind` is `conv`,
    a 3x3 convolution. The `kind` transposed is a transposed 4x4 convolution instead."""

    def __init__(self, channels: int, kind: str, mode: str = "nearest") -> None:
        super().__init__()
        self.kind, self.mode = kind, mode
        if kind == "transposed":
            self.conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1) if kind == "conv" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "transposed":
            return self.conv(x)
        return self.conv(F.interpolate(x, scale_factor=2, mode=self.mode))


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a shortcut; the embedding is added or scales and shifts the second norm (with
    `embedding_channels` None there is none).

    `resample` (down, up) halves or doubles the image inside the block, in branch and shortcut alike.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int | None,
        *,
        norm: Norm,
        scale_shift: bool = False,
        dropout: float = 0.0,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm_1 = norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        embedded = out_channels * (2 if scale_shift else 1)
        self.embed = nn.Linear(embedding_channels, embedded) if embedding_channels is not None else None
        self.norm_2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.resample = resample or nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), embedding (B, E), already through SiLU -> (B, out, H', W')."""
        h = self.conv_1(self.resample(F.silu(self.norm_1(x))))  # (B, out, H', W')
        e = self.embed(embedding)[:, :, None, None] if self.embed is not None else 0  # (B, out or 2 out, 1, 1)
        if self.scale_shift and isinstance(e, Tensor):
            scale, shift = e.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_2(h), 1 + scale)
        else:
            h = self.norm_2(h + e)
        return self.skip(self.resample(x)) + self.conv_2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over the pixels, around a shortcut.

    `full` is softmax attention. `linear` costs O(pixels): softmax over the channels of q and over the positions of k, then
    q (k^T v) (Eq. 4, Shen et al. 2018, arXiv:1812.01243). `split_qkv_first` says whether the projection's channels are
    laid out (3, heads, d) or (heads, 3, d).
    """

    def __init__(self, channels: int, *, kind: str, heads: int, split_qkv_first: bool, norm: Norm) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.layout = "(three heads d)" if split_qkv_first else "(heads three d)"
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")  # (B, N, C)
        layout = f"b n {self.layout} -> three b heads n d"
        q, k, v = rearrange(self.qkv(tokens), layout, three=3, heads=self.heads)  # each (B, heads, N, d)
        if self.kind == "full":
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            context = k.softmax(dim=-2).transpose(-2, -1) @ v  # (B, heads, d, d)
            mixed = q.softmax(dim=-1) @ context
        mixed = self.out(rearrange(mixed, "b heads n d -> b n (heads d)"))
        return x + rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2])


def area_means(x: Tensor, sides: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, h, w): each new pixel is the mean of the area that it covers. Two products with matrices, so that
    the gradient is the same to the bit on every device, unlike that of torch's own resizing."""
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (_shares(old, new).to(x) for old, new in zip(x.shape[2:], sides, strict=True))
        return rows @ x @ columns.T


def _shares(old: int, new: int) -> Tensor:
    """(new, old) float64: the share of each of `old` pixels in each of the `new` ones that cover the same length."""
    edges = torch.arange(new + 1, dtype=torch.float64)[:, None] * (old / new)
    at = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:], at + 1) - torch.maximum(edges[:-1], at)
    return overlap.clamp(min=0) * (new / old)
