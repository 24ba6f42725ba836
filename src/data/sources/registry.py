"""The list of all sources: a source is known to configs, the command line and error messages by its entry here."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Field, Tag

from ...config import OpenUnion, kind_of
from .datasets import DatasetsSource, open_datasets
from .digits import DigitsSource, open_digits
from .emnist import EmnistSource, open_emnist
from .folder import FolderSource, open_folder
from .images import HeldOutShare, Images, Source
from .packed import PackedSource, open_packed
from .python import PythonSource, open_python
from .shapes import ShapesSource, open_shapes

S = TypeVar("S", bound=Source)

SOURCES = OpenUnion("source")
OPEN_FUNCTIONS: dict[type, Callable[[Any], Images]] = {}


def register_source(config_class: type[S], open_function: Callable[[S], Images]) -> None:
    """Add a source: its config, with a field `source: Literal[NAME]`, and the function that opens it.

    A config that is loaded afterwards accepts it, in data, held_out and source.
    """
    OPEN_FUNCTIONS[config_class] = open_function
    SOURCES.add(config_class)


register_source(FolderSource, open_folder)
register_source(DatasetsSource, open_datasets)
register_source(DigitsSource, open_digits)
register_source(EmnistSource, open_emnist)
register_source(ShapesSource, open_shapes)
register_source(PackedSource, open_packed)
register_source(PythonSource, open_python)

OneSource = Annotated[Source, SOURCES]
SeveralSources = Annotated[tuple[OneSource, ...], Field(min_length=1), Tag("list")]
Sources = Annotated[Annotated[OneSource, Tag("object")] | SeveralSources, Discriminator(kind_of)]


def _held_out_kind(value: Any) -> str:
    is_share = isinstance(value, HeldOutShare) or (
        isinstance(value, Mapping) and "source" not in value and bool({"fraction", "together"} & {*value})
    )
    return "share" if is_share else kind_of(value)


HeldOut = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag("plain")]
    | Annotated[HeldOutShare, Tag("share")]
    | Annotated[OneSource, Tag("object")]
    | SeveralSources,
    Discriminator(_held_out_kind),
]
