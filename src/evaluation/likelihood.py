"""Bits per dimension of a whole data set: all ranks, a block of pictures at a time, going on where a kill left it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config import UserError
from ..config.packages import ask_for
from ..config.progress import within
from ..data import ImageSet
from ..diffusion import TableSchedule, bits_per_dimension, clip
from ..runs.opened import Opened
from ..runtime.examples import image_examples
from ..runtime.failures import warn_on_failure
from ..runtime.seeds import noise_of
from ..storage.blocks import Ranks, in_blocks
from ..storage.files import as_json, write_whole
from ..storage.finite import is_finite
from ..storage.requests import claim_folder

BLOCK = 64  # pictures in a file, and what a kill costs at most
KEYS = ("prior", "terms", "eps_mse", "x0_mse")


def _check(opened: Opened, data: ImageSet) -> None:
    if opened.codec is not None:
        raise UserError(f"{opened.path} draws latents, which have no bits per dimension of pictures; give a run on pixels")
    if not isinstance(opened.process.schedule, TableSchedule):
        raise UserError(f"{opened.path} is on the blend: it has no chain of steps, so no bits per dimension")
    if opened.low_resolution is not None:
        raise UserError(f"{opened.path} is an upsampler: what it draws depends on another picture, which the data has not")
    opened.check_classes(data)
    if opened.num_classes is not None and not opened.null_class and bool((data.labels < 0).any()):
        raise UserError(f"{opened.path} has no null class, and some pictures have no class")


@torch.no_grad()
def _measure(opened: Opened, data: ImageSet, block: range, times: Tensor, batch_size: int, seed: int) -> dict[str, Any]:
    device, schedule = next(opened.network.parameters()).device, opened.process.schedule
    examples, found = image_examples(data, opened.image), []
    for start in range(block.start, block.stop, batch_size):
        indices = np.arange(start, min(start + batch_size, block.stop))
        x0, condition = examples.load(indices).to(device), {}
        if opened.num_classes is not None:
            labels = torch.from_numpy(data.labels[indices])
            condition = {"labels": torch.where(labels < 0, opened.num_classes, labels).to(device)}
        denoiser = opened.process.denoiser(opened.network, **condition)
        found.append(
            bits_per_dimension(
                clip(denoiser, schedule, *opened.bounds) if opened.config["process"]["clip"] else denoiser,
                x0,
                times,
                schedule,
                noise=lambda step, like: noise_of(seed, indices.tolist(), like.shape[1:], step).to(like),  # noqa: B023
                variance=opened.process.variance,
            )
        )
        within(len(indices))
    values = {key: torch.cat([getattr(part, key) for part in found]).cpu().double() for key in KEYS}
    bad = [key for key, value in values.items() if not is_finite(value)]
    if bad:
        raise UserError(
            f"the likelihood of {opened.origin} is not finite (NaN or infinity: {', '.join(bad)}) for images {block.start} to "
            f"{block.stop - 1}; measure an earlier checkpoint"
        )
    return {key: value.numpy() for key, value in values.items()}


def measure_likelihood(
    opened: Opened,
    data: ImageSet,
    times: Tensor,
    out: Path,
    *,
    batch_size: int,
    seed: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """The variational bound of every picture along `times` (N + 1,), into `out`: a file for every block of pictures,
    likelihood.json (the means), likelihood.png (the terms by time). Gives the means.

    Every picture has its own noise, so the figures are the same on any number of processes and after a kill. A UserError for
    what has no likelihood, and for a folder of other figures.
    """
    _check(opened, data)
    ask_for("drawing likelihood.png", "matplotlib")
    request = {
        "weights": opened.digest,
        "pictures": data.fingerprint,
        "files": data.state,
        "count": len(data),
        "times": times.tolist(),
        "batch_size": batch_size,
        "seed": seed,
    }
    claim_folder(out / "request.json", request, ranks, holds="figures", newer_keys=("files",))
    each = in_blocks(
        out,
        len(data),
        max(BLOCK, batch_size),
        lambda block: _measure(opened, data, block, times, batch_size, seed),
        ranks,
        doing="likelihood",
    )
    totals = each["prior"] + each["terms"].sum(1)
    means = {
        "bits_per_dimension": float(totals.mean()),
        "standard_error": float(totals.std(ddof=1) / math.sqrt(len(totals))) if len(totals) > 1 else 0.0,
        "prior": float(each["prior"].mean()),
        "decoder": float(each["terms"][:, -1].mean()),
        "terms": each["terms"].mean(0).tolist(),
        "eps_mse": each["eps_mse"].mean(0).tolist(),
        "x0_mse": each["x0_mse"].mean(0).tolist(),
        "steps": times[:-1].tolist(),
        "pictures": len(data),
    }
    if ranks.rank == 0:
        write_whole(out / "likelihood.json", as_json(means))
        t = means["steps"]
        panels = {"L_t, bits/dim": {"L_t": (t, means["terms"])}, "mean squared error": {"eps": (t, means["eps_mse"])}}
        panels["mean squared error"]["x_0"] = (t, means["x0_mse"])
        with warn_on_failure("likelihood.png"):
            figures.curves(out / "likelihood.png", panels, xlabel="t", log=panels.keys())
    return means
