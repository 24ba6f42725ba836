"""Fields whose values are an open list: what a script registers before it reads a config is accepted too."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_type_hints

from pydantic import Discriminator, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag, TypeAdapter
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
    """Annotation of a field that holds one of several config classes, told apart by their `kind`, as in
    Annotated[Weighting, WEIGHTINGS]. The class of the kind `default` needs no `kind` in the JSON."""

    def __init__(self, default: str | None = None) -> None:
        self.default = default
        self.members: dict[str, type] = {}
        self._adapter: tuple[dict[str, type], TypeAdapter[Any]] | None = None

    def register(self, member: C) -> C:
        """Decorator of a config class whose field `kind` is a Literal of one word."""
        (kind,) = get_args(get_type_hints(member)["kind"])
        self.members[kind] = member
        return member

    @property
    def adapter(self) -> TypeAdapter[Any]:
        """pydantic's union of the members that are registered now."""
        if self._adapter is None or self._adapter[0] != self.members:
            tagged = tuple(Annotated[member, Tag(kind)] for kind, member in self.members.items())
            union = Annotated[Union[tagged], Discriminator(self._kind)]  # noqa: UP007
            self._adapter = (dict(self.members), TypeAdapter(union))
        return self._adapter[1]

    def _kind(self, value: Any) -> str | None:
        return value.get("kind", self.default) if isinstance(value, dict) else self.default

    def _read(self, value: Any) -> Any:
        """A member as it is, for configs made in Python; else what the JSON says."""
        if isinstance(value, tuple(self.members.values())):
            return value
        return self.adapter.validate_json(json.dumps(value))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(self.adapter.core_schema)
