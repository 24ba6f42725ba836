"""The scan: damaged files have their reasons, and what is known is not read again."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from src.config import UserError
from src.data.scan import Measured, ScanConfig, cache_folder, examine
from src.data.transforms import decode
from tests.data.folders_of_images import folder_set, save_image


def png(width: int, height: int) -> bytes:
    """A tiny PNG file that claims to be of this size: all its pixels are one byte. A decompression bomb when large: then the
    file ends after some of its first row."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    squeezer = zlib.compressobj(9)
    row, count = (bytes(1 + width), height) if width * height < 3e8 else (bytes(30_000), 1)
    rows = b"".join(squeezer.compress(row) for _ in range(count)) + squeezer.flush()
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_sides_are_those_of_the_upright_image(kind: str, orientation: int) -> None:
    """Orientations 5 to 8 exchange rows and columns: buckets go by the shape that the network sees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, kind, exif=exif)
    measured = examine(lambda: io.BytesIO(file.getvalue()), 99, ScanConfig())
    assert isinstance(measured, Measured)
    assert (measured.width, measured.height) == ((30, 40) if orientation > 4 else (40, 30)) == decode(file.getvalue()).size


def test_what_another_version_scanned_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2 remembered the sides as the file has them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(tmp_path / "turned.jpg", exif=exif)
    with monkeypatch.context() as before:
        before.setattr("src.data.scan.VERSION", 2)
        before.setattr("src.data.scan.is_turned", lambda _: False)
        assert folder_set(tmp_path).sides.tolist() == [[40, 30]]
    assert folder_set(tmp_path).sides.tolist() == [[30, 40]]


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
    assert sum(report.reasons.values()) == 10_000 and len(report.reasons) >= 4


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
