"""Colours as files mean them: profiles, kinds of profiles that are damaged or do not fit, deep grey that states its range."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from src.config import validate
from src.data import ImageSet, check_images, colour, open_sources
from src.data.sources import FolderSource
from src.data.transforms import decode
from tests.conftest import run_in_process
from tests.data import profiles


def saved(image: Image.Image, path: Path, **save: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **save)
    return path


def pixel(path: Path, channels: int = 3) -> tuple[int, ...]:
    image = decode(path, channels=channels)
    value = image.getpixel((image.width // 2, image.height // 2))
    return value if isinstance(value, tuple) else (int(value or 0),)


def opened(folder: Path) -> ImageSet:
    return open_sources(validate(FolderSource, {"source": "folder", "path": str(folder)}))


P3 = Image.new("RGB", (16, 16), (230, 40, 40))
WANTED = np.array([251, 0, 18])


@pytest.mark.parametrize(
    ("ending", "save"),
    [("png", {}), ("jpg", {"quality": 100, "subsampling": 0}), ("webp", {"lossless": True}), ("tif", {})],
)
def test_display_p3_becomes_srgb(tmp_path: Path, ending: str, save: dict[str, Any]) -> None:
    value = pixel(saved(P3, tmp_path / f"a.{ending}", icc_profile=profiles.display_p3(), **save))
    assert np.abs(np.array(value) - WANTED).max() <= 2, value
    assert pixel(saved(P3, tmp_path / f"plain.{ending}", **save))[0] in range(228, 233)


def test_a_palette_and_transparency_keep_what_they_are(tmp_path: Path) -> None:
    options = {"icc_profile": profiles.display_p3()}
    assert np.abs(np.array(pixel(saved(P3.quantize(2), tmp_path / "palette.png", **options))) - WANTED).max() <= 1
    clear = P3.convert("RGBA")
    assert np.abs(np.array(pixel(saved(clear, tmp_path / "opaque.png", **options))) - WANTED).max() <= 1
    clear.putalpha(128)
    half = np.array(pixel(saved(clear, tmp_path / "half.png", **options)))
    assert np.abs(half - (WANTED * 128 + 255 * 127) / 255).max() <= 2, half
    clear.putalpha(0)
    assert pixel(saved(clear, tmp_path / "clear.png", **options)) == (255, 255, 255)
    keyed = saved(P3, tmp_path / "keyed.png", transparency=(230, 40, 40), **options)
    assert pixel(keyed) == (255, 255, 255)


def test_a_profile_that_is_srgb_changes_nothing_and_makes_no_transform(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for name, profile in {
        "ours": profiles.srgb(),
        "of lcms": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    }.items():
        path = saved(image, tmp_path / f"{name}.png", icc_profile=profile)
        assert colour.read_profile(profile, "RGB") == (None, "")
        assert np.array_equal(np.asarray(decode(path)), np.asarray(image))
    grey = saved(image.convert("L"), tmp_path / "grey.jpg", icc_profile=profiles.srgb())
    with Image.open(grey) as plain:
        assert np.array_equal(np.asarray(decode(grey, channels=1)), np.asarray(plain)), "as cameras write grey"
    assert opened(tmp_path).parts[0].report.notes == {} and opened(tmp_path).decoder == 1


def test_grey_profiles(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8), 128)
    linear = saved(image, tmp_path / "linear.png", icc_profile=profiles.grey(1.0))
    assert abs(pixel(linear)[0] - 188) <= 2 and len(set(pixel(linear))) == 1
    assert abs(pixel(linear, channels=1)[0] - 188) <= 2
    half = saved(image.convert("LA"), tmp_path / "alpha.png", icc_profile=profiles.grey(1.0))
    assert abs(pixel(half)[0] - 188) <= 2
    deep = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    assert abs(pixel(saved(deep, tmp_path / "deep.png", icc_profile=profiles.grey(1.0)))[0] - 188) <= 2
    assert opened(tmp_path).parts[0].report.notes == {colour.CONVERTED: 3}


def test_lab_and_cmyk(tmp_path: Path) -> None:
    lab = saved(Image.new("LAB", (8, 8), (140, 160, 120)), tmp_path / "lab.tif")
    assert pixel(lab) == Image.new("LAB", (1, 1), (140, 160, 120)).convert("RGB").getpixel((0, 0))
    assert len(pixel(lab, channels=1)) == 1
    naive = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "plain.tif")
    assert pixel(naive) == (255, 0, 0)


@pytest.mark.parametrize(("ending", "save"), [("tif", {}), ("jpg", {"quality": 100, "subsampling": 0})])
def test_cmyk_by_its_profile(tmp_path: Path, ending: str, save: dict[str, Any]) -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    value = pixel(saved(red, tmp_path / f"press.{ending}", icc_profile=profiles.press(), **save))
    assert np.abs(np.array(value) - 198).max() <= 4, value
    assert opened(tmp_path).parts[0].report.notes == {colour.CONVERTED: 1}


@pytest.mark.parametrize(
    ("image", "profile", "note"),
    [
        (P3, profiles.damaged(), colour.DAMAGED),
        (P3, b"no profile at all" * 10, colour.DAMAGED),
        (P3, profiles.grey(1.8), colour.UNFIT),
        (P3.convert("L"), profiles.display_p3(), colour.UNFIT),
    ],
    ids=["cut", "nonsense", "grey on colour", "colour on grey"],
)
def test_a_profile_that_cannot_be_used_leaves_the_image_as_it_is_and_is_counted(
    tmp_path: Path, image: Image.Image, profile: bytes, note: str
) -> None:
    path = saved(image, tmp_path / "images" / "a.png", icc_profile=profile)
    saved(P3, tmp_path / "images" / "b.png")
    assert np.array_equal(np.asarray(decode(path)), np.asarray(image.convert("RGB")))
    image_set = opened(tmp_path / "images")
    assert len(image_set) == 2 and image_set.parts[0].report.notes == {note: 1} and image_set.decoder == 1
    assert f"1  {note}" in run_in_process("prepare_data.py", "check", tmp_path / "images").out


def test_a_profile_that_cannot_be_unpacked_is_counted_too(tmp_path: Path) -> None:
    content = saved(P3, tmp_path / "images" / "a.png").read_bytes()
    body = b"iCCP" + b"name\0\0" + b"not zipped"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "images" / "a.png").write_bytes(content[:33] + chunk + content[33:])
    assert pixel(tmp_path / "images" / "a.png") == (230, 40, 40)
    assert opened(tmp_path / "images").parts[0].report.notes == {colour.DAMAGED: 1}


def test_threads_share_a_transform(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [
        saved(
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)),
            tmp_path / f"{i}.png",
            icc_profile=profiles.display_p3(),
        )
        for i in range(16)
    ]
    one_by_one = [np.asarray(decode(path)) for path in paths]
    colour.read_profile.cache_clear()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert all(
                np.array_equal(a, b) for a, b in zip(one_by_one, pool.map(lambda p: np.asarray(decode(p)), paths), strict=True)
            )
    assert colour.read_profile.cache_info().currsize == 1


# ---------------------------------------------------------------------------------------------- deep grey

TWELVE = np.array([[0, 1000, 2047, 4095]] * 4, np.uint16)


def png_with_sbit(path: Path, values: np.ndarray, bits: int) -> Path:
    content = saved(Image.fromarray(values), path).read_bytes()
    body = b"sBIT" + bytes([bits])
    path.write_bytes(content[:33] + struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body)) + content[33:])
    return path


def row(path: Path) -> list[int]:
    return np.asarray(decode(path, channels=1))[0].tolist()


@pytest.mark.parametrize("tag", [281, 341], ids=["MaxSampleValue", "SMaxSampleValue"])
def test_a_tiff_that_states_its_largest_value(tmp_path: Path, tag: int) -> None:
    path = saved(Image.fromarray(TWELVE), tmp_path / "a.tif", tiffinfo={tag: 4095})
    assert row(path) == [0, 62, 127, 255]
    image_set = opened(tmp_path)
    assert image_set.parts[0].report.notes == {colour.SCALED: 1} and image_set.decoder == 2
    used = saved(Image.fromarray(TWELVE), tmp_path / "used.tif", tiffinfo={tag: 4000})
    assert row(used) == [0, 62, 127, 255], "the largest value that is used says how many bits there are, no more"
    lies = saved(Image.fromarray(TWELVE * 16), tmp_path / "lies.tif", tiffinfo={tag: 4095})
    assert row(lies)[-1] == 255 and row(lies)[1] == 62, "values above what is stated are of the whole range"


def test_a_tiff_of_twelve_bits(tmp_path: Path) -> None:
    packed = bytes([0x00, 0x03, 0xE8, 0x7F, 0xFF, 0xFF])  # 0, 1000, 2047, 4095
    tags = [
        (256, 3, 4),
        (257, 3, 1),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, 1),
        (279, 4, 6),
    ]
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + (struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value))
        for tag, kind, value in tags
    )
    file = b"II*\0" + struct.pack("<I", 14) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(file)
    assert row(tmp_path / "a.tif") == [0, 62, 127, 255]


def test_a_png_that_states_its_bits(tmp_path: Path) -> None:
    assert row(png_with_sbit(tmp_path / "low.png", TWELVE, 12)) == [0, 62, 127, 255]
    spread = (TWELVE << 4) | (TWELVE >> 8)
    assert row(png_with_sbit(tmp_path / "spread.png", spread, 12)) == [0, 62, 127, 255]
    dark = np.array([[0, 16, 160, 4000]], np.uint16)
    assert row(png_with_sbit(tmp_path / "dark.png", dark, 12)) == [0, 0, 1, 16], "a dark image that is as it should be"


def test_a_pgm_states_its_range(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 4095\n" + TWELVE[0].astype(">u2").tobytes())
    assert row(tmp_path / "a.pgm") == [0, 62, 127, 255]
    assert opened(tmp_path).decoder == 1, "as before"


def test_deep_grey_that_states_nothing_is_told_of(tmp_path: Path) -> None:
    saved(Image.fromarray(TWELVE), tmp_path / "images" / "a.png")
    saved(Image.fromarray(TWELVE * 16), tmp_path / "images" / "b.png")
    assert row(tmp_path / "images" / "a.png") == [0, 4, 8, 16]
    assert opened(tmp_path / "images").parts[0].report.notes == {colour.DARK: 1}
    run = SimpleNamespace(image=SimpleNamespace(size=1))
    assert check_images(run, tmp_path / "run", opened(tmp_path / "images")) == [f"of 1 images: {colour.DARK}"]
    assert (
        "16-bit grey whose values use 12 bits or fewer" in run_in_process("prepare_data.py", "check", tmp_path / "images").out
    )


def test_what_is_read_of_a_jpeg_without_a_profile_is_what_pillow_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = saved(Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)), tmp_path / "a.jpg")
    with Image.open(io.BytesIO(path.read_bytes())) as plain:
        assert np.array_equal(np.asarray(decode(path)), np.asarray(plain))


def test_floats_that_are_not_finite_do_not_blacken_an_image(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0], values[0, 1] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    pixels = np.asarray(decode(tmp_path / "a.tif", channels=1))
    assert pixels[0, 0] == 0
    assert pixels[0, 1] == pixels[7, 7] == 255
    assert 120 < pixels[4, 0] < 135
