"""Autoguidance by another run: its estimate and its calls, through the scripts, and which runs do not fit."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src.config import UserError, dump, read_json, validate
from src.diffusion import Process, ProcessConfig, build_process
from src.runs.opened import Opened, Run, open_trained
from src.sampling import SamplerConfig, build_sampler
from src.sampling.autoguidance import Guide, find_guide, guided_run, make_guide, open_guide
from src.sampling.cascade import sampler_of
from src.sampling.sampler import Sampler, build_samplers, describe
from tests.conftest import SMOKE, Finished, metrics, refused, run_in_process
from tests.kills import settings
from tests.sampling.test_sampling import SHAPE, conditioned, sampler

CPU = torch.device("cpu")
BLEND = build_process(validate(ProcessConfig, {"schedule": {"kind": "blend"}, "target": "x0"}))
TABLE = build_process(validate(ProcessConfig, {"schedule": {"kind": "linear", "steps": 80}, "target": "x0"}))


def guided_by(guide: Guide, *, guidance: float = 1.0, interval: Any = None, **options: Any) -> Sampler:
    """The sampler of a U-Net of 3 classes, guided."""
    plain = sampler(**options, guidance=1.0)
    plain.spec = replace(plain.spec, guidance=guidance, guidance_interval=interval)
    settings: dict[str, Any] = {"shape": SHAPE, "num_classes": plain.num_classes, "clip_x0": plain.clip_x0, "guide": guide}
    return Sampler(plain.network, plain.process, plain.spec, **settings)


def toy(received: list[Any], process: Process = BLEND, **options: Any) -> Guide:
    """A guide along another schedule that estimates half of what it sees, and remembers what it was called with."""

    def network(x: Tensor, time: Tensor, **inputs: Any) -> Tensor:
        received.append(inputs)
        return x / 2

    return Guide(network, process, **options)


def test_a_scale_of_one_is_the_good_network_to_the_bit() -> None:
    received = list[Any]()
    plain, guided = sampler(), guided_by(toy(received, digest="d" * 64))
    images = [each.draw(0, range(3), [0, 1, 2], device=CPU) for each in (plain, guided)]
    assert torch.equal(*images) and not received and guided.calls() == plain.calls()
    assert describe(guided, 3) == describe(plain, 3) | {"guide_with": "d" * 64}


def test_the_estimate_is_that_of_the_formula_and_is_clipped() -> None:
    received, x, t = list[Any](), torch.randn(2, *SHAPE), torch.tensor(30.0)
    tested, guide = guided_by(toy(received, num_classes=3), guidance=3.0), toy([])
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        result = tested.denoiser(labels)(x, t)
        good = tested.process.denoiser(tested.network, labels=labels)(x, t).x0
    alpha, sigma = tested.process.schedule.level(t)
    bad = guide.denoiser(None, None)(x / float(alpha + sigma), sigma / (alpha + sigma)).x0  # the same level of the blend
    wanted = bad + 3 * (good - bad)
    assert wanted.abs().max() > 1, "there is something to clip"
    torch.testing.assert_close(result.x0, wanted.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert len(received) == 1 and torch.equal(received[0]["labels"], labels)


@pytest.mark.parametrize(
    ("solver", "process", "interval", "share"),
    [("ddim", BLEND, None, 1.0), ("heun", BLEND, None, 1.0), ("ancestral", BLEND, None, 1.0), ("dpmpp_2m", BLEND, None, 1.0),
     ("ddim", BLEND, (0.1, 2.0), 0.5), ("ddim", TABLE, None, 0.5)],
)  # fmt: skip
def test_calls_of_both_networks_are_counted(solver: str, process: Process, interval: Any, share: float) -> None:
    """The table of the last one ends before there is much noise: above that, the good network is alone."""
    received = list[Any]()
    tested = guided_by(toy(received, process), solver=solver, steps=6, guidance=2.0, interval=interval)
    network, called = tested.network, list[int]()
    tested.network = lambda *inputs, **labels: (called.append(1), network(*inputs, **labels))[1]
    tested.draw(0, range(2), [0, 1], device=CPU)
    assert len(called) + len(received) == tested.calls() and len(received) == pytest.approx(
        share * len(called), abs=1.1 - share
    )
    assert all(not inputs for inputs in received), "a guide without classes is given none"


def test_classes_of_the_guide_and_the_run() -> None:
    """A guide with classes is given those of the images, or no class where the run has none."""
    received = list[Any]()
    guided_by(toy(received, num_classes=4), num_classes=None, guidance=2.0).draw(0, range(2), None, device=CPU)
    assert received and all(inputs["labels"].tolist() == [4, 4] for inputs in received)
    never = toy(received, num_classes=3, guidable=False)
    guided_by(never, guidance=2.0).draw(0, range(2), [0, 1], device=CPU)
    for guided, labels in ((guided_by(never, guidance=2.0), [0, 3]), (guided_by(never, num_classes=None, guidance=2.0), None)):
        with pytest.raises(UserError, match="the guide network never learned to go without a class"):
            guided.draw(0, range(2), labels, device=CPU)
    blended = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    never.denoiser(blended, None)(torch.zeros(1, *SHAPE), torch.tensor(0.3))
    assert torch.equal(received[-1]["labels"], blended[:, :3]), "a network without a row for no class"
    with pytest.raises(UserError, match="never learned"):
        never.denoiser(torch.tensor([[0.5, 0.0, 0.0, 0.5]]), None)


def test_both_networks_draw_from_the_same_condition() -> None:
    process, spec, condition = sampler().process, SamplerConfig(steps=3, guidance=2.0), torch.randn(2, 2, 8, 8)
    received = list[Any]()
    options: dict[str, Any] = {"shape": SHAPE, "num_classes": None, "condition_guidable": True, "guide": toy(received)}
    tested = Sampler(conditioned(None), process, spec, **options)
    tested.draw(0, range(2), None, device=CPU, condition=condition)
    assert received and all(torch.equal(inputs["condition"], condition) for inputs in received)
    with pytest.raises(UserError, match="goes together neither with a classifier nor with guidance by the condition"):
        Sampler(conditioned(None), process, spec, **options, condition_guidance=2.0)
    with pytest.raises(UserError, match="goes together neither with a classifier"):
        Sampler(conditioned(None), process, SamplerConfig(guidance_method="classifier", guidance=0.0), **options)
    with pytest.raises(UserError, match="guide_with runs/small was not opened"):
        sampler(guide_with="runs/small")


# ---------------------------------------------------------------------------------------------- which runs fit


def change(opened: Opened, **keys: Any) -> Opened:
    """The run with other keys in its config."""
    return replace(opened, config={**opened.config, **keys})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run: change(run, image={**run.config["image"], "size": 32}),
            r"draws 32 px in 3 channel\(s\), and .* 16 px in 3",
        ),
        (lambda run: change(run, image={**run.config["image"], "channels": 1}), r"draws 16 px in 1 channel\(s\), and .* in 3"),
        (lambda run: change(run, image={**run.config["image"], "aspect": {}}), "draws 16 px of several shapes in 3"),
        (lambda run: replace(run, class_names=("a", "b", "c", "d")), r"knows other classes \(a, b, c, d\) than"),
        (lambda run: change(run, condition={"kind": "edges"}), r"draws from images \(kind edges, .* from no image"),
        (lambda run: change(run, low_resolution=8), r"draws from images \(kind low, .* from no image"),
        (lambda run: change(run, source={"source": "folder", "path": "x"}), "starts from another source than"),
        (
            lambda run: replace(run, facts={**run.facts, "latents": {"autoencoder": "a"}}),
            "draws other latents than .* or pixels",
        ),
        (lambda run: replace(run, factor=32), "16 px is not divisible by it"),
    ],
)
def test_a_guide_that_does_not_fit(smoke_run: Path, spoil: Callable[[Opened], Opened], message: str) -> None:
    opened = open_trained(smoke_run, CPU)
    with pytest.raises(UserError, match=message) as raised:
        make_guide(guided_run(opened), spoil(opened))
    assert "\n" not in str(raised.value)


def test_guides_that_fit(smoke_run: Path) -> None:
    """Without classes, along another schedule, of other latent facts that agree; threads stay those of the guided run."""
    opened = open_trained(smoke_run, CPU)
    guide = make_guide(guided_run(opened), change(opened, class_conditional=False))
    assert guide.num_classes is None and guide.digest == opened.digest and guide.origin == f"{smoke_run} (step 30)"
    latents = [{"autoencoder": "a", "mean": [0.1, 0.2], "std": [1.0, scale]} for scale in (1.0, 1.001, 1.1)]
    of_latents = [replace(opened, facts={**opened.facts, "latents": facts}) for facts in latents]
    assert make_guide(guided_run(of_latents[0]), of_latents[1]).guidable
    with pytest.raises(UserError, match="draws other latents"):
        make_guide(guided_run(of_latents[0]), of_latents[2])
    torch.set_num_threads(2)
    open_guide(guided_run(opened), str(smoke_run), CPU)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    one, two, plain = build_samplers(
        opened, [SamplerConfig(guidance=w, guide_with=name) for w, name in ((1.5, str(smoke_run)), (2, str(smoke_run)))]
        + [SamplerConfig()], None,
    )  # fmt: skip
    assert one.guide is two.guide and one.guide is not None and plain.guide is None
    points = Run(**{field.name: getattr(opened, field.name) for field in fields(Run)})
    with pytest.raises(UserError, match="guide_with is about images, and .* is a run of 2-D points; leave it out"):
        build_sampler(points, SamplerConfig(guide_with=str(smoke_run)))
    larger = sampler_of(opened, SamplerConfig(guidance=2, guide_with="nowhere"))
    assert larger.guide is None and not larger.spec.guided, "an upsampler is not guided by the guide of small images"


def test_a_number_is_the_width_of_an_average(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no average of the width 0.1: python posthoc_ema.py .*/run 0.1 makes it"):
        find_guide(tmp_path / "run" / "final", "0.10")
    (tmp_path / "run" / "ema" / "width_0.1").mkdir(parents=True)
    for run in ("run", "run/final", "run/checkpoints/step_00000010", "run/ema/width_0.05"):
        for width in ("0.10", ".1", 0.1):
            assert find_guide(tmp_path / run, width) == tmp_path.resolve() / "run" / "ema" / "width_0.1"
    assert find_guide(tmp_path / "run", "./0.10") == Path("0.10") and find_guide(None, "runs/small") == Path("runs/small")
    with pytest.raises(UserError, match="a run that is trained now has no post-hoc averages yet"):
        find_guide(None, 0.1)


# ---------------------------------------------------------------------------------------------- through the scripts


def sample(run: Path, out: Path, *words: str | Path) -> Finished:
    few = ("--num-samples", "2", "--batch-size", "2", "--steps", "3", "--classes", "0/2")
    return run_in_process("sample.py", run, *few, *words, "--out", out)


def read(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


def test_from_the_command_line(smoke_run: Path, tmp_path: Path) -> None:
    early = smoke_run / "checkpoints" / "step_00000010"
    for name, words in {"plain": (), "one": ("--guide-with", early), "two": ("--guide-with", early, "--guidance", "2")}.items():
        done = sample(smoke_run, tmp_path / name, *words)
        assert done.status == 0 and f"{6 if name == 'two' else 3} network calls" in done.out, done.all
        assert ("--guide-with changed nothing, since --guidance was 1" in done.out) == (name == "one")
    assert read(tmp_path / "plain") == read(tmp_path / "one") != read(tmp_path / "two")
    metadata = read_json(tmp_path / "two" / "metadata.json")
    assert metadata["guide_with"] == open_trained(early, CPU).digest and metadata["guide"] == f"{early} (step 10)"
    assert "guide_with" not in read_json(tmp_path / "plain" / "metadata.json") and "guide_with" not in dump(SamplerConfig())
    late = refused("sample", smoke_run, "--out", tmp_path / "two", "--guide-with", smoke_run, "--guidance", "2")
    assert "holds other images" in late, "another guide"
    assert "has no average of the width 0.1" in refused("sample", smoke_run, "--guide-with", "0.10")
    assert "there is no such run or checkpoint" in refused("sample", smoke_run, "--guide-with", tmp_path / "none")
    words = ("--guide-with", early, "--guidance-method", "classifier", "--guidance", "2")
    assert "goes together neither with a classifier" in refused("sample", smoke_run, *words)
    sheets = [tmp_path / "sheets" / name for name in ("plain", "guided")]
    for out, guided in zip(sheets, ((), ("--guide-with", early)), strict=True):
        words = ("--ckpt", smoke_run, "--ckpt_sampling", "--num-samples", "2", "--steps", "2", "--guidance", "2")
        assert run_in_process("ddpm_accelerate.py", *words, *guided, "--out", out).status == 0
    assert (sheets[0] / "grid.png").read_bytes() != (sheets[1] / "grid.png").read_bytes()
    walk = ("--num-seeds", "2", "--frames-between", "1", "--steps", "2", "--guidance", "2", "--guide-with", early)
    done = run_in_process("interpolate.py", smoke_run, *walk, "--out", tmp_path / "walk")
    assert done.status == 0 and "4 network calls a frame" in done.out, done.all
    assert read_json(tmp_path / "walk" / "metadata.json")["guide_with"] == metadata["guide_with"]


def test_a_sweep_of_the_scale(smoke_run: Path, tmp_path: Path) -> None:
    words = ("--features", "random", "--num-samples", "10", "--steps", "2", "--batch-size", "10", "--num-images", "10")
    early, places = smoke_run / "checkpoints" / "step_00000010", [tmp_path / "swept", tmp_path / "plain"]
    guided = ("--guide-with", early, "--sweep", "guidance=1,2")
    for place, options in zip(places, (guided, ()), strict=True):
        done = run_in_process("evaluate.py", smoke_run / "final", *words, *options, "--out", place)
        assert done.status == 0, done.all
    rows, plain = read_json(places[0] / "evaluation.json")["rows"], read_json(places[1] / "evaluation.json")
    assert [row["network_calls"] for row in rows] == [2, 4] and rows[0]["random"]["frechet"] == plain["random"]["frechet"]
    assert rows[1]["random"]["frechet"] != rows[0]["random"]["frechet"]
    other = ("--guide-with", smoke_run / "checkpoints" / "step_00000020", *guided[2:], "--out", places[0])
    assert "holds other figures" in refused("evaluate", smoke_run / "final", *words, *other)
    assert "--guide-with is about drawing samples" in refused("evaluate", tmp_path, "--guide-with", early)


def test_previews_are_guided(smoke_run: Path, tmp_path: Path) -> None:
    """What is trained stays the same; the preview and the distance of its samples change."""
    few = {"solver": "ddim", "steps": 2, "guidance": 2.0, "guide_with": str(smoke_run)}
    quality = {"every": 2, "num_samples": 10, "features": "random"}
    sets = settings(steps=2, preview__every=2, preview__quality=quality, checkpoint__every=2, log__every=2)
    for name, keys in (("plain", {**few, "guide_with": None}), ("guided", few)):
        done = run_in_process(
            "ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", tmp_path / name, *sets, *settings(preview__sampler=keys)
        )
        assert done.status == 0, done.all
    plain, guided = ((tmp_path / name) for name in ("plain", "guided"))
    assert open_trained(plain, CPU).digest == open_trained(guided, CPU).digest
    assert metrics(plain)[-1]["frechet_distance"] != metrics(guided)[-1]["frechet_distance"]
    sheet = Path("samples") / "step_00000002.png"
    assert (plain / sheet).read_bytes() != (guided / sheet).read_bytes()
    opened = open_trained(guided, CPU)
    assert opened.config["preview"]["sampler"]["guide_with"] == str(smoke_run)
    assert "guide_with" not in open_trained(plain, CPU).config["preview"]["sampler"]
    build_sampler(opened, SamplerConfig(guidance=2, guide_with=str(smoke_run)))
    refusals = {
        "draws 16 px in 3 channel(s), and this run 8 px in 3": settings(image__size=8),
        "a run that is trained now has no post-hoc averages yet": settings(preview__sampler={**few, "guide_with": 0.1}),
    }
    for message, changes in refusals.items():
        words = ("-cfg", SMOKE, "--run-dir", tmp_path / "x", *sets, *settings(preview__sampler=few), *changes)
        assert message in refused("ddpm_accelerate", *words) and not (tmp_path / "x").exists()
