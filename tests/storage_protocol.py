"""Answers in Google storage's JSON protocol, and the faults that they meet on request."""

import base64
import contextlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import google_crc32c

BLOCK = 1 << 16
OPERATIONS = ("list", "about", "download", "delete", "upload", "start", "chunk")


@dataclass
class Fault:
    """`kind` is an HTTP status, `cut` (the connection ends in the middle of the body), `lost` (all is done, and the answer
    never comes), `corrupt` (a byte of the body, sent or received, is another) or `slow` (it takes `seconds` to answer).

    It meets requests whose `OPERATION NAME` matches `where` (a regular expression), `times` times, each with `chance`.
    """

    kind: int | str
    where: str = ""
    times: int = 1
    seconds: float = 0.5
    chance: float = 1.0


class Faults:
    """Faults in a queue: a request meets the first that matches. The chance of the n-th request of an operation and a name is
    a function of `seed`, in whatever order threads ask."""

    def __init__(self) -> None:
        self.waiting = list[Fault]()
        self.met = Counter[int | str]()
        self.seed, self._requests, self._lock = 0, Counter[str](), threading.Lock()

    def add(self, kind: int | str, where: str = "", *, times: int = 1, seconds: float = 0.5, chance: float = 1.0) -> None:
        self.waiting.append(Fault(kind, where, times, seconds, chance))

    def draw(self, operation: str, name: str) -> Fault | None:
        request = f"{operation} {name}"
        with self._lock:
            self._requests[request] += 1
            rng = random.Random(f"{self.seed} {request} {self._requests[request]}")
            for fault in self.waiting:
                if fault.times and re.search(fault.where, request) and rng.random() < fault.chance:
                    fault.times -= 1
                    self.met[fault.kind] += 1
                    return fault
        return None


def crc32c(content: bytes) -> str:
    return base64.b64encode(struct.pack(">I", google_crc32c.value(content))).decode()


def _corrupted(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


class Cut(Exception):
    """The connection ends here."""


class Answers(BaseHTTPRequestHandler):
    storage: Any  # a StorageServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, format: str, *args: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _pace(self, count: int, began: float) -> None:
        wait = began + count / self.storage.rate - time.monotonic()
        if wait > 0:
            time.sleep(wait)

    def _body(self, wanted: int, content: bytes = b"") -> bytes:
        """`content` and as much more of the request's body as is `wanted`."""
        body, began = bytearray(content), time.monotonic()
        while len(body) < wanted:
            piece = self.rfile.read(min(BLOCK, wanted - len(body)))
            if not piece:
                raise Cut
            body += piece
            self._pace(len(body), began)
        return bytes(body)

    def _answer(self, status: int, document: Any = None, **headers: str) -> None:
        content = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, why: str) -> None:
        self._answer(status, {"error": {"code": status, "message": why, "errors": [{"message": why, "reason": why}]}})

    def _handle(self) -> None:
        with self.storage.lock:
            self.storage.busy += 1
        try:
            self._route()
        except (Cut, ConnectionError, TimeoutError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            with self.storage.lock:
                self.storage.busy -= 1

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _route(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        matched = re.fullmatch(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
        length = int(self.headers.get("Content-Length", 0))
        content = self._body(min(length, 4096))
        if matched is None:
            return self._refuse(404, f"nothing is served at {url.path}")
        way, bucket, name = matched[1], unquote(matched[2]), unquote(matched[3] or query.get("name", ""))
        if way == "upload":
            operation = {"multipart": "upload", "resumable": "start"}.get(query.get("uploadType", ""), "upload")
            if "upload_id" in query:
                operation, name = "chunk", self.storage.sessions.get(query["upload_id"], {}).get("name", "")
            else:
                named = re.search(rb'"name": *"((?:[^"\\]|\\.)*)"', content)
                name = json.loads(b'"' + named[1] + b'"') if named else name
        elif self.command == "DELETE":
            operation = "delete"
        elif not name:
            operation = "list"
        else:
            operation = "download" if way == "download" or query.get("alt") == "media" else "about"
        fault = self.storage.faults.draw(operation, name)
        kind = fault.kind if fault else None
        if kind == "cut" and operation != "download":
            self._body(length // 2, content)
            raise Cut
        content, head = self._body(length, content), {}
        if operation == "upload":
            head, content = self._parts(content)
        elif operation == "start":
            head = json.loads(content)
        if kind == "corrupt" and operation in ("upload", "chunk") and content:
            content = _corrupted(content)
        self.storage.requests.append((operation, name or query.get("prefix", "")))
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        if isinstance(kind, int):
            return self._refuse(kind, "a fault that was asked for")
        if bucket in self.storage.private:
            return self._refuse(401, "Anonymous caller does not have storage.objects.list access")
        if bucket in self.storage.forbidden:
            return self._refuse(403, "the caller does not have storage.objects.list access")
        if not (self.storage.folder / bucket).is_dir():
            return self._refuse(404, "The specified bucket does not exist.")
        self._lost = kind == "lost"
        if operation == "list":
            return self._list(bucket, query)
        if operation == "start":
            session = f"{len(self.storage.sessions)}-{time.time_ns()}"
            self.storage.sessions[session] = {"name": name, "head": head, "query": query, "content": bytearray(), "done": None}
            where = f"{self.storage.url}/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable&upload_id={session}"
            return self._answer(200, {}, Location=where)
        if operation == "chunk":
            return self._chunk(bucket, query["upload_id"], content)
        if operation == "upload":
            self._store(bucket, name, content, head, query)
            return None
        about = self.storage.about(bucket, name)
        if about is None or query.get("generation", about["generation"]) != about["generation"]:
            return self._refuse(404, f"No such object: {bucket}/{name}")
        if query.get("ifGenerationMatch", about["generation"]) != about["generation"]:
            return self._refuse(412, "At least one of the pre-conditions you specified did not hold.")
        if operation == "about":
            return self._answer(200, about)
        if operation == "delete":
            self.storage.remove(name, bucket)
            if self._lost:
                raise Cut
            return self._answer(204)
        return self._download(about, self.storage.path(bucket, name).read_bytes(), kind)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, after = query.get("prefix", ""), query.get("pageToken", "")
        names = sorted(unquote(path.name) for path in (self.storage.folder / bucket).iterdir())
        names = [name for name in names if name.startswith(prefix) and name > after]
        page = names[: min(self.storage.page, int(query.get("maxResults", self.storage.page)))]
        document: dict[str, Any] = {"items": [about for name in page if (about := self.storage.about(bucket, name))]}
        if len(page) < len(names):
            document["nextPageToken"] = page[-1]
        self._answer(200, document)

    def _parts(self, body: bytes) -> tuple[dict[str, Any], bytes]:
        """The metadata and the bytes of a multipart/related body."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary is not None
        mark = b"--" + boundary[1].encode()
        _, first, rest = body.split(mark, 2)
        content = rest.split(b"\r\n\r\n", 1)[1]
        return json.loads(first.split(b"\r\n\r\n", 1)[1]), content[: content.rindex(b"\r\n" + mark + b"--")]

    def _store(self, bucket: str, name: str, content: bytes, head: dict[str, Any], query: dict[str, str]) -> dict | None:
        before = self.storage.about(bucket, name)
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and wanted != (before["generation"] if before else "0"):
            self._refuse(412, "At least one of the pre-conditions you specified did not hold.")
            return None
        if head.get("crc32c", crc32c(content)) != crc32c(content):
            self._refuse(400, "Provided CRC32C does not match calculated CRC32C")
            return None
        about = self.storage.put(name, content, bucket)
        if self._lost:
            raise Cut
        self._answer(200, about)
        return about

    def _chunk(self, bucket: str, upload: str, content: bytes) -> None:
        session = self.storage.sessions.get(upload)
        matched = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        if session is None or matched is None:
            return self._refuse(410 if session is None else 400, "no such upload")
        if session["done"]:
            return self._answer(200, session["done"])
        have: bytearray = session["content"]
        if matched[1] is not None:
            start = int(matched[1])
            if start > len(have):
                return self._refuse(503, "there is a gap before these bytes")
            have[start:] = content
        if matched[2] != "*" and len(have) == int(matched[2]):
            session["done"] = self._store(bucket, session["name"], bytes(have), session["head"], session["query"])
            return None
        return self._answer(308, None, **({"Range": f"bytes=0-{len(have) - 1}"} if have else {}))

    def _download(self, about: dict[str, Any], content: bytes, kind: int | str | None) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        end = min(int(wanted[2]) + 1, len(content)) if wanted and wanted[2] else len(content)
        if wanted and start >= len(content):
            return self._refuse(416, "the range begins behind the end")
        body = content[start:end]
        if kind == "corrupt" and body:
            body = _corrupted(body)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Goog-Generation", about["generation"])
        self.send_header("X-Goog-Hash", f"crc32c={about['crc32c']},md5={about['md5Hash']}")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        last, began = len(body) // 2 if kind == "cut" else len(body), time.monotonic()
        for at in range(0, last, BLOCK):
            self.wfile.write(body[at : min(at + BLOCK, last)])
            self._pace(at + BLOCK, began)
        if kind == "cut":
            raise Cut
        return None
