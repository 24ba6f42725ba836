"""Weights of other programs: their files, read without running anything in them, and the network that is inside.

A training script saves more than a network: averages of it (EMA), the optimizer, wrappers' prefixes (`module.`, `_orig_mod.`),
an autoencoder beside it. Every converter finds its network here, and says in words what it took and what it left out.
"""

import argparse
import difflib
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..config import UserError, quoted
from ..config.packages import needed
from .downloads import hub_reason
from .finite import check_finite

# ---------------------------------------------------------------------------------------------- files


def read_foreign_json(path: Path) -> dict[str, Any]:
    """The JSON object that another Python program wrote: -Infinity, NaN and a byte-order mark are read, too."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    except (ValueError, RecursionError) as error:
        pointer = "; it is a Git LFS pointer: git lfs pull fetches the file" if _is_pointer(path) else ""
        raise UserError(f"{path}: not valid JSON ({error}){pointer}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not the JSON object that diffusers writes")
    return found


def _is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not a state dict that can be read safely ({reason})")


def _missing(path: Path) -> UserError:
    """Of a path where nothing is: names beside it that are like it, or that it is no name on the hub."""
    beside = sorted(other.name for other in path.parent.iterdir()) if path.parent.is_dir() else []
    if path.is_symlink():
        return UserError(f"{path}: it is a link that leads nowhere (to {path.readlink()}); bring the file that it names")
    near = difflib.get_close_matches(path.name, beside, 1)
    hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
    if not path.parent.is_dir() and str(path).count("/") == 1 and str(path)[0] not in "./~" and not path.suffix:
        hint = "; a name on the Hugging Face hub is not taken here: download the file, and give its path"
    where = f"{path.parent} has no {path.name}" if path.parent.is_dir() else str(path)
    return UserError(f"{where}: there is no such checkpoint{hint}")


def _is_a_folder(path: Path) -> UserError:
    files = sorted(file.name for file in path.iterdir() if file.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"))
    hint = f"give one of its files, such as {path / files[0]}" if files else "give the file of the weights"
    if any((path / name).is_file() for name in ("model_index.json", "config.json", "unet/config.json", "unet_ema/config.json")):
        hint = f"a folder of diffusers is read by: python convert.py diffusers {quoted(path)}"
    return _unreadable(path, f"it is a folder; {hint}")


def _kind_of_file(path: Path) -> str:
    """`safetensors` or `torch`, by the first bytes, whatever the file is called; a UserError for what is neither."""
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        raise _unreadable(path, "it is empty")
    if head.startswith(b"version https://git-lfs"):
        raise _unreadable(path, "it is a Git LFS pointer, which stands for the file: git lfs pull fetches it")
    if head.lstrip()[:1] == b"<":
        raise _unreadable(path, "it is a web page, as a download that failed leaves; get the file again")
    for magic, name in ((b"\x89HDF", "an HDF5 file, of Keras perhaps"), (b"GGUF", "a GGUF file"), (b"\x93NUMPY", "an array")):
        if head.startswith(magic):
            raise _unreadable(path, f"it is {name}; save the state dict with torch or safetensors")
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!")) or _is_tar(path):
        raise _unreadable(path, "it is a packed archive; unpack it first, and give the file of weights in it")
    if not any(head):
        raise _unreadable(path, "it begins with nothing but zeros, as a copy that failed leaves; get the file again")
    if path.suffix != ".safetensors" and head[8:9] != b"{" and _is_text(head):
        raise _unreadable(path, "it is a text file, as a download that failed leaves; get the file again")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
        if "constants.pkl" in names or "data.pkl" not in names:
            kind = "a TorchScript program" if "constants.pkl" in names else f"a zip archive of {few(names)}"
            raise _unreadable(path, f"it is {kind}; save the state dict with torch or safetensors")
        return "torch"
    return "safetensors" if head[8:9] == b"{" or path.suffix == ".safetensors" else "torch"


def _is_tar(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(257)
        return file.read(5) == b"ustar"


def _is_text(head: bytes) -> bool:
    """Whether these first bytes of a file are words: pickles and zip archives have bytes among them that no text has."""
    return all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)


def _harmless() -> list[Any]:
    """What checkpoints hold besides tensors that runs no code: arguments, and NumPy's numbers by their old and new names."""
    scalar = getattr(np, "_core").multiarray.scalar  # noqa: B009
    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")]
    return [argparse.Namespace, np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"), *kinds]


def read_file(path: str | Path) -> Any:
    """What another program saved in a file of torch or safetensors, read without running anything in it."""
    path = Path(path)
    if path.is_dir():
        raise _is_a_folder(path)
    try:
        if not path.exists():
            raise _missing(path)
        kind = _kind_of_file(path)
    except OSError as error:
        raise _unreadable(path, error.strerror or type(error).__name__) from None
    if kind == "safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); get it again") from None
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")  # of what is odd in a pickle, the error says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of broken bytes the unpickler may make anything
        if (named := re.search(r"GLOBAL (\S+)", str(error))) is not None:
            raise UserError(
                f"{path}: refused, because to load it is to run code ({named[1]}); a checkpoint must hold tensors alone: "
                "have its author save the state dict"
            ) from None
        reason = (str(error).strip().splitlines() or ["it ends too soon"])[0].split(". ")[0]
        if (
            len(reason) < 10 or "weights_only" in reason or reason.startswith("Weights only")
        ):  # torch's words, which say nothing
            reason = "it is no file that torch.save or safetensors wrote, or it is damaged"
        raise _unreadable(path, reason) from None


# ---------------------------------------------------------------------------------------------- the network in a file


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
OTHERS = (
    Kind("denoising-diffusion-pytorch (its own U-Net)", ("init_conv.weight", "time_mlp.1.weight")),
    Kind("this project", ("stem.weight", "time_in.weight")),
    Kind("diffusers' AutoencoderTiny", ("encoder.layers.0.weight", "decoder.layers.1.weight")),
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


def flat(found: Mapping[Any, Any], prefix: str = "", depth: int = 4) -> dict[str, Tensor]:
    """The tensors of dictionaries in dictionaries, and of lists of tensors in them, by their keys joined with dots."""
    tensors = {}
    for key, value in found.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value.detach()
        elif isinstance(value, Mapping) and depth:
            tensors |= flat(value, f"{prefix}{key}.", depth - 1)
        elif isinstance(value, list | tuple) and value and all(isinstance(entry, Tensor) for entry in value):
            tensors |= {f"{prefix}{key}.{i}": entry.detach() for i, entry in enumerate(value)}
    return tensors


def rank(prefix: str) -> int:
    """2 for an average of weights, 1 for the weights themselves, 0 for those that a program keeps beside an average."""
    parts = prefix.split(".")
    if any(part in BESIDE for part in parts):
        return 0
    return 2 if any(AVERAGE.search(part) and not RAW.search(part) for part in parts) else 1


def _prefixes(tensors: Iterable[str], kind: Kind) -> list[str]:
    """What stands before the names of each network of this kind."""
    names = set(tensors)
    found = {
        name.removesuffix(sign): None for sign in kind.signs for name in names if name == sign or name.endswith(f".{sign}")
    }
    whole = [prefix for prefix in found if not kind.every or all(f"{prefix}{sign}" in names for sign in kind.signs)]
    return sorted(whole, key=lambda prefix: (-rank(prefix), prefix))


def _lists(tensors: Iterable[str]) -> list[str]:
    """Where an average of weights is that is saved as a list."""
    return sorted(name.removesuffix(".0") for name in tensors if name.endswith(".0") and rank(name) == 2)


def _named_averages(tensors: dict[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """The same with averages whose names lack something: CompVis's LitEma leaves out the dots, score_sde saves a list."""
    named = dict(tensors)
    lists = _lists(tensors)
    listed = tuple(f"{place}." for place in lists)
    for prefix in _prefixes(tensors, kind):
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix) and not name.startswith(listed)]
        parts = prefix.rstrip(".").split(".") if prefix else []
        for i in range(len(parts) + 1):
            head, rest = parts[:i], "".join(f"{part}." for part in parts[i:])
            root = ".".join([*head[:-1], f"{head[-1]}_ema"]) if head else "model_ema"
            theirs = {name: f"{root}.{(rest + name).replace('.', '')}" for name in names}
            if names and all(key in named for key in theirs.values()):
                named |= {f"{root}.{rest}{name}": named.pop(key) for name, key in theirs.items()}
        for place in lists:
            values = [tensors[f"{place}.{i}"] for i in range(sum(name.startswith(f"{place}.") for name in tensors))]
            if [value.shape for value in values] == [tensors[f"{prefix}{name}"].shape for name in names]:
                named = {name: value for name, value in named.items() if not name.startswith(f"{place}.")}
                named |= {f"{place}.{name}": value for name, value in zip(names, values, strict=True)}
    return named


def _unnamed_average(tensors: Mapping[str, Tensor], prefixes: Sequence[str]) -> str | None:
    """Where an average of the network's weights is that is a list in another order, so that its tensors have no names."""

    lists = _lists(tensors)
    listed = tuple(f"{place}." for place in lists)

    def shapes(prefix: str) -> list[tuple[int, ...]]:
        names = [name for name in tensors if name.startswith(prefix) and (prefix in listed or not name.startswith(listed))]
        return sorted(tuple(tensors[name].shape) for name in names)

    if any(rank(prefix) == 2 for prefix in prefixes):
        return None
    return next((place for place in lists if shapes(f"{place}.") in [shapes(prefix) for prefix in prefixes]), None)


def _inside(found: Any, tensors: Mapping[str, Tensor]) -> str:
    """What a file holds in which the wanted network is not, in words."""
    if isinstance(found, Mapping) and {"state", "param_groups"} <= set(found):
        return "it holds the state of an optimizer, and no weights; give the file with the weights, which is often beside it"
    if isinstance(found, Mapping) and {"weights", "config", "data", "step"} <= set(found):
        return "it is an export of this project, which sample.py and the other scripts open as it is"
    if isinstance(found, Mapping) and tensors and all(OPTIMIZER.search(name) for name in tensors):
        return "it holds the state of an optimizer, and no weights; give the file with the weights, which is often beside it"
    if any(LORA.search(name) for name in tensors):
        return (
            "it holds a LoRA, which only adds to the weights of a network of its own kind; merge it into that network, and "
            "give what was saved then"
        )
    kinds = [kind.words for kind in (GUIDED, UNET_2D, KL, *OTHERS) if _prefixes(tensors, kind)]
    if kinds:
        hint = f", which is read by: python convert.py {READERS[kinds[0]]}" if kinds[0] in READERS else ""
        return f"it holds a network of {' and one of '.join(kinds)}{hint}"
    return f"{UNKNOWN} {few(tensors)}"


def _choose(prefixes: list[str], tensors: Mapping[str, Tensor], which: str | None, path: str | Path) -> str:
    """The prefix of the network to take: an average before raw weights, or the one that `which` names."""
    ranked = prefixes
    if which in ("ema", "raw"):
        ranked = [prefix for prefix in prefixes if (rank(prefix) == 2) == (which == "ema")]
        if not ranked:
            there = "no average (EMA) of weights" if which == "ema" else "nothing but averages (EMA) of weights"
            raise UserError(f"{path}: --which {which}: in it there is {there}; it holds {_listed(prefixes)}")
    elif which is not None:
        ranked = [prefix for prefix in prefixes if which.rstrip(".") in (prefix.rstrip("."), "" if prefix else "bare")]
        if not ranked:
            raise UserError(f"{path}: --which {which}: the networks in it are {_listed(prefixes)}; allowed: those, ema, raw")
    best = [prefix for prefix in ranked if rank(prefix) == rank(ranked[0])]
    different = [best[0], *(prefix for prefix in best[1:] if not _same(tensors, best[0], prefix))]
    if len(different) > 1:
        count = {2: "two", 3: "three"}.get(len(different), str(len(different)))
        raise UserError(
            f"{path}: {count} networks are in it, {_listed(different)}; save the one to import by itself, or choose it: "
            f"--which {different[-1].rstrip('.') or 'bare'}"
        )
    return best[0]


def _listed(prefixes: Sequence[str]) -> str:
    return " and ".join(prefix or "bare" for prefix in prefixes)


def _same(tensors: Mapping[str, Tensor], one: str, other: str) -> bool:
    """Whether the networks under two prefixes are one."""
    parts = [
        {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)} for prefix in (one, other)
    ]
    return parts[0].keys() == parts[1].keys() and all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


def find_network(
    found: Any, kind: Kind, path: str | Path, *, which: str | None = None, parts: Sequence[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of the one network of this `kind` in what was read from the file `path`, and in words what was taken and
    what was left out.

    Whatever prefix it has and whatever is around it; where an average of the weights (EMA) is there, that one. `which` chooses
    otherwise: `ema`, `raw`, or a prefix. Of the network the names that begin with one of `parts` are taken, by default all. A
    UserError says that no such network is in the file and what is, or that there are several; or that it is not finite.
    """
    if isinstance(found, list | tuple) and any(isinstance(entry, Mapping) for entry in found):
        found = {str(i): entry for i, entry in enumerate(found)}  # as some programs save network, optimizer and average
    tensors = flat(found) if isinstance(found, Mapping) else {}
    nested = tuple(f"{key}." for key, value in dict(found).items() if not isinstance(value, Tensor)) if tensors else ()
    if not tensors or {"state", "param_groups"} <= set(found):
        why = _inside(found, tensors) if tensors else "neither tensors by name nor a state_dict of them"
        raise UserError(f"{path}: no state dict: {why}; a state dict of tensors is what can be read")
    tensors = {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items()}
    tensors = _named_averages(tensors, kind)
    prefixes = _prefixes(tensors, kind)
    if prefixes and which is None and (unnamed := _unnamed_average(tensors, prefixes)) is not None:
        raise UserError(
            f"{path}: an average (EMA) is in it under {unnamed}, whose tensors have no names and another order than those of "
            "the network, so it cannot be taken; have its author save it by name, or take the raw weights: --which raw"
        )
    if not prefixes:
        tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
        prefixes = _prefixes(tensors, kind)
    if not prefixes and not (kind.every or nested) and _inside(found, tensors).startswith(UNKNOWN):
        prefixes = [""]  # a plain state dict of an unknown network: the one who wants it says which keys differ
    if not prefixes:
        ends = kind.signs[0] if kind.every else " or ".join(kind.signs)
        raise UserError(f"{path}: no network of {kind.words} is in it: no key ends in {ends}; {_inside(found, tensors)}")
    prefix = _choose(prefixes, tensors, which, path)
    beside = tuple(key for key in nested if not prefix and key != "state_dict.")  # a state dict with others stuck into it
    inside = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    inside = {name: tensor for name, tensor in inside.items() if not (beside and name.startswith(beside))}
    inside = {WRAPPERS.sub("", name): tensor for name, tensor in inside.items()}
    weights = {name: tensor for name, tensor in inside.items() if not parts or name.split(".")[0] in parts}
    _check_kinds(weights, path)
    check_finite(weights, path)
    others = [other for other in prefixes if other != prefix]
    whose = f"under {prefix}" if prefix else "bare"
    if rank(prefix) == 2:
        whose += ", an average (EMA)"
    if others:
        whose += f", and not those under {' and '.join(other or 'no prefix' for other in others)}"
    told = [f"network: {Path(path).name}, {len(weights)} tensors {whose}"]
    left = Counter(
        next((known for known in prefixes if known and name.startswith(known)), name.split(".")[0]).rstrip(".")
        for name in tensors
        if not name.startswith(prefix) or (beside and name.startswith(beside))
    )
    left.update(f"{prefix}{name.split('.')[0]}" for name in inside if name not in weights)
    if left:
        told.append("left out, tensors of " + ", ".join(f"{name} ({count})" for name, count in left.items()))
    return weights, told


def _check_kinds(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """A UserError for tensors that are no plain floating-point numbers: whole numbers, which are quantised weights, complex or
    sparse ones, and those without values."""
    for name, tensor in weights.items():
        what = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_meta:
            raise UserError(f"{path}: {name} has a shape and no values (it was saved from the meta device); save the weights")
        if tensor.layout != torch.strided or tensor.is_quantized:
            what = f"a {'quantised' if tensor.is_quantized else 'sparse'} tensor"
        elif tensor.is_floating_point() or not tensor.ndim:  # a counter beside the weights is a whole number
            continue
        raise UserError(f"{path}: {name} is {what}, and weights are floating-point numbers; save them as float32 or float16")


# ---------------------------------------------------------------------------------------------- the weights of a folder

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of diffusers, of accelerate, of transformers
NO_WEIGHTS = re.compile(r"optimizer|scheduler|random_states|rng_state|scaler|training_args|lora|sampler|dl_state")
ELSEWHERE = (".distcp", ".msgpack", ".onnx", ".h5", ".xml", ".ckpt.index", ".gguf", ".npz")


class FileSet(NamedTuple):
    """The files that make one set of weights: its name, whole or in shards, and the shards that are not there."""

    name: str
    files: tuple[Path, ...]
    missing: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[int, int, int, str]:
        """The best first: names that the libraries give, an average (EMA), full precision before half, raw weights last;
        safetensors before pickles."""
        stem, _, rest = self.name.partition(".")
        variant = rest.rpartition(".")[0]
        half = 1 if variant in ("fp16", "bf16") else 2 if variant else 0
        half = -1 if rank(variant) == 2 else half
        return STEMS.index(stem) if stem in STEMS else len(STEMS), half, int(not self.name.endswith(".safetensors")), self.name


def _file_sets(folder: Path) -> list[FileSet]:
    """The sets of weights in a folder; shards are known by their names, or by the index beside them."""
    groups: dict[str, set[str]] = {}
    indexed: set[str] = set()
    for file in sorted(folder.glob("*.index*.json")):
        shards = read_foreign_json(file).get("weight_map", {})
        named = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set[str]()
        if any("/" in shard or "\\" in shard for shard in named):
            raise UserError(f"{file}: it names files outside of its folder; a shard must lie beside its index")
        wholes = {_set_name(shard)[0] for shard in named}
        groups[wholes.pop() if len(wholes) == 1 else file.name.partition(".index")[0]] = named
        indexed |= named
    for name in sorted(file.name for file in folder.iterdir() if file.is_file()):
        if Path(name).suffix not in (".safetensors", ".bin", ".pt", ".pth", ".ckpt") or NO_WEIGHTS.search(name):
            continue
        whole, count = _set_name(name)
        if name not in indexed:
            names = {re.sub(r"-\d{5}-of-", f"-{i:05d}-of-", name) for i in range(1, count + 1)} if count else {name}
            groups.setdefault(whole, set()).update(names)
    found = []
    for whole, names in groups.items():
        missing = sorted(name for name in names if not (folder / name).is_file())
        found.append(FileSet(whole, tuple(folder / name for name in sorted(names - set(missing))), tuple(missing)))
    return sorted(found, key=lambda files: files.order)


def _set_name(name: str) -> tuple[str, int]:
    """The name of a file without the number of its shard, and how many shards there are, 0 of a whole file."""
    match = re.search(r"-(\d{5})-of-(\d{5})", name)
    return (name.replace(match[0], ""), int(match[2])) if match is not None else (name, 0)


def find_files(folder: Path, which: str | None = None) -> tuple[FileSet, list[str]]:
    """The weights in a folder of diffusers, whatever the file is called, whole or in shards, and in words what was left out.

    `which` is the name of a file, or a variant such as fp16. A UserError says what there is instead of weights, and which
    shards are missing.
    """
    sets = _file_sets(folder)
    if which is not None:
        sets = [files for files in sets if which in (files.name, *files.name.split("."))] or sets
    if not sets:
        elsewhere = [file.name for file in folder.iterdir() if file.name.endswith(ELSEWHERE)]
        there = f"; {few(elsewhere)} cannot be read: save it with safetensors" if elsewhere else ""
        files = few((f"{file.name}/" if file.is_dir() else file.name) for file in folder.iterdir())
        raise UserError(
            f"{folder} holds no {STEMS[0]}.safetensors and no {STEMS[0]}.bin, nor weights by another name"
            f"{there or f'; it holds {files}' if files else '; it is empty'}"
        )
    best = sets[0]
    if best.order[0] == len(STEMS) and len(sets) > 1:
        raise UserError(
            f"{folder} holds several files of weights, {few((files.name for files in sets), 6)}; choose one of them with "
            f"--which, such as --which {best.name}"
        )
    numbered = [files.name for files in sets if re.fullmatch(r"model_\d+\.\w+", files.name)]
    if which is None and numbered and best.name.startswith("model."):  # of accelerate's save_state, a file for each network
        raise UserError(
            f"{folder} holds several networks, {few([best.name, *numbered], 6)}, as accelerate saves them; choose one of them "
            f"with --which, such as --which {best.name}"
        )
    if best.missing:
        raise UserError(f"{folder}: the weights are in shards, and {few(best.missing)} is missing; bring it")
    others = [files.name for files in sets[1:]]
    told = [f"by its name {best.name} is an average (EMA)"] if best.order[1] < 0 else []
    return best, [*told, f"left out, other weights in {folder}: {few(others, 6)}"] if others else told


def read_files(files: FileSet) -> Any:
    """What the files hold; that of shards together. Beside accelerate's `model` the averages that its program registered."""
    if len(files.files) != 1:
        tensors: dict[str, Any] = {}
        for path in files.files:
            tensors |= read_file(path)
        return tensors
    found, averages = read_file(files.files[0]), {}
    if files.name.startswith("model."):
        for path in sorted(files.files[0].parent.glob("custom_checkpoint_*.pkl")):
            try:
                more = read_file(path)
            except UserError:  # what else a program registered may be anything
                continue
            if isinstance(more, Mapping) and any(rank(name) == 2 or "." in name for name in flat(more)):
                averages[path.stem] = more
    return {**found, **averages} if averages and isinstance(found, Mapping) else found


# ---------------------------------------------------------------------------------------------- the hub


def is_hub_name(name: str) -> bool:
    """Whether a name that is no folder here may be one on the hub: OWNER/NAME, or a bare NAME."""
    if not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name or name.startswith("runs/"):
        return False
    return "/" not in name or not Path(name).parent.exists()


def hub_name_of_url(address: str) -> str | None:
    """The name OWNER/NAME in the address of a page of the hub; None for anything else."""
    match = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", address)
    return match[1] if match is not None else None


def from_hub(name: str, patterns: Sequence[str]) -> Path:
    """The folder in the cache of the hub with the files of `name` that match; a UserError says why the hub does not give it."""
    with needed(f"{name}, which is no folder here,", "huggingface_hub"):
        import huggingface_hub
        import huggingface_hub.utils.logging

    huggingface_hub.utils.logging.set_verbosity_error()  # what it tells of each try, we say once
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        raise UserError(hub_reason(name, error)) from None


FORMERLY = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # before diffusers 0.15


def present_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet2DModel's state dict, its attentions by the names that diffusers has had since 0.15."""
    renamed = dict(state)
    for old, new in FORMERLY.items():
        renamed = {key.replace(old, new) if ".attentions." in key else key: value for key, value in renamed.items()}
    return renamed
