"""What of a run is given away: its EMA weights with all that opens them again, and nothing of its data."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from ..config import UserError, read_json
from ..runtime.checkpoint import MANIFEST
from ..storage.files import as_json
from ..storage.hub import local_path
from .autoencoder import autoencoder_folder
from .folders import find_weights_folder, refuse, run_directory

AS_THEY_ARE = ("config.json", "data.json", "ema.safetensors")
PROGRESS = ("step", "tanh")  # of progress.json, what opening needs


class SharedRun(NamedTuple):
    """The `files` by their names, each a path or the bytes themselves, and what is to be said of them: `config`, `facts` (of
    data.json) and `step`. `directory` is that of the run, where metrics.jsonl and previews are, if there are any."""

    files: dict[str, Path | bytes]
    config: dict[str, Any]
    facts: dict[str, Any]
    step: int
    directory: Path


def share_run(path: str | Path) -> SharedRun:
    """The files of a run, a checkpoint, a final folder or an import that make up one folder which opens wherever a run is asked
    for: with a manifest, and of a latent run with its autoencoder. They are not read, so it costs no memory. A UserError where
    there are no whole weights, or where they open nowhere else."""
    place = local_path(path)
    refuse(path, {"is one file; give the run, a checkpoint or a final folder": place.is_file()})
    if not place.is_dir():
        raise UserError(f"{path}: there is no such run or checkpoint")
    folder = find_weights_folder(place)
    config, facts, progress = (read_json(folder / f"{name}.json") for name in ("config", "data", "progress"))
    if facts.get("network") == "python":
        raise UserError(
            f"{path} trained a network that was handed in from Python, which no config builds: it opens nowhere else"
        )
    files: dict[str, Path | bytes] = {name: folder / name for name in AS_THEY_ARE}
    files["progress.json"] = as_json({key: progress[key] for key in PROGRESS if key in progress})
    listed: dict[str, Any] = {**read_json(folder / MANIFEST)["files"]}
    if "latents" in facts:
        beside = autoencoder_folder(folder)
        listed |= read_json(beside / MANIFEST)["files"]
        files |= {name: beside / name for name in ("autoencoder.safetensors", "autoencoder_config.json")}
    for name, content in files.items():
        if isinstance(content, bytes):
            listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files[MANIFEST] = as_json({"version": 1, "files": {name: listed[name] for name in files}})
    return SharedRun(files, config, facts, progress["step"], run_directory(place))
