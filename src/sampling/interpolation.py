"""From one image to the next: the great circle between what two of them start from, and the frames on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from .. import figures
from ..runs.opened import Opened
from ..runtime.failures import explain_failure
from ..storage.blocks import Ranks, wait_for
from .batches import deal_batches, in_batches
from .sampler import Sampler


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """From a (B, ...) at weight (B,) 0 to b at 1 along the great circle, one angle for each sample as a whole, in float64; a
    straight line where the ends are parallel or opposite, or one is zero. Equal norms are kept.

    Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH. The angle is twice the arc tangent of |a - b| / |a + b|
    of the unit vectors, which keeps its digits where it is small.
    """
    flat_a, flat_b, w = a.double().flatten(1), b.double().flatten(1), weight.double()[:, None]
    unit_a, unit_b = (flat / flat.norm(dim=1, keepdim=True) for flat in (flat_a, flat_b))
    distance, sum_ = ((unit_a + sign * unit_b).norm(dim=1, keepdim=True) for sign in (-1, 1))
    angle = 2 * torch.atan2(distance, sum_)  # (B, 1)
    on_circle = angle.sin() > 1e-6  # not of a zero's NaN either
    share_a = torch.where(on_circle, ((1 - w) * angle).sin() / angle.sin(), 1 - w)
    share_b = torch.where(on_circle, (w * angle).sin() / angle.sin(), w)
    return (share_a * flat_a + share_b * flat_b).reshape(a.shape).to(a.dtype)


def straight(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """As `slerp`, on the straight line: between ends that are no Gaussian noise."""
    w = weight.double().reshape(-1, *[1] * (a.ndim - 1))
    return ((1 - w) * a.double() + w * b.double()).to(a.dtype)


def smoothstep(weight: float) -> float:
    """3 w^2 - 2 w^3: from 0 to 1, at rest at both ends, so that an animation lingers at its keys."""
    return weight * weight * (3 - 2 * weight)


class Place(NamedTuple):
    """Where a frame is: between two keys, `weight` of the way from the first to the second."""

    before: int
    after: int
    weight: float


@dataclass(frozen=True)
class Journey:
    """Frames through `keys` keys, `between` of them from one key to the next. A loop goes on from the last key to the first."""

    keys: int
    between: int
    loop: bool = False

    def __len__(self) -> int:
        return self.keys * self.between if self.loop else (self.keys - 1) * self.between + 1

    def __getitem__(self, frame: int) -> Place:
        if not 0 <= frame < len(self):
            raise IndexError(frame)
        key, done = divmod(frame, self.between)
        return Place(key, (key + 1) % self.keys, smoothstep(done / self.between))


class Keys(NamedTuple):
    """What the keys start from, (K, *shape) on the CPU, and their classes; the highest number is no class."""

    starts: Tensor
    labels: Sequence[int] | None


def class_weights(labels: Sequence[int], places: Sequence[Place], rows: int) -> Tensor:
    """The shares that each frame has of the classes, (len(places), rows)."""
    weights = torch.zeros(len(places), rows)
    for row, place in zip(weights, places, strict=True):
        row[labels[place.before]] += 1 - place.weight
        row[labels[place.after]] += place.weight
    return weights


@torch.no_grad()
def inverted(sampler: Sampler, x0: Tensor, labels: Sequence[int] | None, *, batch_size: int) -> Tensor:
    """What the sampler would have to start from to draw x0 (K, *shape), as the network sees it: (K, *shape) on the CPU, by its
    solver in the other direction. The network runs at `batch_size`.

    Estimates of x_0 are clipped as in sampling: where the network's output amplifies errors, no image would come back without.
    """
    starts = []
    for batch in in_batches(range(len(x0)), batch_size):
        padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]
        classes = torch.tensor([labels[i] for i in padded], device=x0.device) if labels is not None else None
        starts.append(sampler.invert(x0[padded].to(sampler.dtype), classes).float().cpu()[: len(batch)])
    return torch.cat(starts)


@torch.no_grad()
def write_frames(
    opened: Opened,
    sampler: Sampler,
    keys: Keys,
    journey: Journey,
    folder: Path,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
) -> list[Path]:
    """Draw the frames of a journey into `folder`, whole batches dealt to ranks; frames that are there already stay.

    Where the solver draws noise at each step, it is that of image 0 of `seed` in all frames, so that nothing flickers. Between
    two images of a source that is no noise, frames start from points on a straight line. Gives the frames' paths.
    """
    paths = [folder / f"frame_{i:05d}.png" for i in range(len(journey))]
    for batch in deal_batches(range(len(paths)), batch_size, ranks, "drawing frames", unit="frames"):
        if all(paths[i].exists() for i in batch):
            continue
        places = [journey[min(i, batch[-1])] for i in range(batch[0], batch[0] + batch_size)]
        weight = torch.tensor([place.weight for place in places], dtype=torch.float64)
        before, after = (keys.starts[[getattr(place, side) for place in places]] for side in ("before", "after"))
        classes = None
        if keys.labels is not None:
            rows = (opened.num_classes or 0) + opened.null_class
            classes = class_weights(keys.labels, places, rows).to(device, sampler.dtype)
        x = (slerp if opened.gaussian else straight)(before, after, weight).to(device, sampler.dtype)
        x = sampler.move(x, classes, seed=seed, indices=[0] * batch_size)
        for i, pixels in zip(batch, figures.to_uint8(sampler.decode(x)), strict=False):
            if not paths[i].exists():
                with explain_failure(paths[i]):
                    figures.save(_enlarged(figures.to_image(pixels)), paths[i])
    ranks.barrier()
    if ranks.rank == 0:
        wait_for(paths)
    return paths


def difference(images: Tensor, paths: Sequence[Path]) -> float:
    """How far the frames `paths` are from the images (K, C, H, W) that they are to show, in levels of 255 on average."""
    wanted = [_enlarged(figures.to_image(pixels)) for pixels in figures.to_uint8(images)]
    each = [ImageChops.difference(image, Image.open(path)) for image, path in zip(wanted, paths, strict=True)]
    return float(np.mean([np.asarray(image) for image in each]))


def _enlarged(image: Image.Image) -> Image.Image:
    zoom = figures.zoom_for(min(image.size))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
