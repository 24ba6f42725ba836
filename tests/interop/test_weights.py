"""Files of weights as other programs leave them: what is taken of them, what is left out, what is refused."""

import argparse
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from src.config import read_json, validate
from src.interop import diffusers_import as folders
from src.interop import guided_diffusion, iadb
from src.interop.guided_diffusion import module_names
from src.interop.imported import keep
from src.interop.names import rename_state
from src.models import UNet, UNetConfig
from src.storage.networks import preference
from src.storage.weight_files import read_file
from tests.conftest import randomise, refused
from tests.interop.foreign_weights import OPTIMIZER, THEIRS, WEIGHTS, message, plus, saved, under
from tests.interop.guided_networks import SMALL as SMALL_GUIDED
from tests.interop.guided_networks import SMALL_FLAGS, foreign_state


@pytest.fixture(scope="module")
def guided() -> dict[str, Tensor]:
    """The state dict of a small U-Net of guided-diffusion."""
    config = validate(UNetConfig, SMALL_GUIDED)
    network = UNet(config)
    randomise(network)
    return foreign_state(network, config)


SHELLS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "module": lambda state: under("module.", state),
    "compiled": lambda state: under("_orig_mod.module.", state),
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": OPTIMIZER},
    "inside_and_beside": lambda state: {**state, "optimizer": OPTIMIZER},
    "model_ema": lambda state: {"model": plus(state), "ema": state, "opt": OPTIMIZER, "args": argparse.Namespace(lr=1)},
    "k_diffusion": lambda state: {
        "model": under("inner_model.", plus(state)),
        "model_ema": under("inner_model.", state),
        "opt": OPTIMIZER,
        "epoch": 2,
    },
    "lightning": lambda state: {
        "state_dict": under("net.", plus(state)) | under("ema_net.", state) | {"loss.weight": torch.ones(2)},
        "optimizer_states": [OPTIMIZER],
        "callbacks": {},
        "hyper_parameters": {"lr": 1e-4},
    },
    "lightning_weight_averaging": lambda state: {
        "state_dict": under("model.", state),
        "current_model_state": under("model.", plus(state)),
        "averaging_state": {"n_averaged": torch.tensor(4)},
    },
    "denoising_diffusion_pytorch": lambda state: {
        "step": 700000,
        "model": under("model.", plus(state)) | {"betas": torch.zeros(10)},
        "opt": OPTIMIZER,
        "ema": under("ema_model.model.", state)
        | under("online_model.model.", plus(state))
        | {"initted": torch.tensor(True), "step": torch.tensor(9), "ema_model.betas": torch.zeros(10)},
        "version": "2.0",
    },
    "compvis": lambda state: {
        "state_dict": under("model.diffusion_model.", plus(state))
        | {f"model_ema.diffusion_model{name.replace('.', '')}": tensor for name, tensor in state.items()}
        | {"model_ema.decay": torch.tensor(0.9999), "first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    },
    "score_sde": lambda state: {
        "model": under("module.", plus(state)),
        "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": list(state.values())},
        "optimizer": OPTIMIZER,
        "step": 7,
    },
    "nemo": lambda state: {"state_dict": under("model.", plus(state)), "ema_weights": list(state.values())},
    "list_of_states": lambda state: [under("module.", state), OPTIMIZER, 3, torch.tensor(4)],
    "wrapped_inside": lambda state: {
        ".".join([*name.split(".")[:-1], "_checkpoint_wrapped_module", name.split(".")[-1]]): tensor
        for name, tensor in under("_orig_mod.", state).items()
    },
    "numbers": lambda state: {"net": state, "loss": np.float64(0.5), "step": np.int64(3), "args": argparse.Namespace(lr=1)},
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
}
AVERAGED = set(SHELLS) - {"bare", "module", "compiled", "state_dict", "inside_and_beside", "numbers", "parameters"}
AVERAGED -= {"list_of_states", "wrapped_inside"}


@pytest.mark.parametrize("how", list(SHELLS))
@pytest.mark.parametrize("kind", ["guided-diffusion", "iadb", "diffusers"])
def test_every_converter_finds_the_network_in_what_is_around_it(
    tmp_path: Path, guided: dict[str, Tensor], how: str, kind: str
) -> None:
    """The average where one is there; and it is said what was taken and what was left out."""
    from diffusers import UNet2DModel

    if kind == "guided-diffusion":
        state = guided
        path = saved(tmp_path / "model.pt", SHELLS[how](state))
        read = guided_diffusion.read(path, SMALL_FLAGS)
        config = validate(UNetConfig, SMALL_GUIDED)
        expected = rename_state(read.network, state, module_names(config))
    else:
        theirs = randomise(UNet2DModel(**THEIRS))
        state = theirs.state_dict()
        theirs.save_pretrained(tmp_path / "plain")
        if kind == "iadb":
            options = {"image_size": 8, "model_config": tmp_path / "a.yaml"}
            (tmp_path / "a.yaml").write_text("norm_num_groups: 4\n")
            read = iadb.read(saved(tmp_path / "model.ckpt", SHELLS[how](state)), **options)
            wanted = iadb.read(saved(tmp_path / "plain.ckpt", state), **options)
        else:
            shutil.copytree(tmp_path / "plain", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
            saved(tmp_path / "model" / f"{WEIGHTS}.bin", SHELLS[how](state))
            read, wanted = folders.read(tmp_path / "model"), folders.read(tmp_path / "plain")
        expected = wanted.network.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(read.network.state_dict()[name], tensor), name
    notes = "\n".join(read.notes)
    assert f"{len(state)} tensors" in notes
    assert ("an average (EMA)" in notes) == (how in AVERAGED - {"lightning_weight_averaging"}), notes
    assert ("and not those under" in notes) == (how in AVERAGED), notes
    whole = ("bare", "module", "compiled", "numbers", "parameters", "wrapped_inside")
    assert ("left out, tensors of" in notes) == (how not in whole), notes
    assert list(read.notes) == saved_notes(read, tmp_path / "out")


def saved_notes(imported: Any, out: Path) -> list[str]:
    keep(imported, out, name="kept")
    return read_json(out / "data.json")["imported"]


def test_which_chooses(tmp_path: Path, guided: dict[str, Tensor]) -> None:
    both = saved(tmp_path / "a.pt", {"model": plus(guided), "ema": guided})

    def first(**options: Any) -> Tensor:
        return guided_diffusion.read(both, SMALL_FLAGS, **options).network.state_dict()["stem.weight"]

    stem = guided["input_blocks.0.0.weight"]
    assert torch.equal(first(), stem) and torch.equal(first(which="ema"), stem)
    assert torch.equal(first(which="raw"), stem + 1) and torch.equal(first(which="model"), stem + 1)
    assert "--which last: the networks in it are ema. and model.; allowed: those, ema, raw" in message(first, which="last")
    two = saved(tmp_path / "b.pt", {"ema_0.999": guided, "ema_0.9999": plus(guided), "model": plus(guided, 2)})
    fault = message(guided_diffusion.read, two, SMALL_FLAGS)
    assert "two networks are in it, ema_0.999. and ema_0.9999.; save the one" in fault and "--which ema_0.9999" in fault
    chosen = guided_diffusion.read(two, SMALL_FLAGS, which="ema_0.9999")
    assert torch.equal(chosen.network.state_dict()["stem.weight"], stem + 1)
    plain = saved(tmp_path / "c.pt", guided)
    assert "no average (EMA) of weights; it holds bare" in message(guided_diffusion.read, plain, SMALL_FLAGS, which="ema")


@pytest.mark.parametrize(
    ("name", "average"),
    [
        *(
            (name, True)
            for name in ("ema", "model_ema", "ema_model", "EMA", "modelEMA", "state_dict_ema", "params_ema", "unet-ema")
        ),
        *((name, True) for name in ("ema_0.9999", "averaged_model", "swa_model", "unet_ema", "ema.shadow_params", "netEma")),
        *((name, True) for name in ("modelema", "model_avg", "avg_model", "polyak", "shadow", "moving_average")),
        *((name, False) for name in ("model", "schema", "semantic", "module", "net", "thema", "cinema", "weights", "")),
        *((name, False) for name in ("non_ema", "unet_non_ema", "no_ema", "model_without_ema")),
    ],
)
def test_names_of_averages(name: str, average: bool) -> None:
    assert (preference(f"{name}.") == 2) == average


def test_raw_weights_beside_their_average_are_remarked_on(tmp_path: Path, guided: dict[str, Tensor]) -> None:
    saved(tmp_path / "ema_0.9999_001000.pt", guided)
    imported = guided_diffusion.read(saved(tmp_path / "model001000.pt", guided), SMALL_FLAGS)
    assert "these are raw weights; an average (EMA) is beside them: ema_0.9999_001000.pt" in imported.notes
    assert not any("raw" in line for line in guided_diffusion.read(tmp_path / "ema_0.9999_001000.pt", SMALL_FLAGS).notes)


FOREIGN: dict[str, tuple[Any, str]] = {
    "optimizer": (OPTIMIZER, "it holds the state of an optimizer, and no weights"),
    "another_project": (
        {"model": {"init_conv.weight": torch.ones(1), "time_mlp.1.weight": torch.ones(1)}},
        "it holds a network of denoising-diffusion-pytorch",
    ),
    "diffusers": (
        {"net": {"time_embedding.linear_1.weight": torch.ones(1), "conv_in.weight": torch.ones(1)}},
        "diffusers' UNet2DModel, which is read by: python convert.py iadb FILE",
    ),
    "autoencoder": ({"module.decoder.conv_in.weight": torch.ones(1)}, "it holds a network of diffusers' AutoencoderKL"),
    "ours": (
        {"weights": {"stem.weight": torch.ones(1)}, "config": {}, "data": {}, "step": 3},
        "it is an export of this project, which sample.py",
    ),
    "nothing": ({"epoch": 3}, "neither tensors by name nor a state_dict of them"),
    "unknown": ({"net": {"layer.weight": torch.ones(1)}}, "its keys are net.layer.weight"),
    "optimizers_by_name": (
        {"optimizer_state_dict": {**OPTIMIZER, "state": {"a.weight": {"exp_avg": torch.zeros(3)}}}, "epoch": 3},
        "it holds the state of an optimizer, and no weights",
    ),
    "lora": (
        {f"unet.down_blocks.0.attentions.0.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"},
        "it holds a LoRA, which only adds to the weights of a network",
    ),
    "kohya": ({"lora_unet_mid_block.lora_down.weight": torch.ones(2, 2)}, "it holds a LoRA"),
    "nan": (
        {"time_embed.0.weight": torch.full((2,), float("nan"))},
        "2 of the 2 numbers of time_embed.0.weight are not finite",
    ),
}


@pytest.mark.parametrize("name", list(FOREIGN))
def test_what_else_is_inside_is_said(tmp_path: Path, name: str) -> None:
    content, words = FOREIGN[name]
    path = saved(tmp_path / "model.pt", content)
    fault = message(guided_diffusion.read, path)
    assert words in fault and str(path) in fault
    if name not in ("nan", "nothing", "diffusers"):
        assert words in message(iadb.read, path, image_size=8)


def test_files_that_hold_no_weights(tmp_path: Path, guided: dict[str, Tensor]) -> None:
    def message_of(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return message(read_file, tmp_path / name)

    assert "Git LFS pointer" in message_of("a.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "Git LFS pointer" in message_of(
        "a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    )
    assert "a web page" in message_of("b.pt", b"\n<!DOCTYPE html><html>Sign in</html>")
    assert "an HDF5 file" in message_of("c.pt", b"\x89HDF\r\n")
    assert "it is empty" in message_of("d.pt", b"")
    assert "is damaged" in message_of("e.safetensors", b"cut")
    assert "it is a text file" in message_of("h.pt", b"Access denied")
    assert "nothing but zeros" in message_of("i.pt", bytes(5000))
    assert "it is a packed archive" in message_of("j.pt", b"\x1f\x8b\x08 more")
    assert "it is a packed archive" in message_of("k.pt", bytes(100) + b"a" * 157 + b"ustar" + bytes(300))
    assert "it is no file that torch.save or safetensors wrote" in message_of("l.pt", pickle.dumps({"a": 1}))
    (tmp_path / "m.pt").symlink_to(tmp_path / "nowhere.pt")
    assert "it is a link that leads nowhere" in message(read_file, tmp_path / "m.pt")
    with open(tmp_path / "f.pt", "wb") as file:
        np.savez(file, a=np.zeros(3))
    assert "a zip archive of a.npy" in message(read_file, tmp_path / "f.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "g.pt")
    assert "a TorchScript program" in message(read_file, tmp_path / "g.pt")
    (tmp_path / "steps").mkdir()
    assert "it is a folder; give the file of the weights" in message(read_file, tmp_path / "steps")
    saved(tmp_path / "steps" / "model.pt", guided)
    assert f"such as {tmp_path / 'steps' / 'model.pt'}" in message(read_file, tmp_path / "steps")
    (tmp_path / "steps" / "config.json").write_text("{}")
    assert f"python convert.py diffusers {tmp_path / 'steps'}" in refused("convert", "iadb", tmp_path / "steps", "--out", "x")
    assert f"did you mean {tmp_path / 'steps' / 'model.pt'}?" in message(read_file, tmp_path / "steps" / "modle.pt")
    assert "a name on the Hugging Face hub is not taken here" in message(read_file, "openai/guided")
    safetensors.torch.save_file(guided, tmp_path / "renamed.ckpt")
    assert read_file(tmp_path / "renamed.ckpt").keys() == guided.keys(), "known by its bytes"


def test_tensors_that_are_no_plain_numbers(tmp_path: Path, guided: dict[str, Tensor]) -> None:
    name = "time_embed.0.weight"
    whole = {key: tensor.to(torch.int8) for key, tensor in guided.items()}
    cases = {
        f"{name} is int8, and weights are floating-point numbers": whole,
        f"{name} is complex64": guided | {name: guided[name].to(torch.complex64)},
        f"{name} is a sparse tensor": guided | {name: guided[name].to_sparse()},
        f"{name} has a shape and no values": guided | {name: guided[name].to("meta")},
    }
    for words, state in cases.items():
        assert words in message(guided_diffusion.read, saved(tmp_path / "model.pt", state), SMALL_FLAGS)
