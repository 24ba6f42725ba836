"""Folders of diffusers: written, read back, and sampled from by diffusers and by us alike."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from src.diffusion import Process, ancestral, build_process, clip, ddim, times
from src.interop.diffusers_import import read
from src.interop.imported import keep
from src.models import UNet
from src.runs.opened import open_trained
from tests.interop.exports import LEARNED, LINEAR, exported, process_of, unet

COSINE_V = {"schedule": {"kind": "cosine", "steps": 1000}, "target": "v", "clip": False}
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddpm": {
        "head_channels": None,
        "downsample": "conv_right",
        "norm_eps": 1e-6,
        "time_embedding": {"order": "sin_cos", "frequency_shift": 1.0},
        "channel_mult": [1, 1, 2],
        "attention": ["none", "full", "none"],
        "blocks": 2,
    },
    "adm": {
        "embedding": "scale_shift",
        "downsample": "residual",
        "upsample": "residual",
        "split_qkv_first": False,
        "channel_mult": [1, 1.5, 2],
        "attention": ["none", "full", "full"],
        "classes": 5,
    },
    "legacy_heads": {"head_channels": None, "num_heads": 4, "split_qkv_first": False, "mid_attention": "none"},
    "one_resolution": {"channel_mult": [1], "attention": ["full"], "upsample": "residual", "channels": 1},
    "no_attention": {
        "embedding": "scale_shift",
        "mid_attention": "none",
        "attention": ["none", "none"],
        "head_channels": None,
    },
    "down_residual": {"downsample": "residual", "classes": 2},
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_an_exported_network_gives_the_same_output_in_diffusers_and_read_back(tmp_path: Path, name: str) -> None:
    from diffusers import UNet2DModel

    network = unet(**NETWORKS[name])
    out = exported(tmp_path / "out", network)
    theirs = UNet2DModel.from_pretrained(out, subfolder="unet")
    x, t = torch.randn(3, network.stem.in_channels, 8, 8), torch.tensor([0, 17, 999])
    labels = torch.tensor([0, 1, network.num_classes]) if network.num_classes else None  # the last row is the null class
    with torch.no_grad():
        ours = network(x, t.float(), labels)
        reference = theirs(x, t, class_labels=labels).sample
        back = read(out)
        restored = back.network(x, t.float(), labels)
    assert ours.std() > 0.1
    torch.testing.assert_close(reference, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(restored, ours, rtol=0, atol=1e-6)
    assert isinstance(back.network, UNet) and back.network.num_classes == network.num_classes
    assert back.network.null_class == (network.num_classes is not None)
    assert (back.image_size, back.channels) == (8, network.stem.in_channels)
    assert back.process == process_of(LINEAR)
    if network.config.split_qkv_first and network.config.num_heads is None:  # which diffusers writes in another way
        assert back.network.config == network.config
        for key, value in network.state_dict().items():
            assert torch.equal(back.network.state_dict()[key], value), key


def test_a_network_of_images_that_are_no_squares(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    network, table = unet(), [[8, 16, 30], [16, 8, 20], [8, 8, 10]]
    out = exported(tmp_path / "out", network, image_size=(8, 16), data={"buckets": table, "images": 60})
    assert json.loads((out / "unet" / "config.json").read_text())["sample_size"] == [8, 16]
    pipeline = DDPMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": 2, "output_type": "np"}
    x, t = torch.randn(2, 3, 8, 16), torch.tensor([3, 700])
    back = read(out)
    with torch.no_grad():
        theirs = pipeline.unet(x, t).sample
        torch.testing.assert_close(theirs, network(x, t.float()), rtol=0, atol=1e-5)
        torch.testing.assert_close(back.network(x, t.float()), network(x, t.float()), rtol=0, atol=1e-6)
    assert back.image_size == (8, 16) and pipeline(**options).images.shape == (2, 8, 16, 3)
    card = (out / "README.md").read_text()
    assert "images of 8 x 16 pixels" in card and "8 x 16 (30 images), 16 x 8 (20 images), 8 x 8 (10 images)." in card
    (line,) = re.findall(r"`(pipeline\.unet\.register_to_config\(.*\))`", card)
    exec(line, {"pipeline": pipeline})
    assert pipeline(**options).images.shape == (2, 16, 8, 3)
    run = keep(back, tmp_path / "run", name="wide")
    assert run is not None and json.loads(run.read_text())["image"]["size"] == [8, 16]
    assert open_trained(tmp_path / "run", torch.device("cpu")).shape == (3, 8, 16)


PROCESSES: dict[str, dict[str, Any]] = {
    "linear": {**LINEAR, "variance": "small"},
    "rescaled": {"schedule": {"kind": "linear", "steps": 250, "rescale_betas": True}, "target": "x0", "clip": False},
    "quadratic": {"schedule": {"kind": "quadratic", "steps": 500, "beta_start": 8.5e-4, "beta_end": 0.012}, "target": "eps"},
    "sigmoid": {"schedule": {"kind": "sigmoid", "steps": 100}, "target": "v"},
    "cosine": {"schedule": {"kind": "cosine", "steps": 4000}, "target": "eps", "time_input": {"kind": "index"}},
    "no_signal": {"schedule": {"kind": "linear", "steps": 1000, "zero_terminal_snr": True}, "target": "v", "clip": False},
    "learned": LEARNED,
}


@pytest.mark.parametrize("name", list(PROCESSES))
def test_a_process_survives_and_has_the_schedulers_levels(tmp_path: Path, name: str) -> None:
    from diffusers import DDPMScheduler

    spec = process_of(PROCESSES[name])
    out = exported(tmp_path / "out", unet(learned=name == "learned"), PROCESSES[name])
    back = read(out).process
    assert (back.target, back.variance, back.clip, back.loss) == (spec.target, spec.variance, spec.clip, spec.loss)
    ours, restored = build_process(spec).schedule, build_process(back).schedule
    table = torch.arange(restored.num_steps, dtype=torch.float64)  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(restored.level(table).alpha, ours.level(table).alpha, rtol=1e-12, atol=0)
    theirs: Any = DDPMScheduler.from_pretrained(out, subfolder="scheduler")
    torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.level(table).alpha ** 2, rtol=0, atol=1e-5)


# With eps and much noise a network that has learned nothing draws black and white alone.
LITTLE_NOISE = {"schedule": {"kind": "linear", "steps": 1000, "beta_end": 0.002}, "target": "eps"}


def images_by_us(
    network: UNet, raw: dict[str, Any], seed: int, draw: Callable[..., Tensor], steps: int, **options: Any
) -> np.ndarray:
    """Images (B, H, W, C) in [0, 1], every noise from one generator, as the pipelines take it."""
    process: Process = build_process(process_of(raw))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    denoiser = process.denoiser(network)
    if process_of(raw).clip:
        denoiser = clip(denoiser, process.schedule, -1, 1)
    with torch.no_grad():
        x = draw(
            denoiser,
            x,
            times(process.schedule, steps, "strided"),
            process.schedule,
            noise=lambda _, like: torch.randn(like.shape, generator=generator),
            **options,
        )
    assert float(x.std()) > 0.1 and float((x.abs() < 0.99).float().mean()) > 0.3, "not all black or white"
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("steps", [25, 10])
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("raw", [LITTLE_NOISE, COSINE_V], ids=["linear_eps", "cosine_v"])
def test_their_ddpm_pipeline_draws_our_images(tmp_path: Path, raw: dict[str, Any], variance: str, steps: int) -> None:
    from diffusers import DDPMPipeline

    learned = variance == "learned"
    raw = {**raw, "variance": variance, "loss": {"kind": "hybrid" if learned else "simple"}}
    if steps == 25:
        raw = {**raw, "schedule": {**raw["schedule"], "steps": 25}}  # every level of a short table
    network = unet(learned=learned, scale=0.05)
    pipeline: Any = DDPMPipeline.from_pretrained(exported(tmp_path / "out", network, raw))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=steps, output_type="np"
    ).images
    ours = images_by_us(network, raw, 3, ancestral, steps, variance=variance)
    np.testing.assert_allclose(images, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("raw", [LITTLE_NOISE, COSINE_V], ids=["linear_eps", "cosine_v"])
def test_their_ddim_pipeline_draws_our_images(tmp_path: Path, raw: dict[str, Any], eta: float) -> None:
    from diffusers import DDIMPipeline

    network = unet(scale=0.05)
    pipeline: Any = DDIMPipeline.from_pretrained(exported(tmp_path / "out", network, raw))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=20,
        eta=eta,
        use_clipped_model_output=True,
        output_type="np",
    ).images
    np.testing.assert_allclose(images, images_by_us(network, raw, 3, ddim, 20, eta=eta), rtol=0, atol=1e-4)


def front_matter(text: str) -> list[str]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    assert match is not None
    return match[1].splitlines()


def run_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's Python defines, run beside the folder."""
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    monkeypatch.chdir(out.parent)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    return names


SHORT = {"schedule": {"kind": "linear", "steps": 10, "rescale_betas": False, "beta_end": 0.2}, "target": "eps"}


def test_the_card_of_a_network_without_classes_says_how_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path / "out", unet(), SHORT, data={"images": 7})
    text = (out / "README.md").read_text()
    assert front_matter(text) == ["library_name: diffusers", "tags:", "- unconditional-image-generation"]
    assert "# small\n" in text and "RGB images of 8 x 8 pixels" in text
    assert text.endswith("Data: the run learned from 7 images.\n")
    assert not (out / "classes.json").exists()
    images = run_card(out, monkeypatch)["images"]
    assert len(images) == 4 and images[0].size == (8, 8)


def test_the_card_of_a_folder_with_quotes_in_its_name_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path / 'my "best" \\ one', unet(), SHORT)
    assert run_card(out, monkeypatch)["images"]


def test_the_card_of_a_network_with_classes_says_how_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path / "out", unet(classes=3), SHORT, class_names=("cat", "dog", "emu"))
    text = (out / "README.md").read_text()
    assert front_matter(text) == ["library_name: diffusers", "tags:", "- class-conditional"]
    assert "Classes: 0 cat, 1 dog, 2 emu." in text and "Class 3 is no class" in text
    assert json.loads((out / "classes.json").read_text()) == {"class_names": ["cat", "dog", "emu"], "null_class": True}
    images = run_card(out, monkeypatch)["images"]
    assert images.shape == (4, 3, 8, 8) and float(images.std()) > 0.01


@pytest.mark.parametrize(
    "raw", [{**SHORT, "variance": "learned", "loss": {"kind": "hybrid"}}, {"schedule": {"kind": "sigmoid"}, "target": "eps"}]
)
def test_the_card_leaves_ddim_out_where_it_cannot_be(tmp_path: Path, raw: dict[str, Any]) -> None:
    text = (exported(tmp_path / "out", unet(learned="variance" in raw), raw) / "README.md").read_text()
    assert "DDPMPipeline" in text and "DDIMPipeline" not in text
