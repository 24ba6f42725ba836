"""How good the samples of a run are: the table, whether they are copies, and whether they are read as their classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import UserError, dump
from ..config.packages import ask_for
from ..data import ImageSet
from ..data.names import printable as shown_name
from ..runs.densities import SourceSampler
from ..runs.opened import Opened
from ..sampling.sampler import Sampler, describe
from .features import check_count, labels_like, on_screen, pixel_loader
from .registry import Comparison, FeatureSets, compare
from .results import TRAINING, Results, Setup


def describe_request(setup: Setup, opened: Opened, sampler: Sampler, data: ImageSet, count: int) -> dict[str, Any]:
    """What the metrics of samples depend on."""
    request = {"weights": opened.digest, "pictures": data.fingerprint, "num_samples": count, "batch_size": setup.batch_size}
    return {**request, **describe(sampler, setup.seed)}


def check_run(opened: Opened, data: ImageSet, count: int) -> None:
    """A UserError where samples of the run cannot be compared with these images."""
    if opened.low_resolution is not None:
        raise UserError(
            f"{opened.path} is an upsampler: draw with sample.py --low IMAGES, then run evaluate.py FOLDER --data IMAGES"
        )
    check_count(count, "samples (--num-samples)")
    check_count(len(data), "real images")
    opened.check_classes(data)
    if not data.class_names:
        opened.no_class()


def evaluate_run(
    setup: Setup,
    opened: Opened,
    sampler: Sampler,
    data: ImageSet,
    held_out: ImageSet | None,
    *,
    count: int,
    reference: str = TRAINING,
) -> Results:
    """Compare samples, drawn on the way, with `data`, which `reference` names. With `held_out` images, which the run did not
    see while it saw `data`, also whether the samples are copies. A sheet, nearest.png, shows the nearest real images."""
    check_run(opened, data, count)
    if held_out is not None:
        opened.check_classes(held_out)
    out = setup.claim(opened.folder, "quality", describe_request(setup, opened, sampler, data, count))
    classes = labels_like(data, count, opened.num_classes)
    if classes is not None:
        ask_for("reading the classes of samples", "sklearn")
    samples = setup.sample_features(sampler, classes, count, out)
    real = setup.real_features(data, opened.image)
    unseen = setup.real_features(held_out, opened.image) if held_out is not None else {}
    results = Results(out, opened.step)
    if not setup.computes:
        return results
    labels = {"samples": np.array(classes), "real": data.labels} if classes is not None else {}
    if classes is not None and held_out is not None:
        labels["held_out"] = held_out.labels
    comparisons = []
    for network in setup.networks:
        features = (samples[network.name], real[network.name], unseen.get(network.name))
        comparison = compare(FeatureSets(network, *features, labels, len(opened.class_names)))
        if isinstance(sampler.source, SourceSampler) and len(sampler.source) < count:
            starts = len(sampler.source)
            comparison.notes.append(
                f"the {count} samples start from {starts} pictures: a solver without noise draws no more than that"
            )
        comparisons.append(comparison)
    class_lines = [line for each in comparisons for line in add_class_accuracy(results, each, opened.class_names)]
    how = f"{sampler.spec.solver}, {sampler.calls()} network calls, guidance {sampler.spec.guidance:g}"
    title = f"{opened.path} (step {opened.step}): {count} samples ({how}) against {len(data)} {on_screen(reference)}"
    results.add_table(title, comparisons)
    results.values |= {"network_calls": sampler.calls(), "guidance": sampler.spec.guidance}
    if held_out is not None:
        if_new = comparisons[0].sets.copying.copied_if_new
        results.lines.append(
            f"  `nearer` is 0.5 and `copied` {if_new:.1%} where samples are as far from the training images as those held out"
        )
        results.document["copied_if_new"] = if_new
    elif reference == TRAINING:
        results.lines.append("  no images were held out, so no number says how near new images would be: look at nearest.png")
    results.lines += class_lines
    results.document |= {"num_samples": count, "real_pictures": len(data), "of": reference, "network_calls": sampler.calls()}
    results.document["sampler"] = dump(sampler.spec)
    results.write()
    pixels, load = setup.sample_pixels(sampler, classes), pixel_loader(data, opened.image)
    results.add_nearest(comparisons[0].sets, pixels, load, reference, setup.batch_size)
    return results


def add_class_accuracy(results: Results, comparison: Comparison, class_names: Sequence[str]) -> list[str]:
    """Add to the results, class by class, how many samples and held-out images are read as their class; gives lines for the
    screen."""
    sets = comparison.sets
    accuracy = (sets.class_accuracy if sets.has("labels") else None) or {}
    if "samples" not in accuracy:
        return []
    for class_name, share in zip(class_names, accuracy["samples"], strict=True):
        if not np.isnan(share):
            results.values[f"class_{class_name}_read_by_{sets.network.name}"] = float(share)
    results.document[f"accuracy_by_class_{sets.network.name}"] = {
        name: {key: None if np.isnan(share) else float(share) for key, share in zip(class_names, shares, strict=True)}
        for name, shares in accuracy.items()
    }
    lines = [f"read by {sets.network.name} as their class, the worst first:"]
    for k in np.argsort(np.nan_to_num(accuracy["samples"], nan=2.0), kind="stable")[:30]:
        beside = f"   held out {accuracy['held_out'][k]:6.1%}" if "held_out" in accuracy else ""
        lines.append(f"  {shown_name(class_names[int(k)]):<29}{accuracy['samples'][k]:14.1%}{beside}")
    return lines
