"""What Google's libraries raise: which errors are tried again, and what each of them means, in one line."""

import http.client
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ...config import UserError

TIMEOUT = 60.0  # seconds without an answer
TRIES = 6  # in a row that bring no byte
FIRST_DELAY = 1.0  # seconds at most before the second try; doubled up to LAST_DELAY
LAST_DELAY = 16.0
HOW_TO_LOG_IN = "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS=key.json"


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
    """Whether no answer came, or one that was cut."""
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


@contextmanager
def explain(bucket_url: str, where: str, *, anonymous: bool) -> Iterator[None]:
    """Around a request about `where` in the bucket: each failure becomes a UserError that says what to do."""
    import google.api_core.exceptions
    import google.auth.exceptions

    try:
        yield
    except Exception as error:
        code, reason = _status_code(error), in_one_line(error)
        refused_key = isinstance(error, google.auth.exceptions.GoogleAuthError) and not _is_lost_answer(error)
        refused, later = code in (401, 403), "run it again later, what has moved is not moved again"
        explanations = (  # the first that holds is the reason
            (
                anonymous and (refused_key or refused),
                UserError(f"{where} is not public, and there are no credentials; give them: {HOW_TO_LOG_IN}"),
            ),
            (refused_key, UserError(f"{where}: the credentials are not valid ({reason}); renew them: {HOW_TO_LOG_IN}")),
            (
                refused,
                UserError(f"{where}: these credentials may not use it; they need the role roles/storage.objectUser ({reason})"),
            ),
            (code == 404, UserError(f"{bucket_url}: there is no such bucket; is the name right?")),
            (_is_transient(error), Unreached(f"{where}: no answer after {TRIES} tries ({reason}); {later}")),
            (isinstance(error, google.api_core.exceptions.GoogleAPICallError), UserError(f"{where}: refused ({reason})")),
        )
        explanation = next((explanation for holds, explanation in explanations if holds), None)
        if explanation is None:
            raise
        raise explanation from None
