"""How one call of a script's `train` runs: for a person who watches it, or as a quiet rehearsal in a temporary folder."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import UserError
from ..config.progress import Phases
from ..runtime.failures import explain_out_of_memory, is_lost_rank
from ..runtime.launch import undetermined
from ..runtime.processes import silent_ranks
from .background import Background
from .clock import Clock
from .state import TrainState

RESTART = -1  # what `train` returns, instead of an exit status, to be called again: it goes on from the newest checkpoint


@dataclass
class RunMode:
    """What a call of `train` takes from its caller, and what it leaves to it.

    A `quiet` run says nothing but what it does at the moment, in lines that begin with `job`, and makes no report. `closing`
    is closed however the training ends; `on_kill` is called where a second signal ends the process at once; `set_batch` is told
    the batch, the micro-batch and its key of each stage. `uploads`, `clock`, `facts` and `train_state` are the run's.
    """

    quiet: bool = False
    says_at_once: bool = True
    job: str = ""
    on_kill: Callable[[], object] = lambda: None
    set_batch: Callable[[int, int, str], None] = lambda *_: None
    closing: ExitStack = field(default_factory=ExitStack)
    uploads: list[Background] = field(default_factory=list)
    clock: Clock | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    train_state: TrainState | None = None
    _phases: Phases | None = None

    def enter_phase(self, what: str, *, at_once: bool = True) -> None:
        """Say on the first process that this is being done now: at once in a quiet run, and every half minute in each."""
        if os.environ.get("RANK", "0") != "0":
            return
        if self._phases is None:
            self._phases = Phases(self.job, at_once=self.quiet and self.says_at_once)
            self.closing.callback(self.leave_phases)
        self._phases.enter(what, at_once=at_once)

    def leave_phases(self) -> None:
        """Say no more what is being done: from now on the run's clock does, or the training is over."""
        if self._phases is not None:
            self._phases.close()
        self._phases = None


Train = Callable[[Any, Path, RunMode, int | None], int]  # (config, run directory, how to run, stop_at) -> exit status


def call(train: Train, cfg: Any, run_dir: Path, run_mode: RunMode, stop_at: int | None = None) -> int:
    """Train, again after each rollback, and close all that was opened; errors that a person can mend are said in words."""
    try:
        with run_mode.closing, explain_out_of_memory(cfg.batch_size, cfg.micro_batch_size) as run_mode.set_batch:
            while (status := train(cfg, run_dir, run_mode, stop_at)) == RESTART:
                pass
        return status
    except RuntimeError as error:
        if (missing := undetermined(error)) is not None:
            reason = f"deterministic: torch has no {missing} that repeats itself to the bit on this device"
            raise UserError(f"{reason}; --set deterministic=false, or train without what asks for it") from error
        if not is_lost_rank(error):
            raise
        lost = f"error on rank {os.environ.get('RANK', '0')}: {silent_ranks()}, so this one cannot go on"
        reason = str(error).splitlines()[0][:200]
        print(f"{lost} ({reason}); what was saved is whole: run the same command again", file=sys.stderr, flush=True)
        return 1
