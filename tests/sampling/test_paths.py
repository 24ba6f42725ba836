"""How straight a path is, what a way back lost, what moves a point, what stands before training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.diffusion import BlendSchedule, Prediction, Process, TimeInput
from src.models import MLP, MLPConfig
from src.runtime.stream import Examples
from src.sampling import Sampler, SamplerConfig
from src.sampling.paths import measure, move_points, velocity
from src.training.first_images import save_first_blends
from src.training.preview import PathLength
from tests.conftest import randomise

BLEND = Process(schedule=BlendSchedule(), target="blend", time_input=TimeInput(kind="alpha"))
NETWORK = randomise(MLP(MLPConfig(kind="mlp", width=16, layers=2)), 0.3)


def sampler(steps: int = 4, solver: str = "euler") -> Sampler:
    spec = SamplerConfig(solver=solver, steps=steps)  # pyright: ignore[reportArgumentType]
    return Sampler(NETWORK, BLEND, spec, shape=(2,), num_classes=None, clip_x0=None)


def test_a_straight_path_has_straightness_0_and_a_right_angle_1_minus_root_half() -> None:
    nothing = Prediction(torch.zeros(2, 2), torch.zeros(2, 2))
    length, time = PathLength(), torch.tensor(1.0)
    length(0, time, torch.tensor([[0.0, 0.0], [0.0, 0.0]]), nothing)
    length(1, time, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), nothing)
    straightness = length.straightness(torch.tensor([[3.0, 3.0], [1.0, 1.0]]))
    assert straightness.tolist() == pytest.approx([0, 1 - math.sqrt(0.5)], abs=1e-6)


def test_what_a_way_back_lost() -> None:
    x0 = torch.randn(3, 16, 16)
    same = measure(x0, 0.5 * x0 + 3, x0 + 0.1 * x0.std())
    assert same["rms"] == pytest.approx(0.1, rel=1e-5) and same["correlation"] == pytest.approx(1, abs=1e-5)
    assert same["std"] == pytest.approx(float(0.5 * x0.std()), rel=1e-3)
    assert abs(measure(x0, torch.randn(3, 16, 16), x0)["correlation"]) < 0.15


def test_velocity_is_what_the_network_says_and_points_follow_it() -> None:
    chosen, at = sampler(), torch.randn(5, 2)
    with torch.no_grad():
        output = NETWORK(at, torch.full((5,), 0.25))
    torch.testing.assert_close(velocity(chosen, at, 0.75), output, rtol=1e-5, atol=1e-5)
    way = move_points(chosen, 0, 6, None, device=torch.device("cpu"))
    assert way.shape == (5, 6, 2) and torch.equal(way[0], chosen.start(0, range(6)))
    torch.testing.assert_close(way[1] - way[0], 0.25 * velocity(chosen, way[0], 1.0), rtol=1e-4, atol=1e-5)


def test_redraw_draws_anew_in_each_step_and_sweep() -> None:
    steps: list[int] = []

    def source(seed: int, indices: object, draw: int = 0) -> torch.Tensor:
        steps.append(draw)
        return torch.randn(3, 2)

    chosen = sampler(3, "redraw")
    chosen.source = source
    chosen.move(torch.randn(3, 2), indices=range(3))
    assert steps == [1, 2], "none at the end"
    gaussian = sampler(3, "redraw")
    assert len({tuple(gaussian.start(0, [0], draw)[0].tolist()) for draw in range(4)}) == 4


def test_the_blend_before_training_goes_from_source_to_data(tmp_path: Path) -> None:
    data = Examples(np.full(50, -1), lambda indices: torch.full((len(indices), 2), 2.0))
    save_first_blends(sampler(), data, tmp_path)
    with Image.open(tmp_path / "blend.png") as image:
        shown = np.asarray(image.convert("L"))[27:-5]  # below the titles, inside the frames
    width = shown.shape[1] // 9
    spread = [np.argwhere(shown[:, i * width + 5 : (i + 1) * width - 5] < 150) for i in (0, 8)]
    assert np.ptp(spread[0], axis=0).min() > 40, "the source is spread"
    assert np.ptp(spread[1], axis=0).max() < 8 and spread[1][:, 0].mean() < 60, "the data lies in one place, above"
