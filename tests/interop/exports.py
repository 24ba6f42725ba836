"""Small networks and processes of ours, and their export as folders of diffusers."""

from pathlib import Path
from typing import Any

from src.config import validate
from src.diffusion import ProcessConfig
from src.interop.diffusers_export import export
from src.models import UNet, UNetConfig
from tests.conftest import randomise

SMALL = {"base_channels": 16, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "full"], "norm_groups": 8}
PLAIN = {"embedding": "add", "head_channels": 8}
LINEAR = {"schedule": {"kind": "linear", "steps": 1000}, "target": "eps"}
LEARNED = {**LINEAR, "variance": "learned", "loss": {"kind": "hybrid"}}


def unet(classes: int | None = None, learned: bool = False, channels: int = 3, scale: float = 0.15, **options: Any) -> UNet:
    config = validate(UNetConfig, {**SMALL, **PLAIN, **options})
    network = UNet(config, in_channels=channels, out_channels=channels * (1 + learned), num_classes=classes)
    randomise(network, scale)
    return network.eval()


def process_of(raw: dict[str, Any]) -> ProcessConfig:
    return validate(ProcessConfig, raw)


def exported(out: Path, network: UNet, raw: dict[str, Any] = LINEAR, **options: Any) -> Path:
    export(network, process_of(raw), **{"image_size": 8, "out": out, "name": "small", **options})
    return out
