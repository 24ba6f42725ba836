"""How a script ends: one line and status 2 where the user can mend what is wrong."""

import errno
import os
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what is wrong and what to do. Ends a script with status 2."""


# What the system says of a disk without room, and of a path that cannot be used.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),
    *(errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


def _print_mistake(message: str, rank: int) -> int:
    """Print the line and give status 2."""
    if rank:  # where rank 0 failed as well, its launcher ends this rank while it waits
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(f"error: {message}" if not rank else f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    return 2


def run_script(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main and exit: 0 done, 2 the user's mistake in one line on standard error, 1 anything else.

    Under a launcher rank 0 prints the line. Another rank waits a moment before it prints its own: where rank 0 failed as well,
    the launcher ends the other rank meanwhile.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        status = main() or 0
    except UserError as error:
        status = _print_mistake(str(error), rank)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 1
    except OSError as error:
        if error.errno in FULL:
            status = _print_mistake(f"the disk is full ({error.filename or 'while writing'}); make room and run it again", rank)
        elif error.errno in FORBIDDEN and error.filename:
            status = _print_mistake(f"{error.filename} cannot be used: {error.strerror}", rank)
        else:
            traceback.print_exc()
            status = 1
    except Exception as error:
        if rank and any(word in str(error) for word in ("Connection closed by peer", "Connection reset by peer")):
            status = _print_mistake("another process ended, so this one cannot go on", rank) and 1
        else:
            traceback.print_exc()
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torch's threads may abort a rank that ends before another
        os._exit(status)
    sys.exit(status)


@contextmanager
def prefix_errors(prefix: str) -> Iterator[None]:
    """Put `prefix` before the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}: {error}") from None
