"""The transfer to and from the hub: what arrives, what is kept there, and the line where it fails."""

import json
import os
import re
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from pydantic import ValidationError

from src.config import UserError
from src.storage import downloads
from src.storage.downloads import from_hub, is_hub_name, is_on_hub, split_revision
from src.storage.hub import HubConfig, forget, is_signed, local_path, push_files, sign
from tests.hub_server import LARGE, READS_ONLY, TOKEN, HubServer

LARGE_FILE = bytes(range(256)) * (LARGE // 256 + 1)
FILES = {"ema.safetensors": LARGE_FILE, "config.json": b"{}"}
MANIFEST = json.dumps({"files": {name: {} for name in FILES}}).encode()
CARD = "---\ntags: [atelier]\n---\n\n# cats\n"


def push(name: str = "me/cats", card: str = CARD, **options: bool) -> str:
    return push_files(name, {**FILES, "MANIFEST.json": MANIFEST}, card, message="a push", **options).address


def refused(name: str = "me/cats") -> str:
    with pytest.raises(UserError) as raised:
        push(name)
    assert "\n" not in str(raised.value) and TOKEN not in str(raised.value)
    return str(raised.value)


def test_names() -> None:
    assert split_revision("me/cats") == ("me/cats", None) and split_revision("me/cats@refs/pr/1") == ("me/cats", "refs/pr/1")
    names = {"me/cats": True, "me/cats@v1": True, "me/cats@refs/pr/1": True, "runs/cats": False, "a/b/c": False, "./a": False}
    assert {name: is_hub_name(name) for name in names} == names
    assert (
        is_on_hub("me/cats@refs/pr/1") and not is_on_hub("cats") and not is_on_hub("cats@a/b") and not is_on_hub("tests/data")
    )
    assert HubConfig(repo="me/cats", revision="v1").name == "me/cats@v1" and HubConfig(repo="me/cats").name == "me/cats"
    for name in ("cats", "me/cats/x", "/me/cats", "me/ca ts"):
        with pytest.raises(ValidationError):
            HubConfig(repo=name)


def test_what_is_pushed_comes_back(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert push() == f"{hub.url}/me/cats" and hub.messages("me/cats") == ["a push"] and not hub.repos["me/cats"].private
    files = hub.files("me/cats")
    assert {name: files[name] for name in FILES} == FILES and files["README.md"] == sign(CARD)
    assert len(hub.large) == 1, "the large file went by itself"
    folder = local_path("me/cats")
    assert {path.name for path in folder.iterdir()} == {*FILES, "MANIFEST.json"}, "what the manifest lists"
    assert (folder / "ema.safetensors").read_bytes() == LARGE_FILE
    assert folder.is_relative_to(tmp_path / "hf_home" / "hub")

    count = len(hub.requests)
    assert local_path("me/cats") == folder and len(hub.requests) == count, "a process sees one version of a name"
    assert local_path(folder) == folder and local_path("runs/cats") == Path("runs/cats")
    (tmp_path / "me" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_path("me/cats") == Path("me/cats"), "a path that is here wins"
    (tmp_path / "me" / "cats").rmdir()
    assert local_path("me/dogs") == Path("me/dogs"), "and where its folder is here, the name is a path with a mistake"
    assert push("me/hidden", private=True) and hub.repos["me/hidden"].private
    assert TOKEN.encode() not in b"".join(hub.bodies)


def test_branches(hub: HubServer) -> None:
    push()
    assert push("me/cats@v2", "---\n---\n# other cats") == f"{hub.url}/me/cats/tree/v2"
    assert b"# other cats" in hub.files("me/cats", "v2")["README.md"] and b"other" not in hub.files("me/cats")["README.md"]
    assert local_path("me/cats@v2") != local_path("me/cats")
    commit = hub.repos["me/cats"].branches["v2"]
    assert local_path(f"me/cats@{commit}") == local_path("me/cats@v2")


def test_a_card_that_a_person_wrote_is_kept(hub: HubServer) -> None:
    theirs = b"# My cats\n"
    hub.make("me/cats", {"README.md": theirs, "samples/old.png": b"1", "samples.txt": b"2"})
    pushed = push_files("me/cats", {"samples/new.png": b"3"}, CARD, message="one", replaced=["samples"])
    assert pushed.card == "ATELIER.md"
    files = hub.files("me/cats")
    assert files == {"README.md": theirs, "ATELIER.md": sign(CARD), "samples/new.png": b"3", "samples.txt": b"2"}

    push("me/dogs")
    push("me/dogs", CARD + "more\n")
    assert hub.files("me/dogs")["README.md"] == sign(CARD + "more\n") and "ATELIER.md" not in hub.files("me/dogs"), "ours"
    edited = hub.files("me/dogs")["README.md"].replace(b"# cats", b"# My dogs")
    hub.make("me/dogs", {"README.md": edited})
    push("me/dogs", CARD + "most\n")
    files = hub.files("me/dogs")
    assert files["README.md"] == edited and files["ATELIER.md"] == sign(CARD + "most\n")
    assert is_signed(sign(CARD)) and not is_signed(edited) and not is_signed(theirs)


def test_why_a_push_is_not_taken(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.make("other/cats")
    writes = "somebody else's, or the token may only read"
    assert re.search(rf"may not write to other/cats \(status 403\): it is {writes}", refused("other/cats"))
    assert "may not write to other/new (status 403)" in refused("other/new")
    assert "is no name on the Hugging Face hub, which is OWNER/NAME" in refused("me/ca ts")
    monkeypatch.setenv("HF_TOKEN", READS_ONLY)
    assert writes in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not take the token for me/cats (status 401): log in with a valid one" in refused()
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token to write to me/cats" in refused() and "hf auth login" in refused()
    assert "me/cats" not in hub.repos
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert refused() == "the Hugging Face hub was not reached; is there a network?"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused()


@pytest.mark.parametrize(("kind", "where"), [(503, "large"), (503, "commit"), ("cut", "put"), ("cut", "commit"), (500, "info")])
def test_a_push_is_whole_or_nothing(hub: HubServer, kind: int | str, where: str) -> None:
    hub.make("me/cats")
    hub.faults.add(kind, f"^{where} ", times=20)
    message = refused()
    assert f"(status {kind})" in message or "was not reached" in message, message
    assert hub.files("me/cats") == {}
    hub.faults.waiting.clear()
    push()
    assert hub.files("me/cats")["ema.safetensors"] == LARGE_FILE and len(hub.messages("me/cats")) == 1


def test_a_change_at_the_same_time_is_not_overwritten(hub: HubServer) -> None:
    hub.make("me/cats")
    hub.faults.add(412, "^commit ")
    assert "somebody changed me/cats at the same time" in refused()


def test_why_a_run_does_not_come(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_run(name: str) -> str:
        with pytest.raises(UserError) as raised:
            local_path(name)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    push()
    beginning = "there is no such run or checkpoint here"
    assert no_run("me/dogs").startswith(f"me/dogs: {beginning}: the Hugging Face hub has no model me/dogs, or it is private")
    revision = no_run("me/cats@v9")
    assert "on the Hugging Face hub me/cats has no revision v9: give one of its branches, tags or commits" in revision
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "log in with a valid token" in no_run("me/cats")
    monkeypatch.delenv("HF_TOKEN")
    hub.make("me/secret", private=True)
    assert "has no model me/secret, or it is private" in no_run("me/secret"), "no token"
    hub.faults.add(503, "^info ", times=9)
    assert "answered with an error (status 503) for me/cats" in no_run("me/cats")
    hub.faults.waiting.clear()
    hub.faults.add("cut", "^file me/cats", times=40)
    assert "was not reached" in no_run("me/cats")
    hub.faults.waiting.clear()
    folder = local_path("me/cats")
    assert (folder / "ema.safetensors").read_bytes() == LARGE_FILE, "what was cut is fetched anew"

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("src.storage.hub._brought", {})
    assert local_path("me/cats") == folder, "without a network the cache has it"
    message = no_run("me/dogs")
    assert f"me/dogs: {beginning}: the Hugging Face hub was not reached" in message
    assert "hf download --revision v1 me/dogs" in no_run("me/dogs@v1")


def test_processes_of_one_launch_see_one_commit(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them fetches, and the others find what it has fetched, also where something is pushed meanwhile."""
    push()
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = local_path("me/cats")
    push_files("me/cats", {"new.json": b"{}"}, CARD, message="meanwhile")
    count = hub.count("file")
    monkeypatch.setattr("src.storage.hub._brought", {})  # as in another process of the same parent
    assert local_path("me/cats") == first and hub.count("file") == count
    monkeypatch.setenv("MASTER_PORT", "4242")  # as in another launch
    monkeypatch.setattr("src.storage.hub._brought", {})
    assert local_path("me/cats") != first


def test_other_repositories_bring_their_json_alone(hub: HubServer) -> None:
    hub.make("other/net", {"config.json": b'{"_class_name": "UNet2DModel"}', "weights.bin": LARGE_FILE})
    folder = local_path("other/net")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert from_hub("other/net@main", ["weights.bin"]) == folder and (folder / "weights.bin").exists()


def test_a_hub_that_takes_the_connection_and_is_silent_is_not_waited_for(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(downloads, "HUB_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert "was not reached" in refused()
    assert time.monotonic() - began < 60 and huggingface_hub.utils.get_session().timeout.read == 0.5


def test_a_name_is_asked_for_anew_when_it_is_forgotten(hub: HubServer) -> None:
    push()
    first = local_path("me/cats")
    push(card=CARD + "more\n")
    assert local_path("me/cats") == first
    forget("me/cats")
    assert local_path("me/cats") != first


def test_only_the_processes_of_one_launch_share_a_version(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process alone asks for what is there now, and so does one whose launcher is out of sight, as in a container."""
    push()

    def as_another_process() -> str:
        forget("me/cats")
        return local_path("me/cats").name

    monkeypatch.setenv("WORLD_SIZE", "2")
    first = as_another_process()
    push(card=CARD + "more\n")
    assert as_another_process() == first, "another rank of the launch"
    monkeypatch.setattr(os, "getppid", lambda: 0)
    newest = as_another_process()
    assert newest != first
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert as_another_process() == newest
