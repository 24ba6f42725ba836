"""Frozen, strict dataclasses that hold a config, and the kinds of fields that they have."""

import functools
import json
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import ConfigDict, Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import CoreSchema, PydanticCustomError, PydanticUndefined, core_schema

T = TypeVar("T")
C = TypeVar("C", bound=type)
NewValue = Callable[[Any], Any]  # from the value of older versions to today's JSON


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Decorator: a frozen dataclass validated by pydantic; unknown keys, wrong types and infinities are errors."""
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic_dataclass(frozen=True, kw_only=True, config=strict)(cls)  # pyright: ignore[reportReturnType]


def config_error(message: str) -> PydanticCustomError:
    """The error that a validator of a config raises: `message` appears after the JSON path, as it is."""
    return PydanticCustomError("config", "{message}", {"message": message})


def json_schema(root: type) -> str:
    """The JSON Schema of a root config, as text, for editors."""
    schema = TypeAdapter(root).json_schema()
    schema["properties"]["$schema"] = {"type": "string"}
    return json.dumps(schema, indent=1) + "\n"


def resumable_field(default: Any = PydanticUndefined, **constraints: Any) -> Any:
    """A field that may change when a run is resumed, because no step's result depends on it."""
    return Field(default, json_schema_extra={"free": True}, **constraints)


class OldName(str):
    """The name that a field had in older versions; `new_value` turns the value of then into today's."""

    new_value: NewValue


def renamed_field(
    old_name: str,
    default: Any = PydanticUndefined,
    *,
    new_value: Callable[[Any], Any] = lambda value: value,
    **constraints: Any,
) -> Any:
    """A field that had another name in older versions: configs, runs and `--set` that say `old_name` are still read. Where the
    value was written in another way, too, `new_value` gives today's JSON for it."""
    name = OldName(old_name)
    name.new_value = new_value
    return Field(default, json_schema_extra={"old_name": name}, **constraints)


# ---------------------------------------------------------------------------------------------- lengths of runs and cadences


def kind_of(value: Any) -> str:
    """object, list or plain: what discriminates a union of configs and plain values."""
    if isinstance(value, list | tuple):
        return "list"
    return "plain" if value is None or isinstance(value, bool | int | float | str) else "object"


@config
class Span:
    """A length given in exactly one unit: `{"steps": 100}`, `{"epochs": 1}` or `{"images": 50000}`."""

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    images: int | None = Field(None, gt=0)

    @pydantic.model_validator(mode="after")
    def _one_unit(self) -> "Span":
        if (self.steps, self.epochs, self.images).count(None) != 2:
            raise config_error("give exactly one of steps, epochs, images")
        return self


Length = Annotated[Annotated[int, Field(gt=0), Tag("plain")] | Annotated[Span, Tag("object")], Discriminator(kind_of)]
ENDLESS = 10**15  # steps of a run without end


def to_steps(length: int | Span, *, batch_size: int, num_images: int) -> int:
    """Optimiser steps in `length`: a number is steps already; epochs and images are rounded up, to at least 1.

    `batch_size` is images per step, `num_images` those in one epoch.
    """
    if isinstance(length, int):
        return length
    if length.steps is not None:
        return length.steps
    images = length.images if length.images is not None else typing.cast(float, length.epochs) * num_images
    return max(1, -int(-images // batch_size))


# ---------------------------------------------------------------------------------------------- open lists
# Whatever is registered before a config is loaded is accepted there.


class NameIn:
    """Annotation of a field that holds a key of `known`: Annotated[str, NameIn(SOLVERS)]."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = known

    def _check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.known:
            *first, last = (repr(name) for name in self.known)
            expected = f"{', '.join(first)} or {last}" if first else last
            raise PydanticCustomError("literal_error", "input should be {expected}", {"expected": expected, "is_open": True})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.known), "type": "string"}


@functools.cache
def _adapter(key: str, *classes: type) -> TypeAdapter[Any]:
    """pydantic's union of some classes."""
    union: Any = Annotated[typing.Union[tuple(classes)], Field(discriminator=key)]  # noqa: UP007
    return TypeAdapter(union)


class OpenUnion:
    """Annotation of a field that holds one of the registered config classes: Annotated[Weighting, OpenUnion("kind")].

    The field `key` of each class, a Literal, says which one a JSON object is; without the key it is the class that has the
    word `default` there. `members` are classes, or unions whose classes belong to this one, too.
    """

    def __init__(self, key: str, *members: "type | OpenUnion", default: str | None = None) -> None:
        self.key, self.members, self.default = key, list(members), default

    @property
    def classes(self) -> list[type]:
        """All classes that a field may hold."""
        return [cls for member in self.members for cls in (member.classes if isinstance(member, OpenUnion) else [member])]

    def _words(self, cls: type) -> set[str]:
        annotation = typing.get_type_hints(cls).get(self.key)
        return set(typing.get_args(annotation)) if typing.get_origin(annotation) is typing.Literal else set()

    def add(self, cls: C) -> C:
        """Accept `cls` too, in configs that are declared already as well. A decorator above @config.

        A TypeError where the class is no config or its field `key` no Literal; a ValueError where the word is taken.
        """
        words = self._words(cls)
        if not words or "__pydantic_fields__" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} needs @config below this decorator, and a field such as {self.key}: Literal['mine']"
            )
        taken = [f"{word} ({other.__name__})" for other in self.classes for word in words & self._words(other)]
        if taken:
            raise ValueError(f"{cls.__name__}: {self.key} {taken[0]} is registered already; take another word")
        self.members.append(cls)
        return cls

    def _read(self, value: Any) -> Any:
        """One of the classes as it is, for configs made in Python; else what the JSON says."""
        if isinstance(value, tuple(self.classes)):
            return value
        if isinstance(value, dict) and self.default is not None:
            value = {self.key: self.default, **value}
        try:
            return _adapter(self.key, *self.classes).validate_json(json.dumps(value))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            if first["type"] != "union_tag_invalid" or first["loc"]:  # a mistake inside one of the classes
                raise
            context = {**first.get("ctx", {}), "is_open": True}
            raise PydanticCustomError("union_tag_invalid", "the tag should be {expected_tags}", context) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(_adapter(self.key, *self.classes).core_schema)
