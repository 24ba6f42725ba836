"""What comes from the network, once for each machine: weights in torch's cache, and what the Hugging Face hub has."""

import glob
import http.client
import os
import re
import shlex
import socket
import sys
import time
import urllib.error
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import getproxies

import torch

from ..config import FORBIDDEN, UserError
from ..config.packages import needed
from .files import explain_full_disk, remove_leftovers
from .locks import fcntl

PATIENCE = 15.0  # seconds without an answer, after which there is no network
HEAD_START = 2.0  # seconds that the first rank of a machine has, so that it is the one that fetches and shows its progress
HUB_SECONDS = 120.0  # that the hub may be silent
NOT_THERE = {"RepositoryNotFoundError", "DatasetNotFoundError"}
UNREACHED = {
    *("ConnectError", "ConnectionError", "LocalEntryNotFoundError", "ProxyError", "SSLError", "Timeout", "TimeoutError"),
    *("TimeoutException", "TransportError", "gaierror"),
}


def how_to_bring(url: str, path: Path) -> str:
    """The command that brings a file."""
    folder = shlex.quote(str(path.parent))
    return f"mkdir -p {folder} && wget -P {folder} {shlex.quote(url)}"


def fetch_weights(url: str, path: Path) -> str | None:
    """Bring `url` to `path` in torch's cache, as torchvision does: whole, and with the hash in its name, or not at all.

    One process of a machine fetches it, and the others wait. Gives why the file is not there, or None where it is; a full disk
    is a UserError.
    """
    if path.is_file():
        return None
    address = urllib.parse.urlsplit(url)
    host = address.hostname or ""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and host not in ("127.0.0.1", "localhost"):
        return "HF_HUB_OFFLINE is set"
    first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not first:
            time.sleep(HEAD_START)
        with explain_full_disk(path), _only_download(path.parent):
            if path.is_file():
                return None
            remove_leftovers(path.parent.glob(f"{glob.escape(path.name)}.*.partial"))
            shown = first and sys.stderr.isatty()  # elsewhere a mistake is to be the only line
            if shown:
                print(f"fetching {url} to {path}, once", file=sys.stderr, flush=True)
            named = re.search(r"-([0-9a-f]{8,})\.", path.name)
            torch.hub.download_url_to_file(url, str(path), named[1] if named else None, progress=first)
            if first and not shown:
                print(f"fetched {url} to {path}", file=sys.stderr, flush=True)
        return None
    except urllib.error.HTTPError as error:
        with error:
            return f"{host} answers {error.code} {error.reason}"
    except RuntimeError as error:
        if "hash" not in str(error):
            raise
        return f"what {host} sends is another file than its name promises, or a part of it"
    except (http.client.HTTPException, OSError) as error:  # a URLError is an OSError around its reason
        reason = getattr(error, "reason", error)
        cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        if getattr(reason, "errno", None) in FORBIDDEN:
            return f"{path.parent} cannot be written: {cause}"
        if isinstance(reason, TimeoutError):
            return f"no answer from {host} in {PATIENCE:g} s"
        proxy = " (a proxy is set in the environment)" if address.scheme in getproxies() else ""
        return " ".join(f"{host}: {cause}{proxy}".split())


@contextmanager
def _only_download(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches into this folder; the system drops the lock of a process that dies. Then torch's
    download waits for an answer for a limited time, and not for ever."""
    with ExitStack() as stack:
        if fcntl is not None:  # on Windows there is one process
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            with suppress(OSError):  # a file system without such locks: then several may fetch it, each whole
                fcntl.flock(handle, fcntl.LOCK_EX)
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(PATIENCE)
        yield


def split_revision(name: str) -> tuple[str, str | None]:
    """OWNER/NAME[@REVISION] in its two parts; the revision is a branch, a tag or a commit, None where there is none."""
    repo, _, revision = name.partition("@")
    return repo, revision or None


def is_hub_name(name: str) -> bool:
    """Whether a name that is no folder here may be one on the hub: OWNER/NAME, or a bare NAME, either with @REVISION."""
    name, _ = split_revision(name)
    if not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name or name.startswith("runs/"):
        return False
    return "/" not in name or not Path(name).parent.exists()


def is_on_hub(name: str | Path) -> bool:
    """Whether a name means no path here and may be a run on the hub, OWNER/NAME[@REVISION]."""
    return not Path(name).expanduser().exists() and "/" in split_revision(str(name))[0] and is_hub_name(str(name))


def hub_name_of_url(address: str) -> str | None:
    """The name OWNER/NAME in the address of a page of the hub; None for anything else."""
    match = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", address)
    return match[1] if match is not None else None


def quiet_hub(why: str, *, shown: bool = True) -> None:
    """Import huggingface_hub, and leave what it says at each try to the one message of the caller. Its progress is `shown` in a
    terminal and in a notebook alone. A UserError where the package, which `why` needs, is missing."""
    with needed(why, "huggingface_hub"):
        import huggingface_hub.utils as hub
        import huggingface_hub.utils.logging

    huggingface_hub.utils.logging.set_verbosity_error()
    if hasattr(session := hub.get_session(), "timeout"):
        session.timeout = HUB_SECONDS  # or a connection that hangs would be waited for without end
    is_watched = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
    if not (shown and is_watched):
        hub.disable_progress_bars()


def from_hub(name: str, patterns: Sequence[str]) -> Path:
    """The folder in the cache of the hub with the files of `name` that match; a UserError says why the hub does not give it."""
    quiet_hub(f"{name}, which is no folder here,")
    import huggingface_hub

    repo, revision = split_revision(name)
    options: dict[str, Any] = {"revision": revision} if revision is not None else {}
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(patterns), **options))
    except Exception as error:
        raise UserError(hub_reason(name, error)) from None


class HubFailure(NamedTuple):
    """Why something of the hub failed: the `kinds` of all errors behind it and their bases, by name, what they say, and the
    status of the hub's answer, None where there was none."""

    kinds: set[str]
    text: str
    status: int | None

    @classmethod
    def of(cls, error: BaseException) -> "HubFailure":
        """Libraries wrap the hub's errors in their own, so whatever caused the error counts."""
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        codes = [getattr(getattr(cause, "response", None), "status_code", None) for cause in chain]
        status = next((code for code in codes if isinstance(code, int) and code >= 400), None)
        kinds = {base.__name__ for cause in chain for base in type(cause).__mro__}
        return cls(kinds, " ".join(str(cause) for cause in chain), status)

    @property
    def is_offline(self) -> bool:
        """Whether a variable of the environment keeps the hub from being asked."""
        return "OfflineModeIsEnabled" in self.kinds or "offline mode" in self.text.lower()


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def hub_reason(name: str, error: BaseException, kind: str = "model") -> str:
    """Why the Hugging Face hub did not give the `kind` (model or dataset) `name`, and how to go on, in one line.

    It tells apart: the hub was not reached; it has no such repository, or no such revision of it; it wants a login; it answered
    with another error. Anything else is given in its own words.
    """
    words, text, status = failure = HubFailure.of(error)
    option, folder = (" --repo-type dataset", "datasets/") if kind == "dataset" else ("", "")
    hub, missing = "the Hugging Face hub", f"the cache of this machine does not have {name}"
    name, revision = split_revision(name)
    option += f" --revision {revision}" if revision is not None else ""
    fetch = f"where there is a network: hf download{option} {name} --local-dir FOLDER, then give the path of that FOLDER here"
    no_name = "HFValidationError" in words or (words & NOT_THERE and (name[:1] in ("/", ".", "~") or name.count("/") > 1))
    login = "log in with: hf auth login"
    reasons = (  # the first that holds is the reason
        (
            "GatedRepoError" in words or "is a gated" in text,
            f"on {hub} {name} is gated: accept its conditions at https://huggingface.co/{folder}{name}, then {login}",
        ),
        (
            "RevisionNotFoundError" in words,
            f"on {hub} {name} has no revision {revision or 'main'}: give one of its branches, tags or commits, or leave it out",
        ),
        (no_name, f"{name} is no folder that is here, and no name on {hub}, which is OWNER/NAME; check it"),
        (
            words & NOT_THERE or status == 404,
            f"{hub} has no {kind} {name}, or it is private: check the name, or, where it is private, {login}",
        ),
        (
            status in (401, 403),
            f"{hub} does not let you read {name} (status {status}): log in with a valid token: hf auth login",
        ),
        (status, f"{hub} answered with an error (status {status}) for {name}; try again later, or, {fetch}"),
        (
            failure.is_offline,
            f"{hub} was not reached, since HF_HUB_OFFLINE (or a variable like it) is set, and {missing}; unset the variable, "
            f"or, {fetch}",
        ),
        (words & UNREACHED, f"{hub} was not reached, and {missing}; {fetch}"),
    )
    return next((reason for holds, reason in reasons if holds), first_line(error))
