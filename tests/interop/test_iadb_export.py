"""The command that imports IADB, and its networks as folders of diffusers."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from src.config import UserError, read_json, validate
from src.diffusion import ProcessConfig, build_process, clip, euler, times
from src.interop import diffusers_import as folders
from src.interop.diffusers_export import export
from src.interop.iadb import PROCESS
from src.models import UNet, UNetConfig
from src.runtime.checkpoint import read_tensors, write_folder
from tests.conftest import ROOT, randomise, refused, run_in_process

sys.path.insert(0, str(ROOT))
from tests.interop.iadb_checkpoints import FULL, lightning, saved, under, unet2d, written


def test_the_command(tmp_path: Path) -> None:
    theirs = unet2d()
    path = saved(tmp_path / "a.ckpt", lightning(under("model.", theirs.state_dict())))
    config = written(tmp_path / "a.yaml", FULL)
    done = run_in_process("convert.py", "iadb", path, "--model-config", config, "--out", tmp_path / "cats")
    assert done.status == 0 and f"python train_iadb.py -cfg {tmp_path / 'cats' / 'finetune.json'}" in done.out, done.all
    done = run_in_process("sample.py", tmp_path / "cats", "--num-samples", "2", "--steps", "4", "--out", tmp_path / "s")
    assert done.status == 0 and (tmp_path / "s" / "00001.png").exists(), done.all
    done = run_in_process("convert.py", "to-diffusers", tmp_path / "cats", "--out", tmp_path / "theirs")
    assert done.status == 0 and not (tmp_path / "theirs" / "model_index.json").exists(), done.all
    done = run_in_process("convert.py", "diffusers", tmp_path / "theirs", "--out", tmp_path / "again")
    assert done.status == 0 and "python train_iadb.py" in done.out, done.all
    before, after = (safetensors.torch.load_file(tmp_path / name / "ema.safetensors") for name in ("cats", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(tmp_path / "again" / "config.json")["process"] == read_json(tmp_path / "cats" / "config.json")["process"]
    cats = tmp_path / "cats"
    config = {**read_json(cats / "config.json"), "source": {"source": "folder", "path": "dogs"}}
    documents = {"config": config, "data": read_json(cats / "data.json"), "progress": {"step": 0}}
    write_folder(tmp_path / "pairs", {"ema": read_tensors(cats, "ema")}, documents)
    assert "from noise alone" in refused("convert", "to-diffusers", tmp_path / "pairs", "--out", tmp_path / "more")
    assert "give --image-size N" in refused("convert", "iadb", path, "--out", tmp_path / "more")
    assert "exists and is not empty" in refused("convert", "iadb", path, "--image-size", "8", "--out", tmp_path / "cats")


BLEND = {"schedule": {"kind": "blend"}, "target": "blend"}
TIMES: dict[str, dict[str, Any]] = {
    "papers": PROCESS,
    "flow": {**BLEND, "clip": False},
    "flow_clipped": {**BLEND, "clip": True, "time_input": {"kind": "t", "scale": 1000.0}},
    "alpha_clipped": {**BLEND, "clip": True, "time_input": {"kind": "alpha", "scale": 250.5}},
    "t": {**BLEND, "clip": False, "time_input": {"kind": "t"}},
}


def run_card(out: Path, monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> Tensor:
    """The images of the card's Python, run beside the folder on this noise."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    monkeypatch.chdir(out.parent)
    monkeypatch.setattr(torch, "randn", lambda *shape: noise if shape == tuple(noise.shape) else pytest.fail(str(shape)))
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.undo()
    return names["images"]


@pytest.mark.parametrize(
    ("time", "classes"),
    [("papers", None), ("papers", 3), ("flow", None), ("flow", 3), ("flow_clipped", None), ("alpha_clipped", 3), ("t", None)],
)
def test_the_card_draws_our_images_and_the_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: str, classes: int | None
) -> None:
    from diffusers import UNet2DModel

    spec = validate(ProcessConfig, TIMES[time])
    raw = {"base_channels": 32, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "full"]}
    options = {"embedding": "add", "head_channels": 8}
    network = UNet(validate(UNetConfig, {**raw, **options}), in_channels=3, num_classes=classes)
    randomise(network, 0.15).eval()
    out, names = tmp_path / "out", ("a", "b", "c")[: classes or 0]
    export(network, spec, image_size=8, out=out, name="small", class_names=names)
    flow = time.startswith("flow")
    expected = {"README.md", "process.json", *(["classes.json"] if classes else [])}
    expected |= (
        {"unet", "scheduler", "pipeline.py", "model_index.json"}
        if flow
        else {"config.json", "diffusion_pytorch_model.safetensors"}
    )
    assert {path.name for path in out.iterdir()} == expected

    labels = torch.arange(4) % 3 if classes else None
    x, process = torch.randn(4, 3, 8, 8), build_process(spec)
    denoiser = process.denoiser(network, **({"labels": labels} if classes else {}))
    if spec.clip:
        denoiser = clip(denoiser, process.schedule, -1, 1)
    with torch.no_grad():
        ours = euler(denoiser, x, times(process.schedule, 50, "even"), process.schedule)
    images = run_card(out, monkeypatch, x)
    assert float((ours - x).std()) > 0.1 and float((ours.abs() < 0.99).float().mean()) > 0.3, "moved, and not black or white"
    torch.testing.assert_close(images, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)

    theirs: Any = UNet2DModel.from_pretrained(out, subfolder="unet" if flow else None)
    with torch.no_grad():
        predicted = theirs(x, torch.tensor(0.3), class_labels=labels).sample
        torch.testing.assert_close(
            predicted, network(x, torch.full((4,), 0.3), labels) * (-1 if flow else 1), rtol=0, atol=1e-5
        )
    back = folders.read(out)
    assert isinstance(back.network, UNet) and back.network.null_class == (classes is not None)
    assert (back.process, back.network.config) == (spec, network.config)
    assert back.class_names == names and back.script == "train_iadb.py"
    for name, value in network.state_dict().items():
        assert torch.equal(back.network.state_dict()[name], value), name


def test_a_flow_of_somebody_else_is_read(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = unet2d(sample_size=8)
    theirs.save_pretrained(tmp_path / "theirs" / "unet")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(tmp_path / "theirs" / "scheduler")
    imported = folders.read(tmp_path / "theirs")
    assert imported.process == validate(ProcessConfig, {**BLEND, "clip": False, "time_input": {"kind": "t", "scale": 1000.0}})
    assert any("shift 3.0" in line and "left out" in line for line in imported.notes) and imported.script == "train_iadb.py"
    scheduler.set_timesteps(8)
    x = start = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t).sample, t, x).prev_sample
        process = build_process(imported.process)
        ours = euler(process.denoiser(imported.network), start, scheduler.sigmas.double(), process.schedule)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)

    path = tmp_path / "theirs" / "scheduler" / "scheduler_config.json"
    for change, message in (
        ({"invert_sigmas": True}, "invert_sigmas=True"),
        ({"num_train_timesteps": "x"}, "time_input.scale"),
    ):
        path.write_text(json.dumps({**read_json(path), **change}))
        with pytest.raises(UserError, match=message) as error:
            folders.read(tmp_path / "theirs")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        path.write_text(json.dumps({**read_json(path), "invert_sigmas": False, "num_train_timesteps": 1000}))
    config = tmp_path / "theirs" / "unet" / "config.json"
    config.write_text(json.dumps({**read_json(config), "out_channels": 6}))
    with pytest.raises(UserError, match="the blend learns no variance"):
        folders.read(tmp_path / "theirs")


def test_a_blend_that_cannot_be_exported(tmp_path: Path) -> None:
    network = UNet(validate(UNetConfig, {"embedding": "add", "head_channels": 8}), in_channels=3)
    spec = validate(ProcessConfig, {**BLEND, "target": "v"})
    with pytest.raises(UserError, match="no process.schedule blend with process.target v; what can be exported has blend"):
        export(network, spec, image_size=8, out=tmp_path / "out", name="small")
    assert list(tmp_path.iterdir()) == []
