"""Pairs of images: the partner of each image of a set, by the names of the files, in the other half, or in a column."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import UserError
from .colour import Pixels
from .conditions import Condition, PairedCondition
from .names import join_names, normal_form, printable
from .scan import ScanConfig, ScanReport
from .sources import DatasetsSource, FolderSource, Images, ImageSet, Source, Sources, open_data, open_sources
from .sources.images import digest
from .sources.registry import OPEN_FUNCTIONS

if TYPE_CHECKING:
    from PIL import Image

SAME_SHAPE = 0.02  # by so much the ratio of width to height may differ between partners
NO_PARTNER, OTHER_SHAPE = "no partner", "a partner of another shape"


def open_pairs(
    data: Sources | Sequence[Source], held_out: Any, condition: Condition | None
) -> tuple[ImageSet, ImageSet | None]:
    """What `open_data` gives; where the condition is another image, each set has a `partner`. Images without a partner are left
    out, and a UserError says that they are too many."""
    return _open_both(data, held_out, condition) if isinstance(condition, PairedCondition) else open_data(data, held_out)


def open_matched(data: Any, held_out: Any, source: Any) -> tuple[ImageSet, ImageSet | None]:
    """The same with the images of `source` that have the same names as partners."""
    if isinstance(source, Sequence):
        raise UserError("coupling 'paired' finds the partners in one source; give one instead of a list")
    return _open_both(data, held_out, OPEN_FUNCTIONS[type(source)](source))


def _open_both(data: Any, held_out: Any, partner: PairedCondition | Images) -> tuple[ImageSet, ImageSet | None]:
    images, held_out_set = open_data(_with_partners(open_sources(data), _listed(data), partner), held_out)
    if held_out_set is not None and held_out_set.partner is None:  # it has sources of its own
        classes = held_out_set.class_names
        held_out_set = _with_partners(held_out_set, _listed(held_out), partner)
        held_out_set.rename_classes(classes)
    return images, held_out_set


def refuse_pairs(condition: Condition | None) -> None:
    """A UserError for a data set from Python, of which no config says where the partners are."""
    if isinstance(condition, PairedCondition):
        raise UserError(
            "condition.kind 'paired' is for data that the config names, and this data set was handed in from Python"
        )


def _listed(specs: Any) -> list[Any]:
    return list(specs) if isinstance(specs, Sequence) else [specs]


def _with_partners(images: ImageSet, specs: Sequence[Any], place: PairedCondition | Images) -> ImageSet:
    """Those of the images that have a partner, with it; the partners are in an opened source, or where a config says."""
    folder, condition = (place, None) if isinstance(place, Images) else (None, place)
    if condition is not None and condition.path is not None:
        folder = OPEN_FUNCTIONS[FolderSource](FolderSource(source="folder", path=condition.path))
    parts, partners = list[Images](), list[Images]()
    chosen, chosen_partners = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    for w, (part, spec) in enumerate(zip(images.parts, specs, strict=True)):
        index = images.index[images.which == w]
        if condition is not None and condition.side is not None:
            other = "right" if condition.side == "left" else "left"
            parts.append(half_of(part, other))
            partners.append(half_of(part, condition.side))
            chosen.append(index)
            chosen_partners.append(index)
            continue
        partner = folder if folder is not None else _open_column(spec, condition)
        partner_index = find_partners([part.names[i] for i in index.tolist()], partner.names, by_stem=folder is not None)
        reasons = _reasons(part.report.measures[index], partner.report.measures, partner_index)
        _leave_out([(part.names[i], why) for i, why in zip(index.tolist(), reasons, strict=True) if why], part, spec, partner)
        good = np.array([not why for why in reasons], dtype=bool)
        parts.append(part)
        partners.append(partner)
        chosen.append(index[good])
        chosen_partners.append(partner_index[good])
    if not sum(map(len, chosen)):
        raise UserError("no image of the data has a partner")
    channels = condition.channels if condition is not None else None
    return ImageSet(parts, chosen, ImageSet(partners, chosen_partners), channels)


def _open_column(spec: Any, condition: PairedCondition | None) -> Images:
    assert condition is not None
    if not isinstance(spec, DatasetsSource):
        raise UserError(
            f"condition.column is for the source datasets, and the data's source is {spec.source}; give path or side"
        )
    if normal_form(condition.column or "") == normal_form(spec.image_column):
        raise UserError(f"condition.column {condition.column!r} is the column of the images themselves; name another one")
    assert condition.column is not None
    return OPEN_FUNCTIONS[DatasetsSource](replace(spec, image_column=condition.column, label_column=None, subset=None))


def find_partners(names: Sequence[str], partner_names: Sequence[str], *, by_stem: bool = True) -> NDArray[np.int64]:
    """For each name the index of its partner, -1 where there is none: the same path, `by_stem` without the ending. A UserError
    where two partners have the same one."""

    def key(name: str) -> str:
        return normal_form(str(PurePath(name).with_suffix("")) if by_stem else name)

    places = defaultdict[str, list[int]](list)
    for i, name in enumerate(partner_names):
        places[key(name)].append(i)
    indices = []
    for name in names:
        matches = places.get(key(name), [-1])
        if len(matches) > 1:
            twice = join_names([partner_names[i] for i in matches])
            raise UserError(f"condition.path: {printable(name)} has several partners, {twice}; leave one of them there")
        indices.append(matches[0])
    return np.array(indices, dtype=np.int64)


def _reasons(measures: NDArray[np.int64], partner_measures: NDArray[np.int64], partner_index: NDArray[np.int64]) -> list[str]:
    """Why each image is left out, "" where it is not."""
    reasons = []
    for (width, height), j in zip(measures[:, :2].tolist(), partner_index.tolist(), strict=True):
        if j < 0:
            reasons.append(NO_PARTNER)
            continue
        other_width, other_height = partner_measures[j, :2].tolist()
        known = min(width, height, other_width, other_height) > 0
        differs = known and abs(width * other_height / (height * other_width) - 1) > SAME_SHAPE
        reasons.append(OTHER_SHAPE if differs else "")
    return reasons


def _leave_out(left_out: list[tuple[str, str]], part: Images, spec: Any, partner: Images) -> None:
    """Note the images that are left out; a UserError where they are more than `max_broken_fraction` of all."""
    scan = getattr(spec, "scan", ScanConfig())
    if len(left_out) > scan.max_broken_fraction * len(part):
        examples = ", ".join(f"{name!r} ({why})" for name, why in left_out[:10])
        raise UserError(
            f"{len(left_out)} of {len(part)} images have no partner, or one of another shape, more than max_broken_fraction "
            f"{scan.max_broken_fraction:g} allows; give both the same names (but for endings) and shapes, or raise it. The "
            f"first: {examples}"
        )
    part.report.skipped += left_out


@dataclass(kw_only=True)
class HalfImages(Images):
    """The left or right halves of the images of another source."""

    whole: Images
    side: str

    def load(self, index: int, *, channels: int, at_least: int | None = None) -> "Image.Image | Pixels":
        return cut_half(self.whole.load(index, channels=channels), self.side)

    def content(self, index: int) -> bytes:
        return self.whole.content(index)


def cut_half(image: "Image.Image | Pixels", side: str) -> "Image.Image | Pixels":
    """The left or right half of an image."""
    width = image.shape[1] if isinstance(image, np.ndarray) else image.width
    first = 0 if side == "left" else width - width // 2
    if isinstance(image, np.ndarray):
        return image[:, first : first + width // 2]
    return image.crop((first, 0, first + width // 2, image.height))


def half_of(part: Images, side: str) -> HalfImages:
    """The `side` (left or right) of each image of a source, which holds two images side by side."""
    measures = part.report.measures.copy()
    measures[:, 0] = np.where(measures[:, 0] > 0, measures[:, 0] // 2, measures[:, 0])
    report = ScanReport(part.report.skipped, measures, part.report.notes, part.report.remarks)
    half = HalfImages(
        names=part.names,
        labels=part.labels,
        class_names=part.class_names,
        fingerprint=digest("half", side, part.fingerprint),
        report=report,
        whole=part,
        side=side,
    )
    half.named_by_files, half.only_folder = part.named_by_files, part.only_folder
    return half
