"""How near the samples of a run that draws from images are to the truth, and how much samples of one image differ."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config import UserError, dump
from ..data import ImageSet
from ..losses import Perceptual, PerceptualConfig
from ..metrics.distances import Array
from ..runs.opened import Opened
from ..runtime.stream import to_network
from ..sampling.conditions import draw_from_set, save_side_by_side
from ..sampling.sampler import Sampler
from .autoencoder import measure_distances
from .registry import check_count
from .results import Results, Setup, on_screen, pixels_of
from .samples import describe_request

UNITS = {"psnr": "PSNR to the truth, dB", "ssim": "SSIM to the truth", "lpips": "LPIPS to the truth", "l1": "L1 to the truth"}
SPREAD = {"spread_l1": "L1 between samples of one image", "spread_lpips": "LPIPS between samples of one"}


def evaluate_conditioned(
    setup: Setup, opened: Opened, sampler: Sampler, data: ImageSet, *, count: int, each: int, reference: str
) -> Results:
    """Draw `each` samples from the condition of each image of `data`, which `reference` names, at most `count` in all: PSNR,
    SSIM, L1 and LPIPS to the image itself, the distances between samples of one image (0 where all are the same), and how far
    the first sample of each is from the images as a set. Sizes are those that the run was trained at; a sheet shows some."""
    opened.check_classes(data)
    check_count(len(data), "real images")
    if opened.num_classes is not None and bool((data.labels < 0).any()):
        opened.no_class()
    chosen = data.lowest(max(1, count // each))
    check_count(len(chosen), "images that are drawn from (--num-samples by --samples-per-image)")
    notes, perceptual = list[str](), None
    try:
        perceptual = Perceptual(PerceptualConfig(), sizes=[opened.image.size]).to(setup.device)
    except UserError as error:
        notes.append(f"no LPIPS: {error}")
    request = describe_request(setup, opened, sampler, chosen, len(chosen) * each)
    out = setup.claim(opened.folder, "conditioned", {**request, "each": each, "lpips": perceptual is not None})
    chosen.prepare(opened.image.plain)

    def draw(part: range) -> tuple[list[Tensor], Tensor]:
        """Samples of each of these images, as 8-bit files would hold them, one draw after the other, and the truth."""
        indices = np.arange(part.start, part.stop)
        conditioned = draw_from_set(opened, chosen, indices)
        assert conditioned.truth is not None
        options: dict[str, Any] = {"device": setup.device, "batch_size": setup.batch_size, "condition": conditioned.values}
        labels = None
        if opened.num_classes is not None:
            labels = [label if label >= 0 else opened.num_classes for label in chosen.labels[indices].tolist()]
        samples = [sampler.draw(setup.seed, [i * each + k for i in part], labels, **options) for k in range(each)]
        as_files = [to_network(pixels_of(images).permute(0, 2, 3, 1), setup.device) for images in samples]
        return as_files, conditioned.truth.to(setup.device)

    @torch.no_grad()
    def measure(part: range) -> dict[str, Array]:
        samples, truth = draw(part)
        to_truth = [measure_distances(images, truth, perceptual) for images in samples]
        values = {name: torch.stack([one[name] for one in to_truth]).mean(0) for name in to_truth[0]}
        if each > 1:
            between = [measure_distances(one, other, perceptual) for one, other in itertools.pairwise(samples)]
            for name in ("l1", "lpips"):
                if name in between[0]:
                    values[f"spread_{name}"] = torch.stack([one[name] for one in between]).mean(0)
        return {name: value.cpu().numpy() for name, value in values.items()} | setup.features(pixels_of(samples[0]))

    arrays = setup.measure(out, len(chosen), measure, "drawing from images")
    comparisons, results = setup.compare(arrays, chosen, opened.image, neighbours=False), Results(out, opened.step)
    if not setup.computes:
        return results
    how = f"{sampler.spec.solver}, {sampler.calls()} network calls"
    condition = opened.condition.kind if opened.condition is not None else ""
    of_images = f"each of {len(chosen)} {on_screen(reference)} ({condition}; {how})"
    title = f"{opened.path} (step {opened.step}): {each} sample(s) of {of_images}"
    results.add_table(title, comparisons)
    means = {name: float(arrays[name].mean()) for name in (*UNITS, *SPREAD) if name in arrays}
    results.lines += [f"  {(UNITS | SPREAD)[name]:<33}{value:10.4g}" for name, value in means.items()]
    results.lines += [f"  note: {note}" for note in notes]
    results.values |= means
    counts = {"num_samples": len(chosen) * each, "real_pictures": len(chosen), "of": reference}
    results.write(**means, **counts, sampler=dump(sampler.spec), notes=notes)
    with results.sheet("side_by_side.png") as path:
        _save_some(opened, chosen, draw, path)
    return results


def _save_some(opened: Opened, chosen: ImageSet, draw: Any, path: Path) -> None:
    part = range(min(8, len(chosen)))
    samples, _ = draw(part)
    rows = [np.concatenate([figures.to_uint8(images[i : i + 1]) for images in samples]) for i in part]
    save_side_by_side(draw_from_set(opened, chosen, np.arange(len(part))), rows, path)
