"""How near the samples of a run that draws from images are to the truth, and how much samples of one image differ."""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config import UserError, dump
from ..data import ImageSet
from ..data.buckets import sort_by_shape
from ..losses import Perceptual, PerceptualConfig
from ..metrics.distances import Array
from ..runs.opened import Opened
from ..runtime.stream import to_network
from ..sampling.conditions import Conditioned, draw_from_set, save_side_by_side
from ..sampling.sampler import Sampler
from .autoencoder import measure_distances
from .registry import check_count, spread_indices
from .results import Results, Setup, on_screen, pixels_of
from .samples import describe_request
from .shapes import describe_squares, measure_by_shape, to_squares

UNITS = {"psnr": "PSNR to the truth, dB", "ssim": "SSIM to the truth", "lpips": "LPIPS to the truth", "l1": "L1 to the truth"}
SPREAD = {"spread_l1": "L1 between samples of one image", "spread_lpips": "LPIPS between samples of one"}


def evaluate_conditioned(
    setup: Setup, opened: Opened, sampler: Sampler, data: ImageSet, *, count: int, each: int, reference: str
) -> Results:
    """Draw `each` samples from the condition of each image of `data`, which `reference` names, at most `count` in all: PSNR,
    SSIM, L1 and LPIPS to the image itself, the distances between samples of one image (0 where all are the same), and how far
    the first sample of each is from the images as a set. Each image is cut to the nearest size that the run was trained at; a
    sheet shows some."""
    opened.check_classes(data)
    check_count(len(data), "real images")
    if opened.num_classes is not None and bool((data.labels < 0).any()):
        opened.no_class()
    chosen = data.lowest(max(1, count // each))
    check_count(len(chosen), "images that are drawn from (--num-samples by --samples-per-image)")
    notes, perceptual = list[str](), None
    try:
        perceptual = Perceptual(PerceptualConfig(), sizes=opened.bucket_sizes or [opened.image.size]).to(setup.device)
    except UserError as error:
        notes.append(f"no LPIPS: {error}")
    if opened.buckets:
        notes.append(describe_squares(opened.square, "each sample has the shape of its image; "))
    request = describe_request(setup, opened, sampler, chosen, len(chosen) * each)
    out = setup.claim(opened.folder, "conditioned", {**request, "each": each, "lpips": perceptual is not None})
    buckets = sort_by_shape(opened.bucket_sizes, opened.image, chosen.sides)
    chosen.prepare(buckets.most_frequent)
    by_bucket, fit = np.argsort(buckets.which, kind="stable"), to_squares(opened.square)

    def draw(indices: Array) -> tuple[list[Tensor], Conditioned]:
        """Samples of each of these images, all of one bucket, as 8-bit files would hold them, one draw after the other."""
        at = opened.at_size(buckets.specs[buckets.which[indices[0]]].sides) if opened.buckets else opened
        conditioned, labels = draw_from_set(at, chosen, indices), None
        options: dict[str, Any] = {"device": setup.device, "batch_size": setup.batch_size}
        options["condition"] = torch.stack(conditioned.values)
        if opened.num_classes is not None:
            labels = [label if label >= 0 else opened.num_classes for label in chosen.labels[indices].tolist()]
        shaped = sampler.at_shape(at.shape)
        samples = [shaped.draw(setup.seed, (indices * each + k).tolist(), labels, **options) for k in range(each)]
        return [to_network(pixels_of(images).permute(0, 2, 3, 1), setup.device) for images in samples], conditioned

    @torch.no_grad()
    def measure(indices: Array) -> dict[str, Array]:
        samples, conditioned = draw(indices)
        assert conditioned.truth is not None
        truth = torch.stack(conditioned.truth).to(setup.device)
        to_truth = [measure_distances(images, truth, perceptual) for images in samples]
        values = {name: torch.stack([one[name] for one in to_truth]).mean(0) for name in to_truth[0]}
        if each > 1:
            between = [measure_distances(one, other, perceptual) for one, other in itertools.pairwise(samples)]
            for name in ("l1", "lpips"):
                if name in between[0]:
                    values[f"spread_{name}"] = torch.stack([one[name] for one in between]).mean(0)
        return {name: value.cpu().numpy() for name, value in values.items()} | setup.features(fit(pixels_of(samples[0])))

    def measure_part(part: range) -> dict[str, Array]:
        return measure_by_shape(by_bucket[part.start : part.stop].tolist(), buckets.which, measure)

    arrays = setup.measure(out, len(chosen), measure_part, "drawing from images")
    comparisons = setup.compare(arrays, chosen, opened.square, None, opened.bucket_sizes, neighbours=False)
    results = Results(out, opened.step)
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
        rows, some = list[list[figures.Pixels]](), list[Conditioned]()
        for i in spread_indices(len(chosen), 8):
            samples, conditioned = draw(np.array([i]))
            rows.append([figures.to_uint8(images)[0] for images in samples])
            some.append(conditioned)
        shown, truth = [one.shown[0] for one in some], [image for one in some for image in one.truth or ()]
        save_side_by_side(Conditioned([], shown, truth), rows, path)
    return results
