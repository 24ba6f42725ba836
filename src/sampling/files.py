"""Samples as files: whole batches dealt to ranks, each picture written once, a killed sampling goes on."""

import io
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import figures
from ..config import UserError
from ..config.progress import Progress
from ..diffusion import Prediction
from ..runs.opened import Opened
from ..runtime.failures import explain_failure, warn_on_failure
from ..storage.blocks import Ranks, wait_for
from ..storage.requests import claim_folder
from .sampler import Edit, Sampler, describe
from .upscaling import Upscaler


class Frames:
    """A callback that keeps the way of the pictures `chosen` of a batch: x_t on the left, the x0 estimate on the right."""

    def __init__(self, chosen: Sequence[int], sampler: Sampler, *, most: int = 60, note: str = "") -> None:
        self.chosen, self.sampler, self.note = list(chosen), sampler, note
        self.steps = sampler.steps
        kept = min(most, self.steps)
        self.keep = {round(i * (self.steps - 1) / max(1, kept - 1)) for i in range(kept)}
        self.seen: list[tuple[int, figures.Pixels, figures.Pixels]] = []  # step, x_t, x0

    def __call__(self, step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        if step in self.keep and self.chosen:
            shown = self.sampler.decode
            self._add(step, shown(x_t[self.chosen]), shown(prediction.x0[self.chosen]))

    def finish(self, images: Tensor) -> None:
        """The last frame: the pictures of the batch as they came out."""
        if self.chosen:
            self._add(self.steps, images[self.chosen], images[self.chosen])

    def _add(self, step: int, x_t: Tensor, x0: Tensor) -> None:
        self.seen.append((step, figures.to_uint8(x_t), figures.to_uint8(x0)))

    @classmethod
    def joined(cls, sampler: Sampler, parts: Sequence[Sequence[Any]], note: str) -> "Frames":
        """What several have `seen`, which went the same steps, one after the other on each frame."""
        frames = cls([], sampler, note=note)
        for same in zip(*parts, strict=True):
            step, x_t, x0 = zip(*same, strict=True)
            frames.seen.append((step[0], np.concatenate(x_t), np.concatenate(x0)))
        return frames

    def _sheet(self, step: int, x_t: figures.Pixels, x0: figures.Pixels) -> Image.Image:
        done = f"step {step:0{len(str(self.steps))}d} of {self.steps}"  # as long on every frame: they have one size
        columns = columns_for(len(x_t))
        titles = f"x_t, {done}", f"estimate of x_0 {self.note}"
        sheets = [figures.grid(x, columns=columns, title=title) for x, title in zip((x_t, x0), titles, strict=True)]
        tall = max(sheet.height for sheet in sheets)  # a title may take more lines than the other
        return figures.in_a_row([ImageOps.expand(sheet, (0, tall - sheet.height, 0, 0), "white") for sheet in sheets])

    def write(self, folder: Path, stem: str, ending: str, out: Path, *, fps: int) -> str:
        """The frames as numbered files in the new folder, and the GIF; gives the command that makes it again."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{stem}_*{ending}"):
            old.unlink()
        paths = [folder / f"{stem}_{i:03d}{ending}" for i in range(len(self.seen))]
        for path, seen in zip(paths, self.seen, strict=True):
            figures.save(self._sheet(*seen), path)
        return figures.gif(paths, folder / f"{stem}_%03d{ending}", out, fps=fps)


def claim(
    out: Path,
    request: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
    *,
    what: str = "images",
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> None:
    """Write `request`, all that what is drawn depends on, and `more` to `out`/metadata.json; a UserError where the folder holds
    something else. What a killed drawing left half-written is removed."""
    claim_folder(out / "metadata.json", request, Ranks(rank, 1, barrier), holds=what, notes=more, indent=1)
    if rank == 0:
        for part in (*out.glob("*.part"), *(out / "frames").glob("*.part")):
            part.unlink()
    barrier()


@contextmanager
def nothing_left(out: Path, rank: int = 0) -> Iterator[None]:
    """Where drawing into `out` ends in a UserError before a single image was written, the folder is not left behind."""
    try:
        yield
    except UserError:
        if rank == 0 and out.is_dir() and {path.name for path in out.rglob("*") if path.is_file()} <= {"metadata.json"}:
            shutil.rmtree(out, ignore_errors=True)
        raise


def columns_for(count: int, num_blocks: int = 1) -> int:
    """A grid near a square; where classes stand in equal blocks, a row for each."""
    if num_blocks > 1 and count % num_blocks == 0 and count // num_blocks <= 16:
        return count // num_blocks
    return max(1, min(16, int(np.ceil(np.sqrt(count)))))


def write_samples(
    opened: Opened,
    sampler: Sampler,
    out: Path,
    *,
    count: int,
    batch_size: int,
    labels: Sequence[int] | None,
    seed: int,
    frames: bool,
    device: torch.device,
    rank: int,
    world: int,
    barrier: Callable[[], None],
    class_names: Sequence[str] = (),
    edit: Edit | None = None,
    low: Tensor | None = None,
    upscaler: Upscaler | None = None,
    npz: bool = False,
    told: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Draw `count` pictures into `out`: PNGs, metadata.json, grid.png, and with `frames` the denoising GIF.

    With an `upscaler` they are written a second time, larger, into `out`/upscaled; with `npz` all of them into one file that
    guided-diffusion's evaluator reads. `told` is what else they depend on. Files that are there already are kept; a folder that
    holds other pictures is a UserError. Gives the pictures' paths.
    """
    class_names = class_names or opened.class_names
    request: dict[str, Any] = {
        "weights": opened.digest,
        "run": opened.name,
        "step": opened.step,
        **describe(sampler, seed, edit),
        "num_samples": count,
        "batch_size": batch_size,
        "classes": [class_names[label] for label in labels] if labels is not None else None,
        **(told or {}),
    }
    claim(out, request, {"path": str(opened.path), "config": opened.config}, rank=rank, barrier=barrier)

    digits = max(5, len(str(count - 1)))
    paths = [out / f"{i:0{digits}d}.png" for i in range(count)]
    large = [out / "upscaled" / path.name for path in paths]
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    mine = batches[rank::world]
    way: Frames | None = None
    gif_wanted = frames and rank == 0 and not (out / "denoising.gif").exists()
    with Progress("sampling", sum(map(len, mine)) * (world if rank == 0 else 1), shown=rank == 0) as bar:
        for batch in mine:
            watched = None
            if gif_wanted and batch.start == 0:
                shown = min(20, len(batch))  # spread over the batch, so that every class is among them
                watched = Frames([i * len(batch) // shown for i in range(shown)], sampler)
            due = [large, paths] if upscaler is not None else [paths]
            if watched is not None or not all(files[i].exists() for files in due for i in batch):
                chosen = [labels[i] for i in batch] if labels is not None else None
                given = {"edit": edit, "low": low[batch.start : batch.stop] if low is not None else None}
                x = sampler.draw(seed, batch, chosen, device=device, callback=watched, batch_size=batch_size, **given)
                for files in due:
                    made = upscaler.upscale(x) if upscaler is not None and files is large else x
                    for i, pixels in zip(batch, figures.to_uint8(made), strict=True):
                        if not files[i].exists():
                            with explain_failure(files[i]):
                                figures.save(figures.to_image(pixels), files[i])
                if watched is not None:
                    watched.finish(x)
                    way = watched
            bar.update(len(batch) * (world if rank == 0 else 1))
    barrier()
    if rank == 0:
        wait_for(paths)
        if npz:
            with explain_failure(out / "samples_*.npz"):
                _write_npz(paths, labels, out)
        names = [class_names[label] for label in labels] if labels is not None else None
        with warn_on_failure("grid.png"):
            _draw_grid(paths[:256], names, opened.image.size, out / "grid.png")
        if sampler.source is not None:
            with warn_on_failure("ways.png"):
                _draw_ways(sampler, seed, paths[:32], out / "ways.png")
        if way is not None:  # the last of all: where it fails, the rest is there
            with explain_failure(out / "denoising.gif"):
                way.write(out / "frames", "frame", ".png", out / "denoising.gif", fps=12)
    return paths


def _draw_grid(paths: Sequence[Path], names: Sequence[str] | None, size: int, out: Path) -> None:
    """Samples on one sheet; where classes stand in equal blocks, a row for each."""
    shown = names[: len(paths)] if names is not None else None
    blocks = len(set(names)) if names is not None and list(names) == sorted(names, key=names.index) else 1
    array = np.stack([np.asarray(Image.open(path)).reshape(size, size, -1) for path in paths])
    figures.save(figures.grid(array, columns=columns_for(len(paths), blocks), labels=shown), out)


@torch.no_grad()
def _draw_ways(sampler: Sampler, seed: int, paths: Sequence[Path], out: Path) -> None:
    """What pictures came from, each beside what it became."""
    own = next(sampler.network.parameters())  # pyright: ignore[reportFunctionMemberAccess]
    sources = figures.to_uint8(sampler.decode(sampler.start(seed, range(len(paths))).to(own)))
    rows = [row for source, path in zip(sources, paths, strict=True) for row in (source, np.asarray(Image.open(path)))]
    array = np.stack([row.reshape(sources.shape[1:]) for row in rows])
    figures.save(figures.grid(array, columns=2 * min(4, len(paths)), title="source and sample, side by side"), out)


def _write_npz(paths: Sequence[Path], labels: Sequence[int] | None, out: Path) -> None:
    """samples_NxHxWx3.npz: the pictures as arr_0 (N, H, W, 3) uint8, grey ones in three equal channels as the evaluator wants
    them, and their labels as arr_1 where they have any. One picture at a time is in memory."""
    with Image.open(paths[0]) as first:
        shape = (len(paths), first.height, first.width, 3)
    staged = out / ".samples.part"
    try:
        with zipfile.ZipFile(staged, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for path in paths:
                    with Image.open(path) as image:
                        stream.write(np.asarray(image.convert("RGB")).tobytes())
            if labels is not None:
                content = io.BytesIO()
                np.save(content, np.array(labels, dtype=np.int64))
                file.writestr("arr_1.npy", content.getvalue())
        staged.replace(out / f"samples_{'x'.join(map(str, shape))}.npz")
    finally:
        staged.unlink(missing_ok=True)
