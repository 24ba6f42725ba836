"""Memory of a run: kept between steps, and which micro-batch to try where there is not enough."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..config import UserError
from .failures import is_out_of_memory


def keep_freed_memory() -> bool:
    """Make glibc keep what one step frees for the next; gives whether it does, which is False without glibc and where
    MALLOC_TRIM_THRESHOLD_ is set. By default glibc gives large blocks back to the system and asks for them anew, which costs a
    CPU a tenth of a step."""
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    # the largest that this version of glibc takes
    return bool(mallopt(trim, 1 << 30)) and any(mallopt(mmap, 1 << size) for size in (30, 25))


@contextmanager
def explain_out_of_memory(
    batch: int, micro: int | None = None, *, key: str = "micro_batch_size"
) -> Iterator[Callable[[int, int, str], None]]:
    """Around steps: an out-of-memory error becomes OutOfMemory, which says which micro-batch to try.

    Yields a function to call with another batch, micro-batch and key where these change on the way.
    """
    current = (batch, micro, key)

    def change(batch: int, micro: int, key: str) -> None:
        nonlocal current
        current = (batch, micro, key)

    try:
        yield change
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(*current) from error
        raise


class OutOfMemory(UserError):
    """Too large a micro-batch, and which one to try: the largest of at most half of it that divides `batch` on the processes
    that there are."""

    def __init__(self, batch: int, micro: int | None, key: str) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self.key, self.micro = key, micro or batch // world
        on_command_line = key.startswith("--")
        smaller = [size for size in range(1, self.micro // 2 + 1) if on_command_line or batch % (size * world) == 0]
        if not smaller:
            advice = "a smaller image.size or model.base_channels"
        elif on_command_line:
            advice = f"{key} {smaller[-1]}"
        else:
            advice = f"--set {key}={smaller[-1]} and, if previews are large, a smaller preview.batch_size"
        super().__init__(f"out of memory at {key} {self.micro}; try {advice}")
