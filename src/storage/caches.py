"""Caches in blocks, made once by all ranks: for each block an array and what is known of it, and a manifest after all of them.

A folder holds a folder for each split with `block_00000.npy` and `block_00000.json`, and last of all `manifest.json`.
"""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import UserError
from .blocks import Block, Ranks, cut_blocks, make_blocks
from .files import write_whole
from .locks import take_lock
from .requests import stage_folder

BLOCK = 256  # items in a file, and what a kill costs at most


def blocks_of(folder: Path, split: str, count: int) -> list[Block]:
    """The blocks of so many items; the path of each is that of its .json, which is written last."""
    return cut_blocks(count, BLOCK, lambda i: folder / split / f"block_{i:05d}.json")


def write_block(block: Block, values: NDArray[np.float32], facts: Mapping[str, Any]) -> None:
    """Write the array of a block and what is known of it; both are there, whole, once the .json is."""
    block.path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, values)  # into memory: given a file, NumPy goes past Python and loses why it could not write
    write_whole(block.path.with_suffix(".npy"), content.getbuffer())
    write_whole(block.path, json.dumps(facts).encode())


def make_cache(
    folder: Path,
    contract: dict[str, Any],
    counts: dict[str, int],
    make: Callable[[str, Block], None],
    finish: Callable[[Path], dict[str, Any]],
    ranks: Ranks,
    *,
    name: str,
    doing: str,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Make a cache of `counts` items per split on all ranks: `make(split, block)` writes one block by `write_block`.

    manifest.json has the contract, the counts, what `finish(folder)` adds, and `notes`. Staged in FOLDER.partial: after a kill
    the same call goes on, where contract and notes are the same. A UserError where another process makes it.
    """
    request = {**contract, **(notes or {})}
    staged = folder.with_name(folder.name + ".partial")
    ranks.barrier()  # all have seen that it is not there before one writes
    with ExitStack() as stack:
        if ranks.rank == 0:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder.with_name(f".{folder.name}.lock"), "w"))
            if not take_lock(lock):
                raise UserError(f"the {name} {folder} is being made by another process; wait for it")
            if folder.exists():
                raise UserError(f"the {name} {folder} was made by another process meanwhile; run the same command again")
            stage_folder(staged, request)
        ranks.barrier()
        blocks = [block for split, count in counts.items() for block in blocks_of(staged, split, count)]
        try:
            make_blocks(blocks, lambda block: make(block.path.parent.name, block), ranks, doing=doing)
        except UserError:  # no later call can go on from here
            shutil.rmtree(staged, ignore_errors=True)
            raise
        if ranks.rank == 0:
            document = {**request, "counts": counts, **finish(staged)}
            write_whole(staged / "manifest.json", json.dumps(document, indent=1).encode())
            (staged / "request.json").unlink()
            staged.replace(folder)
        ranks.barrier()
