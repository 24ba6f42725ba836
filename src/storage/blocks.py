"""Arrays over many pictures, made in blocks that are files: dealt to ranks, each whole or absent, so that a kill costs one."""

import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import UserError
from ..config.progress import Progress
from .files import write_whole

Arrays = dict[str, NDArray[Any]]


class Ranks(NamedTuple):
    """Who shares the work: this one's number, how many there are, and what lets them wait for each other."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


def claim_request(out: Path, request: dict[str, Any], ranks: Ranks) -> None:
    """Write what the figures in `out` depend on to request.json; a UserError where it holds others."""
    told = out / "request.json"
    others = [path for path in out.iterdir() if path != told] if out.exists() else []  # that alone is of what came to nothing
    known = json.loads(told.read_text()) if told.exists() else None
    before = {key: value for key, value in request.items() if key != "files"}  # what older figures know
    if others and known not in (request, before):
        raise UserError(f"{out} holds other figures; give another --out or remove it")
    ranks.barrier()  # all have looked before anybody writes
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(told, json.dumps(request).encode())
    ranks.barrier()


def in_blocks(
    folder: Path,
    count: int,
    size: int,
    make: Callable[[range], Arrays],
    ranks: Ranks,
    *,
    doing: str,
    keys: Sequence[str] = (),
    read: bool = True,
) -> Arrays:
    """`make(range)` gives arrays over those pictures; it is called for `count` of them in blocks of `size`, but for those in
    `folder` already. Gives all of them in order, those of `keys` (default all), on every rank that will `read` them."""
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    paths = [folder / f"block_{i:05d}.npz" for i in range(len(blocks))]
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    due = list(zip(paths, blocks, strict=True))[ranks.rank :: ranks.world]
    if not all(path.exists() for path, _ in due) or ranks.rank == 0:
        with Progress(doing, count, shown=ranks.rank == 0, processes=ranks.world) as bar:
            for path, block in due:
                if not path.exists():
                    content = io.BytesIO()
                    np.savez(content, **dict[str, Any](make(block)))
                    write_whole(path, content.getbuffer())
                bar.update(min(len(block) * ranks.world, count - bar.done))
    ranks.barrier()
    wait_for(paths)
    if not read:
        return {}
    parts: list[Arrays] = []
    for path in paths:
        with open(path, "rb") as file, np.load(file) as part:
            parts.append({key: part[key] for key in keys or part.files})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def wait_for(paths: Sequence[Path], seconds: float = 60) -> None:
    """On network file systems another machine's file may be seen a little later."""
    limit = time.monotonic() + seconds
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > limit:
            raise UserError(f"{missing[0]} was not written; run the same command again to go on")
        time.sleep(0.2)
