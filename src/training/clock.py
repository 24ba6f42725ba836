"""Progress, speed, and when something is due."""

import resource
import sys
import time

import torch
from tqdm import tqdm

from .stream import Split

DRY_WARMUP, DRY_STEPS = 2, 8


class Cadence:
    """Due at every `every`-th step; never without one. `word` says what is."""

    def __init__(self, word: str, every: int | None) -> None:
        self.word, self.every = word, every

    def __call__(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0


class Clock:
    """The progress bar of a run (images, images/s, time left; on the main process only), and its speed."""

    def __init__(self, step: int, steps: int, batch: int, *, shown: bool) -> None:
        self.first, self.steps, self.batch = step, steps, batch
        self._began = self._read_at = time.monotonic()
        self._done = self._read_done = step
        self._bar = tqdm(
            total=steps * batch,
            initial=step * batch,
            desc=f"step {step}",
            unit="img",
            unit_scale=True,
            disable=None if shown else True,
        )
        self._shown = shown

    @property
    def bar_shown(self) -> bool:
        return not self._bar.disable

    def tick(self) -> None:
        """One more step is done."""
        self._done += 1
        self._bar.update(self.batch)

    def read(self, images_per_epoch: int) -> dict[str, float]:
        """epoch, and images_per_second since the last reading."""
        now = time.monotonic()
        speed = (self._done - self._read_done) * self.batch / max(1e-9, now - self._read_at)
        self._read_at, self._read_done = now, self._done
        return {"epoch": self._done * self.batch / images_per_epoch, "images_per_second": round(speed, 1)}

    def show(self, step: int, values: dict[str, float]) -> None:
        """Put epoch, step and loss on the bar."""
        if "loss" in values:
            self._bar.set_description(f"epoch {values['epoch']:.1f} step {step} loss {values['loss']:.4f}", refresh=False)

    def close(self) -> None:
        self._bar.close()

    def measured(self, device: torch.device, step: int) -> bool:
        """In a dry run: time the steps after the first ones; true when enough are timed."""
        if step == self.first + min(DRY_WARMUP, self.steps - self.first - 1):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.read(1)
        enough = step >= min(self.first + DRY_STEPS, self.steps)
        if enough and device.type == "cuda":
            torch.cuda.synchronize(device)
        return enough

    def report(self, name: str, split: Split, parameters: int, images: int, device: torch.device) -> None:
        """What a dry run found out."""
        self.close()
        if not self._shown:
            return
        speed = self.read(1)["images_per_second"]
        seconds = self.steps * self.batch / max(speed, 1e-9)
        rows = {
            "data": f"{images} pictures",
            "parameters": f"{parameters / 1e6:.2f} M",
            "steps": f"{self.steps} of {split.batch} images = {self.steps * split.batch / images:.1f} epochs",
            "one step": f"{split.world} x {device.type} x {split.accumulation} x {split.micro} images",
            "images/s": f"{speed:.1f}",
            "memory": f"{peak_memory_gigabytes(device):.2f} GB",
            "time": f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min",
        }
        print(f"{name}, a dry run: nothing was written")
        for row, value in rows.items():
            print(f"  {row:<11} {value}")


def peak_memory_gigabytes(device: torch.device) -> float:
    """The most memory that this process has held: of the GPU, or, without one, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
