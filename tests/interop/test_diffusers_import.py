"""Folders that diffusers wrote, read: networks, schedulers, names on the hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from src.config import UserError
from src.interop.diffusers_import import read
from src.interop.schedulers import process_config, scheduler_config
from src.interop.unet_2d import unet2d_config, unet_config
from src.models import UNet
from tests.conftest import randomise
from tests.interop.exports import LEARNED, LINEAR, exported, process_of, unet


def pipeline_folder(folder: Path, **scheduler: Any) -> Path:
    """What DDPMPipeline.save_pretrained writes of a network like google's."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    theirs = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        norm_eps=1e-6,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
    )
    randomise(theirs, scale=0.15)
    DDPMPipeline(theirs, DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def same_output(folder: Path, theirs_at: Path) -> None:
    from diffusers import UNet2DModel

    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        reference = UNet2DModel.from_pretrained(theirs_at).eval()(x, t).sample
        output = read(folder).network(x, t.float())
    assert reference.std() > 0.1
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-5)


def test_a_folder_that_diffusers_wrote(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path / "theirs", variance_type="fixed_large", timestep_spacing="trailing")
    same_output(folder, folder / "unet")
    imported = read(folder)
    assert imported.process == process_of({**LINEAR, "variance": "large"})
    assert imported.network.config.downsample == "conv_right" and imported.network.config.time_embedding.frequency_shift == 1
    network = imported.network
    assert isinstance(network, UNet) and (network.num_classes, network.null_class) == (None, False)
    assert (imported.image_size, imported.channels) == (8, 3)
    assert any("timestep_spacing trailing" in line for line in imported.notes)


def test_a_bare_folder_with_weights_in_bin_and_their_old_names(tmp_path: Path) -> None:
    whole = pipeline_folder(tmp_path / "whole") / "unet"
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((whole / "config.json").read_text())
    state = safetensors.torch.load_file(whole / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    torch.save(state, bare / "diffusion_pytorch_model.bin")
    same_output(bare, whole)
    imported = read(bare)
    assert imported.process == process_of({**LINEAR, "variance": "small"})
    assert any("DDPMScheduler's defaults" in line for line in imported.notes)
    # as google/ddpm-cifar10-32 lies on the hub: the scheduler beside the network, of diffusers 0.1
    (bare / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "DDPMScheduler",
                "_diffusers_version": "0.1.1",
                "beta_end": 0.02,
                "beta_schedule": "linear",
                "beta_start": 0.0001,
                "clip_sample": True,
                "num_train_timesteps": 1000,
                "trained_betas": None,
                "variance_type": "fixed_large",
            }
        )
    )
    assert read(bare).process == process_of({**LINEAR, "variance": "large"})


def test_a_bin_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", unet())
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Path("x")}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="diffusion_pytorch_model.bin"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "laplace"}, "beta_schedule='laplace'.*allowed: linear, scaled_linear, sigmoid, squaredcos_cap_v2"),
        ({"prediction_type": "flow"}, "prediction_type='flow'.*allowed: epsilon, sample, v_prediction"),
        ({"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range'.*twice as many channels out as in"),
        ({"thresholding": True}, "thresholding=True"),
        ({"clip_sample_range": 2.0}, "clip_sample_range=2.0.*allowed: 1.0"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas=\[0.1, 0.2\]"),
        ({"skip_prk_steps": True}, "skip_prk_steps=True"),
        ({"_class_name": "PNDMScheduler"}, "_class_name='PNDMScheduler'"),
        ({"rescale_betas_zero_snr": True}, "cannot be read at one end"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps|steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_schedulers_that_we_have_nothing_for(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = exported(tmp_path / "out", unet())
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_ddim_scheduler_is_read_too() -> None:
    config = process_config(
        {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "set_alpha_to_one": False}, learned=False
    )
    assert config == process_of({"schedule": {"kind": "cosine"}, "target": "eps", "variance": "small"})
    assert process_config(scheduler_config(process_of(LEARNED)), learned=True) == process_of(LEARNED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "of a UNet2DConditionModel; a UNet2DModel is what can be read"),
        ({"sample_size": None}, "lacks sample_size"),
        ({"sample_size": [8, 16, 8]}, "is neither one number nor height and width"),
        ({"out_channels": 4}, "3 channels in and 4 out"),
        ({"out_channels": 6}, "twice as many channels out as in"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"time_embedding_dim": 100}, "time_embedding_dim=100"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups=4"),
        ({"resnet_time_scale_shift": "scale_shift"}, "an attention without norm"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D.* is not supported"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "attention differs down and up"),
        ({"norm_num_groups": 7}, "norm_groups 7 does not divide"),
        ({"layers_per_block": 2}, "of another architecture"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_networks_that_we_have_no_option_for(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = exported(tmp_path / "out", unet())
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_blocks_that_resample_in_different_ways_are_refused() -> None:
    options = {"channel_mult": [1, 1, 2], "attention": ["none", "full", "none"], "downsample": "residual"}
    theirs = unet2d_config(unet(**options), image_size=8)
    assert unet_config(theirs).downsample == "residual"
    for change in ({"downsample_type": "conv"}, {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}):
        with pytest.raises(UserError, match="they resample in different ways"):
            unet_config({**theirs, **change})


def test_widths_that_are_no_multiples_of_the_first_come_out_whole() -> None:
    theirs = unet2d_config(unet(), image_size=8)
    for widths in ([56, 488], [48, 72], [96, 224]):
        assert unet_config({**theirs, "block_out_channels": widths}).widths == widths


def test_folders_that_hold_no_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither unet/config.json nor config.json"):
        read(tmp_path)
    folder = exported(tmp_path / "out", unet())
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged"):
        read(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="no diffusion_pytorch_model.safetensors and no diffusion_pytorch_model.bin"):
        read(folder)
    (folder / "unet" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not the JSON object"):
        read(folder)


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, requests = exported(tmp_path / "out", unet()), []
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(weights)
    weights.unlink()

    def download(name: str, allow_patterns: list[str]) -> str:
        """A hub whose weights are a .bin alone."""
        requests.append((name, allow_patterns))
        if "unet/diffusion_pytorch_model.bin" in allow_patterns:
            torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read("somebody/small").process == process_of(LINEAR)
    assert [name for name, _ in requests] == ["somebody/small"] * 2


def test_a_name_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="small is no folder, and the hub does not give it: the Hugging Face hub was not re"):
        read("somebody/small")
    monkeypatch.undo()
    with pytest.raises(UserError, match="absent is no folder, and the hub does not give it") as error:
        read(tmp_path / "absent")
    assert "\n" not in str(error.value)
