"""The notebooks: as they are committed, and from top to bottom in a kernel, at home and as in Colab."""

import ast
import json
import os
import re
import shlex
import tomllib
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

from notebooks import badges
from src.data.sources import SHAPES, draw_shape
from tests.conftest import ROOT, launch

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def source(notebook: dict[str, Any], ident: str) -> str:
    return next("".join(cell["source"]) for cell in notebook["cells"] if cell["id"] == ident)


def code(ident: str, text: str) -> dict[str, Any]:
    return {"cell_type": "code", "execution_count": None, "id": ident, "metadata": {}, "outputs": [], "source": text}


def definitions(text: str) -> set[str]:
    """The functions and classes that a module, or a cell, defines."""
    nodes = ast.parse(text).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


def run(notebook: dict[str, Any], folder: Path, **extra: str) -> dict[str, list[dict[str, Any]]]:
    """The outputs of each cell, executed in a kernel in `folder`; those of widgets under "widgets"."""
    folder.mkdir(exist_ok=True)
    path = folder / "notebook.ipynb"
    path.write_text(json.dumps(notebook))
    extra = {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"), **extra}
    arguments = ["--timeout=200", "--output=done.ipynb", "notebook.ipynb"]
    done = launch("-c", "from nbclient.cli import main; main()", *arguments, cwd=folder, **extra)
    assert done.status == 0, done.all
    executed = read(folder / "done.ipynb")
    cell_outputs = {cell["id"]: cell["outputs"] for cell in executed["cells"] if cell["cell_type"] == "code"}
    widgets = executed["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {"state": {}})["state"]
    cell_outputs["widgets"] = [output for widget in widgets.values() for output in widget["state"].get("outputs", [])]
    assert all(output["output_type"] != "error" for outputs in cell_outputs.values() for output in outputs)
    return cell_outputs


def count_images(outputs: list[dict[str, Any]], kind: str = "image/png") -> int:
    return sum(kind in output.get("data", {}) for output in outputs)


def printed(outputs: list[dict[str, Any]]) -> str:
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream"), "no warnings"
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a notebook sees of the repository, so that it leaves nothing in it."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in (ROOT / "src", ROOT / "configs", *ROOT.glob("*.py")):
        (folder / path.name).symlink_to(path)
    (folder / "runs").mkdir()
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_committed_without_what_a_run_leaves(path: Path) -> None:
    """No outputs or counts, no metadata but the kernel's, cells named once, written as nbformat writes."""
    notebook, text = read(path), path.read_text(encoding="utf-8")
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert set(Counter(cell["id"] for cell in notebook["cells"]).values()) == {1}
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_each_has_its_badge_and_the_same_way_into_colab() -> None:
    assert NAMES == ["flowers", "points2d", "sampling", "zip_to_space"]
    setups = set()
    for path in NOTEBOOKS:
        notebook = read(path)
        setups.add(source(notebook, "setup"))
        title = "".join(notebook["cells"][0]["source"])
        badge = f"https://colab.research.google.com/github/{repository(notebook)}/blob/main/notebooks/{path.name}"
        assert title.startswith("# ") and title.endswith(f"({badge})")
        assert repository(notebook) == badges.repository(), "make badges"
        assert badges.with_repository(path.read_text(), "me/fork").count("/me/fork") == 2
    assert len(setups) == 1
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith("ipywidgets") for line in extras["notebook"])


def repository(notebook: dict[str, Any]) -> str:
    """Owner and name, as the setup clones it."""
    words = source(notebook, "setup").split()
    return next(word for word in words if word.startswith("https://github.com/")).removeprefix("https://github.com/")


def test_nothing_of_the_library_is_defined_again() -> None:
    library_definitions = set[str]().union(*(definitions(path.read_text()) for path in (ROOT / "src").rglob("*.py")))
    for path in NOTEBOOKS:
        for cell in read(path)["cells"]:
            if cell["cell_type"] == "code":
                python = TransformerManager().transform_cell("".join(cell["source"]))
                assert not definitions(python) & library_definitions, path
                assert all(len(line) <= 128 for line in python.splitlines())


DRAW_CALLS = """
for solver in SOLVERS:
    draw("runs/smoke", solver=solver, steps=3, count=2)
draw("runs/smoke", guidance=2.0, label="cross", count=3)
draw("runs/smoke", label="no such class")
draw("runs/smoke", steps=100_000)
"""
TURNED = "run.value = 'runs/smoke'; label.value = 'cross'; knobs.children[3].value = 7; knobs.update()"


def test_sampling_shows_what_the_knobs_ask_for(smoke_run: Path, checkout: Path, tmp_path: Path) -> None:
    """Started in notebooks/: with runs, the first without weights yet, and where there are none."""
    (checkout / "runs" / "smoke").symlink_to(smoke_run)
    for name, image in (("begun", {"size": 16}), ("points", None)):
        (checkout / "runs" / name).mkdir()
        (checkout / "runs" / name / "config.json").write_text(json.dumps({"process": {"target": "eps"}, "image": image}))
    (tmp_path / "empty").mkdir()
    notebook = read(ROOT / "notebooks" / "sampling.ipynb")
    compare = source(notebook, "compare")
    notebook["cells"] += [code("turned", TURNED), code("asked", DRAW_CALLS), code("compared", compare)]
    notebook["cells"] += [code("away", f"os.chdir({str(tmp_path / 'empty')!r})")]
    notebook["cells"] += [code(f"{ident}-away", source(notebook, ident)) for ident in ("runs", "knobs", "compare")]
    outputs = run(notebook, checkout / "notebooks")

    assert str(checkout) in printed(outputs["setup"])
    assert printed(outputs["runs"]).split() == ["runs/begun", "runs/smoke"], "images only"
    assert count_images(outputs["knobs"], "application/vnd.jupyter.widget-view+json") == 1
    assert printed(outputs["compare"]).count("runs/begun holds no checkpoint") == 4 and count_images(outputs["compare"]) == 0
    assert count_images(outputs["compared"]) == 4 and "heun, 10 steps: 19 network calls" in printed(outputs["compared"])
    assert count_images(outputs["widgets"]) == 1 and "euler, 7 steps: 7 network calls" in printed(outputs["widgets"])
    lines = printed(outputs["asked"]).splitlines()
    counts = [int(line.split()[3]) for line in lines if line.endswith("network calls")]
    assert len(counts) == 9 == count_images(outputs["asked"]), "eight solvers, and guidance"
    assert counts[:4] == [3, 5, 5, 9] and counts[-1] == 40, "guidance asks twice"
    assert "class 'no such class' is not known; the classes are: circle, cross" in lines[-2]
    assert "100000 sampling steps are more than" in lines[-1] and len(lines) == 11
    assert printed(outputs["runs-away"]).startswith("no run yet: make demo") and printed(outputs["runs-away"]).count("\n") == 1
    assert not outputs["knobs-away"] and not outputs["compare-away"]


COLAB = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')"


@pytest.mark.soak
def test_points_move_from_drawing_to_drawing_in_colab(checkout: Path, tmp_path: Path) -> None:
    """In Colab's way, with stand-ins for git and pip that note what they are asked, and few steps of a small network."""
    (tmp_path / "bin").mkdir()
    for name, does in (("git", f"ln -s {checkout} atelier"), ("pip", "true")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.txt\n{does}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    notebook = read(ROOT / "notebooks" / "points2d.ipynb")
    config = next(cell for cell in notebook["cells"] if cell["id"] == "config")
    few = '"steps": 60, "model": {"kind": "mlp", "width": 16, "layers": 2},'
    changed = source(notebook, "config").replace('"steps": 1500,', few)
    assert changed != source(notebook, "config")
    config["source"] = changed
    notebook["cells"].insert(0, code("colab", COLAB))
    setup = next(i for i, cell in enumerate(notebook["cells"]) if cell["id"] == "setup")
    notebook["cells"].insert(setup + 1, code("no-colab", "del sys.modules['google.colab']"))  # others ask for it, too
    outputs = run(notebook, tmp_path / "content", PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    assert (tmp_path / "git.txt").read_text() == f"clone --depth 1 https://github.com/{repository(notebook)}\n"
    assert (tmp_path / "pip.txt").read_text() == "install --quiet .[notebook]\n"
    assert printed(outputs["setup"]).strip() == f"working in {checkout}"
    train_output = printed(outputs["train"])
    assert "step 60/60 loss" in train_output and "finished; see runs/star_to_heart/points" in train_output
    shown = {"drawings": 1, "blend": 1, "preview": 1, "moving": 1, "ways": 2, "steps": 1}
    assert {ident: count_images(outputs[ident]) for ident in shown} == shown
    assert count_images(outputs["moving"], "image/gif") == 1
    run_dir = checkout / "runs" / "star_to_heart"
    with Image.open(run_dir / "points" / "points.gif") as gif:
        assert gif.n_frames == 129  # pyright: ignore[reportAttributeAccessIssue]
    assert json.loads((run_dir / "config.json").read_text())["source"]["path"] == "datasets/points2d/star.png"
    command = shlex.split(source(notebook, "step-9").split("```sh\n")[1].split("```")[0].replace("\\\n", " "))
    done = launch(*command[1:], "--dry-run", cwd=checkout)
    assert command[0] == "python" and done.status == 0, done.all


@pytest.mark.soak
def test_flowers_are_learned_drawn_walked_between_and_inverted(checkout: Path, tmp_path: Path) -> None:
    """With shapes for flowers, a few steps of a small network, and no hub."""
    for n, kind in enumerate(("lotus", "petunia", "rose")):
        (checkout / "datasets" / "flowers" / kind).mkdir(parents=True)
        for i in range(8):
            pixels = draw_shape(SHAPES[n], 40, np.random.default_rng([n, i]))
            Image.fromarray(pixels).save(checkout / "datasets" / "flowers" / kind / f"{i}.jpg")
    notebook = read(ROOT / "notebooks" / "flowers.ipynb")
    config = next(cell for cell in notebook["cells"] if cell["id"] == "config")
    changed = source(notebook, "config").replace(
        '{"steps": 3000, "base_channels": 48, "every": 1000}', '{"steps": 4, "base_channels": 8, "every": 4}'
    )
    assert changed != source(notebook, "config")
    config["source"] = changed
    outputs = run(notebook, checkout / "notebooks")

    assert printed(outputs["flowers"]).splitlines() == ["lotus: 8 photos", "petunia: 8 photos", "rose: 8 photos"]
    train_output = printed(outputs["train"])
    assert "step 4/4 loss" in train_output and "finished; see runs/flowers32/samples" in train_output
    shown = {"preview": 2, "draw": 1, "invert": 1}
    assert {ident: count_images(outputs[ident]) for ident in shown} == shown
    assert count_images(outputs["walk"], "image/gif") == 1
    assert (checkout / "samples" / "flowers32_inverted").is_dir() and (checkout / "samples" / "flowers32_walk").is_dir()
    assert not re.search("(?i)error|Traceback", "".join(printed(outputs[ident]) for ident in ("walk", "invert", "train")))


@pytest.mark.soak
def test_a_zip_becomes_a_space(checkout: Path, tmp_path: Path) -> None:
    """With shapes for images, a few steps of a small network, and no hub."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[app]'")
    with zipfile.ZipFile(checkout / "images.zip", "w") as file:
        for n, kind in enumerate(("round", "square")):
            for i in range(30):
                Image.fromarray(draw_shape(SHAPES[n], 72, np.random.default_rng([n, i]))).save(tmp_path / "one.png")
                file.write(tmp_path / "one.png", f"{kind}/{i}.png")
    notebook = read(ROOT / "notebooks" / "zip_to_space.ipynb")
    few = "steps=4 preview.every=4 image.size=32 model.base_channels=8 preview.num_samples=4 data.scan.min_file_bytes=0"
    for ident, old, new in (
        ("train", "mixed_precision=auto", " --set ".join(["mixed_precision=no", *few.split()])),
        ("measure", "count = 200", "count = 20"),
    ):
        cell = next(cell for cell in notebook["cells"] if cell["id"] == ident)
        assert old in source(notebook, ident)
        cell["source"] = source(notebook, ident).replace(old, new)
    outputs = run(notebook, checkout / "notebooks")

    assert "60 images" in printed(outputs["zip"]) and "step 4/4 loss" in printed(outputs["train"])
    assert [count_images(outputs[ident]) for ident in ("sheet", "look", "draw")] == [1, 1, 1]
    assert count_images(outputs["draw"], "image/gif") == 1 and "copied" in printed(outputs["measure"])
    assert (checkout / "my_space" / "app.py").exists() and not outputs["push"], "nothing is pushed without a name"
    assert not [path for path in (checkout / "my_space").rglob("*") if "datasets" in path.parts]
