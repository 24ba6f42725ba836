"""Which images a step shows where all images of a step are of one bucket."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from src.runtime.order import BucketOrder, Interleaving

RNG = np.random.default_rng(0)
WHICH = RNG.permutation(np.repeat([0, 1, 2], [37, 5, 90]))
LABELS = np.where(RNG.random(132) < 0.3, 1, np.where(RNG.random(132) < 0.1, -1, 0))


def images_at(order: BucketOrder, step: int) -> np.ndarray:
    return order.images(*order.place(step))


def test_all_images_of_a_step_are_of_its_bucket_and_none_owes_a_batch() -> None:
    batch = 8
    order, shown = BucketOrder(WHICH, LABELS, 3, batch), Counter[int]()
    steps_of_an_epoch = [sum(int(epoch * n / batch) for n in (37, 5, 90)) for epoch in range(40)]
    for step in range(steps_of_an_epoch[-1]):
        bucket, images = order.place(step)[0], images_at(order, step)
        assert images.shape == (batch,) and set(WHICH[images]) == {bucket}
        shown[bucket] += batch
        if step + 1 in steps_of_an_epoch:
            epoch = len(steps_of_an_epoch) - 1 - steps_of_an_epoch[::-1].index(step + 1)
            for b, count in enumerate((37, 5, 90)):
                assert 0 <= epoch * count - shown[b] < batch


def test_a_pass_through_a_bucket_shows_each_of_its_images_once() -> None:
    order = BucketOrder(WHICH, LABELS, 3, 5)
    streams: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(400):
        streams[order.place(step)[0]] += images_at(order, step).tolist()
    for bucket, images in streams.items():
        members = np.flatnonzero(bucket == WHICH).tolist()
        passes = [images[i : i + len(members)] for i in range(0, len(images) - len(members), len(members))]
        assert len(passes) > 5 and all(sorted(each) == members for each in passes)
        assert passes[0] != passes[1]  # shuffled anew


def test_any_step_is_found_without_those_before_it() -> None:
    whole = BucketOrder(WHICH, LABELS, 7, 8)
    walked = [images_at(whole, step).tolist() for step in range(300)]
    for step in (299, 0, 17, 143, 144):
        assert images_at(BucketOrder(WHICH, LABELS, 7, 8), step).tolist() == walked[step]
    assert images_at(BucketOrder(WHICH, LABELS, 8, 8), 17).tolist() != walked[17]


@pytest.mark.parametrize("batch", [4, 64])  # more images than the smallest bucket has, too
def test_balanced_classes_are_shown_alike(batch: int) -> None:
    order, shown, of_bucket = BucketOrder(WHICH, LABELS, 3, batch, balanced=True), Counter[int](), Counter[tuple[int, int]]()
    for step in range(6000 // batch * 4):
        images = images_at(order, step)
        assert len({*WHICH[images]}) == 1
        shown.update(LABELS[images].tolist())
        of_bucket.update(zip(WHICH[images].tolist(), LABELS[images].tolist(), strict=True))
    total = sum(shown.values())
    assert all(abs(count / total - 1 / 3) < 0.01 for count in shown.values()) and len(shown) == 3
    for (bucket, label), count in of_bucket.items():  # in proportion to n_bc / n_c
        in_both, of_class = ((bucket == WHICH) & (label == LABELS)).sum(), (label == LABELS).sum()
        assert abs(count / total - in_both / of_class / 3) < 0.01


def test_kinds_are_interleaved_by_their_rates() -> None:
    kinds, numbers = Interleaving([Fraction(1, 3), Fraction(5, 2)], 0, "test")(range(170))
    assert Counter(kinds.tolist()) == {0: 20, 1: 150}  # 60 rounds: 20 + 150
    for kind in (0, 1):
        assert sorted(numbers[kinds == kind]) == list(range((kinds == kind).sum()))
    part = Interleaving([Fraction(1, 3), Fraction(5, 2)], 0, "test")(range(101, 133))
    assert (part[0] == kinds[101:133]).all() and (part[1] == numbers[101:133]).all()
