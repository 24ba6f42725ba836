"""Augmentation that does not leak: what is done to images, that the codes say it, and that nothing done changes nothing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from ddpm_accelerate import Config
from src.config import UserError, load, validate
from src.data import open_sources
from src.data.buckets import make_buckets
from src.data.sources import ShapesSource
from src.diffusion.augmentation import CODES, AugmentationConfig, draw_transforms, transform_images
from src.interop.names import state_under
from src.interop.unet_2d import module_names
from src.models import UNet, UNetConfig, build_model
from src.models.mlp import MLPConfig
from src.runs.densities import ImageDensity
from src.runs.latents import LatentDensity, latents_of
from src.runtime.augmentation import draw_copies, draw_of_positions
from src.runtime.stream import StepOrder, latent_stream, plan_batch, to_network
from src.training.inputs import Coupling
from tests.conftest import ROOT, SMOKE, randomise
from tests.runs.test_latents import IMAGE, autoencoder
from train_iadb import Config as BlendConfig

CPU = torch.device("cpu")
NOTHING: dict[str, Any] = {"flips": False, "scale": 0.0, "rotation": 0.0, "stretch": 0.0, "shift": 0.0}


def spec_of(**options: Any) -> AugmentationConfig:
    """Always what the options name, and nothing else."""
    return AugmentationConfig(**NOTHING | {"probability": 1.0} | options)


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(i) for i in range(count)]


def pattern(x: Tensor, y: Tensor) -> Tensor:
    """A smooth function of the place, from -1 to 1 across and down."""
    return 0.5 * torch.sin(2 * x + 0.5) + 0.3 * torch.cos(3 * y - x)


def places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """x and y of the centre of each pixel."""
    y, x = ((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in (height, width))
    return torch.meshgrid(x, y, indexing="xy")


def test_flips_and_quarter_turns_move_pixels_and_change_none() -> None:
    images = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    flipped = transform_images(images, draw_transforms(spec_of(flips=True), generators(6)))
    torch.testing.assert_close(flipped, images.flip((2, 3)), rtol=1e-4, atol=1e-5)
    turns = draw_transforms(spec_of(turns=True), generators(6))
    quarters = [{(1, 0): 1, (1, 1): 2, (0, 1): 3}[first, second] for first, second in turns.codes[:, 2:4].astype(int)]
    assert {*quarters} == {1, 2, 3}
    expected = torch.stack([image.rot90(-quarter, (1, 2)) for image, quarter in zip(images, quarters, strict=True)])
    torch.testing.assert_close(transform_images(images, turns), expected, rtol=1e-4, atol=1e-5)


def test_a_shift_moves_by_its_share_of_the_sides() -> None:
    x, y = places(32, 48)
    image = pattern(x, y)[None, None].expand(4, 1, -1, -1)
    transforms = draw_transforms(spec_of(shift=0.1), generators(4), aspect=1.5)
    for moved, (across, down) in zip(transform_images(image, transforms), transforms.codes[:, 9:], strict=True):
        inside = ((x - 2 * across).abs() < 0.9) & ((y - 2 * down).abs() < 0.9)
        expected = pattern(x - 2 * across, y - 2 * down)
        torch.testing.assert_close(moved[0][inside], expected[inside], rtol=0, atol=8e-3)


def test_scale_stretch_and_rotation_are_those_that_the_codes_say() -> None:
    """In lengths, not in shares of the sides: what is turned keeps its shape where the image is no square."""
    aspect, everything = 1.5, spec_of(scale=0.2, rotation=1.0, stretch=0.2)
    matrices, codes = draw_transforms(everything, generators(20), aspect)
    for matrix, code in zip(matrices, codes, strict=True):
        log_scale, cos, sin, *log_stretch = code[4], code[5] + 1, code[6], *code[7:9]
        linear = np.linalg.inv(np.diag([aspect, 1.0]) @ matrix[:, :2] @ np.diag([1 / aspect, 1.0]))
        assert np.linalg.det(linear) == pytest.approx(2 ** (2 * log_scale))
        strong, weak = np.linalg.svd(linear)[1]
        assert math.log2(strong / weak) / 2 == pytest.approx(math.hypot(*log_stretch))
        if math.hypot(*log_stretch) < 1e-9:
            np.testing.assert_allclose(linear, 2**log_scale * np.array([[cos, -sin], [sin, cos]]))
    one = draw_transforms(spec_of(rotation=1.0), generators(20))
    for matrix, code in zip(one.matrices, one.codes, strict=True):
        np.testing.assert_allclose(np.linalg.inv(matrix[:, :2]), [[code[5] + 1, -code[6]], [code[6], code[5] + 1]], atol=1e-12)


def test_each_is_applied_as_often_as_asked_and_independently() -> None:
    _, codes = draw_transforms(AugmentationConfig(probability=0.3, turns=True), generators(4000))
    groups = [codes[:, part].any(axis=1) for part in ([0], [1], [2, 3], [4], [5, 6], [7, 8], [9, 10])]
    for group in groups:
        assert group.mean() == pytest.approx(0.3, abs=0.03)
    assert np.corrcoef(groups) == pytest.approx(np.eye(7), abs=0.06)


def test_nothing_done_is_nothing_told_and_the_image_itself() -> None:
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    nothing = draw_transforms(spec_of(), generators(3))
    assert not nothing.codes.any() and nothing.codes.shape == (3, CODES)
    assert transform_images(images, nothing) is images
    some = draw_transforms(AugmentationConfig(probability=0.1), generators(30))
    is_plain = ~some.codes.any(axis=1)
    many = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    same = (transform_images(many, some) == many).flatten(1).all(1).numpy()
    assert 3 < is_plain.sum() < 27 and (same == is_plain).all()


def test_a_network_that_is_told_nothing_is_the_one_without_augmentation_to_the_bit() -> None:
    config = validate(
        UNetConfig, {"base_channels": 16, "channel_mult": [1, 2], "attention": ["none", "full"], "norm_groups": 8}
    )
    augmented = randomise(UNet(config, augmented=True)).eval()
    plain = UNet(config).eval()
    plain.load_state_dict({name: value for name, value in augmented.state_dict().items() if name != "augmentation.weight"})
    x, time = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 500.0])
    expected = plain(x, time)
    assert torch.equal(augmented(x, time), expected)
    assert torch.equal(augmented(x, time, augmentation=torch.zeros(2, CODES)), expected)
    assert (augmented(x, time, augmentation=torch.ones(2, CODES)) != expected).any()
    exported = (state_under(module_names(config), network) for network in (augmented, plain))
    assert {*next(exported)} == {*next(exported)}, "what it is told of augmentation does not leave"
    with pytest.raises(ValueError, match="told nothing of augmentation"):
        plain(x, time, augmentation=torch.zeros(2, CODES))
    with pytest.raises(UserError, match="cannot be told how images were augmented"):
        build_model(validate(MLPConfig, {"kind": "mlp"}), (2,), augmented=True)


def config_of(*changes: str) -> Any:
    return load(ROOT / SMOKE, Config, list(changes))


def test_what_a_position_shows_is_a_function_of_seed_and_position() -> None:
    cfg = config_of('augmentation={"probability":0.5}', "image.flip=false", 'condition={"kind":"grey"}', "preview.quality=null")
    train = open_sources(ShapesSource(source="shapes", count=24, size=16))
    coupling = Coupling(ImageDensity(train, None, cfg.image, 1, cfg.condition, cfg.augmentation))
    plans = [plan_batch(8, size, rank=0, world=1) for size in (8, 4)]
    (whole,), halves = ([next(batches)[0] for _ in range(count)] for batches, count in zip(
        (coupling.stream(cfg, plan, 3, CPU) for plan in plans), (1, 2), strict=True
    ))  # fmt: skip
    for one, other in ((whole.images, "images"), (whole.augmentation, "augmentation"), (whole.condition, "condition")):
        assert one is not None and torch.equal(one, torch.cat([getattr(half, other) for half in halves]))
    expected = draw_of_positions(cfg.augmentation, cfg.seed, range(24, 32), 1.0)
    torch.testing.assert_close(whole.augmentation, torch.from_numpy(expected.codes).float())
    weights = torch.tensor([0.299, 0.587, 0.114])
    luminance = ((whole.images + 1) / 2 * weights[:, None, None]).sum(1, keepdim=True) * 2 - 1
    torch.testing.assert_close(whole.condition, luminance, rtol=0, atol=2e-2)  # of the image as it is shown
    plain = Coupling(ImageDensity(train, None, cfg.image, 1, cfg.condition)).stream(cfg, plans[0], 3, CPU)
    untouched = torch.from_numpy(~expected.codes.any(axis=1))
    assert 0 < int(untouched.sum()) < 8
    assert torch.equal(whole.images[untouched], next(plain)[0].images[untouched])


def test_a_latent_cache_holds_augmented_copies_and_the_stream_tells_which(tmp_path: Path) -> None:
    shapes = open_sources(ShapesSource(source="shapes", count=24, size=16))
    spec = AugmentationConfig(probability=0.5, copies=3)

    def cached(name: str, augmentation: AugmentationConfig | None) -> LatentDensity:
        density = ImageDensity(shapes, None, IMAGE, 1, None, augmentation)
        return LatentDensity(density, latents_of(autoencoder(), density, tmp_path / name, Accelerator(cpu=True), batch_size=7))

    density, plain = cached("augmented", spec), cached("plain", None)
    for key in ("mean", "std", "low", "high"):
        assert density.latents.facts[key] == plain.latents.facts[key], "statistics are those of images as they are"
    indices = np.arange(24)
    for version in range(6):  # plain and mirrored, then two augmented copies of both
        images = to_network(torch.from_numpy(shapes.batch(indices, IMAGE.plain, np.full((24, 3), 0.5))), CPU)
        images = images.flip(3) if version % 2 else images
        if version >= 2:
            images = transform_images(images, draw_copies(spec, indices, np.full(24, version)))
        moments = density.latents.train.moments(indices, np.full(24, version))
        torch.testing.assert_close(moments[:, 0], autoencoder().network.moments(images)[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(density.latents.train.moments(indices, indices % 2), plain.latents.train.moments(indices, indices % 2))

    order = StepOrder(make_buckets(IMAGE, shapes.sides, 1), shapes.labels, plan_batch(24, 24, rank=0, world=1), 0)
    batch = next(latent_stream(density.latents.train, order, flip=True, start_step=0, augmentation=spec))
    shown = order(0, 0)
    assert batch.augmentation is not None and batch.augmentation.shape == (24, CODES)
    versions = [
        next(v for v in range(6) if torch.equal(density.latents.train.moments(shown[i : i + 1], np.array([v]))[0], moments))
        for i, moments in enumerate(batch.images)
    ]
    for i, version in enumerate(versions):
        codes = draw_copies(spec, shown[i : i + 1], np.array([version])).codes[0] if version >= 2 else np.zeros(CODES)
        np.testing.assert_array_equal(batch.augmentation[i], codes)
    assert len({*versions}) > 3
    other = ImageDensity(shapes, None, IMAGE, 1, None, AugmentationConfig(probability=0.4, copies=3))
    with pytest.raises(UserError, match="another augmentation"):
        latents_of(autoencoder(), other, tmp_path / "augmented", Accelerator(cpu=True), batch_size=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (['augmentation={"turns":true}', "image.size=[16,24]"], "a quarter turn changes the shape"),
        (['augmentation={"turns":true}', 'image.aspect={"kind":"buckets"}'], "a quarter turn changes the shape"),
        (['augmentation={"copies":3}'], "augmentation.copies: a run on pixels"),
        (['augmentation={"probability":0}'], "augmentation.probability"),
    ],
)
def test_what_cannot_be_is_said(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(*changes)


def test_pairs_and_points_are_not_augmented() -> None:
    pairs = ["coupling=paired", 'source={"source":"folder","path":"x"}', "augmentation={}"]
    with pytest.raises(UserError, match="pairs would be torn apart"):
        load(ROOT / "configs/smoke/iadb.json", BlendConfig, pairs)
    with pytest.raises(UserError, match="2-D points are no images"):
        load(ROOT / "configs/points2d_iadb.json", BlendConfig, ["augmentation={}"])
