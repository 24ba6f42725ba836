"""How a run stops: signals, and steps that are not finite, known to all ranks by one small collective a step."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from ..config import UserError
from .processes import CpuCopy

if TYPE_CHECKING:
    from accelerate import Accelerator


class StopRequest:
    """SIGTERM, Ctrl-C, USR1 (which cluster/slurm.sh sends) and `warning` request a stop; the second signal of the same kind
    ends the process at once, after `before_exit()`.

    (A launcher passes Ctrl-C on as SIGTERM: one of each is still one request.) Python calls a handler between two of its own
    instructions, and inside a step one instruction of torch's may take minutes. So the system writes the signals into a pipe
    at once, and a thread, which runs beside torch, reads them there. (The pipe is a pair of sockets, for Windows.)
    """

    def __init__(self, warning: str = "USR1", before_exit: Callable[[], object] = lambda: None) -> None:
        self.requested = False
        self._before_exit, self._handled, self._read = before_exit, set[int](), set[int]()
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        self._writing = writing.detach()
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        names = ("SIGTERM", "SIGINT", "SIGUSR1", f"SIG{warning}")
        self._numbers = {int(getattr(signal, name)) for name in names if hasattr(signal, name)}  # Windows has fewer
        threading.Thread(target=self._watch, args=(reading.detach(),), name="stop", daemon=True).start()
        for number in self._numbers:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        self._count(number, self._handled)

    def _watch(self, reading: int) -> None:
        with socket.socket(fileno=reading) as pipe:
            while signals := pipe.recv(64):
                for number in signals:
                    if number in self._numbers:
                        if not self._read:
                            print("stopping after this step; once more ends at once", file=sys.stderr, flush=True)
                        self.requested = True
                        self._count(number, self._read)

    def _count(self, number: int, before: set[int]) -> None:
        if number in before:
            self._before_exit()
            os._exit(1)
        before.add(number)

    def close(self) -> None:
        """Read signals no longer: the thread ends. The handlers stay until others are set."""
        if self._writing < 0:
            return
        now = signal.set_wakeup_fd(self._before)
        if now != self._writing:  # another one was set since
            signal.set_wakeup_fd(now)
        with socket.socket(fileno=self._writing) as writing:
            writing.shutdown(socket.SHUT_RDWR)  # loader workers may hold a copy
        self._writing = -1


class StepGate:
    """One small asynchronous collective a step: were the gradients finite, is a stop requested, is a save due?

    `send` starts it, `read` ends it, usually one step later, so that no step waits for the device.
    """

    def __init__(self, accelerator: "Accelerator", stop: StopRequest, *, every_minutes: float | None, patience: int) -> None:
        self.device, self.distributed = accelerator.device, accelerator.num_processes > 1
        self.main = accelerator.is_main_process
        self.request, self.every_minutes = stop, every_minutes
        # Under fp16 the loss scale starts high, and each halving of it is a step that does not count.
        self.patience = patience if accelerator.scaler is None else patience + 30
        self.stop = self.save = False
        self.skipped_in_a_row = 0
        self.saved_step: int | None = None  # of the last checkpoint
        self._saved_at = time.monotonic()
        self._pending: tuple[Any, CpuCopy, int] | None = None

    def send(self, step: int, finite: torch.Tensor) -> None:
        """`finite` () bool on the device: whether step `step`, counted from 1, had finite gradients here."""
        due = self.main and self.every_minutes is not None and time.monotonic() - self._saved_at > 60 * self.every_minutes
        flags = torch.zeros(3, device=self.device)
        flags[0] = ~finite
        if self.request.requested:
            flags[1] = 1
        if due:
            flags[2] = 1
        work = torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, async_op=True) if self.distributed else None
        if work is not None and flags.is_cuda:
            work.wait()  # the stream waits, not the host
            work = None
        self._pending = (work, CpuCopy(flags), step)

    def read(self) -> int | None:
        """The number of the step that was sent last, if it counts: None if it was read before, or was not finite and so
        changed nothing. A UserError after `patience` such steps in a row."""
        if self._pending is None:
            return None
        work, flags, step = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        bad, stop, save = (value > 0 for value in flags.wait().tolist())
        self.stop |= stop
        self.save |= save
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        if self.skipped_in_a_row >= self.patience:
            advice = "there is no checkpoint yet: lower optimizer.lr or set optimizer.clip, and run it again"
            if self.saved_step is not None:
                advice = f"the last checkpoint is of step {self.saved_step}, from before: lower optimizer.lr or set "
                advice += "optimizer.clip, in a new --run-dir or after removing this one"
            raise UserError(
                f"step {step}: the loss or its gradient is not finite, the {self.patience}th time in a row; {advice}"
            )
        return None if bad else step

    @property
    def stop_is_local(self) -> bool:
        """Whether a stop is requested in a run of one process: then it stops after the step that is done."""
        return self.request.requested and not self.distributed

    def saved(self, step: int | None = None) -> None:
        """The checkpoint of `step` is written."""
        self.save, self.saved_step = False, step
        self._saved_at = time.monotonic()
