"""Images that sampling starts from, fills in (inpainting), or makes larger."""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..config import UserError
from ..config.sizes import Sides
from ..data import ImageConfig
from ..data.formats import endings
from ..data.transforms import crop, decode
from ..runs.densities import Start
from ..runs.opened import Opened
from ..runtime.seeds import generator
from ..runtime.stream import to_network
from .config import parse_size

if TYPE_CHECKING:
    from PIL import Image


class Edit(NamedTuple):
    """What a sampling keeps of an image: it starts from `x0` (C, H, W), as the network sees it, where `start_at` steps are
    done, and keeps x0 where `mask` (1, H, W) is 0. Each step is taken `resamplings` times with noise in between, so that the
    new part and the kept part agree (Alg. 1, Lugmayr et al. 2022, arXiv:2201.09865)."""

    x0: Tensor
    start_at: int = 0
    mask: Tensor | None = None
    resamplings: int = 1

    def put_back(self, x: Tensor, known: Tensor) -> Tensor:
        """`x` where it is drawn anew, and the `known` part of the image elsewhere."""
        if self.mask is None:
            return x
        mask = self.mask.to(x)
        return mask * x + (1 - mask) * known


def load_edit(opened: Opened, image: str, mask: str | None, *, start_at: int, resamplings: int, steps: int) -> Edit:
    """The image file `image`, cut and resized as in training, as the network sees it; where the mask is white it is drawn anew.

    A UserError for a file that cannot be read, a mask of another size than the image, a step that does not exist.
    """
    if start_at == 0 and mask is None:
        raise UserError("--image alone changes nothing: say where to start from it (--start-at), or what to draw anew (--mask)")
    if mask is not None and not opened.gaussian:
        raise UserError("a mask needs a run that starts from noise, and this run starts from other data; leave --mask out")
    if not 0 <= start_at < steps:
        raise UserError(f"--start-at {start_at}: there are {steps} steps, counted from 0")
    (x0,) = encode_images(opened, [image])
    if mask is None:
        return Edit(x0, start_at)
    shown, white = open_file(image, opened.image.channels), open_file(mask, 1)
    if white.size != shown.size:
        raise UserError(
            f"the mask {mask} has {white.width} x {white.height} px and {image} {shown.width} x {shown.height}; give one of "
            "the same size, white where the image is drawn anew"
        )
    cut = torch.from_numpy(open_cropped(mask, opened.image.size, 1))
    white_cells = F.adaptive_max_pool2d((cut[:, :, 0] > 127).float()[None], opened.shape[1:])  # whatever the mask touches
    return Edit(x0, start_at, white_cells.to(x0.device), resamplings)


def at_size(opened: Opened, size: str | None, place: str | Path | None = None) -> Opened:
    """The run at the `size` that is asked for; without one, of a run on images of several shapes, at the shape of the first
    image of the file or folder that is given to it."""
    if size is not None:
        return opened.at_size(parse_size(size))
    if place is None or not opened.buckets or Path(place).suffix == ".npz":
        return opened
    return opened.at_nearest(*open_file(files_of(str(place))[0], opened.image.channels).size)


@torch.no_grad()
def encode_images(opened: Opened, files: Sequence[str | Path]) -> Tensor:
    """Images cut and resized as in training, as the network sees them: (N, *shape) on its device. A UserError for a file that
    cannot be read."""
    encoded = []
    for i, file in enumerate(files):  # one by one: encoding a whole folder at once needs too much memory
        pixels = open_cropped(file, opened.image.size, opened.image.channels)
        x0 = to_network(torch.from_numpy(pixels)[None], next(opened.network.parameters()).device)
        encoded.append(opened.codec.encode(x0, [i]) if opened.codec is not None else x0)
    return torch.cat(encoded)


def start_from_images(opened: Opened, place: str) -> Start:
    """A Start from given images in the order of their names; another draw of it deals them anew. A UserError where the run
    starts from noise."""
    if opened.gaussian:
        raise UserError(f"{opened.path} starts from noise; --source is for a run between two data sets")
    images = encode_images(opened, files_of(place)).float().cpu()

    def start(seed: int, indices: Sequence[int], draw: int = 0) -> Tensor:
        order = generator(seed, "source", draw).permutation(len(images)) if draw else np.arange(len(images))
        return images[order[np.array(indices, dtype=np.int64) % len(images)]]

    return start


def no_start(seed: int, indices: Sequence[int], draw: int = 0) -> Tensor:
    """The Start of a sampler that only inverts, and so never starts."""
    raise AssertionError("nothing is drawn")


def files_of(place: str) -> list[Path]:
    """An image, or the images of a folder by name (of a folder of sample.py, its samples); a UserError where there is none."""
    path = Path(place)
    files = [path]
    if path.is_dir():
        samples = sorted(path.glob("[0-9]*.png")) if (path / "metadata.json").exists() else []
        files = samples or sorted(file for file in path.glob("*") if file.suffix.lower() in endings())
    if not files or not files[0].exists():
        raise UserError(f"{place}: no image, and no folder with images")
    return files


def fingerprint(files: Sequence[Path]) -> str:
    """The hash of what is in the files."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def open_file(path: str | Path, channels: int) -> "Image.Image":
    """The image of a file; a UserError where it cannot be read."""
    try:
        return decode(Path(path), channels=channels)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not an image that can be read ({error})") from None


def open_cropped(path: str | Path, size: int | Sides, channels: Literal[1, 3]) -> NDArray[np.uint8]:
    """The image of a file, cut in the middle and resized: (H, W, C)."""
    return np.array(crop(open_file(str(path), channels), ImageConfig(size=size, channels=channels), np.full(3, 0.5)))


def load_low(opened: Opened, source: str) -> tuple[Tensor, list[int] | None]:
    """The images that an upsampler makes larger, (N, C, h, w) in [-1, 1] on the CPU, and their labels where an .npz has them.

    `source` is a folder (that sample.py wrote, or any with images), or an .npz of guided-diffusion's samples. A UserError for
    images of another size.
    """
    size, channels, path = opened.low_resolution, opened.image.channels, Path(source)
    if size is None:
        raise UserError(f"{opened.path} is no upsampler; leave --low out")
    if path.suffix == ".npz":
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                pixels, labels = arrays["arr_0"], arrays.get("arr_1")
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{path}: not an .npz of samples, or damaged") from None
        if pixels.ndim != 4 or not len(pixels) or pixels.shape[1:] != (size, size, channels) or pixels.dtype != np.uint8:
            raise UserError(f"{path}: holds no (N, {size}, {size}, {channels}) uint8 images as arr_0")
        if labels is not None:
            known = opened.num_classes or 0
            if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= known:
                raise UserError(f"{path}: arr_1 is no list of {len(pixels)} labels from 0 to {known - 1}")
    else:
        pixels, labels = np.stack([open_cropped(file, size, channels) for file in files_of(source)]), None
    return to_network(torch.from_numpy(pixels), torch.device("cpu")), labels.tolist() if labels is not None else None
