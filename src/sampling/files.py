"""Samples as files: batches dealt to ranks, each image written once, so that a killed sampling goes on; frames on the way."""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config import UserError
from ..config.progress import Progress
from ..diffusion import Prediction
from ..diffusion.solvers import Callback
from ..runs.opened import Opened
from ..runtime.failures import explain_failure, warn_on_failure
from ..storage.blocks import Ranks, is_of_request, wait_for
from ..storage.files import as_json, write_whole
from .conditions import Conditioned, save_side_by_side
from .edit import Edit
from .sampler import Sampler, describe

if TYPE_CHECKING:
    from PIL import Image

Items = TypeVar("Items", bound=Sequence)
SINGLE = Ranks()  # one process


def in_batches(items: Items, size: int) -> list[Items]:
    """The items (a list, or a range) in batches of `size`, the last with what is left."""
    return [items[start : start + size] for start in range(0, len(items), size)]  # pyright: ignore[reportReturnType]


def deal_batches(items: Items, size: int, ranks: Ranks, doing: str, *, unit: str = "images") -> Iterator[Items]:
    """The batches of this rank, one after the other, while rank 0 shows the progress of all ranks. Whole batches are dealt, so
    that no result depends on the number of processes."""
    yield from _deal(in_batches(items, size), ranks, doing, unit)


def _deal(batches: Sequence[Items], ranks: Ranks, doing: str, unit: str) -> Iterator[Items]:
    """Those of the batches that are this rank's, while rank 0 shows the progress of all."""
    count = sum(map(len, batches))
    with Progress(doing, count, unit=unit, shown=ranks.rank == 0, processes=ranks.world) as bar:
        for batch in batches[ranks.rank :: ranks.world]:
            yield batch
            bar.update(min(len(batch) * ranks.world, count - bar.done))


def short_hash(*words: Any) -> str:
    """Six letters that stand for all that images depend on, in the default name of their folder."""
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:6]


def claim(
    out: Path, request: dict[str, Any], facts: dict[str, Any] | None = None, *, what: str = "images", ranks: Ranks = SINGLE
) -> None:
    """Write `request`, which says all that the images depend on, and other `facts` to `out`/metadata.json, and remove files
    that a killed process left half-written. A UserError where the folder holds something else."""
    file, facts = out / "metadata.json", facts or {}
    has_content = out.exists() and any(path.name[0] != "." for path in out.iterdir())
    if has_content and not is_of_request(file, request, without=facts):
        raise UserError(f"{out} holds other {what}; give another --out or remove it")
    ranks.barrier()  # all ranks have checked before one writes
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for part in (*out.glob("*.part"), *(out / "frames").glob("*.part")):
            part.unlink()
        write_whole(file, as_json({**request, **facts}))
    ranks.barrier()


@contextmanager
def remove_if_empty(out: Path, rank: int = 0) -> Iterator[None]:
    """Where drawing into `out` ends in a UserError before a single image was written, remove the folder."""
    try:
        yield
    except UserError:
        if rank == 0 and out.is_dir() and {path.name for path in out.rglob("*") if path.is_file()} <= {"metadata.json"}:
            shutil.rmtree(out, ignore_errors=True)
        raise


def save_missing(pixels: figures.Pixels, paths: Iterable[Path]) -> None:
    """Write those of the images (N, H, W, C) whose files are missing."""
    for image, path in zip(pixels, paths, strict=False):  # images that fill a batch up have no path
        if not path.exists():
            with explain_failure(path):
                figures.save(figures.to_image(image), path)


def read_pixels(paths: Sequence[Path]) -> list[figures.Pixels]:
    """(H, W, C) uint8 of each of the files, which `save_missing` wrote."""
    from PIL import Image

    return [np.atleast_3d(np.asarray(Image.open(path))) for path in paths]


def columns_for(count: int, num_blocks: int = 1) -> int:
    """A grid near a square; where classes stand in equal blocks, a row for each."""
    if num_blocks > 1 and count % num_blocks == 0 and count // num_blocks <= 16:
        return count // num_blocks
    return max(1, min(16, int(np.ceil(np.sqrt(count)))))


def write_animation(pattern: Path, sheets: "Iterable[Image.Image]", out: Path, *, fps: int) -> str:
    """Write the sheets as files whose number stands at %03d of the `pattern`, in place of older ones, and a GIF of them; gives
    the command that makes the GIF from the files."""
    pattern.parent.mkdir(parents=True, exist_ok=True)
    for old in pattern.parent.glob(pattern.name.replace("%03d", "*")):
        old.unlink()
    paths = list[Path]()
    for i, sheet in enumerate(sheets):
        paths.append(pattern.with_name(pattern.name % i))
        figures.save(sheet, paths[-1])
    return figures.gif(paths, pattern, out, fps=fps)


def batches_by_shape(shapes: Sequence[tuple[int, ...]], count: int, size: int) -> list[Sequence[int]]:
    """The numbers of `count` images in batches of `size`. With the `shapes` of the images, each batch is of one shape."""
    by_shape: dict[Any, list[int]] = {}
    for i in range(count):
        by_shape.setdefault(shapes[i] if shapes else None, []).append(i)
    return [batch for numbers in by_shape.values() for batch in in_batches(numbers, size)]


Frame = tuple[int, figures.Pixels, figures.Pixels]  # step, x_t, the estimate of x0


class Watcher(Protocol):
    """What sees a batch on its way: each step of the solver, as a callback, and at the end the images (B, C, H, W)."""

    def __call__(self, step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None: ...

    def finish(self, images: Tensor) -> None: ...


Watch = Callable[[Sequence[int], Sampler], Watcher]  # of the numbers of a batch's images, and its sampler


class Frames:
    """A callback that keeps at most 60 frames of the images `chosen` of a batch."""

    def __init__(self, chosen: Sequence[int], sampler: Sampler) -> None:
        self.chosen, self.sampler, self.steps = list(chosen), sampler, sampler.steps
        count = min(60, self.steps)
        self.kept_steps = {round(i * (self.steps - 1) / max(1, count - 1)) for i in range(count)}
        self.frames: list[Frame] = []

    def __call__(self, step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        if step in self.kept_steps and self.chosen:
            noised, x0 = (figures.to_uint8(self.sampler.decode(x[self.chosen])) for x in (x_t, prediction.x0))
            self.frames.append((step, noised, x0))

    def finish(self, images: Tensor) -> None:
        """Add the last frame: the images of the batch as they came out."""
        if self.chosen:
            pixels = figures.to_uint8(images[self.chosen])
            self.frames.append((self.steps, pixels, pixels))

    def sheet(self, frame: Frame, note: str = "") -> "Image.Image":
        """A frame as an image: x_t on the left, the estimate of x0 on the right."""
        from PIL import ImageOps

        step, x_t, x0 = frame
        done = f"step {step:0{len(str(self.steps))}d} of {self.steps}"  # as long on every frame: they have one size
        titles = {f"x_t, {done}": x_t, f"estimate of x_0 {note}": x0}
        sheets = [figures.grid(x, columns=columns_for(len(x)), title=title) for title, x in titles.items()]
        tall = max(sheet.height for sheet in sheets)  # a title may take more lines than the other
        return figures.in_a_row([ImageOps.expand(sheet, (0, tall - sheet.height, 0, 0), "white") for sheet in sheets])


def _call_each(watchers: Sequence[Watcher]) -> Callback:
    """The callback that calls each of them."""

    def callback(step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        for watcher in watchers:
            watcher(step, t, x_t, prediction)

    return callback


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
    ranks: Ranks,
    class_names: Sequence[str] = (),
    edit: Edit | None = None,
    condition: Sequence[Tensor] | None = None,
    conditioned: Conditioned | None = None,
    upscale: Callable[[Tensor], Tensor] | None = None,
    npz: bool = False,
    request: dict[str, Any] | None = None,
    watch: Watch | None = None,
) -> list[Path]:
    """Draw `count` images into `out`: PNGs, metadata.json, grid.png, and with `frames` the denoising GIF. Gives their paths.

    With `upscale` the images are written a second time, larger, into `out`/upscaled; with `npz` all of them into one file
    that guided-diffusion's evaluator reads. What is drawn from the `condition`, (k, h, w) of each, is also shown beside what it
    is made of, `conditioned`, each of which stands for as many images in a row, in side_by_side.png. Of a run on images of
    several shapes, each image has the shape of its condition. `request` is what else they depend on.
    `watch` makes, of the numbers of a batch's images and its sampler, what sees that batch on its way.
    Files that are there already stay; a folder with other images is a UserError.
    """
    shapes = [(sampler.shape[0], *each.shape[1:]) for each in condition or ()] if opened.buckets else []
    if npz and len(set(shapes)) > 1:
        raise UserError("--npz is one array, and these images have several shapes: give --size HxW, or leave --npz out")
    class_names = class_names or opened.class_names
    names = [class_names[label] for label in labels] if labels is not None else None
    whole_request = {
        "weights": opened.digest,
        "run": opened.name,
        "step": opened.step,
        **describe(sampler, seed, edit),
        "num_samples": count,
        "batch_size": batch_size,
        "classes": names,
        **(request or {}),
    }
    facts: dict[str, Any] = {"path": str(opened.path), "config": opened.config}
    facts |= {"guide": sampler.guide.origin} if sampler.guide is not None else {}
    claim(out, whole_request, facts, ranks=ranks)

    digits = max(5, len(str(count - 1)))
    paths = [out / f"{i:0{digits}d}.png" for i in range(count)]
    large = [out / "upscaled" / path.name for path in paths] if upscale is not None else paths
    watched: Frames | None = None
    for batch in _deal(batches_by_shape(shapes, count, batch_size), ranks, "sampling", "images"):
        files, larger = [paths[i] for i in batch], [large[i] for i in batch]
        watchers = list[Watcher]()
        if frames and batch[0] == 0 and not (out / "denoising.gif").exists():  # rank 0 has this batch
            shown = min(20, len(batch))  # spread over the batch, so that every class is among them
            watched = Frames([i * len(batch) // shown for i in range(shown)], sampler)
            watchers.append(watched)
        if not watchers and all(path.exists() for path in (*files, *larger)):
            continue
        classes = [labels[i] for i in batch] if labels is not None else None
        shaped = sampler.at_shape(shapes[batch[0]]) if shapes else sampler
        watchers += [watch(batch, shaped)] if watch is not None else []
        options = {"callback": _call_each(watchers) if watchers else None, "batch_size": batch_size, "edit": edit}
        options["condition"] = torch.stack([condition[i] for i in batch]) if condition is not None else None
        x = shaped.draw(seed, batch, classes, device=device, **options)
        if upscale is not None:
            save_missing(figures.to_uint8(upscale(x)), larger)
        save_missing(figures.to_uint8(x), files)
        for watcher in watchers:
            watcher.finish(x)
    ranks.barrier()
    if ranks.rank == 0:
        wait_for(paths)
        if npz:
            with explain_failure(out / "samples_*.npz"):
                _write_npz(paths, labels, out)
        with warn_on_failure("grid.png"):
            few = paths[:256]
            blocks = len(set(names)) if names is not None and names == sorted(names, key=names.index) else 1
            options = {"columns": columns_for(len(few), blocks), "labels": names[: len(few)] if names is not None else None}
            figures.save(figures.grid(figures.on_white(read_pixels(few)), **options), out / "grid.png")
        if conditioned is not None:
            each = count // len(conditioned.values)
            rows = [paths[i * each : i * each + min(each, 8)] for i in range(min(16, count // each))]
            shown = [read_pixels(row) for row in rows]
            with warn_on_failure("side_by_side.png"):
                save_side_by_side(conditioned, shown, out / "side_by_side.png")
        if sampler.source is not None:
            with warn_on_failure("ways.png"):
                _draw_ways(sampler, seed, paths[:32], shapes, out / "ways.png")
        if watched is not None:  # the last of all: where it fails, the rest is there
            with explain_failure(out / "denoising.gif"):
                sheets = (watched.sheet(frame) for frame in watched.frames)
                write_animation(out / "frames" / "frame_%03d.png", sheets, out / "denoising.gif", fps=12)
    return paths


@torch.no_grad()
def _draw_ways(sampler: Sampler, seed: int, paths: Sequence[Path], shapes: Sequence[tuple[int, ...]], out: Path) -> None:
    """What images started from, each beside what it became; they have these `shapes`, where they have several."""
    parameter = next(sampler.network.parameters())  # pyright: ignore[reportFunctionMemberAccess]
    rows = list[figures.Pixels]()
    for i, sample in enumerate(read_pixels(paths)):
        source = (sampler.at_shape(shapes[i]) if shapes else sampler).start(seed, [i])
        rows += [*figures.to_uint8(sampler.decode(source.to(parameter))), sample]
    figures.save(
        figures.grid(figures.on_white(rows), columns=2 * min(4, len(paths)), title="source and sample, side by side"), out
    )


def _write_npz(paths: Sequence[Path], labels: Sequence[int] | None, out: Path) -> None:
    """Write samples_NxHxWx3.npz: the images as arr_0 (N, H, W, 3) uint8, grey ones in three equal channels as the evaluator
    wants them, and their labels, where they have any, as arr_1. One image at a time is in memory."""
    from PIL import Image

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
                with file.open("arr_1.npy", "w") as stream:
                    np.save(stream, np.array(labels, dtype=np.int64))
        staged.replace(out / f"samples_{'x'.join(map(str, shape))}.npz")
    finally:
        staged.unlink(missing_ok=True)
