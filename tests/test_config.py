"""Strict configuration: every mistake has its line."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
from pydantic import Field

from src.config import (
    CommandLine,
    Length,
    Span,
    UserError,
    config,
    differences,
    dump,
    json_schema,
    load,
    parse_json,
    read_text,
    refuse_options,
    renamed_field,
    resumable_field,
    run_script,
    to_steps,
    validate,
)
from src.data import Sources
from tests.conftest import ROOT


@config
class Inner:
    rate: float = Field(0.1, gt=0)
    every: int | None = resumable_field(None)
    widths: tuple[int, ...] = (1, 2)


@config
class Root:
    name: str
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    steps: Length = 10
    every: Length | None = resumable_field(None)
    data: Sources | None = None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"name": "a", "inner": {"rat": 1.0}},
            r"inner\.rat: unknown key; did you mean 'rate'\? allowed here: every, rate, widths",
        ),
        ({"nam": "a"}, r"name: this key is missing; nam: unknown key; did you mean 'name'\?"),
        ({"name": 3}, r"name: input should be a valid string, not 3"),
        ({"name": "a", "inner": {"rate": "fast"}}, r"inner\.rate: input should be a valid number, not 'fast'"),
        ({"name": "a", "inner": {"rate": -1}}, r"inner\.rate: .*greater than 0"),
        ({"name": "a", "inner": {"widths": [1, 2.5]}}, r"inner\.widths\.1"),
        ({"name": "a", "steps": {"epoch": 1}}, r"steps\.epoch: unknown key; did you mean 'epochs'\?"),
        ({"name": "a", "steps": {"epochs": 1, "images": 5}}, r"steps: give exactly one of"),
        ({"name": "a", "steps": True}, r"steps: .*not True"),
        (
            {"name": "a", "data": {"source": "foldr", "path": "x"}},
            r"data\.source: 'foldr' is not known; did you mean 'folder'\?",
        ),
        (
            {"name": "a", "data": {"path": "x"}},  # the words of other fields, such as emnist's split, are not among them
            r"data\.source: missing; allowed: datasets, digits, emnist, folder, packed, python, shapes$",
        ),
        ({"name": "a", "data": "x"}, r"data: a plain value is not allowed here; write an object {...} or a list \[...\]$"),
        ({"name": "a", "steps": [1]}, r"steps: a list .* is not allowed here; write a plain value or an object"),
        (
            {"name": "a", "data": [{"source": "digits"}, {"source": "folder", "pat": "x"}]},
            r"data\.1\.pat: unknown key; did you mean 'path'",
        ),
        (
            {"name": "a", "data": {"source": "folder", "path": "x", "scan": {"max_pixel": 3}}},
            r"data\.scan\.max_pixel: .*'max_pixels'",
        ),
    ],
)
def test_mistakes_are_named_with_their_path(raw: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        validate(Root, raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' is in one object twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": -Infinity}', "-Infinity is not"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": 1,', "not valid JSON at line 1, column 9: .*cut short"),
        ('{"a": [1, 2', "line 1, column 12: .*cut short"),
        ("", "line 1, column 1: .*cut short"),
        ('{\n "a": 1, // half\n "b": 2}', r"line 2, column 10: JSON has no comments"),
        ('{\n# half\n"a": 1}', "line 2, column 1: JSON has no comments"),
        ('{"a": /* half */ 1}', "column 7: JSON has no comments"),
        ('{"a": 1} # end', "column 10: JSON has no comments"),
        ('{"a": [1, 2,\n]}', "a comma stands before the closing bracket"),
        ('{"a": 1,\n}', "a comma stands before the closing bracket"),
        ('{"a": True}', "line 1, column 7: .*small letters"),
        ('{"a": [None]}', "line 1, column 8: .*small letters"),
        ("{'a': 1}", "column 2: JSON takes straight double quotes"),
        ('{"a": \u201cb\u201d}', "column 7: JSON takes straight double quotes"),
        ("{a: 1}", "column 2: the name of a key stands in double quotes"),
        ('{"a": ~/images}', "column 7: a word stands in double quotes"),
        ('{"a": 0.5 "b": 1}', "column 11: a comma is missing"),
        ('{"a" 1}', "column 6: a colon is missing"),
        ('{"a": 1_000}', "column 8: a number is written as in 1000"),
        ('{"a": 007}', "column 8: a number is written as in 1000"),
        ('{"a": .5}', "column 7: a number begins with a digit"),
        ('{"a": "C:\\data"}', r"column 10: a backslash is written twice"),
        ('{"a": "one\ntwo"}', "a text ends on the line on which it began"),
        ('{"a": 1}{"b": 1}', "column 9: something follows after the end"),
        ("[" * 100_000, "nested too deeply"),
        ('{"b": "NaN, 1e999",\n "a": NaN}', r"NaN is not a finite number \(line 2, column 7\)"),
        ('{"a": ' + "9" * 5000 + "}", "too long a number"),
        ('{"a": TRUE}', "column 7: .*small letters"),
        ('{"a": Null}', "column 7: .*small letters"),
        ('{"a": nan}', "column 7: a number is finite"),
        ('{"a": -inf}', "a number is finite"),
        ('{"a": \u22121}', "column 7: .*minus sign"),
        ('{"a": 0,5}', "column 9: .*decimal point"),
        ('{"a": 1,, "b": 2}', "column 9: a comma stands here"),
        ('{"a": }', "column 7: a value is missing"),
        ('{"a": "x\ty"}', r"a tab inside a text is written as \\t"),
        ('{\u00a0"a": 1}', r"column 2: an invisible character \(U\+00A0\)"),
        ('{"a": 1}\x00\x00', r"column 9: an invisible character \(U\+0000\)"),
        ("  \n", "there is nothing in it"),
    ],
)
def test_json_is_strict(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_json(text)


def write(folder: Path, raw: dict) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    return path


def test_load_and_override(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"$schema": "x.json", "name": "a", "data": {"source": "datasets", "name": "hub/x", "split": "train"}}
    )
    plain = load(path, Root)
    assert plain.name == "a" and plain.inner.rate == 0.1
    changed = load(path, Root, ["inner.rate=1e-4", "name=b=c", "inner.widths=[3]", 'every={"epochs": 1}'])
    assert (changed.inner.rate, changed.name, changed.inner.widths) == (1e-4, "b=c", (3,))
    assert changed.every == Span(epochs=1)
    folder = load(path, Root, ["data.path=/pictures", "data.source=folder"])  # in any order; old keys are gone
    assert dump(folder)["data"]["path"] == "/pictures" and dump(folder)["data"]["split"] is None
    path = write(tmp_path, {"name": "a", "inners": [{"rate": 1}, {"rate": 2, "widths": [3, 4]}]})
    inners = load(path, Root, ["inners.0.every=7", "inners.1.widths.0=5"]).inners
    assert inners == (Inner(rate=1, every=7), Inner(rate=2, widths=(5, 4)))
    for assignment, message in [
        ("inner.rate", "KEY=VALUE"),
        ("inner.rate=", "there is no value; is a variable of the shell not set"),
        ("inners.2.rate=1", "the list inners has 2 entries, counted from 0"),
        ("inner.rat=1", "did you mean"),
        ("inner.rate=NaN", "finite"),
        ("inner.rate=None", "true, false and null in small letters"),
        ("inner={", "JSON"),
    ]:
        with pytest.raises(UserError, match=message):
            load(path, Root, [assignment])


def test_an_override_may_say_an_old_name(tmp_path: Path) -> None:
    path = write(tmp_path, {"title": "a", "inners": [{}]})
    assert load(path, New, ["inners.0.speed=2", "name=b"]) == New(title="b", inners=(NewInner(rate=2),))


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.json", Root)
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="text file"):
        load(path, Root)
    path.write_text("[]")
    with pytest.raises(UserError, match="JSON object"):
        load(path, Root)
    path.write_bytes(b'{"name": "caf\xe9"}')
    with pytest.raises(UserError, match="byte 0xe9 at line 1, column 14 is not UTF-8"):
        load(path, Root)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):  # with the mark and without
        path.write_text('{"name": "a"}', encoding=encoding)
        with pytest.raises(UserError, match="UTF-16 or UTF-32; save it as UTF-8"):
            load(path, Root)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"name": "caf\u00e9"}', encoding="utf-8-sig")
    assert load(path, Root).name == "caf\u00e9" and read_text(path)[0] == "{"
    assert parse_json("\ufeff[1]") == [1]


def test_lengths() -> None:
    def steps(length: int | Span) -> int:
        return to_steps(length, batch_size=32, num_images=1000)

    assert steps(7) == 7 and steps(Span(steps=9)) == 9
    assert steps(Span(images=64)) == 2 and steps(Span(images=65)) == 3 and steps(Span(images=1)) == 1
    assert steps(Span(epochs=2)) == 63 and steps(Span(epochs=0.5)) == 16


def test_what_may_change_on_resume() -> None:
    before = dump(validate(Root, {"name": "a", "every": 5}))
    after = dump(validate(Root, {"name": "a", "every": {"epochs": 1}, "inner": {"rate": 0.2}, "steps": 20}))
    assert differences(Root, before, after) == (["every"], ["inner.rate", "steps"])
    assert differences(Root, before, before) == ([], [])
    before = {"inners": [{"rate": 1, "every": 2}, {"rate": 1}]}
    after = {"inners": [{"rate": 1, "every": 3}, {"rate": 2}, {"rate": 1}]}
    assert differences(Root, before, after) == (["inners.0.every"], ["inners.1.rate", "inners"])


@config
class NewInner:
    rate: float = renamed_field("speed", 0.1, gt=0)
    added: bool = False


@config
class New:
    title: str = renamed_field("name")
    inner: NewInner = NewInner()
    inners: tuple[NewInner, ...] = ()


def test_an_old_config_is_read_by_its_old_names() -> None:
    old = {"name": "a", "inner": {"speed": 0.5}, "inners": [{"speed": 1.0}, {"rate": 2.0}]}
    new = validate(New, old)
    assert new == validate(New, {"title": "a", "inner": {"rate": 0.5}, "inners": [{"rate": 1.0}, {"rate": 2.0}]})
    assert differences(New, dump(validate(New, old)), dump(new)) == ([], [])
    with pytest.raises(UserError, match="name: unknown key"):  # the new name stands there, too: which one counts?
        validate(New, {"title": "a", "name": "b"})


def test_dump_and_validate_are_inverse() -> None:
    root = validate(Root, {"name": "a", "data": [{"source": "digits"}], "steps": {"images": 5}})
    assert validate(Root, dump(root)) == root


def test_schema_names_every_key() -> None:
    schema = json.loads(json_schema(Root))
    assert set(schema["properties"]) == {"$schema", "name", "inner", "inners", "steps", "every", "data"}
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (None, 0, ""),
        (UserError("mend it"), 2, "error: mend it\n"),
        (KeyboardInterrupt(), 1, "interrupted\n"),
        (RuntimeError("a bug"), 1, "RuntimeError: a bug"),
    ],
)
def test_how_a_script_ends(raised: BaseException | None, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == status
    assert message in capsys.readouterr().err


def test_an_option_that_makes_no_sense_is_refused() -> None:
    defaults = Namespace(run="r", num_samples=16, seed=0)
    args = Namespace(run="r", num_samples=3, seed=1)
    refuse_options(args, defaults, {"run"}, "is not refused, for it has its default")
    with pytest.raises(UserError, match="^--num-samples is about images, and these are points; leave it out$"):
        refuse_options(args, defaults, {"seed", "num_samples"}, "is about images, and these are points")


def test_docs_say_where_the_data_of_every_config_comes_from() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "configs").glob("*.json")):
        assert f"`{path.stem}`" in text, f"docs/data.md does not say where the data of {path.name} comes from"
        raw = json.loads(path.read_text(encoding="utf-8"))
        for source in [raw["data"]] if isinstance(raw["data"], dict) else raw["data"]:
            if source["source"] == "datasets":
                assert f"`{source['name']}`" in text, path
            if source["source"] in ("folder", "emnist"):
                assert "/".join(source["path"].split("/")[:2]) in text, path


def test_a_path_that_no_file_system_takes_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        (tmp_path / ("x" * 300)).mkdir()

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    assert re.fullmatch(r"error: \S+x{300} cannot be used: File name too long\n", capsys.readouterr().err)


def test_a_mistake_on_the_command_line_is_one_line() -> None:
    parser = CommandLine(prog="draw.py")
    parser.add_argument("--solver", choices=("euler", "heun"))
    parser.add_argument("--guidance", type=float)
    for words, line in (
        ("--solver heum", r"argument --solver: invalid choice: 'heum' \(choose from .*heun.*\); did you mean heun\?"),
        ("--guidence 2", r"unrecognized arguments: --guidence 2; did you mean --guidance\?"),
        ("--guidence=2", r"unrecognized arguments: --guidence=2; did you mean --guidance\?"),
        ("--guidance two", "argument --guidance: invalid float value: 'two'"),
    ):
        with pytest.raises(UserError, match=f"^{line} \\(draw.py --help lists what there is\\)$"):
            parser.parse_args(words.split())
