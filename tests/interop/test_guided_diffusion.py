"""guided-diffusion's numbers: networks, processes and sampling loops."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from src.config import UserError
from src.diffusion import ancestral, clip, euler, log_variance, times, transitions
from src.interop.guided_diffusion import load, module_names, process_from_flags, read_state, rename, unet_config
from src.models import UNet
from tests.conftest import randomise

NAMES = ("adm_64_class_conditional", "adm_32_legacy_attention")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_loops_of_the_reference(vectors: Path, name: str) -> None:
    network, process = load(vectors / f"{name}.pt", vectors / f"{name}.json")
    io = load_file(vectors / f"{name}.io.safetensors")
    condition = {"labels": io["y"]} if "y" in io else {}
    schedule = process.schedule
    torch.testing.assert_close(process.add_noise(io["x0"], io["noise"], io["t"]), io["x_t"], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(network(io["x"], io["t"].float(), **condition), io["out"], rtol=0, atol=1e-4)

        denoiser = clip(process.denoiser(network, **condition), schedule, -1, 1)
        prediction = denoiser(io["x"], io["t"])
        torch.testing.assert_close(prediction.x0, io["pred_xstart"], rtol=0, atol=1e-4)
        chain = times(schedule, 1000)
        steps = transitions(schedule, chain)
        assert prediction.variance_fraction is not None
        for b, t in enumerate(io["t"].tolist()):
            i = 999 - t
            log_var = log_variance(steps, i, process.variance, prediction.variance_fraction[b])
            mean = float(steps.from_x_t[i]) * io["x"][b] + float(steps.from_x0[i]) * prediction.x0[b]
            torch.testing.assert_close(log_var, io["p_log_variance"][b], rtol=0, atol=1e-4)
            torch.testing.assert_close(log_var.exp(), io["p_variance"][b], rtol=0, atol=1e-4)
            torch.testing.assert_close(mean, io["p_mean"][b], rtol=0, atol=1e-4)

        sample = euler(denoiser, io["x"], times(schedule, 10, "strided"), schedule)
        torch.testing.assert_close(sample, io["ddim10_sample"], rtol=0, atol=1e-3)

        def noise(step: int, like: Tensor) -> Tensor:
            return io["ancestral8_noises"][step]

        sample = ancestral(denoiser, io["x"], times(schedule, 8), schedule, noise=noise, variance=process.variance)
        torch.testing.assert_close(sample, io["ancestral8_sample"], rtol=0, atol=1e-3)


FLAGS = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 2,
    "num_heads": 2,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "1,1,2",
    "learn_sigma": False,
    "diffusion_steps": 500,
    "noise_schedule": "linear",
    "predict_xstart": True,
    "rescale_timesteps": True,
    "sigma_small": True,
}


def test_flags_become_process_and_architecture() -> None:
    process = process_from_flags(FLAGS)
    assert (process.target, process.variance) == ("x0", "small")
    assert float(process.network_time(torch.tensor(10.0))) == 20.0
    assert float(process.schedule.level(torch.tensor(499.0)).alpha) < 0.01, "betas are rescaled by 1000 / T"
    config = unet_config(FLAGS)
    assert config.attention == ("none", "full", "full") and config.channel_mult == (1, 1, 2) and config.num_heads == 2
    assert unet_config({**FLAGS, "image_size": 256, "channel_mult": ""}).channel_mult == (1, 1, 2, 2, 4, 4)
    with pytest.raises(UserError, match="noise_schedule"):
        process_from_flags({**FLAGS, "noise_schedule": "wavy"})


def foreign_state(updown: bool) -> tuple[dict[str, Tensor], UNet]:
    """A state dict with guided-diffusion's names, made from a network of ours."""
    flags = {**FLAGS, "resblock_updown": updown}
    network = randomise(UNet(unet_config(flags)))
    names = module_names(network.config)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    state = {}
    for key, value in network.state_dict().items():
        module, _, kind = key.rpartition(".")
        state[f"{names[module]}.{kind}"] = (
            value[..., None] if names[module].endswith(("qkv", "proj_out")) and kind == "weight" else value
        )
    return state, network  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("updown", [False, True])
def test_names_are_one_to_one(tmp_path: Path, updown: bool) -> None:
    state, network = foreign_state(updown)
    assert len(state) == len(network.state_dict())
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "flags.json").write_text(json.dumps({**FLAGS, "resblock_updown": updown}))
    loaded, _ = load(tmp_path / "model.pt", tmp_path / "flags.json")
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_another_architecture_says_which_keys_differ() -> None:
    state, network = foreign_state(False)
    names = module_names(network.config)
    broken = {key: value for key, value in state.items() if not key.startswith("middle_block.0")}
    with pytest.raises(UserError, match="lacks middle_block"):
        rename(network, broken, names)
    with pytest.raises(UserError, match="in excess alien"):
        rename(network, {**state, "alien": torch.zeros(1)}, names)
    with pytest.raises(UserError, match="out.2.weight is"):
        rename(network, {**state, "out.2.weight": torch.zeros(6, 32, 3, 3)}, names)


def test_a_file_that_is_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        read_state(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match="read safely"):
        read_state(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="state dict of tensors"):
        read_state(tmp_path / "list.pt")
