"""Flags that contradict the weights, and files that are no checkpoint of guided-diffusion."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from src.config import UserError, validate
from src.interop.guided_diffusion import module_names, read, read_weights
from src.interop.guided_flags import process_config
from src.interop.guided_shapes import read_shapes
from src.interop.names import rename_state
from src.models import Classifier, ClassifierConfig, UNet, UNetConfig
from tests.conftest import randomise
from tests.interop.guided_networks import FLAGS, SMALL, SMALL_FLAGS, foreign_state, shapes_of


def test_shapes_that_leave_the_depth_open(tmp_path: Path) -> None:
    spec = {"base_channels": 64, "channel_mult": [1, 1], "blocks": 1, "attention": ["none", "none"], "pool": "adaptive"}
    config = validate(ClassifierConfig, spec)
    network = Classifier(config, image_size=16, num_classes=7)
    randomise(network)
    state = foreign_state(network, config)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="has 1 or 3 blocks: give classifier_depth"):
        read_shapes(shapes_of(state))
    imported = read(tmp_path / "model.pt", {"image_size": 16, "classifier_depth": 1})
    assert imported.network.config == config
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([3.0])
    assert torch.equal(imported.network(x, t), network.eval()(x, t))


@pytest.fixture(scope="module")
def unet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, path = validate(UNetConfig, SMALL), tmp_path_factory.mktemp("unet") / "unet.pt"
    torch.save(foreign_state(randomise(UNet(config)), config), path)
    return path


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = {**SMALL, "base_channels": 64, "num_heads": None, "head_channels": 64}
    config, path = validate(ClassifierConfig, spec), tmp_path_factory.mktemp("classifier") / "classifier.pt"
    torch.save(foreign_state(randomise(Classifier(config, image_size=16, num_classes=7)), config), path)
    return path


def test_flags_that_agree_with_the_weights(unet_file: Path) -> None:
    flags = {**FLAGS, "num_heads_upsample": 2, "sigma_small": "False", "use_scale_shift_norm": "True"}
    imported = read(unet_file, {**flags, "attention_resolutions": "8,16", "resblock_updown": "False", "class_cond": False})
    assert imported.process == process_config(flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_channels": 128}, "num_channels is 128 in the flags and 32 in the weights"),
        ({"num_res_blocks": 3}, "num_res_blocks is 3 in the flags and 2 in the weights"),
        ({"channel_mult": "1,2,2"}, "channel_mult is 1,2,2 in the flags, images of 16 px, and 1,1,2 in the weights"),
        ({"image_size": 64}, "channel_mult is 1,2,3,4 by default for 64 px, which the flags say, and 1,1,2 in the weights"),
        (
            {"attention_resolutions": "16,8"},
            "attention_resolutions is 16,8 in the flags, images of 16 px, and 8,4 in the weights",
        ),
        ({"attention_resolutions": "0"}, "write numbers above 0"),
        ({"resblock_updown": True}, "resblock_updown is True in the flags and False in the weights"),
        ({"use_scale_shift_norm": "False"}, "use_scale_shift_norm is False in the flags and True in the weights"),
        ({"class_cond": True}, "class_cond is True in the flags and False in the weights"),
        ({"learn_sigma": True}, "learn_sigma is True in the flags and False in the weights"),
        ({"num_heads": 3}, "num_heads 3 does not divide 32 channels"),
        ({"num_head_channels": 24}, "head_channels 24 does not divide 32 channels"),
        ({"num_heads_upsample": 4}, "num_heads_upsample"),
        ({"image_size": 18}, "the images have 18 px in the flags, and the weights halve them 2 times"),
        ({"image_size": None}, "the weights do not say image_size: give the MODEL_FLAGS"),
        ({"large_size": 16}, "not an upsampler's"),
        ({"noise_schedule": "wavy"}, "noise_schedule 'wavy'"),
    ],
)
def test_flags_that_contradict_the_weights(unet_file: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(unet_file, {**SMALL_FLAGS, **change})
    assert "\n" not in str(raised.value) and str(unet_file) in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_size": 64}, "image_size is 64 in the flags and 16 in the weights"),
        ({"classifier_width": 128}, "classifier_width is 128 in the flags and 64 in the weights"),
        ({"classifier_depth": 1}, "classifier_depth is 1 in the flags and 2 in the weights"),
        ({"classifier_pool": "spatial"}, "classifier_pool is spatial in the flags and attention in the weights"),
        (
            {"classifier_attention_resolutions": "4"},
            "attention_resolutions is 4 in the flags, images of 16 px, and 8,4 in the weights",
        ),
    ],
)
def test_flags_that_contradict_a_classifier(classifier_file: Path, flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(classifier_file, flags)


def test_an_upsampler_needs_both_sizes(tmp_path: Path) -> None:
    config = validate(UNetConfig, SMALL)
    torch.save(foreign_state(UNet(config, condition_channels=3), config), tmp_path / "model.pt")
    with pytest.raises(UserError, match="an upsampler's and do not say large_size and small_size: give the MODEL_FLAGS"):
        read(tmp_path / "model.pt", SMALL_FLAGS)
    with pytest.raises(UserError, match="do not say small_size: give"):
        read(tmp_path / "model.pt", {**SMALL_FLAGS, "large_size": 16})


def test_the_kind_of_network_is_known_by_its_shapes(unet_file: Path, classifier_file: Path) -> None:
    assert isinstance(read(unet_file, SMALL_FLAGS).network, UNet)
    assert isinstance(read(classifier_file, {}).network, Classifier)


def test_another_architecture_says_which_keys_differ(unet_file: Path, tmp_path: Path) -> None:
    def message_of(change: dict[str, Tensor | None]) -> str:
        changed = {**read_weights(unet_file)[0], **change}
        torch.save({name: value for name, value in changed.items() if value is not None}, tmp_path / "changed.pt")
        with pytest.raises(UserError) as raised:
            read(tmp_path / "changed.pt", SMALL_FLAGS)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "lacks middle_block.2.out_layers.3.bias" in message_of({"middle_block.2.out_layers.3.bias": None})
    assert "lacks input_blocks.4.0.in_layers.2.weight" in message_of({"input_blocks.4.0.in_layers.2.weight": None})
    assert "has in excess alien" in message_of({"alien": torch.zeros(1)})
    assert "out.2.bias is (4,), this network wants (3,)" in message_of({"out.2.bias": torch.zeros(4)})
    assert "it sees 3 channels and gives 5" in message_of({"out.2.weight": torch.zeros(5, 32, 3, 3)})
    assert "do not divide into resolutions" in message_of({"input_blocks.9.0.in_layers.2.weight": torch.zeros(64, 64, 3, 3)})
    torch.save(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))).state_dict(), tmp_path / "other.pt")
    with pytest.raises(
        UserError, match="other.pt: .*lacks input_blocks.0.0.weight, .*has in excess 0.bias, 0.weight"
    ) as raised:
        read(tmp_path / "other.pt")
    assert str(raised.value).count(", ") == 8, "the first five of each"


def test_renaming_says_which_keys_differ() -> None:
    config = validate(UNetConfig, SMALL)
    network = UNet(config)
    state, names = foreign_state(network, config), module_names(config)
    assert len(state) == len(network.state_dict())
    broken = {key: value for key, value in state.items() if not key.startswith("middle_block.0")}
    with pytest.raises(UserError, match="lacks middle_block"):
        rename_state(network, broken, names)
    with pytest.raises(UserError, match="in excess alien"):
        rename_state(network, {**state, "alien": torch.zeros(1)}, names)
    with pytest.raises(UserError, match="out.2.weight is"):
        rename_state(network, {**state, "out.2.weight": torch.zeros(6, 32, 3, 3)}, names)


def test_a_pool_that_we_have_not(classifier_file: Path) -> None:
    shapes = shapes_of(read_weights(classifier_file)[0]) | {"out.0.weight": (2048, 700), "out.3.weight": (7, 2048)}
    with pytest.raises(UserError, match="spatial_v2"):
        read_shapes(shapes)


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("this must not run",))


def test_a_file_that_is_no_state_dict(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def message_of(name: str) -> str:
        with pytest.raises(UserError) as raised:
            read_weights(tmp_path / name)[0]
        assert "\n" not in str(raised.value) and name in str(raised.value)
        return str(raised.value)

    assert "no such" in message_of("missing.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").touch()
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    (tmp_path / "folder.pt").mkdir()
    with open(tmp_path / "pickle.pt", "wb") as file:
        pickle.dump({"a": Evil()}, file)
    for name in ("text.pt", "empty.pt", "cut.pt", "folder.pt", "pickle.pt"):
        assert "not a state dict that can be read safely" in message_of(name)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "state dict of tensors" in message_of("list.pt")
    torch.save({"step": 3}, tmp_path / "numbers.pt")
    assert "state dict of tensors" in message_of("numbers.pt")
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    assert "to load it is to run code" in message_of("evil.pt") and "print" in message_of("evil.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    assert "to load it is to run code (torch.nn" in message_of("module.pt")
    assert "must not run" not in capfd.readouterr().out
