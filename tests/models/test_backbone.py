"""The one door of the networks that denoise, and their union by kind."""

from typing import Any

import pytest
import torch
from pydantic_core import PydanticCustomError

import ddpm_accelerate
import train_iadb
from src.config import UserError, config, dump, load, validate
from src.models import MLP, ImageModelConfig, ModelConfig, UNet, build_model
from src.models.layers import check_divides
from tests.conftest import ROOT

SMALL = {"base_channels": 8, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "none"], "norm_groups": 4}


@config
class Root:
    model: ModelConfig


@config
class ImageRoot:
    model: ImageModelConfig


def model_of(raw: dict[str, Any]) -> Any:
    return validate(Root, {"model": raw}).model


def test_a_unet_needs_no_kind() -> None:
    assert model_of(SMALL) == model_of({"kind": "unet", **SMALL})
    assert dump(Root(model=model_of(SMALL)))["model"]["kind"] == "unet"
    assert (model_of({"kind": "mlp"}).kind, model_of({"kind": "mlp"}).takes_points) == ("mlp", True)
    with pytest.raises(UserError, match=r"model.kind: 'unett' is not known; did you mean 'unet'\? Allowed: 'unet', 'mlp'"):
        model_of({"kind": "unett"})
    with pytest.raises(UserError, match=r"model\.base_chanels: unknown key; did you mean 'base_channels'"):
        model_of({"base_chanels": 8})


def test_the_door_builds_what_the_config_names() -> None:
    for options, network in (
        ({}, {"num_classes": 3}),
        ({"learned": True, "condition_channels": 3}, {"num_classes": 3, "out_channels": 6, "condition_channels": 3}),
        ({"null_class": False}, {"num_classes": 3, "null_class": False}),
    ):
        torch.manual_seed(0)
        built = build_model(model_of(SMALL), (3, 8, 8), 3, **options)
        torch.manual_seed(0)
        by_hand = UNet(model_of(SMALL), in_channels=3, **network)
        assert built.state_dict().keys() == by_hand.state_dict().keys()
        assert all(torch.equal(value, by_hand.state_dict()[name]) for name, value in built.state_dict().items())
        assert built.stem.weight.is_contiguous(memory_format=torch.channels_last)  # pyright: ignore
    points = build_model(model_of({"kind": "mlp", "width": 8}), (2,), 3)
    assert isinstance(points, MLP) and points(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4).long()).shape == (4, 2)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UserError, match="model.kind mlp is a network of 2-D points, and the data are images"):
        build_model(model_of({"kind": "mlp"}), (3, 8, 8))
    with pytest.raises(UserError, match="model.kind unet is a network of images, and the data are 2-D points"):
        build_model(model_of(SMALL), (2,))
    with pytest.raises(UserError, match=r"sees 9 px, not divisible by 2, what 2 entries of .* 8 px or 10 px"):
        build_model(model_of(SMALL), (3, 9, 9))
    with pytest.raises(UserError, match="model: mlp is a network of 2-D points, and this script trains on images"):
        validate(ImageRoot, {"model": {"kind": "mlp"}})


def test_scripts_take_the_union() -> None:
    smoke = ROOT / "configs" / "smoke" / "ddpm.json"
    with pytest.raises(UserError, match="model: mlp is a network of 2-D points"):
        load(smoke, ddpm_accelerate.Config, ["model.kind=mlp"])
    for changes in (["model.kind=mlp"], ["image=null"]):
        with pytest.raises(UserError, match="2-D points, which have no image, need an mlp"):
            load(ROOT / "configs" / "smoke" / "iadb.json", train_iadb.Config, changes)


def test_what_does_not_divide_channels_is_an_error_of_the_config() -> None:
    check_divides("heads", None, [7, 8])
    check_divides("heads", 4, [4, 8])
    with pytest.raises(PydanticCustomError, match="^heads 3 does not divide a width of 8$"):
        check_divides("heads", 3, [6, 8], "a width of {}")
    with pytest.raises(PydanticCustomError, match="^heads 3 does not divide 0 channels$"):
        check_divides("heads", 3, [0])
