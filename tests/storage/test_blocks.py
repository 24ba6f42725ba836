"""Arrays and caches in blocks, on several ranks and after a kill; and folders that belong to one request."""

import json
from pathlib import Path

import numpy as np
import pytest

from src.config import UserError
from src.storage.blocks import (
    Block,
    Ranks,
    blocks_of,
    claim_folder,
    cut_blocks,
    in_blocks,
    is_of_request,
    make_blocks,
    make_cache,
    stage_folder,
    wait_for,
    write_block,
)
from src.storage.locks import take_lock


def test_blocks_cover_all_items_and_only_missing_ones_are_made(tmp_path: Path) -> None:
    blocks = cut_blocks(tmp_path, 7, 3, ".npz")
    assert [list(block.items) for block in blocks] == [[0, 1, 2], [3, 4, 5], [6]]
    (tmp_path / "block_00001.npz").touch()
    count_for_classes = []
    for rank in range(2):
        make_blocks(blocks, lambda block: count_for_classes.append(block.path.name), Ranks(rank, 2), doing="testing")
    assert count_for_classes == ["block_00000.npz", "block_00002.npz"]


def test_arrays_come_back_in_order_and_are_computed_once(tmp_path: Path) -> None:
    calls = list[range]()

    def make(items: range) -> dict[str, np.ndarray]:
        calls.append(items)
        return {"a": np.array(items), "b": -np.array(items)}

    for _ in range(2):
        arrays = in_blocks(tmp_path / "x", 5, 2, make, Ranks(), doing="testing")
        assert list(arrays) == ["a", "b"] and arrays["b"].tolist() == [0, -1, -2, -3, -4]
    assert len(calls) == 3 and in_blocks(tmp_path / "x", 5, 2, make, Ranks(), doing="testing", read=False) == {}


def test_a_file_that_never_comes_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone was not written; run the same command again"):
        wait_for([tmp_path / "gone"], seconds=0)


def test_a_cache_goes_on_where_it_was_and_has_a_manifest(tmp_path: Path) -> None:
    folder, contract = tmp_path / "cache", {"of": ["something", 1]}
    stopped = True

    def make(split: str, block: Block) -> None:
        if stopped and split == "b":
            raise KeyboardInterrupt
        write_block(block, np.full((len(block.items), 2), 1.0, np.float32), {"split": split})

    def build() -> None:
        counts = {"a": 300, "b": 1}

        def finish(staged: Path) -> dict[str, int]:
            return {"files": len(list(staged.rglob("*.npy")))}

        make_cache(folder, contract, counts, make, finish, Ranks(), name="cache", doing="testing")

    with pytest.raises(KeyboardInterrupt):
        build()
    first = tmp_path / "cache.partial" / "a" / "block_00000.npy"
    before, stopped = first.stat().st_mtime_ns, False
    build()
    assert (folder / "a" / first.name).stat().st_mtime_ns == before, "it is not made anew"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {**contract, "counts": {"a": 300, "b": 1}, "files": 3} and not (folder / "request.json").exists()
    blocks = blocks_of(folder, "a", 300)
    assert [json.loads(block.path.read_text()) for block in blocks] == [{"split": "a"}] * 2
    assert np.load(blocks[1].path.with_suffix(".npy")).shape == (44, 2)
    with pytest.raises(UserError, match="was made by another process meanwhile"):
        build()


def test_a_cache_that_another_process_makes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.storage.blocks.take_lock", lambda file: take_lock(file) and False)
    with pytest.raises(UserError, match="the cache .*x is being made by another process; wait for it"):
        make_cache(tmp_path / "x", {}, {"a": 1}, lambda *_: None, lambda _: {}, Ranks(), name="cache", doing="testing")


def test_a_mistake_on_the_way_leaves_no_half_of_a_cache(tmp_path: Path) -> None:
    def make(split: str, block: Block) -> None:
        raise UserError("not finite")

    with pytest.raises(UserError, match="not finite"):
        make_cache(tmp_path / "x", {}, {"a": 1}, make, lambda _: {}, Ranks(), name="cache", doing="testing")
    assert [path.name for path in tmp_path.iterdir()] == [".x.lock"]


def test_a_folder_belongs_to_one_request(tmp_path: Path) -> None:
    file = tmp_path / "out" / "request.json"
    claim_folder(file, {"seed": 0, "files": "f"}, Ranks(), holds="figures", newer_keys=["files"])
    assert file.read_text() == '{"seed": 0, "files": "f"}'
    claim_folder(file, {"seed": 1}, Ranks(), holds="figures")  # nothing came of the first one
    (file.parent / "a.npz").touch()
    claim_folder(file, {"seed": 1, "files": "f"}, Ranks(), holds="figures", newer_keys=["files"])
    with pytest.raises(UserError, match="out holds other figures; give another --out or remove it"):
        claim_folder(file, {"seed": 2}, Ranks(), holds="figures")
    assert not is_of_request(file, {"seed": 1}) and is_of_request(file, {"seed": 1}, without=["files"])
    file.write_text("[]")
    assert not is_of_request(file, {"seed": 1})


def test_what_was_staged_for_another_request_is_removed(tmp_path: Path) -> None:
    staged = tmp_path / "x.partial"
    assert not stage_folder(staged, {"size": (8, 8)})
    (staged / "part").touch()
    assert stage_folder(staged, {"size": (8, 8)}) and (staged / "part").exists()
    assert not stage_folder(staged, {"size": (4, 4)}) and not (staged / "part").exists()
