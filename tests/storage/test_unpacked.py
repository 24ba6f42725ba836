"""Data sets that are brought from a bucket and unpacked once."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.storage.bucket_files import call, random_bytes, tree, write, zipped
from tests.storage_server import StorageServer


def test_data_sets_are_brought_and_unpacked_once(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with io.BytesIO() as held:
        with tarfile.open(fileobj=held, mode="w:gz") as file:
            for name in ("birds/1.png", "birds/2.png"):
                member = tarfile.TarInfo(name)
                member.size = 3
                file.addfile(member, io.BytesIO(b"png"))
        server.put("datasets/birds.tar.gz", held.getvalue())
    server.put("datasets/cats.zip", zipped({"1.png": b"png", "cats/2.png": b"png"}))
    server.put("datasets/mine.zip", zipped({"1.png": b"png"}))
    write(project / "datasets" / "mine", {"0.png": b"png"})
    call("bring --dry-run")
    assert "datasets: would pull 3 files" in capsys.readouterr().out and not list(project.glob("datasets/*.zip"))
    call("bring")
    out = capsys.readouterr().out
    assert "checkpoints: the bucket has none" in out and "unpacked 2 files into datasets/birds" in out
    assert "datasets/mine is here already and not from mine.zip: left as it is" in out
    assert set(tree(project / "datasets" / "birds")) == {"1.png", "2.png"}
    assert set(tree(project / "datasets" / "cats")) == {"1.png", "cats/2.png"}
    assert set(tree(project / "datasets" / "mine")) == {"0.png"}

    server.forget()
    server.put("datasets/cats.zip", zipped({"3.png": b"png"}))
    server.put("checkpoints/big.pt", b"weights")
    (project / "datasets" / "cats" / "1.png").unlink()
    call("bring")
    out = capsys.readouterr().out
    assert "datasets/cats.zip has changed since datasets/cats was unpacked: left as it is" in out and "birds" not in out
    assert set(tree(project / "datasets" / "cats")) == {"cats/2.png"}
    assert server.count("download") == 2 and (project / "checkpoints" / "big.pt").read_bytes() == b"weights"
    call("push datasets")  # what was unpacked stays here
    assert not any(name.startswith(("datasets/birds/", "datasets/.")) for name in server.objects())
    server.remove("datasets/mine/0.png")
    call("pull datasets --delete")
    assert (project / "datasets" / "birds" / "1.png").exists() and not (project / "datasets" / "mine").exists()


def test_the_only_copy_of_an_archive_that_was_unpacked_here_is_not_deleted(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zipped({"1.png": b"png"})
    server.put("datasets/hats.zip", archive)
    server.put("datasets/old.zip", archive)
    call("bring")
    (project / "datasets" / "hats.zip").unlink()
    (project / "datasets" / "old.zip").unlink()
    shutil.rmtree(project / "datasets" / "old")  # nothing is left here of that one
    capsys.readouterr()
    for line in ("push datasets --delete --dry-run", "push datasets --delete"):
        call(line)
        out = capsys.readouterr().out
        assert (
            "datasets/hats.zip is not here any more, datasets/hats was unpacked from it: a push leaves it in the bucket" in out
        )
        assert out.count("\n") == 2 and "push 1 files" in out and ": 1\n" in out, out
    assert server.objects() == {"datasets/hats.zip": archive, "datasets/hats/1.png": b"png"}
    server.remove("datasets/hats/1.png")
    call("pull datasets --delete")  # nor is what was unpacked
    assert (project / "datasets" / "hats" / "1.png").exists() and (project / "datasets" / "hats.zip").exists()


def test_changes_in_what_was_unpacked_are_told(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("datasets/hats.zip", zipped({"hats/1.png": b"png", "hats/2.png": b"png"}))
    call("bring")
    write(project / "datasets" / "hats", {".DS_Store": b"junk"})
    call("push datasets")
    assert "has changed" not in capsys.readouterr().out
    write(project / "datasets" / "hats", {"2.png": b"another"})
    for line in ("status", "status datasets", "push datasets --dry-run", "push datasets"):
        call(line)
        printed = (
            "datasets/hats was unpacked from hats.zip and has changed: push datasets leaves it out, push datasets/hats sends it"
        )
        assert capsys.readouterr().out.splitlines().count(printed) == 1
    assert set(server.objects()) == {"datasets/hats.zip"}
    call("push datasets/hats")
    assert server.objects()["datasets/hats/2.png"] == b"another"
    marker = project / "datasets" / ".hats.zip.unpacked"
    marker.write_text("{" + ", ".join(marker.read_text()[1:-1].split(", ")[:2]) + "}")  # of before it was noted
    capsys.readouterr()
    call("bring")
    call("push datasets")
    assert "changed" not in capsys.readouterr().out


def test_an_archive_that_leads_out_is_refused(server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with io.BytesIO() as held:
        with tarfile.open(fileobj=held, mode="w") as file:
            member = tarfile.TarInfo("out")
            member.type, member.linkname = tarfile.SYMTYPE, "../../.."
            file.addfile(member)
        server.put("datasets/bad.tar", held.getvalue())
    assert call("bring") == 2 and "would leave the folder" in capsys.readouterr().err
    assert [path.name for path in (project / "datasets").iterdir()] == ["bad.tar"]


def test_a_damaged_archive_does_not_keep_back_the_others(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = zipped({"1.png": random_bytes(9000)})
    for name in ("cats", "emus"):
        server.put(f"datasets/{name}.zip", whole)
    server.put("datasets/ants.tar", b"nonsense")
    server.put("datasets/dogs.zip", whole[:4000] + b"?" + whole[4001:])
    assert call("bring") == 2
    printed = capsys.readouterr()
    anew = "; push it anew from where it is whole, or remove it, here and in the bucket"
    lines = printed.err.splitlines()
    assert [line.split(":")[1] for line in lines] == [" datasets/ants.tar", " datasets/dogs.zip"], printed
    assert all(line.startswith("error: ") and line.endswith(anew) for line in lines)
    assert "into datasets/cats\n" in printed.out and "into datasets/emus\n" in printed.out
    assert not list(project.glob("datasets/.*partial"))
    (project / "datasets" / "ants.tar").unlink()
    (project / "datasets" / "dogs.zip").write_bytes(whole)
    server.remove("datasets/ants.tar")
    call("push datasets")
    assert call("bring") == 0 and len(tree(project / "datasets" / "dogs")) == 1


def test_an_unpacked_file_that_is_overwritten_by_one_of_the_same_size(
    server: StorageServer, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("datasets/hats.zip", zipped({"hats/1.png": b"png"}))
    call("bring")
    call("push datasets")
    assert "has changed" not in capsys.readouterr().out
    path = project / "datasets" / "hats" / "1.png"
    path.write_bytes(b"gnp")
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    call("push datasets")
    assert "datasets/hats was unpacked from hats.zip and has changed" in capsys.readouterr().out
