"""Progress, speed, and when something is due."""

import resource
import sys
import time

import torch
from tqdm import tqdm


class Cadence:
    """Due at every `every`-th step; never without one. `word` says what is."""

    def __init__(self, word: str, every: int | None) -> None:
        self.word, self.every = word, every

    def __call__(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0


class Clock:
    """The progress bar of a run (images, images/s, time left; on the main process only), and its speed."""

    def __init__(self, step: int, images: int, total_images: int | None, *, shown: bool) -> None:
        self._began = self._read_at = time.monotonic()
        self._images = self._read_images = images
        self._bar = tqdm(
            total=total_images,
            initial=images,
            desc=f"step {step}",
            unit="img",
            unit_scale=True,
            disable=None if shown else True,
        )

    @property
    def bar_shown(self) -> bool:
        return not self._bar.disable

    def tick(self, images: int) -> None:
        """One more step, of so many images, is done."""
        self._images += images
        self._bar.update(images)

    def read(self, images_per_epoch: int) -> dict[str, float]:
        """epoch, and images_per_second since the last reading."""
        now = time.monotonic()
        speed = (self._images - self._read_images) / max(1e-9, now - self._read_at)
        self._read_at, self._read_images = now, self._images
        return {"epoch": self._images / images_per_epoch, "images_per_second": round(speed, 1)}

    def show(self, step: int, values: dict[str, float]) -> None:
        """Put epoch, step and loss on the bar."""
        if "loss" in values:
            self._bar.set_description(f"epoch {values['epoch']:.1f} step {step} loss {values['loss']:.4f}", refresh=False)

    def close(self) -> None:
        self._bar.close()


def peak_memory_gigabytes(device: torch.device) -> float:
    """The most memory that this process has held: of the GPU, or, without one, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
