"""How the images of a batch come about: their estimates on the way, as numbered frames and a GIF."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from .. import figures
from ..diffusion import Prediction
from .sampler import Sampler


def columns_for(count: int, num_blocks: int = 1) -> int:
    """A grid near a square; where classes stand in equal blocks, a row for each."""
    if num_blocks > 1 and count % num_blocks == 0 and count // num_blocks <= 16:
        return count // num_blocks
    return max(1, min(16, int(np.ceil(np.sqrt(count)))))


class Frames:
    """A callback that keeps frames of the images `chosen` of a batch: x_t on the left, the estimate of x0 on the right."""

    def __init__(self, chosen: Sequence[int], sampler: Sampler, *, most: int = 60, note: str = "") -> None:
        self.chosen, self.sampler, self.note, self.steps = list(chosen), sampler, note, sampler.steps
        count = min(most, self.steps)
        self.kept_steps = {round(i * (self.steps - 1) / max(1, count - 1)) for i in range(count)}
        self.frames: list[tuple[int, figures.Pixels, figures.Pixels]] = []  # step, x_t, x0

    def __call__(self, step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        if step in self.kept_steps and self.chosen:
            self._add(step, *(self.sampler.decode(x[self.chosen]) for x in (x_t, prediction.x0)))

    def finish(self, images: Tensor) -> None:
        """Add the last frame: the images of the batch as they came out."""
        if self.chosen:
            self._add(self.steps, images[self.chosen], images[self.chosen])

    def _add(self, step: int, x_t: Tensor, x0: Tensor) -> None:
        self.frames.append((step, figures.to_uint8(x_t), figures.to_uint8(x0)))

    @classmethod
    def joined(cls, sampler: Sampler, parts: Sequence[Sequence[Any]], note: str) -> "Frames":
        """The `frames` of several, which took the same steps, one after the other on each frame."""
        result = cls([], sampler, note=note)
        for same_step in zip(*parts, strict=True):
            step, x_t, x0 = zip(*same_step, strict=True)
            result.frames.append((step[0], np.concatenate(x_t), np.concatenate(x0)))
        return result

    def _sheet(self, step: int, x_t: figures.Pixels, x0: figures.Pixels) -> Image.Image:
        done = f"step {step:0{len(str(self.steps))}d} of {self.steps}"  # as long on every frame: they have one size
        columns = columns_for(len(x_t))
        titles = f"x_t, {done}", f"estimate of x_0 {self.note}"
        sheets = [figures.grid(x, columns=columns, title=title) for x, title in zip((x_t, x0), titles, strict=True)]
        tall = max(sheet.height for sheet in sheets)  # a title may take more lines than the other
        return figures.in_a_row([ImageOps.expand(sheet, (0, tall - sheet.height, 0, 0), "white") for sheet in sheets])

    def write(self, folder: Path, stem: str, ending: str, out: Path, *, fps: int) -> str:
        """Write the frames as numbered files into `folder`, and the GIF; gives the command that makes the GIF from them."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{stem}_*{ending}"):
            old.unlink()
        paths = [folder / f"{stem}_{i:03d}{ending}" for i in range(len(self.frames))]
        for path, frame in zip(paths, self.frames, strict=True):
            figures.save(self._sheet(*frame), path)
        return figures.gif(paths, folder / f"{stem}_%03d{ending}", out, fps=fps)
