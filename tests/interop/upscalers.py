"""Real-ESRGAN's networks in small."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.models.pretrained import import_torchvision
from src.sampling.upscaling import Upscaler


def build(name: str, **options: Any) -> Any:
    """One of spandrel's networks."""
    import_torchvision()
    return getattr(importlib.import_module(f"spandrel.architectures.{name}"), name)(**options)


def randomise_around_grey(network: nn.Module) -> Any:
    """Every parameter from a normal; images come out in the middle of [0, 1], where nothing is cut, and far from flat."""
    generator = torch.Generator().manual_seed(1)
    parameters = list(network.parameters())
    with torch.no_grad():
        for p in parameters:
            scale = 0.8 / (p.shape[1] * p.shape[2] * p.shape[3]) ** 0.5 if p.ndim == 4 else 0.05
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
        parameters[-1].add_(0.5)
    return network.eval()


def rrdb(num_blocks: int = 1, **options: Any) -> Any:
    return randomise_around_grey(build("ESRGAN", num_filters=8, num_blocks=num_blocks, **options))


@torch.no_grad()
def directly(network: nn.Module, x: Tensor) -> Tensor:
    return network((x + 1) / 2).clamp(0, 1) * 2 - 1


@pytest.fixture
def upscaler() -> Upscaler:
    return Upscaler(rrdb(), 4)
