"""What fails: images, curves and reports beside a run's work only warn; out of memory says what to try."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import FULL, UserError
from ..config.packages import MissingPackage

Warn = Callable[[str, str], None]  # (what was to be made, why it failed)


@dataclass
class Outcome:
    """Why optional work failed on this rank; empty where it did not."""

    reason: str = ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, on the device or on the host."""
    words = ("out of memory", "can't allocate memory")
    in_torch = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return in_torch or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or hangs."""
    import torch  # the report of a run is made without it

    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    lost = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return lost or isinstance(error, torch.distributed.DistError)


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk is full: {error.strerror}"
    message = " ".join(str(error).split())[:300]
    if isinstance(error, MissingPackage) or (isinstance(error, OSError) and message):
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")


def warn_on_stderr(what: str, reason: str) -> None:
    """The warning of a script that keeps no log."""
    print(f"warning: {what} failed ({reason}); what was drawn before it stays", file=sys.stderr, flush=True)


@contextmanager
def warn_on_failure(what: str, warn: Warn = warn_on_stderr) -> Iterator[Outcome]:
    """Around the making of `what`, which only people look at: an error there becomes a warning, and ends nothing.

    What the user has to mend still ends it (a UserError, but for a missing package), and so do a stop, out of memory and a
    collective that another process left. No value that decides anything may be computed in here.
    """
    outcome = Outcome()
    try:
        yield outcome
    except Exception as error:
        mistake = isinstance(error, UserError) and not isinstance(error, MissingPackage)
        if mistake or is_out_of_memory(error) or is_lost_rank(error):
            raise
        outcome.reason = reason_of(error)
        warn(what, outcome.reason)


def failed_on_any(outcome: Outcome, what: str, accelerator: Any, warn: Warn) -> bool:
    """Whether `what` failed on any rank, the same answer on all of them; the first rank warns of it. A collective."""
    if accelerator.num_processes == 1:
        return bool(outcome.reason)
    from accelerate.utils import gather_object

    reasons = gather_object([outcome.reason])
    failures = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    if failures and not outcome.reason:  # a rank that failed has warned already; ranks behind the first print nothing here
        warn(what, failures[0])
    return bool(failures)


@contextmanager
def explain_failure(what: str | Path) -> Iterator[None]:
    """Around the making of `what`, which the user wants: an error there becomes a UserError in one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error) or is_lost_rank(error):
            raise
        raise UserError(f"{what} was not made ({reason_of(error)}); what was drawn before it stays") from error


@contextmanager
def explain_out_of_memory(
    batch: int, micro: int | None = None, *, key: str = "micro_batch_size"
) -> Iterator[Callable[[int, int, str], None]]:
    """Around steps: an out-of-memory error becomes OutOfMemory, which says which micro-batch to try.

    Yields a function to call with another batch, micro-batch and key where these change on the way.
    """
    current: list[Any] = [batch, micro, key]

    def change(*changed: int | str) -> None:
        current[:] = changed

    try:
        yield change
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(*current) from error
        raise


class OutOfMemory(UserError):
    """Too large a micro-batch, and which to try: the largest of at most half of it that divides `batch` on all processes."""

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
