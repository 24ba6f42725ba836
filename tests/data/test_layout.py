"""Folders as people have them: splits, annotations, links, and names of all kinds."""

import os
from pathlib import Path

import pytest

from src.config import validate
from src.data import open_data
from src.data.names import class_remarks
from src.data.sources import FolderSource
from src.data.splits import split_of, splits_among
from tests.data.folders_of_images import image, opened, refusal, remarks, tree


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(name, "train") for name in ("train", "Train", "TRAIN", "training", "Training Data", "train_images", "Training Set")],
        *[
            (name, "train")
            for name in ("train2017", "trainset", "TrainImages", "train-data", "images_train", "train 2", "trainA")
        ],
        *[(name, "val") for name in ("val", "valid", "Validation Data", "val2017", "val_256", "dev", "dev-set", "validset")],
        *[(name, "test") for name in ("test", "Testing Data", "test-data", "test1", "PublicTest", "seg_test", "test.images")],
        *[(name, None) for name in ("train station", "trains", "testament", "test tube", "training shoes", "steam train")],
        *[(name, None) for name in ("valley", "contest", "développement", "data", "images", "2017", "trainer", "trainA b", "")],
    ],
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_folders_that_differ_in_the_word_of_a_split_alone_are_splits() -> None:
    both = splits_among(["asl_alphabet_train", "asl_alphabet_test", "notes"])
    assert both == {"asl_alphabet_train": "train", "asl_alphabet_test": "test"}
    assert splits_among(["DIV2K_train_HR", "DIV2K_valid_HR"]) == {"DIV2K_train_HR": "train", "DIV2K_valid_HR": "val"}
    assert splits_among(["train station", "bus station", "steam train", "test tube"]) == {}


@pytest.mark.parametrize(
    "beside",
    [
        ["annotations/i.json"],
        ["labels/0.txt"],
        ["captions/"],
        ["README.md"],
        ["extra/0.png"],
        ["annotations/i.json", "docs/readme.txt", "unlabelled/0.png", "LICENSE"],
        ["masks/0.png"],
    ],
)
@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Train", "Test"), ("train2017", "val2017")])
def test_splits_are_asked_for_whatever_lies_beside_them(tmp_path: Path, beside: list[str], train: str, val: str) -> None:
    coco = tree(tmp_path / "coco", f"{train}/a/0.png", f"{train}/b/1.png", f"{val}/a/2.png", f"{val}/b/3.png", *beside)
    message = refusal(coco)
    assert "holds the splits" in message and train in message and val in message and "set data.split" in message
    image_set = opened(coco, split=train)
    assert image_set.class_names == ("a", "b") and image_set.names == ["a/0.png", "b/1.png"]
    assert opened(tmp_path, split=train).counts == {"a": 1, "b": 1}, "one folder further up"


def test_one_split_is_asked_for_too_and_a_class_may_have_the_name_of_one(tmp_path: Path) -> None:
    assert "holds the splits train" in refusal(tree(tmp_path / "one", "train/a/0.png", "train/b/0.png"))
    assert "holds the splits train" in refusal(tree(tmp_path / "two", "train/a/0.png", "train/b/0.png", "labels/0.txt"))
    assert "holds the splits train" in refusal(tree(tmp_path / "three", "train/a/0.png", "train/b/0.png", "other/a/0.png"))
    assert "Training Data" in refusal(tree(tmp_path / "four", "Training Data/0.png", "cats/0.png"))
    assert "holds the splits test" in refusal(tree(tmp_path / "five", "data/0.png", "test/0.png"))
    vehicles = opened(tree(tmp_path / "vehicles", "bus/0.png", "car/0.png", "train/0.png"))
    assert vehicles.class_names == ("bus", "car", "train")
    assert "'train' is read as a class; if it is a split, set data.split" in remarks(vehicles)


def test_folders_named_as_splits_can_be_classes_where_one_says_so(tmp_path: Path) -> None:
    tree(tmp_path, "bus/a/0.png", "train/a/0.png", "test/0.png", "car/a/0.png")
    assert 'or to "." where they are classes' in refusal(tmp_path)
    image_set = opened(tmp_path, split=".")
    assert (
        image_set.class_names == ("bus", "car", "test", "train")
        and image_set.names[0] == "bus/a/0.png"
        and remarks(image_set) == ""
    )
    nested = opened(tree(tmp_path / "nested", *(f"{name}/{year}/0.png" for name in ("bus", "car", "train") for year in (1, 2))))
    assert nested.class_names == ("bus", "car", "train"), "as it was read before"
    inside = tree(tmp_path / "inside", "train/bus/x/0.png", "train/train/x/0.png", "test/bus/x/0.png")
    assert opened(inside, split="train").class_names == ("bus", "train")
    tree(tmp_path / "circle" / "data", "notes.txt")
    os.symlink("..", tmp_path / "circle" / "data" / "up")
    image(tmp_path / "circle" / "other" / "0.png")
    assert len(opened(tmp_path / "circle" / "data")) == 1, "and does not go round for ever"


def test_the_landscape_archive_and_its_like(tmp_path: Path) -> None:
    inner = tmp_path / "Landscape Classification" / "Landscape Classification"
    for word in ("Training", "Validation", "Testing"):
        for name in ("Coast", "Desert", "Forest"):
            for i in range(2 if word == "Training" else 1):
                image(inner / f"{word} Data" / name / f"{i}.png")
    assert "holds the splits Testing Data, Training Data, Validation Data; set data.split" in refusal(tmp_path)
    for split in ("Training Data", "train", "training", "TRAIN", "training data"):
        assert opened(tmp_path, split=split).counts == {"Coast": 2, "Desert": 2, "Forest": 2}
    assert len(opened(tmp_path, split="val")) == len(opened(tmp_path, split="Testing Data")) == 3
    assert opened(tmp_path, split="train").names == opened(tmp_path, split="Training Data").names
    assert "has no split 'holdout'; its subfolders: Testing Data, Training Data, Validation Data" in refusal(
        tmp_path, split="holdout"
    )


def test_a_plain_word_that_may_mean_two_splits_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "train2014/0.png", "train2017/0.png", "train2017/1.png", "val2017/0.png")
    message = refusal(tmp_path, split="train")
    assert "'train' may mean train2014 or train2017" in message
    assert len(opened(tmp_path, split="train2017")) == 2 and len(opened(tmp_path, split="val")) == 1
    assert "not the name" in refusal(tmp_path, split="../x") and "not the name" in refusal(tmp_path, split="")


def test_class_folders_that_only_contain_the_word_are_classes(tmp_path: Path) -> None:
    names = ("train station", "trains", "testament", "test tube")
    image_set = opened(tree(tmp_path, *(f"{name}/0.png" for name in names)))
    assert image_set.class_names == tuple(sorted(names)) and remarks(image_set) == ""


def test_classes_that_each_hold_the_splits(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        tree(tmp_path / name, "train/0.png", "train/1.png", "test/2.png")
    assert "holds classes, and each of them the splits test, train" in refusal(tmp_path)
    image_set = opened(tmp_path, split="train")
    assert image_set.counts == {"cats": 2, "dogs": 2} and "cats/train/0.png" in image_set.names
    assert len(opened(tmp_path, split="test")) == 2


@pytest.mark.parametrize(
    "beside", ["labels/0.txt", "captions/0.txt", "annotations/deep/0.xml", "masks/0.png", "meta/x.parquet"]
)
@pytest.mark.parametrize("images", ["images", "JPEGImages"])
def test_the_only_folder_with_images_is_gone_into(tmp_path: Path, images: str, beside: str) -> None:
    image_set = opened(tree(tmp_path, f"{images}/0.png", f"{images}/1.png", beside, "data.yaml"))
    assert image_set.class_names == () and len(image_set) == 2 and image_set.names == [f"{images}/0.png", f"{images}/1.png"]
    assert beside.split("/")[0] in remarks(image_set) and "other files are left aside: 1 .yaml" in remarks(image_set)
    classes = opened(tree(tmp_path / "b", f"{images}/cat/0.png", f"{images}/dog/1.png", beside))
    assert classes.class_names == ("cat", "dog")


def test_nested_exports(tmp_path: Path) -> None:
    ilsvrc = tree(
        tmp_path / "ILSVRC",
        *(f"Data/CLS-LOC/train/{name}/{i}.png" for name in ("n01", "n02") for i in range(2)),
        "Data/CLS-LOC/val/0.png",
        "Data/CLS-LOC/test/0.png",
        "Annotations/CLS-LOC/train/n01/0.xml",
        "ImageSets/CLS-LOC/train_cls.txt",
    )
    assert "holds the splits test, train, val" in refusal(ilsvrc) and "holds the splits" in refusal(tmp_path)
    train = opened(tmp_path, split="train")
    assert train.counts == {"n01": 2, "n02": 2} and "Annotations, ImageSets" in remarks(train)
    assert len(opened(ilsvrc, split="val")) == 1
    yolo = tree(tmp_path / "yolo", "images/train/0.png", "images/train/1.png", "images/val/0.png", "labels/train/0.txt")
    assert "holds the splits train, val" in refusal(yolo)
    assert len(opened(yolo, split="train")) == len(opened(yolo, split="images/train")) == 2
    assert opened(yolo, split="train").class_names == ()
    roboflow = tree(
        tmp_path / "roboflow", *(f"{split}/{kind}" for split in ("train", "valid") for kind in ("images/0.png", "labels/0.txt"))
    )
    assert opened(roboflow, split="valid").class_names == () and len(opened(roboflow, split="train")) == 1
    voc = tree(tmp_path / "VOC", "JPEGImages/0.jpg", "SegmentationClass/0.png", "Annotations/0.xml", "ImageSets/Main/x.txt")
    assert opened(voc).names == ["JPEGImages/0.jpg"]


def test_names_are_those_of_before(tmp_path: Path) -> None:
    """Who is held out, and which run goes on, depends on them."""
    tree(tmp_path / "a", "x/y/one/0.png", "x/y/two/1.png")
    assert opened(tmp_path / "a").names == ["x/y/one/0.png", "x/y/two/1.png"]
    tree(tmp_path / "b", "train/x/one/0.png", "train/x/two/1.png", "test/x/one/0.png")
    assert opened(tmp_path / "b", split="train").names == ["x/one/0.png", "x/two/1.png"]
    tree(tmp_path / "c", "x/train/y/one/0.png", "x/train/y/two/0.png", "x/test/0.png")
    assert opened(tmp_path / "c", split="train").names == ["one/0.png", "two/0.png"]
    assert opened(tmp_path / "c" / "x" / "train", split="train").names == ["one/0.png", "two/0.png"], (
        "path is the split already"
    )


def test_an_image_beside_a_folder_of_images_keeps_both(tmp_path: Path) -> None:
    image_set = opened(tree(tmp_path, "cover.png", "a/0.png", "empty/"))
    assert image_set.counts == {"a": 1, "(no class)": 1} and "the folders empty hold no images" in remarks(image_set)


def test_a_link_does_not_rename_a_class(tmp_path: Path) -> None:
    tree(tmp_path / "data", "m/0.png", "z/0.png", "z/1.png")
    before = opened(tmp_path / "data")
    os.symlink(tmp_path / "data" / "z", tmp_path / "data" / "a")
    image_set = opened(tmp_path / "data")
    assert image_set.class_names == ("m", "z") and image_set.fingerprint == before.fingerprint
    assert "the links a lead to folders that are here already" in remarks(image_set)
    (tmp_path / "data" / "nowhere").symlink_to("itself")
    (tmp_path / "data" / "self").symlink_to("self")
    os.symlink(tmp_path / "data", tmp_path / "data" / "m" / "up")
    os.symlink(tree(tmp_path / "outside", "0.png", "deep/1.png"), tmp_path / "data" / "linked")
    assert opened(tmp_path / "data").counts == {"linked": 2, "m": 1, "z": 2}, "the name of a class is that in the data folder"


def test_a_link_beside_the_only_folder_makes_no_class_of_it(tmp_path: Path) -> None:
    tree(tmp_path, "z/0.png", "z/1.png")
    os.symlink("z", tmp_path / "a")
    image_set = opened(tmp_path)
    assert (
        image_set.class_names == ()
        and image_set.names == ["z/0.png", "z/1.png"]
        and "a beside the images" in remarks(image_set)
    )
    tree(tmp_path / "splits", "train/a/0.png", "train/b/0.png", "val/a/0.png")
    os.symlink("train", tmp_path / "splits" / "current")
    assert "holds the splits train, val" in refusal(tmp_path / "splits")
    assert len(opened(tmp_path / "splits", split="current")) == 2


def test_a_data_folder_that_is_a_link(tmp_path: Path) -> None:
    tree(tmp_path / "real", "a/0.png", "b/0.png")
    os.symlink(tmp_path / "real", tmp_path / "data")
    assert opened(tmp_path / "data").names == ["a/0.png", "b/0.png"]


@pytest.mark.parametrize(
    "names",
    [
        ("Trainingsdaten", "Testdaten"),
        ("entraînement", "essai"),
        ("entrenamiento", "prueba"),
        ("treino", "teste"),
        ("datos de entrenamiento", "datos de prueba"),
        ("训练集", "测试集"),
        ("обучение", "тест"),
        ("学習データ", "テスト"),
        ("trn", "tst"),
        ("trainset-v1", "valset-v1"),
    ],
)
def test_splits_in_other_languages_are_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    assert "holds the splits" in refusal(tree(tmp_path, f"{names[0]}/a/1.png", f"{names[1]}/a/1.png"))
    image_set = opened(tmp_path, split="train" if names[0] != "trn" else "trn")
    assert image_set.names == ["a/1.png"] or image_set.names == ["1.png"]


def test_words_of_other_languages_alone_are_classes(tmp_path: Path) -> None:
    image_set = opened(tree(tmp_path, "prueba/1.png", "casa/1.png", "perro/2.png"))
    assert image_set.class_names == ("casa", "perro", "prueba")


@pytest.mark.parametrize(
    ("paths", "count"),
    [
        (["HQ/CelebA-HQ-img/1.jpg", "HQ/CelebAMask-HQ-mask-anno/0/1_hair.png"], 1),
        (["CUB/images/a/1.jpg", "CUB/images/b/1.jpg", "segmentations/a/1.png"], 2),
        (["images1024x1024/0/1.png", "thumbnails128x128/0/1.png"], 1),
        (["COVID/images/1.png", "COVID/masks/1.png", "Normal/images/1.png", "Normal/masks/1.png"], 2),
        (["with_mask/1.png", "without_mask/1.png"], 2),
        (["face/1.png", "mask/1.png"], 2),
    ],
)
def test_masks_are_no_images(tmp_path: Path, paths: list[str], count: int) -> None:
    image_set = opened(tree(tmp_path, *paths))
    assert len(image_set) == count
    assert ("left aside" in remarks(image_set)) == (count < len(paths))


@pytest.mark.parametrize("images", [("images", "annotations"), ("leftImg8bit", "gtFine")])
def test_a_split_of_images_beside_annotations_is_that_of_the_images(tmp_path: Path, images: tuple[str, str]) -> None:
    tree(tmp_path, *(f"{folder}/{split}/1.png" for folder in images for split in ("training", "validation")))
    assert "holds the splits training, validation" in refusal(tmp_path)
    assert len(opened(tmp_path, split="train")) == 1


def test_a_class_without_the_split_that_others_have_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "cat/train/1.png", "cat/test/2.png", "dog/1.png")
    assert "each of them the splits" in refusal(tmp_path)
    image_set = opened(tmp_path, split="train")
    assert len(image_set) == 1
    assert "the classes dog hold no split 'train'" in remarks(image_set)


def test_numbered_parts_are_remarked_on() -> None:
    assert "look like parts" in class_remarks(["images_001", "images_002"], 100)[0]
    assert class_remarks(["cats_1", "dogs_2"], 100) == []


def test_held_out_images_of_one_class_alone_keep_it(tmp_path: Path) -> None:
    data = tree(tmp_path / "data", "dog/1.png", "café/1.png")
    for name, label in (("cafe\u0301", 0), ("dog", 1), ("images", -1)):
        held = tree(tmp_path / f"held{label}", f"{name}/2.png")
        specs = [validate(FolderSource, {"source": "folder", "path": str(path)}) for path in (data, held)]
        image_set = open_data(*specs)[1]
        assert image_set is not None and image_set.class_names == ("café", "dog")
        assert image_set.labels.tolist() == [label]


def test_a_link_to_a_folder_above_is_left_aside(tmp_path: Path) -> None:
    tree(tmp_path, "real/y/1.png", "data/a/1.png", "data/b/2.png")
    (tmp_path / "data/up").symlink_to("..")
    image_set = opened(tmp_path / "data")
    assert image_set.class_names == ("a", "b") and len(image_set) == 2
    assert "links up lead to folders that are here already" in remarks(image_set)
