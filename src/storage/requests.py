"""Does a folder belong to this request? Each folder of results holds a JSON file of all that its content depends on."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..config import UserError
from .blocks import Ranks
from .files import write_whole


def is_of_request(file: Path, request: Mapping[str, Any], *, without: Collection[str] = ()) -> bool:
    """Whether `file` holds this request, its keys `without` left aside; False for a file that is missing or cannot be read."""
    try:
        known = json.loads(file.read_text())
        return {key: value for key, value in known.items() if key not in without} == json.loads(json.dumps(request))
    except (OSError, ValueError, AttributeError):
        return False


def claim_folder(
    file: Path,
    request: Mapping[str, Any],
    ranks: Ranks,
    *,
    holds: str,
    advice: str = "give another --out or remove it",
    notes: Mapping[str, Any] | None = None,
    newer_keys: Collection[str] = (),
    indent: int | None = None,
) -> None:
    """Write `request` and `notes`, which decide nothing, to `file` in the folder of results: on one rank, while all wait.

    A UserError where the folder holds something of another request, in words `holds`. Hidden files count for nothing. A request
    that was written before its `newer_keys` came up counts as the same.
    """
    out, notes = file.parent, notes or {}
    older = {key: value for key, value in request.items() if key not in newer_keys}
    others = out.exists() and any(path.name[0] != "." and path != file for path in out.iterdir())
    if others and not any(is_of_request(file, known, without=notes) for known in (request, older)):
        raise UserError(f"{out} holds other {holds}; {advice}")
    ranks.barrier()  # all have looked before one writes
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps({**request, **notes}, indent=indent) + ("\n" if indent else "")).encode())
    ranks.barrier()


def stage_folder(staged: Path, request: Mapping[str, Any]) -> bool:
    """Make a folder ready for what goes on after a kill; gives whether it holds parts of this request already. What it holds of
    another request is removed."""
    file = staged / "request.json"
    if is_of_request(file, request):
        return True
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    file.write_text(json.dumps(request))
    return False
