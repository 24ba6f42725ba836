"""Latents that turn with the image: the transforms, by networks that are equivariant by construction."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.config import UserError, validate
from src.data import ImageConfig
from src.data.transforms import AspectConfig
from src.models.layers import area_means
from src.models.vae import VAE, VAEConfig
from src.training.autoencoder_stages import bucket_stages, plan_stages
from src.training.latent_terms import EquivarianceTerm, Transform, draw_transform
from tests.conftest import randomise
from tests.training.test_autoencoder_stages import config_of


def pooled(images: Tensor) -> Tensor:
    """An encoder that is equivariant: means of 4 x 4 pixels."""
    return F.avg_pool2d(images, 4)


def repeated(latents: Tensor) -> Tensor:
    """Its decoder."""
    return latents.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("sides", [(16, 16), (16, 24)])
def test_an_equivariant_network_has_no_further_error_at_a_turn(turns: int, sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, *sides, dtype=torch.float64)
    transform = Transform(turns, (sides[0] // 4, sides[1] // 4), (sides[0] // 4, sides[1] // 4))
    target, reconstruction = transform(images), repeated(transform(pooled(images)))
    assert target.shape[2:] == reconstruction.shape[2:] == (sides if turns == 2 else sides[::-1])
    plain = (repeated(pooled(images)) - images).abs().mean()
    torch.testing.assert_close((reconstruction - target).abs().mean(), plain)
    assert torch.equal(Transform(4 - turns, (4, 4), (4, 4))(target), images)


@pytest.mark.parametrize("new", [(8, 12), (4, 6), (2, 3)])
def test_an_equivariant_network_has_no_error_at_a_scale(new: tuple[int, int]) -> None:
    """Pooling, where the blocks of the image are still blocks of pixels in the smaller image."""
    torch.manual_seed(0)
    coarse = torch.rand(2, 3, 2, 3, dtype=torch.float64)
    images = coarse.repeat_interleave(32, 2).repeat_interleave(32, 3)  # (2, 3, 64, 96)
    transform = Transform(0, (16, 24), new)
    target = transform(images)
    assert target.shape[2:] == (4 * new[0], 4 * new[1])
    torch.testing.assert_close(repeated(transform(pooled(images))), target)


def test_a_network_that_is_not_equivariant_has_an_error() -> None:
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64).repeat(1, 1, 8, 1)

    def encode(images: Tensor) -> Tensor:
        return pooled(images) + pooled(ramp)  # it knows the place

    images, transform = torch.ones(1, 1, 8, 8, dtype=torch.float64), Transform(1, (2, 2), (2, 2))
    decoded = repeated(transform(encode(images)) - pooled(ramp))
    assert float((decoded - transform(images)).abs().max()) > 0.5


def test_area_means_are_those_of_torch_and_keep_the_mean() -> None:
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(area_means(x, (4, 4)), F.interpolate(x, (4, 4), mode="area"))
    for sides in ((5, 7), (11, 3), (12, 8)):
        torch.testing.assert_close(area_means(x, sides).mean((2, 3)), x.mean((2, 3)))
    assert torch.equal(area_means(x, (12, 8)), x)
    row = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    torch.testing.assert_close(area_means(row, (1, 2)), torch.tensor([[[[4 / 3, 10 / 3]]]]))


def test_what_a_step_does_is_a_function_of_seed_and_step() -> None:
    term = EquivarianceTerm()
    steps = [draw_transform(term, (16, 24), 8, 5, step) for step in range(400)]
    assert steps == [draw_transform(term, (16, 24), 8, 5, step) for step in range(400)]
    assert steps != [draw_transform(term, (16, 24), 8, 6, step) for step in range(400)]
    counts = Counter("plain" if each is None else each.turns for each in steps)
    assert 160 < counts["plain"] < 240 and 70 < counts[0] < 130 and all(15 < counts[turns] < 55 for turns in (1, 2, 3))
    scales = {each.new for each in steps if each is not None and each.turns == 0}
    assert scales == {(side, round(1.5 * side)) for side in range(8, 16)}, (
        "all sides are whole, and one size is left out: its own"
    )
    only = [draw_transform(EquivarianceTerm(probability=1, turns=False), (16, 24), 1, 5, step) for step in range(200)]
    assert {each.new[0] for each in only if each is not None} == set(range(4, 16)), "from a quarter on"
    only = [draw_transform(EquivarianceTerm(probability=1, min_scale=1), (16, 24), 1, 5, step) for step in range(20)]
    assert all(each is not None and each.turns > 0 for each in only)
    small = [draw_transform(EquivarianceTerm(turns=False), (4, 4), 4, 5, step) for step in range(20)]
    assert small == [None] * 20, "no scale is left"


@pytest.mark.parametrize("bottleneck", [{"kind": "kl"}, {"kind": "vq", "codes": 16}])
def test_the_decoder_is_given_the_transformed_latents(bottleneck: dict) -> None:
    spec = validate(VAEConfig, {"widths": [8, 16], "blocks": 1, "bottleneck": bottleneck})
    torch.manual_seed(0)
    network = randomise(VAE(spec, 3)).eval().double()
    images, noise = torch.rand(2, 3, 16, 24, dtype=torch.float64), torch.randn(2, 4, 8, 12, dtype=torch.float64)
    plain = network(images, noise)
    for transform in (Transform(1, (8, 12), (8, 12)), Transform(0, (8, 12), (5, 8))):
        outputs = network(images, noise, transform)
        assert torch.equal(outputs.mean, plain.mean), "moments are those of the image as it is"
        if spec.bottleneck.kind == "vq":
            z = network.codebook.look_up(network.codebook.nearest(transform(plain.mean)))
            assert torch.equal(outputs.codes, plain.codes)
        else:
            z = transform(plain.mean + (0.5 * plain.logvar).exp() * noise)
        assert outputs.images.shape == transform(images).shape
        torch.testing.assert_close(outputs.images, network.decode(z))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(UserError, match="min_scale 1 without turns leaves no transform; set turns, or a smaller min_scale"):
        validate(EquivarianceTerm, {"min_scale": 1, "turns": False})
    for key, value in (("min_scale", 0), ("min_scale", 1.5), ("probability", 0), ("probability", 1.1)):
        with pytest.raises(UserError, match=key):
            validate(EquivarianceTerm, {key: value})
    sides = np.full((40, 2), 32)
    scales = {"equivariance": {"turns": False}}
    for terms in ({"adversarial": {}}, {"perceptual": {}}):
        cfg = config_of({"steps": 2}, {"steps": 2, **terms, **scales})
        with pytest.raises(UserError, match="stages.1.equivariance: images of 32 px have no scale from 0.25 to below 1 that"):
            bucket_stages(cfg, plan_stages(cfg, 40, rank=0, world=1), sides)
        cfg = config_of({"steps": 2, **terms, "equivariance": {}})
        assert len(bucket_stages(cfg, plan_stages(cfg, 40, rank=0, world=1), sides)) == 1, "turns are left"
    cfg = config_of({"steps": 2, **scales})
    (stage,) = plan_stages(cfg, 40, rank=0, world=1)
    assert stage.smallest == 1 and len(bucket_stages(cfg, [stage], sides)) == 1
    assert "0.5 of the steps transformed" in stage.describe(1)
    assert stage.transform_at(3, (16, 16), 0) == draw_transform(EquivarianceTerm(turns=False), (16, 16), 1, 0, 3)
    cfg = config_of({"steps": 2, "adversarial": {}, **scales})
    cfg.image = ImageConfig(size=48, aspect=AspectConfig(min_images=1, max_ratio=4.0))
    with pytest.raises(UserError, match="equivariance: images of .* have no scale .* sides of 32 px; set turns"):
        bucket_stages(cfg, plan_stages(cfg, 40, rank=0, world=1), np.array([[32, 96], [96, 32], [64, 64]]))
