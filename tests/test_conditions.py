"""Runs that draw from images, through the scripts: what is drawn from given images, how near it is to the truth, mistakes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.config import validate
from src.data.conditions import LowCondition, edges
from src.diffusion import ProcessConfig
from src.interop.imported import Imported, keep
from src.models import UNet, UNetConfig
from src.runs.opened import open_trained
from src.sampling.conditions import read_conditions
from tests.conftest import ROOT, SMOKE, metrics, randomise, refused, run_in_process

CPU = torch.device("cpu")
CONDITIONS: dict[str, dict[str, Any]] = {
    "edges": {"kind": "edges"},
    "low": {"kind": "low", "size": 8, "noise": 0.5},
    "mask": {"kind": "mask"},
}
FEW = ("--steps", "2", "--batch-size", "4")


def save(path: Path, size: tuple[int, int], number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def sizes_of(folder: Path) -> list[tuple[int, int]]:
    """Width and height of the samples in a folder, in order."""
    sizes = []
    for path in sorted(folder.glob("0*.png")):
        with Image.open(path) as image:
            sizes.append(image.size)
    return sizes


def train(run: Path, condition: dict[str, Any], *changes: str, script: str = "ddpm_accelerate", config: str = SMOKE) -> Any:
    every = ["steps=2", "preview.every=2", "preview.quality=null", "preview.num_samples=4", "log.trackers=[]", "log.every=1"]
    every += [f"condition={json.dumps(condition)}", "condition_dropout=0.2", "checkpoint.every=2", *changes]
    words = [word for change in every for word in ("--set", change)]
    return run_in_process(f"{script}.py", "-cfg", ROOT / config, "--run-dir", run, *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each condition."""
    folder = tmp_path_factory.mktemp("conditioned")
    for name, condition in CONDITIONS.items():
        done = train(folder / name, condition)
        assert done.status == 0, done.all
        assert (folder / name / "samples" / "step_00000002.png").exists() and metrics(folder / name)[-1]["held_out_loss"] > 0
    return {name: folder / name for name in CONDITIONS}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images of 16 px."""
    folder = tmp_path_factory.mktemp("given")
    for i in range(3):
        save(folder / f"{i}.png", (16, 16), i)
    return folder


def test_images_are_drawn_from_given_ones(runs: dict[str, Path], given: Path, tmp_path: Path) -> None:
    words = ("--condition", given, "--num-samples", "2", *FEW)
    for name, run in runs.items():
        done = run_in_process("sample.py", run, *words, "--out", tmp_path / name)
        assert done.status == 0 and "6 images of" in done.out and "side_by_side.png" in done.out, done.all
        assert len(list((tmp_path / name).glob("0*.png"))) == 6
    guided = run_in_process("sample.py", runs["edges"], *words, "--condition-guidance", "2", "--out", tmp_path / "guided")
    assert guided.status == 0, guided.all
    files = [(tmp_path / name / "00000.png").read_bytes() for name in ("edges", "guided")]
    assert files[0] != files[1]
    assert json.loads((tmp_path / "guided" / "metadata.json").read_text())["condition_guidance"] == 2
    assert "condition_guidance" not in (tmp_path / "edges" / "metadata.json").read_text()
    one = run_in_process("sample.py", runs["edges"], "--condition", given / "0.png", *FEW, "--out", tmp_path / "one")
    assert one.status == 0 and "1 images of" in one.out, one.all


def test_the_condition_of_a_given_image(runs: dict[str, Path], given: Path, tmp_path: Path) -> None:
    """That of training: edges of the image, which is the truth; a small image stands for itself; a mask file hides its part."""
    opened = open_trained(runs["edges"], CPU)
    values, shown, truth = read_conditions(opened, str(given))
    assert truth is not None and [image.shape for image in (*shown, *truth)] == 6 * [(3, 16, 16)]
    for value, image in zip(values, truth, strict=True):
        assert torch.equal(value[:1], edges(image[None])[0]) and torch.equal(value[1], torch.ones(16, 16))
    upsampler = open_trained(runs["low"], CPU)
    small = save(tmp_path / "small" / "0.png", (8, 8))
    (value,), _, truth = read_conditions(upsampler, str(small), level=0.25)
    assert truth is None and value.shape == (5, 8, 8) and value[3:, 0, 0].tolist() == [0.25, 1.0]
    Image.fromarray(np.pad(np.full((8, 16), 255, np.uint8), ((8, 0), (0, 0)))).save(tmp_path / "mask.png")
    values, _, truth = read_conditions(open_trained(runs["mask"], CPU), str(given), mask=str(tmp_path / "mask.png"))
    for value, image in zip(values, truth or (), strict=True):
        assert torch.equal(value[:3, :8], image[:, :8]) and not value[:3, 8:].any()


def test_what_does_not_fit_is_said(runs: dict[str, Path], given: Path, smoke_run: Path) -> None:
    assert "draws from images (edges): give them with --condition FOLDER" in refused("sample", runs["edges"])
    assert "draws from no image; leave --condition out" in refused("sample", smoke_run, "--condition", given)
    assert "trained with a condition" in refused("sample", smoke_run, "--condition-guidance", "2")
    assert "levels from 0 to 0" in refused("sample", runs["edges"], "--condition", given, "--condition-noise", "0.1")
    assert "draws from no masked image" in refused("sample", runs["edges"], "--condition", given, "--mask", given / "0.png")
    assert "--truth is for runs on pairs" in refused("sample", runs["edges"], "--condition", given, "--truth", given)
    assert "give them with --condition" in refused("sample", runs["edges"], "--truth", given)
    assert "two ways" in refused("sample", runs["edges"], "--condition", given, "--image", given / "0.png", "--start-at", "1")
    assert "leave it out" in refused("sample", runs["edges"], "--invert", given)
    assert "would depend on them" in refused("evaluate", runs["edges"], "--likelihood")
    assert "--sweep measures runs that draw from noise" in refused(
        "evaluate", runs["edges"], "--sweep", "steps=1,2", "--features", "random"
    )
    assert "is about drawing from images" in refused("evaluate", smoke_run, "--samples-per-image", "2", "--features", "random")
    assert "draws from images" in refused("ddpm_accelerate", "--ckpt", runs["edges"], "--ckpt_sampling")


def test_samples_are_measured_against_the_truth(runs: dict[str, Path], tmp_path: Path) -> None:
    words = ("--features", "random", "--num-samples", "22", "--steps", "2", "--out", tmp_path, "--device", "cpu")
    done = run_in_process("evaluate.py", runs["low"], *words, "--samples-per-image", "2", "--json")
    assert done.status == 0, done.all
    values = json.loads(done.out.strip().splitlines()[-1])
    assert values["psnr"] > 0 and values["spread_l1"] > 0 and values["real_pictures"] == 11 and values["num_samples"] == 22
    assert (tmp_path / "side_by_side.png").exists()


def test_a_cascade_goes_from_noise_to_the_large_image(runs: dict[str, Path], tmp_path: Path) -> None:
    done = train(tmp_path / "small", {"kind": "edges"}, "condition=null", "condition_dropout=0", "image.size=8")
    assert done.status == 0, done.all
    words = ("--num-samples", "3", *FEW, "--out", tmp_path / "out", "--then", runs["low"], "--condition-noise", "0.1")
    done = run_in_process("sample.py", tmp_path / "small", *words)
    assert done.status == 0 and "larger: the same, 16 px" in done.out, done.all
    for folder, size in ((tmp_path / "out", 8), (tmp_path / "out" / "larger", 16)):
        assert [np.array(Image.open(path)).shape for path in sorted(folder.glob("0*.png"))] == [(size, size, 3)] * 3
    small = torch.from_numpy(np.array(Image.open(tmp_path / "out" / "00001.png"))).permute(2, 0, 1) / 127.5 - 1
    values = read_conditions(open_trained(runs["low"], CPU), str(tmp_path / "out")).values
    assert torch.equal(values[1][:3], small), "the network sees the samples as they are"
    assert "makes no images larger" in refused("sample", tmp_path / "small", "--then", runs["edges"])


def test_a_latent_run_draws_from_images_and_says_so_where_it_leaves(vae_run: Path, given: Path, tmp_path: Path) -> None:
    changes = (f"autoencoder={vae_run}", f"latents={tmp_path / 'latents'}", "preview.sheets=one")
    done = train(tmp_path / "run", {"kind": "mask", "copies": 2}, *changes, script="train_ldm", config="configs/smoke/ldm.json")
    assert done.status == 0 and "--condition FOLDER" in done.out, done.all
    done = run_in_process("sample.py", tmp_path / "run", "--condition", given, *FEW, "--out", tmp_path / "out")
    assert done.status == 0 and "3 images of" in done.out, done.all
    done = run_in_process("convert.py", "safetensors", tmp_path / "run", "--out", tmp_path / "folder")
    assert done.status == 0, done.all
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "--condition IMAGES" in card and "draws from images (mask)" in card
    assert "diffusers cannot have it: it draws from other images" in card
    assert open_trained(tmp_path / "folder", CPU).condition == open_trained(tmp_path / "run", CPU).condition
    assert "does not draw pixels from noise alone" in refused(
        "convert", "to-diffusers", tmp_path / "run", "--out", tmp_path / "x"
    )


def test_each_image_is_drawn_at_its_own_shape(vae_run: Path, tmp_path: Path) -> None:
    """Latents, buckets and a condition together: trained, drawn (a batch is of one shape), made larger and measured."""
    sides = [(40, 40), (30, 50), (50, 30)]  # width and height
    for i in range(24):
        save(tmp_path / "data" / f"{i:02d}.png", sides[i % 3], i)
    source = {"source": "folder", "path": str(tmp_path / "data")}
    image = {"size": 16, "aspect": {"step": 4, "min_images": 2}}
    changes = (f"data={json.dumps(source)}", f"image={json.dumps(image)}", "held_out=0", "batch_size=4", "micro_batch_size=4")
    latents = (f"autoencoder={vae_run}", f"latents={tmp_path / 'latents'}", "preview.sheets=one", "class_conditional=false")
    run = tmp_path / "run"
    options = {"script": "train_ldm", "config": "configs/smoke/ldm.json"}
    done = train(run, {"kind": "low", "size": 8}, *changes, *latents, "label_dropout=0", **options)
    assert done.status == 0, done.all
    assert {(height, width) for height, width, _ in json.loads((run / "data.json").read_text())["buckets"]} == {
        (16, 16), (20, 12), (12, 20)
    }  # fmt: skip

    given = tmp_path / "given"
    for i in range(4):
        save(given / f"{i}.png", sides[i % 3], i)
    words = ("--condition", given, "--num-samples", "2", "--steps", "2", "--batch-size", "3", "--frames")
    done = run_in_process("sample.py", run, *words, "--out", tmp_path / "out")
    assert done.status == 0 and "8 images of" in done.out and (tmp_path / "out" / "denoising.gif").exists(), done.all
    sizes = sizes_of(tmp_path / "out")
    assert sizes == [size for size in ((16, 16), (12, 20), (20, 12), (16, 16)) for _ in range(2)]
    opened = open_trained(run, CPU)
    values, shown, truth = read_conditions(opened, str(given))
    assert truth is not None and [image.shape[1:] for image in truth] == [image.shape[1:] for image in shown]
    by_itself = read_conditions(opened, str(given / "2.png"))
    assert torch.equal(by_itself.values[0], values[2]) and values[2].shape[1] < values[2].shape[2]
    done = run_in_process("sample.py", run, *words[:-1], "--size", "16", "--out", tmp_path / "squares")
    assert done.status == 0 and sizes_of(tmp_path / "squares") == 8 * [(16, 16)], done.all
    assert "give --size HxW, or leave --npz out" in refused("sample", run, *words, "--npz", "--out", tmp_path / "npz")

    done = run_in_process("sample.py", run, *words[:-1], "--out", tmp_path / "cascade", "--then", run)
    assert done.status == 0, done.all
    assert sizes_of(tmp_path / "cascade" / "larger") == sizes
    words = ("--features", "random", "--num-samples", "24", "--samples-per-image", "2", "--steps", "2", "--device", "cpu")
    done = run_in_process("evaluate.py", run, *words, "--batch-size", "5", "--out", tmp_path / "measured", "--json")
    assert done.status == 0 and "each sample has the shape of its image" in done.err + done.out, done.all
    values = json.loads(done.out.strip().splitlines()[-1])
    assert values["psnr"] > 0 and values["spread_l1"] > 0 and values["num_samples"] == 24
    assert (tmp_path / "measured" / "side_by_side.png").exists()


def test_a_run_starts_from_one_without_a_condition(smoke_run: Path, tmp_path: Path) -> None:
    done = train(tmp_path / "run", CONDITIONS["low"], f"init_from={smoke_run}", "augmentation={}")
    assert done.status == 0 and "its input has zeros for 5 new channels of the condition" in done.out, done.all
    assert "what it is told of augmentation is new, and zero at first" in done.out
    done = train(tmp_path / "back", CONDITIONS["low"], f"init_from={tmp_path / 'run'}")
    assert done.status == 0 and "without what it was told of augmentation" in done.out, done.all


def test_an_imported_upsampler_is_trained_on(tmp_path: Path) -> None:
    model = validate(UNetConfig, json.loads((ROOT / SMOKE).read_text())["model"])
    network = randomise(UNet(model, in_channels=3, num_classes=4, null_class=False, condition_channels=3))
    process = validate(ProcessConfig, {"schedule": {"kind": "linear", "steps": 100, "rescale_betas": True}, "target": "eps"})
    path = keep(Imported(network, process, image_size=16, channels=3, low_resolution=8), tmp_path / "up", name="up")
    assert path is not None and open_trained(tmp_path / "up", CPU).condition == LowCondition(kind="low", size=8)
    settings = json.loads(path.read_text())
    assert settings["condition"] == {"kind": "low", "size": 8, "noise": 0.0} or settings["condition"]["size"] == 8
    done = train(tmp_path / "run", CONDITIONS["low"], f"init_from={tmp_path / 'up'}")
    assert done.status == 0 and "zeros for 2 new channels of the condition" in done.out, done.all


def test_pairs_are_drawn_and_measured(tmp_path: Path) -> None:
    for i in range(12):
        both = np.asarray(Image.open(save(tmp_path / "data" / "B" / f"{i}.png", (16, 16), i)))
        (tmp_path / "data" / "A").mkdir(exist_ok=True)
        Image.fromarray(255 - both).save(tmp_path / "data" / "A" / f"{i}.png")
    source = {"source": "folder", "path": str(tmp_path / "data" / "B")}
    condition = {"kind": "paired", "path": str(tmp_path / "data" / "A")}
    done = train(tmp_path / "run", condition, f"data={json.dumps(source)}", "held_out=0.3", "batch_size=4")
    assert done.status == 0, done.all
    words = ("--condition", tmp_path / "data" / "A", "--truth", tmp_path / "data" / "B", *FEW)
    done = run_in_process("sample.py", tmp_path / "run", *words, "--out", tmp_path / "out")
    assert done.status == 0 and "12 images of" in done.out, done.all
    (tmp_path / "data" / "B" / "0.png").rename(tmp_path / "data" / "B" / "x.png")
    assert "has no image of the name of 0.png" in refused("sample", tmp_path / "run", *words, "--out", tmp_path / "other")
