"""Files that are images to their owner: read, or counted and named with what would read them."""

import importlib.util
import io
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError, features

from src.config import UserError, validate
from src.data import ImageSet, formats, open_sources
from src.data.scan import ScanConfig, examine
from src.data.sources import FolderSource
from src.data.transforms import decode
from src.sampling.edit import files_of
from tests.conftest import run_in_process

SIDE = (12, 8)


def folder_set(path: Path, **options: object) -> ImageSet:
    return open_sources(validate(FolderSource, {"source": "folder", "path": str(path), **options}))


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What can be read here is found out anew, before and after."""
    caches = [formats._formats, formats.endings, formats.unreadable]
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def by_hand(name: str) -> bytes:
    """Files that Pillow reads and does not write: 12 x 8 pixels."""
    width, height = SIDE
    grey = bytes(range(width * height))
    if name == "PSD":
        head = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 1, height, width, 8, 1)
        return head + bytes(12) + struct.pack(">H", 0) + grey
    if name == "SUN":
        return struct.pack(">8I", 0x59A66A95, width, height, 8, len(grey), 1, 0, 0) + grey
    if name == "XPM":
        rows = ",\n".join(f'"{"ab" * (width // 2)}"' for _ in range(height))
        return (
            f'/* XPM */\nstatic char *x[] = {{\n"{width} {height} 2 1",\n"a c #FF0000",\n"b c #00FF00",\n{rows}\n}};\n'.encode()
        )
    if name == "FITS":
        cards = ("SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2")
        cards += (f"NAXIS1  = {width:20d}", f"NAXIS2  = {height:20d}", "END")
        return "".join(f"{card:80}" for card in cards).ljust(2880).encode() + grey.ljust(2880, b"\0")
    assert name == "CUR"
    icon = io.BytesIO()
    Image.new("RGBA", (16, 16), "red").save(icon, "ICO", sizes=[(16, 16)], bitmap_format="bmp")
    return icon.getvalue()[:2] + b"\2" + icon.getvalue()[3:]


def content(name: str) -> bytes:
    if name in ("PSD", "SUN", "XPM", "FITS", "CUR"):
        return by_hand(name)
    file = io.BytesIO()
    sizes = {"sizes": [SIDE]} if name == "ICO" else {}  # Pillow below 13 makes no icon of less than 16 px by itself
    Image.new("1" if name == "XBM" else "RGB", SIDE).save(file, name, **sizes)
    return file.getvalue()


@pytest.mark.parametrize(
    "name", [name for name in formats.BUILT_IN if name not in formats.LIBRARIES or features.check(formats.LIBRARIES[name])]
)
def test_what_pillow_reads_is_read(tmp_path: Path, name: str) -> None:
    for i, ending in enumerate(formats.BUILT_IN[name]):
        (tmp_path / f"{i}{ending.upper() if i % 2 else ending}").write_bytes(content(name))
    image_set = folder_set(tmp_path)
    assert len(image_set) == len(formats.BUILT_IN[name]) == len(files_of(str(tmp_path)))
    for i in range(len(image_set)):
        image = image_set.parts[0].load(i, channels=3)
        assert isinstance(image, Image.Image) and image.mode == "RGB"


def test_no_other_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {"EPS", "WMF", "PDF", "MPEG"} & set(formats.BUILT_IN)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    eps = io.BytesIO()
    Image.new("RGB", SIDE).save(eps, "EPS")
    for name in ("a.png", "a.eps", "a.tga"):
        (tmp_path / name).write_bytes(eps.getvalue())
        with pytest.raises(UnidentifiedImageError):
            decode(tmp_path / name)
    assert examine(lambda: tmp_path / "a.png", 100, ScanConfig()) == "not an image"


def test_what_has_no_signature_goes_by_its_ending(tmp_path: Path) -> None:
    (tmp_path / "a.tga").write_bytes(content("TGA"))
    (tmp_path / "a.png").write_bytes(content("TGA"))
    (tmp_path / "b.tga").write_bytes(content("PNG"))
    assert decode(tmp_path / "a.tga").size == decode(tmp_path / "b.tga").size == SIDE
    assert examine(lambda: tmp_path / "a.png", 100, ScanConfig()) == "not an image"


# ---------------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("ending", "advice"),
    [
        (".HEIC", "pip install pillow-heif"),
        (".jxl", "pip install pillow-jxl-plugin"),
        (".NEF", "pip install rawpy"),
        (".dng", "pip install rawpy"),
        (".pdf", "draw its pages first"),
        (".svg", "draw them first"),
        (".MOV", "ffmpeg"),
        (".zip", "prepare_data.py unpack"),
    ],
)
def test_what_cannot_be_read_is_counted_and_named(
    tmp_path: Path, ending: str, advice: str, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for i in range(4):
        Image.new("RGB", SIDE, (i, 0, 0)).save(tmp_path / f"{i}.png")
    for i in range(40):
        (tmp_path / f"IMG_{i}{ending}").write_bytes(b"x")
    output = run_in_process("prepare_data.py", "check", tmp_path)
    assert "4 images can be trained on, 40 files are left out" in output.out
    assert f"40  {ending.lower()} (" in output.out and advice in output.out
    findings = json.loads(run_in_process("prepare_data.py", "check", tmp_path, "--json").out)
    assert len(findings["skipped"]) == 40 and findings["skipped"][0][0] == f"IMG_0{ending}"
    with pytest.raises(UnidentifiedImageError, match=re.escape(advice)):
        decode(tmp_path / f"IMG_0{ending}")  # as `sample.py --image` does
    for file in tmp_path.glob("*.png"):
        file.unlink()
    output = run_in_process("prepare_data.py", "check", tmp_path)
    assert output.status == 2 and output.err.count("\n") == 1
    assert f"holds no images that can be read here: 40 {ending.lower()} (" in output.err and advice in output.err


def test_a_folder_of_other_files_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.TXT", "sub/c.parquet", "README"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"holds no images; it has 2 .txt, 1 without an ending, 1 .parquet"):
        folder_set(tmp_path)
    (tmp_path / "sub" / "x.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images that can be read here: 1 .heic"):
        folder_set(tmp_path)


def test_raw_files_beside_images_in_class_folders_are_no_class(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", SIDE).save(tmp_path / name / "0.png")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.cr2").write_bytes(b"x")
    image_set = folder_set(tmp_path)
    assert image_set.class_names == ("cat", "dog") and image_set.parts[0].report.skipped == [
        ("raw/0.cr2", formats.reason_for(".cr2"))
    ]


@pytest.mark.parametrize("where", ["dog", "raw/deep", "."])
def test_files_beside_the_only_folder_that_can_be_read_are_counted_too(tmp_path: Path, where: str) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", SIDE).save(tmp_path / "cat" / "0.png")
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    (tmp_path / where / "0.dng").write_bytes(b"x")
    assert dict(folder_set(tmp_path).parts[0].report.skipped) == {str(Path(where) / "0.dng"): formats.reason_for(".dng")}


# ---------------------------------------------------------------------------------------------- plugins

HEIF = """
from PIL import Image, ImageFile
class Opened(ImageFile.ImageFile):
    format = "HEIF"
    def _open(self):
        self.fp.seek(8)
        self._size, self._mode = (2, 1), "RGB"
        self.tile = [("raw", (0, 0, 2, 1), 8, ("RGB", 0, 1))]
def register_heif_opener():
    Image.register_open("HEIF", Opened, lambda prefix: prefix[:8] == b"ftypheic")
"""
RAWPY = """
import numpy
class imread:
    def __init__(self, file):
        assert file.read() == b"raw"
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def postprocess(self, use_camera_wb):
        assert use_camera_wb
        return numpy.full((3, 5, 3), 7, numpy.uint8)
"""


def test_plugins_that_are_installed_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.HEIC").write_bytes(b"ftypheic" + bytes([1, 2, 3, 4, 5, 6]))
    (tmp_path / "data" / "b.Nef").write_bytes(b"raw")
    (tmp_path / "data" / "c.jxl").write_bytes(b"x")
    Image.new("RGB", SIDE).save(tmp_path / "data" / "d.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert folder_set(tmp_path / "data").names == ["d.png"] and formats.with_plugins("key") == "key"
    monkeypatch.undo()
    for cache in (formats._formats, formats.endings, formats.unreadable):
        cache.cache_clear()
    monkeypatch.setenv("ATELIER_CACHE", str(tmp_path / "cache"))
    packages = {"pillow_heif": HEIF, "rawpy": RAWPY, "pillow_jxl": "raise OSError('its library is missing')"}
    for name, source in packages.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    try:
        image_set = folder_set(tmp_path / "data")
        assert image_set.names == ["a.HEIC", "b.Nef", "d.png"] and formats.with_plugins("key") == "key|HEIF"
        assert np.asarray(image_set.parts[0].load(0, channels=3)).tolist() == [[[1, 2, 3], [4, 5, 6]]]
        assert np.asarray(image_set.parts[0].load(1, channels=3)).shape == (3, 5, 3)
        assert [name for name, _ in image_set.parts[0].report.skipped] == ["c.jxl"], "a plugin that does not start is as none"
    finally:
        Image.OPEN.pop("HEIF", None)
        if "HEIF" in Image.ID:
            Image.ID.remove("HEIF")
        for name in packages:
            sys.modules.pop(name, None)


def test_check_says_where_the_first_of_several_images_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", SIDE, (90 * i, 0, 0)) for i in range(3)]
    for name in ("a.gif", "b.gif", "c.tif", "d.webp", "e.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    frames[0].save(tmp_path / "one.tiff")
    (tmp_path / "cursor.ico").write_bytes(content("ICO"))
    image_set = folder_set(tmp_path)
    assert image_set.sequences() == {
        "animated files (GIF), of which the first image is used": 2,
        "files of several pages (TIFF), of which the first image is used": 1,
        "animated files (WEBP), of which the first image is used": 1,
        "animated files (PNG), of which the first image is used": 1,
    }
    output = run_in_process("prepare_data.py", "check", tmp_path).out
    assert "2 animated files (GIF), of which the first image is used" in output


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image under another ending"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image under another ending"),
        (b"%PDF-1.7\n", "a PDF under another ending"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video under another ending"),
        (b"hello", "not an image"),
    ],
)
def test_images_under_another_ending_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for source in (lambda: tmp_path / "a.jpg", lambda: io.BytesIO(content)):
        assert str(examine(source, len(content), ScanConfig())).startswith(reason)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("state.json", "data.source=datasets"),
        ("data/train-0.parquet", "data.source=datasets"),
        ("gzip/emnist-letters-train-images-idx3-ubyte.gz", "data.source=emnist"),
    ],
)
def test_folders_for_another_source_are_named(tmp_path: Path, file: str, line: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match=line):
        open_sources(validate(FolderSource, {"source": "folder", "path": str(tmp_path)}))


def test_an_archive_in_place_of_a_folder_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a b.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"prepare_data.py unpack '.*a b.zip'"):
        open_sources(validate(FolderSource, {"source": "folder", "path": str(tmp_path / "a b.zip")}))
