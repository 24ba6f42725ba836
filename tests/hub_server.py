"""A small server that speaks what huggingface_hub asks of the Hugging Face hub, with faults when they are asked for.

`with HubServer() as server`, and HF_ENDPOINT=server.url for what shall use it (in this process: the fixture `hub`).
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.storage_protocol import Answers, Cut, Faults
from tests.storage_server import Server

TOKEN, READS_ONLY = "hf_secretofmine", "hf_secretthatreads"
LARGE = 1 << 16  # from so many bytes on a file is large, and is uploaded by itself
READ_TIME = 20  # seconds after which a connection that says nothing is given up


@dataclass
class Repo:
    """`branches` are commits by name; a commit is (message, files by name). `private` is answered 401 without a token."""

    private: bool = False
    commits: dict[str, tuple[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = (message, files), sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer:
    """Repositories of models in memory. TOKEN may write to those of `me`, READS_ONLY reads."""

    def __init__(self) -> None:
        self.repos, self.large = dict[str, Repo](), dict[str, bytes]()
        self.faults, self.lock, self.busy, self.rate = Faults(), threading.Lock(), 0, float("inf")
        self.requests, self.bodies = list[tuple[str, str]](), list[bytes]()  # (operation, name); all that was received
        self.tokens = {TOKEN: "write", READS_ONLY: "read"}
        self._server = Server(("127.0.0.1", 0), type("HubAnswers", (HubAnswers,), {"storage": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def make(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repo:
        """A repository, as the hub makes it: with one file in a first commit."""
        repo = self.repos[name] = Repo(private)
        repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return repo

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What the branch holds, without what the hub put there itself."""
        repo = self.repos[name]
        return {path: content for path, content in repo.commits[repo.branches[branch]][1].items() if path != ".gitattributes"}

    def messages(self, name: str) -> list[str]:
        """The messages of the commits after the first one."""
        return [message for message, _ in self.repos[name].commits.values()][1:]

    def count(self, operation: str) -> int:
        return sum(done == operation for done, _ in self.requests)


class HubAnswers(Answers):
    timeout = READ_TIME
    content = b""

    def do_HEAD(self) -> None:
        self._handle()

    def _say(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, document: Any, status: int = 200) -> None:
        self._say(status, json.dumps(document).encode(), Content_Type="application/json")

    def _refuse(self, status: int, why: str, code: str = "") -> None:
        self._say(status, json.dumps({"error": why}).encode(), X_Error_Message=why, **({"X_Error_Code": code} if code else {}))

    def _route(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), dict(parse_qsl(url.query))
        operation, name, rest = _operation(self.command, path)
        fault = self.storage.faults.draw(operation, name or path)
        kind = fault.kind if fault is not None else None
        length = int(self.headers.get("Content-Length", 0))
        if kind == "cut" and self.command != "GET":
            self._body(length // 2)
            raise Cut
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.content = b"".join(iter(self._chunk_of_body, b""))
        else:
            self.content = self._body(length)
        with self.storage.lock:
            self.storage.requests.append((operation, name or path))
            self.storage.bodies.append(self.content)
        if isinstance(kind, int):
            return self._refuse(kind, "a fault that was asked for")
        self.is_cut = kind == "cut"
        return self._serve(operation, name, rest, query)

    def _chunk_of_body(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0], 16)
        piece = self.rfile.read(size)
        self.rfile.readline()
        return piece

    def _serve(self, operation: str, name: str, rest: str, query: dict[str, str]) -> None:
        server: HubServer = self.storage
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        rights = server.tokens.get(token)
        if operation == "put":  # to the storage behind the hub, which wants no token
            server.large[rest] = self.content
            return self._say(200)
        if token and rights is None:
            return self._refuse(401, "Invalid credentials in Authorization header")
        if operation == "validate":
            return self._json({"errors": [], "warnings": []})
        if operation == "create":
            document = json.loads(self.content)
            if rights is None:
                return self._refuse(401, "Unauthorized")
            owner, short = document["organization"] or "me", document["name"]
            name = f"{owner}/{short}"
            if owner != "me" or rights != "write":
                return self._refuse(403, "you have no right to make it")
            if name not in server.repos:
                server.make(name, private=document.get("visibility") == "private")
                return self._json({"url": f"{server.url}/{name}"})
            return self._json({"url": f"{server.url}/{name}"}, 409)
        repo = server.repos.get(name)
        if repo is None or (repo.private and rights is None):
            return self._refuse(404 if rights else 401, "Repository not found", "RepoNotFound")
        if self.command in ("POST", "PUT") and (rights != "write" or not name.startswith("me/")):
            return self._refuse(403, "Forbidden: you must have write access")
        if operation == "large":
            wanted = json.loads(self.content)["objects"]
            missing = [each for each in wanted if each["oid"] not in server.large]
            actions = {each["oid"]: {"upload": {"href": f"{server.url}/lfs/{each['oid']}"}} for each in missing}
            return self._json({"objects": [{**each, **_if(each["oid"] in actions, actions=actions.get(each["oid"]))}
                                           for each in wanted]})  # fmt: skip
        if operation == "branch":
            if rest in repo.branches:
                return self._refuse(409, "Reference already exists")
            repo.branches[rest] = repo.branches["main"]
            return self._json({})
        revision, _, file = rest.partition("/") if operation == "file" else (rest, "", "")
        sha = repo.find(revision or "main")
        if sha is None:
            return self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        _, files = repo.commits[sha]
        if operation == "info":
            return self._json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": []})
        if operation == "tree":
            return self._json([_entry(path, content) for path, content in sorted(files.items())])
        if operation == "preupload":
            wanted = json.loads(self.content)["files"]
            modes = [{"path": each["path"], "shouldIgnore": False, "uploadMode": "lfs" if each["size"] >= LARGE else "regular",
                      **_if(each["path"] in files, oid=_entry(each["path"], files.get(each["path"], b""))["oid"])}
                     for each in wanted]  # fmt: skip
            return self._json({"files": modes})
        if operation == "commit":
            return self._commit(repo, name, revision or "main", sha, dict(files))
        if operation == "file":
            if file not in files:
                return self._refuse(404, f"no {file}", "EntryNotFound")
            return self._file(sha, files[file])
        return self._refuse(404, f"nothing is served at {self.path}")

    def _commit(self, repo: Repo, name: str, branch: str, head: str, files: dict[str, bytes]) -> None:
        message = ""
        for line in self.content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", head) != head:
                    return self._refuse(412, "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.storage.large[value["oid"]]
            else:
                del files[value["path"]]
        sha = repo.commit(branch, message, files)
        return self._json({"commitUrl": f"{self.storage.url}/{name}/commit/{sha}", "commitOid": sha})

    def _file(self, sha: str, content: bytes) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.is_cut and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            raise Cut
        begins = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = {"X_Repo_Commit": sha, "ETag": etag}
        if begins is not None:
            start = int(begins[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._say(206, content[start:], **headers)
        return self._say(200, content, **headers)


def _if(holds: bool, **values: Any) -> dict[str, Any]:
    return values if holds else {}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _operation(command: str, path: str) -> tuple[str, str, str]:
    """(operation, repository, the rest of the path) of a request."""
    patterns = {
        "create": r"/api/repos/create()()",
        "validate": r"/api/validate-yaml()()",
        "put": r"/lfs/()(\w+)",
        "large": r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch()",
        "tree": r"/api/models/([^/]+/[^/]+)/tree/([^/]+)",
        "preupload": r"/api/models/([^/]+/[^/]+)/preupload/(.+)",
        "commit": r"/api/models/([^/]+/[^/]+)/commit/(.+)",
        "branch": r"/api/models/([^/]+/[^/]+)/branch/(.+)",
        "info": r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?",
        "file": r"/([^/]+/[^/]+)/resolve/(.+)",
    }
    for operation, pattern in patterns.items():
        if (matched := re.fullmatch(pattern, path)) is not None:
            return operation, matched[1], matched[2] or ""
    return command.lower(), "", path
