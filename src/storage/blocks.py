"""Arrays over many items, made in blocks that are files: dealt to ranks, each whole or absent, so that a kill costs one."""

import io
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
    """The processes that share the work: this one's number, how many there are, and what lets them wait for each other."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None


class Block(NamedTuple):
    """A file that is there when the block is whole, and the items that it holds."""

    path: Path
    items: range


def cut_blocks(count: int, size: int, path: Callable[[int], Path]) -> list[Block]:
    """`count` items in blocks of `size`, at the `path` of each number."""
    return [Block(path(i), range(start, min(start + size, count))) for i, start in enumerate(range(0, count, size))]


def make_blocks(blocks: Sequence[Block], make: Callable[[Block], None], ranks: Ranks, *, doing: str) -> None:
    """Call `make` for each block whose file is missing, in turns on all ranks, which wait for each other in the end."""
    total = sum(len(block.items) for block in blocks)
    with Progress(doing, total, shown=ranks.rank == 0, processes=ranks.world) as bar:
        for block in blocks[ranks.rank :: ranks.world]:
            if not block.path.exists():
                make(block)
            bar.update(min(len(block.items) * ranks.world, total - bar.done))
    ranks.barrier()


def in_blocks(
    folder: Path,
    count: int,
    size: int,
    make: Callable[[range], Arrays],
    ranks: Ranks,
    *,
    doing: str,
    read: bool = True,
) -> Arrays:
    """The arrays over `count` items that `make(range)` gives, in order, in files of `size` items in `folder`; `make` is called
    for missing files. Only ranks with `read` read them, the others get nothing."""
    blocks = cut_blocks(count, size, lambda i: folder / f"block_{i:05d}.npz")

    def write(block: Block) -> None:
        content = io.BytesIO()
        np.savez(content, **dict[str, Any](make(block.items)))
        write_whole(block.path, content.getbuffer())

    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    make_blocks(blocks, write, ranks, doing=doing)
    wait_for([block.path for block in blocks])
    if not read:
        return {}
    parts: list[Arrays] = []
    for block in blocks:
        with open(block.path, "rb") as file, np.load(file) as part:
            parts.append(dict(part))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def wait_for(paths: Sequence[Path], seconds: float = 60) -> None:
    """Wait for files of other machines, which a network file system may show a little later; a UserError after `seconds`."""
    limit = time.monotonic() + seconds
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > limit:
            raise UserError(f"{missing[0]} was not written; run the same command again to go on")
        time.sleep(0.2)
