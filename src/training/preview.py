"""What is drawn and measured before and while a run trains: first images, previews, the held-out loss, the quality."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import figures
from ..data.names import file_stems
from ..diffusion import Prediction
from ..evaluation.quality import Quality
from ..runtime.failures import Outcome, failed_on_any
from ..runtime.stream import Examples
from ..sampling.config import SamplerConfig
from ..sampling.sampler import Sampler
from ..storage.finite import is_finite
from .config import PathPreviewConfig, PreviewConfig
from .held_out import held_out_loss
from .inputs import Coupling
from .session import Session

PREVIEW = "the preview"


def preview(sampler: Sampler, spec: PreviewConfig, session: Session, class_names: tuple[str, ...]) -> None:
    """Draw the preview of the session's step on all ranks.

    The first rank writes the sheets: `step_STEP.png`, or in the folder `step_STEP` one `sample_CLASS_4x4.png` for each class.
    A sheet that cannot be drawn does not end the run.
    """
    session.clock.enter("a preview")
    stem = session.run.samples / f"step_{session.step:08d}"
    if sampler.conditioned is not None:
        _preview_conditioned(sampler, sampler.conditioned, spec, session, stem.with_name(f"{stem.name}.png"))
        return
    count, of_one = spec.num_samples, sampler.num_classes is None or spec.sheets == "one"
    columns = max(1, min(16, round(math.sqrt(count))))
    sheets = [(stem.with_name(f"{stem.name}.png"), None)]
    if not of_one:
        size = f"{columns}x{-(-count // columns)}"
        sheets = [(stem / f"sample_{name}_{size}.png", label) for label, name in enumerate(file_stems(class_names))]
    for path, label in sheets:
        parts = _draw_shapes(sampler, spec, session, len(class_names), label)
        if parts is None:
            break
        with looked_at(session):
            if session.accelerator.is_main_process:
                captions = [[class_names[i] for i in labels] if labels and of_one else None for _, labels in parts]
                pixels = [figures.to_uint8(images) for images, _ in parts]
                grids = [figures.grid(x, columns=columns, labels=names) for x, names in zip(pixels, captions, strict=True)]
                figures.save(figures.in_a_column(grids), path)


def measure_held_out(sampler: Sampler, held_out: Examples | None, session: Session) -> dict[str, float]:
    """The loss on what is held out, on all ranks; nothing where nothing is. It may decide which checkpoint is kept and when the
    cooldown begins, so an error in it ends the run."""
    if held_out is None:
        return {}
    if not session.is_due("preview"):  # of which it is a part
        session.clock.enter("the held-out loss")
    values = held_out_loss(sampler, held_out, session.batch_plan.micro, session.accelerator)
    session.watch(values["held_out_loss"])
    return values


def _draw_shapes(
    sampler: Sampler, spec: PreviewConfig, session: Session, num_classes: int, label: int | None
) -> list[tuple[Tensor, list[int] | None]] | None:
    """Samples of the most frequent shapes and their labels, each shape by itself: of one class, or where `label` is None of
    all. None where drawing failed."""
    parts, device = list[tuple[Tensor, list[int] | None]](), session.accelerator.device
    for shape, indices in sampler.deal_shapes(spec.num_samples):
        labels = [label] * len(indices) if label is not None else _labels(sampler, len(indices), num_classes)
        draw = partial(_samples, sampler.at_shape(shape), labels, indices, device)
        outputs = _draw_on_all(session, len(indices), spec.batch_size, draw)
        if outputs is None:
            return None
        warn_not_finite(outputs[0], session)
        parts.append((outputs[0], labels))
    return parts


def _preview_conditioned(sampler: Sampler, examples: Examples, spec: PreviewConfig, session: Session, path: Path) -> None:
    """Draw from the conditions of the examples, and save each condition, what is drawn from it and the example side by side."""
    sheets, device = list[Any](), session.accelerator.device
    chosen = np.linspace(0, len(examples.labels) - 1, min(spec.num_samples, len(examples.labels))).astype(np.int64)
    for indices in examples.split(chosen):
        outputs = _draw_on_all(session, len(indices), spec.batch_size, partial(_triples, sampler, examples, indices, device))
        if outputs is None:
            return
        warn_not_finite(outputs[1], session)
        rows = torch.stack(outputs, dim=1).flatten(0, 1)  # (3 n, C, H, W)
        sheets.append((rows, 3 * max(1, round(math.sqrt(len(indices) / 3)))))
    with looked_at(session):
        if session.accelerator.is_main_process:
            title = "condition, sample and truth, side by side"
            grids = [figures.grid(figures.to_uint8(rows), columns=columns, title=title) for rows, columns in sheets]
            figures.save(figures.in_a_column(grids), path)


def _triples(
    sampler: Sampler, examples: Examples, indices: NDArray[np.int64], device: torch.device, part: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The conditions of these examples as images, what is drawn from them, and the examples themselves."""
    chosen = indices[part]
    x0, values, labels = examples.load(chosen), _condition(examples, chosen), _labels_of(sampler, examples, chosen)
    at_shape = sampler.at_shape(x0.shape[1:])
    samples = at_shape.draw(0, chosen.tolist(), labels, device=device, condition=values)
    truth = at_shape.decode(x0.to(device, sampler.dtype))
    return at_shape.show_condition(values.to(device, sampler.dtype), truth.shape[1:]), samples, truth


def _labels_of(sampler: Sampler, examples: Examples, indices: NDArray[np.int64]) -> list[int] | None:
    """The labels of examples, that of no class where they have none; None where the network has no classes."""
    if sampler.num_classes is None:
        return None
    return [label if label >= 0 else sampler.num_classes for label in examples.labels[indices].tolist()]


def _of_shape(examples: Examples, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """The indices of the examples that are of this shape."""
    return examples.groups[shape] if examples.groups else np.arange(len(examples.labels))


def _condition(examples: Examples, indices: NDArray[np.int64]) -> Tensor:
    assert examples.condition is not None
    return examples.condition(indices)


def preview_paths(
    sampler_for: Callable[[SamplerConfig], Sampler],
    spec: PathPreviewConfig,
    session: Session,
    class_names: Sequence[str],
    coupling: Coupling,
) -> dict[str, float]:
    """Draw the preview of the session's step on all ranks as `step_STEP.png`, the same sources after few network calls and
    many, and measure `straightness` along the most calls. 2-D points are drawn beside those of the data."""
    session.clock.enter("a preview")
    sheets, bends, sampler = list[list[Tensor]](), list[Tensor](), sampler_for(spec.most_calls)
    examples = coupling.data.examples() if coupling.paired else sampler.conditioned
    for shape, indices in sampler.deal_shapes(spec.num_samples):
        columns_and_bends = _draw_columns(sampler_for, spec, session, len(class_names), shape, indices, examples)
        if columns_and_bends is None:
            sheets, bends = [], []  # straightness is of all shapes, or not known
            break
        sheets += [columns_and_bends[0]] if columns_and_bends[0] else []
        bends.append(columns_and_bends[1])
    if sheets and session.accelerator.is_main_process:
        with looked_at(session):
            _save_columns(sheets, spec, coupling, session.run.samples / f"step_{session.step:08d}.png")
    return {"straightness": float(torch.cat(bends).mean())} if bends else {}


def _draw_columns(
    sampler_for: Callable[[SamplerConfig], Sampler],
    spec: PathPreviewConfig,
    session: Session,
    num_classes: int,
    shape: tuple[int, ...],
    indices: range,
    examples: Examples | None,
) -> tuple[list[Tensor], Tensor] | None:
    """Sources of one shape and what becomes of them after each number of calls, and how straight the way is along the most
    calls; None where drawing failed. `examples` are the truth, where it is known: it comes last, and conditions first."""
    device, sampler = session.accelerator.device, sampler_for(spec.most_calls).at_shape(shape)
    labels, chosen, condition = _labels(sampler, len(indices), num_classes), np.zeros(0, np.int64), None
    if examples is not None:
        chosen = _of_shape(examples, shape)[: len(indices)]
        if not len(chosen):
            return [], torch.zeros(0)
        indices, labels = range(len(chosen)), _labels_of(sampler, examples, chosen)
        condition = _condition(examples, chosen) if sampler.conditioned is not None else None
    columns, straightness = list[Tensor](), torch.zeros(0)
    for calls in sorted(spec.calls):
        sampler = sampler_for(spec.sampler_of(calls)).at_shape(shape)
        draw = partial(_paths, sampler, labels, indices, device, condition)
        outputs = _draw_on_all(session, len(indices), spec.batch_size, draw)
        if outputs is None:
            return None
        sources, samples, straightness = outputs
        columns = [*(columns or [sources]), samples]
        warn_not_finite(samples, session)
    if examples is not None:
        truth = sampler.decode(examples.load(chosen).to(columns[0]))
        shown = [sampler.show_condition(condition.to(columns[0]), truth.shape[1:])] if condition is not None else []
        columns = [*shown, *columns, truth]
    return columns, straightness


def measure_quality(quality: Quality, sampler: Sampler, batch_size: int, session: Session) -> dict[str, float]:
    """The distance of samples from the training images, on all processes."""
    session.clock.enter("measuring samples")
    return quality.measure(sampler, batch_size, session.run.say)


def looked_at(session: Session) -> AbstractContextManager[Outcome]:
    """Around a part of a preview that may fail. With FSDP nothing is caught: the other ranks wait inside the network."""
    return nullcontext(Outcome()) if session.accelerator.is_fsdp2 else session.drawing(PREVIEW)


def warn_not_finite(samples: Tensor, session: Session) -> None:
    """Say how many of a preview's images (N, ...) are not finite: a preview is only to be looked at, so the run goes on."""
    if session.accelerator.is_main_process and not is_finite(samples):
        count = int((~torch.isfinite(samples.flatten(1)).all(1)).sum())
        session.run.say(
            f"warning: step {session.step}: {count} of {len(samples)} samples of the preview are not finite (NaN or infinity); "
            "look at the loss: where it does not come back, start again from an earlier checkpoint or with a lower optimizer.lr"
        )


def _labels(sampler: Sampler, count: int, num_classes: int) -> list[int] | None:
    """`count` labels, as many of each class; None where the network has no classes."""
    return [i * num_classes // count % num_classes for i in range(count)] if sampler.num_classes is not None else None


def _draw_on_all(
    session: Session, count: int, batch_size: int, draw: Callable[[list[int]], tuple[Tensor, ...]]
) -> tuple[Tensor, ...] | None:
    """What `draw(indices)` gives, tensors (b, ...), for the indices up to `count`, each rank drawing its share; None on all
    where that failed on one of them."""
    accelerator, parts = session.accelerator, list[tuple[Tensor, ...]]()
    each = -(-count // accelerator.num_processes)
    first = accelerator.process_index * each
    indices = [i % count for i in range(first, first + each)]
    with looked_at(session) as outcome:
        parts += [draw(indices[start : start + batch_size]) for start in range(0, each, batch_size)]
    if failed_on_any(outcome, PREVIEW, accelerator, session.run.warn):
        return None
    gathered: Any = accelerator.gather(tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return tuple(tensor[:count] for tensor in gathered)


def _samples(
    sampler: Sampler, labels: list[int] | None, indices: range, device: torch.device, part: list[int]
) -> tuple[Tensor]:
    chosen = [labels[i] for i in part] if labels is not None else None
    return (sampler.draw(0, [indices[i] for i in part], chosen, device=device),)


class PathLength:
    """A callback that adds up how far each sample of a batch goes."""

    def __init__(self) -> None:
        self._first_and_last, self._length = list[Tensor](), torch.zeros(())

    def __call__(self, step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
        if self._first_and_last:
            self._length = self._length + (x_t - self._first_and_last[-1]).flatten(1).norm(dim=1)
        self._first_and_last = [*self._first_and_last[:1], x_t]

    def straightness(self, end: Tensor) -> Tensor:
        """(B,): one minus the ratio of chord to path length, for paths that end at `end` (B, ...): 0 is a straight line."""
        first, last = self._first_and_last[0], self._first_and_last[-1]
        length = self._length + (end - last).flatten(1).norm(dim=1)
        return 1 - (end - first).flatten(1).norm(dim=1) / length.clamp(min=1e-12)


def _paths(
    sampler: Sampler, labels: list[int] | None, indices: range, device: torch.device, condition: Tensor | None, part: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sources and what becomes of them, as images or points, and how straight the way there is (b,)."""
    chosen = [indices[i] for i in part]
    x = sampler.start(0, chosen).to(device, sampler.dtype)
    of_classes = torch.tensor([labels[i] for i in part], device=device) if labels is not None else None
    length, of_part = PathLength(), condition[part].to(x) if condition is not None else None
    end = sampler.move(x, of_classes, indices=chosen, callback=length, condition=of_part)
    return sampler.decode(x), sampler.decode(end), length.straightness(end)


def _save_columns(sheets: list[list[Tensor]], spec: PathPreviewConfig, coupling: Coupling, path: Path) -> None:
    if sheets[0][0].ndim == 2:
        (columns,) = sheets
        titles = ["source", *(f"{calls} network call{'s' * (calls > 1)}" for calls in sorted(spec.calls)), "data"]
        data = coupling.data.examples()
        examples = data.load(np.arange(min(len(columns[0]), len(data.labels))))
        panels = zip([*columns, examples], titles, strict=True)
        figures.save(figures.in_a_row([figures.scatter(x.cpu().numpy(), title=title) for x, title in panels]), path)
        return
    title, grids = f"source, then after {', '.join(map(str, sorted(spec.calls)))} network calls", []
    num_extra = len(sheets[0]) - len(spec.calls) - 1  # columns: the truth, or condition and truth
    title = f"{'condition, ' if num_extra > 1 else ''}{title}{', and truth' if num_extra else ''}"
    for columns in sheets:
        rows = torch.stack(columns, dim=1).flatten(0, 1)  # (count (1 + calls), C, H, W)
        grids.append(figures.grid(figures.to_uint8(rows), columns=len(columns), title="" if grids else title))
    figures.save(figures.in_a_column(grids), path)
