"""The script of `make env` that installs the CPU build of torch on the CI machines, with a pip that is made up."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, launch

FILE = ROOT / ".ci" / "torch_cpu_build.py"
EXTENSION = "import torch\n\n\ndef _has_ops():\n    return {}\n"
REGISTRATIONS = """
import torch
from . import extension

for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}", lambda dets, scores, iou_threshold: dets)
"""


class Pip:
    """Stands in for pip: has the CPU build in its folders or not, and notes what it is asked to install."""

    def __init__(self, has_build: bool, status: int = 0) -> None:
        self.has_build, self.status = has_build, status
        self.installed: list[str] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess:
        assert command[1:4] == ["-m", "pip", "install"]
        if "--no-index" in command:
            assert "--dry-run" in command and command[-1].endswith("+cpu"), "PyPI has no version with such an ending"
            return subprocess.CompletedProcess(command, 0 if self.has_build else 1)
        self.installed += [word for word in command[4:] if not word.startswith("-")]
        return subprocess.CompletedProcess(command, self.status)


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("torch_cpu_build", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put_torchvision(site: Path, has_operators: bool) -> Path:
    """A package torchvision in the folder `site` that needs its operators when it is imported, as the real one does."""
    folder = site / "torchvision"
    folder.mkdir()
    (folder / "extension.py").write_text(EXTENSION.format(has_operators))
    (folder / "__init__.py").write_text(REGISTRATIONS)
    return folder


@pytest.mark.parametrize("gpu", [None, "/bin/nvidia-smi"])
@pytest.mark.parametrize("has_build", [True, False])
@pytest.mark.parametrize("status", [0, 1])
def test_the_cpu_build_is_installed_only_where_pip_has_it_and_no_gpu_is(
    script: Any, gpu: str | None, has_build: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(has_build, status)
    extension = put_torchvision(tmp_path, False) / "extension.py"
    monkeypatch.setattr(script.subprocess, "run", pip)
    monkeypatch.setattr(script.shutil, "which", lambda name: gpu)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    assert script.has_cpu_build() == (has_build and gpu is None)
    if script.has_cpu_build():
        assert script.main() == status and pip.installed == [script.TORCH, script.TORCHVISION]
        assert (script.OPERATORS in extension.read_text()) == (status == 0)
    else:
        assert script.main() == 0 and pip.installed == [], "pip takes the newest when it installs the project"
        assert extension.read_text() == EXTENSION.format(False)


def test_a_torchvision_without_operators_is_imported_after_they_are_defined(script: Any, tmp_path: Path) -> None:
    folder = put_torchvision(tmp_path, False)
    code = "import torch, torchvision; print(torch.ops.torchvision.nms.default._schema)"
    before = launch("-c", code, PYTHONPATH=str(tmp_path))
    assert before.status == 1 and "operator torchvision::nms does not exist" in before.all
    script.define_operators(folder)
    once = (folder / "extension.py").read_text()
    script.define_operators(folder)
    assert (folder / "extension.py").read_text() == once, "a second time changes nothing"
    after = launch("-c", code, PYTHONPATH=str(tmp_path))
    assert after.status == 0 and after.out.startswith("torchvision::nms(Tensor dets, Tensor scores, float"), after.all


def test_a_torchvision_that_has_its_operators_gets_no_others(script: Any, tmp_path: Path) -> None:
    folder = put_torchvision(tmp_path, True)
    (folder / "__init__.py").write_text("from . import extension\n")
    script.define_operators(folder)
    done = launch("-c", "import torchvision; print(hasattr(torchvision.extension, '_library'))", PYTHONPATH=str(tmp_path))
    assert done.out == "False\n", done.all


def test_the_versions_of_torch_stand_nowhere_else(script: Any) -> None:
    """What a user installs names no version but the oldest that works."""
    versions = [name.partition("==")[2].partition("+")[0] for name in (script.TORCH, script.TORCHVISION)]
    for name in ("Makefile", "environment.yaml", "pyproject.toml", "setup.sh"):
        text = (ROOT / name).read_text()
        assert not any(version in text for version in versions), name
    assert script.PIP_INSTALL[0] == sys.executable, "the pip of the environment that runs the script"
