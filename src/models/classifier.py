"""The noisy classifier: the encoder half of the U-Net, and a pool over its features."""

from typing import Literal, Self

import pydantic
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import UserError, config
from ..config.sizes import Sides, is_divisible, sides_of
from .layers import check_divides, zeroed
from .unet import Encoder, EncoderConfig

HIDDEN = 2048  # of the spatial pool, as guided-diffusion has it


@config
class ClassifierConfig(EncoderConfig):
    """The architecture: the U-Net's keys for the way down and the middle, with guided-diffusion's choices for a classifier
    (heads of 64 channels; to give `num_heads`, set `head_channels` to null), and the pool.

    `adaptive` is a linear layer on the mean of the middle; `attention` lets the mean attend to the middle's pixels, whose
    number is fixed; `spatial` is two linear layers on the means of all that the encoder computes.
    """

    head_channels: int | None = pydantic.Field(64, ge=1)
    split_qkv_first: bool = False
    downsample: Literal["conv", "conv_right", "average", "max", "residual"] = "residual"
    pool: Literal["attention", "adaptive", "spatial"] = "attention"

    @pydantic.model_validator(mode="after")
    def _pool_fits(self) -> Self:
        if self.pool == "attention":
            check_divides(*self.of_heads, self.widths[-1:], "{} channels that are pooled")
        return self


class AttentionPool(nn.Module):
    """(B, C, h, w) -> (B, out_channels): the mean of the pixels is one more token, which attends to all of them.

    Each token has a learned position, so h and w are fixed. Sec. 2.3, Radford et al. 2021, arXiv:2103.00020.
    """

    def __init__(self, channels: int, pixels: int, out_channels: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, pixels + 1) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(x, "b c h w -> b (h w) c")
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # (B, 1 + N, C)
        tokens = tokens + self.positional_embedding.T
        q, k, v = rearrange(self.qkv(tokens), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # (B, heads, 1, d): the other tokens are not read
        return self.out(rearrange(pooled, "b heads 1 d -> b (heads d)"))


class Classifier(Encoder[ClassifierConfig]):
    """network(x, time): x (B, in_channels, *image_size), time (B,) -> logits (B, num_classes); `image_size` is (height, width),
    or the side of a square.

    A UserError says where image_size does not fit the architecture, a ValueError where x has not the size that the attention
    pool has learned.
    Sec. 4, Dhariwal & Nichol 2021, arXiv:2105.05233.
    """

    def __init__(self, config: ClassifierConfig, *, in_channels: int = 3, image_size: int | Sides, num_classes: int) -> None:
        super().__init__(config, in_channels)
        height, width = sides_of(image_size)
        if min(height, width) < 1 or not is_divisible(image_size, config.factor):
            raise UserError(f"image_size {image_size} is not divisible by {config.factor}, the classifier's down-sampling")
        self.pool, self.image_size, self.num_classes = config.pool, (height, width), num_classes
        channels = config.widths[-1]
        self.head_norm = self._norm(channels) if config.pool != "spatial" else None
        if config.pool == "spatial":
            features = sum(config.skips) + channels
            self.head = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_classes))
        elif config.pool == "adaptive":
            self.head = zeroed(nn.Linear(channels, num_classes))
        else:
            pixels = height * width // config.factor**2
            self.head = AttentionPool(channels, pixels, num_classes, heads=config.heads(channels))

    @property
    def last_layer(self) -> str:
        """The beginning of the names of the parameters that compute logits from features."""
        return {"spatial": "head.2.", "adaptive": "head.", "attention": "head.out."}[self.pool]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if self.pool == "attention" and x.shape[2:] != self.image_size:
            height, width = self.image_size
            raise ValueError(f"this classifier sees images of {height} x {width} px, not {x.shape[2]} x {x.shape[3]}")
        features = self._encode(x, F.silu(self._embed_time(time)))
        if self.head_norm is None:
            return self.head(torch.cat([h.mean(dim=(2, 3)) for h in features], dim=1))
        h = F.silu(self.head_norm(features[-1]))  # (B, base mult[-1], h, w)
        return self.head(h.mean(dim=(2, 3)) if self.pool == "adaptive" else h)
