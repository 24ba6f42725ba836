"""How straight the paths have become: the same sources after few network calls and many, while a run trains."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import figures
from ..diffusion import Prediction
from ..runtime.seeds import generator
from ..runtime.stream import Examples
from ..sampling.config import SamplerConfig
from ..sampling.sampler import Sampler
from .config import PathPreviewConfig
from .inputs import Coupling
from .preview import held_out_loss, looked_at, preview_failed, warn_not_finite
from .session import Session


class PathLength:
    """A callback that adds up how far each sample of a batch goes."""

    def __init__(self) -> None:
        self._first = self._last = None
        self._length = torch.zeros(())

    def __call__(self, step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        self._go(x_t)

    def _go(self, x: Tensor) -> None:
        if self._last is None:
            self._first = x
        else:
            self._length = self._length + (x - self._last).flatten(1).norm(dim=1)
        self._last = x

    def straightness(self, end: Tensor) -> Tensor:
        """(B,): one minus the ratio of chord to path length, for paths that end at `end` (B, ...): 0 is a straight line."""
        self._go(end)
        assert self._first is not None
        chord = (end - self._first).flatten(1).norm(dim=1)
        return 1 - chord / self._length.clamp(min=1e-12)


def preview_paths(
    sampler_for: Callable[[SamplerConfig], Sampler],
    spec: PathPreviewConfig,
    session: Session,
    class_names: Sequence[str],
    coupling: Coupling,
) -> dict[str, float]:
    """Draw the preview of the session's step on all ranks as `step_STEP.png`, and measure: `straightness` along the most calls,
    and the loss on what is held out. 2-D points are drawn beside those of the data."""
    session.clock.enter("a preview")
    accelerator, count, n = session.accelerator, spec.num_samples, len(class_names)
    each = math.ceil(count / accelerator.num_processes)
    indices = [i % count for i in range(accelerator.process_index * each, (accelerator.process_index + 1) * each)]
    values: dict[str, float] = {}
    columns: list[Tensor] = []
    for calls in sorted(spec.calls):
        sampler = sampler_for(SamplerConfig(solver="euler", steps=calls, guidance=spec.guidance))
        starts, reached, measured = [], [], []
        with looked_at(session) as outcome:
            for first in range(0, each, spec.batch_size):
                part = indices[first : first + spec.batch_size]
                x = sampler.start(0, part).to(accelerator.device, sampler.dtype)
                labels = None
                if sampler.num_classes is not None:
                    labels = torch.tensor([i * n // count % n for i in part], device=accelerator.device)
                length = PathLength()
                end = sampler.move(x, labels, indices=part, callback=length)
                measured.append(length.straightness(end))
                starts.append(sampler.decode(x))
                reached.append(sampler.decode(end))
        if preview_failed(outcome, session):
            columns, values = [], {}  # straightness is along the most calls, or not known
            break
        columns = columns or [_gathered(session, starts)[:count]]
        columns.append(_gathered(session, reached)[:count])
        warn_not_finite(columns[-1], session)
        values["straightness"] = float(_gathered(session, measured)[:count].mean())
    if columns and accelerator.is_main_process:
        with looked_at(session):
            _save_columns(columns, spec, coupling, count, session.run.samples / f"step_{session.step:08d}.png")
    if (held_out := coupling.held_out_examples()) is not None:
        sampler = sampler_for(SamplerConfig())
        values |= held_out_loss(
            sampler.network,
            sampler.process,
            held_out,
            session.batch_plan.micro,
            sampler.num_classes,
            accelerator,
            source=sampler.source,
        )
    return values


def _save_columns(columns: list[Tensor], spec: PathPreviewConfig, coupling: Coupling, count: int, path: Path) -> None:
    """The sheet of the sources and of what became of them after each number of calls."""
    if columns[0].ndim == 2:
        titles = ["source", *(f"{calls} network call{'s' * (calls > 1)}" for calls in sorted(spec.calls)), "data"]
        shown = [column.cpu().numpy() for column in columns] + [_some(coupling.data.examples(), count)]
        panels = [figures.scatter(points, title=title) for points, title in zip(shown, titles, strict=True)]
        figures.save(figures.in_a_row(panels), path)
        return
    rows = torch.stack(columns, dim=1).flatten(0, 1)  # (count (1 + calls), C, H, W)
    title = f"source, then after {', '.join(map(str, sorted(spec.calls)))} network calls"
    figures.save(figures.grid(figures.to_uint8(rows), columns=len(columns), title=title), path)


def _gathered(session: Session, parts: list[Tensor]) -> Tensor:
    gathered = session.accelerator.gather(torch.cat(parts))
    assert isinstance(gathered, Tensor)
    return gathered


def _some(examples: Examples, count: int) -> NDArray[np.float32]:
    return examples.load(np.arange(min(count, len(examples.labels)))).cpu().numpy()


@torch.no_grad()
def save_first_blends(sampler: Sampler, data: Examples, folder: Path, *, count: int = 4, alphas: int = 9) -> None:
    """What a person looks at before training: `blend.png`, rows of one source and one example each, blended from alpha 0 to
    1; of 2-D points, the densities of the blend."""
    device = next(sampler.network.parameters()).device  # pyright: ignore[reportFunctionMemberAccess]
    points = len(sampler.shape) == 1
    count = min(20_000 if points else count, len(data.labels))
    chosen = generator(0, "blend").choice(len(data.labels), count, replace=False)
    x0 = data.load(chosen).to(device, sampler.dtype)
    eps = sampler.start(0, range(count)).to(x0)
    levels = torch.linspace(0, 1, alphas, dtype=torch.float64)
    blends = [sampler.process.add_noise(x0, eps, 1 - alpha) for alpha in levels]
    if points:
        panels = [
            figures.scatter(x.cpu().numpy(), size=160, title=f"alpha {a:g}")
            for x, a in zip(blends, levels.tolist(), strict=True)
        ]
        figures.save(figures.in_a_row(panels), folder / "blend.png")
        return
    shown = torch.stack([sampler.decode(x) for x in blends], dim=1).flatten(0, 1)
    title = f"x_alpha, alpha from 0 (source) to 1 (data) in {alphas - 1} steps"
    figures.save(figures.grid(figures.to_uint8(shown), columns=alphas, title=title), folder / "blend.png")
