"""The source `folder`: class folders, splits, odd names, and folders that hold no images."""

import json
import os
from pathlib import Path

import pytest

from src.config import UserError, validate
from src.data import open_data
from src.data.sources import FolderSource
from tests.data.folders_of_images import classes_folder, folder_set, save_image


def test_class_subfolders(tmp_path: Path) -> None:
    image_set = folder_set(classes_folder(tmp_path, "b", "a"))
    assert image_set.class_names == ("a", "b") and image_set.counts == {"a": 3, "b": 3}
    assert image_set.names == ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"]
    assert image_set.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_layouts_as_unpacked(tmp_path: Path) -> None:
    # Kaggle's landscapes: flat, names with spaces and brackets. CelebA: a folder in a folder, tables beside it.
    landscape = tmp_path / "landscape"
    for i in range(3):
        save_image(landscape / f"0000000{i} ({i}).jpg")
    celeba = tmp_path / "celeba"
    for i in range(2):
        save_image(celeba / "img_align_celeba" / "img_align_celeba" / f"00000{i}.jpg")
    (celeba / "list_attr_celeba.csv").write_text("image_id")
    wikiart = classes_folder(tmp_path / "wikiart", "High_Renaissance", "Ukiyo_e")
    assert (len(folder_set(landscape)), folder_set(landscape).class_names) == (3, ())
    assert (len(folder_set(celeba)), folder_set(celeba).class_names) == (2, ())
    assert folder_set(wikiart).class_names == ("High_Renaissance", "Ukiyo_e")
    save_image(wikiart / "cover.jpg")  # an image beside the classes has none
    assert folder_set(wikiart).counts == {"High_Renaissance": 3, "Ukiyo_e": 3, "(no class)": 1}


def test_splits_are_chosen_and_not_mistaken_for_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        classes_folder(tmp_path / "clothing" / split, "hat", "shoes", each=2 if split == "test" else 4)
    with pytest.raises(UserError, match=r"holds the splits test, train; set data\.split"):
        folder_set(tmp_path)
    train = folder_set(tmp_path, split="train")
    assert train.counts == {"hat": 4, "shoes": 4}
    with pytest.raises(UserError, match="no split 'val'; its subfolders: test, train"):
        folder_set(tmp_path, split="val")


def test_odd_names_and_hidden_files(tmp_path: Path) -> None:
    odd = ["with space.PNG", "-leading.JpEg", "ünï→码.png", "new\nline.png", "two.dots.jpg"]
    for name in odd:
        save_image(tmp_path / "images" / name)
    for name in (".hidden.png", "._resource.jpg", "Thumbs.db", "notes.txt"):
        (tmp_path / "images" / name).write_bytes(b"x")
    save_image(tmp_path / "images" / ".git" / "a.png")
    os.symlink(tmp_path / "images", tmp_path / "images" / "loop")
    assert sorted(folder_set(tmp_path / "images").names) == sorted(odd)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist; set data.path"),
        (lambda p: p.mkdir(), "holds no images"),
        (lambda p: p.write_text("x"), "is a file"),
    ],
)
def test_folders_that_are_no_data(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "data")  # pyright: ignore[reportCallIssue]
    with pytest.raises(UserError, match=message):
        folder_set(tmp_path / "data")


def test_the_report_of_a_set_is_json(tmp_path: Path) -> None:
    image_set = folder_set(classes_folder(tmp_path, "a", "b"))
    assert json.dumps(image_set.counts) and len(image_set.fingerprint) == 64


def test_who_is_held_out_does_not_depend_on_what_else_the_folder_holds(tmp_path: Path) -> None:
    for i in range(40):
        save_image(tmp_path / "a" / f"{i}.png")
    spec = validate(FolderSource, {"source": "folder", "path": str(tmp_path)})
    before = open_data(spec, 0.3)[1]
    save_image(tmp_path / "b" / "0.png")  # now a/ and b/ are classes
    beside = open_data(spec, 0.3)[1]
    assert before is not None and beside is not None
    assert set(before.names) == {name for name in beside.names if name.startswith("a")}
