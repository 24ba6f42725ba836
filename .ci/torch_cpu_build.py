"""The one place for the CPU build of torch that lies on the CI machines. `make env` runs it before it installs the rest.

The rule: the CPU build is installed where there is no NVIDIA GPU and pip finds this build without an index, which means in a
folder of wheels that pip's own settings name (find-links). The newest torch would download gigabytes of CUDA there for nothing.
On every other machine this script installs nothing, and pip takes the newest torch that PyPI has: on Linux the build for CUDA,
which runs on a CPU too, on a Mac the build for CPU and MPS.

PyPI's torchvision is compiled for PyPI's torch. Its operators do not load beside the CPU build, so importing torchvision fails,
and with it timm, which `accelerate launch` imports. So its file `extension.py` gets lines that define the missing operators by
name, with nothing behind them. This project needs none of them: what it uses of torchvision are networks in plain torch.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCH, TORCHVISION = "torch==2.13.0+cpu", "torchvision==0.28.0"
PIP_INSTALL = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
OPERATORS = """

# Added by .ci/torch_cpu_build.py of Atelier: the operators' names alone, where the installed torch cannot load the operators.
if not _has_ops():
    _library = torch.library.Library("torchvision", "DEF")  # the names exist as long as this object does
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def has_cpu_build() -> bool:
    """Whether this machine has no NVIDIA GPU, and pip finds the CPU build of torch without an index."""
    if shutil.which("nvidia-smi"):
        return False
    found = subprocess.run([*PIP_INSTALL, "--dry-run", "--no-index", "--no-deps", TORCH], capture_output=True)
    return found.returncode == 0


def define_operators(torchvision: Path) -> None:
    """Add OPERATORS to the installed package in the folder `torchvision`, once."""
    file = torchvision / "extension.py"
    text = file.read_text(encoding="utf-8")
    if OPERATORS not in text:
        file.write_text(text + OPERATORS, encoding="utf-8")


def main() -> int:
    """Install the CPU build where the rule says so; the exit status is that of pip."""
    if not has_cpu_build():
        return 0
    print(f"pip finds {TORCH} in a folder of this machine: it is installed instead of the newest torch")
    status = subprocess.run([*PIP_INSTALL, TORCH, TORCHVISION]).returncode
    if status == 0:
        define_operators(Path(sysconfig.get_path("platlib")) / "torchvision")
    return status


if __name__ == "__main__":
    sys.exit(main())
