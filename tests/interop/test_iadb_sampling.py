"""IADB checkpoints that cannot be read; those that can draw what the loop of the paper draws, on images and on latents."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.config import UserError, load, read_json
from src.interop.iadb import read
from src.interop.imported import keep
from src.runs.autoencoder import open_autoencoder
from src.runs.diffusers_autoencoder import autoencoder_from_config
from src.runs.opened import open_trained
from src.runtime.seeds import noise_of
from src.sampling import SamplerConfig
from tests.conftest import ROOT, randomise, run_in_process

sys.path.insert(0, str(ROOT))
import train_iadb
from src.sampling import build_sampler
from tests.interop.iadb_checkpoints import change, lightning, same_output, saved, under, unet2d, written

CPU = torch.device("cpu")


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
    assert config.model == imported.network.config and config.class_conditional is False and config.autoencoder is None


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
        UserError, match="the network sees latents of 4 channels: give --autoencoder NAME, a diffusers autoencod"
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
    done = run_in_process("convert.py", "to-diffusers", moved, "--out", tmp_path / "theirs")
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
    with pytest.raises(UserError, match="vae has latents that have no scale of their own, .*; only a diffusers autoencoder"):
        read(path, image_size=16, autoencoder=vae)
