"""Which images a step shows: a function of (seed, step), so that a run goes on wherever it stands."""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .seeds import generator


class Order:
    """Which image is at a position: each epoch is a shuffle of all images, or, balanced, has as many of each class."""

    def __init__(self, labels: NDArray[np.int64], seed: int, *, balanced: bool) -> None:
        self.count, self.labels, self.seed, self.balanced = len(labels), labels, seed, balanced
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            rng = generator(self.seed, "order", epoch)
            self._epochs[epoch] = self._balanced(rng) if self.balanced else rng.permutation(self.count)
        return self._epochs[epoch]

    def _balanced(self, rng: np.random.Generator) -> NDArray[np.int64]:
        classes = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        each = -(-self.count // len(classes))
        rounds = [[rng.permutation(members) for _ in range(-(-each // len(members)))] for members in classes]
        shuffles = [np.concatenate(of_class)[:each] for of_class in rounds]
        return rng.permutation(np.concatenate(shuffles))[: self.count]

    def __call__(self, positions: range) -> NDArray[np.int64]:
        firsts = range(positions.start // self.count * self.count, positions.stop, self.count)  # positions of the epochs
        parts = [self._epoch(i // self.count)[max(0, positions.start - i) : positions.stop - i] for i in firsts]
        return np.concatenate(parts).astype(np.int64)


class Interleaving:
    """An endless sequence of kinds in which kind k stands `rates[k]` times a round: of round r, floor((r + 1) rate) -
    floor(r rate) times, so that it is never a whole one behind; the order within a round is shuffled by (seed, key, r)."""

    def __init__(self, rates: Sequence[Fraction], seed: int, key: str) -> None:
        self.rates, self.seed, self.key = rates, seed, key
        self._round = lru_cache(maxsize=2)(self._shuffled)

    def _before(self, round_number: int) -> list[int]:
        """How often each kind stands before a round."""
        return [int(round_number * rate) for rate in self.rates]

    def _shuffled(self, round_number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The kinds of a round in their order, and the how manieth of its kind each of them is."""
        before, after = np.array(self._before(round_number)), np.array(self._before(round_number + 1))
        kinds = generator(self.seed, self.key, round_number).permutation(np.repeat(np.arange(len(before)), after - before))
        numbers = np.empty(len(kinds), np.int64)
        for kind in range(len(before)):
            numbers[kinds == kind] = np.arange(before[kind], after[kind])
        return kinds, numbers

    def _round_at(self, position: int) -> int:
        kinds, size = len(self.rates), sum(self.rates)
        first = int(position / size)  # a kind is less than one behind its rate, so the round is this one or a little later
        rounds = range(first, first + 3 + int(kinds / size))
        return rounds[bisect_right(rounds, position, key=lambda number: sum(self._before(number))) - 1]

    def __call__(self, positions: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The kinds at these positions, and how often each stood before: (len(positions),) each."""
        round_number, parts = self._round_at(positions.start), list[tuple[NDArray[np.int64], NDArray[np.int64]]]()
        first = sum(self._before(round_number))
        while first < positions.stop:
            kinds, numbers = self._round(round_number)
            part = slice(max(0, positions.start - first), positions.stop - first)
            parts.append((kinds[part], numbers[part]))
            first, round_number = first + len(kinds), round_number + 1
        kinds, numbers = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return kinds, numbers


class BucketOrder:
    """Which images a step shows where they are in several buckets: all of a step are of one.

    Bucket b with n_b images is an endless stream, and epoch e has floor((e + 1) n_b / B) - floor(e n_b / B) of its batches of
    B images. So a step is found without those before it, and no bucket is ever behind by as many as B images. `balanced`
    counts n_b = (N / C) sum over classes c of n_bc / n_c in place of its images, and draws the classes within a bucket in
    proportion to n_bc / n_c.
    """

    def __init__(
        self, which: NDArray[np.int64], labels: NDArray[np.int64], seed: int, batch: int, *, balanced: bool = False
    ) -> None:
        self.batch, count = batch, int(which.max()) + 1
        classes, numbers = np.unique(labels, return_inverse=True)
        table = np.zeros((count, len(classes)), np.int64)  # n_bc
        np.add.at(table, (which, numbers), 1)
        shares = [[Fraction(int(n), int(total)) for n, total in zip(row, table.sum(0), strict=True)] for row in table]
        each = Fraction(len(which), len(classes))
        sizes = [each * sum(row) for row in shares] if balanced else [Fraction(int(n)) for n in table.sum(1)]
        self._buckets = Interleaving([size / batch for size in sizes], seed, "buckets")
        self._streams = list[_Stream]()
        for bucket in range(count):
            groups = [np.flatnonzero((which == bucket) & (numbers == c)) for c in range(len(classes))] if balanced else []
            groups = groups or [np.flatnonzero(which == bucket)]
            weights = shares[bucket] if balanced else [Fraction(1)]
            members = [(group, weight) for group, weight in zip(groups, weights, strict=True) if len(group)]
            self._streams.append(_Stream(members, seed, f"bucket {bucket}"))

    def place(self, step: int) -> tuple[int, int]:
        """The bucket of a step, counted from the start of a stage, and how many steps before it were of this bucket."""
        (bucket,), (number,) = self._buckets(range(step, step + 1))
        return int(bucket), int(number)

    def images(self, bucket: int, number: int) -> NDArray[np.int64]:
        """The images (B,) of a batch of a bucket, counted from 0."""
        return self._streams[bucket](range(number * self.batch, (number + 1) * self.batch))


class _Stream:
    """The endless stream of one bucket: groups of images, each shuffled anew in every pass through it, which stand in
    proportion to their weights."""

    def __init__(self, groups: Sequence[tuple[NDArray[np.int64], Fraction]], seed: int, key: str) -> None:
        self._groups, total = [group for group, _ in groups], sum(len(group) for group, _ in groups)
        rates = [total * weight / sum(weight for _, weight in groups) for _, weight in groups]
        self._kinds = Interleaving(rates, seed, f"{key} classes") if len(groups) > 1 else None
        self._passes = [
            lru_cache(maxsize=2)(_shuffles(group, seed, f"{key} group {g}")) for g, group in enumerate(self._groups)
        ]

    def __call__(self, positions: range) -> NDArray[np.int64]:
        numbers = np.arange(positions.start, positions.stop)
        groups, numbers = self._kinds(positions) if self._kinds is not None else (np.zeros_like(numbers), numbers)
        images = np.empty(len(positions), np.int64)
        for g in np.unique(groups).tolist():
            passes, places = np.divmod(numbers[groups == g], len(self._groups[g]))
            images[groups == g] = [self._passes[g](int(number))[i] for number, i in zip(passes, places, strict=True)]
        return images


def _shuffles(group: NDArray[np.int64], seed: int, key: str):
    """A function of the number of a pass: the images of the group in the order of that pass."""
    return lambda pass_number: generator(seed, key, pass_number).permutation(group)
