"""Schedules against diffusers and the reference numbers; sampling times against published sets."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.config import UserError, validate
from src.diffusion import (
    BlendSchedule,
    Prediction,
    ProcessConfig,
    TableSchedule,
    ancestral,
    build_process,
    build_schedule,
    ddim,
    dpmpp_2m,
    times,
)
from src.diffusion.schedules import BetaSchedule, BlendScheduleConfig, CosineSchedule


def cosine_betas(steps: int) -> torch.Tensor:
    return CosineSchedule(kind="cosine", steps=steps).betas()


def linear(steps: int = 1000) -> TableSchedule:
    return TableSchedule(BetaSchedule(kind="linear", steps=steps).betas())


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("quadratic", "scaled_linear"), ("sigmoid", "sigmoid")])
def test_betas_are_those_of_diffusers(ours: str, theirs: str) -> None:
    from diffusers import DDPMScheduler

    betas = BetaSchedule(kind=ours, steps=500, beta_start=1e-4, beta_end=0.02).betas()  # pyright: ignore[reportArgumentType]
    reference = DDPMScheduler(num_train_timesteps=500, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs).betas
    torch.testing.assert_close(betas.float(), reference, rtol=1e-4, atol=1e-8)


def test_cosine_is_that_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(num_train_timesteps=300, beta_schedule="squaredcos_cap_v2").betas
    torch.testing.assert_close(cosine_betas(300).float(), reference, rtol=1e-5, atol=1e-8)
    assert cosine_betas(300).max() == 0.999


def test_schedules_of_the_reference(vectors: Path) -> None:
    reference = load_file(vectors / "schedules.safetensors")
    torch.testing.assert_close(cosine_betas(1000), reference["betas_cosine_1000"], rtol=0, atol=1e-15)
    betas = BetaSchedule(kind="linear").betas()
    torch.testing.assert_close(betas, reference["betas_linear_1000"], rtol=0, atol=1e-15)


def test_rescaled_betas_end_in_noise_with_few_steps() -> None:
    few = build_schedule(BetaSchedule(kind="linear", steps=100, rescale_betas=True))
    plain = build_schedule(BetaSchedule(kind="linear", steps=100))
    last = torch.tensor(99.0)
    assert few.level(last).alpha < 0.01 < plain.level(last).alpha
    with pytest.raises(UserError, match="between 0 and 1"):
        build_schedule(BetaSchedule(kind="linear", steps=10, rescale_betas=True))


@pytest.mark.parametrize("schedule", [linear(50), TableSchedule(cosine_betas(50)), BlendSchedule()])
def test_level_and_time_are_inverse_between_entries_too(schedule: TableSchedule | BlendSchedule) -> None:
    top = 49.0 if isinstance(schedule, TableSchedule) else 1.0
    t = torch.linspace(schedule.clean, top, 137, dtype=torch.float64)
    alpha, sigma = schedule.level(t)
    u = sigma / (alpha + sigma)
    torch.testing.assert_close(schedule.time(u), t, rtol=0, atol=1e-9)
    assert u[0] == 0 and bool((u.diff() > 0).all())
    if isinstance(schedule, TableSchedule):
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


def test_a_level_is_the_tables_at_its_entries() -> None:
    schedule = linear(20)
    alpha = schedule.level(torch.arange(20)).alpha
    torch.testing.assert_close(alpha**2, schedule.alphas_bar)
    assert schedule.level(torch.tensor(schedule.clean)) == (1, 0)
    assert alpha.dtype == torch.float64 and alpha.device.type == "cpu"
    with pytest.raises(ValueError, match="times"):
        schedule.level(torch.tensor(20))
    blend = build_schedule(BlendScheduleConfig(kind="blend")).level(torch.tensor([0.0, 0.25, 1.0]))
    assert blend.alpha.tolist() == [1, 0.75, 0] and blend.sigma.tolist() == [0, 0.25, 1]


def entries(schedule: TableSchedule, steps: int | list[int], spacing: str = "even") -> list[int]:
    levels = times(schedule, steps, spacing)
    assert levels[-1] == schedule.clean and bool((levels.diff() < 0).all()), "descending, ended by the clean level"
    return sorted(levels[:-1].long().tolist())


def test_published_respacings(vectors: Path) -> None:
    schedule = TableSchedule(cosine_betas(1000))
    for name, published in json.loads((vectors / "respacing.json").read_text()).items():
        if name.startswith("ddim"):
            ours = entries(schedule, int(name[4:]), "strided")
        else:
            counts = [int(part) for part in name.split(",")]
            ours = entries(schedule, counts if len(counts) > 1 else counts[0])
        assert ours == published, name


def test_trailing_is_that_of_diffusers() -> None:
    from diffusers import DDIMScheduler

    for steps in (7, 10, 50):
        reference = DDIMScheduler(timestep_spacing="trailing")
        reference.set_timesteps(steps)
        assert entries(linear(), steps, "trailing") == sorted(reference.timesteps.tolist())


def test_spacings() -> None:
    schedule = linear(100)
    assert entries(schedule, 1) == [99]
    assert entries(schedule, 3) == [0, 50, 99]
    assert entries(schedule, 100) == list(range(100)) == entries(schedule, 100, "dense_clean")
    clean, noise = entries(schedule, 10, "dense_clean"), entries(schedule, 10, "dense_noise")
    assert clean[0] == 0 and clean[-1] == 99 and clean[1] - clean[0] < clean[-1] - clean[-2]
    assert noise == sorted(99 - entry for entry in clean)
    for spacing in ("even", "trailing", "dense_clean", "dense_noise"):
        for steps in (1, 2, 9, 33, 99):
            assert len(set(entries(schedule, steps, spacing))) == steps
    blend = times(BlendSchedule(), 4)
    assert blend.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert times(BlendSchedule(), 2, "dense_clean").tolist() == [1, 0.25, 0]
    assert times(BlendSchedule(), 2, "dense_noise").tolist() == [1, 0.75, 0]


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [
        (0, "even", "at least 1"),
        (101, "even", "more than"),
        (30, "strided", "nearest are"),
        ([60, 10], "even", "at most 50"),
    ],
)
def test_steps_that_do_not_exist(steps: int | list[int], spacing: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        times(linear(100), steps, spacing)


def test_spacings_that_do_not_exist() -> None:
    with pytest.raises(UserError, match="allowed: even"):
        times(linear(), 10, "odd")
    with pytest.raises(UserError, match="belong to a table"):
        times(BlendSchedule(), 10, "strided")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_zero_terminal_snr_is_that_of_diffusers_and_leaves_no_signal(kind: str) -> None:
    """Alg. 1, Lin et al. 2023, arXiv:2305.08891."""
    from diffusers import DDPMScheduler

    spec = validate(ProcessConfig, {"schedule": {"kind": kind, "steps": 200, "zero_terminal_snr": True}, "target": "v"})
    schedule = build_process(spec).schedule
    assert isinstance(schedule, TableSchedule)
    named = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[kind]
    reference = DDPMScheduler(
        num_train_timesteps=200, beta_start=1e-4, beta_end=0.02, beta_schedule=named, rescale_betas_zero_snr=True
    )
    torch.testing.assert_close(schedule.alphas_bar[:-1].float(), reference.alphas_cumprod[:-1], rtol=2e-4, atol=1e-6)
    alpha, sigma = schedule.level(torch.tensor([0.0, 199.0]))
    assert float(alpha[1]) == 0 and float(sigma[1]) == 1 and float(schedule.betas[-1]) == 1
    plain = BetaSchedule(kind="linear", steps=200).betas() if kind == "linear" else cosine_betas(200)
    assert float(alpha[0] ** 2) == pytest.approx(1 - float(plain[0])), "the first level stays"
    with pytest.raises(UserError, match="'eps' cannot be read at one end of the"):
        validate(ProcessConfig, {"schedule": {"kind": kind, "steps": 200, "zero_terminal_snr": True}, "target": "eps"})


@pytest.mark.parametrize("solver", [ddim, ancestral, dpmpp_2m])
def test_solvers_start_from_a_level_without_signal(solver: Callable[..., torch.Tensor]) -> None:
    spec = {"schedule": {"kind": "cosine", "steps": 60, "zero_terminal_snr": True}, "target": "v"}
    process = build_process(validate(ProcessConfig, spec))
    truth = torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> Prediction:
        alpha, sigma = process.schedule.level(t)
        return Prediction(truth, (x_t - alpha * truth) / sigma)

    options = {} if solver is dpmpp_2m else {"noise": lambda step, like: torch.randn_like(like)}
    options |= {"variance": "large"} if solver is ancestral else {}
    x0 = solver(denoise, torch.randn(2, 1, 4, 4, dtype=torch.float64), times(process.schedule, 12), process.schedule, **options)
    torch.testing.assert_close(x0, truth)
