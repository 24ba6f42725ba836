"""In which precision a run trains: what its config says or, for `auto`, what its first process decides once for the run."""

from pathlib import Path
from typing import Any

import torch

from ..config import UserError, read_json


def _bf16_units() -> bool | None:
    """Whether this processor has units for bf16; None where torch does not say."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    named = [bool(value) for name, value in known.items() if "bf16" in name]
    return any(named) if named else None


def has_bf16_units() -> bool:
    """Whether this processor has units for bf16, without which bf16 is slower than float32. True where torch does not say."""
    return _bf16_units() is not False


def precision_for(wanted: str) -> str:
    """bf16, or fp16 on a GPU that has no bf16."""
    if wanted == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return wanted


def native_precision(device: torch.device, dtype: str = "float32") -> str:
    """What `auto` is for a new run: bf16 where the device is known to have units for it, else no; no with `dtype` float64. Its
    features decide, and no clock, so that it is the same at each start."""
    if dtype == "float64":
        return "no"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device.type == "cpu" and _bf16_units() else "no"


def recorded_precision(checkpoint: Path) -> str | None:
    """In which precision the run of a checkpoint trains: as its config says or, where that says `auto`, as its data.json does.
    None where neither can be read."""
    try:
        wanted: Any = read_json(checkpoint / "config.json").get("mixed_precision", "no")
        return read_json(checkpoint / "data.json").get("mixed_precision") if wanted == "auto" else wanted
    except (UserError, OSError, AttributeError):
        return None


def kept_precision(run: Path) -> str | None:
    """The precision in which a run directory's newest checkpoint was trained, which the run keeps on every machine; None of a
    run that has none. Only the checkpoint's small files are read."""
    folders = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    return next((precision for folder in folders if (precision := recorded_precision(folder)) is not None), None)


def explain_precision(decided: str, device: torch.device, dtype: str = "float32", *, goes_on: bool = False) -> str:
    """The line that says what `auto` is in a run: of a new one why, and of one that `goes_on` whether this machine would
    take another."""
    native, line = native_precision(device, dtype), f"mixed_precision auto is {decided} in this run"
    if goes_on:
        return f"{line}, which was begun so and keeps it" + (f"; a new one would take {native} here" * (decided != native))
    kind = {"cpu": "processor", "cuda": "GPU"}.get(device.type, "device")
    reason = f"this {kind} has units for bf16" if decided == "bf16" else f"torch knows of no units for bf16 in this {kind}"
    return f"{line}: {reason if dtype == 'float32' else f'its dtype is {dtype}'}"
