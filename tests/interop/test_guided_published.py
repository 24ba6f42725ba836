"""Published checkpoints are known by the shapes of their weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from src.config import UserError, validate
from src.interop.guided_diffusion import read
from src.interop.guided_flags import PUBLISHED, find_published, model_config, process_config
from src.interop.guided_shapes import read_shapes
from src.models import Classifier, ClassifierConfig, UNet, UNetConfig
from tests.conftest import randomise
from tests.interop.guided_networks import SMALL, foreign_state, shapes_of

CLASSIFIER_128 = {"base_channels": 128, "downsample": "residual", "head_channels": 64, "split_qkv_first": False}
GUIDED_64 = {"head_channels": 64, "split_qkv_first": False, "downsample": "residual", "upsample": "residual"}
GUIDED_4 = {"num_heads": 4, "split_qkv_first": False, "downsample": "residual", "upsample": "residual"}
IMPROVED_4 = {"num_heads": 4, "split_qkv_first": False, "downsample": "conv", "upsample": "conv"}
LINEAR_1000, COSINE_1000 = ("linear", 1000, 1.0, 1.0), ("cosine", 1000, 1.0, 1.0)
COSINE_4000, RESCALED_4000 = ("cosine", 4000, 1.0, 1.0), ("cosine", 4000, 0.25, 4.0)


def levels(attended: str, **spec: Any) -> dict[str, Any]:
    """`attended` has a digit for each resolution: 1 where there is attention."""
    return {**spec, "attention": ["full" if digit == "1" else "none" for digit in attended]}


# name, (size, small size or None, classes), the architecture, (schedule, steps, time scale, weight of the bound), and the size
# in millions of parameters, where the paper says it (Tables 11 and 12, arXiv:2105.05233; improved-diffusion's README)
RUNS: list[tuple[str, tuple, dict, tuple, int | None]] = [
    (
        "64x64_diffusion.pt",
        (64, None, 1000),
        levels("0111", base_channels=192, channel_mult=[1, 2, 3, 4], blocks=3, dropout=0.1, **GUIDED_64)
        | {"split_qkv_first": True},
        COSINE_1000,
        296,
    ),
    (
        "128x128_diffusion.pt",
        (128, None, 1000),
        levels("00111", base_channels=256, channel_mult=[1, 1, 2, 3, 4], blocks=2, **GUIDED_4),
        LINEAR_1000,
        422,
    ),
    (
        "256x256_diffusion.pt",
        (256, None, 1000),
        levels("000111", base_channels=256, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_64),
        LINEAR_1000,
        554,
    ),
    (
        "256x256_diffusion_uncond.pt",
        (256, None, None),
        levels("000111", base_channels=256, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_64),
        LINEAR_1000,
        None,
    ),
    (
        "512x512_diffusion.pt",
        (512, None, 1000),
        levels("0000111", base_channels=256, channel_mult=[0.5, 1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_64),
        LINEAR_1000,
        559,
    ),
    (
        "64_256_upsampler.pt",
        (256, 64, 1000),
        levels("000111", base_channels=192, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_4),
        LINEAR_1000,
        312,
    ),
    (
        "128_512_upsampler.pt",
        (512, 128, 1000),
        levels("000011", base_channels=192, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **GUIDED_64),
        LINEAR_1000,
        309,
    ),
    (
        "64x64_classifier.pt",
        (64, None, 1000),
        levels("0111", channel_mult=[1, 2, 3, 4], blocks=4, pool="attention", **CLASSIFIER_128),
        COSINE_1000,
        None,
    ),
    (
        "128x128_classifier.pt",
        (128, None, 1000),
        levels("00111", channel_mult=[1, 1, 2, 3, 4], blocks=2, pool="attention", **CLASSIFIER_128),
        LINEAR_1000,
        None,
    ),
    (
        "256x256_classifier.pt",
        (256, None, 1000),
        levels("000111", channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, pool="attention", **CLASSIFIER_128),
        LINEAR_1000,
        None,
    ),
    (
        "512x512_classifier.pt",
        (512, None, 1000),
        levels("0000111", channel_mult=[0.5, 1, 1, 2, 2, 4, 4], blocks=2, pool="attention", **CLASSIFIER_128),
        LINEAR_1000,
        None,
    ),
    (
        "cifar10_uncond_50M_500K.pt",
        (32, None, None),
        levels("0110", base_channels=128, channel_mult=[1, 2, 2, 2], blocks=3, dropout=0.3, **IMPROVED_4),
        RESCALED_4000,
        None,
    ),
    (
        "imagenet64_uncond_100M_1500K.pt",
        (64, None, None),
        levels("0011", base_channels=128, channel_mult=[1, 2, 3, 4], blocks=3, **IMPROVED_4),
        RESCALED_4000,
        None,
    ),
    (
        "imagenet64_cond_270M_250K.pt",
        (64, None, 1000),
        levels("0011", base_channels=192, channel_mult=[1, 2, 3, 4], blocks=3, **IMPROVED_4),
        COSINE_4000,
        273,
    ),
    (
        "upsample_cond_500K.pt",
        (256, 64, 1000),
        levels("000011", base_channels=192, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **IMPROVED_4),
        ("linear", 4000, 1.0, 1.0),
        280,
    ),
    (
        "lsun_uncond_100M_1200K_bs128.pt",
        (256, None, None),
        levels("000010", base_channels=128, channel_mult=[1, 1, 2, 2, 4, 4], blocks=2, **IMPROVED_4)
        | {"num_heads": 1, "embedding": "add"},
        LINEAR_1000,
        None,
    ),
]


@pytest.mark.parametrize(("name", "images", "spec", "diffusion", "millions"), RUNS, ids=[run[0] for run in RUNS])
def test_a_published_file_is_known_by_its_shapes(
    name: str, images: tuple, spec: dict, diffusion: tuple, millions: int | None
) -> None:
    size, small, classes = images
    with torch.device("meta"):
        if "pool" in spec:
            config = validate(ClassifierConfig, spec)
            network = Classifier(config, image_size=size, num_classes=classes)
        else:
            config = validate(UNetConfig, spec)
            network = UNet(config, out_channels=6, num_classes=classes, null_class=False, condition_channels=3 if small else 0)
    if millions is not None:
        assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions
    architecture = read_shapes(shapes_of(foreign_state(network, config)))
    known = find_published(architecture)
    assert known is not None and name in known[0]
    flags = known[1]
    assert model_config(architecture, flags) == config
    assert (flags.get("large_size", flags.get("image_size")), flags.get("small_size"), architecture.num_classes) == images
    schedule, steps, scale, weight = diffusion
    process = process_config({**flags, "learn_sigma": architecture.learn_sigma})
    assert (process.schedule.kind, process.schedule.steps) == (schedule, steps)  # pyright: ignore
    assert process.time_input is not None and (process.time_input.kind, process.time_input.scale) == ("index", scale)
    assert process.target == "eps"
    if "pool" in spec:
        assert architecture.image_size == size
    else:
        assert architecture.learn_sigma and architecture.upsampler == (small is not None)
        assert (process.variance, process.loss.kind, process.loss.variational_weight) == ("learned", "hybrid", weight)


def test_every_published_file_is_tested() -> None:
    assert [key.split(",")[0] for key in PUBLISHED] == [run[0] for run in RUNS]


def test_a_published_file_is_read_without_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small stand-in for one of 200 MB."""
    config = validate(UNetConfig, {**SMALL, "num_heads": 4, "split_qkv_first": True})
    network = UNet(config, out_channels=6)
    randomise(network)
    torch.save(foreign_state(network, config), tmp_path / "model.pt")
    flags = PUBLISHED["cifar10_uncond_50M_500K.pt"] | {"num_channels": 32, "num_res_blocks": 2, "attention_resolutions": "16,8"}
    flags |= {"channel_mult": "1,1,2", "use_new_attention_order": True, "dropout": 0.0}
    with pytest.raises(UserError, match=r"model.pt: .*image_size, num_heads.*noise_schedule.*MODEL_FLAGS.*--flags FILE"):
        read(tmp_path / "model.pt")
    monkeypatch.setitem(PUBLISHED, "tiny.pt", flags)
    imported = read(tmp_path / "model.pt")
    assert imported.network.config == config and imported.image_size == 32
    assert imported.process.time_input is not None and imported.process.time_input.scale == 0.25
    weights, signature, defaults = imported.notes[-3:]
    assert weights.startswith("from the weights: ") and "num_channels 32" in weights and "channel_mult 1,1,2" in weights
    assert signature.startswith("from the published tiny.pt") and "noise_schedule cosine" in signature
    assert "num_heads 4" in signature and "num_channels" not in signature
    assert defaults == (
        "guided-diffusion's defaults: num_heads_upsample -1, num_head_channels -1, predict_xstart False, use_kl False, "
        "sigma_small False"
    )
    notes = read(tmp_path / "model.pt", {"image_size": 32, "noise_schedule": "cosine", "channel_mult": "1,1,2"}).notes[-3:]
    assert notes[1] == "from the flags: image_size 32, noise_schedule cosine" and "diffusion_steps 1000" in notes[2]
