"""Real-ESRGAN's networks in small: read as spandrel reads them, tiles that join without a seam."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from src.config import UserError
from src.sampling.upscaling import Upscaler, open_upscaler
from tests.interop.upscalers import build, directly, randomise_around_grey, rrdb

RADIUS = 19  # of one block, in pixels of its input: 1 + 3 x 5 + 1 convolutions, then 0.5 + 3 x 0.25 behind the upsampling


def real_esrgan_names(network: Any, num_blocks: int) -> dict[str, Tensor]:
    """spandrel's names of a x4 RRDBNet as in Real-ESRGAN's files."""
    places = {"0": "conv_first", f"1.sub.{num_blocks}": "conv_body", "3": "conv_up1", "6": "conv_up2"}
    places |= {"8": "conv_hr", "10": "conv_last"}
    names = {}
    for key in network.state_dict():
        module, _, kind = key.removeprefix("model.").rpartition(".")
        if module not in places:
            _, _, block, dense, conv, _ = module.split(".")
            places[module] = f"body.{block}.{dense.lower()}.{conv}"
        names[key] = f"{places[module]}.{kind}"
    return {names[key]: value for key, value in network.state_dict().items()}


def images(batch: int = 2, channels: int = 3, height: int = 20, width: int = 17) -> Tensor:
    return torch.rand(batch, channels, height, width) * 2 - 1


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
    message = refused(None)
    assert "models/RealESRGAN_x4plus.pth" in message and "xinntao/Real-ESRGAN" in message and "v0.1.0" in message
    (tmp_path / "models").mkdir()
    torch.save({"params_ema": real_esrgan_names(rrdb(), 1)}, tmp_path / "models" / "RealESRGAN_x4plus.pth")
    assert open_upscaler(None, "cpu").scale == 4


def test_the_compact_network(tmp_path: Path) -> None:
    network = randomise_around_grey(build("Compact", num_feat=8, num_conv=2))
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
        assert "without running code" in refused(tmp_path / name)
    torch.save(rrdb(), tmp_path / "whole.pth")  # a pickled network names its classes, which would be imported
    assert "without running code" in refused(tmp_path / "whole.pth")
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
    assert "DnCNN" in refuse(randomise_around_grey(build("DnCNN", in_nc=3, out_nc=3, nc=8, nb=4)).state_dict())
    assert "1 channels to 1 at scale 4" in refuse(rrdb(in_nc=1, out_nc=1).state_dict())
    assert "scale 1" in refuse(rrdb(scale=1).state_dict())
    state = rrdb().state_dict()
    assert "not an upscaler, or damaged" in refuse({k: v for k, v in state.items() if not k.endswith("RDB2.conv3.0.bias")})
    assert "not an upscaler, or damaged" in refuse(state | {"model.3.weight": torch.zeros(8, 8, 1, 1)})

    torch.save(state, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not weights\n", b"\x80\x02garbage"):
        path.write_bytes(content)
        assert "damaged" in refused(path)
    (tmp_path / "weights.safetensors").write_bytes(b"garbage!" * 8)
    assert "damaged" in refused(tmp_path / "weights.safetensors")
    assert "no such weights" in refused(tmp_path)


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
            spans = windows(side)
            assert [0, *(end for _, _, end in spans)] == [*(start for _, start, _ in spans), side]
            for at, start, end in spans:
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
    tiled = open_upscaler(tmp_path / "x2.pth", "cpu", tile=91, overlap=2 * RADIUS).upscale(x)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)


def test_tiles_that_are_all_margin_are_refused(upscaler: Upscaler) -> None:
    for tile, overlap in ((32, 16), (0, 0), (32, -1)):
        with pytest.raises(UserError, match="keeps nothing"):
            replace(upscaler, tile=tile, overlap=overlap)


def test_one_pixel(tmp_path: Path) -> None:
    torch.save(rrdb().state_dict(), tmp_path / "weights.pth")
    assert open_upscaler(tmp_path / "weights.pth", "cpu").upscale(images(1, 3, 1, 1)).shape == (1, 3, 4, 4)
