"""Plots of 2-D points: on their way from source to data, the field that moves them, and a GIF."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config.progress import track
from ..diffusion import Prediction
from ..storage.files import write_whole
from .files import claim, write_animation
from .sampler import Sampler

FIELD_TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)


@torch.no_grad()
def move_points(sampler: Sampler, seed: int, count: int, labels: Tensor | None, *, device: torch.device) -> Tensor:
    """The points 0 .. count - 1 of `seed` after each step, (steps + 1, count, 2) on the CPU, the source first."""
    way: list[Tensor] = []

    def keep(step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        way.append(x_t.float().cpu())

    x = sampler.start(seed, range(count)).to(device, sampler.dtype)
    end = sampler.move(x, labels, seed=seed, indices=range(count), callback=keep)
    return torch.stack([*way, end.float().cpu()])


@torch.no_grad()
def velocity(sampler: Sampler, at: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
    """What moves the points `at` (N, 2) towards the data at time t: the network's estimate of data - source, (N, 2)."""
    condition = {"labels": labels} if labels is not None else {}
    at = at.to(next(sampler.network.parameters()))  # pyright: ignore[reportFunctionMemberAccess]
    prediction = sampler.process.denoiser(sampler.network, **condition)(at, torch.tensor(t, dtype=torch.float64))
    return (prediction.x0 - prediction.eps).float().cpu()


def write_points(
    sampler: Sampler,
    out: Path,
    *,
    count: int = 20_000,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    device: torch.device,
    frames: bool = True,
    request: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write into the folder `out`: `x0.png`, the source (the paper's x_0), `x1.png`, the samples, `trajectories.png` of 100
    points, `velocity.png` at five times, `points.npz` with both ends, and `points.gif` with the points between them.

    `labels` are the classes (count,) of a conditional network, `request` what all depends on, for `metadata.json`. Gives the
    paths of the plots; a folder that holds others is a UserError.
    """
    if request is not None:
        claim(out, request, what="frames")
    classes = torch.tensor(labels, device=device) if labels is not None else None
    way = move_points(sampler, seed, count, classes, device=device).numpy()
    first, last = (figures.scatter(way[i], title=title) for i, title in ((0, "x_0: the source"), (-1, "x_1: the data")))
    out.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, source=way[0], data=way[-1])
    write_whole(out / "points.npz", content.getbuffer())
    figures.save(first, out / "x0.png")
    figures.save(last, out / "x1.png")
    figures.trajectories(
        out / "trajectories.png", way[:, :100], title=f"100 of {count} points, {sampler.calls()} network calls"
    )
    fields = {}
    for t in FIELD_TIMES:  # at points of that time: elsewhere the network was not trained
        if t == 0 and not sampler.process.schedule.network_at_clean:
            continue
        at = way[int((sampler.times - t).abs().argmin())][:300]
        some = classes[: len(at)] if classes is not None else None
        fields[f"alpha = {1 - t:g}"] = at, velocity(sampler, torch.from_numpy(at).to(device), t, some).numpy()
    figures.velocity_fields(out / "velocity.png", fields)
    paths = [out / name for name in ("x0.png", "x1.png", "trajectories.png", "velocity.png")]
    if not frames:
        return paths
    alphas = (1 - sampler.process.schedule.level(sampler.times).sigma).tolist()
    steps = track(list(zip(way, alphas, strict=True)), "drawing frames", unit="frames")
    sheets = (figures.in_a_row([first, figures.scatter(x, title=f"alpha = {alpha:.2f}"), last]) for x, alpha in steps)
    write_animation(out / "frames" / "frame_%03d.png", sheets, out / "points.gif", fps=24)
    return [*paths, out / "points.gif"]
