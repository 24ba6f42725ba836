"""Iterative alpha-(de)blending: the paper's iteration, maps that are known, the way back."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src.config import UserError, validate
from src.diffusion import (
    BlendSchedule,
    Prediction,
    Process,
    TimeInput,
    build_schedule,
    ddim,
    euler,
    inversion_times,
    redraw,
    rk4,
    times,
)
from src.diffusion.schedules import CosineSchedule, like
from src.models import MLP, MLPConfig
from src.sampling import Sampler, SamplerConfig
from src.training.ema import EMA, EMAConfig
from tests.conftest import randomise

BLEND = Process(schedule=BlendSchedule(), target="blend", time_input=TimeInput(kind="alpha"))
EVEN = times(BlendSchedule(), 16)


class Conv(nn.Module):
    """A network that is neither linear nor small: any will do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + time[:, None, None, None]))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_euler_is_the_papers_iteration(dtype: torch.dtype, bound: float) -> None:
    """Alg. 4, arXiv:2305.03486: x <- x + (alpha' - alpha) D(x, alpha)."""
    network = randomise(Conv(), 0.5).to(dtype)
    x = x_alpha = torch.randn(4, 3, 8, 8, dtype=dtype)
    steps = 32
    with torch.no_grad():
        for i in range(steps):
            alpha = torch.full((4,), i / steps, dtype=dtype)
            x_alpha = x_alpha + (1 / steps) * network(x_alpha, alpha)
        ours = euler(BLEND.denoiser(network), x, times(BLEND.schedule, steps), BLEND.schedule)
    assert float((ours - x_alpha).abs().max()) < bound and float((x_alpha - x).abs().max()) > 0.1


def test_ddim_on_the_same_network_read_as_a_table_takes_the_same_path() -> None:
    table = build_schedule(validate(CosineSchedule, {"kind": "cosine", "steps": 200}))
    network = randomise(Conv(), 0.5).double()
    on_blend = BLEND.denoiser(network)

    def on_table(x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = table.level(t)
        return on_blend(x_t / like(alpha + sigma, x_t), sigma / (alpha + sigma))

    way, paths = times(table, 20), ([], [])
    alpha, sigma = table.level(way)
    x, scale = torch.randn(2, 3, 8, 8, dtype=torch.float64), alpha + sigma

    def keep(path: list[Tensor], scales: Tensor):
        return lambda i, t, x_t, prediction: path.append(x_t / scales[i])

    with torch.no_grad():
        noise = {"noise": lambda step, x: pytest.fail("eta is 0")}
        end = ddim(on_table, x * scale[0], way, table, eta=0.0, callback=keep(paths[0], scale), **noise)
        same = euler(on_blend, x, sigma / scale, BLEND.schedule, callback=keep(paths[1], torch.ones_like(scale)))
    for left, right in zip([*paths[0], end], [*paths[1], same], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


class Gaussians:
    """The exact denoiser between two Gaussians of commuting covariances, and the map that its path is.

    Along each eigenvector E[eps - x0 | x] is linear in x, and the flow carries a point at so many standard deviations of the
    source to as many of the data.
    """

    def __init__(self) -> None:
        angle = 0.5
        self.axes = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.data, self.source = torch.tensor([0.25, 4.0], dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
        self.data_mean, self.source_mean = torch.tensor([1.5, -0.5]).double(), torch.tensor([-1.0, 0.3]).double()

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        u = t.reshape(-1, 1)
        along_axes = (x_t - (1 - u) * self.data_mean - u * self.source_mean) @ self.axes
        total = (1 - u) ** 2 * self.data + u**2 * self.source
        x0 = self.data_mean + (along_axes * (1 - u) * self.data / total) @ self.axes.T
        eps = self.source_mean + (along_axes * u * self.source / total) @ self.axes.T
        return Prediction(x0, eps)

    def draw(self, count: int, end: str) -> Tensor:
        spread, mean = (self.data, self.data_mean) if end == "data" else (self.source, self.source_mean)
        return mean + (torch.randn(count, 2, dtype=torch.float64) * spread.sqrt()) @ self.axes.T

    def to_data(self, x: Tensor) -> Tensor:
        return self.data_mean + (((x - self.source_mean) @ self.axes) * (self.data / self.source).sqrt()) @ self.axes.T


def test_a_gaussian_is_carried_to_another() -> None:
    exact = Gaussians()
    x = exact.draw(256, "source")
    carried = rk4(exact, x, times(BLEND.schedule, 64), BLEND.schedule)
    assert float((carried - exact.to_data(x)).abs().max()) < 1e-4
    away = (carried.mean(0) - exact.source_mean).norm(), (carried.mean(0) - exact.data_mean).norm()
    assert away[1] < 0.5 < away[0], "to the data, and not back to the source"
    back = rk4(exact, carried, inversion_times(times(BLEND.schedule, 64), BLEND.schedule), BLEND.schedule)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)


def test_a_trained_network_carries_it_within_two_percent() -> None:
    torch.manual_seed(0)
    exact, network = Gaussians(), MLP(MLPConfig(kind="mlp", width=48, layers=2, frequencies=1))
    optimizer, average = torch.optim.Adam(network.parameters(), lr=5e-3), EMA(network, EMAConfig(half_life_images=150_000))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for step in range(1500):
        x0, eps = exact.draw(1024, "data").float(), exact.draw(1024, "source").float()
        loss = BLEND.losses(network, x0, eps, torch.rand(1024).double()).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        average.update(network, 1024 * (step + 1), 1024)
    x = exact.draw(4096, "source")
    with torch.no_grad():
        carried = rk4(BLEND.denoiser(average.network), x.float(), times(BLEND.schedule, 16), BLEND.schedule).double()
    wanted = exact.to_data(x)
    assert float((carried - wanted).norm() / (wanted - wanted.mean(0)).norm()) < 0.02


def test_redraw_blends_the_estimate_with_a_new_source_at_each_step() -> None:
    exact, sources = Gaussians(), []

    def source(step: int, like: Tensor) -> Tensor:
        sources.append(torch.full_like(like, float(step)))
        return sources[-1]

    x = exact.draw(3, "source")
    way = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    x0 = redraw(exact, x, way, BLEND.schedule, source=source)
    middle = 0.5 * exact(x, way[0]).x0 + 0.5 * torch.zeros_like(x)
    torch.testing.assert_close(x0, exact(middle, way[1]).x0)
    assert len(sources) == 1, "at the data there is none of the source"


def test_the_way_back_begins_where_the_network_may_be_called() -> None:
    table = build_schedule(validate(CosineSchedule, {"kind": "cosine", "steps": 10}))
    assert inversion_times(times(table, 5), table).tolist() == [0, 2, 4, 7, 9]
    assert inversion_times(times(BLEND.schedule, 2), BLEND.schedule).tolist() == [0, 0.5, 1]
    assert inversion_times(times(BLEND.schedule, 2), BlendSchedule(network_at_clean=False)).tolist() == [0.5, 1]


def sampler(**spec: object) -> Sampler:
    network = randomise(MLP(MLPConfig(kind="mlp", width=16, layers=2)), 0.2)
    config = validate(SamplerConfig, spec)
    return Sampler(network, BLEND, config, shape=(2,), num_classes=None, clip_x0=None)


def test_alphas_are_the_steps() -> None:
    chosen = sampler(solver="euler", alphas=[0, 0.1, 0.6, 1])
    assert torch.allclose(chosen.times, torch.tensor([1, 0.9, 0.4, 0]).double()) and chosen.calls() == 3
    assert sampler(solver="rk4", alphas=[0, 0.1, 0.6, 1]).calls() == 12
    x = torch.randn(4, 2)
    even = sampler(solver="heun", steps=2)
    torch.testing.assert_close(sampler(solver="heun", alphas=[0, 0.5, 1]).move(x), even.move(x))
    assert even.calls() == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"alphas": [0, 1.5]}, "1.5 lies outside [0, 1]"),
        ({"alphas": [-0.1, 0.5, 1]}, "-0.1 lies outside [0, 1]"),
        ({"alphas": [0, 0.7, 0.3, 1]}, "rising from 0 to 1"),
        ({"alphas": [0.1, 1]}, "rising from 0 to 1"),
        ({"solver": "eulers"}, "allowed: 'euler', 'midpoint', 'heun', 'rk4'"),
    ],
)
def test_steps_and_solvers_that_there_are_not(spec: dict, message: str) -> None:
    with pytest.raises(UserError) as raised:
        sampler(**spec)
    assert message in str(raised.value)


def test_what_assumes_gaussian_noise_is_refused_elsewhere() -> None:
    network = MLP(MLPConfig(kind="mlp", width=16, layers=2))

    def other(**spec: object) -> Sampler:
        start = lambda seed, indices, draw=0: torch.zeros(len(indices), 2)  # noqa: E731
        config = validate(SamplerConfig, spec)
        return Sampler(network, BLEND, config, shape=(2,), num_classes=None, clip_x0=None, source=start)

    for spec, word in (
        ({"solver": "ancestral"}, "the solver ancestral"),
        ({"eta": 0.5}, "eta"),
        ({"double_sampling": 3}, "double_sampling"),
        ({"guidance_method": "classifier", "guidance": 2.0}, "guidance by a classifier"),
    ):
        with pytest.raises(UserError, match=f"{word} assumes Gaussian noise at the start"):
            other(**spec)
    assert torch.equal(other(solver="redraw", steps=3).start(0, range(2)), torch.zeros(2, 2))
    table = Process(schedule=build_schedule(validate(CosineSchedule, {"kind": "cosine", "steps": 10})), target="v")
    with pytest.raises(UserError, match="alphas belong to the blend"):
        Sampler(network, table, validate(SamplerConfig, {"alphas": [0, 1]}), shape=(2,), num_classes=None, clip_x0=None)


def test_there_and_back_again() -> None:
    chosen = sampler(solver="rk4", steps=16)
    x0 = torch.randn(32, 2)
    source = chosen.invert(x0)
    assert float((source - x0).abs().max()) > 0.05
    torch.testing.assert_close(chosen.move(source), x0, rtol=0, atol=1e-3)
    for solver in ("dpmpp_2m", "redraw"):
        with pytest.raises(UserError, match=r"cannot be gone back; allowed: euler, midpoint, heun, rk4, ddim"):
            sampler(solver=solver).invert(x0)
