"""Given pictures, to start from, to fill in, or to make larger: files into what a sampling takes."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..config import UserError
from ..data import ImageConfig
from ..data.formats import endings
from ..data.transforms import decode, square
from ..runs.opened import Opened
from ..runs.starts import Start
from ..runtime.seeds import generator
from ..runtime.stream import to_network
from .sampler import Edit


def load_edit(opened: Opened, picture: str, mask: str | None, *, start_at: int, resamplings: int, steps: int) -> Edit:
    """The picture cut and resized as in training, and as the network sees it; where the mask is white it is drawn anew.

    A UserError for a file that cannot be read, a mask of another size than the picture, a step that there is not.
    """
    if start_at == 0 and mask is None:
        raise UserError("--image alone changes nothing: say where to start from it (--start-at), or what to draw anew (--mask)")
    if mask is not None and not opened.gaussian:
        raise UserError("a mask keeps a picture by noising it, and this run starts from other data; leave --mask out")
    if not 0 <= start_at < steps:
        raise UserError(f"--start-at {start_at}: there are {steps} steps, counted from 0")
    kept = as_seen(opened, [picture])
    if mask is None:
        return Edit(kept[0], start_at)
    shown, white = _open(picture, opened.image.channels), _open(mask, 1)
    if white.size != shown.size:
        raise UserError(
            f"the mask {mask} has {white.width} x {white.height} px and {picture} {shown.width} x {shown.height}; give one of "
            "the same size, white where the picture is drawn anew"
        )
    cut = torch.from_numpy(np.array(square(white, ImageConfig(size=opened.image.size, channels=1), np.full(3, 0.5))))
    return Edit(kept[0], start_at, _shrink((cut[:, :, 0] > 127).float()[None], opened.shape[1]).to(kept.device), resamplings)


@torch.no_grad()
def as_seen(opened: Opened, files: Sequence[str | Path]) -> Tensor:
    """Pictures cut and resized as in training, as the network sees them: (N, *shape) on its device. A UserError for a file that
    cannot be read."""
    image = ImageConfig(size=opened.image.size, channels=opened.image.channels)
    seen = []
    for i, file in enumerate(files):  # one by one: encoding a whole folder at once takes its memory
        pixels = np.array(square(_open(str(file), image.channels), image, np.full(3, 0.5)))
        x0 = to_network(torch.from_numpy(pixels)[None], next(opened.network.parameters()).device)
        seen.append(opened.codec.encode(x0, [i]) if opened.codec is not None else x0)
    return torch.cat(seen)


def start_from_pictures(opened: Opened, place: str) -> Start:
    """A Start from given pictures in the order of their names; another draw of it deals them anew. A UserError where the run
    starts from noise."""
    if opened.gaussian:
        raise UserError(f"{opened.path} starts from noise; --source is for a run between two data sets")
    seen = as_seen(opened, files_of(place)).float().cpu()

    def start(seed: int, indices: Sequence[int], draw: int = 0) -> Tensor:
        order = generator(seed, "source", draw).permutation(len(seen)) if draw else np.arange(len(seen))
        return seen[order[np.array(indices, dtype=np.int64) % len(seen)]]

    return start


def from_nowhere(seed: int, indices: Sequence[int], draw: int = 0) -> Tensor:
    """The Start of a sampler that only goes back, and needs none."""
    raise AssertionError("nothing is drawn")


def files_of(place: str) -> list[Path]:
    """A picture, or those of a folder by name (of a folder of sample.py's, its samples); a UserError where there is none."""
    path = Path(place)
    found = [path]
    if path.is_dir():
        drawn = sorted(path.glob("[0-9]*.png")) if (path / "metadata.json").exists() else []
        found = drawn or sorted(file for file in path.glob("*") if file.suffix.lower() in endings())
    if not found or not found[0].exists():
        raise UserError(f"{place}: no picture, and no folder with pictures")
    return found


def _shrink(mask: Tensor, size: int) -> Tensor:
    """(1, H, W) -> (1, size, size): whatever a mask touches is drawn anew."""
    return F.adaptive_max_pool2d(mask, size)


def _open(path: str, channels: int) -> Image.Image:
    try:
        return decode(Path(path), channels=channels)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a picture that can be read ({error})") from None


def load_low(opened: Opened, source: str) -> tuple[Tensor, list[int] | None]:
    """The pictures that an upsampler makes larger, (N, C, h, w) in [-1, 1] on the CPU, and their labels where an .npz has them.

    `source` is a folder (one that sample.py wrote, or any of pictures), or an .npz of guided-diffusion's samples. A UserError
    for pictures of another size.
    """
    size, channels, path = opened.low_resolution, opened.image.channels, Path(source)
    if size is None:
        raise UserError(f"{opened.path} is no upsampler; leave --low out")
    if path.suffix == ".npz":
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
                shown, labels = found["arr_0"], found.get("arr_1")
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{path}: not an .npz of samples, or damaged") from None
        if shown.ndim != 4 or not len(shown) or shown.shape[1:] != (size, size, channels) or shown.dtype != np.uint8:
            raise UserError(f"{path}: holds no (N, {size}, {size}, {channels}) uint8 pictures as arr_0")
        if labels is not None:
            known = opened.num_classes or 0
            if labels.shape != (len(shown),) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= known:
                raise UserError(f"{path}: arr_1 is no list of {len(shown)} labels from 0 to {known - 1}")
        return to_network(torch.from_numpy(shown), torch.device("cpu")), None if labels is None else labels.tolist()
    paths = files_of(source)
    plain, middle = ImageConfig(size=size, channels=channels), np.full(3, 0.5)
    pixels = np.stack([square(_open(str(file), channels), plain, middle) for file in paths])
    return to_network(torch.from_numpy(pixels), torch.device("cpu")), None
