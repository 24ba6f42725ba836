"""Progress, speed, and when something is due."""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..config.progress import Progress


class Cadence:
    """Due at every `every`-th step of the run; never without one. `word` says what is.

    Within the steps `early` it is due `FIRST` steps after their begin, too, then after twice as many, and so on as long as that
    is less than `every`: what a person waits for comes early, and then ever more rarely.
    """

    FIRST = 100

    def __init__(self, word: str, every: int | None, *, early: range = range(0)) -> None:
        self.word, self.every, self._first = word, every, early.start
        after = [self.FIRST << i for i in range(every.bit_length())] if every is not None else []
        self.early = frozenset(early.start + steps for steps in after if steps < min(every or 0, len(early)))

    def regular(self, step: int) -> bool:
        """Whether it would be due without the early ones."""
        return self.every is not None and step % self.every == 0

    def __call__(self, step: int) -> bool:
        return self.regular(step) or step in self.early

    def count(self, first: int, end: int) -> int:
        """How often it is due between step `first` of the run and step `end`, where it is due in any case."""
        if self.every is None:
            return 1
        return -(-(end - first) // self.every) + sum(first < step < end and not self.regular(step) for step in self.early)

    def __str__(self) -> str:
        first = ", ".join(map(str, sorted(step - self._first for step in self.early)))
        return f"{self.word} every {self.every}" + (f" (the first ones after {first})" if first else "")


class Activity(NamedTuple):
    """What took how many seconds after a step, besides steps."""

    step: int
    what: str
    seconds: float


class Clock:
    """The progress of a run (images, images/s, time left), its speed, and what the last previews and checkpoints took.

    Where it is `shown`, a person sees the progress; `tell`(words, at_once) is told what the run does instead.
    """

    def __init__(
        self, step: int, images: int, total_images: int | None, *, shown: bool, tell: Callable[..., object] | None = None
    ) -> None:
        self._images = self._read_images = images
        self._step, self._tell = step, tell or (lambda *_: None)
        self._activity: tuple[str, float] | None = None
        self.activities = deque[Activity](maxlen=1000)
        self.readings = deque([(step, time.monotonic())], maxlen=1000)  # (step, when the device had done it)
        self._counted = "" if total_images is None else " images"
        self._progress = Progress(f"step {step}", total_images, done=images, shown=shown)
        self._describe()

    @property
    def bar_shown(self) -> bool:
        return self._progress.bar_shown

    def _describe(self, doing: str = "") -> None:
        if not self.bar_shown:
            self._progress.describe(f"step {self._step},{doing}{self._counted}")

    def tick(self, images: int) -> None:
        """Count one more step of so many images."""
        self.leave()
        self._images += images
        self._step += 1
        self._progress.update(images)
        self._describe()
        self._tell(f"step {self._step + 1}", False)

    def enter(self, what: str) -> None:
        """Say that this is being done between two steps, and measure how long it takes."""
        self.leave()
        self._activity = (what, time.monotonic())
        self._describe(f" {what},")
        self._tell(what, True)

    def leave(self) -> None:
        """Note how long what was entered last has taken."""
        if self._activity is not None:
            what, began = self._activity
            self.activities.append(Activity(self._step, what, time.monotonic() - began))
            self._activity = None

    def read(self, images_per_epoch: int) -> dict[str, float]:
        """The epoch, and the images per second since the last reading."""
        now = time.monotonic()
        speed = (self._images - self._read_images) / max(1e-9, now - self.readings[-1][1])
        self._read_images = self._images
        self.readings.append((self._step, now))
        return {"epoch": self._images / images_per_epoch, "images_per_second": round(speed, 1)}

    def set_total(self, images: int) -> None:
        """The run will end after so many images."""
        self._counted = " images"
        self._progress.set_total(images)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Put epoch, step and loss on the bar."""
        if "loss" in values and self.bar_shown:
            self._progress.describe(f"epoch {values['epoch']:.1f} step {step} loss {values['loss']:.4f}")

    def close(self) -> None:
        self.leave()
        self._progress.close(whole=False)


def peak_memory_gigabytes(device: torch.device) -> float:
    """The most memory that this process has held: of the GPU, or, without one, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
