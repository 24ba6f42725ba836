"""EMNIST's files: read, turned upright, and refused where they are not whole."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.config import UserError, validate
from src.data import ImageConfig, ImageSet, open_data, open_sources
from src.data.sources import EMNIST_CLASSES, DatasetsSource, EmnistSource

CLASSES = {"letters": 26, "digits": 10, "mnist": 10, "byclass": 62, "bymerge": 47, "balanced": 47}


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.astype(np.uint8).tobytes()


def upright(count: int, size: int = 28) -> np.ndarray:
    """Images that a test can tell apart: a bar across the top, whose length and grey say which image it is."""
    images = np.zeros((count, size, size), np.uint8)
    for i in range(count):
        images[i, :3, : 5 + i % 20] = 100 + i
    return images


def write(folder: Path, split: str, part: str, labels: list[int], *, zipped: bool = False) -> Path:
    """Files as NIST has them, each image on its side."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        f"emnist-{split}-{part}-images-idx3-ubyte": idx(upright(len(labels)).transpose(0, 2, 1)),
        f"emnist-{split}-{part}-labels-idx1-ubyte": idx(np.array(labels)),
    }
    for name, content in contents.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def emnist(path: Path, split: str = "letters", **options: Any) -> ImageSet:
    return open_sources(validate(EmnistSource, {"source": "emnist", "path": str(path), "split": split, **options}))


def loaded(image_set: ImageSet, i: int) -> np.ndarray:
    return np.asarray(image_set.parts[0].load(i, channels=1))


def test_the_letters_stand_upright_and_have_their_names(tmp_path: Path) -> None:
    image_set = emnist(write(tmp_path, "letters", "train", [1, 26, 2, 1]))
    assert image_set.class_names == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert image_set.labels.tolist() == [0, 25, 1, 0]
    assert image_set.names == [f"emnist/letters/train/{i:06d}" for i in range(4)]
    for i, image in enumerate(upright(4)):
        assert np.array_equal(loaded(image_set, i), image[..., None])
    spec = ImageConfig(size=28, channels=1)
    image_set.prepare(spec)
    assert image_set.ready
    assert np.array_equal(image_set.batch(np.array([2, 0]), spec, np.full((2, 3), 0.5))[..., 0], upright(4)[[2, 0]])


@pytest.mark.parametrize("split", list(CLASSES))
def test_the_classes_of_each_split(tmp_path: Path, split: str) -> None:
    first = 1 if split == "letters" else 0
    count = CLASSES[split]
    image_set = emnist(write(tmp_path, split, "train", list(range(first, first + count))), split)
    assert len(set(image_set.class_names)) == count and image_set.labels.tolist() == list(range(count)), "the order is EMNIST's"
    with pytest.raises(UserError, match=f"the labels .* run from {first} to {first + count}, those of EMNIST from {first}"):
        emnist(write(tmp_path, split, "train", list(range(first, first + count + 1))), split)


def test_the_mapping_of_the_merged_classes() -> None:
    """NIST's emnist-balanced-mapping.txt ends with 36 97, 37 98, 38 100, 39 101, 40 102, 41 103, 42 104, 43 110, 44 113,
    45 114, 46 116; emnist-byclass-mapping.txt has 10 65 and 36 97."""
    codes = [48, 57, 65, 90, 97, 98, 100, 101, 102, 103, 104, 110, 113, 114, 116]
    for split in ("balanced", "bymerge"):
        names = EMNIST_CLASSES[split]
        assert [ord(names[i]) for i in (0, 9, 10, 35, *range(36, 47))] == codes
    assert [ord(EMNIST_CLASSES["byclass"][i]) for i in (0, 10, 35, 36, 61)] == [48, 65, 90, 97, 122]


def test_zipped_files_and_the_folder_of_the_zip(tmp_path: Path) -> None:
    plain = emnist(write(tmp_path / "plain", "digits", "train", [3, 1, 4]), "digits")
    zipped = emnist(write(tmp_path / "zipped" / "gzip", "digits", "train", [3, 1, 4], zipped=True).parent, "digits")
    assert zipped.fingerprint == plain.fingerprint
    assert np.array_equal(loaded(zipped, 2), loaded(plain, 2))
    other = emnist(write(tmp_path / "other", "digits", "train", [3, 1, 5]), "digits")
    assert other.fingerprint != plain.fingerprint, "the labels count"


def test_the_test_part_can_be_held_out(tmp_path: Path) -> None:
    write(tmp_path, "letters", "train", [1, 2, 3])
    write(tmp_path, "letters", "test", [26, 25])
    raw = {"source": "emnist", "path": str(tmp_path), "split": "letters"}
    data, test = validate(EmnistSource, raw), validate(EmnistSource, {**raw, "part": "test"})
    train, held = open_data(data, test)
    assert held is not None and (len(train), held.labels.tolist()) == (3, [25, 24])
    assert not set(train.names) & set(held.names)
    assert len(emnist(tmp_path, subset=2)) == 2


IMAGES, LABELS = "emnist-letters-train-images-idx3-ubyte", "emnist-letters-train-labels-idx1-ubyte"


def change(name: str, cut: slice | None = None, start: bytes = b"") -> Any:
    def act(folder: Path) -> None:
        content = (folder / name).read_bytes()
        content = start + content[len(start) :]
        (folder / name).write_bytes(content[cut] if cut is not None else content)

    return act


def damage_gzip(folder: Path) -> None:
    whole = gzip.compress((folder / IMAGES).read_bytes())
    (folder / IMAGES).unlink()
    (folder / f"{IMAGES}.gz").write_bytes(whole[: len(whole) // 2])


def no_gzip(folder: Path) -> None:
    (folder / LABELS).rename(folder / f"{LABELS}.gz")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / IMAGES).unlink(), f"no {IMAGES}, plain or .gz; it is in gzip.zip on the EMNIST page of NIST"),
        (lambda folder: (folder / LABELS).unlink(), f"no {LABELS}, plain or .gz; it is in gzip.zip on the EMNIST page of NIST"),
        (change(IMAGES, slice(0, -5)), r"holds 3 x 28 x 28 bytes, and has 2347; download it again"),
        (change(IMAGES, slice(0, 9)), "not an idx file of bytes with 3 axes"),
        (change(IMAGES, start=b"\0\0\x0b\x03"), r"not an idx file of bytes with 3 axes \(its first bytes are 00 00 0b 03\)"),
        (change(LABELS, start=b"<htm"), "not an idx file of bytes with 1 axes"),
        (change(LABELS, slice(0, 0)), "not an idx file"),
        (lambda folder: (folder / LABELS).write_bytes(idx(np.array([1, 2]))), "3 images and 2 labels"),
        (
            lambda folder: (folder / LABELS).write_bytes(idx(np.array([0, 1, 2]))),
            "run from 0 to 2, those of EMNIST from 1 to 26",
        ),
        (damage_gzip, rf"{IMAGES}\.gz is damaged"),
        (no_gzip, rf"{LABELS}\.gz is damaged"),
    ],
    ids=["images", "labels", "truncated", "short", "type", "html", "empty", "count", "range", "cut_gzip", "no_gzip"],
)
def test_files_that_are_not_whole(tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(write(tmp_path, "letters", "train", [1, 2, 3]))
    with pytest.raises(UserError, match=message) as error:
        emnist(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent has no emnist-digits-test-images-idx3-ubyte"):
        emnist(tmp_path / "absent", "digits", part="test")
    with pytest.raises(UserError, match="split: 'small' is not known"):
        emnist(tmp_path, "small")


def test_a_transposed_copy_from_datasets_can_be_turned(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "images").mkdir()
    for i, image in enumerate(upright(3)):
        Image.fromarray(image.T).save(tmp_path / "images" / f"{i}.png")
    files = sorted(str(path) for path in (tmp_path / "images").iterdir())
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "saved"))
    raw = {"source": "datasets", "name": str(tmp_path / "saved")}
    lying, standing = (open_sources(validate(DatasetsSource, {**raw, **options})) for options in ({}, {"transpose": True}))
    for i, image in enumerate(upright(3)):
        assert np.array_equal(loaded(lying, i), image.T)
        assert np.array_equal(loaded(standing, i), image)
    assert lying.fingerprint != standing.fingerprint
