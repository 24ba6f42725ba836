"""The pipeline.py of an exported folder draws, in diffusers, the images that our sampler draws from the same seed."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src import figures
from src.diffusion import build_process
from src.interop import diffusers_pipeline
from src.runs.autoencoder import open_autoencoder
from src.runs.opened import open_trained
from src.runtime.seeds import noise_of
from src.sampling import SamplerConfig, build_sampler
from src.sampling.sampler import Sampler
from tests.interop.exports import exported, process_of, unet
from tests.interop.final_folders import CPU, keep_vae, leave
from tests.interop.test_latent_runs_leave import keep_latent

HYBRID = {"variance": "learned", "loss": {"kind": "hybrid"}}
PIXELS: dict[str, dict[str, Any]] = {
    "eps": {"schedule": {"kind": "linear", "steps": 1000, "beta_end": 0.01}, "target": "eps"},
    "v": {"schedule": {"kind": "cosine", "steps": 1000}, "target": "v", "clip": False},
    "v_zero_snr": {"schedule": {"kind": "quadratic", "steps": 300, "zero_terminal_snr": True}, "target": "v"},
    "x0": {"schedule": {"kind": "sigmoid", "steps": 100}, "target": "x0"},
    "learned": {
        "schedule": {"kind": "linear", "steps": 50, "rescale_betas": False, "beta_end": 0.2},
        "target": "eps",
        **HYBRID,
    },
    "blend": {"schedule": {"kind": "blend"}, "target": "blend", "clip": False},
    "blend_clipped": {"schedule": {"kind": "blend"}, "target": "blend", "clip": True},
}


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies pipeline.py to where it imports it from."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def opened_pipeline(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def same(pipeline: Any, ours: torch.Tensor, **words: Any) -> None:
    """As numbers to 1e-4, and as the pixels of the files to one of 255."""
    theirs = pipeline(batch_size=len(ours), output_type="np", **words).images
    np.testing.assert_allclose(theirs, (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)
    assert float(np.std(theirs)) > 0.005, "the images say something"
    files = np.stack([np.asarray(image) for image in pipeline(batch_size=len(ours), **words).images])
    pixels = figures.to_uint8(ours)
    assert np.abs(files.reshape(pixels.shape).astype(int) - pixels).max() <= 1


@pytest.mark.parametrize("name", list(PIXELS))
def test_a_run_on_pixels_with_classes_draws_our_images(tmp_path: Path, name: str) -> None:
    raw = PIXELS[name]
    network = unet(classes=3, learned="variance" in raw, scale=0.05)
    out = exported(tmp_path / "out", network, raw, class_names=("cat", "dog", "emu"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "AtelierPipeline"] and (out / "pipeline.py").is_file()
    pipeline, process = opened_pipeline(out), build_process(process_of(raw))
    for guidance, steps in ((1.0, 9), (2.0, 5)):
        spec = SamplerConfig(steps=steps, guidance=guidance)
        clip = (-1.0, 1.0) if process_of(raw).clip else None
        sampler = Sampler(network, process, spec, shape=(3, 8, 8), num_classes=3, clip_x0=clip)
        ours = sampler.draw(7, [4, 5], [2, 0], device=CPU)
        words = {"seed": 7, "first_index": 4, "num_inference_steps": steps, "guidance_scale": guidance}
        same(pipeline, ours, classes=["emu", 0], **words)


@pytest.mark.parametrize("process", ["v", "v_clipped", "learned_clipped", "iadb_clipped", "flow", "flow_clipped"])
def test_a_latent_run_draws_our_images(tmp_path: Path, process: str) -> None:
    classes = () if process in ("v", "flow") else ("cat", "dog")
    autoencoder = open_autoencoder(str(keep_vae(tmp_path / "vae")), CPU)
    run, out = keep_latent(tmp_path / "run", autoencoder, process, classes=classes), tmp_path / "theirs"
    leave("to-diffusers", run, out)
    pipeline, opened = opened_pipeline(out), open_trained(run, CPU)
    guidance = 2.0 if classes else 1.0
    sampler = build_sampler(opened, SamplerConfig(steps=6, guidance=guidance))
    ours = sampler.draw(3, range(2), [1, 0] if classes else None, device=CPU)
    words = {"seed": 3, "num_inference_steps": 6, "guidance_scale": guidance}
    same(pipeline, ours, **({"classes": ["dog", "cat"]} if classes else {}), **words)


def test_a_blend_without_classes_needs_no_words_about_them(tmp_path: Path) -> None:
    network, raw = unet(channels=1, scale=0.05), PIXELS["blend"]
    out = exported(tmp_path / "out", network, raw, image_size=(8, 12))
    sampler = Sampler(network, build_process(process_of(raw)), SamplerConfig(steps=4), shape=(1, 8, 12), num_classes=None)
    pipeline = opened_pipeline(out)
    same(pipeline, sampler.draw(0, range(2), None, device=CPU), num_inference_steps=4)
    images = pipeline(num_inference_steps=2, height=12, width=8).images
    assert images[0].size == (8, 12) and images[0].mode == "L"
    start = noise_of(0, [0], (1, 8, 12))
    given = pipeline(num_inference_steps=4, latents=start, output_type="pt", return_dict=False)[0]
    torch.testing.assert_close(given, pipeline(num_inference_steps=4, output_type="pt").images, rtol=0, atol=0)


def test_what_diffusers_draws_by_itself_has_no_pipeline_of_ours(tmp_path: Path) -> None:
    out = exported(tmp_path / "out", unet(), PIXELS["eps"])
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    assert not (out / "pipeline.py").exists() and "pipeline.py" not in (out / "README.md").read_text()
    fed_alpha = {**PIXELS["blend"], "time_input": {"kind": "alpha"}}
    out = exported(tmp_path / "alpha", unet(), fed_alpha)
    assert not (out / "pipeline.py").exists() and not (out / "model_index.json").exists(), "the U-Net alone, as before"


def test_the_card_says_how_to_draw_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = exported(tmp_path / 'my "best" one', unet(classes=3, scale=0.05), PIXELS["v"], class_names=("a", "b", "c"))
    (code,) = re.findall(r"```py\n(.*?)```", (out / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    assert len(names["images"]) == 4 and names["images"][0].size == (8, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"classes": "dog"}, "class 'dog' is not known; the classes are: cat, emu"),
        ({"classes": [2]}, "class 2 is not known"),
        ({"classes": [0, 1, 0]}, "classes has 3 entries for 2 images"),
        ({"guidance_scale": 2.0}, "label_dropout"),
        ({"num_inference_steps": 0}, "must be at least 1"),
        ({"num_inference_steps": 51}, "more than the 50 levels"),
        ({"output_type": "jpeg"}, "pil, np or pt"),
    ],
)
def test_what_it_refuses(tmp_path: Path, words: dict[str, Any], message: str) -> None:
    raw = {"schedule": {"kind": "linear", "steps": 50}, "target": "eps"}
    names = ["cat", "emu"]
    network = unet(classes=2)
    pipeline: Any = diffusers_pipeline.AtelierPipeline(
        unet=unet_of_diffusers(exported(tmp_path / "out", network, raw, class_names=names)),
        process=json.loads((tmp_path / "out" / "model_index.json").read_text())["process"],
        class_names=names,
        null_class="guidance_scale" not in words,
    )
    if "guidance_scale" in words:
        names.append("owl")
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline(batch_size=2, **words)


def unet_of_diffusers(folder: Path) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel.from_pretrained(folder, subfolder="unet")


def test_a_network_without_classes_takes_none(tmp_path: Path) -> None:
    pipeline = opened_pipeline(exported(tmp_path / "out", unet(), PIXELS["blend"]))
    with pytest.raises(ValueError, match="has no classes"):
        pipeline(classes=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 999, 1000])
def test_the_levels_are_those_of_our_schedules(steps: int) -> None:
    from src.diffusion import times

    for raw in PIXELS.values():
        spec = process_of(raw)
        process = build_process(spec)
        total = raw["schedule"].get("steps", 1000)
        path = diffusers_pipeline.levels(json.loads(spec_as_json(spec)), min(steps, total))
        taken = times(process.schedule, min(steps, total))
        alpha, sigma = process.schedule.level(taken)
        assert [a for _, a, _ in path] == pytest.approx(alpha.tolist(), abs=1e-12)
        assert [s for _, _, s in path] == pytest.approx(sigma.tolist(), abs=1e-7)
        assert [t for t, _, _ in path[:-1]] == pytest.approx(process.network_time(taken).tolist()[:-1])


def spec_as_json(spec: Any) -> str:
    from src.config import dump

    return json.dumps(dump(spec))


def test_its_noise_is_ours() -> None:
    assert torch.equal(diffusers_pipeline.noise_of(2**63, [0, 5], (2, 3, 3)), noise_of(2**63, [0, 5], (2, 3, 3)))
