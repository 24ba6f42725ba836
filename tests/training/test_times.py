"""Which times are trained: densities, weights, histories, checkpoints."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from src.config import UserError, validate
from src.diffusion import ProcessConfig, build_process
from src.diffusion.process import Process
from src.diffusion.weightings import LogitNormalTimes, SecondMomentTimes, UniformTimes
from src.training.step_noise import LAG, TimeSampler

U = torch.linspace(0, 1 - 1e-9, 4000, dtype=torch.float64)


def process_of(kind: str = "cosine", steps: int = 20) -> Process:
    schedule = {"kind": kind} | ({"steps": steps} if kind != "blend" else {})
    return build_process(validate(ProcessConfig, {"schedule": schedule, "target": "v"}))


def test_uniform_times_and_no_weights() -> None:
    times = TimeSampler(UniformTimes(), process_of())
    counts = torch.bincount(times.draw(U).long(), minlength=20)
    assert bool((counts == 200).all()) and not times.learns
    losses = torch.rand(5)
    assert times.weigh(losses, slice(0, 5)) is losses


def test_logit_normal_times_have_the_densitys_quantiles() -> None:
    times = TimeSampler(LogitNormalTimes(kind="logit_normal", mean=0.5, std=0.8), process_of("blend"))
    sampled = times.draw(U[1:])
    logit = torch.log(sampled / (1 - sampled))
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.01) and float(logit.std()) == pytest.approx(0.8, abs=0.01)
    table = TimeSampler(LogitNormalTimes(kind="logit_normal"), process_of()).draw(U)
    assert set(table.tolist()) <= set(range(20)) and float((table == 10).double().mean()) > 2 * float(
        (table == 1).double().mean()
    )


def observe(times: TimeSampler, accelerator: Accelerator, losses: torch.Tensor) -> None:
    times.weigh(losses[: len(losses) // 2], slice(0, len(losses) // 2))
    times.weigh(losses[len(losses) // 2 :], slice(len(losses) // 2, len(losses)))
    times.observe(accelerator)


def test_the_second_moment_decides_how_often_and_weighs_back() -> None:
    """Eq. 18, Nichol & Dhariwal 2021: p_t as the root of E[L_t^2], weights 1 / (T p_t)."""
    accelerator, process = Accelerator(cpu=True), process_of(steps=4)
    times = TimeSampler(SecondMomentTimes(kind="second_moment", history=3, uniform_share=0.1), process)
    value = torch.tensor([1.0, 2.0, 3.0, 10.0])
    u = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    for _ in range(LAG):  # four losses of each a step, which count LAG steps later
        t = times.draw(u)
        assert bool((t == torch.arange(4).repeat_interleave(4)).all()), "uniform until each entry has its history"
        assert times.probabilities() is None
        observe(times, accelerator, value[t.long()])
    times.draw(u)
    chances = times.probabilities()
    assert chances is not None
    np.testing.assert_allclose(chances, 0.9 * value.numpy() / 16 + 0.1 / 4)
    sampled = times.draw(U)
    assert float((sampled == 3).double().mean()) == pytest.approx(float(chances[3]), abs=0.001)
    weighted = times.weigh(value[sampled.long()], slice(0, len(U)))
    assert float(weighted.mean()) == pytest.approx(4.0, rel=0.002), "the mean over uniform times"
    assert float(weighted.std()) < 0.4 * float(value.std()), "which now varies less"


def test_old_losses_leave_and_what_is_not_finite_never_enters() -> None:
    accelerator = Accelerator(cpu=True)
    times = TimeSampler(SecondMomentTimes(kind="second_moment", history=2, uniform_share=0.0), process_of(steps=2))
    u = torch.tensor([0.2, 0.7], dtype=torch.float64)
    for losses in ([1, 1], [1, 1], [3, math.nan], [4, 5], [9, 9], [9, 9]):
        times.draw(u)
        observe(times, accelerator, torch.tensor(losses, dtype=torch.float64))
    history = times.tensors()["history"]
    assert history.tolist() == [[3, 4], [1, 5]], "the last two steps do not count yet"


def test_a_checkpoint_keeps_what_was_learned_and_what_is_on_its_way() -> None:
    accelerator, spec = Accelerator(cpu=True), SecondMomentTimes(kind="second_moment", history=2)
    generator = torch.Generator().manual_seed(0)
    whole, resumed = TimeSampler(spec, process_of(steps=5)), TimeSampler(spec, process_of(steps=5))
    for step in range(30):
        if step == 17:
            resumed.load({name: tensor.clone() for name, tensor in whole.tensors().items()})
        u = torch.rand(8, generator=generator, dtype=torch.float64)
        losses = torch.rand(8, generator=generator, dtype=torch.float64)
        t = whole.draw(u)
        observe(whole, accelerator, losses * (t + 1))
        if step >= 17:
            assert torch.equal(resumed.draw(u), t)
            observe(resumed, accelerator, losses * (t + 1))
    assert whole.probabilities() is not None


def test_the_blend_has_no_history() -> None:
    with pytest.raises(UserError, match="the blend has none"):
        TimeSampler(SecondMomentTimes(kind="second_moment"), process_of("blend"))
