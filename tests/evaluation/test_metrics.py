"""The metrics of samples: the registry and the table, classes, notes, batches of features; and the settings of a sweep."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src import figures
from src.config import UserError
from src.data import ImageConfig, open_sources
from src.data.sources import ShapesSource
from src.diffusion import TimeShift
from src.evaluation.autoencoder import measure_distances
from src.evaluation.registry import METRICS, FeatureSets, Metric, flag, spread_indices
from src.evaluation.results import (
    Results,
    Setup,
    extract_features,
    join_batches,
    labels_like,
    on_screen,
    pixel_loader,
    pixels_of,
)
from src.evaluation.samples import add_class_accuracy, parse_sweep
from src.metrics.features import open_features
from src.runs.densities import SourceSampler
from src.runtime.stream import Examples
from src.sampling.config import SamplerConfig
from src.storage.blocks import Ranks


def test_what_a_sweep_says() -> None:
    parsed = parse_sweep(SamplerConfig(eta=0.5), ["steps=5,10", "spacing=even,trailing"])
    assert [(setting.steps, setting.spacing, setting.eta) for setting in parsed] == [
        (5, "even", 0.5), (5, "trailing", 0.5), (10, "even", 0.5), (10, "trailing", 0.5),
    ]  # fmt: skip
    shifted = parse_sweep(SamplerConfig(), ["shift.base=1024,4096", "steps=5"])
    assert shifted == [SamplerConfig(steps=5, shift=TimeShift(base=base)) for base in (1024, 4096)]
    assert parse_sweep(shifted[0], ["shift=null", "steps=7"]) == [SamplerConfig(steps=7)]
    assert parse_sweep(shifted[0], ['shift={"base":9}']) == [SamplerConfig(steps=5, shift=TimeShift(base=9))]
    for words, message in (
        (["shift.base=0"], r"shift.base: input should be greater than 0, not 0"),
        (["steps.base=3"], r"steps: "),
        (["stepz=1"], r"stepz: unknown key; did you mean 'steps'\? allowed here: alphas"),
        (["steps"], "write it as KEY=A,B"),
        (["steps=1", "steps=2"], "stands there twice"),
        (["solver=ddim,dimm"], "dimm"),
    ):
        with pytest.raises(UserError, match=message):
            parse_sweep(SamplerConfig(), words)


def test_samples_have_the_classes_of_the_real_images() -> None:
    data = open_sources(ShapesSource(source="shapes", count=40, size=16))
    data.labels = np.array([0] * 30 + [1] * 5 + [-1] * 5)
    labels = labels_like(data, 80, 4)
    assert labels is not None and [labels.count(k) for k in (0, 1, 2, 4)] == [60, 10, 0, 10], "no class is the null class"
    assert labels_like(data, 80, None) is None


def test_notes_on_too_few_images() -> None:
    assert flag(17, 17, 16) == []
    assert flag(16, 17, 16)[0].startswith("16 samples for 16 features: the distance is too large")
    assert on_screen(flag(2000, 12, 16)[0]).startswith("12 real images for")


def feature_sets(**labels: np.ndarray) -> FeatureSets:
    """Two classes far apart, the same images as samples, real and held out."""
    features = np.eye(2, dtype=np.float32).repeat(20, 0)
    return FeatureSets(open_features("random"), features, features, features, labels, 2)


def test_held_out_images_without_a_class_are_not_read(tmp_path: Path) -> None:
    labels = np.array([0] * 20 + [1] * 20)
    comparison = feature_sets(real=labels, samples=labels, held_out=np.full(40, -1))
    results = Results(tmp_path)
    lines = add_class_accuracy(results, comparison, ["a", "b"])
    assert comparison.values["accuracy"] == 1.0 and "accuracy_held_out" not in comparison.values
    assert results.values["class_b_read_by_random"] == 1 and len(lines) == 3
    json.dumps(results.document, allow_nan=False)


@pytest.mark.parametrize(
    ("real", "samples", "note"), [([0, 0], [0, 1], "one class alone"), ([0, 1], [2, 2], "no sample has a class")]
)
def test_samples_or_real_images_without_classes(tmp_path: Path, real: list[int], samples: list[int], note: str) -> None:
    comparison = feature_sets(real=np.repeat(real, 20), samples=np.repeat(samples, 20))
    assert comparison.notes[-1] == f"{note}: nothing to read"
    assert "accuracy" not in comparison.values and add_class_accuracy(Results(tmp_path), comparison, ["a", "b"]) == []


def test_a_metric_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        METRICS, "gap", Metric(lambda sets: float(sets.real.mean() - sets.samples.mean()), "mean gap", "{:.1f}")
    )
    monkeypatch.setitem(METRICS, "never", Metric(lambda sets: 1.0, "never", needs="labels"))
    monkeypatch.setitem(METRICS, "hidden", Metric(lambda sets: 2.0, needs="held_out", counted="held_out"))
    sets = feature_sets()
    sets.held_out = sets.real[:12]
    results = Results(tmp_path, step=3)
    results.add_table("title", [sets])
    assert results.values["gap_random_of_40"] == 0 and results.values["hidden_random_of_12"] == 2
    assert "never" not in results.document["random"]
    assert "  mean gap                                0.0" in results.lines and "hidden" not in "".join(results.lines)
    results.write()
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["step"] == 3 and document["random"]["gap"] == 0


def test_batches_are_joined_and_indices_spread() -> None:
    joined = join_batches({"x": np.full(len(part), part[0])} for part in ([1, 2], [3]))
    assert joined["x"].tolist() == [1, 1, 3]
    assert spread_indices(10, 3).tolist() == [0, 3, 6] and spread_indices(2, 5).tolist() == [0, 1]
    pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert extract_features(open_features("random"), pixels).shape == (2, 16)
    assert pixels_of(torch.tensor([-1.0, 1.0, 2.0]).reshape(1, 3, 1, 1)).flatten().tolist() == [0, 255, 255]


def test_starts_are_dealt_anew_when_all_were_given() -> None:
    starts = SourceSampler(Examples(np.zeros(5, np.int64), lambda indices: torch.from_numpy(indices).float()))
    points = starts(0, range(10))
    assert len(starts) == 5 and sorted(points[:5].tolist()) == [0, 1, 2, 3, 4] and (points[:5] == points[5:]).all()


def test_a_folder_of_results_belongs_to_one_request(tmp_path: Path) -> None:
    setup = Setup([open_features("random")], tmp_path / "out", Ranks(), torch.device("cpu"), batch_size=4, seed=0)
    assert setup.claim("run", "quality", {"weights": "a"}) == tmp_path / "out"
    assert json.loads((tmp_path / "out" / "request.json").read_text())["features"][0][0] == "random"
    (tmp_path / "out" / "block_00000.npz").touch()
    with pytest.raises(UserError, match="holds other figures"):
        setup.claim("run", "quality", {"weights": "b"})
    assert setup.computes and not replace(setup, ranks=Ranks(1, 2)).computes


def test_features_are_extracted_in_blocks_and_the_nearest_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup([open_features("random")], tmp_path, Ranks(), torch.device("cpu"), batch_size=4, seed=0)
    data = open_sources(ShapesSource(source="shapes", count=12, size=16))
    load = pixel_loader(data, ImageConfig(size=16))

    def pixels(indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(load(indices)).permute(0, 3, 1, 2)

    samples = setup.measure(tmp_path, 12, lambda part: setup.features(pixels(part)), "testing", block=5)["random"]
    assert samples.shape == (12, 16) and len(list(tmp_path.glob("block_*.npz"))) == 3
    assert np.allclose(samples[4:8], extract_features(setup.networks[0], pixels(range(4, 8))), atol=1e-5)
    sets = FeatureSets(setup.networks[0], samples, samples[::-1].copy())
    assert np.allclose(sets.nearest, 0, atol=1e-3)
    sheets, draw_grid = list[Any](), figures.grid
    monkeypatch.setattr(figures, "grid", lambda rows, **options: sheets.append((rows, options)) or draw_grid(rows, **options))
    results = Results(tmp_path)
    results.add_nearest(sets, pixels, lambda indices: load([11 - i for i in indices]), "training pictures", 5)
    rows, options = sheets[0]
    assert results.files == [tmp_path / "nearest.png"] and rows.shape == (4 * 12, 16, 16, 3)
    assert np.array_equal(rows[0::4], rows[1::4]), "beside each sample, the real image at no distance"
    assert options["labels"][0].startswith("#") and options["title"].startswith("the 12 samples nearest to the training")


def test_distances_of_reconstructions_are_per_image() -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    distances = measure_distances(images, images, lambda a, b: (a - b).abs().flatten(1).sum(1))
    assert {name: values.shape for name, values in distances.items()} == dict.fromkeys(("psnr", "l1", "ssim", "lpips"), (3,))
    assert distances["l1"].eq(0).all() and distances["ssim"].allclose(torch.ones(3))
    assert "ssim" not in measure_distances(images[:, :, :8, :8], images[:, :, :8, :8]), "smaller than its window"
