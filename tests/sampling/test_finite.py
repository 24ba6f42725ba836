"""Weights and samples that are not numbers: refused where they are opened, said where they are drawn, and no run's end."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from src.config import UserError, read_json, validate
from src.data import ImageConfig, open_sources
from src.data.sources import FolderSource
from src.diffusion import ProcessConfig
from src.evaluation.reconstruct import troubled_channels
from src.interop.imported import Imported, keep
from src.losses import Perceptual, PerceptualConfig
from src.metrics.features import open_features
from src.models import MLP, VAE, MLPConfig, UNet, UNetConfig, VAEConfig
from src.models.pretrained import efficientnet_lite0, import_torchvision
from src.runs.autoencoder import Autoencoder, open_autoencoder
from src.runs.latents import latents_of
from src.runs.opened import open_trained
from src.runtime.checkpoint import export, read_tensors, write_folder
from src.sampling import SamplerConfig, build_sampler
from src.sampling.build import sampler_of
from src.sampling.upscaling import open_upscaler
from src.storage.finite import check_finite, is_finite
from src.training.preview import warn_not_finite
from src.training.session import Session
from tests.conftest import Finished, here, metrics, randomise, refused, run_here

CPU = torch.device("cpu")
MODEL = {"base_channels": 8, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "none"], "norm_groups": 4}
MODEL |= {"mid_attention": "none"}
PROCESS = {"schedule": {"kind": "linear", "steps": 100, "rescale_betas": True}, "target": "eps", "clip": False}


def a_run(folder: Path, change: Callable[[dict[str, Tensor]], Any] = lambda weights: None, **process: Any) -> Path:
    """The final folder of a small run of 8 px, its weights changed."""
    model = validate(UNetConfig, MODEL)
    network = UNet(model, in_channels=3)
    randomise(network)
    keep(Imported(network, model, validate(ProcessConfig, {**PROCESS, **process}), 8, 3, None), folder, name="small")
    weights = read_tensors(folder, "ema")
    change(weights)
    documents = {name: read_json(folder / f"{name}.json") for name in ("config", "data")}
    write_folder(folder, {"ema": weights}, {**documents, "progress": {"step": 70}})
    return folder


def holes(name: str, value: float = float("nan")) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights[name].view(-1)[0] = value

    return change


def blown(weights: dict[str, Tensor]) -> None:
    """Weights that are finite, and outputs that are not."""
    weights["head.weight"].fill_(3e38)


def images(folder: Path, count: int = 12, size: int = 8) -> Path:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


# ---------------------------------------------------------------------------------------------- the check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_found(dtype: torch.dtype, bad: float) -> None:
    value = torch.randn(7, 5).to(dtype)
    assert is_finite(value)
    value[3, 2] = bad
    assert not is_finite(value)


def test_sums_that_overflow_are_no_infinity() -> None:
    assert is_finite(torch.full((9,), 3e38)) and is_finite(torch.full((9,), 6e4, dtype=torch.float16))
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]))
    assert is_finite(torch.tensor([1, 2])) and is_finite(torch.empty(0)) and is_finite(torch.zeros(2, device="meta"))
    assert is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))


def test_the_first_tensor_is_named_and_the_others_are_counted() -> None:
    good, bad = torch.ones(4), torch.tensor([1.0, float("nan"), float("inf")])
    check_finite({"a": good, "step": torch.tensor(3), "note": "words"}, "here")
    with pytest.raises(UserError) as error:
        check_finite({"a": good, "b": bad, "c": bad}, "here")
    message = (
        "here: these weights cannot be used: 2 of the 3 numbers of b are not finite (NaN or infinity), and 1 more tensors; get"
    )
    assert str(error.value).startswith(message)


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_every_script_refuses_a_run_whose_weights_are_none(tmp_path: Path, value: float) -> None:
    run, out = a_run(tmp_path / "run", holes("head.bias", value)), tmp_path / "out"
    message = f"{run / 'ema.safetensors'}: these weights cannot be used: 1 of the 3 numbers of head.bias are not finite"
    folder = images(tmp_path / "images")
    assert message in refused("sample", run, "--out", out)
    assert message in refused("interpolate", run, "--out", out)
    assert message in refused("evaluate", run, "--features", "random", "--data", folder, "--out", out)
    assert message in refused("evaluate", run, "--likelihood", "--data", folder, "--out", out)
    assert message in refused("convert", "to-diffusers", run, "--out", out)
    assert message in refused("convert", "safetensors", run, "--out", out)
    finetune = ("-cfg", run / "finetune.json", "--set", f"data.path={folder}", "--run-dir", out / "run")
    assert not (run / "finetune.json").exists(), "write_folder replaced the folder"
    (run / "finetune.json").write_text(json.dumps(finetuned(run)))
    assert message in refused("ddpm_accelerate", *finetune)
    export(tmp_path / "run.pt", {"stem.weight": torch.full((2,), value)}, {}, {"class_names": []}, 3)
    assert "2 of the 2 numbers of stem.weight" in refused("sample", tmp_path / "run.pt", "--out", out)
    assert not (out / "metadata.json").exists()


def finetuned(run: Path) -> dict[str, Any]:
    config = {key: value for key, value in read_json(run / "config.json").items() if key != "low_resolution"}
    optimizer = {"lr": 1e-5, "schedule": {"kind": "constant"}}
    return config | {
        "data": {"source": "folder", "path": "x"},
        "class_conditional": False,
        "optimizer": optimizer,
        "steps": 2,
        "batch_size": 2,
        "init_from": str(run),
    }


def test_autoencoders_whose_weights_are_none(tmp_path: Path) -> None:
    network = randomise(VAE(VAEConfig(widths=(8, 16), blocks=1), 3))
    weights = dict(network.state_dict())
    name = next(iter(weights))
    weights[name] = torch.full_like(weights[name], float("inf"))
    config = {"stages": [{"image_size": 16}], "image": {"size": 16, "channels": 3}, "model": {"widths": [8, 16], "blocks": 1}}
    write_folder(tmp_path / "vae" / "final", {"ema": weights}, {"config": config, "progress": {"step": 3, "tanh": False}})
    for place in (tmp_path / "vae", tmp_path / "vae" / "final"):
        with pytest.raises(
            UserError, match=f"final/ema.safetensors: these weights cannot be used: .* of {name} are not finite"
        ):
            open_autoencoder(str(place), CPU)


def test_networks_that_measure_whose_weights_are_none(tmp_path: Path) -> None:
    def spoilt(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        tensors = {key: value.clone() for key, value in state.items()}
        tensors[name].view(-1)[0] = float("nan")
        return tensors

    state = efficientnet_lite0(None, "test").state_dict()
    torch.save(spoilt(state, "_fc.bias"), tmp_path / "efficientnet.pth")
    message = "1 of the 1000 numbers of _fc.bias are not finite"
    weights = str(tmp_path / "efficientnet.pth")
    with pytest.raises(UserError, match=f"^perceptual.network 'efficientnet_lite0': .*{message}"):
        Perceptual(PerceptualConfig(network="efficientnet_lite0", weights=weights))
    with pytest.raises(UserError, match=f"^--features efficientnet_lite0: .*{message}"):
        open_features("efficientnet_lite0", weights)
    torch.save({"features.0.weight": torch.full((64, 3, 3, 3), float("nan"))}, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"^perceptual.weights: .*vgg.pth: .* of features.0.weight are not finite"):
        Perceptual(PerceptualConfig(network="vgg", weights=str(tmp_path / "vgg.pth")))
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.full((2,), float("inf"))}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match="^--inception-weights: .*2 of the 2 numbers of Conv2d_1a_3x3.conv.weight"):
        open_features("inception", str(tmp_path / "inception.pth"))
    import_torchvision()
    torch.save({"params_ema": {"conv_first.weight": torch.full((2,), float("nan"))}}, tmp_path / "upscaler.pth")
    save_file({"conv_first.weight": torch.full((2,), float("nan"))}, tmp_path / "upscaler.safetensors")
    for file in ("upscaler.pth", "upscaler.safetensors"):
        with pytest.raises(UserError, match=f"{file}: .* 2 of the 2 numbers of conv_first.weight are not finite"):
            open_upscaler(tmp_path / file, CPU)


def smoke(run: Path, *changes: str) -> Finished:
    sets = ["steps=4", "checkpoint.every=2", "preview.every=2", "log.every=1", "preview.num_samples=2", "preview.quality=null"]
    arguments = [word for key in (*sets, *changes) for word in ("--set", key)]
    return here("ddpm_accelerate.py", "-cfg", "configs/smoke/ddpm.json", "--run-dir", run, *arguments)


def test_a_checkpoint_that_is_no_number_is_not_gone_on_from(tmp_path: Path) -> None:
    """Its bytes are whole; the message says how to go on, and then the run does."""
    run = tmp_path / "run"
    assert smoke(run).status == 0
    last = run / "checkpoints" / "step_00000004"
    for spoilt in ("ema", "optimizer"):
        tensors = {path.stem: read_tensors(last, path.stem) for path in last.glob("*.safetensors")}
        documents = {path.stem: read_json(path) for path in last.glob("*.json") if path.name != "MANIFEST.json"}
        name = next(key for key, value in tensors[spoilt].items() if value.ndim)
        good, tensors[spoilt] = tensors[spoilt], {**tensors[spoilt], name: tensors[spoilt][name] * float("nan")}
        write_folder(last, tensors, documents)
        done = smoke(run, "steps=4")
        assert done.status == 2 and f"{last / spoilt}.safetensors: these weights cannot be used" in done.err, done.all
        assert f"a run goes on from the one before where {last} is removed" in done.err
        write_folder(last, {**tensors, spoilt: good}, documents)


# ---------------------------------------------------------------------------------------------- samples


def test_samples_that_are_no_numbers_name_the_run_and_the_step(tmp_path: Path) -> None:
    run, out, folder = a_run(tmp_path / "run", blown), tmp_path / "out", images(tmp_path / "images")
    message = f"the samples of {run} (step 70) are not finite (NaN or infinity), from sampling step 1 of 4 on; draw from an"
    for solver in ("ddim", "ancestral", "euler", "heun", "dpmpp_2m"):
        assert message in refused("sample", run, "--steps", "4", "--solver", solver, "--num-samples", "2", "--out", out)
        assert not out.exists(), "nothing is left behind"
    assert message in refused("sample", run, "--steps", "4", "--frames", "--out", out) and not out.exists()
    words = ("--steps", "4", "--frames-between", "2", "--num-seeds", "2", "--out", out)
    assert message in refused("interpolate", run, *words) and not out.exists()
    words = ("--features", "random", "--data", folder, "--steps", "4", "--num-samples", "10", "--out", tmp_path / "e")
    assert message in refused("evaluate", run, *words)
    words = ("--features", "random", "--data", folder, "--num-samples", "10", "--out", tmp_path / "sweep")
    assert "from sampling step 1 of 3 on" in refused("evaluate", run, *words, "--sweep", "steps=3,4")
    assert f"the likelihood of {run} (step 70) is not finite" in refused(
        "evaluate", run, "--likelihood", "--data", folder, "--steps", "4", "--out", tmp_path / "bits"
    )
    assert f"the samples of {run} (step 70) are not finite" in refused(
        "sample", run, "--invert", folder / "000.png", "--steps", "4", "--solver", "euler", "--out", out
    )
    assert not out.exists()


def test_the_step_from_which_samples_are_no_numbers(tmp_path: Path) -> None:
    opened = open_trained(a_run(tmp_path / "run"), CPU)
    sampler = build_sampler(opened, SamplerConfig(solver="ddim", steps=6))
    network, calls = sampler.network, []

    def from_the_third(*arguments: Any, **options: Any) -> Tensor:
        calls.append(1)
        return network(*arguments, **options) * (float("nan") if len(calls) >= 3 else 1)

    sampler.network = from_the_third
    with pytest.raises(UserError, match="from sampling step 3 of 6 on"):
        sampler.draw(0, [0, 1], None, device=CPU)


def test_an_autoencoder_that_makes_no_numbers_is_named(tmp_path: Path) -> None:
    class Codec:
        def encode(self, images: Tensor, indices: Any) -> Tensor:
            return images

        def decode(self, latents: Tensor) -> Tensor:
            return latents * float("inf")

    opened = open_trained(a_run(tmp_path / "run"), CPU)
    spec, options = SamplerConfig(steps=2), {"clip": False, "label_dropout": 0.0, "codec": Codec()}
    arguments = (spec, opened.network, opened.process, (3, 8, 8), None)
    with pytest.raises(UserError, match=r"the autoencoder of run \(step 3\) makes images that are not finite"):
        sampler_of(*arguments, origin="run (step 3)", **options).draw(0, [0], None, device=CPU)
    images = sampler_of(*arguments, **options).draw(0, [0], None, device=CPU)
    assert not is_finite(images), "of a preview nobody is refused"


def test_points_that_are_no_numbers(tmp_path: Path) -> None:
    process = {"schedule": {"kind": "blend"}, "target": "blend", "clip": False}
    network = MLP(validate(MLPConfig, {"kind": "mlp"}), num_classes=None)
    weights = {key: torch.full_like(value, 1e38) for key, value in network.state_dict().items()}
    source = {"source": "gaussian"}
    config = {"name": "points", "image": None, "class_conditional": False, "label_dropout": 0.0, "process": process}
    config |= {"model": {"kind": "mlp"}, "source": source}
    documents = {"config": config, "data": {"class_names": []}, "progress": {"step": 5}}
    write_folder(tmp_path / "points", {"ema": weights}, documents)
    message = refused(
        "sample", tmp_path / "points", "--solver", "euler", "--steps", "3", "--num-samples", "5", "--out", tmp_path / "o"
    )
    assert f"the samples of {tmp_path / 'points'} (step 5) are not finite" in message and not (tmp_path / "o").exists()


# ---------------------------------------------------------------------------------------------- while a run trains


def test_a_preview_that_is_no_number_warns_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The EMA's head is blown up before the first preview; the run itself trains to its end."""
    run, before = tmp_path / "run", Session.now

    def blow(self: Session, word: str) -> bool:
        if word == "preview":
            with torch.no_grad():
                self.trained.ema.network.head.weight.fill_(3e38)  # pyright: ignore[reportAttributeAccessIssue]
        return before(self, word)

    monkeypatch.setattr(Session, "now", blow)
    done = smoke(run, "process.clip=false", 'preview.quality={"every":2,"num_samples":10,"features":"random"}')
    assert done.status == 0 and read_json(run / "status.json")["state"] == "finished", done.all
    assert "warning: step 2: 2 of 2 samples of the preview are not finite (NaN or infinity); look at the loss" in done.out
    assert "warning: frechet_distance: samples are not finite" in done.out
    assert (run / "samples" / "step_00000002.png").exists() and len(metrics(run)) == 4


def test_paths_and_reconstructions_that_are_no_numbers_warn() -> None:
    warnings: list[str] = []
    session: Any = SimpleNamespace(
        step=7, run=SimpleNamespace(say=warnings.append), accelerator=SimpleNamespace(is_main_process=True)
    )
    outputs = torch.zeros(3, 2)
    warn_not_finite(outputs, session)
    assert not warnings
    outputs[1, 0] = float("nan")
    warn_not_finite(outputs, session)
    assert warnings[0].startswith("warning: step 7: 1 of 3 samples of the preview are not finite")
    values = {"l1": float("nan"), "psnr": float("inf"), "latent_mean_0": 0.0, "latent_std_0": 1.0}
    assert troubled_channels(values) == ["the reconstructions are not finite (NaN or infinity): l1; look at the loss"]
    assert troubled_channels({**values, "l1": 0.0}) == []


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    session: Any = SimpleNamespace(best=None, step=3, cfg=SimpleNamespace(checkpoint=SimpleNamespace(keep_best=True)))
    assert not Session.better(session, "l1", float("nan")) and session.best is None
    assert Session.better(session, "l1", 0.5) and not Session.better(session, "l1", float("nan"))
    assert session.best["l1"] == 0.5


# ---------------------------------------------------------------------------------------------- latents


class Spoilt(VAE):
    """An autoencoder whose encoder fails on bright images."""

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, logvar = super().moments(images)
        bright = (images.flatten(1).mean(1) > 0.5)[:, None, None, None]
        return torch.where(bright, float("nan"), mean), logvar


def test_an_autoencoder_that_gives_no_numbers_is_named_with_the_image_and_leaves_no_cache(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", size=16)
    Image.new("RGB", (16, 16), "white").save(folder / "005.png")
    image_set = open_sources(FolderSource(source="folder", path=str(folder)))
    network = randomise(Spoilt(VAEConfig(widths=(8, 16), blocks=1), 3)).eval()
    opened = Autoencoder(network=network, path="runs/vae", document={}, digest="d", channels=3, latent_channels=4, factor=2)
    cache = tmp_path / "caches" / "one"
    with pytest.raises(UserError) as error:
        latents_of(opened, image_set, None, ImageConfig(size=16), cache, Accelerator(cpu=True), batch_size=4)
    words = (
        "the latents of the autoencoder runs/vae are not finite (NaN or infinity), first of the image 005.png, and no latent"
    )
    assert words in str(error.value)
    assert [path.name for path in cache.parent.iterdir()] == [".one.lock"], "no cache, whole or in parts"
    network.moments = lambda images: VAE.moments(network, images)
    latents_of(opened, image_set, None, ImageConfig(size=16), cache, Accelerator(cpu=True), batch_size=4)
    assert (cache / "manifest.json").exists(), "the same call works with a sound autoencoder"

    manifest = read_json(cache / "manifest.json")  # as versions before this one left it
    (cache / "manifest.json").write_text(json.dumps({**manifest, "mean": [float("nan")] * 4}))
    with pytest.raises(UserError, match="damaged, or its latents are not finite .*; remove it, and it is made again"):
        latents_of(opened, image_set, None, ImageConfig(size=16), cache, Accelerator(cpu=True), batch_size=4)


def test_reconstructions_that_are_no_numbers_are_no_measure(tmp_path: Path) -> None:
    config = {"name": "vae", "stages": [{"image_size": None}], "image": {"size": 16, "channels": 3}}
    config |= {"model": {"widths": [8, 16], "blocks": 1}, "perceptual": {"network": "random"}}
    network = randomise(VAE(VAEConfig(widths=(8, 16), blocks=1), 3))
    weights = {key: torch.full_like(value, 3e38) for key, value in network.state_dict().items()}
    write_folder(tmp_path / "vae" / "final", {"ema": weights}, {"config": config, "progress": {"step": 9, "tanh": False}})
    folder, out = images(tmp_path / "images", size=16), tmp_path / "out"
    message = refused("evaluate", tmp_path / "vae", "--features", "random", "--data", folder, "--out", out)
    assert (
        f"the reconstructions of {tmp_path / 'vae'} (step 9) are not finite (NaN or infinity), first of the image 000.png"
        in message
    )


def test_sound_runs_draw_as_before(tmp_path: Path) -> None:
    run_here("sample", a_run(tmp_path / "run"), "--steps", "2", "--num-samples", "2", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "00001.png").exists()
