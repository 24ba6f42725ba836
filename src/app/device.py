"""The one device that all visitors of the page share: the runs that are open on it, one job at a time, and how a job is
stopped."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from ..config import UserError
from ..runs.opened import Run, open_run

OPEN_RUNS = 3  # at most so many stay in memory
T = TypeVar("T")


class Stopped(Exception):
    """The visitor has stopped the job, or left the page."""


def stamp_of(path: str) -> tuple[tuple[str, int], ...]:
    """What changes when the weights of a run do: when its manifests were written, or its file. A run of the hub stays the same
    while the page is open."""
    place = Path(path)
    if not place.exists() and path.count("/") == 1:  # the page asks for no run of this machine that is gone
        return ((path, 0),)
    if place.is_file():
        return ((path, place.stat().st_mtime_ns),)
    manifests = [*place.glob("MANIFEST.json"), *place.glob("final/MANIFEST.json"), *place.glob("checkpoints/*/MANIFEST.json")]
    stamps = list[tuple[str, int]]()
    for manifest in sorted(manifests):
        with suppress(FileNotFoundError):  # a run that trains removes old checkpoints
            stamps.append((str(manifest), manifest.stat().st_mtime_ns))
    return tuple(stamps)


@dataclass
class Device:
    """The device, and the runs that were opened last on it, which stay open."""

    device: torch.device
    threads: int = field(default_factory=torch.get_num_threads)
    lock: threading.Lock = field(default_factory=threading.Lock)
    runs: "OrderedDict[str, tuple[Any, Run]]" = field(default_factory=OrderedDict)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around a job: it alone has the device, and begins with as many threads as a script does."""
        with self.lock:
            torch.set_num_threads(self.threads)
            yield

    def open(self, path: str) -> Run:
        """The run, opened once as long as its weights stay the same, with its number of threads. A UserError says what is
        missing or damaged."""
        stamp = stamp_of(path)
        if path in self.runs and self.runs[path][0] == stamp and stamp:
            run = self.runs[path][1]
            if run.config.get("cpu_threads") is not None:
                torch.set_num_threads(run.config["cpu_threads"])  # as open_run does: images are the same to the bit
        else:
            self.runs.pop(path, None)
            while len(self.runs) >= OPEN_RUNS:
                self.runs.popitem(last=False)
            run = open_run(path, self.device)
            self.runs[path] = stamp, run
        self.runs.move_to_end(path)
        return run

    def peek(self, path: str) -> Run | None:
        """The run where it can be opened and no job has the device, which would take long to wait for."""
        if not self.lock.acquire(blocking=False):
            return self.runs[path][1] if path in self.runs else None
        try:
            return self.open(path)
        except (UserError, OSError, RuntimeError):  # drawing says what is wrong
            return None
        finally:
            torch.set_num_threads(self.threads)
            self.lock.release()


def stream(device: Device, job: Callable[[Callable[[Any], None]], T]) -> Iterator[Any]:
    """What the `job` shows on its way, then its result, while it runs in a thread of its own on the device. The job is given
    `show`, and shows what it has by calling it. Where the iterator is closed before the end, because a visitor has stopped it
    or is gone, the next `show` raises Stopped in the job."""
    messages: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    is_stopped = threading.Event()

    def show(value: Any) -> None:
        if is_stopped.is_set():
            raise Stopped
        if value is not None:  # None asks only whether the job is stopped
            messages.put(("shown", value))

    def run() -> None:
        try:
            with device.held():
                show(None)
                messages.put(("result", job(show)))
        except BaseException as error:
            messages.put(("error", error))

    thread = threading.Thread(target=run, name="drawing", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = messages.get()
            if kind == "error":
                raise value
            yield value
            if kind == "result":
                return
    finally:
        is_stopped.set()
