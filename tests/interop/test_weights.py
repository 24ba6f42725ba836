"""Files and folders of weights as other programs leave them: what is taken of them, what is left out, what is refused."""

import argparse
import json
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

from src.config import UserError, load, read_json, validate
from src.interop import diffusers_folder as folders
from src.interop import guided_diffusion, iadb
from src.interop.diffusers_latents import add_autoencoder
from src.interop.guided_shapes import module_names
from src.interop.imported import keep
from src.interop.names import rename_state
from src.models import UNet, UNetConfig
from src.models.pretrained import import_torchvision
from src.runs.autoencoder import open_autoencoder, start_from
from src.runs.diffusers_autoencoder import DiffusersAutoencoder, autoencoder_from_config
from src.runs.opened import open_trained
from src.storage.weights import KL, UNET_2D, find_files, find_network, rank, read_file, read_foreign_json
from tests.conftest import here, randomise, refused
from tests.interop.test_guided_diffusion import SMALL as SMALL_GUIDED
from tests.interop.test_guided_diffusion import SMALL_FLAGS, foreign_state

CPU = torch.device("cpu")
THEIRS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(autouse=True)
def importable() -> None:
    import_torchvision()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.clone() for name, tensor in state.items()}


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def message(what: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        what(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def guided() -> dict[str, Tensor]:
    """The state dict of a small U-Net of guided-diffusion."""
    config = validate(UNetConfig, SMALL_GUIDED)
    network = UNet(config)
    randomise(network)
    return foreign_state(network, config)


def plus(state: dict[str, Tensor], offset: float = 1.0) -> dict[str, Tensor]:
    return {name: tensor + offset for name, tensor in state.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(4.0)}}, "param_groups": [{"lr": 1e-4}]}
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
    assert (rank(f"{name}.") == 2) == average


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


# ---------------------------------------------------------------------------------------------- folders of diffusers


def unet_folder(folder: Path, **options: Any) -> dict[str, Tensor]:
    from diffusers import UNet2DModel

    theirs = UNet2DModel(**{**THEIRS, **options})
    randomise(theirs)
    theirs.save_pretrained(folder)
    return theirs.state_dict()


def training_checkpoint(folder: Path) -> dict[str, Tensor]:
    """As diffusers' training script leaves it; gives the averaged weights."""
    state = unet_folder(folder / "unet_ema")
    shutil.copytree(folder / "unet_ema", folder / "unet")
    safetensors.torch.save_file(plus(state), folder / "unet" / f"{WEIGHTS}.safetensors")
    settings = read_json(folder / "unet_ema" / "config.json") | {"decay": 0.9999, "optimization_step": 500, "power": 0.75}
    (folder / "unet_ema" / "config.json").write_text(json.dumps(settings))
    saved(folder / "optimizer.bin", OPTIMIZER)
    saved(folder / "scheduler.bin", {"last_epoch": 500})
    (folder / "random_states_0.pkl").write_bytes(b"x")
    return state


def stem(imported: Any) -> Tensor:
    return imported.network.state_dict()["stem.weight"]


def test_a_training_checkpoint_gives_its_average(tmp_path: Path) -> None:
    folder = tmp_path / "ddpm" / "checkpoint-500"
    state = training_checkpoint(folder)
    imported = folders.read(folder)
    assert torch.equal(stem(imported), state["conv_in.weight"])
    notes = "\n".join(imported.notes)
    assert f"{folder / 'unet_ema' / 'config.json'}, weights {WEIGHTS}.safetensors, {len(state)} tensors" in notes
    assert "of unet_ema, are an average (EMA); --which raw takes the others" in notes and "other networks: unet" in notes
    for which in ("raw", "unet"):
        assert torch.equal(stem(folders.read(folder, which=which)), state["conv_in.weight"] + 1)
    assert torch.equal(stem(folders.read(folder, which="unet_ema")), state["conv_in.weight"])
    raw = folders.read(folder / "unet")
    assert f"these are raw weights; an average (EMA) is in {folder / 'unet_ema'}" in raw.notes
    assert "holds checkpoint-500: name one of them" in message(folders.read, tmp_path / "ddpm")
    assert any("there is no scheduler_config.json" in line for line in imported.notes)
    scheduler = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}
    (tmp_path / "ddpm" / "scheduler").mkdir()
    (tmp_path / "ddpm" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    assert folders.read(folder).process.schedule.kind == "cosine", "the script saves it beside its checkpoints"
    shutil.copytree(folder / "unet_ema", folder / "ema_of_another_length")
    fault = message(folders.read, folder)
    assert "several networks, ema_of_another_length, unet_ema; choose one with --which" in fault
    done = here("convert.py", "diffusers", folder, "--which", "unet_ema", "--out", tmp_path / "out")
    assert done.status == 0 and "an average (EMA)" in done.out, done.all


def test_weights_by_other_names_and_in_shards(tmp_path: Path) -> None:
    state = unet_folder(tmp_path / "plain")
    config = (tmp_path / "plain" / "config.json").read_text()
    halves = [dict(list(state.items())[i::2]) for i in range(2)]

    def folder(name: str, files: dict[str, dict[str, Tensor]], **documents: Any) -> Path:
        out = tmp_path / name
        out.mkdir()
        (out / "config.json").write_text(config)
        for file, tensors in files.items():
            if file.endswith(".safetensors"):
                safetensors.torch.save_file(tensors, out / file)
            else:
                torch.save(tensors, out / file)
        for file, document in documents.items():
            (out / file.replace("__", ".")).write_text(json.dumps(document))
        return out

    shards = {f"{WEIGHTS}-0000{i + 1}-of-00002.safetensors": half for i, half in enumerate(halves)}
    index = {"weight_map": {name: file for file, half in shards.items() for name in half}}
    half = {name: tensor.half() for name, tensor in state.items()}
    parts = {f"part_{i}.safetensors": part for i, part in enumerate(halves)}
    places = {
        "half": folder("half", {f"{WEIGHTS}.fp16.safetensors": half}),
        "half_bin": folder("half_bin", {f"{WEIGHTS}.fp16.bin": half}),
        "shards": folder("shards", shards, **{f"{WEIGHTS}.safetensors.index__json": index}),
        "shards_bin": folder("shards_bin", {f"{WEIGHTS}-0000{i + 1}-of-00002.bin": part for i, part in enumerate(halves)}),
        "half_shards": folder(
            "half_shards",
            {f"{WEIGHTS}.fp16-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate(halves)},
        ),
        "index_alone": folder(
            "index_alone", parts, a__index__json={"weight_map": {name: file for file, part in parts.items() for name in part}}
        ),
        "accelerate": folder("accelerate", {"model.safetensors": state, "optimizer.bin": OPTIMIZER}),
        "transformers": folder("transformers", {"pytorch_model.bin": state}),
        "own_name": folder("own_name", {"weights_at_500.pt": {"state_dict": under("module.", state)}}),
        "full_beside_half": folder("full", {f"{WEIGHTS}.safetensors": state, f"{WEIGHTS}.fp16.safetensors": plus(half)}),
        "safe_beside_bin": folder("safe", {f"{WEIGHTS}.safetensors": state, f"{WEIGHTS}.bin": plus(state)}),
        "the_average": folder("ema", {f"{WEIGHTS}.ema.bin": state, f"{WEIGHTS}.safetensors": plus(state)}),
        "not_the_raw": folder("raw", {f"{WEIGHTS}.non_ema.safetensors": plus(state), f"{WEIGHTS}.bin": state}),
    }
    wanted = state["conv_in.weight"]
    for name, place in places.items():
        imported = folders.read(place)
        torch.testing.assert_close(
            stem(imported), wanted.half().float() if name in ("half", "half_bin") else wanted, rtol=0, atol=0
        )
        assert any(f"{len(state)} tensors" in line for line in imported.notes), imported.notes
    assert f"other weights in {places['full_beside_half']}: {WEIGHTS}.fp16.safetensors" in "\n".join(
        folders.read(places["full_beside_half"]).notes
    )
    assert f"by its name {WEIGHTS}.ema.bin is an average (EMA)" in folders.read(places["the_average"]).notes
    chosen = folders.read(places["full_beside_half"], which="fp16")
    torch.testing.assert_close(stem(chosen), wanted.half().float() + 1, rtol=0, atol=1e-3)

    (places["shards"] / f"{WEIGHTS}-00002-of-00002.safetensors").unlink()
    assert f"{WEIGHTS}-00002-of-00002.safetensors is missing; bring it" in message(folders.read, places["shards"])
    (places["shards_bin"] / f"{WEIGHTS}-00001-of-00002.bin").unlink()
    assert "in shards, and" in message(folders.read, places["shards_bin"])
    outside = {"weight_map": {"a": "../../secret.safetensors"}}
    assert "files outside of its folder" in message(folders.read, folder("outside", {}, a__index__json=outside))
    several = folder("several", {"a.pt": state, "b.pt": plus(state)})
    assert "several files of weights, a.pt, b.pt; choose one of them with --which" in message(folders.read, several)
    assert torch.equal(stem(folders.read(several, which="b.pt")), wanted + 1)
    nothing = folder("nothing", {"optimizer.bin": OPTIMIZER})
    assert "nor weights by another name; it holds config.json, optimizer.bin" in message(folders.read, nothing)
    (nothing / "flax_model.msgpack").write_bytes(b"x")
    assert "flax_model.msgpack cannot be read: save it with safetensors" in message(find_files, nothing)


def test_what_save_state_of_accelerate_leaves(tmp_path: Path) -> None:
    """Networks in numbered files are chosen by name; an average that is a list in another order is never passed over."""
    folder = tmp_path / "checkpoint_3"
    state = unet_folder(folder)
    (folder / f"{WEIGHTS}.safetensors").unlink()
    safetensors.torch.save_file(plus(state), folder / "model.safetensors")
    saved(folder / "custom_checkpoint_0.pkl", {"decay": 0.99, "shadow_params": list(state.values())})
    saved(folder / "custom_checkpoint_1.pkl", {"epoch": 3})
    fault = message(folders.read, folder)
    assert "an average (EMA) is in it under custom_checkpoint_0.shadow_params" in fault and "--which raw" in fault
    assert torch.equal(stem(folders.read(folder, which="raw")), state["conv_in.weight"] + 1)
    order = list(safetensors.torch.load_file(folder / "model.safetensors"))
    saved(folder / "custom_checkpoint_0.pkl", {"decay": 0.99, "shadow_params": [state[name] for name in order]})
    imported = folders.read(folder)
    assert torch.equal(stem(imported), state["conv_in.weight"]) and any("an average (EMA)" in line for line in imported.notes)
    (folder / "custom_checkpoint_0.pkl").unlink()
    safetensors.torch.save_file(plus(state, 2), folder / "model_1.safetensors")
    assert "several networks, model.safetensors, model_1.safetensors" in message(folders.read, folder)
    assert torch.equal(stem(folders.read(folder, which="model_1.safetensors")), state["conv_in.weight"] + 2)


@pytest.mark.parametrize(
    ("key", "value"), [("block_out_channels", [0, 8]), ("block_out_channels", 8), ("in_channels", "3"), ("sample_size", "8")]
)
def test_values_that_no_network_can_be_built_of(tmp_path: Path, key: str, value: Any) -> None:
    unet_folder(tmp_path / "unet")
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps(read_json(config) | {key: value}))
    assert f"{key} is {json.dumps(value)}, which no UNet2DModel can be built of" in message(folders.read, tmp_path / "unet")


def test_a_pipeline_whose_scheduler_was_not_brought(tmp_path: Path) -> None:
    unet_folder(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "DDPMScheduler"]}))
    assert "names a scheduler (DDPMScheduler), and scheduler/scheduler_config.json" in message(folders.read, tmp_path)
    (tmp_path / "loose").mkdir()
    saved(tmp_path / "loose" / "pytorch_lora_weights.bin", {})
    assert "neither unet/config.json nor config.json; it holds pytorch_lora" in message(folders.read, tmp_path / "loose")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ({"a": torch.ones(1)}, "is no export of this project, which holds weights"),
        ([1], "is no export of this project"),
        ({"stem.weight": torch.ones(1)}, "holds weights alone, as convert.py safetensors writes them"),
        ({"weights": [1], "config": {}, "data": {}, "step": 3}, "is no export of this project"),
        ({"weights": {}, "config": {}, "data": [], "step": 3}, "is no export of this project"),
    ],
)
def test_files_that_are_no_export(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        saved(path, content)
    assert words in message(open_trained, path, CPU)


def test_a_folder_of_diffusers_is_no_run(tmp_path: Path) -> None:
    unet_folder(tmp_path / "unet")
    assert f"brought in first: python convert.py diffusers {tmp_path}" in message(open_trained, tmp_path, CPU)
    place = tmp_path / "unet"
    assert f"brought in first: python convert.py diffusers {place}" in message(open_trained, place, CPU)
    for kind, words in {
        "AutoencoderKL": f"--set autoencoder={place} trains on its latents",
        "ControlNetModel": "give a run",
    }.items():
        (place / "config.json").write_text(json.dumps({"_class_name": kind}))
        fault = message(open_trained, place, CPU)
        assert f"is {kind} of diffusers and no run of this project" in fault and words in fault


def test_an_address_of_the_hub_is_answered_with_the_name() -> None:
    address = "https://huggingface.co/stabilityai/sd-vae-ft-mse/tree/main"
    for what in (folders.read, lambda name: open_autoencoder(name, CPU)):
        assert message(what, address).endswith("is an address; give the name on the hub: stabilityai/sd-vae-ft-mse")


def test_train_vae_does_not_start_from_theirs(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    randomise(AutoencoderKL(**VAE)).save_pretrained(tmp_path)
    assert "train_vae.py starts from autoencoders of its own alone" in message(start_from, str(tmp_path))


def test_a_file_or_a_path_where_a_folder_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet_folder(tmp_path / "unet")
    file, out = tmp_path / "unet" / f"{WEIGHTS}.safetensors", tmp_path / "out"
    fault = refused("convert", "diffusers", file, "--out", out)
    assert f"is a file, and convert.py diffusers takes a folder of diffusers: give {tmp_path / 'unet'};" in fault
    assert "convert.py iadb" in fault and "convert.py guided-diffusion" in fault
    fault = refused("convert", "diffusers", tmp_path / "unett", "--out", out)
    assert f"it is a path, and a name there is OWNER/NAME; did you mean {tmp_path / 'unet'}?" in fault
    assert "it is a path" in refused("convert", "diffusers", "a/b/c", "--out", out)
    assert not out.exists()


# ---------------------------------------------------------------------------------------------- schedulers, JSON


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_that_is_not_read_is_named(tmp_path: Path, name: str) -> None:
    import diffusers

    unet_folder(tmp_path / "unet")
    getattr(diffusers, name)().save_pretrained(tmp_path / "scheduler")
    fault = message(folders.read, tmp_path)
    assert f"_class_name='{name}' is not supported; allowed: DDPMScheduler, DDIMScheduler, FlowMatch" in fault
    assert "DDPMScheduler.from_config(pipeline.scheduler.config)" in fault and "finite" not in fault


def test_json_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": -Infinity, "b": NaN, "b": 1}')
    assert read_foreign_json(path) == {"a": float("-inf"), "b": 1}
    path.write_text("{")
    assert "not valid JSON" in message(read_foreign_json, path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in message(read_foreign_json, path)


# ---------------------------------------------------------------------------------------------- autoencoders


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
    assert any(f"{len(state)} tensors" in line for line in plain.told)

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
    assert f"the autoencoder is {tmp_path / 'pipeline' / 'vae'}, a part of the pipeline" in opened.told[0]


def test_what_is_no_whole_autoencoder_says_what_it_is(tmp_path: Path) -> None:
    from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, DDPMPipeline, DDPMScheduler, UNet2DModel, VQModel

    def message_of(name: str) -> str:
        return message(open_autoencoder, str(tmp_path / name), CPU)

    blocks = {key: VAE[key] for key in ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups")}
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(tmp_path / "tiny")
    VQModel(**blocks).save_pretrained(tmp_path / "vq")
    unet = UNet2DModel(**THEIRS, in_channels=4, out_channels=4)
    unet.save_pretrained(tmp_path / "unet")
    AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), down_block_out_channels=(8,), up_block_types=("UpDecoderBlock2D",),
        up_block_out_channels=(8,), norm_num_groups=4, sample_size=8,
    ).save_pretrained(tmp_path / "asymmetric")  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    known = "an AutoencoderKL, such as stabilityai/sd-vae-ft-mse, is what can be used"
    for name, kind in (("tiny", "AutoencoderTiny"), ("vq", "VQModel"), ("asymmetric", "AsymmetricAutoencoderKL")):
        assert f"{tmp_path / name} is of the class {kind}, which is no AutoencoderKL; {known}" in message_of(name)
        shutil.copytree(tmp_path / name, tmp_path / f"pipeline_{name}" / "vae")
        assert f"of the class {kind}" in message_of(f"pipeline_{name}")
    assert "of the class UNet2DModel, which is a diffusion network and no autoencoder" in message_of("unet")
    assert "is a DDPMPipeline without vae/ with an AutoencoderKL; it holds unet (UNet2DModel)" in message_of("ddpm")

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
    assert "the config wants (8, 3, 3, 3)" in holding({**state, "encoder.conv_in.weight": torch.ones(8, 1, 3, 3)})
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


# ---------------------------------------------------------------------------------------------- networks on latents


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

    done = here("convert.py", "diffusers", tmp_path / "pipeline", "--autoencoder", tmp_path / "apart", "--out", out)
    assert done.status == 0 and "latents: 4 x 8 x 8 of" in done.out and "python train_ldm.py -cfg" in done.out, done.all
    shutil.copytree(tmp_path / "apart", tmp_path / "pipeline" / "vae")
    done = here("convert.py", "diffusers", tmp_path / "pipeline", "--out", tmp_path / "whole")
    assert done.status == 0, done.all
    one, two = (safetensors.torch.load_file(place / "autoencoder.safetensors") for place in (out, tmp_path / "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    done = here("sample.py", out, "--num-samples", "2", "--steps", "3", "--out", tmp_path / "drawn")
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
