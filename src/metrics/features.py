"""Networks whose features say how alike two sets of pictures are: Inception, DINOv2, EfficientNet-Lite0, any of timm."""

import hashlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UserError
from ..config.packages import ask_for, needed
from ..models.pretrained import efficientnet_lite0, import_torchvision
from ..storage.downloads import fetch_weights, how_to_bring, put_weights, read_weights
from ..storage.finite import check_finite
from ..storage.hub import hub_reason

INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
NAMES = ("inception", "dinov2", "efficientnet_lite0", "timm:NAME")


class Asked(NamedTuple):
    """How a person asks for features, for files of weights, and for Inception's: evaluate.py's options."""

    features: str = "--features"
    weights: str = "--weights"
    inception: str = "--inception-weights"


OPTIONS = Asked()


class Features(nn.Module):
    """forward(pixels (B, C, H, W) uint8, C 1 or 3) -> (B, dim) float32. Frozen.

    `name` is how it is asked for, `digest` the hash of its weights, `comparable` what its numbers may be compared with.
    """

    name: str
    dim: int
    comparable: str

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.eval().requires_grad_(False)
        found = hashlib.sha256()
        for key, value in sorted(network.state_dict().items()):
            found.update(key.encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.digest = found.hexdigest()[:16]

    def train(self, mode: bool = True) -> "Features":
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        return self.see(pixels).float()

    def see(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor | None:
        """(B, dim) -> the logits of the ImageNet classes for the Inception Score, or None."""
        return None


def _resized(pixels: Tensor, size: int) -> Tensor:
    """As float32 in [0, 255], at `size` px; bicubic, with antialiasing where it becomes smaller."""
    if pixels.shape[2:] == (size, size):
        return pixels.float()
    scaled = F.interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return scaled.round().clamp(0, 255)


class Inception(Features):
    """The 2048 pooled features of Inception v3 as it was in 2015, resized as TensorFlow 1 did, by torch-fidelity: FID as papers
    give it (Heusel et al. 2017, arXiv:1706.08500)."""

    name = "inception"
    dim = 2048
    comparable = "FID, KID and IS of papers, at the same number of samples and of the same reference pictures"

    def __init__(self, weights: str | None, asked: Asked) -> None:
        ask_for(f"{asked.features} inception", "torch_fidelity", "torchvision")
        path = Path(weights).expanduser() if weights is not None else inception_file()
        reason = fetch_weights(INCEPTION_URL, path) if weights is None else f"{asked.inception} names no file"
        if not path.is_file():
            raise UserError(
                f"{asked.features} inception needs weights that are not at {path}; get them from {INCEPTION_URL} and put them "
                f"there ({how_to_bring(INCEPTION_URL, inception_file())}), or name the file with {asked.inception}; "
                f"{asked.features} efficientnet_lite0 works without; they were not fetched: {reason}"
            )
        import_torchvision()
        with needed(f"{asked.features} inception", "torch_fidelity"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        read_weights(path, asked.inception)  # that the file is whole and holds no code: it is read once more below
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
        except (RuntimeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{asked.inception}: {path} holds the weights of another network") from None
        super().__init__(network)

    def see(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)[0]

    def logits(self, features: Tensor) -> Tensor:
        """Without the bias, as the Inception Score is computed (Salimans et al. 2016, arXiv:1606.03498)."""
        return features.to(self.network.fc.weight) @ self.network.fc.weight.t()


def inception_file() -> Path:
    """Where torch's cache keeps the weights that torch-fidelity and torchmetrics take."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]


class EfficientNetLite0(Features):
    """The 1280 pooled features of EfficientNet-Lite0 at 224 px; the weights come with a package."""

    name = "efficientnet_lite0"
    dim = 1280
    comparable = "numbers of this project in the same features, at the same number of samples; not with FID of papers"

    def __init__(self, weights: str | None, asked: Asked) -> None:
        network = efficientnet_lite0(weights, f"{asked.features} efficientnet_lite0")
        super().__init__(network.to(memory_format=torch.channels_last))  # a third faster on a CPU

    def see(self, pixels: Tensor) -> Tensor:
        scaled = (_resized(pixels, 224) - 127) / 128
        return self.network.extract_features(scaled.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class Timm(Features):
    """The pooled features of a network of timm, at its own size, mean and standard deviation."""

    def __init__(self, network_name: str, weights: str | None, name: str, comparable: str, asked: Asked) -> None:
        ask_for(f"{asked.features} {name}", "timm", "torchvision")
        import_torchvision()
        with needed(f"{asked.features} {name}", "timm"):
            import timm
            from timm.data.config import resolve_model_data_config

        if not timm.is_model(network_name):
            near = [
                found.partition(".")[0] for found in timm.list_models(f"*{network_name.partition('.')[0].partition('_')[0]}*")
            ]
            told = f"; is it one of {', '.join(dict.fromkeys(near[:8]))}?" if near else ""
            raise UserError(f"{asked.features} {name}: timm has no network {network_name!r}{told}")
        more: dict[str, Any] = {"num_classes": 0}
        if "dinov2" in network_name:
            more["dynamic_img_size"] = True  # weights for 518 px, which the paper's distance shows 224
        if weights is not None:
            network = timm.create_model(network_name, **more)
            path = Path(weights).expanduser()
            found = {key: value for key, value in read_weights(path, asked.weights).items() if key in network.state_dict()}
            put_weights(network, found, path, asked.weights)
        else:
            try:
                network = timm.create_model(network_name, pretrained=True, **more)
            except Exception as error:  # of hub, network, cache, or a network that has none
                reason = hub_reason(f"timm/{network_name}", error).partition(";")[0][:160]
                raise UserError(
                    f"{asked.features} {name} needs weights that cannot be brought here ({reason}); name a "
                    f"safetensors file of them with {asked.weights}; {asked.features} efficientnet_lite0 works without"
                ) from None
            check_finite(network.state_dict(), f"{asked.features} {name}")
        super().__init__(network)
        self.name, self.comparable = name, comparable
        self.dim = int(getattr(network, "num_features"))  # noqa: B009
        data = resolve_model_data_config(network)
        self._size = 224 if "dinov2" in network_name else int(data["input_size"][-1])
        self._mean, self._std = (torch.tensor(data[key])[:, None, None] * 255 for key in ("mean", "std"))

    def see(self, pixels: Tensor) -> Tensor:
        scaled = _resized(pixels, self._size)
        return self.network((scaled - self._mean.to(scaled)) / self._std.to(scaled))


class RandomFeatures(Features):
    """16 features of three random convolutions, always the same: for smoke tests, where no number counts."""

    name = "random"
    dim = 16
    comparable = "nothing: these features are random, for tests"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in ((3, 8), (8, 16), (16, 16)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.Tanh()]
        network = nn.Sequential(*layers)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        super().__init__(network)

    def see(self, pixels: Tensor) -> Tensor:
        return self.network(pixels.float() / 127.5 - 1).mean((2, 3))


def open_features(name: str, weights: str | None = None, asked: Asked = OPTIONS) -> Features:
    """`inception`, `dinov2`, `efficientnet_lite0`, or `timm:NAME` with a network's name there; `weights` is a file. `random` is
    for tests. A UserError says what is missing and where it comes from, in the words by which it was `asked`."""
    if name in (*NAMES, "random") or name.startswith("timm:"):  # what compares them in the end
        ask_for(f"{asked.features} {name}", "torchmetrics", "torchvision")
    if name == "inception":
        return Inception(weights, asked)
    if name == "efficientnet_lite0":
        return EfficientNetLite0(weights, asked)
    if name == "dinov2":
        told = "FD-DINOv2 of papers (Stein et al. 2023, arXiv:2306.04675), at the same number of samples"
        return Timm(DINOV2, weights, name, told, asked)
    if name.startswith("timm:"):
        told = f"numbers in the features of {name}, at the same number of samples"
        return Timm(name.removeprefix("timm:"), weights, name, told, asked)
    if name == "random":
        return RandomFeatures()
    near = get_close_matches(name, NAMES, 1)
    told = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{asked.features} {name!r} is not known; allowed: {', '.join(NAMES)}{told}")
