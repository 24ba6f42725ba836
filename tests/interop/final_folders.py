"""Finals of autoencoders and latent runs with random weights, and what convert.py does with them."""

from pathlib import Path
from typing import Any

import pytest
import torch

import convert
from src.config import UserError, validate
from src.models import VAE, VAEConfig
from src.runs.autoencoder import open_autoencoder
from src.runs.opened import open_trained
from src.runtime.checkpoint import write_folder
from src.sampling import SamplerConfig, build_sampler
from tests.conftest import randomise

CPU = torch.device("cpu")
PLAIN = {"widths": [8, 16], "blocks": 1, "mid_attention": "full"}


def vae(options: dict[str, Any], channels: int = 3, *, tanh: bool = False) -> VAE:
    network = randomise(VAE(validate(VAEConfig, options, origin="test"), channels)).eval()
    assert isinstance(network, VAE)
    network.tanh = tanh
    return network


def keep_vae(folder: Path, options: dict[str, Any] = PLAIN, *, channels: int = 3, tanh: bool = False) -> Path:
    """The `final` of a run of train_vae.py, whose weights are random."""
    config = {"name": "small_vae", "image": {"size": 16, "channels": channels}, "model": options}
    config["stages"] = [{"image_size": None}, {"image_size": 32}]
    data = {"class_names": ["cat", "dog"], "counts": {"cat": 30, "dog": 10}, "images": 40, "held_out_images": 4}
    tensors = {"ema": vae(options, channels, tanh=tanh).state_dict()}
    write_folder(folder, tensors, {"config": config, "data": data, "progress": {"step": 7, "tanh": tanh}})
    return folder


def leave(command: str, run: Path, out: Path, *, half: bool = False) -> None:
    """What convert.py does, without its command line, which other tests go through."""
    if command == "to-diffusers":
        convert.to_diffusers(str(run), out)
    else:
        convert.to_safetensors(str(run), out, half=half)


def refuse(command: str, run: Path, out: Path) -> str:
    with pytest.raises(UserError) as raised:
        leave(command, run, out)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def same_autoencoder(one: Path, other: Path, *, digest: bool = True) -> None:
    a, b = (open_autoencoder(str(path), CPU) for path in (one, other))
    assert (a.sizes, a.channels, a.latent_channels, a.factor, a.scaling) == (
        b.sizes, b.channels, b.latent_channels, b.factor, b.scaling,
    )  # fmt: skip
    assert not digest or a.digest == b.digest, "its latent caches are found again"
    assert a.network.tanh == b.network.tanh
    images = torch.rand(2, a.channels, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(a.network.moments(images)[0], b.network.moments(images)[0], rtol=0, atol=0)
        z = torch.randn(2, a.latent_channels, 8, 8)
        torch.testing.assert_close(a.network.decode(z), b.network.decode(z), rtol=0, atol=0)


def images_of(folder: Path, *, labels: list[int] | None = None) -> torch.Tensor:
    opened = open_trained(folder, CPU)
    solver = "ancestral" if opened.process.target != "blend" else "euler"
    steps = 20 if solver == "ancestral" else 6
    return build_sampler(opened, SamplerConfig(solver=solver, steps=steps)).draw(0, range(3), labels, device=CPU)
