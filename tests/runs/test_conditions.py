"""Conditions in latents: what the cache holds of them, that masks are encoded and do not leak, and what a contract says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from src.config import UserError, read_json
from src.data import open_sources
from src.data.buckets import make_buckets
from src.data.conditions import Condition, EdgesCondition, GreyCondition, LowCondition, MaskCondition, draw_masks, edges
from src.data.sources import ShapesSource
from src.runs.conditions import latent_condition, normalised
from src.runs.densities import ImageDensity
from src.runs.latents import LatentDensity, latents_of
from src.runtime.stream import StepOrder, latent_stream, plan_batch, to_network
from tests.runs.test_latents import CPU, IMAGE, autoencoder


@pytest.fixture
def shapes() -> Any:
    return open_sources(ShapesSource(source="shapes", count=24, size=16))


def images_of(shapes: Any, indices: list[int]) -> torch.Tensor:
    return to_network(torch.from_numpy(shapes.batch(np.array(indices), IMAGE.plain, np.full((len(indices), 3), 0.5))), CPU)


def make(condition: Condition | None, shapes: Any, folder: Path, held_out: Any = None) -> Any:
    density = ImageDensity(shapes, held_out, IMAGE, 1, condition)
    return LatentDensity(density, latents_of(autoencoder(), density, folder, Accelerator(cpu=True), batch_size=7))


def test_a_cache_holds_each_image_with_some_masks(tmp_path: Path, shapes: Any) -> None:
    density = make(MaskCondition(kind="mask", copies=3), shapes, tmp_path / "cache")
    latents, network = density.latents, autoencoder().network
    copies = latents.train_conditions.moments(np.array([5]), np.array([True]))
    assert copies.shape == (1, 3, 5, 8, 8)
    image = images_of(shapes, [5]).flip(3)
    for copy in range(3):
        mask = draw_masks(0, [5 * 3 + copy], (16, 16))
        mean, _ = network.moments(image * (1 - mask))
        torch.testing.assert_close(copies[:, copy, :4], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copies[:, copy, 4:], F.avg_pool2d(mask, 2))
        chosen = latents.draw_condition(copies, np.array([(copy + 0.5) / 3]))
        torch.testing.assert_close(chosen[:, :4], latents.codec.normalise(mean), rtol=1e-3, atol=1e-4)
    condition = density.examples().condition
    assert condition is not None and condition(np.array([0, 23])).shape == (2, 6, 8, 8)
    order = StepOrder(make_buckets(IMAGE, shapes.sides, 1), shapes.labels, plan_batch(8, 8, rank=0, world=1), 0)
    batch = next(latent_stream(latents.train, order, flip=True, start_step=0, conditions=latents.train_conditions))
    assert batch.condition is not None and batch.condition.shape == (8, 3, 5, 8, 8)


def test_what_lies_under_a_mask_is_in_no_latent() -> None:
    """Two images that differ under the mask alone have the same condition."""
    network, mask, condition = autoencoder().network, draw_masks(0, [0], (16, 16)), MaskCondition(kind="mask")
    one, noise = torch.rand(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    both = [
        latent_condition(condition, network, condition.make(image, mask), (3, 16, 16), (4, 8, 8))
        for image in (one, one + mask * noise)
    ]
    assert torch.equal(*both)


def test_what_is_no_latent_is_resized() -> None:
    network, image, low = autoencoder().network, torch.rand(2, 3, 16, 16), LowCondition(kind="low", size=4)
    as_pixels = latent_condition(EdgesCondition(kind="edges"), network, edges(image), (3, 16, 16), (4, 8, 8))
    torch.testing.assert_close(as_pixels, F.avg_pool2d(edges(image), 2))
    grey = latent_condition(GreyCondition(kind="grey"), network, edges(image), (3, 16, 16), (4, 8, 8))
    torch.testing.assert_close(grey, network.moments(edges(image).expand(-1, 3, -1, -1))[0])
    enlarged = F.interpolate(low.make(image), (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        latent_condition(low, network, low.make(image), (3, 16, 16), (4, 8, 8)), network.moments(enlarged)[0]
    )
    codec: Any = type("Codec", (), {"mean": torch.zeros(4, 1, 1), "normalise": staticmethod(lambda z: 2 * z)})
    values = torch.rand(1, 5, 8, 8)
    assert torch.equal(normalised(EdgesCondition(kind="edges"), codec, values), values)
    assert torch.equal(normalised(MaskCondition(kind="mask"), codec, values)[:, 4:], values[:, 4:])


def test_a_contract_names_the_condition_and_that_of_a_cache_without_one_stays(tmp_path: Path, shapes: Any) -> None:
    make(None, shapes, tmp_path / "plain")
    assert "condition" not in read_json(tmp_path / "plain" / "manifest.json")
    assert not list((tmp_path / "plain").glob("condition*"))
    held_out = open_sources(ShapesSource(source="shapes", count=8, size=16, split="test"))
    make(LowCondition(kind="low", size=8), shapes, tmp_path / "low", held_out)
    assert read_json(tmp_path / "low" / "manifest.json")["condition"] == {"kind": "low", "size": 8}
    assert sorted(path.name for path in (tmp_path / "low").glob("condition*")) == ["condition_held_out", "condition_train"]
    make(LowCondition(kind="low", size=8, noise=0.5), shapes, tmp_path / "low", held_out)  # noise is added later
    for condition, folder in ((LowCondition(kind="low", size=4), "low"), (GreyCondition(kind="grey"), "plain")):
        with pytest.raises(UserError, match="was made of another condition"):
            make(condition, shapes, tmp_path / folder, held_out if folder == "low" else None)
