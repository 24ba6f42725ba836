"""Checks of images that can be read, before a run: images smaller than it trains at, colour profiles that do not help."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import UserError
from .colour import DAMAGED, DARK, UNFIT
from .facts import sources_of
from .sources import ArrayImages, ImageSet, PackedImages


def trained_sizes(cfg: Any) -> dict[str, int]:
    """{config key: side in pixels} of all sizes at which a training config trains."""
    if cfg.image is None:
        return {}
    stages = getattr(cfg, "stages", ())
    named = {f"stages.{i}.image_size": stage.image_size for i, stage in enumerate(stages) if stage.image_size is not None}
    plain = not stages or any(stage.image_size is None for stage in stages)
    return ({"image.size": cfg.image.size} if plain else {}) | named


def refuse_small_packs(sizes: Mapping[str, int], *sets: Any) -> None:
    """Refuse packed sets whose images are smaller than a size that is trained at: enlarged, they would teach blur."""
    packs = [part for part in sources_of(*sets) if isinstance(part, PackedImages) and len(part)]
    for key, size in sizes.items():
        for part in packs:
            if (side := int(part.report.sides.min())) < size:
                raise UserError(
                    f"the packed set {part.folder} holds images of {side} px, and {key} is {size}: they would be enlarged; "
                    f"pack them again with --size {max(sizes.values())}, or set {key} to {side} or less"
                )


def count_small(size: int, *sets: Any) -> tuple[int, int, int]:
    """How many images have a shorter side below `size`, of how many, and the smallest side. Sets in memory (digits, shapes,
    EMNIST) do not count: they are small by nature, and whoever chooses them knows."""
    small, total, smallest = 0, 0, size
    for images in sets:
        if isinstance(images, ImageSet):
            files = [i for i, part in enumerate(images.parts) if not isinstance(part, ArrayImages)]
            sides = images.sides.min(1)[np.isin(images.which, files)]
            sides = sides[sides > 0]
            small, total = small + int((sides < size).sum()), total + len(images)
            smallest = min(smallest, int(sides.min(initial=size)))
    return small, total, smallest


def describe_small(sizes: Mapping[str, int], *sets: Any) -> list[str]:
    """A line for each size below which there are images."""
    lines = []
    for key, size in sizes.items():
        small, total, smallest = count_small(size, *sets)
        if small:
            lines.append(
                f"{small} of {total} images are enlarged: their shorter side is below {key} {size} (the smallest: "
                f"{smallest} px); leave them out with --set data.scan.min_side={size}, or train at a smaller size"
            )
    return lines


def describe_notes(*sets: Any) -> list[str]:
    """A line for each kind of image whose colours or brightness may not be what its owner sees."""
    notes = sum((Counter(part.report.notes) for part in sources_of(*sets)), Counter[str]())
    return [f"of {count} images: {note}" for note, count in notes.items() if note in (DAMAGED, UNFIT, DARK)]


def check_images(cfg: Any, run_dir: Path, *sets: Any) -> list[str]:
    """Compare the images of a training config with every size at which it trains, before anything is written.

    A packed set that is too small is a UserError, but for a run that has begun with it. Gives the lines to warn with.
    """
    sizes = trained_sizes(cfg)
    if not any((run_dir / "checkpoints").glob("step_*")):
        refuse_small_packs(sizes, *sets)
    return describe_small(sizes, *sets) + describe_notes(*sets)
