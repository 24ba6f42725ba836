"""The YAML beside an IADB checkpoint."""

import json
import sys
from pathlib import Path

import pytest
import torch

from src.config import UserError
from src.interop.iadb import read
from src.interop.iadb_yaml import read_yaml
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))
from tests.interop.iadb_checkpoints import FULL, lightning, same_output, saved, under, unet2d, written

NESTED = """
seed_everything: 1
trainer: {max_epochs: -1}
model:
  class_path: iadb.Module
  init_args:
    learning_rate: 1e-4
    unet:
      sample_size: 8
      in_channels: 3
      base_channels: 32
      channel_mult: [1, 2]
      num_res_blocks: 1
      down_block_types: [DownBlock2D, AttnDownBlock2D]
      up_block_types: [AttnUpBlock2D, UpBlock2D]
      norm_eps: 1e-5
      norm_num_groups: 32
      attention_head_dim: 8
      num_class_embeds: null
data: {resolution: [8, 8], path: pictures}
"""


def test_a_yaml_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: {in_channels: 3}\n", encoding="utf-8-sig")
    assert list(read_yaml(path).facts) == ["in_channels"]
    path.write_text("model: {in_channels: 3}\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"a\.yaml: is not a UTF-8 text file but UTF-16"):
        read_yaml(path)


@pytest.mark.parametrize("text", [FULL, NESTED], ids=["flat", "nested"])
def test_the_yaml_and_the_shapes_say_the_same(tmp_path: Path, text: str) -> None:
    theirs = unet2d()
    path = saved(tmp_path / "a.ckpt", lightning(under("model.", theirs.state_dict())))
    by_shapes, by_yaml = read(path, image_size=8), read(path, model_config=written(tmp_path / "a.yaml", text))
    assert (by_yaml.network.config, by_yaml.process, by_yaml.image_size) == (by_shapes.network.config, by_shapes.process, 8)
    for name, value in by_shapes.network.state_dict().items():
        assert torch.equal(by_yaml.network.state_dict()[name], value), name
    notes = "\n".join(by_yaml.notes)
    if text == NESTED:
        assert "seed_everything, trainer, model.class_path, model.init_args.learning_rate, data.path" in notes
        assert "image size: 8 px, from data.resolution" in notes
    else:
        assert "image size: 8 px, from resolution" in notes and "ignored" not in notes
    assert "image size: 16 px, from --image-size" in "\n".join(
        read(path, model_config=tmp_path / "a.yaml", image_size=16).notes
    )


def test_the_yaml_says_what_the_weights_do_not(tmp_path: Path) -> None:
    odd = {
        "block_out_channels": (16, 32),
        "attention_head_dim": None,
        "norm_num_groups": 8,
        "norm_eps": 1e-3,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
    }
    theirs = unet2d(**odd)
    path = saved(tmp_path / "a.pt", theirs.state_dict())
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in odd.items()) + "image_size: 8\nnorm_eps: 1e-3\n"
    imported = read(path, model_config=written(tmp_path / "a.yaml", text))
    same_output(imported, theirs)
    config = imported.network.config
    assert (config.head_channels, config.norm_eps, config.downsample) == (None, 1e-3, "conv_right")
    with pytest.raises(
        UserError, match="a.pt: the weights do not say norm_num_groups, .* of 32 does not divide 16 channels: write"
    ):
        read(path, image_size=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "a.yaml: not valid YAML, line 1$"),
        ("when: 2024-13-45", "a.yaml: not valid YAML$"),
        ("- a\n- b", "a.yaml: not a YAML mapping, KEY: VALUE"),
        ("model: {in_channels: 4}", "a.yaml says model.in_channels 4, and the weights 3$"),
        ("out_channels: 6", "says out_channels 6, and the weights 3"),
        ("channels: [32, 32]", r"says channels \[32, 32\], and the weights \[32, 64\]"),
        ("base_channels: 64\nchannel_mult: [1, 2]", r"says channel_mult \[64, 128\], and the weights \[32, 64\]"),
        ("blocks: 2", "says blocks 2, and the weights 1"),
        ("blocks: many", "blocks is 'many', and should be a whole number"),
        ("norm_eps: small", "norm_eps is 'small', and should be a number"),
        ("add_attention: 1", "add_attention is 1, and should be true or false"),
        ("attention: [0, 1]", r"says attention \[0, 1\], and the weights \[1\]"),
        ("up_block_types: [UpBlock2D, UpBlock2D]", r"says up_block_types .*, and the weights \['AttnUpBlock2D', 'UpBlock2D'\]"),
        (
            "unet: {resnet_time_scale_shift: scale_shift}",
            "says unet.resnet_time_scale_shift scale_shift, and the weights default",
        ),
        ("num_class_embeds: 10", "says num_class_embeds 10, and the weights None"),
        ("norm_eps: 1.0e-5\nmodel: {norm_eps: 1.0e-6}", "norm_eps is 1e-05 and model.norm_eps is 1e-06; leave one out"),
        (
            "image_size: 8\ndata: {resolution: 16}",
            "says data.resolution, images of 16 px, and image_size, .* 8 px, which differ: give --image-size N",
        ),
        ("resolution: 9", "sees 9 px, of images of 9 px as resolution says, not divisible by 2, what its 2 levels ask for"),
        ("resolution: -8", "size"),
        ("resolution: [8, 16]", r"resolution is \[8, 16\], and should be a whole number"),
        ("norm_num_groups: 24\nresolution: 8", "norm_groups 24 does not divide a width of 32"),
        ("act_fn: gelu", "act_fn='gelu' is not supported"),
        ("center_input_sample: true", "center_input_sample=True is not supported"),
        ("blocks: 1", "do not say the size of the images: give --image-size N, or --model-config with a resolution"),
    ],
)
def test_yamls_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    path = saved(tmp_path / "a.pt", unet2d().state_dict())
    with pytest.raises(UserError, match=message) as error:
        read(path, model_config=written(tmp_path / "a.yaml", text))
    assert "\n" not in str(error.value)


def test_a_yaml_whose_aliases_go_round(tmp_path: Path) -> None:
    path, text = saved(tmp_path / "a.pt", unet2d().state_dict()), "&top\nresolution: 8\nmodel: *top\n"
    assert read(path, model_config=written(tmp_path / "a.yaml", text)).image_size == 8
    text = "resolution: 8\nvae: &v {inside: *v}\n"
    with pytest.raises(UserError, match="network sees latents of 3 channels: give --autoencoder"):
        read(path, model_config=written(tmp_path / "a.yaml", text))
