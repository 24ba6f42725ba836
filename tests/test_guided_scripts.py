"""Learned variance, likelihood, classifiers and guidance, imports: launched as a user launches them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src.config import UserError, read_json, validate
from src.diffusion import ProcessConfig
from src.interop.imported import Imported, keep
from src.models import UNet, UNetConfig
from src.runs.classifier import open_classifier
from src.runs.opened import open_trained
from src.sampling import SamplerConfig, build_sampler
from src.sampling.edit import load_edit, load_low
from tests import kills
from tests.conftest import SMOKE, Finished, launch, metrics, one_line, randomise, refused, run_in_process
from tests.in_turn import launch_in_turn
from tests.kills import settings
from tests.sampling.test_upscaling import rrdb

CLASSIFIER = "configs/smoke/classifier.json"
CPU = torch.device("cpu")
HYBRID = settings(process__variance="learned", process__loss={"kind": "hybrid"}, times={"kind": "second_moment", "history": 2})


@pytest.fixture(scope="session")
def hybrid_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke config with learned variance, the hybrid loss, and times by the second moment; read only."""
    run = tmp_path_factory.mktemp("hybrid") / "one"
    done = run_in_process("ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", run, *HYBRID)
    assert done.status == 0, done.all
    return run


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke classifier on one process; read only."""
    run = tmp_path_factory.mktemp("classifier") / "one"
    done = launch("train_classifier.py", "-cfg", CLASSIFIER, "--run-dir", run)
    assert done.status == 0 and "= 1 x cpu x 2 x 8" in done.out, done.all
    return run


@pytest.fixture(scope="module")
def on_two(
    hybrid_run: Path, classifier_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Finished]]:
    """What these tests run on two processes, in one launch: the folder that it is in, and how each ended."""
    folder = tmp_path_factory.mktemp("on_two")
    kills.go_back(hybrid_run, folder / "hybrid")
    torch.save({"params_ema": rrdb().state_dict()}, folder / "weights.pth")
    upscaled = ("--upscale", "--upscaler", folder / "weights.pth")
    words = {
        "hybrid": ("ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", folder / "hybrid", *HYBRID),
        "classifier": ("train_classifier.py", "-cfg", CLASSIFIER, "--run-dir", folder / "classifier"),
        "samples": sample_words(hybrid_run, folder / "samples", *guided_by(classifier_run), "--guidance", "3", "--npz"),
        "upscaled": sample_words(hybrid_run, folder / "upscaled", *upscaled),
    }
    return folder, dict(zip(words, launch_in_turn(folder / "words", *words.values()), strict=True))


# ---------------------------------------------------------------------------------------------- training


def test_the_hybrid_loss_is_logged_by_its_terms_and_resumed_on_two(
    hybrid_run: Path, on_two: tuple[Path, dict[str, Finished]]
) -> None:
    """The history of the times is in the checkpoint, and the same on all ranks."""
    for line in metrics(hybrid_run):
        assert {"loss", "mse", "vb"} <= line.keys() and line["vb"] > 0
    done = on_two[1]["hybrid"]
    assert done.status == 0 and "going on at step 10 of 30" in done.out and "= 2 x cpu x 1 x 8" in done.out, done.all
    kills.same_end(hybrid_run, on_two[0] / "hybrid")
    learned = load_file(hybrid_run / "checkpoints" / "step_00000030" / "times.safetensors")
    assert learned["history"].shape == (100, 2) and int(learned["counts"].sum()) > 100
    assert "pending.1.losses" in learned, "the last two steps do not count yet"


def test_a_classifier_on_one_process_and_two_is_equal_to_the_bit(
    classifier_run: Path, on_two: tuple[Path, dict[str, Finished]]
) -> None:
    done = on_two[1]["classifier"]
    assert done.status == 0 and "= 2 x cpu x 1 x 8" in done.out, done.all
    kills.same_end(classifier_run, on_two[0] / "classifier")
    last = metrics(classifier_run)[-1]
    assert [key for key in last if key.startswith("held_out_accuracy")] == [f"held_out_accuracy_{i}" for i in range(4)]
    assert (classifier_run / "samples" / "step_00000030.png").stat().st_size > 5000
    repeated = run_in_process("train_classifier.py", "-cfg", CLASSIFIER, "--run-dir", classifier_run)
    assert repeated.status == 0 and "is finished (30 steps); guide with it: python sample.py" in repeated.out


@pytest.mark.soak
def test_a_classifier_learns_and_is_better_where_there_is_less_noise(tmp_path: Path) -> None:
    sets = settings(steps=300, preview__every=300, preview__num_measured=80, checkpoint__every=None, log__every=100)
    arguments = settings(optimizer__lr=2e-3, data__count=400, held_out=0.2)
    done = run_in_process("train_classifier.py", "-cfg", CLASSIFIER, "--run-dir", tmp_path / "run", *sets, *arguments)
    assert done.status == 0, done.all
    last = metrics(tmp_path / "run")[-1]
    assert last["held_out_accuracy_0"] > 0.55 and last["held_out_accuracy_0"] > last["held_out_accuracy_3"] + 0.2
    opened = open_classifier(tmp_path / "run", CPU)
    assert opened.class_names == ("circle", "cross", "square", "triangle") and opened.step == 300


def test_a_classifier_of_another_run(classifier_run: Path, tmp_path: Path) -> None:
    shapes = settings(steps=2, init_from=str(classifier_run), log__trackers=[])
    same = run_in_process("train_classifier.py", "-cfg", CLASSIFIER, "--run-dir", tmp_path / "same", *shapes)
    assert same.status == 0 and f"starting from the weights of {classifier_run} (step 30)\n" in same.out, same.all
    for name in ("cats", "dogs"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20, 20), (20 * i, 90, 200)).save(tmp_path / "mine" / name / f"{i}.png")
    own_data = settings(
        data={"source": "folder", "path": str(tmp_path / "mine")}, held_out=0.0, batch_size=8, micro_batch_size=4
    )
    done = run_in_process("train_classifier.py", "-cfg", CLASSIFIER, "--run-dir", tmp_path / "run", *shapes, *own_data)
    assert done.status == 0 and "its classes are others, so its last layer is new" in done.out, done.all
    before = load_file(classifier_run / "final" / "ema.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "step_00000002" / "model.safetensors")
    assert after["head.out.weight"].shape[0] == 2 and float((after["stem.weight"] - before["stem.weight"]).abs().max()) < 0.05


def test_a_classifier_is_killed_and_resumed(classifier_run: Path, tmp_path: Path) -> None:
    kills.go_back(classifier_run, tmp_path / "run")
    done = run_in_process("train_classifier.py", "-cfg", CLASSIFIER, "--run-dir", tmp_path / "run")
    assert done.status == 0 and "going on at step 10 of 30" in done.out, done.all
    kills.same_end(classifier_run, tmp_path / "run")


# ---------------------------------------------------------------------------------------------- sampling


def sample_words(run: Path, out: Path, *arguments: str | Path) -> tuple[str | Path, ...]:
    return ("sample.py", run, "--num-samples", "4", "--batch-size", "2", "--steps", "4", "--out", out, *arguments)


def guided_by(classifier: Path) -> tuple[str | Path, ...]:
    guided = ("--guidance-method", "classifier", "--classifier", classifier)
    return (*guided, "--classes", "circle/square", "--solver", "ancestral")


def sample(run: Path, out: Path, *arguments: str | Path) -> Finished:
    return run_in_process(*sample_words(run, out, *arguments))


def read(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


def test_classifier_guidance_from_the_command_line(
    hybrid_run: Path, classifier_run: Path, on_two: tuple[Path, dict[str, Finished]], tmp_path: Path
) -> None:
    guided, done, two = guided_by(classifier_run), on_two[1]["samples"], on_two[0] / "samples"
    assert done.status == 0 and "2 process(es)" in done.out, done.all
    one = sample(hybrid_run, tmp_path / "one", *guided, "--guidance", "3")
    assert one.status == 0 and read(tmp_path / "one") == read(two) and len(read(tmp_path / "one")) == 4
    plain = sample(hybrid_run, tmp_path / "plain", *guided, "--guidance", "0")
    assert plain.status == 0 and read(tmp_path / "plain") != read(tmp_path / "one")
    with np.load(two / "samples_4x16x16x3.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_1"].tolist() == [0, 0, 2, 2]
        assert np.array_equal(archive["arr_0"][2], np.asarray(Image.open(two / "00002.png")))
    metadata = read_json(two / "metadata.json")
    assert metadata["guidance_method"] == "classifier" and len(metadata["classifier"]) == 64


def test_from_an_image_with_a_mask_and_in_sections(hybrid_run: Path, tmp_path: Path) -> None:
    image, mask = Image.new("RGB", (24, 20), (200, 60, 30)), Image.new("L", (24, 20), 0)
    image.save(tmp_path / "image.png")
    mask.paste(255, (12, 0, 24, 20))
    mask.save(tmp_path / "mask.png")
    keep = ("--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--resamplings", "2", "--frames")
    done = sample(hybrid_run, tmp_path / "out", *keep)
    assert done.status == 0, done.all
    for i in range(4):
        pixels = np.asarray(Image.open(tmp_path / "out" / f"0000{i}.png")).astype(int)
        assert np.abs(pixels[:, :7] - (200, 60, 30)).max() <= 1 and np.abs(pixels[:, 9:] - (200, 60, 30)).max() > 20
    done = sample(hybrid_run, tmp_path / "sections", "--steps", "3,2", "--solver", "ancestral", "--stop-at", "4")
    assert done.status == 0 and "5 network calls" in done.out, done.all
    Image.new("L", (16, 16), 255).save(tmp_path / "small.png")
    message = refused("sample", hybrid_run, *keep[:2], "--mask", tmp_path / "small.png", "--out", tmp_path / "x")
    assert "has 16 x 16 px and" in message and "24 x 20; give one of the same size" in message
    assert "--image alone changes nothing" in refused("sample", hybrid_run, *keep[:2])
    assert "counted from 0" in refused("sample", hybrid_run, *keep[:2], "--start-at", "50")
    assert "not an image" in refused("sample", hybrid_run, "--image", tmp_path / "none.png", "--start-at", "5")


def test_an_image_is_filled_in_through_its_latents(ldm_run: Path, tmp_path: Path) -> None:
    """What a mask touches is drawn anew, latent by latent; the rest is the image as its autoencoder has it."""
    opened = open_trained(ldm_run, CPU)
    assert opened.codec is not None
    size, latent = opened.image.size, opened.shape[1]
    image, mask = Image.new("RGB", (size, size), (180, 90, 40)), Image.new("L", (size, size), 0)
    mask.putpixel((size - 1, 0), 255)
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    paths = str(tmp_path / "image.png"), str(tmp_path / "mask.png")
    edit = load_edit(opened, *paths, start_at=0, resamplings=1, steps=4)
    assert edit.mask is not None and edit.mask.shape == (1, latent, latent) and float(edit.mask.sum()) == 1
    assert float(edit.mask[0, 0, -1]) == 1 and edit.x0.shape == opened.shape
    sampler = build_sampler(opened, SamplerConfig(steps=4))
    noisy_latents = []
    sampler.draw(0, [0], [0], device=CPU, edit=edit, callback=lambda step, t, x_t, prediction: noisy_latents.append(x_t))
    whole = sampler.draw(0, [0], [0], device=CPU, edit=edit._replace(mask=torch.zeros(1, latent, latent)))
    torch.testing.assert_close(whole[0], opened.codec.decode(edit.x0[None])[0])
    assert len(noisy_latents) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--guidance-method", "classifier"), "guidance by a classifier needs one: sample.py takes --classifier RUN"),
        (("--mask", "m.png"), "--mask and --start-at are about an image"),
        (("--resamplings", "3"), "--resamplings belongs to --mask"),
        (("--classifier", "x"), "guides only with --guidance-method classifier"),
        (("--upscaler", "x.pth"), "--upscaler is for --upscale"),
        (("--upscale", "--upscaler", "none.pth"), "none.pth: there are no such weights"),
        (("--classes", "0/1/2", "--num-samples", "16"), "16 images cannot be dealt to 3 classes in equal blocks"),
        (("--classes", "9"), "class '9' is not known; the classes are: circle"),
        (("--steps", "99,2"), "more than the schedule's 100"),
        (("--steps", "20", "--spacing", "strided", "--stop-at", "20"), "stop_at: 20 of 20 steps leaves none out"),
        (("--steps", "30", "--spacing", "strided"), "no whole stride through 100 entries gives 30 steps"),
        (("--steps", "60,20,20"), "cannot take 60 steps out of a section of 34"),
        (("--classes", "\u00b2"), "is not known; the classes are: circle"),
    ],
)
def test_what_sampling_refuses(hybrid_run: Path, words: tuple[str, ...], message: str) -> None:
    assert message in refused("sample", hybrid_run, *words)


def test_a_classifier_of_other_classes_or_size_is_refused(hybrid_run: Path, classifier_run: Path, tmp_path: Path) -> None:
    guided = ("--guidance-method", "classifier", "--classifier")
    opened, classifier = open_trained(hybrid_run, CPU), open_classifier(classifier_run, CPU)
    larger = replace(classifier, image=replace(classifier.image, size=32))
    others = replace(classifier, class_names=("a", "b", "c", "d"))
    with pytest.raises(UserError, match=r"knows other classes \(a, b, c, d\) than .*\(circle, cross, square, triangle\)"):
        build_sampler(opened, SamplerConfig(guidance_method="classifier"), others)
    with pytest.raises(UserError, match=r"sees 32 px in 3 channel\(s\), .* draws 16 px in 3; train one with the same image"):
        build_sampler(opened, SamplerConfig(guidance_method="classifier"), larger)
    assert "is no classifier" in refused("sample", hybrid_run, *guided, hybrid_run)
    assert "is a classifier, which draws nothing by itself" in refused("sample", classifier_run)
    (tmp_path / "flat").mkdir()
    for i in range(40):
        Image.new("RGB", (20, 20), (6 * i, 10, 10)).save(tmp_path / "flat" / f"{i}.png")
    flat = settings(data={"source": "folder", "path": str(tmp_path / "flat")})
    assert "the data has none" in refused("train_classifier", "-cfg", CLASSIFIER, "--run-dir", tmp_path / "run", *flat)


# ---------------------------------------------------------------------------------------------- likelihood


@pytest.mark.soak
def test_bits_per_dimension_on_two_processes_and_after_a_kill(hybrid_run: Path, tmp_path: Path) -> None:
    shutil.copytree(hybrid_run, run := tmp_path / "run")  # its metrics.jsonl is written to
    words = ("evaluate.py", run, "--likelihood", "--steps", "8", "--part", "train", "--num-images", "80")
    done = launch(*words, "--out", tmp_path / "two", processes=2)
    assert done.status == 0 and "bits per dimension = prior" in done.out, done.all
    assert "80 training images, 8 steps" in done.out
    whole = read_json(tmp_path / "two" / "likelihood.json")
    assert (tmp_path / "two" / "likelihood.png").exists() and len(whole["terms"]) == 8 and whole["pictures"] == 80
    assert whole["bits_per_dimension"] == pytest.approx(whole["prior"] + sum(whole["terms"]))
    assert whole["terms"][-1] == whole["decoder"]
    assert metrics(run)[-1]["evaluation_bits_per_dimension_of_80_in_8_steps_on_train"] == whole["bits_per_dimension"]
    (tmp_path / "two" / "block_00001.npz").unlink()
    (tmp_path / "two" / "likelihood.json").unlink()
    repeated = run_in_process(*words, "--out", tmp_path / "two", "--json")
    assert repeated.status == 0 and json.loads(repeated.out) == whole, repeated.all
    message = one_line(run_in_process(*words[:-1], "70", "--out", tmp_path / "two"))
    assert "holds other figures" in message


def test_what_has_no_likelihood(hybrid_run: Path, ldm_run: Path, tmp_path: Path) -> None:
    assert "--features is about" in refused("evaluate", hybrid_run, "--likelihood", "--features", "random")
    assert "--shift-base is about" in refused("evaluate", hybrid_run, "--likelihood", "--shift-base", "9")
    assert "--data are others; leave one out" in refused(
        "evaluate", hybrid_run, "--likelihood", "--part", "train", "--data", "x"
    )
    assert "dynamic thresholding is for pixels" in refused("sample", ldm_run, "--threshold", "0.9")
    assert "which have no bits per dimension" in refused("evaluate", ldm_run, "--likelihood", "--out", tmp_path / "x")
    assert "such as 100,50,25" in refused("evaluate", hybrid_run, "--likelihood", "--steps", "many")
    for i in range(3):
        (tmp_path / "mine").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (90 * i, 10, 10)).save(tmp_path / "mine" / f"{i}.png")
    words = ("evaluate", hybrid_run, "--likelihood", "--data", tmp_path / "mine", "--steps", "4", "--out", tmp_path / "y")
    (tmp_path / "mine" / "cats").mkdir()
    shutil.move(tmp_path / "mine" / "0.png", tmp_path / "mine" / "cats" / "0.png")
    assert "the data has other classes (cats) than" in refused(*words)


# ---------------------------------------------------------------------------------------------- other projects' checkpoints


def test_published_networks_are_brought_in_guided_and_trained_on(vectors: Path, tmp_path: Path) -> None:
    for name, flags in (("adm_64_class_conditional", True), ("adm_64_classifier", True)):
        words = ("--flags", vectors / f"{name}.json") if flags else ()
        done = run_in_process("convert.py", "guided-diffusion", vectors / f"{name}.pt", "--out", tmp_path / name, *words)
        assert done.status == 0 and "python sample.py" in done.out, done.all
    network, classifier = tmp_path / "adm_64_class_conditional", tmp_path / "adm_64_classifier"
    guided = ("--guidance-method", "classifier", "--classifier", classifier, "--classes", "7/900", "--solver", "ancestral")
    done = run_in_process(
        "sample.py", network, *guided, "--num-samples", "2", "--batch-size", "2", "--steps", "2", "--out", tmp_path / "out"
    )
    assert done.status == 0 and np.asarray(Image.open(tmp_path / "out" / "00001.png")).shape == (64, 64, 3), done.all
    assert "trained with label_dropout above 0" in refused("sample", network, "--guidance", "2")
    assert "class '1000' is not known" in refused("sample", network, "--classes", "1000")
    assert "names no images to measure it on: give --data" in refused("evaluate", network, "--likelihood")
    (tmp_path / "seven").mkdir()
    shutil.copy(tmp_path / "out" / "00000.png", tmp_path / "seven" / "0.png")
    words = ("evaluate", network, "--likelihood", "--data", tmp_path / "seven", "--steps", "2", "--out", tmp_path / "bits")
    assert "has no null class, and some images have no class" in refused(*words)
    for name in ("cats", "dogs"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (70, 66), (40 * i, 90, 200)).save(tmp_path / "mine" / name / f"{i}.png")
    config = network / "finetune.json"
    quick = settings(data__path=str(tmp_path / "mine"), steps=2, batch_size=2, preview__every=None, checkpoint__every=None)
    few = settings(preview__num_samples=2, preview__sampler={"steps": 2}, log__trackers=[])
    done = run_in_process("ddpm_accelerate.py", "-cfg", config, "--run-dir", tmp_path / "run", *quick, *few)
    assert done.status == 0 and "its classes are others, so the label embedding is new" in done.out, done.all
    before = load_file(network / "ema.safetensors")["stem.weight"]
    after = load_file(tmp_path / "run" / "checkpoints" / "step_00000002" / "model.safetensors")["stem.weight"]
    assert 0 < float((after - before).abs().max()) < 1e-3
    words = ("convert", "guided-diffusion", vectors / "adm_64_classifier.pt", "--out", network)
    assert "give the MODEL_FLAGS and DIFFUSION_FLAGS" in refused(*words)
    assert "exists and is not empty" in refused(*words, "--flags", vectors / "adm_64_classifier.json")


def test_a_run_goes_to_diffusers_and_back(hybrid_run: Path, tmp_path: Path) -> None:
    there = run_in_process("convert.py", "to-diffusers", hybrid_run, "--out", tmp_path / "theirs")
    assert there.status == 0 and (tmp_path / "theirs" / "model_index.json").exists(), there.all
    assert "README.md says how" in there.out and "library_name: diffusers" in (tmp_path / "theirs" / "README.md").read_text()
    back = run_in_process("convert.py", "diffusers", tmp_path / "theirs", "--out", tmp_path / "back", "--name", "again")
    assert back.status == 0, back.all
    images = []
    for run in (hybrid_run, tmp_path / "back"):
        opened = open_trained(run, CPU)
        assert opened.class_names == ("circle", "cross", "square", "triangle")
        sampler = build_sampler(opened, SamplerConfig(solver="ancestral", steps=5))
        images.append(sampler.draw(0, range(3), [0, 1, 4], device=CPU))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)
    assert "exists and is not empty" in refused("convert", "to-diffusers", hybrid_run, "--out", tmp_path / "theirs")


def test_half_precision_in_one_file(hybrid_run: Path, tmp_path: Path) -> None:
    done = run_in_process("convert.py", "safetensors", hybrid_run, "--out", tmp_path / "half.safetensors", "--fp16")
    assert done.status == 0, done.all
    half, original = load_file(tmp_path / "half.safetensors"), load_file(hybrid_run / "final" / "ema.safetensors")
    assert half.keys() == original.keys() and all(value.dtype == torch.float16 for value in half.values())
    torch.testing.assert_close(half["stem.weight"].float(), original["stem.weight"], rtol=1e-3, atol=1e-4)
    assert "is there already" in refused("convert", "safetensors", hybrid_run, "--out", tmp_path / "half.safetensors")
    assert run_in_process("convert.py", "safetensors", hybrid_run, "--out", tmp_path / "new" / "whole.safetensors").status == 0


def test_upscaled_samples_and_a_folder_of_ones_own(
    hybrid_run: Path, on_two: tuple[Path, dict[str, Finished]], tmp_path: Path
) -> None:
    done, out = on_two[1]["upscaled"], on_two[0] / "upscaled"
    weights = ("--upscaler", on_two[0] / "weights.pth")
    assert done.status == 0 and f"{out}/upscaled" in done.out, done.all
    assert [path.name for path in sorted((out / "upscaled").iterdir())] == [f"0000{i}.png" for i in range(4)]
    assert np.asarray(Image.open(out / "upscaled" / "00003.png")).shape == (64, 64, 3)
    (out / "upscaled" / "00001.png").unlink()
    repeated = sample(hybrid_run, out, "--upscale", *weights)
    assert repeated.status == 0 and (out / "upscaled" / "00001.png").exists(), repeated.all
    upscaled = run_in_process("sample.py", "--upscale-only", out / "upscaled", "--out", tmp_path / "huge", *weights)
    assert upscaled.status == 0 and "4 images, 4 times as large" in upscaled.out, upscaled.all
    assert np.asarray(Image.open(tmp_path / "huge" / "00000.png")).shape == (256, 256, 3)
    assert "give a run to sample from, or --upscale-only" in refused("sample", hybrid_run, "--upscale-only", tmp_path)
    only = ("sample", "--upscale-only", out / "upscaled")
    assert "--classes is about drawing images" in refused(*only, "--classes", "3")
    torch.save({"params_ema": rrdb(2).state_dict()}, tmp_path / "others.pth")
    others = ("--upscaler", tmp_path / "others.pth")
    assert "holds other images" in refused(*only, "--out", tmp_path / "huge", *others)
    script, *words = sample_words(hybrid_run, out, "--upscale", *others)
    assert "holds other images" in refused(str(script).removesuffix(".py"), *words)


def test_an_imported_upsampler_makes_images_larger(hybrid_run: Path, tmp_path: Path) -> None:
    config = {"base_channels": 8, "channel_mult": [1, 2], "attention": ["none", "none"], "blocks": 1, "norm_groups": 4}
    model = validate(UNetConfig, config)
    network = randomise(UNet(model, in_channels=3, num_classes=4, null_class=False, condition_channels=3))
    process = validate(ProcessConfig, {"schedule": {"kind": "linear", "steps": 50}, "target": "eps"})
    imported = Imported(network, process, image_size=32, channels=3, low_resolution=16)
    assert keep(imported, tmp_path / "up", name="up") == tmp_path / "up" / "finetune.json"
    assert "give with --low the images of 16 px" in refused("sample", tmp_path / "up")
    assert "is no upsampler" in refused("sample", hybrid_run, "--low", tmp_path)
    done = sample(hybrid_run, tmp_path / "small", "--npz", "--classes", "circle/cross")
    assert done.status == 0, done.all
    file_contents = []
    for low in (tmp_path / "small", tmp_path / "small" / "samples_4x16x16x3.npz"):
        words = ("--batch-size", "3", "--steps", "3", "--out", tmp_path / f"large{len(file_contents)}", "--low", low)
        done = run_in_process("sample.py", tmp_path / "up", *words, *(("--classes", "0/1") if low.is_dir() else ()))
        assert done.status == 0 and "4 images of" in done.out, done.all
        file_contents.append(read(tmp_path / f"large{len(file_contents)}"))
    assert file_contents[0] == file_contents[1] and len(file_contents[0]) == 4, "the .npz brings the labels 0, 0, 1, 1"
    opened = open_trained(tmp_path / "up", CPU)
    low, _ = load_low(opened, str(tmp_path / "small"))
    images = build_sampler(opened, SamplerConfig(steps=3)).draw(
        0, range(4), [0, 0, 1, 1], device=CPU, batch_size=4, condition=low
    )
    other = build_sampler(opened, SamplerConfig(steps=3)).draw(
        0, range(4), [0, 0, 1, 1], device=CPU, batch_size=4, condition=-low
    )
    assert images.shape == (4, 3, 32, 32) and not torch.allclose(images, other, atol=1e-3)
    low_file, shown = tmp_path / "wrong.npz", np.zeros((2, 16, 16, 3), np.uint8)
    for arrays, message in (
        ((np.zeros((2, 8, 8, 3), np.uint8),), "holds no (N, 16, 16, 3) uint8 images"),
        ((shown[:0],), "holds no (N, 16, 16, 3) uint8 images"),
        ((shown, np.array([0, 4])), "arr_1 is no list of 2 labels from 0 to 3"),
        ((shown, np.array([0])), "arr_1 is no list of 2 labels"),
        ((shown, np.array([0.0, 1.0])), "arr_1 is no list of 2 labels"),
    ):
        np.savez(low_file, *arrays)
        assert message in refused("sample", tmp_path / "up", "--low", low_file)
    np.savez(low_file, shown)
    assert "has 2 images" in refused("sample", tmp_path / "up", "--low", low_file, "--num-samples", "3")
    for content in (low_file.read_bytes()[:300], b"text", low_file.read_bytes().replace(b"NUMPY", b"NUMPX")):
        low_file.write_bytes(content)
        assert "not an .npz of samples, or damaged" in refused("sample", tmp_path / "up", "--low", low_file)
    up = tmp_path / "up"
    assert "is an upsampler" in refused("evaluate", up, "--likelihood", "--data", tmp_path / "small", "--steps", "2")
    assert "an upsampler draws from other images" in refused("ddpm_accelerate", "--ckpt", up, "--ckpt_sampling")


class Evil:
    """A pickle of it makes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (self.path,))  # pyright: ignore[reportReturnType]


def test_a_checkpoint_that_wants_to_run_code(hybrid_run: Path, tmp_path: Path) -> None:
    torch.save({"input_blocks.0.0.weight": Evil(tmp_path / "touched")}, tmp_path / "evil.pt")
    message = refused("convert", "guided-diffusion", tmp_path / "evil.pt", "--out", tmp_path / "out")
    assert "run code" in message or "safely" in message
    weights = ("--upscaler", tmp_path / "evil.pt")
    assert "to load it is to run code" in refused("sample", hybrid_run, "--upscale", *weights, "--out", tmp_path / "samples")
    assert not (tmp_path / "touched").exists() and not (tmp_path / "out").exists()
