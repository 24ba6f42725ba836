"""One table for many settings of the sampler, and the curves of their Fréchet distances."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import figures
from ..config import UserError, dump, parse_json, validate
from ..config.packages import ask_for
from ..data import ImageSet
from ..runs.classifier import OpenedClassifier
from ..runs.opened import Opened
from ..sampling.config import SamplerConfig
from ..sampling.sampler import build_sampler
from .registry import FeatureSets
from .results import TRAINING, Results, Setup, labels_like, on_screen
from .samples import check_run, describe_request

COLUMNS = ("frechet", "kernel", "precision", "recall")  # of the table; evaluation.json has all metrics


def parse_sweep(base: SamplerConfig, words: Sequence[str]) -> list[SamplerConfig]:
    """`steps=5,10 guidance=1,2`: `base` with every combination; a UserError where a key or value does not fit."""
    axes = dict[str, list[Any]]()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"--sweep {word}: write it as KEY=A,B,.., such as steps=5,10,20")
        if key in axes:
            raise UserError(f"--sweep: {key} stands there twice; put its values into one list")
        axes[key] = [_parse_value(part) for part in text.split(",")]
    settings = [{**dump(base), **dict(zip(axes, values, strict=True))} for values in itertools.product(*axes.values())]
    return [validate(SamplerConfig, setting, origin=f"--sweep {' '.join(words)}") for setting in settings]


def _parse_value(text: str) -> Any:
    try:
        return parse_json(text)
    except UserError:
        return text


def evaluate_sweep(
    setup: Setup,
    opened: Opened,
    data: ImageSet,
    settings: Sequence[SamplerConfig],
    *,
    count: int,
    classifier: OpenedClassifier | None = None,
    reference: str = TRAINING,
) -> Results:
    """Compare samples of every setting, all from the same noise, with `data`, which `reference` names: a table, and sweep.png,
    the distances against the network calls."""
    check_run(opened, data, count)
    ask_for("drawing sweep.png", "matplotlib")
    samplers = [build_sampler(opened, setting, classifier) for setting in settings]
    request = describe_request(setup, opened, samplers[0], data, count)
    out = setup.claim(opened.folder, "sweep", {**request, "settings": [dump(setting) for setting in settings]})
    swept = [key for key in dump(settings[0]) if len({json.dumps(dump(setting)[key]) for setting in settings}) > 1]
    classes = labels_like(data, count, opened.num_classes)
    real = setup.real_features(data, opened.image)
    rows, notes = list[dict[str, Any]](), dict[str, list[str]]()
    for sampler in samplers:
        setting = dump(sampler.spec)
        tag = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]
        samples = setup.sample_features(sampler, classes, count, out / tag)
        if setup.computes:
            compared = {n.name: FeatureSets(n, samples[n.name], real[n.name]) for n in setup.networks}
            values = {name: sets.values for name, sets in compared.items()}
            rows.append({**{key: setting[key] for key in swept}, "network_calls": sampler.calls(), **values})
            notes = {name: sets.notes for name, sets in compared.items()}
    results = Results(out, opened.step)
    if not setup.computes:
        return results
    results.lines.append(
        f"{opened.path} (step {opened.step}): {count} samples a row against {len(data)} {on_screen(reference)}"
    )
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
