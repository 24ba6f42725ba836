"""The UNet2DModel of a folder of diffusers (a pipeline, a training script's checkpoint, the hub's), and its autoencoder."""

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from torch import Tensor

from ..config import UserError, prefix_errors, read_json, validate
from ..config.sizes import side_or_sides, sides_of
from ..diffusion import ProcessConfig
from ..runs.autoencoder import Autoencoder
from ..runs.diffusers_autoencoder import FAMILIES, SUBFOLDERS, WEIGHTS
from ..runs.folders import read_if_there, refuse
from ..storage.downloads import from_hub, hub_name_of_url, is_hub_name
from ..storage.networks import UNET_2D, few, find_network, preference
from ..storage.weight_files import find_files, read_files, read_foreign_json
from .imported import GIVE_AUTOENCODER, LATENTS, Imported, open_autoencoder_of
from .schedulers import FLOW, FLOW_SAMPLING, SAMPLING, process_config
from .unet_2d import unet_from_diffusers

# The types in the config of a UNet2DModel.
Count: Any = Annotated[int, pydantic.Field(strict=True, gt=0)]
Number: Any = Annotated[float, pydantic.Field(strict=True)]
Counts: Any = Annotated[list[Count], pydantic.Field(min_length=1)]
Words: Any = Annotated[list[str], pydantic.Field(min_length=1)]
NEEDED = {
    "block_out_channels": Counts,
    **dict.fromkeys(("down_block_types", "up_block_types"), Words),
    **dict.fromkeys(("layers_per_block", "in_channels", "out_channels"), Count),
    "sample_size": Count | Counts,
}
TYPES = NEEDED | {
    **dict.fromkeys(("num_class_embeds", "norm_num_groups", "attention_head_dim", "attn_norm_num_groups"), Count | None),
    **dict.fromkeys(("dropout", "norm_eps", "freq_shift"), Number),
}


def local_folder(name: str | Path) -> Path:
    """A folder as it is, or what the hub has under this name: its JSON and the weights of full precision."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    place = f"give {folder.parent}" if (folder.parent / "config.json").is_file() else "with config.json and the weights"
    beside = [other.name for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, 1)
    hint = f"; did you mean {folder.with_name(near[0])}?" if near else ""
    no_folder, hub_name = "is no folder, and the hub does not give it", hub_name_of_url(str(name))
    reasons = {
        f"is a file, and convert.py diffusers takes a folder of diffusers: {place}; a checkpoint in one file is read by "
        "convert.py iadb (diffusers' names) or convert.py guided-diffusion (OpenAI's names)": folder.is_file(),
        f"is an address; give the name on the hub: {hub_name}": hub_name is not None,
        f"{no_folder}: it is a path, and a name there is OWNER/NAME{hint}": not is_hub_name(str(name)),
    }
    refuse(name, reasons)
    files = [f"{place}{WEIGHTS}.safetensors" for place in ("", "unet/", "unet_ema/")]
    files += ["model_index.json", "config.json", "*/config.json", "classes.json", "process.json"]
    files += ["scheduler_config.json", "scheduler/scheduler_config.json", LATENTS]
    files += [f"{place}/*.{ending}" for place in SUBFOLDERS for ending in ("json", "safetensors")]
    with prefix_errors(f"{name} {no_folder}"):
        folder = from_hub(str(name), files)
        places = [place for place in ("unet/", "unet_ema/") if (folder / place / "config.json").is_file()] or [""]
        if not any((folder / place / f"{WEIGHTS}.safetensors").is_file() for place in places):
            suffixes = (f"{WEIGHTS}.bin", "*.safetensors", "*.bin", "*.index*.json")
            folder = from_hub(str(name), [f"{place}{suffix}" for place in places for suffix in suffixes])
    return folder


def _find_network(folder: Path, name: str | Path, which: str | None) -> tuple[Path, list[str], str | None]:
    """The folder of the network, notes on the other networks beside it, and `which` where it names a file and no folder. An
    average of weights, as `unet_ema` of diffusers' training scripts, is taken before raw ones. A UserError says that there is
    no network, or that there are several."""
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
    average = {"ema": True, "raw": False}.get(which or "")
    chosen = [sub for sub in networks if which == sub or average == (preference(sub) == 2)]
    best = [sub for sub in chosen or networks if preference(sub) == max(map(preference, chosen or networks))]
    if len(best) > 1:
        raise UserError(f"{name} holds several networks, {few(best, 6)}; choose one with --which, such as --which {best[-1]}")
    others = [sub for sub in networks if sub != best[0]]
    notes = [f"left out, other networks: {few(others, 6)}"] if others else []
    if others and preference(best[0]) == 2:
        notes.insert(0, f"these weights, of {best[0]}, are an average (EMA); --which raw takes the others")
    return folder / best[0], notes, None if chosen else which


def read(name: str | Path, *, which: str | None = None) -> Imported:
    """The UNet2DModel of a folder of diffusers, with its process: the folder of a pipeline, of a training script's checkpoint,
    or of the model alone, or its name on the hub. What `export` wrote comes back as it was. Weights are safetensors, or a .bin
    that is read without running anything in it, whole or in shards; an average of weights is taken before raw ones. `which`
    chooses otherwise: `ema`, `raw`, or the name of a folder or file inside. For a network on latents, size and channels are
    those of the latents. A UserError says which file is missing, and names each option that our network or process lacks."""
    folder = local_folder(name)
    place, others, which = _find_network(folder, name, which)
    path = place / "config.json"
    theirs = read_foreign_json(path)
    kind, missing = theirs.get("_class_name", "UNet2DModel"), [key for key in NEEDED if theirs.get(key) is None]
    is_other = kind != "UNet2DModel"
    refuse(path, {f"is of a {kind}; a UNet2DModel is what can be read": is_other, f"lacks {', '.join(missing)}": missing})
    for key in TYPES.keys() & theirs.keys():
        try:
            pydantic.TypeAdapter(TYPES[key]).validate_python(theirs[key])
        except pydantic.ValidationError:
            raise UserError(f"{path}: {key} is {json.dumps(theirs[key])}, which no UNet2DModel can be built of") from None
    size, channels, outputs = theirs["sample_size"], theirs["in_channels"], theirs["out_channels"]
    sides, no_process = [size] if isinstance(size, int) else size, outputs not in (channels, 2 * channels)
    height, width = sides[0], sides[-1]
    reasons = {
        f"sample_size {size} is neither one number nor height and width, which is what can be read": len(sides) > 2,
        f"{channels} channels in and {outputs} out is no network of a diffusion process": no_process,
    }
    refuse(f"{path}:", reasons)
    theirs["sample_size"] = (height, width)
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
        network = unet_from_diffusers(theirs, state_dict, null_class=null_class)
    names = classes.get("class_names")
    first, *weight_notes = weight_notes
    first = f"network: {path}, weights {first.removeprefix('network: ')}"
    return Imported(
        network=network,
        process=process,
        image_size=side_or_sides(height, width),
        class_names=tuple(map(str, names)) if isinstance(names, list) and len(names) == network.num_classes else (),
        channels=channels,
        notes=(first, *weight_notes, *others, *left_out, *process_notes),
    )


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


def read_whole(name: str | Path, autoencoder: str | None = None, *, which: str | None = None) -> Imported:
    """What `read` gives, and, for a network on latents, with it the autoencoder of this name or of the folder. A UserError for
    a folder that needs no conversion, and for what `add_autoencoder` refuses."""
    folder = local_folder(name)
    kind, files = read_if_there(folder / "config.json").get("_class_name"), ("MANIFEST.json", "ema.safetensors")
    what = f"{'a' if kind == 'VQModel' else 'an'} {kind}"
    reasons = {
        f"is {what}, which needs no conversion: name it as it is, as in train_ldm.py --set autoencoder={name}": (
            kind in FAMILIES
        ),
        "is a folder of Atelier's own, which needs no conversion: give it where a run is wanted": all(
            (folder / file).is_file() for file in files
        ),
    }
    refuse(name, reasons)
    return add_autoencoder(read(name, which=which), folder, autoencoder, origin=name)


def add_autoencoder(imported: Imported, folder: Path, name: str | None = None, *, origin: str | Path | None = None) -> Imported:
    """An imported network on latents together with the autoencoder `name`, or with the one in its `folder`. A network on images
    is given back as it is. Messages name the `origin`, which may be a name on the hub. A UserError where the network sees
    latents and there is no autoencoder, or the other way round; where the two do not fit; and where nothing says how the
    latents are normalised."""
    sides, channels, origin = sides_of(imported.image_size), imported.channels, origin or folder
    inside = next((folder / sub for sub in SUBFOLDERS if (folder / sub).is_dir()), None)
    if name is None and inside is None:
        if channels in (1, 3):
            return imported
        latents = f"the network sees {channels} channels, which no image has, so they are latents"
        raise UserError(f"{origin}: {latents}: {GIVE_AUTOENCODER}")
    facts_file = folder / LATENTS
    try:
        autoencoder = open_autoencoder_of(name or str(inside), channels, with_scaling=name is not None)
        facts = _read_facts(facts_file, autoencoder, [channels, *sides]) if name is None else None
    except UserError as error:
        if name is None and channels in (1, 3) and not facts_file.is_file():
            raise UserError(
                f"{origin} holds the autoencoder {inside}, and its network sees {channels} channels, as images have: give "
                f"--autoencoder if these are latents, else the folder of the network alone ({error})"
            ) from None
        raise
    return imported.on_latents_of(autoencoder, facts)


def _read_facts(path: Path, autoencoder: Autoencoder, shape: list[int]) -> dict[str, Any] | None:
    """What our latents.json says of the latents; None where the scaling of the autoencoder says it. A UserError where neither
    does."""
    facts = read_json(path) if path.is_file() else None
    if not isinstance(facts, dict) or facts.get("autoencoder") != autoencoder.digest:
        if autoencoder.scaling is None:
            raise UserError(f"{path} is missing or belongs to another autoencoder: it says how the latents are normalised")
        return None
    each = [facts.get(key) for key in ("mean", "std", "low", "high")]
    fits = all(isinstance(values, list) and len(values) == shape[0] for values in each) and facts.get("shape") == shape
    numbers = fits and all(type(value) in (int, float) for values in each for value in values or [])
    if not numbers or not all(value > 0 for value in facts["std"]):
        raise UserError(f"{path}: it needs the shape {shape} of the latents, and mean, std, low, high of {shape[0]} channels")
    return facts
