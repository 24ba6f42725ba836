"""Frozen, strict dataclasses that hold a config, and the kinds of fields that they have."""

import dataclasses
import typing
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


def renamed_field(old_name: str, default: Any = dataclasses.MISSING, **constraints: Any) -> Any:
    """A field that had another name in older versions: configs and runs that say `old_name` are still read."""
    if default is not dataclasses.MISSING:
        constraints["default"] = default
    return Field(json_schema_extra={"old_name": old_name}, **constraints)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Decorator: a frozen dataclass validated by pydantic; unknown keys, wrong types and infinities are errors."""
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic_dataclass(frozen=True, kw_only=True, config=strict)(cls)  # pyright: ignore[reportReturnType]


def config_error(message: str) -> PydanticCustomError:
    """The error that a validator of a config raises: `message` appears after the JSON path, as it is."""
    return PydanticCustomError("config", "{message}", {"message": message})
