"""guided-diffusion's networks, and improved-diffusion's: their checkpoints and flags as our networks and process.

What the shapes of the weights say is read from them. What they do not say (the heads, the schedule, the picture's size) is
in the flags of the command that trained the checkpoint, or, for a published file, in a table here.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import UserError, read_json, validate
from ..diffusion import Process, ProcessConfig, build_process
from ..models import Classifier, ClassifierConfig, UNet, UNetConfig
from ..storage import networks
from ..storage.networks import few, find_network
from ..storage.weight_files import read_file
from .imported import Imported

RESIDUAL = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",
    "embed": "emb_layers.1",
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
POOLS = {
    "adaptive": {"head_norm": "out.0", "head": "out.3"},
    "attention": {"head_norm": "out.0", "head": "out.2", "head.qkv": "out.2.qkv_proj", "head.out": "out.2.c_proj"},
    "spatial": {"head.0": "out.0", "head.2": "out.2"},
}


def module_names(config: UNetConfig | ClassifierConfig) -> dict[str, str]:
    """Our module names -> guided-diffusion's, for every module that holds parameters."""
    names = {"time_in": "time_embed.0", "time_out": "time_embed.2", "label_embedding": "label_emb"}
    names["stem"] = "input_blocks.0.0"

    def residual(ours: str, theirs: str) -> None:
        names.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESIDUAL.items()})

    def block(ours: str, theirs: str) -> None:
        residual(f"{ours}.residual", f"{theirs}.0")
        names.update({f"{ours}.attention.{a}": f"{theirs}.1.{b}" for a, b in ATTENTION.items()})

    last = len(config.channel_mult) - 1
    at = 1
    for level in range(last + 1):
        for i in range(config.blocks):
            block(f"down.{level}.blocks.{i}", f"input_blocks.{at}")
            at += 1
        if level < last:
            residual(f"down.{level}.resample", f"input_blocks.{at}.0")
            names[f"down.{level}.resample.conv"] = f"input_blocks.{at}.0.op"
            at += 1
    block("mid.0", "middle_block")
    residual("mid.1.residual", f"middle_block.{1 if config.mid_attention == 'none' else 2}")
    if isinstance(config, ClassifierConfig):
        return names | POOLS[config.pool]
    at = 0
    for stage, level in enumerate(reversed(range(last + 1))):
        for i in range(config.blocks + 1):
            block(f"up.{stage}.blocks.{i}", f"output_blocks.{at}")
            at += 1
        if level > 0:
            resample = f"output_blocks.{at - 1}.{1 if config.attention[level] == 'none' else 2}"
            residual(f"up.{stage}.resample", resample)
            names[f"up.{stage}.resample.conv"] = f"{resample}.conv"
    return names | {"head_norm": "out.0", "head": "out.2"}


def _another_architecture(missing: Iterable[str], extra: Iterable[str]) -> UserError:
    found = (("lacks", sorted(missing)), ("has in excess", sorted(extra)))
    parts = [f"{word} {', '.join(keys[:5])}" for word, keys in found if keys]
    return UserError(f"the checkpoint is of another architecture: it {' and '.join(parts)}")


def rename(network: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Another project's state dict under our parameter names, in float32, reshaped where only 1s differ.

    `names` maps our module names to theirs. A UserError says which keys differ, the first five.
    """
    ours = {key: (names.get(key.rpartition(".")[0], "?") + "." + key.rpartition(".")[2]) for key in network.state_dict()}
    missing, extra = set(ours.values()) - set(state), set(state) - set(ours.values())
    if missing or extra:
        raise _another_architecture(missing, extra)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    renamed = {}
    for key, theirs in ours.items():
        tensor = state[theirs]
        if [n for n in tensor.shape if n != 1] != [n for n in shapes[key] if n != 1]:
            raise UserError(
                f"the checkpoint is of another architecture: {theirs} is {tuple(tensor.shape)}, "
                f"this network wants {tuple(shapes[key])}"
            )
        renamed[key] = tensor.reshape(shapes[key]).float()
    return renamed


# ------------------------------------------------------------------------------------------------------ what the shapes say


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a checkpoint say. `attention` has an entry for each resolution, the largest first;
    `resblock_updown` is None where there is one resolution and so no resampling; `image_size` None where they do not say it."""

    kind: Literal["U-Net", "classifier"]
    channels: int
    num_channels: int
    num_res_blocks: int
    channel_mult: tuple[float, ...]
    attention: tuple[bool, ...]
    mid_attention: bool
    resblock_updown: bool | None
    use_scale_shift_norm: bool
    num_classes: int | None
    learn_sigma: bool = False
    upsampler: bool = False
    pool: str | None = None
    image_size: int | None = None

    def flags(self, image_size: int) -> dict[str, Any]:
        """The same as guided-diffusion's flags for pictures of this size."""
        attended = _sizes(image_size >> level for level, on in enumerate(self.attention) if on)
        common = {"use_scale_shift_norm": self.use_scale_shift_norm, "attention_resolutions": attended}
        if self.resblock_updown is not None:
            common["resblock_updown"] = self.resblock_updown
        if self.kind == "classifier":
            common |= {"width": self.num_channels, "depth": self.num_res_blocks, "pool": self.pool}
            own = {} if self.image_size is None else {"image_size": self.image_size}
            return own | {f"classifier_{name}": value for name, value in common.items()}
        return common | {
            "num_channels": self.num_channels,
            "num_res_blocks": self.num_res_blocks,
            "channel_mult": _multiples(self.channel_mult),
            "class_cond": self.num_classes is not None,
            "learn_sigma": self.learn_sigma,
        }


def _sizes(sizes: Iterable[int]) -> str:
    return ",".join(map(str, sorted(set(sizes), reverse=True))) or "none"


def _multiples(channel_mult: Iterable[float]) -> str:
    return ",".join(f"{mult:g}" for mult in channel_mult)


def read_shapes(shapes: Mapping[str, Sequence[int]], depth: int | None = None) -> Architecture:
    """The architecture that a state dict's shapes say, by guided-diffusion's names.

    Resampling inside residual blocks leaves few classifiers' blocks to a resolution open: there `depth` decides. A
    UserError says what is missing, or that no U-Net and no classifier of theirs has such shapes.
    """

    def size(name: str, axis: int = 0) -> int:
        shape = shapes.get(name, ())
        if axis >= len(shape) or shape[axis] < 1:
            raise _another_architecture([name], [])
        return shape[axis]

    kind = "U-Net" if any(name.startswith("output_blocks.") for name in shapes) else "classifier"
    first = {f"{name}.weight" for name in ("time_embed.0", "input_blocks.0.0", "input_blocks.1.0.in_layers.2")}
    first |= {f"{name}.weight" for name in ("middle_block.0.in_layers.2", "out.0", *(["out.2"] if kind == "U-Net" else []))}
    if missing := first - set(shapes):
        theirs = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
        raise _another_architecture(missing, [name for name in shapes if not name.startswith(theirs)])

    total = 1 + max(int(name.split(".")[1]) for name in shapes if re.match(r"input_blocks\.\d+\.", name))
    widths = [size("input_blocks.0.0.weight")]  # of the stem, each block and each resampling
    for i in range(1, total):
        kept = f"input_blocks.{i}.0.op.weight"
        widths.append(size(kept if kept in shapes else f"input_blocks.{i}.0.in_layers.2.weight"))
    attended = [f"input_blocks.{i}.1.qkv.weight" in shapes for i in range(total)]

    convolved = [i for i in range(total) if f"input_blocks.{i}.0.op.weight" in shapes]
    raised = sorted(
        int(match[1])
        for name in shapes
        if (match := re.match(r"output_blocks\.(\d+)\.[12]\.(in_layers\.2|conv)\.weight", name)) is not None
    )
    if convolved:
        choices = [convolved[0] - 1]
    elif kind == "U-Net":
        choices = [raised[0] if raised else total - 1]
    else:
        choices = [blocks for blocks in range(1, total) if _fits(blocks, widths, attended)]
        choices = [depth] if len(choices) > 1 and depth in choices else choices
    if len(choices) > 1:
        found = " or ".join(map(str, choices))
        raise UserError(f"the weights leave open whether a resolution has {found} blocks: give classifier_depth in the flags")
    if not choices or choices[0] < 1 or total % (choices[0] + 1):
        raise UserError("the checkpoint is of another architecture: its input_blocks do not divide into resolutions")
    blocks = choices[0]
    starts = range(1, total, blocks + 1)

    base = size("time_embed.0.weight", 1)
    wide, embedded = size("input_blocks.1.0.in_layers.2.weight"), size("input_blocks.1.0.emb_layers.1.weight")
    common: dict[str, Any] = {
        "kind": kind,
        "num_channels": base,
        "num_res_blocks": blocks,
        "channel_mult": tuple(multiple(base, widths[i]) for i in starts),
        "attention": tuple(attended[i] for i in starts),
        "mid_attention": "middle_block.1.qkv.weight" in shapes,
        "resblock_updown": not convolved if len(starts) > 1 else None,
        "use_scale_shift_norm": embedded == 2 * wide,
    }
    seen = size("input_blocks.0.0.weight", 1)
    if kind == "classifier":
        return Architecture(**common, channels=seen, **_pool(shapes, size, len(starts)))
    made = size("out.2.weight")
    channels = {1: 1, 2: 1, 3: 3, 6: 3}.get(made)
    if channels is None or seen not in (channels, 2 * channels):
        raise UserError(
            f"the checkpoint is of another architecture: it sees {seen} channels and gives {made}; pictures have 3 channels or "
            "1, given once, or twice with learned variance, and seen twice by an upsampler"
        )
    return Architecture(
        **common,
        channels=channels,
        num_classes=size("label_emb.weight") if "label_emb.weight" in shapes else None,
        learn_sigma=made == 2 * channels,
        upsampler=seen == 2 * channels,
    )


def _fits(blocks: int, widths: list[int], attended: list[bool]) -> bool:
    """Whether so many blocks to a resolution are possible: widths change, and attention begins and ends, only with one, and
    what resamples changes no width and does not attend."""
    period = blocks + 1
    if len(widths) % period:
        return False
    for i in range(1, len(widths)):
        place = i % period  # 1 is the first block of a resolution, 0 what resamples
        if place != 1 and widths[i] != widths[i - 1]:
            return False
        if attended[i] if place == 0 else place > 1 and attended[i] != attended[i - 1]:
            return False
    return True


def multiple(base: int, width: int) -> float:
    """The multiple of base that is width when it is rounded down, as the config rounds it."""
    mult = width / base
    return mult if int(base * mult) == width else math.nextafter(mult, math.inf)


def _pool(shapes: Mapping[str, Sequence[int]], size: Callable[..., int], levels: int) -> dict[str, Any]:
    if len(shapes["out.0.weight"]) == 2:
        if "out.3.weight" in shapes:
            raise UserError("classifier_pool 'spatial_v2' is not supported; allowed: attention, adaptive, spatial")
        return {"pool": "spatial", "num_classes": size("out.2.weight")}
    if "out.2.positional_embedding" not in shapes:
        return {"pool": "adaptive", "num_classes": size("out.3.weight")}
    side = math.isqrt(size("out.2.positional_embedding", 1) - 1)
    return {"pool": "attention", "num_classes": size("out.2.c_proj.weight"), "image_size": side << (levels - 1)}


# ------------------------------------------------------------------------------------------------------ what the flags say

# The flags that say what the weights do not, with guided-diffusion's defaults; a classifier's blocks have no other choice.
HEADS = {"num_heads": 4, "num_heads_upsample": -1, "num_head_channels": -1, "use_new_attention_order": False, "dropout": 0.0}
DIFFUSION = {
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
    "use_kl": False,
    "sigma_small": False,
}
# Those that the weights say, too, and how they are written.
KINDS: dict[str, type] = {name: type(value) for name, value in (HEADS | DIFFUSION).items()} | {
    "image_size": int,
    "large_size": int,
    "small_size": int,
    "num_channels": int,
    "num_res_blocks": int,
    "attention_resolutions": str,
    "channel_mult": str,
    "class_cond": bool,
    "learn_sigma": bool,
    "use_scale_shift_norm": bool,
    "resblock_updown": bool,
    "classifier_width": int,
    "classifier_depth": int,
    "classifier_attention_resolutions": str,
    "classifier_use_scale_shift_norm": bool,
    "classifier_resblock_updown": bool,
    "classifier_pool": str,
}
# What a command has besides: it says how a network was trained or sampled, not what it is.
IGNORED = (
    *("use_checkpoint", "use_fp16", "classifier_use_fp16", "fp16_scale_growth", "timestep_respacing", "clip_denoised"),
    *("data_dir", "val_data_dir", "noised", "iterations", "schedule_sampler", "lr", "weight_decay", "lr_anneal_steps"),
    *("anneal_lr", "batch_size", "microbatch", "ema_rate", "log_interval", "eval_interval", "save_interval"),
    *("resume_checkpoint", "num_samples", "use_ddim", "model_path", "classifier_path", "classifier_scale"),
    *("base_name", "base_samples"),
)
WORDS = {word: on for words, on in (("yes true t y 1", True), ("no false f n 0", False)) for word in words.split()}
DEFAULT_MULT = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4", 32: "1,2,2,2"}
WHERE = "the MODEL_FLAGS and DIFFUSION_FLAGS of the command that trained the checkpoint, as JSON: --flags FILE"


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",") if part.strip()]
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError
    except ValueError:
        raise UserError(f"flags: {name} is {text!r}; write numbers above 0, parted by commas") from None
    return numbers


def _typed(name: str, value: Any) -> Any:
    kind = KINDS[name]
    if kind is str:
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return text.replace(" ", "")
    try:
        if kind is bool:
            return WORDS[str(value).lower()]
        number = float(value) if not isinstance(value, bool) else math.nan
        if kind is int and number != int(number):
            raise ValueError
        return kind(number)
    except (ValueError, KeyError, TypeError, OverflowError):
        wanted = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"flags: {name} is {value!r}; write {wanted}") from None


def read_flags(flags: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """guided-diffusion's flags, a dict or a JSON file of them (or of {"flags": them}), values as on its command line or in
    JSON, as a dict with typed values. A UserError names the flag that is unknown, with the likely word, or not of its type."""
    found = flags if isinstance(flags, Mapping) else read_json(flags)
    if isinstance(found, Mapping):
        found = found.get("flags", found)
    if not isinstance(found, Mapping):
        raise UserError(f"{flags}: flags are a JSON object, {{...}}")
    read = {}
    for name, value in found.items():
        if name not in KINDS and name not in IGNORED:
            close = difflib.get_close_matches(str(name), [*KINDS, *IGNORED], 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(KINDS)}"
            raise UserError(f"flags: {name!r} is no flag of guided-diffusion{hint}")
        if name in KINDS and value is not None:
            read[name] = _typed(name, value)
    for name in ("image_size", "large_size", "small_size", "diffusion_steps"):
        if read.get(name, 1) < 1:
            raise UserError(f"flags: {name} is {read[name]}; it must be at least 1")
    return read


def _default_mult(flags: Mapping[str, Any]) -> str | None:
    size = flags.get("large_size", flags.get("image_size"))
    return DEFAULT_MULT.get(256 if size == 512 and "large_size" in flags else size)


def _check(found: Architecture, flags: Mapping[str, Any], size: int) -> None:
    """A UserError where flags contradict the shapes."""
    halvings = len(found.channel_mult) - 1
    if size % 2**halvings:
        raise UserError(f"the pictures have {size} px in the flags, and the weights halve them {halvings} times")
    told = {**flags, "channel_mult": flags.get("channel_mult") or _default_mult(flags)}
    for name, seen in found.flags(size).items():
        said, where = told.get(name), ""
        if said is None:
            continue
        if name.endswith("attention_resolutions"):
            factors = {size // resolution for resolution in _numbers(name, said, int)}
            said = _sizes(size >> level for level in range(halvings + 1) if 2**level in factors)
            where = f", pictures of {size} px,"
        if name == "channel_mult":
            said = _multiples(_numbers(name, said, float))
            where = f", pictures of {size} px,"
        if said != seen:
            given = f"in the flags{where}" if flags.get(name) is not None else f"by default for {size} px, which the flags say,"
            raise UserError(f"{name} is {told[name]} {given} and {seen} in the weights")
    if flags.get("num_heads_upsample", -1) not in (-1, flags.get("num_heads", HEADS["num_heads"])):
        raise UserError("num_heads_upsample other than num_heads is not supported")


def process_config(flags: Mapping[str, Any]) -> ProcessConfig:
    """guided-diffusion's flags as the config of our process."""
    flags = {**DIFFUSION, "learn_sigma": False, **read_flags(flags)}
    steps, name = flags["diffusion_steps"], flags["noise_schedule"]
    schedules = {"cosine": {"kind": "cosine"}, "linear": {"kind": "linear", "rescale_betas": True}}
    if name not in schedules:
        raise UserError(f"noise_schedule {name!r} is not known; allowed: linear, cosine")
    loss: dict[str, Any] = {"kind": "rescaled_kl" if flags["use_kl"] else "simple"}
    if flags["learn_sigma"] and not flags["use_kl"]:
        loss = {"kind": "hybrid", "variational_weight": steps / 1000 if flags["rescale_learned_sigmas"] else 1.0}
    spec = {
        "schedule": {**schedules[name], "steps": steps},
        "target": "x0" if flags["predict_xstart"] else "eps",
        "variance": "learned" if flags["learn_sigma"] else "small" if flags["sigma_small"] else "large",
        "clip": True,
        "loss": loss,
        "time_input": {"scale": 1000 / steps if flags["rescale_timesteps"] else 1.0},
    }
    return validate(ProcessConfig, spec, origin="flags")


def process_from_flags(flags: Mapping[str, Any]) -> Process:
    """guided-diffusion's flags as our process."""
    return build_process(process_config(flags))


def model_config(found: Architecture, flags: Mapping[str, Any]) -> UNetConfig | ClassifierConfig:
    """Our architecture: what the shapes say, and the heads and the dropout of the flags."""
    flags = {**HEADS, **flags}
    spec: dict[str, Any] = {
        "base_channels": found.num_channels,
        "channel_mult": found.channel_mult,
        "blocks": found.num_res_blocks,
        "attention": ["full" if on else "none" for on in found.attention],
        "mid_attention": "full" if found.mid_attention else "none",
        "embedding": "scale_shift" if found.use_scale_shift_norm else "add",
        "downsample": "residual" if found.resblock_updown else "conv",
        "dropout": flags["dropout"],
    }
    if found.kind == "classifier":
        spec |= {"pool": found.pool, "head_channels": 64, "split_qkv_first": False}
        return validate(ClassifierConfig, spec, origin="flags")
    by_channels = flags["num_head_channels"] != -1
    spec["upsample"] = spec["downsample"]
    spec["head_channels" if by_channels else "num_heads"] = flags["num_head_channels" if by_channels else "num_heads"]
    spec["split_qkv_first"] = flags["use_new_attention_order"]
    return validate(UNetConfig, spec, origin="flags")


# ------------------------------------------------------------------------------------------------------ the published files

GUIDED = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "diffusion_steps": 1000,
    "learn_sigma": True,
    "noise_schedule": "linear",
    "num_channels": 256,
    "num_res_blocks": 2,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
GUIDED_CLASSIFIER = {
    "classifier_attention_resolutions": "32,16,8",
    "classifier_depth": 2,
    "classifier_pool": "attention",
    "classifier_resblock_updown": True,
    "classifier_use_scale_shift_norm": True,
    "classifier_width": 128,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
}
IMPROVED = {
    "attention_resolutions": "16,8",
    "class_cond": False,
    "diffusion_steps": 4000,
    "learn_sigma": True,
    "noise_schedule": "cosine",
    "num_channels": 128,
    "num_heads": 4,
    "num_res_blocks": 3,
    "rescale_learned_sigmas": True,
    "rescale_timesteps": True,
    "resblock_updown": False,
    "use_scale_shift_norm": True,
}
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


def published(found: Architecture) -> tuple[str, dict[str, Any]] | None:
    """The name and the flags of the published file of this architecture, None where there is none."""
    for name, flags in PUBLISHED.items():
        kind = "classifier" if "classifier_width" in flags else "U-Net"
        classes = CLASSES if kind == "classifier" or flags["class_cond"] else None
        if (found.kind, found.channels, found.mid_attention, found.num_classes) != (kind, 3, True, classes):
            continue
        if found.upsampler != ("large_size" in flags):
            continue
        seen = found.flags(flags["large_size"] if found.upsampler else flags["image_size"])
        if seen == {key: flags.get(key, _default_mult(flags)) for key in seen}:
            return name, flags
    return None


# ------------------------------------------------------------------------------------------------------ reading a checkpoint


def read_weights(path: str | Path, which: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of the network in another project's file, and in words what was taken and what was left out; see
    `find_network`. A name of guided-diffusion's files that says that an average is beside it is said, too."""
    state, told = find_network(read_file(path), networks.GUIDED, path, which=which)
    if any(".transformer_blocks." in name for name in state):
        raise UserError(
            f"{path}: the network is a U-Net of latent-diffusion, whose attention reads a text; what can be read is one of "
            "guided- or improved-diffusion, with labels or without"
        )
    raw = re.fullmatch(r"model(\d+)\.pt", Path(path).name)
    averages = sorted(other.name for other in Path(path).parent.glob(f"ema_*_{raw[1]}.pt")) if raw is not None else []
    if averages:
        told.append(f"these are raw weights; an average (EMA) is beside them: {few(averages)}")
    return state, told


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict of the network in another project's file, read without running anything in it."""
    return read_weights(path)[0]


def _size(found: Architecture, flags: Mapping[str, Any]) -> int:
    """The size of the pictures; a UserError where only flags say it and they do not, or say it of another kind of network."""
    if found.upsampler:
        if missing := [name for name in ("large_size", "small_size") if name not in flags]:
            raise UserError(f"the weights are an upsampler's and do not say {' and '.join(missing)}: give {WHERE}")
        return flags["large_size"]
    if "large_size" in flags or "small_size" in flags:
        raise UserError("large_size and small_size are in the flags, and the weights are not an upsampler's")
    size = flags.get("image_size", found.image_size)
    if size is None:
        raise UserError(f"the weights do not say image_size: give {WHERE}")
    return size


def _listed(flags: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in flags.items())


def _resolve(found: Architecture, flags: Mapping[str, Any] | None) -> tuple[int, dict[str, Any], tuple[str, ...]]:
    """The size of the pictures, the flags that say what the weights do not, and where each fact comes from."""
    defaults = DIFFUSION if found.kind == "classifier" else HEADS | DIFFUSION
    sizes = ("large_size", "small_size") if found.upsampler else ("image_size",) if found.image_size is None else ()
    source = "from the flags"
    if flags is None:
        if (known := published(found)) is None:
            raise UserError(
                f"this is no published architecture, and the weights do not say {', '.join([*sizes, *defaults])}: give {WHERE}"
            )
        name, flags = known
        source = f"from the published {name}, whose architecture this is (another run of it needs its own flags)"
    size = _size(found, flags)
    _check(found, flags, size)
    if flags.get("diffusion_steps", 1000) != 1000 and "rescale_timesteps" not in flags:
        raise UserError(
            f"the flags say diffusion_steps {flags['diffusion_steps']} and not rescale_timesteps, whose default is true in "
            f"improved-diffusion and false in guided-diffusion: give {WHERE}"
        )
    given = {name: flags[name] for name in (*sizes, *defaults) if name in flags}
    assumed = {name: value for name, value in defaults.items() if name not in given}
    seen = found.flags(size) | {"picture channels": found.channels, "classes": found.num_classes or "none"}
    lines = {"from the weights": seen, source: given, "guided-diffusion's defaults": assumed}
    told = tuple(f"{origin}: {_listed(facts)}" for origin, facts in lines.items() if facts)
    return size, assumed | given | {"learn_sigma": found.learn_sigma}, told


def _build(found: Architecture, model: UNetConfig | ClassifierConfig, image_size: int) -> UNet | Classifier:
    """The network on the meta device, its weights still to be loaded."""
    with torch.device("meta"):
        if isinstance(model, ClassifierConfig):
            return Classifier(model, in_channels=found.channels, image_size=image_size, num_classes=found.num_classes or 0)
        return UNet(
            model,
            in_channels=found.channels,
            out_channels=found.channels * (2 if found.learn_sigma else 1),
            num_classes=found.num_classes,
            null_class=False,
            low_channels=found.channels if found.upsampler else 0,
        )


def _read(
    path: str | Path, flags: Mapping[str, Any] | str | Path | None, wanted: str | None, which: str | None = None
) -> Imported:
    given = None if flags is None else read_flags(flags)
    state, taken = read_weights(path, which)
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        found = read_shapes(shapes, (given or {}).get("classifier_depth"))
        if wanted not in (None, found.kind):
            raise UserError(f"these are the weights of a {found.kind}, and those of a {wanted} are asked for")
        size, facts, told = _resolve(found, given)
        model = model_config(found, facts)
        network = _build(found, model, size)
        network.load_state_dict(rename(network, state, module_names(model)), assign=True)
        process = process_config(facts)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Imported(
        network=network.eval(),
        model=model,
        process=process,
        image_size=size,
        channels=found.channels,
        num_classes=found.num_classes,
        low_resolution=facts.get("small_size"),
        told=told,
        taken=tuple(taken),
    )


def read(path: str | Path, flags: Mapping[str, Any] | str | Path | None = None, *, which: str | None = None) -> Imported:
    """A guided- or improved-diffusion checkpoint, U-Net or classifier, with all that sampling needs.

    `flags` are guided-diffusion's own, or a JSON file of them; a published file needs none. `which` chooses one of several
    networks in the file, as `find_network` says. A UserError says what is missing, what contradicts the weights, or why the
    file is no such checkpoint.
    """
    return _read(path, flags, None, which)


def load(path: str | Path, flags: Mapping[str, Any] | str | Path | None = None) -> tuple[UNet, Process]:
    """A U-Net's checkpoint as (network, process); see `read`."""
    found = _read(path, flags, "U-Net")
    assert isinstance(found.network, UNet)
    return found.network, build_process(found.process)


def load_classifier(path: str | Path, flags: Mapping[str, Any] | str | Path | None = None) -> Classifier:
    """A classifier's checkpoint; see `read`."""
    found = _read(path, flags, "classifier")
    assert isinstance(found.network, Classifier)
    return found.network
