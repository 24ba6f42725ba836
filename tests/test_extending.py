"""The examples of CONTRIBUTING.md, added from outside the package: they train, draw and measure through the scripts."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from src.config import UserError, dump, load
from src.data.sources.registry import SOURCES
from src.diffusion import SOLVERS, BlendSchedule, times
from src.diffusion.weightings import WEIGHTINGS
from src.doctor import needs
from src.evaluation.registry import METRICS
from src.models import BACKBONES, build_model
from src.runtime.checkpoint import read_tensors
from tests.conftest import ROOT, SMOKE, metrics, refused, run_here
from tests.diffusion.test_solvers import COVARIANCE, MEAN, affine, cosine, gaussian

EXAMPLES = re.findall(r"```diff\n--- [^\n]*\n\+\+\+ b/(\S+)\n@@ [^\n]*\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)


def outside(path: str, lines: str) -> str:
    """The lines that an example adds to a file of src/, as they stand in a file outside: absolute imports, and what the file
    has already imported."""
    code = "".join(line[1:] + "\n" for line in lines.splitlines())
    package = path.removesuffix(".py").replace("/", ".").split(".")[:-1]
    if "\nregister_source" in code:  # the new file is a part of the module outside
        code = code[code.index("\n") + 1 :]
    code = re.sub(r"^from \.\.\.(\w)", rf"from {'.'.join(package[:-2])}.\1", code, flags=re.M)
    code = re.sub(r"^from \.\.(\w)", rf"from {'.'.join(package[:-1])}.\1", code, flags=re.M)
    code = re.sub(r"^from \.(\w)", rf"from {'.'.join(package)}.\1", code, flags=re.M)
    if code.startswith("    "):  # an entry of a dictionary
        code = f"METRICS.update({{\n{code}}})\n".replace("distances.mean_gap", "mean_gap")
    module = path.removesuffix(".py").replace("/", ".")
    return (f"from {module} import *\n" if (ROOT / path).exists() else "") + code


@pytest.fixture(scope="module")
def additions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module outside of the package that registers all examples; they are gone afterwards."""
    registries: list[Any] = [SOLVERS, WEIGHTINGS.members, BACKBONES.members]
    code = [
        outside(*example) for example in EXAMPLES if not any(word in example[0] for word in ("source", "registry", "__init__"))
    ]
    registries += [SOURCES.members, METRICS]
    code += [outside(*example) for example in EXAMPLES if "source" in example[0] or "evaluation" in example[0]]
    before = [registry.copy() for registry in registries]
    folder = tmp_path_factory.mktemp("outside")
    (folder / "my_additions.py").write_text("\n\n".join(code))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("my_additions")
    del sys.modules["my_additions"]
    for registry, old in zip(registries, before, strict=True):
        registry.clear()
        registry.update(old) if isinstance(registry, dict) else registry.extend(old)


@pytest.fixture(scope="module")
def run(additions: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke config with the new backbone, weighting, solver and source, trained for a few steps."""
    folder = tmp_path_factory.mktemp("extended")
    raw = json.loads((ROOT / SMOKE).read_text())
    raw |= {"steps": 6, "model": {"kind": "convnet", "width": 8}, "data": {"source": "shapes", "count": 48, "size": 16}}
    raw["process"]["loss"] = {"weighting": {"kind": "truncated_snr", "least": 0.5}}
    raw["preview"] = {"every": 6, "num_samples": 2, "sampler": {"solver": "adams_bashforth", "steps": 3}}
    raw["checkpoint"] = {"every": 3}
    raw["log"] = {"every": 1, "trackers": []}
    raw["data"], raw["image"] = {"source": "stripes", "count": 48}, {"size": 16, "channels": 1}
    (folder / "config.json").write_text(json.dumps(raw))
    run_here("ddpm_accelerate", "-cfg", folder / "config.json", "--run-dir", folder / "run")
    return folder / "run"


def test_every_row_of_the_table_has_its_example() -> None:
    files = {path for path, _ in EXAMPLES}
    assert {"src/diffusion/solvers.py", "src/diffusion/weightings.py", "src/models/convnet.py"} < files
    assert {"src/data/sources/stripes.py", "src/metrics/distances.py", "src/evaluation/registry.py"} < files


def test_the_solver_recovers_a_gaussian(additions: Any) -> None:
    for schedule in (cosine(), BlendSchedule()):
        grid = times(schedule, 200)
        mean, covariance = affine(lambda x: additions.adams_bashforth(gaussian(schedule), x, grid, schedule))
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=1e-3)
        torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=1e-3)


def test_it_trains_with_them(run: Path, additions: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["model"] == {"kind": "convnet", "width": 8, "blocks": 2}
    assert config["process"]["loss"]["weighting"] == {"kind": "truncated_snr", "least": 0.5}
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    first, last = (read_tensors(run / "checkpoints" / f"step_{step:08d}", "model") for step in (3, 6))
    assert first.keys() == last.keys() and "blocks.1.conv.weight" in last
    assert any(bool((first[name] != last[name]).any()) for name in first), "the weights moved"
    assert (run / "samples" / "step_00000006.png").exists(), "the preview was drawn by the new solver"
    assert dump(additions.TruncatedSNRWeighting()) == {"kind": "truncated_snr", "least": 1.0}


def test_it_draws_and_is_a_start(run: Path, tmp_path: Path) -> None:
    run_here("sample", run, "--solver", "adams_bashforth", "--steps", "3", "--num-samples", "4", "--out", tmp_path / "drawn")
    assert len(list((tmp_path / "drawn").rglob("*.png"))) >= 4
    config = run.parent / "config.json"
    run_here("ddpm_accelerate", "-cfg", config, "--run-dir", tmp_path / "next", "--set", f"init_from={run}", "--set", "steps=1")
    assert "starting from the weights of" in (tmp_path / "next" / "log.txt").read_text()
    message = refused("interpolate", run, "--pictures", config, config, "--solver", "adams_bashforth")
    assert message.startswith("adams_bashforth cannot be gone back, as --pictures need")


def test_it_is_measured(run: Path, tmp_path: Path) -> None:
    words = ("--features", "random", "--batch-size", "8", "--num-samples", "12", "--steps", "2", "--solver", "adams_bashforth")
    run_here("evaluate", run, *words, "--out", tmp_path / "measured")
    values = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["random"]
    assert values["frechet"] > 0
    assert values["mean_gap"] > 0


def test_the_latent_script_and_blending_take_the_backbone(additions: Any) -> None:
    import train_iadb
    import train_ldm

    for script, config, shape in ((train_iadb, "smoke/iadb.json", (3, 16, 16)), (train_ldm, "smoke/ldm.json", (4, 8, 8))):
        cfg: Any = load(ROOT / "configs" / config, script.Config, ["model.kind=convnet", "model.width=4"])
        assert cfg.model == additions.ConvNetConfig(kind="convnet", width=4)
        network = build_model(cfg.model, shape)
        assert needs.count_parameters(cfg) == (sum(parameter.numel() for parameter in network.parameters()), 0)
        with pytest.raises(UserError, match="a convnet takes no condition"):
            build_model(cfg.model, shape, condition_channels=3)
