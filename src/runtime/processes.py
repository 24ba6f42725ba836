"""The processes of a run: what one of them tells the others, and which of them no longer answer."""

import itertools
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..config import UserError
from ..storage.blocks import Ranks

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def process_state(*, cpu: bool = False, timeout: timedelta | None = None) -> "PartialState":
    """The processes as accelerate knows them, whose collectives wait for `timeout`, where this call is the first. Its import
    takes a second, so nothing of ours imports it before it is needed."""
    from accelerate import PartialState

    return PartialState(cpu=cpu, **({} if timeout is None else {"timeout": timeout}))


def broadcast(chosen: T) -> T:
    """What the first rank chose or found, on all ranks."""
    from accelerate.utils import broadcast_object_list

    box = [chosen]
    broadcast_object_list(box)
    return box[0]


class CpuCopy:
    """A copy of a tensor that is on its way to the CPU, so that no step waits for the device. (A tensor on the CPU stays what
    it is.)"""

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values, None
        if values.is_cuda:
            self._values, self._event = torch.empty(values.shape, dtype=values.dtype, pin_memory=True), torch.cuda.Event()
            self._values.copy_(values, non_blocking=True)
            self._event.record()

    def wait(self) -> Tensor:
        """The values, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.cpu()


def silent_ranks(patience_seconds: float = 5.0) -> str:
    """After a collective failed: which ranks no longer answer, in words. All ranks that still run call it at about the same
    time. A launcher that is about to end them may do so meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    state = torch.distributed
    if not state.is_initialized():
        return "another process is gone"
    try:
        store = state.distributed_c10d._get_default_store()
        store.set(f"atelier/alive/{state.get_rank()}", "yes")
        time.sleep(patience_seconds)
        silent = [rank for rank in range(state.get_world_size()) if not store.check([f"atelier/alive/{rank}"])]
    except RuntimeError:  # the store is gone, and it is on the first machine
        return f"rank 0 and its machine ({os.environ.get('MASTER_ADDR', 'the first')}) no longer answer"
    if not silent:
        return "a collective failed between ranks that still run"
    ranks = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {' and '.join(map(str, silent))}"
    return f"{ranks} of {state.get_world_size()} no longer answer{'s' if len(silent) == 1 else ''}"


class Heartbeats:
    """Each rank writes a sign of life into the store over which the ranks met, and one prints a line about ranks that stopped.

    Over NCCL torch ends a process that waits too long, with a report that does not say for which rank. This ends nothing.
    """

    def __init__(self, rank: int, world: int, *, seconds: float = 5.0, patience: int = 6) -> None:
        self.rank, self.world, self.seconds, self.patience = rank, world, seconds, patience
        # A connection of its own, because a wait on the common one blocks all its users.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = torch.distributed.TCPStore(address, port, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This rank is done, and its sign of life is no longer expected."""
        self._over.set()
        self._thread.join(5)

    def _watch(self) -> None:
        last, missed = dict[int, bytes](), dict.fromkeys(range(self.world), 0)
        keys = [f"atelier/beat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}" for rank in missed]
        try:
            for beat in itertools.count():
                ended = self._over.wait(self.seconds)
                self._store.set(keys[self.rank], "over" if ended else str(beat))
                if ended:
                    return
                for rank in missed:
                    sign = self._store.get(keys[rank]) if self._store.check([keys[rank]]) else b""
                    missed[rank] = missed[rank] + 1 if sign == last.get(rank) and sign not in (b"", b"over") else 0
                    last[rank] = sign
                silent = [str(rank) for rank in missed if missed[rank] == self.patience]
                if silent and self.rank == min(rank for rank in missed if missed[rank] < self.patience):
                    self._say(f"rank {' and '.join(silent)} of {self.world} gave no sign of life for", self.patience)
        except RuntimeError:  # the store is on the first machine
            if not self._over.is_set():
                self._say(f"rank 0's machine ({os.environ['MASTER_ADDR']}) does not answer for", 1)

    def _say(self, what: str, beats: int) -> None:
        print(f"warning on rank {self.rank}: {what} {beats * self.seconds:g} s", file=sys.stderr, flush=True)


def same_on_all(fingerprint: str) -> None:
    """A UserError where the processes were handed different data sets."""
    from accelerate.utils import gather_object

    if len(set(gather_object([fingerprint]))) > 1:
        raise UserError("the processes were handed different data sets: make it the same on each, with a fixed seed")


def ranks_of(state: Any) -> Ranks:
    """All processes of an Accelerator or a PartialState."""
    return Ranks(state.process_index, state.num_processes, state.wait_for_everyone)


def ranks_of_machine() -> Ranks:
    """The processes of this machine, which share the work on files of its own; the barrier is that of all machines."""
    state = process_state()
    world = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)) if state.num_processes > 1 else 1
    return Ranks(state.local_process_index, world, state.wait_for_everyone)
