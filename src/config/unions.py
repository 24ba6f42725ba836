"""Unions of configs that stay open: a class that is registered before a config is loaded is accepted there."""

from typing import Annotated, Any, Union

from pydantic import Field, GetCoreSchemaHandler
from pydantic.dataclasses import rebuild_dataclass
from pydantic_core import CoreSchema

from .fields import CONFIG_CLASSES


class OpenUnion:
    """Annotation of a field that holds one of the registered config classes: Annotated[Protocol, OpenUnion("source")].

    The field `key` of each class, a Literal of one word, says which one a JSON object is. `members` are classes, or
    unions whose classes belong to this one too, those that are registered later included.
    """

    def __init__(self, key: str, *members: "type | OpenUnion") -> None:
        self.key, self.members = key, list(members)
        self._is_in_use = False

    @property
    def classes(self) -> list[type]:
        """All classes that a field may hold."""
        return [cls for member in self.members for cls in (member.classes if isinstance(member, OpenUnion) else [member])]

    def add(self, cls: type) -> None:
        """Accept `cls` too, in configs that are declared already as well."""
        self.members.append(cls)
        if self._is_in_use:
            for config_class in CONFIG_CLASSES:
                rebuild_dataclass(config_class, force=True, raise_errors=False)  # pyright: ignore[reportArgumentType]

    def __get_pydantic_core_schema__(self, _source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        for union in (self, *(member for member in self.members if isinstance(member, OpenUnion))):
            union._is_in_use = True
        return handler.generate_schema(Annotated[Union[tuple(self.classes)], Field(discriminator=self.key)])  # noqa: UP007
