"""Pictures on fixed noise while a run trains, and the loss on held-out pictures."""

import math
from pathlib import Path

import numpy as np
import pydantic
import torch
from accelerate import Accelerator
from torch import Tensor

from .. import pictures
from ..config import Length, config, free
from ..data import ImageConfig, PictureSet
from ..data.transforms import position_uniforms
from ..diffusion import Process, TableSchedule
from ..training.seeds import generator, normal
from ..training.stream import to_network
from .sampler import Sampler, SamplerConfig, noise_of


@config
class PreviewConfig:
    """`num_samples` pictures from the EMA weights every `every` steps and at the end, always from the same noise."""

    every: Length | None = free(None)
    num_samples: int = free(16, ge=1)
    batch_size: int = free(16, ge=1)
    sampler: SamplerConfig = pydantic.Field(default=SamplerConfig(), json_schema_extra={"free": True})


def preview(
    sampler: Sampler, spec: PreviewConfig, path: Path, *, class_names: tuple[str, ...], accelerator: Accelerator
) -> None:
    """Draw the preview on all ranks; the first writes the sheet."""
    rank, world = accelerator.process_index, accelerator.num_processes
    each = math.ceil(spec.num_samples / world)
    indices = range(rank * each, (rank + 1) * each)
    n = len(class_names)
    labels = [i * n // spec.num_samples % n for i in range(each * world)] if sampler.num_classes is not None else None
    drawn: list[Tensor] = []
    for start in range(0, each, spec.batch_size):
        part = indices[start : start + spec.batch_size]
        chosen = [labels[i] for i in part] if labels is not None else None
        drawn.append(sampler.draw(0, part, chosen, device=accelerator.device))
    x = accelerator.gather(torch.cat(drawn))
    if accelerator.is_main_process:
        assert isinstance(x, Tensor)
        sheet = pictures.to_uint8(x[: spec.num_samples])
        names = [class_names[label] for label in labels[: spec.num_samples]] if labels is not None else None
        columns = max(1, min(16, round(math.sqrt(spec.num_samples))))
        pictures.save(pictures.grid(sheet, columns=columns, labels=names), path)


@torch.no_grad()
def held_out_loss(
    network: torch.nn.Module,
    process: Process,
    held_out: PictureSet,
    spec: ImageConfig,
    *,
    batch_size: int,
    num_classes: int | None,
    accelerator: Accelerator,
    most: int = 1024,
) -> float:
    """The mean loss on up to `most` held-out pictures, spread over all, each always with the same noise and time."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    count = min(most, len(held_out))
    shape = (spec.channels, spec.size, spec.size)
    held_out.prepare(spec)
    dtype = next(network.parameters()).dtype
    total = torch.zeros((), device=device, dtype=dtype)
    plain = ImageConfig(size=spec.size, channels=spec.channels)
    for start in range(rank * batch_size, count, batch_size * world):
        indices = np.linspace(0, len(held_out) - 1, count).astype(np.int64)[start : start + batch_size]
        x0 = to_network(torch.from_numpy(held_out.batch(indices, plain, np.full((len(indices), 3), 0.5))), device, dtype)
        eps = noise_of(0, indices.tolist(), shape).to(x0)
        u = torch.from_numpy(position_uniforms(0, indices)[:, 0])
        condition = {}
        if num_classes is not None:
            labels = torch.from_numpy(held_out.labels[indices])
            condition = {"labels": torch.where(labels < 0, num_classes, labels).to(device)}
        total += process.losses(network, x0, eps, process.draw_times(u), **condition).loss.sum()
    summed = accelerator.reduce(total)
    assert isinstance(summed, Tensor)
    return float(summed) / count


def first_pictures(folder: Path, process: Process, train_set: PictureSet, spec: ImageConfig, seed: int) -> None:
    """What a person looks at before training: `contact_sheet.png` of what the network will see, `original.png` beside
    `noised.png` (12 pictures at growing times, in the title), and `beta_alpha_hat.png` (the schedule)."""
    count = min(64, len(train_set))
    chosen = generator(seed, "contact sheet").choice(len(train_set), count, replace=False)
    seen = train_set.batch(chosen, spec, np.full((count, 3), 0.5))
    names = [train_set.class_names[label] if label >= 0 else "" for label in train_set.labels[chosen]]
    sheet = pictures.grid(seen, columns=8, labels=names if train_set.class_names else None)
    pictures.save(sheet, folder / "contact_sheet.png")

    x0 = to_network(torch.from_numpy(seen[:12]), torch.device("cpu"))
    n = len(x0)
    schedule = process.schedule
    t = process.draw_times(torch.linspace(0, 1 - 1e-9, n, dtype=torch.float64))
    eps = normal(x0.shape, seed, "noised", device=x0.device, dtype=x0.dtype)
    noised = pictures.to_uint8(process.add_noise(x0, eps, t))
    told = [f"{value:g}" if isinstance(schedule, TableSchedule) else f"{value:.2f}" for value in t.tolist()]
    pictures.save(pictures.grid(seen[:12], columns=12, title="x_0"), folder / "original.png")
    pictures.save(pictures.grid(noised, columns=12, title=f"x_t at t = {', '.join(told)}"), folder / "noised.png")

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
    pictures.curves(folder / "beta_alpha_hat.png", panels, xlabel="t")
