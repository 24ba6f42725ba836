"""IADB checkpoints whose network is diffusers' UNet2DModel: bare or inside a Lightning checkpoint, with their YAML or not.

Heitz, Belcour & Chambon 2023, arXiv:2305.03486. The network is fed alpha in [0, 1], 0 at the noise and 1 at the data, and
predicts data - noise: our blend, whose time t is 1 - alpha. What shapes do not say is in the YAML, or a default of diffusers.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import UserError, prefix_errors, validate
from ..data import ImageConfig
from ..diffusion import ProcessConfig
from ..runs.autoencoder import Autoencoder
from ..runs.folders import refuse
from ..storage.networks import UNET_2D, find_network, present_names
from ..storage.weight_files import read_file
from .iadb_yaml import SIZES, YamlFacts, read_yaml
from .imported import GIVE_AUTOENCODER, Imported, open_autoencoder_of
from .names import list_origins, size_of
from .unet_2d import unet_config, unet_from_diffusers

PROCESS = {"schedule": {"kind": "blend"}, "target": "blend", "clip": False, "time_input": {"kind": "alpha", "scale": 1.0}}
PARTS = ("conv_in", "time_embedding", "class_embedding", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
WITHOUT_RESAMPLING = {"ResnetDownsampleBlock2D": "DownBlock2D", "ResnetUpsampleBlock2D": "UpBlock2D"}
# Diffusers' values for what the weights do not say.
DEFAULTS = {"attention_head_dim": 8, "norm_num_groups": 32, "norm_eps": 1e-5, "freq_shift": 0, "flip_sin_to_cos": True}
DEFAULTS |= {"downsample_padding": 1, "dropout": 0.0}


def read_weights(path: str | Path, which: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of the network by diffusers' present names, and notes on what was taken and left out; see `find_network`.
    A UserError says why it cannot be read, or that the file holds no UNet2DModel, or several."""
    state_dict, notes = find_network(read_file(path), UNET_2D, path, which=which, parts=(*PARTS, "time_proj"))
    has_time, has_text = (any(part in f".{name}" for name in state_dict) for part in (".time_proj.", ".transformer_blocks."))
    reasons = {
        "its time embedding is fourier or learned; a positional one is what can be read": has_time,
        "the network is a UNet2DConditionModel; a UNet2DModel is what can be read": has_text,
    }
    refuse(f"{path}:", reasons)
    return present_names(state_dict), notes


def read_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What the shapes of a UNet2DModel's state dict (by present names) say of its `config.json`. A UserError names what is
    missing."""
    size = functools.partial(size_of, shapes)

    def count(pattern: str) -> int:
        return len({match[0] for name in shapes if (match := re.match(pattern, name)) is not None})

    levels = count(r"down_blocks\.\d+\.")
    widths = [size(f"down_blocks.{i}.resnets.0.conv1.weight") for i in range(max(1, levels))]
    scale_shift = size("down_blocks.0.resnets.0.time_emb_proj.weight") == 2 * widths[0]
    has_classes = "class_embedding.weight" in shapes
    config: dict[str, Any] = {
        "in_channels": size("conv_in.weight", 1),
        "out_channels": size("conv_out.weight"),
        "block_out_channels": widths,
        "layers_per_block": count(r"down_blocks\.0\.resnets\.\d+\."),
        "add_attention": "mid_block.attentions.0.to_q.weight" in shapes,
        "time_embedding_dim": size("time_embedding.linear_1.weight"),
        "num_class_embeds": size("class_embedding.weight") if has_classes else None,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
    }
    if not has_classes and any(name.startswith("class_embedding.") for name in shapes):
        config["class_embed_type"] = "timestep"
    for way in ("down", "up"):
        kinds = []
        for block in (f"{way}_blocks.{i}" for i in range(levels)):
            is_residual, is_plain = (f"{block}.{way}samplers.0.{layer}.weight" in shapes for layer in ("conv1", "conv"))
            attends = f"{block}.attentions.0.to_q.weight" in shapes
            if attends and (is_residual or is_plain):
                config[f"{way}sample_type"] = "resnet" if is_residual else "conv"
            kind = "Attn{}Block2D" if attends else "Resnet{}sampleBlock2D" if is_residual else "{}Block2D"
            kinds.append(kind.format(way.title()))
        config[f"{way}_block_types"] = kinds
    return config


def architecture(shapes: Mapping[str, Sequence[int]], yaml: YamlFacts) -> tuple[dict[str, Any], list[str]]:
    """The `config.json` of the UNet2DModel with such shapes, and notes on where it comes from. What neither shapes nor YAML say
    is a default of diffusers. A UserError names what the YAML says otherwise than the shapes, and a default that cannot be."""
    by_shapes = read_shapes(shapes)
    levels = [i for i, kind in enumerate(by_shapes["down_block_types"]) if kind.startswith("Attn")]
    known = {**by_shapes, "attention": levels}
    for name, (key, value) in yaml.facts.items():
        given = value
        if name.endswith("block_types"):  # the last block does not resample, so its shapes do not say how it would
            given = [*value[:-1], *(WITHOUT_RESAMPLING.get(str(kind), kind) for kind in value[-1:])]
        if given != known.get(name, given):
            raise UserError(f"{yaml.file} says {key} {value}, and the weights {known[name]}")
    by_yaml = {name: value for name, (_, value) in yaml.facts.items() if name not in (*SIZES, "latents", *known)}
    assumed = {name: value for name, value in DEFAULTS.items() if name not in by_yaml}
    theirs = {**assumed, **by_yaml, **by_shapes}
    if by_shapes["resnet_time_scale_shift"] == "scale_shift" and "mid_block.attentions.0.group_norm.weight" in shapes:
        theirs.setdefault("attn_norm_num_groups", theirs["norm_num_groups"])

    widths = by_shapes["block_out_channels"]
    attended = [widths[i] for i in levels] + ([widths[-1]] if by_shapes["add_attention"] else [])
    for name, divided in (("norm_num_groups", widths), ("attention_head_dim", attended)):
        if undivided := [width for width in divided if name in assumed and width % assumed[name]]:
            raise UserError(
                f"the weights do not say {name}, and diffusers' default of {assumed[name]} does not divide {undivided[0]} "
                f"channels: write {name} into a YAML, and give it with --model-config"
            )
    origins = {
        "from the weights": by_shapes,
        f"from {yaml.file}": by_yaml,
        "diffusers' defaults, which the weights do not say": assumed,
    }
    notes = list_origins(origins)
    notes += [f"ignored in {yaml.file}: {', '.join(yaml.ignored)}"] if yaml.ignored else []
    return theirs, notes


def _image_size(given: int | None, yaml: YamlFacts, factor: int) -> tuple[int, str]:
    """The size of the images, and what says it; `factor` is that of the autoencoder. A UserError where nothing says it."""
    if given is not None:
        return given, "--image-size"
    facts = {name: yaml.facts[name] for name in SIZES if name in yaml.facts}
    sizes = {key: size * factor if name == "sample_size" else size for name, (key, size) in facts.items()}
    words = " and ".join(f"{key}, images of {size} px," for key, size in sizes.items())
    reasons = {
        "the weights do not say the size of the images: give --image-size N, or --model-config with a resolution": not sizes,
        f"{yaml.file} says {words} which differ: give --image-size N": len({*sizes.values()}) > 1,
    }
    refuse("", reasons)
    return next((size, key) for key, size in sizes.items())


def _open_autoencoder(given: str | None, yaml: YamlFacts, channels: int) -> Autoencoder | None:
    """The autoencoder whose latents the network sees; None where it sees images. A UserError says that it is missing, or why it
    cannot be the one."""
    names = yaml.autoencoder or []
    guess = given is not None or yaml.autoencoder is not None or channels not in (1, 3)
    key, on_latents = yaml.facts.get("latents", ("", guess))
    if not on_latents:
        reasons = {
            f"the weights see {channels} channels, which no images have": channels not in (1, 3),
            f"--autoencoder {given} is given; leave one out": given is not None,
        }
        refuse(f"{yaml.file} says {key} false, and", reasons)
        return None
    places = [str(place) for name in names for place in (Path(name), Path(yaml.file).parent / name) if place.is_dir()]
    if given is None and not places:
        hint = f" (the YAML names {names[0]})" if names else ""
        raise UserError(f"the network sees latents of {channels} channels{hint}: {GIVE_AUTOENCODER}")
    return open_autoencoder_of(given or places[0], channels)


def read(
    path: str | Path,
    *,
    model_config: str | Path | None = None,
    image_size: int | None = None,
    autoencoder: str | None = None,
    which: str | None = None,
) -> Imported:
    """An IADB checkpoint with all that sampling needs. `model_config` is the YAML that the network was built from, `image_size`
    the size of the images where it does not say it, `autoencoder` that of a network on latents, by the name that train_ldm.py
    takes; `which` chooses one of several networks in the file, as `find_network` says. A UserError says what is missing, and
    what contradicts the weights."""
    yaml = read_yaml(model_config) if model_config is not None else YamlFacts()
    state_dict, notes = read_weights(path, which)
    with prefix_errors(str(path)):
        theirs, facts = architecture({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, yaml)
        inputs, outputs = theirs["in_channels"], theirs["out_channels"]
        if inputs != outputs:
            raise UserError(f"the network sees {inputs} channels and gives {outputs}; that of IADB gives what it sees")
        model = unet_config(theirs)
        latents = _open_autoencoder(autoencoder, yaml, inputs)
        channels, factor = (latents.channels, latents.factor) if latents is not None else (inputs, 1)
        size, key = _image_size(image_size, yaml, factor)
        image = validate(ImageConfig, {"size": size, "channels": channels}, origin="image")
        side = latents.latent_shape(image)[1] if latents is not None else size
        if side % model.factor:
            raise UserError(
                f"the network sees {side} px, of images of {size} px as {key} says, not divisible by {model.factor}, what its "
                f"{len(model.channel_mult)} levels ask for: give another --image-size"
            )
        network = unet_from_diffusers(theirs, state_dict)
    imported = Imported(
        network=network,
        process=validate(ProcessConfig, PROCESS),
        image_size=side,
        channels=inputs,
        notes=(
            *notes,
            *facts,
            f"image size: {size} px, from {key}",
            "process: IADB's, which the checkpoint does not say: the blend, alpha fed unscaled in [0, 1], nothing clipped",
        ),
    )
    return imported if latents is None else imported.on_latents_of(latents)
