"""From the sources of a config to the set of images to train on and the set that is held out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...config import UserError
from ..names import find_spelling, join_names, normal_form
from ..transforms import ImageConfig
from .image_set import ImageSet, lowest_names
from .images import Source, name_fraction
from .python import read_dataset
from .registry import open_source


def open_sources(sources: Source | Sequence[Source], *, among: Sequence[str] = ()) -> ImageSet:
    """Open one or several sources as one set; `subset` keeps the images whose names hash lowest.

    Where one folder of a source alone holds images and has the name of one of the classes `among`, they are of that class.
    """
    parts, chosen = [], []
    specs: Sequence[Any] = sources if isinstance(sources, Sequence) else [sources]
    for spec in specs:
        part = open_source(spec)
        if part.only_folder is not None and not part.class_names:
            name = find_spelling(among, part.only_folder)
            if name is not None:
                part.class_names, part.labels = (name,), np.zeros_like(part.labels)
        subset = getattr(spec, "subset", None)
        parts.append(part)
        chosen.append(np.arange(len(part)) if subset is None or subset >= len(part) else lowest_names(part.names, subset))
    images = ImageSet(parts, chosen)
    if len(images) == 0:
        raise UserError("the data has no images")
    return images


def open_data(
    data: Source | Sequence[Source] | ImageSet, held_out: float | Source | Sequence[Source]
) -> tuple[ImageSet, ImageSet | None]:
    """The training images, and those held out: a fraction by hash of the relative path, or sources of their own."""
    images = data if isinstance(data, ImageSet) else open_sources(data)
    if not isinstance(held_out, float | int):
        held_out_set = open_sources(held_out, among=images.class_names)
        known = {normal_form(name) for name in images.class_names}
        unknown = [name for name in held_out_set.class_names if normal_form(name) not in known]
        if unknown:
            raise UserError(f"held_out has classes that data lacks: {join_names(unknown)}")
        held_out_set.rename_classes(images.class_names)
        return images, held_out_set
    if held_out == 0:
        return images, None
    is_held_out = np.array([name_fraction(name) < held_out for name in images.names])
    if is_held_out.all() or not is_held_out.any():
        raise UserError(f"held_out {held_out:g} of {len(images)} images leaves one side empty; change it")
    return images.only(~is_held_out), images.only(is_held_out)


def open_given(dataset: Any, held_out: Any, image: ImageConfig) -> tuple[ImageSet, ImageSet | None]:
    """What `open_data` gives, of a data set that was handed in from Python; `read_dataset` says what its items are."""
    part = read_dataset(dataset, image.channels)
    return open_data(ImageSet([part], [np.arange(len(part))]), held_out)
