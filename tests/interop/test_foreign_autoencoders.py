"""Autoencoders of diffusers, and networks on their latents."""

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from src.config import load, read_json
from src.interop import diffusers_import as folders
from src.interop.diffusers_import import add_autoencoder
from src.interop.imported import keep
from src.runs.autoencoder import open_autoencoder
from src.runs.diffusers_autoencoder import DiffusersAutoencoder, autoencoder_from_config
from src.storage.networks import KL, UNET_2D, find_network
from tests.conftest import randomise, refused, run_in_process
from tests.interop.foreign_weights import CPU, OPTIMIZER, THEIRS, VAE, WEIGHTS, message, plus, saved, under, unet_folder


def vae(folder: Path, **options: Any) -> dict[str, Tensor]:
    network = autoencoder_from_config({**VAE, **options}).network
    randomise(network)
    network.save_pretrained(folder)
    return network.state_dict()


def test_an_autoencoder_is_opened_as_before_whatever_its_files_are_called(tmp_path: Path) -> None:
    """Its hash, which stands in caches and runs, is that of the weights in float32 under its own names."""
    import hashlib

    from diffusers import AutoencoderKL

    state = vae(tmp_path / "vae")
    theirs = DiffusersAutoencoder(AutoencoderKL.from_pretrained(tmp_path / "vae"))
    weights = theirs.state_dict()
    digest = hashlib.sha256(b"".join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest()
    plain = open_autoencoder(str(tmp_path / "vae"), CPU)
    assert plain.digest == digest and plain.document == {"kind": "diffusers", "config": theirs.config}
    assert (plain.scaling, plain.factor, plain.channels, plain.latent_channels) == ((0.25, 2.0), 2, 3, 4)
    assert any(f"{len(state)} tensors" in line for line in plain.notes)

    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    formerly = dict(state)
    for new, name in old.items():
        formerly = {key.replace(f".{new}.", f".{name}."): value for key, value in formerly.items()}
    contents = {
        "wrapped": {"state_dict": under("module.", state)},
        "old_names": formerly,
        "convolved": {key: v[:, :, None, None] if ".to_q.weight" in key else v for key, v in state.items()},
        "averaged": {"model": plus(state), "model_ema": state},
        "with_loss": {**under("vae.", state), "loss.discriminator.weight": torch.ones(2)},
    }
    for name, content in contents.items():
        shutil.copytree(tmp_path / "vae", tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        saved(tmp_path / name / f"{WEIGHTS}.bin", content)
        assert open_autoencoder(str(tmp_path / name), CPU).digest == digest, name
    shutil.copytree(tmp_path / "vae", tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    opened = open_autoencoder(str(tmp_path / "pipeline"), CPU)
    assert opened.digest == digest
    assert f"the autoencoder is {tmp_path / 'pipeline' / 'vae'}, a part of the pipeline" in opened.notes[0]


def test_what_is_no_whole_autoencoder_says_what_it_is(tmp_path: Path) -> None:
    from diffusers import AsymmetricAutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

    def message_of(name: str) -> str:
        return message(open_autoencoder, str(tmp_path / name), CPU)

    unet = UNet2DModel(**THEIRS, in_channels=4, out_channels=4)
    unet.save_pretrained(tmp_path / "unet")
    AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), down_block_out_channels=(8,), up_block_types=("UpDecoderBlock2D",),
        up_block_out_channels=(8,), norm_num_groups=4, sample_size=8,
    ).save_pretrained(tmp_path / "asymmetric")  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    known = (
        "an AutoencoderKL, AutoencoderDC, AutoencoderTiny or VQModel, such as stabilityai/sd-vae-ft-mse, is what can be used"
    )
    kind = "AsymmetricAutoencoderKL"
    assert f"{tmp_path / 'asymmetric'} is of the class {kind}, which is none of these; {known}" in message_of("asymmetric")
    shutil.copytree(tmp_path / "asymmetric", tmp_path / "pipeline_asymmetric" / "vae")
    assert f"of the class {kind}" in message_of("pipeline_asymmetric")
    assert "of the class UNet2DModel, which is a diffusion network and no autoencoder" in message_of("unet")
    assert "is a DDPMPipeline without vae/ with an autoencoder; it holds unet (UNet2DModel)" in message_of("ddpm")

    state = vae(tmp_path / "vae")
    shutil.copytree(tmp_path / "vae", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "holds no diffusion_pytorch_model.safetensors" in message_of("bare")
    file = tmp_path / "bare" / f"{WEIGHTS}.bin"

    def holding(content: Any) -> str:
        torch.save(content, file)
        return message_of("bare")

    half = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.up_blocks")}
    assert "of a whole AutoencoderKL of its config.json: it lacks decoder.up_blocks.0" in holding(half)
    assert "it lacks decoder.conv_in.bias, decoder.conv_in.weight" in holding(
        {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    )
    assert "has in excess encoder.alien" in holding({**state, "encoder.alien": torch.ones(1)})
    assert "this network wants (8, 3, 3, 3)" in holding({**state, "encoder.conv_in.weight": torch.ones(8, 1, 3, 3)})
    assert "names of CompVis's latent-diffusion" in holding(
        {"encoder.conv_in.weight": torch.ones(1), "encoder.down.0.block.0.conv1.weight": torch.ones(1)}
    )
    assert "it holds a network of diffusers' UNet2DModel" in holding({"net": unet.state_dict()})
    assert "it holds the state of an optimizer" in holding(OPTIMIZER)
    bad = {**state, "decoder.conv_out.bias": torch.tensor([0.0, float("inf"), 0.0])}
    assert "1 of the 3 numbers of decoder.conv_out.bias are not finite" in holding(bad)
    torch.save(state, file)
    settings = read_json(tmp_path / "bare" / "config.json")

    def configured(changed: Any) -> str:
        (tmp_path / "bare" / "config.json").write_text(json.dumps(changed))
        return message_of("bare")

    assert "scaling_factor 0" in configured({**settings, "scaling_factor": 0})
    assert "no AutoencoderKL can be built of" in configured({**settings, "down_block_types": ["Nothing"] * 2})
    assert "does not say its _class_name" in configured({"_class_name": None, "latent_channels": 4})
    (tmp_path / "bare" / "config.json").unlink()
    assert "which have a config.json; it holds diffusion_pytorch_model.bin" in message_of("bare")
    assert "is a file; name a folder" in message(open_autoencoder, str(file), CPU)
    saved(tmp_path / "half" / "vae" / f"{WEIGHTS}.bin", state)
    assert "has no config.json, which says what its weights are" in message_of("half")


def test_a_unet_on_latents_is_refused_or_made_to_work(tmp_path: Path) -> None:
    import train_ldm

    unet_folder(tmp_path / "pipeline" / "unet", in_channels=4, out_channels=4)
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"}
    (tmp_path / "pipeline" / "scheduler").mkdir()
    (tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    out, words = tmp_path / "out", ("convert", "diffusers", tmp_path / "pipeline")
    fault = refused(*words, "--out", out)
    assert "sees 4 channels, which no image has, so they are latents: give --autoencoder NAME" in fault
    assert not out.exists(), "nothing was written"
    assert "so they are latents" in message(keep, folders.read(tmp_path / "pipeline"), out, name="a")
    vae(tmp_path / "apart")
    vae(tmp_path / "other", latent_channels=8)
    assert "has latents of 8 channels, and the network sees 4" in refused(
        *words, "--autoencoder", tmp_path / "other", "--out", out
    )
    assert not out.exists()

    done = run_in_process("convert.py", "diffusers", tmp_path / "pipeline", "--autoencoder", tmp_path / "apart", "--out", out)
    assert done.status == 0 and "latents: 4 x 8 x 8 of" in done.out and "python train_ldm.py -cfg" in done.out, done.all
    shutil.copytree(tmp_path / "apart", tmp_path / "pipeline" / "vae")
    done = run_in_process("convert.py", "diffusers", tmp_path / "pipeline", "--out", tmp_path / "whole")
    assert done.status == 0, done.all
    one, two = (safetensors.torch.load_file(place / "autoencoder.safetensors") for place in (out, tmp_path / "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    done = run_in_process("sample.py", out, "--num-samples", "2", "--steps", "3", "--out", tmp_path / "drawn")
    assert done.status == 0 and (tmp_path / "drawn" / "00001.png").exists(), done.all
    cfg = load(out / "finetune.json", train_ldm.Config)
    assert cfg.autoencoder == str(tmp_path / "apart") and cfg.init_from == str(out) and cfg.image.size == 16

    unet_folder(tmp_path / "pixels")
    shutil.copytree(tmp_path / "apart", tmp_path / "pixels" / "vae")
    imported = folders.read(tmp_path / "pixels")
    assert "give --autoencoder if these are latents" in message(add_autoencoder, imported, tmp_path / "pixels")


def test_kinds_of_networks_are_told_apart(tmp_path: Path) -> None:
    """An autoencoder beside a U-Net is no second U-Net, and the other way round."""
    unet, state = unet_folder(tmp_path / "unet"), vae(tmp_path / "vae")
    both = {"state_dict": under("unet.", unet) | under("vae.", state)}
    assert find_network(both, UNET_2D, "a.ckpt")[0].keys() == unet.keys()
    assert find_network(both, KL, "a.ckpt")[0].keys() == state.keys()
