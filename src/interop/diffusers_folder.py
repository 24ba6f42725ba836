"""The UNet2DModel in a folder of diffusers: of a pipeline, of a training script's checkpoint, or of the hub."""

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import UserError, prefix_errors, validate
from ..diffusion import ProcessConfig
from ..runs.diffusers_autoencoder import WEIGHTS
from ..storage.downloads import from_hub, hub_name_of_url, is_hub_name
from ..storage.networks import UNET_2D, few, find_network, preference
from ..storage.weight_files import find_files, read_files, read_foreign_json
from .imported import LATENTS, Imported
from .schedulers import FLOW, FLOW_SAMPLING, SAMPLING, process_config
from .unet_2d import unet_config, unet_from_diffusers


def local_folder(name: str | Path) -> Path:
    """A folder as it is, or what the hub has under this name: its JSON and the weights of full precision."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        hint = f"give {folder.parent}" if (folder.parent / "config.json").is_file() else "with config.json and the weights"
        raise UserError(
            f"{name} is a file, and convert.py diffusers takes a folder of diffusers: {hint}; a checkpoint in one file is read "
            "by convert.py iadb (diffusers' names) or convert.py guided-diffusion (OpenAI's names)"
        )
    no_folder = f"{name} is no folder, and the hub does not give it"
    if (hub_name := hub_name_of_url(str(name))) is not None:
        raise UserError(f"{name} is an address; give the name on the hub: {hub_name}")
    if not is_hub_name(str(name)):
        beside = [other.name for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, beside, 1)
        hint = f"; did you mean {folder.with_name(near[0])}?" if near else ""
        raise UserError(f"{no_folder}: it is a path, and a name there is OWNER/NAME{hint}")
    files = [f"{place}{WEIGHTS}.safetensors" for place in ("", "unet/", "unet_ema/")]
    files += ["model_index.json", "config.json", "*/config.json", "classes.json", "process.json"]
    files += ["scheduler_config.json", "scheduler/scheduler_config.json", LATENTS, "vae/*.json", "vae/*.safetensors"]
    with prefix_errors(no_folder):
        folder = from_hub(str(name), files)
        places = [place for place in ("unet/", "unet_ema/") if (folder / place / "config.json").is_file()] or [""]
        if not any((folder / place / f"{WEIGHTS}.safetensors").is_file() for place in places):
            suffixes = (f"{WEIGHTS}.bin", "*.safetensors", "*.bin", "*.index*.json")
            folder = from_hub(str(name), [f"{place}{suffix}" for place in places for suffix in suffixes])
    return folder


def _find_network(folder: Path, name: str | Path, which: str | None) -> tuple[Path, list[str], str | None]:
    """The folder of the network, notes on the other networks beside it, and `which` where it names a file and no folder.

    An average of weights, as `unet_ema` of diffusers' training scripts, is taken before raw ones. A UserError says that there
    is no network, or that there are several.
    """
    kinds = {path.parent.name: read_foreign_json(path).get("_class_name", "?") for path in sorted(folder.glob("*/config.json"))}
    networks = [sub for sub, kind in kinds.items() if sub == "unet" or kind == "UNet2DModel"]
    if not networks and (folder / "config.json").is_file():
        resolved = folder.resolve()
        averages = [str(path.parent) for path in resolved.parent.glob("unet*/config.json") if preference(path.parent.name) == 2]
        is_raw = averages and preference(resolved.name) == 1
        return folder, [f"these are raw weights; an average (EMA) is in {averages[0]}"] if is_raw else [], which
    if not networks:
        contents = few((f"{path.name}/" if path.is_dir() else path.name) for path in folder.iterdir())
        hint = f"it holds {contents}" if contents else "it is empty"
        if kinds:
            hint = f"it holds {few(f'{sub} ({kind})' for sub, kind in kinds.items())}"
        elif steps := sorted(path.name for path in folder.glob("checkpoint-*") if path.is_dir()):
            hint = f"it holds {few(steps)}: name one of them"
        raise UserError(f"{name} holds no diffusers U-Net: it has neither unet/config.json nor config.json; {hint}")
    chosen = [
        sub for sub in networks if which == sub or (which in ("ema", "raw") and (preference(sub) == 2) == (which == "ema"))
    ]
    which = None if chosen else which
    chosen = sorted(chosen or networks, key=lambda sub: -preference(sub))
    best = [sub for sub in chosen if preference(sub) == preference(chosen[0])]
    if len(best) > 1:
        raise UserError(f"{name} holds several networks, {few(best, 6)}; choose one with --which, such as --which {best[-1]}")
    others = [sub for sub in networks if sub != best[0]]
    notes = [f"left out, other networks: {few(others, 6)}"] if others else []
    if others and preference(best[0]) == 2:
        notes.insert(0, f"these weights, of {best[0]}, are an average (EMA); --which raw takes the others")
    return folder / best[0], notes, which


def read_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file."""
    return read_foreign_json(path) if path.is_file() else {}


def read(name: str | Path, *, which: str | None = None) -> Imported:
    """The UNet2DModel of a folder of diffusers, with its process: the folder of a pipeline, of a training script's checkpoint,
    or of the model alone, or its name on the hub.

    What `export` wrote comes back as it was. Weights are safetensors, or a .bin that is read without running anything in it,
    whole or in shards; an average of weights is taken before raw ones. `which` chooses otherwise: `ema`, `raw`, or the name of
    a folder or file inside. For a network on latents, size and channels are those of the latents. A UserError says which file
    is missing, and names each option that our network or process lacks.
    """
    folder = local_folder(name)
    place, others, which = _find_network(folder, name, which)
    path = place / "config.json"
    theirs = read_foreign_json(path)
    if (kind := theirs.get("_class_name", "UNet2DModel")) != "UNet2DModel":
        raise UserError(f"{path} is of a {kind}; a UNet2DModel is what can be read")
    needed = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "in_channels", "out_channels")
    missing = [key for key in (*needed, "sample_size") if theirs.get(key) is None]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    _check_types(theirs, path)
    size, channels, outputs = theirs["sample_size"], theirs["in_channels"], theirs["out_channels"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"{path}: sample_size {size} is no square, which is what can be read")
    if outputs not in (channels, 2 * channels):
        raise UserError(f"{path}: {channels} channels in and {outputs} out is no network of a diffusion process")
    process, process_notes, is_negated = _read_process(folder, learned=outputs == 2 * channels)

    try:
        files, left_out = find_files(place, which)
        which = None if which in (files.name, *files.name.split(".")) else which
        state_dict, weight_notes = find_network(read_files(files), UNET_2D, place / files.name, which=which)
    except UserError as error:
        raise UserError(str(error) if str(name) in str(error) else f"{name}: {error}") from None
    if is_negated:
        state_dict = negate_output(state_dict)
    classes = read_if_there(folder / "classes.json")
    null_class = classes.get("null_class") is True and theirs.get("num_class_embeds") is not None
    with prefix_errors(str(path.parent)):
        model, network = unet_config(theirs), unet_from_diffusers(theirs, state_dict, null_class=null_class)
    names = classes.get("class_names")
    first = f"network: {path}, weights {weight_notes[0].removeprefix('network: ')}"
    return Imported(
        network=network,
        model=model,
        process=process,
        image_size=sides.pop(),
        class_names=tuple(map(str, names)) if isinstance(names, list) and len(names) == network.num_classes else (),
        channels=channels,
        num_classes=network.num_classes,
        null_class=null_class,
        notes=(first, *weight_notes[1:], *others, *left_out, *process_notes),
    )


def _check_types(theirs: Mapping[str, Any], path: Path) -> None:
    """A UserError for a value of a type that the config of a UNet2DModel never has."""

    def is_count(value: Any) -> bool:
        return type(value) is int and value > 0

    def is_list(value: Any, of: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(of(entry) for entry in value)

    optional_counts = ("num_class_embeds", "norm_num_groups", "attention_head_dim", "attn_norm_num_groups")
    checks = {
        **{key: is_count(theirs[key]) for key in ("in_channels", "out_channels", "layers_per_block")},
        "sample_size": is_count(theirs["sample_size"]) or is_list(theirs["sample_size"], is_count),
        "block_out_channels": is_list(theirs["block_out_channels"], is_count),
        **{key: is_list(theirs[key], lambda entry: isinstance(entry, str)) for key in ("down_block_types", "up_block_types")},
        **{key: theirs.get(key) is None or is_count(theirs[key]) for key in optional_counts},
        **{key: type(theirs.get(key, 0)) in (int, float) for key in ("dropout", "norm_eps", "freq_shift")},
    }
    for key, fits in checks.items():
        if not fits:
            raise UserError(f"{path}: {key} is {json.dumps(theirs[key])}, which no UNet2DModel can be built of")


def negate_output(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the UNet2DModel whose output is minus the output of this one."""
    return {key: -value if key.startswith("conv_out.") else value for key, value in state_dict.items()}


def _read_process(folder: Path, *, learned: bool) -> tuple[ProcessConfig, list[str], bool]:
    """The process of the folder's process.json (which is ours) or scheduler_config.json, or else of DDPMScheduler's defaults;
    notes on where it comes from; and whether the network gives minus its target, as a FlowMatchEulerDiscreteScheduler needs."""
    resolved, ours, index = folder.resolve(), folder / "process.json", read_if_there(folder / "model_index.json")
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", resolved.name)  # of a training script, which saves a scheduler beside it
    places = [folder, *([resolved.parent] if is_checkpoint else [])]
    # the first versions of diffusers had no subfolder for it
    files = [place / sub / "scheduler_config.json" for place in places for sub in ("scheduler", "")]
    path = next((file for file in files if file.is_file()), None)
    if path is None and isinstance(index.get("scheduler"), list) and not ours.is_file():
        raise UserError(
            f"{folder}: model_index.json names a scheduler ({index['scheduler'][-1]}), and scheduler/scheduler_config.json, "
            "which says how the network was trained, is missing; bring it"
        )
    settings = read_foreign_json(path) if path is not None else {}
    is_negated = settings.get("_class_name") == FLOW
    if ours.is_file():
        return validate(ProcessConfig, read_foreign_json(ours), origin=str(ours)), [f"process: {ours}"], is_negated
    with prefix_errors(str(path or folder)):
        process = process_config(settings, learned=learned)
    defaults = "there is no scheduler_config.json, so DDPMScheduler's defaults: linear betas, 1000 steps, eps, clipped"
    notes = [f"process: {path or defaults}"]
    usual = FLOW_SAMPLING if is_negated else SAMPLING
    changed = [f"{key} {settings[key]}" for key in usual if settings.get(key, usual[key]) != usual[key]]
    if changed:
        notes.append(f"left out, since sampling has settings of its own: {', '.join(changed)}")
    if learned:
        notes.append("loss: hybrid of weight 1, of which the folder says nothing")
    return process, notes, is_negated
