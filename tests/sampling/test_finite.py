"""Weights and samples that are not numbers: refused where they are opened, said where they are drawn, and no run's end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from src.config import UserError, read_json
from src.losses import Perceptual, PerceptualConfig
from src.metrics.features import open_features
from src.models import VAE, VAEConfig
from src.models.pretrained import efficientnet_lite0, import_torchvision
from src.runs.autoencoder import open_autoencoder
from src.runtime.checkpoint import export, read_tensors, write_folder
from src.sampling.upscaling import open_upscaler
from src.storage.finite import check_finite, is_finite
from tests.conftest import randomise, refused
from tests.sampling.finite_runs import CPU, a_run, holes, images, smoke

# ---------------------------------------------------------------------------------------------- the check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_found(dtype: torch.dtype, bad: float) -> None:
    value = torch.randn(7, 5).to(dtype)
    assert is_finite(value)
    value[3, 2] = bad
    assert not is_finite(value)


def test_sums_that_overflow_are_no_infinity() -> None:
    assert is_finite(torch.full((9,), 3e38)) and is_finite(torch.full((9,), 6e4, dtype=torch.float16))
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]))
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.empty(0)) and is_finite(torch.zeros(2, device="meta"))
    assert is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))


def test_the_first_tensor_is_named_and_the_others_are_counted() -> None:
    good, bad = torch.ones(4), torch.tensor([1.0, float("nan"), float("inf")])
    check_finite({"a": good, "step": torch.tensor(3), "note": "words"}, "here")
    with pytest.raises(UserError) as error:
        check_finite({"a": good, "b": bad, "c": bad}, "here")
    message = (
        "here: these weights cannot be used: 2 of the 3 numbers of b are not finite (NaN or infinity), and 1 more tensors; get"
    )
    assert str(error.value).startswith(message)


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_every_script_refuses_a_run_whose_weights_are_none(tmp_path: Path, value: float) -> None:
    run, out = a_run(tmp_path / "run", holes("head.bias", value)), tmp_path / "out"
    message = f"{run / 'ema.safetensors'}: these weights cannot be used: 1 of the 3 numbers of head.bias are not finite"
    folder = images(tmp_path / "images")
    assert message in refused("sample", run, "--out", out)
    assert message in refused("interpolate", run, "--out", out)
    assert message in refused("evaluate", run, "--features", "random", "--data", folder, "--out", out)
    assert message in refused("evaluate", run, "--likelihood", "--data", folder, "--out", out)
    assert message in refused("convert", "to-diffusers", run, "--out", out)
    assert message in refused("convert", "safetensors", run, "--out", out)
    finetune = ("-cfg", run / "finetune.json", "--set", f"data.path={folder}", "--run-dir", out / "run")
    assert not (run / "finetune.json").exists(), "write_folder replaced the folder"
    (run / "finetune.json").write_text(json.dumps(finetuned(run)))
    assert message in refused("ddpm_accelerate", *finetune)
    export(tmp_path / "run.pt", {"stem.weight": torch.full((2,), value)}, {}, {"class_names": []}, 3)
    assert "2 of the 2 numbers of stem.weight" in refused("sample", tmp_path / "run.pt", "--out", out)
    assert not (out / "metadata.json").exists()


def finetuned(run: Path) -> dict[str, Any]:
    config = {key: value for key, value in read_json(run / "config.json").items() if key != "low_resolution"}
    optimizer = {"lr": 1e-5, "schedule": {"kind": "constant"}}
    return config | {
        "data": {"source": "folder", "path": "x"},
        "class_conditional": False,
        "optimizer": optimizer,
        "steps": 2,
        "batch_size": 2,
        "init_from": str(run),
    }


def test_autoencoders_whose_weights_are_none(tmp_path: Path) -> None:
    network = randomise(VAE(VAEConfig(widths=(8, 16), blocks=1), 3))
    weights = dict(network.state_dict())
    name = next(iter(weights))
    weights[name] = torch.full_like(weights[name], float("inf"))
    config = {"stages": [{"image_size": 16}], "image": {"size": 16, "channels": 3}, "model": {"widths": [8, 16], "blocks": 1}}
    write_folder(tmp_path / "vae" / "final", {"ema": weights}, {"config": config, "progress": {"step": 3, "tanh": False}})
    for place in (tmp_path / "vae", tmp_path / "vae" / "final"):
        with pytest.raises(
            UserError, match=f"final/ema.safetensors: these weights cannot be used: .* of {name} are not finite"
        ):
            open_autoencoder(str(place), CPU)


def test_networks_that_measure_whose_weights_are_none(tmp_path: Path) -> None:
    def spoilt(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        tensors = {key: value.clone() for key, value in state.items()}
        tensors[name].view(-1)[0] = float("nan")
        return tensors

    state = efficientnet_lite0(None, "test").state_dict()
    torch.save(spoilt(state, "_fc.bias"), tmp_path / "efficientnet.pth")
    message = "1 of the 1000 numbers of _fc.bias are not finite"
    weights = str(tmp_path / "efficientnet.pth")
    with pytest.raises(UserError, match=f"^perceptual.network 'efficientnet_lite0': .*{message}"):
        Perceptual(PerceptualConfig(network="efficientnet_lite0", weights=weights))
    with pytest.raises(UserError, match=f"^--features efficientnet_lite0: .*{message}"):
        open_features("efficientnet_lite0", weights)
    torch.save({"features.0.weight": torch.full((64, 3, 3, 3), float("nan"))}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"^perceptual.weights: .*vgg.pth: .* of features.0.weight are not finite"):
        Perceptual(PerceptualConfig(network="vgg", weights=str(tmp_path / "vgg.pth")))
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.full((2,), float("inf"))}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match="^--inception-weights: .*2 of the 2 numbers of Conv2d_1a_3x3.conv.weight"):
        open_features("inception", str(tmp_path / "inception.pth"))
    import_torchvision()
    torch.save({"params_ema": {"conv_first.weight": torch.full((2,), float("nan"))}}, tmp_path / "upscaler.pth")
    save_file({"conv_first.weight": torch.full((2,), float("nan"))}, tmp_path / "upscaler.safetensors")
    for file in ("upscaler.pth", "upscaler.safetensors"):
        with pytest.raises(UserError, match=f"{file}: .* 2 of the 2 numbers of conv_first.weight are not finite"):
            open_upscaler(tmp_path / file, CPU)


def test_a_checkpoint_that_is_no_number_is_not_gone_on_from(tmp_path: Path) -> None:
    """Its bytes are whole; the message says how to go on, and then the run does."""
    run = tmp_path / "run"
    assert smoke(run).status == 0
    last = run / "checkpoints" / "step_00000004"
    for spoilt in ("ema", "optimizer"):
        tensors = {path.stem: read_tensors(last, path.stem) for path in last.glob("*.safetensors")}
        documents = {path.stem: read_json(path) for path in last.glob("*.json") if path.name != "MANIFEST.json"}
        name = next(key for key, value in tensors[spoilt].items() if value.ndim)
        good, tensors[spoilt] = tensors[spoilt], {**tensors[spoilt], name: tensors[spoilt][name] * float("nan")}
        write_folder(last, tensors, documents)
        done = smoke(run, "steps=4")
        assert done.status == 2 and f"{last / spoilt}.safetensors: these weights cannot be used" in done.err, done.all
        assert f"a run goes on from the one before where {last} is removed" in done.err
        write_folder(last, {**tensors, spoilt: good}, documents)
