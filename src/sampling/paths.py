"""Paths between source and data: frames from one image to the next, images inverted, plots of 2-D points on their way."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config.progress import track
from ..diffusion import Prediction
from ..runs.opened import Opened
from ..runtime.failures import warn_on_failure
from ..storage.blocks import Ranks, wait_for
from ..storage.files import as_json, numpy_bytes, write_whole
from .edit import encode_images, fingerprint
from .files import claim, deal_batches, in_batches, read_pixels, save_missing, write_animation
from .sampler import Sampler, describe

FIELD_TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the plots of what moves the points


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


def plan_frames(keys: int, between: int, *, loop: bool = False) -> list[Place]:
    """The frames through `keys` keys, `between` of them from one key to the next. A loop goes on from the last key to the
    first."""
    count = keys * between if loop else (keys - 1) * between + 1
    return [Place(i // between, (i // between + 1) % keys, smoothstep(i % between / between)) for i in range(count)]


def class_weights(labels: Sequence[int], places: Sequence[Place], rows: int) -> Tensor:
    """The shares that each frame has of the classes, (len(places), rows)."""
    weights = torch.zeros(len(places), rows)
    for row, place in zip(weights, places, strict=True):
        row[labels[place.before]] += 1 - place.weight
        row[labels[place.after]] += place.weight
    return weights


@torch.no_grad()
def write_frames(
    opened: Opened,
    sampler: Sampler,
    starts: Tensor,
    labels: Sequence[int] | None,
    places: Sequence[Place],
    folder: Path,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
    watch: Callable[[list[Path]], None] | None = None,
) -> list[Path]:
    """Draw the frames at `places` between the keys into `folder`, whole batches dealt to ranks; frames that are there already
    stay. The keys start from `starts` (K, *shape) on the CPU and have the classes `labels`; the highest number is no class.

    Where the solver draws noise at each step, it is that of image 0 of `seed` in all frames, so that nothing flickers. Between
    two images of a source that is no noise, frames start from points on a straight line. Gives the frames' paths. `watch` is
    given those that are there, after each batch.
    """
    paths = [folder / f"frame_{i:05d}.png" for i in range(len(places))]
    for batch in deal_batches(range(len(paths)), batch_size, ranks, "drawing frames", unit="frames"):
        files = paths[batch.start : batch.stop]
        if all(path.exists() for path in files):
            continue
        padded = [places[min(i, batch[-1])] for i in range(batch[0], batch[0] + batch_size)]
        weight = torch.tensor([place.weight for place in padded], dtype=torch.float64)
        before, after = (starts[[getattr(place, side) for place in padded]] for side in ("before", "after"))
        classes = None
        if labels is not None:
            rows = (opened.num_classes or 0) + opened.null_class
            classes = class_weights(labels, padded, rows).to(device, sampler.dtype)
        x = (slerp if opened.gaussian else straight)(before, after, weight).to(device, sampler.dtype)
        x = sampler.move(x, classes, seed=seed, indices=[0] * batch_size)
        save_missing(_enlarged(sampler.decode(x)), files)
        if watch is not None:
            watch(paths[: batch.stop])
    ranks.barrier()
    if ranks.rank == 0:
        wait_for(paths)
    return paths


def difference(images: Tensor, paths: Sequence[Path]) -> float:
    """How far the frames `paths` are from the images (K, C, H, W) that they are to show, in levels of 255 on average."""
    wanted = _enlarged(images)
    return float(np.abs(wanted.astype(np.int64) - np.stack(read_pixels(paths))).mean())


def _enlarged(images: Tensor) -> figures.Pixels:
    """Small images with pixels that a person sees."""
    zoom = figures.zoom_for(min(images.shape[2:]))
    return figures.to_uint8(images).repeat(zoom, axis=1).repeat(zoom, axis=2)


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
    write_whole(out / "sources.npy", numpy_bytes(np.save, np.concatenate(sources)))
    write_whole(out / "inversion.json", as_json({"mean": mean, "pictures": measured}))
    title = f"picture, source, and back again with {sampler.calls()} network calls each way"
    with warn_on_failure("inversion.png"):
        sheet = figures.grid(np.concatenate(rows)[: 3 * 32], columns=3 * min(4, len(files)), title=title)
        figures.save(sheet, out / "inversion.png")
    return mean


@torch.no_grad()
def move_points(sampler: Sampler, seed: int, count: int, labels: Tensor | None, *, device: torch.device) -> Tensor:
    """The points 0 .. count - 1 of `seed` after each step, (steps + 1, count, 2) on the CPU, the source first."""
    way: list[Tensor] = []

    def keep(step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        way.append(x_t.float().cpu())

    x = sampler.start(seed, range(count)).to(device, sampler.dtype)
    end = sampler.move(x, labels, seed=seed, indices=range(count), callback=keep)
    return torch.stack([*way, end.float().cpu()])


@torch.no_grad()
def velocity(sampler: Sampler, at: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
    """What moves the points `at` (N, 2) towards the data at time t: the network's estimate of data - source, (N, 2)."""
    condition = {"labels": labels} if labels is not None else {}
    at = at.to(next(sampler.network.parameters()))  # pyright: ignore[reportFunctionMemberAccess]
    prediction = sampler.process.denoiser(sampler.network, **condition)(at, torch.tensor(t, dtype=torch.float64))
    return (prediction.x0 - prediction.eps).float().cpu()


def write_points(
    sampler: Sampler,
    out: Path,
    *,
    count: int = 20_000,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    device: torch.device,
    frames: bool = True,
    request: dict[str, Any] | None = None,
) -> list[Path]:
    """Write into the folder `out`: `x0.png`, the source (the paper's x_0), `x1.png`, the samples, `trajectories.png` of 100
    points, `velocity.png` at five times, `points.npz` with both ends, and `points.gif` with the points between them.

    `labels` are the classes (count,) of a conditional network, `request` what all depends on, for `metadata.json`. Gives the
    paths of the plots; a folder that holds others is a UserError.
    """
    if request is not None:
        claim(out, request, what="frames")
    classes = torch.tensor(labels, device=device) if labels is not None else None
    way = move_points(sampler, seed, count, classes, device=device).numpy()
    first, last = (figures.scatter(way[i], title=title) for i, title in ((0, "x_0: the source"), (-1, "x_1: the data")))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "points.npz", numpy_bytes(np.savez, source=way[0], data=way[-1]))
    figures.save(first, out / "x0.png")
    figures.save(last, out / "x1.png")
    figures.trajectories(
        out / "trajectories.png", way[:, :100], title=f"100 of {count} points, {sampler.calls()} network calls"
    )
    fields = {}
    for t in [t for t in FIELD_TIMES if t or sampler.process.schedule.network_at_clean]:
        # at points of that time: elsewhere the network was not trained
        at = way[int((sampler.times - t).abs().argmin())][:300]
        some = classes[: len(at)] if classes is not None else None
        fields[f"alpha = {1 - t:g}"] = at, velocity(sampler, torch.from_numpy(at).to(device), t, some).numpy()
    figures.velocity_fields(out / "velocity.png", fields)
    paths = [out / name for name in ("x0.png", "x1.png", "trajectories.png", "velocity.png")]
    if not frames:
        return paths
    alphas = (1 - sampler.process.schedule.level(sampler.times).sigma).tolist()
    steps = track(list(zip(way, alphas, strict=True)), "drawing frames", unit="frames")
    sheets = (figures.in_a_row([first, figures.scatter(x, title=f"alpha = {alpha:.2f}"), last]) for x, alpha in steps)
    write_animation(out / "frames" / "frame_%03d.png", sheets, out / "points.gif", fps=24)
    return [*paths, out / "points.gif"]
