"""A drawing as moving points: the exact estimate against sums over samples, and where points end."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.app.device import Device
from src.app.points_tab import CELLS, EXTENT, TRAIN, DrawnDensity, drawing_of, drawn_sampler, move_drawing, move_run
from src.config import UserError, load, validate
from src.diffusion.mixture import mixture_estimate
from src.sampling import SamplerConfig
from src.sampling.paths import move_points
from src.sampling.plan import DrawRequest
from tests.conftest import ROOT, run_here
from tests.test_house import train_iadb

CPU, SPEC = torch.device("cpu"), validate(SamplerConfig, {"solver": "euler", "steps": 3})


def test_the_estimate_is_the_mean_over_samples_of_the_mixture() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.0, 0.0], [1.0, -1.0], [2.0, 1.0]], dtype=torch.float64)
    weights, std = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), 0.3
    chosen = torch.multinomial(weights, 400_000, replacement=True, generator=generator)
    x0 = means[chosen] + std * torch.randn(len(chosen), 2, dtype=torch.float64, generator=generator)
    alpha, sigma = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    x_t = torch.tensor([[0.2, -0.1], [0.9, 0.4]], dtype=torch.float64)
    density = torch.exp(-(torch.cdist(x_t, alpha * x0) ** 2) / (2 * sigma**2))  # of x_t given each sample
    expected = density @ x0 / density.sum(1, keepdim=True)
    torch.testing.assert_close(mixture_estimate(x_t, alpha, sigma, means, weights, std), expected, atol=0.01, rtol=0)


def test_of_one_gaussian_it_is_the_posterior_mean() -> None:
    mean, std = torch.tensor([[1.0, 2.0]], dtype=torch.float64), 0.5
    alpha, sigma = (torch.tensor([[value], [value]], dtype=torch.float64) for value in (0.8, 0.6))
    x_t = torch.tensor([[0.0, 1.0], [3.0, -1.0]], dtype=torch.float64)
    gain = 0.8 * std**2 / (0.8**2 * std**2 + 0.6**2)
    expected = mean + gain * (x_t - 0.8 * mean)
    torch.testing.assert_close(mixture_estimate(x_t, alpha, sigma, mean, torch.ones(1, dtype=torch.float64), std), expected)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    torch.testing.assert_close(mixture_estimate(x_t, 1 + zero, zero, mean, torch.ones(1, dtype=torch.float64), std), x_t)


def drawing(rows: slice, columns: slice) -> dict[str, Any]:
    layer = np.zeros((2 * CELLS, 2 * CELLS, 4), dtype=np.uint8)
    layer[rows, columns] = 255
    return {"background": None, "layers": [Image.fromarray(layer)], "composite": None}


def test_points_go_where_it_is_drawn(tmp_path: Path) -> None:
    density = drawing_of(drawing(slice(0, 32), slice(64, 128)))  # the upper quarter, on the right
    assert density.shape == (CELLS, CELLS) and density.sum() == pytest.approx(1) and density[:16, 32:].sum() == pytest.approx(1)
    spec = validate(SamplerConfig, {"solver": "heun", "steps": 12})
    sampler = drawn_sampler(density, spec)
    way = move_points(sampler, 0, 400, None, device=CPU)
    assert way.shape == (13, 400, 2) and abs(way[0].mean()) < 0.1 and way[0].std() == pytest.approx(1, abs=0.05)
    end = way[-1]
    inside = (end[:, 0] > -0.1) & (end[:, 0] < EXTENT + 0.1) & (end[:, 1] > EXTENT / 2 - 0.1) & (end[:, 1] < EXTENT + 0.1)
    assert inside.float().mean() > 0.95
    assert end.mean(0).tolist() == pytest.approx([EXTENT / 2, 0.75 * EXTENT], abs=0.15)
    shown = list[Any]()
    result = move_drawing(Device(CPU), density, spec, 100, 0, tmp_path, shown.append)
    assert [path.name for path in result.files] == ["points.gif", "points.png", "points.npz", "drawing.png"]
    assert (
        "exact answer" in result.words and "100 points, 23 calls" in result.words and shown[0][1] == "100 points, step 0 of 12"
    )
    with Image.open(result.sheet) as gif:
        assert gif.n_frames > 13, "it lingers at its end"
    pixels = np.asarray(Image.open(tmp_path / "drawing.png"))
    assert pixels.shape == (CELLS, CELLS) and pixels[0, 40] == 255 and pixels[40, 40] == 0


def test_the_estimate_is_cut_into_parts_without_a_difference() -> None:
    density = drawing_of(drawing(slice(10, 60), slice(20, 40)))
    network = DrawnDensity(density)
    x, time = torch.randn(2500, 2), torch.linspace(0, 1000, 2500)
    assert torch.equal(network(x, time)[1024:1030], network(x[1024:1030], time[1024:1030]))


def test_the_command_trains_on_the_drawing() -> None:
    cfg = load(ROOT / TRAIN[1], train_iadb.Config, [*TRAIN[3::2], "data.path=drawing.png"])
    assert cfg.data.source == "density" and cfg.data.path == "drawing.png" and cfg.source.source == "gaussian"


def test_the_points_of_a_run_are_those_of_the_script(place: Path, tmp_path: Path) -> None:
    request = DrawRequest(
        run="runs/points", spec=validate(SamplerConfig, {"solver": "euler", "steps": 3}), num_samples=50, seed=2
    )
    result = move_run(Device(CPU), request, tmp_path / "ours", lambda _: None)
    run_here("sample", *shlex.split(request.command("cpu"))[2:], "--out", tmp_path / "theirs", cwd=place)
    with np.load(tmp_path / "theirs" / "points.npz") as arrays, np.load(tmp_path / "ours" / "points.npz") as ours:
        assert np.array_equal(arrays["data"], ours["data"])
    assert result.sheet.name == "points.gif"
    with pytest.raises(UserError, match="go to the tab Draw"):
        move_run(Device(CPU), DrawRequest(run="runs/shapes"), tmp_path / "x", lambda _: None)


def test_nothing_drawn() -> None:
    for value in (None, {"background": None, "layers": [], "composite": None}, drawing(slice(0, 0), slice(0, 0))):
        with pytest.raises(UserError, match="draw something first"):
            drawing_of(value)
