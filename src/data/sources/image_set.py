"""The images of one or several sources, selected and in a fixed order, which training reads; and how they are opened."""

import copy
import hashlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...config import UserError
from ...config.sizes import Sides
from .. import formats
from ..colour import Pixels
from ..names import find_spelling, join_names, normal_form, sorted_by_count, sorted_classes
from ..transforms import ImageConfig, crop
from .images import ArrayImages, Images, Share, Source, digest, hold_out, name_fraction
from .python import read_dataset
from .registry import OPEN_FUNCTIONS


class ImageSet:
    """The images `chosen[i]` (indices) of each source `parts[i]`, in a fixed order.

    Image k of the set is image `index[k]` of the source `parts[which[k]]`; `names` are their paths there. `labels` (N,) are
    indices into `class_names`, -1 for none. `sides` (N, 2) are width and height of the upright image, -1 where they are not
    known; `times` (N,) when the file was modified, in nanoseconds, 0 where the fingerprint changes with the content; `decoders`
    (N,) the first version of the decoder that reads each image as today's does. A `partner` is a set of as many images in the
    same order, which are read with `partner_channels` (without it: as the images are).
    """

    def __init__(
        self,
        parts: Sequence[Images],
        chosen: Sequence[NDArray[np.int64]],
        partner: "ImageSet | None" = None,
        partner_channels: Literal[1, 3] | None = None,
    ) -> None:
        self.parts, pairs = list(parts), list(zip(parts, chosen, strict=True))
        self.which = np.repeat(np.arange(len(parts), dtype=np.int32), [len(c) for c in chosen])
        self.index = np.concatenate([np.asarray(c, dtype=np.int64) for c in chosen])
        self.names = [part.names[i] for part, c in pairs for i in c.tolist()]
        self.class_names = sorted_classes(name for part in parts for name in part.class_names)
        self.labels = np.concatenate([_renumbered(part.labels[c], part.class_names, self.class_names) for part, c in pairs])
        measures = np.concatenate([part.report.measures[c] for part, c in pairs])
        self.sides, self.times, self.decoders = measures[:, :2], measures[:, 2], measures[:, 3]
        self.partner = partner
        self.partner_channels: Literal[1, 3] | None = partner_channels
        if partner is not None:
            assert len(partner) == len(self.index)
            self.times, self.decoders = np.maximum(self.times, partner.times), np.maximum(self.decoders, partner.decoders)
        self._in_memory: tuple[Sides, Pixels, NDArray[np.int64]] | None = None  # of `prepare`: their size, pixels, index
        self.ready = False  # whether, once prepared, a batch is nothing but copies, so that loader workers would only cost time

    def __len__(self) -> int:
        return len(self.index)

    def locate(self, i: int) -> tuple[Images, int]:
        """The source of an image of this set, and its index there."""
        return self.parts[self.which[i]], int(self.index[i])

    @property
    def fingerprint(self) -> str:
        """The hash of what is in the set and in which order."""
        of_partner = [self.partner.fingerprint, str(self.partner_channels)] if self.partner is not None else []
        return digest(*(part.fingerprint for part in self.parts), self.which.tobytes(), self.index.tobytes(), *of_partner)

    @property
    def decoder(self) -> int:
        """The first version of the decoder that reads all of the images as today's does."""
        return int(self.decoders.max(initial=1))

    @property
    def state(self) -> str:
        """A hash of what may change while `fingerprint` does not: the times of the files, and the decoder that reads them.

        A cache on this machine remembers it, to know whether it was made of the files as they are now. What travels, or is
        compared when a run goes on, must not hold it: a bucket or an archive gives a file another time.
        """
        return digest(self.times.tobytes(), str(self.decoder))

    def contents(self, indices: Sequence[int]) -> str:
        """The hash of what these images are decoded from. One that cannot be read any more counts as empty."""

        def content_digest(i: int) -> bytes:
            part, index = self.locate(i)
            try:
                content = part.content(index)
            except (OSError, ValueError):
                content = b""
            return hashlib.sha256(content).digest()

        with ThreadPoolExecutor(8) as pool:
            digests = b"".join(pool.map(content_digest, indices))
        if self.partner is not None:
            digests += self.partner.contents(indices).encode()
        return hashlib.sha256(digests).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """How many images each class has."""
        counts = {name: int((self.labels == i).sum()) for i, name in enumerate(self.class_names)}
        unlabelled, key = int((self.labels < 0).sum()), "(no class)"
        while key in counts:  # a class may be called that
            key = f"({key})"
        return counts | ({key: unlabelled} if unlabelled else {})

    @property
    def endings(self) -> dict[str, int]:
        """How many images of folders have which ending: another version of the project may read other ones."""
        of_files = (name for name, which in zip(self.names, self.which, strict=True) if self.parts[which].named_by_files)
        return dict(sorted_by_count(Counter(Path(name).suffix.lower() for name in of_files)))

    def sequences(self) -> dict[str, int]:
        """{what they are: how many} of files that hold more than the one image that is taken. Opens every file."""

        def kind_of_sequence(i: int) -> str | None:
            part, index = self.locate(i)
            file = part.encoded(index)
            return formats.sequence_of(io.BytesIO(file) if isinstance(file, bytes) else file) if file is not None else None

        with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
            kinds = Counter(kind for kind in pool.map(kind_of_sequence, range(len(self))) if kind is not None)
        return dict(kinds.most_common())

    def prepare(self, spec: ImageConfig) -> None:
        """Bring small sets to the size of `spec` once, so that a batch of them, or of a packed file of that size, is a copy."""
        uniform, self._in_memory = self.parts[0].uniform if len(self.parts) == 1 else None, None
        if uniform is not None and uniform[0].shape[1:] == (*spec.sides, spec.channels):
            self._in_memory = spec.sides, *uniform
        elif uniform is not None and isinstance(self.parts[0], ArrayImages):
            pixels = np.stack([crop(image, spec.plain, np.full(3, 0.5)) for image in uniform[0]])
            self._in_memory = spec.sides, pixels, uniform[1]
        self.ready = self._in_memory is not None or all(part.is_decoded_at(spec.sides) for part in self.parts)
        if self.partner is not None:
            self.partner.prepare(self._of_partner(spec))
            self.ready = self.ready and self.partner.ready

    def _of_partner(self, spec: ImageConfig) -> ImageConfig:
        """What is read of the partners of images of this `spec`."""
        return replace(spec, channels=self.partner_channels or spec.channels)

    def batch(self, indices: NDArray[np.int64], spec: ImageConfig, u: NDArray[np.float64], *, partners: bool = False) -> Pixels:
        """(B, height, width, channels) uint8 of the images `indices` (B,), cut and flipped by the random numbers `u` (B, 3).
        With `partners` the channels of their partners follow, cut and flipped in the same way; a set without partners has
        none."""
        if partners and self.partner is not None and self._in_memory and self.partner._in_memory:
            both = (self, spec), (self.partner, self._of_partner(spec))
            return np.concatenate([images.batch(indices, each, u) for images, each in both], axis=3)
        if self._in_memory is None or self._in_memory[0] != spec.sides or (partners and self.partner is not None):
            return np.stack([self._load_cropped(int(i), spec, row, partners) for i, row in zip(indices, u, strict=True)])
        _, images, position = self._in_memory
        pixels = images[position[self.index[indices]]]
        if spec.flip:
            mirrored = u[:, 2] < 0.5
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        return pixels

    def _load(self, i: int, spec: ImageConfig, u: NDArray[np.float64], partners: bool) -> Pixels:
        """One image, with the channels of its partner."""
        part, index = self.locate(i)
        pixels = crop(part.load(index, channels=spec.channels, at_least=max(spec.sides)), spec, u)
        if not partners or self.partner is None:
            return pixels
        return np.concatenate([pixels, self.partner._load(i, self._of_partner(spec), u, False)], axis=2)

    def _load_cropped(self, i: int, spec: ImageConfig, u: NDArray[np.float64], partners: bool) -> Pixels:
        """One image. In the place of one that broke after the scan, or whose partner did, comes the next of its class, with a
        warning."""
        j = i
        for tries in range(1, 21):
            part, index = self.locate(j)
            try:
                return self._load(j, spec, u, partners)
            except Exception as error:
                line = f"warning: {part.names[index]!r} can no longer be read ({error}); the next one takes its place"
                print(line, flush=True)
                same_class = np.flatnonzero(self.labels == self.labels[i])
                j = int(same_class[(int(np.searchsorted(same_class, i)) + tries) % len(same_class)])
        raise UserError(f"twenty images in a row, from {self.names[i]!r} on, can no longer be read; is the disk gone?")

    def lowest(self, count: int) -> "ImageSet":
        """The `count` images whose names hash lowest, or all where there are no more. The classes keep their numbers."""
        subset = self.only(np.isin(np.arange(len(self)), lowest_names(self.names, count)))
        subset.rename_classes(self.class_names)
        return subset

    def rename_classes(self, class_names: Sequence[str]) -> None:
        """Give the labels the numbers of their classes in `class_names`, among which all of them are."""
        self.labels, self.class_names = _renumbered(self.labels, self.class_names, class_names), tuple(class_names)

    def without_partners(self) -> "ImageSet":
        """The same images alone."""
        images = copy.copy(self)
        images.partner = None
        return images

    def only(self, keep: NDArray[np.bool_]) -> "ImageSet":
        """The images where `keep` (N,) is true."""
        chosen = [self.index[(self.which == w) & keep] for w in range(len(self.parts))]
        partner = self.partner.only(keep) if self.partner is not None else None
        return ImageSet(self.parts, chosen, partner, self.partner_channels)


def _renumbered(labels: NDArray[np.int64], class_names: Sequence[str], new_names: Sequence[str]) -> NDArray[np.int64]:
    """Labels that count in `class_names` -> the same classes by their numbers in `new_names`; -1 stays."""
    number = {normal_form(name): i for i, name in enumerate(new_names)}
    return np.array([*(number[normal_form(name)] for name in class_names), -1], dtype=np.int64)[labels]


def lowest_names(names: Sequence[str], count: int) -> NDArray[np.int64]:
    """The indices, in order, of the `count` names that hash lowest. The hash is not the one that decides who is held out."""
    return np.array(sorted(sorted(range(len(names)), key=lambda i: (name_fraction(f"subset of {names[i]}"), i))[:count]))


def open_sources(sources: Source | Sequence[Source], *, among: Sequence[str] = ()) -> ImageSet:
    """Open one or several sources as one set; `subset` keeps the images whose names hash lowest.

    Where one folder of a source alone holds images and has the name of one of the classes `among`, they are of that class.
    """
    parts, chosen = [], []
    specs: Sequence[Any] = sources if isinstance(sources, Sequence) else [sources]
    for spec in specs:
        part = OPEN_FUNCTIONS[type(spec)](spec)
        name = find_spelling(among, part.only_folder) if part.only_folder is not None and not part.class_names else None
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
    data: Source | Sequence[Source] | ImageSet, held_out: Share | Source | Sequence[Source]
) -> tuple[ImageSet, ImageSet | None]:
    """The training images, and those held out: a share by the hash of the relative path or of a part of the name, or sources
    of their own."""
    images = data if isinstance(data, ImageSet) else open_sources(data)
    if not isinstance(held_out, Share):
        held_out_set = open_sources(held_out, among=images.class_names)
        known = {normal_form(name) for name in images.class_names}
        unknown = [name for name in held_out_set.class_names if normal_form(name) not in known]
        if unknown:
            raise UserError(f"held_out has classes that data lacks: {join_names(unknown)}")
        held_out_set.rename_classes(images.class_names)
        return images, held_out_set
    return hold_out(images, images.names, held_out, "images")


def open_given(dataset: Any, held_out: Any, image: ImageConfig) -> tuple[ImageSet, ImageSet | None]:
    """What `open_data` gives, of a data set that was handed in from Python; `read_dataset` says what its items are."""
    part = read_dataset(dataset, image.channels)
    return open_data(ImageSet([part], [np.arange(len(part))]), held_out)
