"""IADB checkpoints: read, sampled from as the paper's loop does, kept on latents too, and written as folders of diffusers."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from src.config import UserError, load, read_json, validate
from src.diffusion import ProcessConfig, build_process, clip, euler, times
from src.interop import diffusers_folder as folders
from src.interop.diffusers_export import export
from src.interop.iadb import PROCESS, architecture, read
from src.interop.iadb_yaml import YamlFacts, read_yaml
from src.interop.imported import Imported, keep
from src.interop.unet_2d import unet_config
from src.models import UNet, UNetConfig
from src.models.pretrained import import_torchvision
from src.runs.autoencoder import open_autoencoder
from src.runs.diffusers_autoencoder import autoencoder_from_config
from src.runs.opened import open_trained
from src.runtime.checkpoint import read_tensors, write_folder
from src.runtime.seeds import noise_of
from src.sampling import SamplerConfig
from tests.conftest import ROOT, here, randomise, refused

sys.path.insert(0, str(ROOT))
import train_iadb
from src.sampling import build_sampler

CPU = torch.device("cpu")
SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@pytest.fixture(autouse=True)
def importable() -> None:
    import_torchvision()


def unet2d(scale: float = 0.15, **options: Any) -> Any:
    """Diffusers' own network, every weight of it from a normal."""
    from diffusers import UNet2DModel

    return randomise(UNet2DModel(**{**SMALL, **options}), scale).eval()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.clone() for name, tensor in state.items()}


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for new, old in OLD.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    return state


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    """What Lightning's Trainer saves around a state dict."""
    return {
        "epoch": 131,
        "global_step": 415486,
        "pytorch-lightning_version": "2.0.2",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 132}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "best_model_score": None}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"batch_size": 64, "learning_rate": 1e-4},
    }


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def same_output(imported: Imported, theirs: Any, side: int = 8) -> None:
    x, alpha = torch.randn(3, theirs.config.in_channels, side, side), torch.tensor([0.0, 0.3, 1.0])
    labels = torch.tensor([0, 1, 2]) if theirs.config.num_class_embeds else None
    with torch.no_grad():
        reference = theirs(x, alpha, class_labels=labels).sample
        ours = imported.network(x, alpha, labels)
    assert reference.std() > 0.1
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize(
    "how", ["bare", "old", "lightning", "ema", "old_ema", "module", "compiled", "safetensors", "half", "nested"]
)
def test_a_checkpoint_gives_the_same_output_as_in_diffusers(tmp_path: Path, how: str) -> None:
    theirs = unet2d()
    state, path = theirs.state_dict(), tmp_path / "last.ckpt"
    other = {name: tensor + 1 for name, tensor in state.items()}
    averaged = under("model.", other) | under("ema.online_model.", other)
    if how in ("old_ema", "old"):
        state = old_names(state)
    averaged |= under("ema.ema_model.", state) | {"ema.initted": torch.tensor(True), "ema.step": torch.tensor(7)}
    frozen = {"vae.encoder.conv_in.weight": torch.zeros(2), "loss.weight": torch.ones(1), "vae.decoder.x": torch.zeros(1)}
    content: Any = {
        "bare": state,
        "old": state,
        "lightning": lightning(under("model.", state) | frozen),
        "ema": lightning(averaged),
        "old_ema": lightning(averaged),
        "module": under("module.", state),
        "compiled": lightning(under("model._orig_mod.module.", state)),
        "safetensors": state,
        "half": {name: tensor.half() for name, tensor in state.items()},
        "nested": {"model": other, "model_ema": state, "step": 3},
    }[how]
    if how == "safetensors":
        path = tmp_path / "cats64.safetensors"
        safetensors.torch.save_file(content, path)
    else:
        saved(path, content)
    imported = read(path, image_size=8)
    if how == "half":
        theirs.load_state_dict({name: tensor.float() for name, tensor in content.items()})
    same_output(imported, theirs)
    assert (imported.image_size, imported.channels, imported.num_classes, imported.autoencoder) == (8, 3, None, None)
    assert imported.process == validate(ProcessConfig, PROCESS) and imported.script == "train_iadb.py"
    notes = "\n".join(imported.notes)
    count = len(state)
    expected = {
        "lightning": [f"{count} tensors under model.", "vae (2)", "loss (1)"],
        "ema": ["under ema.ema_model., an average (EMA), and not those under model.", f"model ({count})", "ema (2)"],
        "compiled": [f"{count} tensors under model._orig_mod.module."],
        "nested": ["under model_ema., an average (EMA), and not those under model.", f"model ({count})"],
    }.get(how, [])
    assert all(words in notes for words in expected), notes
    assert ("left out" in notes) == (how in ("lightning", "ema", "old_ema", "nested")), notes


NETWORKS: dict[str, dict[str, Any]] = {
    "grey": {"in_channels": 1, "out_channels": 1},
    "classes": {"num_class_embeds": 3},
    "no_mid_attention": {"add_attention": False},
    "residual": {
        "block_out_channels": (32, 32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
    },
    "deeper": {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    },
    "one_level": {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_shapes_say_the_architecture(tmp_path: Path, name: str) -> None:
    theirs = unet2d(**NETWORKS[name])
    imported = read(saved(tmp_path / "a.pt", theirs.state_dict()), image_size=8)
    same_output(imported, theirs)
    assert imported.num_classes == theirs.config.num_class_embeds and imported.channels == theirs.config.in_channels


def test_the_network_of_the_paper_by_its_shapes() -> None:
    from diffusers import UNet2DModel

    down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
    down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    with torch.device("meta"):
        theirs = UNet2DModel(
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            add_attention=True,
        )
        config, notes = architecture({name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}, YamlFacts())
        ours = UNet(unet_config(config), in_channels=3, out_channels=3)
    assert (config["down_block_types"], config["up_block_types"]) == (down, up)
    assert "attention_head_dim 8, norm_num_groups 32, norm_eps 1e-05" in notes[-1]
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (ours, theirs)]
    assert counts[0] == counts[1] and 113e6 < counts[0] < 114e6
    assert ours.config.factor == 32


# ---------------------------------------------------------------------------------------------- the YAML

FULL = """
resolution: 8
channels: [32, 64]
attention: [1]
vae_latents: false
"""
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
    assert (by_yaml.model, by_yaml.process, by_yaml.image_size) == (by_shapes.model, by_shapes.process, 8)
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
    assert (imported.model.head_channels, imported.model.norm_eps, imported.model.downsample) == (None, 1e-3, "conv_right")
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


# ---------------------------------------------------------------------------------------------- what cannot be read


def change(theirs: Any, **changed: Tensor | None) -> dict[str, Any]:
    state = {**theirs.state_dict(), **{name.replace("__", "."): tensor for name, tensor in changed.items()}}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    theirs, path = unet2d(), tmp_path / "a.ckpt"
    state = theirs.state_dict()

    def fault(content: Any, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            read(saved(path, content), **{"image_size": 8, **options})
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "say the size of the images: give --image-size N" in fault(state, image_size=None)
    assert "no state dict: neither tensors by name nor a state_dict" in fault(lightning({}) | {"optimizer_states": []})
    assert "no state dict" in fault([1, 2])
    assert "no network of diffusers' UNet2DModel is in it: no key ends in time_embedding" in fault({"a.weight": torch.ones(1)})
    assert "refused, because to load it is to run code (pathlib" in fault(lightning(state) | {"hyper_parameters": Path("x")})
    two = under("a.", state) | under("b.", {name: tensor + 1 for name, tensor in state.items()})
    assert "two networks are in it, a. and b.; save the one" in fault(two)
    read(saved(path, under("a.", state) | under("b.", state)), image_size=8)  # one, under two names
    assert "sees 3 channels and gives 6" in fault(unet2d(out_channels=6).state_dict())
    assert "it lacks up_blocks" in fault({name: tensor for name, tensor in state.items() if "up_blocks.1" not in name})
    assert "it lacks down_blocks.0.resnets.0.conv1.weight" in fault(
        change(theirs, down_blocks__0__resnets__0__conv1__weight=None)
    )
    assert "fourier or learned" in fault(change(theirs, time_proj__weight=torch.ones(16)))
    one = torch.ones(1)
    assert "is a UNet2DConditionModel" in fault(change(theirs, mid_block__attentions__0__transformer_blocks__0__a=one))
    assert "class_embed_type='timestep'" in fault(unet2d(class_embed_type="timestep").state_dict())
    assert "does not divide 20 channels" in fault(unet2d(block_out_channels=(20, 40), norm_num_groups=4).state_dict())
    assert "image: size" in fault(state, image_size=-8)
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match="not a state dict that can be read safely"):
        read(path)
    with pytest.raises(UserError, match="there is no such checkpoint"):
        read(tmp_path / "absent.ckpt")
    with pytest.raises(UserError, match="has no absent.safetensors"):
        read(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match=r"absent.yaml: there is no such file"):
        read(saved(path, state), model_config=tmp_path / "absent.yaml")


# ---------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def papers_loop(theirs: Any, x: Tensor, steps: int) -> Tensor:
    """Algorithm 4, arXiv:2305.03486, with their network."""
    for t in range(steps):
        start, end = t / steps, (t + 1) / steps
        x = x + (end - start) * theirs(x, torch.tensor(start)).sample
    return x


def test_an_import_draws_what_the_papers_loop_draws(tmp_path: Path) -> None:
    theirs = unet2d()
    imported = read(saved(tmp_path / "a.ckpt", lightning(under("model.", theirs.state_dict()))), image_size=8)
    train = keep(imported, tmp_path / "out", name="cats")
    opened = open_trained(tmp_path / "out", CPU)
    assert opened.num_classes is None and opened.codec is None and opened.shape == (3, 8, 8)
    sampler = build_sampler(opened, SamplerConfig(solver="euler", steps=10))
    ours, reference = (
        sampler.draw(5, range(3), None, device=CPU),
        papers_loop(theirs, noise_of(5, range(3), (3, 8, 8)), 10),
    )
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)
    assert float((reference - noise_of(5, range(3), (3, 8, 8))).std()) > 0.1, "and the network moved it"

    assert train == tmp_path / "out" / "finetune.json"
    config = load(train, train_iadb.Config)
    assert (config.name, config.init_from, config.process) == ("cats_finetuned", str(tmp_path / "out"), imported.process)
    assert config.model == imported.model and config.class_conditional is False and config.autoencoder is None


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    theirs = unet2d(num_class_embeds=3)
    keep(read(saved(tmp_path / "a.pt", theirs.state_dict()), image_size=8), tmp_path / "out", name="digits")
    opened = open_trained(tmp_path / "out", CPU)
    assert (opened.class_names, opened.null_class) == (("0", "1", "2"), False)
    samples = build_sampler(opened, SamplerConfig(solver="euler", steps=4)).draw(0, range(3), [0, 1, 2], device=CPU)
    x = noise_of(0, range(3), (3, 8, 8))
    with torch.no_grad():
        for t in range(4):
            x = x + theirs(x, torch.tensor(t / 4), class_labels=torch.tensor([0, 1, 2])).sample / 4
    torch.testing.assert_close(samples, x, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------- latents


def autoencoder(folder: Path, latent_channels: int = 4) -> Path:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    wide = {"block_out_channels": [8, 16], "norm_num_groups": 4, "scaling_factor": 0.5, "shift_factor": 0.25}
    network = autoencoder_from_config({**blocks, **wide, "latent_channels": latent_channels}).network
    randomise(network).save_pretrained(folder)
    return folder


def test_a_network_on_latents_draws_images(tmp_path: Path) -> None:
    theirs = unet2d(in_channels=4, out_channels=4)
    path, vae = (
        saved(tmp_path / "a.ckpt", lightning(under("ema.ema_model.", theirs.state_dict()))),
        autoencoder(tmp_path / "vae"),
    )
    with pytest.raises(
        UserError, match="the network sees latents of 4 channels: give --autoencoder NAME, a diffusers Autoencod"
    ):
        read(path, image_size=16)
    imported = read(path, image_size=16, autoencoder=str(vae))
    same_output(imported, theirs)
    assert (imported.image_size, imported.channels) == (16, 3)
    assert f"latents: 4 x 8 x 8 of {vae}, less 0.25 over 2 by its own scaling" in "\n".join(imported.notes)
    train = keep(imported, tmp_path / "out", name="cats")
    assert train is not None and load(train, train_iadb.Config).autoencoder == str(vae)
    facts = read_json(tmp_path / "out" / "data.json")["latents"]
    assert (facts["shape"], facts["mean"], facts["std"]) == ([4, 8, 8], [0.25] * 4, [2.0] * 4)

    moved = tmp_path / "elsewhere"
    (tmp_path / "out").rename(moved)
    opened = open_trained(moved, CPU)
    assert opened.shape == (4, 8, 8) and opened.image.size == 16
    samples = build_sampler(opened, SamplerConfig(solver="euler", steps=10)).draw(5, range(2), None, device=CPU)
    from diffusers import AutoencoderKL

    latents = papers_loop(theirs, noise_of(5, range(2), (4, 8, 8)), 10)
    with torch.no_grad():
        reference = AutoencoderKL.from_pretrained(vae).eval().decode(latents / 0.5 + 0.25).sample
    assert samples.shape == (2, 3, 16, 16)
    torch.testing.assert_close(samples, reference, rtol=0, atol=1e-4)
    done = here("convert.py", "to-diffusers", moved, "--out", tmp_path / "theirs")
    assert done.status == 0 and (tmp_path / "theirs" / "vae" / "config.json").is_file(), done.all


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("resolution: 16\nvae_latents: true\nvae: vae", 16),
        ("model: {sample_size: 8, first_stage: {pretrained: vae}}", 16),
        ("model: {sample_size: 8}\ndata: {image_size: 16}\nautoencoder_path: vae", 16),
        ("resolution: 32\nuse_latents: true\nvae_path: vae\nvae: null", 32),
    ],
)
def test_a_yaml_names_the_autoencoder_and_the_size(tmp_path: Path, text: str, size: int) -> None:
    """`resolution` and `image_size` are of images, diffusers' `sample_size` is what the network sees."""
    theirs = unet2d(in_channels=4, out_channels=4)
    path = saved(tmp_path / "a.pt", theirs.state_dict())
    autoencoder(tmp_path / "vae")
    imported = read(path, model_config=written(tmp_path / "a.yaml", text))
    assert (
        imported.image_size == size and imported.autoencoder is not None and imported.autoencoder.path == str(tmp_path / "vae")
    )


@pytest.mark.parametrize(
    ("channels", "text", "given", "message"),
    [
        (4, "vae_latents: false", None, "says vae_latents false, and the weights see 4 channels, which no images have"),
        (3, "latents: false", "vae", "says latents false, and --autoencoder .*vae is given; leave one out"),
        (3, "latents: true", None, "sees latents of 3 channels: give --autoencoder"),
        (4, "vae: someone/sd-vae", None, r"4 channels \(the YAML names someone/sd-vae\): give --autoencoder"),
        (3, "resolution: 16", "vae", "has latents of 4 channels, and the network sees 3"),
        (4, "resolution: 15", "vae", "image.size 15 is not divisible by 2"),
        (4, "resolution: 18", "vae", "sees 9 px, of images of 18 px as resolution says, not divisible by 2"),
        (
            4,
            "sample_size: 8\nresolution: 8",
            "vae",
            "says resolution, images of 8 px, and sample_size, images of 16 px, which differ",
        ),
        (4, "resolution: 16", "absent", "autoencoder .*absent does not exist"),
    ],
)
def test_latents_that_cannot_be(tmp_path: Path, channels: int, text: str, given: str | None, message: str) -> None:
    path = saved(tmp_path / "a.pt", unet2d(in_channels=channels, out_channels=channels).state_dict())
    autoencoder(tmp_path / "vae")
    config, named = written(tmp_path / "a.yaml", text), str(tmp_path / given) if given else None
    with pytest.raises(UserError, match=message) as error:
        read(path, model_config=config, autoencoder=named)
    assert "\n" not in str(error.value)


def test_latents_without_a_scale_of_their_own_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, vae = saved(tmp_path / "a.pt", unet2d(in_channels=4, out_channels=4).state_dict()), str(autoencoder(tmp_path / "vae"))
    opened = replace(open_autoencoder(vae, CPU), scaling=None)  # as a run of train_vae.py
    monkeypatch.setattr("src.interop.imported.open_autoencoder", lambda name, device: opened)
    with pytest.raises(UserError, match="the latents of .*vae have no scale of their own, .*; only a diffusers AutoencoderKL"):
        read(path, image_size=16, autoencoder=vae)


# ---------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path) -> None:
    theirs = unet2d()
    path = saved(tmp_path / "a.ckpt", lightning(under("model.", theirs.state_dict())))
    config = written(tmp_path / "a.yaml", FULL)
    done = here("convert.py", "iadb", path, "--model-config", config, "--out", tmp_path / "cats")
    assert done.status == 0 and f"python train_iadb.py -cfg {tmp_path / 'cats' / 'finetune.json'}" in done.out, done.all
    done = here("sample.py", tmp_path / "cats", "--num-samples", "2", "--steps", "4", "--out", tmp_path / "s")
    assert done.status == 0 and (tmp_path / "s" / "00001.png").exists(), done.all
    done = here("convert.py", "to-diffusers", tmp_path / "cats", "--out", tmp_path / "theirs")
    assert done.status == 0 and not (tmp_path / "theirs" / "model_index.json").exists(), done.all
    done = here("convert.py", "diffusers", tmp_path / "theirs", "--out", tmp_path / "again")
    assert done.status == 0 and "python train_iadb.py" in done.out, done.all
    before, after = (safetensors.torch.load_file(tmp_path / name / "ema.safetensors") for name in ("cats", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(tmp_path / "again" / "config.json")["process"] == read_json(tmp_path / "cats" / "config.json")["process"]
    cats = tmp_path / "cats"
    config = {**read_json(cats / "config.json"), "source": {"source": "folder", "path": "dogs"}}
    documents = {"config": config, "data": read_json(cats / "data.json"), "progress": {"step": 0}}
    write_folder(tmp_path / "pairs", {"ema": read_tensors(cats, "ema")}, documents)
    assert "from noise alone" in refused("convert", "to-diffusers", tmp_path / "pairs", "--out", tmp_path / "more")
    assert "give --image-size N" in refused("convert", "iadb", path, "--out", tmp_path / "more")
    assert "exists and is not empty" in refused("convert", "iadb", path, "--image-size", "8", "--out", tmp_path / "cats")


# ---------------------------------------------------------------------------------------------- folders of diffusers

BLEND = {"schedule": {"kind": "blend"}, "target": "blend"}
TIMES: dict[str, dict[str, Any]] = {
    "papers": PROCESS,
    "flow": {**BLEND, "clip": False},
    "flow_clipped": {**BLEND, "clip": True, "time_input": {"kind": "t", "scale": 1000.0}},
    "alpha_clipped": {**BLEND, "clip": True, "time_input": {"kind": "alpha", "scale": 250.5}},
    "t": {**BLEND, "clip": False, "time_input": {"kind": "t"}},
}


def run_card(out: Path, monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> Tensor:
    """The images of the card's Python, run beside the folder on this noise."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    monkeypatch.chdir(out.parent)
    monkeypatch.setattr(torch, "randn", lambda *shape: noise if shape == tuple(noise.shape) else pytest.fail(str(shape)))
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.undo()
    return names["images"]


@pytest.mark.parametrize(
    ("time", "classes"),
    [("papers", None), ("papers", 3), ("flow", None), ("flow", 3), ("flow_clipped", None), ("alpha_clipped", 3), ("t", None)],
)
def test_the_card_draws_our_images_and_the_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: str, classes: int | None
) -> None:
    from diffusers import UNet2DModel

    spec = validate(ProcessConfig, TIMES[time])
    raw = {"base_channels": 32, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "full"]}
    options = {"embedding": "add", "head_channels": 8}
    network = UNet(validate(UNetConfig, {**raw, **options}), in_channels=3, num_classes=classes)
    randomise(network, 0.15).eval()
    out, names = tmp_path / "out", ("a", "b", "c")[: classes or 0]
    export(network, spec, image_size=8, out=out, name="small", class_names=names)
    flow = time.startswith("flow")
    expected = {"README.md", "process.json", *(["classes.json"] if classes else [])}
    expected |= {"unet", "scheduler"} if flow else {"config.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in out.iterdir()} == expected

    labels = torch.arange(4) % 3 if classes else None
    x, process = torch.randn(4, 3, 8, 8), build_process(spec)
    denoiser = process.denoiser(network, **({"labels": labels} if classes else {}))
    if spec.clip:
        denoiser = clip(denoiser, process.schedule, -1, 1)
    with torch.no_grad():
        ours = euler(denoiser, x, times(process.schedule, 50, "even"), process.schedule)
    images = run_card(out, monkeypatch, x)
    assert float((ours - x).std()) > 0.1 and float((ours.abs() < 0.99).float().mean()) > 0.3, "moved, and not black or white"
    torch.testing.assert_close(images, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)

    theirs: Any = UNet2DModel.from_pretrained(out, subfolder="unet" if flow else None)
    with torch.no_grad():
        predicted = theirs(x, torch.tensor(0.3), class_labels=labels).sample
        torch.testing.assert_close(
            predicted, network(x, torch.full((4,), 0.3), labels) * (-1 if flow else 1), rtol=0, atol=1e-5
        )
    back = folders.read(out)
    assert (back.process, back.model, back.null_class) == (spec, network.config, classes is not None)
    assert back.class_names == names and back.script == "train_iadb.py"
    for name, value in network.state_dict().items():
        assert torch.equal(back.network.state_dict()[name], value), name


def test_a_flow_of_somebody_else_is_read(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = unet2d(sample_size=8)
    theirs.save_pretrained(tmp_path / "theirs" / "unet")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(tmp_path / "theirs" / "scheduler")
    imported = folders.read(tmp_path / "theirs")
    assert imported.process == validate(ProcessConfig, {**BLEND, "clip": False, "time_input": {"kind": "t", "scale": 1000.0}})
    assert any("shift 3.0" in line and "left out" in line for line in imported.notes) and imported.script == "train_iadb.py"
    scheduler.set_timesteps(8)
    x = start = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t).sample, t, x).prev_sample
        process = build_process(imported.process)
        ours = euler(process.denoiser(imported.network), start, scheduler.sigmas.double(), process.schedule)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)

    path = tmp_path / "theirs" / "scheduler" / "scheduler_config.json"
    for change, message in (
        ({"invert_sigmas": True}, "invert_sigmas=True"),
        ({"num_train_timesteps": "x"}, "time_input.scale"),
    ):
        path.write_text(json.dumps({**read_json(path), **change}))
        with pytest.raises(UserError, match=message) as error:
            folders.read(tmp_path / "theirs")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        path.write_text(json.dumps({**read_json(path), "invert_sigmas": False, "num_train_timesteps": 1000}))
    config = tmp_path / "theirs" / "unet" / "config.json"
    config.write_text(json.dumps({**read_json(config), "out_channels": 6}))
    with pytest.raises(UserError, match="the blend learns no variance"):
        folders.read(tmp_path / "theirs")


def test_a_blend_that_cannot_be_exported(tmp_path: Path) -> None:
    network = UNet(validate(UNetConfig, {"embedding": "add", "head_channels": 8}), in_channels=3)
    spec = validate(ProcessConfig, {**BLEND, "target": "v"})
    with pytest.raises(UserError, match="no process.schedule blend with process.target v; what can be exported has blend"):
        export(network, spec, image_size=8, out=tmp_path / "out", name="small")
    assert list(tmp_path.iterdir()) == []
