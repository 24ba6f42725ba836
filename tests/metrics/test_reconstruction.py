"""What is measured of reconstructions, against torchmetrics' modules and by closed forms."""

import math

import pytest
import torch
from torch import Tensor

from src.metrics import colour_drift, psnr, ssim
from src.metrics.distances import SMALLEST_FOR_SSIM
from src.models.pretrained import import_torchvision


def noisy_pair(channels: int = 3, size: int = 24) -> tuple[Tensor, Tensor]:
    images = torch.rand(4, channels, size, size) * 2 - 1
    noise = torch.tensor([0.01, 0.1, 0.3, 1.0])[:, None, None, None] * torch.randn_like(images)
    return (images + noise).clamp(-1, 1), images


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_is_that_of_torchmetrics_image_by_image(channels: int) -> None:
    import_torchvision()
    from torchmetrics.image import PeakSignalNoiseRatio

    reconstruction, images = noisy_pair(channels)
    values = psnr(reconstruction, images)
    assert values.shape == (4,) and values.dtype == images.dtype
    for i in range(4):
        wanted = PeakSignalNoiseRatio(data_range=2.0)(reconstruction[i : i + 1], images[i : i + 1])
        torch.testing.assert_close(values[i], wanted)


def test_psnr_by_its_closed_form() -> None:
    reconstruction, images = noisy_pair()
    for i, values in enumerate(psnr(reconstruction, images).tolist()):
        error = float((reconstruction[i].double() - images[i].double()).square().mean())
        assert math.isclose(values, 10 * math.log10(4 / error), rel_tol=1e-5)


def test_psnr_of_an_even_shift_is_known() -> None:
    images = torch.zeros(2, 3, 8, 8)
    torch.testing.assert_close(psnr(images + 0.02, images), torch.full((2,), 40.0))


def test_equal_images_are_infinitely_alike() -> None:
    _, images = noisy_pair()
    assert bool((psnr(images, images) == math.inf).all())
    torch.testing.assert_close(ssim(images, images), torch.ones(4))


def test_more_noise_is_worse() -> None:
    reconstruction, images = noisy_pair()
    for measure in (psnr, ssim):
        values = measure(reconstruction, images).tolist()
        assert values == sorted(values, reverse=True) and len(set(values)) == 4, measure.__name__


def test_a_batch_of_one_gives_one_number() -> None:
    reconstruction, images = noisy_pair()
    for measure in (psnr, ssim):
        assert measure(reconstruction[:1], images[:1]).shape == (1,)
        torch.testing.assert_close(measure(reconstruction[:1], images[:1]), measure(reconstruction, images)[:1])


def test_ssim_takes_an_image_as_small_as_its_window() -> None:
    values = ssim(*noisy_pair(size=SMALLEST_FOR_SSIM))
    assert bool(torch.isfinite(values).all()) and bool((values.diff() < 0).all())


def test_colour_drift_is_in_steps_of_a_255th() -> None:
    images = (torch.randint(0, 250, (2, 3, 8, 8)).double() / 127.5) - 1
    steps = torch.tensor([[3.0, 0, -2], [0, 5, 1]]).double()
    reconstruction = (images + 1) * 127.5 + steps[:, :, None, None]  # bytes, so many steps brighter
    values = colour_drift(reconstruction / 127.5 - 1, images)
    torch.testing.assert_close(values.double(), steps, rtol=1e-5, atol=1e-5)


def test_noise_that_is_even_on_both_sides_is_no_drift() -> None:
    images = torch.zeros(1, 3, 8, 8)
    noise = torch.randn(1, 3, 8, 4)
    drift = colour_drift(images + torch.cat([noise, -noise], dim=3), images)
    torch.testing.assert_close(drift, torch.zeros(1, 3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_both_are_those_of_scikit_image(channels: int) -> None:
    """SSIM with the window of the paper: a Gaussian of 1.5 px, 11 px wide, and population covariances."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    reconstruction, images = noisy_pair(channels)
    for i in range(4):
        a, b = (side[i].permute(1, 2, 0).double().numpy() for side in (images, reconstruction))
        assert float(psnr(reconstruction, images)[i]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2.0), rel=1e-4)
        wanted = structural_similarity(
            a, b, data_range=2.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(ssim(reconstruction, images)[i]) == pytest.approx(wanted, abs=1e-4)
