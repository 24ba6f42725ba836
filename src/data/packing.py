"""One memory-mapped file of uint8 pixels, so that ranks share the page cache and a batch is one indexed copy.

A packed folder holds `pixels.bin`, `records.npy` (N, 5: byte offset, height, width, label, held out) and `manifest.json`.
"""

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import UserError
from ..config.progress import Progress
from ..storage.files import write_flushed
from ..storage.requests import stage_folder
from .sources import PACK_VERSION, ImageSet, _fraction
from .transforms import DECODER, shorter_side

BLOCK = 256


def pack(pictures: ImageSet, out: Path, *, size: int, channels: int, held_out: float = 0.0) -> int:
    """Write `pictures` with their shorter side at `size` into the folder `out`; gives the number of pictures.

    Staged in `out`.partial and renamed when whole; after a kill the same call goes on where it was.
    """
    if out.exists():
        raise UserError(f"{out} exists; give another folder or remove it")
    staged = out.with_name(out.name + ".partial")
    request = {"fingerprint": pictures.fingerprint, "size": size, "channels": channels, "held_out": held_out}
    done = _resume(staged, {**request, "state": pictures.state})
    names = pictures.names

    def one(i: int) -> np.ndarray:
        part = pictures.parts[pictures.which[i]]
        picture = part.load(int(pictures.index[i]), channels=channels, at_least=size)
        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(picture.squeeze(-1) if picture.shape[2] == 1 else picture)
        return shorter_side(picture.convert("RGB" if channels == 3 else "L"), size)

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
                written = []
                for i, array in zip(block, pool.map(one, block), strict=True):
                    pixels.write(np.ascontiguousarray(array).tobytes())
                    held = _fraction(names[i]) < held_out
                    written.append((offset, array.shape[0], array.shape[1], int(pictures.labels[i]), int(held)))
                    offset += array.size
                    bar.update()
                pixels.flush()  # pixels before records: a record never points at bytes that are not there
                os.fsync(pixels.fileno())
                records.write(np.array(written, dtype=np.int64).tobytes())
                records.flush()
                os.fsync(records.fileno())
        table = np.fromfile(staged / "records.bin", dtype=np.int64).reshape(-1, 5)
        content = io.BytesIO()
        np.save(content, table)
        write_flushed(staged / "records.npy", content.getbuffer())
        manifest = {
            **request,
            "version": PACK_VERSION,
            "decoder": DECODER,
            "count": len(table),
            "bytes": int(offset),
            "class_names": list(pictures.class_names),
            "names": names,
        }
        write_flushed(staged / "manifest.json", json.dumps(manifest).encode())
        staged.replace(out)
        for name in ("records.bin", "request.json"):
            (out / name).unlink()
    except OSError as error:
        raise UserError(f"packing into {out} stopped: {error}; mend it and run the same command again to go on") from None
    return len(table)


def _resume(staged: Path, request: dict) -> int:
    """Make the staging folder ready and give the number of pictures that are already whole in it."""
    if not stage_folder(staged, request):
        return 0
    records = staged / "records.bin"
    if not records.exists():
        (staged / "pixels.bin").unlink(missing_ok=True)
        return 0
    whole = records.stat().st_size // 40
    os.truncate(records, whole * 40)
    table = np.fromfile(records, dtype=np.int64).reshape(-1, 5)
    channels = request["channels"]
    end = int(table[-1, 0] + table[-1, 1] * table[-1, 2] * channels) if whole else 0
    if (staged / "pixels.bin").exists():
        os.truncate(staged / "pixels.bin", end)
    return whole
