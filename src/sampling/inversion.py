"""From images back to their source, and forth again."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config.progress import track
from ..runs.opened import Opened
from ..runtime.failures import warn_on_failure
from ..storage.files import write_whole
from .batches import in_batches
from .edit import encode_images
from .files import claim
from .sampler import Sampler, describe


def measure(x0: Tensor, source: Tensor, returned: Tensor) -> dict[str, float]:
    """Of one image, as the network sees it: `rms` of what is lost on the way there and back, relative to the standard deviation
    of the image; `std` of the source; `correlation` of source and image."""
    flat, noise = x0.flatten().double(), source.flatten().double()
    lost = (returned.double() - x0.double()).square().mean().sqrt() / flat.std()
    both = torch.corrcoef(torch.stack([flat, noise]))[0, 1]
    return {"rms": float(lost), "std": float(noise.std()), "correlation": float(both)}


def write_inversions(
    opened: Opened, sampler: Sampler, files: Sequence[Path], out: Path, *, label: int | None, batch_size: int
) -> dict[str, float]:
    """Write into the folder `out`: `inversion.png` (image, its source, and the image again, in rows), `sources.npy`
    (N, *shape), `inversion.json` with what `measure` gives for each. Gives the means.

    `label` is the class that the network is given, if any. Both ways are clipped as in sampling: without it, a network that
    predicts eps throws its estimate of x_0 out of all bounds near the noise.
    """
    sampler.check_invertible()
    images = encode_images(opened, files).to(sampler.dtype)
    label = opened.no_class() if label is None else label
    claim(out, {"weights": opened.digest, "label": label, "files": fingerprint(files), **describe(sampler, 0)})
    rows, sources, measured = [], [], []
    for part in track(in_batches(range(len(files)), batch_size), "inverting", unit="batches"):
        x0 = images[part.start : part.stop]
        labels = torch.full((len(x0),), label, device=x0.device) if label is not None else None
        source = sampler.invert(x0, labels)
        returned = sampler.move(source, labels)
        shown = [sampler.decode(x) for x in (x0, source, returned)]
        rows.append(figures.to_uint8(torch.stack(shown, dim=1).flatten(0, 1)))
        sources.append(source.float().cpu().numpy())
        measured += [{"file": files[i].name, **measure(*ways)} for i, *ways in zip(part, x0, source, returned, strict=True)]
    mean = {key: float(np.mean([abs(entry[key]) for entry in measured])) for key in ("rms", "std", "correlation")}
    content = io.BytesIO()
    np.save(content, np.concatenate(sources))
    write_whole(out / "sources.npy", content.getbuffer())
    title = f"picture, source, and back again with {sampler.calls()} network calls each way"
    write_whole(out / "inversion.json", (json.dumps({"mean": mean, "pictures": measured}, indent=1) + "\n").encode())
    with warn_on_failure("inversion.png"):
        sheet = figures.grid(np.concatenate(rows)[: 3 * 32], columns=3 * min(4, len(files)), title=title)
        figures.save(sheet, out / "inversion.png")
    return mean


def fingerprint(files: Sequence[Path]) -> str:
    """The hash of what is in the files."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
