"""The losses of the autoencoder: reconstruction, the KL of its latents, a perceptual distance, and the discriminator's.

Every function gives one number per image, (B,), so that a batch may be split into any parts.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UserError, config, config_error, resumable_field
from .config.packages import needed
from .config.sizes import Sides, describe_size, sides_of
from .models.layers import area_means
from .models.pretrained import efficientnet_lite0, find_weights, import_torchvision, random_convolutions, timm_network
from .storage.weight_files import put_weights, read_weights

AdversarialKind = Literal["hinge", "vanilla"]
PAIRED_SIDE = 16  # the most areas down and across of which an alignment compares all pairs
LPIPS_BACKBONES = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights"}


def reconstruction_loss(kind: str, reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B, C, H, W) twice -> (B,): the mean over pixels and channels of |reconstruction - images| (l1) or its square (mse)."""
    difference = reconstruction.to(images.dtype) - images
    return (difference.abs() if kind == "l1" else difference.square()).flatten(1).mean(1)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)) in nats, the mean over latent dimensions: (B, D, h, w) twice -> (B,).

    App. B, Kingma & Welling 2013, arXiv:1312.6114.
    """
    mean, logvar = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (mean, logvar))
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


def commitment_loss(mean: Tensor, vectors: Tensor) -> Tensor:
    """The mean squared distance of the encoder's output to its codes' vectors, (B, D, h, w) twice -> (B,); gradients reach
    the encoder alone (Eq. 3, arXiv:1711.00937)."""
    return (mean - vectors.detach()).square().flatten(1).mean(1)


def alignment_loss(latents: Tensor, projected: Tensor, features: Tensor, margin: float, distance_margin: float) -> Tensor:
    """How far latents z (B, D, h, w) are from features f (B, F, h', w') of their images, which are resized to h x w: (B,), the
    mean over positions i of relu(1 - margin - cos(z'_i, f_i)), z' = `projected` (B, F, h, w), and over pairs of them i, j of
    relu(|cos(z_i, z_j) - cos(f_i, f_j)| - distance_margin). Pairs are of at most 16 x 16 areas, of which z and f are the means.

    Marginal cosine and distance matrix similarity, Yao et al. 2025, arXiv:2501.01423. No gradient reaches the features.
    """
    sides = latents.shape[2:]
    resized = F.interpolate(features.detach(), sides, mode="bilinear", align_corners=False, antialias=True)
    points = F.relu(1 - margin - (_unit(projected) * _unit(resized)).sum(1)).flatten(1).mean(1)
    areas = [min(side, PAIRED_SIDE) for side in sides]
    ours, theirs = (_cosines(area_means(each, areas)) for each in (latents, resized))
    return points + F.relu((ours - theirs).abs() - distance_margin).flatten(1).mean(1)


def _cosines(values: Tensor) -> Tensor:
    """(B, F, h, w) -> the cosine of each two positions, (B, h w, h w)."""
    with torch.autocast(values.device.type, enabled=False):
        unit = _unit(values).flatten(2)
        return unit.transpose(1, 2) @ unit


def generator_loss(kind: AdversarialKind, fake: Tensor) -> Tensor:
    """Logits of reconstructions (B, 1, h, w) -> (B,): -D (hinge; Lim & Ye 2017, arXiv:1705.02894), or -log sigmoid(D)
    (vanilla, non-saturating; Goodfellow et al. 2014, arXiv:1406.2661)."""
    each = -fake if kind == "hinge" else F.softplus(-fake)
    return each.flatten(1).mean(1)


def discriminator_loss(kind: AdversarialKind, real: Tensor, fake: Tensor) -> Tensor:
    """Logits (B, 1, h, w) twice -> (B,): (max(0, 1 - real) + max(0, 1 + fake)) / 2, or with softplus (same papers)."""
    each = F.relu(1 - real) + F.relu(1 + fake) if kind == "hinge" else F.softplus(-real) + F.softplus(fake)
    return 0.5 * each.flatten(1).mean(1)


def discriminator_accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Logits (B, 1, h, w) twice -> (B,): the share of patches with the right sign: real above 0, fake below."""
    return 0.5 * ((real > 0).float() + (fake < 0).float()).flatten(1).mean(1)


@config
class PerceptualConfig:
    """LPIPS on `vgg`, `alex` or `squeeze`, whose ImageNet weights are in torch's cache, into which they are fetched once where
    there is a network, or in the file `weights`; or `efficientnet_lite0`, whose weights a package brings.

    `random` is for tests.
    """

    network: Literal["vgg", "alex", "squeeze", "efficientnet_lite0", "random"] = "vgg"
    weights: str | None = None


class Perceptual(nn.Module):
    """forward(reconstruction, images (B, 1 or 3, H, W) in [-1, 1]) -> (B,): how different they look.

    LPIPS (Zhang et al. 2018, arXiv:1801.03924) by the package `lpips`. On the others the paper's uncalibrated form: the mean
    over resolutions of the mean over positions of |f(reconstruction) - f(images)|^2, features of unit length. Frozen; gradients
    reach the reconstruction alone. A UserError where the network cannot take images of one of the `sizes`.
    """

    def __init__(self, spec: PerceptualConfig, sizes: Sequence[int | Sides] = ()) -> None:
        super().__init__()
        self.spec = spec
        if spec.network in LPIPS_BACKBONES:
            self.network = _lpips(spec)
        else:
            why = f"perceptual.network {spec.network!r}"
            self.network = _RandomFeatures() if spec.network == "random" else _EfficientNet(spec.weights, why)
        self.eval().requires_grad_(False)
        for size in sizes:
            self._check(size)

    def train(self, mode: bool = True) -> "Perceptual":
        return super().train(False)  # it stays in eval mode, whatever module it is a part of

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            reconstruction, images = reconstruction.expand(-1, 3, -1, -1), images.expand(-1, 3, -1, -1)
        images = images.detach()
        if self.spec.network in LPIPS_BACKBONES:
            return self.network(reconstruction, images).flatten()
        layers = zip(self.network(reconstruction), self.network(images), strict=True)
        distances = [(_unit(a) - _unit(b)).square().sum(1).flatten(1).mean(1) for a, b in layers]
        return torch.stack(distances).mean(0)

    def _check(self, size: int | Sides) -> None:
        blank = torch.zeros(1, 3, *sides_of(size))
        try:
            finite = bool(torch.isfinite(self(blank, blank)).all())
        except RuntimeError:
            finite = False
        if not finite:
            why = f"perceptual.network {self.spec.network!r} cannot take images of {describe_size(size)}"
            raise UserError(f"{why}; use larger ones, or efficientnet_lite0")


def _unit(features: Tensor) -> Tensor:
    """(B, F, h, w) with each position's features at length 1."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features * (features.square().sum(1, keepdim=True) + 1e-10).rsqrt()


def imagenet_weights(network: str) -> tuple[Path, str]:
    """Where torch's cache keeps the ImageNet weights of an LPIPS backbone, and the URL of their file."""
    torchvision: Any = import_torchvision()
    url: str = getattr(torchvision.models, LPIPS_BACKBONES[network]).IMAGENET1K_V1.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2], url


def _lpips(spec: PerceptualConfig) -> nn.Module:
    """LPIPS with its backbone's weights, which are fetched once into torch's cache where no file is named."""
    why, option = f"perceptual.network {spec.network!r}", "perceptual.weights"
    with needed(why, "lpips", "torchvision"):
        import lpips

    cached, url = imagenet_weights(spec.network)
    otherwise = "or use efficientnet_lite0"
    path = find_weights(f"{why} needs ImageNet weights", spec.weights, cached, url, option=option, otherwise=otherwise)
    in_file = read_weights(path, option)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's own, about the way lpips calls it
        network = lpips.LPIPS(net=spec.network, pnet_rand=True, verbose=False)
    # slice2.5.weight of lpips is features.5.weight of torchvision
    names = {name: f"features.{name.partition('.')[2]}" for name in network.net.state_dict()}
    weights = {name: in_file[other] for name, other in names.items() if other in in_file}
    put_weights(network.net, weights, path, option)
    return network


@config
class TeacherConfig:
    """The frozen network that latents are aligned to: `efficientnet_lite0`, whose weights a package brings, or `timm:NAME`,
    whose weights are fetched once where there is a network, or are in the file `weights`. Each process keeps the features of
    the images that it has seen in up to `cache_gib` of memory.

    `random` is for tests.
    """

    network: str = "efficientnet_lite0"
    weights: str | None = None
    cache_gib: float = resumable_field(1.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "TeacherConfig":
        if self.network not in ("efficientnet_lite0", "random") and not self.network.startswith("timm:"):
            raise config_error(f"network: {self.network!r} is not known; allowed: efficientnet_lite0, timm:NAME")
        return self


class Teacher(nn.Module):
    """forward(images (B, 1 or 3, H, W) in [-1, 1]) -> features (B, `channels`, h, w), float32, without a gradient. Frozen.

    The images are resized to the network's own square. Of EfficientNet-Lite0 the features are the 112 channels at 14 x 14; of a
    network of timm its last ones, those of the patches where it is a transformer. A UserError where there are none.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: TeacherConfig) -> None:
        super().__init__()
        self.spec, self.size, mean, std = spec, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        why, option = f"teacher.network {spec.network!r}", "teacher.weights"
        if spec.network == "random":
            self.network, self.size = random_convolutions(), 32
        elif spec.network == "efficientnet_lite0":
            self.network = _EfficientNet(spec.weights, why)
        else:
            name, otherwise = spec.network.removeprefix("timm:"), "efficientnet_lite0 needs none"
            self.network, self.size, mean, std = timm_network(name, spec.weights, why, option=option, otherwise=otherwise)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.eval().requires_grad_(False)
        shape = self(torch.zeros(1, 3, self.size, self.size)).shape
        if len(shape) != 4:
            raise UserError(f"{why} has no features at places of the image; use a convolutional network or a transformer")
        self.channels = shape[1]

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            images, sides = images.float().expand(-1, 3, -1, -1), (self.size, self.size)
            x = F.interpolate(images, sides, mode="bilinear", align_corners=False, antialias=True)
            x = ((x + 1) / 2 - self.mean) / self.std
            if self.spec.network == "random":
                return self.network(x)
            return self.network(x)[4] if isinstance(self.network, _EfficientNet) else self._of_timm(x)

    def _of_timm(self, x: Tensor) -> Tensor:
        network: Any = self.network
        features, channels = network.forward_features(x), network.num_features
        if features.ndim == 3:  # (B, tokens, F), the first ones of no place
            features = features[:, getattr(network, "num_prefix_tokens", 0) :]
            side = math.isqrt(features.shape[1])
            return features.transpose(1, 2).unflatten(2, (side, side)) if side**2 == features.shape[1] else features
        return features.movedim(3, 1) if features.ndim == 4 and features.shape[1] != channels else features


class _EfficientNet(nn.Module):
    """EfficientNet-Lite0's features at the end of each of its seven widths; its ImageNet weights come with a package."""

    def __init__(self, weights: str | None, key: str) -> None:
        super().__init__()
        network = efficientnet_lite0(weights, key)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks
        widths = [*(block._project_conv.out_channels for block in network._blocks), 0]
        self.last_of_width = [i for i in range(len(widths) - 1) if widths[i] != widths[i + 1]]

    def forward(self, images: Tensor) -> list[Tensor]:
        while min(images.shape[2:]) < 32:  # the deep layers need so much
            images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
        x = self.stem(images)  # the weights expect (pixel - 127) / 128, which is the input within half a step of 255
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.last_of_width:
                features.append(x)
        return features


class _RandomFeatures(nn.Module):
    """The features of three random convolutions: for tests."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = random_convolutions()

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = list(accumulate(self.layers, lambda x, layer: layer(x), initial=images))
        return outputs[2::2]  # behind each tanh
