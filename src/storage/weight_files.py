"""Weights of other programs as files: read without running anything in them, and found in a folder."""

import argparse
import difflib
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..config import UserError, quoted
from .finite import check_finite
from .networks import few, flatten, preference

LFS_POINTER = b"version https://git-lfs"
OTHER_FILES = (  # how they begin, and what to do
    (LFS_POINTER, "it is a Git LFS pointer, which stands for the file: git lfs pull fetches it"),
    (b"\x89HDF", "it is an HDF5 file, of Keras perhaps; save the state dict with torch or safetensors"),
    (b"GGUF", "it is a GGUF file; save the state dict with torch or safetensors"),
    (b"\x93NUMPY", "it is an array; save the state dict with torch or safetensors"),
)
PACKED = (b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of diffusers, of accelerate, of transformers
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NO_WEIGHTS = re.compile(r"optimizer|scheduler|random_states|rng_state|scaler|training_args|lora|sampler|dl_state")
OF_DIFFUSERS = ("model_index.json", "config.json", "unet/config.json", "unet_ema/config.json")
# What checkpoints hold besides tensors that runs no code: arguments, and NumPy's numbers by their old and new names.
_SCALAR = getattr(np, "_core").multiarray.scalar  # noqa: B009
_NUMBERS = [type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")]
HARMLESS = [argparse.Namespace, np.dtype, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"), *_NUMBERS]
ELSEWHERE = (".distcp", ".msgpack", ".onnx", ".h5", ".xml", ".ckpt.index", ".gguf", ".npz")


def read_foreign_json(path: Path) -> dict[str, Any]:
    """The JSON object that another Python program wrote: -Infinity, NaN and a byte-order mark are read, too."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    except (ValueError, RecursionError) as error:
        pointer = "; it is a Git LFS pointer: git lfs pull fetches the file" if _head(path).startswith(LFS_POINTER) else ""
        raise UserError(f"{path}: not valid JSON ({error}){pointer}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: not the JSON object that diffusers writes")
    return document


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: not a state dict that can be read safely ({reason})")


def _no_file(path: Path) -> UserError:
    """The mistake of a path that is no file: it names one in it or beside it."""
    files = sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    if path.is_dir():
        weights = [file for file in files if file.suffix in WEIGHTS]
        hint = f"give one of its files, such as {weights[0]}" if weights else "give the file of the weights"
        if any((path / name).is_file() for name in OF_DIFFUSERS):
            hint = f"a folder of diffusers is read by: python convert.py diffusers {quoted(path)}"
        return _unreadable(path, f"it is a folder; {hint}")
    if path.is_symlink():
        return UserError(f"{path}: it is a link that leads nowhere (to {path.readlink()}); bring the file that it names")
    near = difflib.get_close_matches(path.name, [file.name for file in files], 1)
    hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
    if not path.parent.is_dir() and str(path).count("/") == 1 and str(path)[0] not in "./~" and not path.suffix:
        hint = "; a name on the Hugging Face hub is not taken here: download the file, and give its path"
    where = f"{path.parent} has no {path.name}" if path.parent.is_dir() else str(path)
    return UserError(f"{where}: there is no such checkpoint{hint}")


def _is_safetensors(path: Path) -> bool:
    """Whether a file is of safetensors, else it is of torch, by its first bytes; a UserError for what is neither."""
    head = _head(path)
    safe = path.suffix == ".safetensors" or head[8:9] == b"{"
    reasons = (
        (not head, "it is empty"),
        (head.lstrip()[:1] == b"<", "it is a web page, as a download that failed leaves; get the file again"),
        *((head.startswith(magic), reason) for magic, reason in OTHER_FILES),
        (
            head.startswith(PACKED) or head[257:262] == b"ustar",
            "it is a packed archive; unpack it first, and give the file of weights in it",
        ),
        (not any(head), "it begins with nothing but zeros, as a copy that failed leaves; get the file again"),
        (  # pickles and zip archives have bytes at their beginning that no text has
            not safe and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head[:256]),
            "it is a text file, as a download that failed leaves; get the file again",
        ),
    )
    if (reason := next((reason for holds, reason in reasons if holds), None)) is not None:
        raise _unreadable(path, reason)
    if not zipfile.is_zipfile(path):
        return safe
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] or name for name in archive.namelist()]
    if "constants.pkl" in names or "data.pkl" not in names:
        kind = "a TorchScript program" if "constants.pkl" in names else f"a zip archive of {few(names)}"
        raise _unreadable(path, f"it is {kind}; save the state dict with torch or safetensors")
    return False


def read_file(path: str | Path) -> Any:
    """What another program saved in a file of torch or safetensors, read without running anything in it."""
    path = Path(path)
    try:
        if path.is_dir() or not path.exists():
            raise _no_file(path)
        is_safetensors = _is_safetensors(path)
    except OSError as error:
        raise _unreadable(path, error.strerror or type(error).__name__) from None
    try:
        if is_safetensors:
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of what is odd in a pickle, the error says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); get it again") from None
    except Exception as error:  # broken bytes may make the unpickler raise anything
        if (named := re.search(r"GLOBAL (\S+)", str(error))) is not None:
            raise UserError(
                f"{path}: refused, because to load it is to run code ({named[1]}); a checkpoint must hold tensors alone: "
                "have its author save the state dict"
            ) from None
        reason = (str(error).strip().splitlines() or ["it ends too soon"])[0].split(". ")[0]
        if len(reason) < 10 or "weights_only" in reason or reason.startswith("Weights only"):  # torch's words say nothing
            reason = "it is no file that torch.save or safetensors wrote, or it is damaged"
        raise _unreadable(path, reason) from None


class FileSet(NamedTuple):
    """The files that make one set of weights: its name, whole or in shards, and the shards that are not there."""

    name: str
    files: tuple[Path, ...]
    missing: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[int, int, int, str]:
        """The best first: names of the libraries, an average (EMA), full precision, half, raw weights; pickles last."""
        stem, _, rest = self.name.partition(".")
        variant = rest.rpartition(".")[0]
        half = -1 if preference(variant) == 2 else 1 if variant in ("fp16", "bf16") else 2 if variant else 0
        return STEMS.index(stem) if stem in STEMS else len(STEMS), half, int(not self.name.endswith(".safetensors")), self.name


def _file_sets(folder: Path) -> list[FileSet]:
    """The sets of weights in a folder; shards are known by their names, or by the index beside them."""
    groups: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.index*.json")):
        shards = read_foreign_json(file).get("weight_map", {})
        named = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else set[str]()
        if any("/" in shard or "\\" in shard for shard in named):
            raise UserError(f"{file}: it names files outside of its folder; a shard must lie beside its index")
        wholes = {_set_name(shard)[0] for shard in named}
        groups[wholes.pop() if len(wholes) == 1 else file.name.partition(".index")[0]] = named
    indexed = set[str]().union(*groups.values())
    for name in sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix in WEIGHTS):
        if name not in indexed and not NO_WEIGHTS.search(name):
            whole, count = _set_name(name)
            names = {re.sub(r"-\d{5}-of-", f"-{i:05d}-of-", name) for i in range(1, count + 1)} if count else {name}
            groups.setdefault(whole, set()).update(names)
    sets = []
    for whole, names in groups.items():
        missing = sorted(name for name in names if not (folder / name).is_file())
        sets.append(FileSet(whole, tuple(folder / name for name in sorted(names - set(missing))), tuple(missing)))
    return sorted(sets, key=lambda files: files.order)


def _set_name(name: str) -> tuple[str, int]:
    """The name of a file without the number of its shard, and how many shards there are, 0 of a whole file."""
    match = re.search(r"-(\d{5})-of-(\d{5})", name)
    return (name.replace(match[0], ""), int(match[2])) if match is not None else (name, 0)


def find_files(folder: Path, which: str | None = None) -> tuple[FileSet, list[str]]:
    """The weights in a folder of diffusers, by any name, whole or in shards; and lines that say what was left out.

    `which` is the name of a file, or a variant such as fp16. A UserError says what there is instead, or what is missing.
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
    best, *others = sets
    names = [files.name for files in sets]
    numbered = [name for name in names if re.fullmatch(r"model_\d+\.\w+", name)]
    choose = f"choose one of them with --which, such as --which {best.name}"
    if best.order[0] == len(STEMS) and others:
        raise UserError(f"{folder} holds several files of weights, {few(names, 6)}; {choose}")
    if which is None and numbered and best.name.startswith("model."):  # of accelerate's save_state, a file for each network
        several = few([best.name, *numbered], 6)
        raise UserError(f"{folder} holds several networks, {several}, as accelerate saves them; {choose}")
    if best.missing:
        raise UserError(f"{folder}: the weights are in shards, and {few(best.missing)} is missing; bring it")
    lines = [f"by its name {best.name} is an average (EMA)"] if best.order[1] < 0 else []
    return best, lines + ([f"left out, other weights in {folder}: {few(names[1:], 6)}"] if others else [])


def read_files(files: FileSet) -> Any:
    """What the files hold; that of shards together. Beside accelerate's `model` the averages that its program registered."""
    if len(files.files) != 1:
        return {name: tensor for path in files.files for name, tensor in read_file(path).items()}
    content, averages = read_file(files.files[0]), {}
    if files.name.startswith("model."):
        for path in sorted(files.files[0].parent.glob("custom_checkpoint_*.pkl")):
            try:
                registered = read_file(path)
            except UserError:  # what else a program registered may be anything
                continue
            if isinstance(registered, Mapping) and any(preference(name) == 2 or "." in name for name in flatten(registered)):
                averages[path.stem] = registered
    return {**content, **averages} if averages and isinstance(content, Mapping) else content


def read_weights(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file; a UserError begins with `key`, the part of the config that wants them."""
    try:
        weights = read_file(path)
    except UserError:
        reason = "is damaged, or holds no weights; get it again" if path.exists() else "is not there"
        raise UserError(f"{key}: {path} {reason}") from None
    if isinstance(weights, dict):
        check_finite(weights, f"{key}: {path}", "get the file again")
    return weights


def put_weights(network: torch.nn.Module, weights: dict[str, Tensor], path: Path, key: str) -> None:
    """Load all of a network's weights, or a UserError."""
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"{key}: {path} holds the weights of another network") from None
