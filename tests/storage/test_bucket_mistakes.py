"""Names, links, addresses and keys that a bucket or a folder does not take: one line says what is wrong."""

from pathlib import Path
from typing import Any

import google.auth
import pytest
from google.auth.exceptions import DefaultCredentialsError

from src.storage.buckets import Bucket, folders, open_bucket, pull, push, status
from tests.storage.bucket_files import mistake, tree, write
from tests.storage_server import StorageServer


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/a", "a//b", "a\\b", "C:/a", "c:a", "./a", "..", "a/\x01", "\x00"])
def test_names_that_would_leave_the_folder(server: StorageServer, bucket: Bucket, tmp_path: Path, name: str) -> None:
    server.put("mine/x/good", b"good")
    server.put(f"mine/x/{name}", b"bad")
    for call in (pull, status):
        assert repr(name) in mistake(call, *((bucket, "x", tmp_path / "x")))
    assert [path.name for path in tmp_path.iterdir()] == []


def test_links_that_lead_out_and_names_that_clash(
    server: StorageServer, bucket: Bucket, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("mine/x/way/a", b"a")
    (tmp_path / "away").mkdir()
    (run / "way").symlink_to(tmp_path / "away")
    server.put("mine/x/beside", b"b")
    assert "is a link that leads out" in mistake(push, bucket, run, "x")
    assert pull(bucket, "x", run).files == 1 and "is a link that leads out" in capsys.readouterr().err
    assert not tree(tmp_path / "away") and (run / "beside").read_bytes() == b"b"
    (run / "way").unlink()
    (run / "way").symlink_to(tmp_path / "nowhere")  # a link to nothing is no folder, and none is made behind it
    with pytest.raises(OSError, match="exists"):
        pull(bucket, "x", run)
    assert not (tmp_path / "nowhere").exists()
    server.put("mine/y/a/", b"")  # the console's folder
    server.put("mine/y/a/b", b"")
    assert pull(bucket, "y", tmp_path / "y").files == 1
    server.put("mine/y/a", b"")
    assert "would be a file and a folder" in mistake(pull, bucket, "y", tmp_path / "new")
    assert "would be a file and a folder" in mistake(pull, bucket, "y", tmp_path / "y")
    write(tmp_path / "bad", {"a\\b": b""})
    assert "rename or delete it" in mistake(push, bucket, tmp_path / "bad", "bad")


@pytest.mark.parametrize(
    "url", ["bucket", "gs://", "gs://B", "gs://a", "s3://bucket", "gs://buck et", "gs://bucket/../x", "gs://-bad-"]
)
def test_urls_that_are_none(url: str) -> None:
    assert url in mistake(open_bucket, url)


def test_what_is_wrong_with_a_url_is_said() -> None:
    for url in ("gs://Bucket", "gs://b2"):
        assert "a NAME is of lower-case letters, digits" in mistake(open_bucket, url)
    assert mistake(open_bucket, "gs://bucket/../x").startswith("'gs://bucket/../x': '../x' is no folder in the bucket; write")


def test_buckets_and_places_that_are_none(server: StorageServer, bucket: Bucket, tmp_path: Path) -> None:
    assert "gs://bucket/mine/runs/x/ has no files" in mistake(pull, bucket, "runs/x", tmp_path)
    assert "there is no such folder" in mistake(push, bucket, tmp_path / "none", "x")
    server.put("mine/x/a", b"")
    (tmp_path / "empty").mkdir()
    assert "has no files to push" in mistake(push, bucket, tmp_path / "empty", "x", delete=True)
    assert status(bucket, "x", tmp_path / "none") == ([], ["a"], [], 0)
    for url in ("gs://nobodys", "gs://nobodys/x"):
        with open_bucket(url) as other:
            assert "there is no such bucket" in mistake(other.list, "x")
    for closed, otherwise in ((server.forbidden, "may not use it"), (server.private, "are not valid")):
        closed.add("bucket")
        message = mistake(bucket.list, "x")
        assert "there are no credentials" in message and "gcloud auth application-default login" in message
        bucket.anonymous = False
        assert otherwise in mistake(bucket.list, "x")
        bucket.anonymous = True
        closed.clear()


def test_a_key_file_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    write(tmp_path, {"bad.json": b"nonsense", "part.json": b'{"type": "service_account"}', "folder/a": b""})
    for name, why in (("bad", "Expecting value"), ("part", "missing fields"), ("folder", "Is a directory")):
        path = tmp_path / (f"{name}.json" if name != "folder" else name)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
        message = mistake(open_bucket, "gs://bucket")
        assert why in message and str(path) in message and "('" not in message and "Error" not in message, message


def test_without_credentials_a_bucket_is_read_as_anybody_may(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> None:
        raise DefaultCredentialsError("File nothing.json was not found.")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setattr(google.auth, "default", none)
    with open_bucket("gs://bucket/a/b/") as bucket:
        assert bucket.anonymous and bucket.url == "gs://bucket/a/b"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "nothing.json")
    assert "GOOGLE_APPLICATION_CREDENTIALS: File nothing.json was not found" in mistake(open_bucket, "gs://bucket")


def test_names_that_move_come_last_or_stay() -> None:
    assert folders.is_manifest("a/MANIFEST.json") and folders.is_manifest("x/manifest.json")
    assert not folders.is_manifest("a.json")
    assert folders.is_of_this_machine(".run.lock") and folders.is_of_this_machine("a/.x.partial/b")
    assert not folders.is_of_this_machine("yard.lock") and folders.is_temporary("a~") and not folders.is_temporary("cars.old/a")
    assert folders.folder_of("a/b/c") == "a/b/" and folders.folder_of("c") == "" and folders.join("", "a", "b") == "a/b"
    assert folders.is_unsafe("a//b") and not folders.is_unsafe("a/b.txt")
