"""One batch on its way from the source to the data: what a solver is given, and what an edit keeps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..diffusion import Denoiser, Prediction, Process, Solver, transitions
from ..diffusion.chain import Transitions
from ..diffusion.schedules import like
from ..diffusion.solvers import Callback


class Edit(NamedTuple):
    """What a sampling keeps of an image: it starts from `x0` (C, H, W), as the network sees it, where `start_at` steps are
    done, and keeps x0 where `mask` (1, H, W) is 0. Each step is taken `resamplings` times with noise in between, so that the
    new part and the kept part agree (Alg. 1, Lugmayr et al. 2022, arXiv:2201.09865)."""

    x0: Tensor
    start_at: int = 0
    mask: Tensor | None = None
    resamplings: int = 1


class SweptNoise(Protocol):
    """The noise of a step; `sweep` counts how often the step was taken before, and each sweep has other noise."""

    def __call__(self, step: int, like: Tensor, sweep: int = 0) -> Tensor: ...


@dataclass(kw_only=True)
class Trajectory:
    """The way of one batch along `times`. `source` draws new starting points, `mean_shift` is a classifier's. Where it
    `watches_finite`, `finite` gets (step, whether the estimate was finite) of each step, on the device, so that nobody waits.
    """

    process: Process
    solver: Solver
    times: Tensor
    eta: float
    denoiser: Denoiser
    noise: SweptNoise
    source: SweptNoise
    mean_shift: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    callback: Callback | None
    watches_finite: bool
    sweep: int = 0
    finite: list[tuple[int, Tensor]] = field(default_factory=list)

    def _solve(self, x: Tensor, first: int, end: int) -> Tensor:
        """From where `first` steps are done to where `end` are."""
        schedule = self.process.schedule

        def callback(step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
            if self.watches_finite:
                self.finite.append((first + step, torch.isfinite(prediction.x0).all()))
            if self.callback is not None:
                self.callback(first + step, t, x_t, prediction)

        def transitions_of_part() -> Transitions:
            return Transitions(*(values[first:end] for values in transitions(schedule, self.times)))

        arguments = {  # of these a solver is given what it takes
            "noise": lambda: lambda step, like: self.noise(first + step, like, self.sweep),
            "source": lambda: lambda step, like: self.source(first + step, like, self.sweep),
            "eta": lambda: self.eta,
            "variance": lambda: self.process.variance,
            "mean_shift": lambda: self.mean_shift,
            "steps": transitions_of_part,
        }
        options = {name: value() for name, value in arguments.items() if self.solver.takes(name)}
        return self.solver.function(self.denoiser, x, self.times[first : end + 1], schedule, callback=callback, **options)

    def run(self, x: Tensor, first: int, end: int, edit: Edit | None) -> Tensor:
        """From where `first` steps are done to where `end` are; what an edit keeps is put back after each step."""
        if edit is None or edit.mask is None:
            return self._solve(x, first, end)
        num_steps = len(self.times) - 1
        alpha, sigma = self.process.schedule.level(self.times)
        x0, mask, before = edit.x0.to(x).expand_as(x), edit.mask.to(x), self.sweep
        for i in range(first, end):
            for self.sweep in range(before, before + edit.resamplings):
                if self.sweep > before:
                    ratio = alpha[i] / alpha[i + 1]
                    spread = (sigma[i] ** 2 - ratio**2 * sigma[i + 1] ** 2).sqrt()
                    x = like(ratio, x) * x + like(spread, x) * self.noise(2 * num_steps + i, x, self.sweep)
                x = self._solve(x, i, i + 1)
                noised = self.process.add_noise(x0, self.noise(num_steps + i, x, self.sweep), self.times[i + 1])
                x = mask * x + (1 - mask) * noised
        return x

    def estimate(self, x: Tensor, step: int, edit: Edit | None) -> Tensor:
        """The estimate of x_0 where `step` steps are done, with what an edit keeps."""
        t = self.times[step]
        prediction = self.denoiser(x, t)
        if self.callback is not None:
            self.callback(step, t, x, prediction)
        if edit is None or edit.mask is None:
            return prediction.x0
        mask = edit.mask.to(x)
        return mask * prediction.x0 + (1 - mask) * edit.x0.to(x)

    def repeat(self, x0: Tensor, first: int, edit: Edit | None) -> Tensor:
        """The finished image noised again to where `first` steps are done, and denoised once more."""
        num_steps = len(self.times) - 1
        self.sweep += 1
        x = self.process.add_noise(x0, self.noise(3 * num_steps, x0, self.sweep), self.times[first])
        return self.run(x, first, num_steps, edit)
