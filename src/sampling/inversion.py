"""From pictures back to their source, and forth again."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config.progress import track
from ..runs.opened import Opened
from ..runtime.failures import warn_on_failure
from ..storage.files import as_json, write_whole
from .edit import as_seen
from .files import claim
from .sampler import Sampler, describe


def measure(x0: Tensor, source: Tensor, again: Tensor) -> dict[str, float]:
    """Of one picture, as the network sees it: `rms` of what is lost on the way there and back, relative to the picture's own
    standard deviation; `std` of the source; `correlation` of source and picture."""
    flat, noise = x0.flatten().double(), source.flatten().double()
    lost = (again.double() - x0.double()).square().mean().sqrt() / flat.std()
    both = torch.corrcoef(torch.stack([flat, noise]))[0, 1]
    return {"rms": float(lost), "std": float(noise.std()), "correlation": float(both)}


def write_inversions(
    opened: Opened, sampler: Sampler, files: Sequence[Path], out: Path, *, label: int | None, batch_size: int
) -> dict[str, float]:
    """Into the folder `out`: `inversion.png` (picture, its source, and the picture again, in rows), `sources.npy`
    (N, *shape), `inversion.json` with what `measure` says of each. Gives the means.

    `label` is the class that the way is asked with, none without one. Both ways are clipped as the run samples: without it, a
    network that predicts eps throws its estimate of x_0 out of all bounds near the noise.
    """
    sampler.check_invertible()
    seen = as_seen(opened, files).to(sampler.dtype)
    label = opened.no_class() if label is None else label
    claim(out, {"weights": opened.digest, "label": label, "files": fingerprint(files), **describe(sampler, 0)})
    rows, sources, told = [], [], []
    for first in track(range(0, len(files), batch_size), "inverting", unit="batches"):
        part, x0 = files[first : first + batch_size], seen[first : first + batch_size]
        labels = torch.full((len(x0),), label, device=x0.device) if label is not None else None
        source = sampler.invert(x0, labels)
        again = sampler.move(source, labels)
        shown = [sampler.decode(x) for x in (x0, source, again)]
        rows.append(figures.to_uint8(torch.stack(shown, dim=1).flatten(0, 1)))
        sources.append(source.float().cpu().numpy())
        told += [{"file": file.name, **measure(*three)} for file, *three in zip(part, x0, source, again, strict=True)]
    mean = {key: float(np.mean([abs(entry[key]) for entry in told])) for key in ("rms", "std", "correlation")}
    content = io.BytesIO()
    np.save(content, np.concatenate(sources))
    write_whole(out / "sources.npy", content.getbuffer())
    title = f"picture, source, and back again with {sampler.calls()} network calls each way"
    write_whole(out / "inversion.json", as_json({"mean": mean, "pictures": told}))
    with warn_on_failure("inversion.png"):
        sheet = figures.grid(np.concatenate(rows)[: 3 * 32], columns=3 * min(4, len(files)), title=title)
        figures.save(sheet, out / "inversion.png")
    return mean


def fingerprint(files: Sequence[Path]) -> str:
    """The hash of what is in the files."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
