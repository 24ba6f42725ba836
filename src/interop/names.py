"""State dicts of other projects under our parameter names, and ours under theirs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import UserError
from ..models.layers import Attention
from ..runs.diffusers_autoencoder import fit_state

ANOTHER = "the checkpoint is of another architecture"


def multiple(base: int, width: int) -> float:
    """The number m for which int(base * m) is `width`, as our configs round it."""
    mult = width / base
    return mult if int(base * mult) == width else math.nextafter(mult, math.inf)


def size_of(shapes: Mapping[str, Sequence[int]], name: str, axis: int = 0) -> int:
    """The length along an axis of the tensor `name`; a UserError where a state dict of these shapes does not have it."""
    shape = shapes.get(name, ())
    if axis >= len(shape) or shape[axis] < 1:
        raise UserError(f"{ANOTHER}: it lacks {name}")
    return shape[axis]


def list_origins(origins: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each origin of facts that has any: it says them."""

    def in_words(value: Any) -> str:
        if isinstance(value, list):
            return "/".join(map(str, value))
        return str(value) if value is not None else "none"

    return [
        f"{origin}: {', '.join(f'{name} {in_words(value)}' for name, value in facts.items())}"
        for origin, facts in origins.items()
        if facts
    ]


def rename_state(network: nn.Module, state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Another project's state dict under the names of `network`, in float32, reshaped where only 1s differ. `names` maps our
    module names to theirs. A UserError says which keys or shapes differ."""
    wanted, keys = network.state_dict(), dict[str, str]()
    for key in wanted:
        module, _, kind = key.rpartition(".")
        keys[key] = f"{names.get(module, '?')}.{kind}"
    fitted = fit_state(state_dict, {theirs: wanted[key] for key, theirs in keys.items()}, ANOTHER)
    return {key: fitted[theirs].float() for key, theirs in keys.items()}


def state_under(names: Mapping[str, str], network: nn.Module) -> dict[str, Tensor]:
    """The weights of our network under diffusers' names, float32 on the CPU. `names` maps our module names to theirs. The qkv
    of an attention becomes to_q, to_k and to_v, whose rows have one layout."""
    state_dict = {}
    attentions = {f"{name}.qkv": module for name, module in network.named_modules() if isinstance(module, Attention)}
    for key, value in network.state_dict().items():
        module, _, kind = key.rpartition(".")
        if module == "augmentation":  # at sampling time it is told zeros, and adds nothing
            continue
        value = value.detach().to("cpu", torch.float32)
        if module in attentions:
            layer, place = attentions[module], names[module].removesuffix("qkv")
            parts = rearrange(value, f"{layer.layout} ... -> three (heads d) ...", three=3, heads=layer.heads)
            state_dict |= {f"{place}to_{name}.{kind}": part.contiguous() for name, part in zip("qkv", parts, strict=True)}
        else:
            state_dict[f"{names[module]}.{kind}"] = value.contiguous()
    return state_dict
