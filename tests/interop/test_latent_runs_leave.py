"""Latent runs leave for diffusers, or for a folder of our own, and come back to the same pixels."""

import json
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import convert
from src.config import UserError, validate
from src.data import ImageConfig
from src.diffusion import ProcessConfig, ancestral, clip, times
from src.interop.diffusers_import import read_whole
from src.interop.imported import Imported, keep
from src.models import VAE, UNet, UNetConfig
from src.models.pretrained import import_torchvision
from src.runs.autoencoder import Autoencoder, open_autoencoder, start_from
from src.runs.opened import open_trained
from src.runtime.checkpoint import read_tensors, write_folder
from src.sampling import SamplerConfig, build_sampler
from tests.conftest import randomise, refused, run_in_process
from tests.interop.final_folders import CPU, images_of, keep_vae, leave, refuse, same_autoencoder

FLOW_TIME = {"kind": "t", "scale": 1000.0}
PROCESSES = {
    "v": {"schedule": {"kind": "cosine", "steps": 20}, "target": "v", "clip": False},
    "eps_clipped": {"schedule": {"kind": "linear", "steps": 20}, "target": "eps", "clip": True},
    "x0_clipped": {"schedule": {"kind": "cosine", "steps": 20}, "target": "x0", "clip": True},
    "v_clipped": {"schedule": {"kind": "cosine", "steps": 20}, "target": "v", "clip": True},
    "learned_clipped": {
        "schedule": {"kind": "cosine", "steps": 20}, "target": "eps", "clip": True, "variance": "learned",
        "loss": {"kind": "hybrid"},
    },
    "iadb": {"schedule": {"kind": "blend"}, "target": "blend", "clip": False, "time_input": {"kind": "alpha"}},
    "iadb_clipped": {"schedule": {"kind": "blend"}, "target": "blend", "clip": True, "time_input": {"kind": "alpha"}},
    "flow": {"schedule": {"kind": "blend"}, "target": "blend", "clip": False, "time_input": FLOW_TIME},
    "flow_clipped": {"schedule": {"kind": "blend"}, "target": "blend", "clip": True, "time_input": FLOW_TIME},
}  # fmt: skip
UNET = {"base_channels": 8, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "full"], "head_channels": 8}


def keep_latent(
    folder: Path,
    autoencoder: Autoencoder,
    process: str = "v",
    *,
    classes: Sequence[str] = (),
    model: dict[str, Any] | None = None,
    size: int | tuple[int, int] = 16,
) -> Path:
    """A latent run of random weights, as its `final` is."""
    spec = validate(ProcessConfig, PROCESSES[process], origin="test")
    config = validate(UNetConfig, {"norm_groups": 4, **UNET, **(model or {})}, origin="test")
    channels = autoencoder.latent_channels
    outputs = channels * (2 if spec.variance == "learned" else 1)
    network = randomise(
        UNet(config, in_channels=channels, out_channels=outputs, num_classes=len(classes) or None, null_class=bool(classes)),
        0.05,
    )
    facts = {
        "autoencoder": autoencoder.digest,
        "image": {"size": size, "channels": autoencoder.channels, "flip": False},
        "shape": list(autoencoder.latent_shape(ImageConfig(size=size, channels=autoencoder.channels))),
        "mean": [0.1 * i - 0.2 for i in range(channels)],
        "std": [0.5 + 0.3 * i for i in range(channels)],
        "low": [-1.0 - 0.2 * i for i in range(channels)],
        "high": [1.5 - 0.3 * i for i in range(channels)],
    }
    if autoencoder.scaling is not None:
        facts |= {key: [value] * channels for key, value in zip(("mean", "std"), autoencoder.scaling, strict=True)}
    imported = Imported(
        network=network.eval(),
        process=spec,
        image_size=size,
        channels=autoencoder.channels,
        class_names=tuple(classes),
        autoencoder=autoencoder,
        latents=facts,
    )
    keep(imported, folder, name="small_ldm")
    return folder


def bring_back(folder: Path, out: Path) -> None:
    convert.save_imported(Namespace(out=str(out), name="again", class_names=None), read_whole(folder))


@pytest.mark.parametrize("process", ["v", "learned_clipped", "iadb", "iadb_clipped", "flow", "flow_clipped"])
def test_a_latent_run_leaves_for_diffusers_draws_there_and_comes_back(
    tmp_path: Path, process: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = () if process in ("v", "eps_clipped", "iadb", "flow_clipped") else ("cat", "dog")
    autoencoder = open_autoencoder(str(keep_vae(tmp_path / "vae")), CPU)
    run, out = keep_latent(tmp_path / "run", autoencoder, process, classes=classes), tmp_path / "theirs"
    leave("to-diffusers", run, out)
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "AtelierPipeline"], "no pipeline of theirs draws this"
    labels = [0, 1, 2] if classes else None
    wanted = images_of(run, labels=labels)

    bring_back(out, tmp_path / "back")
    script = "train_iadb.py" if "iadb" in process or "flow" in process else "train_ldm.py"
    assert f"python {script} -cfg" in capsys.readouterr().out
    torch.testing.assert_close(images_of(tmp_path / "back", labels=labels), wanted, rtol=0, atol=1e-5)
    a, b = (open_trained(path, CPU) for path in (run, tmp_path / "back"))
    assert (a.class_names, a.shape, a.image) == (b.class_names, b.shape, b.image)
    assert a.config["process"] == b.config["process"]
    assert a.facts["latents"] == b.facts["latents"]
    same_autoencoder(tmp_path / "vae", out)
    same_autoencoder(tmp_path / "vae", tmp_path / "back")

    if a.process.target == "blend":  # the card's loop draws what our sampler draws from the same noise; of the others, below
        monkeypatch.chdir(tmp_path)
        x = torch.randn(4, *a.shape)
        monkeypatch.setattr(torch, "randn", lambda *_, **__: x.clone())
        exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], scope := {})
        monkeypatch.undo()
        sampler = build_sampler(a, SamplerConfig(solver="euler", steps=50))
        with torch.no_grad():
            moved = sampler.move(x, torch.arange(4) % 2 if classes else None, seed=0, indices=range(4))
            assert a.codec is not None
            images = (a.codec.decode(moved) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(scope["images"], images, rtol=0, atol=1e-4)


def test_their_loop_draws_the_very_images_with_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ancestral steps of ours and of the card's, with the noise of each step taken from one list."""
    import_torchvision()
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    autoencoder = open_autoencoder(str(keep_vae(tmp_path / "vae")), CPU)
    for process in ("v", "eps_clipped", "x0_clipped", "v_clipped", "learned_clipped"):
        run, out = keep_latent(tmp_path / process, autoencoder, process), tmp_path / f"{process}_theirs"
        leave("to-diffusers", run, out)
        a = open_trained(run, CPU)
        generator = torch.Generator().manual_seed(5)
        start = torch.randn(4, *a.shape, generator=generator)
        noises = [torch.randn(4, *a.shape, generator=generator) for _ in range(20)]
        step, count = DDPMScheduler.step, iter(range(20))

        def same(self: Any, output: Any, t: Any, x: Any, step: Any = step, count: Any = count, noises: Any = noises) -> Any:
            monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noises[next(count)])
            return step(self, output, t, x)

        monkeypatch.setattr(DDPMScheduler, "step", same)
        monkeypatch.setattr(torch, "randn", lambda *shape, start=start, **_: start.clone())
        monkeypatch.chdir(tmp_path)
        exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], scope := {})
        monkeypatch.undo()

        schedule, low_high = a.process.schedule, a.bounds
        denoiser = a.process.denoiser(a.network)
        if a.config["process"]["clip"]:
            denoiser = clip(denoiser, schedule, *low_high)
        with torch.no_grad():
            levels = times(schedule, 20, "even")
            x = ancestral(
                denoiser, start, levels, schedule, noise=lambda k, like, noises=noises: noises[k].to(like),
                variance=a.process.variance,
            )  # fmt: skip
            assert a.codec is not None
            images = (a.codec.decode(x) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(scope["images"], images, rtol=0, atol=1e-4)


def test_a_latent_run_leaves_as_our_own_folder_and_is_opened_as_it_is(tmp_path: Path) -> None:
    autoencoder = open_autoencoder(str(keep_vae(tmp_path / "vae", {"widths": [8, 16]}, tanh=True)), CPU)
    model = {"attention": ["linear", "full"], "mid_attention": "linear"}
    run = keep_latent(tmp_path / "run", autoencoder, classes=("cat", "dog"), model=model)
    message = refuse("to-diffusers", run, tmp_path / "theirs")
    for reason in ("attention linear", "ends with tanh", "convert.py safetensors"):
        assert reason in message
    assert "give --out a folder" in refuse("safetensors", run, tmp_path / "own.safetensors")
    leave("safetensors", run, tmp_path / "own")
    folder, wanted = tmp_path / "own", images_of(run, labels=[0, 1, 2])
    shutil.rmtree(tmp_path / "vae")
    run.rename(tmp_path / "gone")
    torch.testing.assert_close(images_of(folder, labels=[0, 1, 2]), wanted, rtol=0, atol=0)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".md"}
    card = (folder / "README.md").read_text()
    for words in (
        "16 x 16 pixels",
        "2 classes",
        "4 x 8 x 8",
        "| 0 | -0.2 | 0.5 | -1 | 1.5 |",
        "0 cat, 1 dog",
        "diffusers cannot",
    ):
        assert words in card, words
    (folder / "README.md").write_text("a person's own words")
    assert images_of(folder, labels=[0, 1, 2]).isfinite().all(), "the card is not part of what is checked"
    assert "needs no conversion" in refused("convert", "diffusers", folder, "--out", tmp_path / "again")
    assert open_autoencoder(str(folder), CPU).digest == autoencoder.digest, (
        "train_ldm.py takes the autoencoder of such a folder"
    )


def test_a_latent_run_of_several_shapes_leaves_at_the_most_frequent(tmp_path: Path) -> None:
    autoencoder = open_autoencoder(str(keep_vae(tmp_path / "vae")), CPU)
    one_size, run, table = (
        keep_latent(tmp_path / "one", autoencoder, size=(16, 20)),
        tmp_path / "run",
        [[16, 20, 30], [20, 16, 5]],
    )
    documents = {path.stem: json.loads(path.read_text()) for path in one_size.glob("[!M]*.json")}
    documents["data"]["buckets"], documents["config"]["image"] = table, {"size": 18, "aspect": {"kind": "buckets"}}
    write_folder(run, {name: read_tensors(one_size, name) for name in ("ema", "autoencoder")}, documents)
    wanted = images_of(run)
    assert wanted.shape == (3, 3, 16, 20)

    leave("safetensors", run, tmp_path / "own")
    opened = open_trained(tmp_path / "own", CPU)
    assert [list(bucket) for bucket in opened.buckets] == table and opened.at_size((20, 16)).shape == (4, 10, 8)
    torch.testing.assert_close(images_of(tmp_path / "own"), wanted, rtol=0, atol=0)
    card = (tmp_path / "own" / "README.md").read_text()
    assert "16 x 20 (30 images), 20 x 16 (5 images)." in card and "--size HEIGHTxWIDTH" in card

    leave("to-diffusers", run, tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "unet" / "config.json").read_text())["sample_size"] == [8, 10]
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert "x = torch.randn(4, 4, 8, 10)\n" in card and "20 x 16 pixels start from\n`x = torch.randn(4, 4, 10, 8)`" in card
    bring_back(tmp_path / "theirs", tmp_path / "back")
    torch.testing.assert_close(images_of(tmp_path / "back"), wanted, rtol=0, atol=1e-5)
    assert open_trained(tmp_path / "back", CPU).image.size == (16, 20)


def test_a_latent_run_in_half_precision(tmp_path: Path) -> None:
    autoencoder = open_autoencoder(str(keep_vae(tmp_path / "vae")), CPU)
    run = keep_latent(tmp_path / "run", autoencoder)
    leave("safetensors", run, tmp_path / "own", half=True)
    for name, dtype in (("ema", torch.float16), ("autoencoder", torch.float32)):
        state = safetensors.torch.load_file(tmp_path / "own" / f"{name}.safetensors")
        assert {value.dtype for value in state.values()} == {dtype}
    torch.testing.assert_close(images_of(tmp_path / "own"), images_of(run), rtol=0, atol=0.05)


def test_a_latent_run_with_their_autoencoder(tmp_path: Path) -> None:
    """One whose latents have a scaling of their own."""
    import_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    kind: Any = AutoencoderKL
    theirs = kind(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, scaling_factor=0.4, shift_factor=0.1,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "vae")
    autoencoder = open_autoencoder(str(tmp_path / "vae"), CPU)
    run = keep_latent(tmp_path / "run", autoencoder)
    leave("to-diffusers", run, tmp_path / "out")
    bring_back(tmp_path / "out", tmp_path / "back")
    torch.testing.assert_close(images_of(tmp_path / "back"), images_of(run), rtol=0, atol=1e-5)
    (tmp_path / "out" / "latents.json").unlink()  # then its own scaling says how latents are normalised
    imported = read_whole(tmp_path / "out")
    assert imported.latents is not None and autoencoder.scaling is not None
    assert [imported.latents[key] for key in ("mean", "std")] == [[value] * 4 for value in autoencoder.scaling]


def test_a_latent_folder_that_does_not_fit_together(tmp_path: Path) -> None:
    autoencoder = open_autoencoder(str(keep_vae(tmp_path / "vae")), CPU)
    run, out = keep_latent(tmp_path / "run", autoencoder), tmp_path / "theirs"
    leave("to-diffusers", run, out)
    facts = json.loads((out / "latents.json").read_text())
    for change, words in (
        ({"std": [1.0] * 3}, "needs the shape"),
        ({"std": [1.0, 0.0, 1.0, 1.0]}, "needs the shape"),
        ({"mean": "x"}, "needs the shape"),
        ({"shape": [4, 16, 16]}, "needs the shape"),
        ({"autoencoder": "other"}, "missing or belongs to another autoencoder"),
    ):
        (out / "latents.json").write_text(json.dumps(facts | change))
        assert words in refused("convert", "diffusers", out, "--out", tmp_path / "back")
    (out / "latents.json").unlink()
    assert "missing or belongs" in refused("convert", "diffusers", out, "--out", tmp_path / "back")
    shutil.rmtree(out / "vae")
    assert not (tmp_path / "back").exists()


def test_a_blend_from_other_data_is_refused_by_diffusers_alone(tmp_path: Path) -> None:
    autoencoder = open_autoencoder(str(keep_vae(tmp_path / "vae")), CPU)
    run = keep_latent(tmp_path / "run", autoencoder, "iadb")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"source": {"source": "shapes", "count": 8, "size": 16}}))
    manifest = json.loads((run / "MANIFEST.json").read_text())
    del manifest["files"]["config.json"]
    (run / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "does not start from Gaussian noise" in refuse("to-diffusers", run, tmp_path / "theirs")
    leave("safetensors", run, tmp_path / "own")
    assert open_trained(tmp_path / "own", CPU).config["source"]["source"] == "shapes"


def test_training_takes_what_left(tmp_path: Path) -> None:
    autoencoder = open_autoencoder(str(keep_vae(tmp_path / "vae")), CPU)
    run = keep_latent(tmp_path / "run", autoencoder, classes=("circle", "cross", "square", "triangle"))
    leave("safetensors", run, tmp_path / "own")
    leave("to-diffusers", run, tmp_path / "theirs")
    leave("to-diffusers", tmp_path / "vae", tmp_path / "kl")
    raw = json.loads((tmp_path / "own" / "config.json").read_text())
    sets = {"model": raw["model"], "process": raw["process"], "steps": 1, "preview": {"sampler": {"steps": 2}}, "held_out": 0.0}
    words = [f"--set={key}={json.dumps(value)}" for key, value in sets.items()]
    words += [f"--set=autoencoder={tmp_path / 'theirs'}", f"--set=init_from={tmp_path / 'own'}"]
    done = run_in_process("train_ldm.py", "-cfg", "configs/smoke/ldm.json", *words, "--run-dir", tmp_path / "trained")
    assert done.status == 0 and f"starting from the weights of {tmp_path / 'own'}" in done.all, done.all
    digests = {open_autoencoder(str(tmp_path / name), CPU).digest for name in ("vae", "kl", "theirs", "own", "trained")}
    assert digests == {autoencoder.digest}, "all of them are the same autoencoder, and share a latent cache"
    started = VAE(autoencoder.network.spec, 3)
    assert start_from(str(tmp_path / "kl"), started) is False, "what train_vae.py does with init_from: no tanh"
    assert all(torch.equal(value, autoencoder.network.state_dict()[key]) for key, value in started.state_dict().items())


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = keep_vae(tmp_path / "run")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("src.interop.diffusers_export.write_flushed", full)
    with pytest.raises((OSError, UserError)):
        leave("to-diffusers", run, tmp_path / "theirs")
    monkeypatch.setattr("src.runtime.checkpoint.write_flushed", full)
    assert "the disk is full" in refuse("safetensors", run, tmp_path / "own")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
