"""The latent cache and the codec: what is stored, normalised, refused; the sheet and the words for troubled channels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from src.config import UserError
from src.data import ImageConfig, open_sources
from src.data import latents as cache
from src.data.buckets import make_buckets
from src.data.sources import ShapesSource
from src.evaluation.autoencoder import ReconstructConfig, reconstruct, troubled_channels
from src.models import VAE, VAEConfig
from src.runs.autoencoder import Autoencoder, LatentCodec
from src.runs.densities import ImageDensity
from src.runs.latents import latents_of
from src.runtime.stream import StepOrder, image_examples, latent_stream, plan_batch, to_network
from src.storage.blocks import blocks_of
from tests.conftest import randomise

CPU = torch.device("cpu")
IMAGE = ImageConfig(size=16, flip=True)


def autoencoder(**options: Any) -> Autoencoder:
    network = randomise(VAE(VAEConfig(widths=(8, 16), blocks=1), 3)).eval().requires_grad_(False)
    return Autoencoder(
        network=network, path="somewhere", document={}, digest="d", channels=3, latent_channels=4, factor=2, **options
    )


@pytest.fixture
def shapes() -> Any:
    return open_sources(ShapesSource(source="shapes", count=40, size=16))


def test_a_cache_holds_the_moments_of_images_and_their_mirror_images(tmp_path: Path, shapes: Any) -> None:
    latents = latents_of(
        autoencoder(), ImageDensity(shapes, None, IMAGE), tmp_path / "cache", Accelerator(cpu=True), batch_size=7
    )
    indices, mirrored = np.array([3, 39, 0]), np.array([False, True, True])
    moments = latents.train.moments(indices, mirrored)
    pixels = torch.from_numpy(shapes.batch(indices, ImageConfig(size=16), np.full((3, 3), 0.5)))
    images = to_network(pixels, CPU)
    images[1:] = images[1:].flip(3)
    mean, logvar = autoencoder().network.moments(images)
    torch.testing.assert_close(moments, torch.stack([mean, logvar], dim=1), rtol=1e-4, atol=1e-5)
    z = latents.draw(moments, torch.zeros_like(mean))
    torch.testing.assert_close(z, latents.codec.normalise(mean), rtol=1e-3, atol=1e-4)
    low, high = (torch.tensor(latents.facts[key])[:, None, None] for key in ("low", "high"))
    assert (z >= low - 1e-3).all() and (z <= high + 1e-3).all()


def test_in_memory_and_from_the_file_are_the_same_and_batches_follow_positions(tmp_path: Path, shapes: Any) -> None:
    latents = latents_of(
        autoencoder(), ImageDensity(shapes, None, IMAGE), tmp_path / "cache", Accelerator(cpu=True), batch_size=8
    )
    mapped = cache.LatentSet(latents.train.blocks, CPU)
    assert latents.train.resident is not None and mapped.resident is None and len(mapped) == 40
    assert sum(block.nbytes for block in mapped.blocks) == 40 * 2 * 2 * 4 * 64 * 4
    split = plan_batch(8, 4, rank=0, world=1)

    def batches(latents: Any, start: int) -> Any:
        order = StepOrder(make_buckets(IMAGE, shapes.sides, 1), shapes.labels, split, 2)
        return latent_stream(latents, order, flip=True, start_step=start)

    one, two, late = batches(latents.train, 0), batches(mapped, 0), batches(latents.train, 3)
    micros = [next(one) for _ in range(10)]
    for micro in micros:
        other = next(two)
        assert torch.equal(micro.images, other.images) and torch.equal(micro.labels, other.labels)
    assert torch.equal(next(late).images, micros[6].images), "step 3 begins with the seventh micro-batch"
    assert sorted(int(label) for micro in micros for label in micro.labels) == sorted(shapes.labels.tolist()), "one epoch"


def test_statistics_by_the_law_of_total_variance() -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.standard_normal((n, 1, 2, 3, 2, 2)).astype(np.float32) for n in (5, 9)]
    statistics = cache.statistics([cache.sums_of(block) for block in blocks])
    everything = np.concatenate(blocks).astype(np.float64)
    mean, logvar = everything[:, :, 0], everything[:, :, 1]
    np.testing.assert_allclose(statistics["mean"], mean.mean((0, 1, 3, 4)))
    variance = mean.var((0, 1, 3, 4)) + np.exp(logvar).mean((0, 1, 3, 4))
    np.testing.assert_allclose(statistics["std"], np.sqrt(variance))
    assert statistics["low"] == mean.min((0, 1, 3, 4)).tolist() and statistics["high"] == mean.max((0, 1, 3, 4)).tolist()


def test_differences_in_words() -> None:
    contract = {"autoencoder": "a", "pictures": "p", "held_out": None, "image": {"size": 16}}
    assert cache.describe_differences(contract, contract) == []
    assert cache.describe_differences({**contract, "autoencoder": "b", "image": {"size": 8}}, contract) == [
        "another autoencoder", "another image (size, channels or flip)",
    ]  # fmt: skip
    blocks = blocks_of(Path("x"), "train", 1000)
    assert [block.path.name for block in blocks[1::2]] == ["block_00001.json", "block_00003.json"]
    assert [len(block.items) for block in blocks] == [256, 256, 256, 232]


def test_a_codec_goes_there_and_back() -> None:
    opened = autoencoder()
    codec = LatentCodec(opened.network, [1.0, 0.0, -2.0, 0.5], [2.0, 1.0, 0.5, 4.0])
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = opened.network.moments(images)[0]
    torch.testing.assert_close(codec.decode(codec.normalise(mean)), opened.network.decode(mean), rtol=1e-4, atol=1e-5)
    assert float(codec.normalise(torch.tensor([3.0, 1, -1, 0.5])[:, None, None].expand(1, 4, 1, 1))[0, 0]) == 1.0


def test_images_are_encoded_as_the_draws_that_a_run_learns_from(tmp_path: Path, shapes: Any) -> None:
    """What is held out has the posterior's variance, and an image, cached or not, has the same latents each time."""
    opened, twice = autoencoder(), 6
    images = torch.zeros(400, 3, 16, 16)
    mean, logvar = opened.network.moments(images)
    codec = LatentCodec(opened.network, [0.0] * 4, [2.0] * 4)
    encoded = codec.encode(images, range(400))
    around = (2 * encoded - mean) / (0.5 * logvar).exp()
    torch.testing.assert_close(around.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.02)
    assert abs(float(around.mean())) < 0.01
    torch.testing.assert_close(codec.encode(images[:1], [twice])[0], encoded[twice], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.examples(mean, None, range(400)), mean / 2)

    held_out = open_sources(ShapesSource(source="shapes", count=8, size=16, split="test"))
    latents = latents_of(opened, ImageDensity(shapes, held_out, IMAGE), tmp_path / "cache", Accelerator(cpu=True), batch_size=7)
    examples, some = latents.examples(held_out.labels), np.array([5, 2])
    pixels = torch.from_numpy(held_out.batch(some, ImageConfig(size=16), np.full((2, 3), 0.5)))
    encoded = latents.codec.encode(to_network(pixels, CPU), [5, 2])
    torch.testing.assert_close(examples.load(some), encoded, rtol=1e-3, atol=1e-3)


def test_images_that_an_autoencoder_was_not_made_for() -> None:
    def shape_at(channels: Any, size: Any, sizes: Any = (16, 32)) -> tuple[int, ...]:
        return autoencoder(sizes=sizes).latent_shape(ImageConfig(size=size, channels=channels))

    assert shape_at(3, 32) == (4, 16, 16)
    assert shape_at(3, (28, 36)) == (4, 14, 18) == shape_at(3, (28, 36), ((28, 36),))  # about the area of 32 px
    assert shape_at(3, 32, ((28, 36),)) == (4, 16, 16)
    for channels, size, message in (
        (1, 16, "has images of 3 channels; set image.channels"),
        (3, 17, "not divisible by 2"),
        (3, (16, 17), "image.size 16x17 is not divisible by 2; set it to 16 px or 16x18 px"),
        (3, 64, "at 16 px and 32 px"),
        (3, (64, 32), "at 16 px and 32 px, and images are 64x32 px; set image.size"),
    ):
        with pytest.raises(UserError, match=message):
            shape_at(channels, size)


def test_reconstruction_is_measured_and_shown(tmp_path: Path, shapes: Any) -> None:
    class Same(torch.nn.Module):
        """An autoencoder that gives back what it was given, a little brighter."""

        spec = VAEConfig(widths=(8,), latent_channels=3)

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
            return images, None

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z * 0.5 + 2 / 127.5

    sheet = tmp_path / "sheet.png"
    values = reconstruct(
        Same(),
        image_examples(shapes, make_buckets(IMAGE, shapes.sides, 1)),
        ReconstructConfig(num_samples=5),
        Accelerator(cpu=True),
        batch_size=16,
        sheet=sheet,
    )
    images = image_examples(shapes, make_buckets(IMAGE, shapes.sides, 1)).load(np.arange(40))
    outputs = images * 0.5 + 2 / 127.5
    assert values["l1"] == pytest.approx(float((outputs - images).abs().mean()), rel=1e-5)
    mse = (outputs - images).square().flatten(1).mean(1)
    assert values["psnr"] == pytest.approx(float((10 * torch.log10(4 / mse)).mean()), rel=1e-4)
    drift = (outputs - images).mean((0, 2, 3)) * 127.5
    assert values["colour_drift"] == pytest.approx(float(max(drift, key=abs)), rel=1e-4)
    assert values["latent_std_1"] == pytest.approx(float(images[:, 1].double().std(correction=0)), rel=1e-4)
    with Image.open(sheet) as image:
        assert image.width == 4 + 5 * 68, "five columns"


def test_channels_in_trouble_are_named() -> None:
    healthy = {"latent_mean_0": 0.1, "latent_std_0": 1.0}
    assert troubled_channels(healthy) == []
    lines = troubled_channels(
        healthy | {"latent_mean_1": 0.0, "latent_std_1": 1e-3, "latent_mean_2": 500.0, "latent_std_2": 3.0}
    )
    assert len(lines) == 2 and "latent channel 1 is dead" in lines[0] and "latent channel 2 explodes" in lines[1]
