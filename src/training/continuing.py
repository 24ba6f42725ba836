"""A new run that goes on from an old one: its checkpoint under another config, in a directory of its own (--continue-as)."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import UserError, dump, read_json, validate
from ..report.run_files import read_lines
from ..runtime.checkpoint import contents, newest, spared_steps, step_folder, verify_checkpoint, write_folder
from ..storage.files import link_file, new_folder
from ..storage.locks import folder_lock
from .changed_config import at, cannot_change, images_seen, in_cooldown, moves_cooldown
from .run_directory import changes

MARK = ".continuing"  # says, in a directory whose run has not begun, of what it was made; empty until it is whole
BESIDE = ("latents", "pairs", "autoencoder", "ema")  # folders of a run that its checkpoints need


def directory_of(name: str, old: Path) -> Path:
    """Where the run NAME lives that goes on from `old`: beside it; a NAME with a slash is a path."""
    new = Path(name) if "/" in name else old.parent / name
    if name in ("", ".") or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", new.name) is None:
        raise UserError(
            f"--continue-as {name[:100]!r}: a run's name has up to 200 letters, digits, '.', '_' and '-', and begins "
            "with a letter or a digit"
        )
    if os.path.abspath(new) == os.path.abspath(old):
        raise UserError(f"--continue-as {name}: that is the old run itself; give the new one another name")
    return new


def continue_as(cfg: Any, old: Path, new: Path) -> None:
    """Make the run directory `new`, whose only checkpoint is the newest of `old`, with the config `cfg`; where it has been made
    before, that run goes on. Where the cooldown of `old` has begun and `cfg` asks for another one, it is the last checkpoint
    before the cooldown. `old` is read only. Every process calls it, before any waits for another.

    The place in the stream of images stays: where batches or stages had other sizes before, `images_ahead` says by how many
    images it is further than steps of this config alone would be. A UserError where there is nothing to go on from, where `new`
    is another run, or where the network, the data or their order would be others.
    """
    if _is_there(old, new):
        return
    start = start_of(cfg, old)
    raw, facts = (read_json(start / f"{name}.json") for name in ("config", "data"))
    harmless, other = changes(cfg, raw, read_json(start / "progress.json"))
    old_cfg = validate(type(cfg), raw)  # as today's version reads it
    before, after = dump(old_cfg), dump(cfg)
    if refused := cannot_change(before, after, other):
        raise UserError(
            f"--continue-as keeps network, data and their order, and {old} has another {', '.join(refused)}; change it back, "
            "or start a new run from its weights alone, with init_from"
        )
    changed = {key: [at(before, key), at(after, key)] for key in [*other, *harmless]}

    def origins_at(folder: Path) -> list[dict[str, Any]]:
        """From which runs a checkpoint of the old run comes once it is one of the new run."""
        progress = read_json(folder / "progress.json")
        step, origins = progress["step"], progress.get("continued", [])
        images_before, images_now = (images_seen(each, step, facts["images"]) for each in (old_cfg, cfg))
        ahead = images_before - images_now + (origins[-1]["images_ahead"] if origins else 0)
        return [*origins, {"run": str(old), "step": step, "images_ahead": ahead, "changed": changed}]

    request, mark = json.dumps([after, *origins_at(start)]), new / MARK
    with folder_lock(new):
        # another process may have made it, or this one just before
        if not (mark.exists() and mark.read_text(encoding="utf-8") == request) and not _is_there(old, new):
            _make(old, new, start, after, origins_at)
            mark.write_text(request, encoding="utf-8")
        new.with_name(f".{new.name}.bring.lock").unlink(missing_ok=True)


def start_of(cfg: Any, old: Path) -> Path:
    """The checkpoint of the run `old` that a new run with the config `cfg` goes on from: the newest whole one or, where its
    cooldown has begun and `cfg` asks for another one, the last before the cooldown. A UserError where there is none."""
    start, passed = newest(old / "checkpoints")
    if start is None:
        why = f" ({'; '.join(passed)})" if passed else ""
        raise UserError(
            f"--continue-as: {old} has no checkpoint to go on from{why}; the old run is runs/NAME of the config, or --run-dir"
        )
    progress = read_json(start / "progress.json")
    if not in_cooldown(progress) or not moves_cooldown(changes(cfg, read_json(start / "config.json"), progress)[1]):
        return start
    step, weights = progress["cooldown"]["before"], "start a new run from its weights alone, with init_from"
    if step is None:
        raise UserError(f"--continue-as: {old} has no checkpoint from before its cooldown; {weights}")
    start = step_folder(old / "checkpoints", step)
    if (reason := verify_checkpoint(start)) is not None:
        raise UserError(
            f"--continue-as: {start}, the last checkpoint before the cooldown, is not whole ({reason}); bring it back, "
            f"or {weights}"
        )
    return start


def _is_there(old: Path, new: Path) -> bool:
    """Whether the run `new`, gone on from `old`, has begun; a UserError where it is another one."""
    if not new.exists() or (new / MARK).exists() or not any(new.iterdir()):
        return False
    checkpoint, passed = newest(new / "checkpoints")
    if checkpoint is None and passed:
        return True  # it is said, when it is opened, which are damaged
    entries = read_json(checkpoint / "progress.json").get("continued", []) if checkpoint is not None else []
    if not any(Path(entry["run"]).name == old.name for entry in entries):
        raise UserError(
            f"--continue-as: {new} is there already, and does not go on from {old}; give another name, or remove it"
        )
    return True


def _make(
    old: Path, new: Path, start: Path, settings: dict[str, Any], origins_at: Callable[[Path], list[dict[str, Any]]]
) -> None:
    spared = {step_folder(old / "checkpoints", step) for step in spared_steps(read_json(start / "progress.json"))}
    with new_folder(new) as staged:
        (staged / "checkpoints").mkdir()
        for folder in [start, *(folder for folder in spared if folder < start and verify_checkpoint(folder) is None)]:
            tensors, documents = contents(folder)
            documents["progress"] |= {"continued": origins_at(folder)}
            if settings["mixed_precision"] != "auto":  # the config says it now
                documents["data"].pop("mixed_precision", None)
            write_folder(staged / "checkpoints" / folder.name, tensors, {**documents, "config": settings})
        for name in BESIDE:
            if (old / name).is_dir():
                hidden = shutil.ignore_patterns(".*", "*.partial")
                shutil.copytree(old / name, staged / name, copy_function=link_file, ignore=hidden)
        for folder in (staged / "ema").glob("step_*"):
            if folder.name > start.name:
                shutil.rmtree(folder)
        step = origins_at(start)[-1]["step"]
        lines = [line for line in read_lines(old / "metrics.jsonl") if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (staged / "metrics.jsonl").write_text(text, encoding="utf-8")
        (staged / MARK).touch()


def describe(entry: Mapping[str, Any]) -> str:
    """from runs/old at step 1200, with another optimizer.lr (0.001 -> 0.0005)"""
    words = []
    for key, (was, now) in entry["changed"].items():
        plain = all(not isinstance(value, dict | list) for value in (was, now))
        words.append(f"{key} ({json.dumps(was)} -> {json.dumps(now)})" if plain else key)
    return f"from {entry['run']} at step {entry['step']}" + (f", with another {', '.join(words)}" if words else "")
