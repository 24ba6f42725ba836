"""Animations: the frames of every kind of run, what goes on after a kill, and mistakes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from src import figures
from src.config import validate
from src.data.sources import draw_shape
from src.diffusion import SOLVERS, ProcessConfig
from src.interop.imported import Imported, keep
from src.models import UNet, UNetConfig
from src.runs.folders import read_weights
from src.runs.opened import open_trained
from src.runtime.checkpoint import write_folder
from src.sampling import SamplerConfig, build_sampler
from src.sampling.edit import encode_images
from src.sampling.paths import smoothstep
from src.sampling.sampler import random_labels
from tests.animations import QUICK, animate, decoded, frames_of, seconds_of, shown
from tests.conftest import ROOT, launch, randomise, refused

CPU = torch.device("cpu")


def sample_image(run: Path, seed: int, label: int | None, spec: SamplerConfig) -> NDArray[np.float64]:
    """The first image that sample.py draws of a seed, as a frame shows it."""
    sampler = build_sampler(open_trained(run, CPU), spec)
    pixels = figures.to_uint8(sampler.draw(seed, [0], None if label is None else [label], device=CPU))[0]
    zoom = figures.zoom_for(pixels.shape[0])
    return np.asarray(figures.to_image(pixels).convert("RGB"), float).repeat(zoom, 0).repeat(zoom, 1)


def steps_of(frames: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean difference of neighbouring frames, in levels of 255."""
    return np.abs(frames[1:] - frames[:-1]).mean((1, 2, 3))


@pytest.fixture(scope="session")
def whole(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop through three seeds; read only."""
    out = tmp_path_factory.mktemp("interpolation") / "whole"
    printed = animate(smoke_run, out, "--seeds", "3/14/15", "--loop")
    assert all(words in printed for words in ("15 frames through 3 keys", "4 network calls a frame", "animation.mp4")), printed
    return out


def test_keys_are_the_first_images_of_their_seeds(smoke_run: Path, whole: Path) -> None:
    frames = shown(whole)
    assert frames.shape == (15, 64, 64, 3), "16 px, enlarged four times"
    for i, seed in enumerate((3, 14, 15)):
        label = random_labels(seed, [0], 4)[0]
        assert np.abs(frames[5 * i] - sample_image(smoke_run, seed, label, SamplerConfig(steps=4))).max() <= 1
    metadata = json.loads((whole / "metadata.json").read_text())
    assert metadata["keys"] == [3, 14, 15] and metadata["classes"][0] == ["circle", "cross", "square", "triangle"][
        random_labels(3, [0], 4)[0]
    ]  # fmt: skip


def test_frames_go_smoothly(smoke_run: Path, tmp_path: Path) -> None:
    animate(smoke_run, tmp_path / "slow", "--num-seeds", "2", "--frames-between", "24")
    frames = shown(tmp_path / "slow")
    distance = np.abs(frames[-1] - frames[0]).mean()
    assert distance > 5, "the keys are different"
    assert steps_of(frames).max() < 0.15 * distance, "no jump"
    assert steps_of(frames)[0] < 0.3 * steps_of(frames)[12], "slow at the keys"


def test_the_videos_are_h264_and_a_gif_of_all_frames(whole: Path) -> None:
    stream, frames = decoded(whole / "animation.mp4")
    assert "Video: h264" in stream and "yuv420p(tv, bt709, progressive), 64x64" in stream and " 24 fps" in stream
    assert frames.shape == (15, 64, 64, 3) and np.abs(frames - shown(whole)).mean() < 5, "frame by frame, in its colours"
    assert (whole / "animation.mp4").read_bytes().find(b"moov") < 100, "plays while it loads"
    assert abs(seconds_of(whole / "animation.gif", 15) - 15 / 24) <= 0.01


def test_an_interrupted_rendering_goes_on(smoke_run: Path, whole: Path, tmp_path: Path) -> None:
    words = ("--seeds", "3/14/15", "--loop")
    animate(smoke_run, tmp_path, *words)
    assert frames_of(tmp_path) == frames_of(whole)
    folder = tmp_path / "frames"
    for i in (2, 9, 10, 11, 14):
        (folder / f"frame_{i:05d}.png").unlink()
    (folder / "frame_00002.png.part").write_bytes(b"half an image")
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    printed = animate(smoke_run, tmp_path, *words, "--fps", "12")
    assert frames_of(tmp_path) == frames_of(whole)
    assert all(path.stat().st_mtime_ns == then for path, then in written.items()), "what was there is not drawn again"
    assert "1.2 seconds at 12 frames a second" in printed
    message = refused("interpolate", smoke_run, *QUICK, "--out", tmp_path, "--seeds", "3/14/16", "--loop")
    assert message == f"{tmp_path} holds other frames; give another --out or remove it"
    assert "holds other frames" in refused("interpolate", smoke_run, *QUICK, "--out", ROOT / "tests")


def test_two_processes_draw_the_same(smoke_run: Path, whole: Path, tmp_path: Path) -> None:
    words = ("interpolate.py", smoke_run, *QUICK, "--seeds", "3/14/15", "--loop")
    done = launch(*words, "--out", tmp_path / "two", processes=2)
    assert done.status == 0 and "2 process(es)" in done.out, done.all
    assert frames_of(tmp_path / "two") == frames_of(whole)


@pytest.mark.parametrize("kind", ["latent", "blend", "imported"])
def test_every_kind_of_run(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    spec = {"steps": 4}
    words = ()
    if kind == "imported":
        run, words, spec = imported(tmp_path / "imported"), ("--shift-base", "48"), spec | {"shift": {"base": 48}}
    else:
        run = request.getfixturevalue({"latent": "ldm_run", "blend": "iadb_run"}[kind])
    if kind == "blend":
        words = ("--alphas", "0,0.3,0.6,1", "--solver", "heun")
        spec = {"solver": "heun", "alphas": [0, 0.3, 0.6, 1]}
    animate(run, tmp_path / "out", "--seed", "8", "--num-seeds", "2", "--classes", "1/3", *words)
    frames = shown(tmp_path / "out")
    assert len(frames) == 6
    spec = validate(SamplerConfig, spec)
    for frame, seed, label in ((frames[0], 8, 1), (frames[5], 9, 3)):
        assert np.abs(frame - sample_image(run, seed, label, spec)).max() <= 1


def imported(out: Path) -> Path:
    """A network of guided-diffusion's kind, with classes and none for no class."""
    config = {"base_channels": 8, "channel_mult": [1, 2], "attention": ["none", "none"], "blocks": 1, "norm_groups": 4}
    model = validate(UNetConfig, config)
    network = randomise(UNet(model, in_channels=3, num_classes=4, null_class=False))
    process = validate(ProcessConfig, {"schedule": {"kind": "linear", "steps": 50}, "target": "eps"})
    keep(Imported(network, process, image_size=16, channels=3), out, name="imported")
    return out


def test_noise_of_the_steps_is_the_same_in_all_frames(smoke_run: Path, tmp_path: Path) -> None:
    for name, words in {
        "eta": ("--eta", "1"),
        "ancestral": ("--solver", "ancestral"),
        "redraw": ("--solver", "redraw"),
    }.items():
        animate(smoke_run, tmp_path / name, "--seeds", "3/3", "--classes", "circle", *words)
        assert len(set(frames_of(tmp_path / name).values())) == 1, "one seed, one class: nothing moves"
    label = ["circle", "cross", "square", "triangle"].index("circle")
    wanted = sample_image(smoke_run, 3, label, SamplerConfig(steps=4, eta=1.0))
    assert np.abs(shown(tmp_path / "eta")[0] - wanted).max() <= 1, "image 0 of the seed"


def test_classes_are_blended(smoke_run: Path, tmp_path: Path) -> None:
    animate(smoke_run, tmp_path / "out", "--seeds", "3/3", "--classes", "circle/triangle", "--guidance", "3")
    frames = shown(tmp_path / "out")
    spec = SamplerConfig(steps=4, guidance=3.0)
    for frame, label in ((frames[0], 0), (frames[5], 3)):
        assert np.abs(frame - sample_image(smoke_run, 3, label, spec)).max() <= 1
    distance = np.abs(frames[5] - frames[0]).mean()
    assert distance > 0.3 and steps_of(frames).max() < 0.6 * distance
    assert "dealt to 3 classes" in refused("interpolate", smoke_run, "--seeds", "1/2", "--classes", "0/1/2")
    assert "class 'dog' is not known" in refused("interpolate", smoke_run, "--classes", "dog")


# ---------------------------------------------------------------------------------------------- images


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images that are no squares of the network's size."""
    folder, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    paths = [folder / f"{kind}.png" for kind in ("circle", "square", "triangle")]
    for path in paths:
        Image.fromarray(draw_shape(path.stem, 40, rng)[:, :36]).save(path)
    return paths


@pytest.mark.parametrize("kind", ["smoke_run", "ldm_run", "iadb_run"])
def test_images_come_back_through_their_inversions(
    kind: str, shapes: list[Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = request.getfixturevalue(kind)
    words = ("--pictures", *shapes[:2], "--solver", "rk4", "--steps", "12")
    printed = animate(run, tmp_path / "out", *words)
    assert float(re.findall(r"come back to ([\d.]+) of 255", printed)[0]) < 0.5, printed
    opened = open_trained(run, CPU)
    sampler = build_sampler(opened, SamplerConfig())
    images = figures.to_uint8(sampler.decode(encode_images(opened, shapes[:2])))
    frames = shown(tmp_path / "out")[:, ::4, ::4]
    assert np.abs(frames[[0, 5]] - images).mean() < 0.5
    assert steps_of(frames).max() < 0.6 * np.abs(frames[5] - frames[0]).mean()
    assert "holds other frames" in refused(
        "interpolate", run, *QUICK, "--out", tmp_path / "out", *words[:2], shapes[2], *words[3:]
    )


def test_images_that_cannot_be_inverted(smoke_run: Path, shapes: list[Path], tmp_path: Path) -> None:
    message = refused("interpolate", smoke_run, "--pictures", *shapes, "--solver", "dpmpp_2m")
    assert message == (
        "dpmpp_2m cannot be gone back, as --pictures need; allowed: euler, midpoint, heun, rk4, ddim (with eta 0)"
    )
    assert "ddim with eta 0.5 cannot be gone back" in refused("interpolate", smoke_run, "--pictures", *shapes, "--eta", "0.5")
    assert "and here is 1" in refused("interpolate", smoke_run, "--pictures", shapes[0])
    assert "no image" in refused("interpolate", smoke_run, "--pictures", shapes[0], tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert "broken.png: not an image" in refused("interpolate", smoke_run, "--pictures", shapes[0], tmp_path / "broken.png")
    run = imported(tmp_path / "imported")
    assert "never learned to go without a class: give --classes" in refused("interpolate", run, "--pictures", *shapes)
    printed = animate(run, tmp_path / "out", "--pictures", shapes[0].parent, "--classes", "0/1/2", "--frames-between", "2")
    assert "5 frames through 3 keys" in printed, "a folder stands for its images"


def test_between_two_data_sets_the_way_is_straight(iadb_run: Path, shapes: list[Path], tmp_path: Path) -> None:
    """A network whose target is zero leaves the source as it is."""
    weights = read_weights(iadb_run)
    config = {**weights.config, "source": {"source": "shapes", "count": 64, "size": 24}}
    still = {name: torch.zeros_like(tensor) for name, tensor in weights.tensors.items()}
    write_folder(tmp_path / "run", {"ema": still}, {"config": config, "data": weights.data, "progress": {"step": weights.step}})
    animate(tmp_path / "run", tmp_path / "seeds", "--seeds", "1/2")
    sampler = build_sampler(open_trained(tmp_path / "run", CPU), SamplerConfig())
    first, last = (figures.to_uint8(sampler.start(seed, [0]))[0].astype(float) for seed in (1, 2))
    frames = shown(tmp_path / "seeds")[:, ::4, ::4]
    for i in range(6):
        weight = smoothstep(i / 5)
        assert np.abs(frames[i] - (1 - weight) * first - weight * last).max() <= 1
    animate(tmp_path / "run", tmp_path / "source", "--source", shapes[0].parent, "--loop")
    wanted = figures.to_uint8(encode_images(open_trained(tmp_path / "run", CPU), shapes))
    assert np.abs(shown(tmp_path / "source")[::5, ::4, ::4] - wanted).max() <= 1
    assert "starts from noise" in refused("interpolate", iadb_run, "--source", shapes[0].parent)


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seeds", "3"), "an animation goes through two keys or more, and here is 1; give more"),
        (("--num-seeds", "1"), "an animation goes through two keys or more, and here is 1; give more"),
        (("--seeds", "3/x"), "--seeds 3/x: give numbers with a slash between them, such as 3/14/15"),
        (("--seeds", "3/18446744073709551616"), "seeds go from 0 to 2^64 - 1"),
        (("--seeds", "1/2", "--num-seeds", "4"), "--seeds, --num-seeds, --pictures and --source each name the keys; give one"),
        (("--frames-between", "0"), "--frames-between and --batch-size must be at least 1, --fps from 1 to 100"),
        (("--steps", "many"), "--steps many: give a number, or counts for equal sections, such as 100,50,25"),
        (("--shift-base", "0"), "shift.base: input should be greater than 0, not 0"),
        (("--shift-base", "9", "--alphas", "0,0.5,1"), "shift: alphas are the steps themselves"),
        (("--alphas", "0,0.5,1.5"), "alphas: 1.5 lies outside [0, 1]; alpha goes from 0, the source, to 1, the data"),
    ],
)
def test_mistakes_are_told_before_anything_is_opened(words: Sequence[str], message: str) -> None:
    assert message in refused("interpolate", "no run at all", *words)


def test_an_unknown_solver_ends_with_the_list() -> None:
    line = refused("interpolate", "run", "--solver", "rk5")
    assert all(solver in line for solver in SOLVERS) and "did you mean rk4?" in line


def test_what_the_run_does_not_have_is_refused(smoke_run: Path, tmp_path: Path) -> None:
    assert "there is no such run" in refused("interpolate", tmp_path / "none")
    assert "alphas belong to the blend" in refused("interpolate", smoke_run, "--alphas", "0,0.5,1")
    assert "starts from noise" in refused("interpolate", smoke_run, "--source", ROOT / "docs")
    assert not list(tmp_path.iterdir())
