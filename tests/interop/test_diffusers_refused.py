"""What cannot be a folder of diffusers, and folders that are whole or absent."""

from pathlib import Path
from typing import Any

import pytest

from src.config import UserError
from tests.interop.exports import LEARNED, LINEAR, exported, unet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": ["none", "linear"]}, "no model.attention linear; what can be exported has none or full"),
        ({"mid_attention": "linear"}, "no model.mid_attention linear"),
        ({"downsample": "average"}, "no model.downsample average; what can be exported has conv or conv_right or residual"),
        ({"downsample": "max"}, "no model.downsample max"),
        ({"upsample": "nearest"}, "no model.upsample nearest; what can be exported has conv or residual"),
        ({"time_embedding": {"scale": 2.0}}, "no model.time_embedding.scale 2.0"),
        ({"channel_mult": [2, 4], "head_channels": 8}, r"no model.channel_mult\[0\] 2.0; what can be exported has 1"),
        ({"patch": 2}, "no model.patch 2; what can be exported has 1"),
        (
            {"attention": ["full", "full"], "head_channels": None, "num_heads": 4},
            "model.num_heads 4 makes heads of 4, 8 channels, .* has model.head_channels",
        ),
    ],
    ids=["linear", "mid_linear", "average", "max", "nearest", "time_scale", "first_width", "patch", "heads"],
)
def test_networks_that_unet2dmodel_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        exported(tmp_path / "out", unet(**options))
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"schedule": {"kind": "blend"}, "target": "v"}, "no process.schedule blend"),
        ({**LINEAR, "target": "blend"}, "no process.target blend; what can be exported has eps, x0, v"),
        ({**LINEAR, "time_input": {"kind": "index", "scale": 0.25}}, "no process.time_input index times 0.25"),
        ({**LINEAR, "time_input": {"kind": "alpha"}}, "no process.time_input alpha times 1"),
        ({**LINEAR, "time_input": {"kind": "t", "scale": 1000.0}}, "no process.time_input t times 1000"),
        (LEARNED, "3 channels in and 3 out does not go with process.variance learned"),
    ],
    ids=["blend", "target", "scale", "alpha", "t", "learned"],
)
def test_processes_that_ddpm_scheduler_cannot_be(tmp_path: Path, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        exported(tmp_path / "out", unet(), raw)
    assert list(tmp_path.iterdir()) == []


def test_latents_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the network sees 4 channels; .* decodes no latents"):
        exported(tmp_path / "out", unet(channels=4))


def test_a_folder_is_whole_or_absent_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match="exists and is not empty"):
            exported(tmp_path / name, unet())
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.partial").mkdir()
    (tmp_path / ".empty.partial" / "of a run that was killed").write_text("half")
    exported(tmp_path / "empty", unet())
    inside = sorted(path.relative_to(tmp_path / "empty").as_posix() for path in (tmp_path / "empty").rglob("*.*"))
    assert inside == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]

    def no_room(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("src.interop.diffusers_export.write_flushed", no_room)
    with pytest.raises(OSError, match="No space left"):
        exported(tmp_path / "more", unet())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
