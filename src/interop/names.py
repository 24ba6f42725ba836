"""State dicts of other projects under our parameter names, and ours under theirs."""

import math
from collections.abc import Iterable, Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import UserError
from ..models.layers import Attention


def multiple(base: int, width: int) -> float:
    """The number m for which int(base * m) is `width`, as our configs round it."""
    mult = width / base
    return mult if int(base * mult) == width else math.nextafter(mult, math.inf)


def another_architecture(missing: Iterable[str], unknown: Iterable[str]) -> UserError:
    """The error that names the first five keys that the checkpoint lacks, and the first five that it has in excess."""
    faults = (("lacks", sorted(missing)), ("has in excess", sorted(unknown)))
    parts = [f"{verb} {', '.join(keys[:5])}" for verb, keys in faults if keys]
    return UserError(f"the checkpoint is of another architecture: it {' and '.join(parts)}")


def rename_state(network: nn.Module, state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Another project's state dict under the names of `network`, in float32, reshaped where only 1s differ.

    `names` maps our module names to theirs. A UserError says which keys or shapes differ.
    """
    wanted, keys = network.state_dict(), dict[str, str]()
    for key in wanted:
        module, _, kind = key.rpartition(".")
        keys[key] = f"{names.get(module, '?')}.{kind}"
    missing, unknown = set(keys.values()) - set(state_dict), set(state_dict) - set(keys.values())
    if missing or unknown:
        raise another_architecture(missing, unknown)
    renamed = {}
    for key, theirs in keys.items():
        tensor, shape = state_dict[theirs], wanted[key].shape
        if [n for n in tensor.shape if n != 1] != [n for n in shape if n != 1]:
            raise UserError(
                f"the checkpoint is of another architecture: {theirs} is {tuple(tensor.shape)}, this network wants "
                f"{tuple(shape)}"
            )
        renamed[key] = tensor.reshape(shape).float()
    return renamed


def state_under(names: Mapping[str, str], network: nn.Module) -> dict[str, Tensor]:
    """The weights of our network under diffusers' names, float32 on the CPU.

    `names` maps our module names to theirs. The qkv of an attention becomes to_q, to_k and to_v, whose rows have one layout.
    """
    state_dict = {}
    attentions = {f"{name}.qkv": module for name, module in network.named_modules() if isinstance(module, Attention)}
    for key, value in network.state_dict().items():
        module, _, kind = key.rpartition(".")
        value = value.detach().to("cpu", torch.float32)
        if module in attentions:
            layer, place = attentions[module], names[module].removesuffix("qkv")
            parts = rearrange(value, f"{layer.layout} ... -> three (heads d) ...", three=3, heads=layer.heads)
            state_dict |= {f"{place}to_{name}.{kind}": part.contiguous() for name, part in zip("qkv", parts, strict=True)}
        else:
            state_dict[f"{names[module]}.{kind}"] = value.contiguous()
    return state_dict
