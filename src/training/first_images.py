"""What is drawn before a run trains: the images that the network will see, their noised forms, the blends."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import figures
from ..data import ImageSet
from ..data.buckets import Buckets
from ..diffusion import Process, TableSchedule
from ..runs.autoencoder import LatentCodec
from ..runtime.seeds import generator, normal
from ..runtime.stream import Examples, to_network
from ..sampling.sampler import Sampler


@torch.no_grad()
def save_first_images(
    folder: Path,
    train_set: ImageSet,
    buckets: Buckets,
    seed: int,
    process: Process | None = None,
    codec: LatentCodec | None = None,
    device: torch.device | None = None,
) -> None:
    """`contact_sheet.png` of what the network will see, shape by shape; with a process `original.png` beside `noised.png` (12
    images at growing times, in the title), and `beta_alpha_hat.png` (the schedule). With a codec, which lives on `device`, its
    latents are noised, and decoded to be looked at."""
    chosen = generator(seed, "contact sheet").choice(len(train_set), min(64, len(train_set)), replace=False)
    sheets, pages = list[Any](), list[figures.Pixels]()
    for bucket, spec in enumerate(buckets.specs):
        part = chosen[buckets.which[chosen] == bucket]
        if not len(part):
            continue
        pixels = train_set.batch(part, spec, np.full((len(part), 3), 0.5))
        names = [train_set.class_names[label] if label >= 0 else "" for label in train_set.labels[part]]
        sheets.append(figures.grid(pixels, columns=8, labels=names if train_set.class_names else None))
        pages.append(pixels)
    figures.save(figures.in_a_column(sheets), folder / "contact_sheet.png")
    if process is None:
        return

    first = max(pages, key=len)[:12]
    images = to_network(torch.from_numpy(first), device or torch.device("cpu"))
    x0 = codec.encode(images, range(len(images))) if codec is not None else images
    t = process.draw_times(torch.linspace(0, 1 - 1e-9, len(x0), dtype=torch.float64))
    noised = process.add_noise(x0, normal(x0.shape, seed, "noised", device=x0.device, dtype=x0.dtype), t)
    noised = figures.to_uint8(codec.decode(noised) if codec is not None else noised)
    schedule = process.schedule
    labels = [f"{value:g}" if isinstance(schedule, TableSchedule) else f"{value:.2f}" for value in t.tolist()]
    decoded = "" if codec is None else ", decoded"
    figures.save(figures.grid(first, columns=12, title="x_0"), folder / "original.png")
    figures.save(figures.grid(noised, columns=12, title=f"x_t at t = {', '.join(labels)}{decoded}"), folder / "noised.png")

    if isinstance(schedule, TableSchedule):
        index = list(range(schedule.num_steps))
        curves = {"beta_t": schedule.betas, "alpha-bar_t": schedule.alphas_bar}
        panels = {name: {name: (index, values.tolist())} for name, values in curves.items()}
    else:
        times = torch.linspace(0, 1, 101, dtype=torch.float64)
        level = schedule.level(times)
        curves = {"alpha": level.alpha, "sigma": level.sigma}
        panels = {"level": {name: (times.tolist(), values.tolist()) for name, values in curves.items()}}
    figures.curves(folder / "beta_alpha_hat.png", panels, xlabel="t")


@torch.no_grad()
def save_first_blends(sampler: Sampler, data: Examples, folder: Path) -> None:
    """`blend.png`, rows of one source and one example each, blended from alpha 0 to 1; of 2-D points, the densities of the
    blend."""
    device = next(sampler.network.parameters()).device  # pyright: ignore[reportFunctionMemberAccess]
    points = len(sampler.shape) == 1
    members = data.groups.get(sampler.shape, np.arange(len(data.labels)))
    count = min(20_000 if points else 4, len(members))
    chosen = members[generator(0, "blend").choice(len(members), count, replace=False)]
    x0 = data.load(chosen).to(device, sampler.dtype)
    eps = sampler.start(0, range(count)).to(x0)
    levels = torch.linspace(0, 1, 9, dtype=torch.float64)
    blends = [sampler.process.add_noise(x0, eps, 1 - alpha) for alpha in levels]
    if points:
        titled = zip(blends, levels.tolist(), strict=True)
        sheet = figures.in_a_row([figures.scatter(x.cpu().numpy(), size=160, title=f"alpha {a:g}") for x, a in titled])
    else:
        shown = torch.stack([sampler.decode(x) for x in blends], dim=1).flatten(0, 1)
        title = "x_alpha, alpha from 0 (source) to 1 (data) in 8 steps"
        sheet = figures.grid(figures.to_uint8(shown), columns=9, title=title)
    figures.save(sheet, folder / "blend.png")
