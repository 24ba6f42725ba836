"""Bits per dimension of a whole data set: all ranks share the work in blocks of images; after a kill, whole blocks are kept."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import figures
from ..config import UserError
from ..config.packages import ask_for
from ..data import ImageSet
from ..data.buckets import sort_by_shape
from ..diffusion import TableSchedule, bits_per_dimension, clip
from ..diffusion import times as times_of
from ..metrics.distances import Array
from ..runs.opened import Opened
from ..runtime.failures import warn_on_failure
from ..runtime.seeds import noise_of
from ..runtime.stream import image_examples
from ..storage.files import as_json, write_whole
from ..storage.finite import is_finite
from .results import Setup
from .shapes import measure_by_shape

BLOCK = 64  # images in a file; a kill loses the work on one file
KEYS = ("prior", "terms", "eps_mse", "x0_mse")


def measure_likelihood(
    setup: Setup, opened: Opened, data: ImageSet, *, steps: int | list[int] | None, spacing: str
) -> tuple[dict[str, Any], Path]:
    """The variational bound of every image along so many steps (default all of the schedule): a file for every block of images,
    likelihood.json (the means), likelihood.png (the terms by time). Gives the means, and the folder (default
    evaluations/RUN/likelihood_...).

    Every image has its own noise, so the results are the same on any number of processes and after a kill. A UserError for a
    run that has no likelihood, and for a folder of other results.
    """
    schedule = _check(opened, data)
    times = times_of(schedule, schedule.num_steps if steps is None else steps, spacing)
    ask_for("drawing likelihood.png", "matplotlib")
    batch_size, seed = setup.batch_size, setup.seed
    request = {
        "weights": opened.digest,
        "pictures": data.fingerprint,
        "files": data.state,
        "count": len(data),
        "times": times.tolist(),
        "batch_size": batch_size,
        "seed": seed,
    }
    request |= {"buckets": opened.buckets} if opened.buckets else {}
    key = [value for name, value in request.items() if name != "count"]
    out = setup.claim(opened.folder, "likelihood", request, key)
    buckets = sort_by_shape(opened.bucket_sizes, opened.image, data.sides)
    examples, device = image_examples(data, buckets), next(opened.network.parameters()).device

    @torch.no_grad()
    def measure(indices: NDArray[np.int64]) -> dict[str, Array]:
        """The terms of the bound of a batch of images of one shape, (B, ...) each."""
        condition = {}
        if opened.num_classes is not None:
            labels = torch.from_numpy(examples.labels[indices])
            condition = {"labels": torch.where(labels < 0, opened.num_classes, labels).to(device)}
        denoiser = opened.process.denoiser(opened.network, **condition)
        bits = bits_per_dimension(
            clip(denoiser, schedule, *opened.bounds) if opened.config["process"]["clip"] else denoiser,
            examples.load(indices).to(device),
            times,
            schedule,
            noise=lambda step, like: noise_of(seed, indices.tolist(), like.shape[1:], step).to(like),
            variance=opened.process.variance,
        )
        values = {key: getattr(bits, key).cpu().double().numpy() for key in KEYS}
        bad = [key for key, value in values.items() if not is_finite(torch.from_numpy(value))]
        if bad:
            raise UserError(
                f"the likelihood of {opened.origin} is not finite (NaN or infinity: {', '.join(bad)}) for images "
                f"{indices[0]} to {indices[-1]}; measure an earlier checkpoint"
            )
        return values

    def measure_batch(images: range) -> dict[str, Array]:
        return measure_by_shape(images, buckets.which, measure)

    arrays = setup.measure(out, len(data), measure_batch, "likelihood", block=max(BLOCK, batch_size))
    totals, mean = arrays["prior"] + arrays["terms"].sum(1), {key: arrays[key].mean(0).tolist() for key in KEYS}
    means = {
        "bits_per_dimension": float(totals.mean()),
        "standard_error": float(totals.std(ddof=1) / math.sqrt(len(totals))) if len(totals) > 1 else 0.0,
        "prior": mean["prior"],
        "decoder": float(arrays["terms"][:, -1].mean()),
        **{key: mean[key] for key in KEYS[1:]},
        "steps": times[:-1].tolist(),
        "pictures": len(data),
    }
    if setup.computes:
        write_whole(out / "likelihood.json", as_json(means))
        t = means["steps"]
        errors = {"eps": (t, means["eps_mse"]), "x_0": (t, means["x0_mse"])}
        panels = {"L_t, bits/dim": {"L_t": (t, means["terms"])}, "mean squared error": errors}
        with warn_on_failure("likelihood.png"):
            figures.curves(out / "likelihood.png", panels, xlabel="t", log=panels.keys())
    return means, out


def _check(opened: Opened, data: ImageSet) -> TableSchedule:
    """The schedule of the run; a UserError where the images have no likelihood under the run."""
    if opened.codec is not None:
        raise UserError(f"{opened.path} draws latents, which have no bits per dimension of images; give a run on pixels")
    if not isinstance(opened.process.schedule, TableSchedule):
        raise UserError(f"{opened.path} is on the blend: it has no chain of steps, so no bits per dimension")
    if opened.low_resolution is None and opened.condition is not None:
        raise UserError(f"{opened.path} draws from images ({opened.condition.kind}), so its likelihood would depend on them")
    if opened.low_resolution is not None:
        raise UserError(f"{opened.path} is an upsampler: what it draws depends on another image, which the data has not")
    opened.check_classes(data)
    if opened.num_classes is not None and not opened.null_class and bool((data.labels < 0).any()):
        raise UserError(f"{opened.path} has no null class, and some images have no class")
    return opened.process.schedule
