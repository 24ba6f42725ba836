"""Images on fixed noise while a run trains, the loss on held-out images, and what a person looks at before."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .. import figures
from ..data import ImageConfig, ImageSet
from ..data.names import file_stems
from ..data.transforms import position_uniforms
from ..diffusion import Process, TableSchedule
from ..evaluation.quality import Quality
from ..runs.autoencoder import LatentCodec
from ..runs.starts import Bound, Start
from ..runtime.examples import Examples
from ..runtime.failures import Outcome, failed_on_any, warn_on_failure
from ..runtime.seeds import generator, noise_of, normal
from ..runtime.stream import to_network
from ..sampling.sampler import Sampler
from ..storage.finite import is_finite
from .config import DiffusionConfig, PreviewConfig
from .session import Session

LEVELS = 10  # of noise, for which the held-out loss is told


def preview(
    sampler: Sampler, spec: PreviewConfig, session: Session, class_names: tuple[str, ...], held_out: Examples | None
) -> dict[str, float]:
    """Draw the preview of the session's step on all ranks, and measure the loss on what is held out.

    The first rank writes the sheets: `step_STEP.png`, or in the folder `step_STEP` one `sample_CLASS_4x4.png` for each class.
    A sheet that cannot be drawn does not end the run; the loss may decide which checkpoint is kept, and an error in it does.
    """
    session.clock.enter("a preview")
    stem = session.run.samples / f"step_{session.step:08d}"
    n, count = len(class_names), spec.num_samples
    columns = max(1, min(16, round(math.sqrt(count))))
    if sampler.num_classes is None or spec.sheets == "one":
        labels = [i * n // count % n for i in range(count)] if sampler.num_classes is not None else None
        sheets = [(stem.with_name(f"{stem.name}.png"), labels)]
    else:
        size = f"{columns}x{-(-count // columns)}"
        sheets = [(stem / f"sample_{name}_{size}.png", [i] * count) for i, name in enumerate(file_stems(class_names))]
    for path, labels in sheets:
        samples = _draw(sampler, count, spec.batch_size, labels, session)
        if samples is None:
            break
        warn_not_finite(samples, session)
        with looked_at(session):
            if session.accelerator.is_main_process:
                names = [class_names[label] for label in labels] if labels is not None else None
                captions = names if spec.sheets == "one" else None
                figures.save(figures.grid(figures.to_uint8(samples), columns=columns, labels=captions), path)
    if held_out is None:
        return {}
    batch = session.batch_plan.micro
    return held_out_loss(sampler.network, sampler.process, held_out, batch, sampler.num_classes, session.accelerator)


def measure_quality(quality: Quality, sampler: Sampler, batch_size: int, session: Session) -> dict[str, float]:
    """The distance of samples from the training images, on all processes."""
    session.clock.enter("measuring samples")
    return quality.measure(sampler, batch_size, session.run.say)


PREVIEW = "the preview"


def looked_at(session: Session) -> AbstractContextManager[Outcome]:
    """Around a part of a preview that may fail. With FSDP nothing is caught: the other ranks wait inside the network."""
    if session.accelerator.is_fsdp2:
        return nullcontext(Outcome())
    return warn_on_failure(PREVIEW, lambda what, reason: session.run.warn(what, reason))


def preview_failed(outcome: Outcome, session: Session) -> bool:
    """Whether drawing failed on any rank, the same answer on all: what was drawn is gathered by all of them or by none."""
    return failed_on_any(outcome, PREVIEW, session.accelerator, lambda what, reason: session.run.warn(what, reason))


def warn_not_finite(samples: Tensor, session: Session) -> None:
    """Say how many of a preview's images (N, ...) are not finite: a preview is only to be looked at, so the run goes on."""
    if session.accelerator.is_main_process and not is_finite(samples):
        count = int((~torch.isfinite(samples.flatten(1)).all(1)).sum())
        session.run.say(
            f"warning: step {session.step}: {count} of {len(samples)} samples of the preview are not finite (NaN or infinity); "
            "look at the loss: where it does not come back, start again from an earlier checkpoint or with a lower optimizer.lr"
        )


def _draw(sampler: Sampler, count: int, batch_size: int, labels: list[int] | None, session: Session) -> Tensor | None:
    """(count, C, H, W), each rank drawing its share; None where that failed on one of them."""
    accelerator = session.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    each = math.ceil(count / world)
    indices = range(rank * each, (rank + 1) * each)
    samples: list[Tensor] = []
    with looked_at(session) as outcome:
        for start in range(0, each, batch_size):
            part = indices[start : start + batch_size]
            chosen = [labels[i % count] for i in part] if labels is not None else None
            samples.append(sampler.draw(0, part, chosen, device=accelerator.device))
    if preview_failed(outcome, session):
        return None
    x = accelerator.gather(torch.cat(samples))
    assert isinstance(x, Tensor)
    return x[:count]


@torch.no_grad()
def held_out_loss(
    network: Any,
    process: Process,
    held_out: Examples,
    batch_size: int,
    num_classes: int | None,
    accelerator: Accelerator,
    most: int = 1024,
    source: Start | None = None,
) -> dict[str, float]:
    """The mean loss on up to `most` held-out examples, spread over all, each always with the same noise (what `source` gives)
    and time: held_out_loss, and held_out_loss_0 to _9 of those whose times are in each tenth, the cleanest first."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    total_count = len(held_out.labels)
    count = min(most, total_count)
    dtype = next(network.parameters()).dtype
    totals = torch.zeros(2, LEVELS, device=device, dtype=dtype)  # of losses, and how many
    chosen = np.linspace(0, total_count - 1, count).astype(np.int64)
    for first in range(0, count, batch_size * world):
        start = first + rank * batch_size
        real = start < count  # with FSDP no rank can run alone: one that has no batch left runs along
        indices = chosen[start : start + batch_size] if real else chosen[:1]
        x0 = held_out.load(indices).to(device, dtype)
        numbers = indices.tolist()
        eps = (source(0, numbers, 0) if source is not None else noise_of(0, numbers, x0.shape[1:])).to(x0)
        u = torch.from_numpy(position_uniforms(0, indices)[:, 0])
        condition = {}
        if num_classes is not None:
            labels = torch.from_numpy(held_out.labels[indices])
            condition = {"labels": torch.where(labels < 0, num_classes, labels).to(device)}
        loss = process.losses(network, x0, eps, process.draw_times(u), **condition).loss.to(dtype)
        if real:
            level = (u * LEVELS).long().to(device)
            totals.index_add_(1, level, torch.stack([loss, torch.ones_like(loss)]))
    summed = accelerator.reduce(totals)
    assert isinstance(summed, Tensor)
    losses, counts = summed.tolist()
    levels = {f"held_out_loss_{i}": losses[i] / counts[i] for i in range(LEVELS) if counts[i]}
    return {"held_out_loss": sum(losses) / count, **levels}


@torch.no_grad()
def save_first_images(
    folder: Path,
    train_set: ImageSet,
    spec: ImageConfig,
    seed: int,
    process: Process | None = None,
    codec: LatentCodec | None = None,
    device: torch.device | None = None,
) -> None:
    """What a person looks at before training: `contact_sheet.png` of what the network will see; with a process `original.png`
    beside `noised.png` (12 images at growing times, in the title), and `beta_alpha_hat.png` (the schedule). With a codec,
    which lives on `device`, its latents are noised, and decoded to be looked at."""
    count = min(64, len(train_set))
    chosen = generator(seed, "contact sheet").choice(len(train_set), count, replace=False)
    pixels = train_set.batch(chosen, spec, np.full((count, 3), 0.5))
    names = [train_set.class_names[label] if label >= 0 else "" for label in train_set.labels[chosen]]
    sheet = figures.grid(pixels, columns=8, labels=names if train_set.class_names else None)
    figures.save(sheet, folder / "contact_sheet.png")
    if process is None:
        return

    images = to_network(torch.from_numpy(pixels[:12]), device or torch.device("cpu"))
    x0 = codec.encode(images, range(len(images))) if codec is not None else images
    schedule = process.schedule
    t = process.draw_times(torch.linspace(0, 1 - 1e-9, len(x0), dtype=torch.float64))
    eps = normal(x0.shape, seed, "noised", device=x0.device, dtype=x0.dtype)
    noised = process.add_noise(x0, eps, t)
    noised = figures.to_uint8(codec.decode(noised) if codec is not None else noised)
    labels = [f"{value:g}" if isinstance(schedule, TableSchedule) else f"{value:.2f}" for value in t.tolist()]
    decoded = "" if codec is None else ", decoded"
    figures.save(figures.grid(pixels[:12], columns=12, title="x_0"), folder / "original.png")
    figures.save(figures.grid(noised, columns=12, title=f"x_t at t = {', '.join(labels)}{decoded}"), folder / "noised.png")

    if isinstance(schedule, TableSchedule):
        index = list(range(schedule.num_steps))
        panels = {
            "beta_t": {"beta_t": (index, schedule.betas.tolist())},
            "alpha-bar_t": {"alpha-bar_t": (index, schedule.alphas_bar.tolist())},
        }
    else:
        grid = torch.linspace(0, 1, 101, dtype=torch.float64)
        level = schedule.level(grid)
        panels = {"level": {"alpha": (grid.tolist(), level.alpha.tolist()), "sigma": (grid.tolist(), level.sigma.tolist())}}
    figures.curves(folder / "beta_alpha_hat.png", panels, xlabel="t")


def preview_sampler(
    cfg: DiffusionConfig,
    preview: PreviewConfig,
    network: nn.Module,
    process: Process,
    shape: Sequence[int],
    num_classes: int | None,
    *,
    codec: LatentCodec | None = None,
    bounds: tuple[Bound, Bound] = (-1.0, 1.0),
) -> Sampler:
    """The sampler of a training config's previews, guided where there are classes."""
    options = {"clip_x0": bounds if cfg.process.clip else None, "guidable": cfg.label_dropout > 0, "codec": codec}
    spec = preview.sampler.without_guidance(num_classes is None)
    return Sampler(network, process, spec, shape=shape, num_classes=num_classes, **options)
