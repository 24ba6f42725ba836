"""From JSON to a config. Each mistake is one line: the path in the JSON, what is allowed, and "did you mean"."""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic

from .fields import T
from .json_files import parse_json, read_json
from .mistakes import UserError
from .unions import OpenUnion


def _choices(annotation: Any) -> list[Any]:
    """The types behind Annotated and unions, None left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        union = next((extra for extra in get_args(annotation) if isinstance(extra, OpenUnion)), None)
        return _choices(get_args(annotation)[0]) if union is None else union.classes
    if origin in (Union, types.UnionType):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return [] if annotation is type(None) else [annotation]


def _fields(owner: Any) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True) if dataclasses.is_dataclass(owner) else {}


def _tags(owner: Any) -> set[str]:
    """The words by which a union tells this dataclass: the values of its one-word Literal fields."""
    literals = [hint for hint in _fields(owner).values() if get_origin(hint) is Literal]
    return {str(word) for literal in literals for word in get_args(literal)}


def _descend(owners: list[Any], element: str | int) -> list[Any]:
    """The types one step down from `owners`; a step that is the tag of a union narrows them instead."""
    below: list[Any] = []
    for owner in owners:
        if isinstance(element, int):
            if get_origin(owner) in (tuple, list):
                below += _choices(get_args(owner)[0])
        elif element in _fields(owner):
            below += _choices(_fields(owner)[element])
    if below:
        return below
    return [owner for owner in owners if element in _tags(owner)] or owners


def _owners_at(root: Any, path: Sequence[str | int]) -> list[Any]:
    """The types that a value at this path may have."""
    owners = _choices(root)
    for element in path:
        owners = _descend(owners, element)
    return owners


def _keys_allowed(root: Any, path: Sequence[str | int]) -> list[str]:
    return sorted({key for owner in _owners_at(root, path) for key in _fields(owner)})


def _is_resumable(root: Any, path: Sequence[str | int]) -> bool:
    """Whether the key at this path, or one above it, is a `resumable_field`."""
    for i, element in enumerate(path):
        for owner in _owners_at(root, path[:i]):
            field = getattr(owner, "__pydantic_fields__", {}).get(element)
            if field is not None and (field.json_schema_extra or {}).get("free"):
                return True
    return False


def differences(root: Any, old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The dotted keys in which two dumped configs of type `root` differ: (harmless on resume, not harmless)."""
    harmless: list[str] = []
    other: list[str] = []

    def walk(before: Any, after: Any, path: tuple[str | int, ...]) -> None:
        if before == after:
            return
        inside = type(before) is type(after) and not _is_resumable(root, path)
        if inside and isinstance(before, dict):
            for key in sorted({*before, *after}):
                walk(before.get(key), after.get(key), (*path, key))
        elif inside and isinstance(before, list) and any(isinstance(entry, dict) for entry in before):
            for i, (was, now) in enumerate(zip(before, after, strict=False)):
                walk(was, now, (*path, i))
            if len(before) != len(after):
                other.append(".".join(map(str, path)))
        else:
            (harmless if _is_resumable(root, path) else other).append(".".join(map(str, path)))

    walk(old, new, ())
    return harmless, other


def _explain(root: Any, raw: Any, error: pydantic.ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        path: list[str] = []
        value: Any = raw
        for element in item["loc"]:  # elements that are not in the JSON are tags of unions: not shown
            if (isinstance(value, dict) and element in value) or (
                isinstance(value, list) and isinstance(element, int) and element < len(value)
            ):
                value = value[element]  # pyright: ignore[reportCallIssue, reportArgumentType]
            elif element != item["loc"][-1] or item["type"] not in ("missing", "missing_argument"):
                continue
            path.append(str(element))
        where = ".".join(path) or "the config"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            allowed = _keys_allowed(root, item["loc"][:-1])
            message = f"unknown key{_guess(str(item['loc'][-1]), allowed) or ';'} allowed here: {', '.join(allowed)}"
        elif item["type"] in ("missing", "missing_argument"):
            message = "this key is missing"
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            context = item.get("ctx", {})
            field = str(context.get("discriminator", "")).strip("'")
            tags = {tag for owner in _owners_at(root, item["loc"]) for tag in _tags(owner)}
            allowed = str(context.get("expected_tags", ", ".join(sorted(tags))))
            word = context.get("tag")
            where = f"{where}.{field}" if field.isidentifier() else where
            message = f"{word!r} is not known{_guess(word, _words_in(allowed)) or '.'} Allowed: {allowed}"
            message = f"missing; allowed: {allowed}" if word is None else message
        elif item["type"] == "literal_error":
            expected = item.get("ctx", {}).get("expected", "")
            message = f"{value!r} is not known; allowed: {expected}{_guess(value, _words_in(expected))}"
        elif item["type"] != "config" and not isinstance(value, dict | list):
            message = f"{message[0].lower()}{message[1:]}, not {value!r}"
            if isinstance(value, str) and value.lower() in ("true", "false", "none", "null"):
                message += "; JSON writes true, false and null in small letters, without quotes"
        lines.append(f"{where}: {message}")
    return "; ".join(lines[:3]) + (f" (and {len(lines) - 3} more)" if len(lines) > 3 else "")


def _words_in(expected: str) -> list[str]:
    """The words of pydantic's list 'a', 'b' or 'c'."""
    return expected.replace("'", "").replace(" or ", ", ").split(", ")


def _guess(word: Any, allowed: Sequence[str]) -> str:
    """A question with the likely word, or nothing."""
    close = difflib.get_close_matches(str(word), allowed, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _old_names(owners: list[Any]) -> dict[str, tuple[str, Any]]:
    """{old name: (today's name, the function that gives today's value)} of the fields of `owners`."""
    names = {}
    for owner in owners:
        for name, field in getattr(owner, "__pydantic_fields__", {}).items():
            old_name = (field.json_schema_extra or {}).get("old_name")
            if old_name is not None:
                names[str(old_name)] = (name, old_name.new_value)
    return names


def _with_new_names(owners: list[Any], raw: Any) -> Any:
    """Parsed JSON for `owners`, with today's name and value for each key that has an old name."""
    if isinstance(raw, list):
        return [_with_new_names(_descend(owners, i), entry) for i, entry in enumerate(raw)]
    if not isinstance(raw, dict):
        return raw
    known = dict(raw)
    for old_name, (name, new_value) in _old_names(owners).items():
        if old_name in known and name not in known:
            known[name] = new_value(known.pop(old_name))
    return {key: _with_new_names(_descend(owners, key), value) for key, value in known.items()}


def validate(root: type[T], raw: Any, *, origin: str = "config") -> T:
    """The dataclass `root` made from parsed JSON; a UserError names the JSON path, what is allowed, and the likely word."""
    if isinstance(raw, dict):
        raw = {key: value for key, value in raw.items() if key != "$schema"}
    if broken := re.search("[\ud800-\udfff]", json.dumps(raw, ensure_ascii=False)):
        word = next((word for word in _strings(raw) if broken[0] in word), "")
        raise UserError(f"{origin}: {word!a} has bytes that are no text; rename it, or give a link to it (ln -s)")
    raw = _with_new_names(_choices(root), raw)
    try:
        return pydantic.TypeAdapter(root).validate_json(json.dumps(raw))
    except pydantic.ValidationError as error:
        raise UserError(f"{origin}: {_explain(root, raw, error)}") from None


def _strings(value: Any) -> typing.Iterator[str]:
    """All strings in parsed JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _strings(below)


def dump(value: Any) -> dict[str, Any]:
    """The plain JSON dictionary of a config dataclass, defaults included."""
    return pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")


def _override(root: Any, raw: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"--set {assignment}: write it as KEY=VALUE, as in --set optimizer.lr=1e-4")
    if not text:
        raise UserError(f"--set {assignment}: there is no value; is a variable of the shell not set? (for none: {key}=null)")
    try:
        value = parse_json(text)
    except UserError as error:
        if "not valid JSON" not in str(error) or text[:1] in '{["':
            raise UserError(f"--set {key}: {error}") from None
        value = text  # a bare word is a string
    path: list[Any] = list(key.split("."))
    owners = _choices(root)
    for i, part in enumerate(path):
        path[i], new_value = _old_names(owners).get(part, (part, None))
        if new_value is not None and i == len(path) - 1:
            value = new_value(value)
        owners = _descend(owners, path[i])
    parent: Any = raw
    for i in range(1, len(path)):
        part = path[i - 1]
        below = parent[part] if isinstance(parent, list) else parent.get(part)
        if isinstance(below, list) and path[i].isdecimal():
            path[i] = int(path[i])
            if path[i] >= len(below):
                raise UserError(f"--set {key}: the list {part} has {len(below)} entries, counted from 0")
        elif not isinstance(below, dict):
            below = parent[part] = {}
        parent = below
    if len(path) > 1 and path[-1] in ("source", "kind"):
        parent.clear()  # another kind has other keys: those of the old one do not belong to it
    parent[path[-1]] = value


def load(path: str | Path, root: type[T], overrides: Sequence[str] = ()) -> T:
    """Load a JSON config, apply `KEY=VALUE` overrides, and validate it as `root`."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a JSON object, {{...}}")
    raw = _with_new_names(_choices(root), raw)
    for assignment in sorted(overrides, key=lambda text: text.partition("=")[0].split(".")[-1] not in ("source", "kind")):
        _override(root, raw, assignment)
    return validate(root, raw, origin=str(path))
