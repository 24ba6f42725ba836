"""Frozen, strict dataclasses that hold a config, and the kinds of fields that they have."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

T = TypeVar("T")


def resumable_field(default: Any = dataclasses.MISSING, **constraints: Any) -> Any:
    """A field that may change when a run is resumed, because no step's result depends on it."""
    if default is not dataclasses.MISSING:
        constraints["default"] = default
    return Field(json_schema_extra={"free": True}, **constraints)


class OldName(str):
    """The name that a field had in older versions; `new_value` turns the value of then into today's."""

    new_value: Callable[[Any], Any]


def renamed_field(
    old_name: str,
    default: Any = dataclasses.MISSING,
    *,
    new_value: Callable[[Any], Any] = lambda value: value,
    **constraints: Any,
) -> Any:
    """A field that had another name in older versions: configs, runs and `--set` that say `old_name` are still read. Where the
    value was written in another way, too, `new_value` gives today's JSON for it."""
    if default is not dataclasses.MISSING:
        constraints["default"] = default
    name = OldName(old_name)
    name.new_value = new_value
    return Field(json_schema_extra={"old_name": name}, **constraints)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Decorator: a frozen dataclass validated by pydantic; unknown keys, wrong types and infinities are errors."""
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic_dataclass(frozen=True, kw_only=True, config=strict)(cls)  # pyright: ignore[reportReturnType]


def config_error(message: str) -> PydanticCustomError:
    """The error that a validator of a config raises: `message` appears after the JSON path, as it is."""
    return PydanticCustomError("config", "{message}", {"message": message})
