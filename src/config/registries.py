"""Fields whose values are an open list: what a script registers before it reads a config is accepted too."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

C = TypeVar("C", bound=type)


class NameIn:
    """Annotation of a field that holds a key of `known`, as in Annotated[str, NameIn(SOLVERS)]."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = known

    def _check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.known:
            *first, last = (repr(name) for name in self.known)
            raise PydanticKnownError("literal_error", {"expected": " or ".join(([", ".join(first)] if first else []) + [last])})
        return value

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.known), "type": "string"}
