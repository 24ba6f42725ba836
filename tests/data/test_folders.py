"""What is in a folder: images, other files, folders, and links to folders."""

import os
from collections import Counter
from pathlib import Path

import pytest

from src.data.folders import ending_of, entries, holds_images, identity, is_image, is_unreadable_image, list_endings, walk
from src.data.layout import Folder, find_layout
from tests.data.folders_of_images import tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (
        "b/1.png",
        "b/deep/2.JPG",
        "a/3.png",
        "a/notes.txt",
        "a/raw.psb",
        ".git/4.png",
        "__MACOSX/5.png",
        "empty/x.json",
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "data"


def test_images_are_known_by_their_endings() -> None:
    assert ending_of("a.tar.PNG") == ".png" and ending_of("a") == ""
    assert is_image("a.PNG") and not is_image("a.txt") and not is_image("a.psb")
    assert is_unreadable_image("a.PSB") and not is_unreadable_image("a.png")


def test_hidden_entries_and_links_to_nowhere_are_left_out(root: Path) -> None:
    os.symlink(root / "nowhere", root / "broken")
    assert {entry.name: is_folder for entry, is_folder in entries(root)} == {"a": True, "b": True, "empty": True}


def test_a_walk_has_all_images_in_the_order_of_their_names(root: Path) -> None:
    tree = walk(root)
    assert [parts for parts, _ in tree.images] == [("a", "3.png"), ("b", "1.png"), ("b", "deep", "2.JPG")]
    assert [entry.name for _, entry in tree.images] == ["3.png", "1.png", "2.JPG"]
    assert sorted(tree.subfolders) == ["a", "b", "empty"] and tree.unreadable == [root / "a" / "raw.psb"]
    assert tree.others == {".txt": 1, ".json": 1} and tree.links == []


def test_a_folder_is_visited_under_its_own_name_alone(root: Path) -> None:
    os.symlink(root / "b", root / "a" / "link")
    os.symlink(root, root / "loop")
    tree = walk(root)
    assert len(tree.images) == 3 and tree.links == ["a/link", "loop"]
    assert identity(root / "b") == identity(root / "a" / "link") != identity(root)
    (root.parent / "other").mkdir()
    os.symlink(root / "b", root.parent / "other" / "b")
    images = walk(root.parent / "other").images
    assert [parts for parts, _ in images] == [("b", "1.png"), ("b", "deep", "2.JPG")], "a link to elsewhere is followed"


def test_folders_that_hold_images_at_any_depth(root: Path) -> None:
    assert holds_images(root) and holds_images(root / "b" / "deep") and not holds_images(root / "empty")
    (root / "a" / "3.png").unlink()
    assert not holds_images(root / "a") and holds_images(root / "a", also_unreadable=True)


def test_endings_in_words() -> None:
    assert list_endings(Counter({".json": 3, "": 1})) == "3 .json, 1 without an ending"
    assert list_endings(Counter({f".{i}": 1 for i in range(10)})).endswith("1 .7, 2 others")


def test_a_folder_knows_what_is_in_it(tmp_path: Path) -> None:
    tree(tmp_path, "data/cat/0.png", "data/dog/1.png", "annotations/2.png", "notes.txt")
    top = Folder(tmp_path)
    assert list(top.subfolders) == ["annotations", "data"] and top.files == ["notes.txt"] and not top.has_images
    assert list(top.image_folders["data"].image_folders) == ["cat", "dog"] and top.next_folder() == "data"
    layout = find_layout(tmp_path, None, "here")
    assert layout.folder.path == tmp_path / "data" and layout.passed == ["annotations"] and layout.others == {".txt": 1}
