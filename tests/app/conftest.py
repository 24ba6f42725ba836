"""A place with runs, as a person has it after some training: below runs/, and models/."""

import asyncio
import gc
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from src.app.page import serve
from src.app.places import Places
from tests.conftest import run_in_process


def train(script: str, config: str, run: Path, *settings: str) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    done = run_in_process(f"{script}.py", "-cfg", config, "--run-dir", run, *words)
    assert done.status == 0, done.all


@contextmanager
def closed_loops() -> Iterator[None]:
    """Around gradio's work: it makes event loops that it never closes."""
    loops, make_loop = list[asyncio.AbstractEventLoop](), asyncio.new_event_loop

    def recorded() -> asyncio.AbstractEventLoop:
        loops.append(make_loop())
        return loops[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", recorded)
        try:
            yield
        finally:
            asyncio.set_event_loop(None)
            for loop in loops:
                if not loop.is_running():
                    loop.close()
            with warnings.catch_warnings():  # of sockets that gradio leaves open: here, or in another test
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()


@contextmanager
def served(**options: Any) -> Iterator[Any]:
    """The page of the working directory on a server, as gradio's Blocks."""
    with closed_loops(), serve(Places(), torch.device("cpu"), **options) as page:
        yield page


@pytest.fixture(scope="session")
def workplace(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/shapes, its export models/shapes.pt, runs/larger, which makes images larger, and runs/points; read only."""
    base = tmp_path_factory.mktemp("place")
    shutil.copytree(smoke_run, base / "runs" / "shapes", ignore=shutil.ignore_patterns("tensorboard"))
    (base / "models").mkdir()
    shutil.copy(next(smoke_run.parent.rglob("*.pt")), base / "models" / "shapes.pt")
    few = ("steps=4", "preview.every=4", "checkpoint.every=4")
    train("ddpm_accelerate", "configs/smoke/condition.json", base / "runs" / "larger", *few)
    points = ("model.width=16", "batch_size=256", "preview.num_samples=64", "preview.batch_size=64", "source.source=gaussian")
    train("train_iadb", "configs/points2d_iadb.json", base / "runs" / "points", *few, *points, "data.count=2048")
    return base


@pytest.fixture
def place(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the working directory."""
    monkeypatch.chdir(workplace)
    return workplace
