"""How good samples are, of a run, of many settings of its sampler, or in a folder: the table, copies, classes, curves."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import figures
from ..config import UserError, dump, parse_json, validate
from ..config.packages import ask_for
from ..data import ImageSet
from ..data.buckets import sort_by_shape
from ..data.names import printable
from ..runs.densities import SourceSampler
from ..runs.opened import Opened
from ..sampling.config import SamplerConfig
from ..sampling.sampler import Sampler, describe, describe_spec
from .registry import FeatureSets, check_count
from .results import TRAINING, Results, Setup, on_screen, samples_like
from .shapes import describe_squares, on_white, pixel_loader, to_squares

COLUMNS = ("frechet", "kernel", "precision", "recall")  # of the table of a sweep; evaluation.json has all metrics


def describe_request(setup: Setup, opened: Opened, sampler: Sampler, data: ImageSet, count: int) -> dict[str, Any]:
    """What the metrics of samples depend on."""
    request = {"weights": opened.digest, "pictures": data.fingerprint, "num_samples": count, "batch_size": setup.batch_size}
    request |= {"buckets": opened.buckets} if opened.buckets else {}
    return {**request, **describe(sampler, setup.seed)}


def check_run(opened: Opened, data: ImageSet, count: int) -> None:
    """A UserError where samples of the run cannot be compared with these images."""
    if opened.condition is not None:
        raise UserError(f"{opened.path} draws from images; --sweep measures runs that draw from noise alone")
    check_count(count, "samples (--num-samples)")
    check_count(len(data), "real images")
    opened.check_classes(data)
    if not data.class_names:
        opened.no_class()


def evaluate_run(
    setup: Setup, opened: Opened, sampler: Sampler, data: ImageSet, held_out: ImageSet | None, *, count: int, reference: str
) -> Results:
    """Compare samples, drawn on the way, with `data`, which `reference` names. With `held_out` images, which the run did not
    see while it saw `data`, also whether the samples are copies. A sheet, nearest.png, shows the nearest real images."""
    check_run(opened, data, count)
    if held_out is not None:
        opened.check_classes(held_out)
    out = setup.claim(opened.folder, "quality", describe_request(setup, opened, sampler, data, count))
    classes, which = _plan_samples(opened, data, count)
    if classes is not None:
        ask_for("reading the classes of samples", "sklearn")
    samples = setup.sample_features(setup.sample_pixels(sampler, classes, which, to_squares(opened.square)), count, out)
    labels = {"samples": np.array(classes), "real": data.labels} if classes is not None else {}
    if classes is not None and held_out is not None:
        labels["held_out"] = held_out.labels
    options = {"labels": labels, "num_classes": len(opened.class_names)}
    comparisons = setup.compare(samples, data, opened.square, held_out, opened.bucket_sizes, **options)
    results = Results(out, opened.step)
    if not setup.computes:
        return results
    for comparison in comparisons:
        comparison.notes.extend(_describe_samples(opened, sampler, count, which))
    class_lines = [line for each in comparisons for line in add_class_accuracy(results, each, opened.class_names)]
    how = f"{sampler.spec.solver}, {sampler.calls()} network calls, guidance {sampler.spec.guidance:g}"
    how += f" with {sampler.guide.origin}" if sampler.guide is not None else ""
    title = f"{opened.path} (step {opened.step}): {count} samples ({how}) against {len(data)} {on_screen(reference)}"
    results.add_table(title, comparisons)
    results.values |= {"network_calls": sampler.calls(), "guidance": sampler.spec.guidance}
    if held_out is not None:
        if_new = comparisons[0].copying.copied_if_new
        results.lines.append(
            f"  `nearer` is 0.5 and `copied` {if_new:.1%} where samples are as far from the training images as those held out"
        )
        results.document["copied_if_new"] = if_new
    elif reference == TRAINING:
        results.lines.append("  no images were held out, so no number says how near new images would be: look at nearest.png")
    results.lines += class_lines
    counts = {"num_samples": count, "real_pictures": len(data), "of": reference, "network_calls": sampler.calls()}
    results.write(**counts, sampler=dump(sampler.spec))
    sizes = opened.bucket_sizes
    fit = on_white(sizes) if sizes else to_squares(opened.image)
    pixels, load = setup.sample_pixels(sampler, classes, which, fit), pixel_loader(data, opened.square, sizes, fit)
    results.add_nearest(comparisons[0], pixels, load, reference, setup.batch_size)
    return results


def _plan_samples(opened: Opened, data: ImageSet, count: int) -> tuple[list[int] | None, NDArray[np.int64] | None]:
    """The classes of samples, and which of the run's shapes each has, both as the real images have them; None where the run has
    no classes, or images of one size alone."""
    buckets = sort_by_shape(opened.bucket_sizes, opened.image, data.sides)
    labels, which = samples_like(data, buckets.which, count, opened.num_classes)
    return labels, which if opened.buckets else None


def _describe_samples(opened: Opened, sampler: Sampler, count: int, which: NDArray[np.int64] | None) -> list[str]:
    """Notes on what the samples start from, where they are more than that, and on their shapes, where these are several."""
    notes, starts = list[str](), count
    if isinstance(sampler.source, SourceSampler):
        shapes = [*sampler.shapes] if which is not None else [sampler.shape]
        numbers = np.bincount(which, minlength=len(shapes)).tolist() if which is not None else [count]
        sources = [sampler.source.at_shape(shape) for shape, number in zip(shapes, numbers, strict=True) if number]
        starts = sum(min(len(source), number) for source, number in zip(sources, filter(None, numbers), strict=True))
    if starts < count:
        notes.append(f"the {count} samples start from {starts} pictures: a solver without noise draws no more than that")
    if opened.buckets:
        notes.append(describe_squares(opened.square, "samples have the shapes of the real pictures, in their shares; "))
    return notes


def add_class_accuracy(results: Results, sets: FeatureSets, class_names: Sequence[str]) -> list[str]:
    """Add to the results, class by class, how many samples and held-out images are read as their class; gives lines for the
    screen."""
    accuracy = (sets.class_accuracy if sets.has("labels") else None) or {}
    if "samples" not in accuracy:
        return []
    by_class = {
        name: {key: None if np.isnan(share) else float(share) for key, share in zip(class_names, shares, strict=True)}
        for name, shares in accuracy.items()
    }
    results.document[f"accuracy_by_class_{sets.network.name}"] = by_class
    known = {name: share for name, share in by_class["samples"].items() if share is not None}
    results.values |= {f"class_{name}_read_by_{sets.network.name}": share for name, share in known.items()}
    lines = [f"read by {sets.network.name} as their class, the worst first:"]
    for k in np.argsort(np.nan_to_num(accuracy["samples"], nan=2.0), kind="stable")[:30]:
        beside = f"   held out {accuracy['held_out'][k]:6.1%}" if "held_out" in accuracy else ""
        lines.append(f"  {printable(class_names[int(k)]):<29}{accuracy['samples'][k]:14.1%}{beside}")
    return lines


def parse_sweep(base: SamplerConfig, words: Sequence[str]) -> list[SamplerConfig]:
    """`steps=5,10 guidance=1,2 shift.base=4096,16384`: `base` with every combination; a UserError where a key or value does not
    fit."""
    axes = dict[str, list[Any]]()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"--sweep {word}: write it as KEY=A,B,.., such as steps=5,10,20")
        if key in axes:
            raise UserError(f"--sweep: {key} stands there twice; put its values into one list")
        axes[key] = [_parse_value(part) for part in text.split(",")]
    settings = [_with_values(dump(base), dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    return [validate(SamplerConfig, setting, origin=f"--sweep {' '.join(words)}") for setting in settings]


def _with_values(setting: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A setting with other values, also of keys inside keys (shift.base)."""
    for key, value in changes.items():
        outer, dot, inner = key.partition(".")
        before = setting.get(outer)
        setting[outer] = {**(before if isinstance(before, dict) else {}), inner: value} if dot else value
    return setting


def _columns(setting: dict[str, Any]) -> dict[str, Any]:
    """A setting in one level: a key inside a key has both names (shift.base)."""
    return {
        f"{outer}.{inner}" if inner else outer: value
        for outer, inside in setting.items()
        for inner, value in (inside.items() if isinstance(inside, dict) else [("", inside)])
    }


def _parse_value(text: str) -> Any:
    try:
        return parse_json(text)
    except UserError:
        return text


def evaluate_sweep(
    setup: Setup, opened: Opened, samplers: Sequence[Sampler], data: ImageSet, *, count: int, reference: str
) -> Results:
    """Compare samples of every sampler, all from the same noise, with `data`, which `reference` names: a table, and sweep.png,
    the distances against the network calls."""
    check_run(opened, data, count)
    ask_for("drawing sweep.png", "matplotlib")
    settings = [dump(sampler.spec) for sampler in samplers]
    request = describe_request(setup, opened, samplers[0], data, count)
    out = setup.claim(opened.folder, "sweep", {**request, "settings": [describe_spec(sampler) for sampler in samplers]})
    columns = [_columns(setting) for setting in settings]
    keys = dict.fromkeys(key for row in columns for key in row)
    swept = [key for key in keys if len({json.dumps(row.get(key)) for row in columns}) > 1]
    classes, which = _plan_samples(opened, data, count)
    real = setup.real_features(data, opened.square, opened.bucket_sizes)
    rows, notes = list[dict[str, Any]](), dict[str, list[str]]()
    for sampler, row in zip(samplers, columns, strict=True):
        tag = hashlib.sha256(json.dumps(describe_spec(sampler)).encode()).hexdigest()[:8]
        pixels = setup.sample_pixels(sampler, classes, which, to_squares(opened.square))
        samples = setup.sample_features(pixels, count, out / tag)
        if setup.computes:
            compared = {n.name: FeatureSets(n, samples[n.name], real[n.name]) for n in setup.networks}
            values = {name: sets.values for name, sets in compared.items()}
            rows.append({**{key: row.get(key) for key in swept}, "network_calls": sampler.calls(), **values})
            of_samples = _describe_samples(opened, sampler, count, which) if opened.buckets else []
            notes = {name: [*sets.notes, *of_samples] for name, sets in compared.items()}
    results = Results(out, opened.step)
    if not setup.computes:
        return results
    which = f"{count} samples a row against {len(data)} {on_screen(reference)}"
    results.lines.append(f"{opened.path} (step {opened.step}): {which}")
    for network in setup.networks:
        for row in rows:
            words = ",".join(f"{key}={_short(row[key])}" for key in swept)
            values = row[network.name].items()
            results.values |= {f"sweep_{words}_{key}_{network.name}_of_{count}": value for key, value in values}
        results.lines.append(f"  in {network.name}, which compares with {network.comparable}")
        results.lines += _table(rows, [*swept, "network_calls"], network.name)
        results.lines += [f"  note: {on_screen(note)}" for note in notes[network.name]]
        best = min(rows, key=lambda row: row[network.name]["frechet"])
        results.lines.append("  best: " + ", ".join(f"{key} {_short(best[key])}" for key in (*swept, "network_calls")))
    document = {"num_samples": count, "real_pictures": len(data), "of": reference, "rows": rows, "notes": notes}
    comparable = {network.name: network.comparable for network in setup.networks}
    results.write(**document, compares_with=comparable)
    with results.sheet("sweep.png") as path:
        _draw_sweep(path, rows, swept, list(comparable))
    return results


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str], network: str) -> list[str]:
    keys = [key for key in COLUMNS if all(key in row[network] for row in rows)]
    cells = [[_short(row[column]) for column in columns] + [f"{row[network][key]:.4g}" for key in keys] for row in rows]
    lines = [[*columns, *keys], *cells]
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return ["  " + "".join(f"{word:>{width}}" for word, width in zip(line, widths, strict=True)) for line in lines]


def _draw_sweep(path: Path, rows: Sequence[dict[str, Any]], swept: Sequence[str], networks: Sequence[str]) -> None:
    """The distances against the steps where these are swept, else against the first number that is; a line for all else."""
    numbers = [key for key in swept if all(isinstance(row[key], int | float) for row in rows)]
    along = "steps" if "steps" in numbers else next(iter(numbers), None)
    axis = "network_calls" if along in ("steps", None) else along
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for network in networks:
        lines = panels[f"Fréchet distance, {network}"] = {}
        for row in sorted(rows, key=lambda row: row[axis]):
            name = ", ".join(f"{key} {_short(row[key])}" for key in swept if key != along) or network
            x, y = lines.setdefault(name, ([], []))
            x.append(row[axis])
            y.append(row[network]["frechet"])
    figures.curves(path, panels, xlabel=axis.replace("_", " "), marker="o")
