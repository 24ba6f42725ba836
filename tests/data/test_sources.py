"""The registry of sources: all that are there are accepted, and one that another package adds is trained on."""

import hashlib
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from PIL import Image

from src.config import UserError, config, json_schema, validate
from src.data import HeldOut, Sources
from src.data.facts import count_notes, describe_data, skipped_files, sources_of
from src.data.points import POINT_SOURCES, DataEnd, SourceEnd, is_point_source
from src.data.sources import GIVEN, SOURCES, DigitsSource, HeldOutShare, open_data, open_sources
from src.data.sources.image_set import lowest_names
from src.data.sources.images import digest, hold_out, name_fraction, number_classes, odd_label_remarks
from tests.conftest import ROOT, SMOKE, launch


@config
class _Config:
    data: Sources
    held_out: HeldOut = 0.0


@config
class _BlendConfig:
    data: DataEnd
    source: SourceEnd


def words(classes: list[type]) -> list[str]:
    return [get_args(get_type_hints(cls)["source"])[0] for cls in classes]


def test_the_choices_of_a_config_are_those_of_the_registry() -> None:
    assert words(SOURCES.classes) == ["folder", "datasets", "digits", "emnist", "shapes", "packed", "python"]
    assert words(POINT_SOURCES.classes) == ["density", "mixture", "moons", "spiral", "checkerboard"]
    names = "'folder', 'datasets', 'digits', 'emnist', 'shapes', 'packed', 'python'"
    with pytest.raises(
        UserError, match=rf"'digit' is not known; did you mean 'digits'\? Allowed: {names}; a source of your own"
    ):
        validate(_Config, {"data": {"source": "digit"}})
    with pytest.raises(UserError, match=rf"Allowed: 'gaussian', {names}, 'density'"):
        validate(_BlendConfig, {"data": {"source": "digits"}, "source": {"source": "noise"}})
    with pytest.raises(
        UserError, match=r"data.sise: unknown key; did you mean 'size'\? allowed here: count, size, source, split"
    ):
        validate(_Config, {"data": {"source": "shapes", "sise": 8}})
    with pytest.raises(UserError, match=r"source.source: missing; allowed: .*gaussian.*spiral"):
        validate(_BlendConfig, {"data": {"source": "moons"}, "source": {}})


def test_sources_are_read_alone_and_in_lists() -> None:
    spec = validate(
        _Config, {"data": [{"source": "digits"}, {"source": "shapes", "count": 8}], "held_out": {"source": "digits"}}
    )
    assert isinstance(spec.data, tuple) and isinstance(spec.held_out, DigitsSource)
    blend = validate(_BlendConfig, {"data": {"source": "moons"}, "source": [{"source": "digits"}]})
    assert is_point_source(blend.data) and not is_point_source(spec.held_out)
    with pytest.raises(UserError, match="no config can open it"):
        open_sources(GIVEN)


TOY = """
from dataclasses import dataclass
from typing import Literal

import numpy as np

import ddpm_accelerate
from src.config import UserError, config, json_schema, load
from src.data import register_source
from src.data.sources import ArrayImages

before = json_schema(ddpm_accelerate.Config)
load(SMOKE, ddpm_accelerate.Config)


@config
class StripesSource:
    source: Literal["stripes"]
    count: int = 32


def open_stripes(spec: StripesSource) -> ArrayImages:
    pixels = np.zeros((spec.count, 16, 16, 3), np.uint8)
    pixels[:, ::2] = 200
    return ArrayImages(
        names=[f"stripes/{i}" for i in range(spec.count)],
        labels=np.zeros(spec.count, np.int64),
        class_names=("stripes",),
        fingerprint=f"stripes {spec.count}",
        pixels=pixels,
    )


register_source(StripesSource, open_stripes)
assert "stripes" not in before and "StripesSource" in json_schema(ddpm_accelerate.Config)
cfg = load(SMOKE, ddpm_accelerate.Config, ["data.source=stripes", "data.count=40", "steps=2", "held_out=0.2"])
assert isinstance(cfg.data, StripesSource) and cfg.data.count == 40
try:
    load(SMOKE, ddpm_accelerate.Config, ["data.source=stripe"])
except UserError as error:
    print(error)
try:
    load(SMOKE, ddpm_accelerate.Config, ["data.source=stripes", "data.size=3"])
except UserError as error:
    print(error)
assert ddpm_accelerate.train(cfg, RUN) == 0
"""


def test_a_source_of_another_package_is_trained_on(tmp_path: Path) -> None:
    done = launch("-c", f"SMOKE, RUN = {SMOKE!r}, {str(tmp_path / 'run')!r}\n{TOY}")
    assert done.status == 0, done.all
    assert "data.source: 'stripe' is not known; did you mean 'stripes'? Allowed: 'folder', " in done.out
    assert "unknown key; allowed here: count, source" in done.out
    assert '"stripes"' in (tmp_path / "run" / "config.json").read_text() and (tmp_path / "run" / "final").is_dir()


def test_the_schema_that_is_shipped_is_todays() -> None:
    import ddpm_accelerate

    assert json_schema(ddpm_accelerate.Config) == (ROOT / "configs/schemas/ddpm_accelerate.json").read_text()


def test_what_identifies_images_is_for_ever() -> None:
    assert digest("a", b"b") == digest("a", b"b") != digest("ab")
    assert digest("a") == "ffe9aaeaa2a2d5048174df0b80599ef0197ec024c4b051bc9860cff58ef7f9f3"
    assert name_fraction("a.png") == pytest.approx(int(hashlib.sha256(b"a.png").hexdigest()[:16], 16) / 2**64)
    names = [f"{i}.png" for i in range(50)]
    assert set(lowest_names(names, 5)) < set(lowest_names(names, 9)) and list(lowest_names(names, 99)) == list(range(50))


def test_classes_get_their_numbers_in_order() -> None:
    labels, class_names, remarks = number_classes(["10", "9", None, "caf\u00e9", "cafe\u0301"])
    assert class_names == ("9", "10", "cafe\u0301") and labels.tolist() == [1, 0, -1, 2, 2]
    assert len(remarks) == 1 and "two spellings" in remarks[0]
    assert odd_label_remarks([[1]], ("a",)) == ["the labels are lists or tables, and each different one is a class of its own"]
    assert "the label -1" in odd_label_remarks([], ("-1", "0"))[0] and odd_label_remarks([], ("-1", "1")) == []


def test_each_source_of_several_sets_is_described_once() -> None:
    digits = open_sources(DigitsSource(source="digits"))
    half = digits.only(digits.labels < 5)
    assert sources_of(digits, half, None) == digits.parts and skipped_files(digits, half) == []
    assert describe_data(half, digits)["held_out_images"] == 1797
    assert digits.locate(3) == (digits.parts[0], 3) and count_notes(digits, half) == {}
    train_set, held_out = hold_out(digits, digits.names, 0.2, "images")
    assert len(train_set) + len(held_out) == 1797 and all(name_fraction(name) < 0.2 for name in held_out.names)
    assert hold_out(digits, digits.names, 0.0, "images") == (digits, None)
    with pytest.raises(UserError, match=r"held_out 1e-09 of 1797 images leaves one side empty"):
        hold_out(digits, digits.names, 1e-9, "images")


def test_images_that_belong_together_are_held_out_together(tmp_path: Path) -> None:
    """Here by the number of a person at the start of the file's name; a file without one goes by its own path."""
    (tmp_path / "a").mkdir()
    names = [f"{person:02d}_{i}.png" for person in range(40) for i in range(3)] + ["odd.png", "_.png"]
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "a" / name)
    data = {"source": "folder", "path": str(tmp_path), "scan": {"min_file_bytes": 0}}
    cfg = validate(_Config, {"data": data, "held_out": {"fraction": 0.3, "together": "^[0-9]+"}})
    assert isinstance(cfg.held_out, HeldOutShare) and cfg.held_out.key_of("b/7_1.png") == "7"
    assert cfg.held_out.key_of("3/odd.png") == "3/odd.png", "the folder is no part of the file's name"
    train_set, held_out = open_data(cfg.data, cfg.held_out)
    assert held_out is not None and len(train_set) + len(held_out) == len(names) and len(held_out) > 10
    people = [{Path(name).name.partition("_")[0] for name in part.names} - {"odd.png", ""} for part in (train_set, held_out)]
    assert not people[0] & people[1] and len(people[0] | people[1]) == 40
    assert people[1] == {f"{person:02d}" for person in range(40) if name_fraction(f"{person:02d}") < 0.3}
    for pattern, reason in (("x+", "finds nothing in the name of any file"), ("png", "finds 'png' in the name of every file")):
        with pytest.raises(UserError, match=reason):
            open_data(cfg.data, HeldOutShare(fraction=0.3, together=pattern))
    for held_out_value, reason in (
        ({"fraction": 0.3, "together": "["}, "held_out.together: it is no regular expression"),
        ({"fraction": 1.5, "together": "a"}, "held_out.fraction"),
        ({"together": "a"}, "held_out.fraction: this key is missing"),
        ({"path": "x"}, "held_out.source"),
    ):
        with pytest.raises(UserError, match=re.escape(reason)):
            validate(_Config, {"data": data, "held_out": held_out_value})
