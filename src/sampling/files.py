"""Samples as files: whole batches dealt to ranks, each image written once; a sampling that was killed goes on."""

import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import figures
from ..config import UserError
from ..runs.opened import Opened
from ..runtime.failures import explain_failure, warn_on_failure
from ..storage.blocks import Ranks, wait_for
from ..storage.files import write_whole
from .batches import deal_batches
from .frames import Frames, columns_for
from .sampler import Edit, Sampler, describe
from .upscaling import Upscaler


def claim(
    out: Path,
    request: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    *,
    what: str = "images",
    ranks: Ranks = Ranks(),  # noqa: B008
) -> None:
    """Write `request`, which says all that the images depend on, and other `facts` to `out`/metadata.json, and remove files
    that a killed process left half-written. A UserError where the folder holds something else."""
    facts = facts or {}
    if out.exists() and any(path.name[0] != "." for path in out.iterdir()):
        try:
            known = json.loads((out / "metadata.json").read_text())
            same = {key: value for key, value in known.items() if key not in facts} == json.loads(json.dumps(request))
        except (OSError, ValueError, LookupError, TypeError):
            same = False
        if not same:
            raise UserError(f"{out} holds other {what}; give another --out or remove it")
    ranks.barrier()  # all ranks have checked before one writes
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for part in (*out.glob("*.part"), *(out / "frames").glob("*.part")):
            part.unlink()
        write_whole(out / "metadata.json", (json.dumps({**request, **facts}, indent=1) + "\n").encode())
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
    low: Tensor | None = None,
    upscaler: Upscaler | None = None,
    npz: bool = False,
    request: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Draw `count` images into `out`: PNGs, metadata.json, grid.png, and with `frames` the denoising GIF. Gives their paths.

    With an `upscaler` the images are written a second time, larger, into `out`/upscaled; with `npz` all of them into one file
    that guided-diffusion's evaluator reads. `request` is what else they depend on. Files that are there already stay; a folder
    with other images is a UserError.
    """
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
    claim(out, whole_request, {"path": str(opened.path), "config": opened.config}, ranks=ranks)

    digits = max(5, len(str(count - 1)))
    paths = [out / f"{i:0{digits}d}.png" for i in range(count)]
    large = [out / "upscaled" / path.name for path in paths]
    wanted = [large, paths] if upscaler is not None else [paths]
    watched: Frames | None = None
    for batch in deal_batches(range(count), batch_size, ranks, "sampling"):
        callback = None
        if frames and batch.start == 0 and not (out / "denoising.gif").exists():  # rank 0 has this batch
            shown = min(20, len(batch))  # spread over the batch, so that every class is among them
            callback = watched = Frames([i * len(batch) // shown for i in range(shown)], sampler)
        if callback is None and all(files[i].exists() for files in wanted for i in batch):
            continue
        classes = [labels[i] for i in batch] if labels is not None else None
        images_low = low[batch.start : batch.stop] if low is not None else None
        options = {"callback": callback, "batch_size": batch_size, "edit": edit, "low": images_low}
        x = sampler.draw(seed, batch, classes, device=device, **options)
        for files in wanted:
            images = upscaler.upscale(x) if upscaler is not None and files is large else x
            for i, pixels in zip(batch, figures.to_uint8(images), strict=True):
                if not files[i].exists():
                    with explain_failure(files[i]):
                        figures.save(figures.to_image(pixels), files[i])
        if callback is not None:
            callback.finish(x)
    ranks.barrier()
    if ranks.rank == 0:
        wait_for(paths)
        if npz:
            with explain_failure(out / "samples_*.npz"):
                _write_npz(paths, labels, out)
        with warn_on_failure("grid.png"):
            _draw_grid(paths[:256], names, opened.image.size, out / "grid.png")
        if sampler.source is not None:
            with warn_on_failure("ways.png"):
                _draw_ways(sampler, seed, paths[:32], out / "ways.png")
        if watched is not None:  # the last of all: where it fails, the rest is there
            with explain_failure(out / "denoising.gif"):
                watched.write(out / "frames", "frame", ".png", out / "denoising.gif", fps=12)
    return paths


def _draw_grid(paths: Sequence[Path], names: Sequence[str] | None, size: int, out: Path) -> None:
    """Samples on one sheet; where classes stand in equal blocks, a row for each."""
    shown = names[: len(paths)] if names is not None else None
    blocks = len(set(names)) if names is not None and list(names) == sorted(names, key=names.index) else 1
    array = np.stack([np.asarray(Image.open(path)).reshape(size, size, -1) for path in paths])
    figures.save(figures.grid(array, columns=columns_for(len(paths), blocks), labels=shown), out)


@torch.no_grad()
def _draw_ways(sampler: Sampler, seed: int, paths: Sequence[Path], out: Path) -> None:
    """What images started from, each beside what it became."""
    parameter = next(sampler.network.parameters())  # pyright: ignore[reportFunctionMemberAccess]
    sources = figures.to_uint8(sampler.decode(sampler.start(seed, range(len(paths))).to(parameter)))
    rows = [row for source, path in zip(sources, paths, strict=True) for row in (source, np.asarray(Image.open(path)))]
    array = np.stack([row.reshape(sources.shape[1:]) for row in rows])
    figures.save(figures.grid(array, columns=2 * min(4, len(paths)), title="source and sample, side by side"), out)


def _write_npz(paths: Sequence[Path], labels: Sequence[int] | None, out: Path) -> None:
    """Write samples_NxHxWx3.npz: the images as arr_0 (N, H, W, 3) uint8, grey ones in three equal channels as the evaluator
    wants them, and their labels, where they have any, as arr_1. One image at a time is in memory."""
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
