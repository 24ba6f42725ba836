"""Draws the times of a training step, and weighs its losses for how often their times are drawn."""

from collections import deque
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import UserError
from ..diffusion import Process, TableSchedule
from ..diffusion.weightings import LogitNormalTimes, SecondMomentTimes, UniformTimes

LAG = 2  # steps until a loss enters the history, so that no step waits for the device


class TimeSampler:
    """Draws the times of a step, and weighs its losses. What it has learned from them is the same on all ranks, and belongs
    into the checkpoint."""

    def __init__(self, spec: UniformTimes | LogitNormalTimes | SecondMomentTimes, process: Process) -> None:
        self.spec, self.process = spec, process
        self._history = self._counts = None
        if isinstance(spec, SecondMomentTimes):
            if not isinstance(process.schedule, TableSchedule):
                raise UserError("times.kind 'second_moment' keeps a history for each entry of a table; the blend has none")
            self._history = np.zeros((process.schedule.num_steps, spec.history))
            self._counts = np.zeros(process.schedule.num_steps, dtype=np.int64)
        self._t = self._weights = torch.empty(0, dtype=torch.float64)
        self._losses: list[Tensor] = []
        self._pending: deque[tuple[Tensor, Tensor, Any]] = deque()

    def probabilities(self) -> np.ndarray | None:
        """(T,): how likely each entry is drawn; None while all are alike."""
        if self._history is None or self._counts is None or bool((self._counts < self._history.shape[1]).any()):
            return None
        roots = np.sqrt(np.mean(self._history**2, axis=1))
        share = self.spec.uniform_share if isinstance(self.spec, SecondMomentTimes) else 0.0
        total = roots.sum()
        return (1 - share) * roots / total + share / len(roots) if total > 0 else None

    def draw(self, uniform: Tensor) -> Tensor:
        """The times (B,) of the next step, from numbers in [0, 1)."""
        while len(self._pending) >= LAG:
            self._learn(*self._pending.popleft())
        chances = self.probabilities()
        self._weights = torch.ones_like(uniform)
        if chances is not None:
            above = np.cumsum(chances)
            entries = np.minimum(np.searchsorted(above / above[-1], uniform.numpy(), side="right"), len(chances) - 1)
            self._t = torch.from_numpy(entries).double()
            self._weights = torch.from_numpy(1 / (len(chances) * chances[entries]))
        elif isinstance(self.spec, LogitNormalTimes):
            normal = torch.special.ndtri(uniform.clamp(min=1e-12))
            shifted = torch.sigmoid(self.spec.mean + self.spec.std * normal)
            self._t = self.process.draw_times(shifted.clamp(max=1 - 1e-12))
        else:
            self._t = self.process.draw_times(uniform)
        return self._t

    def weigh(self, losses: Tensor, local_slice: slice) -> Tensor:
        """The losses (b,) of the samples that are this slice of the batch, weighted for how often their times are drawn."""
        if self._history is None:
            return losses
        self._losses.append(losses.detach())
        return losses * self._weights[local_slice].to(losses.device, losses.dtype, non_blocking=True)

    def observe(self, accelerator: Accelerator) -> None:
        """After the last micro-batch of a step, on all ranks: keep what its losses were. They count `LAG` steps later."""
        if self._history is None:
            return
        losses = accelerator.gather(torch.cat(self._losses))  # ranks hold slices of the batch, in their order
        assert isinstance(losses, Tensor)
        self._losses, event = [], None
        if losses.is_cuda:
            host = torch.empty(losses.shape, dtype=losses.dtype, pin_memory=True)
            host.copy_(losses, non_blocking=True)
            losses, event = host, torch.cuda.Event()
            event.record()
        self._pending.append((self._t, losses, event))

    def _learn(self, t: Tensor, losses: Tensor, event: Any) -> None:
        assert self._history is not None and self._counts is not None
        if event is not None:
            event.synchronize()
        for entry, loss in zip(t.long().tolist(), losses.double().tolist(), strict=True):
            if not np.isfinite(loss):
                continue
            count, size = self._counts[entry], self._history.shape[1]
            if count == size:
                self._history[entry] = np.roll(self._history[entry], -1)
            self._history[entry, min(count, size - 1)] = loss
            self._counts[entry] = min(count + 1, size)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: nothing where nothing is learned."""
        if self._history is None or self._counts is None:
            return {}
        history = {"history": torch.from_numpy(self._history.copy()), "counts": torch.from_numpy(self._counts.copy())}
        for i, (t, losses, event) in enumerate(self._pending):
            if event is not None:
                event.synchronize()
            history |= {f"pending.{i}.t": t.clone(), f"pending.{i}.losses": losses.cpu().clone()}
        return history

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what a checkpoint kept."""
        self._history, self._counts = tensors["history"].numpy().copy(), tensors["counts"].numpy().copy()
        count = sum(name.endswith(".t") for name in tensors)
        self._pending = deque((tensors[f"pending.{i}.t"], tensors[f"pending.{i}.losses"], None) for i in range(count))
