"""Weights that are fetched once and whole, and who fetches them."""

import errno
import hashlib
import io
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from src import losses
from src.config import UserError
from src.losses import Perceptual, PerceptualConfig
from src.metrics import features
from src.metrics.features import open_features
from src.models.pretrained import import_torchvision
from src.storage import downloads
from src.storage.downloads import fetch_weights, how_to_bring


class Server(ThreadingHTTPServer):
    """Serves `files`, each with a status; keeps the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, tuple[int, bytes]] = {}
        self.requests: list[str] = []
        self.wait = 0.0

    def url(self, name: str, content: bytes = b"", status: int = 200) -> str:
        self.files[f"/{name}"] = (status, content)
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        time.sleep(self.server.wait)
        status, content = self.server.files[self.path]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with Server() as started:
        thread = threading.Thread(target=started.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


def named(content: bytes, name: str = "net") -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_weights_are_fetched_once_and_whole(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = os.urandom(300_000)
    name = named(content)
    url, path = server.url(name, content), tmp_path / "deep" / "cache" / name
    assert fetch_weights(url, path) is None and path.read_bytes() == content
    output = capsys.readouterr()
    assert f"fetched {url} to {path}" in output.err and "100%" in output.err and not output.out, "--json stays JSON"
    assert fetch_weights(url, path) is None and len(server.requests) == 1 and left(path.parent) == [name]


def test_one_process_fetches_and_the_others_wait(server: Server, tmp_path: Path) -> None:
    content, server.wait = b"weights" * 1000, 0.3
    name = named(content)
    url, path = server.url(name, content), tmp_path / name
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda _: fetch_weights(url, path), range(6))) == [None] * 6
    assert server.requests == [f"/{name}"] and left(tmp_path) == [name]


def test_the_other_ranks_give_the_first_one_a_start_and_say_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert fetch_weights(server.url(named(b"a"), b"a"), tmp_path / named(b"a")) is None
    assert downloads.HEAD_START in slept and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [(200, b"a login page", "another file than its name promises"), (404, b"", "answers 404"), (503, b"", "answers 503")],
)
def test_what_is_not_the_file_is_refused_and_nothing_stays(
    server: Server, tmp_path: Path, status: int, content: bytes, message: str
) -> None:
    name = named(b"the weights")
    reason = fetch_weights(server.url(name, content, status), tmp_path / name)
    assert reason is not None and message in reason and "\n" not in reason and left(tmp_path) == []


def test_without_a_network_it_is_said_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(downloads, "PATIENCE", 0.2)
    began, before = time.monotonic(), socket.getdefaulttimeout()
    with socket.socket() as nobody:  # takes connections and never answers
        nobody.bind(("127.0.0.1", 0))
        nobody.listen()
        port = nobody.getsockname()[1]
        assert fetch_weights(f"http://127.0.0.1:{port}/a.pth", tmp_path / "a.pth") == "no answer from 127.0.0.1 in 0.2 s"
    refused = fetch_weights(f"http://127.0.0.1:{port}/a.pth", tmp_path / "a.pth")
    assert refused is not None and "refused" in refused
    nowhere = fetch_weights("http://nowhere.invalid/a.pth", tmp_path / "a.pth")
    assert nowhere is not None and nowhere.startswith("nowhere.invalid: ")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(urllib.request, "_opener", None)
    reason = fetch_weights("http://nowhere.invalid/a.pth", tmp_path / "a.pth")
    assert reason is not None and reason.endswith("refused (a proxy is set in the environment)"), reason
    assert time.monotonic() - began < 30 and socket.getdefaulttimeout() == before and left(tmp_path) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_weights("https://nowhere.invalid/a.pth", tmp_path / "a.pth") == "HF_HUB_OFFLINE is set"


def test_a_disk_that_is_full_or_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match="the disk is full"):
        fetch_weights("https://nowhere.invalid/a.pth", tmp_path / "a.pth")
    (tmp_path / "file").write_bytes(b"")
    reason = fetch_weights("https://nowhere.invalid/a.pth", tmp_path / "file" / "a.pth")
    assert reason is not None and "cannot be written" in reason


def test_parts_of_downloads_that_were_killed_long_ago_are_removed(server: Server, tmp_path: Path) -> None:
    name = named(b"a")
    for part, age in (("old", 4000), ("new", 0)):
        file = tmp_path / f"{name}.{part}.partial"
        file.write_bytes(b"half")
        os.utime(file, (time.time() - age,) * 2)
    fetch_weights(server.url(name, b"a"), tmp_path / name)
    assert left(tmp_path) == [name, f"{name}.new.partial"]


def test_the_command_can_be_pasted() -> None:
    assert how_to_bring("https://x/a.pth", Path("/my cache/a.pth")) == (
        "mkdir -p '/my cache' && wget -P '/my cache' https://x/a.pth"
    )


def test_lpips_fetches_its_backbone(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = import_torchvision().models.squeezenet1_1(weights=None)
    with io.BytesIO() as file:
        torch.save(network.state_dict(), file)
        content = file.getvalue()
    name = named(content, "squeezenet1_1")
    monkeypatch.setattr(losses, "imagenet_weights", lambda _: (tmp_path / name, server.url(name, content)))
    perceptual = Perceptual(PerceptualConfig(network="squeeze"))
    wanted = network.state_dict()["features.0.weight"]
    assert torch.equal(perceptual.network.net.state_dict()["slice1.0.weight"], wanted)
    (tmp_path / name).unlink()
    monkeypatch.setattr(losses, "imagenet_weights", lambda _: (tmp_path / name, server.url(name, b"", 404)))
    with pytest.raises(UserError) as raised:
        Perceptual(PerceptualConfig(network="squeeze"))
    message = str(raised.value)
    assert "127.0.0.1 answers 404" in message and f"wget -P {tmp_path} http://127.0.0.1" in message and "\n" not in message
    server.requests.clear()
    with pytest.raises(UserError, match="perceptual.weights names no file"):
        Perceptual(PerceptualConfig(network="squeeze", weights=str(tmp_path / "mine.pth")))
    assert not server.requests, "a file that was named is not fetched"


def test_inception_is_fetched(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"no network, but what the name promises"
    name = named(content, "weights-inception-2015-12-05")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features, "INCEPTION_URL", server.url(name, content))
    with pytest.raises(UserError, match="is damaged, or holds no weights"):
        open_features("inception")
    assert (tmp_path / "checkpoints" / name).read_bytes() == content and server.requests == [f"/{name}"]
    (tmp_path / "checkpoints" / name).unlink()
    server.url(name, b"wrong")
    with pytest.raises(UserError, match="another file than its name promises"):
        open_features("inception")
    assert left(tmp_path / "checkpoints") == []
