"""Seeded noise, the sampler, opening what was trained, files written once."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.config import UserError, validate
from src.diffusion import ProcessConfig, build_process, euler, transitions
from src.models import UNet, UNetConfig
from src.runs.folders import run_name
from src.runs.opened import open_trained
from src.sampling import Sampler, SamplerConfig, build_sampler, noise_of
from src.sampling.files import Frames, columns_for, write_samples
from src.sampling.sampler import describe, random_labels
from src.sampling.trajectory import Edit
from tests.conftest import here, launch, one_line, randomise, refused, run_here

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


def sampler(
    solver: str = "ddim", *, num_classes: int | None = 3, steps: Any = 4, classifier: Any = None, **options: Any
) -> Sampler:
    config = {"base_channels": 8, "channel_mult": [1, 2], "attention": ["none", "none"], "blocks": 1, "norm_groups": 4}
    network = randomise(UNet(validate(UNetConfig, config), in_channels=1, num_classes=num_classes)).eval()
    process = build_process(validate(ProcessConfig, {"schedule": {"kind": "cosine", "steps": 50}, "target": "v"}))
    spec = validate(SamplerConfig, {"solver": solver, "steps": steps, **options})
    return Sampler(network, process, spec, shape=SHAPE, num_classes=num_classes, clip_x0=(-1.0, 1.0), classifier=classifier)


def test_noise_is_a_function_of_seed_and_picture_alone() -> None:
    many = noise_of(7, range(100), SHAPE)
    assert torch.equal(noise_of(7, [42, 3], SHAPE), many[[42, 3]])
    assert not torch.equal(noise_of(8, [42], SHAPE), many[[42]])
    assert not torch.equal(noise_of(7, [42], SHAPE, 1), many[[42]])
    assert not torch.equal(noise_of(7 + 2**32, [42], SHAPE), many[[42]]), "all 64 bits of the seed count"
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.03


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "dpmpp_2m", "ddim", "ancestral"])
def test_every_solver_draws_the_same_picture_whoever_else_is_drawn(solver: str) -> None:
    options = {"eta": 0.5} if solver == "ddim" else {}
    draw = sampler(solver, **options).draw
    many = draw(0, range(5), [0, 1, 2, 0, 1], device=CPU, batch_size=5)
    one = draw(0, [3], [0], device=CPU, batch_size=5)
    torch.testing.assert_close(one[0], many[3], rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(0, range(5), [0, 1, 2, 0, 1], device=CPU, batch_size=5), many)
    assert many.shape == (5, *SHAPE) and many.abs().max() < 3


def test_calls_are_counted() -> None:
    for solver in ("euler", "midpoint", "heun", "rk4", "ddim"):
        for guidance in (1.0, 2.0):
            drawn = sampler(solver, guidance=guidance)
            real, calls = drawn.network, []
            drawn.network = lambda *a, real=real, calls=calls, **k: (calls.append(1), real(*a, **k))[1]
            drawn.draw(0, [0], [1], device=CPU)
            assert len(calls) == drawn.calls(), (solver, guidance)
    assert describe(sampler(), 3)["seed"] == 3


def test_calls_of_shortened_repeated_and_partly_guided_ways() -> None:
    for options in (
        {"stop_at": 3}, {"double_sampling": 2}, {"guidance": 2.0, "guidance_interval": [0.1, 2.0]},
        {"solver": "heun", "double_sampling": 3}, {"guidance": 2.0, "guidance_interval": [0.0, 0.5], "stop_at": 5},
    ):  # fmt: skip
        drawn = sampler(steps=6, **options)
        real, calls = drawn.network, []
        drawn.network = lambda *a, real=real, calls=calls, **k: (calls.append(1), real(*a, **k))[1]
        drawn.draw(0, [0], [1], device=CPU)
        assert len(calls) == drawn.calls(), options
    drawn, calls = sampler(steps=6), []
    real = drawn.network
    drawn.network = lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    edit = Edit(torch.zeros(SHAPE), start_at=2, mask=torch.ones(1, 8, 8), resamplings=3)
    drawn.draw(0, [0], [1], device=CPU, edit=edit)
    assert len(calls) == drawn.calls(edit) == 12


def test_stopping_early_gives_the_estimate_of_x0_there() -> None:
    seen, watched = {}, sampler("ancestral", steps=6)
    watched.draw(0, [0], [1], device=CPU, callback=lambda step, t, x_t, prediction: seen.update({step: prediction.x0}))
    for step in (1, 4):
        assert torch.equal(sampler("ancestral", steps=6, stop_at=step).draw(0, [0], [1], device=CPU), seen[step])


def test_double_sampling_noises_the_finished_picture_and_goes_on() -> None:
    once, twice = sampler(steps=6), sampler(steps=6, double_sampling=4)
    seen = []
    drawn = twice.draw(0, [0], [1], device=CPU, callback=lambda step, t, x_t, prediction: seen.append((step, t, x_t)))
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4, 5, 4, 5]
    finished = once.draw(0, [0], [1], device=CPU)
    _, t, x_t = seen[6]
    alpha, sigma = twice.process.schedule.level(t)
    noise = (x_t - alpha.float() * finished) / sigma.float()
    assert abs(float(noise.std()) - 1) < 0.3 and not torch.equal(drawn, finished)
    assert not torch.allclose(noise, noise_of(0, [0], SHAPE), atol=1e-3), "new noise"


def test_a_given_picture_is_started_from_and_kept_where_the_mask_is_black() -> None:
    picture, drawn = torch.linspace(-0.9, 0.9, 64).reshape(SHAPE), sampler("ddim", steps=10, eta=1.0)
    near = drawn.draw(0, [0], [1], device=CPU, edit=Edit(picture, start_at=9))
    far = drawn.draw(0, [0], [1], device=CPU, edit=Edit(picture, start_at=2))
    assert (near[0] - picture).norm() < (far[0] - picture).norm()
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 5:] = 1
    for resamplings in (1, 3):
        filled = drawn.draw(0, [0, 1], [1, 2], device=CPU, edit=Edit(picture, mask=mask, resamplings=resamplings))
        torch.testing.assert_close(filled[:, :, :, :5], picture[:, :, :5].expand(2, -1, -1, -1))
        assert (filled[:, :, :, 5:] - picture[:, :, 5:]).abs().max() > 0.1 and not torch.equal(filled[0], filled[1])
        again = drawn.draw(0, [1], [2], device=CPU, batch_size=2, edit=Edit(picture, mask=mask, resamplings=resamplings))
        torch.testing.assert_close(again[0], filled[1], rtol=1e-4, atol=1e-4)


def test_stopping_early_keeps_what_the_mask_keeps() -> None:
    picture, mask = torch.full(SHAPE, 0.3), torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    drawn = sampler(steps=6, stop_at=3).draw(0, [0], [1], device=CPU, edit=Edit(picture, mask=mask))
    assert bool((drawn[0, :, 4:] == picture[:, 4:]).all()) and not torch.allclose(drawn[0, :, :4], picture[:, :4], atol=0.01)
    with pytest.raises(UserError, match="start_at 3 is not before stop_at 3"):
        sampler(steps=6, stop_at=3).draw(0, [0], [1], device=CPU, edit=Edit(picture, start_at=3))
    with pytest.raises(UserError, match="dpmpp_2m remembers the step before"):
        sampler("dpmpp_2m").draw(0, [0], [1], device=CPU, edit=Edit(picture, mask=mask))


def test_resampling_makes_what_is_drawn_agree_with_what_is_kept() -> None:
    """Two pixels of a Gaussian with correlation 0.9; the first is known. The mean of the second is 0.9 times it; without
    resampling it lags behind (Fig. 3, Lugmayr et al. 2022)."""
    covariance = torch.tensor([[0.25, 0.225], [0.225, 0.25]])
    process = build_process(validate(ProcessConfig, {"schedule": {"kind": "cosine", "steps": 200}, "target": "x0"}))

    def best(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha, sigma = process.schedule.level(time[:1].double())
        total = alpha.float() ** 2 * covariance + sigma.float() ** 2 * torch.eye(2)
        return (x.flatten(1) @ torch.linalg.solve(total, alpha.float() * covariance)).reshape(x.shape)

    means = []
    for resamplings in (1, 10):
        spec = SamplerConfig(solver="ancestral", steps=40)
        drawn = Sampler(best, process, spec, shape=(1, 1, 2), num_classes=None, clip_x0=None)
        edit = Edit(torch.tensor([[[0.4, 0.0]]]), mask=torch.tensor([[[0.0, 1.0]]]), resamplings=resamplings)
        found = drawn.draw(0, range(600), None, device=CPU, edit=edit)
        assert bool((found[:, 0, 0, 0] == 0.4).all())
        means.append(float(found[:, 0, 0, 1].mean()))
    assert means[0] < 0.3 and means[1] == pytest.approx(0.36, abs=0.05)


class Brightness:
    """A classifier of two classes, dark and bright, on its own schedule."""

    schedule = build_process(validate(ProcessConfig, {"schedule": {"kind": "linear", "steps": 80}, "target": "v"})).schedule

    def logits(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mean = x_t.mean((1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


@pytest.mark.parametrize("solver", ["ddim", "ancestral", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("num_classes", [None, 2])
def test_a_classifier_guides_networks_with_classes_and_without(solver: str, num_classes: int | None) -> None:
    means = {}
    for scale, levels in ((0.0, None), (200.0, None), (200.0, [1e6, 2e6])):
        drawn = sampler(
            solver, num_classes=num_classes, steps=8, guidance=scale, guidance_method="classifier", classifier=Brightness(),
            **({"guidance_interval": levels} if levels else {}),
        )  # fmt: skip
        means[scale, levels is None] = drawn.draw(0, range(4), [0, 0, 1, 1], device=CPU).mean((1, 2, 3))
    shift = means[200.0, True] - means[0.0, True]
    assert bool((shift[:2] < -0.01).all()) and bool((shift[2:] > 0.01).all())
    torch.testing.assert_close(means[200.0, False], means[0.0, True])


def test_a_classifier_shifts_eps_of_the_clipped_estimate() -> None:
    """In guided-diffusion's order: clip x0, take its eps, subtract sigma times the gradient; then, which it does not, clip the
    x0 of that. Ancestral sampling moves the mean by variance times gradient instead."""
    guided = {"guidance": 300.0, "guidance_method": "classifier", "classifier": Brightness(), "num_classes": None}
    x, labels = noise_of(5, range(2), SHAPE), torch.tensor([0, 1])
    drawn = sampler("ddim", steps=4, **guided)
    schedule, (t, s) = drawn.process.schedule, drawn.times[1:3]
    (alpha, sigma), (alpha_s, sigma_s) = (map(float, schedule.level(at)) for at in (t, s))
    gradient = drawn._gradient(labels)
    assert gradient is not None
    with torch.no_grad():
        plain = drawn.process.denoiser(drawn.network)(x, t)
        assert plain.x0.abs().max() > 1, "there is something to clip"
        eps = (x - alpha * plain.x0.clamp(-1, 1)) / sigma - sigma * gradient(x, t)
        shifted = (x - sigma * eps) / alpha
        assert shifted.abs().max() > 1, "and again"
        x0 = shifted.clamp(-1, 1)
        wanted = alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma
        denoiser = drawn._denoiser(labels, gradient, None)
        torch.testing.assert_close(euler(denoiser, x, drawn.times[1:3], schedule), wanted, rtol=1e-4, atol=1e-4)

        chain = sampler("ancestral", steps=4, **guided)
        chain.network = drawn.network
        way = chain._trajectory(labels, 0, range(2), None, None)
        way.noise = lambda step, like, sweep=0: torch.zeros_like(like)
        steps = transitions(schedule, drawn.times)
        mean = steps.mean(1, plain.x0.clamp(-1, 1), x)
        wanted = mean + float(steps.beta[1]) * gradient(x, t)
        torch.testing.assert_close(way._solve(x, 1, 2), wanted, rtol=1e-4, atol=1e-4)


def test_sections_and_dynamic_thresholds() -> None:
    sections = sampler(steps=[4, 3, 2])
    assert sections.steps == 9 and len(sections.times) == 10 and describe(sections, 0)["steps"] == [4, 3, 2]
    held = sampler(threshold=0.5).draw(0, [0], [1], device=CPU)
    assert held.abs().max() <= 1.001


def test_guidance_pulls_towards_the_class() -> None:
    plain, strong = sampler(guidance=1.0), sampler(guidance=4.0)
    null = plain.draw(0, [0], [3], device=CPU)
    one, four = plain.draw(0, [0], [1], device=CPU), strong.draw(0, [0], [1], device=CPU)
    assert (four - null).norm() > (one - null).norm() > 0


def test_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="has no classes"):
        sampler(num_classes=None, guidance=2.0)
    with pytest.raises(UserError, match="eta belongs to"):
        sampler("euler", eta=0.5)
    with pytest.raises(UserError, match="more than the schedule's 50"):
        sampler(steps=51)
    for options, said in (
        ({"stop_at": 4}, "leaves none out"), ({"double_sampling": 4}, "none to do again"),
        ({"stop_at": 2, "double_sampling": 2}, "do not go together"), ({"guidance_interval": [0, 1]}, "no guidance to hold"),
        ({"guidance": 2, "guidance_interval": [2, 1]}, "the lower one first"),
        ({"guidance": 2, "guidance_method": "classifier"}, "guidance by a classifier needs one"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            sampler(**options)
    assert random_labels(0, range(1000), 4).count(2) > 180
    assert (columns_for(16), columns_for(100, 10), columns_for(1)) == (4, 10, 1)


# ---------------------------------------------------------------------------------------------- opening


def test_a_run_a_checkpoint_a_final_folder_and_an_export_are_the_same(smoke_run: Path, tmp_path: Path) -> None:
    shutil.copytree(smoke_run / "final", tmp_path / "moved")
    export = next((smoke_run.parent / "models").glob("ckpt_epoch4_ddpm.pt"))
    pictures = []
    for path in (smoke_run, smoke_run / "checkpoints" / "step_00000030", tmp_path / "moved", export):
        opened = open_trained(path, CPU)
        assert opened.class_names == ("circle", "cross", "square", "triangle") and opened.step == 30
        drawn = build_sampler(opened, SamplerConfig(steps=3))
        pictures.append(drawn.draw(0, [0, 1], opened.labels("cross/0", 2), device=CPU))
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


def test_classes_by_name_and_number_in_equal_blocks(smoke_run: Path) -> None:
    opened = open_trained(smoke_run, CPU)
    assert opened.labels("square/0/triangle", 6) == [2, 2, 0, 0, 3, 3]
    with pytest.raises(UserError, match="'hexagon' is not known; the classes are: circle, cross"):
        opened.labels("hexagon", 4)
    with pytest.raises(UserError, match="'4' is not known"):
        opened.labels("4", 4)
    with pytest.raises(UserError, match="16 pictures cannot be dealt to 3 classes in equal blocks; ask for 15 or 18"):
        opened.labels("0/1/2", 16)


def spoil(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 255
    (folder / name).write_bytes(content)


def test_what_cannot_be_opened(smoke_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run or checkpoint"):
        open_trained(tmp_path / "none", CPU)
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_trained(tmp_path, CPU)
    shutil.copytree(smoke_run / "final", tmp_path / "final")
    spoil(tmp_path / "final", "ema.safetensors")
    with pytest.raises(UserError, match="ema.safetensors is damaged"):
        open_trained(tmp_path / "final", CPU)
    export = next((smoke_run.parent / "models").iterdir())
    (tmp_path / "cut.pt").write_bytes(export.read_bytes()[:2000])
    with pytest.raises(UserError, match="damaged or no export"):
        open_trained(tmp_path / "cut.pt", CPU)
    found = torch.load(export, weights_only=True)
    found["config"]["model"]["base_channels"] = 24
    torch.save(found, tmp_path / "other.pt")
    with pytest.raises(UserError, match="another architecture"):
        open_trained(tmp_path / "other.pt", CPU)


# ---------------------------------------------------------------------------------------------- files


def draw_files(run: Path, out: Path, *, count: int = 7, world: int = 1, frames: bool = False, seed: int = 0) -> list[Path]:
    opened = open_trained(run, CPU)
    drawn = build_sampler(opened, SamplerConfig(steps=3, guidance=2.0))
    paths: list[Path] = []
    for rank in reversed(range(world)):  # the first rank last: it waits for the others' files
        labels = [i * 3 // count for i in range(count)]
        paths = write_samples(
            opened, drawn, out, count=count, batch_size=3, labels=labels, seed=seed, frames=frames,
            device=CPU, rank=rank, world=world, barrier=lambda: out.mkdir(exist_ok=True),
        )  # fmt: skip
    return paths


def test_a_killed_sampling_goes_on_and_gives_the_same_files(smoke_run: Path, tmp_path: Path) -> None:
    paths = draw_files(smoke_run, tmp_path / "out")
    whole = [path.read_bytes() for path in paths]
    kept = paths[0].stat().st_mtime_ns
    for lost in (paths[1], paths[4], paths[5]):
        lost.unlink()
    draw_files(smoke_run, tmp_path / "out")
    assert [path.read_bytes() for path in paths] == whole
    assert paths[0].stat().st_mtime_ns == kept, "what was there is not written again"
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["num_samples"] == 7 and metadata["seed"] == 0 and metadata["classes"][0] == "circle"
    assert metadata["guidance"] == 2.0 and metadata["config"]["name"] == "smoke_ddpm" and len(metadata["weights"]) == 64
    with pytest.raises(UserError, match="holds other pictures"):
        draw_files(smoke_run, tmp_path / "out", seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds other pictures"):
        draw_files(smoke_run, tmp_path / "other")


def test_frames_have_one_size_and_their_images_one_height() -> None:
    sampler: Any = SimpleNamespace(steps=50)
    way, black = Frames([0], sampler, note="a_long_name_of_a_run-with_parts"), np.zeros((1, 16, 16, 3), np.uint8)
    seen = [way._sheet(step, black, black) for step in (0, 7, 10, 50)]
    assert len({sheet.size for sheet in seen}) == 1
    pixels = np.asarray(seen[0].convert("L"))
    assert (pixels[-68:-4, 4:68] == 0).all() and (pixels[-68:-4, 76:140] == 0).all(), "side by side"


def test_frames_and_gif(smoke_run: Path, tmp_path: Path) -> None:
    draw_files(smoke_run, tmp_path / "out", frames=True)
    frames = sorted((tmp_path / "out" / "frames").iterdir())
    assert [frame.name for frame in frames] == [f"frame_{i:03d}.png" for i in range(4)]
    with Image.open(tmp_path / "out" / "denoising.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 4
    with Image.open(frames[-1]) as last:
        left, right = np.split(np.asarray(last.convert("RGB"))[22:], 2, axis=1)  # below the titles
        assert np.array_equal(left, right), "at the end x_t is the estimate of x_0"
    with Image.open(frames[0]) as first:
        left, right = np.split(np.asarray(first.convert("RGB"))[22:], 2, axis=1)
        assert not np.array_equal(left, right)


def test_frames_keep_both_ends_of_a_long_way() -> None:
    frames = Frames([0], sampler(steps=50), most=10)
    assert len(frames.keep) == 10 and {0, 49} <= frames.keep


def test_one_process_and_two_write_the_same_files(smoke_run: Path, tmp_path: Path) -> None:
    arguments = ["sample.py", smoke_run, "--num-samples", "10", "--batch-size", "4", "--steps", "4", "--guidance", "2"]
    one = launch(*arguments, "--out", tmp_path / "one")
    two = launch(*arguments, "--out", tmp_path / "two", processes=2)
    assert one.status == two.status == 0, one.all + two.all
    assert "1 process(es)" in one.out and two.out.count("2 process(es)") == 1, "there were two, and one of them spoke"
    names = sorted(path.name for path in (tmp_path / "one").glob("0*.png"))
    assert len(names) == 10
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "two" / "grid.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--classes", "hexagon"], "the classes are: circle"),
        (["--eta", "0.5", "--solver", "heun"], "eta belongs to the solver ddim"),
        (["--steps", "1000"], "more than the schedule's 100"),
        (["--num-samples", "0"], "at least 1"),
        (["--device", "toaster"], "--device toaster cannot be used"),
    ],
)
def test_mistakes_of_sample_py(smoke_run: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in one_line(here("sample.py", smoke_run, "--out", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- where they go


def test_the_name_of_a_run_is_that_of_its_directory(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "a_b"
    for place in ("", "checkpoints/step_00000010", "final", "ema/width_0.05", "ema/step_00000020"):
        assert run_name(run / place) == "a_b"
    run.mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to(run)
    (run / "ckpt_epoch3_ddpm.pt").touch()
    assert (
        run_name(tmp_path / "runs" / "latest" / "final") == "a_b"
        and run_name(run / "ckpt_epoch3_ddpm.pt") == "ckpt_epoch3_ddpm"
    )
    monkeypatch.chdir(run)
    assert run_name(".") == run_name("final") == "a_b" and run_name("imported/model") == "model"


def test_two_runs_of_one_config_do_not_mix(smoke_run: Path, tmp_path: Path) -> None:
    for name in ("a_b", "c d"):
        shutil.copytree(smoke_run / "final", tmp_path / "runs" / name / "final")
    words = ("--steps", "1", "--num-samples", "2")
    for place in ("runs/a_b", "runs/c d/final"):
        assert here("sample.py", place, *words, cwd=tmp_path).status == 0
        few = ("--num-samples", "12", "--num-images", "12", "--steps", "1", "--features", "random")
        assert here("evaluate.py", place, *few, cwd=tmp_path).status == 0
    for folder in ("samples", "evaluations"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["a_b", "c d"]
    run_here("interpolate", "runs/a_b", "--steps", "1", "--num-seeds", "2", "--frames-between", "1", cwd=tmp_path)
    assert list((tmp_path / "samples" / "a_b").glob("interpolation_*"))


@pytest.mark.parametrize(("classes", "count"), [("0/1/2", 18), ("0", 16), ("0/1/2/3/0/1/2", 21), (None, 16)])
def test_the_default_count_is_dealt_to_any_number_of_classes(
    classes: str | None, count: int, smoke_run: Path, tmp_path: Path
) -> None:
    asked = ("--classes", classes) if classes is not None else ()
    done = here("sample.py", smoke_run, "--steps", "1", *asked, "--out", tmp_path / "out")
    assert done.status == 0 and done.out.startswith(f"{count} pictures of"), done.all
    assert len(list((tmp_path / "out").glob("0*.png"))) == count


def test_keys_by_default_are_dealt_too(smoke_run: Path, tmp_path: Path) -> None:
    words = ("--steps", "1", "--frames-between", "1", "--out", tmp_path / "out", "--classes", "0/1/2")
    done = here("interpolate.py", smoke_run, *words)
    assert done.status == 0 and "through 6 keys" in done.out, done.all
    assert "4 pictures cannot be dealt to 3 classes" in refused("interpolate", smoke_run, *words, "--num-seeds", "4")
