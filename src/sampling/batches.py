"""Whole batches, dealt to the processes that share the work, so that a result does not depend on their number."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from ..config.progress import Progress
from ..storage.blocks import Ranks

Items = TypeVar("Items", bound=Sequence)


def in_batches(items: Items, size: int) -> list[Items]:
    """The items (a list, or a range) in batches of `size`, the last with what is left."""
    return [items[start : start + size] for start in range(0, len(items), size)]  # pyright: ignore[reportReturnType]


def deal_batches(items: Items, size: int, ranks: Ranks, doing: str, *, unit: str = "images") -> Iterator[Items]:
    """The batches of this rank, one after the other, while rank 0 shows the progress of all ranks."""
    with Progress(doing, len(items), unit=unit, shown=ranks.rank == 0, processes=ranks.world) as bar:
        for batch in in_batches(items, size)[ranks.rank :: ranks.world]:
            yield batch
            bar.update(min(len(batch) * ranks.world, len(items) - bar.done))
