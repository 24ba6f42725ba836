"""guided-diffusion's flags: reading them, holding them against the weights, and our configs made of them."""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from ..config import UserError, read_json, validate
from ..diffusion import ProcessConfig
from ..models import ClassifierConfig, UNetConfig
from .guided_shapes import Architecture, join_multiples, join_sizes
from .names import list_origins

# The flags that say what the weights of a U-Net do not, with guided-diffusion's defaults.
HEADS = {"num_heads": 4, "num_heads_upsample": -1, "num_head_channels": -1, "use_new_attention_order": False, "dropout": 0.0}
# The same of a U-Net and a classifier.
DIFFUSION = {"diffusion_steps": 1000, "noise_schedule": "linear"} | dict.fromkeys(
    ("predict_xstart", "rescale_timesteps", "rescale_learned_sigmas", "use_kl", "sigma_small"), False
)
# The types of all flags that are read; the weights say the others, too.
TYPES: dict[str, type] = {name: type(value) for name, value in (HEADS | DIFFUSION).items()} | {
    **dict.fromkeys(("image_size", "large_size", "small_size", "num_channels", "num_res_blocks"), int),
    **dict.fromkeys(("attention_resolutions", "channel_mult"), str),
    **dict.fromkeys(("class_cond", "learn_sigma", "use_scale_shift_norm", "resblock_updown"), bool),
    **dict.fromkeys(("classifier_width", "classifier_depth"), int),
    **dict.fromkeys(("classifier_attention_resolutions", "classifier_pool"), str),
    **dict.fromkeys(("classifier_use_scale_shift_norm", "classifier_resblock_updown"), bool),
}
# Other flags of the commands: they say how a network was trained or sampled, not what it is.
IGNORED = (
    *("use_checkpoint", "use_fp16", "classifier_use_fp16", "fp16_scale_growth", "timestep_respacing", "clip_denoised"),
    *("data_dir", "val_data_dir", "noised", "iterations", "schedule_sampler", "lr", "weight_decay", "lr_anneal_steps"),
    *("anneal_lr", "batch_size", "microbatch", "ema_rate", "log_interval", "eval_interval", "save_interval"),
    *("resume_checkpoint", "num_samples", "use_ddim", "model_path", "classifier_path", "classifier_scale"),
    *("base_name", "base_samples"),
)
DEFAULT_MULT = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4", 32: "1,2,2,2"}
FLAGS_OF_COMMAND = "the MODEL_FLAGS and DIFFUSION_FLAGS of the command that trained the checkpoint, as JSON: --flags FILE"


def _split_numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [math.nan]
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(f"flags: {name} is {text!r}; write numbers above 0, parted by commas")
    return numbers


def _convert(name: str, value: Any) -> Any:
    """The value of a flag in the type that the flag has."""
    kind = TYPES[name]
    if kind is str:
        return (",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)).replace(" ", "")
    try:
        return pydantic.TypeAdapter(kind).validate_python(value if kind is bool or not isinstance(value, bool) else None)
    except pydantic.ValidationError:
        words = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"flags: {name} is {value!r}; write {words}") from None


def read_flags(flags: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """guided-diffusion's flags with values of their types, from a dict or a JSON file of them (or of {"flags": them}), where
    values are written as on a command line or as in JSON. A UserError names a flag that is unknown or of another type."""
    raw = flags if isinstance(flags, Mapping) else read_json(flags)
    raw = raw.get("flags", raw) if isinstance(raw, Mapping) else raw
    if not isinstance(raw, Mapping):
        raise UserError(f"{flags}: flags are a JSON object, {{...}}")
    for name in raw:
        if name not in TYPES and name not in IGNORED:
            close = difflib.get_close_matches(str(name), [*TYPES, *IGNORED], 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(TYPES)}"
            raise UserError(f"flags: {name!r} is no flag of guided-diffusion{hint}")
    typed = {name: _convert(name, value) for name, value in raw.items() if name in TYPES and value is not None}
    for name in ("image_size", "large_size", "small_size", "diffusion_steps"):
        if typed.get(name, 1) < 1:
            raise UserError(f"flags: {name} is {typed[name]}; it must be at least 1")
    return typed


def default_mult(flags: Mapping[str, Any]) -> str | None:
    """The channel_mult that guided-diffusion takes for the image size of these flags."""
    size = flags.get("large_size", flags.get("image_size"))
    return DEFAULT_MULT.get(256 if size == 512 and "large_size" in flags else size)


def resolve(architecture: Architecture, flags: Mapping[str, Any] | None) -> tuple[int, dict[str, Any], list[str]]:
    """The size of the images, the flags that say what the weights do not, and notes on where each fact comes from. A UserError
    where flags are missing, contradict the weights, or are of another network."""
    defaults = DIFFUSION if architecture.kind == "classifier" else HEADS | DIFFUSION
    sizes = ["image_size"] if architecture.image_size is None else []
    sizes, source = ["large_size", "small_size"] if architecture.upsampler else sizes, "from the flags"
    if flags is None:
        name, flags = find_published(architecture)
        source = f"from the published {name}, whose architecture this is (another run of it needs its own flags)"
    if flags is None:
        unknown = ", ".join([*sizes, *defaults])
        raise UserError(f"this is no published architecture, and the weights do not say {unknown}: give {FLAGS_OF_COMMAND}")
    if not architecture.upsampler and ("large_size" in flags or "small_size" in flags):
        raise UserError("large_size and small_size are in the flags, and the weights are not an upsampler's")
    if missing := [name for name in sizes if name not in flags]:
        whose = "are an upsampler's and do" if architecture.upsampler else "do"
        raise UserError(f"the weights {whose} not say {' and '.join(missing)}: give {FLAGS_OF_COMMAND}")
    size = flags.get("large_size" if architecture.upsampler else "image_size", architecture.image_size)
    check_flags(architecture, flags, size)
    if (steps := flags.get("diffusion_steps", 1000)) != 1000 and "rescale_timesteps" not in flags:
        raise UserError(
            f"the flags say diffusion_steps {steps} and not rescale_timesteps, whose default is true in improved-diffusion and "
            f"false in guided-diffusion: give {FLAGS_OF_COMMAND}"
        )
    given = {name: flags[name] for name in (*sizes, *defaults) if name in flags}
    assumed = {name: value for name, value in defaults.items() if name not in given}
    by_shapes = architecture.flags(size) | {"image channels": architecture.channels, "classes": architecture.num_classes}
    notes = list_origins({"from the weights": by_shapes, source: given, "guided-diffusion's defaults": assumed})
    return size, assumed | given | {"learn_sigma": architecture.learn_sigma}, notes


def check_flags(architecture: Architecture, flags: Mapping[str, Any], size: int) -> None:
    """A UserError where flags contradict the shapes of the weights."""
    halvings = len(architecture.model["channel_mult"]) - 1
    if size % 2**halvings:
        raise UserError(f"the images have {size} px in the flags, and the weights halve them {halvings} times")
    values = {**flags, "channel_mult": flags.get("channel_mult") or default_mult(flags)}
    for name, by_shapes in architecture.flags(size).items():
        value, where = values.get(name), ""
        if value is None:
            continue
        if name.endswith("attention_resolutions"):
            factors = {size // resolution for resolution in _split_numbers(name, value, int)}
            value, where = join_sizes(size >> k for k in range(halvings + 1) if 2**k in factors), f", images of {size} px,"
        if name == "channel_mult":
            value, where = join_multiples(_split_numbers(name, value, float)), f", images of {size} px,"
        if value != by_shapes:
            given = f"in the flags{where}" if flags.get(name) is not None else f"by default for {size} px, which the flags say,"
            raise UserError(f"{name} is {values[name]} {given} and {by_shapes} in the weights")
    if flags.get("num_heads_upsample", -1) not in (-1, flags.get("num_heads", HEADS["num_heads"])):
        raise UserError("num_heads_upsample other than num_heads is not supported")


def process_config(flags: Mapping[str, Any]) -> ProcessConfig:
    """guided-diffusion's flags as the config of our process."""
    flags = {**DIFFUSION, "learn_sigma": False, **read_flags(flags)}
    steps, name = flags["diffusion_steps"], flags["noise_schedule"]
    if name not in ("linear", "cosine"):
        raise UserError(f"noise_schedule {name!r} is not known; allowed: linear, cosine")
    loss: dict[str, Any] = {"kind": "rescaled_kl" if flags["use_kl"] else "simple"}
    if flags["learn_sigma"] and not flags["use_kl"]:
        loss = {"kind": "hybrid", "variational_weight": steps / 1000 if flags["rescale_learned_sigmas"] else 1.0}
    spec = {
        "schedule": {"kind": name, "steps": steps, **({"rescale_betas": True} if name == "linear" else {})},
        "target": "x0" if flags["predict_xstart"] else "eps",
        "variance": "learned" if flags["learn_sigma"] else "small" if flags["sigma_small"] else "large",
        "clip": True,
        "loss": loss,
        "time_input": {"scale": 1000 / steps if flags["rescale_timesteps"] else 1.0},
    }
    return validate(ProcessConfig, spec, origin="flags")


def model_config(architecture: Architecture, flags: Mapping[str, Any]) -> UNetConfig | ClassifierConfig:
    """The config of our network: what the shapes say, and the heads and the dropout of the flags."""
    flags = {**HEADS, **flags}
    spec = {**architecture.model, "dropout": flags["dropout"]}
    if architecture.kind == "classifier":
        return validate(ClassifierConfig, {**spec, "head_channels": 64, "split_qkv_first": False}, origin="flags")
    by_channels = flags["num_head_channels"] != -1
    spec["head_channels" if by_channels else "num_heads"] = flags["num_head_channels" if by_channels else "num_heads"]
    spec |= {"upsample": spec["downsample"], "split_qkv_first": flags["use_new_attention_order"]}
    return validate(UNetConfig, spec, origin="flags")


# The flags of the commands that trained the published checkpoints.
GUIDED = (
    {"num_channels": 256, "num_res_blocks": 2, "attention_resolutions": "32,16,8", "resblock_updown": True}
    | {"use_scale_shift_norm": True, "class_cond": True, "learn_sigma": True}
    | {"diffusion_steps": 1000, "noise_schedule": "linear"}
)
GUIDED_CLASSIFIER = (
    {"classifier_width": 128, "classifier_depth": 2, "classifier_attention_resolutions": "32,16,8"}
    | {"classifier_pool": "attention", "classifier_resblock_updown": True, "classifier_use_scale_shift_norm": True}
    | {"diffusion_steps": 1000, "noise_schedule": "linear"}
)
IMPROVED = (
    {"num_channels": 128, "num_res_blocks": 3, "num_heads": 4, "attention_resolutions": "16,8", "resblock_updown": False}
    | {"use_scale_shift_norm": True, "class_cond": False, "learn_sigma": True, "diffusion_steps": 4000}
    | {"noise_schedule": "cosine", "rescale_learned_sigmas": True, "rescale_timesteps": True}
)
NOT_RESCALED = {"rescale_learned_sigmas": False, "rescale_timesteps": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_diffusion.pt": GUIDED
    | {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64}
    | {"use_new_attention_order": True, "noise_schedule": "cosine", "dropout": 0.1},
    "128x128_diffusion.pt": GUIDED | {"image_size": 128, "num_heads": 4},
    "256x256_diffusion.pt": GUIDED | {"image_size": 256, "num_head_channels": 64},
    "256x256_diffusion_uncond.pt, lsun_bedroom.pt, lsun_cat.pt and lsun_horse.pt": GUIDED
    | {"image_size": 256, "num_head_channels": 64, "class_cond": False},
    "512x512_diffusion.pt": GUIDED | {"image_size": 512, "num_head_channels": 64},
    "64_256_upsampler.pt": GUIDED | {"large_size": 256, "small_size": 64, "num_channels": 192, "num_heads": 4},
    "128_512_upsampler.pt": GUIDED
    | {"large_size": 512, "small_size": 128, "num_channels": 192, "num_head_channels": 64, "attention_resolutions": "32,16"},
    # a classifier was trained on the noise of the network that it guides
    "64x64_classifier.pt": GUIDED_CLASSIFIER | {"image_size": 64, "classifier_depth": 4, "noise_schedule": "cosine"},
    "128x128_classifier.pt": GUIDED_CLASSIFIER | {"image_size": 128},
    "256x256_classifier.pt": GUIDED_CLASSIFIER | {"image_size": 256},
    "512x512_classifier.pt": GUIDED_CLASSIFIER | {"image_size": 512},
    "cifar10_uncond_50M_500K.pt": IMPROVED | {"image_size": 32, "dropout": 0.3},
    "imagenet64_uncond_100M_1500K.pt": IMPROVED | {"image_size": 64},
    "imagenet64_cond_270M_250K.pt": IMPROVED | NOT_RESCALED | {"image_size": 64, "num_channels": 192, "class_cond": True},
    "upsample_cond_500K.pt": IMPROVED
    | NOT_RESCALED
    | {"large_size": 256, "small_size": 64, "num_channels": 192, "num_res_blocks": 2, "class_cond": True}
    | {"noise_schedule": "linear"},
    "lsun_uncond_100M_1200K_bs128.pt": IMPROVED
    | NOT_RESCALED
    | {"image_size": 256, "num_res_blocks": 2, "num_heads": 1, "use_scale_shift_norm": False}
    | {"attention_resolutions": "16", "diffusion_steps": 1000, "noise_schedule": "linear"},
}
CLASSES = 1000  # of every published network that has classes


def find_published(architecture: Architecture) -> tuple[str, dict[str, Any] | None]:
    """The name and the flags of the published file of this architecture; no name and None where there is none."""
    for name, flags in PUBLISHED.items():
        kind = "classifier" if "classifier_width" in flags else "U-Net"
        facts = (kind, 3, "full", CLASSES if kind == "classifier" or flags["class_cond"] else None, "large_size" in flags)
        a = architecture
        if (a.kind, a.channels, a.model["mid_attention"], a.num_classes, a.upsampler) != facts:
            continue
        by_shapes = a.flags(flags["large_size"] if a.upsampler else flags["image_size"])
        if by_shapes == {key: flags.get(key, default_mult(flags)) for key in by_shapes}:
            return name, flags
    return "", None
