"""Samples, points, previews and latents that are not finite: each script says whose they are and leaves nothing behind."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from src.config import UserError, read_json, validate
from src.data import ImageConfig, open_sources
from src.data.sources import FolderSource
from src.evaluation.autoencoder import troubled_channels
from src.models import MLP, VAE, MLPConfig, VAEConfig
from src.runs.autoencoder import Autoencoder
from src.runs.densities import ImageDensity
from src.runs.latents import latents_of
from src.runs.opened import open_trained
from src.runtime.checkpoint import write_folder
from src.sampling import Sampler, SamplerConfig, build_sampler
from src.storage.finite import is_finite
from src.training.preview import warn_not_finite
from src.training.session import Session
from tests.conftest import metrics, randomise, refused, run_here
from tests.sampling.finite_runs import CPU, a_run, blown, images, smoke

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
    spec, options = SamplerConfig(steps=2), {"shape": (3, 8, 8), "num_classes": None, "codec": Codec()}
    arguments = (opened.network, opened.process, spec)
    with pytest.raises(UserError, match=r"the autoencoder of run \(step 3\) makes images that are not finite"):
        Sampler(*arguments, origin="run (step 3)", **options).draw(0, [0], None, device=CPU)
    images = Sampler(*arguments, **options).draw(0, [0], None, device=CPU)
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
    run, before = tmp_path / "run", Session.is_due

    def blow(self: Session, word: str) -> bool:
        if word == "preview":
            with torch.no_grad():
                self.train_state.ema.network.head.weight.fill_(3e38)  # pyright: ignore[reportAttributeAccessIssue]
        return before(self, word)

    monkeypatch.setattr(Session, "is_due", blow)
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
    assert not Session.note_if_best(session, "l1", float("nan")) and session.best is None
    assert Session.note_if_best(session, "l1", 0.5) and not Session.note_if_best(session, "l1", float("nan"))
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
        latents_of(opened, ImageDensity(image_set, None, ImageConfig(size=16)), cache, Accelerator(cpu=True), batch_size=4)
    words = (
        "the latents of the autoencoder runs/vae are not finite (NaN or infinity), first of the image 005.png, and no latent"
    )
    assert words in str(error.value)
    assert [path.name for path in cache.parent.iterdir()] == [".one.lock"], "no cache, whole or in parts"
    network.moments = lambda images: VAE.moments(network, images)
    latents_of(opened, ImageDensity(image_set, None, ImageConfig(size=16)), cache, Accelerator(cpu=True), batch_size=4)
    assert (cache / "manifest.json").exists(), "the same call works with a sound autoencoder"

    manifest = read_json(cache / "manifest.json")  # as versions before this one left it
    (cache / "manifest.json").write_text(json.dumps({**manifest, "mean": [float("nan")] * 4}))
    with pytest.raises(UserError, match="damaged, or its latents are not finite .*; remove it, and it is made again"):
        latents_of(opened, ImageDensity(image_set, None, ImageConfig(size=16)), cache, Accelerator(cpu=True), batch_size=4)


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
