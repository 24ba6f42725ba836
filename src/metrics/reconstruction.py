"""How far reconstructions are from their images; (B, C, H, W) in [-1, 1] each, one number per image."""

from torch import Tensor

from ..config.packages import needed
from ..models.pretrained import import_torchvision

SMALLEST_FOR_SSIM = 11  # its window


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B,) decibels: 10 log10(2^2 / mean squared error), by torchmetrics."""
    import_torchvision()
    with needed("PSNR", "torchmetrics"):
        from torchmetrics.functional.image import peak_signal_noise_ratio

    pairs = zip(reconstruction.float(), images.float(), strict=True)
    return images.new_tensor([float(peak_signal_noise_ratio(a[None], b[None], data_range=2.0)) for a, b in pairs])


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B,) structural similarity, 1 for equal images, by torchmetrics (Wang et al. 2004): the mean over the windows that lie
    inside the image, as that paper and scikit-image have it; images of at least 11 px."""
    import_torchvision()
    with needed("SSIM", "torchmetrics"):
        from torchmetrics.functional.image import structural_similarity_index_measure

    _, windows = structural_similarity_index_measure(
        reconstruction.float(), images.float(), data_range=2.0, reduction="none", return_full_image=True
    )
    edge = SMALLEST_FOR_SSIM // 2
    return windows[..., edge:-edge, edge:-edge].flatten(1).mean(1)


def colour_drift(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B, C): the mean of each channel in the reconstruction less that in the image, in steps of 1/255."""
    return (reconstruction - images).float().mean((2, 3)) * 127.5
