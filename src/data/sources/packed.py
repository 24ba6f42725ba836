"""The source `packed`: one memory-mapped file of pixels, which `prepare_data.py pack` writes (data/packing.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...config import UserError, config, read_json, resumable_field
from ...config.sizes import Sides
from ..colour import Pixels
from ..scan import ScanReport
from .images import Images, digest

PACK_VERSION = 1


@config
class PackedSource:
    """A folder that `prepare_data.py pack` wrote. `split` train or held_out as it was packed, or all."""

    source: Literal["packed"]
    path: str = resumable_field()
    split: Literal["all", "train", "held_out"] = "all"
    subset: int | None = Field(None, gt=0)


@dataclass(kw_only=True)
class PackedImages(Images):
    """Images of any size in one mapped file; `records` (N, 3) are byte offset, height and width."""

    pixels: Pixels
    records: NDArray[np.int64]
    channels: int
    folder: str

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> Pixels:
        offset, height, width = self.records[index].tolist()
        size = height * width * self.channels
        return self.pixels[offset : offset + size].reshape(height, width, self.channels)

    @property
    def uniform(self) -> tuple[Pixels, NDArray[np.int64]] | None:
        if len(self.records) == 0 or (self.records[:, 1:] != self.records[0, 1:]).any():
            return None
        height, width = self.records[0, 1:].tolist()
        size = height * width * self.channels
        if (self.records[:, 0] % size).any() or len(self.pixels) % size:
            return None  # images of another size lie between
        return self.pixels.reshape(-1, height, width, self.channels), self.records[:, 0] // size

    def is_decoded_at(self, sides: Sides) -> bool:
        return bool(((np.array(sides) / self.records[:, 1:]).max(axis=1) == 1).all())


def open_packed(spec: PackedSource) -> PackedImages:
    path = Path(spec.path).expanduser()
    pixels = path / "pixels.bin"
    if not (path / "manifest.json").exists():
        raise UserError(f"{path} is not a packed data set (no manifest.json); make one with prepare_data.py pack")
    manifest = read_json(path / "manifest.json")
    if manifest.get("version") != PACK_VERSION:
        raise UserError(f"{path} was packed by another version; pack it again")
    if not pixels.exists() or pixels.stat().st_size != manifest["bytes"]:
        raise UserError(f"{pixels} is missing or cut; pack it again")
    table = np.load(path / "records.npy")
    keep = np.ones(len(table), dtype=bool) if spec.split == "all" else (table[:, 4] == (spec.split == "held_out"))
    measures = np.ones((int(keep.sum()), 4), np.int64)
    measures[:, :2], measures[:, 2] = table[keep, 2:0:-1], pixels.stat().st_mtime_ns
    return PackedImages(
        names=[name for name, is_in_split in zip(manifest["names"], keep, strict=True) if is_in_split],
        labels=table[keep, 3],
        class_names=tuple(manifest["class_names"]),
        fingerprint=digest("packed", manifest["fingerprint"], str(manifest["size"]), table[keep].tobytes()),
        pixels=np.memmap(pixels, dtype=np.uint8, mode="r"),
        records=table[keep, :3],
        channels=manifest["channels"],
        report=ScanReport(measures=measures),
        folder=str(path),
    )
