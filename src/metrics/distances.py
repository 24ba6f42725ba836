"""How alike two sets of images are, by their features: (N, D) of samples and (M, D) of real images, float32 or float64. And how
far reconstructions are from their images: (B, C, H, W) in [-1, 1] each, one number per image.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config.packages import needed

Array = NDArray[Any]
NEIGHBOURS = 5  # of precision, recall, density and coverage, as Naeem et al. have it
MAX_IMAGES = 10_000  # of each side for them: their cost grows with the square
ON_ONE_RANK: dict[str, Any] = {"sync_on_compute": False}  # one rank has all features, and the others do not compute
DISTANCES_AT_A_TIME = 20_000_000
SMALLEST_FOR_SSIM = 11  # its window


def _double(features: Array) -> Tensor:
    return torch.from_numpy(features).double()  # so that the fast way to distances is exact to 1e-7


class Moments(NamedTuple):
    """Number, sum (D,) and sum of outer products (D, D) of features, in float64: what a Fréchet distance needs of a set."""

    number: int
    sum: Tensor
    outer: Tensor


def moments(features: Array) -> Moments:
    x = _double(np.asarray(features))
    return Moments(len(x), x.sum(0), x.T @ x)


class _Identity(nn.Identity):
    """In place of torchmetrics' own network: its input are features already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim


def frechet(samples: Array, real: Moments) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), by torchmetrics: the squared Fréchet distance between Gaussians of the means
    and covariances of the samples (N, D) and of the real images (Eq. 6, Heusel et al. 2017, arXiv:1706.08500); 0 for equal
    sets."""
    with needed("the Fréchet distance", "torchmetrics", "torchvision"):
        from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Identity(len(real.sum)), **ON_ONE_RANK)
    metric.update(_double(samples), real=False)
    metric.real_features_sum, metric.real_features_cov_sum = real.sum, real.outer
    metric.real_features_num_samples = torch.tensor(real.number)
    return max(0.0, float(metric.compute()))


def frechet_with_error(samples: Array, real: Moments, *, blocks: int = 16) -> tuple[float, float]:
    """What `frechet` gives, and its standard error over the draw of the samples (N, D), by the jackknife: one of `blocks` equal
    parts is left out at a time, and the variance is (blocks - 1) / blocks times the sum of squares of what comes of it about
    its mean (Quenouille 1956, Tukey 1958). Samples i, i + blocks, ... are a part, so that each has all classes."""
    x, number = _double(np.asarray(samples)), real.number
    mean = real.sum / number
    covariance = (real.outer - number * mean.outer(mean)) / (number - 1)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(part: Tensor) -> float:
        centred = part - part.mean(0)
        rooted = centred @ root  # the eigenvalues of C C' are those of (X root)' (X root) / (N - 1), and of the smaller product
        product = rooted @ rooted.T if len(part) <= part.shape[1] else rooted.T @ rooted
        trace = torch.linalg.eigvalsh(product / (len(part) - 1)).clamp(min=0).sqrt().sum()
        spread = centred.square().sum() / (len(part) - 1) + covariance.trace() - 2 * trace
        return float((part.mean(0) - mean).square().sum() + spread)

    blocks = min(blocks, len(x) // 2)
    which = torch.arange(len(x)) % blocks
    return max(0.0, distance(x)), _jackknife(np.array([distance(x[which != block]) for block in range(blocks)]))


def kernel_with_error(samples: Array, real: Array) -> tuple[float, float]:
    """The squared maximum mean discrepancy of `kernel_distance`, unbiased, of all images at once (of at most MAX_IMAGES real
    ones), and its standard error over the draw of the samples (N, D), by the jackknife that leaves one sample out at a time."""
    x, y = _double(np.asarray(samples)), _double(np.asarray(real))
    y = y[torch.arange(min(len(y), MAX_IMAGES)) * len(y) // min(len(y), MAX_IMAGES)]
    n, m, dim = len(x), len(y), x.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    within, across = kernel(x, x).fill_diagonal_(0).sum(1), kernel(x, y).mean(1)  # (N,) each
    of_real = sum(float(kernel(part, y).sum()) for part in y.split(1000)) - float(((y * y).sum(1) / dim + 1).pow(3).sum())
    of_real /= m * (m - 1)
    whole = within.sum() / (n * (n - 1)) - 2 * across.mean() + of_real
    left_out = (within.sum() - 2 * within) / ((n - 1) * (n - 2)) - 2 * (across.sum() - across) / (n - 1) + of_real
    return float(whole), _jackknife(left_out.numpy())


def _jackknife(left_out: Array) -> float:
    """The standard error of a number from its values with one part of the data left out at a time (parts,)."""
    return float(np.sqrt((len(left_out) - 1) * np.var(left_out)))


def _over_subsets(metric: Any, *sets: tuple[Array, dict[str, bool]]) -> tuple[float, float]:
    """The mean and the deviation that a metric of torchmetrics gives. It draws subsets from torch's generator: here always the
    same ones, and without its warnings."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom")  # of one split
        for values, side in sets:
            metric.update(_double(values), **side)
        mean, std = metric.compute()
    return float(mean), float(std.nan_to_num())


def kernel_distance(samples: Array, real: Array, *, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """KID (Binkowski et al. 2018, arXiv:1801.01401), by torchmetrics: the squared maximum mean discrepancy under the kernel
    (x'y / D + 1)^3, unbiased: the mean over `subsets` of `size` images and its deviation. About 0 for equal sets."""
    with needed("the kernel distance", "torchmetrics", "torchvision"):
        from torchmetrics.image.kid import KernelInceptionDistance

    size = min(size, len(samples), len(real))
    with warnings.catch_warnings(action="ignore"):  # of the memory that features take
        metric = KernelInceptionDistance(feature=_Identity(0), subsets=subsets, subset_size=size, **ON_ONE_RANK)
    return _over_subsets(metric, (samples, {"real": False}), (real, {"real": True}))


def inception_score(logits: Array, *, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y | x) || p(y)) of class logits (N, K), the mean over `splits` and its standard deviation, by torchmetrics
    (Salimans et al. 2016, arXiv:1606.03498). Higher is better; K at most."""
    with needed("the Inception Score", "torchmetrics", "torchvision"):
        from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(action="ignore"):
        metric = InceptionScore(feature=_Identity(0), splits=min(splits, len(logits)), **ON_ONE_RANK)
    return _over_subsets(metric, (logits, {}))


def _rows(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of the distances |x_i - y_j|: (first row, (b, M)), of 160 MB at most."""
    block = max(1, DISTANCES_AT_A_TIME // len(y))
    for start in range(0, len(x), block):
        yield start, torch.cdist(x[start : start + block], y, compute_mode="use_mm_for_euclid_dist")


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """(N,): each point's distance to its `neighbours`-th neighbour among the others."""
    return torch.cat([rows.kthvalue(neighbours + 1, dim=1).values for _, rows in _rows(x, x)])  # the first is the point itself


class Manifold(NamedTuple):
    """Shares in [0, 1], but density, which may exceed 1. For two samples of one distribution density and coverage are near 1;
    the value of precision and recall for such samples depends on the features."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(samples: Array, real: Array, *, neighbours: int = NEIGHBOURS) -> Manifold:
    """A set is the balls around its points that reach to their k-th neighbours. Precision is the share of samples in the real
    set's balls, recall that of real points in the samples' (Kynkäänniemi et al. 2019, arXiv:1904.06991). Density is the mean
    number of real balls that a sample is in, over k; coverage the share of real balls that hold a sample (Naeem et al. 2020,
    arXiv:2002.09797). At least k + 1 points of each."""
    x, y = _double(samples), _double(real)
    of_samples, of_real = _radii(x, neighbours), _radii(y, neighbours)
    inside, counted = 0, 0
    covered, recalled = torch.zeros(2, len(y), dtype=torch.bool)
    for start, rows in _rows(x, y):
        in_real = rows <= of_real
        inside += int(in_real.any(1).sum())
        counted += int(in_real.sum())
        covered |= in_real.any(0)
        recalled |= (rows <= of_samples[start : start + len(rows), None]).any(0)
    recall, coverage = float(recalled.float().mean()), float(covered.float().mean())
    return Manifold(inside / len(x), recall, counted / (neighbours * len(x)), coverage)


def nearest(samples: Array, real: Array, *, most: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(N, most) twice: each sample's distances to its nearest real images, the nearest first, and the indices of those."""
    parts = [rows.topk(min(most, len(real)), dim=1, largest=False) for _, rows in _rows(_double(samples), _double(real))]
    return torch.cat([part.values for part in parts]).float().numpy(), torch.cat([part.indices for part in parts]).numpy()


class Copying(NamedTuple):
    """Whether samples are copies of training images, compared with images that the network did not learn from.

    `nearer` is the share of all pairs of a sample and a held-out image in which the sample is nearer to its nearest training
    image than the held-out one to its: one half where samples are as new as held-out images. `copied` is the share of samples
    nearer than 99 % of the held-out images are, or, of fewer than 99, nearer than all of them; of new images the share
    `copied_if_new` would be.
    """

    nearer: float
    copied: float
    copied_if_new: float


def copying(samples: Array, held_out: Array) -> Copying:
    """From distances (N,) and (M,) to the nearest training image."""
    ordered = np.sort(held_out)
    below, upto = np.searchsorted(ordered, samples, side="left"), np.searchsorted(ordered, samples, side="right")
    nearer = 1 - (below + upto) / 2 / len(ordered)  # equal ones count half
    share = max(0.01, 1 / (len(ordered) + 1))  # of new images that share is nearer than the one of M at share * (M + 1)
    threshold = np.quantile(ordered, share, method="weibull")
    return Copying(float(nearer.mean()), float((samples < threshold).mean()), share)


def fit_reader(real: Array, labels: NDArray[np.int64]) -> Callable[[Array], NDArray[np.int64]]:
    """A logistic regression on the features (M, D) of real images and their labels (M,): features (N, D) -> labels (N,)."""
    with needed("reading the classes of samples", "sklearn"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    reader: Any = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500, tol=1e-3))
    reader.fit(real, labels)
    return reader.predict


def accuracy_by_class(read: NDArray[np.int64], wanted: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """(num_classes,): the share of the images of each class that were read as this class; NaN where there are none."""
    right = read == wanted
    return np.array([right[wanted == k].mean() if (wanted == k).any() else np.nan for k in range(num_classes)])


# ---------------------------------------------------------------------------------------------- pairs of images


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B,) decibels: 10 log10(2^2 / mean squared error), by torchmetrics."""
    with needed("PSNR", "torchmetrics", "torchvision"):
        from torchmetrics.functional.image import peak_signal_noise_ratio

    pairs = zip(reconstruction.float(), images.float(), strict=True)
    return images.new_tensor([float(peak_signal_noise_ratio(a[None], b[None], data_range=2.0)) for a, b in pairs])


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B,) structural similarity, 1 for equal images, by torchmetrics (Wang et al. 2004): the mean over the windows that lie
    inside the image, as that paper and scikit-image have it; images of at least 11 px."""
    with needed("SSIM", "torchmetrics", "torchvision"):
        from torchmetrics.functional.image import structural_similarity_index_measure

    _, windows = structural_similarity_index_measure(
        reconstruction.float(), images.float(), data_range=2.0, reduction="none", return_full_image=True
    )
    edge = SMALLEST_FOR_SSIM // 2
    return windows[..., edge:-edge, edge:-edge].flatten(1).mean(1)


def colour_drift(reconstruction: Tensor, images: Tensor) -> Tensor:
    """(B, C): the mean of each channel in the reconstruction less that in the image, in steps of 1/255."""
    return (reconstruction - images).float().mean((2, 3)) * 127.5
