"""Fields whose values are an open list: what a script registers before it reads a config is accepted too."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_type_hints

from pydantic import Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag, TypeAdapter
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

C = TypeVar("C", bound=type)


class NameIn:
    """Annotation of a field that holds a key of `known`, as in Annotated[str, NameIn(SOLVERS)]."""

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


class KindUnion:
    """Annotation of a field that holds one of several config classes, told apart by a word in their field `key`, as in
    Annotated[Weighting, WEIGHTINGS]. The class of the word `default` needs none in the JSON. Classes of the unions `others`
    belong to this one too, those that are registered later included."""

    def __init__(self, key: str = "kind", *others: "KindUnion | type", default: str | None = None) -> None:
        self.key, self.default = key, default
        self._others: list[KindUnion | type] = list(others)
        self._adapter: tuple[dict[str, type], TypeAdapter[Any]] | None = None

    @property
    def members(self) -> dict[str, type]:
        """The classes that a field may hold now, by their word."""
        members: dict[str, type] = {}
        for other in self._others:
            members |= other.members if isinstance(other, KindUnion) else {get_args(get_type_hints(other)[self.key])[0]: other}
        return members

    @property
    def classes(self) -> list[type]:
        return list(self.members.values())

    def register(self, member: C) -> C:
        """Decorator of a config class whose field `key` is a Literal of one word."""
        self._others.append(member)
        return member

    @property
    def adapter(self) -> TypeAdapter[Any]:
        """pydantic's union of the members that are registered now."""
        members = self.members
        if self._adapter is None or self._adapter[0] != members:
            if self.default is None:
                union = Annotated[Union[tuple(members.values())], Field(discriminator=self.key)]  # noqa: UP007
            else:
                tagged = tuple(Annotated[member, Tag(word)] for word, member in members.items())
                union = Annotated[Union[tagged], Discriminator(self._word)]  # noqa: UP007
            self._adapter = (members, TypeAdapter(union))
        return self._adapter[1]

    def _word(self, value: Any) -> str | None:
        return value.get(self.key, self.default) if isinstance(value, dict) else self.default

    def _read(self, value: Any) -> Any:
        """A member as it is, for configs made in Python; else what the JSON says."""
        if isinstance(value, tuple(self.classes)):
            return value
        return self.adapter.validate_json(json.dumps(value))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(self.adapter.core_schema)
