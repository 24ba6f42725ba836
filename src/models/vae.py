"""The autoencoder: residual blocks and linear attention down to a small latent image, and back."""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, cast

import pydantic
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import config, config_error, resumable_field
from ..config.sizes import Sides, sides_of
from .layers import Attention, AttentionKind, Downsample, ResidualBlock, Upsample, check_divides


@config
class KLBottleneck:
    """A Gaussian at every latent position, held near N(0, I) by the KL term (Kingma & Welling 2013, arXiv:1312.6114)."""

    kind: Literal["kl"]


@config
class VQBottleneck:
    """A codebook of `codes` vectors that follows the encoder by moving averages (van den Oord et al. 2017, arXiv:1711.00937).

    `commitment` weighs the encoder's distance to its codes. A code used less than `revive_below` times as often as the
    average one is dead, and takes the place of a vector of the current batch.
    """

    kind: Literal["vq"]
    codes: int = pydantic.Field(1024, ge=2)
    commitment: float = pydantic.Field(0.25, ge=0)
    decay: float = pydantic.Field(0.99, gt=0, lt=1)
    revive_below: float = pydantic.Field(0.03, ge=0, lt=1)


@config
class VAEConfig:
    """The architecture. `widths` has one entry for each resolution, the largest image first: n of them make the latent
    image 2^(n-1) times smaller. `attention` has one entry for each as well; without it there is attention in the middle
    alone. `downsample` is pooling (average, max) or a strided convolution (conv). `upsample` is nearest or bilinear, followed
    by a convolution, or a transposed convolution (transposed). The pair of conv and transposed is there to compare with older
    networks: it leaves checkerboards (Odena et al. 2016, distill.pub/2016/deconv-checkerboard).
    """

    widths: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = pydantic.Field((64, 128, 256, 512), min_length=1)
    latent_channels: int = pydantic.Field(4, ge=1)
    blocks: int = pydantic.Field(2, ge=1)
    attention: tuple[AttentionKind, ...] | None = None
    mid_attention: AttentionKind = "linear"
    head_channels: int | None = pydantic.Field(None, ge=1)
    downsample: Literal["average", "max", "conv"] = "average"
    upsample: Literal["nearest", "bilinear", "transposed"] = "nearest"
    norm_groups: int = pydantic.Field(8, ge=1)
    bottleneck: Annotated[KLBottleneck | VQBottleneck, pydantic.Field(discriminator="kind")] = pydantic.Field(
        default_factory=lambda: KLBottleneck(kind="kl")
    )
    gradient_checkpointing: bool = resumable_field(False)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "VAEConfig":
        if len(self.kinds) != len(self.widths):
            counts = f"attention has {len(self.kinds)} entries and widths {len(self.widths)}"
            raise config_error(f"{counts}; give one for each resolution")
        check_divides("norm_groups", self.norm_groups, self.widths, "a width of {} channels")
        kinds = zip([*self.widths, self.widths[-1]], [*self.kinds, self.mid_attention], strict=True)
        check_divides("head_channels", self.head_channels, [width for width, kind in kinds if kind != "none"])
        return self

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        return self.attention if self.attention is not None else ("none",) * len(self.widths)

    @property
    def factor(self) -> int:
        """How many times smaller the latent image is, in height and in width."""
        return 2 ** (len(self.widths) - 1)

    def norm(self, channels: int) -> nn.Module:
        return nn.GroupNorm(self.norm_groups, channels, eps=1e-6)

    def latent_shape(self, size: int | Sides) -> tuple[int, int, int]:
        """(D, h, w) of the latents of images of this size."""
        height, width = sides_of(size)
        return self.latent_channels, height // self.factor, width // self.factor


class Reconstruction(NamedTuple):
    """What one pass gives: images (B, C, H, W); mean and, of a `kl` bottleneck, logvar (B, D, h, w); of a `vq` one the codes
    used, (B, h, w) int64."""

    images: Tensor
    mean: Tensor
    logvar: Tensor | None
    codes: Tensor | None


def _level(spec: VAEConfig, narrow: int, wide: int, kind: AttentionKind) -> list[nn.Module]:
    """The blocks of one resolution, and its attention."""
    return [_block(spec, narrow if i == 0 else wide, wide) for i in range(spec.blocks)] + _attention(spec, wide, kind)


def _middle(spec: VAEConfig, width: int) -> list[nn.Module]:
    return [_block(spec, width, width), *_attention(spec, width, spec.mid_attention), _block(spec, width, width)]


def _block(spec: VAEConfig, narrow: int, wide: int) -> nn.Module:
    return ResidualBlock(narrow, wide, None, norm=spec.norm)


def _attention(spec: VAEConfig, width: int, kind: AttentionKind) -> list[nn.Module]:
    heads = width // (spec.head_channels or width)
    attention = Attention(width, kind=kind, heads=heads, split_qkv_first=True, norm=spec.norm)
    return [attention] if kind != "none" else []  # always built: a seed's weights depend on the random numbers it draws


class _Layers(nn.Module):
    """Layers one after the other; with `recompute` each is computed again in the backward pass, which saves memory."""

    def __init__(self, layers: list[nn.Module], *, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            recomputes = self.recompute and torch.is_grad_enabled()
            x = cast(Tensor, checkpoint(layer, x, use_reentrant=False) if recomputes else layer(x))
        return x


class Codebook(nn.Module):
    """`codes` vectors of `channels` numbers. They are buffers: they follow the encoder's outputs and get no gradient."""

    codebook: Tensor
    size: Tensor
    total: Tensor

    def __init__(self, spec: VQBottleneck, channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("codebook", torch.randn(spec.codes, channels))
        self.register_buffer("size", torch.zeros(spec.codes))  # moving average of how often a code is used
        self.register_buffer("total", torch.zeros(spec.codes, channels))  # and of the sum of the vectors it stood for

    def nearest(self, z: Tensor) -> Tensor:
        """(B, D, h, w) -> the numbers (B, h, w) of the nearest codes, in at least float32."""
        with torch.autocast(z.device.type, enabled=False):
            rows = rearrange(z.to(self.codebook.dtype), "b d h w -> (b h w) d")  # (N, D)
            distance = self.codebook.square().sum(1) - 2 * rows @ self.codebook.T  # + |z|^2, the same for all codes
            return rearrange(distance.argmin(1), "(b h w) -> b h w", b=len(z), h=z.shape[2])

    def look_up(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, D, h, w)."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    @torch.no_grad()
    def statistics(self, z: Tensor, codes: Tensor, image: Tensor, place: Tensor) -> Tensor:
        """What the codebook learns from a batch, (codes, 1 + 2 D): uses, sum of the vectors, and a candidate for a dead code.

        Sums of these over micro-batches and devices are those of the whole batch. The candidate of code k is the vector at
        `place` (codes,) of the image number `image` (codes,) of this micro-batch; an image outside of it adds nothing.
        """
        rows = rearrange(z.to(self.codebook.dtype), "b d h w -> b (h w) d")  # (B, N, D)
        used = F.one_hot(codes.flatten(), len(self.codebook)).to(rows.dtype)  # (B N, codes)
        total = used.T @ rearrange(rows, "b n d -> (b n) d")
        ours = (image >= 0) & (image < len(rows))
        candidates = rows[image.clamp(0, len(rows) - 1), place] * ours[:, None]
        return torch.cat([used.sum(0)[:, None], total, candidates], dim=1)

    @torch.no_grad()
    def update(self, statistics: Tensor, counts: Tensor) -> None:
        """Follow a batch's `statistics`, unless `counts` () bool says that its step did not (Eq. 6-8, App. A.1,
        arXiv:1711.00937)."""
        uses, total, candidates = statistics.split([1, self.codebook.shape[1], self.codebook.shape[1]], dim=1)
        decay = self.spec.decay
        size = decay * self.size + (1 - decay) * uses[:, 0]
        sums = decay * self.total + (1 - decay) * total
        average = size.mean()
        dead = size <= self.spec.revive_below * average
        size = torch.where(dead, average, size)
        sums = torch.where(dead[:, None], candidates * average, sums)
        self.size.copy_(torch.where(counts, size, self.size))
        self.total.copy_(torch.where(counts, sums, self.total))
        self.codebook.copy_(torch.where(counts, sums / size[:, None].clamp(min=1e-12), self.codebook))

    def usage(self) -> dict[str, float]:
        """`code_perplexity`, as of how many codes are used evenly, and `codes_used`, the share used at more than a
        tenth of that."""
        p = self.size.double() / self.size.double().sum().clamp(min=1e-12)
        perplexity = torch.exp(-(p * p.clamp(min=1e-12).log()).sum())
        return {"code_perplexity": float(perplexity), "codes_used": float((p > 0.1 / perplexity).double().mean())}


class VAE(nn.Module):
    """forward(images (B, C, H, W), noise (B, D, h, w), transform=None) -> Reconstruction; h = H / factor.

    With a `transform` of (B, D, h, w) the decoder is given the transformed latents, and the images have their sides times the
    factor; mean, logvar and codes are those before it.

    `tanh` bounds its images to (-1, 1). It is an attribute and no part of the architecture, since a later stage turns it on.
    """

    def __init__(self, spec: VAEConfig, channels: int) -> None:
        super().__init__()
        self.spec, self.tanh = spec, False
        self.vq = isinstance(spec.bottleneck, VQBottleneck)
        widths, last = spec.widths, len(spec.widths) - 1

        down: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1)]
        for i, (width, kind) in enumerate(zip(widths, spec.kinds, strict=True)):
            down += _level(spec, widths[max(0, i - 1)], width, kind)
            down += [Downsample(width, spec.downsample)] if i < last else []
        moments = spec.latent_channels * (1 if self.vq else 2)
        out = [spec.norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], moments, 3, padding=1)]
        self.encoder = _Layers([*down, *_middle(spec, widths[-1]), *out], recompute=spec.gradient_checkpointing)

        self.codebook = Codebook(spec.bottleneck, spec.latent_channels) if isinstance(spec.bottleneck, VQBottleneck) else None
        inside = [nn.Conv2d(spec.latent_channels, widths[-1], 3, padding=1), *_middle(spec, widths[-1])]
        self.middle = _Layers(inside, recompute=spec.gradient_checkpointing)
        up: list[nn.Module] = []
        kind = "transposed" if spec.upsample == "transposed" else "conv"
        for i in reversed(range(len(widths))):
            up += _level(spec, widths[min(last, i + 1)], widths[i], spec.kinds[i])
            up += [Upsample(widths[i], kind, spec.upsample)] if i > 0 else []
        up += [spec.norm(widths[0]), nn.SiLU()]
        self.up = _Layers(up, recompute=spec.gradient_checkpointing)
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)

    @property
    def to_moments(self) -> nn.Conv2d:
        """The encoder's last layer."""
        return cast(nn.Conv2d, self.encoder.layers[-1])

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """mean and logvar (B, D, h, w) of the latents of images (B, C, H, W); no logvar with a codebook."""
        moments = self.encoder(images)
        if self.vq:
            return moments, None
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def _draw(self, h: Tensor) -> Tensor:
        images = self.last(self.up(h))
        return images.tanh() if self.tanh else images

    def forward(self, images: Tensor, noise: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> Reconstruction:
        mean, logvar = self.moments(images)
        codes = None
        if self.codebook is not None:
            codes = of_z = self.codebook.nearest(mean)
            z = mean
            if transform is not None:  # before the codes are looked up, so that the decoder is given vectors of the codebook
                z = transform(mean)
                of_z = self.codebook.nearest(z)
            z = z + (self.codebook.look_up(of_z).to(z.dtype) - z).detach()  # the gradient goes straight through
        else:
            assert logvar is not None
            z = mean + (0.5 * logvar).exp() * noise
            z = z if transform is None else transform(z)
        return Reconstruction(self._draw(self.middle(z)), mean, logvar, codes)

    def decode(self, z: Tensor, tile: int | None = 64) -> Tensor:
        """(B, D, h, w) -> (B, C, H, W); a codebook's vectors are looked up first.

        A latent image larger than `tile` is decoded in overlapping tiles that fade into each other. This begins after the
        middle, where attention reads all of it: memory stays that of a tile and there are no seams. Group norms see one tile
        at a time, so contrast may differ a little from that of the whole image decoded at once.
        """
        if self.codebook is not None:
            z = self.codebook.look_up(self.codebook.nearest(z)).to(z.dtype)
        h = self.middle(z)
        if tile is None or max(h.shape[2:]) <= tile:
            return self._draw(h)
        factor, fade = self.spec.factor, max(1, tile // 4)
        rows, columns = (_starts(length, tile, max(1, tile - fade)) for length in h.shape[2:])
        images = h.new_zeros(h.shape[0], self.last.out_channels, h.shape[2] * factor, h.shape[3] * factor)
        weight = images.new_zeros(images.shape[2:])
        for top in rows:
            for left in columns:
                part = self._draw(h[:, :, top : top + tile, left : left + tile])
                images, weight = images.to(part), weight.to(part)  # autocast may have another dtype than h
                ramp = (_ramp(part.shape[2], fade * factor)[:, None] * _ramp(part.shape[3], fade * factor)).to(part)
                place = (slice(top * factor, top * factor + part.shape[2]), slice(left * factor, left * factor + part.shape[3]))
                images[(..., *place)] += part * ramp
                weight[place] += ramp
        return images / weight


def _starts(length: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin that cover `length`; the last ends with it."""
    return [*range(0, length - tile, stride), max(0, length - tile)]


def _ramp(length: int, fade: int) -> Tensor:
    """1 in the middle, falling along half a sine to near 0 over `fade` pixels at both ends: a tile's border, which saw no
    neighbours, hardly counts."""
    at = torch.arange(length, dtype=torch.float64)
    nearness = ((torch.minimum(at, length - 1 - at) + 0.5) / fade).clamp(max=1)
    return (0.5 * torch.pi * nearness).sin().square()
