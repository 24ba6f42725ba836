"""Names of classes: their order, which are the same, what a file system allows, and how they are asked for."""

import itertools
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from src.config import UserError, validate
from src.data import ImageSet, open_data, open_sources
from src.data.names import (
    class_of,
    class_remarks,
    class_sort_key,
    file_stems,
    normal_form,
    parse_classes,
    printable,
    sorted_by_count,
    sorted_classes,
)
from src.data.sources import FolderSource
from tests.conftest import ROOT, run_in_process

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
# All that a file system allows: other digits, emoji, line breaks, quotes, marks, what is right to left, and bytes of no text.
ODD = [
    *("①", "②", "²", "½", "Ⅳ", "1", "001", "١", "1.0", "-1", "1e9", "9" * 255),
    *(
        "😀",
        "👩‍👩‍👧",
        "new\nline",
        "tab\t",
        "-leading",
        "--all",
        '"quoted"',
        "it's",
        "100%",
        "%03d %s",
        "a\\b",
        "*",
        "?",
        "$(x)",
        "`x`",
    ),
    *(
        "x" * 255,
        "é" * 127,
        "שלום\u202e",
        "a\u0301b\u0302",
        "trailing.",
        "trailing ",
        " ",
        "…",
        "con",
        "\x01\x7f",
        "A",
        "a",
        "~",
    ),
    *("&lt;b&gt;", "(no class)", "nan", os.fsdecode(b"\xff\xfe\x80"), os.fsdecode(b"caf\xe9")),
]


def odd_folder(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        folder = os.fsencode(root / name)
        os.makedirs(folder)
        for j, file in enumerate((b"0.png", b"-\xfe \n%d.PNG")):
            with open(folder + b"/" + file, "wb") as opened:
                Image.new("RGB", (8, 8), (4 * i % 256, 90 * j, 3)).save(opened, "PNG")
    return root


def folder_set(path: Path) -> ImageSet:
    return open_sources(validate(FolderSource, {"source": "folder", "path": str(path)}))


def test_every_name_that_a_file_system_allows_is_a_class(tmp_path: Path) -> None:
    image_set = folder_set(odd_folder(tmp_path, ODD))
    assert sorted(image_set.class_names) == sorted(ODD) and set(image_set.counts.values()) == {2}
    for label, name in enumerate(image_set.class_names):
        assert [image_set.names[i].split("/")[0] for i in (image_set.labels == label).nonzero()[0]] == [name] * 2
        assert parse_classes(str(label), [f"<{other}>" for other in image_set.class_names]) == [label]
        assert parse_classes(name, image_set.class_names) == [label], "a name goes before a number"
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "loose.png")
    counts = folder_set(tmp_path).counts
    assert counts["(no class)"] == 2 and counts["((no class))"] == 1, "what has no class is not counted to that one"


def test_odd_names_are_shown_on_one_line_and_make_file_names() -> None:
    for name in ODD:
        line = printable(name)
        assert line.isprintable() or "\u200d" in line
        line.encode()  # it can be printed
    assert [printable(name) for name in ("cats", "é", "👩‍👩‍👧", "a\nb", "\udcff", "\u202e")] == [
        "cats", "é", "👩‍👩‍👧", "a\\nb", "\\udcff", "\\u202e",
    ]  # fmt: skip
    captions = ["a long caption of an image, " * 30 + str(i) for i in range(3)]
    for names in (ODD, captions, ["x" * 300, "x" * 301], ["é" * 200, "é" * 201], ["a b", "a_b"]):
        stems = file_stems(names)
        assert len(set(stems)) == len(names)
        assert all(len(stem.encode()) < 130 and not set(stem) & set("/\\%\n '\"") for stem in stems)
    assert file_stems(["hat", "a b", "tea-cup", "v1.0"]) == ["hat", "a_b", "tea-cup", "v1.0"], "as they were before"


def test_the_order_of_classes_is_total() -> None:
    """Names that are equal as numbers come in one order, whatever the hash seed of the process."""
    equal = ["1", "001", "01", "١", "१"]
    assert len({class_sort_key(name) for name in ODD}) == len(ODD)
    assert {sorted_classes(names) for names in itertools.permutations(equal)} == {("001", "01", "1", "١", "१")}
    assert sorted_classes(["b", "10", "9", "a", "010", "②"]) == ("9", "010", "10", "a", "b", "②")
    code = "from src.data.names import sorted_classes; print(ascii(sorted_classes({*'1 001 01 ١ ② b a 10'.split()})))"
    orders = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(orders) == 1


def test_the_most_frequent_come_first() -> None:
    assert sorted_by_count({"b": 1, "c": 3, "a": 1}) == [("c", 3), ("a", 1), ("b", 1)]


# ---------------------------------------------------------------------------------------------- names that look the same


def test_names_that_differ_in_normal_form_alone_are_one_class(tmp_path: Path) -> None:
    assert COMPOSED != DECOMPOSED == unicodedata.normalize("NFD", COMPOSED)
    for name in (COMPOSED, DECOMPOSED, "tea"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    image_set = folder_set(tmp_path)
    assert len(image_set.class_names) == 2 and sorted(image_set.counts.values()) == [1, 2]
    assert "in two spellings that look the same; they are one class" in image_set.parts[0].report.remarks[0]


def called(root: Path, cafe: str) -> dict:
    for name in (cafe, "cafz", "tea"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8)).save(root / name / f"{i}.png")
    return {"source": "folder", "path": str(root)}


def test_sources_with_other_spellings_share_their_classes(tmp_path: Path) -> None:
    one, other = (validate(FolderSource, called(tmp_path / str(i), name)) for i, name in enumerate((COMPOSED, DECOMPOSED)))
    both = open_sources([one, other])
    assert len(both.class_names) == 3 and set(both.counts.values()) == {6}
    train, held_out = open_data(one, other)
    assert held_out is not None and held_out.class_names == train.class_names
    for i in range(len(held_out)):
        name = normal_form(held_out.names[i].split("/")[0])
        assert normal_form(train.class_names[held_out.labels[i]]) == name, "though they stand in another order on the disk"


def test_splits_and_columns_are_found_in_either_spelling(tmp_path: Path) -> None:
    for split in (DECOMPOSED, "b"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / "0.png")
    (tmp_path / "b" / "t.csv").write_text(f"file,{DECOMPOSED}\n0.png,x\n")
    spec = {"source": "folder", "path": str(tmp_path), "split": COMPOSED}
    assert open_sources(validate(FolderSource, spec)).names == ["0.png"]
    table = {"file": "t.csv", "label_column": COMPOSED}
    labelled = {"source": "folder", "path": str(tmp_path / "b"), "labels": table}
    assert open_sources(validate(FolderSource, labelled)).class_names == ("x",)


# ---------------------------------------------------------------------------------------------- --classes


def test_classes_are_asked_for_in_either_spelling() -> None:
    assert parse_classes(f"{COMPOSED}/{DECOMPOSED}/tea", (DECOMPOSED, "tea")) == [0, 0, 1]
    assert parse_classes(DECOMPOSED, (COMPOSED,)) == [0]


def test_classes_with_a_slash() -> None:
    names = ("jazz", "rock/pop", "a/b/c", "1/2", "0")
    assert parse_classes("rock/pop", names) == [1]
    assert parse_classes("jazz/rock/pop/a/b/c/rock\\/pop/0", names) == [0, 1, 2, 1, 4], "a name goes before a number"
    assert parse_classes("1/2", names) == [3] and parse_classes("3/2/1", names) == [3, 2, 1]
    with pytest.raises(UserError, match=r"class 'rock' is not known.*by its name or its number, 0 to 4"):
        parse_classes("rock", names)
    both = ("rock", "pop", "rock/pop")
    with pytest.raises(UserError, match=r"rock/pop may mean two things; write it as .*rock\\/pop.*, or give the classes' n"):
        parse_classes("rock/pop", both)
    assert parse_classes("rock\\/pop", both) == [2] and parse_classes("2/0", both) == [2, 0]
    assert parse_classes("rock/rock", both) == [0, 0]
    for text in ("", "/", "jazz/", "9" * 5000, "①", "-1", "jazz//0"):
        with pytest.raises(UserError, match="is not known"):
            parse_classes(text, names)
    assert parse_classes("/".join(["a/b/c"] * 200), names) == [2] * 200


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("label", [None, float("nan"), "", "  ", "nan", "NaN", "<NA>"])
def test_a_missing_label_is_no_class(label: object) -> None:
    assert class_of(label) is None


def test_labels_are_their_text() -> None:
    assert [class_of(label) for label in (0, 1.5, True, "naan", " a", "None")] == ["0", "1.5", "True", "naan", " a", "None"]


def test_one_class_and_too_many_are_remarked_on() -> None:
    assert "the same one, 'images'" in class_remarks(["images"], 500)[0]
    assert "40 classes for 40 images" in class_remarks([str(i) for i in range(40)], 40)[0]
    assert class_remarks([], 10) == class_remarks(["a", "b"], 100) == class_remarks([str(i) for i in range(10)], 40) == []


def test_check_prints_odd_names_and_what_to_know(tmp_path: Path) -> None:
    odd_folder(tmp_path / "data", ["new\nline", os.fsdecode(b"\xff"), "שלום\u202e"])
    output = run_in_process("prepare_data.py", "check", tmp_path / "data", "--sheet", tmp_path / "sheet.png")
    assert output.status == 0 and "2  new\\nline\n" in output.out and "2  \\udcff\n" in output.out
    assert "3 classes for 6 images, too few of each to learn" in output.out
    (tmp_path / os.fsdecode(b"\xff")).mkdir()
    refused = run_in_process("prepare_data.py", "check", tmp_path / os.fsdecode(b"\xff"))
    assert refused.status == 2 and "has bytes that are no text; rename it" in refused.err and refused.err.count("\n") == 1
