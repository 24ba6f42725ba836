"""Real-ESRGAN's networks in small: read as spandrel reads them, tiles that join without a seam, folders of images."""

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from src.config import UserError
from src.models.pretrained import import_torchvision
from src.sampling import upscaling
from src.sampling.upscaling import Upscaler, open_upscaler, upscale_folder
from src.storage.blocks import Ranks

RADIUS = 19  # of one block, in pixels of its input: 1 + 3 x 5 + 1 convolutions, then 0.5 + 3 x 0.25 behind the upsampling


def build(name: str, **options: Any) -> Any:
    """One of spandrel's networks."""
    import_torchvision()
    return getattr(importlib.import_module(f"spandrel.architectures.{name}"), name)(**options)


def randomized(network: nn.Module) -> Any:
    """Every parameter from a normal; images come out in the middle of [0, 1], where nothing is cut, and far from flat."""
    generator = torch.Generator().manual_seed(1)
    parameters = list(network.parameters())
    with torch.no_grad():
        for p in parameters:
            scale = 0.8 / (p.shape[1] * p.shape[2] * p.shape[3]) ** 0.5 if p.ndim == 4 else 0.05
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
        parameters[-1].add_(0.5)
    return network.eval()


def rrdb(num_blocks: int = 1, **options: Any) -> Any:
    return randomized(build("ESRGAN", num_filters=8, num_blocks=num_blocks, **options))


def real_esrgan_names(network: Any, num_blocks: int) -> dict[str, Tensor]:
    """spandrel's names of a x4 RRDBNet as in Real-ESRGAN's files."""
    renamed = {"0": "conv_first", f"1.sub.{num_blocks}": "conv_body", "3": "conv_up1", "6": "conv_up2"}
    renamed |= {"8": "conv_hr", "10": "conv_last"}
    names = {}
    for key in network.state_dict():
        module, _, kind = key.removeprefix("model.").rpartition(".")
        if module not in renamed:
            _, _, block, dense, conv, _ = module.split(".")
            renamed[module] = f"body.{block}.{dense.lower()}.{conv}"
        names[key] = f"{renamed[module]}.{kind}"
    return {names[key]: value for key, value in network.state_dict().items()}


def images(batch: int = 2, channels: int = 3, height: int = 20, width: int = 17) -> Tensor:
    return torch.rand(batch, channels, height, width) * 2 - 1


@torch.no_grad()
def directly(network: nn.Module, x: Tensor) -> Tensor:
    return network((x + 1) / 2).clamp(0, 1) * 2 - 1


@pytest.fixture
def upscaler() -> Upscaler:
    return Upscaler(rrdb(), 4)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("num_blocks", [1, 6])
@pytest.mark.parametrize("layout", ["ESRGAN", "Real-ESRGAN", "params", "safetensors"])
def test_a_file_opens_as_the_network_that_was_saved(layout: str, num_blocks: int, tmp_path: Path) -> None:
    network = rrdb(num_blocks)
    path = tmp_path / "weights.pth"
    if layout == "ESRGAN":
        torch.save(network.state_dict(), path)
    elif layout == "Real-ESRGAN":
        torch.save({"params_ema": real_esrgan_names(network, num_blocks)}, path)
    elif layout == "params":  # the averaged ones are preferred
        other = real_esrgan_names(rrdb(num_blocks), num_blocks)
        torch.save({"params": {k: v * 2 for k, v in other.items()}, "params_ema": real_esrgan_names(network, num_blocks)}, path)
    else:
        path = tmp_path / "weights.safetensors"
        save_file(network.state_dict(), path)
    opened = open_upscaler(str(path), torch.device("cpu"))
    x = images()
    enlarged = opened.upscale(x)
    assert opened.scale == 4 and enlarged.shape == (2, 3, 80, 68) and enlarged.dtype == torch.float32
    assert sum(key.endswith("RDB1.conv1.0.weight") for key in opened.network.state_dict()) == num_blocks
    assert not opened.network.training and not any(p.requires_grad for p in opened.network.parameters())
    wanted = directly(network, x)
    assert wanted.std() > 0.05 and wanted.abs().max() < 1, "the test's network says something"
    torch.testing.assert_close(enlarged, wanted, rtol=0, atol=1e-6)


def test_the_default_is_the_published_file_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(upscaling, "PACKAGE", "no_such_package")
    message = refused(None)
    assert "models/RealESRGAN_x4plus.pth" in message and "xinntao/Real-ESRGAN" in message and "v0.1.0" in message
    (tmp_path / "models").mkdir()
    torch.save({"params_ema": real_esrgan_names(rrdb(), 1)}, tmp_path / "models" / "RealESRGAN_x4plus.pth")
    assert open_upscaler(None, "cpu").scale == 4


def test_the_compact_network(tmp_path: Path) -> None:
    network = randomized(build("Compact", num_feat=8, num_conv=2))
    torch.save({"params": network.state_dict()}, tmp_path / "compact.pth")
    x = images()
    enlarged = open_upscaler(tmp_path / "compact.pth", "cpu").upscale(x)
    torch.testing.assert_close(enlarged, directly(network, x), rtol=0, atol=1e-6)


def refused(weights: Path | str | None) -> str:
    with pytest.raises(UserError) as raised:
        open_upscaler(None if weights is None else str(weights), "cpu")
    assert "\n" not in str(raised.value)
    return str(raised.value)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    for name, legacy in (("zip.pth", False), ("legacy.pth", True)):
        content = {"params_ema": rrdb().state_dict(), "trap": RunsCode(tmp_path / "ran")}
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        assert "to load it is to run code" in refused(tmp_path / name)
    torch.save(rrdb(), tmp_path / "whole.pth")  # a pickled network names its classes, which would be imported
    assert "to load it is to run code" in refused(tmp_path / "whole.pth")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_upscaler_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def refuse(content: Any) -> str:
        torch.save(content, path)
        message = refused(path)
        assert str(path) in message
        return message

    assert "not a state dict" in refuse([torch.zeros(3)])
    assert "knows no network" in refuse({"weight": torch.zeros(3)})
    assert "not an upscaler" in refuse({1: torch.zeros(3)}) and "not an upscaler" in refuse({})
    assert "DnCNN" in refuse(randomized(build("DnCNN", in_nc=3, out_nc=3, nc=8, nb=4)).state_dict())
    assert "1 channels to 1 at scale 4" in refuse(rrdb(in_nc=1, out_nc=1).state_dict())
    assert "scale 1" in refuse(rrdb(scale=1).state_dict())
    state = rrdb().state_dict()
    assert "not an upscaler, or damaged" in refuse({k: v for k, v in state.items() if not k.endswith("RDB2.conv3.0.bias")})
    assert "not an upscaler, or damaged" in refuse(state | {"model.3.weight": torch.zeros(8, 8, 1, 1)})

    torch.save(state, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not weights\n", b"\x80\x02garbage"):
        path.write_bytes(content)
        assert "not a state dict that can be read safely" in refused(path)
    (tmp_path / "weights.safetensors").write_bytes(b"garbage!" * 8)
    assert "damaged" in refused(tmp_path / "weights.safetensors")
    assert "no such weights" in refused(tmp_path)


# ------------------------------------------------------------------------------------------------ tiles


def test_a_network_of_zeros_gives_the_constant_that_is_its_last_bias() -> None:
    network = build("ESRGAN", num_filters=8, num_blocks=1)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
        list(network.parameters())[-1].copy_(torch.tensor([0.75, 0.5, 2.0]))
    enlarged = Upscaler(network, 4, tile=16, overlap=4).upscale(images(1, 3, 40, 15))
    wanted = torch.tensor([0.5, 0.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 160, 60)
    torch.testing.assert_close(enlarged, wanted, rtol=0, atol=0)
    enlarged = Upscaler(network, 4).upscale(images(1, 1))
    torch.testing.assert_close(enlarged, torch.full((1, 1, 80, 68), 0.5), rtol=0, atol=1e-6)


def test_grey_goes_through_as_three_channels_whose_mean_comes_back(upscaler: Upscaler) -> None:
    x = images(channels=1)
    wanted = upscaler.upscale(x.expand(-1, 3, -1, -1)).mean(1, keepdim=True)
    enlarged = upscaler.upscale(x)
    assert enlarged.shape == (2, 1, 80, 68)
    torch.testing.assert_close(enlarged, wanted, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="1 or 3"):
        upscaler.upscale(images(channels=4))


def test_values_outside_are_cut_and_the_callers_tensor_stays(upscaler: Upscaler) -> None:
    x = images() * 2
    before = x.clone()
    torch.testing.assert_close(upscaler.upscale(x), upscaler.upscale(x.clamp(-1, 1)), rtol=0, atol=0)
    assert torch.equal(x, before)
    assert upscaler.upscale(x.double()).dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(70, 93), (48, 60), (30, 49), (97, 20)])
def test_with_the_receptive_radius_as_overlap_tiles_are_the_whole(upscaler: Upscaler, height: int, width: int) -> None:
    x = images(1, 3, height, width)
    whole = upscaler.upscale(x)
    torch.testing.assert_close(whole, directly(upscaler.network, x), rtol=0, atol=1e-6)
    tiled = replace(upscaler, tile=48, overlap=RADIUS).upscale(x)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)


def test_the_overlap_is_what_hides_the_seams(upscaler: Upscaler) -> None:
    x = images(1, 3, 90, 70)
    whole = upscaler.upscale(x)

    def error(overlap: int) -> Tensor:
        return (replace(upscaler, tile=40, overlap=overlap).upscale(x) - whole).abs().amax(dim=(0, 1))

    none, some, much = error(0), error(4), error(16)
    assert none.max() > 1e-2 > 3 * some.max() and much.max() < 1e-4
    rows = none[:, 4 * 8 : 4 * 30].amax(1)  # away from the vertical seams; tiles start at rows 0, 40 and 50
    assert rows[: 4 * 16].max() < 1e-4 < 1e-2 < rows[4 * 38 : 4 * 42].max(), "without overlap the error sits at the seam"


def test_all_tiles_of_an_image_have_one_size_and_cover_it_with_their_margins(upscaler: Upscaler) -> None:
    shapes = []
    upscaler.network.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    replace(upscaler, tile=32, overlap=8).upscale(images(2, 3, 75, 33))
    assert len(shapes) == 4 * 2 and set(shapes) == {(2, 3, 32, 32)}
    shapes.clear()
    replace(upscaler, tile=32, overlap=8).upscale(images(1, 3, 20, 75))
    assert len(shapes) == 4 and set(shapes) == {(1, 3, 20, 32)}
    for multiple in (1, 4):
        windows = Upscaler(upscaler.network, 4, multiple, tile=40, overlap=7)._windows
        for side in range(multiple, 200, multiple):
            parts = windows(side)
            assert [0, *(end for _, _, end in parts)] == [*(start for _, start, _ in parts), side]
            for at, start, end in parts:
                last = min(side, at + 40)
                assert at % multiple == 0 and start < end
                assert (start == 0 == at or start - at >= 7) and (end == side == last or last - end >= 7)


def test_a_network_that_folds_pixels_has_tiles_that_fold_the_same_ones(tmp_path: Path) -> None:
    """Real-ESRGAN's x2: four pixels are one to the network, so the radius is twice as large and sides are multiples of 4."""
    network = rrdb(in_nc=12, scale=4, shuffle_factor=2)
    torch.save({"params_ema": network.state_dict()}, tmp_path / "x2.pth")
    opened = open_upscaler(tmp_path / "x2.pth", "cpu")
    assert opened.scale == 2 and opened.multiple == 4
    x = images(1, 3, 111, 33)
    whole = opened.upscale(x)
    assert whole.shape == (1, 3, 222, 66)
    padded = functional.pad(x, (0, 3, 0, 1), mode="replicate")
    torch.testing.assert_close(whole, directly(network, padded)[:, :, :222, :66], rtol=0, atol=1e-6)
    tiled = replace(open_upscaler(tmp_path / "x2.pth", "cpu"), tile=91, overlap=2 * RADIUS).upscale(x)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)


def test_tiles_that_are_all_margin_are_refused(upscaler: Upscaler) -> None:
    for tile, overlap in ((32, 16), (0, 0), (32, -1)):
        with pytest.raises(UserError, match="keeps nothing"):
            replace(upscaler, tile=tile, overlap=overlap)


def test_one_pixel(tmp_path: Path) -> None:
    torch.save(rrdb().state_dict(), tmp_path / "weights.pth")
    assert open_upscaler(tmp_path / "weights.pth", "cpu").upscale(images(1, 3, 1, 1)).shape == (1, 3, 4, 4)


# ------------------------------------------------------------------------------------------------ folders


def save_random_image(path: Path, *size: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)
    return path


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    for i in range(5):
        save_random_image(folder / f"{i}.png", 6, 8, 3, seed=i)
    save_random_image(folder / "sub" / "grey.png", 6, 8)
    save_random_image(folder / "sub" / "wide.jpg", 5, 44, 3)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    save_random_image(folder / ".hidden" / "x.png", 6, 8, 3)
    (folder / "notes.txt").write_text("not an image")
    return folder


def upscale(folder: Path, out: Path, upscaler: Upscaler, *, batch_size: int = 3, rank: int = 0, world: int = 1) -> list[Path]:
    return upscale_folder(folder, out, upscaler, batch_size=batch_size, ranks=Ranks(rank, world))


def test_a_folder_becomes_pngs_of_the_same_names(
    folder: Path, tmp_path: Path, upscaler: Upscaler, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "large"
    written = upscale(folder, out, replace(upscaler, tile=40))
    names = [*(f"{i}.png" for i in range(5)), "sub/grey.png", "sub/wide.png"]
    assert written == [out / name for name in names]
    assert {path for path in out.rglob("[!.]*") if path.is_file()} == set(written)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and str(folder / "broken.jpg") in lines[0]
    assert pixels(out / "sub" / "grey.png").shape == (24, 32), "grey stays grey"
    assert pixels(out / "sub" / "wide.png").shape == (20, 176, 3)

    x = torch.from_numpy(pixels(folder / "2.png")).permute(2, 0, 1)[None] / 127.5 - 1
    enlarged = pixels(out / "2.png").astype(float)
    wanted = (directly(upscaler.network, x)[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(enlarged - wanted).max() <= 0.51


def test_what_was_overwritten_is_made_again(folder: Path, tmp_path: Path, upscaler: Upscaler) -> None:
    first = {path: path.read_bytes() for path in upscale(folder, tmp_path / "a", upscaler)}
    times = (folder / "1.png").stat()
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes())
    later = (tmp_path / "a" / "2.png").stat().st_mtime_ns + 1
    os.utime(folder / "2.png", ns=(times.st_atime_ns, later))
    upscale(folder, tmp_path / "a", upscaler)
    changed = [path.name for path, content in first.items() if path.read_bytes() != content]
    assert changed == ["2.png"], changed


def test_what_is_there_is_kept_and_the_rest_comes_out_the_same(folder: Path, tmp_path: Path, upscaler: Upscaler) -> None:
    written = upscale(folder, tmp_path / "a", upscaler)
    first = {path: path.read_bytes() for path in written}
    for path in written[1::2]:
        path.unlink()
    Image.new("RGB", (3, 3)).save(written[0])
    rewritten = written[0].read_bytes()
    calls = []
    upscaler.network.register_forward_hook(lambda *_: calls.append(1))
    assert upscale(folder, tmp_path / "a", upscaler) == written
    assert calls and {path: path.read_bytes() for path in written} == {**first, written[0]: rewritten}
    calls.clear()
    upscale(folder, tmp_path / "a", upscaler)
    assert not calls, "nothing is drawn twice, the batch with the broken file neither"


def test_ranks_share_the_images_and_give_the_same_bytes(folder: Path, tmp_path: Path, upscaler: Upscaler) -> None:
    whole = upscale(folder, tmp_path / "one", upscaler)
    first = upscale(folder, tmp_path / "two", upscaler, rank=0, world=2)
    assert tmp_path / "two" / "3.png" not in first, "the second batch of three is the other's, with the broken file"
    both = upscale(folder, tmp_path / "two", upscaler, rank=1, world=2)
    assert [path.relative_to(tmp_path / "two") for path in both] == [path.relative_to(tmp_path / "one") for path in whole]
    assert [path.read_bytes() for path in both] == [path.read_bytes() for path in whole]


def test_large_images_go_one_at_a_time(tmp_path: Path, upscaler: Upscaler) -> None:
    shapes = []
    upscaler.network.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    for i in range(4):
        save_random_image(tmp_path / "in" / f"{i}.png", 6, 30 if i < 2 else 8, 3)
    upscale(tmp_path / "in", tmp_path / "out", replace(upscaler, tile=20, overlap=4), batch_size=4)
    assert shapes == [(1, 3, 6, 20)] * 4 + [(2, 3, 6, 8)]


def test_folders_that_cannot_be_upscaled(folder: Path, tmp_path: Path, upscaler: Upscaler) -> None:
    out = tmp_path / "out"

    def refuse(source: Path, out: Path = out, **options: Any) -> str:
        with pytest.raises(UserError) as raised:
            upscale(source, out, upscaler, **options)
        assert "\n" not in str(raised.value) and not out.exists()
        return str(raised.value)

    assert "does not exist" in refuse(tmp_path / "nowhere")
    assert "not a folder" in refuse(folder / "1.png")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refuse(tmp_path / "empty")
    assert "lies in" in refuse(folder, folder / "large")
    assert "batch_size" in refuse(folder, batch_size=0)
    save_random_image(folder / "2.bmp", 6, 8, 3)
    message = refuse(folder)
    assert "2.bmp" in message and "2.png" in message and "rename" in message
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"nothing")
    assert "none of its 1 images" in refuse(tmp_path / "broken")
    save_random_image(tmp_path / "broken" / "b.png", 6, 8, 3)
    written = upscale(tmp_path / "broken", out, upscaler)
    (tmp_path / "broken" / "b.png").unlink()
    with pytest.raises(UserError, match="none of its 1 images"):
        upscale(tmp_path / "broken", out, upscaler)
    assert len(written) == 1 and written[0].exists(), "what an earlier run made is not lost"
