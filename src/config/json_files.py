"""JSON files, strictly: duplicate keys, NaN and broken text are refused by line and column."""

import codecs
import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from .script import UserError, prefix_errors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"the key {key!r} is in one object twice; keep one")
    return unique


class _NoNumber(ValueError):
    """A number that JSON or Python allows and a config does not: as it is written, and why."""


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise _NoNumber(text, f"{text} is not a finite number")
    return float(text)


def _whole(text: str) -> int:
    if len(text) > 300:  # Python itself refuses to read more than 4300 digits
        raise _NoNumber(text, f"{text[:20]}... is too long a number ({len(text)} digits)")
    return int(text)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark; every failure is a UserError that names the file."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (len(content) > 3 and content[:4].count(0) in (2, 3)):
        raise UserError(f"{path}: is not a UTF-8 text file but UTF-16 or UTF-32; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        where = f"the byte 0x{content[error.start]:02x} at line {line}, column {column}"
        raise UserError(f"{path}: {where} is not UTF-8: is it a text file? If it is, save it as UTF-8") from None


_TOO_SHORT = "the text ends too early; is the file cut short? (A missing quote or bracket looks the same.)"
_TRAILING = "a comma stands before the closing bracket; remove it"
_JSON_HINTS = (  # patterns of Python's message, of what stands before the mistake and at it; and what to do
    ("trailing comma", "", "", _TRAILING),
    ("", r",\s*$", r"[}\]]", _TRAILING),
    ("escape", "", "", r"a backslash is written twice, \\ (in a path a / does as well)"),
    ("control character", "", r"\t", r"a tab inside a text is written as \t"),
    ("control character", "", "", r"a text ends on the line on which it began; write \n for a new line"),
    ("", r"^\s*$", r"\s*$", "there is nothing in it; is the file cut short?"),
    ("", "", r"\s*$", _TOO_SHORT),
    ("Unterminated string", "", "", _TOO_SHORT),
    ("", r"\d,\s*$", r"\d", "a number is written with a decimal point and without commas, as in 0.5 or 1000"),
    ("", r"[\d.]\Z", r"[\w.]", "a number is written as in 1000, 0.5 or 1e-4, without leading zeros"),
    ("Extra data", "", r'[{\["]', "something follows after the end: {word!r}; one object holds all"),
    ("Expecting value", "", r"[}\])]", "a value is missing before the closing bracket"),
    ("", "", r"//|#|/\*", "JSON has no comments; remove it"),
    ("", "", r"(?i:true|false|none|null|undefined)\b", "JSON writes true, false and null in small letters"),
    ("", "", r"(?i:[-+]?(nan|inf|infinity))\b", "a number is finite, in digits"),
    ("", "", r"[-\u2010-\u2015\u2212]", "a number begins with a digit or the minus sign of the keyboard, -"),
    ("", "", ",", "a comma stands here, and a value or a key is missing before it; remove the comma, or write what is missing"),
    ("", "", r"['\u2018\u2019\u201c\u201d\u00ab\u00bb]", 'JSON takes straight double quotes: "'),
    ("", "", r"[A-Za-z_]\w*\s*:", 'the name of a key stands in double quotes: "key"'),
    ("", "", r"[A-Za-z_~$/][^\s,}\]]*", 'a word stands in double quotes: "word"'),
    ("", "", r"[+.]\.?\d", "a number begins with a digit or a minus sign"),
    ("',' delimiter", "", "", "a comma is missing here, or the value before it has something in excess: {word!r}"),
    ("delimiter", "", "", "a colon is missing here, or the value before it has something in excess: {word!r}"),
    ("Extra data", "", "", "something follows after the end: {word!r}; remove it"),
)


def _json_hint(text: str, error: json.JSONDecodeError) -> str:
    """A hint in words: what is wrong at the place of a mistake in JSON, and what to do."""
    before, rest = text[: error.pos], text[error.pos :]
    if rest and rest[0] not in " \t\r\n" and (rest[0].isspace() or not rest[0].isprintable()):
        return f"an invisible character (U+{ord(rest[0]):04X}) stands here; remove it"
    word = "".join(rest[:20].split()[:1])
    for message, left, right, hint in _JSON_HINTS:
        if re.search(message, error.msg) and re.search(left, before) and re.match(right, rest):
            return hint.format(word=word)
    return f"{error.msg[0].lower()}{error.msg[1:]}, not {word!r}"


def parse_json(text: str) -> Any:
    """Parse strict JSON; duplicate keys, NaN, Infinity and numbers like 1e999 are a UserError."""
    text = text.removeprefix("\ufeff")
    hooks = {"object_pairs_hook": _no_duplicates, "parse_float": _finite, "parse_int": _whole, "parse_constant": _finite}
    try:
        return json.loads(text, **hooks)
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
    with prefix_errors(str(path)):
        return parse_json(text)


def quoted(path: str | Path) -> str:
    """A path to paste into a shell command, also as a value of --set: quoted, and neither an option nor JSON there."""
    text = str(path)
    try:
        other = not isinstance(json.loads(text), str) or text.startswith('"')
    except ValueError:
        other = text.startswith(("-", "{", "[", '"'))
    return shlex.quote(f"./{text}" if other else text)
