"""Batches dealt to ranks, and the folders that images are drawn into."""

from pathlib import Path

import pytest

from src.config import UserError
from src.sampling.files import claim, deal_batches, in_batches, remove_if_empty
from src.storage.blocks import Ranks


def test_batches_are_slices_of_the_items() -> None:
    assert in_batches(range(2, 9), 3) == [range(2, 5), range(5, 8), range(8, 9)]
    assert in_batches(["a", "b"], 5) == [["a", "b"]] and in_batches(range(0), 5) == []


def test_each_batch_is_dealt_to_one_rank() -> None:
    count_for_classes = [list(deal_batches(range(10), 3, Ranks(rank, 2), "drawing")) for rank in (0, 1)]
    assert count_for_classes == [[range(3), range(6, 9)], [range(3, 6), range(9, 10)]]


def test_a_folder_belongs_to_one_request(tmp_path: Path) -> None:
    claim(tmp_path / "out", {"seed": 1}, {"path": "here"})
    (tmp_path / "out" / "00000.png.part").touch()
    claim(tmp_path / "out", {"seed": 1}, {"path": "moved since"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metadata.json"], "half a file is removed"
    with pytest.raises(UserError, match="out holds other frames; give another --out"):
        claim(tmp_path / "out", {"seed": 2}, what="frames")


@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_without_images_does_not_stay(begun: bool, tmp_path: Path) -> None:
    def draw() -> None:
        with remove_if_empty(tmp_path / "out"):
            claim(tmp_path / "out", {"seed": 1})
            if begun:
                (tmp_path / "out" / "00000.png").touch()
            raise UserError("not finite")

    with pytest.raises(UserError, match="not finite"):
        draw()
    assert (tmp_path / "out").exists() == begun
