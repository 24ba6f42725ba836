"""The facts of a run's data that travel with its weights."""

from collections import Counter
from typing import Any

from .points import PointSet
from .sources import Images, ImageSet


def skipped_files(train_set: ImageSet | PointSet, held_out: ImageSet | PointSet | None) -> list[tuple[str, str]]:
    """(name, reason) of every file left out of the sources of both sets."""
    return [entry for part in sources_of(train_set, held_out) for entry in part.report.skipped]


def sources_of(*sets: ImageSet | PointSet | None) -> list[Images]:
    """The sources of all these sets, each once."""
    parts = [part for data in sets if data is not None for part in data.parts]
    return list({id(part): part for part in parts}.values())


def describe_data(train_set: ImageSet | PointSet, held_out: ImageSet | PointSet | None) -> dict[str, Any]:
    """What travels with the weights: classes, counts, the hash of the file list, and the remarks on the data."""
    return {
        "class_names": list(train_set.class_names),
        "counts": train_set.counts,
        "images": len(train_set),
        "held_out_images": len(held_out) if held_out is not None else 0,
        "fingerprint": train_set.fingerprint,
        "skipped": dict(Counter(why for _, why in skipped_files(train_set, held_out)).most_common()),
        "remarks": list(dict.fromkeys(remark for part in sources_of(train_set, held_out) for remark in part.report.remarks)),
        "endings": train_set.endings if isinstance(train_set, ImageSet) else {},
    }
