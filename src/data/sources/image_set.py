"""The images of one or several sources, selected and in a fixed order: what training reads."""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ...config import UserError
from .. import formats
from ..names import count_endings, normal_form, sorted_classes
from ..transforms import ImageConfig, Pixels, square
from .images import ArrayImages, Images, digest, name_fraction


class ImageSet:
    """The images `chosen[i]` (indices) of each source `parts[i]`.

    `labels` (N,) are indices into `class_names`, -1 for none; `names` are relative paths. Image k of the set is image
    `index[k]` of the source `parts[which[k]]`.
    """

    def __init__(self, parts: Sequence[Images], chosen: Sequence[NDArray[np.int64]]) -> None:
        self.parts = list(parts)
        self.which = np.concatenate([np.full(len(c), i, dtype=np.int32) for i, c in enumerate(chosen)])
        self.index = np.concatenate([np.asarray(c, dtype=np.int64) for c in chosen])
        self.class_names = sorted_classes(name for part in parts for name in part.class_names)
        pairs = zip(parts, chosen, strict=True)
        self.labels = np.concatenate([_renumbered(part.labels[c], part.class_names, self.class_names) for part, c in pairs])
        self._in_memory: tuple[Pixels, NDArray[np.int64]] | None = None
        self.ready = False  # whether, once prepared, a batch is nothing but copies, so that loader workers would only cost time

    def __len__(self) -> int:
        return len(self.index)

    def _locations(self) -> Iterator[tuple[Images, int]]:
        """(source, index in it) of each image."""
        for which, index in zip(self.which.tolist(), self.index.tolist(), strict=True):
            yield self.parts[which], index

    @property
    def names(self) -> list[str]:
        return [part.names[i] for part, i in self._locations()]

    @property
    def fingerprint(self) -> str:
        """The hash of what is in the set and in which order."""
        return digest(*(part.fingerprint for part in self.parts), self.which.tobytes(), self.index.tobytes())

    def _gather(self, measure: str) -> NDArray[np.int64]:
        """(N, ...): a measure of the scan reports of the sources, for the images of this set."""
        values = [getattr(part.report, measure) for part in self.parts]
        gathered = np.zeros((len(self), *values[0].shape[1:]), np.int64)
        for number, value in enumerate(values):
            in_part = self.which == number
            gathered[in_part] = value[self.index[in_part]]
        return gathered

    @property
    def sides(self) -> NDArray[np.int64]:
        """(N, 2): the width and the height of each image, as its file has it; -1 where that is not known."""
        return self._gather("sides")

    @property
    def times(self) -> NDArray[np.int64]:
        """(N,): when the file of each image was modified, in nanoseconds; 0 where the fingerprint changes with the content."""
        return self._gather("times")

    @property
    def decoders(self) -> NDArray[np.int64]:
        """(N,): the first version of the decoder that reads each image as today's does."""
        return self._gather("decoders")

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
            try:
                content = self.parts[self.which[i]].content(int(self.index[i]))
            except (OSError, ValueError):
                content = b""
            return hashlib.sha256(content).digest()

        with ThreadPoolExecutor(8) as pool:
            return hashlib.sha256(b"".join(pool.map(content_digest, indices))).hexdigest()

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
        return count_endings(part.names[i] for part, i in self._locations() if part.named_by_files)

    def sequences(self) -> dict[str, int]:
        """{what they are: how many} of files that hold more than the one image that is taken. Opens every file."""

        def kind_of_sequence(location: tuple[Images, int]) -> str | None:
            file = location[0].encoded(location[1])
            return formats.sequence_of(io.BytesIO(file) if isinstance(file, bytes) else file) if file is not None else None

        with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
            kinds = Counter(kind for kind in pool.map(kind_of_sequence, self._locations()) if kind is not None)
        return dict(kinds.most_common())

    def prepare(self, spec: ImageConfig) -> None:
        """Bring small sets to the size of `spec` once, so that a batch of them, or of a packed file of that size, is a copy."""
        uniform = self.parts[0].uniform if len(self.parts) == 1 else None
        if uniform is not None and uniform[0].shape[1:] == (spec.size, spec.size, spec.channels):
            self._in_memory = uniform
        elif uniform is not None and isinstance(self.parts[0], ArrayImages):
            centered = ImageConfig(size=spec.size, channels=spec.channels)
            self._in_memory = np.stack([square(image, centered, np.full(3, 0.5)) for image in uniform[0]]), uniform[1]
        self.ready = self._in_memory is not None or all(part.is_decoded_at(spec.size) for part in self.parts)

    def batch(self, indices: NDArray[np.int64], spec: ImageConfig, u: NDArray[np.float64]) -> Pixels:
        """(B, size, size, channels) uint8 of the images `indices` (B,), cut and flipped by the random numbers `u` (B, 3)."""
        if self._in_memory is not None:
            images, position = self._in_memory
            pixels = images[position[self.index[indices]]]
            if spec.flip:
                mirrored = u[:, 2] < 0.5
                pixels[mirrored] = pixels[mirrored, :, ::-1]
            return pixels
        return np.stack([self._load_square(int(i), spec, row) for i, row in zip(indices, u, strict=True)])

    def _load_square(self, i: int, spec: ImageConfig, u: NDArray[np.float64]) -> Pixels:
        """One image. In the place of one that broke after the scan comes the next of its class, with a warning."""
        j = i
        for tries in range(1, 21):
            part, index = self.parts[self.which[j]], int(self.index[j])
            try:
                return square(part.load(index, channels=spec.channels, at_least=spec.size), spec, u)
            except Exception as error:
                print(
                    f"warning: {part.names[index]!r} can no longer be read ({error}); the next one takes its place", flush=True
                )
                same_class = np.flatnonzero(self.labels == self.labels[i])
                j = int(same_class[(int(np.searchsorted(same_class, i)) + tries) % len(same_class)])
        raise UserError(f"twenty images in a row, from {self.names[i]!r} on, can no longer be read; is the disk gone?")

    def lowest(self, count: int) -> "ImageSet":
        """The `count` images whose names hash lowest, or all where there are no more. The classes keep their numbers."""
        keep = np.zeros(len(self), dtype=np.bool_)
        keep[lowest_names(self.names, count)] = True
        subset = self.only(keep)
        subset.rename_classes(self.class_names)
        return subset

    def rename_classes(self, class_names: Sequence[str]) -> None:
        """Give the labels the numbers of their classes in `class_names`, among which all of them are."""
        self.labels, self.class_names = _renumbered(self.labels, self.class_names, class_names), tuple(class_names)

    def only(self, keep: NDArray[np.bool_]) -> "ImageSet":
        """The images where `keep` (N,) is true."""
        return ImageSet(self.parts, [self.index[(self.which == w) & keep] for w in range(len(self.parts))])


def _renumbered(labels: NDArray[np.int64], class_names: Sequence[str], new_names: Sequence[str]) -> NDArray[np.int64]:
    """Labels that count in `class_names` -> the same classes by their numbers in `new_names`; -1 stays."""
    number = {normal_form(name): i for i, name in enumerate(new_names)}
    return np.array([*(number[normal_form(name)] for name in class_names), -1], dtype=np.int64)[labels]


def lowest_names(names: Sequence[str], count: int) -> NDArray[np.int64]:
    """The indices, in order, of the `count` names that hash lowest. The hash is not the one that decides who is held out."""
    return np.array(sorted(sorted(range(len(names)), key=lambda i: (name_fraction(f"subset of {names[i]}"), i))[:count]))
