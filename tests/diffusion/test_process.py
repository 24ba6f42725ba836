"""The process: every target is read back, at every level, on every schedule."""

from collections.abc import Callable

import pytest
import torch

from src.config import UserError, validate
from src.diffusion import ProcessConfig, TimeInput, build_process
from src.diffusion.process import Process

SCHEDULES = [{"kind": kind, "steps": 100} for kind in ("linear", "cosine", "quadratic", "sigmoid")] + [{"kind": "blend"}]


def process_of(schedule: dict, target: str, **options: object) -> Process:
    return build_process(validate(ProcessConfig, {"schedule": schedule, "target": target, **options}))


def some_times(process: Process) -> torch.Tensor:
    return process.draw_times(torch.linspace(0.02, 0.999, 9, dtype=torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
@pytest.mark.parametrize("target", ["eps", "x0", "v", "blend"])
def test_what_was_made_is_read_back(schedule: dict, target: str) -> None:
    if schedule["kind"] == "blend" and target == "eps":
        pytest.skip("refused: see test_singular_pairs")
    process = process_of(schedule, target)
    t = some_times(process)
    x0, eps = torch.randn(2, len(t), 3, 4, 4, dtype=torch.float64)
    x_t = process.add_noise(x0, eps, t)
    read = process.read(process.make_target(x0, eps, t), x_t, t)
    torch.testing.assert_close(read.x0, x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(read.eps, eps, rtol=0, atol=1e-8)
    assert read.variance_fraction is None


def test_targets_by_their_formulas() -> None:
    x0, eps = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    for name, wanted in {
        "eps": lambda a, s: eps,
        "x0": lambda a, s: x0,
        "v": lambda a, s: a * eps - s * x0,
        "blend": lambda a, s: x0 - eps,
    }.items():
        process = process_of({"kind": "cosine"}, name)
        t = torch.tensor([400])
        alpha, sigma = process.schedule.level(t)
        torch.testing.assert_close(process.make_target(x0, eps, t), wanted(alpha, sigma))


def test_reading_is_done_in_float32_at_least() -> None:
    process = process_of({"kind": "linear"}, "v")
    y = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    read = process.read(y, torch.randn(2, 3, 4, 4, dtype=torch.bfloat16), torch.tensor([5, 900]))
    assert read.x0.dtype == read.eps.dtype == torch.float32


def test_the_learned_variance_is_the_second_half() -> None:
    process = process_of({"kind": "linear"}, "eps", variance="learned", loss={"kind": "hybrid"})
    y = torch.cat([torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)], dim=1)
    read = process.read(y, torch.randn(1, 3, 2, 2), torch.tensor([10]))
    assert read.variance_fraction is not None and bool((read.variance_fraction == 0.75).all())


def test_losses_are_per_sample_means() -> None:
    process = process_of({"kind": "linear"}, "eps")
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    t = torch.tensor([0, 10, 999])
    inputs = []

    def network(x: torch.Tensor, time: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs.append((x, time, labels))
        return torch.zeros_like(x)

    losses = process.losses(network, x0, eps, t, labels=torch.tensor([1, 2, 3]))
    torch.testing.assert_close(losses.loss, eps.square().mean((1, 2, 3)))
    x, time, labels = inputs[0]
    torch.testing.assert_close(x, process.add_noise(x0, eps, t))
    assert time.tolist() == [0, 10, 999] and time.dtype == torch.float32 and labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("schedule", "time_input", "t", "wanted"),
    [
        ({"kind": "linear", "steps": 100}, None, 30.0, 30.0),
        ({"kind": "linear", "steps": 100}, {"kind": "index", "scale": 10.0}, 30.0, 300.0),
        ({"kind": "linear", "steps": 100}, {"kind": "t"}, 99.0, 1.0),
        ({"kind": "blend"}, None, 0.25, 250.0),
        ({"kind": "blend"}, {"kind": "alpha"}, 0.25, 0.75),
    ],
)
def test_what_the_network_is_told_of_the_time(schedule: dict, time_input: dict | None, t: float, wanted: float) -> None:
    process = process_of(schedule, "v", time_input=time_input)
    assert float(process.network_time(torch.tensor([t]))) == pytest.approx(wanted)


def test_times_are_drawn_over_the_whole_table() -> None:
    process = process_of({"kind": "linear", "steps": 10}, "eps")
    u = torch.linspace(0, 1 - 1e-12, 1000, dtype=torch.float64)
    assert sorted(set(process.draw_times(u).tolist())) == list(range(10))


def test_singular_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        process_of({"kind": "blend"}, "eps")
    with pytest.raises(UserError, match="set clip to true"):
        process_of({"kind": "cosine"}, "eps", clip=False)
    assert process_of({"kind": "cosine"}, "v", clip=False)
    with pytest.raises(UserError, match="use t or alpha"):
        process_of({"kind": "blend"}, "v", time_input={"kind": "index"})


def test_gain_by_its_formula() -> None:
    process = process_of({"kind": "linear"}, "eps")
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(process.gain(t), 1 / process.schedule.level(t).alpha)
    torch.testing.assert_close(process_of({"kind": "linear"}, "v").gain(t), torch.ones(3, dtype=torch.float64))


def test_a_network_must_not_be_called_where_x0_says_nothing() -> None:
    assert not process_of({"kind": "blend"}, "x0").schedule.network_at_clean
    assert process_of({"kind": "blend"}, "blend").schedule.network_at_clean
    assert TimeInput().kind == "index"


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("eps", lambda snr, gamma: min(snr, gamma) / snr),
        ("x0", lambda snr, gamma: min(snr, gamma)),
        ("v", lambda snr, gamma: min(snr, gamma) / (snr + 1)),
    ],
)
def test_min_snr_weights_by_their_formulas(target: str, wanted: Callable[[float, float], float]) -> None:
    """Sec. 3.4, Hang et al. 2023, arXiv:2303.09556."""
    process = process_of({"kind": "cosine"}, target, loss={"weighting": {"kind": "min_snr", "gamma": 5.0}})
    t = torch.tensor([3.0, 300.0, 700.0])
    snr = [float(level) for level in (process.schedule.level(t).alpha / process.schedule.level(t).sigma) ** 2]
    assert snr[0] > 5 > snr[2]
    torch.testing.assert_close(process.loss_weight(t), torch.tensor([wanted(s, 5.0) for s in snr], dtype=torch.float64))
    x0, eps = torch.randn(2, 3, 1, 4, 4)
    losses = process.losses(lambda x, time: torch.zeros_like(x), x0, eps, t)
    assert losses.mse is not None and losses.terms == {}
    torch.testing.assert_close(losses.loss, losses.mse * process.loss_weight(t).float())


def test_min_snr_weighs_any_target_as_it_weighs_x0() -> None:
    """On the blend too: an error of the output, read as one of x0, costs min(SNR, gamma) times its square."""
    process = process_of({"kind": "blend"}, "blend", loss={"weighting": {"kind": "min_snr", "gamma": 2.0}})
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x_t, y, error = torch.randn(3, 3, 1, 2, 2, dtype=torch.float64)
    moved = (process.read(y + error, x_t, t).x0 - process.read(y, x_t, t).x0).square().mean((1, 2, 3))
    snr = ((1 - t) / t) ** 2
    torch.testing.assert_close(process.loss_weight(t) * error.square().mean((1, 2, 3)), snr.clamp(max=2.0) * moved)
