"""The facts of a run's data that travel with its weights, and checks before a run: images that are small or odd in colour."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import UserError
from ..config.sizes import Sides, describe_size, sides_of
from .colour import DAMAGED, DARK, UNFIT
from .points import PointSet
from .sources import ArrayImages, Images, ImageSet, PackedImages
from .transforms import is_enlarged


def sources_of(*sets: ImageSet | PointSet | None) -> list[Images]:
    """The sources of all these sets, each once."""
    partners = [data.partner for data in sets if isinstance(data, ImageSet)]
    parts = [part for data in (*sets, *partners) if data is not None for part in data.parts]
    return list({id(part): part for part in parts}.values())


def skipped_files(*sets: ImageSet | PointSet | None) -> list[tuple[str, str]]:
    """(name, reason) of every file left out of the sources of these sets."""
    return [entry for part in sources_of(*sets) for entry in part.report.skipped]


def count_notes(*sets: ImageSet | PointSet | None) -> dict[str, int]:
    """{what is odd: how many} of the images of the sources of these sets."""
    return sum((Counter(part.report.notes) for part in sources_of(*sets)), Counter[str]())


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


def refuse_small_packs(sizes: Mapping[str, int | Sides], *sets: ImageSet | PointSet | None) -> None:
    """Refuse packed sets whose images are smaller than a size that is trained at: enlarged, they would teach blur."""
    packs = [part for part in sources_of(*sets) if isinstance(part, PackedImages) and len(part)]
    for key, size in sizes.items():
        for part in packs:
            sides = part.report.measures[:, :2]
            if is_enlarged(sides, size).any():
                largest = max(max(sides_of(each)) for each in sizes.values())
                raise UserError(
                    f"the packed set {part.folder} holds images of {int(sides.min())} px, and {key} is {_in_words(size)}: they "
                    f"would be enlarged; pack them again with --size {largest}, or set {key} to {int(sides.min())} or less"
                )


def count_small(size: int | Sides, *sets: ImageSet | PointSet | None) -> tuple[int, int, int]:
    """How many images are enlarged until they cover `size`, of how many, and the smallest side of those. Sets in memory
    (digits, shapes, EMNIST) do not count: they are small by nature, and whoever chooses them knows."""
    small, total, smallest = 0, 0, max(sides_of(size))
    for images in sets:
        if isinstance(images, ImageSet):
            files = [i for i, part in enumerate(images.parts) if not isinstance(part, ArrayImages)]
            sides = images.sides[np.isin(images.which, files)]
            sides = sides[sides.min(1) > 0]
            enlarged = sides[is_enlarged(sides, size)]
            small, total = small + len(enlarged), total + len(images)
            smallest = min(smallest, int(enlarged.min(initial=smallest)))
    return small, total, smallest


def describe_small(sizes: Mapping[str, int | Sides], *sets: ImageSet | PointSet | None) -> list[str]:
    """A line for each size below which there are images."""
    lines = []
    for key, size in sizes.items():
        small, total, smallest = count_small(size, *sets)
        if small:
            shorter = "their shorter side is below" if isinstance(size, int) else "they do not cover"
            lines.append(
                f"{small} of {total} images are enlarged: {shorter} {key} {_in_words(size)} (the smallest: {smallest} px); "
                f"leave them out with --set data.scan.min_side={max(sides_of(size))}, or train at a smaller size"
            )
    return lines


def _in_words(size: int | Sides) -> str:
    return describe_size(size).removesuffix(" px")


def check_images(cfg: Any, run_dir: Path, *sets: Any) -> list[str]:
    """Compare the images of a training config with every size at which it trains, before anything is written.

    A packed set that is too small is a UserError, but for a run that has begun with it. Gives the lines to warn with, also on
    images whose colours or brightness may not be what their owner sees.
    """
    stages = getattr(cfg, "stages", ()) if cfg.image is not None else ()
    sizes = {f"stages.{i}.image_size": stage.image_size for i, stage in enumerate(stages) if stage.image_size is not None}
    if cfg.image is not None and (not stages or len(sizes) < len(stages)):
        sizes = {"image.size": cfg.image.size} | sizes
    if not any((run_dir / "checkpoints").glob("step_*")):
        refuse_small_packs(sizes, *sets)
    notes = count_notes(*sets).items()
    return describe_small(sizes, *sets) + [f"of {n} images: {note}" for note, n in notes if note in (DAMAGED, UNFIT, DARK)]
