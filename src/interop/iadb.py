"""IADB checkpoints whose network is diffusers' UNet2DModel: bare or inside a Lightning checkpoint, with their YAML or not.

Heitz, Belcour & Chambon 2023, arXiv:2305.03486. The network is fed alpha in [0, 1], 0 at the noise and 1 at the data, and
predicts data - noise: our blend, whose time t is 1 - alpha. What shapes do not say is in the YAML, or a default of diffusers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ..config import UserError, read_text, validate
from ..data import ImageConfig
from ..diffusion import ProcessConfig
from ..runs.autoencoder import Autoencoder
from ..storage.networks import UNET_2D, find_network, present_names
from ..storage.weight_files import read_file
from .diffusers import unet_config, unet_from_diffusers
from .imported import Imported
from .on_latents import open_scaled

PROCESS = {
    "schedule": {"kind": "blend"},
    "target": "blend",
    "clip": False,
    "time_input": {"kind": "alpha", "scale": 1.0},
}

# ------------------------------------------------------------------------------------------------------ the weights

PARTS = (
    *("conv_in", "time_embedding", "class_embedding", "down_blocks"),
    *("mid_block", "up_blocks", "conv_norm_out", "conv_out"),
)
SIGN = UNET_2D.signs[0]


def read_weights(path: str | Path, which: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The network's state dict by diffusers' present names, and in words what it was taken from and what was left out; see
    `find_network`. A UserError says why it cannot be read, or that no UNet2DModel is in it, or several."""
    found = read_file(path)
    weights, told = find_network(found, UNET_2D, path, which=which, parts=(*PARTS, "time_proj"))
    if any(name.startswith("time_proj.") for name in weights):
        raise UserError(f"{path}: its time embedding is fourier or learned; a positional one is what can be read")
    if any(".transformer_blocks." in name for name in weights):
        raise UserError(f"{path}: the network is a UNet2DConditionModel; a UNet2DModel is what can be read")
    return present_names(weights), told


# ------------------------------------------------------------------------------------------------------ what the shapes say


def read_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What the shapes of a UNet2DModel's state dict (by present names) say of its `config.json`.

    A UserError names what is missing.
    """

    def size(name: str, axis: int = 0) -> int:
        if axis >= len(shapes.get(name, ())):
            raise UserError(f"the checkpoint is of another architecture: it lacks {name}")
        return shapes[name][axis]

    def count(pattern: str) -> int:
        return len({match[0] for name in shapes if (match := re.match(pattern, name)) is not None})

    levels = count(r"down_blocks\.\d+\.")
    widths = [size(f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(max(1, levels))]
    found: dict[str, Any] = {
        "in_channels": size("conv_in.weight", 1),
        "out_channels": size("conv_out.weight"),
        "block_out_channels": widths,
        "layers_per_block": count(r"down_blocks\.0\.resnets\.\d+\."),
        "add_attention": "mid_block.attentions.0.to_q.weight" in shapes,
        "time_embedding_dim": size(SIGN),
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
    }
    if "class_embedding.weight" in shapes:
        found["num_class_embeds"] = size("class_embedding.weight")
    elif any(name.startswith("class_embedding.") for name in shapes):
        found["class_embed_type"] = "timestep"
    if size("down_blocks.0.resnets.0.time_emb_proj.weight") == 2 * widths[0]:
        found["resnet_time_scale_shift"] = "scale_shift"
    for way, other in (("down", "Down"), ("up", "Up")):
        kinds = []
        for i in range(levels):
            block = f"{way}_blocks.{i}"
            residual = f"{block}.{way}samplers.0.conv1.weight" in shapes
            attended = f"{block}.attentions.0.to_q.weight" in shapes
            if attended and (residual or f"{block}.{way}samplers.0.conv.weight" in shapes):
                found[f"{way}sample_type"] = "resnet" if residual else "conv"
            kind = "Attn{}Block2D" if attended else "Resnet{}sampleBlock2D" if residual else "{}Block2D"
            kinds.append(kind.format(other))
        found[f"{way}_block_types"] = kinds
    return found


# ------------------------------------------------------------------------------------------------------ what the YAML says

SECTIONS = (
    *("model", "params", "unet", "unet_config", "model_config", "network", "net", "denoiser", "backbone", "init_args"),
    *("data", "dataset", "datamodule", "image", "config", "hparams", "hyper_parameters"),
)
SAME = {"num_res_blocks": "layers_per_block", "blocks": "layers_per_block"}
LATENT = ("latent", "latents", "use_latents", "vae_latents", "use_vae")
AUTOENCODER = re.compile(r"(vae|autoencoder|first_stage)(_(model|config|path|name|dir|folder|ckpt))?")
SIDES = ("resolution", "image_size", "sample_size")  # the first two of pictures, the last of what the network sees
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", list: "a list"}
KINDS: dict[str, type] = {
    **dict.fromkeys((*SIDES, "in_channels", "out_channels", "layers_per_block", "num_class_embeds", "time_embedding_dim"), int),
    **dict.fromkeys(("attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "downsample_padding"), int),
    **dict.fromkeys(("norm_eps", "dropout", "freq_shift", "mid_block_scale_factor"), float),
    **dict.fromkeys(("add_attention", "flip_sin_to_cos", "center_input_sample"), bool),
    **dict.fromkeys(("block_out_channels", "down_block_types", "up_block_types"), list),
    **dict.fromkeys(("resnet_time_scale_shift", "downsample_type", "upsample_type", "act_fn", "mid_block_type"), str),
    **dict.fromkeys(("time_embedding_type", "class_embed_type"), str),
}


@dataclass
class Said:
    """What a YAML says: `facts` by diffusers' names, each with the dotted key that says it; `latent` likewise whether the
    network works on latents; what it names as an autoencoder; and the keys that mean nothing here."""

    file: str = ""
    facts: dict[str, tuple[str, Any]] = field(default_factory=dict)
    latent: tuple[str, bool] | None = None
    autoencoder: list[str] | None = None
    ignored: list[str] = field(default_factory=list)


def read_yaml(path: str | Path) -> Said:
    """The YAML that a network was built from: its keys at the top, and in sections such as model, params or data.

    They are those of UNet2DModel's config, and `resolution` or `image_size` of the pictures; `blocks` or `num_res_blocks`;
    `channels`, a list of widths, or a number (or `base_channels`) with `channel_mult`; `attention`, the levels that have it,
    counted from 0; `vae_latents`, `latents` or `use_latents`; and `vae`, `autoencoder` or `first_stage`. A UserError says what
    is no such file, and what it says twice and differently.
    """
    try:
        raw = yaml.safe_load(read_text(path))
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}: not valid YAML{where}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a YAML mapping, KEY: VALUE")
    said = Said(str(path))
    _walk(said, raw, "", set())
    return said


def _walk(said: Said, section: dict[Any, Any], path: str, seen: set[int]) -> None:
    if id(section) in seen:  # an alias inside what it stands for
        return
    seen.add(id(section))
    base, mult = section.get("base_channels", section.get("channels")), section.get("channel_mult")
    multiplied = False
    if isinstance(base, int) and isinstance(mult, list):
        multiplied = True
        where = f"{path}channel_mult"
        _take(said, "block_out_channels", where, [int(base * _typed(said, where, times, float)) for times in mult])
    for key, value in ((str(key), value) for key, value in section.items()):
        where, name = f"{path}{key}", SAME.get(key, key)
        if multiplied and key in ("base_channels", "channels", "channel_mult"):
            continue
        if key == "channels" and isinstance(value, list):
            _take(said, "block_out_channels", where, value)
        elif key == "attention" and isinstance(value, list) and all(type(level) is int for level in value):
            _take(said, key, where, sorted(set(value)))
        elif key in LATENT and value is not None:
            said.latent = (where, bool(value))
        elif AUTOENCODER.fullmatch(key):
            if value is not None and value is not False:
                said.autoencoder = _strings(value)
        elif name in KINDS:
            if value is not None or name == "attention_head_dim":  # there null is a choice, one head
                _take(said, name, where, None if value is None else _typed(said, where, value, KINDS[name]))
        elif key in SECTIONS and isinstance(value, dict):
            _walk(said, value, f"{where}.", seen)
        else:
            said.ignored.append(where)


def _typed(said: Said, where: str, value: Any, kind: type) -> Any:
    """The value as what it must be. YAML reads 1e-5 as a word."""
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if where.rpartition(".")[2] in SIDES and isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{said.file}: {where} is {value!r}, and should be {WORDS[kind]}")
    return value


def _take(said: Said, name: str, where: str, value: Any) -> None:
    before, other = said.facts.setdefault(name, (where, value))
    if other != value:
        raise UserError(f"{said.file}: {before} is {other} and {where} is {value}; leave one out")


def _strings(value: Any, depth: int = 4) -> list[str]:
    """Every word in a value, whatever is around it."""
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [word for part in inside for word in _strings(part, depth - 1)] if depth else []


# ------------------------------------------------------------------------------------------------------ all that is known

DEFAULTS = {
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "downsample_padding": 1,
    "dropout": 0.0,
}


def architecture(shapes: Mapping[str, Sequence[int]], said: Said) -> tuple[dict[str, Any], list[str]]:
    """The `config.json` of the UNet2DModel with such shapes, and where it is from, in words.

    What neither shapes nor YAML say is a default of diffusers. A UserError names what the YAML says otherwise than the shapes,
    and a default that cannot be.
    """
    found = read_shapes(shapes)
    levels = {"attention": [i for i, kind in enumerate(found["down_block_types"]) if kind.startswith("Attn")]}
    for name, (where, value) in said.facts.items():
        seen = {**found, **levels}.get(name, value)
        given = _without_resampling(value) if name.endswith("block_types") else value
        if given != seen:
            raise UserError(f"{said.file} says {where} {value}, and the weights {seen}")
    own = ("attention", *SIDES, *found)
    stated = {name: value for name, (_, value) in said.facts.items() if name not in own}
    assumed = {name: value for name, value in DEFAULTS.items() if name not in stated}
    theirs = {**assumed, **stated, **found}
    if found["resnet_time_scale_shift"] == "scale_shift" and "mid_block.attentions.0.group_norm.weight" in shapes:
        theirs.setdefault("attn_norm_num_groups", theirs["norm_num_groups"])

    widths = found["block_out_channels"]
    attended = [widths[i] for i in levels["attention"]] + ([widths[-1]] if found["add_attention"] else [])
    for name, wide in (("norm_num_groups", widths), ("attention_head_dim", attended)):
        wrong = [width for width in wide if name in assumed and width % assumed[name]]
        if wrong:
            raise UserError(
                f"the weights do not say {name}, and diffusers' default of {assumed[name]} does not divide {wrong[0]} channels:"
                f" write {name} into a YAML, and give it with --model-config"
            )
    told = [f"from the weights: {_listed(found)}"]
    told += [f"from {said.file}: {_listed(stated)}"] if stated else []
    told += [f"diffusers' defaults, which the weights do not say: {_listed(assumed)}"] if assumed else []
    told += [f"ignored in {said.file}: {', '.join(said.ignored)}"] if said.ignored else []
    return theirs, told


def _without_resampling(kinds: list[Any]) -> list[Any]:
    """Block types as shapes show them: the last one does not resample, so it does not say how."""
    last = {"ResnetDownsampleBlock2D": "DownBlock2D", "ResnetUpsampleBlock2D": "UpBlock2D"}
    return [*kinds[:-1], *(last.get(str(kind), kind) for kind in kinds[-1:])]


def _listed(facts: Mapping[str, Any]) -> str:
    def word(value: Any) -> str:
        return "/".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)

    return ", ".join(f"{name} {word(value)}" for name, value in facts.items())


def _image_size(asked: int | None, said: Said, factor: int) -> tuple[int, str]:
    """The side of the pictures, and where it is from; `factor` is the autoencoder's. A UserError where nothing says it."""
    named = {name: said.facts[name] for name in SIDES if name in said.facts}
    sizes = {where: side * factor if name == "sample_size" else side for name, (where, side) in named.items()}
    if asked is not None:
        return asked, "--image-size"
    if not sizes:
        raise UserError(
            "the weights do not say the size of the pictures: give --image-size N, or --model-config with a resolution"
        )
    if len(set(sizes.values())) > 1:
        listed = " and ".join(f"{where}, pictures of {size} px," for where, size in sizes.items())
        raise UserError(f"{said.file} says {listed} which differ: give --image-size N")
    where = next(iter(sizes))
    return sizes[where], where


def _latents(asked: str | None, said: Said, channels: int) -> Autoencoder | None:
    """The autoencoder whose latents the network sees, opened; None where it sees pictures.

    A UserError says that it is missing, or why it cannot be the one.
    """
    where, on_latents = said.latent or ("", asked is not None or said.autoencoder is not None or channels not in (1, 3))
    if not on_latents:
        if channels not in (1, 3):
            raise UserError(f"{said.file} says {where} false, and the weights see {channels} channels, which no pictures have")
        if asked is not None:
            raise UserError(f"{said.file} says {where} false, and --autoencoder {asked} is given; leave one out")
        return None
    named = said.autoencoder or []
    places = [str(place) for name in named for place in (Path(name), Path(said.file).parent / name) if place.is_dir()]
    if asked is None and not places:
        hint = f" (the YAML names {named[0]})" if named else ""
        raise UserError(
            f"the network sees latents of {channels} channels{hint}: give --autoencoder NAME, a diffusers AutoencoderKL as "
            "folder or hub name, such as stabilityai/sd-vae-ft-mse"
        )
    return open_scaled(asked or places[0], channels)


def read(
    path: str | Path,
    *,
    model_config: str | Path | None = None,
    image_size: int | None = None,
    autoencoder: str | None = None,
    which: str | None = None,
) -> Imported:
    """An IADB checkpoint with all that sampling needs.

    `model_config` is the YAML that the network was built from, `image_size` the side of the pictures where it does not say it,
    `autoencoder` that of a network on latents, by the name that train_ldm.py takes; `which` chooses one of several networks in
    the file, as `find_network` says. A UserError says what is missing, and what
    contradicts the weights.
    """
    said = read_yaml(model_config) if model_config is not None else Said()
    state, told = read_weights(path, which)
    try:
        theirs, facts = architecture({name: tuple(tensor.shape) for name, tensor in state.items()}, said)
        seen, made, classes = theirs["in_channels"], theirs["out_channels"], theirs["num_class_embeds"]
        if seen != made:
            raise UserError(f"the network sees {seen} channels and gives {made}; that of IADB gives what it sees")
        model = unet_config(theirs)
        latents = _latents(autoencoder, said, seen)
        channels, factor = (latents.channels, latents.factor) if latents is not None else (seen, 1)
        size, where = _image_size(image_size, said, factor)
        image = validate(ImageConfig, {"size": size, "channels": channels}, origin="image")
        side = latents.latent_shape(channels, size)[1] if latents is not None else size
        if side % model.factor:
            raise UserError(
                f"the network sees {side} px, of pictures of {size} px as {where} says, not divisible by {model.factor}, what "
                f"its {len(model.channel_mult)} levels ask for: give another --image-size"
            )
        network = unet_from_diffusers(theirs, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    told += [*facts, f"image size: {size} px, from {where}"]
    if latents is not None:
        mean, deviation = latents.scaling or (0.0, 1.0)
        told += latents.notes
        told.append(
            f"latents: {seen} x {side} x {side} of {latents.path}, less {mean:g} over {deviation:g} by its own scaling, which "
            "the checkpoint does not say; nor does it say their range"
        )
    told.append("process: IADB's, which the checkpoint does not say: the blend, alpha fed unscaled in [0, 1], nothing clipped")
    return Imported(
        network=network,
        model=model,
        process=validate(ProcessConfig, PROCESS),
        image_size=image.size,
        channels=channels,
        num_classes=classes,
        told=tuple(told),
        script="train_iadb.py",
        autoencoder=latents,
    )
