"""Checkpoints: safetensors and JSON in a folder that is whole or absent, its bytes known by their hashes."""

import hashlib
import io
import json
import shutil
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..config import Length, UserError, config, resumable_field
from ..storage.files import as_json, explain_full_disk, new_folder, write_flushed, write_whole
from ..storage.finite import check_finite
from ..storage.networks import list_differences
from .sharding import part_of

MANIFEST = "MANIFEST.json"
Tensors = Mapping[str, Mapping[str, Tensor]]
Documents = Mapping[str, Any]


@config
class CheckpointConfig:
    """A run saves a checkpoint every `every` steps and every `every_minutes`. It keeps the last `keep`, the last one before a
    cooldown (optimizer.schedule.kind wsd), and the best one where `keep_best` is set (lowest held-out loss; of an autoencoder
    LPIPS, or L1 without a perceptual loss) or preview.quality (lowest distance)."""

    every: Length | None = resumable_field(None)
    every_minutes: float | None = resumable_field(30.0, gt=0)
    keep: int = resumable_field(3, ge=1)
    keep_best: bool = resumable_field(False)


def write_folder(folder: Path, tensors: Tensors, documents: Documents, *, readme: str | None = None) -> None:
    """Write `NAME.safetensors` and `NAME.json` files and their manifest to `folder`, which is whole or as it was before. A
    `readme` becomes its README.md, which is not in the manifest, so that people may change it. A full disk is a UserError."""
    weights = (  # one after the other: each is in memory as tensors and as bytes
        (f"{name}.safetensors", safetensors.torch.save({key: value.contiguous() for key, value in state.items()}))
        for name, state in tensors.items()
    )
    with explain_full_disk(folder, ", and nothing that was saved before is changed"), new_folder(folder) as staged:
        files = {}
        for name, content in chain(weights, ((f"{name}.json", as_json(document)) for name, document in documents.items())):
            write_flushed(staged / name, content)
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if readme is not None:
            write_flushed(staged / "README.md", readme.encode())
        write_flushed(staged / MANIFEST, as_json({"version": 1, "files": files}))


def check_whole(folder: Path) -> None:
    """A UserError where a checkpoint's bytes are not what was written."""
    reason = verify_checkpoint(folder)
    if reason is not None:
        raise UserError(f"{folder} is damaged: {reason}")


def verify_checkpoint(folder: Path) -> str | None:
    """Why a checkpoint's bytes are not what was written, or None."""
    try:
        for name, facts in json.loads((folder / MANIFEST).read_text())["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    return f"{name} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """The hash of weights on the CPU, by their names in order."""
    return hashlib.sha256(b"".join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest()


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def _steps(checkpoints: Path) -> list[Path]:
    return sorted((path for path in checkpoints.glob("step_*") if path.is_dir()), reverse=True)


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose bytes match, and a line for each newer one that was passed over."""
    passed = []
    for folder in _steps(checkpoints):
        if (reason := verify_checkpoint(folder)) is None:
            return folder, passed
        passed.append(f"passed over {folder.name}: {reason}")
    return None, passed


def set_aside(checkpoints: Path, step: int) -> None:
    """Hide the checkpoints newer than `step`, which are damaged, where a run goes on from there: `retain` would keep them
    instead of whole ones. The next `retain` removes them."""
    for folder in _steps(checkpoints):
        if folder > step_folder(checkpoints, step):
            _hide(folder, "damaged")


def _hide(folder: Path, why: str) -> Path:
    hidden = folder.with_name(f".{folder.name}.{why}")
    shutil.rmtree(hidden, ignore_errors=True)
    return folder.rename(hidden)


def _remove(folder: Path) -> None:
    shutil.rmtree(_hide(folder, "old"))  # hidden first, so that a kill leaves no checkpoint with files missing


def contents(folder: Path, *, finite: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors and the documents of a checkpoint, as `write_folder` takes them; with `finite` NaN is a UserError."""
    weights, documents = folder.glob("*.safetensors"), (path for path in folder.glob("*.json") if path.name != MANIFEST)
    tensors = {path.stem: read_tensors(folder, path.stem, finite=finite) for path in sorted(weights)}
    return tensors, {path.stem: json.loads(path.read_text()) for path in sorted(documents)}


def roll_back(checkpoints: Path, step: int, progress: Mapping[str, Any]) -> int:
    """Make the checkpoint of `step`, or the last before it, the newest, with `progress` put into its own; gives its step."""
    newer = list[Path]()
    for target in _steps(checkpoints):
        if target <= step_folder(checkpoints, step) and verify_checkpoint(target) is None:
            break
        newer.append(target)
    else:
        raise UserError(f"there is no checkpoint of step {step} or before to go back to; start anew with a smaller weight")
    for folder in newer:
        _remove(folder)
    tensors, documents = contents(target, finite=False)  # the run checks that when it goes on
    documents["progress"] |= progress
    write_folder(target, tensors, documents)
    return documents["progress"]["step"]


def retain(checkpoints: Path, keep: int, spared_steps: Collection[int] = ()) -> None:
    """Remove all checkpoints but the last `keep` and those of `spared_steps`; and half-written ones that a kill left."""
    spared = {step_folder(checkpoints, step) for step in spared_steps}
    for folder in {*_steps(checkpoints)[keep:]} - spared:
        _remove(folder)
    for leftover in checkpoints.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def keeps_best(cfg: Any) -> bool:
    """Whether a run keeps its best checkpoint: where its config says so, or where the distance of samples is measured."""
    return cfg.checkpoint.keep_best or getattr(getattr(cfg, "preview", None), "quality", None) is not None


def count_spared(cfg: Any) -> int:
    """How many checkpoints a run keeps beside its last ones: the best one, and the last one before a cooldown."""
    has_cooldown = hasattr(cfg, "steps") and cfg.optimizer.schedule.kind == "wsd"
    return keeps_best(cfg) + has_cooldown


def spared_steps(progress: Mapping[str, Any]) -> set[int]:
    """The steps whose checkpoints a run needs beside its last ones: its best one, the one that a rollback would take, and the
    last one before the cooldown."""
    best, guard = progress.get("best") or {}, progress.get("guard", {})
    back_to, before_cooldown = guard.get("healthy_step"), progress.get("cooldown", {}).get("before")
    rolled_to = guard.get("before_step") if back_to is None else back_to
    steps = (best["step"] if best.get("kept") else None, rolled_to, before_cooldown)
    return {step for step in steps if step is not None}


def read_tensors(folder: Path, name: str, *, finite: bool = True) -> dict[str, Tensor]:
    """The tensors of `NAME.safetensors`, on the CPU; a UserError where they are damaged, or not finite (with `finite`)."""
    try:
        tensors = safetensors.torch.load_file(folder / f"{name}.safetensors")
    except FileNotFoundError:
        raise UserError(f"{folder} has no {name}.safetensors") from None
    except SafetensorError as error:
        raise UserError(f"{folder}/{name}.safetensors is damaged ({error})") from None
    if finite:
        earlier = f"take an earlier checkpoint; a run goes on from the one before where {folder} is removed"
        advice = earlier if folder.name.startswith("step_") else "take other ones"
        check_finite(tensors, folder / f"{name}.safetensors", advice)
    return tensors


def load_weights(network: Any, state: Mapping[str, Tensor], where: Path) -> None:
    """Load weights; a checkpoint of another architecture is a UserError that names the first keys that differ."""
    expected = network.state_dict()
    mistakes = list_differences(expected.keys() - state.keys(), state.keys() - expected.keys())
    common = [(key, tuple(state[key].shape), tuple(value.shape)) for key, value in expected.items() if key in state]
    mistakes += [f"{key} is {shape} and not {wanted}" for key, shape, wanted in common if shape != wanted][:5]
    if mistakes:
        raise UserError(f"{where} is of another architecture: {'; '.join(mistakes)}")
    network.load_state_dict({key: part_of(expected[key], value) for key, value in state.items()})


def export(path: Path, weights: Mapping[str, Tensor], settings: Any, data: Any, step: int) -> None:
    """One `.pt` file of tensors and config, read with `weights_only=True`; whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    torch.save({"weights": dict(weights), "config": settings, "data": data, "step": step}, content)
    write_whole(path, content.getbuffer())
