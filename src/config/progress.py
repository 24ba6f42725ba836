"""The progress of long work: a bar on a terminal, and elsewhere a line every half minute."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
EVERY_SECONDS = 30.0  # between two lines
STRETCHES = 6  # the speed is that of the last so many lines


def say(message: str) -> None:
    """Print a line for a person on standard output, above a bar where there is one."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()
    _spoken()


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.4 h."""
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


_last_spoken = 0.0
_pulses: list["_Pulse"] = []  # the last one is of the innermost job
_open: list["Progress"] = []


def _spoken() -> None:
    global _last_spoken
    _last_spoken = time.monotonic()


class _Pulse:
    """A thread that calls `report` whenever nothing was printed for `EVERY_SECONDS`; of jobs inside jobs, for the innermost."""

    def __init__(self, report: Callable[[], None]) -> None:
        self._report, self._over, self._began = report, threading.Event(), time.monotonic()
        _pulses.append(self)
        threading.Thread(target=self._beat, name="progress", daemon=True).start()

    def _beat(self) -> None:
        silent = 0.0
        while not self._over.wait(max(EVERY_SECONDS / 100, EVERY_SECONDS - silent)):
            silent = time.monotonic() - max(self._began, _last_spoken)
            if silent >= EVERY_SECONDS and _pulses[-1:] == [self]:
                self._report()
                _spoken()
                silent = 0.0

    def close(self) -> None:
        self._over.set()
        if self in _pulses:
            _pulses.remove(self)


class Progress:
    """How much of `total` (None: unknown) `unit` is done, for a person, on standard error. `doing` says what is being done.

    Where it is not `shown` (on all processes but one) it prints nothing. `processes` share the work, and this one knows only
    its own part.
    """

    def __init__(
        self,
        doing: str,
        total: int | None = None,
        *,
        unit: str = "images",
        done: int = 0,
        shown: bool = True,
        leave: bool = True,
        processes: int = 1,
    ) -> None:
        self.doing, self.total, self.unit, self.done, self._processes = doing, total, unit, done, processes
        self._word = "" if unit == "B" else f" {unit}"
        self._inside = 0  # of what the next `update` will count
        _open.append(self)
        self._began, self._printed = time.monotonic(), False
        self._marks = deque([(self._began, done)], maxlen=STRETCHES + 1)
        self._bar = self._pulse = None
        if shown and sys.stderr is not None and sys.stderr.isatty():
            many = unit == "B" or (total or 0) >= 10**6
            word = self._word or unit
            self._bar = tqdm(total=total, initial=done, desc=doing, unit=word, unit_scale=many, leave=leave)
        elif shown:
            self._pulse = _Pulse(self._print)

    @property
    def bar_shown(self) -> bool:
        return self._bar is not None

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done, self._inside = self.done + count, 0
        if self._bar is not None:
            self._bar.update(count)

    def set_total(self, total: int) -> None:
        """There are so many, as is known only now."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total

    def describe(self, doing: str) -> None:
        """Show from now on that this is being done."""
        self.doing = doing
        if self._bar is not None:
            self._bar.set_description(doing, refresh=False)

    def line(self) -> str:
        """checking images 1200/40000, 310 images/s, 2 min left"""
        now = time.monotonic()
        (then, before), elapsed = self._marks[0], now - self._began
        done = self.done + self._inside * self._processes
        done = done if self.total is None else min(done, self.total)
        speed = (done - before) / max(1e-9, now - then)
        self._marks.append((now, done))
        line = f"{self.doing} {self._amount(done)}{self._word if self.total is None else f'/{self._amount(self.total)}'}"
        if speed <= 0:
            return f"{line}, {duration(elapsed)} so far"
        line += f", {self._amount(speed, rate=True)}{self._word}/s"
        return line if self.total is None or done >= self.total else f"{line}, {duration((self.total - done) / speed)} left"

    def _amount(self, count: float, *, rate: bool = False) -> str:
        if self.unit == "B":
            return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
        return f"{count:.3g}" if rate and count < 100 else f"{count:.0f}"

    def _print(self) -> None:
        self._printed = True
        print(self.line(), file=sys.stderr, flush=True)

    def close(self, *, whole: bool = True) -> None:
        """End it. Where lines were printed on the way, a last one says that all is done, unless it is not `whole`."""
        if self._bar is not None:
            self._bar.close()
        if self._pulse is not None:
            self._pulse.close()
            if self._printed and whole and self.done:
                took = duration(time.monotonic() - self._began)
                print(f"{self.doing} {self._amount(self.done)}{self._word}, done in {took}", file=sys.stderr, flush=True)
        self._bar = self._pulse = None
        if self in _open:
            _open.remove(self)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(whole=kind is None)


def within(count: int) -> None:
    """`count` more are done inside the piece that the innermost progress counts next, such as images of a block."""
    if _open:
        _open[-1]._inside += count


def track(items: Iterable[T], doing: str, *, unit: str = "images", leave: bool = True) -> Iterator[T]:
    """The items one after the other, with a Progress."""
    total = len(items) if isinstance(items, Sequence) else None
    with Progress(doing, total, unit=unit, leave=leave) as progress:
        for item in items:
            yield item
            progress.update()


class Phases:
    """What a long job does now, in lines on standard output that begin with `job`: one for each new phase (without `at_once`
    only for one that takes long), and another every half minute."""

    def __init__(self, job: str, *, at_once: bool) -> None:
        self._job, self._at_once, self._what, self._since = job, at_once, "", time.monotonic()
        self._pulse = _Pulse(self._print)

    def enter(self, what: str, *, at_once: bool = True) -> None:
        """A phase begins: `what` is being done now."""
        if what == self._what:
            return
        self._what, self._since = what, time.monotonic()
        if self._at_once and at_once:
            say(f"{self._job}{what}")

    def _print(self) -> None:
        if self._what:
            say(f"{self._job}{self._what}, {duration(time.monotonic() - self._since)} so far")

    def close(self) -> None:
        self._pulse.close()
