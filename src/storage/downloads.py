"""Weights are fetched into the cache of torch once for each machine; why the Hugging Face hub gives nothing, in words."""

import http.client
import os
import re
import shlex
import socket
import sys
import time
import urllib.error
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import torch
from torch import Tensor

from ..config import FORBIDDEN, FULL, UserError
from .finite import check_finite

PATIENCE = 15.0  # seconds without an answer, after which there is no network


HEAD_START = 2.0  # seconds that the first rank of a machine has, so that it is the one that fetches and shows its progress


def how_to_bring(url: str, path: Path) -> str:
    """The command that brings a file."""
    folder = shlex.quote(str(path.parent))
    return f"mkdir -p {folder} && wget -P {folder} {shlex.quote(url)}"


def fetch_weights(url: str, path: Path) -> str | None:
    """Bring `url` to `path` in torch's cache, as torchvision does: whole, and with the hash in its name, or not at all.

    One process of a machine fetches it and the others wait for it. Gives None when the file is there, else why it is not, in
    words; a full disk is a UserError.
    """
    if path.is_file():
        return None
    host = urllib.parse.urlsplit(url).hostname or ""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and host not in ("127.0.0.1", "localhost"):
        return "HF_HUB_OFFLINE is set"
    first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not first:
            time.sleep(HEAD_START)
        with _alone(path.parent):
            if path.is_file():
                return None
            _sweep(path)
            shown = first and sys.stderr.isatty()  # elsewhere a mistake is to be the only line
            if shown:
                print(f"fetching {url} to {path}, once", file=sys.stderr, flush=True)
            named = re.search(r"-([0-9a-f]{8,})\.", path.name)
            with _limited_wait():
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
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, OSError) and reason.errno in FULL:
            raise UserError(f"the disk is full: {path} was not written; make room and run the same command again") from None
        if isinstance(reason, OSError) and reason.errno in FORBIDDEN:
            return f"{path.parent} cannot be written: {reason.strerror}"
        if isinstance(reason, TimeoutError):
            return f"no answer from {host} in {PATIENCE:g} s"
        told = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        by = " (a proxy is set in the environment)" if urllib.parse.urlsplit(url).scheme in getproxies() else ""
        return " ".join(f"{host}: {told}{by}".split())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches into this folder, and keep them waiting. The kernel drops the lock when one dies."""
    try:
        import fcntl
    except ImportError:  # Windows: there is one process
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without such locks: then several may fetch it, each whole
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _sweep(path: Path) -> None:
    """Remove what downloads that were killed left behind, an hour ago or more."""
    for part in path.parent.iterdir():
        if part.name.startswith(f"{path.name}.") and part.name.endswith(".partial"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > 3600:
                    part.unlink()


@contextmanager
def _limited_wait() -> Iterator[None]:
    """torch waits for ever for a network that swallows what it is sent."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_weights(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file; a UserError that begins with `key`, who wants them."""
    found: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{key}: there is no file {path}") from None
    except Exception:  # whatever they say of bytes that are no weights
        raise UserError(f"{key}: {path} is damaged, or holds no weights; get it again") from None
    if isinstance(found, dict):
        check_finite(found, f"{key}: {path}", "get the file again")
    return found


def put_weights(network: torch.nn.Module, weights: dict[str, Tensor], path: Path, key: str) -> None:
    """Load all of a network's weights, or a UserError."""
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"{key}: {path} holds the weights of another network") from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def hub_reason(name: str, error: BaseException, kind: str = "model") -> str:
    """Why the Hugging Face hub did not give the `kind` (model or dataset) `name`, and how to go on, in one line.

    Libraries wrap the hub's errors in their own, so whatever caused the error counts. It tells apart: the hub was not reached;
    it has no such repository; it wants a login; it answered with another error. Anything else is given in its own words.
    """
    chain = list(_causes(error))
    words = {base.__name__ for cause in chain for base in type(cause).__mro__}
    text = " ".join(str(cause) for cause in chain)
    status = next((code for cause in chain if (code := _status(cause)) is not None), None)
    option = " --repo-type dataset" if kind == "dataset" else ""
    fetch = f"where there is a network: hf download{option} {name} --local-dir FOLDER, then give the path of that FOLDER here"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    if "GatedRepoError" in words or "is a gated" in text:
        return f"on the Hugging Face hub {name} is gated: accept its conditions at {page}, then log in with: hf auth login"
    if "HFValidationError" in words or (words & NOWHERE and (name[:1] in ("/", ".", "~") or name.count("/") > 1)):
        return f"{name} is no folder that is here, and no name on the Hugging Face hub, which is OWNER/NAME; check it"
    if words & NOWHERE or status == 404:
        return (
            f"the Hugging Face hub has no {kind} {name}, or it is private: check the name, or, where it is private, log in "
            "with: hf auth login"
        )
    if status in (401, 403):
        return f"the Hugging Face hub does not let you read {name} (status {status}): log in with a valid token: hf auth login"
    if status is not None:
        return f"the Hugging Face hub answered with an error (status {status}) for {name}; try again later, or, {fetch}"
    if "OfflineModeIsEnabled" in words or "offline mode" in text.lower():
        return (
            "the Hugging Face hub was not reached, since HF_HUB_OFFLINE (or a variable like it) is set, and the cache of this "
            f"machine does not have {name}; unset the variable, or, {fetch}"
        )
    unreached = {"LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException", "TransportError", "Timeout"}
    if words & {*unreached, "TimeoutError", "gaierror", "SSLError", "ProxyError"}:
        return f"the Hugging Face hub was not reached, and the cache of this machine does not have {name}; {fetch}"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


NOWHERE = {"RepositoryNotFoundError", "DatasetNotFoundError"}


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) and code >= 400 else None
