"""Fields whose values are an open list: what is registered before a config is loaded is accepted there."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, Union

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

C = TypeVar("C", bound=type)


class NameIn:
    """Annotation of a field that holds a key of `known`: Annotated[str, NameIn(SOLVERS)]."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = known

    def _check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.known:
            *first, last = (repr(name) for name in self.known)
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}" if first else last})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.known), "type": "string"}


class OpenUnion:
    """Annotation of a field that holds one of the registered config classes: Annotated[Weighting, OpenUnion("kind")].

    The field `key` of each class, a Literal, says which one a JSON object is; without the key it is the class that has the
    word `default` there. `members` are classes, or unions whose classes belong to this one, too.
    """

    def __init__(self, key: str, *members: "type | OpenUnion", default: str | None = None) -> None:
        self.key, self.members, self.default = key, list(members), default
        self._built: tuple[list[type], TypeAdapter[Any]] | None = None

    @property
    def classes(self) -> list[type]:
        """All classes that a field may hold."""
        return [cls for member in self.members for cls in (member.classes if isinstance(member, OpenUnion) else [member])]

    def add(self, cls: C) -> C:
        """Accept `cls` too, in configs that are declared already as well. A decorator."""
        self.members.append(cls)
        return cls

    @property
    def adapter(self) -> TypeAdapter[Any]:
        """pydantic's union of the classes that are registered now."""
        if self._built is None or self._built[0] != self.classes:
            union: Any = Annotated[Union[tuple(self.classes)], Field(discriminator=self.key)]  # noqa: UP007
            self._built = (self.classes, TypeAdapter(union))
        return self._built[1]

    def _read(self, value: Any) -> Any:
        """One of the classes as it is, for configs made in Python; else what the JSON says."""
        if isinstance(value, tuple(self.classes)):
            return value
        if isinstance(value, dict) and self.default is not None:
            value = {self.key: self.default, **value}
        return self.adapter.validate_json(json.dumps(value))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(self.adapter.core_schema)
