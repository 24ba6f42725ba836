"""Weights that are fetched into the cache of torch, once for each machine; and weights read from files."""

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
        with _one_process_at_a_time(path.parent):
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
        cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        proxy = " (a proxy is set in the environment)" if urllib.parse.urlsplit(url).scheme in getproxies() else ""
        return " ".join(f"{host}: {cause}{proxy}".split())


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches into this folder. The system drops the lock of a process that dies."""
    try:
        import fcntl
    except ImportError:  # Windows: there is one process
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without such locks: then several may fetch it, each whole
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sweep(path: Path) -> None:
    """Remove what downloads that were killed left behind, an hour ago or more."""
    for part in path.parent.iterdir():
        if part.name.startswith(f"{path.name}.") and part.name.endswith(".partial"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > 3600:
                    part.unlink()


@contextmanager
def _limited_wait() -> Iterator[None]:
    """Around torch's download, which would wait for ever for a network that gives no answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_weights(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file; a UserError begins with `key`, the part of the config that wants them."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{key}: there is no file {path}") from None
    except Exception:  # the libraries raise anything for bytes that are no weights
        raise UserError(f"{key}: {path} is damaged, or holds no weights; get it again") from None
    if isinstance(weights, dict):
        check_finite(weights, f"{key}: {path}", "get the file again")
    return weights


def put_weights(network: torch.nn.Module, weights: dict[str, Tensor], path: Path, key: str) -> None:
    """Load all of a network's weights, or a UserError."""
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"{key}: {path} holds the weights of another network") from None
