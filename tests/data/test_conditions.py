"""Conditions: closed forms of what is made of an image, and masks that depend on (seed, position) alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from src.config import UserError, config, dump, validate
from src.data.conditions import (
    ConditionConfig,
    channel_names,
    draw_masks,
    edges,
    luminance,
    masked,
    noised,
    reduced,
    with_flag,
)


@config
class Root:
    condition: ConditionConfig | None = None


def condition_of(**raw: Any) -> Any:
    return validate(Root, {"condition": raw}).condition


def test_each_kind_has_its_channels() -> None:
    counted = [
        (condition_of(**raw).count_channels(3), condition_of(**raw).count_channels(1), condition_of(**raw).extra_channels)
        for raw in (
            {"kind": "paired", "path": "A"},
            {"kind": "paired", "side": "left", "channels": 1},
            {"kind": "low", "size": 8},
            {"kind": "low", "size": 8, "noise": 0.3},
            {"kind": "grey"},
            {"kind": "edges"},
            {"kind": "mask"},
        )
    ]
    assert counted == [(3, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 2), (1, 1, 1), (1, 1, 1), (4, 2, 1)]
    for raw in ({"kind": "low", "size": 4}, {"kind": "grey"}, {"kind": "edges"}, {"kind": "mask"}):
        condition = condition_of(**raw)
        mask = torch.zeros(2, 1, 8, 8) if condition.needs_masks else None
        assert condition.make(torch.rand(2, 3, 8, 8), mask).shape[1] == condition.count_channels(3)


def test_a_latent_run_encodes_all_but_edges_unless_the_config_says_otherwise() -> None:
    assert [condition_of(kind=kind).is_encoded for kind in ("grey", "mask", "edges")] == [True, True, False]
    assert not condition_of(**{"kind": "grey", "as": "pixels"}).is_encoded
    assert condition_of(kind="edges", space="latents").is_encoded


def test_channels_have_names() -> None:
    low, noisy = condition_of(kind="low", size=4), condition_of(kind="low", size=4, noise=0.5)
    assert channel_names(None, 3) == []
    assert channel_names(low, 2) == ["low pixels 0", "low pixels 1", "flag"]
    assert channel_names(noisy, 1, 2) == ["low latents 0", "low latents 1", "level", "flag"]
    assert channel_names(condition_of(kind="edges"), 3, 8) == ["edges pixels 0", "flag"]
    assert len(channel_names(condition_of(kind="mask"), 3, 8)) == 8 + 1 + 1
    for condition in (low, noisy, condition_of(kind="mask"), condition_of(kind="paired", path="A", channels=1)):
        assert len(channel_names(condition, 3)) == condition.count_channels(3) + condition.extra_channels


def test_mistakes_in_a_config() -> None:
    assert Root().condition is None and dump(Root())["condition"] is None
    for raw, message in (
        ({"kind": "gray"}, r"condition.kind: 'gray' is not known; did you mean 'grey'\? Allowed: 'paired', 'low', 'grey'"),
        ({"kind": "paired"}, "condition: say where the other image is: give exactly one of path, side, column"),
        ({"kind": "paired", "path": "A", "side": "left"}, "give exactly one of path, side, column"),
        ({"kind": "low"}, "condition.size: this key is missing"),
        ({"kind": "grey", "size": 3}, "condition.size: unknown key"),
        ({"kind": "low", "size": 8, "noise": 2}, "condition.noise: .* less than or equal to 1"),
    ):
        with pytest.raises(UserError, match=message):
            validate(Root, {"condition": raw})


def test_the_small_image_holds_the_means_of_areas() -> None:
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(reduced(images, 4), F.avg_pool2d(images, 2))
    assert reduced(images, 2).shape == (2, 3, 2, 3)
    assert torch.equal(condition_of(kind="low", size=4).make(images), reduced(images, 4))


def test_the_luminance_is_that_of_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    by_pillow = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"))) / 127.5 - 1
    assert (luminance(images)[0, 0] - by_pillow).abs().max() <= 1.01 / 127.5
    assert torch.equal(luminance(images[:, :1]), images[:, :1])


def test_edges_by_their_closed_form() -> None:
    """-1 in a plain area, 1 on both sides of a border between black and white, and |slope| in between; for either direction."""
    border = torch.full((1, 3, 6, 8), -1.0)
    border[..., 4:] = 1
    expected = torch.full((1, 1, 6, 8), -1.0)
    expected[..., 3:5] = 1
    for images, wanted in ((border, expected), (-border, expected), (border.mT, expected.mT)):
        torch.testing.assert_close(edges(images), wanted)
    slope = torch.linspace(-1, 1, 9).expand(1, 3, 5, 9)  # 0.25 a pixel: 0.25 by [-0.5, 0, 0.5]
    torch.testing.assert_close(edges(slope)[..., 1:-1], torch.full((1, 1, 5, 7), 2 * 0.25 - 1))


def test_the_mask_is_beside_the_image_without_what_it_hides() -> None:
    images, mask = torch.rand(2, 3, 8, 8) + 0.5, draw_masks(0, [0, 1], (8, 8))
    condition = condition_of(kind="mask").make(images, mask)
    assert torch.equal(condition, masked(images, mask)) and torch.equal(condition[:, 3:], mask)
    assert torch.equal(condition[:, :3] == 0, mask.bool().expand(-1, 3, -1, -1))
    shown = (mask == 0).expand(-1, 3, -1, -1)
    assert torch.equal(condition[:, :3][shown], images[shown])


def test_masks_are_functions_of_seed_and_position() -> None:
    masks = draw_masks(5, range(100), (32, 48))
    assert masks.shape == (100, 1, 32, 48) and set(masks.unique().tolist()) == {0.0, 1.0}
    shares = masks.mean((1, 2, 3))
    assert float(shares.min()) >= 0.1 and float(shares.max()) <= 0.62 and float(shares.std()) > 0.05
    assert torch.equal(draw_masks(5, [7, 3], (32, 48)), masks[[7, 3]])
    assert not torch.equal(draw_masks(6, [7], (32, 48)), masks[[7]])
    assert len({mask.numpy().tobytes() for mask in masks}) == 100
    assert draw_masks(0, range(20), (2, 3)).mean((1, 2, 3)).min() >= 0.1  # of tiny images, too


def test_noise_keeps_a_variance_of_one() -> None:
    """low' = sqrt(1 - s^2) low + s eps (Sec. 4.2, arXiv:2106.15282)."""
    low, eps = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    level = torch.tensor([0.0, 0.6], dtype=torch.float64)
    torch.testing.assert_close(noised(low, level, eps), torch.stack([low[0], 0.8 * low[1] + 0.6 * eps[1]]))


def test_a_flag_says_whether_the_condition_is_there() -> None:
    condition, present = torch.rand(3, 2, 4, 4) + 1, torch.tensor([True, False, True])
    flagged = with_flag(condition, present)
    assert flagged.shape == (3, 3, 4, 4) and torch.equal(flagged[0, 2], torch.ones(4, 4))
    assert torch.equal(flagged[::2, :2], condition[::2]) and not flagged[1].any()
    levels = with_flag(condition, present, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert levels.shape == (3, 4, 4, 4) and levels[:, 2, 0, 0].tolist() == [0.25, 0.0, 0.75]
    assert levels[:, 3, 0, 0].tolist() == [1.0, 0.0, 1.0] and levels.dtype == condition.dtype


def test_what_is_read_is_not_made() -> None:
    paired = condition_of(kind="paired", column="edges")
    with pytest.raises(AssertionError, match="is read, not made"):
        replace(paired, space="pixels").make(torch.zeros(1, 3, 4, 4))
