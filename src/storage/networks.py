"""The network inside a file of another program.

A training script saves more than a network: averages of it (EMA), the optimizer, wrappers' prefixes (`module.`, `_orig_mod.`),
an autoencoder beside it. Every converter finds its network here, and says in words what it took and what it left out.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import UserError
from .finite import check_finite


class Kind(NamedTuple):
    """A kind of network: what it is called, and the names of parameters by which it is known, `every` one of them or any."""

    words: str
    signs: tuple[str, ...]
    every: bool = True


GUIDED = Kind(
    "guided- or improved-diffusion (U-Net or classifier)",
    ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.2.weight"),
    every=False,
)
UNET_2D = Kind("diffusers' UNet2DModel", ("time_embedding.linear_1.weight", "conv_in.weight"))
KL = Kind(
    "diffusers' AutoencoderKL",
    ("encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.conv_norm_out.weight", "decoder.conv_norm_out.weight"),
    every=False,
)
TINY = Kind("diffusers' AutoencoderTiny", ("encoder.layers.0.weight", "decoder.layers.0.weight"))
DC = Kind("diffusers' AutoencoderDC", ("encoder.conv_out.weight", "decoder.conv_in.weight"))
VQ = Kind("diffusers' VQModel", (*KL.signs, "quantize.embedding.weight"), every=False)
OTHERS = (
    Kind("denoising-diffusion-pytorch (its own U-Net)", ("init_conv.weight", "time_mlp.1.weight")),
    Kind("this project", ("stem.weight", "time_in.weight")),
    TINY,
    Kind("CompVis's latent-diffusion (autoencoder)", ("encoder.down.0.block.0.conv1.weight",)),
    Kind("k-diffusion (its own network)", ("timestep_embed.weight", "mapping.in_proj.weight"), every=False),
    Kind("EDM", ("map_layer0.weight", "map_layer1.weight")),
    Kind("DiT", ("x_embedder.proj.weight", "t_embedder.mlp.0.weight")),
    Kind("a transformer of diffusers", ("transformer_blocks.0.attn1.to_q.weight",)),
    Kind("score_sde", ("all_modules.0.weight", "all_modules.1.weight"), every=False),
)
AVERAGE = re.compile(
    r"(?<![A-Za-z])(ema|swa|avg|polyak|shadow)(?![A-Za-z])|modelema|netema|EMA|Ema(?![a-z])|averaged?(?![a-z])|shadow_params"
)
RAW = re.compile(r"(?i)(?<![a-z])(non?|without)[_-]?ema")
READERS = {GUIDED.words: "guided-diffusion FILE", UNET_2D.words: "iadb FILE, or diffusers FOLDER"}
UNKNOWN = "its keys are"
OPTIMIZER = re.compile(r"(^|\.)state\.[^.]+\.|exp_avg|momentum_buffer|(^|\.)optim")
LORA = re.compile(r"lora_(A|B|up|down)|(^|\.)lora\.(up|down)\.|^lora_unet_|hada_w1|lokr_w1")
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # inside a network's names
BESIDE = ("online_model", "current_model_state")  # raw weights that an average of ema_pytorch, of Lightning, keeps beside it


def few(names: Iterable[str], most: int = 3) -> str:
    """The first few of these names, and how many there are besides."""
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def flatten(content: Mapping[Any, Any], prefix: str = "", depth: int = 4) -> dict[str, Tensor]:
    """The tensors of dictionaries in dictionaries, and of lists of tensors in them, by their keys joined with dots."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value.detach()
        elif isinstance(value, Mapping) and depth:
            tensors |= flatten(value, f"{prefix}{key}.", depth - 1)
        elif isinstance(value, list | tuple) and value and all(isinstance(entry, Tensor) for entry in value):
            tensors |= {f"{prefix}{key}.{i}": entry.detach() for i, entry in enumerate(value)}
    return tensors


def preference(prefix: str) -> int:
    """2 for an average of weights, 1 for the weights themselves, 0 for those that a program keeps beside an average."""
    parts = prefix.split(".")
    if any(part in BESIDE for part in parts):
        return 0
    return 2 if any(AVERAGE.search(part) and not RAW.search(part) for part in parts) else 1


def _prefixes(tensors: Iterable[str], kind: Kind) -> list[str]:
    """The prefixes of the networks of this kind, the preferred ones first."""
    names = set(tensors)
    prefixes = {name.removesuffix(sign) for sign in kind.signs for name in names if name == sign or name.endswith(f".{sign}")}
    whole = [prefix for prefix in prefixes if not kind.every or all(f"{prefix}{sign}" in names for sign in kind.signs)]
    return sorted(whole, key=lambda prefix: (-preference(prefix), prefix))


def _list_prefixes(tensors: Iterable[str]) -> tuple[str, ...]:
    """The prefixes of averages of weights that are saved as lists."""
    return tuple(sorted(name.removesuffix("0") for name in tensors if name.endswith(".0") and preference(name) == 2))


def _name_averages(tensors: dict[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """The same tensors, averages among them with whole names: CompVis's LitEma leaves out the dots, score_sde saves a list."""
    named = dict(tensors)
    lists = _list_prefixes(tensors)
    for prefix in _prefixes(tensors, kind):
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix) and not name.startswith(lists)]
        parts = prefix.rstrip(".").split(".") if prefix else []
        for i in range(len(parts) + 1):
            head, rest = parts[:i], "".join(f"{part}." for part in parts[i:])
            root = ".".join([*head[:-1], f"{head[-1]}_ema"]) if head else "model_ema"
            without_dots = {name: f"{root}.{(rest + name).replace('.', '')}" for name in names}
            if names and all(key in named for key in without_dots.values()):
                named |= {f"{root}.{rest}{name}": named.pop(key) for name, key in without_dots.items()}
        for place in lists:
            values = [tensors[f"{place}{i}"] for i in range(sum(name.startswith(place) for name in tensors))]
            if [value.shape for value in values] == [tensors[f"{prefix}{name}"].shape for name in names]:
                named = {name: value for name, value in named.items() if not name.startswith(place)}
                named |= {f"{place}{name}": value for name, value in zip(names, values, strict=True)}
    return named


def _unnamed_average(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> str | None:
    """The place of an average of the network that is a list in another order, so that its tensors have no names; or None."""
    lists = _list_prefixes(tensors)

    def shapes(prefix: str) -> list[tuple[int, ...]]:
        names = [name for name in tensors if name.startswith(prefix) and (prefix in lists or not name.startswith(lists))]
        return sorted(tuple(tensors[name].shape) for name in names)

    if any(preference(prefix) == 2 for prefix in prefixes):
        return None
    return next((place[:-1] for place in lists if shapes(place) in [shapes(prefix) for prefix in prefixes]), None)


def _describe(content: Any, tensors: Mapping[str, Tensor]) -> str:
    keys = set(content) if isinstance(content, Mapping) else set[str]()
    kinds = [kind.words for kind in (GUIDED, UNET_2D, KL, *OTHERS) if _prefixes(tensors, kind)]
    hint = f", which is read by: python convert.py {READERS[kinds[0]]}" if kinds and kinds[0] in READERS else ""
    descriptions = (  # the first that is true
        (
            {"weights", "config", "data", "step"} <= keys,
            "it is an export of this project, which sample.py and the other scripts open as it is",
        ),
        (
            {"state", "param_groups"} <= keys or (tensors and all(OPTIMIZER.search(name) for name in tensors)),
            "it holds the state of an optimizer, and no weights; give the file with the weights, which is often beside it",
        ),
        (
            any(LORA.search(name) for name in tensors),
            "it holds a LoRA, which only adds to the weights of a network of its own kind; merge it into that network, and "
            "give what was saved then",
        ),
        (kinds, f"it holds a network of {' and one of '.join(kinds)}{hint}"),
        (True, f"{UNKNOWN} {few(tensors)}"),
    )
    return next(words for is_true, words in descriptions if is_true)


def _choose(prefixes: list[str], tensors: Mapping[str, Tensor], which: str | None, path: str | Path) -> str:
    """The prefix of the network to take: an average before raw weights, or the one that `which` names."""
    names = {prefix: prefix or "bare" for prefix in prefixes}
    ranked, listed = prefixes, " and ".join(names.values())
    if which in ("ema", "raw"):
        ranked = [prefix for prefix in prefixes if (preference(prefix) == 2) == (which == "ema")]
        there = "no average (EMA) of weights" if which == "ema" else "nothing but averages (EMA) of weights"
        mistake = f"in it there is {there}; it holds {listed}"
    else:
        mistake = f"the networks in it are {listed}; allowed: those, ema, raw"
        if which is not None:
            ranked = [prefix for prefix, name in names.items() if which.rstrip(".") == name.rstrip(".")]
    if not ranked:
        raise UserError(f"{path}: --which {which}: {mistake}")
    best, *others = [prefix for prefix in ranked if preference(prefix) == preference(ranked[0])]
    network = _below(tensors, best)
    different = [best]
    for other in others:
        same = _below(tensors, other)
        if network.keys() != same.keys() or not all(torch.equal(network[name], same[name]) for name in same):
            different.append(other)
    if len(different) > 1:
        count = {2: "two", 3: "three"}.get(len(different), str(len(different)))
        listed = " and ".join(names[prefix] for prefix in different)
        raise UserError(
            f"{path}: {count} networks are in it, {listed}; save the one to import by itself, or choose it: "
            f"--which {names[different[-1]].rstrip('.')}"
        )
    return best


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def find_network(
    content: Any, kind: Kind, path: str | Path, *, which: str | None = None, parts: Sequence[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of the one network of this `kind` in the `content` of the file `path`; and lines that say what was taken
    and what was left out.

    The network may have any prefix and anything around it. An average of the weights (EMA) is preferred; `which` chooses
    otherwise: `ema`, `raw`, or a prefix. Only names that begin with one of `parts` are taken, by default all. A UserError says
    that the file has no such network and what it has, or that there are several, or that its weights are not finite.
    """
    if isinstance(content, list | tuple) and any(isinstance(entry, Mapping) for entry in content):
        content = {str(i): entry for i, entry in enumerate(content)}  # some programs save network, optimizer and average so
    tensors = flatten(content) if isinstance(content, Mapping) else {}
    if not isinstance(content, Mapping) or not tensors or {"state", "param_groups"} <= set(content):
        why = _describe(content, tensors) if tensors else "neither tensors by name nor a state_dict of them"
        raise UserError(f"{path}: no state dict: {why}; a state dict of tensors is what can be read")
    nested = tuple(f"{key}." for key, value in content.items() if not isinstance(value, Tensor))
    tensors = _name_averages({name.removeprefix("state_dict."): tensor for name, tensor in tensors.items()}, kind)
    prefixes = _prefixes(tensors, kind)
    if prefixes and which is None and (unnamed := _unnamed_average(tensors, prefixes)) is not None:
        raise UserError(
            f"{path}: an average (EMA) is in it under {unnamed}, whose tensors have no names and another order than those of "
            "the network, so it cannot be taken; have its author save it by name, or take the raw weights: --which raw"
        )
    if not prefixes:
        tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
        prefixes = _prefixes(tensors, kind)
    if not prefixes and not (kind.every or nested) and _describe(content, tensors).startswith(UNKNOWN):
        prefixes = [""]  # a plain state dict of an unknown network: the caller says which keys differ
    if not prefixes:
        keys = kind.signs[0] if kind.every else " or ".join(kind.signs)
        raise UserError(f"{path}: no network of {kind.words} is in it: no key ends in {keys}; {_describe(content, tensors)}")
    prefix = _choose(prefixes, tensors, which, path)
    # Of a state dict without a prefix what lies beside it was put into it by the program, and is not of the network.
    beside = tuple(key for key in nested if not prefix and key != "state_dict.") or ("\0",)
    network = {name: tensor for name, tensor in _below(tensors, prefix).items() if not name.startswith(beside)}
    network = {WRAPPERS.sub("", name): tensor for name, tensor in network.items()}
    weights = {name: tensor for name, tensor in network.items() if not parts or name.split(".")[0] in parts}
    _check_numbers(weights, path)
    check_finite(weights, path)
    others = " and ".join(other or "no prefix" for other in prefixes if other != prefix)
    line = f"network: {Path(path).name}, {len(weights)} tensors {f'under {prefix}' if prefix else 'bare'}"
    line += ", an average (EMA)" if preference(prefix) == 2 else ""
    lines = [line + (f", and not those under {others}" if others else "")]
    left_out = Counter(
        next((known for known in prefixes if known and name.startswith(known)), name.split(".")[0]).rstrip(".")
        for name in tensors
        if not name.startswith(prefix) or name.startswith(beside)
    )
    left_out.update(f"{prefix}{name.split('.')[0]}" for name in network if name not in weights)
    if left_out:
        lines.append("left out, tensors of " + ", ".join(f"{name} ({count})" for name, count in left_out.items()))
    return weights, lines


def _check_numbers(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """A UserError for tensors without values, and for quantised, complex and sparse ones, which are no plain numbers."""
    for name, tensor in weights.items():
        what = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_meta:
            raise UserError(f"{path}: {name} has a shape and no values (it was saved from the meta device); save the weights")
        if tensor.layout != torch.strided or tensor.is_quantized:
            what = f"a {'quantised' if tensor.is_quantized else 'sparse'} tensor"
        elif tensor.is_floating_point() or not tensor.ndim:  # a counter beside the weights is a whole number
            continue
        raise UserError(f"{path}: {name} is {what}, and weights are floating-point numbers; save them as float32 or float16")


FORMERLY = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # before diffusers 0.15


def present_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet2DModel's state dict, its attentions by the names that diffusers has had since 0.15."""
    renamed = dict(state)
    for old, new in FORMERLY.items():
        renamed = {key.replace(old, new) if ".attentions." in key else key: value for key, value in renamed.items()}
    return renamed


def list_differences(missing: Collection[str], unknown: Collection[str]) -> list[str]:
    """In words, the keys that a state dict lacks, and those that it has in excess."""
    return [f"it {verb} {few(keys, 5)}" for verb, keys in (("lacks", missing), ("has in excess", unknown)) if keys]
