"""Arrays over many items, made in blocks that are files: dealt to ranks, each whole or absent, so that a kill costs one."""

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import UserError
from ..config.progress import Progress
from .files import numpy_bytes, write_whole
from .locks import take_lock

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


def cut_blocks(folder: Path, count: int, size: int, ending: str) -> list[Block]:
    """`count` items in blocks of `size`, whose files in `folder` have the `ending`."""
    starts = enumerate(range(0, count, size))
    return [Block(folder / f"block_{i:05d}{ending}", range(start, min(start + size, count))) for i, start in starts]


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
    folder: Path, count: int, size: int, make: Callable[[range], Arrays], ranks: Ranks, *, doing: str, read: bool = True
) -> Arrays:
    """The arrays over `count` items that `make(range)` gives, in order, in files of `size` items in `folder`; `make` is called
    for missing files. Only ranks with `read` read them, the others get nothing."""
    blocks = cut_blocks(folder, count, size, ".npz")

    def write(block: Block) -> None:
        write_whole(block.path, numpy_bytes(np.savez, **make(block.items)))

    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    make_blocks(blocks, write, ranks, doing=doing)
    wait_for([block.path for block in blocks])
    if not read:
        return {}
    parts: list[Arrays] = []
    for block in blocks:
        with np.load(block.path) as part:
            parts.append(dict(part))
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def wait_for(paths: Sequence[Path], seconds: float = 60) -> None:
    """Wait for files of other machines, which a network file system may show a little later; a UserError after `seconds`."""
    limit = time.monotonic() + seconds
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > limit:
            raise UserError(f"{missing[0]} was not written; run the same command again to go on")
        time.sleep(0.2)


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
    newer_keys: Collection[str] = (),
) -> None:
    """Write `request` to `file` in the folder of results: on one rank, while all wait.

    A UserError where the folder holds something of another request, in words `holds`. Hidden files count for nothing. A request
    that was written before its `newer_keys` came up counts as the same.
    """
    out, older = file.parent, {key: value for key, value in request.items() if key not in newer_keys}
    others = out.exists() and any(path.name[0] != "." and path != file for path in out.iterdir())
    if others and not is_of_request(file, request) and not is_of_request(file, older):
        raise UserError(f"{out} holds other {holds}; {advice}")
    ranks.barrier()  # all have looked before one writes
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(request).encode())
    ranks.barrier()


def stage_folder(staged: Path, request: Mapping[str, Any]) -> bool:
    """Make a folder ready for work that a kill may cut; gives whether it holds parts of this request, and removes others."""
    file = staged / "request.json"
    if is_of_request(file, request):
        return True
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    file.write_text(json.dumps(request))
    return False


BLOCK = 256  # items in a file, and what a kill costs at most


def blocks_of(folder: Path, split: str, count: int) -> list[Block]:
    """The blocks of so many items; the path of each is that of its .json, which is written last."""
    return cut_blocks(folder / split, count, BLOCK, ".json")


def write_block(block: Block, values: NDArray[np.float32], facts: Mapping[str, Any]) -> None:
    """Write the array of a block and what is known of it; both are there, whole, once the .json is."""
    block.path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(block.path.with_suffix(".npy"), numpy_bytes(np.save, values))
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
            manifest = json.dumps({**request, "counts": counts, **finish(staged)}, indent=1)
            write_whole(staged / "manifest.json", manifest.encode())
            (staged / "request.json").unlink()
            staged.replace(folder)
        ranks.barrier()
