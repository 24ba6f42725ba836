"""A server of buckets, a bucket in it, a run folder, and a project folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from src.storage.buckets import Bucket, client, open_bucket
from tests.storage.bucket_files import small, write
from tests.storage_server import StorageServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageServer]:
    with StorageServer() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setattr(client, "FIRST_DELAY", 0.01)
        monkeypatch.setattr(client, "LAST_DELAY", 0.05)
        yield server


@pytest.fixture
def bucket(server: StorageServer) -> Iterator[Bucket]:
    with open_bucket("gs://bucket/mine") as bucket:
        yield bucket


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write(tmp_path / "run", small())


@pytest.fixture
def project(server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATELIER_BUCKET", "gs://bucket")
    return tmp_path
