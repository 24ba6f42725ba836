"""Images before and while a run trains, and the held-out loss."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from src.config import validate
from src.data import ImageConfig, open_sources
from src.data.buckets import make_buckets
from src.data.sources import ShapesSource
from src.diffusion import ProcessConfig, build_process
from src.runtime.failures import warn_on_failure, warn_on_stderr
from src.runtime.stream import image_examples, plan_batch
from src.sampling import Sampler, SamplerConfig
from src.training.config import PreviewConfig
from src.training.first_images import save_first_images
from src.training.held_out import held_out_loss
from src.training.preview import preview


def process_of(kind: str, target: str):
    return build_process(validate(ProcessConfig, {"schedule": {"kind": kind}, "target": target}))


class Zero(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        return x * 0 * self.one


def test_a_network_that_says_nothing_has_a_held_out_loss_of_one() -> None:
    """For eps the target's mean square is 1, however the images are batched."""
    shapes = open_sources(ShapesSource(source="shapes", count=300, size=8))
    process = process_of("linear", "eps")
    sampler = Sampler(Zero(), process, SamplerConfig(steps=2), shape=(3, 8, 8), num_classes=4, clip_x0=None)
    examples = image_examples(shapes, make_buckets(ImageConfig(size=8), shapes.sides, 1))
    losses = [held_out_loss(sampler, examples, size, Accelerator(cpu=True)) for size in (50, 200)]
    assert [loss["held_out_loss"] for loss in losses] == pytest.approx([1, 1], abs=0.03)
    levels = [f"held_out_loss_{i}" for i in range(10)]
    assert [losses[0][level] for level in levels] == pytest.approx([losses[1][level] for level in levels]) and losses[
        0
    ].keys() == {
        "held_out_loss",
        *levels,
    }


def session_in(folder: Path, step: int) -> Any:
    """What a preview sees of a session."""
    batch_plan = plan_batch(4, None, rank=0, world=1)
    run, clock = SimpleNamespace(samples=folder, warn=warn_on_stderr), SimpleNamespace(enter=lambda _: None)
    around = {"accelerator": Accelerator(cpu=True), "drawing": warn_on_failure}
    return SimpleNamespace(run=run, step=step, batch_plan=batch_plan, clock=clock, **around)


def test_a_preview_is_a_sheet_with_labels(tmp_path: Path) -> None:
    process = process_of("cosine", "v")
    spec = validate(PreviewConfig, {"num_samples": 6, "batch_size": 4, "sampler": {"steps": 2}})
    sampler = Sampler(Zero(), process, SamplerConfig(steps=2), shape=(3, 8, 8), num_classes=3, clip_x0=(-1.0, 1.0))
    for step in (1, 2):
        preview(sampler, spec, session_in(tmp_path, step), ("a", "b", "c"))
    one, two = tmp_path / "step_00000001.png", tmp_path / "step_00000002.png"
    assert one.read_bytes() == two.read_bytes(), "always from the same noise"
    with Image.open(one) as sheet:
        assert sheet.width == 4 + 2 * 68


def test_a_preview_is_a_sheet_for_each_class(tmp_path: Path) -> None:
    process = process_of("cosine", "v")
    spec = validate(PreviewConfig, {"num_samples": 16, "sheets": "class", "sampler": {"steps": 2}})
    sampler = Sampler(Zero(), process, SamplerConfig(steps=2), shape=(3, 8, 8), num_classes=2, clip_x0=None)
    names = ("High Renaissance", "Cubism")
    preview(sampler, spec, session_in(tmp_path, 7), names)
    sheets = {path.name for path in (tmp_path / "step_00000007").iterdir()}
    assert sheets == {"sample_High_Renaissance_4x4.png", "sample_Cubism_4x4.png"}


@pytest.mark.parametrize(("kind", "target"), [("cosine", "v"), ("blend", "blend")])
def test_first_images_before_training(tmp_path: Path, kind: str, target: str) -> None:
    shapes = open_sources(ShapesSource(source="shapes", count=20, size=64))
    save_first_images(tmp_path, shapes, make_buckets(ImageConfig(size=64), shapes.sides, 1), 0, process_of(kind, target))
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"contact_sheet.png", "original.png", "noised.png", "beta_alpha_hat.png"}
    with Image.open(tmp_path / "original.png") as original, Image.open(tmp_path / "noised.png") as noised:
        left, right = (np.asarray(sheet.convert("RGB")).astype(int)[26:90] for sheet in (original, noised))
    off = [abs(left[:, 4 + 68 * i : 68 + 68 * i] - right[:, 4 + 68 * i : 68 + 68 * i]).mean() for i in range(12)]
    assert off[0] < 5 and off[-1] > 50, "from hardly noised to noise"
