"""Blending between two densities, launched as a user launches it: images, latents, points, pairs."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_iadb
from src.config import dump, load, read_json, validate
from src.data.points import MoonsSource, draw_points
from src.runs.opened import open_run, open_trained
from src.sampling import SamplerConfig, build_sampler
from src.training.config import PairsConfig
from src.training.inputs import open_coupling
from src.training.pairs import PairMaker
from tests import kills
from tests.conftest import ROOT, Charts, command, environment, launch, metrics, one_line, refused, run_here, run_in_process
from tests.kills import settings

SMOKE = "configs/smoke/iadb.json"
CPU = torch.device("cpu")
QUICK = settings(log__trackers=[], checkpoint__every=None)
MOONS = settings(
    source={"source": "gaussian"},
    data={"source": "moons"},
    steps=400,
    model={"kind": "mlp", "width": 96, "layers": 3},
    batch_size=1024,
    micro_batch_size=512,
    ema__half_life_images=20000,
    preview={"every": 200, "num_samples": 512, "batch_size": 512},
    checkpoint__every=200,
    log__trackers=[],
)


@pytest.fixture(scope="session")
def points_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise to two moons, on one process; read only but for pairs."""
    run = tmp_path_factory.mktemp("points") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Charts, "are_real", True)
        done = run_in_process("train_iadb.py", "-cfg", "configs/points2d_iadb.json", "--run-dir", run, *MOONS)
    assert done.status == 0 and "= 1 x cpu x 2 x 512" in done.out and "Warning" not in done.err, done.all
    return run


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).copy()


# ---------------------------------------------------------------------------------------------- images


def test_a_run_of_images_shows_its_paths(iadb_run: Path) -> None:
    """Sources after 1, 2 and 4 calls side by side, how straight the paths are, and the blend before training."""
    sheet = pixels(iadb_run / "samples" / "step_00000030.png")
    assert sheet.shape[:2] == (22 + 4 + 3 * 68, 4 + 4 * 68), "three rows of four images, enlarged to 64 px"
    assert pixels(iadb_run / "blend.png").shape[1] == 4 + 9 * 68
    lines = metrics(iadb_run)
    assert all(0 <= line["straightness"] < 0.5 for line in lines if "held_out_loss" in line)
    assert lines[-1]["step"] == 30 and {"loss", "straightness", "held_out_loss"} <= lines[-1].keys()
    config = read_json(iadb_run / "final" / "config.json")
    assert config["process"]["target"] == "blend" and config["process"]["time_input"] == {"kind": "alpha", "scale": 1.0}
    assert (iadb_run / "loss.png").exists()


@pytest.mark.soak
def test_images_go_on_to_the_bit_on_two_processes(iadb_run: Path, tmp_path: Path) -> None:
    kills.go_back(iadb_run, tmp_path / "two")
    done = launch("train_iadb.py", "-cfg", SMOKE, "--run-dir", tmp_path / "two", processes=2)
    assert done.status == 0 and "going on at step 10 of 30" in done.out and "= 2 x cpu x 1 x 8" in done.out, done.all
    kills.same_end(iadb_run, tmp_path / "two")


def test_the_summed_loss_has_the_papers_gradient_and_the_same_log(tmp_path: Path) -> None:
    logged = {}
    for reduction in ("mean", "sum"):
        run = tmp_path / reduction
        arguments = settings(loss_reduction=reduction, steps=2, log__every=1, preview__num_samples=1, model__dropout=0.0)
        run_here("train_iadb", "-cfg", SMOKE, "--run-dir", run, *QUICK, *arguments)
        logged[reduction] = metrics(run)[0]
    assert logged["sum"]["loss"] == pytest.approx(logged["mean"]["loss"])
    assert logged["sum"]["grad_norm"] == pytest.approx(logged["mean"]["grad_norm"] * 16 * 3 * 16 * 16, rel=1e-4)


def test_from_one_set_of_images_to_another_in_latents(vae_run: Path, tmp_path: Path) -> None:
    """Digits to shapes, by a diffusers autoencoder with its own scale; then from images of one's own, from `final` alone."""
    from src.runs.diffusers_autoencoder import autoencoder_from_config

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    wide = {"block_out_channels": [8, 16], "norm_num_groups": 4, "scaling_factor": 0.5, "shift_factor": 0.25}
    autoencoder_from_config({**blocks, **wide}).network.save_pretrained(tmp_path / "vae")
    source_words = settings(source={"source": "digits", "subset": 60}, class_conditional=False, steps=4, preview__num_samples=2)
    named = settings(autoencoder=str(tmp_path / "vae"), latents=str(tmp_path / "cache"))
    run_here("train_iadb", "-cfg", SMOKE, "--run-dir", tmp_path / "run", *QUICK, *source_words, *named)
    data = read_json(tmp_path / "run" / "data.json")
    assert data["source"]["images"] + data["source"]["held_out_images"] == 60 and data["latents"]["std"] == [2.0] * 4
    assert sorted(path.name for path in tmp_path.glob("cache*")) == ["cache", "cache_source"]
    assert (tmp_path / "run" / "autoencoder" / "autoencoder.safetensors").exists()

    shutil.copytree(tmp_path / "run" / "final", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "vae")
    for name in ("red", "blue"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        Image.new("RGB", (20, 24), name).save(tmp_path / "mine" / f"{name}.png")
    arguments = ("--steps", "3", "--solver", "heun")
    run_here("sample", tmp_path / "elsewhere", "--out", tmp_path / "own", "--num-samples", "3", *arguments)
    run_here("sample", tmp_path / "elsewhere", "--out", tmp_path / "given", "--source", tmp_path / "mine", *arguments)
    assert len(list((tmp_path / "given").glob("0*.png"))) == 2 and (tmp_path / "given" / "ways.png").exists()
    ways = pixels(tmp_path / "own" / "ways.png")
    assert ways.shape[:2] == (22 + 4 + 68, 4 + 6 * 68)
    config = tmp_path / "elsewhere" / "config.json"
    changed = {**read_json(config), "source": {"source": "folder", "path": str(tmp_path / "gone")}}
    opened = open_trained(tmp_path / "elsewhere", CPU)
    with pytest.raises(ValueError, match=r"starts from other data, which is needed: .* or give --source FOLDER"):
        build_sampler(type(opened)(**{**vars(opened), "config": changed}), SamplerConfig())
    message = refused("sample", tmp_path / "elsewhere", "--num-samples", "2", "--out", tmp_path / "given", *arguments)
    assert "holds other images" in message, "the same but for where they come from"
    red = tmp_path / "mine" / "red.png"
    assert "a mask needs a run that starts from" in refused("sample", tmp_path / "elsewhere", "--image", red, "--mask", red)
    message = refused("sample", tmp_path / "elsewhere", "--solver", "ancestral", "--out", tmp_path / "no")
    assert "the solver ancestral assumes Gaussian noise" in message
    assert "no bits per dimension" in refused("evaluate", tmp_path / "elsewhere", "--likelihood")
    dry = run_in_process("train_iadb.py", "-cfg", SMOKE, "--dry-run", *source_words, *settings(autoencoder=str(vae_run)))
    assert dry.status == 0 and "images/s" in dry.out and "nothing was written" in dry.out, dry.all


def test_a_run_without_end_is_stopped_and_may_be_given_one(tmp_path: Path) -> None:
    job = kills.Job(
        "train_iadb.py", SMOKE, settings(optimizer__schedule={"kind": "constant"}, log__every=1, preview__num_samples=1)
    )
    process = subprocess.Popen(
        command(1, *job.arguments(tmp_path / "run", *settings(steps=None))), cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "run" / "checkpoints" / "step_00000010").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "starting at step 0 without end" in output and "stopped at step" in output, output
    status = read_json(tmp_path / "run" / "status.json")
    assert status["steps"] is None and status["state"] == "stopped"
    run_here(*[word.removesuffix(".py") for word in job.arguments(tmp_path / "run", *settings(steps=status["step"] + 2))])
    assert read_json(tmp_path / "run" / "status.json")["state"] == "finished"


# ---------------------------------------------------------------------------------------------- points


def sliced_wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    """Between two sets (N, 2): the root mean square, over 64 directions, of the distance of their sorted projections."""
    angles = np.pi * np.arange(64) / 64
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.sqrt(np.mean((np.sort(one @ directions, axis=0) - np.sort(other @ directions, axis=0)) ** 2)))


def test_points_become_the_density_that_is_wanted(points_run: Path) -> None:
    """No farther from the moons than two draws of the moons are from each other."""
    moons, rng, count = draw_points(MoonsSource(source="moons")).points, np.random.default_rng(0), 1000

    def density_sample() -> np.ndarray:
        return rng.choice(moons, count, replace=False)

    with np.load(points_run / "points" / "points.npz") as archive:
        source, data = archive["source"], archive["data"]
    bound = max(sliced_wasserstein(density_sample(), density_sample()) for _ in range(20))
    assert sliced_wasserstein(data[:count], density_sample()) <= bound
    assert sliced_wasserstein(source[:count], density_sample()) > 3 * bound
    assert np.abs(source.std(0) - 1).max() < 0.03 and source.shape == data.shape == (20_000, 2)


def test_points_are_shown_on_their_way(points_run: Path) -> None:
    points_folder = points_run / "points"
    with Image.open(points_folder / "points.gif") as gif:
        assert gif.n_frames == 129, "128 steps"  # pyright: ignore[reportAttributeAccessIssue]
    first, last = (pixels(points_folder / "frames" / f"frame_{i:03d}.png") for i in (0, 128))
    x0, x1 = pixels(points_folder / "x0.png"), pixels(points_folder / "x1.png")
    width = x0.shape[1]
    assert first.shape[1] == 3 * width and np.array_equal(first[:, :width], x0) and np.array_equal(first[:, -width:], x1)
    moving = first[26:-4, width:-width], last[26:-4, width:-width]  # below the titles
    assert np.array_equal(moving[0], x0[26:-4]) and np.array_equal(moving[1], x1[26:-4])
    for name in ("trajectories.png", "velocity.png"):
        assert len(np.unique(pixels(points_folder / name))) > 50, "something is drawn"
    assert pixels(points_run / "samples" / "step_00000400.png").shape[1] == 6 * 264, "source, 1, 4, 16, 64 calls, data"
    report = (points_run / "report.html").read_text()
    assert all(f'alt="{name}"' in report for name in ("step 400", "blend.png", "points/x1.png", "points/points.gif"))


@pytest.mark.soak
def test_points_go_on_to_the_bit_on_two_processes(points_run: Path, tmp_path: Path) -> None:
    kills.go_back(points_run, tmp_path / "two", 200)
    words = ("train_iadb.py", "-cfg", "configs/points2d_iadb.json", "--run-dir", tmp_path / "two", *MOONS)
    done = launch(*words, processes=2)
    assert done.status == 0 and "going on at step 200 of 400" in done.out and "= 2 x cpu x 1 x 512" in done.out, done.all
    kills.same_end(points_run, tmp_path / "two")


def test_points_are_drawn_again(points_run: Path, tmp_path: Path) -> None:
    arguments = ("--num-samples", "64", "--solver", "rk4", "--steps", "4", "--classes", "1")
    assert "trained without classes" in refused("sample", points_run, *arguments)
    run_here("sample", points_run, *arguments[:-2], "--shift-base", "4", "--out", tmp_path / "drawn")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        "metadata.json", "points.npz", "trajectories.png", "velocity.png", "x0.png", "x1.png",
    ]  # fmt: skip
    metadata = read_json(tmp_path / "drawn" / "metadata.json")
    assert metadata["network_calls"] == 16 and metadata["shift"] == {"base": 4}
    message = refused("sample", points_run, "--num-samples", "32", "--out", tmp_path / "drawn")
    assert "holds other frames; give another --out" in message
    assert "--npz is about images" in refused("sample", points_run, "--npz")
    assert "--guide-with is about images" in refused("sample", points_run, "--guide-with", points_run)
    assert "2-D points, not of images" in refused("convert", "safetensors", points_run, "--out", tmp_path / "w.safetensors")


@pytest.mark.soak
def test_points_are_killed_and_resumed(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_here(*[word.removesuffix(".py") for word in kills.POINTS.arguments(whole)])
    assert kills.start_and_kill(run, 1, random.Random(1), inside_save=True, job=kills.POINTS) != "ended"
    done = launch(*kills.POINTS.arguments(run))
    assert done.status == 0, done.all
    kills.same_end(whole, run)


@pytest.mark.soak
def test_points_with_classes_are_drawn_by_class(tmp_path: Path) -> None:
    """Without label_dropout there is no null class: each point has a class, as images have."""
    arguments = settings(class_conditional=None, steps=300, batch_size=512, micro_batch_size=512, ema__half_life_images=10000)
    quiet = settings(preview={"every": 300, "num_samples": 8, "calls": [1]}, checkpoint__every=300)
    run = tmp_path / "run"
    run_here("train_iadb", "-cfg", "configs/points2d_iadb.json", "--run-dir", run, *MOONS, *arguments, *quiet)
    moons = draw_points(MoonsSource(source="moons"))
    with np.load(run / "points" / "points.npz") as archive:
        assert np.abs(archive["data"].mean(0) - moons.points.mean(0)).max() < 0.15, "both moons"
    run_here("sample", run, "--classes", "1", "--num-samples", "2000", "--steps", "8", "--out", tmp_path / "one")
    with np.load(tmp_path / "one" / "points.npz") as archive:
        assert np.abs(archive["data"].mean(0) - moons.points[moons.labels == 1].mean(0)).max() < 0.15
    assert "--stop-at is about images" in refused("sample", run, "--stop-at", "3")
    assert "--threshold is about images" in refused("sample", run, "--threshold", "0.9")
    pairs = settings(pairs=str(run), class_conditional=False)
    message = refused("train_iadb", "-cfg", "configs/points2d_iadb.json", "--run-dir", tmp_path / "no", *MOONS, *pairs)
    assert "never learned to go without a class" in message


def test_a_density_travels_with_the_weights(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "density.png")
    source_words = settings(source={"source": "density", "path": str(tmp_path / "density.png"), "count": 500}, steps=2)
    run = tmp_path / "run"
    run_here("train_iadb", "-cfg", "configs/points2d_iadb.json", "--run-dir", run, *MOONS, *source_words)
    (tmp_path / "density.png").unlink()
    run_here("sample", run / "final", "--num-samples", "100", "--steps", "2", "--out", tmp_path / "out")
    with np.load(tmp_path / "out" / "points.npz") as archive:
        assert np.abs(archive["source"]).max() <= 2 and 1 < archive["source"].std() < 1.3


# ---------------------------------------------------------------------------------------------- pairs


@pytest.mark.soak
def test_reflow_straightens_the_paths(points_run: Path, tmp_path: Path) -> None:
    """Pairs made on two processes are what one makes, and one goes on where two were; the paths become straighter."""
    words = ("train_iadb.py", "-cfg", "configs/points2d_iadb.json", *MOONS)
    pairs = {"run": str(points_run), "count": 3000, "batch_size": 256, "sampler": {"solver": "heun", "steps": 8}}
    arguments = settings(pairs=pairs, init_from=str(points_run), steps=100, preview__every=100, checkpoint__every=50)
    done = launch(*words, "--run-dir", tmp_path / "two", *arguments, processes=2)
    assert done.status == 0 and "= 2 x cpu x 1 x 512" in done.out, done.all
    folder = next(path for path in (points_run / "pairs").iterdir() if path.is_dir())
    block_bytes = {path.name: path.read_bytes() for path in folder.rglob("block_*")}
    assert len(block_bytes) == 2 * 12, "3000 pairs in blocks of 256"
    sampler = build_sampler(open_run(points_run, CPU), SamplerConfig(solver="heun", steps=8))
    x = sampler.start(1, range(5))
    block = np.load(folder / "pairs" / "block_00000.npy")
    assert len(np.unique(np.concatenate([np.load(path) for path in folder.rglob("*.npy")])[:, 0, 0], axis=0)) == 3000
    assert np.allclose(block[:5, 0, 0], x) and np.allclose(block[:5, 0, 1], sampler.move(x), atol=1e-5)

    shutil.rmtree(folder)
    partial = folder.with_name(folder.name + ".partial")  # as a kill leaves it: some blocks, and the request
    (partial / "pairs").mkdir(parents=True)
    contract = {**read_json(tmp_path / "two" / "data.json")["pairs"]}
    (partial / "request.json").write_text(json.dumps(contract))
    for name in ("block_00000.npy", "block_00000.json", "block_00003.npy"):
        (partial / "pairs" / name).write_bytes(block_bytes[name])
    kills.go_back(tmp_path / "two", tmp_path / "one", 50)
    done = launch(*words, "--run-dir", tmp_path / "one", *arguments)
    assert done.status == 0 and "going on at step 50 of 100" in done.out, done.all
    assert {path.name: path.read_bytes() for path in folder.rglob("block_*")} == block_bytes
    kills.same_end(tmp_path / "two", tmp_path / "one")
    before, after = (metrics(run)[-1]["straightness"] for run in (points_run, tmp_path / "two"))
    assert after < 0.6 * before

    other = settings(pairs=pairs | {"count": 2000}, init_from=str(points_run), steps=100)
    assert "was started with another pairs.count" in refused(
        "train_iadb", *words[1:], "--run-dir", tmp_path / "one", *other, *arguments[6:]
    )


def test_pairs_of_images_keep_their_classes(iadb_run: Path, tmp_path: Path) -> None:
    pairs: dict[str, Any] = {"run": str(iadb_run), "count": 20, "batch_size": 8, "sampler": {"solver": "euler", "steps": 2}}
    arguments = settings(pairs=pairs, steps=2, preview__num_samples=1)
    run_here("train_iadb", "-cfg", SMOKE, "--run-dir", tmp_path / "run", *QUICK, *arguments)
    block = next((iadb_run / "pairs").rglob("block_00000.json"))
    labels = read_json(block)["labels"]
    assert len(labels) == 20 and set(labels) <= {0, 1, 2, 3} and len(set(labels)) > 1
    values = np.load(block.with_suffix(".npy"))
    assert values.shape == (20, 1, 2, 3, 16, 16)
    sampler = build_sampler(open_trained(iadb_run, CPU), SamplerConfig(solver="euler", steps=2))
    expected = sampler.move(sampler.start(1, range(8)), torch.tensor(labels[:8]))
    assert np.allclose(values[:8, 0, 1], expected, atol=1e-4)
    cfg = load(SMOKE, train_iadb.Config)
    coupling = open_coupling(cfg.data, cfg.source, cfg.held_out, cfg.image, factor=cfg.model.factor)
    makers = [
        PairMaker(validate(PairsConfig, pairs | {"sampler": pairs["sampler"] | guided}), coupling, 4, tmp_path, CPU)
        for guided in ({}, {"guidance": 2.0, "guide_with": str(iadb_run)})
    ]
    assert makers[0].folder in block.parents and makers[0].folder != makers[1].folder
    settings_of_old = {key: value for key, value in dump(makers[0].spec).items() if key != "run"}
    old = {"weights": makers[0].contract["weights"], "shape": [3, 16, 16], **settings_of_old}
    assert json.dumps(makers[0].contract) == json.dumps(old), "as before there were guides"
    assert makers[1].contract["sampler"]["guide_with"] == makers[1].contract["weights"]
    assert (
        load_file(tmp_path / "run" / "final" / "ema.safetensors").keys()
        == load_file(iadb_run / "final" / "ema.safetensors").keys()
    )


# ---------------------------------------------------------------------------------------------- inversion


def test_images_go_to_their_source_and_back(iadb_run: Path, ldm_run: Path, tmp_path: Path) -> None:
    for i, colour in enumerate(("red", "green", "blue")):
        (tmp_path / "mine").mkdir(exist_ok=True)
        image = Image.new("RGB", (20, 24), colour)
        image.paste("white", (3 + i, 3, 12, 14))
        image.save(tmp_path / "mine" / f"{i}.png")
    for run in (iadb_run, ldm_run):
        out = tmp_path / run.parent.name
        arguments = ("--solver", "rk4", "--steps", "16", "--batch-size", "2")
        run_here("sample", run, "--invert", tmp_path / "mine", "--out", out, *arguments)
        inversion = read_json(out / "inversion.json")
        calls = read_json(out / "metadata.json")["network_calls"]
        assert calls == (64 if run == iadb_run else 61) and len(inversion["pictures"]) == 3
        assert inversion["mean"]["rms"] < 0.05 and np.load(out / "sources.npy").shape[0] == 3
        message = refused("sample", run, "--invert", tmp_path / "mine" / "1.png", "--out", out, *arguments)
        assert "holds other images" in message
    assert "draws none" in refused("sample", iadb_run, "--invert", tmp_path / "mine", "--npz")
    assert "draws none" in refused("sample", iadb_run, "--invert", tmp_path / "mine", "--stop-at", "3")
    (tmp_path / "text.png").write_text("no image")
    message = refused("sample", iadb_run, "--invert", tmp_path / "text.png", "--out", tmp_path / "fresh")
    assert "not an image" in message and not (tmp_path / "fresh").exists(), "nothing is claimed for a mistake"
    assert "cannot be gone back" in refused("sample", iadb_run, "--invert", tmp_path / "mine", "--solver", "dpmpp_2m")
    assert "no image, and no folder" in refused("sample", iadb_run, "--invert", tmp_path / "nothing")
    assert "starts from noise; --source is for" in refused("sample", iadb_run, "--source", tmp_path / "mine")


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "sets", "message"),
    [
        (SMOKE, {"source": {"source": "moons"}}, "moons is a density of 2-D points: set image to null, or name images"),
        (SMOKE, {"image": None}, "2-D points, which have no image, need an mlp, and images another kind"),
        ("configs/points2d_iadb.json", {"data": {"source": "digits"}}, "images need image"),
        (SMOKE, {"process": {"schedule": {"kind": "blend"}, "target": "eps"}}, "target 'eps' cannot be read at one end of the"),
        (SMOKE, {"process": {"schedule": {"kind": "cosine"}, "target": "v"}}, "only the blend joins two densities"),
        (SMOKE, {"steps": None}, "a run without end needs optimizer.schedule.kind constant"),
        (SMOKE, {"source": {"source": "noise"}}, "source.source: 'noise' is not known. Allowed: 'gaussian', 'folder'"),
        (SMOKE, {"pairs": "runs/nothing"}, "runs/nothing"),
        ("configs/points2d_iadb.json", {"data": {"source": "density", "path": "EMPTY"}}, "is empty: all of it is black"),
        ("configs/points2d_iadb.json", {"autoencoder": "runs/x"}, "2-D points have no latents"),
        (
            "configs/points2d_iadb.json",
            {"process": {"schedule": {"kind": "blend"}, "target": "blend"}},
            "2-D points have no bounds to clip to",
        ),
        ("configs/points2d_iadb.json", {"held_out": {"source": "digits"}}, "held_out of 2-D points is a share of them"),
        (SMOKE, {"source": {"source": "folder", "path": "runs/nowhere"}}, "source: data folder runs/nowhere does not exist"),
        (SMOKE, {"label_dropout": 0.0, "preview": {"guidance": 2.0}}, "label_dropout above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_ends_that_cannot_be_blended(tmp_path: Path, config: str, sets: dict, message: str) -> None:
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    words = [word.replace("EMPTY", str(tmp_path / "black.png")) for word in settings(**sets)]
    assert message in refused("train_iadb", "-cfg", config, "--run-dir", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_one_line_and_status_two(tmp_path: Path, iadb_run: Path, points_run: Path) -> None:
    message = one_line(
        run_in_process("train_iadb.py", "-cfg", SMOKE, "--set", 'source={"source": "spiral"}', "--run-dir", tmp_path / "a")
    )
    assert "spiral is a density of 2-D points" in message
    pairs = settings(pairs=str(points_run))
    message = refused("train_iadb", "-cfg", SMOKE, "--run-dir", tmp_path / "b", *pairs)
    assert f"pairs.run {points_run} makes 2, and this run sees 3 x 16 x 16" in message
    spiral = settings(pairs=str(points_run), data={"source": "spiral"})
    message = refused("train_iadb", "-cfg", "configs/points2d_iadb.json", "--run-dir", tmp_path / "d", *MOONS, *spiral)
    assert f"pairs.run {points_run} was trained on other data" in message
    noisy = settings(pairs={"run": str(points_run), "sampler": {"solver": "redraw"}})
    message = refused("train_iadb", "-cfg", "configs/points2d_iadb.json", "--run-dir", tmp_path / "e", *MOONS, *noisy)
    assert "noise on the way parts a source from its sample" in message
    other = settings(pairs=str(iadb_run), source={"source": "digits"})
    message = refused("train_iadb", "-cfg", SMOKE, "--run-dir", tmp_path / "c", *other)
    assert "starts from another source" in message


def test_densities_of_different_shapes(tmp_path: Path) -> None:
    from src.data import ImageConfig
    from src.data.sources import ShapesSource
    from src.runs.densities import open_density
    from src.training.inputs import Coupling

    shapes = ShapesSource(source="shapes", count=8, size=16)
    densities = [open_density(shapes, 0.0, ImageConfig(size=16, channels=channels)) for channels in (3, 1)]
    with pytest.raises(ValueError, match="data and source have different shapes, 3 x 16 x 16 and 1 x 16 x 16"):
        Coupling(*densities)
