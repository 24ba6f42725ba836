"""Folders, odd files, scans, packing, archives: what users' images are really like."""

import errno
import io
import json
import os
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from src.config import UserError, validate
from src.data import ImageConfig, ImageSet, open_data, open_sources
from src.data import packing as packing_module
from src.data.packing import pack
from src.data.scan import Measured, ScanConfig, cache_folder, examine
from src.data.sources import SHAPES, DatasetsSource, DigitsSource, FolderSource, PackedSource, ShapesSource, draw_shape
from src.data.transforms import decode, position_uniforms, resize_shorter_side, square
from src.storage.archives import unpack

MIDDLE = np.full(3, 0.5)


def save_image(path: Path, size: tuple[int, int] = (40, 30), colour: str = "red", **save: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **save)  # pyright: ignore[reportArgumentType]
    return path


def folder_set(path: Path, **options: object) -> ImageSet:
    return open_sources(validate(FolderSource, {"source": "folder", "path": str(path), **options}))


def classes_folder(root: Path, *names: str, each: int = 3) -> Path:
    for i, name in enumerate(names):
        for j in range(each):
            save_image(root / name / f"{j}.png", colour=["red", "green", "blue"][i % 3], size=(40 + i, 30 + j))
    return root


# ---------------------------------------------------------------------------------------------- layouts


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


# ---------------------------------------------------------------------------------------------- the scan


def png(width: int, height: int) -> bytes:
    """A tiny PNG file that claims to be of this size: all its pixels are one byte, a decompression bomb when large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    squeezer = zlib.compressobj(9)
    rows = (
        b"".join(squeezer.compress(bytes(1 + width)) for _ in range(height if width * height < 3e8 else 1)) + squeezer.flush()
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg(size: tuple[int, int] = (64, 64)) -> bytes:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.save(file, "JPEG")
    return file.getvalue()


BROKEN = {
    "truncated.jpg": (jpeg()[: len(jpeg()) // 2], "truncated"),
    "empty.png": (b"", "empty file"),
    "text.jpg": (b"<html>not found</html>", "not an image"),
    "bomb.png": (png(30_000, 30_000), "more pixels than max_pixels"),
    "absurd.png": (png(2**31 - 1, 2**31 - 1), "more pixels than max_pixels"),
    "ribbon.png": (png(4000, 1), "absurd shape"),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_each_kind_of_damage_has_its_reason(tmp_path: Path, name: str) -> None:
    content, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert examine(lambda: path, len(content), ScanConfig()) == reason


def test_large_honest_scans_pass_and_small_files_can_be_left_out(tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(png(12_000, 10_000))
    assert isinstance(examine(lambda: large, large.stat().st_size, ScanConfig()), Measured)
    assert examine(lambda: large, 4999, ScanConfig(min_file_bytes=5000)) == "smaller than min_file_bytes"


def with_words(kind: str, count: int) -> bytes:
    """A PNG with so many bytes beside its pixels, which compress well."""
    info, options = PngImagePlugin.PngInfo(), {}
    if kind == "icc":
        options = {"icc_profile": b"x" * count}
    elif kind == "many":
        for i in range(0, count, 900_000):
            info.add_text(str(i), "w" * 900_000, zip=True)
    elif kind == "iTXt":
        info.add_itxt("workflow", "w" * count, zip=True)
    else:
        info.add_text("workflow", "w" * count, zip=kind == "zTXt")
    content = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(content, "PNG", pnginfo=info, **options)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "icc", "many"])
def test_a_png_may_carry_much_more_than_its_pixels(kind: str, tmp_path: Path) -> None:
    """The workflow of a generator, or a profile of a printer: Pillow by itself takes a megabyte."""
    content = with_words(kind, 3_000_000)
    assert isinstance(examine(lambda: io.BytesIO(content), len(content), ScanConfig()), Measured)
    assert decode(content).getpixel((5, 5)) == (255, 0, 0)
    bomb = with_words(kind, 68_000_000) if kind in ("zTXt", "icc") else None
    if bomb is not None:
        reason = "more text than 64 MB in a chunk, or 256 MB in all"
        assert examine(lambda: io.BytesIO(bomb), len(bomb), ScanConfig()) == reason, "and yet there is a bound"
    (tmp_path / "a.png").write_bytes(content)
    save_image(tmp_path / "b.png")
    assert len(folder_set(tmp_path)) == 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
@pytest.mark.parametrize("notes", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\0\0", b"Exif\0\0"])
def test_notes_that_cannot_be_read_turn_nothing(ending: str, notes: bytes, tmp_path: Path) -> None:
    path = save_image(tmp_path / f"a.{ending}", exif=notes)
    assert isinstance(examine(lambda: path, 99, ScanConfig()), Measured) and decode(path).size == (40, 30)


def test_ten_thousand_damaged_images(tmp_path: Path) -> None:
    good = save_image(tmp_path / "good.png")
    contents = [content for content, _ in BROKEN.values()]
    for i in range(10_000):
        (tmp_path / f"{i:05d}.jpg").write_bytes(contents[i % len(contents)][:20_000])
    tracemalloc.start()
    with pytest.raises(UserError, match=r"10000 of 10001 images cannot be read.*The first: '00000.jpg'") as error:
        folder_set(tmp_path)
    assert str(error.value).count("(") == 10 and "\n" not in str(error.value)
    image_set = folder_set(tmp_path, scan={"max_broken_fraction": 1.0})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert image_set.names == [good.name] and peak < 2e8
    report = image_set.parts[0].report
    assert report.total == 10_001 and sum(report.reasons.values()) == 10_000 and len(report.reasons) >= 4


def test_a_scan_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        save_image(tmp_path / f"{i}.png")
    assert len(folder_set(tmp_path)) == 4
    looked = []

    def recording_examine(source: object, size: int, spec: ScanConfig) -> Measured | str:
        looked.append(source)
        return examine(source, size, spec)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("src.data.scan.examine", recording_examine)
    assert len(folder_set(tmp_path)) == 4 and not looked
    (tmp_path / "2.png").write_bytes(b"broken now")
    with pytest.raises(UserError, match="1 of 4"):
        folder_set(tmp_path)
    assert len(looked) == 1
    assert len(folder_set(tmp_path, scan={"max_broken_fraction": 0.25})) == 3 and len(looked) == 1
    for file in (cache_folder() / "scans").glob("*.json"):
        file.write_text("{cut")  # a damaged memory costs a scan, nothing else
    assert len(folder_set(tmp_path, scan={"max_broken_fraction": 0.25})) == 3 and len(looked) == 5


# ---------------------------------------------------------------------------------------------- decoding


def rgb(path: Path | bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(decode(path, channels=channels))


def test_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = rgb(tmp_path / "turned.jpg")
    assert pixels.shape == (20, 10, 3) and pixels[2].mean() > 200 and pixels[-3].mean() < 50


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert bool((rgb(tmp_path / "clear.png") == 255).all())
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert bool((rgb(tmp_path / "palette.png") == 255).all())
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "half.png")
    assert abs(int(rgb(tmp_path / "half.png")[0, 0, 0]) - 127) <= 1


def test_grey_cmyk_16_bits_and_animations(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    assert rgb(tmp_path / "grey.png")[0, 0].tolist() == [77, 77, 77]
    assert rgb(tmp_path / "grey.png", channels=1).shape == (4, 4)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    red = rgb(tmp_path / "cmyk.jpg")[4, 4]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    values = np.array([[0, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert rgb(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[-2.0, 0.0, 2.0]], dtype=np.float32)).save(tmp_path / "float.tiff")
    assert rgb(tmp_path / "float.tiff")[0, :, 0].tolist() == [0, 128, 255]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("blue", "red")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert rgb(tmp_path / "moving.gif")[0, 0].tolist() == [0, 0, 255]


def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path: Path) -> None:
    save_image(tmp_path / "large.jpg", size=(1600, 1200))
    assert decode(tmp_path / "large.jpg", at_least=64).size == (200, 150)


# ---------------------------------------------------------------------------------------------- the square


def test_the_square_is_cut_from_the_middle_or_at_random() -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 32, axis=0)  # (32, 64, 1)
    spec = ImageConfig(size=32, channels=1)
    assert square(ramp, spec, MIDDLE)[0, :, 0].tolist() == list(range(16, 48))
    random = ImageConfig(size=32, channels=1, crop="random")
    assert square(ramp, random, np.array([0.0, 0, 1]))[0, 0, 0] == 0
    assert square(ramp, random, np.array([0.999, 0, 1]))[0, 0, 0] == 31
    flipped = ImageConfig(size=32, channels=1, flip=True)
    assert square(ramp, flipped, np.array([0, 0, 0.4]))[0, :, 0].tolist() == list(range(47, 15, -1))
    assert square(ramp, flipped, np.array([0, 0, 0.6]))[0, 0, 0] == 16


def test_resizing_is_antialiased_and_cheap_for_ribbons() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (256, 128))
    small = square(Image.fromarray(stripes), ImageConfig(size=16, channels=1), MIDDLE)
    assert abs(small.astype(int) - 127).max() < 30, "without antialiasing the stripes would come out black or white"
    ribbon = Image.new("L", (40_000, 400))
    assert square(ribbon, ImageConfig(size=512, channels=1), MIDDLE).shape == (512, 512, 1)


def test_channels_are_made_to_fit() -> None:
    grey = np.full((8, 8, 1), 9, np.uint8)
    assert square(grey, ImageConfig(size=8, channels=3), MIDDLE)[0, 0].tolist() == [9, 9, 9]
    assert square(np.full((8, 8, 3), 9, np.uint8), ImageConfig(size=8, channels=1), MIDDLE).shape == (8, 8, 1)


def test_position_uniforms_are_uniform_and_a_function_of_seed_and_position() -> None:
    u = position_uniforms(3, np.arange(20_000))
    assert u.shape == (20_000, 3) and u.min() >= 0 and u.max() < 1
    assert abs(u.mean(0) - 0.5).max() < 0.01 and abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    assert np.array_equal(position_uniforms(3, np.arange(50, 60)), u[50:60])
    assert not np.array_equal(position_uniforms(4, np.arange(10)), u[:10])


# ---------------------------------------------------------------------------------------------- sources


def test_digits_and_shapes() -> None:
    digits = open_sources(DigitsSource(source="digits"))
    assert len(digits) == 1797 and digits.class_names == tuple("0123456789")
    train, test = (open_sources(DigitsSource(source="digits", split=split)) for split in ("train", "test"))
    assert len(train) + len(test) == 1797 and not set(train.names) & set(test.names) and 120 < len(test) < 240
    shapes = open_sources(ShapesSource(source="shapes", count=8, size=16))
    assert shapes.class_names == SHAPES and shapes.labels.tolist() == [0, 1, 2, 3] * 2
    same = open_sources(ShapesSource(source="shapes", count=8, size=16))
    assert same.fingerprint == shapes.fingerprint
    assert np.array_equal(same.parts[0].load(3, channels=3), shapes.parts[0].load(3, channels=3))
    shape = draw_shape("circle", 32, np.random.default_rng(0))
    assert shape.shape == (32, 32, 3) and len(np.unique(shape.reshape(-1, 3), axis=0)) > 2


def test_held_out_images_are_a_function_of_the_name(tmp_path: Path) -> None:
    for i in range(60):
        save_image(tmp_path / "a" / f"{i}.png", size=(12, 10 + i % 3))
    spec = validate(FolderSource, {"source": "folder", "path": str(tmp_path / "a")})
    train, held = open_data(spec, 0.3)
    assert held is not None and len(train) + len(held) == 60 and not set(train.names) & set(held.names)
    before = set(held.names)
    for i in range(60, 90):
        save_image(tmp_path / "a" / f"{i}.png", size=(12, 10))
    _, later = open_data(spec, 0.3)
    assert later is not None and before < set(later.names), "more images move nobody from one side to the other"
    assert open_data(spec, 0.0)[1] is None
    with pytest.raises(UserError, match="leaves one side empty"):
        open_data(validate(FolderSource, {"source": "folder", "path": str(tmp_path / "a"), "subset": 1}), 0.1)


def test_several_sources_and_subsets(tmp_path: Path) -> None:
    one = classes_folder(tmp_path / "one", "dog", "cat")
    two = classes_folder(tmp_path / "two", "cat", "emu")
    specs = [validate(FolderSource, {"source": "folder", "path": str(path)}) for path in (one, two)]
    both = open_sources(specs)
    assert both.counts == {"cat": 6, "dog": 3, "emu": 3}
    assert [both.class_names[label] for label in both.labels] == [name.split("/")[0] for name in both.names]
    few = open_sources(validate(FolderSource, {"source": "folder", "path": str(one), "subset": 4}))
    fewer = open_sources(validate(FolderSource, {"source": "folder", "path": str(one), "subset": 2}))
    digits, held_out = open_data(validate(DigitsSource, {"source": "digits", "subset": 100}), 0.1)
    assert len(digits) > 80 and held_out is not None and len(held_out) > 3, "a subset is not all held out"
    assert len(few) == 4 and set(fewer.names) < set(few.names)
    held = open_data(specs[1], specs[1])[1]
    assert held is not None and len(held) == 6
    with pytest.raises(UserError, match="classes that data lacks: emu"):
        open_data(specs[0], specs[1])


def test_datasets_from_disk_and_imagefolder(tmp_path: Path) -> None:
    import datasets

    root = classes_folder(tmp_path / "images", "cat", "dog")
    by_folder = {"source": "datasets", "name": "imagefolder", "data_dir": str(root), "label_column": "label"}
    image_set = open_sources(validate(DatasetsSource, by_folder))
    assert image_set.counts == {"cat": 3, "dog": 3}
    loaded = image_set.parts[0].load(4, channels=3)
    assert isinstance(loaded, Image.Image) and loaded.getpixel((0, 0)) == (0, 128, 0)

    files = sorted(str(path) for path in root.rglob("*.png"))
    rows = datasets.Dataset.from_dict({"picture": files, "style": ["x", "y", "x", "y", "x", None], "n": list(range(6))})
    rows = rows.cast_column("picture", datasets.Image())
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    saved = {"source": "datasets", "name": str(tmp_path / "saved"), "image_column": "picture", "label_column": "style"}
    image_set = open_sources(validate(DatasetsSource, saved))
    assert image_set.counts == {"x": 3, "y": 2, "(no class)": 1}
    for change, message in [
        ({"label_column": "stile"}, "no label column 'stile'; it has: style, n"),
        ({"image_column": "image"}, "no image column 'image'; it has: picture"),
        ({"split": "test"}, "no split 'test'; it has: train"),
        ({"name": str(tmp_path / "absent")}, "cannot be loaded"),
    ]:
        with pytest.raises(UserError, match=message):
            open_sources(validate(DatasetsSource, {**saved, **change}))


def test_a_image_that_breaks_after_the_scan_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, colour in enumerate(("red", "green", "blue")):
        save_image(tmp_path / f"{i}.png", colour=colour)
    image_set = folder_set(tmp_path)
    (tmp_path / "1.png").write_bytes(b"gone")
    batch = image_set.batch(np.array([0, 1]), ImageConfig(size=8), np.tile(MIDDLE, (2, 1)))
    assert batch[1, 0, 0].tolist() == [0, 0, 255]
    assert "'1.png' can no longer be read" in capsys.readouterr().out


def test_a_batch_of_a_ready_set_is_the_same_as_one_by_one() -> None:
    spec = ImageConfig(size=16, channels=3, flip=True)
    indices, u = np.array([5, 0, 5, 7]), position_uniforms(0, np.arange(4))
    slow = open_sources(ShapesSource(source="shapes", count=8, size=16))
    fast = open_sources(ShapesSource(source="shapes", count=8, size=16))
    fast.prepare(spec)
    assert fast.ready
    assert np.array_equal(fast.batch(indices, spec, u), slow.batch(indices, spec, u))


# ---------------------------------------------------------------------------------------------- packing


def packed_set(path: Path, split: str = "all") -> ImageSet:
    return open_sources(validate(PackedSource, {"source": "packed", "path": str(path), "split": split}))


def test_packed_images_are_those_of_the_folder(tmp_path: Path) -> None:
    root = classes_folder(tmp_path / "images", "a", "b")
    image_set = folder_set(root)
    assert pack(image_set, tmp_path / "packed", size=16, channels=3, held_out=0.5) == 6
    packed = packed_set(tmp_path / "packed")
    assert (packed.names, packed.class_names) == (image_set.names, image_set.class_names)
    assert packed.labels.tolist() == image_set.labels.tolist()
    for i in range(6):
        original = image_set.parts[0].load(i, channels=3)
        assert isinstance(original, Image.Image)
        assert np.array_equal(packed.parts[0].load(i, channels=3), resize_shorter_side(original, 16))
    train, held = packed_set(tmp_path / "packed", "train"), packed_set(tmp_path / "packed", "held_out")
    assert sorted(train.names + held.names) == image_set.names and set(held.names) == set(open_data(*_spec(root), 0.5)[1].names)  # pyright: ignore
    with pytest.raises(UserError, match="exists"):
        pack(image_set, tmp_path / "packed", size=16, channels=3)
    (tmp_path / "packed" / "pixels.bin").write_bytes(b"cut")
    with pytest.raises(UserError, match="cut; pack it again"):
        packed_set(tmp_path / "packed")
    with pytest.raises(UserError, match="no manifest"):
        packed_set(root)


def _spec(root: Path) -> tuple[FolderSource]:
    return (validate(FolderSource, {"source": "folder", "path": str(root)}),)


def test_packed_squares_are_one_indexed_copy(tmp_path: Path) -> None:
    pack(open_sources(ShapesSource(source="shapes", count=8, size=16)), tmp_path / "packed", size=16, channels=3)
    image_set = packed_set(tmp_path / "packed")
    image_set.prepare(ImageConfig(size=16))
    assert image_set.ready and image_set._in_memory is not None and isinstance(image_set._in_memory[0], np.memmap)


def test_packing_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_set = folder_set(classes_folder(tmp_path / "images", "a", "b", each=5))
    pack(image_set, tmp_path / "whole", size=16, channels=3)
    monkeypatch.setattr(packing_module, "BLOCK", 2)
    real, count = packing_module.resize_shorter_side, []

    def dies(image: Image.Image, size: int) -> np.ndarray:
        count.append(1)
        if len(count) > 5:
            raise KeyboardInterrupt
        return real(image, size)

    monkeypatch.setattr(packing_module, "resize_shorter_side", dies)
    with pytest.raises(KeyboardInterrupt):
        pack(image_set, tmp_path / "packed", size=16, channels=3)
    assert not (tmp_path / "packed").exists()
    with open(tmp_path / "packed.partial" / "pixels.bin", "ab") as file:
        file.write(b"half an image")
    monkeypatch.setattr(packing_module, "resize_shorter_side", lambda image, size: (count.append(1), real(image, size))[1])
    count.clear()
    pack(image_set, tmp_path / "packed", size=16, channels=3)
    assert 0 < len(count) < 10, "what was packed before the kill was kept"
    for name in ("pixels.bin", "records.npy"):
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "packed.partial").exists()


# ---------------------------------------------------------------------------------------------- archives


def make_zip(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, jpeg())
    return path


def make_tar(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for member in members:
            content = jpeg() if member.isfile() else b""
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def test_archives_are_unpacked(tmp_path: Path) -> None:
    assert unpack(make_zip(tmp_path / "a.zip", ["x/1.jpg", "x/2.jpg"]), tmp_path / "out") == 2
    assert unpack(make_tar(tmp_path / "a.tar.gz", tarfile.TarInfo("y/1.jpg")), tmp_path / "tar") == 1
    assert len(folder_set(tmp_path / "out")) == 2 and len(folder_set(tmp_path / "tar")) == 1
    with pytest.raises(UserError, match="not empty"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize("evil", ["../out.jpg", "/abs.jpg", "a/../../b.jpg", "C:\\x.jpg", "..\\x.jpg"])
def test_no_name_leaves_the_folder(tmp_path: Path, evil: str) -> None:
    for archive in (
        make_zip(tmp_path / "evil.zip", ["fine.jpg", evil]),
        make_tar(tmp_path / "evil.tar.gz", tarfile.TarInfo(evil)),
    ):
        with pytest.raises(UserError, match="would leave the folder"):
            unpack(archive, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar.gz", "evil.zip"], "nothing is left behind"


def test_links_and_damage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would leave"):
        unpack(make_tar(tmp_path / "link.tar.gz", link("inner", "/etc")), tmp_path / "out")
    whole = make_zip(tmp_path / "cut.zip", ["a.jpg", "b.jpg"]).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.tar.gz").write_bytes(make_tar(tmp_path / "b.tar.gz", tarfile.TarInfo("a.jpg")).read_bytes()[:-200])
    for name, message in [
        ("cut.zip", "neither"),
        ("cut.tar.gz", "cannot be unpacked|neither"),
        ("none.zip", "no such archive"),
    ]:
        with pytest.raises(UserError, match=message):
            unpack(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_disk_without_room_for_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Known before the first byte: of a zip to the byte, of a tar by its own size."""
    names, rng = [f"{i}.png" for i in range(20)], np.random.default_rng(0)
    path, free_bytes = tmp_path / f"a.{kind}", [3_000_000]
    with zipfile.ZipFile(path, "w") if kind == "zip" else tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as file:
        for name in names:
            content = rng.bytes(200_000)
            if isinstance(file, zipfile.ZipFile):
                file.writestr(name, content)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes[0]))
    for each in (zipfile.ZipFile, tarfile.TarFile):
        monkeypatch.setattr(each, "extract", lambda *_, **__: pytest.fail("a byte was written"))
    with pytest.raises(UserError, match=r"a\.\S+ unpacks to (at least )?4\.\d MB and 3\.0 MB are free; make room$"):
        unpack(path, tmp_path / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    free_bytes[0] = 10**9
    for each in (zipfile.ZipFile, tarfile.TarFile):
        monkeypatch.setattr(each, "extract", full)
    with pytest.raises(UserError, match=r"MB\) was not unpacked: the disk is full; make room and try again$"):
        unpack(path, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


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


def test_what_cannot_be_read_now_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        save_image(tmp_path / f"{i}.png")
    real, denied = Image.open, [True]

    def deny(source: object, **options: object) -> Image.Image:
        if denied[0] and str(source).endswith("1.png"):
            raise PermissionError(13, "Permission denied")
        return real(source, **options)  # pyright: ignore

    monkeypatch.setattr(Image, "open", deny)
    image_set = folder_set(tmp_path, scan={"max_broken_fraction": 0.5})
    assert image_set.parts[0].report.reasons == {"cannot be read now: Permission denied": 1}
    denied[0] = False
    assert len(folder_set(tmp_path)) == 3


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ATELIER_CACHE", str(tmp_path / "file" / "cache"))
    save_image(tmp_path / "data" / "0.png")
    assert len(folder_set(tmp_path / "data")) == 1


def test_a_replaced_image_is_of_the_same_class(tmp_path: Path) -> None:
    image_set = folder_set(classes_folder(tmp_path, "a", "b", each=2))
    (tmp_path / "a" / "1.png").write_bytes(b"gone")
    batch = image_set.batch(np.array([1]), ImageConfig(size=8), MIDDLE[None])
    assert batch[0, 0, 0].tolist() == [255, 0, 0], "the other red one, not the next in the list"


def test_a_packed_split_with_gaps_is_one_indexed_copy_too(tmp_path: Path) -> None:
    shapes = open_sources(ShapesSource(source="shapes", count=40, size=16))
    pack(shapes, tmp_path / "packed", size=16, channels=3, held_out=0.3)
    held = packed_set(tmp_path / "packed", "held_out")
    held.prepare(ImageConfig(size=16))
    assert held.ready and 0 < len(held) < 40
    batch = held.batch(np.arange(len(held)), ImageConfig(size=16), np.tile(MIDDLE, (len(held), 1)))
    for name, pixels in zip(held.names, batch, strict=True):
        assert np.array_equal(pixels, shapes.parts[0].load(shapes.names.index(name), channels=3))
    other = packed_set(tmp_path / "packed")
    other.prepare(ImageConfig(size=8))
    assert not other.ready, "resizing is work for the loader's workers"
