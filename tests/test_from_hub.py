"""A run on the hub is a run: each script takes OWNER/NAME[@REVISION], draws the same from it, and so does from_pretrained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import src
from src.config import UserError
from src.runs.autoencoder import open_autoencoder
from src.runs.opened import open_run
from src.runs.starting import start_from
from tests.conftest import ROOT, SMOKE, launch, refused, run_here
from tests.hub_server import TOKEN, HubServer

RUNS = ROOT / "tests" / "old_runs"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of shapes in four classes, at its checkpoint."""
    run = tmp_path_factory.mktemp("runs") / "shapes"
    shutil.copytree(RUNS / "ddpm_accelerate" / "run", run)
    return str(run)


@pytest.fixture
def pushed(hub: HubServer, shapes: str) -> HubServer:
    """With the run as me/cats."""
    run_here("convert", "push", shapes, "me/cats")
    return hub


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_convert_pushes_a_run(pushed: HubServer, shapes: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = pushed.files("me/cats")
    weights = (RUNS / "ddpm_accelerate" / "run" / "checkpoints" / "step_00000004" / "ema.safetensors").read_bytes()
    names = {"README.md", "config.json", "data.json", "ema.safetensors", "progress.json", "MANIFEST.json"}
    assert files.keys() == names and files["ema.safetensors"] == weights
    assert pushed.messages("me/cats") == ["old_ddpm, step 4"]
    assert b"me/cats" in files["README.md"] and b"4 classes" in files["README.md"]

    run_here("convert", "push", shapes, "me/cats@trial")
    out = capsys.readouterr().out
    assert f"{pushed.url}/me/cats/tree/trial: README.md says how to draw" in out and "python sample.py me/cats@trial" in out
    trial = pushed.files("me/cats", "trial")
    assert trial["MANIFEST.json"] == files["MANIFEST.json"] and b"me/cats@trial" in trial["README.md"]
    pushed.make("me/cats", {"README.md": b"# mine"})
    run_here("convert", "push", shapes, "me/cats")
    assert "ATELIER.md says how to draw from it" in (line := capsys.readouterr().out)
    assert (
        "the README.md there is somebody's own, and is as it was" in line and pushed.files("me/cats")["README.md"] == b"# mine"
    )
    assert TOKEN not in out and TOKEN.encode() not in b"".join([*files.values(), *pushed.bodies])


def test_what_cannot_be_pushed_is_said_in_one_line(
    hub: HubServer, shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cats is no name on the Hugging Face hub, which is OWNER/NAME" in refused("convert", "push", shapes, "cats")
    assert f"{tmp_path / 'none'}: there is no such run or checkpoint" in refused(
        "convert", "push", tmp_path / "none", "me/cats"
    )
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in refused("convert", "push", tmp_path / "empty", "me/cats")
    (tmp_path / "weights.pt").write_bytes(b"")
    assert "is one file; give the run" in refused("convert", "push", tmp_path / "weights.pt", "me/cats")
    assert "may not write to other/cats (status 403)" in refused("convert", "push", shapes, "other/cats")
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token to write to me/cats" in refused("convert", "push", shapes, "me/cats")
    assert not hub.repos


def test_scripts_draw_the_same_from_a_name(pushed: HubServer, shapes: str, tmp_path: Path) -> None:
    words = ("--num-samples", 6, "--steps", 4, "--seed", 3, "--guidance", 2, "--classes", "cross/1/0", "--batch-size", 4)
    for name, out in ((shapes, "here"), ("me/cats", "hub")):
        run_here("sample", name, *words, "--guide-with", name, "--out", tmp_path / out)
    assert pngs(tmp_path / "here") == pngs(tmp_path / "hub") and len(pngs(tmp_path / "hub")) == 7
    facts = json.loads((tmp_path / "hub" / "metadata.json").read_text())
    assert facts["path"] == "me/cats", "which another machine can open, too"

    words = ("--num-seeds", 2, "--frames-between", 2, "--steps", 2)
    for name, out in ((shapes, "way"), ("me/cats", "way_hub")):
        run_here("interpolate", name, *words, "--out", tmp_path / out)
    assert pngs(tmp_path / "way" / "frames") == pngs(tmp_path / "way_hub" / "frames") != {}

    for name, out in ((shapes, "bits"), ("me/cats", "bits_hub")):
        run_here("evaluate", name, "--likelihood", "--steps", 3, "--num-images", 4, "--out", tmp_path / out)
    numbers = (Path(shapes) / "metrics.jsonl").read_text().splitlines()[-1]
    assert (tmp_path / "bits_hub" / "metrics.jsonl").read_text().splitlines() == [numbers] and "bits_per" in numbers

    run_here("convert", "safetensors", "me/cats", "--out", tmp_path / "cats.safetensors")
    assert (tmp_path / "cats.safetensors").stat().st_size > 1000


def test_a_run_starts_from_a_name(pushed: HubServer, shapes: str, tmp_path: Path) -> None:
    run, fresh = open_run(shapes, CPU), open_run(shapes, CPU)
    with torch.no_grad():
        for parameter in fresh.network.parameters():
            parameter.zero_()
    assert start_from("me/cats", run.class_names, fresh.network) == "starting from the weights of me/cats (step 4)"
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, fresh.network.state_dict()[name])
    line = refused("ddpm_accelerate", "-cfg", ROOT / "configs/smoke/ddpm.json", "--set", "init_from=me/dogs",
                   "--run-dir", tmp_path / "run")  # fmt: skip
    assert "me/dogs: there is no such run or checkpoint here: the Hugging Face hub has no model me/dogs" in line


def test_an_autoencoder_comes_from_a_name(hub: HubServer) -> None:
    run = RUNS / "train_vae" / "run"
    checkpoint = next((run / "checkpoints").glob("step_*"))
    run_here("convert", "push", checkpoint, "me/vae")
    local, brought = open_autoencoder(str(checkpoint), CPU), open_autoencoder("me/vae@main", CPU)
    assert brought.digest == local.digest and brought.path == "me/vae@main"
    assert brought.document == local.document
    with pytest.raises(UserError, match="autoencoder me/none is no folder here: the Hugging Face hub has no model me/none"):
        open_autoencoder("me/none", CPU)
    with pytest.raises(UserError, match="is an autoencoder, which draws nothing by itself"):
        src.from_pretrained("me/vae", device="cpu")


def test_of_two_processes_one_fetches_and_they_draw_the_same(pushed: HubServer, shapes: str, tmp_path: Path) -> None:
    words = ("--num-samples", 4, "--batch-size", 2, "--steps", 2)
    run_here("sample", shapes, *words, "--device", "cpu", "--out", tmp_path / "one")
    pushed.requests.clear()
    done = launch("sample.py", "me/cats", *map(str, words), "--out", tmp_path / "two", processes=2)
    assert done.status == 0 and "2 process(es)" in done.out, done.all
    assert pngs(tmp_path / "one") == pngs(tmp_path / "two")
    assert pushed.count("file") == 2 * 5, "a question and an answer for each of five files"
    assert TOKEN not in done.all


# ---------------------------------------------------------------------------------------------- from_pretrained


@pytest.fixture
def model(shapes: str) -> Any:
    return src.from_pretrained(shapes, device="cpu")


SETTINGS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "as it is": (["--steps", 3], {"steps": 3}),
    "classes": (
        ["--classes", "cross/3", "--num-samples", 4, "--seed", 5, "--steps", 3, "--guidance", 2.5, "--solver", "heun"],
        {"classes": ["cross", 3], "num_samples": 4, "seed": 5, "steps": 3, "guidance": 2.5, "solver": "heun"},
    ),
    "size": (
        ["--size", "16x24", "--num-samples", 3, "--batch-size", 2, "--steps", "2,2", "--eta", 0.5],
        {"size": (16, 24), "num_samples": 3, "batch_size": 2, "steps": (2, 2), "eta": 0.5},
    ),
    "guide": (
        ["--guide-with", "RUN", "--guidance", 3, "--guidance-interval", 0.1, 9, "--num-samples", 2, "--steps", 3],
        {"guide_with": "RUN", "guidance": 3.0, "guidance_interval": (0.1, 9), "num_samples": 2, "steps": 3},
    ),
}


@pytest.mark.parametrize("what", list(SETTINGS))
def test_it_draws_what_sample_draws_to_the_bit(model: Any, shapes: str, tmp_path: Path, what: str) -> None:
    words, settings = [shapes if word == "RUN" else word for word in SETTINGS[what][0]], dict(SETTINGS[what][1])
    settings |= {"guide_with": shapes} if "guide_with" in settings else {}
    run_here("sample", shapes, *words, "--device", "cpu", "--out", tmp_path / "out")
    images = model.draw(**settings)
    files = sorted((tmp_path / "out").glob("0*.png"))
    assert len(images) == len(files) == settings.get("num_samples", 16)
    for image, file in zip(images, files, strict=True):
        with Image.open(file) as written:
            assert written.mode == image.mode and np.array_equal(np.asarray(written), np.asarray(image))


def test_it_draws_from_images(tmp_path: Path) -> None:
    keys = {"condition.kind": "grey", "steps": 2, "preview.quality": "null", "log.trackers": "[]", "label_dropout": 0.5}
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    run_here("ddpm_accelerate", "-cfg", SMOKE, *words, "--run-dir", tmp_path / "run")
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    model = src.from_pretrained(str(tmp_path / "run"), device="cpu")
    words = ("--condition", tmp_path, "--num-samples", 2, "--steps", 3, "--batch-size", 4)
    for extra, settings in (((), {}), (("--classes", "1/2"), {"classes": "1/2"})):
        out = tmp_path / f"out{len(extra)}"
        run_here("sample", tmp_path / "run", *words, *extra, "--device", "cpu", "--out", out)
        images = model.draw(condition=tmp_path, num_samples=2, steps=3, batch_size=4, **settings)
        files = sorted(out.glob("0*.png"))
        assert len(images) == len(files) == 6
        assert all(np.array_equal(np.asarray(Image.open(file)), np.asarray(image)) for file, image in zip(files, images))  # noqa: B905
    with pytest.raises(UserError, match=r"draws from images \(grey\): give condition, a file or a folder"):
        model.draw()


def test_it_draws_from_the_hub(pushed: HubServer, model: Any) -> None:
    brought = src.from_pretrained("me/cats", device="cpu")
    assert brought.class_names == ("circle", "cross", "square", "triangle") and "me/cats" in repr(brought)
    one, other = (each.draw(num_samples=1, steps=2)[0] for each in (brought, model))
    assert one.tobytes() == other.tobytes()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown setting": ({"step": 3}, "draw: step: unknown key; did you mean 'steps'?"),
    "a solver": ({"solver": "eular"}, "solver"),
    "a class": ({"classes": "dog"}, "class 'dog' is not known; the classes are: circle, cross, square, triangle"),
    "a number": ({"classes": 4}, "class 4 is not known: .* has 4 classes"),
    "blocks": ({"classes": [0, 1], "num_samples": 3}, "3 images cannot be dealt to 2 classes in equal blocks"),
    "images": ({"condition": "tests"}, "draws from no image; leave --condition out"),
    "none": ({"num_samples": 0}, "num_samples and batch_size must be at least 1"),
    "size": ({"size": 15}, "is not divisible by it"),
    "classifier": ({"guidance_method": "classifier", "guidance": 2.0}, "sample.py, which takes --classifier RUN"),
}


@pytest.mark.parametrize("what", list(MISTAKES))
def test_mistakes_are_one_line(model: Any, what: str) -> None:
    settings, words = MISTAKES[what]
    with pytest.raises(UserError, match=words) as raised:
        model.draw(**{"steps": 5, **settings})
    assert "\n" not in str(raised.value)


def test_import_atelier_is_light() -> None:
    code = "import sys, src; print('torch' in sys.modules, 'pydantic' in sys.modules, *src.__all__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "Pretrained", "from_pretrained"], done.stderr
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = src.other


def test_a_run_keeps_to_the_autoencoder_of_the_hub_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is pushed there meanwhile: it is not asked for."""
    from src.runs import autoencoder

    monkeypatch.setattr(autoencoder, "kept_autoencoder", lambda run_dir, device: f"that of {run_dir.name}")
    monkeypatch.setattr(autoencoder, "open_autoencoder", lambda name, device: SimpleNamespace(notes=(), name=name))
    run, cpu = tmp_path / "run", torch.device("cpu")
    assert autoencoder.autoencoder_for("me/vae", run, cpu).name == "me/vae"
    (run / "autoencoder").mkdir(parents=True)
    (run / "autoencoder" / "autoencoder_config.json").write_text('{"path": "me/vae"}')
    assert autoencoder.autoencoder_for("me/vae", run, cpu) == "that of run"
    assert autoencoder.autoencoder_for("me/other", run, cpu).name == "me/other", "the config names another one now"


def test_classes_are_numbers_of_numpy_too(smoke_run: Path) -> None:
    cats = src.from_pretrained(str(smoke_run), device="cpu")
    for one in (np.int64(1), torch.tensor(1), np.arange(1, 2), [1], 1):
        assert np.array_equal(*(np.asarray(cats.draw(classes=c, num_samples=1, steps=1)[0]) for c in (one, "cross"))), one
