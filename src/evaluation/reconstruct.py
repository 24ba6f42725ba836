"""How well an autoencoder reconstructs: numbers over held-out pictures, and a sheet of them to look at."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from accelerate import Accelerator
from torch import Tensor

from .. import figures, metrics
from ..config import Length, config, resumable_field
from ..losses import reconstruction_loss
from ..metrics.reconstruction import SMALLEST_FOR_SSIM
from ..runtime.examples import Examples
from ..runtime.failures import Warn, warn_on_failure, warn_on_stderr


@config
class ReconstructConfig:
    """Every `every` steps and at the end of a stage: a sheet of `num_samples` held-out pictures (of training pictures where
    none are held out), and numbers over up to `num_measured` of them."""

    every: Length | None = None  # not free to change on the way: the guard decides by what it sees here
    num_samples: int = resumable_field(8, ge=1)
    num_measured: int = pydantic.Field(512, ge=1)


@torch.no_grad()
def reconstruct(
    network: Any,
    examples: Examples,
    spec: ReconstructConfig,
    accelerator: Accelerator,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    batch_size: int,
    sheet: Path | None = None,
    warn: Warn = warn_on_stderr,
) -> dict[str, float]:
    """l1, psnr, ssim, lpips (by the `perceptual` loss's network) and colour_drift of the examples, through the posterior's
    mean and the EMA weights; mean and standard deviation of each latent channel. All ranks share the work.

    `sheet` gets, of the same examples every time, the picture, its reconstruction and their difference. Where it cannot be
    drawn, `warn` is told; the numbers decide what is kept, so an error in them ends the run.
    """
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    dtype = next(network.parameters()).dtype
    total = len(examples.labels)
    count = min(spec.num_measured, total)
    spread = np.linspace(0, total - 1, count).astype(np.int64)
    sums: dict[str, Tensor] = {}

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros((), device=device, dtype=torch.float64)) + values.double().sum()

    for start in range(rank * batch_size, count, batch_size * world):
        images = examples.load(spread[start : start + batch_size]).to(device, dtype)
        drawn, mean = _through(network, images)
        add("l1", reconstruction_loss("l1", drawn, images))
        add("psnr", metrics.psnr(drawn, images))
        if min(images.shape[2:]) >= SMALLEST_FOR_SSIM:
            add("ssim", metrics.ssim(drawn, images))
        if perceptual is not None:
            add("lpips", perceptual(drawn, images))
        for c, drift in enumerate(metrics.colour_drift(drawn, images).unbind(1)):
            add(f"drift {c}", drift)
        for c, channel in enumerate(mean.double().unbind(1)):
            add(f"sum {c}", channel)
            add(f"square {c}", channel.square())
            add(f"count {c}", torch.ones_like(channel))
    names = _names(network, examples, perceptual is not None)
    zero = torch.zeros((), device=device, dtype=torch.float64)
    summed = accelerator.reduce(torch.stack([sums.get(name, zero) for name in names]))  # a rank may have had none
    assert isinstance(summed, Tensor)
    found = dict(zip(names, summed.tolist(), strict=True))

    values = {name: found[name] / count for name in ("l1", "psnr", "ssim", "lpips") if name in found}
    drifts = [found[name] / count for name in names if name.startswith("drift")]
    values["colour_drift"] = max(drifts, key=abs)
    for c in range(sum(name.startswith("sum") for name in names)):
        mean, square = (found[f"{word} {c}"] / found[f"count {c}"] for word in ("sum", "square"))
        values |= {f"latent_mean_{c}": mean, f"latent_std_{c}": max(0.0, square - mean**2) ** 0.5}
    if sheet is not None and accelerator.is_main_process:
        with warn_on_failure("the preview", warn):
            shown = spread[np.linspace(0, count - 1, min(spec.num_samples, count)).astype(np.int64)]
            images = examples.load(shown).to(device, dtype)
            save_sheet(sheet, images, _through(network, images)[0], values)
    return values


def _through(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What comes back, cut to [-1, 1] as a picture is, and the latents' means."""
    mean, _ = network.moments(images)
    return network.decode(mean).clamp(-1, 1), mean


def _names(network: Any, examples: Examples, perceptual: bool) -> list[str]:
    """All sums in one order, the same on a rank that had no picture."""
    shape = examples.load(np.zeros(1, dtype=np.int64)).shape
    latents = network.spec.latent_channels
    names = ["l1", "psnr"]
    names += ["ssim"] if min(shape[2:]) >= SMALLEST_FOR_SSIM else []
    names += ["lpips"] if perceptual else []
    names += [f"drift {c}" for c in range(shape[1])]
    return names + [f"{word} {c}" for c in range(latents) for word in ("sum", "square", "count")]


def save_sheet(path: Path, images: Tensor, drawn: Tensor, values: dict[str, float], which: str = "") -> None:
    """Three rows: pictures (`which` says what kind), reconstructions, and their difference around grey; (N, C, H, W) in [-1, 1]
    twice."""
    rows = torch.cat([images, drawn, drawn - images])
    told = ", ".join(f"{name} {values[name]:.3g}" for name in ("psnr", "ssim", "lpips") if name in values)
    title = f"{which}picture, reconstruction, difference: {told}"
    figures.save(figures.grid(figures.to_uint8(rows), columns=len(images), title=title), path)


def troubled_channels(values: dict[str, float]) -> list[str]:
    """What is not finite, the latent channels that say nothing any more, and those that grow out of bounds, in words."""
    bad = [name for name, value in values.items() if math.isnan(value) or (math.isinf(value) and name != "psnr")]
    found = [f"the reconstructions are not finite (NaN or infinity): {', '.join(bad[:3])}; look at the loss"] if bad else []
    c = 0
    while f"latent_std_{c}" in values:
        mean, std = values[f"latent_mean_{c}"], values[f"latent_std_{c}"]
        if std < 0.02:
            found.append(
                f"latent channel {c} is dead: its standard deviation is {std:.3g}; lower kl_weight, or use fewer channels"
            )
        elif max(std, abs(mean)) > 100:
            found.append(f"latent channel {c} explodes: mean {mean:.3g}, standard deviation {std:.3g}; raise kl_weight")
        c += 1
    return found
