"""What a run draws images from, made of given images: as its network is told, to be looked at, and the truth, where it is
known."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import figures
from ..config import UserError
from ..config.sizes import Sides
from ..data import ImageSet
from ..data.conditions import LowCondition, MaskCondition, PairedCondition, flagged, noised, reduced, split_condition
from ..data.pairs import cut_half, find_partners
from ..data.transforms import crop
from ..runs.conditions import latent_condition, normalised
from ..runs.opened import Opened
from ..runtime.seeds import noise_of
from ..runtime.stream import CPU, to_network
from .edit import files_of, load_low, open_cropped, open_file

MIDDLE = np.full(3, 0.5)


def add_condition_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of sample.py for a run that draws from images."""
    given = parser.add_argument_group("from images, of a run with a condition")
    given.add_argument("--condition", metavar="PLACE", help="an image, or a folder: what it draws from")
    given.add_argument("--then", metavar="RUN", help="an upsampler that makes what is drawn larger, into the folder larger")
    given.add_argument("--truth", metavar="FOLDER", help="of a run on pairs: the images of the same names, to be shown beside")
    given.add_argument("--condition-guidance", type=float, default=1.0, metavar="S", help="scale of its guidance (default 1)")
    given.add_argument("--condition-noise", type=float, default=0.0, metavar="S", help="noise on the smaller image (default 0)")


def check_conditions(args: argparse.Namespace) -> None:
    """A UserError for those of these arguments that make no sense together."""
    if args.condition is not None and args.image is not None:
        raise UserError("--condition and --image are two ways to draw from an image; give one of them")
    has_noise = args.condition_noise and args.low is None and args.then is None
    if args.condition is None and (args.truth is not None or has_noise):
        raise UserError("--truth and --condition-noise are about images to draw from: give them with --condition")


class Conditioned(NamedTuple):
    """What images are drawn from, one entry for each, which may have several shapes: `values` (k, h, w) as the network is told,
    on the CPU; `shown` (C, H, W) to be looked at; and the `truth` (C, H, W), both in [-1, 1], None where it is not known."""

    values: list[Tensor]
    shown: list[Tensor]
    truth: list[Tensor] | None

    @property
    def digest(self) -> str:
        """The hash of what the network is told."""
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in self.values)).hexdigest()


def read_conditions(
    opened: Opened,
    place: str,
    *,
    by_shape: bool = True,
    mask: str | None = None,
    truth: str | None = None,
    level: float = 0.0,
    seed: int = 0,
) -> Conditioned:
    """The images of a folder, or one, as what the run draws from. Of conditions that are made of an image, that image is the
    truth; of pairs, `truth` is a folder of images of the same names. `mask` is a file, white where images are hidden (without
    it masks are drawn), and `level` that of the noise that a smaller image gets. With `by_shape`, a run on images of several
    shapes takes each image at the nearest of them. A UserError says what does not fit."""
    condition = opened.condition
    if condition is None:
        raise UserError(f"{opened.path} draws from no image; leave --condition out")
    if mask is not None and not isinstance(condition, MaskCondition):
        raise UserError(f"{opened.path} draws from no masked image; leave --mask out")
    if truth is not None and (not isinstance(condition, PairedCondition) or condition.side is not None):
        raise UserError(f"--truth is for runs on pairs of files; the images of {opened.path} tell the truth themselves")
    files = files_of(place)
    by_shape = by_shape and bool(opened.buckets)
    shapes = [opened.at_nearest(*_read_sides(opened, file)) if by_shape else opened for file in files]
    partners = _find_partners(files, truth) if truth is not None else None
    is_low = isinstance(condition, LowCondition) and any(map(_is_smaller, files, shapes))
    each: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    for sides in dict.fromkeys(shape.image.sides for shape in shapes):
        numbers = [i for i, shape in enumerate(shapes) if shape.image.sides == sides]
        at, part = shapes[numbers[0]], [files[i] for i in numbers]
        if isinstance(condition, PairedCondition):
            values, known = _read_pairs(at, condition, part, [partners[i] for i in numbers] if partners is not None else None)
        elif isinstance(condition, LowCondition) and is_low:
            height, width = reduced(torch.zeros(1, 1, *sides), condition.size).shape[2:]
            values, known = _stack(at, part, (height, width)), None
        else:
            known = _stack(at, part)
            if isinstance(condition, MaskCondition) and mask is not None:
                hidden = torch.from_numpy((open_cropped(mask, sides, 1) > 127).astype(np.float32)).permute(2, 0, 1)
                values = condition.make(known, hidden.expand(len(known), -1, -1, -1))
            else:
                values = _split(at, known, seed, numbers)[1]
        inputs, shown = tell(at, values, numbers, level=level, seed=seed), condition.show(values, at.image.shape)
        each |= zip(numbers, zip(inputs, shown, known if known is not None else [None] * len(part), strict=True), strict=True)
    in_order = [each[i] for i in range(len(files))]
    truths = [known for _, _, known in in_order if known is not None]
    return Conditioned([values for values, _, _ in in_order], [shown for _, shown, _ in in_order], truths or None)


class Given(NamedTuple):
    """What the arguments of sample.py say of a condition: what the network is told of each image that is drawn, what that is
    made of, labels where they are known, and what else the samples depend on."""

    values: list[Tensor] | None
    conditioned: Conditioned | None
    labels: list[int] | None
    request: dict[str, Any]


def read_given(opened: Opened, args: argparse.Namespace) -> Given:
    """The images that the run draws from, `args.num_samples` times each, which becomes their number in all. An imported
    upsampler draws one of each. A UserError where they are missing, or the run draws from none."""
    place = args.condition if args.low is None else args.low  # of an upsampler two names of one thing
    if opened.low_resolution is not None:
        if place is None:
            raise UserError(
                f"{args.run} is an upsampler: give with --low the images of {opened.low_resolution} px that it makes larger"
            )
        if args.truth is not None or (args.condition_noise and args.then is None):
            raise UserError(f"{args.run} was imported, and knows no noise and no truth; leave both options out")
        values, labels = load_low(opened, place)
        if (args.num_samples or 1) > len(values):
            raise UserError(f"--num-samples {args.num_samples}: {place} has {len(values)} images")
        args.num_samples = args.num_samples or len(values)
        small = Conditioned(list(values), list(values), None)
        return Given(small.values, None, labels, {"low": small.digest})
    if args.low is not None and not isinstance(opened.condition, LowCondition):
        load_low(opened, args.low)  # says that it is no upsampler
    if place is None:
        if opened.condition is not None:
            raise UserError(f"{args.run} draws from images ({opened.condition.kind}): give them with --condition FOLDER")
        return Given(None, None, None, {})
    level = args.condition_noise if args.then is None else 0.0  # else it is that of the upsampler
    options = {"mask": args.mask, "truth": args.truth, "level": level, "seed": args.seed}
    conditioned, each = read_conditions(opened, place, by_shape=args.size is None, **options), args.num_samples or 1
    args.num_samples = each * len(conditioned.values)
    values = [value for value in conditioned.values for _ in range(each)]
    return Given(values, conditioned, None, {"condition": conditioned.digest})


def draw_from_set(opened: Opened, images: ImageSet, indices: NDArray[np.int64]) -> Conditioned:
    """The same of images of a set, at the size of the run; the set has partners where the run draws from pairs."""
    pixels = images.batch(indices, opened.image.plain, np.full((len(indices), 3), 0.5), partners=True)
    known, values = _split(opened, to_network(torch.from_numpy(np.ascontiguousarray(pixels)), CPU), 0, indices.tolist())
    assert opened.condition is not None
    shown = opened.condition.show(values, opened.image.shape)
    return Conditioned(list(tell(opened, values, indices.tolist())), list(shown), list(known))


def tell(opened: Opened, values: Tensor, numbers: Sequence[int], *, level: float = 0.0, seed: int = 0) -> Tensor:
    """What the network is told of a condition (B, k, h, w) of the images of these numbers: encoded where it is a latent run,
    noised, with its flag; on the CPU. A UserError for a level that was not trained."""
    condition = opened.condition
    assert condition is not None
    if not 0 <= level <= condition.noise:
        raise UserError(f"--condition-noise {level:g}: {opened.path} was trained with levels from 0 to {condition.noise:g}")
    if opened.codec is not None:
        device = next(opened.network.parameters()).device
        encoded = [
            latent_condition(condition, opened.codec.network, value[None].to(device), opened.image.shape, opened.shape)
            for value in values  # one by one: encoding a whole folder at once needs too much memory
        ]
        values = normalised(condition, opened.codec, torch.cat(encoded)).cpu()
    if level:
        eps = noise_of(seed, numbers, values.shape[1:], sweep=1 << 32)
        values = noised(values, torch.full((len(values),), level), eps)
    return values if opened.low_resolution is not None else flagged(values, condition, level)


def save_side_by_side(conditioned: Conditioned, samples: Sequence[Sequence[figures.Pixels]], path: Path) -> None:
    """Rows of a condition, what was drawn from it, and the truth where it is known; `samples` are (H, W, C) of each."""
    rows = list[figures.Pixels]()
    for i, of_one in enumerate(samples):
        images = [known[i] for known in (conditioned.shown, conditioned.truth) if known is not None]
        condition, *truth = (figures.to_uint8(image[None])[0] for image in images)
        rows += [condition, *of_one, *truth]
    title = "condition, samples" + (" and truth" if conditioned.truth is not None else "")
    figures.save(figures.grid(figures.on_white(rows), columns=len(rows) // len(samples), title=title), path)


def _stack(opened: Opened, files: Sequence[Path], sides: Sides | None = None) -> Tensor:
    """(N, C, H, W) in [-1, 1] of files, cut and resized as in training, or to other `sides`."""
    size, channels = sides or opened.image.size, opened.image.channels
    return to_network(torch.from_numpy(np.stack([open_cropped(file, size, channels) for file in files])), CPU)


def _split(opened: Opened, pixels: Tensor, seed: int, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images and what the run draws them from, of pixels (B, channels, H, W)."""
    images, values = split_condition(pixels, opened.image.channels, opened.condition, seed, numbers)
    assert values is not None
    return images, values


def _read_sides(opened: Opened, file: Path) -> Sides:
    """Width and height of what a file shows of one image: of side-by-side pairs one half."""
    condition, (width, height) = opened.condition, open_file(file, opened.image.channels).size
    is_pair = isinstance(condition, PairedCondition) and condition.side is not None
    return (width // 2 if is_pair else width), height


def _is_smaller(file: Path, opened: Opened) -> bool:
    """Whether an image is smaller than those that the run draws, so that it is what is made larger."""
    (width, height), (rows, columns) = open_file(file, opened.image.channels).size, opened.image.sides
    return width < columns or height < rows


def _find_partners(files: Sequence[Path], truth: str) -> list[Path]:
    """The files of the folder `truth` that have the names of these `files`; a UserError where one is missing."""
    partners = files_of(truth)
    matches = find_partners([file.name for file in files], [file.name for file in partners]).tolist()
    if missing := [file.name for file, i in zip(files, matches, strict=True) if i < 0]:
        raise UserError(f"--truth {truth} has no image of the name of {', '.join(missing[:5])}; add it, or leave --truth out")
    return [partners[i] for i in matches]


def _read_pairs(
    opened: Opened, condition: PairedCondition, files: Sequence[Path], partners: Sequence[Path] | None
) -> tuple[Tensor, Tensor | None]:
    """The given images as conditions, and the truth: the other halves, or the files `partners`."""
    image, channels = opened.image, condition.count_channels(opened.image.channels)
    spec = replace(image.plain, channels=3 if channels == 3 else 1)

    def stack(cut: Sequence[NDArray[np.uint8]]) -> Tensor:
        return to_network(torch.from_numpy(np.ascontiguousarray(np.stack(cut))), CPU)

    if condition.side is not None:
        other = "right" if condition.side == "left" else "left"
        both = [open_file(file, 3) for file in files]
        values = stack([crop(cut_half(whole, condition.side), spec, MIDDLE) for whole in both])
        return values, stack([crop(cut_half(whole, other), image.plain, MIDDLE) for whole in both])
    values = stack([crop(open_file(file, channels), spec, MIDDLE) for file in files])
    return values, _stack(opened, partners) if partners is not None else None
