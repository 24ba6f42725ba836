"""Folders in a Google storage bucket and here: what differs moves, verified, and a manifest after all that it promises.

./setup.sh push runs/digits_ldm --bucket gs://NAME
./setup.sh pull digits_ldm
./setup.sh status
./setup.sh bring
"""

import argparse
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath

from ...config import UserError, run_script
from ..locks import folder_lock
from . import Bucket, Empty, Moved, Status, is_temporary, open_bucket, pull, push, status
from .folders import list_files
from .names import check_name
from .unpacked import folders_that_stay, kept_in, print_unpacked, skipped_in, unpack_all


def _place(word: str) -> str:
    """A place inside the project; a word that is no folder here is a run's name."""
    path = PurePosixPath(word)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"{word!r} leaves the project folder; give a folder inside, such as runs/NAME")
    place = path.as_posix()
    check_name(place, "arguments")
    is_folder = place in ("runs", "datasets", "checkpoints") or "/" in place or Path(place).exists()
    return place if is_folder else f"runs/{place}"


def _print_left_out(place: str, names: list[str]) -> None:
    """A line about what a person may miss, where there is any."""
    staying = folders_that_stay(place)
    names = [name if name.isprintable() else repr(name) for name in names if name.split("/")[0] not in staying]
    if names:
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        advice = "to move it, name its folder as the place, or rename it"
        print(f"{place}: left out: {', '.join(names[:5])}{rest}; {advice}", file=sys.stderr)


def _print_moved(place: str, verb: str, moved: Moved, dry_run: bool) -> None:
    line = f"{place}: {'would ' if dry_run else ''}{verb} {moved.files} files, {moved.bytes / 1e6:,.1f} MB"
    line += f"; {moved.same} are the same"
    print(line + (f"; {'to delete' if dry_run else 'deleted'}: {moved.deleted}" if moved.deleted else ""))


def _lock(place: str, dry_run: bool) -> AbstractContextManager[None]:
    return nullcontext() if dry_run else folder_lock(Path(place))


def _move(bucket: Bucket, command: str, place: str, *, delete: bool = False, dry_run: bool) -> None:
    """Push or pull a place, and say what moved."""
    pulls, left_out = command == "pull", list[str]()
    options = {"delete": delete, "dry_run": dry_run, "skip": skipped_in(place), "keep": kept_in(place, pull=pulls)}
    if pulls:
        moved = pull(bucket, place, Path(place), **options, left_out=left_out)
    else:
        print_unpacked(place)
        moved = push(bucket, Path(place), place, **options, left_out=left_out)
    _print_left_out(place, left_out)
    _print_moved(place, command, moved, dry_run)


def _bring(bucket: Bucket, dry_run: bool) -> int:
    """Pull checkpoints and data sets, and unpack these; gives the exit status."""
    exit_status = 0
    for place in ("checkpoints", "datasets"):
        with _lock(place, dry_run):
            try:
                _move(bucket, "pull", place, dry_run=dry_run)
            except Empty:
                print(f"{place}: the bucket has none")
            if not dry_run and place == "datasets" and Path(place).is_dir():
                exit_status = unpack_all(Path(place))
    return exit_status


def _print_status(bucket: Bucket, places: list[str]) -> None:
    names = {name.split("/")[0] for name in bucket.list("runs") if "/" in name} if not places else set[str]()
    names |= {path.name for path in Path("runs").glob("*") if path.is_dir()} if not places else set[str]()
    runs = [f"runs/{name}" for name in sorted(names) if not is_temporary(name)]
    rows = list[tuple[str, Status]]()
    for place in places or [*runs, "datasets", "checkpoints"]:
        row = status(bucket, place, Path(place), skip=skipped_in(place))
        if places and row == ([], [], [], 0) and not Path(place).exists():
            raise UserError(f"{place} is neither here nor in {bucket.url}; is the name right?")
        rows.append((place, row))
    width = max(len(place) for place, _ in rows)
    print(f"{'':{width}}  {'same':>7}  {'only here':>9}  {'only there':>10}  {'different':>9}")
    for place, row in rows:
        print(f"{place:{width}}  {row.same:>7}  {len(row.only_local):>9}  {len(row.only_remote):>10}  {len(row.different):>9}")
    for place, _ in rows:
        print_unpacked(place)
        if Path(place).is_dir():
            _print_left_out(place, list_files(Path(place), skipped_in(place)).left_out)
    for place, row in rows if places else ():
        for label, names in (("only here", row.only_local), ("only there", row.only_remote), ("different", row.different)):
            for name in names:
                print(f"{label:>10}  {place}/{name}")


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="./setup.sh", description=__doc__, formatter_class=plain)
    default = os.environ.get("ATELIER_BUCKET")
    parser.add_argument("command", choices=("push", "pull", "status", "bring"), help="bring: pull data sets and unpack them")
    parser.add_argument("places", nargs="*", metavar="PLACE", help="a folder such as runs/NAME, or a run's name")
    parser.add_argument("--bucket", default=default, metavar="URL", help="gs://NAME[/PREFIX] (default: ATELIER_BUCKET)")
    parser.add_argument("--dry-run", action="store_true", help="say what would move, and move nothing")
    parser.add_argument("--delete", action="store_true", help="delete what is only at the target")
    args = parser.parse_args()
    if not args.bucket:
        raise UserError("no bucket is named; give --bucket gs://NAME, or set ATELIER_BUCKET")
    moves = args.command in ("push", "pull")
    if moves != bool(args.places) and args.command != "status":
        raise UserError(f"{args.command} {'needs a PLACE, such as runs/NAME' if moves else 'takes no PLACE'}")
    if args.delete and not moves:
        raise UserError(f"--delete is for push and pull; {args.command} deletes nothing")
    places = list(dict.fromkeys(_place(word) for word in args.places))
    with open_bucket(args.bucket) as bucket:
        if args.command == "bring":
            return _bring(bucket, args.dry_run)
        if args.command == "status":
            _print_status(bucket, places)
        for place in places if moves else ():
            with _lock(place, args.dry_run or args.command == "push"):
                _move(bucket, args.command, place, delete=args.delete, dry_run=args.dry_run)
    return 0


if __name__ == "__main__":
    run_script(main)
