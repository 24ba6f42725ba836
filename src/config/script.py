"""How a script begins and ends: its command line, and one line and status 2 where the user can mend what is wrong."""

import argparse
import difflib
import errno
import os
import re
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .fields import json_schema


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what is wrong and what to do. Ends a script with status 2."""


# The folder of the scripts and of configs/: in the installed package, or a clone.
PACKAGE = Path(__file__).resolve().parent.parent
INSTALLED = (PACKAGE / "scripts").is_dir()
SCRIPTS = PACKAGE / "scripts" if INSTALLED else PACKAGE.parent


def script_command(script: Path) -> list[str]:
    """What starts a script: Python with its path, or where the package is installed without a clone, the command `atelier`."""
    return [sys.executable, *(["-m", "atelier", script.stem] if INSTALLED and script.parent == SCRIPTS else [str(script)])]


@contextmanager
def prefix_errors(prefix: str) -> Iterator[None]:
    """Put `prefix` before the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}: {error}") from None


# What the system says of a disk without room, and of a path that cannot be used.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),
    *(errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)


def run_script(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main and exit: 0 done, 2 the user's mistake in one line on standard error, 1 anything else.

    Under a launcher rank 0 prints the line. Another rank waits a moment before it prints its own: where rank 0 failed as well,
    the launcher ends the other rank meanwhile.
    """
    rank = int(os.environ.get("RANK", "0"))
    message, status = None, 0
    try:
        status = main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 1
    except Exception as error:
        message, status = _explain(error, rank)
        if message is None:
            traceback.print_exc()
    if message is not None:
        if rank:  # where rank 0 failed as well, its launcher ends this rank while it waits
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        print(f"error on rank {rank}: {message}" if rank else f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torch's threads may abort a rank that ends before another
        os._exit(status)
    sys.exit(status)


def _explain(error: Exception, rank: int) -> tuple[str | None, int]:
    """The line for the user, or None where only a traceback helps; and the exit status."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk is full ({error.filename or 'while writing'}); make room and run it again", 2
    if isinstance(error, OSError) and error.errno in FORBIDDEN and error.filename:
        return f"{error.filename} cannot be used: {error.strerror}", 2
    if rank and any(f"Connection {how} by peer" in str(error) for how in ("closed", "reset")):
        return "another process ended, so this one cannot go on", 1
    return None, 1


class CommandLine(argparse.ArgumentParser):
    """The parser of a script's arguments. A mistake in them is a UserError: one line, with "did you mean"."""

    def __init__(self, **options: typing.Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> typing.NoReturn:
        misspelt = re.search(r"invalid choice: '?([^' ]+)|unrecognized arguments: ([^ =]+)", message)
        known = [*self._option_string_actions, *(str(choice) for action in self._actions for choice in action.choices or ())]
        close = difflib.get_close_matches(misspelt[1] or misspelt[2], known, 1) if misspelt else []
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{message}{hint} ({self.prog} --help lists what there is)")


def refuse_options(args: argparse.Namespace, defaults: argparse.Namespace, idle: Collection[str], reason: str) -> None:
    """A UserError for the first option that has another value than its default and is among the `idle` ones, for a `reason`."""
    for name, value in vars(args).items():
        if name in idle and value != getattr(defaults, name):
            raise UserError(f"--{name.replace('_', '-')} {reason}; leave it out")


class _PrintSchema(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: typing.Any) -> None:
        print(json_schema(self.const), end="")
        parser.exit()


def training_arguments(root: type, description: str, *, default: str) -> CommandLine:
    """The command line that all training scripts share; `root` is the class of the config."""
    parser = CommandLine(description=description)
    parser.add_argument("-cfg", "--config", metavar="FILE", default=default, help=f"the JSON config (default {default})")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
    parser.add_argument("--run-dir", metavar="DIR", help="the folder of the run (default runs/NAME)")
    new_run = "go on from the run's newest checkpoint in a new run beside it: with another rate, or longer"
    parser.add_argument("--continue-as", metavar="NAME", help=new_run)
    parser.add_argument("--dry-run", action="store_true", help="measure data, speed, memory, disk and time; write nothing")
    parser.add_argument("--verify-resume", action="store_true", help="after a change of the code: does a run go on to the bit?")
    schema = "print the JSON Schema of the config and stop"
    parser.add_argument("--schema", action=_PrintSchema, nargs=0, const=root, help=schema)
    return parser
