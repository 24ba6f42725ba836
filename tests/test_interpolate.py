"""Animations: great circles, the frames of every kind of run, what goes on after a kill, MP4 and GIF."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from PIL import Image

from src import figures
from src.config import UserError, validate
from src.data.sources import draw_shape
from src.diffusion import SOLVERS, ProcessConfig
from src.interop.imported import Imported, keep
from src.models import UNet, UNetConfig
from src.runs.folders import read_weights
from src.runs.opened import open_trained
from src.runtime.checkpoint import write_folder
from src.sampling import SamplerConfig
from src.sampling.edit import encode_images
from src.sampling.interpolation import Journey, class_weights, slerp, smoothstep, straight
from src.sampling.sampler import random_labels
from tests.conftest import ROOT, here, launch, one_line, randomise, refused

sys.path.insert(0, str(ROOT))
import interpolate
from src.sampling import build_sampler

CPU = torch.device("cpu")
QUICK = ("--steps", "4", "--batch-size", "4", "--frames-between", "5")


def animate(run: Path, out: Path, *words: str | Path) -> str:
    """What the script says, run in this process."""
    AcceleratorState._reset_state(True)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["interpolate.py", *map(str, (run, *QUICK, "--out", out, *words))])
        interpolate.main()
    AcceleratorState._reset_state(True)
    return printed.getvalue()


def frames_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "frames").iterdir())}


def shown(out: Path) -> NDArray[np.float64]:
    """(frames, H, W, 3)."""
    return np.stack([np.asarray(Image.open(path).convert("RGB"), float) for path in sorted((out / "frames").iterdir())])


def sample_image(run: Path, seed: int, label: int | None, spec: SamplerConfig) -> NDArray[np.float64]:
    """The first image that sample.py draws of a seed, as a frame shows it."""
    sampler = build_sampler(open_trained(run, CPU), spec)
    pixels = figures.to_uint8(sampler.draw(seed, [0], None if label is None else [label], device=CPU))[0]
    zoom = figures.zoom_for(pixels.shape[0])
    return np.asarray(figures.to_image(pixels).convert("RGB"), float).repeat(zoom, 0).repeat(zoom, 1)


def steps_of(frames: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean difference of neighbouring frames, in levels of 255."""
    return np.abs(frames[1:] - frames[:-1]).mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------- the way


def test_slerp_is_the_great_circle() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]
    weight = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.9, 1e-3], dtype=torch.float64)
    between = slerp(a, b, weight)
    assert torch.equal(between[0], a[0]) and torch.equal(between[1], b[1]), "the ends are exact"
    torch.testing.assert_close(between.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    for i, w in enumerate(weight.tolist()):  # the formula as published, one angle for the whole tensor
        one, other = (tensor[i].double().numpy() for tensor in (a, b))
        theta = np.arccos((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
        wanted = (np.sin((1 - w) * theta) * one + np.sin(w * theta) * other) / np.sin(theta)
        np.testing.assert_allclose(between[i].numpy(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(slerp(a[i : i + 1], b[i : i + 1], weight[i : i + 1])[0], between[i]), "each sample for itself"


def test_slerp_of_a_quarter_circle_of_other_norms_and_of_small_angles() -> None:
    a, b = torch.tensor([[1.0, 0.0]] * 3).double(), torch.tensor([[0.0, 1.0]] * 3).double()
    weight = torch.tensor([1 / 3, 0.5, 2 / 3], dtype=torch.float64)
    angle = weight * torch.pi / 2
    torch.testing.assert_close(slerp(a, b, weight), torch.stack([angle.cos(), angle.sin()], 1), rtol=0, atol=1e-15)
    half = slerp(a[:1], 3 * b[:1], weight[1:2])[0]
    torch.testing.assert_close(half, torch.tensor([0.5, 1.5]).double() * 2**0.5, rtol=0, atol=1e-14)
    for tiny in (1e-3, 1e-5, 1e-7, 0.0):
        near = torch.tensor([[np.cos(tiny), np.sin(tiny)]], dtype=torch.float64)
        wanted = torch.tensor([[np.cos(tiny / 4), np.sin(tiny / 4)]], dtype=torch.float64)
        torch.testing.assert_close(slerp(a[:1], near, torch.tensor([0.25])), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, 0.0])
def test_slerp_is_straight_between_parallel_and_opposite_ends(factor: float) -> None:
    a = torch.randn(3, 4, 5, 5)
    weight = torch.tensor([0.0, 0.3, 1.0])
    between = slerp(a, factor * a, weight)
    torch.testing.assert_close(between, a + weight[:, None, None, None] * (factor - 1) * a, rtol=0, atol=1e-6)
    torch.testing.assert_close(slerp(factor * a, a, weight), straight(factor * a, a, weight), rtol=0, atol=1e-6)


def test_smoothstep_rests_at_the_keys() -> None:
    assert [smoothstep(w) for w in (0.0, 0.5, 1.0)] == [0, 0.5, 1]
    assert smoothstep(1e-4) < 1e-7 and 1 - smoothstep(1 - 1e-4) < 1e-7
    values = [smoothstep(i / 100) for i in range(101)]
    assert values == sorted(values)


def test_a_journey_goes_from_key_to_key() -> None:
    journey = Journey(keys=3, between=4)
    assert len(journey) == 9 and [journey[i] for i in (0, 4)] == [(0, 1, 0), (1, 2, 0)]
    assert journey[8].before == 2 and journey[8].weight == 0, "the last key is the end"
    assert journey[6] == (1, 2, 0.5)
    loop = Journey(keys=3, between=4, loop=True)
    assert len(loop) == 12 and loop[10] == (2, 0, 0.5) and loop[11].weight == smoothstep(0.75)
    with pytest.raises(IndexError):
        loop[12]


def test_class_weights_are_shares() -> None:
    places = [Journey(keys=2, between=2)[i] for i in range(3)]
    assert class_weights([3, 1], places, 5).tolist() == [[0, 0, 0, 1, 0], [0, 0.5, 0, 0.5, 0], [0, 1, 0, 0, 0]]
    assert class_weights([2, 2], places, 3).tolist() == [[0, 0, 1]] * 3


# ---------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="session")
def whole(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop through three seeds; read only."""
    out = tmp_path_factory.mktemp("interpolation") / "whole"
    printed = animate(smoke_run, out, "--seeds", "3/14/15", "--loop")
    assert "15 frames through 3 keys" in printed and "4 network calls a frame" in printed and "animation.mp4" in printed, (
        printed
    )
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


def decoded(video: Path) -> tuple[str, NDArray[np.float64]]:
    """What ffmpeg says of a video's stream, and its frames (N, H, W, 3)."""
    command = [figures.ffmpeg() or "", "-hide_banner", "-i", str(video), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    stream = next(line for line in done.stderr.decode().splitlines() if "Video: " in line)
    width, height = map(int, re.findall(r", (\d+)x(\d+)", stream)[0])
    return stream, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3).astype(float)


def test_the_videos_are_h264_and_a_gif_of_all_frames(whole: Path) -> None:
    stream, frames = decoded(whole / "animation.mp4")
    assert "Video: h264" in stream and "yuv420p(tv, bt709, progressive), 64x64" in stream and " 24 fps" in stream
    assert frames.shape == (15, 64, 64, 3) and np.abs(frames - shown(whole)).mean() < 5, "frame by frame, in its colours"
    assert (whole / "animation.mp4").read_bytes().find(b"moov") < 100, "plays while it loads"
    assert abs(seconds_of(whole / "animation.gif", 15) - 15 / 24) <= 0.01


def seconds_of(path: Path, count: int) -> float:
    """How long a GIF of so many frames lasts."""
    with Image.open(path) as gif:
        assert getattr(gif, "n_frames", 1) == count and gif.info["loop"] == 0
        lasting = []
        for i in range(count):
            gif.seek(i)
            lasting.append(gif.info["duration"])
    return sum(lasting) / 1000


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
    if kind == "imported":
        run = imported(tmp_path / "imported")
    else:
        run = request.getfixturevalue({"latent": "ldm_run", "blend": "iadb_run"}[kind])
    if kind == "blend":
        spec = {"solver": "heun", "alphas": [0, 0.3, 0.6, 1]}
    words = ("--alphas", "0,0.3,0.6,1", "--solver", "heun") if kind == "blend" else ()
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
    keep(Imported(network, model, process, image_size=16, channels=3, num_classes=4), out, name="imported")
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
        (("--alphas", "0,0.5,1.5"), "alphas: 1.5 lies outside [0, 1]; alpha goes from 0, the source, to 1, the data"),
    ],
)
def test_mistakes_are_told_before_anything_is_opened(words: Sequence[str], message: str) -> None:
    assert message in refused("interpolate", "no run at all", *words)


def test_an_unknown_solver_ends_with_the_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["interpolate.py", "run", "--solver", "rk5"])
    with pytest.raises(SystemExit) as ended:
        interpolate.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and all(solver in last for solver in SOLVERS)


def test_what_the_run_does_not_have_is_refused(smoke_run: Path, tmp_path: Path) -> None:
    assert "there is no such run" in refused("interpolate", tmp_path / "none")
    assert "alphas belong to the blend" in refused("interpolate", smoke_run, "--alphas", "0,0.5,1")
    assert "starts from noise" in refused("interpolate", smoke_run, "--source", ROOT / "docs")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- ffmpeg


def test_without_ffmpeg_there_is_still_a_gif(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    printed = animate(smoke_run, tmp_path / "out", "--num-seeds", "2")
    assert printed.startswith("there is no ffmpeg, so no MP4 is made: pip install imageio-ffmpeg, or put ffmpeg on PATH\n")
    assert "animation.gif" in printed and "animation.mp4" not in printed
    assert abs(seconds_of(tmp_path / "out" / "animation.gif", 6) - 6 / 24) <= 0.01
    assert not (tmp_path / "out" / "animation.mp4").exists()
    monkeypatch.undo()
    frames = frames_of(tmp_path / "out")
    assert "animation.mp4" in animate(smoke_run, tmp_path / "out", "--num-seeds", "2"), "the same command again makes it"
    assert frames_of(tmp_path / "out") == frames


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Three frames with odd sides."""
    for i in range(3):
        pixels = np.zeros((15, 17, 3), np.uint8)
        pixels[:, :, i] = 200
        pixels[:, -3:], pixels[-3:] = 255, 255
        Image.fromarray(pixels).save(tmp_path / f"f_{i:05d}.png")
    return tmp_path / "f_%05d.png"


def test_an_mp4_of_odd_sides(odd: Path, tmp_path: Path) -> None:
    command = figures.mp4(odd, tmp_path / "out.mp4", fps=24)
    stream, frames = decoded(tmp_path / "out.mp4")
    assert "Video: h264" in stream and ", 18x16" in stream and " 24 fps" in stream
    assert [int(frame[:12, :14].mean(axis=(0, 1)).argmax()) for frame in frames] == [0, 1, 2]
    assert all(frame[-1].min() > 200 and frame[:, -1].min() > 200 for frame in frames), "the edge is repeated, not padded black"
    assert not (tmp_path / ".out.mp4").exists()
    (tmp_path / "out.mp4").unlink()
    subprocess.run([figures.ffmpeg() or "", *shlex.split(command)[1:]], check=True)
    assert (tmp_path / "out.mp4").exists(), "the command makes it again"


def test_an_ffmpeg_that_cannot(odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*given: Any, **options: Any) -> list[str]:
        return ["libx999" if word == "libx264" else word for word in original(*given, **options)]

    original = figures.mp4_command
    monkeypatch.setattr(figures, "mp4_command", without)
    with pytest.raises(UserError, match="was built without libx264, so no MP4 is made"):
        figures.mp4(odd, tmp_path / "out.mp4", fps=24)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="ffmpeg failed"):
        figures.mp4(tmp_path / "none_%05d.png", tmp_path / "out.mp4", fps=24)
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob(".*.mp4"))


# ---------------------------------------------------------------------------------------------- what fails in the end


def broken_ffmpeg(folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "ffmpeg").write_text("not a program")
    (folder / "ffmpeg").chmod(0o755)
    patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    patch.setattr(figures, "_said", set())


def test_an_ffmpeg_that_does_not_start(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """With the one of imageio-ffmpeg both are made, without it the GIF; sample.py likewise. The folder's name has a %."""
    broken_ffmpeg(tmp_path / "bin", monkeypatch)
    out = tmp_path / "my samples" / "100% [new] %d 'x' #1"
    printed = animate(smoke_run, out / "a", "--num-seeds", "2")
    assert "animation.gif" in printed and "animation.mp4" in printed and (out / "a" / "animation.mp4").exists()
    assert capfd.readouterr().err.count("does not start (Exec format error); another way is taken") == 1
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    printed = animate(smoke_run, out / "b", "--num-seeds", "2")
    assert printed.startswith("there is no ffmpeg, so no MP4 is made") and (out / "b" / "animation.gif").exists()
    sampled = here("sample.py", smoke_run, "--steps", "2", "--num-samples", "2", "--frames", "--out", out / "c")
    assert sampled.status == 0 and (out / "c" / "denoising.gif").exists(), sampled.all


def test_a_gif_that_was_asked_for_and_fails_leaves_the_rest(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ("sample.py", smoke_run, "--steps", "2", "--num-samples", "3", "--frames", "--npz", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(figures, "gif", full)
        message = one_line(here(*words))
        assert "denoising.gif was not made (the disk is full: No space left" in message and message.endswith("before it stays")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"00000.png", "00002.png", "grid.png", "samples_3x16x16x3.npz", "metadata.json"} <= names
        with pytest.raises(UserError, match="animation.gif was not made"):
            animate(smoke_run, tmp_path / "a", "--num-seeds", "2")
        assert len(frames_of(tmp_path / "a")) == 6 and (tmp_path / "a" / "animation.mp4").exists()
    written = (tmp_path / "out" / "00002.png").stat().st_mtime_ns
    assert here(*words).status == 0 and (tmp_path / "out" / "denoising.gif").exists(), "the same command again makes it"
    assert (tmp_path / "out" / "00002.png").stat().st_mtime_ns == written


def test_a_grid_that_fails_leaves_the_samples(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_font(*_: Any, **__: Any) -> Any:
        raise ValueError("no font")

    monkeypatch.setattr(figures, "grid", no_font)
    done = here("sample.py", smoke_run, "--steps", "2", "--num-samples", "3", "--out", tmp_path / "out")
    assert done.status == 0 and done.err.count("warning: grid.png failed (ValueError: no font)") == 1
    assert "grid.png" not in done.out and len(list((tmp_path / "out").glob("0*.png"))) == 3
