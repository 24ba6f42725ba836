"""Find and read the EMA weights of a run, and the JSON beside them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..config import UserError, quoted, read_json
from ..runtime.checkpoint import check_whole, digest_of, newest, read_tensors, verify_checkpoint
from ..storage.finite import check_finite
from ..storage.hub import local_path
from ..storage.weight_files import read_file, read_foreign_json


def read_if_there(path: Path) -> dict[str, Any]:
    """The JSON object that another program wrote into a file, empty where there is no file."""
    return read_foreign_json(path) if path.is_file() else {}


def refuse(where: object, reasons: Mapping[str, Any]) -> None:
    """A UserError of `where` and the first of these reasons that applies; nothing where none does."""
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"{where} {reason}".strip())


def run_directory(path: str | Path) -> Path:
    """The directory of a run, given that, a checkpoint, the final folder or an average in it; absolute."""
    place = Path(path).resolve()
    if place.name == "final" or re.fullmatch(r"\.?step_\d+.*|width_[\d.]+", place.name):
        return place.parent.parent if place.parent.name in ("checkpoints", "ema") else place.parent
    return place


def run_name(path: str | Path) -> str:
    """The name of a run, given its directory, a checkpoint, the final folder or an average in it; of an export that of the
    file."""
    place = Path(path).resolve()
    return place.stem if place.is_file() else run_directory(place).name or place.name


EXPORT = {"weights": dict, "config": dict, "data": dict, "step": int}


class Weights(NamedTuple):
    """EMA weights from `folder` with their config, data.json, step, and the hash that names them."""

    folder: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    data: dict[str, Any]
    step: int
    digest: str


def _step(folder: Path) -> int:
    return read_json(folder / "progress.json")["step"]


def finished(run: Path, checkpoint: Path | None) -> Path | None:
    """The final folder of a run, where it is whole and not behind the newest `checkpoint`."""
    final = run / "final"
    is_whole = verify_checkpoint(final) is None
    return final if is_whole and (checkpoint is None or _step(checkpoint) <= _step(final)) else None


def find_weights_folder(path: Path) -> Path:
    """The folder with the weights: `path` itself, its final, or its newest whole checkpoint."""
    if (path / "ema.safetensors").exists() or (path / "MANIFEST.json").exists():
        check_whole(path)
        return path
    checkpoint, passed = newest(path / "checkpoints")
    if (best := finished(path, checkpoint) or checkpoint) is not None:
        return best
    kind = read_if_there(path / "config.json").get("_class_name")
    is_autoencoder = str(kind).startswith("Autoencoder") or kind == "VQModel"
    advice = f"train_ldm.py --set autoencoder={quoted(path)} trains on its latents" if is_autoencoder else "give a run"
    parts = ("model_index.json", "unet/config.json", "unet_ema/config.json")
    reasons = {
        f"holds no checkpoint that is whole ({'; '.join(passed)})": passed,
        f"is {kind} of diffusers and no run of this project; {advice}": kind not in ("UNet2DModel", None),
        "is a folder of diffusers, which has to be brought in first: python convert.py diffusers "
        f"{quoted(path)} --out FOLDER": kind is not None or any((path / name).is_file() for name in parts),
    }
    refuse(path, reasons)
    raise UserError(f"{path} holds no checkpoint; give a run, a checkpoint, a final folder or an export")


def read_weights(path: Path) -> Weights:
    """Those of a run, a checkpoint, a final folder, a `.pt` export or a run on the hub, OWNER/NAME[@REVISION]; a UserError says
    what is missing or damaged."""
    path = local_path(path)
    if path.is_file():
        return _read_export(path)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run or checkpoint")
    folder = find_weights_folder(path)
    return Weights(
        folder=folder,
        tensors=read_tensors(folder, "ema"),
        config=read_json(folder / "config.json"),
        data=read_json(folder / "data.json"),
        step=_step(folder),
        digest=read_json(folder / "MANIFEST.json")["files"]["ema.safetensors"]["sha256"],
    )


def _read_export(path: Path) -> Weights:
    try:
        content = read_file(path)
    except UserError as error:
        raise UserError(f"{path} is damaged or no export of this project: {str(error).removeprefix(f'{path}: ')}") from None
    content = content if isinstance(content, dict) else {}
    is_export = all(isinstance(content.get(key), kind) for key, kind in EXPORT.items())
    reasons = {
        "holds weights alone, as convert.py safetensors writes them for other programs, and nothing that says of which network "
        "they are; give the run, a checkpoint or a final folder": not is_export and "stem.weight" in content,
        "is no export of this project, which holds weights, config, data and step; give a run, a checkpoint or a final folder; "
        "what another program trained is brought in by convert.py": not is_export,
    }
    refuse(path, reasons)
    weights = content["weights"]
    try:
        digest = digest_of(weights)
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no export of this project: {reason}") from None
    check_finite(weights, path)
    return Weights(path, weights, content["config"], content["data"], content["step"], digest)
