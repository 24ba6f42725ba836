"""From JSON to a config. Each mistake is one line: the path in the JSON, what is allowed, and "did you mean"."""

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic

from .fields import OpenUnion, T
from .json_files import parse_json, read_json
from .script import UserError

TAG_KEYS = ("source", "kind")  # these say which class an object is, and so which other keys it has


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


def _extras(owner: Any) -> dict[str, dict[str, Any]]:
    """What `resumable_field` and `renamed_field` say of the fields of a type."""
    fields = getattr(owner, "__pydantic_fields__", {})
    return {name: field.json_schema_extra for name, field in fields.items() if field.json_schema_extra}


def _words(owner: Any, key: str | None = None) -> list[str]:
    """The values of the Literal fields of a dataclass, or of its field `key` alone."""
    literals = [hint for name, hint in _fields(owner).items() if get_origin(hint) is Literal and key in (None, name)]
    return [str(word) for literal in literals for word in get_args(literal)]


def _descend(owners: list[Any], element: str | int) -> list[Any]:
    """The types one step down from `owners`; a step that is the tag of a union narrows them instead."""
    if isinstance(element, int):
        below = [get_args(owner)[0] for owner in owners if get_origin(owner) in (tuple, list)]
    else:
        below = [_fields(owner)[element] for owner in owners if element in _fields(owner)]
    inside = [choice for annotation in below for choice in _choices(annotation)]
    return inside or [owner for owner in owners if element in _words(owner)] or owners


def _owners_at(root: Any, path: Sequence[str | int]) -> list[Any]:
    """The types that a value at this path may have."""
    return functools.reduce(_descend, path, _choices(root))


def _is_resumable(root: Any, path: Sequence[str | int]) -> bool:
    """Whether the key at this path, or one above it, is a `resumable_field`."""
    keys = ((key, owner) for i, key in enumerate(path) for owner in _owners_at(root, path[:i]))
    return any(_extras(owner).get(str(key), {}).get("free") for key, owner in keys)


def differences(root: Any, old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The dotted keys in which two dumped configs of type `root` differ: (harmless on resume, not harmless)."""
    harmless: list[str] = []
    other: list[str] = []

    def walk(before: Any, after: Any, path: tuple[str | int, ...]) -> None:
        if before == after:
            return
        dotted, resumable = ".".join(map(str, path)), _is_resumable(root, path)
        inside = type(before) is type(after) and not resumable
        if inside and isinstance(before, dict):
            for key in sorted({*before, *after}):
                walk(before.get(key), after.get(key), (*path, key))
        elif inside and isinstance(before, list) and any(isinstance(entry, dict) for entry in before):
            for i, (was, now) in enumerate(zip(before, after, strict=False)):
                walk(was, now, (*path, i))
            if len(before) != len(after):
                other.append(dotted)
        else:
            (harmless if resumable else other).append(dotted)

    walk(old, new, ())
    return harmless, other


def _mistake(root: Any, raw: Any, item: Any) -> str:
    """The line for one of the errors that pydantic lists."""
    kind, context, loc = item["type"], item.get("ctx", {}), item["loc"]
    missing = kind in ("missing", "missing_argument")
    path, value = [], raw
    for element in loc:  # elements that are not in the JSON are tags of unions: not shown
        try:
            value = value[element]
        except (KeyError, IndexError, TypeError):
            if not (missing and element == loc[-1]):
                continue
        path.append(str(element))
    message = item["msg"].removeprefix("Value error, ")
    if missing:
        message = "this key is missing"
    elif kind in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = sorted({key for owner in _owners_at(root, loc[:-1]) for key in _fields(owner)})
        message = f"unknown key{_guess(loc[-1], allowed) or ';'} allowed here: {', '.join(allowed)}"
    elif kind in ("union_tag_invalid", "union_tag_not_found") and (key := context["discriminator"].strip("'")).isidentifier():
        path.append(key)
        allowed = context.get("expected_tags")
        if allowed is None:
            words = sorted({word for owner in _owners_at(root, loc) for word in _words(owner, key)})
            message = f"missing; allowed: {', '.join(words)}"
        else:
            message = f"{context['tag']!r} is not known{_guess(context['tag'], _listed(allowed)) or '.'} Allowed: {allowed}"
    elif kind == "union_tag_invalid":  # by kind_of
        named = {"object": "an object {...}", "list": "a list [...]", "plain": "a plain value"}
        allowed = " or ".join(named[word] for word in _listed(context["expected_tags"]))
        message = f"{named[context['tag']]} is not allowed here; write {allowed}"
    elif kind == "literal_error":
        message = f"{value!r} is not known; allowed: {context['expected']}{_guess(value, _listed(context['expected']))}"
    elif kind != "config" and not isinstance(value, dict | list):
        message = f"{message[0].lower()}{message[1:]}, not {value!r}"
        if isinstance(value, str) and value.lower() in ("true", "false", "none", "null"):
            message += "; JSON writes true, false and null in small letters, without quotes"
    if context.get("is_open"):
        message += f"; a {path[-1]} of your own is known once the file that registers it is imported (see CONTRIBUTING.md)"
    return f"{'.'.join(path) or 'the config'}: {message}"


def _listed(expected: str) -> list[str]:
    """The words of pydantic's list 'a', 'b' or 'c'."""
    return expected.replace("'", "").replace(" or ", ", ").split(", ")


def _guess(word: Any, allowed: Sequence[str]) -> str:
    """A question with the likely word, or nothing."""
    close = difflib.get_close_matches(str(word), allowed, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _old_names(owners: list[Any]) -> dict[str, tuple[str, Any]]:
    """{old name: (today's name, the function that gives today's value)} of the fields of `owners`."""
    renamed = [(name, extra["old_name"]) for owner in owners for name, extra in _extras(owner).items() if "old_name" in extra]
    return {str(old_name): (name, old_name.new_value) for name, old_name in renamed}


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
    for word in re.findall(r'"(?:[^"\\]|\\.)*"', json.dumps(raw, ensure_ascii=False)):
        if re.search("[\ud800-\udfff]", word):
            raise UserError(
                f"{origin}: {json.loads(word)!a} has bytes that are no text; rename it, or give a link to it (ln -s)"
            )
    raw = _with_new_names(_choices(root), raw)
    try:
        return pydantic.TypeAdapter(root).validate_json(json.dumps(raw))
    except pydantic.ValidationError as error:
        lines = [_mistake(root, raw, item) for item in error.errors(include_url=False)]
        others = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise UserError(f"{origin}: {'; '.join(lines[:3])}{others}") from None


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
    owners, path = _choices(root), key.split(".")
    name: Any
    parent: Any = raw
    for i, part in enumerate(path):
        name, new_value = _old_names(owners).get(part, (part, None))
        if isinstance(parent, list):
            name = int(part)
            if name >= len(parent):
                raise UserError(f"--set {key}: the list {path[i - 1]} has {len(parent)} entries, counted from 0")
        owners = _descend(owners, name)
        if i < len(path) - 1:
            below = parent[name] if isinstance(parent, list) else parent.get(name)
            if not isinstance(below, dict) and not (isinstance(below, list) and path[i + 1].isdecimal()):
                below = parent[name] = {}
            parent = below
        else:
            if i and part in TAG_KEYS:
                parent.clear()  # another kind has other keys: those of the old one do not belong to it
            parent[name] = value if new_value is None else new_value(value)


def load(path: str | Path, root: type[T], overrides: Sequence[str] = ()) -> T:
    """Load a JSON config, apply `KEY=VALUE` overrides, and validate it as `root`."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a JSON object, {{...}}")
    raw = _with_new_names(_choices(root), raw)
    for assignment in sorted(overrides, key=lambda text: text.partition("=")[0].split(".")[-1] not in TAG_KEYS):
        _override(root, raw, assignment)
    return validate(root, raw, origin=str(path))
