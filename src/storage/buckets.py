"""Folders in a Google storage bucket and here: what differs moves, verified, and a manifest after all that it promises.

./setup.sh push runs/digits_ldm --bucket gs://NAME
./setup.sh pull digits_ldm
./setup.sh status
./setup.sh bring
"""

import argparse
import base64
import json
import os
import re
import shutil
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, NamedTuple

from ..config import FULL, UserError, run_script
from ..config.packages import needed
from ..config.progress import Progress
from .archives import Damaged, size, stem, unpack
from .files import write_whole
from .locks import take_lock

TRIES = 6  # in a row that bring no byte
FIRST_DELAY = 1.0  # seconds at most before the second try; doubled up to LAST_DELAY
LAST_DELAY = 16.0
TIMEOUT = 60.0  # seconds without an answer
CHUNK = 1 << 24  # bytes of an upload in memory, for each job
BLOCK = 1 << 20
HOW_TO_LOG_IN = "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS=key.json"
OWN = (".lock", ".part", ".partial", ".old", ".trial", ".unpacked")  # hidden: of a live process, half-written, noted here
PASSING = (".part", ".partial", ".swp", ".swx", "~")  # half-written, and of editors
JUNK = ("__pycache__", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db")
CACHES = ("latents", "pairs")  # of a run: large, and made again where they are missing

Advance = Callable[[int], None]  # told of bytes that have moved; negative where they move again


class Remote(NamedTuple):
    """An object: bytes, crc32c (base64, big-endian), and the generation, which is another with each write."""

    size: int
    crc32c: str
    generation: int


class Moved(NamedTuple):
    """Files and bytes that moved, files that were the same, and files that were deleted (or would, of a dry run)."""

    files: int
    bytes: int
    same: int
    deleted: int


class Status(NamedTuple):
    """Names only here, only in the bucket, and in both but different; how many are the same."""

    here: list[str]
    there: list[str]
    different: list[str]
    same: int


class Empty(UserError):
    """There is nothing to pull."""


class Unreached(UserError):
    """No answer comes from the bucket, or it cannot answer now."""


class Overwritten(UserError):
    """The generation that was listed is no more."""


class _Stopped(Exception):
    """Another file failed, so this one need not go on."""


def manifest(name: str) -> bool:
    """Whether a file promises that the others in its folder are whole."""
    return name.endswith(("MANIFEST.json", "manifest.json"))


def passing(name: str) -> bool:
    """Whether a file, or a folder that it is in, is only of a live process, half-written, or an editor's."""
    return _own(name) or any(part.endswith(PASSING) or part in JUNK for part in name.split("/"))


def _own(name: str) -> bool:
    """Whether it is the project's own, of a live process: nobody misses it elsewhere."""
    return any((part.startswith(".") and part.endswith(OWN)) or part.startswith(".doctor-") for part in name.split("/"))


def _nothing(count: int) -> None:
    pass


def _none(name: str) -> bool:
    return False


def _join(*names: str) -> str:
    return "/".join(name for name in names if name)


def _leaves(name: str) -> bool:
    parts = name.split("/")
    return any(part in ("", ".", "..") for part in parts) or bool(re.search(r"^[A-Za-z]:|[\x00-\x1f\\\ud800-\udfff]", name))


def _check_name(name: str, where: str) -> None:
    if _leaves(name):
        raise UserError(f"{where}: the name {name!r} could leave the folder or be no file's; rename it or delete it")


def _crc32c(file: BinaryIO, size: int) -> str:
    """Of the first `size` bytes, or of all where there are fewer."""
    import google_crc32c

    checksum = google_crc32c.Checksum()
    while size > 0 and (block := file.read(min(BLOCK, size))):
        checksum.update(block)
        size -= len(block)
    return base64.b64encode(checksum.digest()).decode()


def file_crc32c(path: Path) -> str:
    facts = path.stat()
    return _known_crc32c(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _known_crc32c(path: Path, _inode: int, size: int, _time: int) -> str:
    """A file that has not changed is read once by a process, however often a run is pushed."""
    with open(path, "rb") as file:
        return _crc32c(file, size)


# ---------------------------------------------------------------------------------------------- one object


def _code(error: BaseException) -> int | None:
    """The HTTP status that an error of one of google's libraries stands for."""
    code = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _short(error: BaseException) -> str:
    """An error in one line. The cause stands last in it, so where it is long its beginning is left out."""
    from google.auth.exceptions import GoogleAuthError

    parts = error.args if isinstance(error, GoogleAuthError) else (error,)  # a message, then its cause or an answer's content
    told = ": ".join(str(part).rstrip(".") for part in parts if isinstance(part, str | Exception))
    told = " ".join(told.split()).replace(";", ",")  # what to do comes behind a semicolon
    told = re.sub(r"^.*\(Caused by (.*)\)$", r"\1", told)
    return told if len(told) <= 200 else f"... {told[-200:]}"


def _of_the_line(error: BaseException) -> bool:
    """Whether no answer came, or one that was cut."""
    import http.client

    import google.auth.exceptions
    import requests
    import urllib3

    cut = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError, TimeoutError)
    return isinstance(error, (*cut, google.auth.exceptions.TransportError))


def _retry(position: Callable[[], int] = lambda: 0) -> Any:
    """Tries again after 408, 429, 5xx and cut connections, up to TRIES times in which `position` has not moved on."""
    from google.api_core.retry import Retry

    furthest, failed = -1, 0

    def again(error: BaseException) -> bool:
        nonlocal furthest, failed
        if (response := getattr(error, "response", None)) is not None:
            with suppress(Exception):
                response.content  # noqa: B018 (read to its end: the library leaves the connection of a refused download open)
        code = _code(error)
        if not (code in (408, 429) or code >= 500 if code else _of_the_line(error)):
            return False
        here = position()
        failed = 1 if here > furthest else failed + 1
        furthest = max(here, furthest)
        return failed < TRIES

    return Retry(predicate=again, initial=FIRST_DELAY, maximum=LAST_DELAY, multiplier=2, timeout=None)


class _Reader:
    """A file that tells what is read of it."""

    def __init__(self, file: BinaryIO, advance: Advance) -> None:
        self.tell, self._file, self._advance = file.tell, file, advance

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._advance(len(content))
        return content


class _Writer:
    """A file that tells what is written to it, and its crc32c."""

    def __init__(self, file: BinaryIO, advance: Advance) -> None:
        import google_crc32c

        self._file, self._advance = file, advance
        self._checksum = google_crc32c.Checksum()
        self.size = 0

    def write(self, content: bytes) -> int:
        self._file.write(content)
        self._checksum.update(content)
        self.size += len(content)
        self._advance(len(content))
        return len(content)

    @property
    def crc32c(self) -> str:
        return base64.b64encode(self._checksum.digest()).decode()


class Bucket:
    """Objects below `gs://NAME/PREFIX`, whose names are relative to that. Every failure is a UserError."""

    def __init__(self, url: str, client: Any, name: str, prefix: str, anonymous: bool) -> None:
        self.url, self.anonymous = url, anonymous
        self._client, self._bucket, self._prefix = client, client.bucket(name), prefix

    def __enter__(self) -> "Bucket":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _blob(self, name: str, **more: Any) -> Any:
        return self._bucket.blob(_join(self._prefix, name), **more)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        import google.api_core.exceptions
        import google.auth.exceptions

        where = _join(self.url, name)
        try:
            yield
        except Exception as error:
            code = _code(error)
            unknown = isinstance(error, google.auth.exceptions.GoogleAuthError) and not _of_the_line(error)
            if self.anonymous and (unknown or code in (401, 403)):
                raise UserError(
                    f"{where} is not for everybody and there are no credentials; give them: {HOW_TO_LOG_IN}"
                ) from None
            if unknown:
                message = f"the credentials are not valid ({_short(error)}); renew them"
                raise UserError(f"{where}: {message}: {HOW_TO_LOG_IN}") from None
            if code in (401, 403):
                message = "these credentials may not use it; they need the role roles/storage.objectUser"
                raise UserError(f"{where}: {message} ({_short(error)})") from None
            if code == 404:
                raise UserError(f"{self.url}: there is no such bucket; is the name right?") from None
            if code in (408, 429) or (code or 0) >= 500 or _of_the_line(error):
                message = f"no answer after {TRIES} tries ({_short(error)})"
                raise Unreached(f"{where}: {message}; run it again later, what has moved is not moved again") from None
            if isinstance(error, google.api_core.exceptions.GoogleAPICallError):
                raise UserError(f"{where}: refused ({_short(error)})") from None
            raise

    def list(self, under: str) -> dict[str, Remote]:
        """The objects below `under/`, their names relative to it; a name that would leave a folder is a UserError."""
        prefix = _join(self._prefix, under)
        prefix += "/" if prefix else ""
        fields = "items(name,size,crc32c,generation),nextPageToken"
        with self._explained(under):
            pages = self._client.list_blobs(self._bucket, prefix=prefix or None, fields=fields, timeout=TIMEOUT, retry=_retry())
            blobs = [blob for blob in pages if not blob.name.endswith("/")]  # such a one stands for a folder, in the console
        found = {blob.name[len(prefix) :]: Remote(blob.size, blob.crc32c, blob.generation) for blob in blobs}
        for name in found:
            _check_name(name, _join(self.url, under))
        return found

    def about(self, name: str) -> Remote | None:
        """One object, or None where there is none."""
        with self._explained(name):
            blob = self._bucket.get_blob(_join(self._prefix, name), timeout=TIMEOUT, retry=_retry())
        return None if blob is None else Remote(blob.size, blob.crc32c, blob.generation)

    def put(self, path: Path, name: str, known: Remote | None, advance: Advance = _nothing) -> None:
        """Write a file's bytes as they are now to the object that was listed as `known`, or to a new one.

        Somebody else's write in between is a UserError, but where it wrote the same.
        """
        from google.api_core.exceptions import BadRequest
        from google.auth.exceptions import GoogleAuthError

        reason = ""
        for _ in range(TRIES):
            with open(path, "rb") as file, self._explained(name):
                size = os.fstat(file.fileno()).st_size
                crc32c = _crc32c(file, size)
                file.seek(0)
                try:
                    return self._send(file, Remote(size, crc32c, known.generation if known else 0), name, advance)
                except (BadRequest, ValueError) as error:  # other bytes, or fewer, than those whose crc32c was promised
                    if isinstance(error, UserError | GoogleAuthError):
                        raise
                    reason = _short(error)
                    advance(-file.tell())
        raise UserError(f"{path}: not taken {TRIES} times; is it rewritten all the time? ({reason})")

    def _send(self, file: BinaryIO, wanted: Remote, name: str, advance: Advance) -> None:
        """`wanted` has the generation of what it replaces, 0 for nothing."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._blob(name, chunk_size=CHUNK)
        blob.crc32c = wanted.crc32c  # the service refuses other bytes
        try:
            blob.upload_from_file(
                _Reader(file, advance), size=wanted.size, checksum=None, if_generation_match=wanted.generation,
                timeout=TIMEOUT, retry=_retry(file.tell),
            )  # fmt: skip
        except PreconditionFailed:
            found = self.about(name)
            if found is None or found[:2] != wanted[:2]:  # else a try before had arrived, and its answer had not
                message = "somebody else has written it since it was listed; look at `status` and push again"
                raise UserError(f"{_join(self.url, name)}: {message}") from None

    def get(self, name: str, remote: Remote, path: Path, advance: Advance = _nothing) -> None:
        """Read an object to a file that is whole (size and crc32c) or absent."""
        part = path.with_name(f".bring-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.part")
        try:
            for _ in range(TRIES):
                with open(part, "wb") as file:
                    written = _Writer(file, advance)
                    self._receive(name, remote, written)
                    file.flush()
                    os.fsync(file.fileno())
                if (written.size, written.crc32c) == (remote.size, remote.crc32c):
                    part.replace(path)
                    return
                advance(-written.size)
            raise UserError(f"{_join(self.url, name)}: came damaged {TRIES} times; run it again, or push it anew")
        except OSError as error:
            if error.errno in FULL:
                raise UserError(f"the disk is full: {path} was not written; make room and run the same command again") from None
            raise
        finally:
            part.unlink(missing_ok=True)

    def _receive(self, name: str, remote: Remote, written: _Writer) -> None:
        from google.api_core.exceptions import NotFound

        blob = self._blob(name, generation=remote.generation)
        retry = _retry(lambda: written.size)
        with self._explained(name):
            try:
                blob.download_to_file(written, checksum=None, raw_download=True, timeout=TIMEOUT, retry=retry)
            except NotFound:
                message = "was overwritten or deleted since it was listed; run it again"
                raise Overwritten(f"{_join(self.url, name)} {message}") from None

    def delete(self, name: str, remote: Remote) -> None:
        """Delete the object that was listed; one that is gone is fine, one that was overwritten a UserError."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with self._explained(name):
            try:
                self._blob(name).delete(if_generation_match=remote.generation, timeout=TIMEOUT, retry=_retry())
            except NotFound:
                pass
            except PreconditionFailed:
                raise Overwritten(f"{_join(self.url, name)} was overwritten since it was listed: not deleted") from None


def open_bucket(url: str) -> Bucket:
    """The bucket of `gs://NAME[/PREFIX]`, to be closed by `with`; nothing is asked of it yet.

    Without credentials it is read as anybody may. A malformed url and a key that cannot be read are UserErrors.
    """
    matched = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/+(.*?))?/*", url)
    if matched is None:
        name = "; a NAME is of lower-case letters, digits, '-', '_' and '.', three or more" if url.startswith("gs://") else ""
        raise UserError(f"{url!r} is no bucket{name}; write it as gs://NAME or gs://NAME/PREFIX")
    name, prefix = matched[1], matched[2] or ""
    if prefix and _leaves(prefix):
        raise UserError(f"{url!r}: {prefix!r} is no folder in the bucket; write it as gs://NAME or gs://NAME/PREFIX")
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")  # it asks for rights on the bucket itself
    with needed(url, "google.cloud.storage", "google_crc32c"):
        import google.auth
        import google_crc32c  # noqa: F401  (what compares files)
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import storage

    credentials: Any = None
    if not os.environ.get("STORAGE_EMULATOR_HOST"):
        try:
            with warnings.catch_warnings():  # that a user's own credentials name no project to bill: none is needed
                warnings.simplefilter("ignore")
                credentials, _ = google.auth.default(scopes=storage.Client.SCOPE)
        except (DefaultCredentialsError, OSError) as error:
            if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                raise UserError(f"GOOGLE_APPLICATION_CREDENTIALS: {_short(error)}; give it a key file") from None
    anonymous = credentials is None
    client = storage.Client(project=None, credentials=credentials or AnonymousCredentials())
    return Bucket(f"gs://{_join(name, prefix)}", client, name, prefix, anonymous)


# ---------------------------------------------------------------------------------------------- folders


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process brings this folder, and keep them waiting. The kernel drops the lock when one dies; its file
    goes where there is no such folder afterwards."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.bring.lock")
    while True:
        with open(path, "a+") as lock:
            try:
                take_lock(lock, wait=True)
            except OSError as error:
                raise UserError(f"{folder.parent} cannot be locked ({error.strerror}); put it on another disk") from None
            if not _is_at(path, lock):
                continue  # who was first removed it meanwhile, and others lock a new one
            try:
                yield
            finally:
                if not folder.exists():
                    path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _sweep(folder: Path) -> None:
    """Remove the parts of pulls that were killed: on this machine, or an hour ago."""
    for part in folder.rglob(".bring-*-*-*.part"):
        host, pid, _ = part.stem.removeprefix(".bring-").rsplit("-", 2)
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > 3600 or (host == socket.gethostname() and not _lives(int(pid))):
                part.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _files(
    folder: Path, skip: Callable[[str], bool], out: set[str] | None = None, left: list[str] | None = None
) -> dict[str, os.stat_result]:
    """The files below a folder by name, in order. A linked folder that leads out of it is a UserError, or goes into `out`;
    another is left out. What a person may miss of what is left out goes into `left`, with the reason."""
    left = [] if left is None else left
    found: dict[str, os.stat_result] = {}
    root = folder.resolve()

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a live run removes its old checkpoints
            raise error

    for top, folders, files in os.walk(folder, onerror=failed):
        inside = "/".join(Path(top).relative_to(folder).parts)
        left += [f"{_join(inside, name)}/" for name in folders if skip(_join(inside, name)) and not _own(_join(inside, name))]
        folders[:] = [name for name in folders if not skip(_join(inside, name))]
        for name in folders:
            path = Path(top, name)
            if path.is_symlink() and path.resolve().is_relative_to(root):
                left.append(f"{_join(inside, name)} (a link to a folder that is pushed anyway)")
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                if out is not None:
                    out.add(_join(inside, name))
                    continue
                raise UserError(
                    f"{path} is a link that leads out of {folder}; put the files there, or push and pull it by itself"
                )
        for name in (_join(inside, file) for file in files):
            if skip(name):
                left += [] if _own(name) else [name]
                continue
            _check_name(name, str(folder))
            try:
                facts = (folder / name).stat()
            except FileNotFoundError:
                left += [f"{name} (a link that leads nowhere)"] if (folder / name).is_symlink() else []
                continue
            if stat.S_ISREG(facts.st_mode):
                found[name] = facts
            else:
                left.append(f"{name} (no file that has an end)")
    return dict(sorted(found.items()))


def _tell_left(place: str, left: Sequence[str]) -> None:
    """A line about what a person may miss, where there is any."""
    travels = {out.name for archive, out in _unpacked() if archive.exists()} if place == "datasets" else set[str]()
    left = [name for name in left if name.split("/")[0] not in travels]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        told = "to move it, name its folder as the place, or rename it"
        print(f"{place}: left out: {', '.join(map(_printed, left[:5]))}{more}; {told}", file=sys.stderr)


def _printed(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _same(
    folder: Path, here: dict[str, os.stat_result], there: dict[str, Remote], jobs: int, *, shown: bool = True
) -> set[str]:
    """The names whose sizes and then whose crc32c agree."""

    def equal(name: str) -> bool:
        try:
            return file_crc32c(folder / name) == there[name].crc32c
        except FileNotFoundError:
            return False

    names = [name for name in here if name in there and here[name].st_size == there[name].size]
    total, found = sum(here[name].st_size for name in names), set[str]()
    with ThreadPoolExecutor(jobs) as pool, Progress("comparing files", total, unit="B", shown=shown, leave=False) as bar:
        for name, same in zip(names, pool.map(equal, names), strict=True):
            found |= {name} if same else set()
            bar.update(here[name].st_size)
    return found


class _Crew:
    """Does a thing for each of many names, `jobs` at a time, below one bar of bytes; the first failure ends the rest."""

    def __init__(self, label: str, total: int, jobs: int, shown: bool) -> None:
        self.bar = Progress(label, total, unit="B", shown=shown)
        self._pool, self._lock, self._stop = ThreadPoolExecutor(jobs), threading.Lock(), threading.Event()

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self.bar.close()

    def advance(self, count: int) -> None:
        if count > 0 and self._stop.is_set():
            raise _Stopped
        with self._lock:
            self.bar.update(count)

    def all(self, work: Callable[[str], None], names: Iterable[str]) -> None:
        for done in as_completed([self._pool.submit(work, name) for name in names]):
            done.result()


def push(
    bucket: Bucket,
    folder: Path,
    under: str,
    *,
    delete: bool = False,
    dry_run: bool = False,
    last: Callable[[str], bool] = manifest,
    skip: Callable[[str], bool] = passing,
    keep: Callable[[str], bool] = _none,
    jobs: int = 8,
    shown: bool = True,
    left: list[str] | None = None,
) -> Moved:
    """Make the bucket's `under/` what the folder is; with `delete`, what is only there goes, but for what is to `keep`.

    Files that are `last` follow when all others have arrived, and not where one of their folder was replaced or removed
    meanwhile; an old one goes from there before what it promises is replaced. `skip` is asked for folders too. Where it is not
    `shown`, there is no bar, and nothing is said. What is left out goes into `left`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder to push")
    here = _files(folder, skip, left=left)
    if not here:
        raise UserError(f"{folder} has no files to push")
    there = {name: remote for name, remote in bucket.list(under).items() if not skip(name)}
    same = _same(folder, here, there, jobs, shown=shown)
    replaced = [name for name in here if name in there and name not in same and not last(name)]
    void = [name for name in here if name in there and last(name) and any(one.startswith(_folder(name)) for one in replaced)]
    same -= set(void)
    moving = [name for name in here if name not in same]
    gone = sorted(name for name in there.keys() - here.keys() if not keep(name)) if delete else []
    plan = Moved(len(moving), sum(here[name].st_size for name in moving), len(same), len(gone))
    if dry_run:
        return plan
    sent = list[str]()

    def send(name: str) -> None:
        try:
            bucket.put(folder / name, _join(under, name), there.get(name), crew.advance)
            sent.append(name)
        except FileNotFoundError:  # by a live run: then no manifest of its folder goes either
            pass

    def remove(name: str) -> None:
        bucket.delete(_join(under, name), there[name])

    def settled(name: str) -> bool:
        return all(_stands(folder / other, facts) for other, facts in here.items() if other.startswith(_folder(name)))

    with _Crew(f"push {under}", plan.bytes, jobs, shown) as crew:
        crew.all(remove, void)
        for name in void:
            del there[name]
        crew.all(send, [name for name in moving if not last(name)])
        held = [name for name in moving if last(name) and not settled(name)]
        crew.all(send, [name for name in moving if last(name) and name not in held])
        crew.all(remove, filter(last, gone))
        crew.all(remove, [name for name in gone if not last(name)])
    for name in held if shown else ():
        print(f"{folder / name}: its folder changed meanwhile, so it goes with the next push", file=sys.stderr)
    return Moved(len(sent), sum(here[name].st_size for name in sent), len(same), len(gone))


def _folder(name: str) -> str:
    return name[: name.rfind("/") + 1]


def _stands(path: Path, before: os.stat_result) -> bool:
    """Whether a file is still there, not replaced and not rewritten. (A log that grew stands.)"""
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return now.st_ino == before.st_ino and (now.st_size > before.st_size or now.st_mtime_ns == before.st_mtime_ns)


def pull(
    bucket: Bucket,
    under: str,
    folder: Path,
    *,
    delete: bool = False,
    dry_run: bool = False,
    last: Callable[[str], bool] = manifest,
    skip: Callable[[str], bool] = passing,
    keep: Callable[[str], bool] = _none,
    jobs: int = 8,
    left: list[str] | None = None,
) -> Moved:
    """Make the folder what the bucket's `under/` is, in the same order as `push`; with `delete`, what is only here goes, but
    for what is to `keep`. Whoever may meet another process there calls it `alone`. What is left in the bucket goes into `left`.

    A disk without room for all that is to come is a UserError before the first byte.
    """
    listed = bucket.list(under)
    there = {name: remote for name, remote in listed.items() if not skip(name)}
    if left is not None:
        left += sorted(name for name in listed if skip(name) and not _own(name))
    if not there:
        raise Empty(f"{_join(bucket.url, under)}/ has no files to pull; is the name right?")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; move it away")
    linked = set[str]()
    here = _files(folder, skip, linked)
    for link in sorted(linked & {parent.as_posix() for name in there for parent in PurePosixPath(name).parents}):
        print(f"{folder / link} is a link that leads out of {folder}: left as it is", file=sys.stderr)
        there = {name: remote for name, remote in there.items() if not name.startswith(f"{link}/")}
    for name in there:
        if (folder / name).is_dir() or any(parent.as_posix() in there for parent in PurePosixPath(name).parents):
            raise UserError(f"{folder / name} would be a file and a folder; delete or rename one of them")
    same = _same(folder, here, there, jobs)
    moving = [name for name in there if name not in same]
    gone = sorted(name for name in here.keys() - there.keys() if not keep(name)) if delete else []
    plan = Moved(len(moving), sum(there[name].size for name in moving), len(same), len(gone))
    if dry_run:
        return plan
    _sweep(folder)
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    if plan.bytes > free:
        raise UserError(f"{folder}: {size(plan.bytes)} are to come and {size(free)} are free; make room")

    def fetch(name: str) -> None:
        path, whole = folder / name, _join(under, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            bucket.get(whole, there[name], path, crew.advance)
        except Overwritten:  # a log of a live run; a manifest is not taken, for it may promise other files
            now = None if last(name) else bucket.about(whole)
            if now is None:
                raise
            bucket.get(whole, now, path, crew.advance)

    with _Crew(f"pull {under}", plan.bytes, jobs, shown=True) as crew:
        crew.all(fetch, [name for name in moving if not last(name)])
        crew.all(fetch, filter(last, moving))
    for name in sorted(gone, key=lambda name: not last(name)):
        (folder / name).unlink(missing_ok=True)
        for parent in PurePosixPath(name).parents[:-1]:
            if any((folder / parent).iterdir()):
                break
            (folder / parent).rmdir()
    return plan


def status(bucket: Bucket, under: str, folder: Path, *, skip: Callable[[str], bool] = passing, jobs: int = 8) -> Status:
    """How a folder and the bucket's `under/` differ; either may be missing."""
    there = {name: remote for name, remote in bucket.list(under).items() if not skip(name)}
    return _compare(folder, there, skip, jobs)


def _compare(folder: Path, there: dict[str, Remote], skip: Callable[[str], bool], jobs: int = 8) -> Status:
    here = _files(folder, skip, set())
    same = _same(folder, here, there, jobs)
    both = here.keys() & there.keys()
    return Status(sorted(here.keys() - both), sorted(there.keys() - both), sorted(both - same), len(same))


# ---------------------------------------------------------------------------------------------- the command line


def _place(word: str) -> str:
    """A place inside the project; a word that is no folder here is a run's name."""
    path = PurePosixPath(word)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"{word!r} leaves the project folder; give a folder inside, such as runs/NAME")
    place = path.as_posix()
    _check_name(place, "arguments")
    known = place in ("runs", "datasets", "checkpoints") or "/" in place or Path(place).exists()
    return place if known else f"runs/{place}"


def _skip(place: str) -> Callable[[str], bool]:
    """Of datasets, what was unpacked here from an archive that is here too, and travels, stays here; of a run, its caches."""
    if place.split("/")[0] == "runs":
        level = 1 if place == "runs" else 0
        return lambda name: passing(name) or any(part in CACHES for part in name.split("/")[level : level + 1])
    if place != "datasets":
        return passing
    hidden = {out.name for archive, out in _unpacked() if archive.exists()}
    return lambda name: passing(name) or name.split("/")[0] in hidden


def _keep(place: str, *, here: bool) -> Callable[[str], bool]:
    """What `--delete` spares of datasets: here what was unpacked, in the bucket the archives that it was unpacked from, which
    may be the only copy of what is not here any more."""
    kept = {(out if here else archive).name for archive, out in _unpacked()} if place == "datasets" else set[str]()
    return lambda name: name.split("/")[0] in kept


def _unpacked() -> list[tuple[Path, Path]]:
    """The archives of datasets, here or not any more, that were unpacked to folders that are here; and those."""
    markers = sorted(Path("datasets").glob(".*.unpacked"))  # no part of a pattern is a person's
    archives = [marker.with_name(marker.name.removeprefix(".").removesuffix(".unpacked")) for marker in markers]
    pairs = [(archive, archive.with_name(stem(archive.name) or archive.name)) for archive in archives]
    return [(archive, out) for archive, out in pairs if out.is_dir()]


def _tell_of_unpacked(place: str) -> None:
    """A line for each folder of datasets that a push treats in another way than its name says."""
    for archive, out in _unpacked() if place == "datasets" else ():
        known = json.loads(_marker(archive).read_text())
        if not archive.exists():
            told = f"{archive} is not here any more, {out} was unpacked from it"
            print(f"{told}: a push leaves it in the bucket, and sends the folder")
        elif any(known.get(key, count) != count for key, count in _tally(out).items()):  # older ones do not know all of it
            print(f"{out} was unpacked from {archive.name} and has changed: push {place} leaves it out, push {out} sends it")


def _marker(archive: Path) -> Path:
    """Beside an archive that was unpacked: says what it and its folder were."""
    return archive.with_name(f".{archive.name}.unpacked")


def _tally(folder: Path) -> dict[str, int]:
    """How many files a folder has, how many bytes, and when the newest was modified: where these are others than before, it
    was changed."""
    files = [path for path in folder.rglob("*") if not passing(path.relative_to(folder).as_posix()) and not path.is_dir()]
    facts = [path.lstat() for path in files]
    newest = max((fact.st_mtime_ns for fact in facts), default=0)
    return {"files": len(facts), "files_bytes": sum(fact.st_size for fact in facts), "newest_ns": newest}


def _unpack_beside(archive: Path) -> str | None:
    """Unpack `datasets/x.zip` to `datasets/x`, once; gives a line about it, or None where there was nothing to do."""
    name = stem(archive.name) or ""
    out, marker = archive.with_name(name), _marker(archive)
    facts = {"bytes": archive.stat().st_size, "crc32c": file_crc32c(archive)}
    if out.exists():
        if not marker.exists():
            return f"{out} is here already and not from {archive.name}: left as it is"
        if not json.loads(marker.read_text()).items() >= facts.items():
            return f"{archive} has changed since {out} was unpacked: left as it is; remove {out} and bring it again"
        return None
    staged = archive.with_name(f".{name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        count = unpack(archive, staged)
        tops = list(staged.iterdir())
        single = len(tops) == 1 and tops[0].name == name and tops[0].is_dir()
        made = staged / name if single else staged
        write_whole(marker, json.dumps({**facts, **_tally(made)}).encode())
        made.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return f"unpacked {count} files into {out}"


def _told(verb: str, moved: Moved, dry_run: bool) -> str:
    line = f"{'would ' if dry_run else ''}{verb} {moved.files} files, {moved.bytes / 1e6:,.1f} MB; {moved.same} are the same"
    return line + (f"; {'to delete' if dry_run else 'deleted'}: {moved.deleted}" if moved.deleted else "")


def _bring(bucket: Bucket, dry_run: bool) -> int:
    """Gives the exit status: 2 where an archive could not be unpacked, which keeps none of the others back."""
    status = 0
    for place in ("checkpoints", "datasets"):
        with nullcontext() if dry_run else alone(Path(place)):
            try:
                left = list[str]()
                moved = pull(bucket, place, Path(place), dry_run=dry_run, skip=_skip(place), left=left)
                print(f"{place}: {_told('pull', moved, dry_run)}")
                _tell_left(place, left)
            except Empty:
                print(f"{place}: the bucket has none")
            if dry_run or place != "datasets" or not Path(place).is_dir():
                continue
            for archive in sorted(path for path in Path(place).iterdir() if stem(path.name) and path.is_file()):
                try:
                    line = _unpack_beside(archive)
                except UserError as error:
                    anew = "push it anew from where it is whole, or remove it, here and in the bucket"
                    print(f"error: {error}{f'; {anew}' if isinstance(error, Damaged) else ''}", file=sys.stderr)
                    status = 2
                    continue
                if line:
                    print(line)
    return status


def _print_status(bucket: Bucket, places: Sequence[str]) -> None:
    rows = list[tuple[str, Status]]()
    if not places:
        remote = {name: facts for name, facts in bucket.list("runs").items() if not _skip("runs")(name)}
        names = {name.split("/")[0] for name in remote if "/" in name}
        names |= {path.name for path in Path("runs").glob("*") if path.is_dir() and not passing(path.name)}
        for name in sorted(names):
            there = {other.removeprefix(f"{name}/"): facts for other, facts in remote.items() if other.startswith(f"{name}/")}
            rows.append((f"runs/{name}", _compare(Path("runs") / name, there, _skip(f"runs/{name}"))))
    for place in places or ("datasets", "checkpoints"):
        found = status(bucket, place, Path(place), skip=_skip(place))
        if place in places and found == ([], [], [], 0) and not Path(place).exists():
            raise UserError(f"{place} is neither here nor in {bucket.url}; is the name right?")
        rows.append((place, found))
    width = max(len(place) for place, _ in rows)
    print(f"{'':{width}}  {'same':>7}  {'only here':>9}  {'only there':>10}  {'different':>9}")
    for place, found in rows:
        counts = f"{found.same:>7}  {len(found.here):>9}  {len(found.there):>10}  {len(found.different):>9}"
        print(f"{place:{width}}  {counts}")
    for place, _ in rows:
        _tell_of_unpacked(place)
        if Path(place).is_dir():
            left = list[str]()
            _files(Path(place), _skip(place), set(), left)
            _tell_left(place, left)
    for place, found in rows if places else ():
        for label, names in (("only here", found.here), ("only there", found.there), ("different", found.different)):
            for name in names:
                print(f"{label:>10}  {place}/{name}")


def main() -> int:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="./setup.sh", description=__doc__, formatter_class=plain)
    bucket = os.environ.get("ATELIER_BUCKET")
    parser.add_argument("command", choices=("push", "pull", "status", "bring"), help="bring: pull data sets and unpack them")
    parser.add_argument("places", nargs="*", metavar="PLACE", help="a folder such as runs/NAME, or a run's name")
    parser.add_argument("--bucket", default=bucket, metavar="URL", help="gs://NAME[/PREFIX] (default: ATELIER_BUCKET)")
    parser.add_argument("--dry-run", action="store_true", help="say what would move, and move nothing")
    parser.add_argument("--delete", action="store_true", help="delete what is not where it comes from")
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
            options = {"delete": args.delete, "dry_run": args.dry_run, "skip": _skip(place)}
            left = list[str]()
            options["keep"] = _keep(place, here=args.command == "pull")
            if args.command == "push":
                _tell_of_unpacked(place)
                moved = push(bucket, Path(place), place, **options, left=left)
            else:
                with nullcontext() if args.dry_run else alone(Path(place)):
                    moved = pull(bucket, place, Path(place), **options, left=left)
            _tell_left(place, left)
            print(f"{place}: {_told(args.command, moved, args.dry_run)}")
    return 0


if __name__ == "__main__":
    run_script(main)
