"""Images drawn for the page by what sample.py draws with, shown while they are denoised."""

import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config import UserError
from ..diffusion import Prediction
from ..runs.opened import Opened
from ..runtime.failures import explain_out_of_memory
from ..sampling import Sampler, build_sampler
from ..sampling.cascade import open_upsampler, sampler_of, write_larger
from ..sampling.edit import at_size
from ..sampling.files import SINGLE, columns_for, read_pixels, write_samples
from ..sampling.plan import DrawRequest, Plan, plan_samples
from .device import Device

if TYPE_CHECKING:
    from PIL import Image

SHOW_EVERY = 0.4  # seconds between two images of the page while it draws
MOST_STEPS = 1000  # of one job
Show = Callable[[Any], None]


class Result(NamedTuple):
    """What a job has written: the sheet to look at, the files to take away, and what was drawn, in words."""

    sheet: Path
    files: list[Path]
    words: str


class Progress:
    """What the page shows while a job draws: all its images in one sheet, each as the network expects it to become. `show`
    takes the sheets, with a line that says how far the job is."""

    def __init__(self, show: Show, count: int) -> None:
        self.show, self.count, self.title = show, count, ""
        self.pixels: dict[int, figures.Pixels] = {}
        self.last = float("-inf")

    def watch(self, batch: Sequence[int], sampler: Sampler) -> "_Batch":
        """What sees a batch on its way, as `write_samples` wants it."""
        return _Batch(self, batch, sampler)

    def put(self, numbers: Sequence[int], images: Tensor, line: str) -> None:
        """Images (B, C, H, W) of these numbers as they are now."""
        self.pixels |= zip(numbers, figures.to_uint8(images), strict=False)
        blank = np.full_like(next(iter(self.pixels.values())), 225)
        shown = figures.on_white([self.pixels.get(i, blank) for i in range(self.count)])
        self.last = time.monotonic()
        self.show((figures.grid(shown, columns=columns_for(self.count)), self.title + line))


class _Batch:
    """A batch on its way: it shows the estimate of x_0 as often as a person looks, and ends a job that is stopped."""

    def __init__(self, progress: Progress, batch: Sequence[int], sampler: Sampler) -> None:
        self.progress, self.batch, self.sampler = progress, batch, sampler

    def __call__(self, step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        progress, steps = self.progress, self.sampler.steps
        progress.show(None)
        if time.monotonic() - progress.last >= SHOW_EVERY:
            images = self.sampler.decode(prediction.x0[: len(self.batch)])
            progress.put(self.batch, images, f"{_numbers(self.batch, progress.count)}, step {step + 1} of {steps}")

    def finish(self, images: Tensor) -> None:
        self.progress.put(self.batch, images, f"{_numbers(self.batch, self.progress.count)} done")


def _numbers(batch: Sequence[int], count: int) -> str:
    return f"images {batch[0] + 1} to {batch[-1] + 1} of {count}" if count > 1 else "the image"


class Prepared(NamedTuple):
    """A run that is open, with its sampler, the plan of a request, and the run that makes its images larger, if any."""

    opened: Opened
    sampler: Sampler
    plan: Plan
    larger: Opened | None


def prepare(device: Device, request: DrawRequest) -> Prepared:
    """All that a request needs, in the order of sample.py, on which the number of threads depends. A UserError says what does
    not fit the run."""
    torch.set_num_threads(device.threads)  # a run of a job before may have asked for others
    opened = device.open(request.run)
    if not isinstance(opened, Opened):
        raise UserError(f"{request.run} draws 2-D points: go to the tab Points")
    if opened.condition is not None and request.condition is None:
        raise UserError(f"{request.run} draws from images ({opened.condition.kind}): go to the tab Edit, and give it one")
    opened = at_size(opened, request.size, request.image)
    larger = open_upsampler(request.then, device.device) if request.then is not None else None
    sampler = build_sampler(opened, request.spec, condition_guidance=request.condition_guidance)
    return Prepared(opened, sampler, plan_samples(opened, sampler, request.arguments), larger)


def draw_images(device: Device, request: DrawRequest, folder: Path, show: Show) -> Result:
    """Draw what is asked for into the folder, with the files that sample.py writes, and show it on its way."""
    with explain_out_of_memory(request.batch_size, request.batch_size, key="--batch-size"):
        opened, sampler, plan, larger = prepare(device, request)
        progress = Progress(show, plan.count)
        options = {"batch_size": request.batch_size, "seed": request.seed, "frames": request.frames, "device": device.device}
        paths = write_samples(
            opened, sampler, folder, **plan.job, **options, ranks=SINGLE, request=plan.request, watch=progress.watch
        )
        sheet = folder / ("side_by_side.png" if plan.conditioned is not None else "grid.png")
        words = f"{plan.count} images of {opened.path} (step {opened.step}), {sampler.calls(plan.edit)} network calls a batch"
        if larger is not None:
            names = [plan.class_names[label] for label in plan.labels] if plan.labels is not None else None
            at = {"level": request.condition_noise, "seed": request.seed, "batch_size": request.batch_size}
            paths += write_larger(
                larger,
                sampler_of(larger, request.spec),
                folder,
                class_names=names,
                **at,
                device=device.device,
                ranks=SINGLE,
                watch=Progress(show, plan.count).watch,
            )
            sheet, words = folder / "larger" / "grid.png", f"{words}; then made larger by {larger.path}"
    files = [sheet, *folder.glob("denoising.gif")]
    return Result(sheet, [*files, pack(folder, paths)], words)


def pack(folder: Path, paths: Sequence[Path]) -> Path:
    """images.zip of the images, by their names in the folder."""
    out = folder / "images.zip"
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for path in paths:
            file.write(path, path.relative_to(folder).as_posix())
    return out


def compare_images(
    device: Device, requests: Sequence[Sequence[DrawRequest]], titles: Sequence[Sequence[str]], folder: Path, show: Show
) -> Result:
    """Draw the same seeds by each request: a panel for each, with its title, in rows as they are given. The folder gets a
    subfolder of each, named by its number."""
    panels, count, every = list[list["Image.Image"]](), 0, sum(map(len, requests))
    paths = list[Path]()
    for row, row_titles in zip(requests, titles, strict=True):
        panels.append([])
        for request, title in zip(row, row_titles, strict=True):
            count += 1
            part = folder / f"{count:02d}"

            def show_part(value: Any, number: int = count, title: str = title) -> None:
                show(value if value is None else (value[0], f"{number} of {every}: {title}, {value[1]}"))

            draw_images(device, request, part, show_part)
            samples = sorted(part.glob("[0-9]*.png"))
            paths += samples
            pixels = figures.on_white(read_pixels(samples))
            panels[-1].append(figures.grid(pixels, columns=columns_for(len(pixels)), title=title))
    sheet = figures.in_a_column([figures.in_a_row(row) for row in panels])
    figures.save(sheet, folder / "comparison.png")
    files = [folder / "comparison.png", pack(folder, paths)]
    return Result(files[0], files, f"{every} panels of the same seed, {len(paths)} images")
