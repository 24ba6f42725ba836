"""How good the images of a folder are, whoever made them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import figures
from ..config import UserError
from ..data import ImageConfig, ImageSet
from ..sampling.edit import files_of
from .features import check_count, on_screen, pixel_loader, spread_indices
from .registry import FeatureSets, compare
from .results import GIVEN, Results, Setup


def evaluate_folder(setup: Setup, place: Path, data: ImageSet, *, resize: bool) -> Results:
    """Compare the images of a folder (of sample.py's, its samples) with `data`. Real images of another size are a UserError,
    unless `resize` says that they are to be cut and resized as in training."""
    files = files_of(str(place))
    check_count(len(files), f"images in {place}")
    check_count(len(data), "real images")
    image = _image_of(files)
    if not resize:
        _check_sizes(data, image)

    def pixels(indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([_read(files[i], image) for i in indices])).permute(0, 3, 1, 2)

    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    request = {"samples": digest, "pictures": data.fingerprint, "size": image.size}
    out = setup.claim(place.resolve().name, "pictures", request)
    samples = setup.extract(out, len(files), pixels, "features of the samples")
    real = setup.real_features(data, image)
    results = Results(out)
    if not setup.computes:
        return results
    comparisons = [compare(FeatureSets(n, samples[n.name], real[n.name])) for n in setup.networks]
    results.add_table(f"{place}: {len(files)} images against {len(data)} {on_screen(GIVEN)}", comparisons)
    results.document |= {"num_samples": len(files), "real_pictures": len(data)}
    results.write()
    results.add_nearest(comparisons[0].sets, pixels, pixel_loader(data, image), GIVEN, setup.batch_size)
    return results


def _read(path: Path, image: ImageConfig) -> figures.Pixels:
    """(H, W, C) uint8 of a file; a UserError where it cannot be read."""
    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB" if image.channels == 3 else "L"))
    except OSError as error:
        raise UserError(f"{path}: not an image that can be read ({error}); remove it or draw it again") from None
    return pixels.reshape(image.size, image.size, -1)


def _image_of(files: Sequence[Path]) -> ImageConfig:
    """The size and channels of images of one square size; a UserError where they have no one size."""
    kinds: dict[tuple[int, int, int], Path] = {}
    for path in files:
        try:
            with Image.open(path) as image:
                kinds.setdefault((image.width, image.height, 1 if image.mode in ("L", "1") else 3), path)
        except OSError as error:
            raise UserError(f"{path}: not an image that can be read ({error})") from None
    if len(kinds) > 1:
        (a, b, _), (c, d, _) = list(kinds)[:2]
        one, other = list(kinds.values())[:2]
        if (a, b) == (c, d):
            raise UserError(f"{one} is grey and {other} in colour, or the other way: samples are of one kind")
        raise UserError(f"{one} is {a}x{b} px and {other} {c}x{d}: samples are all of one size")
    ((width, height, channels),) = kinds
    if width != height:
        raise UserError(f"{files[0]} is {width}x{height} px: samples are squares")
    return ImageConfig(size=width, channels=1 if channels == 1 else 3)


def _check_sizes(data: ImageSet, image: ImageConfig) -> None:
    """A UserError where real images, of which some are looked at, have another size than the samples."""
    for i in spread_indices(len(data), 64).tolist():
        part, index = data.parts[data.which[i]], int(data.index[i])
        real = part.load(index, channels=image.channels)
        width, height = real.size if isinstance(real, Image.Image) else real.shape[1::-1]
        if (width, height) != (image.size, image.size):
            raise UserError(
                f"the samples are {image.size}x{image.size} px and the real image {part.names[index]} {width}x{height}; "
                "give --resize to cut and resize the real ones as training does"
            )
