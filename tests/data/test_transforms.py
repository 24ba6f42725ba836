"""From a file to the rectangle of pixels that a network sees."""

from pathlib import Path

import numpy as np
from PIL import Image

from src.data import ImageConfig
from src.data.transforms import AspectConfig, crop, decode, is_enlarged, position_uniforms
from tests.data.folders_of_images import MIDDLE, save_image


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


def test_the_square_is_cut_from_the_middle_or_at_random() -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 32, axis=0)  # (32, 64, 1)
    spec = ImageConfig(size=32, channels=1)
    assert crop(ramp, spec, MIDDLE)[0, :, 0].tolist() == list(range(16, 48))
    random = ImageConfig(size=32, channels=1, crop="random")
    assert crop(ramp, random, np.array([0.0, 0, 1]))[0, 0, 0] == 0
    assert crop(ramp, random, np.array([0.999, 0, 1]))[0, 0, 0] == 31
    flipped = ImageConfig(size=32, channels=1, flip=True)
    assert crop(ramp, flipped, np.array([0, 0, 0.4]))[0, :, 0].tolist() == list(range(47, 15, -1))
    assert crop(ramp, flipped, np.array([0, 0, 0.6]))[0, 0, 0] == 16


def test_resizing_is_antialiased_and_cheap_for_ribbons() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (256, 128))
    small = crop(Image.fromarray(stripes), ImageConfig(size=16, channels=1), MIDDLE)
    assert abs(small.astype(int) - 127).max() < 30, "without antialiasing the stripes would come out black or white"
    ribbon = Image.new("L", (40_000, 400))
    assert crop(ribbon, ImageConfig(size=512, channels=1), MIDDLE).shape == (512, 512, 1)


def test_channels_are_made_to_fit() -> None:
    grey = np.full((8, 8, 1), 9, np.uint8)
    assert crop(grey, ImageConfig(size=8, channels=3), MIDDLE)[0, 0].tolist() == [9, 9, 9]
    assert crop(np.full((8, 8, 3), 9, np.uint8), ImageConfig(size=8, channels=1), MIDDLE).shape == (8, 8, 1)


def test_position_uniforms_are_uniform_and_a_function_of_seed_and_position() -> None:
    u = position_uniforms(3, np.arange(20_000))
    assert u.shape == (20_000, 3) and u.min() >= 0 and u.max() < 1
    assert abs(u.mean(0) - 0.5).max() < 0.01 and abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03
    assert np.array_equal(position_uniforms(3, np.arange(50, 60)), u[50:60])
    assert not np.array_equal(position_uniforms(4, np.arange(10)), u[:10])


def test_a_rectangle_is_covered_and_what_is_over_is_cut() -> None:
    rows = np.repeat(np.arange(60, dtype=np.uint8)[:, None, None], 40, axis=1)  # (60, 40, 1): a tall image
    tall, wide = ImageConfig(size=(30, 40), channels=1), ImageConfig(size=(60, 20), channels=1)
    assert crop(rows, tall, MIDDLE)[:, 0, 0].tolist() == list(range(15, 45))  # as wide as it is: nothing is resized
    assert crop(rows, wide, MIDDLE).shape == (60, 20, 1) and crop(rows, wide, MIDDLE)[:, 7, 0].tolist() == list(range(60))
    half = crop(rows, ImageConfig(size=(30, 20), channels=1), MIDDLE)
    assert (
        half.shape == (30, 20, 1) and abs(int(half[3, 0, 0]) - 6) <= 1 and abs(int(half[-1, 0, 0]) - 58) <= 1
    )  # the whole image at half its size
    bottom = crop(rows, ImageConfig(size=(15, 20), channels=1, crop="random"), np.array([0.0, 0.999, 1.0]))
    assert abs(int(bottom[-1, 0, 0]) - 59) <= 1 and abs(int(bottom[0, 0, 0]) - 30) <= 2


def test_which_images_are_enlarged() -> None:
    sides = np.array([[64, 48], [63, 48], [64, 47], [200, 20]])  # width and height
    assert is_enlarged(sides, (48, 64)).tolist() == [False, True, True, True]
    assert is_enlarged(sides, 48).tolist() == [False, False, True, True]


def test_an_image_config_knows_its_shape() -> None:
    image = ImageConfig(size=64, crop="random", flip=True, aspect=AspectConfig())
    assert image.sides == (64, 64) and image.shape == (3, 64, 64)
    assert image.plain == ImageConfig(size=64, aspect=AspectConfig())
    assert image.at((48, 88)) == ImageConfig(size=(48, 88), crop="random", flip=True)
    assert image.at((64, 64)).size == 64  # a square has one side, in hashes as well
