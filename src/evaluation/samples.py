"""How good samples are, of a run, of many settings of its sampler, or in a folder: the table, copies, classes, curves."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config import UserError, dump, parse_json, validate
from ..config.packages import ask_for
from ..data import ImageConfig, ImageSet
from ..data.names import printable
from ..runs.densities import SourceSampler
from ..runs.opened import Opened
from ..sampling.config import SamplerConfig
from ..sampling.edit import files_of
from ..sampling.sampler import Sampler, describe
from .registry import FeatureSets, check_count, spread_indices
from .results import GIVEN, TRAINING, Results, Setup, labels_like, on_screen, pixel_loader

COLUMNS = ("frechet", "kernel", "precision", "recall")  # of the table of a sweep; evaluation.json has all metrics


def describe_request(setup: Setup, opened: Opened, sampler: Sampler, data: ImageSet, count: int) -> dict[str, Any]:
    """What the metrics of samples depend on."""
    request = {"weights": opened.digest, "pictures": data.fingerprint, "num_samples": count, "batch_size": setup.batch_size}
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
    classes = labels_like(data, count, opened.num_classes)
    if classes is not None:
        ask_for("reading the classes of samples", "sklearn")
    samples = setup.sample_features(sampler, classes, count, out)
    labels = {"samples": np.array(classes), "real": data.labels} if classes is not None else {}
    if classes is not None and held_out is not None:
        labels["held_out"] = held_out.labels
    options = {"labels": labels, "num_classes": len(opened.class_names)}
    comparisons = setup.compare(samples, data, opened.image, held_out, **options)
    results = Results(out, opened.step)
    if not setup.computes:
        return results
    if isinstance(sampler.source, SourceSampler) and len(sampler.source) < count:
        note = f"the {count} samples start from {len(sampler.source)} pictures: a solver without noise draws no more than that"
        for comparison in comparisons:
            comparison.notes.append(note)
    class_lines = [line for each in comparisons for line in add_class_accuracy(results, each, opened.class_names)]
    how = f"{sampler.spec.solver}, {sampler.calls()} network calls, guidance {sampler.spec.guidance:g}"
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
    pixels, load = setup.sample_pixels(sampler, classes), pixel_loader(data, opened.image)
    results.add_nearest(comparisons[0], pixels, load, reference, setup.batch_size)
    return results


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
    out = setup.claim(opened.folder, "sweep", {**request, "settings": settings})
    columns = [_columns(setting) for setting in settings]
    keys = dict.fromkeys(key for row in columns for key in row)
    swept = [key for key in keys if len({json.dumps(row.get(key)) for row in columns}) > 1]
    classes = labels_like(data, count, opened.num_classes)
    real = setup.real_features(data, opened.image)
    rows, notes = list[dict[str, Any]](), dict[str, list[str]]()
    for sampler, setting, row in zip(samplers, settings, columns, strict=True):
        tag = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]
        samples = setup.sample_features(sampler, classes, count, out / tag)
        if setup.computes:
            compared = {n.name: FeatureSets(n, samples[n.name], real[n.name]) for n in setup.networks}
            values = {name: sets.values for name, sets in compared.items()}
            rows.append({**{key: row.get(key) for key in swept}, "network_calls": sampler.calls(), **values})
            notes = {name: sets.notes for name, sets in compared.items()}
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


def evaluate_folder(setup: Setup, place: Path, data: ImageSet, *, resize: bool) -> Results:
    """Compare the images of a folder (of sample.py's, its samples) with `data`. Real images of another size are a UserError,
    unless `resize` says that they are to be cut and resized as in training."""
    files = files_of(str(place))
    check_count(len(files), f"images in {place}")
    check_count(len(data), "real images")
    image = _image_of(files)
    if not resize:
        _check_sizes(data, image)

    def pixels(indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([_read(files[i], image) for i in indices])).permute(0, 3, 1, 2)

    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    request = {"samples": digest, "pictures": data.fingerprint, "size": image.size}
    out = setup.claim(place.resolve().name, "pictures", request)
    samples = setup.measure(out, len(files), lambda part: setup.features(pixels(part)), "features of the samples")
    comparisons, results = setup.compare(samples, data, image), Results(out)
    if not setup.computes:
        return results
    results.add_table(f"{place}: {len(files)} images against {len(data)} {on_screen(GIVEN)}", comparisons)
    results.write(num_samples=len(files), real_pictures=len(data))
    results.add_nearest(comparisons[0], pixels, pixel_loader(data, image), GIVEN, setup.batch_size)
    return results


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The image in a file; a UserError where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except OSError as error:
        raise UserError(f"{path}: not an image that can be read ({error}); remove it or draw it again") from None


def _read(path: Path, image: ImageConfig) -> figures.Pixels:
    """(H, W, C) uint8 of a file."""
    with _opened(path) as opened:
        pixels = np.asarray(opened.convert("RGB" if image.channels == 3 else "L"))
    return pixels.reshape(*image.sides, -1)


def _image_of(files: Sequence[Path]) -> ImageConfig:
    """The size and channels of images of one square size; a UserError where they have no one size."""
    kinds: dict[tuple[int, int, bool], Path] = {}
    for path in files:
        with _opened(path) as image:
            kinds.setdefault((image.width, image.height, image.mode in ("L", "1")), path)
    if len(kinds) > 1:
        ((a, b, _), one), ((c, d, _), other) = list(kinds.items())[:2]
        if (a, b) == (c, d):
            raise UserError(f"{one} is grey and {other} in colour, or the other way: samples are of one kind")
        raise UserError(f"{one} is {a}x{b} px and {other} {c}x{d}: samples are all of one size")
    ((width, height, is_grey),) = kinds
    return ImageConfig(size=width if width == height else (height, width), channels=1 if is_grey else 3)


def _check_sizes(data: ImageSet, image: ImageConfig) -> None:
    """A UserError where real images, of which some are looked at, have another size than the samples."""
    for i in spread_indices(len(data), 64).tolist():
        part, index = data.locate(i)
        height, width = np.asarray(part.load(index, channels=image.channels)).shape[:2]
        if (height, width) != image.sides:
            raise UserError(
                f"the samples are {image.sides[1]}x{image.sides[0]} px and the real image {part.names[index]} "
                f"{width}x{height}; give --resize to cut and resize the real ones as training does"
            )
