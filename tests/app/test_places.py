"""Which runs the page knows, and that it opens nothing else; and what it asks sample.py's words for."""

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from src.app.asking import divisible, join_classes, parse_shares, whole
from src.app.places import NEWEST, Facts, Places, kind_of_run, read_facts
from src.config import UserError, dump, validate
from src.sampling import SamplerConfig
from src.sampling.config import sampler_config, sampler_words
from src.sampling.plan import DrawRequest
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))
import sample


def test_the_runs_below_the_roots_and_those_that_the_owner_named(place: Path) -> None:
    (place / "runs" / "notes").mkdir(exist_ok=True)
    places = Places(named=("me/cats",))
    assert places.names()[0] == "me/cats" and set(places.names()) == {
        *("me/cats", "runs/shapes", "runs/larger", "runs/points", "models/shapes.pt"),
    }
    kinds = {name: places.facts(name).kind for name in places.names()}
    assert kinds == {
        "runs/shapes": "images",
        "runs/larger": "images",
        "runs/points": "points",
        "models/shapes.pt": "export",
        "me/cats": "hub",
    }
    assert places.facts("runs/shapes").class_names == ("circle", "cross", "square", "triangle")
    assert places.facts("runs/larger").condition == "low" and places.facts("runs/shapes").condition is None
    assert places.facts("runs/nothing") == Facts({}, (), "other")


def test_checkpoints_have_the_paths_that_sample_py_takes(place: Path) -> None:
    places = Places()
    steps = places.checkpoints("runs/shapes")
    assert steps[0] == NEWEST and steps[1] == "step_00000030" and len(steps) >= 4
    assert places.place("runs/shapes") == places.place("runs/shapes", NEWEST) == "runs/shapes"
    assert places.place("runs/shapes", "step_00000020") == "runs/shapes/checkpoints/step_00000020"
    assert places.guide("0.10") == "0.10" and places.guide("") is None and places.guide("runs/larger") == "runs/larger"
    with pytest.raises(UserError, match="has no step_00000007 any more"):
        places.place("runs/shapes", "step_00000007")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../place/runs/shapes",
            "runs/../runs/shapes",
            "/etc",
            "runs/shapes/",
            "runs",
            "runs/shapes/checkpoints/../final",
            "",
        ),
        *("models/../../x.pt", "runs/notes", "me/dogs", "~/runs/shapes", "file:///etc/passwd"),
    ],
)
def test_no_other_path_is_opened(name: str, place: Path) -> None:
    for open_it in (Places().place, lambda word: Places().guide(word or "x")):
        with pytest.raises(UserError) as raised:
            open_it(name)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="has no"):
        Places().place("runs/shapes", f"../../{name}")


def test_a_run_that_vanishes_is_named(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(workplace / "runs" / "points", tmp_path / "runs" / "points")
    monkeypatch.chdir(tmp_path)
    places = Places()
    assert places.place("runs/points") == "runs/points"
    shutil.rmtree(tmp_path / "runs" / "points")
    with pytest.raises(UserError, match="^the run runs/points is gone; choose another$"):
        places.place("runs/points")


def test_the_kind_of_a_run() -> None:
    of_images = {"model": {}, "process": {}, "image": {"size": 8}}
    assert [
        kind_of_run(config) for config in ({"stages": []}, {"classifier": {}}, {}, of_images, of_images | {"image": None})
    ] == [
        *("autoencoder", "classifier", "other", "images", "points"),
    ]


def test_facts_of_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert read_facts(tmp_path).kind == "other"
    (tmp_path / "config.json").write_text(json.dumps({"stages": []}))
    (tmp_path / "data.json").write_text("[]")
    assert read_facts(tmp_path) == Facts({"stages": []}, (), "autoencoder")
    assert read_facts(Path("nothing.txt")).kind == "other" and not read_facts(tmp_path).draws_images


SAMPLERS = [
    {},
    {"solver": "heun", "steps": 7, "guidance": 2.5, "spacing": "trailing"},
    {"steps": (10, 5), "eta": 0.5, "guidance": 2.0, "guidance_interval": (0.25, 3.0)},
    {"alphas": (0.0, 0.25, 1.0), "solver": "euler", "guide_with": "runs/small one", "guidance": 1.5},
    {"shift": {"base": 4096}, "threshold": 0.995, "guide_with": "0.10", "stop_at": 3, "guidance": -1.0},
    {"guidance_method": "classifier", "guidance": 1.0, "double_sampling": 2},
]


@pytest.mark.parametrize("keys", SAMPLERS)
def test_the_words_of_a_sampler_are_read_as_that_sampler(keys: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = validate(SamplerConfig, keys)
    monkeypatch.setattr(sys, "argv", ["sample.py", "run", *sampler_words(spec)])
    args, _ = sample.arguments()
    assert dump(sampler_config(args)) == dump(spec)


def test_the_words_of_a_request_are_read_as_that_request(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = validate(SamplerConfig, {"solver": "heun", "steps": 3})
    given = {"classes": "a b/c", "size": "16x8", "seed": 2**53 - 1, "frames": True, "num_samples": 6, "batch_size": 6}
    request = DrawRequest(run="runs/a b", spec=spec, **given, image="x y.png", start_at=2, mask="m.png", resamplings=3)
    monkeypatch.setattr(sys, "argv", ["sample.py", *request.words])
    args, defaults = sample.arguments()
    sample.check(args, defaults)
    asked_for = request.arguments
    for key in fields(DrawRequest):
        if key.name != "spec":
            assert getattr(args, key.name) == getattr(asked_for, key.name), key.name
    assert request.command("cpu").startswith("python sample.py 'runs/a b' --num-samples 6 ")
    assert request.command("cpu").endswith(" --device cpu") and "--device" not in request.command()
    assert DrawRequest(run="x").words == ["x", *["--batch-size", "16", "--seed", "0", "--solver", "ddim", "--steps", "50"]]
    for mistake in ({"seed": -1}, {"seed": 2**64}, {"num_samples": 0}, {"resamplings": 0}):
        with pytest.raises(UserError):
            DrawRequest(run="x", **mistake)


def test_shares_deal_classes_to_blocks() -> None:
    names = ["cat", "dog", "1", "a/b"]
    assert join_classes([], names) is None and join_classes(["dog"], names) == "dog"
    assert join_classes(["dog", "cat"], names, "2/1") == "dog/dog/cat"
    assert join_classes(["a/b", "cat"], names, " ") == "a\\/b/cat"
    assert join_classes(["a", "b"], ["a", "b", "a/b"]) == "0/1" or join_classes(["a", "b"], ["a", "b", "a/b"]) == "a/b"
    assert divisible(16, "dog/dog/cat", names) == 18 and divisible(5, None, []) == 5
    with pytest.raises(UserError, match="shares of 100 in all need 100 images"):
        divisible(16, "/".join(["dog"] * 100), names)
    assert parse_shares(None, 3) == [1, 1, 1] and parse_shares("1/20", 2) == [1, 20]
    for text in ("1", "1/2/3", "0/1", "a/b", "1/101", "1.5/1"):
        with pytest.raises(UserError, match="give a number from 1 to 100 for each of"):
            parse_shares(text, 2)
    with pytest.raises(UserError, match="does not know the class cow"):
        join_classes(["cow"], names)


def test_whole_numbers() -> None:
    assert whole(3.0, "steps", 1, 5) == 3
    for value in (None, 2.5, 0, 6, "3", float("nan"), float("inf")):
        with pytest.raises(UserError, match="^steps: give a whole number from 1 to 5$"):
            whole(value, "steps", 1, 5)
