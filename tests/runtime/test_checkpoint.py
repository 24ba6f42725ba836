"""A folder of weights is whole or refused, and its weights have a hash that their order does not change."""

from pathlib import Path

import pytest
import torch

from src.config import UserError
from src.runtime.checkpoint import check_whole, contents, digest_of, verify_checkpoint, write_folder


def test_a_folder_is_read_as_it_was_written_and_refused_when_it_is_damaged(tmp_path: Path) -> None:
    folder, weights = tmp_path / "final", {"w": torch.arange(4.0)}
    write_folder(folder, {"ema": weights}, {"progress": {"step": 3}}, readme="# a network\n")
    check_whole(folder)
    (folder / "README.md").write_text("another text")
    check_whole(folder)
    (folder / "README.md").unlink()
    tensors, documents = contents(folder)
    assert torch.equal(tensors["ema"]["w"], weights["w"]) and documents == {"progress": {"step": 3}}
    (folder / "progress.json").write_text("{}")
    assert verify_checkpoint(folder) == "progress.json has 2 bytes instead of 15"
    with pytest.raises(UserError, match="final is damaged: progress.json has 2 bytes"):
        check_whole(folder)


def test_the_hash_of_weights_is_that_of_their_values() -> None:
    one, other = torch.arange(3.0), torch.ones(2)
    assert digest_of({"a": one, "b": other}) == digest_of({"b": other, "a": one}) != digest_of({"a": one, "b": other + 1})
