"""Labels from tables beside the images, as people write them."""

from pathlib import Path

import pytest

from src.config import UserError
from src.data import ImageSet
from tests.data.folders_of_images import opened, refusal, remarks, tree

CELEBA = """4
5_o_Clock_Shadow Smiling Young
000001.jpg -1  1  1
000002.jpg -1 -1  1
000003.jpg  1  1 -1
000009.jpg  1  1 -1
"""


ART500K = (
    'FILE\tauthor_name\tGenre\nart/x.jpg\tVan "Vincent" Gogh\tlandscape\nart/y.jpg\tMonet\tportrait, oil\nart/z.jpg\tMonet\t\n'
)


def labelled(path: Path, text: str | bytes, name: str = "labels.csv", **columns: object) -> ImageSet:
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return opened(path, labels={"file": name, **columns})


def test_celebas_attributes_are_classes(tmp_path: Path) -> None:
    tree(tmp_path, *(f"img_align_celeba/img_align_celeba/00000{i}.jpg" for i in range(1, 5)))
    image_set = labelled(tmp_path, CELEBA, "list_attr_celeba.txt", label_column="Smiling")
    assert image_set.counts == {"Smiling": 2, "not Smiling": 1, "(no class)": 1}
    remark = remarks(image_set)
    assert "1 images without a row are left without a class" in remark and "1 rows name no image" in remark
    table = "image_id,5_o_Clock_Shadow,Smiling\n000001.jpg,-1,1\n000002.jpg,1,-1\n000003.jpg,1,-1\n000004.jpg,1,1\n"
    assert labelled(tmp_path, table, label_column="Smiling", image_column="image_id").counts == {"Smiling": 2, "not Smiling": 2}
    identities = "000001.jpg 2880\n000002.jpg 2937\n000003.jpg 2880\n000004.jpg 10\n"
    image_set = labelled(tmp_path, identities, "identity_CelebA.txt", label_column=1)
    assert image_set.class_names == ("10", "2880", "2937") and image_set.labels.tolist() == [1, 2, 1, 0]


def test_art500ks_table_is_separated_by_tabs(tmp_path: Path) -> None:
    tree(tmp_path, "art/x.jpg", "art/y.jpg", "art/z.jpg")
    image_set = labelled(tmp_path, ART500K, label_column="Genre")
    assert image_set.counts == {"landscape": 1, "portrait, oil": 1, "(no class)": 1}
    assert "1 images with a row and no label" in remarks(image_set)
    assert labelled(tmp_path, ART500K, label_column="author_name").class_names == ("Monet", 'Van "Vincent" Gogh')


@pytest.mark.parametrize(
    "table",
    [
        "file,style\r\na/1.jpg,Cubism\r\nb\\2.jpg,Rococo\r\n",
        "\ufefffile;style\n1.jpg;Cubism\n2.jpg;Rococo\n",
        'file,title,style\n1,"a, b",Cubism\n2,"c\nd",Rococo\n',
        "style\tfile\nCubism\thttps://host/x/1.jpg\nRococo\t/mnt/all/2.jpg\n",
        "file,style\n1.jpg,Cubism\n2.jpg,Rococo\n".encode("utf-16"),
    ],
)
def test_tables_as_they_are_written(tmp_path: Path, table: str | bytes) -> None:
    tree(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.jpg")
    image_set = labelled(tmp_path, table, label_column="style", image_column="file")
    assert image_set.class_names == ("Cubism", "Rococo") and image_set.labels.tolist() == [0, 1, -1], "and not by folders"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label_column": "stile"}, "data.labels.label_column: .* has no column 'stile'; it has: file, style, year"),
        (
            {"label_column": "style", "image_column": "path"},
            "data.labels.image_column: .* has no column 'path'; it has: file, st",
        ),
        ({"label_column": 7}, "has no column 7; it has: file, style, year"),
        ({"label_column": "style", "image_column": "year"}, "no row of .* names an image .*first row has '1907', .* '1.jpg'"),
        ({"label_column": "style", "delimiter": "tab"}, "has no column 'style'; it has: file,style,year"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, columns: dict, message: str) -> None:
    tree(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(UserError, match=message):
        labelled(tmp_path, "file,style,year\n1.jpg,Cubism,1907\n2.jpg,Rococo,1730\n", **columns)
    (tmp_path / "empty.csv").write_text("\n\n")
    assert "is empty" in refusal(tmp_path, labels={"file": "empty.csv", "label_column": "style"})
    assert "does not exist" in refusal(tmp_path, labels={"file": "none.csv", "label_column": "style"})


def test_rows_that_say_too_much(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg")
    image_set = labelled(tmp_path, "file,c\n1.jpg,x\nb/1.jpg,y\n2.jpg,x\n2.jpg,y\n2.jpg\nnan.jpg,nan\n", label_column="c")
    assert image_set.labels.tolist() == [-1, 1, 0]
    remark = remarks(image_set)
    for part in (
        "1 rows name several",
        "1 rows name an image again",
        "1 rows are too short",
        "1 rows name no image",
        "1 images w",
    ):
        assert part in remark


def test_other_labels_are_other_data(tmp_path: Path) -> None:
    """The run that was trained on the old ones must not go on."""
    tree(tmp_path, "1.jpg", "2.jpg")
    one = labelled(tmp_path, "file,c\n1.jpg,x\n2.jpg,y\n", label_column="c")
    other = labelled(tmp_path, "file,c\n1.jpg,y\n2.jpg,x\n", label_column="c")
    same = labelled(tmp_path, "n,c,file\n3,x,1.jpg\n4,y,2.jpg\n", label_column="c", image_column="file")
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "text",
    [
        "style,file\nmodern,a.png\nold,b.png\n",
        ",file,style\n0,a.png,modern\n1,b.png,old\n",
        "sep=;\nfile;style\na.png;modern\nb.png;old\n",
        "file,style\na.png,modern,1907\nb.png,old\n",
        "file,style\nhttps://x.org/a.png?width=300,modern\nb.png,old\n",
    ],
)
def test_the_column_of_the_images_is_found(tmp_path: Path, text: str) -> None:
    (tree(tmp_path, "a.png", "b.png", "1.png") / "labels.csv").write_text(text)
    image_set = opened(tmp_path, labels={"file": "labels.csv", "label_column": "style"})
    assert image_set.class_names == ("modern", "old")
    assert dict(zip(image_set.names, image_set.labels.tolist(), strict=True)) == {"1.png": -1, "a.png": 0, "b.png": 1}


def test_tables_that_are_none_and_letters_that_are_lost(tmp_path: Path) -> None:
    tree(tmp_path, "a.png")
    (tmp_path / "one.csv").write_text("style\nmodern\n")
    (tmp_path / "t.xlsx").write_bytes(b"PK\3\4" + bytes(99))
    (tmp_path / "latin.csv").write_bytes("file,style\na.png,café\n".encode("latin-1"))
    assert "one column alone" in refusal(tmp_path, labels={"file": "one.csv", "label_column": "style"})
    assert "is an Excel file" in refusal(tmp_path, labels={"file": "t.xlsx", "label_column": "style"})
    assert "is not UTF-8" in remarks(opened(tmp_path, labels={"file": "latin.csv", "label_column": "style"}))


@pytest.mark.parametrize(("labels", "is_noted"), [("-1 0 1", True), ("-1 1 1", False), ("0 1 2", False)])
def test_a_label_that_may_mean_none_is_said(tmp_path: Path, labels: str, is_noted: bool) -> None:
    tree(tmp_path, "1.png", "2.png", "3.png")
    rows = "".join(f"{i + 1}.png,{label}\n" for i, label in enumerate(labels.split()))
    (tmp_path / "labels.csv").write_text(f"file,label\n{rows}")
    image_set = opened(tmp_path, labels={"file": "labels.csv", "label_column": "label"})
    assert ("the label -1 is read as a class" in remarks(image_set)) == is_noted
