"""The great circle between two images, the keys of a journey, and the classes on the way."""

import numpy as np
import pytest
import torch

from src.sampling.paths import class_weights, plan_frames, slerp, smoothstep, straight


def test_slerp_is_the_great_circle() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]
    weight = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.9, 1e-3], dtype=torch.float64)
    between = slerp(a, b, weight)
    assert torch.equal(between[0], a[0]) and torch.equal(between[1], b[1]), "the ends are exact"
    torch.testing.assert_close(between.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    for i, w in enumerate(weight.tolist()):  # the formula as published, one angle for the whole tensor
        one, other = (tensor[i].double().numpy() for tensor in (a, b))
        theta = np.arccos((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
        wanted = (np.sin((1 - w) * theta) * one + np.sin(w * theta) * other) / np.sin(theta)
        np.testing.assert_allclose(between[i].numpy(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(slerp(a[i : i + 1], b[i : i + 1], weight[i : i + 1])[0], between[i]), "each sample for itself"


def test_slerp_of_a_quarter_circle_of_other_norms_and_of_small_angles() -> None:
    a, b = torch.tensor([[1.0, 0.0]] * 3).double(), torch.tensor([[0.0, 1.0]] * 3).double()
    weight = torch.tensor([1 / 3, 0.5, 2 / 3], dtype=torch.float64)
    angle = weight * torch.pi / 2
    torch.testing.assert_close(slerp(a, b, weight), torch.stack([angle.cos(), angle.sin()], 1), rtol=0, atol=1e-15)
    half = slerp(a[:1], 3 * b[:1], weight[1:2])[0]
    torch.testing.assert_close(half, torch.tensor([0.5, 1.5]).double() * 2**0.5, rtol=0, atol=1e-14)
    for tiny in (1e-3, 1e-5, 1e-7, 0.0):
        near = torch.tensor([[np.cos(tiny), np.sin(tiny)]], dtype=torch.float64)
        wanted = torch.tensor([[np.cos(tiny / 4), np.sin(tiny / 4)]], dtype=torch.float64)
        torch.testing.assert_close(slerp(a[:1], near, torch.tensor([0.25])), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, 0.0])
def test_slerp_is_straight_between_parallel_and_opposite_ends(factor: float) -> None:
    a = torch.randn(3, 4, 5, 5)
    weight = torch.tensor([0.0, 0.3, 1.0])
    between = slerp(a, factor * a, weight)
    torch.testing.assert_close(between, a + weight[:, None, None, None] * (factor - 1) * a, rtol=0, atol=1e-6)
    torch.testing.assert_close(slerp(factor * a, a, weight), straight(factor * a, a, weight), rtol=0, atol=1e-6)


def test_smoothstep_rests_at_the_keys() -> None:
    assert [smoothstep(w) for w in (0.0, 0.5, 1.0)] == [0, 0.5, 1]
    assert smoothstep(1e-4) < 1e-7 and 1 - smoothstep(1 - 1e-4) < 1e-7
    values = [smoothstep(i / 100) for i in range(101)]
    assert values == sorted(values)


def test_a_journey_goes_from_key_to_key() -> None:
    journey = plan_frames(3, 4)
    assert len(journey) == 9 and [journey[i] for i in (0, 4)] == [(0, 1, 0), (1, 2, 0)]
    assert journey[8].before == 2 and journey[8].weight == 0, "the last key is the end"
    assert journey[6] == (1, 2, 0.5)
    loop = plan_frames(3, 4, loop=True)
    assert len(loop) == 12 and loop[10] == (2, 0, 0.5) and loop[11].weight == smoothstep(0.75)


def test_class_weights_are_shares() -> None:
    places = plan_frames(2, 2)
    assert class_weights([3, 1], places, 5).tolist() == [[0, 0, 0, 1, 0], [0, 0.5, 0, 0.5, 0], [0, 1, 0, 0, 0]]
    assert class_weights([2, 2], places, 3).tolist() == [[0, 0, 1]] * 3
