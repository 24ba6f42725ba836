"""Distances of feature sets, against torchmetrics, torch-fidelity, brute force and closed forms."""

from typing import Any

import numpy as np
import pytest
import torch

from src.metrics import distances
from src.metrics.distances import Array
from src.models.pretrained import import_torchvision

RNG = np.random.default_rng


def points(count: int = 300, dim: int = 12, scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> Array:
    return (RNG(seed).standard_normal((count, dim)) * scale + shift).astype(np.float32)


def fidelity(module: str) -> Any:
    import_torchvision()
    return __import__(f"torch_fidelity.{module}", fromlist=["x"])


def test_frechet_of_gaussians_is_the_closed_form() -> None:
    """Samples whose moments are exact: |m - m'|^2 + |C^(1/2) - C'^(1/2)|_F^2 where the covariances commute."""
    raw = RNG(0).standard_normal((400, 6))
    centred = raw - raw.mean(0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred.T)).T)
    turn, _ = np.linalg.qr(RNG(1).standard_normal((6, 6)))
    a, b, shift = np.linspace(0.2, 2, 6), np.linspace(1.5, 0.3, 6), np.arange(6) / 3
    value = distances.frechet(white * a @ turn, distances.moments((white * b + shift) @ turn))
    assert value == pytest.approx(((a - b) ** 2).sum() + (shift**2).sum(), rel=1e-9)


def test_frechet_is_that_of_torch_fidelity_and_of_torchmetrics_itself() -> None:
    import_torchvision()
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = points(200), points(260, scale=1.3, shift=0.2, seed=1)
    value = distances.frechet(x, distances.moments(y))
    theirs = fidelity("metric_fid")
    sides = [theirs.fid_features_to_statistics(torch.from_numpy(side).double()) for side in (x, y)]
    other = theirs.fid_statistics_to_metric(*sides, False)["frechet_inception_distance"]
    assert value == pytest.approx(other, rel=1e-6)
    metric = FrechetInceptionDistance(feature=distances._Identity(12))
    metric.update(torch.from_numpy(x), real=False)
    metric.update(torch.from_numpy(y), real=True)
    assert value == pytest.approx(float(metric.compute()), rel=1e-5)


def test_equal_sets() -> None:
    x = points()
    assert distances.frechet(x, distances.moments(x)) == pytest.approx(0, abs=1e-9)
    few = points(20, 60)  # fewer than features: the covariance is singular
    assert distances.frechet(few, distances.moments(few)) == pytest.approx(0, abs=1e-4)
    mean, std = distances.kernel_distance(x, x, size=100)
    assert abs(mean) < 3 * std
    same = distances.manifold(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    nearest, which = distances.nearest(x, x)
    assert nearest.max() < 1e-5 and (which[:, 0] == np.arange(len(x))).all()


def test_moments_add_up() -> None:
    x = points(50, 4)
    whole, parts = distances.moments(x), [distances.moments(x[:20]), distances.moments(x[20:])]
    assert whole.number == sum(part.number for part in parts)
    torch.testing.assert_close(whole.outer, parts[0].outer + parts[1].outer)
    torch.testing.assert_close(whole.sum, torch.from_numpy(x).double().sum(0))


def test_kernel_distance_of_whole_sets_is_that_of_torch_fidelity() -> None:
    """Where a subset is the whole set, no drawing comes between."""
    x, y = points(80), points(80, shift=0.5, seed=1)
    mean, std = distances.kernel_distance(x, y, subsets=2, size=80)
    options = {"kid_subsets": 2, "kid_subset_size": 80, "verbose": False, "rng_seed": 0}
    theirs = fidelity("metric_kid").kid_features_to_metric(*(torch.from_numpy(side).double() for side in (x, y)), **options)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6) and std < 1e-9
    torch.manual_seed(5)
    number = torch.rand(1)
    torch.manual_seed(5)
    assert distances.kernel_distance(x, y, size=20) == distances.kernel_distance(x, y, size=20)
    assert torch.rand(1) == number, "what it draws is its own"


@pytest.mark.parametrize("count", [9, 150])  # fewer samples than features, and more
def test_a_frechet_distance_with_its_error_is_the_same_distance(count: int) -> None:
    samples, real = points(count, 12, 1.2, 0.1), distances.moments(points(400, seed=1))
    value, error = distances.frechet_with_error(samples, real)
    assert value == pytest.approx(distances.frechet(samples, real), rel=1e-6) and error > 0


def test_a_kernel_distance_with_its_error_is_the_same_distance() -> None:
    samples, real = points(60, seed=1), points(90, shift=0.2)
    double = samples.astype(np.float64), real.astype(np.float64)
    within = [(x @ x.T / 12 + 1) ** 3 for x in double]
    across = (double[0] @ double[1].T / 12 + 1) ** 3
    of_sets = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within]
    value, error = distances.kernel_with_error(samples, real)
    assert value == pytest.approx(sum(of_sets) - 2 * across.mean(), rel=1e-9) and error > 0


@pytest.mark.parametrize("distance", ["frechet", "kernel"])
def test_the_standard_errors_are_how_far_other_samples_lie_apart(distance: str) -> None:
    real, measured = points(500, 6, seed=9), list[tuple[float, float]]()
    for seed in range(60):
        samples = points(160, 6, 1.3, 0.2, seed=100 + seed)
        known = distances.moments(real) if distance == "frechet" else real
        measured.append(getattr(distances, f"{distance}_with_error")(samples, known))
    values, errors = np.array(measured).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.3)


def test_inception_score() -> None:
    logits = np.eye(10)[np.arange(200) % 10] * 60  # certain, and all classes alike: as many as classes
    assert distances.inception_score(logits, splits=1)[0] == pytest.approx(10, rel=1e-6)
    assert distances.inception_score(np.ones((50, 10)))[0] == pytest.approx(1)
    some = RNG(0).standard_normal((300, 7)) * 2
    theirs = fidelity("metric_isc").isc_features_to_metric(torch.from_numpy(some), splits=1)
    assert distances.inception_score(some, splits=1)[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_precision_and_recall_are_those_of_torch_fidelity() -> None:
    x, y = points(150, 5, scale=0.7), points(220, 5, seed=1)
    values = distances.manifold(x, y, neighbours=3)
    options = {"prc_neighborhood": 3, "prc_batch_size": 64, "save_cpu_ram": False, "verbose": False}
    theirs = fidelity("metric_prc").prc_features_to_metric(*(torch.from_numpy(side).double() for side in (x, y)), **options)
    assert (values.precision, values.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert values.precision > values.recall, "samples of a narrower Gaussian are all plausible and cover less"


def test_density_and_coverage_by_brute_force() -> None:
    x, y, k = points(40, 3, shift=0.3), points(50, 3, seed=1), 4
    among = np.sort(np.linalg.norm(y[:, None] - y[None], axis=2), axis=1)[:, k]
    inside = np.linalg.norm(x[:, None] - y[None], axis=2) <= among
    values = distances.manifold(x, y, neighbours=k)
    assert values.density == pytest.approx(inside.sum() / (k * len(x)))
    assert values.coverage == pytest.approx(inside.any(0).mean())


def test_blocks_of_rows_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = points(70), points(90, seed=1)
    whole = distances.manifold(x, y), distances.nearest(x, y, most=3)
    monkeypatch.setattr(distances, "DISTANCES_AT_A_TIME", 1000)
    parts = distances.manifold(x, y), distances.nearest(x, y, most=3)
    assert whole[0] == parts[0] and all((a == b).all() for a, b in zip(whole[1], parts[1], strict=True))


def test_copies_are_seen() -> None:
    train, held_out = points(500), points(300, seed=1)
    unseen = distances.nearest(held_out, train)[0][:, 0]
    new = distances.copying(distances.nearest(points(400, seed=2), train)[0][:, 0], unseen)
    assert new.nearer == pytest.approx(0.5, abs=0.06) and new.copied < 0.04
    copies = train[:200] + 0.01 * points(200, seed=3)
    old = distances.copying(distances.nearest(copies, train)[0][:, 0], unseen)
    assert old.nearer > 0.999 and old.copied == 1
    assert distances.copying(unseen, unseen).nearer == pytest.approx(0.5)
    assert new.copied_if_new == 0.01


@pytest.mark.parametrize("held_out", [6, 150])
def test_new_images_are_called_copies_as_often_as_is_said(held_out: int) -> None:
    """Over many draws of the held-out images and of the samples, all from one distribution."""
    rng = np.random.default_rng(0)
    results = [distances.copying(rng.random(400), rng.random(held_out)) for _ in range(2000)]
    share = results[0].copied_if_new
    assert share == max(0.01, 1 / (held_out + 1))
    assert np.mean([one.copied for one in results]) == pytest.approx(share, rel=0.06)


def test_a_reader_reads_classes() -> None:
    labels = np.arange(300) % 3
    centres = np.eye(3, 12) * 6
    read = distances.fit_reader(points() + centres[labels], labels)
    fresh = points(90, seed=1) + centres[np.arange(90) % 3]
    wanted = np.arange(90) % 3
    each = distances.accuracy_by_class(read(fresh), wanted, 4)
    assert (each[:3] > 0.9).all() and np.isnan(each[3])
    assert distances.accuracy_by_class(read(fresh), (wanted + 1) % 3, 3).max() < 0.1
