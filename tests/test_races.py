"""The races' own logic: peers of our operations, distances, photos, stages that fit the time, tables, a race in pieces."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ddpm_accelerate
import train_ldm
import train_vae
from benchmarks import equal, few_images, kl, measures, photos, race_latent, timed
from benchmarks.common import installed
from benchmarks.measures import LITE0, LITE2, NETWORKS
from benchmarks.peers import Snapshots, TimeIsUp
from src.config import UserError, load, read_json
from tests.test_benchmarks import Known, in_both_networks


def needs(kind: str) -> None:
    if kind == "ddp" and installed("denoising-diffusion-pytorch") is None:
        pytest.skip("denoising-diffusion-pytorch is not installed: pip install -e '.[bench]'")


# ---------------------------------------------------------------------------------------------- peers of our operations


@pytest.mark.parametrize(("kind", "classes"), [("diffusers", 0), ("diffusers", 3), ("ddp", 0), ("ddp", 3)])
def test_a_peer_has_our_operations_an_image(kind: str, classes: int) -> None:
    needs(kind)
    known = {"kind": kind, "widths": [8, 16], "shape": [3, 8, 8], "classes": classes, "attention": classes > 0}
    wanted = 1.05 * equal.operations(equal.build(known).eval(), *equal.inputs_of(known))
    document = equal.of_equal_operations(kind, wanted, (3, 8, 8), classes, (1, 2))
    network = equal.build(document).eval()
    counted = equal.operations(network, *equal.inputs_of(document))
    assert counted == document["operations"] and counted == pytest.approx(wanted, rel=equal.TOLERANCE)
    with pytest.raises(AssertionError, match="the nearest network"):
        equal.of_equal_operations(kind, 1e3, (3, 8, 8), classes, (1, 2))


def test_operations_are_two_for_a_product_and_a_sum() -> None:
    assert equal.operations(torch.nn.Conv2d(3, 5, 3, padding=1), torch.zeros(1, 3, 8, 8)) == 2 * 3 * 5 * 9 * 64


def memory_file(folder: Path, shape: tuple[int, ...], *, pixels: bool) -> equal.Data:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, shape, np.uint8) if pixels else rng.standard_normal(shape, np.float32)
    np.savez(folder / "data.npz", x=x, labels=np.arange(len(x)) % 3)
    return equal.Data(folder / "data.npz")


def test_batches_are_images_or_their_mirror_images_in_minus_one_to_one(tmp_path: Path) -> None:
    data = memory_file(tmp_path, (1, 4, 4, 3), pixels=True)
    batch, labels = data.draw(64)
    image = data.x[0].permute(2, 0, 1).float() / 127.5 - 1
    assert {bool(torch.equal(one, image)) for one in batch} == {True, False}
    assert all(torch.equal(one, image) or torch.equal(one.flip(2), image) for one in batch) and labels.unique().tolist() == [0]
    latents = memory_file(tmp_path, (5, 4, 4, 4), pixels=False)
    (latent,) = latents.draw(1)[0]
    assert not latents.is_pixels and any(torch.equal(latent, one) for one in latents.x)


def test_a_rate_rises_and_ends_at_zero() -> None:
    assert equal.rate_at(equal.WARMUP) == 1 and equal.rate_at(1.0) == 0 == equal.rate_at(1.5)
    assert equal.rate_at((1 + equal.WARMUP) / 2) == pytest.approx(0.5) and 0 < equal.rate_at(0.0) < equal.rate_at(0.03)


@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.parametrize(
    ("kind", "classes", "channels"), [("diffusers", 0, 3), ("diffusers", 3, 4), ("ddp", 0, 3), ("ddp", 3, 3)]
)
def test_a_peer_of_our_operations_trains_and_draws(
    kind: str, classes: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(kind)
    pixels = channels == 3
    document = {"kind": kind, "widths": [8, 16], "shape": [channels, 8, 8], "classes": classes, "attention": classes > 0}
    document |= {"pixels": pixels}
    data = memory_file(tmp_path, (12, 8, 8, 3) if pixels else (12, channels, 8, 8), pixels=pixels)
    snapshots = Snapshots(tmp_path, time.time(), 0.3, (0.5, 1.0))
    precision = "bf16" if pixels else "no"
    with pytest.raises(TimeIsUp):
        equal.train(document, data, snapshots, lr=1e-3, batch=4, precision=precision)
    assert list(snapshots.saved) == ["0.5", "1.0"]
    (tmp_path / "trained.json").write_text(json.dumps({"network": document}))
    monkeypatch.setattr(equal, "CALLS", 4)
    labels = [0, 1, 2] if classes else None
    for weights, guidance in (("ema", 1.0), ("raw", 2.0 if classes else 1.0)):
        images = equal.draw(tmp_path, weights, 3, labels, guidance, batch=2)
        assert images.shape == (3, channels, 8, 8) and bool(images.isfinite().all()) and images.std() > 0


def test_the_peers_autoencoder_has_our_operations_trains_and_gives_latents(tmp_path: Path) -> None:
    document = kl.of_equal_operations(4e7, (3, 32, 32), 4, (1, 2))
    counted = equal.operations(kl.build(document).eval(), torch.zeros(1, 3, 32, 32))
    assert counted == pytest.approx(4e7, rel=equal.TOLERANCE)
    data = memory_file(tmp_path, (6, 32, 32, 3), pixels=True)
    began = time.time()
    images = kl.train(document, data, tmp_path, lr=1e-3, batch=2, seconds=1.5, began=began)
    assert images > 0 and time.time() >= began + 1.5
    (tmp_path / "trained.json").write_text(json.dumps({"network": document, "scale": 2.0}))
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    latents = kl.encode(kl.open_kl(tmp_path), x, batch=2)
    assert latents.shape == (3, 4, 16, 16)
    torch.testing.assert_close(kl.decode(tmp_path, latents / 2.0), kl.reconstruct(tmp_path, x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- distances and time


def test_a_win_is_above_two_standard_errors() -> None:
    ours, theirs = in_both_networks(10.0)[LITE2], in_both_networks(13.0)[LITE2]
    assert measures.is_win(ours, theirs) and not measures.is_win(ours, {**theirs, "frechet": 12.8})
    assert not measures.is_win(theirs, ours)


def test_the_floor_is_the_mean_over_sets_of_as_many_real_images() -> None:
    rng = np.random.default_rng(0)
    real, others = Known(rng.standard_normal((200, 8))), Known(rng.standard_normal((60, 8)))
    floor = real.floor(others, 20)
    parts = np.split(np.random.default_rng(0).permutation(60), 3)
    each = [real.compare(LITE2, others.features(LITE2)[np.sort(part)])["frechet"] for part in parts]
    assert floor[LITE2]["frechet"] == pytest.approx(np.mean(each))
    assert floor[LITE0]["frechet_error"] == pytest.approx(np.std(each, ddof=1) / math.sqrt(3))
    of_one = real.floor(others, 60)[LITE2]
    assert of_one == real.compare(LITE2, others.features(LITE2)), "one set has its own error"


def test_steps_fit_the_time(tmp_path: Path) -> None:
    assert timed.Speed(start=7.0, rate=32.0).steps(100, 16) == 2 * 90
    (tmp_path / "config.json").write_text('{"batch_size": 16}')
    assert timed.value_of("batch_size", tmp_path / "config.json", ["a=1"]) == 16
    assert timed.value_of("batch_size", tmp_path / "config.json", ["batch_size=4", "batch_size=8"]) == 8
    assert timed.precision_of("no") == "no" and timed.precision_of("auto") in ("no", "bf16")


class Ended:
    """A process that has ended."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode


def test_a_probe_says_how_fast_a_recipe_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, codes = tmp_path / "run", [0, 1]

    def launch(command: list[str], log: Path) -> Ended:
        run.mkdir()
        log.write_text("what went wrong")
        (run / "config.json").write_text('{"batch_size": 4}')
        lines = [{"step": 5, "images_per_second": 1}, {"step": 10, "images_per_second": 15}]  # the first has the start in it
        lines += [{"step": 15, "images_per_second": 30}, {"step": 15, "held_out_l1": 0.5}]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return Ended(codes.pop(0))

    monkeypatch.setattr(timed, "launch", launch)
    speed = timed.measure_speed("x.py", tmp_path / "x.json", run, [])
    assert speed == (0.0, 20.0) and not run.exists()  # 60 images at 20 images/s are all of the time, and more
    with pytest.raises(UserError, match="ended in its probe: what went wrong"):
        timed.measure_speed("x.py", tmp_path / "x.json", run, [])


# ---------------------------------------------------------------------------------------------- photos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits at 16 px in three parts."""
    place = tmp_path_factory.mktemp("datasets")
    folder = photos.prepare_photos(place, 16, place / "missing")
    assert folder.name == "digits_race_16" and photos.prepare_photos(place, 16, place / "missing") == folder
    return folder


def test_photos_are_in_three_parts_and_few_of_them_are_a_subset(folder: Path) -> None:
    counts = {part: len(photos.open_photos(folder, part)) for part in photos.PARTS}
    assert counts == {"train": 1197, "validation": 300, "test": 300}
    some = photos.Photos(folder, 16, 100)
    assert len(some.sets["train"].images) == 100 and len(some.sets["test"].images) == 300
    assert '"subset": 100' in some.overrides[0] and "validation" in some.overrides[1]
    assert np.bincount(some.labels("test", 50)).tolist() == [5] * 10
    with np.load(some.memory_file()) as arrays:
        assert arrays["x"].shape == (100, 16, 16, 3) and len(arrays["labels"]) == 100


def test_what_is_said_of_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pixels for features: real photos are read, and training photos are copies."""
    known = photos.Photos(folder, 16)
    for part, reference in known.sets.items():
        pixels = photos.pixels_of(photos.open_photos(folder, part), 16)
        reference._features = dict.fromkeys(NETWORKS, pixels[:, ::4, ::4, 0].reshape(len(pixels), -1).astype(np.float32))
    monkeypatch.setattr(measures, "features", lambda name, x: x[:, 0, ::4, ::4].flatten(1).float().numpy())
    monkeypatch.setattr(photos, "features", measures.features)
    reader = photos.distances.fit_reader(known.sets["train"].features(LITE2), known.sets["train"].images.labels)
    monkeypatch.setattr(photos.Photos, "read_features", reader)
    monkeypatch.setattr(photos.Photos, "read", lambda self, pixels: reader(measures.features(LITE2, pixels)))
    train, test = known.measure_part("train", 60), known.measure_part("test", 60)
    assert train["copied"] == 1 and train["nearer"] == 1 and train["samples"] == 60 and train[LITE2]["frechet_error"] > 0
    assert test["copied"] < 0.1 and test["nearer"] == pytest.approx(0.5, abs=0.1) and test["precision"] == 1
    assert test["read"] > 0.6 and test["read"] == test["read_lite2"]
    assert "read" not in known.measure_part("test", 60, reading=False)


# ---------------------------------------------------------------------------------------------- the race of latents


def test_stages_are_scaled_to_the_time() -> None:
    stages = read_json(race_latent.VAE_CONFIG)["stages"]
    cfg = load(race_latent.VAE_CONFIG, train_vae.Config, [race_latent.scaled_stages(stages, 0.1)])
    assert [stage.steps for stage in cfg.stages] == [130, 20, 100]
    adversarial = cfg.stages[0].adversarial
    assert adversarial is not None and adversarial.start_step == 105
    assert race_latent.scaled({"epochs": 4}, 0.5) == {"epochs": 2.0} and race_latent.scaled(3, 0.01) == 1


def test_every_row_of_ours_is_a_config() -> None:
    rows = race_latent.check(read_json(race_latent.ROWS), race_latent.ROWS)
    for row in rows:
        if "of" not in row:
            load(race_latent.VAE_CONFIG, train_vae.Config, row["vae"])
            load(race_latent.LDM_CONFIG, train_ldm.Config, row["ldm"])
    for faulty in ({"name": "ddp", "of": "ours"}, {"name": "a", "of": "b"}, {"name": "a", "share": 1.0, "vae": [], "ldm": []}):
        with pytest.raises(UserError, match="a row needs a `name`"):
            race_latent.check([*rows, faulty], race_latent.ROWS)
    with pytest.raises(UserError, match="the guide of 'a'"):
        race_latent.check([*rows, {"name": "a", "of": "ours", "guide": 0.1}], race_latent.ROWS)


def measured(frechet: float, copied: float = 0.0) -> dict[str, Any]:
    shares = dict.fromkeys(("precision", "recall", "read", "read_lite2", "nearer"), 0.5)
    return {"samples": 20, **in_both_networks(frechet), **shares, "copied": copied, "copied_if_new": 0.01}


class FakePhotos:
    class_names = ("a", "b")

    def labels(self, part: str, count: int) -> list[int]:
        return [i * 2 // count for i in range(count)]

    def measure(self, pixels: torch.Tensor, labels: list[int], **_: Any) -> dict[str, Any]:
        return measured(float(pixels.float().mean()), 0.0)

    def measure_part(self, part: str, count: int, **_: Any) -> dict[str, Any]:
        return measured(10.0 if part == "train" else 11.0)


def test_a_race_of_latents_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, trainings = {"ours": 30, "diffusers": 80, "ddp": 100, "diffusers-latent": 60}, list[str]()
    fractions = {"1.0": {"images": 100, "seconds": 60.0}}

    def train(self: race_latent.Contestant, *_: Any) -> dict[str, Any]:
        trainings.append(self.name)
        known = {} if self.row is not None else {"probes": dict.fromkeys(race_latent.RATES, 5.0)}
        autoencoder = {"autoencoder": {"images": 50, "probes": dict.fromkeys(race_latent.RATES, 7.0)}}
        return {"parameters": 10, "fractions": fractions, **known, **(autoencoder if self.name == "diffusers-latent" else {})}

    ours = {"parameters": 10, "fractions": fractions, "autoencoder": {"images": 50}}
    monkeypatch.setattr(race_latent, "train_ours", lambda *_: trainings.append("ours") or ours)
    monkeypatch.setattr(race_latent, "our_operations", lambda: (1, 1, (4, 16, 16)))
    monkeypatch.setattr(race_latent.Contestant, "network_file", lambda *_: Path("x"))
    monkeypatch.setattr(race_latent.Contestant, "train_equal", train)
    monkeypatch.setattr(race_latent.Contestant, "train_latent", train)
    monkeypatch.setattr(FakePhotos, "memory_file", lambda self: Path("x"), raising=False)
    calls = list[tuple[str, float]]()

    def draw(self: race_latent.Contestant, weights: str, guidance: float, count: int, part: str = "") -> torch.Tensor:
        calls.append((weights, guidance))
        level = levels[self.name] + (5 if weights == "ema" else 0) + round(4 * abs(guidance - 1.5))
        return torch.full((count, 3, 8, 8), level, dtype=torch.uint8)

    monkeypatch.setattr(race_latent.Contestant, "draw", draw)
    monkeypatch.setattr(race_latent.Contestant, "distance", lambda self, pixels: float(pixels.float().mean()))
    rows, known = [{"name": "ours", "share": 0.5, "vae": [], "ldm": []}], FakePhotos()
    options: dict[str, Any] = {"minutes": 1.0, "samples": 20}
    first = race_latent.race(tmp_path, known, rows, only="ours", **options)  # pyright: ignore[reportArgumentType]
    assert trainings == ["ours"] and "some contestants are missing" in first and ("raw", 1.0) not in calls
    whole = race_latent.race(tmp_path, known, rows, **options)  # pyright: ignore[reportArgumentType]
    assert sorted(trainings) == sorted(levels)  # each once
    assert "| ours | 0.0 M | 50 + 100 | ema, 1.5 | 35.0 ± 1.0 | 25.0 |" in whole
    assert "| diffusers, its autoencoder and latents | 0.0 M | 50 + 100 | raw, 1.5 | 60.0 ± 1.0 | 50.0 |" in whole
    assert "| diffusers, its autoencoder and latents, autoencoder | 7.0 | 7.0 | 7.0 |" in whole
    assert "met: the distance of ours above the floor is 0.50 of that of the best peer that is there, diffusers-latent" in whole
    assert (tmp_path / "samples.png").exists() and "| 20 photos to choose by |" in whole
    before = len(calls)
    race_latent.race(tmp_path, known, rows, **options)  # pyright: ignore[reportArgumentType]
    assert len(calls) == before and sorted(trainings) == sorted(levels)
    rows.append({"name": "guided", "of": "ours", "guide": 0.25})
    levels["guided"] = 31
    guided = race_latent.race(tmp_path, known, rows, only="guided", **options)  # pyright: ignore[reportArgumentType]
    assert "| guided | 0.0 M | 50 + 100 | ema, 1.5 | 36.0 ± 1.0 |" in guided and "guided" not in trainings
    other = [{**rows[0], "share": 0.3}]
    with pytest.raises(UserError, match="another row of this name"):
        race_latent.race(tmp_path, known, other, only="ours", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="another --out"):
        race_latent.race(tmp_path, known, rows, minutes=2.0, samples=20)  # pyright: ignore[reportArgumentType]


def test_rates_are_probed_once(tmp_path: Path) -> None:
    contestant = race_latent.Contestant("diffusers", tmp_path, FakePhotos())  # pyright: ignore[reportArgumentType]
    contestant.out.mkdir()
    tried = list[str]()
    distances = dict(zip(race_latent.RATES, (30.0, 10.0, 20.0), strict=True))
    for _ in range(2):
        best, known = contestant.best_rate("probes", lambda place, lr: tried.append(lr), lambda place: distances[place.name])
        assert best == race_latent.RATES[1] and known == distances
    assert tried == list(race_latent.RATES)


# ---------------------------------------------------------------------------------------------- few images


def test_points_double() -> None:
    assert few_images.points(64_000) == [8_000, 16_000, 32_000, 64_000] and few_images.points(70_000)[-1] == 64_000


@pytest.mark.parametrize("size", few_images.AT_SIZE)
def test_every_recipe_for_few_images_is_a_config(size: int) -> None:
    for variant in few_images.VARIANTS.values():
        sets = [*few_images.RECIPE, f"image.size={size}", *few_images.AT_SIZE[size], *variant]
        cfg = load(few_images.CONFIG, ddpm_accelerate.Config, sets)
        assert (cfg.augmentation is not None) == (few_images.AUGMENTED in variant) and cfg.class_conditional


def test_checkpoints_at_the_points_are_kept_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = few_images.LongRun(tmp_path, FakePhotos(), 300, "plain", first=160)  # pyright: ignore[reportArgumentType]
    for step in (10, 20, 30, 40):
        place = run.run / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        (place / "ema.safetensors").write_text(str(step))
        with open(run.run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "held_out_loss": abs(step - 20) / 100 + 0.1}) + "\n")
    monkeypatch.setattr(FakePhotos, "size", 32, raising=False)
    monkeypatch.setattr(FakePhotos, "overrides", [], raising=False)
    monkeypatch.setattr(few_images, "launch", lambda *_: pytest.fail("every checkpoint is there"))
    calls = list[Path]()

    def draw(weights: Path, labels: list[int], sampler: dict[str, Any]) -> torch.Tensor:
        calls.append(weights)
        return torch.full((len(labels), 3, 8, 8), 20 + 1000 // int(weights.name), dtype=torch.uint8)

    monkeypatch.setattr(few_images, "draw_ours", draw)
    for _ in range(2):
        text = few_images.study(tmp_path, {300: run.photos}, most=640, samples=20, only="300 plain", first=160)
    assert [path.name for path in calls] == ["160", "320", "640"]
    assert (run.weights(640) / "ema.safetensors").read_text() == "40"
    assert "300 photos, plain" in text and "| 640 | 2 | 0.3000 | 21.0 ± 1.0 | 11.0 |" in text
    assert "| 300 | plain | 320 | 640 | 21.0 ± 1.0 | 0.0% |" in text
    assert (tmp_path / "few_images.png").exists() and read_json(tmp_path / "few_images.json")[0]["photos"] == 300
