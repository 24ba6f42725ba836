"""Autoencoders leave for diffusers, or for a folder of our own, and come back to the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from src.config import UserError, validate
from src.interop.autoencoder_kl import autoencoder_files, obstacles
from src.models import VAE, VAEConfig
from src.models.pretrained import import_torchvision
from src.runs.autoencoder import Autoencoder, open_autoencoder
from src.runs.diffusers_autoencoder import exported_autoencoder
from tests.conftest import refused, run_in_process
from tests.interop.final_folders import CPU, PLAIN, keep_vae, leave, refuse, same_autoencoder, vae

ARCHITECTURES = {
    "plain": PLAIN,
    "one_level": {"widths": [16], "blocks": 3, "mid_attention": "none", "latent_channels": 3},
    "attention_everywhere": {
        "widths": [8, 16, 24],
        "blocks": 2,
        "mid_attention": "full",
        "attention": ["none", "full", "full"],
    },
    "one_head": {"widths": [8, 8, 16], "blocks": 1, "mid_attention": "full", "head_channels": 16, "norm_groups": 4},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_autoencoder_is_their_autoencoder_kl(tmp_path: Path, name: str) -> None:
    import_torchvision()
    channels = 1 if name == "one_head" else 3
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    network, document = (
        vae(ARCHITECTURES[name], channels),
        {"kind": "atelier", "model": ARCHITECTURES[name], "channels": channels},
    )
    mean, std = (
        [f(i) for i in range(network.spec.latent_channels)] for f in (lambda i: 0.3 * i - 0.4, lambda i: 0.5 + 0.7 * i)
    )
    autoencoder = Autoencoder(network, "run", {**document, "tanh": False, "sizes": [16, 32]}, "abc", channels, 4, 2)
    files = autoencoder_files(autoencoder, {"mean": mean, "std": std})
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    theirs: Any = AutoencoderKL.from_pretrained(tmp_path)
    images, m, s = torch.rand(2, channels, 24, 32) * 2 - 1, *(torch.tensor(values)[:, None, None] for values in (mean, std))
    with torch.no_grad():
        ours, logvar = network.moments(images)
        assert logvar is not None and float(ours.std()) > 0.01, "the network does something"
        posterior = theirs.encode(images).latent_dist
        torch.testing.assert_close(posterior.mean, (ours - m) / s, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(posterior.std, (0.5 * logvar).exp() / s, rtol=1e-5, atol=1e-5)
        z = torch.randn_like(ours)
        torch.testing.assert_close(theirs.decode(z).sample, network.decode(z * s + m), rtol=1e-5, atol=1e-5)
    exported = exported_autoencoder(tmp_path)
    assert exported is not None and exported[2] == "abc"
    state = network.state_dict()
    assert exported[1].keys() == state.keys() and all(torch.equal(exported[1][key], state[key]) for key in state)


UNLIKE = [
    ({}, True, "it ends with tanh"),
    ({"mid_attention": "linear"}, False, "mid_attention is linear"),
    ({"attention": ["linear", "none"]}, False, "is linear"),
    ({"head_channels": 8}, False, "several heads"),
    ({"downsample": "max"}, False, "model.downsample is max"),
    ({"downsample": "conv"}, False, "model.downsample is conv"),
    ({"upsample": "transposed"}, False, "model.upsample is transposed"),
    ({"upsample": "bilinear"}, False, "model.upsample is bilinear"),
    ({"bottleneck": {"kind": "vq", "codes": 8}}, False, "bottleneck is vq"),
    ({"mid_attention": "linear", "upsample": "bilinear"}, True, "linear (full or none is needed); model.upsample is bilinear"),
]


def test_what_an_autoencoder_kl_cannot_be_is_refused_and_leaves_as_our_own_folder(tmp_path: Path) -> None:
    for number, (change, tanh, reason) in enumerate(UNLIKE):
        folder = tmp_path / str(number)
        run = keep_vae(folder / "run", PLAIN | change, tanh=tanh)
        message = refuse("to-diffusers", run, folder / "theirs")
        assert reason in message and f"python convert.py safetensors {run} --out FOLDER" in message
        assert not (folder / "theirs").exists()
        leave("safetensors", run, folder / "own")
        card = (folder / "own" / "README.md").read_text()
        assert "AutoencoderKL cannot be this network" in card and reason in card
        same_autoencoder(run, folder / "own")


def test_with_one_level_the_ways_to_resample_do_not_matter() -> None:
    spec = validate(
        VAEConfig, {"widths": [8], "downsample": "max", "upsample": "bilinear", "mid_attention": "full"}, origin="t"
    )
    assert obstacles(VAE(spec, 3)) == []


@pytest.mark.parametrize("command", ["to-diffusers", "safetensors"])
def test_an_autoencoder_leaves_and_comes_back_to_the_bit(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = keep_vae(tmp_path / "run"), tmp_path / "out"
    done = run_in_process("convert.py", command, run, "--out", out)
    assert done.status == 0 and "README.md" in done.out, done.all
    card = (out / "README.md").read_text()
    assert "40 images; 4 more images are held out" in card and "0 cat (30 images), 1 dog (10 images)" in card
    same_autoencoder(run, out)
    if command == "to-diffusers":
        monkeypatch.chdir(tmp_path)
        exec(card.split("```python\n")[1].split("```")[0], scope := {})
        assert scope["images"].shape == (1, 3, 16, 16)
        message = refused("convert", "diffusers", out, "--out", tmp_path / "again")
        assert "needs no conversion" in message and "autoencoder=" in message
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "--out" in refused("convert", command, run, "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_weights_that_were_trained_on_in_diffusers_are_theirs(tmp_path: Path) -> None:
    run, out = keep_vae(tmp_path / "run"), tmp_path / "out"
    leave("to-diffusers", run, out)
    path = out / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    state["decoder.conv_out.bias"] += 1
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    changed = open_autoencoder(str(out), CPU)
    assert changed.scaling == (0.0, 1.0) and changed.digest != open_autoencoder(str(run), CPU).digest
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(changed.network.decode(z), open_autoencoder(str(run), CPU).network.decode(z) + 1)


def test_a_damaged_note_of_ours_is_said(tmp_path: Path) -> None:
    run, out = keep_vae(tmp_path / "run"), tmp_path / "out"
    leave("to-diffusers", run, out)
    note = json.loads((out / "atelier.json").read_text())
    del note["model"]
    (out / "atelier.json").write_text(json.dumps(note))
    with pytest.raises(UserError, match=r"atelier.json is damaged: it lacks model"):
        open_autoencoder(str(out), CPU)


def test_half_precision_spares_a_codebook(tmp_path: Path) -> None:
    run = keep_vae(tmp_path / "run", PLAIN | {"bottleneck": {"kind": "vq", "codes": 8}})
    leave("safetensors", run, tmp_path / "own", half=True)
    state = safetensors.torch.load_file(tmp_path / "own" / "ema.safetensors")
    assert {key for key, value in state.items() if value.dtype == torch.float32} == {
        "codebook.codebook", "codebook.size", "codebook.total",
    }  # fmt: skip
    opened = open_autoencoder(str(tmp_path / "own"), CPU).network
    assert next(opened.parameters()).dtype == torch.float32
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        close = open_autoencoder(str(run), CPU).network.decode(z)
        torch.testing.assert_close(opened.decode(z), close, rtol=1e-2, atol=1e-2)
