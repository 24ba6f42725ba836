"""The benchmarks' own logic: what is held out, the peers' networks, distances, tables and goals, a race in pieces."""

import json
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import ablate, equal, measures, peers, race, speed, timed
from benchmarks.common import ROOT, goal, installed
from benchmarks.measures import LITE0, LITE2, NETWORKS
from src.config import UserError, load, read_json
from src.diffusion import SOLVERS
from src.sampling import SamplerConfig

PEER_PACKAGE = {"diffusers": "diffusers", "ddp": "denoising-diffusion-pytorch"}


def needs(peer: str) -> None:
    if installed(PEER_PACKAGE[peer]) is None:
        pytest.skip(f"{PEER_PACKAGE[peer]} is not installed: pip install -e '.[bench]'")


def draw_images(folder: Path, per_class: int, size: int = 32) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / name / f"{i:04d}.png")


# ---------------------------------------------------------------------------------------------- images and distances


def test_the_last_images_of_each_class_are_held_out(tmp_path: Path) -> None:
    draw_images(tmp_path, 12)
    train, held_out = race.split_classes(tmp_path, 5)
    assert [file.name for file in held_out] == [f"{i:04d}.png" for i in range(7, 12)] * 2
    assert len(train) == 14 and not set(train) & set(held_out)


def test_an_archive_becomes_a_folder_with_what_is_trained_on_packed(tmp_path: Path) -> None:
    draw_images(tmp_path / "cifar10" / "train", 502, size=8)
    with tarfile.open(tmp_path / "cifar10.tar", "w") as tar:
        tar.add(tmp_path / "cifar10", "cifar10")
    folder = race.prepare_images(tmp_path / "datasets", tmp_path / "cifar10.tar")
    assert [len(list((folder / part).rglob("*.png"))) for part in ("train", "held_out")] == [4, 1000]
    assert read_json(folder / "packed" / "manifest.json")
    assert race.prepare_images(tmp_path / "datasets", tmp_path / "cifar10.tar") == folder


def test_without_the_archive_there_are_digits(tmp_path: Path) -> None:
    folder = race.prepare_images(tmp_path, tmp_path / "missing")
    assert folder.name == "digits_race" and len(list((folder / "held_out").rglob("*.png"))) == 300


# ---------------------------------------------------------------------------------------------- contestants


@pytest.mark.parametrize("peer", ["diffusers", "ddp"])
def test_the_peers_have_the_networks_of_their_defaults(peer: str) -> None:
    needs(peer)
    with torch.device("meta"):
        network = peers.build(peer)
    assert sum(parameter.numel() for parameter in network.parameters()) == peers.PARAMETERS[peer]


def tiny(peer: str) -> Any:
    peers.import_torchvision()
    if peer == "ddp":
        from denoising_diffusion_pytorch import Unet

        return Unet(dim=8, dim_mults=(1, 2), flash_attn=True)
    from diffusers.models.unets.unet_2d import UNet2DModel

    kinds: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(sample_size=32, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, **kinds)


@pytest.mark.filterwarnings("ignore")  # their own
@pytest.mark.parametrize("peer", ["diffusers", "ddp"])
def test_a_peer_trains_and_draws(peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(peer)
    draw_images(tmp_path / "images", 60)
    network = tiny(peer)
    snapshots = peers.Snapshots(tmp_path, time.time(), 0.5)
    with pytest.raises(peers.TimeIsUp):
        peers.TRAINERS[peer](network, tmp_path / "images", 1e-3, snapshots)
    assert list(snapshots.saved) == [str(fraction) for fraction in peers.FRACTIONS]
    assert snapshots.saved["1.0"]["images"] >= 16 and snapshots.saved["1.0"]["seconds"] >= 0.5
    monkeypatch.setattr(peers, "build", lambda _: tiny(peer))
    monkeypatch.setattr(peers, "CALLS", 3)
    for kind in ("ema", "raw"):
        images = peers.draw(peer, tmp_path / "weights" / "1.0" / f"{kind}.safetensors", 3, batch=2)
        assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and images.float().std() > 0


def test_the_clock_stands_while_weights_are_written(tmp_path: Path) -> None:
    snapshots = peers.Snapshots(tmp_path, time.time() - 3, 20)

    def weights() -> dict[str, Any]:
        time.sleep(0.2)
        return {"ema": nn.Linear(1, 1).state_dict()}

    began = snapshots.began
    snapshots.save_if_due(16, weights)
    assert snapshots.began >= began + 0.2 and list(snapshots.saved) == ["0.125"]


def test_ours_is_a_command_that_a_user_types() -> None:
    words = timed.our_command("ddpm_accelerate.py", race.CONFIG, ROOT / "runs" / "x", ["steps=5"])
    assert timed.shown(words) == "python ddpm_accelerate.py -cfg configs/cifar10_race.json --run-dir runs/x --set steps=5"


@pytest.mark.soak
def test_ours_trains_by_the_clock(tmp_path: Path) -> None:
    folder = race.prepare_images(tmp_path, tmp_path / "missing")
    (tmp_path / "ours").mkdir()
    small = ["model.base_channels=16", "model.head_channels=16", "batch_size=16"]
    result = race.train_ours(tmp_path / "ours", folder, 40, small)
    assert result["fractions"]["1.0"]["seconds"] <= 40 and result["fractions"]["1.0"]["images"] > 0
    assert race.draw_ours(tmp_path / "ours" / "weights" / "1.0", 4).shape == (4, 3, 32, 32)


# ---------------------------------------------------------------------------------------------- the race and its table


def made_up(name: str, end: float, quarter: float) -> dict[str, Any]:
    measurement = {"images": 1000, "seconds": 1200.0}
    result = {
        "name": name,
        "minutes": 20.0,
        "parameters": 4_000_000,
        "weights": "ema",
        "fractions": {"0.25": measurement, "1.0": measurement},
    }
    lr: dict[str, Any] = {"lr": name.partition("_")[2]} if "_" in name else {}
    lr |= {"lr": "1e-3", "probes": {"1e-3": {"ema": end + 20, "raw": 999}}} if name.endswith("equal") else {}
    lr |= {"pair": {"ema": end + 10, "raw": 999}}
    distances = {part: {"samples": 500, **in_both_networks(value)} for part, value in (("0.25", quarter), ("1.0", end))}
    return {**result, **lr, "distances": distances}


def in_both_networks(frechet: float) -> dict[str, measures.Numbers]:
    numbers = {"frechet": frechet, "frechet_error": 1.0, "kernel": frechet / 1000, "kernel_error": 0.001}
    return {LITE2: numbers, LITE0: {**numbers, "frechet": frechet + 0.5}}


@pytest.mark.parametrize(
    ("end", "quarter", "verdicts"),
    [
        (30, 110, ("met", "met", "met")),
        (45, 120, ("MISSED", "met", "met")),
        (46, 121, ("MISSED", "MISSED", "MISSED")),
        (25, 130, ("met", "met", "MISSED")),
    ],
)
def test_the_goals_are_held_to_the_best_peer(end: float, quarter: float, verdicts: tuple[str, ...]) -> None:
    results = [made_up("ours", end, quarter), made_up("diffusers_1e-4", 300, 310), made_up("diffusers_1e-3", 150, 200)]
    results += [made_up("ddp_1e-4", 200, 250), made_up("ddp_3e-4", 140, 260)]
    assert "missing" in race.goals(results, 20.0)[0], "the peers with our operations"
    results += [made_up("diffusers-equal", 120, 160), made_up("ddp-equal", 125, 160)]
    lines = race.goals(results, 20.0)
    assert tuple(line.partition(":")[0] for line in lines) == verdicts
    assert "diffusers-equal, by more than two standard errors" in lines[1]
    shown = race.table(results, in_both_networks(20.0), 500)
    assert (
        "| diffusers | 1e-4 (its own) | ema | 310.0 |" in shown and "denoising-diffusion-pytorch, learning rate 3e-4" in shown
    )
    assert "| diffusers, our operations | 1e-3 (a probe) | ema | 140.0 |" in shown
    assert "| ema | 120.0 ± 1.0 | 100.0 | 120.0 ± 1.0 | 120.5 ± 1.0 |" in shown
    assert "| distance after minutes | 2.5 | 5 | 10 | 20 |" in shown


def test_nothing_is_said_of_the_goals_while_a_contestant_is_missing() -> None:
    (line,) = race.goals([made_up("ours", 60, 110), made_up("ddp_1e-4", 200, 250)], 20.0)
    assert "missing" in line
    assert "100 held-out images" in race.table([], in_both_networks(20.0), 100)


def test_a_goal_says_whether_it_is_met() -> None:
    assert goal("speed", 2.0, 2.0).startswith("met") and goal("speed", 1.99, 2.0).startswith("MISSED")


class Known(measures.Reference):
    """A reference whose features are these, (N, 8)."""

    def __init__(self, features: Any) -> None:
        super().__init__(range(len(features)), 32)  # pyright: ignore[reportArgumentType]
        self._features = dict.fromkeys(NETWORKS, features)


def test_a_race_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_titles, folder = list[str](), tmp_path / "images"
    rng = np.random.default_rng(0)
    known = {"train": rng.standard_normal((200, 8)), "held_out": rng.standard_normal((40, 8))}
    monkeypatch.setattr(race, "reference", lambda folder, part: Known(known[part]))

    def train(out: Path, title: str) -> dict[str, Any]:
        trained_titles.append(title)
        fractions = {str(fraction): {"images": 100, "seconds": 60 * fraction} for fraction in race.FRACTIONS}
        return {"parameters": 10, "fractions": fractions, "used": "", "command": "python", "lr": title.partition("_")[2]}

    def constant_images(count: int, level: int) -> torch.Tensor:
        return torch.full((count, 3, 32, 32), level, dtype=torch.uint8)

    monkeypatch.setattr(race, "train_ours", lambda out, *_: train(out, "ours"))
    monkeypatch.setattr(race, "train_peer", lambda name, out, folder, lr, seconds: train(out, f"{name}_{lr}"))
    probes = {"probes": {"1e-3": {"ema": 1.0, "raw": 2.0}}}
    monkeypatch.setattr(race, "train_equal", lambda name, out, *_: out.mkdir() or train(out, name) | probes)
    monkeypatch.setattr(equal, "draw", lambda folder, weights, count, **_: constant_images(count, 0) / 127.5 + 0.9)
    monkeypatch.setattr(race, "draw_ours", lambda weights, count: constant_images(count, 0))
    monkeypatch.setattr(
        peers, "draw", lambda name, weights, count: constant_images(count, 100 if weights.stem == "raw" else 200)
    )
    noise = np.random.default_rng(1).standard_normal((64, 8))
    monkeypatch.setattr(measures, "features", lambda name, x: x[:, 0, 0, :8].numpy() + noise[: len(x)])

    out = tmp_path / "out"
    race.race(out, folder, 1.0, 20, "ours")
    assert trained_titles == ["ours"]
    race.race(out, folder, 1.0, 20, "diffusers_")
    (out / "ddp_1e-4").mkdir()  # it was killed while it trained
    (out / "ddp_1e-4" / "half").touch()
    assert "- so far without ddp_1e-4, ddp_3e-4, ddp_1e-3, diffusers-equal" in race.race(out, folder, 1.0, 20, "diffusers_")
    summary = race.race(out, folder, 1.0, 20)
    assert "so far without" not in summary
    assert sorted(trained_titles) == sorted(race.names())  # each once
    assert not (out / "ddp_1e-4" / "half").exists()
    assert summary.count("met:") == 3 and (out / "distance.png").exists()
    assert (out / "samples.png").stat().st_size <= 300_000
    result = json.loads((out / "diffusers_1e-4" / "result.json").read_text())
    assert result["weights"] == "raw" and set(result["distances"]) == {str(fraction) for fraction in race.FRACTIONS}
    for name, measured in (("ddp_1e-4", {"1.0"}), ("ddp_1e-3", set())):  # only the better peer's way is drawn
        assert set(json.loads((out / name / "result.json").read_text())["distances"]) == measured
    result = json.loads((out / "ddp_1e-4" / "result.json").read_text())
    (out / "ddp_1e-4" / "result.json").write_text(json.dumps({key: result[key] for key in result if key != "decides"}))
    before = race.Contestant("ddp_1e-4", out, folder).result  # its training counts, what was measured does not
    assert before["fractions"] == result["fractions"] and not before["distances"] and "pair" not in before
    other = race.race(out, folder, 1.0, 24, "ours")
    assert "| ours |" in other and "| diffusers |" not in other.partition("Fréchet")[2], "20 samples do not compare with 24"
    with pytest.raises(UserError, match="another --out"):
        race.race(out, folder, 2.0, 20, "ours")


def test_the_sheet_of_samples_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "noise.npy", rng.integers(0, 256, (64, 3, 32, 32), np.uint8))
    race.draw_sheet([(title, tmp_path / "noise.npy") for title in ("a", "b", "c")], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size <= 300_000


# ---------------------------------------------------------------------------------------------- ablations and speed


def test_every_row_of_the_ablations_is_a_config_and_draws_with_fifty_calls() -> None:
    rows = read_json(ROOT / "benchmarks" / "ablations.json")
    ablate.check(rows)
    for row in rows:
        if "set" in row:
            load(race.CONFIG, speed.ddpm_accelerate.Config, row["set"])
        elif "sampler" in row:
            spec = SamplerConfig(**row["sampler"])
            calls = SOLVERS[spec.solver].calls_per_step * (2 if "guide" in row else 1)
            assert isinstance(spec.steps, int) and spec.steps * calls <= race.CALLS
    with pytest.raises(UserError, match="no row that trains"):
        ablate.check([*rows, {"name": "x", "of": "nothing", "sampler": {}}])
    for lacking in ({"name": "x"}, {"name": "x", "of": "baseline"}):
        with pytest.raises(UserError, match="needs a `set`"):
            ablate.check([*rows, lacking])


def test_a_row_that_is_done_is_known_by_all_that_its_result_depends_on() -> None:
    row = {"name": "eps", "set": ["process.target=eps"]}
    done = ablate.identified(row, seed=1, minutes=5.0, samples=256)
    judged = {**done, "lite2": {"frechet": 1.0}}
    assert ablate.is_done(done, [judged]) and not ablate.is_done(done, [{**done, "distance": 1.0}])
    for other in ({"seed": 2}, {"minutes": 1.0}, {"samples": 16}, {"set": []}, {"recipe": "another"}):
        assert not ablate.is_done({**done, **other}, [judged])
    measured = {"parameters": 10, "images": 100, "distance": 50.0}
    lite2 = {"lite2": {"frechet": 40.0, "frechet_error": 3.0}}
    base = {**ablate.identified({"name": "baseline", "set": []}, seed=1, minutes=5.0, samples=256), **measured}
    longer = {**done, **measured, "minutes": 20.0}
    shown = ablate.table([longer, base, {**done, **measured, "distance": 44.0}], recipe=base["recipe"]).splitlines()
    assert shown[0] == "The recipe as it is, 5 minutes, 256 images"
    assert shown[4].startswith("| eps | process.target=eps") and shown[4].endswith("| -6.0 | 44.0 |")
    assert shown[7] == "The recipe as it is, 20 minutes, 256 images" and shown[-1].endswith("|  |  | 50.0 |"), "no baseline"
    better = {**done, **measured, "lite2": {"frechet": 35.0, "frechet_error": 4.0}}
    shown = ablate.table([{**base, **lite2}, better], [20.0, 30.0], base["recipe"]).splitlines()
    assert shown[4].endswith("| 35.0 ± 4.0 | -5.0 ± 5.0 | 50.0 |") and "20.0 in Lite2, 30.0 in Lite0" in shown[-1]
    with pytest.raises(UserError, match="the guide of the row"):
        ablate.check([{"name": "a", "set": []}, {"name": "b", "of": "a", "sampler": {}, "guide": 0.3}])


@pytest.mark.parametrize("parameters", [5_278_000, 7_126_000])
def test_ours_is_deepened_to_a_peers_parameters(parameters: int) -> None:
    shape = speed.our_shape(parameters)
    with torch.device("meta"):
        network = speed.build_model(shape, (3, 32, 32), None)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(parameters, rel=0.02)
