"""Importing torchvision, in processes of their own: what is imported there stays there."""

import importlib
from pathlib import Path

import pytest
import torch

from src.config import UserError
from src.models.pretrained import find_weights, import_torchvision, random_convolutions
from tests.conftest import ROOT, launch

NO_OPERATORS = """
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets
"""


def python(code: str, **extra: str) -> str:
    done = launch("-c", code, **extra)
    assert done.status == 0, done.all
    return done.out


def test_after_it_torchvisions_networks_and_what_imports_torchvision_come_in() -> None:
    out = python(
        "from src.models.pretrained import import_torchvision\n"
        "first = import_torchvision()\n"
        "import torch, torchvision, torchvision.models, lpips, torchmetrics\n"
        "assert first is torchvision and import_torchvision() is torchvision\n"
        "with torch.device('meta'):\n"
        "    assert len(torchvision.models.alexnet().features) == 13\n"
        "print('done')"
    )
    assert out == "done\n"


def test_a_torchvision_that_was_compiled_for_another_torch_is_said_in_one_line_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(NO_OPERATORS)
    path = f"{tmp_path}:{ROOT}"
    for script, why in (("train_vae", "measuring reconstructions"), ("ddpm_accelerate", "preview.quality.features random")):
        config = f"configs/smoke/{script.removeprefix('train_').removesuffix('_accelerate')}.json"
        done = launch(f"{script}.py", "-cfg", config, "--run-dir", tmp_path / "run", PYTHONPATH=path)
        message = f"{why} needs the package torchvision, and the installed one was compiled for another torch than "
        assert done.status == 2 and done.all.count("error: ") == 1, done.all
        assert f"error: {message}{torch.__version__}: pip install --upgrade torch torchvision\n" in done.all, done.all
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("operator torchaudio::load does not exist"), ImportError("No module named 'torchvision'"), OSError("nms")],
    ids=str,
)
def test_an_error_about_something_else_is_passed_on(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[str] = []

    def refuse(name: str) -> None:
        requested.append(name)
        raise error

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(type(error)) as caught:
        import_torchvision()
    assert caught.value is error and requested == ["torchvision"]


def test_weights_are_those_that_the_user_names(tmp_path: Path) -> None:
    words = {"option": "--weights", "otherwise": "or use another"}
    (tmp_path / "a.pth").write_bytes(b"x")
    path = find_weights("x needs weights", str(tmp_path / "a.pth"), tmp_path / "cached.pth", "https://x/cached.pth", **words)
    assert path == tmp_path / "a.pth"
    message = r"^x needs weights that are not at .*b.pth; get them from https://x/cached.pth .*--weights; or use another"
    with pytest.raises(UserError, match=message):
        find_weights("x needs weights", str(tmp_path / "b.pth"), tmp_path / "cached.pth", "https://x/cached.pth", **words)


def test_random_convolutions_are_always_the_same() -> None:
    x = torch.ones(1, 3, 16, 16)
    torch.manual_seed(1)
    y = random_convolutions()(x)
    torch.manual_seed(2)
    assert y.shape == (1, 16, 2, 2) and torch.equal(random_convolutions()(x), y)
