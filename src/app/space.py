"""A run as a Space: a folder with the page, this package, and the final weights, which starts with `python app.py`."""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from ..config import PACKAGE, SCRIPTS, UserError
from ..config.packages import ask_for
from ..data.names import join_names
from ..report.card import draws_from_noise
from ..runs.folders import run_name
from ..runs.opened import Opened, Run, open_run
from ..runs.sharing import share_run

# What drawing needs, as pip installs it; gradio comes with the Space.
PACKAGES = (
    *("accelerate", "datasets", "diffusers", "einops", "imageio-ffmpeg", "jinja2", "matplotlib", "numpy", "pillow"),
    *("psutil", "pydantic", "safetensors", "torch", "torchvision", "tqdm"),
)
LARGE = "filter=lfs diff=lfs merge=lfs -text"  # how git keeps large files
CARD = """---
title: {title}
emoji: 🖼️
colorFrom: indigo
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
pinned: false
---

# {title}

This page draws with `{name}` (step {step}), which was trained with Atelier.{classes}

`pip install -r requirements.txt gradio` and then `python app.py` open the same page on your machine. The licence of weights and
images is yours to name: add `license:` to the header of this file.
"""


def write_space(out: Path, run: str, device: torch.device) -> list[Path]:
    """Write the folder `out`, a Space of the `run`, and give what is in it. The data of the run is not there. A UserError where
    the folder holds something, or where the run could draw nothing there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; give another --export, or remove it")
    ask_for("a Space (app.py --export)", "gradio")
    opened = open_run(run, device)
    name = run_name(run)
    if isinstance(opened, Opened) and not opened.gaussian:
        raise UserError(
            f"{run} starts from images, not from noise, and no image travels with a Space, so it would draw nothing there"
        )
    if Path(run).is_file():
        (out / "models").mkdir(parents=True)
        shutil.copy(run, out / "models" / f"{name}.pt")
    else:
        shared = share_run(run)
        for file, content in shared.files.items():
            path = out / "runs" / name / "final" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copy(content, path)
        if draws_from_noise(shared.config):  # other previews show images of the data
            copy_preview(shared.directory, out / "runs" / name)
    shutil.copytree(PACKAGE, out / "src", ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "scripts"))
    shutil.copy(SCRIPTS / "app.py", out / "app.py")
    (out / "requirements.txt").write_text("".join(f"{package}\n" for package in PACKAGES), encoding="utf-8")
    (out / "README.md").write_text(render_card(opened, name), encoding="utf-8")
    (out / ".gitattributes").write_text("".join(f"*.{ending} {LARGE}\n" for ending in ("safetensors", "pt")))
    return sorted(out.iterdir())


def render_card(opened: Run, name: str) -> str:
    """README.md of a Space, whose header says how it is started."""
    classes = f" It knows the classes {join_names(opened.class_names, 40)}." if opened.num_classes is not None else ""
    python = ".".join(map(str, sys.version_info[:2]))
    title = json.dumps(name, ensure_ascii=False)  # as YAML reads it, whatever is in the name
    header = CARD.format(title=title, gradio=version("gradio"), python=python, name=name, step=opened.step, classes=classes)
    return header.replace(f"# {title}", f"# {name}")


def copy_preview(run: Path, place: Path) -> None:
    """Copy the newest preview of the run, for the gallery."""
    from .cards import last_preview

    preview = last_preview(run)
    if preview is not None and preview.is_relative_to(run / "samples"):
        copy = place / preview.relative_to(run)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(preview, copy)
