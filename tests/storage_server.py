"""A small server that speaks Google storage's JSON protocol, with faults when they are asked for.

In a test: `with StorageServer() as server`, and STORAGE_EMULATOR_HOST=server.url for what shall use it. Beside a shell:
`python -m tests.storage_server PORT FOLDER`, where each folder in FOLDER is a bucket (PORT 0: one that is free, printed).
"""

import base64
import hashlib
import os
import sys
import tempfile
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from tests.storage_protocol import OPERATIONS, Answers, Faults, crc32c


class StorageServer:
    """Objects are files in FOLDER/BUCKET (a temporary one by default), their names quoted; a generation is a file's time.

    `rate` bytes/s is what each connection gets; `page` the most names of one answer to a listing; a bucket in `forbidden`
    answers 403, one in `private` 401.
    """

    def __init__(self, folder: Path | None = None, *, buckets: tuple[str, ...] = ("bucket",), port: int = 0) -> None:
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder or "")
        for name in buckets:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.forbidden, self.private = set[str](), set[str]()
        self.faults = Faults()
        self.requests = list[tuple[str, str]]()  # (operation, name)
        self.page, self.rate = 1000, float("inf")
        self.sessions = dict[str, dict[str, Any]]()  # resumable uploads
        self.lock = threading.Lock()
        self.busy = self._generation = 0
        self._known = dict[tuple[Path, int], dict[str, Any]]()  # a file's hashes
        self._server = Server(("127.0.0.1", port), type("Answers", (Answers,), {"storage": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "StorageServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._temporary:
            self._temporary.cleanup()

    def serve(self) -> None:
        self._server.serve_forever()

    def count(self, *operations: str) -> int:
        """The requests so far of these operations (of OPERATIONS; of all without one)."""
        return sum(operation in (operations or OPERATIONS) for operation, _ in self.requests)

    def forget(self) -> None:
        self.requests.clear()

    def wait_until_idle(self) -> None:
        """Wait until all requests are answered, also those of clients that are gone."""
        count = -1
        while self.busy or len(self.requests) != count:
            count = len(self.requests)
            time.sleep(0.1)

    def objects(self, bucket: str = "bucket") -> dict[str, bytes]:
        with self.lock:
            return {unquote(path.name): path.read_bytes() for path in sorted((self.folder / bucket).iterdir())}

    def put(self, name: str, content: bytes, bucket: str = "bucket") -> dict[str, Any]:
        """Store an object; gives what the protocol says about it."""
        path = self.path(bucket, name)
        staged = self.folder / f".{threading.get_ident()}"
        staged.write_bytes(content)
        with self.lock:
            self._generation = max(self._generation + 1, time.time_ns())
            os.utime(staged, ns=(self._generation, self._generation))
            staged.replace(path)
        about = self.about(bucket, name)
        assert about is not None
        return about

    def remove(self, name: str, bucket: str = "bucket") -> None:
        with self.lock:  # what is being listed is read to its end
            self.path(bucket, name).unlink()

    def path(self, bucket: str, name: str) -> Path:
        return self.folder / bucket / quote(name, safe="")

    def about(self, bucket: str, name: str) -> dict[str, Any] | None:
        path = self.path(bucket, name)
        try:
            generation = path.stat().st_mtime_ns
            known = self._known.get((path, generation))
            if known is None:
                content = path.read_bytes()
                md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
                known = {"size": str(len(content)), "crc32c": crc32c(content), "md5Hash": md5}
                self._known[path, generation] = known
        except FileNotFoundError:
            return None
        return {"kind": "storage#object", "bucket": bucket, "name": name, "generation": str(generation), **known}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    names = () if folder.is_dir() and any(folder.iterdir()) else ("bucket",)
    server = StorageServer(folder, buckets=names, port=int(sys.argv[1]))
    print(server.url, flush=True)
    server.serve()
