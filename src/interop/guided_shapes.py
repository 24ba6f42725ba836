"""guided-diffusion's U-Nets and classifiers: what the shapes of their weights say."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..config import UserError
from ..storage.networks import list_differences
from .names import ANOTHER, multiple, size_of


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a checkpoint say. `model` holds options of our config, the largest resolution first; `image_size` is
    None where the shapes do not say it."""

    kind: Literal["U-Net", "classifier"]
    model: dict[str, Any]
    channels: int
    num_classes: int | None
    learn_sigma: bool = False
    upsampler: bool = False
    image_size: int | None = None

    def flags(self, image_size: int) -> dict[str, Any]:
        """The same as guided-diffusion's flags for images of this size."""
        model, scale_shift = self.model, self.model["embedding"] == "scale_shift"
        attended = join_sizes(image_size >> level for level, kind in enumerate(model["attention"]) if kind == "full")
        common = {"use_scale_shift_norm": scale_shift, "attention_resolutions": attended}
        if len(model["channel_mult"]) > 1:  # a single resolution is not resampled
            common["resblock_updown"] = model["downsample"] == "residual"
        if self.kind == "classifier":
            common |= {"width": model["base_channels"], "depth": model["blocks"], "pool": model["pool"]}
            size = {} if self.image_size is None else {"image_size": self.image_size}
            return size | {f"classifier_{name}": value for name, value in common.items()}
        return common | {
            "num_channels": model["base_channels"],
            "num_res_blocks": model["blocks"],
            "channel_mult": join_multiples(model["channel_mult"]),
            "class_cond": self.num_classes is not None,
            "learn_sigma": self.learn_sigma,
        }


def join_sizes(sizes: Iterable[int]) -> str:
    """Sizes in one form, the largest first."""
    return ",".join(map(str, sorted(set(sizes), reverse=True))) or "none"


def join_multiples(channel_mult: Iterable[float]) -> str:
    """Multiples of the channels in one form."""
    return ",".join(f"{mult:g}" for mult in channel_mult)


def read_shapes(shapes: Mapping[str, Sequence[int]], depth: int | None = None) -> Architecture:
    """The architecture that the shapes of a state dict say, by guided-diffusion's names. For some classifiers that resample
    inside residual blocks, shapes leave open how many blocks a resolution has: there `depth` decides. A UserError says what is
    missing, or that no U-Net and no classifier of theirs has such shapes."""
    size = functools.partial(size_of, shapes)
    kind = "U-Net" if any(name.startswith("output_blocks.") for name in shapes) else "classifier"
    modules = ("time_embed.0", "input_blocks.0.0", "input_blocks.1.0.in_layers.2", "middle_block.0.in_layers.2", "out.0")
    needed = {f"{name}.weight" for name in (*modules, *(["out.2"] if kind == "U-Net" else []))}
    if missing := needed - set(shapes):
        theirs = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.", "output_blocks.", "out.")
        unknown = [name for name in shapes if not name.startswith(theirs)]
        raise UserError(f"{ANOTHER}: {'; '.join(list_differences(missing, unknown))}")

    # of the stem, each block and each resampling: its width, whether it attends, and whether it is a bare convolution
    total = 1 + max(int(name.split(".")[1]) for name in shapes if re.match(r"input_blocks\.\d+\.", name))
    convolutions = [i for i in range(1, total) if f"input_blocks.{i}.0.op.weight" in shapes]
    layers = (f"input_blocks.{i}.0.{'op' if i in convolutions else 'in_layers.2'}.weight" for i in range(1, total))
    widths = [size("input_blocks.0.0.weight"), *map(size, layers)]
    attended = [f"input_blocks.{i}.1.qkv.weight" in shapes for i in range(total)]

    if convolutions:
        choices = [convolutions[0] - 1]
    elif kind == "U-Net":
        upsampling = re.compile(r"output_blocks\.(\d+)\.[12]\.(in_layers\.2|conv)\.weight")
        choices = [min((int(match[1]) for name in shapes if (match := upsampling.match(name))), default=total - 1)]
    else:
        choices = [blocks for blocks in range(1, total) if _is_possible(blocks, widths, attended)]
        choices = [depth] if len(choices) > 1 and depth in choices else choices
    if len(choices) > 1:
        numbers = " or ".join(map(str, choices))
        raise UserError(f"the weights leave open whether a resolution has {numbers} blocks: give classifier_depth in the flags")
    if not choices or choices[0] < 1 or total % (choices[0] + 1):
        raise UserError(f"{ANOTHER}: its input_blocks do not divide into resolutions")
    starts, base = range(1, total, choices[0] + 1), size("time_embed.0.weight", 1)
    is_scale_shift = size("input_blocks.1.0.emb_layers.1.weight") == 2 * size("input_blocks.1.0.in_layers.2.weight")
    model: dict[str, Any] = {
        "base_channels": base,
        "channel_mult": [multiple(base, widths[i]) for i in starts],
        "blocks": choices[0],
        "attention": ["full" if attended[i] else "none" for i in starts],
        "mid_attention": "full" if "middle_block.1.qkv.weight" in shapes else "none",
        "embedding": "scale_shift" if is_scale_shift else "add",
        "downsample": "residual" if len(starts) > 1 and not convolutions else "conv",
    }
    inputs = size("input_blocks.0.0.weight", 1)
    if kind == "classifier":
        pool, classes, image_size = _read_pool(shapes, size, len(starts))
        return Architecture(kind, {**model, "pool": pool}, channels=inputs, num_classes=classes, image_size=image_size)
    outputs = size("out.2.weight")
    channels = {1: 1, 2: 1, 3: 3, 6: 3}.get(outputs)
    if channels is None or inputs not in (channels, 2 * channels):
        raise UserError(
            f"{ANOTHER}: it sees {inputs} channels and gives {outputs}; images have 3 channels or 1, which a network gives "
            "once, or twice with learned variance, and an upsampler sees twice"
        )
    return Architecture(
        kind,
        model,
        channels=channels,
        num_classes=size("label_emb.weight") if "label_emb.weight" in shapes else None,
        learn_sigma=outputs == 2 * channels,
        upsampler=inputs == 2 * channels,
    )


def _read_pool(shapes: Mapping[str, Sequence[int]], size: Callable[..., int], levels: int) -> tuple[str, int, int | None]:
    """The pool of a classifier, the number of its classes, and the image size where the shapes say it."""
    if len(shapes["out.0.weight"]) == 2:
        if "out.3.weight" in shapes:
            raise UserError("classifier_pool 'spatial_v2' is not supported; allowed: attention, adaptive, spatial")
        return "spatial", size("out.2.weight"), None
    if "out.2.positional_embedding" not in shapes:
        return "adaptive", size("out.3.weight"), None
    side = math.isqrt(size("out.2.positional_embedding", 1) - 1)
    return "attention", size("out.2.c_proj.weight"), side << (levels - 1)


def _is_possible(blocks: int, widths: list[int], attended: list[bool]) -> bool:
    """Whether each resolution may have so many blocks: the width changes, and attention begins and ends, only where a
    resolution begins, and the block that resamples changes no width and does not attend."""
    groups = [slice(start, start + blocks + 1) for start in range(1, len(widths), blocks + 1)]
    return len(widths) % (blocks + 1) == 0 and all(
        len({*widths[group]}) == 1 and len({*attended[group][:blocks]}) == 1 and not any(attended[group][blocks:])
        for group in groups
    )
