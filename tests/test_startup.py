"""What a script loads before it answers `--help`, or says what is wrong in a config. It counts modules, never seconds."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

# At most so many modules of src/ are loaded, those of networks and sources not counted: there a file more is an addition.
MODULES = {
    "train_vae": 125,
    "train_ldm": 126,
    "ddpm_accelerate": 127,
    "train_iadb": 127,
    "train_classifier": 123,
    "sample": 80,
    "interpolate": 76,
    "evaluate": 104,
    "posthoc_ema": 57,
    "prepare_data": 104,
    "convert": 77,
    "doctor": 127,
    "app": 100,
}
TRAINING = ("train_vae", "train_ldm", "ddpm_accelerate", "train_iadb", "train_classifier")
HEAVY = {
    "PIL",
    "accelerate",
    "datasets",
    "diffusers",
    "efficientnet_lite_pytorch",
    "fastapi",
    "google.cloud",
    "gradio",
    "huggingface_hub",
    "imageio_ffmpeg",
    "lpips",
    "matplotlib",
    "sklearn",
    "spandrel",
    "tensorboard",
    "torchmetrics",
    "torchvision",
    "wandb",
    "yaml",
}
RUN = """
import json, runpy, sys
script, *arguments = sys.argv[1:]
sys.argv = [f"{script}.py", *arguments]
try:
    runpy.run_path(f"{script}.py", run_name="__main__")
except SystemExit as ended:
    print(json.dumps([ended.code, sorted(sys.modules)]), file=sys.__stderr__)
"""


def loaded(script: str, *arguments: str) -> tuple[int, str, set[str]]:
    """The exit status, all that the script says, and the modules that it has loaded at its end."""
    command = [sys.executable, "-c", RUN, script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    *errors, last = done.stderr.splitlines()
    status, modules = json.loads(last)
    return status, done.stdout + "\n".join(errors), set(modules)


def check(script: str, modules: set[str]) -> None:
    assert not HEAVY & modules, f"{script}.py loads them before it needs them"
    additions = ("src.models.", "src.data.sources.")
    ours = sorted(module for module in modules if module.startswith("src.") and not module.startswith(additions))
    assert len(ours) <= MODULES[script], f"{script}.py loads more than before it can say what is wrong: {', '.join(ours)}"


@pytest.mark.parametrize("script", MODULES)
def test_help_loads_little_and_scripts_can_be_run(script: str) -> None:
    path = ROOT / f"{script}.py"
    assert path.stat().st_mode & 0o111 and path.read_text().startswith("#!/usr/bin/env python\n")
    status, text, modules = loaded(script, "--help")
    assert status == 0 and "usage:" in text
    check(script, modules)


@pytest.mark.parametrize("script", TRAINING)
def test_a_mistake_in_a_config_loads_little(script: str) -> None:
    status, text, modules = loaded(script, "--set", "optimizr.lr=1")
    assert status == 2 and "optimizr: unknown key; did you mean 'optimizer'?" in text
    check(script, modules)
