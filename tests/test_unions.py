"""Fields whose values are an open list: what is registered after the config classes is accepted, too."""

import json
from dataclasses import replace
from typing import Annotated, Literal

import pytest

from src.config import (
    NameIn,
    OpenUnion,
    UserError,
    config,
    differences,
    dump,
    json_schema,
    renamed_field,
    resumable_field,
    validate,
)
from src.diffusion import ProcessConfig

COLOURS = {"red": 1, "blue": 2}
SHAPES = OpenUnion("kind", default="circle")


@config
class Shape:
    kind: str


@SHAPES.add
@config
class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


@SHAPES.add
@config
class Polygon(Shape):
    kind: Literal["polygon"] = "polygon"
    corners: tuple[int, ...] = (0, 1, 2)
    smooth: bool = resumable_field(False)


@config
class Drawing:
    colour: Annotated[str, NameIn(COLOURS)] = "red"
    shape: Annotated[Shape, SHAPES] = renamed_field("radius", Circle(), new_value=lambda radius: {"radius": radius})
    shapes: tuple[Annotated[Shape, SHAPES], ...] = ()


def test_a_name_that_is_registered_later_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("gren", 3):
        with pytest.raises(UserError, match=f"colour: {word!r} is not known; allowed: 'red' or 'blue'"):
            validate(Drawing, {"colour": word})
    monkeypatch.setitem(COLOURS, "green", 3)
    assert validate(Drawing, {"colour": "green"}).colour == Drawing(colour="green").colour == "green"
    with pytest.raises(UserError, match=r"allowed: 'red', 'blue' or 'green'; did you mean 'green'\?; a colour of your own"):
        validate(Drawing, {"colour": "gren"})
    assert json.loads(json_schema(Drawing))["properties"]["colour"]["enum"] == ["red", "blue", "green"]


def test_a_kind_that_is_registered_later_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SHAPES, "members", list(SHAPES.members))
    with pytest.raises(UserError, match=r"shape.kind: 'star' is not known.*Allowed: 'circle', 'polygon'; a kind of your own"):
        validate(Drawing, {"shape": {"kind": "star"}})

    @SHAPES.add
    @config
    class Star(Shape):
        """With points."""

        kind: Literal["star"] = "star"
        points: int = 5

    drawing = validate(Drawing, {"shape": {"kind": "star"}, "shapes": [{"kind": "star", "points": 6}, {}]})
    assert drawing == Drawing(shape=Star(), shapes=(Star(points=6), Circle()))
    assert validate(Drawing, dump(drawing)) == drawing
    assert json.loads(json_schema(Drawing))["$defs"]["Star"]["description"] == "With points."


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"shape": {"radius": "big"}}, r"shape\.radius: input should be a valid number, not 'big'"),
        ({"shape": {"kind": "polygon", "corner": []}}, r"shape\.corner: unknown key; did you mean 'corners'"),
        ({"shape": {"kind": "polygon", "corner": []}}, "allowed here: corners, kind, smooth$"),
        ({"shapes": [{}, {"kind": "polygon", "corners": [1.5]}]}, r"shapes\.1\.corners\.0: "),
        ({"shape": {"kind": "polygn"}}, r"'polygn' is not known; did you mean 'polygon'\?"),
    ],
)
def test_mistakes_inside_name_their_place(raw: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Drawing, raw)


def test_a_closed_list_has_only_what_it_says() -> None:
    with pytest.raises(UserError, match=r"schedule\.kind: 'mine' is not known; .* 'blend'$"):
        validate(ProcessConfig, {"schedule": {"kind": "mine"}, "target": "eps"})


def test_old_values_and_differences_reach_the_members() -> None:
    assert validate(Drawing, {"radius": 3}).shape == Circle(radius=3.0)
    before = Drawing(shape=Polygon())
    after = replace(before, shape=Polygon(smooth=True, corners=(1, 2, 3)))
    assert differences(Drawing, dump(before), dump(after)) == (["shape.smooth"], ["shape.corners"])


def test_what_cannot_be_told_apart_is_refused_where_it_is_registered() -> None:
    @config
    class Disc(Shape):
        kind: Literal["circle"] = "circle"

    @config
    class Nameless(Shape):
        size: int = 1

    class NoConfig(Shape):
        kind: Literal["plain"] = "plain"

    with pytest.raises(ValueError, match=r"Disc: kind circle \(Circle\) is registered already"):
        SHAPES.add(Disc)
    for cls in (Nameless, NoConfig):
        with pytest.raises(TypeError, match=f"{cls.__name__} needs @config below this decorator, and a field such as kind"):
            SHAPES.add(cls)
    assert SHAPES.classes == [Circle, Polygon]
