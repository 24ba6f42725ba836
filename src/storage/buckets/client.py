"""One bucket: its objects, each write and deletion bound to the generation that was listed; Google's errors in one line.

google-cloud-storage's `transfer_manager` is not used, because its `upload_many` takes one precondition for all files, and its
`download_many` writes into the final file, which a cut connection leaves half-written.
"""

import http.client
import os
import re
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ...config import UserError
from ...config.packages import needed
from ..files import explain_full_disk
from .folders import Remote, check_name, crc32c_of, is_unsafe, join

TIMEOUT = 60.0  # seconds without an answer
TRIES = 6  # in a row that bring no byte
FIRST_DELAY = 1.0  # seconds at most before the second try; doubled up to LAST_DELAY
LAST_DELAY = 16.0
HOW_TO_LOG_IN = "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS=key.json"
CHUNK = 1 << 24  # bytes of an upload in memory, for each job

Advance = Callable[[int], None]  # is called with the bytes that have moved; with a negative number where they move once more


class Empty(UserError):
    """There is nothing to pull."""


class Unreached(UserError):
    """The bucket gives no answer, or cannot answer now."""


class Overwritten(UserError):
    """The generation of an object that was listed is not there any more."""


def _status_code(error: BaseException) -> int | None:
    """The HTTP status that an error of one of Google's libraries stands for."""
    code = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def in_one_line(error: BaseException) -> str:
    """An error in one line. Its cause comes last, so the beginning of a long one is left out."""
    from google.auth.exceptions import GoogleAuthError

    parts = error.args if isinstance(error, GoogleAuthError) else (error,)  # a message, then its cause or an answer's content
    line = ": ".join(str(part).rstrip(".") for part in parts if isinstance(part, str | Exception))
    line = " ".join(line.split()).replace(";", ",")  # our messages say what to do after a semicolon
    line = re.sub(r"^.*\(Caused by (.*)\)$", r"\1", line)
    return line if len(line) <= 200 else f"... {line[-200:]}"


def _is_lost_answer(error: BaseException) -> bool:
    import google.auth.exceptions
    import requests
    import urllib3

    cut = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError, TimeoutError)
    return isinstance(error, (*cut, google.auth.exceptions.TransportError))


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: after 408, 429, 5xx and lost answers."""
    code = _status_code(error)
    return code in (408, 429) or code >= 500 if code else _is_lost_answer(error)


def patience(position: Callable[[], int] = lambda: 0) -> dict[str, Any]:
    """Options of a request: its time limit, and Google's Retry, which repeats what failed for a while, up to TRIES times in
    which `position` has not moved on."""
    from google.api_core.retry import Retry

    furthest, failures = -1, 0

    def is_worth_a_try(error: BaseException) -> bool:
        nonlocal furthest, failures
        if (response := getattr(error, "response", None)) is not None:
            with suppress(Exception):
                response.content  # noqa: B018 (read to its end: the library leaves the connection of a refused download open)
        if not _is_transient(error):
            return False
        reached = position()
        failures = 1 if reached > furthest else failures + 1
        furthest = max(reached, furthest)
        return failures < TRIES

    repeated = Retry(predicate=is_worth_a_try, initial=FIRST_DELAY, maximum=LAST_DELAY, multiplier=2, timeout=None)
    return {"timeout": TIMEOUT, "retry": repeated}


class _Counted:
    """A file that reports the bytes that are read from it or written to it."""

    def __init__(self, file: BinaryIO, advance: Advance) -> None:
        self.tell, self._file, self._advance = file.tell, file, advance

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._advance(len(content))
        return content

    def write(self, content: bytes) -> int:
        self._advance(len(content))
        return self._file.write(content)


class Bucket(AbstractContextManager["Bucket"]):
    """Objects below `gs://NAME/PREFIX`, whose names are relative to that. Every failure is a UserError."""

    def __init__(self, url: str, client: Any, name: str, prefix: str, anonymous: bool) -> None:
        self.url, self.anonymous = url, anonymous
        self._client, self._bucket, self._prefix = client, client.bucket(name), prefix

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _blob(self, name: str, **options: Any) -> Any:
        return self._bucket.blob(join(self._prefix, name), **options)

    @contextmanager
    def _explain(self, name: str, overwritten: str = "") -> Iterator[None]:
        """Around a request about an object, or those below a name: each failure becomes a UserError that says what to do.
        `overwritten` says it where the generation that was listed is not there any more."""
        import google.api_core.exceptions
        import google.auth.exceptions

        where = join(self.url, name)
        try:
            yield
        except Exception as error:
            code, reason = _status_code(error), in_one_line(error)
            refused = code in (401, 403)
            refused_key = isinstance(error, google.auth.exceptions.GoogleAuthError) and not _is_lost_answer(error)
            no_answer = f"no answer after {TRIES} tries ({reason}); run it again later, what has moved is not moved again"
            role = "these credentials may not use it; they need the role roles/storage.objectUser"
            reasons = (  # the first that holds is given
                (overwritten and code in (404, 412), Overwritten, f"{where} {overwritten}"),
                (
                    self.anonymous and (refused_key or refused),
                    UserError,
                    f"{where} is not public, and there are no credentials; give them: {HOW_TO_LOG_IN}",
                ),
                (refused_key, UserError, f"{where}: the credentials are not valid ({reason}); renew them: {HOW_TO_LOG_IN}"),
                (refused, UserError, f"{where}: {role} ({reason})"),
                (code == 404, UserError, f"{self.url}: there is no such bucket; is the name right?"),
                (_is_transient(error), Unreached, f"{where}: {no_answer}"),
                (
                    isinstance(error, google.api_core.exceptions.GoogleAPICallError),
                    UserError,
                    f"{where}: refused ({reason})",
                ),
            )
            mistake = next((kind(message) for holds, kind, message in reasons if holds), None)
            if mistake is None:
                raise
            raise mistake from None

    def list(self, under: str) -> dict[str, Remote]:
        """The objects below `under/`, their names relative to it; an unsafe name is a UserError."""
        prefix = join(self._prefix, under)
        prefix += "/" if prefix else ""
        fields = "items(name,size,crc32c,generation),nextPageToken"
        with self._explain(under):
            pages = self._client.list_blobs(self._bucket, prefix=prefix or None, fields=fields, **patience())
            blobs = [blob for blob in pages if not blob.name.endswith("/")]  # the console makes those to stand for folders
        objects = {blob.name[len(prefix) :]: Remote(blob.size, blob.crc32c, blob.generation) for blob in blobs}
        for name in objects:
            check_name(name, join(self.url, under))
        return objects

    def about(self, name: str) -> Remote | None:
        """One object, or None where there is none."""
        with self._explain(name):
            blob = self._bucket.get_blob(join(self._prefix, name), **patience())
        return None if blob is None else Remote(blob.size, blob.crc32c, blob.generation)

    def put(self, path: Path, name: str, known: Remote | None, advance: Advance = lambda count: None) -> None:
        """Write a file's bytes as they are now to the object that was listed as `known`, or to a new one.

        Somebody else's write in between is a UserError, except where it wrote the same bytes.
        """
        from google.api_core.exceptions import BadRequest, PreconditionFailed
        from google.auth.exceptions import GoogleAuthError

        reason = ""
        for _ in range(TRIES):
            with open(path, "rb") as file, self._explain(name):
                size = os.fstat(file.fileno()).st_size
                blob = self._blob(name, chunk_size=CHUNK)
                blob.crc32c = crc32c = crc32c_of(file, size)  # the service refuses other bytes
                file.seek(0)
                options = {"checksum": None, "if_generation_match": known.generation if known else 0, **patience(file.tell)}
                try:
                    return blob.upload_from_file(_Counted(file, advance), size=size, **options)
                except PreconditionFailed:
                    current = self.about(name)
                    if current is not None and current[:2] == (size, crc32c):
                        return None  # an earlier try had arrived, and its answer had not
                    message = "somebody else has written it since it was listed; look at `status` and push again"
                    raise UserError(f"{join(self.url, name)}: {message}") from None
                except (BadRequest, ValueError) as error:  # other bytes, or fewer, than those whose crc32c was promised
                    if isinstance(error, UserError | GoogleAuthError):
                        raise
                    reason = in_one_line(error)
                    advance(-file.tell())
        raise UserError(f"{path}: the bucket refused it {TRIES} times; is it rewritten all the time? ({reason})")

    def get(self, name: str, remote: Remote, path: Path, advance: Advance = lambda count: None) -> None:
        """Read an object into a file that is whole (size and crc32c) or absent."""
        part = path.with_name(f".bring-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.part")
        blob = self._blob(name, generation=remote.generation)
        gone = "was overwritten or deleted since it was listed; run it again"
        try:
            with explain_full_disk(path):
                for _ in range(TRIES):
                    with open(part, "w+b") as file, self._explain(name, gone):
                        options = {"checksum": None, "raw_download": True, **patience(file.tell)}
                        blob.download_to_file(_Counted(file, advance), **options)
                        file.flush()
                        os.fsync(file.fileno())
                        size = file.seek(0, os.SEEK_END)
                        file.seek(0)
                        crc32c = crc32c_of(file, size)
                    if (size, crc32c) == (remote.size, remote.crc32c):
                        part.replace(path)
                        return
                    advance(-size)
            raise UserError(f"{join(self.url, name)}: it arrived damaged {TRIES} times; run it again, or push it anew")
        finally:
            part.unlink(missing_ok=True)

    def delete(self, name: str, remote: Remote) -> None:
        """Delete the object that was listed. One that is gone already is no error, one that was overwritten is a UserError."""
        from google.api_core.exceptions import NotFound

        with self._explain(name, "was overwritten since it was listed: not deleted"), suppress(NotFound):
            self._blob(name).delete(if_generation_match=remote.generation, **patience())


def open_bucket(url: str) -> Bucket:
    """The bucket of `gs://NAME[/PREFIX]`, to be closed by `with`; no request is made yet.

    Without credentials the bucket is read as a public one. A malformed url and a key that cannot be read are UserErrors.
    """
    matched = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/+(.*?))?/*", url)
    if matched is None:
        name = "; a NAME is of lower-case letters, digits, '-', '_' and '.', three or more" if url.startswith("gs://") else ""
        raise UserError(f"{url!r} is no bucket{name}; write it as gs://NAME or gs://NAME/PREFIX")
    name, prefix = matched[1], matched[2] or ""
    if prefix and is_unsafe(prefix):
        raise UserError(f"{url!r}: {prefix!r} is no folder in the bucket; write it as gs://NAME or gs://NAME/PREFIX")
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")  # it asks for rights on the bucket itself
    with needed(url, "google.cloud.storage", "google_crc32c"):
        import google.auth
        import google_crc32c  # noqa: F401  (compares files)
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import storage

    credentials: Any = None
    if not os.environ.get("STORAGE_EMULATOR_HOST"):
        try:
            with warnings.catch_warnings():  # a user's own credentials name no project to bill: none is needed
                warnings.simplefilter("ignore")
                credentials, _ = google.auth.default(scopes=storage.Client.SCOPE)
        except (DefaultCredentialsError, OSError) as error:
            if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                raise UserError(f"GOOGLE_APPLICATION_CREDENTIALS: {in_one_line(error)}; give it a key file") from None
    client = storage.Client(project=None, credentials=credentials or AnonymousCredentials())
    return Bucket(f"gs://{join(name, prefix)}", client, name, prefix, anonymous=credentials is None)
