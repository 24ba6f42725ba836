"""Folders in a Google storage bucket and here: what differs moves, verified, and a manifest after all that it promises.

./setup.sh push runs/digits_ldm --bucket gs://NAME
./setup.sh pull digits_ldm
./setup.sh status
./setup.sh bring
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath

from ...config import CommandLine, UserError, run_script
from ..archives import Damaged, stem, unpack
from ..files import write_whole
from ..locks import folder_lock
from . import CACHES, Bucket, Empty, file_crc32c, is_temporary, open_bucket, pull, push, status
from .folders import Filter, check_name, list_files


def _find_unpacked(place: str) -> list[tuple[Path, Path]]:
    """The archives in datasets/ that were unpacked here, whether they are still here or not, each with its folder, which is
    here. Where both are here, the archive travels and the folder stays. None are in another place."""
    markers = sorted(Path(place).glob(".*.unpacked")) if place == "datasets" else []  # they say what both were
    archives = [marker.with_name(marker.name.removeprefix(".").removesuffix(".unpacked")) for marker in markers]
    pairs = [(archive, archive.with_name(stem(archive.name) or archive.name)) for archive in archives]
    return [pair for pair in pairs if pair[1].is_dir()]


def _folders_that_stay(place: str) -> set[str]:
    """The names of folders in a place whose archives are here and travel instead."""
    return {folder.name for archive, folder in _find_unpacked(place) if archive.exists()}


def _skipped_in(place: str) -> Filter:
    """What neither moves nor counts: of datasets the folders that stay, of a run its caches."""
    level = 1 if place == "runs" else 0
    staying = CACHES if place.split("/")[0] == "runs" else _folders_that_stay(place)
    return lambda name: is_temporary(name) or any(part in staying for part in name.split("/")[level : level + 1])


def _print_unpacked(place: str) -> None:
    """A line for each folder of datasets that a push treats in another way than its name says."""
    for archive, folder in _find_unpacked(place):
        before = json.loads(_marker(archive).read_text())
        if not archive.exists():
            line = f"{archive} is not here any more, {folder} was unpacked from it"
            print(f"{line}: a push leaves it in the bucket, and sends the folder")
        elif any(before.get(key, count) != count for key, count in _tally(folder).items()):  # older ones do not know all of it
            line = f"{folder} was unpacked from {archive.name} and has changed"
            print(f"{line}: push {place} leaves it out, push {folder} sends it")


def _marker(archive: Path) -> Path:
    return archive.with_name(f".{archive.name}.unpacked")


def _tally(folder: Path) -> dict[str, int]:
    """How many files a folder has, how many bytes, and when the newest was modified: other numbers mean a change."""
    files = [path for path in folder.rglob("*") if not is_temporary(path.relative_to(folder).as_posix()) and not path.is_dir()]
    facts = [path.lstat() for path in files]
    newest = max((fact.st_mtime_ns for fact in facts), default=0)
    return {"files": len(facts), "files_bytes": sum(fact.st_size for fact in facts), "newest_ns": newest}


def _unpack_beside(archive: Path, name: str) -> str | None:
    """Unpack `datasets/x.zip` to `datasets/x`, once; gives a line about it, or None where there was nothing to do."""
    folder, staged, marker = archive.with_name(name), archive.with_name(f".{name}.partial"), _marker(archive)
    facts = {"bytes": archive.stat().st_size, "crc32c": file_crc32c(archive)}
    if folder.exists():
        if not marker.exists():
            return f"{folder} is here already and not from {archive.name}: left as it is"
        if not json.loads(marker.read_text()).items() >= facts.items():
            return f"{archive} has changed since {folder} was unpacked: left as it is; remove {folder} and bring it again"
        return None
    shutil.rmtree(staged, ignore_errors=True)
    try:
        count = unpack(archive, staged)
        top = list(staged.iterdir())
        whole = top[0] if len(top) == 1 and top[0].name == name and top[0].is_dir() else staged
        write_whole(marker, json.dumps({**facts, **_tally(whole)}).encode())
        whole.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return f"unpacked {count} files into {folder}"


def _unpack_all(place: Path) -> int:
    """Unpack the archives of a place, with a line for each; gives 2 where one could not be unpacked, else 0."""
    exit_status = 0
    for archive in sorted(path for path in place.iterdir() if path.is_file()):
        try:
            if (name := stem(archive.name)) and (line := _unpack_beside(archive, name)):
                print(line)
        except UserError as error:
            anew = "; push it anew from where it is whole, or remove it, here and in the bucket"
            print(f"error: {error}{anew if isinstance(error, Damaged) else ''}", file=sys.stderr)
            exit_status = 2
    return exit_status


def _place(word: str) -> str:
    """A place inside the project; a word that is no folder here is a run's name."""
    path = PurePosixPath(word)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"{word!r} leaves the project folder; give a folder inside, such as runs/NAME")
    place = path.as_posix()
    check_name(place, "arguments")
    is_folder = place in ("runs", "datasets", "checkpoints") or "/" in place or Path(place).exists()
    return place if is_folder else f"runs/{place}"


def _print_left_out(place: str, left_out: Sequence[str]) -> None:
    staying = _folders_that_stay(place)
    names = [name if name.isprintable() else repr(name) for name in left_out if name.split("/")[0] not in staying]
    if names:
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        advice = "to move it, name its folder as the place, or rename it"
        print(f"{place}: left out: {', '.join(names[:5])}{rest}; {advice}", file=sys.stderr)


def _lock(place: str, dry_run: bool) -> AbstractContextManager[None]:
    return nullcontext() if dry_run else folder_lock(Path(place))


def _move(bucket: Bucket, command: str, place: str, *, delete: bool = False, dry_run: bool) -> None:
    pulls = command == "pull"
    # A pull keeps the unpacked folders; a push keeps the archives in the bucket that were unpacked here, which may be the only
    # copies of archives that are not here any more.
    kept_names = {(folder if pulls else archive).name for archive, folder in _find_unpacked(place)}
    options = {"delete": delete, "dry_run": dry_run, "skip": _skipped_in(place)}
    if not pulls:
        _print_unpacked(place)
    options["keep"] = lambda name: name.split("/")[0] in kept_names
    moved = pull(bucket, place, Path(place), **options) if pulls else push(bucket, Path(place), place, **options)
    _print_left_out(place, moved.left_out)
    line = f"{place}: {'would ' if dry_run else ''}{command} {moved.files} files, {moved.bytes / 1e6:,.1f} MB"
    line += f"; {moved.same} are the same"
    print(line + (f"; {'to delete' if dry_run else 'deleted'}: {moved.deleted}" if moved.deleted else ""))


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
                exit_status = _unpack_all(Path(place))
    return exit_status


def _print_status(bucket: Bucket, named: list[str]) -> None:
    """A table of what is where, for the places that are named, or for all; and the names of what differs in named ones."""
    places = named
    if not named:
        names = {name.split("/")[0] for name in bucket.list("runs") if "/" in name}
        names |= {path.name for path in Path("runs").glob("*") if path.is_dir()}
        places = [*(f"runs/{name}" for name in sorted(names) if not is_temporary(name)), "datasets", "checkpoints"]
    rows = {place: status(bucket, place, Path(place), skip=_skipped_in(place)) for place in places}
    for place in named:
        if rows[place] == ([], [], [], 0) and not Path(place).exists():
            raise UserError(f"{place} is neither here nor in {bucket.url}; is the name right?")
    width = max(len(place) for place in places)
    print(f"{'':{width}}  {'same':>7}  {'only here':>9}  {'only there':>10}  {'different':>9}")
    for place, row in rows.items():
        print(f"{place:{width}}  {row.same:>7}  {len(row.only_local):>9}  {len(row.only_remote):>10}  {len(row.different):>9}")
    for place in places:
        _print_unpacked(place)
        if Path(place).is_dir():
            _print_left_out(place, list_files(Path(place), _skipped_in(place)).left_out)
    for place in named:
        for label, names in zip(("only here", "only there", "different"), rows[place][:3], strict=True):
            for name in names:
                print(f"{label:>10}  {place}/{name}")


def main() -> int:
    parser = CommandLine(prog="./setup.sh", description=__doc__)
    default = os.environ.get("ATELIER_BUCKET")
    parser.add_argument("command", choices=("push", "pull", "status", "bring"), help="bring: pull data sets and unpack them")
    parser.add_argument("places", nargs="*", metavar="PLACE", help="a folder such as runs/NAME, or a run's name")
    parser.add_argument("--bucket", default=default, metavar="URL", help="gs://NAME[/PREFIX] (default: ATELIER_BUCKET)")
    parser.add_argument("--dry-run", action="store_true", help="say what would move, and move nothing")
    parser.add_argument("--delete", action="store_true", help="delete what is only at the target")
    args = parser.parse_args()
    moves = args.command in ("push", "pull")
    if not args.bucket:
        raise UserError("no bucket is named; give --bucket gs://NAME, or set ATELIER_BUCKET")
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
