"""Which times are trained: densities, weights, histories, checkpoints."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from src.config import UserError, config, validate
from src.diffusion import ProcessConfig, TimeShift, build_process
from src.diffusion.process import Process
from src.diffusion.weightings import LogitNormalTimes, SecondMomentTimes, TimesConfig, UniformTimes
from src.runtime.stream import plan_batch
from src.training.step_noise import LAG, StepNoise, TimeSampler


@config
class _Config:
    times: TimesConfig


U = torch.linspace(0, 1 - 1e-9, 4000, dtype=torch.float64)


def process_of(kind: str = "cosine", steps: int = 20) -> Process:
    schedule = {"kind": kind} | ({"steps": steps} if kind != "blend" else {})
    return build_process(validate(ProcessConfig, {"schedule": schedule, "target": "v"}))


def test_uniform_times_and_no_weights() -> None:
    times = TimeSampler(UniformTimes(), process_of())
    counts = torch.bincount(times.draw(U, 48).long(), minlength=20)
    assert bool((counts == 200).all()) and not times.learns
    losses = torch.rand(5)
    assert times.weigh(losses, slice(0, 5)) is losses


def test_logit_normal_times_have_the_densitys_quantiles() -> None:
    times = TimeSampler(LogitNormalTimes(kind="logit_normal", mean=0.5, std=0.8), process_of("blend"))
    sampled = times.draw(U[1:], 48)
    logit = torch.log(sampled / (1 - sampled))
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.01) and float(logit.std()) == pytest.approx(0.8, abs=0.01)
    table = TimeSampler(LogitNormalTimes(kind="logit_normal"), process_of()).draw(U, 48)
    assert set(table.tolist()) <= set(range(20)) and float((table == 10).double().mean()) > 2 * float(
        (table == 1).double().mean()
    )


def test_times_are_shifted_by_the_dimensions_of_the_step() -> None:
    """logit(u') = logit(u) + log s; without a shift the dimensions change nothing."""
    spec = LogitNormalTimes(kind="logit_normal", mean=0.5, std=0.8)
    plain, shifted = (TimeSampler(each, process_of("blend")) for each in (spec, replace(spec, shift=TimeShift(base=48))))
    for dimensions, s in ((48, 1.0), (192, 2.0), (12, 0.5)):
        sampled = shifted.draw(U[1:], dimensions)
        logit = torch.log(sampled / (1 - sampled))
        assert float(logit.mean()) == pytest.approx(0.5 + math.log(s), abs=0.01)
        assert float(logit.std()) == pytest.approx(0.8, abs=0.01)
        assert torch.equal(plain.draw(U, dimensions), plain.draw(U, 48))
    table = TimeSampler(UniformTimes(shift=TimeShift(base=48)), process_of())
    assert torch.equal(table.draw(U, 48), TimeSampler(UniformTimes(), process_of()).draw(U, 48))
    assert torch.equal(table.draw(U, 192), process_of().draw_times(U, 2.0))


def test_a_step_of_larger_images_has_later_times_of_the_same_numbers() -> None:
    times = TimeSampler(UniformTimes(shift=TimeShift(base=48)), process_of("blend"))
    cfg: Any = SimpleNamespace(seed=3, label_dropout=0.25, dtype="float32")

    def draw(shape: tuple[int, ...]) -> StepNoise:
        return StepNoise(cfg, times, plan_batch(64, 16, rank=0, world=1), shape, 7, torch.device("cpu"))

    small, wide, points = draw((3, 4, 4)), draw((3, 8, 32)), draw((2,))
    torch.testing.assert_close(wide.t, 4 * small.t / (1 + 3 * small.t))
    assert bool((points.t < small.t).all()) and torch.equal(small.dropped, wide.dropped)


def test_what_learns_its_times_takes_no_shift() -> None:
    for kind in ("uniform", "logit_normal"):
        spec = {"kind": kind, "shift": {"base": 4096}}
        assert validate(_Config, {"times": spec}).times.shift == TimeShift(base=4096)
        with pytest.raises(UserError, match="times.shift.base: input should be greater than 0, not 0"):
            validate(_Config, {"times": {"kind": kind, "shift": {"base": 0}}})
    with pytest.raises(UserError, match="times.shift: second_moment learns how often each time is drawn") as raised:
        validate(_Config, {"times": {"kind": "second_moment", "shift": {"base": 4096}}})
    assert "\n" not in str(raised.value)
    unset = validate(_Config, {"times": {"kind": "second_moment", "shift": None}})
    assert unset.times == SecondMomentTimes(kind="second_moment")


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
        t = times.draw(u, 48)
        assert bool((t == torch.arange(4).repeat_interleave(4)).all()), "uniform until each entry has its history"
        assert times.probabilities() is None
        observe(times, accelerator, value[t.long()])
    times.draw(u, 48)
    chances = times.probabilities()
    assert chances is not None
    np.testing.assert_allclose(chances, 0.9 * value.numpy() / 16 + 0.1 / 4)
    sampled = times.draw(U, 48)
    assert float((sampled == 3).double().mean()) == pytest.approx(float(chances[3]), abs=0.001)
    weighted = times.weigh(value[sampled.long()], slice(0, len(U)))
    assert float(weighted.mean()) == pytest.approx(4.0, rel=0.002), "the mean over uniform times"
    assert float(weighted.std()) < 0.4 * float(value.std()), "which now varies less"


def test_old_losses_leave_and_what_is_not_finite_never_enters() -> None:
    accelerator = Accelerator(cpu=True)
    times = TimeSampler(SecondMomentTimes(kind="second_moment", history=2, uniform_share=0.0), process_of(steps=2))
    u = torch.tensor([0.2, 0.7], dtype=torch.float64)
    for losses in ([1, 1], [1, 1], [3, math.nan], [4, 5], [9, 9], [9, 9]):
        times.draw(u, 48)
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
        t = whole.draw(u, 48)
        observe(whole, accelerator, losses * (t + 1))
        if step >= 17:
            assert torch.equal(resumed.draw(u, 48), t)
            observe(resumed, accelerator, losses * (t + 1))
    assert whole.probabilities() is not None


def test_the_blend_has_no_history() -> None:
    with pytest.raises(UserError, match="the blend has none"):
        TimeSampler(SecondMomentTimes(kind="second_moment"), process_of("blend"))
