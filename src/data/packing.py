"""Writes the one memory-mapped file of uint8 pixels that ranks share and whose batches are one indexed copy.

A packed folder holds `pixels.bin`, `records.npy` (N, 5: byte offset, height, width, label, held out) and `manifest.json`;
sources/packed.py reads it.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import UserError
from ..config.progress import Progress
from ..storage.blocks import stage_folder
from ..storage.files import numpy_bytes, write_flushed
from .colour import Pixels, to_image
from .sources import ImageSet
from .sources.images import name_fraction
from .sources.packed import PACK_VERSION
from .transforms import DECODER, resize_shorter_side

BLOCK = 256


def pack(images: ImageSet, out: Path, *, size: int, channels: int, held_out: float = 0.0) -> int:
    """Write `images` with their shorter side at `size` into the folder `out`; gives the number of images.

    The files are written into `out`.partial, which is renamed when it is whole; after a kill the same call goes on from there.
    """
    if out.exists():
        raise UserError(f"{out} exists; give another folder or remove it")
    staged = out.with_name(out.name + ".partial")
    request = {"fingerprint": images.fingerprint, "size": size, "channels": channels, "held_out": held_out}
    done = _resume(staged, {**request, "state": images.state})
    names = images.names

    def load(i: int) -> Pixels:
        part, index = images.locate(i)
        image = part.load(index, channels=channels, at_least=size)
        image = to_image(image) if isinstance(image, np.ndarray) else image
        return resize_shorter_side(image.convert("RGB" if channels == 3 else "L"), size)

    try:
        with (
            open(staged / "pixels.bin", "ab") as pixels,
            open(staged / "records.bin", "ab") as records,
            ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool,
            Progress("packing", len(names), done=done) as bar,
        ):
            offset = pixels.tell()
            for start in range(done, len(names), BLOCK):
                block = range(start, min(start + BLOCK, len(names)))
                rows = []
                for i, array in zip(block, pool.map(load, block), strict=True):
                    pixels.write(np.ascontiguousarray(array).tobytes())
                    is_held_out = name_fraction(names[i]) < held_out
                    rows.append((offset, array.shape[0], array.shape[1], int(images.labels[i]), int(is_held_out)))
                    offset += array.size
                    bar.update()
                _flush(pixels)  # before the records: a record never points at bytes that are not there
                records.write(np.array(rows, dtype=np.int64).tobytes())
                _flush(records)
        table = _read_records(staged)
        write_flushed(staged / "records.npy", numpy_bytes(np.save, table))
        manifest = {**request, "version": PACK_VERSION, "decoder": DECODER, "count": len(table), "bytes": int(offset)}
        manifest |= {"class_names": list(images.class_names), "names": names}
        write_flushed(staged / "manifest.json", json.dumps(manifest).encode())
        staged.replace(out)
        (out / "records.bin").unlink()
        (out / "request.json").unlink()
    except OSError as error:
        raise UserError(f"packing into {out} stopped: {error}; mend it and run the same command again to go on") from None
    return len(table)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_records(staged: Path) -> NDArray[np.int64]:
    return np.fromfile(staged / "records.bin", dtype=np.int64).reshape(-1, 5)


def _resume(staged: Path, request: dict[str, Any]) -> int:
    """Make the staging folder ready and give the number of images that are already whole in it."""
    stage_folder(staged, request)
    records, pixels = staged / "records.bin", staged / "pixels.bin"
    for path in (records, pixels):
        path.touch()
    os.truncate(records, records.stat().st_size // 40 * 40)
    table = _read_records(staged)
    offset, height, width = table[-1, :3].tolist() if len(table) else (0, 0, 0)
    os.truncate(pixels, offset + height * width * request["channels"])
    return len(table)
