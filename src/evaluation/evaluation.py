"""What evaluate.py says of a run, of reconstructions or of a folder of pictures: figures, a table, sheets to look at."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .. import figures, metrics
from ..config import UserError, dump, parse_json, read_json, validate
from ..config.packages import ask_for
from ..config.progress import within
from ..data import ImageConfig, ImageSet
from ..data.names import printable
from ..losses import Perceptual, PerceptualConfig
from ..metrics import distances
from ..metrics.distances import Array
from ..metrics.features import Features
from ..metrics.reconstruction import SMALLEST_FOR_SSIM
from ..runs.autoencoder import open_autoencoder
from ..runs.classifier import OpenedClassifier
from ..runs.folders import run_name
from ..runs.opened import Opened
from ..runs.starts import SourceSampler
from ..runtime.failures import warn_on_failure
from ..runtime.stream import to_network
from ..sampling.build import build_sampler
from ..sampling.config import SamplerConfig
from ..sampling.edit import files_of
from ..sampling.sampler import Sampler, describe
from ..storage.blocks import Ranks, in_blocks
from ..storage.files import as_json, write_whole
from ..storage.finite import is_finite
from ..storage.requests import claim_folder
from .quality import (
    BLOCK,
    FEWEST,
    Compared,
    check_count,
    compare,
    draw_nearest,
    drawn_features,
    labels_like,
    pixels_of,
    real_features,
    see,
)
from .reconstruct import save_sheet

TRAINING, HELD_OUT, GIVEN = "training pictures", "held-out pictures", "given pictures"  # what is measured against
ROWS = {  # of the table: label, and how a value is written
    "frechet": ("Fréchet distance", "{:.3f}"),
    "frechet_held_out": ("  of the held-out pictures", "{:.3f}"),
    "kernel": ("kernel distance", "{:.5f}"),
    "inception_score": ("Inception Score", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "accuracy": ("read as their class", "{:.1%}"),
    "accuracy_held_out": ("  held-out pictures", "{:.1%}"),
    "nearer": ("nearer to training pictures", "{:.3f}"),
    "copied": ("copied", "{:.1%}"),
}


@dataclass(frozen=True)
class Evaluation:
    """How it is measured: in which features, by whom, where the figures go (default evaluations/NAME/...)."""

    networks: Sequence[Features]
    out: Path | None
    ranks: Ranks
    device: torch.device
    batch_size: int
    seed: int

    @property
    def reads(self) -> bool:
        """Whether this rank computes what all of them have measured."""
        return self.ranks.rank == 0

    def folder(self, name: str, kind: str, request: dict[str, Any]) -> Path:
        """Where figures that depend on `request` go; a UserError where there are others."""
        request = {**request, "features": [[network.name, network.digest] for network in self.networks]}
        tag = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:8]
        out = self.out or Path("evaluations") / name / f"{kind}_{tag}"
        claim_folder(out / "request.json", request, self.ranks, holds="figures", newer_keys=("files",))
        return out


@dataclass
class Report:
    """What was found: `values` for metrics.jsonl, `figures` for another program, `lines` for the screen, `files` to look at."""

    out: Path
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def table(
        self, title: str, networks: Sequence[Features], found: dict[str, Compared], count: int, held_out: int = 0
    ) -> None:
        """A row for each number and a column for each network, what a number may be compared with, and what to know of it. The
        `count` of samples (of those `held_out`, theirs) is a part of a value's name: those of other counts do not compare."""
        self.lines.append(title)
        width = max(len(network.name) for network in networks) + 2
        self.lines.append(f"  {'':<29}" + "".join(f"{network.name:>{max(14, width)}}" for network in networks))
        for key, (label, how) in ROWS.items():
            if any(key in compared.values for compared in found.values()):
                cells = [how.format(found[n.name].values[key]) if key in found[n.name].values else "" for n in networks]
                self.lines.append(f"  {label:<29}" + "".join(f"{cell:>{max(14, width)}}" for cell in cells))
        for network in networks:
            self.lines.append(f"  {network.name} compares with {network.comparable}")
            self.lines += [f"  note: {note}" for note in found[network.name].notes]
        for network in networks:
            values, notes = found[network.name]
            for key, value in values.items():
                self.values[f"{key}_{network.name}_of_{held_out if key == 'frechet_held_out' else count}"] = value
            self.figures[network.name] = {**values, "compares_with": network.comparable, "notes": notes}

    def write(self, ranks: Ranks) -> "Report":
        """evaluation.json, beside the sheets."""
        if ranks.rank == 0:
            document = {"step": self.step, **self.figures}
            write_whole(self.out / "evaluation.json", as_json(document))
        return self


def _load(data: ImageSet, image: ImageConfig, indices: Sequence[int]) -> NDArray[np.uint8]:
    plain = ImageConfig(size=image.size, channels=image.channels)
    data.prepare(plain)
    return data.batch(np.array(indices, dtype=np.int64), plain, np.full((len(indices), 3), 0.5))


def _spread(count: int, most: int) -> NDArray[np.int64]:
    return np.arange(min(count, most)) * count // min(count, most)


# ---------------------------------------------------------------------------------------------- what a run draws


def _request(opened: Opened, sampler: Sampler, data: ImageSet, count: int, seed: int, batch_size: int) -> dict[str, Any]:
    told = {"weights": opened.digest, "pictures": data.fingerprint, "num_samples": count, "batch_size": batch_size}
    return {**told, **describe(sampler, seed)}


def _check_run(opened: Opened, data: ImageSet, count: int) -> None:
    if opened.low_resolution is not None:
        raise UserError(
            f"{opened.path} is an upsampler: draw with sample.py --low PICTURES, then evaluate.py FOLDER --data PICTURES"
        )
    check_count(count, "samples (--num-samples)")
    check_count(len(data), "real pictures")
    opened.check_classes(data)
    if not data.class_names:
        opened.no_class()


def evaluate_run(
    it: Evaluation,
    opened: Opened,
    sampler: Sampler,
    data: ImageSet,
    held_out: ImageSet | None,
    *,
    count: int,
    told: str = TRAINING,
) -> Report:
    """Samples drawn on the way against `data` (`told` says what pictures those are); with `held_out`, which the run did not see
    while it saw `data`, also whether they are copies. A sheet, nearest.png, shows the pictures that samples are nearest to."""
    _check_run(opened, data, count)
    if held_out is not None:
        opened.check_classes(held_out)
    out = it.folder(opened.folder, "quality", _request(opened, sampler, data, count, it.seed, it.batch_size))
    labels = labels_like(data, count, opened.num_classes)
    if labels is not None:
        ask_for("reading the classes of samples", "sklearn")
    drawing = {"count": count, "seed": it.seed, "batch_size": it.batch_size, "device": it.device, "ranks": it.ranks}
    drawn = drawn_features(sampler, it.networks, labels, out, **drawing)
    report, found, by_class = Report(out, opened.step), dict[str, Compared](), list[str]()
    shown: tuple[Array, Array, Array] | None = None
    few, if_new = 0, 0.0
    for network in it.networks:
        real = real_features(network, data, opened.image, read=it.reads)
        unseen = real_features(network, held_out, opened.image, read=it.reads) if held_out is not None else None
        if not it.reads:
            continue
        samples = drawn[network.name]
        compared = compare(samples, real, network)
        if unseen is not None and len(unseen) >= FEWEST:
            chosen = unseen[_spread(len(unseen), count)]
            few, compared.values["frechet_held_out"] = len(chosen), distances.frechet(chosen, distances.moments(real))
            if few < count:
                compared.notes.append(f"the held-out pictures are {few}: compare the distance of as many samples with theirs")
        if isinstance(sampler.source, SourceSampler) and len(sampler.source) < count:
            compared.notes.append(
                f"the {count} samples start from {len(sampler.source)} pictures: a solver without noise draws no more than that"
            )
        nearest = distances.nearest(samples, real)[0][:, 0]
        if unseen is not None:
            copying = distances.copying(nearest, distances.nearest(unseen, real)[0][:, 0])
            compared.values.update(nearer=copying.nearer, copied=copying.copied)
            if_new = copying.copied_if_new
        if labels is not None:
            named = {"real": (real, data.labels), "samples": (samples, np.array(labels))}
            named |= {"held_out": (unseen, held_out.labels)} if unseen is not None and held_out is not None else {}
            by_class += read_classes(compared, report, network.name, named, opened.class_names)
        shown = shown or (samples, real, nearest)
        found[network.name] = compared
    if shown is None:
        return report
    how = f"{sampler.spec.solver}, {sampler.calls()} network calls, guidance {sampler.spec.guidance:g}"
    title = f"{opened.path} (step {opened.step}): {count} samples ({how}) against {len(data)} {told}"
    report.table(title, it.networks, found, count, few)
    report.values |= {"network_calls": sampler.calls(), "guidance": sampler.spec.guidance}
    if held_out is not None:
        report.lines.append(
            f"  `nearer` is 0.5 and `copied` {if_new:.1%} where samples are as far from the training pictures as those held out"
        )
        report.figures["copied_if_new"] = if_new
    elif told == TRAINING:
        report.lines.append("  nothing was held out, so nothing says how near new pictures would be: look at nearest.png")
    report.lines += by_class
    report.figures |= {"num_samples": count, "real_pictures": len(data), "of": told, "network_calls": sampler.calls()}
    report.figures["sampler"] = dump(sampler.spec)

    def draw(indices: Sequence[int]) -> NDArray[np.uint8]:
        parts = [indices[i : i + it.batch_size] for i in range(0, len(indices), it.batch_size)]
        more: dict[str, Any] = {"device": it.device, "batch_size": it.batch_size}
        images = [sampler.draw(it.seed, part, [labels[i] for i in part] if labels else None, **more) for part in parts]
        return figures.to_uint8(torch.cat(images))

    report.write(it.ranks)
    with warn_on_failure("nearest.png"):
        draw_nearest(out / "nearest.png", *shown, draw, lambda indices: _load(data, opened.image, indices), told)
        report.files.append(out / "nearest.png")
    return report


def read_classes(
    compared: Compared,
    report: Report,
    name: str,
    sets: dict[str, tuple[Array, NDArray[np.int64]]],
    class_names: Sequence[str],
) -> list[str]:
    """Whether a reader of the `real` pictures' features, a logistic regression, reads `samples`, and those `held_out`, as their
    class: into `compared` and `report`, and, class by class, in lines. `sets` are features and labels."""
    real, labels = sets["real"]
    known = np.flatnonzero(labels >= 0)
    known = known[_spread(len(known), distances.MAX_IMAGES)]
    if len(np.unique(labels[known])) < 2:
        compared.notes.append("one class alone: nothing to read")
        return []
    read = distances.fit_reader(real[known], labels[known])
    found: dict[str, Array] = {}
    for which, key in (("samples", "accuracy"), ("held_out", "accuracy_held_out")):
        if which in sets and np.isin(sets[which][1], range(len(class_names))).any():
            features, wanted = sets[which]
            found[which] = distances.accuracy_by_class(read(features), wanted, len(class_names))
            compared.values[key] = float(np.nanmean(found[which]))
    if "samples" not in found:
        compared.notes.append("no sample has a class: nothing to read")
        return []
    for class_name, share in zip(class_names, found["samples"], strict=True):
        if not np.isnan(share):
            report.values[f"class_{class_name}_read_by_{name}"] = float(share)
    report.figures[f"accuracy_by_class_{name}"] = {
        which: {name: None if np.isnan(share) else float(share) for name, share in zip(class_names, each, strict=True)}
        for which, each in found.items()
    }
    lines = [f"read by {name} as their class, the worst first:"]
    for k in np.argsort(np.nan_to_num(found["samples"], nan=2.0), kind="stable")[:30]:
        beside = f"   held out {found['held_out'][k]:6.1%}" if "held_out" in found else ""
        lines.append(f"  {printable(class_names[int(k)]):<29}{found['samples'][k]:14.1%}{beside}")
    return lines


# ---------------------------------------------------------------------------------------------- sweeps


def parse_sweep(how: SamplerConfig, words: Sequence[str]) -> list[SamplerConfig]:
    """`steps=5,10 guidance=1,2`: `how` with every combination; a UserError where a key or value does not fit."""
    known, axes = {key.name for key in fields(SamplerConfig)}, dict[str, list[Any]]()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"--sweep {word}: write it as KEY=A,B,.., such as steps=5,10,20")
        if key not in known:
            near = get_close_matches(key, known, 1)
            told = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"--sweep {word}: the sampler has no {key!r}; allowed: {', '.join(sorted(known))}{told}")
        if key in axes:
            raise UserError(f"--sweep: {key} stands there twice; put its values into one list")
        axes[key] = [_value(part) for part in text.split(",")]
    found = []
    for values in itertools.product(*axes.values()):
        setting = {**dump(how), **dict(zip(axes, values, strict=True))}
        found.append(validate(SamplerConfig, setting, origin=f"--sweep {' '.join(words)}"))
    return found


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except UserError:
        return text


def sweep(
    it: Evaluation,
    opened: Opened,
    data: ImageSet,
    settings: Sequence[SamplerConfig],
    *,
    count: int,
    classifier: OpenedClassifier | None = None,
    told: str = TRAINING,
) -> Report:
    """Every setting of the sampler against `data` (`told` says what pictures those are), all from the same noise: a table, and
    sweep.png, the distances against the network calls."""
    _check_run(opened, data, count)
    ask_for("drawing sweep.png", "matplotlib")
    samplers = [build_sampler(opened, how, classifier) for how in settings]
    request = _request(opened, samplers[0], data, count, it.seed, it.batch_size)
    out = it.folder(opened.folder, "sweep", {**request, "settings": [dump(how) for how in settings]})
    swept = [key for key in dump(settings[0]) if len({json.dumps(dump(how)[key]) for how in settings}) > 1]
    labels, rows = labels_like(data, count, opened.num_classes), list[dict[str, Any]]()
    real = {network.name: real_features(network, data, opened.image, read=it.reads) for network in it.networks}
    notes = dict[str, list[str]]()
    for sampler in samplers:
        setting = {key: dump(sampler.spec)[key] for key in swept}
        tag = hashlib.sha256(json.dumps(dump(sampler.spec)).encode()).hexdigest()[:8]
        drawing = {"count": count, "seed": it.seed, "batch_size": it.batch_size, "device": it.device, "ranks": it.ranks}
        drawn = drawn_features(sampler, it.networks, labels, out / tag, **drawing)
        if it.reads:
            found = {n.name: compare(drawn[n.name], real[n.name], n) for n in it.networks}
            rows.append({**setting, "network_calls": sampler.calls(), **{name: each.values for name, each in found.items()}})
            notes = {name: each.notes for name, each in found.items()}
    report = Report(out, opened.step)
    if not it.reads:
        return report
    keys = [key for key in ("frechet", "kernel", "precision", "recall") if all(key in row[it.networks[0].name] for row in rows)]
    columns = [*swept, "network_calls"]
    report.lines.append(f"{opened.path} (step {opened.step}): {count} samples a row against {len(data)} {told}")
    for network in it.networks:
        for row in rows:
            setting = ",".join(f"{key}={_told(row[key])}" for key in swept)
            report.values |= {f"sweep_{setting}_{k}_{network.name}_of_{count}": v for k, v in row[network.name].items()}
        report.lines.append(f"  in {network.name}, which compares with {network.comparable}")
        head = [*columns, *keys]
        cells = [[_told(row[c]) for c in columns] + [f"{row[network.name][k]:.4g}" for k in keys] for row in rows]
        widths = [max(len(line[i]) for line in [head, *cells]) + 2 for i in range(len(head))]
        report.lines += ["  " + "".join(f"{w:>{n}}" for w, n in zip(line, widths, strict=True)) for line in [head, *cells]]
        report.lines += [f"  note: {note}" for note in notes[network.name]]
        best = min(rows, key=lambda row: row[network.name]["frechet"])
        report.lines.append("  best: " + ", ".join(f"{key} {_told(best[key])}" for key in columns))
    report.figures = {"num_samples": count, "real_pictures": len(data), "of": told, "rows": rows, "notes": notes}
    report.figures["compares_with"] = {network.name: network.comparable for network in it.networks}
    report.write(it.ranks)
    with warn_on_failure("sweep.png"):
        _draw_sweep(out / "sweep.png", rows, swept, it.networks)
        report.files.append(out / "sweep.png")
    return report


def _told(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _draw_sweep(path: Path, rows: Sequence[dict[str, Any]], swept: Sequence[str], networks: Sequence[Features]) -> None:
    """The distances against steps where these are swept, else against the first number that is; a line for all else."""
    numbers = [key for key in swept if all(isinstance(row[key], int | float) for row in rows)]
    along = next((key for key in ("steps", *numbers) if key in numbers), None)
    axis = "network_calls" if along in ("steps", None) else along
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for network in networks:
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for row in sorted(rows, key=lambda row: row[axis]):
            name = ", ".join(f"{key} {_told(row[key])}" for key in swept if key != along) or network.name
            x, y = lines.setdefault(name, ([], []))
            x.append(row[axis])
            y.append(row[network.name]["frechet"])
        panels[f"Fréchet distance, {network.name}"] = lines
    figures.curves(path, panels, xlabel=axis.replace("_", " "), marker="o")


# ---------------------------------------------------------------------------------------------- pictures that are there


def _sizes(files: Sequence[Path]) -> ImageConfig:
    """What pictures of one square size are; a UserError where they are not."""
    found: dict[tuple[int, int, int], Path] = {}
    for path in files:
        try:
            with Image.open(path) as image:
                found.setdefault((image.width, image.height, 1 if image.mode in ("L", "1") else 3), path)
        except OSError as error:
            raise UserError(f"{path}: not a picture that can be read ({error})") from None
    if len(found) > 1:
        (a, b, _), (c, d, _) = list(found)[:2]
        one, other = list(found.values())[:2]
        if (a, b) == (c, d):
            raise UserError(f"{one} is grey and {other} in colour, or the other way: samples are of one kind")
        raise UserError(f"{one} is {a}x{b} px and {other} {c}x{d}: samples are all of one size")
    ((width, height, channels),) = found
    if width != height:
        raise UserError(f"{files[0]} is {width}x{height} px: samples are squares")
    return ImageConfig(size=width, channels=1 if channels == 1 else 3)


def evaluate_folder(it: Evaluation, place: Path, data: ImageSet, *, resize: bool) -> Report:
    """The pictures of a folder (of sample.py's, its samples) against `data`. Real pictures of another size are a UserError,
    unless they are to be cut as training does."""
    files = files_of(str(place))
    check_count(len(files), f"pictures in {place}")
    check_count(len(data), "real pictures")
    image = _sizes(files)
    for i in _spread(len(data), 64).tolist():
        part = data.parts[data.which[i]]
        real = part.load(int(data.index[i]), channels=image.channels)
        width, height = real.size if isinstance(real, Image.Image) else real.shape[1::-1]
        if (width, height) != (image.size, image.size) and not resize:
            raise UserError(
                f"the samples are {image.size}x{image.size} px and the real picture {part.names[int(data.index[i])]} "
                f"{width}x{height}; to cut and resize the real ones as training does: --resize"
            )

    def pixels(block: Sequence[Path]) -> Tensor:
        found = list[NDArray[np.uint8]]()
        for path in block:
            try:
                with Image.open(path) as opened:
                    found.append(np.asarray(opened.convert("RGB" if image.channels == 3 else "L")))
            except OSError as error:
                raise UserError(f"{path}: not a picture that can be read ({error}); remove it or draw it again") from None
        return torch.from_numpy(np.stack([array.reshape(image.size, image.size, -1) for array in found])).permute(0, 3, 1, 2)

    def make(block: range) -> dict[str, Array]:
        parts = [files[i : min(i + it.batch_size, block.stop)] for i in range(block.start, block.stop, it.batch_size)]
        seen: dict[str, list[Array]] = {network.name: [] for network in it.networks}
        for part in parts:
            for network in it.networks:
                seen[network.name].append(see(network, pixels(part)))
            within(len(part))
        return {name: np.concatenate(arrays) for name, arrays in seen.items()}

    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    told = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    out = it.folder(place.resolve().name, "pictures", {"samples": told, "pictures": data.fingerprint, "size": image.size})
    drawn = in_blocks(out, len(files), BLOCK, make, it.ranks, doing="features of the samples")
    report, found = Report(out), dict[str, Compared]()
    shown: tuple[Array, Array, Array] | None = None
    for network in it.networks:
        real = real_features(network, data, image, read=it.reads)
        if it.reads:
            found[network.name] = compare(drawn[network.name], real, network)
            nearest = distances.nearest(drawn[network.name], real)[0][:, 0]
            shown = shown or (drawn[network.name], real, nearest)
    if shown is None:
        return report
    report.table(f"{place}: {len(files)} pictures against {len(data)} {GIVEN}", it.networks, found, len(files))
    report.figures |= {"num_samples": len(files), "real_pictures": len(data)}

    def draw(indices: Sequence[int]) -> NDArray[np.uint8]:
        return pixels([files[i] for i in indices]).permute(0, 2, 3, 1).numpy()

    report.write(it.ranks)
    with warn_on_failure("nearest.png"):
        draw_nearest(out / "nearest.png", *shown, draw, lambda indices: _load(data, image, indices), GIVEN)
        report.files.append(out / "nearest.png")
    return report


# ---------------------------------------------------------------------------------------------- reconstructions


def evaluate_autoencoder(it: Evaluation, run: str, settings: dict[str, Any], data: ImageSet, told: str) -> Report:
    """rFID in each of the features, PSNR, SSIM, L1 and the run's own perceptual distance of the reconstructions of `data`
    (`told` says what pictures those are), at the size of the run's last stage; a sheet of the worst and of usual ones."""
    autoencoder = open_autoencoder(run, it.device)
    check_count(len(data), "real pictures")
    ask_for("measuring reconstructions", "torchmetrics", "torchvision")
    spec = validate(ImageConfig, settings["image"], origin=f"{run}: image")
    image = replace(spec, size=settings["stages"][-1]["image_size"] or spec.size, crop="center", flip=False)
    notes = list[str]()
    try:
        asked = validate(PerceptualConfig, settings["perceptual"], origin=f"{run}: perceptual")
        perceptual = Perceptual(asked, sizes=[image.size]).to(it.device)
    except UserError as error:
        asked, perceptual = None, None
        notes.append(f"no LPIPS: {error}")
    seen_by = asked.network if asked is not None else None
    request = {"weights": autoencoder.digest, "pictures": data.fingerprint, "files": data.state, "size": image.size}
    request["lpips"] = seen_by
    out = it.folder(settings["name"], "reconstructions", {**request, "batch_size": it.batch_size})
    out = it.folder(run_name(run), "reconstructions", {**request, "batch_size": it.batch_size})
    own = next(autoencoder.network.parameters()).dtype
    told_by = [place / "progress.json" for place in (Path(run), Path(run) / "final") if (place / "progress.json").exists()]
    step = read_json(told_by[0])["step"] if told_by else 0

    @torch.no_grad()
    def through(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pictures, and what comes back as a file would hold it."""
        images = to_network(torch.from_numpy(np.ascontiguousarray(_load(data, image, indices))), it.device, own)
        mean, _ = autoencoder.network.moments(images)
        drawn = autoencoder.network.decode(mean)
        if not is_finite(drawn):
            first = indices[int((~torch.isfinite(drawn.flatten(1)).all(1)).nonzero()[0])]
            name = data.parts[data.which[first]].names[int(data.index[first])]
            raise UserError(
                f"the reconstructions of {run} (step {step}) are not finite (NaN or infinity), first of the image {name}; "
                "measure an earlier checkpoint"
            )
        return images, to_network(pixels_of(drawn).permute(0, 2, 3, 1), it.device, own)

    @torch.no_grad()
    def make(block: range) -> dict[str, Array]:
        found: dict[str, list[Array]] = {}

        def add(name: str, values: Any) -> None:
            found.setdefault(name, []).append(np.asarray(values.cpu() if isinstance(values, Tensor) else values))

        for start in range(block.start, block.stop, it.batch_size):
            images, drawn = through(range(start, min(start + it.batch_size, block.stop)))
            add("psnr", metrics.psnr(drawn, images))
            add("l1", (drawn - images).abs().flatten(1).mean(1))
            if image.size >= SMALLEST_FOR_SSIM:
                add("ssim", metrics.ssim(drawn, images))
            if perceptual is not None:
                add("lpips", perceptual(drawn.float(), images.float()))
            for network in it.networks:
                add(network.name, see(network, pixels_of(drawn)))
            within(len(drawn))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    each = in_blocks(out, len(data), BLOCK, make, it.ranks, doing="reconstructing")
    report, found = Report(out, step), dict[str, Compared]()
    for network in it.networks:
        real = real_features(network, data, image, read=it.reads)
        if it.reads:
            found[network.name] = compare(each[network.name], real, network, neighbours=False)
    if not it.reads:
        return report
    report.table(
        f"{run}: {len(data)} {told} of {image.size} px against their reconstructions (the Fréchet distance is rFID)",
        it.networks, found, len(data),
    )  # fmt: skip
    units = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": f"LPIPS ({seen_by})", "l1": "L1, of [-1, 1]"}
    means = {name: float(each[name].mean()) for name in units if name in each}
    for name, value in means.items():
        report.lines.append(f"  {units[name]:<29}{value:14.4g}")
    report.lines += [f"  note: {note}" for note in notes]
    report.values |= means
    report.figures |= {**means, "real_pictures": len(data), "of": told, "notes": notes}
    report.write(it.ranks)
    with warn_on_failure("reconstructions.png"):
        order = np.argsort(each["psnr"], kind="stable")
        chosen = [*order[:6].tolist(), *order[len(order) // 2 :][:6].tolist()]
        save_sheet(out / "reconstructions.png", *through(chosen), means, f"the {len(order[:6])} worst, then usual ones; ")
        report.files.append(out / "reconstructions.png")
    return report
