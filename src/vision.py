"""torchvision, also where its build does not match torch's and it fails to import."""

import importlib
import sys
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """Import torchvision: call this before what imports it (lpips, torchmetrics, parts of diffusers).

    A torchvision whose compiled operators do not load fails on the name of the first one. Then those names are defined,
    without anything behind them, and it is imported again; what this project uses of it are networks in plain torch.
    """
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
