"""The parts of README cards, names of modules, and errors with a prefix."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from src.config import UserError, prefix_errors
from src.interop.cards import colours, in_pixels, in_python, millions, render_card
from src.interop.names import multiple, state_under
from src.models.layers import Attention

NORM = partial(nn.GroupNorm, 2)


def test_words_of_the_cards() -> None:
    assert (colours(1), colours(3)) == ("grey", "RGB")
    assert (in_pixels((512, 256)), in_pixels(None)) == ("256 px and 512 px", "")
    assert millions(nn.Linear(999, 1000)) == "1.0 M parameters"
    text = 'my "best" \\ one\n'
    assert eval(f'"{in_python(text)}"') == text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, ""),
        ({"images": 40}, "Data: the run learned from 40 images."),
        ({"images": 40, "held_out_images": 4}, "Data: the run learned from 40 images; 4 more images are held out."),
        ({"imported": []}, "Data: the weights were imported, and nothing is known of what they learned from."),
        ({"class_names": ["cat", "a\nb"], "counts": {"cat": 30}}, "Classes: 0 cat (30 images), 1 a\\nb."),
    ],
)
def test_a_card_says_what_is_known_of_the_data(data: dict[str, Any], expected: str) -> None:
    assert render_card("data", data=data) == f"{expected}\n"


def test_a_card_lists_the_statistics_of_latents() -> None:
    facts = SimpleNamespace(mean=[0.5, 1 / 3], std=[1.0, 2.0], low=[-1, -2], high=[1, 2])
    rows = render_card("latents", facts=facts).splitlines()[-2:]
    assert rows == ["| 0 | 0.5 | 1 | -1 | 1 |", "| 1 | 0.333333 | 2 | -2 | 2 |"]


def test_a_multiple_gives_the_width_when_it_is_rounded_down() -> None:
    for base in (48, 56, 96):
        assert all(int(base * multiple(base, width)) == width for width in range(8, 1000, 8))


@pytest.mark.parametrize("split_qkv_first", [True, False])
def test_the_parts_of_an_attention_have_one_layout(split_qkv_first: bool) -> None:
    network = nn.ModuleDict({"a": Attention(8, kind="full", heads=2, split_qkv_first=split_qkv_first, norm=NORM)})
    weight = torch.arange(24.0)[:, None].expand(24, 8)
    with torch.no_grad():
        network["a"].qkv.weight.copy_(weight)
    names = {"a.norm": "b.group_norm", "a.qkv": "b.qkv", "a.out": "b.to_out.0"}
    state = state_under(names, network)
    assert {name.rpartition(".")[0] for name in state} == {"b.group_norm", "b.to_q", "b.to_k", "b.to_v", "b.to_out.0"}
    rows = state["b.to_k.weight"][:, 0].tolist()
    assert rows == ([8, 9, 10, 11, 12, 13, 14, 15] if split_qkv_first else [4, 5, 6, 7, 16, 17, 18, 19])


def test_an_error_gets_a_prefix() -> None:
    def fail(error: type[Exception]) -> Callable[[], None]:
        with prefix_errors("a.json"):
            raise error("is empty")

    with pytest.raises(UserError, match=r"^a\.json: is empty$"):
        fail(UserError)
    with pytest.raises(OSError, match=r"^is empty$"):
        fail(OSError)
