"""Folders of weights as other programs leave them: averages, shards, other names."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from src.config import read_json
from src.interop import diffusers_import as folders
from src.runs.autoencoder import open_autoencoder, start_from
from src.runs.opened import open_trained
from src.storage.weight_files import find_files, read_foreign_json
from tests.conftest import randomise, refused, run_in_process
from tests.interop.foreign_weights import CPU, OPTIMIZER, VAE, WEIGHTS, message, plus, saved, stem, under, unet_folder


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
    done = run_in_process("convert.py", "diffusers", folder, "--which", "unet_ema", "--out", tmp_path / "out")
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
