"""How well an autoencoder reconstructs: numbers and a sheet while it trains, and in full with the Fréchet distance (rFID)."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import figures, metrics
from ..config import Length, UserError, config, read_json, resumable_field, validate
from ..config.packages import ask_for
from ..config.sizes import describe_size
from ..data import ImageConfig, ImageSet
from ..data.buckets import sort_by_shape
from ..losses import Perceptual, PerceptualConfig, reconstruction_loss
from ..metrics.distances import SMALLEST_FOR_SSIM, Array
from ..runs.autoencoder import open_autoencoder
from ..runs.folders import run_name
from ..runtime.failures import Warn, warn_on_failure, warn_on_stderr
from ..runtime.stream import Examples, to_network
from ..storage.finite import is_finite
from .registry import check_count
from .results import Results, Setup, on_screen, pixels_of
from .shapes import measure_by_shape, split_by_shape, to_squares

if TYPE_CHECKING:
    from accelerate import Accelerator


@config
class ReconstructConfig:
    """Every `every` steps and at the end of a stage: a sheet of `num_samples` held-out images (of training images where none
    are held out), and numbers over up to `num_measured` of them."""

    every: Length | None = None  # a resumed run may not change it: the guard decides by these numbers
    num_samples: int = resumable_field(8, ge=1)
    num_measured: int = pydantic.Field(512, ge=1)


def measure_distances(
    outputs: Tensor,
    images: Tensor,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    with_ssim: bool = True,
) -> dict[str, Tensor]:
    """{"l1", "psnr", "ssim" of images of 11 px or more, "lpips" by the network `perceptual`} of reconstructions, (B,) each."""
    distances = {"psnr": metrics.psnr(outputs, images), "l1": reconstruction_loss("l1", outputs, images)}
    if with_ssim and min(images.shape[2:]) >= SMALLEST_FOR_SSIM:
        distances["ssim"] = metrics.ssim(outputs, images)
    return distances | ({"lpips": perceptual(outputs, images)} if perceptual is not None else {})


@torch.no_grad()
def reconstruct(
    network: Any,
    examples: Examples,
    spec: ReconstructConfig,
    accelerator: "Accelerator",
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    batch_size: int,
    sheet: Path | None = None,
    warn: Warn = warn_on_stderr,
) -> dict[str, float]:
    """l1, psnr, ssim, lpips (by the network of the `perceptual` loss) and colour_drift of the examples, through the posterior's
    mean and the EMA weights; mean and standard deviation of each latent channel. All ranks share the work.

    The file `sheet` shows some of the same examples every time: image, reconstruction, difference. Where it cannot be drawn,
    `warn` is called; an error in the numbers, which decide what checkpoint is best, ends the run.
    """
    from accelerate.utils import gather_object

    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    dtype, count = next(network.parameters()).dtype, min(spec.num_measured, len(examples.labels))
    chosen = np.linspace(0, len(examples.labels) - 1, count).astype(np.int64)
    with_ssim = all(min(shape[1:]) >= SMALLEST_FOR_SSIM for shape in examples.groups)

    def outputs_of(indices: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Images, their reconstructions, cut to [-1, 1] as files are, and the means of their latents."""
        images = examples.load(indices).to(device, dtype)
        mean, _ = network.moments(images)
        return images, network.decode(mean).clamp(-1, 1), mean

    sums: dict[str, Tensor] = {}
    for indices in examples.batches(chosen, batch_size)[rank::world]:
        images, outputs, mean = outputs_of(indices)
        values = measure_distances(outputs, images, perceptual, with_ssim=with_ssim)
        values |= {f"drift {c}": drift for c, drift in enumerate(metrics.colour_drift(outputs, images).unbind(1))}
        for c, channel in enumerate(mean.double().unbind(1)):
            values |= {f"sum {c}": channel, f"square {c}": channel.square(), "count": torch.ones_like(channel)}
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.double().sum()
    of_rank = {name: float(value) for name, value in sums.items()}
    of_ranks = [part for part in gather_object([of_rank]) if part]  # a rank may have had no batch
    totals = {name: sum(part[name] for part in of_ranks) for name in of_ranks[0]}

    result = {name: totals[name] / count for name in ("l1", "psnr", "ssim", "lpips") if name in totals}
    result["colour_drift"] = max((value / count for name, value in totals.items() if name.startswith("drift")), key=abs)
    for c in range(sum(name.startswith("sum") for name in totals)):
        mean, square = (totals[f"{word} {c}"] / totals["count"] for word in ("sum", "square"))
        result |= {f"latent_mean_{c}": mean, f"latent_std_{c}": max(0.0, square - mean**2) ** 0.5}
    if sheet is not None and accelerator.is_main_process:
        with warn_on_failure("the preview", warn):
            shown = chosen[np.linspace(0, count - 1, min(spec.num_samples, count)).astype(np.int64)]
            save_sheet(sheet, [outputs_of(part)[:2] for part in examples.split(shown)], result)
    return result


def save_sheet(path: Path, pairs: Sequence[tuple[Tensor, Tensor]], values: dict[str, float], which: str = "") -> None:
    """Three rows for each shape of images, the widest first: images (`which` says what kind), reconstructions, and their
    difference around grey. `pairs` are images and reconstructions of one shape each, (N, C, H, W) in [-1, 1] twice."""
    numbers = ", ".join(f"{name} {values[name]:.3g}" for name in ("psnr", "ssim", "lpips") if name in values)
    title = f"{which}picture, reconstruction, difference: {numbers}"  # the pixels of a sheet stay as older runs have them
    sheets = []
    for images, outputs in sorted(pairs, key=lambda pair: -len(pair[0]) * pair[0].shape[3]):
        rows = figures.to_uint8(torch.cat([images, outputs, outputs - images]))
        sheets.append(figures.grid(rows, columns=len(images), title="" if sheets else title))
    figures.save(figures.in_a_column(sheets), path)


def troubled_channels(values: dict[str, float]) -> list[str]:
    """A line for values that are not finite, for each latent channel that is dead, and for each that grows out of bounds."""
    bad = [name for name, value in values.items() if math.isnan(value) or (math.isinf(value) and name != "psnr")]
    lines = [f"the reconstructions are not finite (NaN or infinity): {', '.join(bad[:3])}; look at the loss"] if bad else []
    for c in itertools.takewhile(lambda c: f"latent_std_{c}" in values, itertools.count()):
        mean, std = values[f"latent_mean_{c}"], values[f"latent_std_{c}"]
        channel = f"latent channel {c}"
        if std < 0.02:
            lines.append(f"{channel} is dead: its standard deviation is {std:.3g}; lower kl_weight, or use fewer channels")
        elif max(std, abs(mean)) > 100:
            lines.append(f"{channel} explodes: mean {mean:.3g}, standard deviation {std:.3g}; raise kl_weight")
    return lines


def evaluate_autoencoder(setup: Setup, run: str, settings: dict[str, Any], data: ImageSet, reference: str) -> Results:
    """Compare `data`, which `reference` names, with their reconstructions, at the size of the run's last stage: rFID in each of
    the features, PSNR, SSIM, L1 and the perceptual distance of the run; a sheet of the worst and of usual ones. Images of
    several shapes are reconstructed in their shapes, and resized to squares for the features."""
    autoencoder = open_autoencoder(run, setup.device)
    check_count(len(data), "real images")
    ask_for("measuring reconstructions", "torchmetrics", "torchvision")
    spec = validate(ImageConfig, settings["image"], origin=f"{run}: image")
    last = settings["stages"][-1]["image_size"]
    image = replace(spec.plain, size=spec.size if last is None else last if isinstance(last, int) else tuple(last))
    facts = [Path(run) / name for name in ("data.json", "final/data.json") if (Path(run) / name).exists()]
    table = read_json(facts[0]).get("buckets", []) if facts else []
    sizes = [(height, width) for height, width, _ in table]
    buckets = sort_by_shape(sizes, image.at(image.sides), data.sides)
    notes, perceptual = list[str](), None
    try:
        perceptual_spec = validate(PerceptualConfig, settings["perceptual"], origin=f"{run}: perceptual")
        perceptual = Perceptual(perceptual_spec, sizes=sizes or [image.size]).to(setup.device)
    except UserError as error:
        notes.append(f"no LPIPS: {error}")
    lpips_network = perceptual.spec.network if perceptual is not None else None
    request = {"weights": autoencoder.digest, "pictures": data.fingerprint, "files": data.state, "size": image.size}
    request |= {"lpips": lpips_network, "batch_size": setup.batch_size} | ({"buckets": table} if table else {})
    out = setup.claim(run_name(run), "reconstructions", request)
    progress = [Path(run) / name for name in ("progress.json", "final/progress.json") if (Path(run) / name).exists()]
    step = read_json(progress[0])["step"] if progress else 0
    network, square = autoencoder.network, to_squares(image)
    data.prepare(buckets.most_frequent)
    with_ssim = all(min(spec.sides) >= SMALLEST_FOR_SSIM for spec in buckets.specs)

    @torch.no_grad()
    def reconstruct(indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images of one shape, and their reconstructions as 8-bit files would hold them."""
        pixels = data.batch(indices, buckets.specs[buckets.which[indices[0]]], np.full((len(indices), 3), 0.5))
        images = to_network(torch.from_numpy(np.ascontiguousarray(pixels)), setup.device)
        mean, _ = network.moments(images)
        outputs = network.decode(mean)
        if not is_finite(outputs):
            first = indices.tolist()[int((~torch.isfinite(outputs.flatten(1)).all(1)).nonzero()[0])]
            part, index = data.locate(first)
            raise UserError(
                f"the reconstructions of {run} (step {step}) are not finite (NaN or infinity), first of the image "
                f"{part.names[index]}; measure an earlier checkpoint"
            )
        return images, to_network(pixels_of(outputs).permute(0, 2, 3, 1), setup.device)

    @torch.no_grad()
    def measure(part: NDArray[np.int64]) -> dict[str, Array]:
        images, outputs = reconstruct(part)
        values = measure_distances(outputs, images, perceptual, with_ssim=with_ssim)
        return {name: value.cpu().numpy() for name, value in values.items()} | setup.features(square(pixels_of(outputs)))

    arrays = setup.measure(out, len(data), lambda part: measure_by_shape(part, buckets.which, measure), "reconstructing")
    comparisons, results = setup.compare(arrays, data, image, None, sizes, neighbours=False), Results(out, step)
    if not setup.computes:
        return results
    if sizes:
        notes.append(f"images of {len(sizes)} shapes are resized to squares of {describe_size(image.size)} for rFID")
    which = f"{len(data)} {on_screen(reference)} of {describe_size(image.size)}"
    results.add_table(f"{run}: {which} against their reconstructions (the Fréchet distance is rFID)", comparisons)
    units = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": f"LPIPS ({lpips_network})", "l1": "L1, of [-1, 1]"}
    means = {name: float(arrays[name].mean()) for name in units if name in arrays}
    results.lines += [f"  {units[name]:<29}{value:14.4g}" for name, value in means.items()]
    results.lines += [f"  note: {note}" for note in notes]
    results.values |= means
    results.write(**means, real_pictures=len(data), of=reference, notes=notes)
    with results.sheet("reconstructions.png") as path:
        order = np.argsort(arrays["psnr"], kind="stable")
        chosen = [*order[:6].tolist(), *order[len(order) // 2 :][:6].tolist()]
        pairs = [reconstruct(part) for part in split_by_shape(chosen, buckets.which)[0]]
        save_sheet(path, pairs, means, f"the {len(order[:6])} worst, then usual ones; ")
    return results
