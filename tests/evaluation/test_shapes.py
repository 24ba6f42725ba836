"""Runs on images of several shapes are measured: samples in the data's shapes, likelihoods, reconstructions, folders."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.config import UserError, read_json
from src.data import ImageConfig, ImageSet, open_sources
from src.data.buckets import sort_by_shape
from src.data.sources import FolderSource
from src.data.sources.shapes import SHAPES, draw_shape
from src.evaluation.quality import Quality, QualityConfig
from src.evaluation.results import samples_like
from src.evaluation.shapes import by_shape, measure_by_shape, on_white, pixel_loader, to_squares
from src.metrics.features import open_features
from src.runs.densities import SourceSampler
from src.runs.opened import open_trained
from src.sampling import SamplerConfig, build_sampler
from tests.conftest import ROOT, launch, metrics, refused, run_here

SIZES = ((20, 12), (16, 16), (12, 20))  # of the buckets: height and width
ASPECT = {"size": 16, "aspect": {"min_images": 4}}
RANDOM = ("--features", "random", "--batch-size", "8")


def write_images(root: Path, counts: tuple[int, int, int] = (12, 36, 24)) -> Path:
    """So many images of each of the sizes (twice as large), in classes."""
    rng = np.random.default_rng(0)
    for (height, width), count in zip(SIZES, counts, strict=True):
        for i in range(count):
            kind = SHAPES[i % 2 if height == width else 2]
            path = root / kind / f"{height}x{width}_{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw_shape(kind, 2 * max(height, width), rng)
            top, left = max(height, width) - height, max(height, width) - width
            Image.fromarray(pixels[top : top + 2 * height, left : left + 2 * width]).save(path)
    return root


def images_in(folder: Path) -> ImageSet:
    return open_sources(FolderSource(source="folder", path=str(folder)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


def train(script: str, config: str, data: Path, folder: Path, **changes: Any) -> Path:
    raw = json.loads((ROOT / "configs" / "smoke" / f"{config}.json").read_text())
    del raw["$schema"]
    raw |= {"data": {"source": "folder", "path": str(data)}, "held_out": 0.25} | changes
    (folder / f"{config}.json").write_text(json.dumps(raw))
    run_here(script, "-cfg", folder / f"{config}.json", "--run-dir", folder / config)
    return folder / config


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quality = {"every": 4, "num_samples": 20, "features": "random"}
    preview = {"every": 4, "num_samples": 4, "batch_size": 4, "quality": quality, "sampler": {"steps": 2}}
    folder = tmp_path_factory.mktemp("run")
    return train("ddpm_accelerate", "ddpm", data, folder, image=ASPECT, steps=4, preview=preview)


def figures_in(out: Path) -> dict[str, Any]:
    return read_json(out / "evaluation.json")


def test_pixels_of_several_shapes_become_squares() -> None:
    square = to_squares(ImageConfig(size=16))
    same = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert square(same) is same
    flat = square(torch.full((1, 3, 12, 20), 77, dtype=torch.uint8))
    assert flat.shape == (1, 3, 16, 16) and flat.eq(77).all()
    ramp = square(torch.arange(20, dtype=torch.uint8).mul(10).expand(1, 1, 12, 20).contiguous())[0, 0]
    assert ramp.eq(ramp[:1]).all() and (ramp[0].int().diff() > 0).all(), "across, and not turned"
    padded = on_white(SIZES)(torch.zeros(1, 3, 12, 20, dtype=torch.uint8))
    assert padded.shape == (1, 3, 20, 20) and padded[0, 0, 4:16].eq(0).all() and padded[0, 0, :4].eq(255).all()


def test_what_is_made_shape_by_shape_comes_in_the_order_that_is_asked_for() -> None:
    which, calls = np.array([1, 0, 1, 2, 0]), list[tuple[int, list[int]]]()

    def make(bucket: int, part: list[int]) -> torch.Tensor:
        calls.append((bucket, part))
        return torch.tensor(part)

    assert by_shape([4, 3, 2, 1, 0], which, make).tolist() == [4, 3, 2, 1, 0]
    assert calls == [(0, [4, 1]), (1, [2, 0]), (2, [3])]
    assert measure_by_shape(range(5), which, lambda part: {"x": part * 2})["x"].tolist() == [0, 2, 4, 6, 8]


def test_samples_have_shapes_and_classes_in_the_shares_of_the_data(data: Path) -> None:
    images = images_in(data)
    buckets = sort_by_shape(SIZES, ImageConfig(size=16), images.sides)
    assert buckets.counts == [12, 36, 24]
    labels, which = samples_like(images, buckets.which, 36, len(images.class_names))
    assert labels is not None and np.bincount(which).tolist() == [6, 18, 12] and (np.diff(which) >= 0).all()
    square = images.class_names.index("square")
    assert all((label == square) == (bucket != 1) for label, bucket in zip(labels, which, strict=True))
    assert samples_like(images, buckets.which, 7, None)[0] is None
    assert sort_by_shape((), ImageConfig(size=16), images.sides).counts == [72]


def test_real_images_are_cut_to_their_bucket(data: Path) -> None:
    images = images_in(data)
    load = pixel_loader(images, ImageConfig(size=16), SIZES, on_white(SIZES))
    for i in (0, 40, 71):
        width, height = (images.sides[i] // 2).tolist()
        pixels, top, left = load([i])[0], (20 - height) // 2, (20 - width) // 2
        whole = images.batch(np.array([i]), ImageConfig(size=(height, width)), np.full((1, 3), 0.5))[0]
        assert np.array_equal(pixels[top : top + height, left : left + width], whole)
    assert pixel_loader(images, ImageConfig(size=16), SIZES)([0, 71]).shape == (2, 16, 16, 3)


def test_the_quality_is_measured_while_a_run_trains(run: Path) -> None:
    assert metrics(run)[-1]["frechet_distance"] > 0
    assert "frechet_distance: images of all shapes are resized to squares of 16 px" in (run / "log.txt").read_text()


def test_ranks_share_the_samples_of_the_quality_in_batches_of_one_shape(data: Path) -> None:
    which = np.array([0] * 6 + [1] * 9 + [2] * 2)
    for world in (1, 2, 3):
        ranks = list[list[list[int]]]()
        for rank in range(world):
            accelerator: Any = SimpleNamespace(process_index=rank, num_processes=world)
            options = {"labels": None, "which": which, "sizes": SIZES}
            spec = QualityConfig(every=1, num_samples=17)
            quality = Quality(spec, images_in(data), ImageConfig(size=16), accelerator, open_features("random"), **options)
            ranks.append(quality.batches(4))
        assert len({len(batches) for batches in ranks}) == 1, "with FSDP all ranks draw as often"
        batches = [batch for of_rank in ranks for batch in of_rank]
        assert {i for batch in batches for i in batch} == set(range(17))
        assert all(len(batch) == 4 and len(set(which[batch])) == 1 for batch in batches)


def test_samples_of_a_run_are_drawn_in_the_shapes_of_the_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (run, "--num-samples", "24", "--steps", "2", *RANDOM)
    run_here("evaluate", *words, "--out", tmp_path / "one")
    note = "samples have the shapes of the real images, in their shares; all are resized to squares of 16 px"
    assert note in capsys.readouterr().out
    document = figures_in(tmp_path / "one")
    assert note.replace("images", "pictures") in document["random"]["notes"][-1]
    opened = open_trained(run, torch.device("cpu"))
    assert read_json(tmp_path / "one" / "request.json")["buckets"] == [list(bucket) for bucket in opened.buckets]
    assert {(height, width) for height, width, _ in opened.buckets} == set(SIZES) and opened.square == ImageConfig(size=16)
    with Image.open(tmp_path / "one" / "nearest.png") as sheet:
        assert sheet.width == 4 + 8 * (3 * 20 + 4), "every sample in its shape, on white"

    done = launch("evaluate.py", *words, "--out", tmp_path / "two", processes=2)
    assert done.status == 0 and figures_in(tmp_path / "two") == document, done.all
    run_here("evaluate", run, "--num-samples", "12", "--sweep", "steps=1,2", *RANDOM, "--out", tmp_path / "sweep")
    assert "resized to squares" in figures_in(tmp_path / "sweep")["notes"]["random"][-1]


def test_a_likelihood_is_of_every_image_in_its_shape(run: Path, tmp_path: Path) -> None:
    """Batches of other images, of other shapes, find the same."""
    results = list[dict[str, Any]]()
    for size in ("8", "5"):
        words = (run, "--likelihood", "--steps", "3", "--part", "train", "--batch-size", size, "--out", tmp_path / size)
        run_here("evaluate", *words)
        results.append(read_json(tmp_path / size / "likelihood.json"))
    assert results[0]["pictures"] == read_json(run / "data.json")["images"]
    assert results[0]["bits_per_dimension"] == pytest.approx(results[1]["bits_per_dimension"], rel=1e-5)
    assert read_json(tmp_path / "5" / "request.json")["buckets"] == read_json(run / "data.json")["buckets"]


def test_an_autoencoder_reconstructs_every_image_in_its_shape(data: Path, tmp_path: Path) -> None:
    stages = [{"steps": 2, "perceptual": {"weight": 0.5}, "tanh": True}]
    run = train("train_vae", "vae", data, tmp_path, image=ASPECT, stages=stages, preview={"every": 2, "num_samples": 6})
    table = read_json(run / "data.json")["buckets"]
    assert {(height, width) for height, width, _ in table} == set(SIZES)
    run_here("evaluate", run, *RANDOM, "--part", "train", "--out", tmp_path / "out")
    document = figures_in(tmp_path / "out")
    assert document["notes"][-1] == "images of 3 shapes are resized to squares of 16 px for rFID"
    assert document["psnr"] > 0 and abs(document["ssim"]) < 1 and document["random"]["frechet"] > 0
    with Image.open(tmp_path / "out" / "reconstructions.png") as sheet:
        assert sheet.height > 3 * 3 * 12 * 3, "three rows for each shape"


def test_a_run_that_starts_from_other_images_starts_from_those_of_the_same_shape(data: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "source", (24, 12, 36))
    source = {"source": "folder", "path": str(tmp_path / "source")}
    few = {"every": 2, "num_samples": 2, "batch_size": 2, "calls": [1], "quality": None}
    run = train("train_iadb", "iadb", data, tmp_path, image=ASPECT, source=source, steps=2, preview=few, held_out=0.0)
    opened = open_trained(run, torch.device("cpu"))
    sampler = build_sampler(opened, SamplerConfig(solver="euler", steps=1))
    assert sampler.start(0, range(2)).shape == (2, 3, 16, 16)
    lengths = {}
    for shape in sampler.shapes:
        shaped = sampler.at_shape(shape)
        assert isinstance(shaped.source, SourceSampler) and shaped.start(0, range(3)).shape == (3, *shape)
        lengths[shape[1:]] = len(shaped.source)
    assert lengths == dict(zip(SIZES, (24, 12, 36), strict=True))
    with pytest.raises(UserError, match=r"no image of the source has about the shape 16 x 20; ask for another --size"):
        opened.at_size((16, 20)).starts()
    run_here("evaluate", run, "--num-samples", "36", "--solver", "euler", "--steps", "1", *RANDOM, "--out", tmp_path / "out")
    notes = figures_in(tmp_path / "out")["random"]["notes"]
    assert any("the 36 samples start from 30 pictures" in note for note in notes), "18 squares start from 12"


def test_a_folder_of_images_of_several_sizes(data: Path, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for i, path in enumerate(sorted(data.rglob("*.png"))):
        (tmp_path / "samples" / f"{i:05d}.png").write_bytes(path.read_bytes())
    words = (tmp_path / "samples", "--data", data, *RANDOM)
    assert "give --resize to compare images of several sizes as squares" in refused("evaluate", *words)
    run_here("evaluate", *words, "--resize", "--out", tmp_path / "out")
    values = figures_in(tmp_path / "out")["random"]
    assert values["frechet"] == pytest.approx(0, abs=1e-6) and values["recall"] == 1
    assert (
        "samples have 3 shapes, and real pictures are cut to them; all are resized to squares of 31 px" in values["notes"][-1]
    )
