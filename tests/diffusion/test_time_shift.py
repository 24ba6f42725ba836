"""The time shift: its equation, entries of tables, training times, and what samplers do with it."""

from typing import Any

import pytest
import torch

from src.config import UserError, dump, validate
from src.diffusion import SOLVERS, BlendSchedule, ProcessConfig, TableSchedule, TimeShift, build_process, shift_times, times
from src.diffusion.schedules import SPACINGS, Schedule
from src.diffusion.time_shift import draw_shifted_times, shift
from src.sampling import Sampler, SamplerConfig
from src.sampling.sampler import describe
from src.training.config import PairsConfig, PathPreviewConfig

FACTORS = (1e-3, 0.25, 0.9, 1.0, 1.1, 3.0, 14.0, 1e3)
TABLES = {
    "linear": {"kind": "linear"},
    "rescaled": {"kind": "linear", "rescale_betas": True},
    "quadratic": {"kind": "quadratic"},
    "sigmoid": {"kind": "sigmoid"},
    "cosine": {"kind": "cosine"},
    "zero": {"kind": "cosine", "zero_terminal_snr": True},
}
U = torch.linspace(0, 1, 1001, dtype=torch.float64)


def table(name: str = "linear", steps: int = 100) -> TableSchedule:
    spec = {"schedule": TABLES[name] | {"steps": steps}, "target": "v"}
    schedule = build_process(validate(ProcessConfig, spec)).schedule
    assert isinstance(schedule, TableSchedule)
    return schedule


def u_of(schedule: Schedule, t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = schedule.level(t)
    return sigma / (alpha + sigma)


# ---------------------------------------------------------------------------------------------- the equation


@pytest.mark.parametrize("s", FACTORS)
def test_the_equation_its_inverse_and_its_ends(s: float) -> None:
    shifted = shift(U, s)
    torch.testing.assert_close(shifted, s * U / (1 + (s - 1) * U), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(shift(shifted, 1 / s), U, rtol=1e-9, atol=1e-9)
    assert shifted[0] == 0 and shifted[-1] == 1 and bool((shifted.diff() > 0).all())
    inner = slice(1, -1)
    torch.testing.assert_close(shifted[inner] / (1 - shifted[inner]), s * U[inner] / (1 - U[inner]))  # sigma / alpha
    assert bool((shifted[inner] > U[inner]).all()) == (s > 1) and torch.equal(shifted, U) == (s == 1)


def test_the_factor_is_the_root_of_the_dimensions() -> None:
    for size, s in ((32, 0.8660), (64, 1.7321), (128, 3.4641), (256, 6.9282), (512, 13.8564)):  # docs/sampling.md
        assert TimeShift(base=4096).factor(3 * size * size) == pytest.approx(s, abs=5e-5)
        assert TimeShift(base=4096).factor(4 * (size // 4) ** 2) == size / 128
    assert TimeShift(base=4096).factor(4 * 32 * 32) == 1 and TimeShift(base=4096).factor(4 * 64 * 64) == 2
    assert TimeShift(base=8).factor(2) == 0.5


# ---------------------------------------------------------------------------------------------- sampling times


@pytest.mark.parametrize("s", FACTORS)
@pytest.mark.parametrize("spacing", ["even", "dense_clean", "dense_noise"])
def test_times_of_the_blend_follow_the_equation(spacing: str, s: float) -> None:
    blend = BlendSchedule()
    before = times(blend, 16, spacing)
    after = shift_times(blend, before, s)
    torch.testing.assert_close(after, s * before / (1 + (s - 1) * before), rtol=1e-9, atol=1e-12)
    assert after[0] == 1 and after[-1] == 0 and bool((after.diff() < 0).all())
    torch.testing.assert_close(shift_times(blend, after, 1 / s), before, rtol=0, atol=1e-12)
    assert torch.equal(after, before) == (s == 1)


@pytest.mark.parametrize("name", TABLES)
def test_entries_stay_distinct_and_in_order_and_the_noisiest_stays(name: str) -> None:
    schedule = table(name)
    counts, spacings = (1, 2, 9, 33, 99, 100), [spacing for spacing in SPACINGS if spacing != "strided"]
    grids = [times(schedule, steps, spacing) for spacing in spacings for steps in counts]
    grids += [times(schedule, 20, "strided"), times(schedule, [10, 5, 3]), times(schedule, [1, 20])]
    for before in grids:
        for s in FACTORS:
            after = shift_times(schedule, before, s)
            assert after.dtype == torch.float64 and len(after) == len(before) and torch.equal(after, after.round())
            assert after[0] == before[0] and after[-1] == schedule.clean and bool((after.diff() < 0).all())
            assert after[-2] >= 0
            if s == 1 or len(before) == 101:
                assert torch.equal(after, before), "no shift, or the whole table"


@pytest.mark.parametrize("s", [0.5, 2.0, 6.0])
def test_entries_are_those_nearest_to_the_shifted_u(s: float) -> None:
    """Of a table whose last entry is pure noise, with entries enough that none falls on another."""
    schedule = table("zero", 1000)
    before = times(schedule, 12)
    u = u_of(schedule, before[:-1])
    wanted = schedule.time(s * u / (1 + (s - 1) * u)).round().clamp(min=0)
    assert len(set(wanted.tolist())) == 12
    assert torch.equal(shift_times(schedule, before, s)[:-1], wanted)


def test_u_is_measured_in_that_of_the_noisiest_entry() -> None:
    """The last entry of the linear schedule has u = 0.99. Sampling starts there from pure noise, so it is the 1 of the shift:
    no entry is pushed out of the table."""
    schedule = table("linear", 1000)
    before = times(schedule, 50)
    u = u_of(schedule, before[:-1])
    after = shift_times(schedule, before, 7.0)
    wanted = schedule.time(u[0] * shift(u / u[0], 7.0)).round()
    moved = (after[:-1] - wanted).abs()
    assert 0.98 < u[0] < 0.995 and moved.max() <= 1 and (moved == 0).sum() > 40
    assert (shift_times(schedule, before, 0.2)[:-1] < before[:-1])[1:-5].all()


# ---------------------------------------------------------------------------------------------- training times


R = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


@pytest.mark.parametrize("s", [0.3, 1.7, 7.0])
@pytest.mark.parametrize("name", TABLES)
def test_entries_are_drawn_as_often_as_the_shifted_u_lies_below_them(name: str, s: float) -> None:
    """P(entry <= k) = P(u' <= u_k), and u without the shift is at most any x with the probability (time(x) + 1) / T."""
    schedule = table(name, 40)
    drawn_entries = draw_shifted_times(schedule, R, s).long()
    shares = torch.bincount(drawn_entries, minlength=40).double() / len(R)
    u = u_of(schedule, torch.arange(40))
    below = (schedule.time(u[-1] * shift(u / u[-1], 1 / s)) + 1) / 40
    torch.testing.assert_close(shares.cumsum(0), below, rtol=0, atol=2e-5)
    assert len(shares) == 40 and bool((shares > 0).all()), "every entry is trained, the noisiest too"
    assert (float(drawn_entries.double().mean()) > 19.5) == (s > 1)


@pytest.mark.parametrize("steps", [2, 7, 40, 1000])
def test_a_shift_by_1_draws_the_same_entries(steps: int) -> None:
    for name in TABLES if steps == 40 else ("cosine",):
        process = build_process(validate(ProcessConfig, {"schedule": TABLES[name] | {"steps": steps}, "target": "v"}))
        torch.testing.assert_close(process.draw_times(R, 1.0), process.draw_times(R))
        assert process.draw_times(torch.tensor([0, 1 - 1e-16]), 3.0).tolist() == [0, steps - 1]


def test_times_of_the_blend_have_the_density_of_the_shifted_u() -> None:
    """t' <= x where t <= shift(x, 1 / s), so the density at x is s / (s + (1 - s) x)^2."""
    s = 2.5
    process = build_process(validate(ProcessConfig, {"schedule": {"kind": "blend"}, "target": "blend"}))
    sampled = process.draw_times(R, s)
    counts = torch.histc(sampled, 20, 0, 1)
    middle = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    torch.testing.assert_close(20 * counts / len(R), s / (s + (1 - s) * middle) ** 2, rtol=0.01, atol=0)
    assert float((sampled <= 0.5).double().mean()) == pytest.approx(1 / (1 + s), abs=1e-5)


# ---------------------------------------------------------------------------------------------- samplers


def sampler(
    shape: tuple[int, ...] = (3, 8, 8), schedule: dict[str, Any] | None = None, truth: torch.Tensor | None = None, **spec: Any
) -> Sampler:
    process = {"schedule": schedule or {"kind": "cosine", "steps": 50}, "target": "x0"}

    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return truth if truth is not None else x

    built = build_process(validate(ProcessConfig, process))
    return Sampler(network, built, validate(SamplerConfig, spec), shape=shape, num_classes=None)


@pytest.mark.parametrize("solver", [*SOLVERS, "ddim with eta"])
def test_every_solver_reaches_the_data_along_shifted_times(solver: str) -> None:
    truth = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    name, _, eta = solver.partition(" with ")
    for schedule in ({"kind": "linear", "steps": 50, "rescale_betas": True}, {"kind": "blend"}):
        if schedule["kind"] == "blend" and name == "ancestral":
            continue
        options = {"solver": name, "steps": 10, "shift": {"base": 4}} | ({"eta": 1.0} if eta else {})
        tested = sampler((3, 4, 4), schedule, truth, **options)
        assert not torch.equal(tested.times, times(tested.process.schedule, 10))
        x0 = tested.draw(0, [0], None, device=torch.device("cpu"))
        torch.testing.assert_close(x0, truth, rtol=0, atol=1e-3)


def test_a_sampler_shifts_by_its_shape() -> None:
    blend = {"kind": "blend"}
    tested = sampler((3, 8, 8), blend, steps=5, shift={"base": 48})
    plain = times(BlendSchedule(), 5)
    assert torch.equal(tested.times, shift_times(BlendSchedule(), plain, 2.0)) and tested.calls() == 5
    assert torch.equal(tested.times_for((3, 16, 16)), shift_times(BlendSchedule(), plain, 4.0))
    assert torch.equal(tested.times_for((3, 4, 4)), plain), "as many dimensions as the base"
    assert torch.equal(sampler((2,), blend, steps=5, shift={"base": 8}).times, shift_times(BlendSchedule(), plain, 0.5))
    sections = sampler(steps=[5, 3, 2], shift={"base": 48})
    assert len(set(sections.times.tolist())) == 11 and sections.steps == 10


def test_without_a_shift_all_is_as_before_it_was_there() -> None:
    for schedule in ({"kind": "cosine", "steps": 50}, {"kind": "blend"}):
        tested = sampler(schedule=schedule, steps=7)
        assert torch.equal(tested.times, times(tested.process.schedule, 7))
    assert torch.equal(sampler(schedule={"kind": "blend"}, alphas=[0, 0.5, 1]).times, torch.tensor([1, 0.5, 0]).double())
    keys = ["solver", "steps", "alphas", "spacing", "eta", "guidance", "guidance_method", "guidance_interval", "threshold"]
    keys += ["stop_at", "double_sampling"]
    assert list(dump(SamplerConfig())) == keys, "so folders of samples, sweeps and pairs have the hashes that they had"
    assert list(dump(PairsConfig(run="x"))["sampler"]) == keys
    assert list(describe(sampler(), 0)) == [*keys, "seed", "network_calls"]
    shifted = SamplerConfig(shift=TimeShift(base=48))
    assert dump(shifted)["shift"] == {"base": 48} and validate(SamplerConfig, dump(shifted)) == shifted
    assert describe(sampler(shift={"base": 48}), 0)["shift"] == {"base": 48}


def test_previews_of_blends_are_shifted() -> None:
    spec = validate(PathPreviewConfig, {"calls": [2, 5], "shift": {"base": 48}})
    assert spec.sampler_of(2) == SamplerConfig(solver="euler", steps=2, shift=TimeShift(base=48))
    assert spec.most_calls.steps == 5 and spec.most_calls.shift == TimeShift(base=48)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"alphas": [0, 0.5, 1], "shift": {"base": 48}}, "shift: alphas are the steps themselves"),
        ({"shift": {"base": 0}}, "shift.base: input should be greater than 0, not 0"),
        ({"shift": {"base": -4096}}, "shift.base: input should be greater than 0, not -4096"),
        ({"shift": {"base": 10**400}}, "shift.base: input should be less than or equal to 1000000000"),
        ({"shift": {"base": "many"}}, "shift.base: input should be a valid integer, not 'many'"),
        ({"shift": {}}, "shift.base: this key is missing"),
        ({"shift": {"base": 4096, "by": 2}}, "shift.by: unknown key"),
    ],
)
def test_shifts_that_do_not_exist(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        validate(SamplerConfig, spec)
    assert message in str(raised.value) and "\n" not in str(raised.value)
