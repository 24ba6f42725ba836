"""Configuration: JSON files into frozen, strict dataclasses, and the one way a script ends on a user's mistake."""

import argparse
import codecs
import dataclasses
import difflib
import errno
import json
import os
import re
import shlex
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what is wrong and what to do. Ends a script with status 2."""


def free(default: Any = dataclasses.MISSING, **constraints: Any) -> Any:
    """A field that may change when a run is resumed, because no step's result depends on it."""
    if default is not dataclasses.MISSING:
        constraints["default"] = default
    return Field(json_schema_extra={"free": True}, **constraints)


def renamed(old_name: str, default: Any = dataclasses.MISSING, **constraints: Any) -> Any:
    """A field that had another name in older versions: configs and runs that say `old_name` are still read."""
    if default is not dataclasses.MISSING:
        constraints["default"] = default
    return Field(json_schema_extra={"old_name": old_name}, **constraints)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Decorator: a frozen dataclass validated by pydantic; unknown keys, wrong types and infinities are errors."""
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return pydantic_dataclass(frozen=True, kw_only=True, config=strict)(cls)  # pyright: ignore[reportReturnType]


def wrong(message: str) -> PydanticCustomError:
    """The error that a validator of a config raises: `message` appears after the JSON path, as it is."""
    return PydanticCustomError("config", "{message}", {"message": message})


def kind_of(value: Any) -> str:
    return {dict: "object", list: "list", tuple: "list"}.get(type(value), "plain" if _is_plain(value) else "object")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


# ---------------------------------------------------------------------------------------------- lengths


@config
class Span:
    """A length given in exactly one unit: `{"steps": 100}`, `{"epochs": 1}` or `{"images": 50000}`."""

    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    images: int | None = Field(None, gt=0)

    @pydantic.model_validator(mode="after")
    def _one_unit(self) -> "Span":
        if sum(unit is not None for unit in (self.steps, self.epochs, self.images)) != 1:
            raise wrong("give exactly one of steps, epochs, images")
        return self


Length = Annotated[
    Annotated[int, Field(gt=0), Tag("plain")] | Annotated[Span, Tag("object")],
    Discriminator(lambda value: "plain" if _is_plain(value) else "object"),
]


ENDLESS = 10**15  # steps of a run without end


def to_steps(length: int | Span, *, batch_size: int, num_images: int) -> int:
    """Optimiser steps in `length`: a number is steps already; epochs and images are rounded up, to at least 1.

    `batch_size` is images per step, `num_images` those in one epoch.
    """
    if isinstance(length, int):
        return length
    if length.steps is not None:
        return length.steps
    images = length.images if length.images is not None else typing.cast(float, length.epochs) * num_images
    return max(1, -int(-images // batch_size))


# ---------------------------------------------------------------------------------------------- reading JSON


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"the key {key!r} stands twice in one object; keep one")
        found[key] = value
    return found


class _NoNumber(ValueError):
    """A number that JSON, or Python, has and a config cannot: as it is written, and why."""


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")) or value != value:
        raise _NoNumber(text, f"{text} is not a finite number")
    return value


def _whole(text: str) -> int:
    if len(text) > 300:  # Python itself refuses to read more than 4300 digits
        raise _NoNumber(text, f"{text[:20]}... is too long a number ({len(text)} digits)")
    return int(text)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file that a person wrote, without a byte-order mark. A UserError that names the file."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    start = content[:4]
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (len(start) == 4 and start.count(0) in (2, 3)):
        raise UserError(f"{path}: is not a UTF-8 text file but UTF-16 or UTF-32; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        where = f"the byte 0x{content[error.start]:02x} at line {line}, column {column}"
        raise UserError(f"{path}: {where} is not UTF-8: is it a text file? If it is, save it as UTF-8") from None


_JSON_HINTS = (  # what stands at the place of the mistake, and what to do
    (r"//|#|/\*", "JSON has no comments; remove it"),
    (r"(?i:true|false|none|null|undefined)\b", "JSON writes true, false and null in small letters"),
    (r"(?i:[-+]?(nan|inf|infinity))\b", "a number is finite, in digits"),
    (r"[-\u2010-\u2015\u2212]", "a number begins with a digit or the minus sign of the keyboard, -"),
    (r",", "a comma stands here, and a value or a key is missing before it; remove the comma, or write what is missing"),
    (r"['\u2018\u2019\u201c\u201d\u00ab\u00bb]", 'JSON takes straight double quotes: "'),
    (r"[A-Za-z_]\w*\s*:", 'the name of a key stands in double quotes: "key"'),
    (r"[A-Za-z_~$/][^\s,}\]]*", 'a word stands in double quotes: "word"'),
    (r"[+.]\.?\d", "a number begins with a digit or a minus sign"),
)


def _json_hint(text: str, error: json.JSONDecodeError) -> str:
    """What is wrong at the place of a mistake in JSON, and what to do, in words."""
    rest, before = text[error.pos :], text[: error.pos].rstrip()
    if "trailing comma" in error.msg or (rest[:1] in ("}", "]") and before.endswith(",")):
        return "a comma stands before the closing bracket; remove it"
    if "escape" in error.msg:
        return r"a backslash is written twice, \\ (in a path a / does as well)"
    if "control character" in error.msg and rest[:1] == "\t":
        return r"a tab inside a text is written as \t"
    if "control character" in error.msg:
        return r"a text ends on the line on which it began; write \n for a new line"
    if not text.strip():
        return "there is nothing in it; is the file cut short?"
    if rest and rest[0] not in " \t\r\n" and (rest[0].isspace() or not rest[0].isprintable()):
        return f"an invisible character (U+{ord(rest[0]):04X}) stands here; remove it"
    if not rest.strip() or "Unterminated string" in error.msg:
        return "the text ends too early; is the file cut short? (A missing quote or bracket looks the same.)"
    if re.match(r"\d", rest) and re.search(r"\d,$", before):
        return "a number is written with a decimal point and without commas, as in 0.5 or 1000"
    if re.search(r"[\d.]$", before) and before == text[: error.pos] and re.match(r"[\w.]", rest):
        return "a number is written as in 1000, 0.5 or 1e-4, without leading zeros"
    if "Extra data" in error.msg and rest[0] in '{["':
        return f"something follows after the end: {rest[:20].split()[0]!r}; one object holds all"
    if "Expecting value" in error.msg and rest[0] in "}])":
        return "a value is missing before the closing bracket"
    for pattern, hint in _JSON_HINTS:
        if re.match(pattern, rest):
            return hint
    if "delimiter" in error.msg:
        wanted = "comma" if "','" in error.msg else "colon"
        return f"a {wanted} is missing here, or the value before it has something in excess: {rest[:20].split()[0]!r}"
    if "Extra data" in error.msg:
        return f"something follows after the end: {rest[:20].split()[0]!r}; remove it"
    return f"{error.msg[0].lower()}{error.msg[1:]}, not {rest[:20].split()[0]!r}"


def parse_json(text: str) -> Any:
    """Parse strict JSON; duplicate keys, NaN, Infinity and numbers like 1e999 are a UserError."""
    text = text.removeprefix("\ufeff")
    try:
        return json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_float=_finite,
            parse_int=_whole,
            parse_constant=_finite,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"not valid JSON at {where}: {_json_hint(error.doc, error)}") from None
    except _NoNumber as error:
        written, reason = error.args
        places = re.finditer(rf'"(?:\\.|[^"\\])*"|(?<![\w.+-]){re.escape(written)}(?![\w.+-])', text)
        place = next((match.start() for match in places if match[0] == written), 0)
        line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
        raise UserError(f"{reason} (line {line}, column {column})") from None
    except RecursionError:
        raise UserError("not a config: nested too deeply") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON file strictly; every failure is a UserError that names the file."""
    text = read_text(path)
    try:
        return parse_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def write_flushed(path: Path, content: bytes | memoryview) -> None:
    """Write a file, and wait until it is on the disk; an OSError names the file."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it is whole or absent: beside its place, flushed, and then moved there."""
    staged = path.with_name(f".{path.name}.part")
    try:
        write_flushed(staged, content)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def quoted(path: str | Path) -> str:
    """A path as a person pastes it into a command of a shell, also as a value of --set: it is no option and no JSON there."""
    text = str(path)
    try:
        other = not isinstance(json.loads(text), str) or text.startswith('"')
    except ValueError:
        other = text.startswith(("-", "{", "[", '"'))
    return shlex.quote(f"./{text}" if other else text)


# ---------------------------------------------------------------------------------------------- walking types


def _choices(annotation: Any) -> list[Any]:
    """The types behind Annotated and unions, None left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _choices(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return [] if annotation is type(None) else [annotation]


def _fields(owner: Any) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True) if dataclasses.is_dataclass(owner) else {}


def _tags(owner: Any) -> set[str]:
    """The words by which a union tells this dataclass: the values of its one-word Literal fields."""
    found = set()
    for hint in _fields(owner).values():
        if get_origin(hint) is Literal:
            found.update(str(word) for word in get_args(hint))
    return found


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


def _keys_allowed(root: Any, path: Sequence[str | int]) -> list[str]:
    owners = _choices(root)
    for element in path:
        owners = _descend(owners, element)
    return sorted({key for owner in owners for key in _fields(owner)})


def _is_free(root: Any, path: Sequence[str | int]) -> bool:
    owners = _choices(root)
    for element in path:
        for owner in owners:
            field = getattr(owner, "__pydantic_fields__", {}).get(element)
            if field is not None and (field.json_schema_extra or {}).get("free"):
                return True
        owners = _descend(owners, element)
    return False


def differences(root: Any, old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The dotted keys in which two dumped configs of type `root` differ: (harmless on resume, not harmless)."""
    harmless: list[str] = []
    other: list[str] = []

    def walk(before: Any, after: Any, path: tuple[str | int, ...]) -> None:
        if before == after:
            return
        inside = type(before) is type(after) and not _is_free(root, path)
        if inside and isinstance(before, dict):
            for key in sorted({*before, *after}):
                walk(before.get(key), after.get(key), (*path, key))
        elif inside and isinstance(before, list) and any(isinstance(entry, dict) for entry in before):
            for i, (was, now) in enumerate(zip(before, after, strict=False)):
                walk(was, now, (*path, i))
            if len(before) != len(after):
                other.append(".".join(map(str, path)))
        else:
            (harmless if _is_free(root, path) else other).append(".".join(map(str, path)))

    walk(old, new, ())
    return harmless, other


# ---------------------------------------------------------------------------------------------- loading


def _explain(root: Any, raw: Any, error: pydantic.ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        path: list[str] = []
        here: Any = raw
        for element in item["loc"]:  # elements that are not in the JSON are tags of unions: not shown
            if (isinstance(here, dict) and element in here) or (
                isinstance(here, list) and isinstance(element, int) and element < len(here)
            ):
                here = here[element]  # pyright: ignore[reportCallIssue, reportArgumentType]
            elif element != item["loc"][-1] or item["type"] not in ("missing", "missing_argument"):
                continue
            path.append(str(element))
        where = ".".join(path) or "the config"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            key = str(item["loc"][-1])
            allowed = _keys_allowed(root, item["loc"][:-1])
            close = difflib.get_close_matches(key, allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            message = f"unknown key{hint} allowed here: {', '.join(allowed)}"
        elif item["type"] in ("missing", "missing_argument"):
            message = "this key is missing"
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            context = item.get("ctx", {})
            field = str(context.get("discriminator", "")).strip("'")
            allowed = str(context.get("expected_tags", ", ".join(sorted(_union_tags(root, item["loc"])))))
            word = context.get("tag")
            close = difflib.get_close_matches(str(word), allowed.replace("'", "").split(", "), 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            where = f"{where}.{field}" if field.isidentifier() else where
            message = f"{word!r} is not known{hint or '.'} Allowed: {allowed}"
            message = f"missing; allowed: {allowed}" if word is None else message
        elif item["type"] == "literal_error":
            expected = item.get("ctx", {}).get("expected", "")
            close = difflib.get_close_matches(str(here), expected.replace("'", "").replace(" or ", ", ").split(", "), 1)
            message = f"{here!r} is not known; allowed: {expected}" + (f"; did you mean {close[0]!r}?" if close else "")
        elif item["type"] != "config" and not isinstance(here, dict | list):
            message = f"{message[0].lower()}{message[1:]}, not {here!r}"
            if str(here).lower() in ("true", "false", "none", "null") and isinstance(here, str):
                message += "; JSON writes true, false and null in small letters, without quotes"
        lines.append(f"{where}: {message}")
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _union_tags(root: Any, path: Sequence[str | int]) -> set[str]:
    owners = _choices(root)
    for element in path:
        owners = _descend(owners, element)
    return {tag for owner in owners for tag in _tags(owner)}


def _with_new_names(owners: list[Any], raw: Any) -> Any:
    """Parsed JSON for `owners`, with today's name for each key that was `renamed`."""
    if isinstance(raw, list):
        return [_with_new_names(_descend(owners, i), entry) for i, entry in enumerate(raw)]
    if not isinstance(raw, dict):
        return raw
    known = dict(raw)
    for owner in owners:
        for name, field in getattr(owner, "__pydantic_fields__", {}).items():
            old_name = (field.json_schema_extra or {}).get("old_name")
            if old_name in known and name not in known:
                known[name] = known.pop(old_name)
    return {key: _with_new_names(_descend(owners, key), value) for key, value in known.items()}


def validate(root: type[T], raw: Any, *, origin: str = "config") -> T:
    """Turn parsed JSON into the dataclass `root`; a UserError names the JSON path, what is allowed, and the likely word."""
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
    here: Any = raw
    for i in range(1, len(path)):
        part = path[i - 1]
        below = here[part] if isinstance(here, list) else here.get(part)
        if isinstance(below, list) and path[i].isdecimal():
            path[i] = int(path[i])
            if path[i] >= len(below):
                raise UserError(f"--set {key}: the list {part} has {len(below)} entries, counted from 0")
        elif not isinstance(below, dict):
            below = here[part] = {}
        here = below
    if len(path) > 1 and path[-1] in ("source", "kind"):
        here.clear()  # to choose a kind is to start afresh: what was set for the old one does not belong to it
    here[path[-1]] = value


def load(path: str | Path, root: type[T], overrides: Sequence[str] = ()) -> T:
    """Load a JSON config, apply `KEY=VALUE` overrides, and validate it as `root`."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a JSON object, {{...}}")
    for assignment in sorted(overrides, key=lambda text: text.partition("=")[0].split(".")[-1] not in ("source", "kind")):
        _override(root, raw, assignment)
    return validate(root, raw, origin=str(path))


def json_schema(root: type) -> str:
    """The JSON Schema of a root config, as text, for editors."""
    schema = pydantic.TypeAdapter(root).json_schema()
    schema["properties"]["$schema"] = {"type": "string"}
    return json.dumps(schema, indent=1) + "\n"


class _PrintSchema(argparse.Action):
    def __init__(self, *args: Any, root: type, **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, help="print the JSON Schema of the config and stop", **kwargs)
        self.root = root

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(json_schema(self.root), end="")
        parser.exit()


def training_arguments(root: type, description: str, *, default: str) -> argparse.ArgumentParser:
    """The command line that all training scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-cfg", "--config", metavar="FILE", default=default, help=f"JSON config (default {default})")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
    parser.add_argument("--run-dir", metavar="DIR", help="where the run lives (default runs/NAME)")
    parser.add_argument(
        "--continue-as",
        metavar="NAME",
        help="go on from the run's newest checkpoint in a new run beside it: with another rate, or longer",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure data, speed, memory, disk and time; write nothing")
    parser.add_argument("--verify-resume", action="store_true", help="after a change of the code: does a run go on to the bit?")
    parser.add_argument("--schema", action=_PrintSchema, root=root)
    return parser


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def _mistake(message: str, rank: int) -> int:
    if rank:  # where the first rank failed as well, its launcher ends this one while it waits
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(f"error: {message}" if not rank else f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    return 2


def run_script(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main and exit: 0 done, 2 the user's mistake in one line on standard error, 1 anything else.

    Under a launcher rank 0 prints the line. Another rank waits a moment first: where rank 0 failed as well the launcher
    ends it before it speaks, and where it alone failed somebody has to.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        status = main() or 0
    except UserError as error:
        status = _mistake(str(error), rank)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 1
    except OSError as error:
        if error.errno in FULL:
            status = _mistake(f"the disk is full ({error.filename or 'while writing'}); make room and run it again", rank)
        elif error.errno in FORBIDDEN and error.filename:
            status = _mistake(f"{error.filename} cannot be used: {error.strerror}", rank)
        else:
            traceback.print_exc()
            status = 1
    except Exception as error:
        if rank and any(word in str(error) for word in ("Connection closed by peer", "Connection reset by peer")):
            status = _mistake("another process ended, so this one cannot go on", rank) and 1
        else:
            traceback.print_exc()
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # all is written: torch's threads may abort a rank that ends before another
        os._exit(status)
    sys.exit(status)
