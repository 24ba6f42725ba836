"""Compare what two commands left in two folders, file by file, to the bit."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file

# Files that are not compared, and why.
NOT_COMPARED = {
    "log.txt": "sentences, which may be reworded",
    "README.md": "sentences, which may be reworded",
    "report.html": "sentences, which may be reworded",
    "loss.png": "a chart of metrics.jsonl, which is compared, with words",
    ".lock": "it names the process",
    "config.json": "a later commit may know more keys, and call them otherwise",
    "MANIFEST.json": "hashes of files, config.json among them; the files are compared",
}
# Likewise the keys of JSON files.
KEYS_NOT_COMPARED = {
    "images_per_second": "the clock",
    "pid": "the process",
    "time": "the clock, in status.json",
    "config": "as config.json",
}


@dataclass
class Comparison:
    """How many values of each kind were compared, and what differs, by name."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def compare(self, kind: str, old: dict[str, Any], new: dict[str, Any], where: str) -> None:
        """Compare the values of two dictionaries to the bit, and remember the keys that one side lacks."""
        for side, only in (("reference", old.keys() - new.keys()), ("other commit", new.keys() - old.keys())):
            self.differences += [f"{where}: {key} is in the {side} alone" for key in sorted(only)]
        for key in sorted(old.keys() & new.keys()):
            self.counts[kind] += 1
            if reason := difference(old[key], new[key]):
                self.differences.append(f"{where}: {key}: {reason}")


def difference(old: Any, new: Any) -> str:
    """Why two tensors, arrays, numbers or texts are not the same to the bit, or nothing."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return f"{old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}"
        left, right = (value.detach().contiguous().flatten().view(torch.uint8) for value in (old, new))
        if torch.equal(left, right):
            return ""
        return f"differs by up to {(old.double() - new.double()).abs().max().item():.3g}"
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return f"{old.dtype} {old.shape} became {new.dtype} {new.shape}"
        return "" if old.tobytes() == new.tobytes() else f"{int((old != new).sum())} of {old.size} values differ"
    return "" if repr(old) == repr(new) else f"{old!r:.80} became {new!r:.80}"


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries and lists by their paths, without those of KEYS_NOT_COMPARED."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [flatten(below, f"{path}.{key}" if path else str(key)) for key, below in pairs if key not in KEYS_NOT_COMPARED]
        return {key: leaf for part in parts for key, leaf in part.items()} or {path: type(value)()}
    return {path: value}


def read(path: Path) -> tuple[str, dict[str, Any]] | None:
    """What kind of values a file holds, and the values by name; None of a file that is not compared."""
    if path.name in NOT_COMPARED and not (path.suffix == ".json" and "_class_name" in path.read_text()):
        return None  # (a config.json of diffusers is compared)
    if path.suffix == ".safetensors":
        return "tensors", load_file(path)
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return "tensors", flatten(torch.load(path, weights_only=True))
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return "arrays", dict(arrays)
    if path.suffix == ".npy":
        return "arrays", {"array": np.load(path)}
    if path.suffix in (".png", ".gif"):
        with Image.open(path) as image:
            return "images", {
                f"frame {i}": np.asarray(frame.convert("RGBA")) for i, frame in enumerate(ImageSequence.Iterator(image))
            }
    if path.suffix == ".json":
        return "numbers", flatten(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return "numbers", flatten([json.loads(line) for line in path.read_text().splitlines()])
    return "files", {"bytes": path.read_bytes()}


def compare_folders(old: Path, new: Path) -> Comparison:
    """Compare all files below two folders."""
    result = Comparison()
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (old, new)]
    for side, only in (("reference", names[0] - names[1]), ("other commit", names[1] - names[0])):
        result.differences += [f"{name} is in the {side} alone" for name in sorted(only)]
    for name in sorted(names[0] & names[1]):
        values = read(old / name), read(new / name)
        if values[0] is not None and values[1] is not None:
            result.compare(values[0][0], values[0][1], values[1][1], name)
    if not result.counts:
        result.differences.append("there is nothing to compare")
    return result
