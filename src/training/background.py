"""A thread beside the training that brings what a run saves to another place, and fails without ending the run."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..runtime.checkpoint import step_folder

RETRY_SECONDS = 60.0
LAST_RETRY_SECONDS = 10.0  # between the last attempts, when the run has ended


class Background(ABC):
    """A thread that brings the newest checkpoint of a run to the place `where`, as `_put` of a subclass does it.

    A failure is reported once, and what failed is tried again; it never ends the run. `pinned` checkpoints must stay here.
    """

    starts_at_once = False  # whether `_put` is called before there is a checkpoint, too
    last_attempts = 1  # when the run has ended
    failing, works = "not uploaded", "uploads work again"  # what is said of the first failure, and of the success after it

    def __init__(self, run_dir: Path, where: str) -> None:
        self.where, self._run_dir = where, run_dir
        self.say: Callable[[str], None] = print
        self._condition = threading.Condition()
        self._next: str | None = None  # the checkpoint to push next
        self._now: str | None = None  # the one that is being pushed
        self._back = False  # the run went back to the next one: newer ones there are void
        self._closing = self._is_last = False
        self._failed: str | None = None
        self._thread = threading.Thread(target=self._work, name=type(self).__name__, daemon=True)
        self._thread.start()

    @property
    def pinned(self) -> set[int]:
        """The steps of checkpoints that are being pushed, or will be next."""
        with self._condition:
            return {int(name.removeprefix("step_")) for name in (self._next, self._now) if name is not None}

    def wake(self, step: int, *, went_back: bool = False) -> None:
        """The checkpoint of this step is the newest now."""
        with self._condition:
            self._next = step_folder(Path(), step).name
            self._back |= went_back
            self._condition.notify()

    def close(self) -> bool:
        """Push what is left, as long as that takes, or say how to push it later; gives whether all is there."""
        self.begin_close()
        self._thread.join()
        if (line := self._last_line(self._failed)) is not None:
            self.say(line)
        return self._failed is None

    def begin_close(self) -> None:
        """Let it push what is left, without waiting for it."""
        with self._condition:
            self._closing = True
            self._condition.notify()

    @abstractmethod
    def _put(self, step: str | None, back: bool) -> None:
        """Bring the checkpoint of this name there, and what belongs to it; `_is_last` says that the run has ended."""

    @abstractmethod
    def _last_line(self, failed: str | None) -> str | None:
        """What is said at the end: that all is there, or, with the reason why not, how to bring it later."""

    def _work(self) -> None:
        closing, attempts, waits = False, self.last_attempts, not self.starts_at_once
        while not closing:
            with self._condition:
                if waits and not self._closing and (self._next is None or self._failed is not None):
                    self._condition.wait(RETRY_SECONDS if self._failed is not None else None)
                closing, self._now, before = self._closing, self._next, self._failed
                back, self._back = self._back, False
                self._is_last, waits = closing, True
            failed = None
            try:
                self._put(self._now, back)
            except BaseException as error:  # what a library written in another language raises, too: training goes on
                failed = str(error) or type(error).__name__
            with self._condition:
                self._failed = failed
                self._back |= back and failed is not None
                self._next = self._next if failed is not None or self._next != self._now else None
                self._now = None
            if (failed is None) != (before is None):
                warning = f"warning: {self.failing} ({failed}); it is tried again, and training goes on"
                with suppress(Exception):  # the log may be closed by now
                    self.say(warning if failed is not None else self.works)
            if closing and failed is not None and attempts > 1:
                closing, attempts = False, attempts - 1
                time.sleep(LAST_RETRY_SECONDS)
