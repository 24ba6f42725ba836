"""Samplers against closed forms (data that is one Gaussian) and, step by step, against diffusers."""

import argparse
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.config import UserError, json_schema, validate
from src.diffusion import (
    SOLVERS,
    BlendSchedule,
    Prediction,
    Process,
    TableSchedule,
    ancestral,
    classifier_free,
    clip,
    ddim,
    dpmpp_2m,
    euler,
    invertible_solvers,
    log_variance,
    register_solver,
    times,
    transitions,
)
from src.diffusion.process import Denoiser
from src.diffusion.schedules import BetaSchedule, CosineSchedule, Schedule, like
from src.diffusion.solvers import Noise
from src.runtime.seeds import noise_of
from src.sampling import Sampler, SamplerConfig
from src.sampling.config import add_arguments, sampler_config

DETERMINISTIC = {name: solver.function for name, solver in SOLVERS.items() if not (solver.stochastic or solver.takes("eta"))}
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.6, 0.3], [0.3, 0.4]], dtype=torch.float64)


def gaussian(schedule: Schedule) -> Denoiser:
    """The optimal denoiser of N(MEAN, COVARIANCE): E[x0 | x_t] = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha m)."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.level(t)
        total = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
        pull = alpha * COVARIANCE @ torch.linalg.inv(total)
        off = x_t - alpha * MEAN
        x0 = MEAN + off @ pull.T
        eps = off @ (sigma * torch.linalg.inv(total)).T  # E[eps | x_t], finite at sigma = 0 too
        return Prediction(x0, eps)

    return denoise


def cosine(steps: int = 1000) -> TableSchedule:
    return TableSchedule(CosineSchedule(kind="cosine", steps=steps).betas())


def affine(sample: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The mean and covariance that a deterministic sampler of a Gaussian gives: it is an affine map of its noise."""
    out = sample(torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.float64))
    matrix = (out[1:] - out[0]).T
    return out[0], matrix @ matrix.T


@pytest.mark.parametrize("name", list(DETERMINISTIC))
@pytest.mark.parametrize("schedule", [cosine(), BlendSchedule()], ids=["table", "blend"])
def test_a_gaussian_is_recovered(name: str, schedule: TableSchedule | BlendSchedule) -> None:
    grid = times(schedule, 500)
    mean, covariance = affine(lambda x: DETERMINISTIC[name](gaussian(schedule), x, grid, schedule))
    accuracy = 2e-3 if name in ("midpoint", "heun", "rk4", "dpmpp_2m") else 1e-2  # of order 2 or more
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=accuracy)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=accuracy)


@pytest.mark.parametrize("how", ["small", "large", "eta 1", "eta 0.5"])
def test_a_gaussian_is_recovered_by_chance_too(how: str) -> None:
    schedule = cosine(400)
    generator = torch.Generator().manual_seed(0)

    def noise(step: int, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    x = torch.randn(40_000, 2, generator=generator, dtype=torch.float64)
    grid = times(schedule, 400)
    if how.startswith("eta"):
        out = ddim(gaussian(schedule), x, grid, schedule, noise=noise, eta=float(how[4:]))
    else:
        out = ancestral(gaussian(schedule), x, grid, schedule, noise=noise, variance=how)
    torch.testing.assert_close(out.mean(0), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(out.T), COVARIANCE, rtol=0, atol=0.025)


@pytest.mark.parametrize("schedule", [BlendSchedule(), cosine()], ids=["blend", "table"])
def test_orders_of_convergence(schedule: TableSchedule | BlendSchedule) -> None:
    """On u from 0.95 to 0.05, for data that is two Gaussians (for one, midpoint happens to be of order 3)."""
    centres, s = torch.tensor([-0.9, 0.7], dtype=torch.float64), 0.4

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.level(t)
        total = alpha**2 * s**2 + sigma**2
        off = x_t - alpha * centres  # (N, 2)
        weight = (-(off**2) / (2 * total)).softmax(1)
        x0 = (weight * (centres + alpha * s**2 / total * off)).sum(1, keepdim=True)
        eps = (weight * (sigma / total * off)).sum(1, keepdim=True)
        return Prediction(x0, eps)

    def solve(solver: Callable[..., Tensor], steps: int) -> Tensor:
        grid = schedule.time(torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64))
        alpha, sigma = schedule.level(grid)
        x = torch.tensor([[1.3], [-0.4], [0.1]], dtype=torch.float64)
        return solver(denoise, x * like(alpha[0] + sigma[0], x), grid, schedule)

    exact = solve(DETERMINISTIC["rk4"], 2048)
    for name, order in (("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)):
        before, after = (float((solve(DETERMINISTIC[name], steps) - exact).abs().max()) for steps in (256, 512))
        assert math.log2(before / after) == pytest.approx(order, abs=0.15), (name, before, after)


def random_denoiser(schedule: Schedule, calls: list[float] | None = None) -> Denoiser:
    """An arbitrary, smooth network that predicts eps."""
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        if calls is not None:
            calls.append(float(t))
        eps = torch.tanh(x_t @ weight.to(x_t) + float(t) / 1000)
        alpha, sigma = schedule.level(t)
        return Prediction((x_t - like(sigma, x_t) * eps) / like(alpha, x_t), eps)

    return denoise


def linear_schedule() -> TableSchedule:
    return TableSchedule(BetaSchedule(kind="linear").betas())


def walk(scheduler: object, x: Tensor, ours: Denoiser, **step: object) -> Tensor:
    for t in scheduler.timesteps:  # pyright: ignore[reportAttributeAccessIssue]
        eps = ours(x, t).eps
        x = scheduler.step(eps, t, x, **step).prev_sample  # pyright: ignore[reportAttributeAccessIssue]
    return x


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_is_diffusers_ddpm(variance: str) -> None:
    from diffusers import DDPMScheduler

    schedule = linear_schedule()
    theirs = DDPMScheduler(variance_type=f"fixed_{variance}", clip_sample=False, timestep_spacing="leading")
    theirs.set_timesteps(50)
    x = torch.randn(4, 8)
    reference = walk(theirs, x, random_denoiser(schedule), generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    ours = ancestral(
        random_denoiser(schedule),
        x,
        times(schedule, 50, "strided"),
        schedule,
        noise=lambda step, like: torch.randn(like.shape, generator=generator),
        variance=variance,
    )
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_is_diffusers_ddim(eta: float) -> None:
    from diffusers import DDIMScheduler

    schedule = linear_schedule()
    theirs = DDIMScheduler(clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True)
    theirs.set_timesteps(20)
    x = torch.randn(4, 8)
    reference = walk(theirs, x, random_denoiser(schedule), eta=eta, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    ours = ddim(
        random_denoiser(schedule),
        x,
        times(schedule, 20, "strided"),
        schedule,
        noise=lambda step, like: torch.randn(like.shape, generator=generator),
        eta=eta,
    )
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    if eta == 0:
        torch.testing.assert_close(euler(random_denoiser(schedule), x, times(schedule, 20, "strided"), schedule), ours)


def test_dpmpp_2m_is_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    schedule = linear_schedule()
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=False,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        beta_start=1e-4,
        beta_end=0.02,
    )
    theirs.set_timesteps(20)
    x = torch.randn(4, 8)
    reference = walk(theirs, x, random_denoiser(schedule))
    ours = dpmpp_2m(random_denoiser(schedule), x, times(schedule, 20, "trailing"), schedule)
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-3)


def test_dpmpp_2m_starts_where_alpha_is_zero() -> None:
    schedule = BlendSchedule()
    out = dpmpp_2m(gaussian(schedule), torch.randn(5, 2, dtype=torch.float64), times(schedule, 10), schedule)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("name", list(DETERMINISTIC))
def test_a_table_is_never_called_at_or_below_its_clean_level(name: str) -> None:
    schedule = linear_schedule()
    calls: list[float] = []
    DETERMINISTIC[name](random_denoiser(schedule, calls), torch.randn(2, 8), times(schedule, 5), schedule)
    assert min(calls) >= 0 and max(calls) == 999
    assert len(calls) == 4 * SOLVERS[name].calls_per_step + 1


def test_blend_is_not_called_at_zero_where_its_target_is_singular() -> None:
    for allowed in (True, False):
        schedule = BlendSchedule(network_at_clean=allowed)
        calls: list[float] = []

        def denoise(x_t: Tensor, t: Tensor, calls: list[float] = calls) -> Prediction:
            calls.append(float(t))
            return Prediction(x_t, x_t)

        DETERMINISTIC["heun"](denoise, torch.randn(1, 2), times(schedule, 3), schedule)
        assert (0.0 in calls) == allowed


@pytest.mark.parametrize("name", [*DETERMINISTIC, "ddim", "ancestral"])
def test_no_solver_changes_what_it_is_given_and_all_call_back(name: str) -> None:
    schedule = linear_schedule()
    x, grid = torch.randn(3, 8), times(schedule, 4)
    before, grid_before, calls = x.clone(), grid.clone(), []

    def watch(step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        calls.append((step, float(t)))

    def noise(step: int, like: Tensor) -> Tensor:
        return torch.ones_like(like)

    if name == "ddim":
        ddim(random_denoiser(schedule), x, grid, schedule, noise=noise, eta=1.0, callback=watch)
    elif name == "ancestral":
        ancestral(random_denoiser(schedule), x, grid, schedule, noise=noise, variance="small", callback=watch)
    else:
        DETERMINISTIC[name](random_denoiser(schedule), x, grid, schedule, callback=watch)
    assert torch.equal(x, before) and torch.equal(grid, grid_before)
    assert calls == [(i, float(t)) for i, t in enumerate(grid[:-1])]


def test_transitions_of_the_full_chain_are_ddpms() -> None:
    schedule = linear_schedule()
    steps = transitions(schedule, times(schedule, 1000))
    bar = schedule.alphas_bar.flip(0)
    before = torch.cat([bar[1:], torch.ones(1, dtype=torch.float64)])
    betas = schedule.betas.flip(0)
    torch.testing.assert_close(steps.beta, betas)
    torch.testing.assert_close(steps.beta_tilde, betas * (1 - before) / (1 - bar))
    torch.testing.assert_close(steps.from_x0, betas * before.sqrt() / (1 - bar))
    torch.testing.assert_close(steps.from_x_t, (1 - betas).sqrt() * (1 - before) / (1 - bar))
    assert steps.beta_tilde[-1] == 0 and steps.log_beta_tilde[-1] == steps.log_beta_tilde[-2]


def test_variances_between_small_and_large() -> None:
    schedule = linear_schedule()
    steps = transitions(schedule, times(schedule, 10))
    for i in range(9):
        small, large = log_variance(steps, i, "small", None), log_variance(steps, i, "large", None)
        assert small < large
        learned = log_variance(steps, i, "learned", torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
        torch.testing.assert_close(learned, torch.stack([small, (small + large) / 2, large]))


def test_ancestral_adds_the_mean_shift() -> None:
    schedule = linear_schedule()
    grid = times(schedule, 2)
    shifts = []

    def shift(x_t: Tensor, t: Tensor, variance: Tensor) -> Tensor:
        shifts.append(float(variance.flatten()[0]))
        return torch.ones_like(x_t) if len(shifts) == 2 else torch.zeros_like(x_t)

    x = torch.randn(1, 8)
    plain = ancestral(random_denoiser(schedule), x, grid, schedule, noise=lambda s, z: torch.zeros_like(z), variance="small")
    moved = ancestral(
        random_denoiser(schedule),
        x,
        grid,
        schedule,
        noise=lambda s, z: torch.zeros_like(z),
        variance="small",
        mean_shift=shift,
    )
    torch.testing.assert_close(moved, plain + 1)
    assert shifts[0] == pytest.approx(float(transitions(schedule, grid).beta_tilde[0]), rel=1e-5)


def test_classifier_free_by_its_formula_with_one_call_at_scale_one() -> None:
    def constant(value: float) -> Denoiser:
        return lambda x, t: Prediction(torch.full_like(x, value), torch.full_like(x, -value))

    one, null = constant(3.0), constant(1.0)
    assert classifier_free(one, null, 1.0) is one
    guided = classifier_free(one, null, 2.5)(torch.zeros(2), torch.tensor(0.0))
    assert guided.x0.tolist() == [6.0, 6.0] and guided.eps.tolist() == [-6.0, -6.0]


def test_clipping_keeps_x_t() -> None:
    schedule = linear_schedule()
    denoise = clip(lambda x, t: Prediction(3 * x, x), schedule, -1.0, 1.0)
    x_t, t = torch.randn(6, 8), torch.tensor(400.0)
    prediction = denoise(x_t, t)
    alpha, sigma = schedule.level(t)
    assert prediction.x0.abs().max() <= 1
    torch.testing.assert_close(like(alpha, x_t) * prediction.x0 + like(sigma, x_t) * prediction.eps, x_t)


def test_eta_is_not_negative() -> None:
    schedule = linear_schedule()
    with pytest.raises(UserError, match="eta"):
        ddim(random_denoiser(schedule), torch.randn(1, 8), times(schedule, 2), schedule, noise=lambda s, x: x, eta=-1)


def test_the_registry_says_what_each_solver_is() -> None:
    assert list(SOLVERS) == ["euler", "midpoint", "heun", "rk4", "dpmpp_2m", "ddim", "ancestral", "redraw"]
    assert [SOLVERS[name].calls_per_step for name in SOLVERS] == [1, 2, 2, 4, 1, 1, 1, 1]
    assert invertible_solvers() == ["euler", "midpoint", "heun", "rk4", "ddim"] and SOLVERS["ddim"].inverse is euler
    assert [name for name, solver in SOLVERS.items() if solver.stochastic] == ["ancestral", "redraw"]
    assert [name for name, solver in SOLVERS.items() if solver.multistep] == ["dpmpp_2m"]
    assert [name for name, solver in SOLVERS.items() if solver.gaussian] == ["ancestral"]
    assert [name for name, solver in SOLVERS.items() if solver.takes("eta")] == ["ddim"]


def test_a_solver_that_is_registered_elsewhere_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the config, its schema, the command line and the sampler, which hands in what it takes."""
    parser = argparse.ArgumentParser()
    with pytest.raises(UserError, match="solver: 'to_noise' is not known; allowed: 'euler', .* or 'redraw'"):
        validate(SamplerConfig, {"solver": "to_noise"})

    def to_noise(denoiser: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, *, noise: Noise, callback: object) -> Tensor:
        return noise(len(times) - 2, x)

    monkeypatch.setitem(SOLVERS, "to_noise", SOLVERS["euler"])  # put back at the end
    with pytest.raises(ValueError, match="a solver to_noise is registered already"):
        register_solver()(to_noise)
    del SOLVERS["to_noise"]
    assert register_solver(calls_per_step=3, stochastic=True)(to_noise) is to_noise
    assert "to_noise" in json.loads(json_schema(SamplerConfig))["properties"]["solver"]["enum"]
    add_arguments(parser)
    spec = sampler_config(parser.parse_args(["--solver", "to_noise", "--steps", "4"]))
    process = Process(schedule=cosine(), target="v")
    sampler = Sampler(lambda x, time: x, process, spec, shape=(1, 2, 2), num_classes=None, clip_x0=None)
    assert sampler.calls() == 3 * 3 + 1, "the step into the clean level calls once"
    assert torch.equal(sampler.draw(0, [5], None, device=torch.device("cpu")), noise_of(0, [5], (1, 2, 2), 4))
    with pytest.raises(UserError, match="to_noise cannot be gone back; allowed: euler"):
        sampler.check_invertible()
