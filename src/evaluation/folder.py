"""How good the images in a folder are: those of sample.py, or of any other program."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config import UserError
from ..config.sizes import Sides
from ..data import ImageConfig, ImageSet
from ..sampling.edit import files_of
from .registry import check_count, spread_indices
from .results import GIVEN, Results, Setup, on_screen
from .shapes import Fit, describe_squares, on_white, pixel_loader, to_squares


def evaluate_folder(setup: Setup, place: Path, data: ImageSet, *, resize: bool) -> Results:
    """Compare the images of a folder (of sample.py's, its samples) with `data`. Real images of another size are a UserError,
    unless `resize` says that they are to be cut and resized as in training."""
    files = files_of(str(place))
    check_count(len(files), f"images in {place}")
    check_count(len(data), "real images")
    image, sizes = _image_of(files, several=resize)
    if not resize:
        _check_sizes(data, image)

    def pixels(fit: Fit, indices: Sequence[int]) -> Tensor:
        return torch.cat([fit(torch.from_numpy(_read(files[i], image)).permute(2, 0, 1)[None]) for i in indices])

    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    request = {"samples": digest, "pictures": data.fingerprint, "size": image.size}
    out = setup.claim(place.resolve().name, "pictures", request)
    samples = setup.measure(
        out, len(files), lambda part: setup.features(pixels(to_squares(image), part)), "features of the samples"
    )
    comparisons, results = setup.compare(samples, data, image, None, sizes), Results(out)
    if not setup.computes:
        return results
    for comparison in comparisons if sizes else []:
        comparison.notes.append(
            describe_squares(image, f"samples have {len(sizes)} shapes, and real pictures are cut to them; ")
        )
    results.add_table(f"{place}: {len(files)} images against {len(data)} {on_screen(GIVEN)}", comparisons)
    results.write(num_samples=len(files), real_pictures=len(data))
    fit = on_white(sizes) if sizes else to_squares(image)
    load = pixel_loader(data, image, sizes, fit)
    results.add_nearest(comparisons[0], partial(pixels, fit), load, GIVEN, setup.batch_size)
    return results


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The image in a file; a UserError where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except OSError as error:
        raise UserError(f"{path}: not an image that can be read ({error}); remove it or draw it again") from None


def _read(path: Path, image: ImageConfig) -> figures.Pixels:
    """(H, W, C) uint8 of a file."""
    with _opened(path) as opened:
        pixels = np.array(opened.convert("RGB" if image.channels == 3 else "L"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _image_of(files: Sequence[Path], *, several: bool) -> tuple[ImageConfig, tuple[Sides, ...]]:
    """The size and channels of images, and, where they have `several` sizes, these sizes beside a square of their mean area;
    a UserError where they may not, and where they are not all of one kind."""
    kinds: dict[tuple[int, int, bool], Path] = {}
    for path in files:
        with _opened(path) as image:
            kinds.setdefault((image.width, image.height, image.mode in ("L", "1")), path)
    sizes, is_grey = sorted({(height, width) for width, height, _ in kinds}), {is_grey for _, _, is_grey in kinds}
    if len(kinds) > 1:
        ((a, b, _), one), ((c, d, _), other) = list(kinds.items())[:2]
        if (a, b) != (c, d) and not several:
            raise UserError(
                f"{one} is {a}x{b} px and {other} {c}x{d}: samples are all of one size; give --resize to compare images of "
                "several sizes as squares"
            )
        if len(is_grey) > 1:
            one, other = ({grey: path for (_, _, grey), path in kinds.items()}[grey] for grey in (True, False))
            raise UserError(f"{one} is grey and {other} in colour, or the other way: samples are of one kind")
    image = ImageConfig(size=sizes[0], channels=1 if is_grey == {True} else 3)
    if len(sizes) == 1:
        return image, ()
    side = round(math.sqrt(sum(height * width for height, width in sizes) / len(sizes)))
    return image.at((side, side)), tuple(sizes)


def _check_sizes(data: ImageSet, image: ImageConfig) -> None:
    """A UserError where real images, of which some are looked at, have another size than the samples."""
    for i in spread_indices(len(data), 64).tolist():
        part, index = data.locate(i)
        height, width = np.asarray(part.load(index, channels=image.channels)).shape[:2]
        if (height, width) != image.sides:
            raise UserError(
                f"the samples are {image.sides[1]}x{image.sides[0]} px and the real image {part.names[index]} "
                f"{width}x{height}; give --resize to cut and resize the real ones as training does"
            )
