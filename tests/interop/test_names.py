"""State dicts under other names: what is renamed and reshaped, and what is said where it does not fit."""

import json
from pathlib import Path

import pytest
import torch

from src.config import UserError
from src.interop.names import list_origins, size_of
from src.runs.diffusers_autoencoder import fit_state, names_inside
from src.runs.folders import finished, read_if_there, refuse
from src.runtime.checkpoint import write_folder
from src.storage.networks import list_differences


def test_the_names_inside_a_module() -> None:
    names = names_inside({"a": "b.0"}, {"norm": "group_norm"})
    assert names == {"a": "b.0", "a.norm": "b.0.group_norm"}
    assert names_inside({"mid": "x"})["mid.out"] == "x.to_out.0", "diffusers' by default"


def test_a_state_is_reshaped_where_only_ones_differ() -> None:
    wanted = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    fitted = fit_state({"a": torch.ones(2, 3, 1, 1), "b": torch.ones(2)}, wanted, "x.pt")
    assert list(fitted) == ["a", "b"] and fitted["a"].shape == (2, 3)
    for state, fault in (
        ({"b": torch.ones(2), "c": torch.ones(2)}, r"^x\.pt: it lacks a; it has in excess c$"),
        ({"a": torch.ones(3, 2), "b": torch.ones(2)}, r"^x\.pt: a is \(3, 2\), this network wants \(2, 3\)$"),
    ):
        with pytest.raises(UserError, match=fault):
            fit_state(state, wanted, "x.pt")


def test_differences_in_words() -> None:
    assert list_differences([], []) == []
    assert list_differences("gfedcba", ["z"]) == ["it lacks a, b, c, d, e and 2 more", "it has in excess z"]


def test_the_size_of_a_tensor_by_its_name() -> None:
    assert size_of({"a": (4, 3)}, "a", 1) == 3
    for name, axis in (("a", 2), ("b", 0)):
        with pytest.raises(UserError, match=f"of another architecture: it lacks {name}$"):
            size_of({"a": (4, 3)}, name, axis)


def test_facts_are_listed_by_their_origin() -> None:
    facts = {"from a": {"widths": [8, 16], "classes": None}, "from b": {}, "from c": {"bias": False}}
    assert list_origins(facts) == ["from a: widths 8/16, classes none", "from c: bias False"]


def test_the_first_reason_that_applies_is_given() -> None:
    refuse("a", {"is fine": False, "holds nothing": []})
    with pytest.raises(UserError, match="^a is small$"):
        refuse("a", {"is fine": False, "is small": 1, "is odd": True})


def test_json_that_may_be_missing(tmp_path: Path) -> None:
    assert read_if_there(tmp_path / "a.json") == {}
    (tmp_path / "a.json").write_text(json.dumps({"b": 1}))
    assert read_if_there(tmp_path / "a.json") == {"b": 1}


def test_a_final_folder_counts_where_no_checkpoint_is_ahead_of_it(tmp_path: Path) -> None:
    assert finished(tmp_path, None) is None
    for name, step in (("final", 5), ("behind", 5), ("ahead", 6)):
        write_folder(tmp_path / name, {"ema": {"a": torch.ones(1)}}, {"progress": {"step": step}})
    final = tmp_path / "final"
    assert finished(tmp_path, None) == finished(tmp_path, tmp_path / "behind") == final
    assert finished(tmp_path, tmp_path / "ahead") is None
    (final / "ema.safetensors").write_bytes(b"cut")
    assert finished(tmp_path, None) is None
