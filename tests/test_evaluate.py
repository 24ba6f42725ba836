"""evaluate.py: runs, reconstructions and folders of images, on one process and on two, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.data import HeldOutShare, open_data, open_sources
from src.data.sources import ShapesSource
from src.runtime.checkpoint import spared_steps
from src.training.session import Session
from tests.conftest import SMOKE, launch, metrics, one_line, refused, run_here, run_in_process
from tests.kills import settings

SHAPES = '{"source": "shapes", "count": 64, "size": 16}'
RANDOM = ("--features", "random", "--batch-size", "8")


def figures(out: Path) -> dict:
    return json.loads((out / "evaluation.json").read_text())


def evaluate(*words: str | Path) -> None:
    run_here("evaluate", *words, *RANDOM)


def copied(run: Path, folder: Path) -> Path:
    """One that may be written to."""
    shutil.copytree(run, folder / "copied")
    return folder / "copied"


@pytest.fixture(scope="module")
def run(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(smoke_run, tmp_path_factory.mktemp("evaluated"))


def test_one_process_and_two_find_the_same_and_a_kill_costs_a_block(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (run, "--num-samples", "48", "--steps", "3")
    evaluate(*words, "--out", tmp_path / "one")
    printed = capsys.readouterr().out
    assert "Fréchet distance" in printed and "read as their class" in printed and "nearest.png" in printed
    document = figures(tmp_path / "one")
    assert set(document["random"]) == {
        "frechet", "frechet_held_out", "kernel", "kernel_std", "precision", "recall", "density", "coverage", "nearer",
        "copied", "accuracy", "accuracy_held_out", "compares_with", "notes",
    }  # fmt: skip
    assert document["num_samples"] == 48 and document["real_pictures"] == 114 and document["network_calls"] == 3
    by_class = document["accuracy_by_class_random"]["samples"]
    assert set(by_class) == {"circle", "cross", "square", "triangle"}
    assert document["random"]["compares_with"].startswith("nothing") and document["of"] == "training pictures"
    assert document["copied_if_new"] == 1 / 15 and "`copied` 6.7% where samples are as far" in printed
    assert any("the held-out pictures are 14" in note for note in document["random"]["notes"])
    last = metrics(run)[-1]
    assert last["evaluation_class_circle_read_by_random"] == by_class["circle"]
    assert last["evaluation_frechet_held_out_random_of_14"] == document["random"]["frechet_held_out"]
    assert (
        last["step"] == 30
        and last["evaluation_frechet_random_of_48"] == document["random"]["frechet"]
        and last["evaluation_network_calls"] == 3
    )
    with Image.open(tmp_path / "one" / "nearest.png") as sheet:
        assert sheet.width == 4 + 8 * (64 + 4)

    done = launch("evaluate.py", *words, *RANDOM, "--out", tmp_path / "two", "--json", processes=2)
    assert done.status == 0, done.all
    blocks = {folder: sorted((tmp_path / folder).glob("block_*")) for folder in ("one", "two")}
    features = [np.concatenate([np.load(path)["random"] for path in paths]) for paths in blocks.values()]
    assert len(blocks["two"]) >= 2 and (features[0] == features[1]).all()
    assert figures(tmp_path / "two") == document
    assert json.loads(done.out.strip().splitlines()[-1])["random"] == document["random"]

    present, missing = blocks["two"][0], blocks["two"][1]
    stamp = present.stat().st_mtime_ns
    missing.unlink()
    evaluate(*words, "--out", tmp_path / "two")
    assert figures(tmp_path / "two") == document and missing.exists() and present.stat().st_mtime_ns == stamp
    assert "holds other figures" in refused("evaluate", *words, *RANDOM, "--seed", "1", "--out", tmp_path / "two")


def test_real_images_against_themselves_are_at_no_distance(tmp_path: Path) -> None:
    """Training images as samples: distance 0, all covered. Their features are computed once and kept."""
    source = open_sources(ShapesSource(source="shapes", count=64, size=16))
    (tmp_path / "copies").mkdir()
    for i in range(64):
        Image.fromarray(np.asarray(source.parts[0].load(i, channels=3))).save(tmp_path / "copies" / f"{i:05d}.png")
    evaluate(tmp_path / "copies", "--data", SHAPES, "--out", tmp_path / "same")
    values = figures(tmp_path / "same")["random"]
    assert values["frechet"] == pytest.approx(0, abs=1e-6) and -0.02 < values["kernel"] <= 0, "unbiased: at most 0 there"
    assert values["precision"] == values["recall"] == values["coverage"] == 1

    # Twice as large, and cut to their size again where that is asked for.
    larger = '{"source": "shapes", "count": 64, "size": 32}'
    message = refused("evaluate", tmp_path / "copies", "--data", larger, *RANDOM, "--out", tmp_path / "x")
    assert "the samples are 16x16 px and the real image shapes/train/000000 32x32" in message and "--resize" in message
    evaluate(tmp_path / "copies", "--data", larger, "--resize", "--out", tmp_path / "resized")
    assert 0 < figures(tmp_path / "resized")["random"]["frechet"] < 1

    Image.new("RGB", (20, 20)).save(tmp_path / "copies" / "00099.png")
    assert "is 16x16 px and" in refused("evaluate", tmp_path / "copies", "--data", SHAPES, *RANDOM)
    (tmp_path / "copies" / "00099.png").write_bytes((tmp_path / "copies" / "00000.png").read_bytes()[:90])
    words = (tmp_path / "copies", "--data", SHAPES, *RANDOM, "--out", tmp_path / "cut")
    assert "00099.png: not an image that can be read" in refused("evaluate", *words)
    (tmp_path / "copies" / "00099.png").unlink()
    run_here("evaluate", *words)
    for path in list((tmp_path / "copies").iterdir())[5:]:
        path.unlink()
    assert "5 images in" in refused("evaluate", tmp_path / "copies", "--data", SHAPES, *RANDOM)
    (tmp_path / "empty").mkdir()
    assert "no image, and no folder with images" in refused("evaluate", tmp_path / "empty", "--data", SHAPES, *RANDOM)
    assert "holds no images" in refused("evaluate", tmp_path / "copies", "--data", tmp_path / "empty", *RANDOM)
    for kind, mode, size in (("oblong", "RGB", (20, 16)), ("grey", "L", (16, 16))):
        shutil.rmtree(tmp_path / "copies")
        (tmp_path / "copies").mkdir()
        for i in range(10):
            Image.new(mode if i else "RGB", size).save(tmp_path / "copies" / f"{i}.png")
        message = "the samples are 20x16 px and the real" if kind == "oblong" else "or the other way: samples are of one kind"
        assert message in refused("evaluate", tmp_path / "copies", "--data", SHAPES, *RANDOM)


def test_reconstructions(vae_run: Path, tmp_path: Path) -> None:
    vae_run = copied(vae_run, tmp_path)
    evaluate(vae_run, "--out", tmp_path / "held_out")
    document = figures(tmp_path / "held_out")
    measured = metrics(vae_run)[-1]
    assert metrics(vae_run)[-1]["evaluation_psnr"] == document["psnr"], "a line of its own"
    before = next(line for line in reversed(metrics(vae_run)) if "held_out_psnr" in line)
    assert document["psnr"] == pytest.approx(before["held_out_psnr"], abs=0.05), "8 bits a channel here, none there"
    assert document["lpips"] == pytest.approx(before["held_out_lpips"], abs=0.02)
    assert {"frechet", "kernel", "compares_with", "notes"} == set(document["random"]) and measured["step"] == before["step"]
    assert (tmp_path / "held_out" / "reconstructions.png").exists()
    assert document["of"] == "held-out pictures"
    evaluate(vae_run, "--part", "train", "--num-images", "20", "--out", tmp_path / "train")
    train = figures(tmp_path / "train")
    assert train["real_pictures"] == 20 and train["of"] == "training pictures"
    assert metrics(vae_run)[-1]["evaluation_psnr_on_train"] == train["psnr"]
    assert "draws none" in refused("evaluate", vae_run, "--sweep", "steps=1,2", *RANDOM)
    assert "3 real images are too few" in refused("evaluate", vae_run, "--num-images", "3", *RANDOM)
    for name in ("checkpoints", "final"):
        shutil.rmtree(vae_run / name)
    assert "has not finished" in refused("evaluate", vae_run, *RANDOM)


def test_a_sweep(ldm_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run on latents: the same noise in every row, so that a setting that changes nothing changes no number."""
    ldm_run = copied(ldm_run, tmp_path)
    words = (ldm_run, "--num-samples", "16", "--sweep", "steps=2,3", "eta=0,0.5", "--part", "train")
    evaluate(*words, "--out", tmp_path / "out")
    rows = figures(tmp_path / "out")["rows"]
    assert [(row["steps"], row["eta"], row["network_calls"]) for row in rows] == [
        (2, 0, 2),
        (2, 0.5, 2),
        (3, 0, 3),
        (3, 0.5, 3),
    ]
    assert len({row["random"]["frechet"] for row in rows}) == 4
    printed = capsys.readouterr().out
    assert "best: steps" in printed and (tmp_path / "out" / "sweep.png").exists()
    line, name = metrics(ldm_run)[-1], "evaluation_sweep_steps=3,eta=0.5_frechet_random_of_16_on_train"
    assert line[name] == rows[3]["random"]["frechet"]
    assert "sweep steps" not in (ldm_run / "report.html").read_text(), "a table, and no chart of one point"
    evaluate(ldm_run, "--num-samples", "16", "--steps", "3", "--sweep", "shift.base=4,4096", "--out", tmp_path / "shifted")
    shifted, printed = figures(tmp_path / "shifted")["rows"], capsys.readouterr().out
    assert [row["shift.base"] for row in shifted] == [4, 4096] and "best: shift.base" in printed
    assert len({row["random"]["frechet"] for row in (*shifted, rows[2])}) == 3
    evaluate(ldm_run, "--num-samples", "16", "--steps", "2", "--out", tmp_path / "alone")
    assert figures(tmp_path / "alone")["random"]["frechet"] == rows[0]["random"]["frechet"]
    assert "evaluation_frechet_random_of_16" in metrics(ldm_run)[-1]
    assert (
        "evaluation_frechet" in (ldm_run / "report.html").read_text()
        or "frechet random of 16" in (ldm_run / "report.html").read_text()
    )


def test_mistakes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    done = run_in_process("evaluate.py", run)
    assert "get them from https" in one_line(done) and "--features efficientnet_lite0 works without" in done.err
    out = ("--out", tmp_path / "x")
    message = refused("evaluate", run, "--features", "incepton")
    assert "'incepton' is not known" in message and "did you mean 'inception'?" in message
    assert "--resize is for a folder" in refused("evaluate", run, *RANDOM, "--resize")
    assert "--steps is about drawing samples" in refused("evaluate", tmp_path, *RANDOM, "--steps", "3")
    assert "belongs to --features inception" in refused("evaluate", run, *RANDOM, "--inception-weights", "x")
    assert "--weights is the file of one network" in refused("evaluate", run, *RANDOM, "--weights", "x")
    assert "holds the checkpoints of" in refused("evaluate", run / "checkpoints", *RANDOM)
    assert "4 samples (--num-samples) are too few" in refused("evaluate", run, "--num-samples", "4", *RANDOM, *out)
    assert "3 real images are too few" in refused("evaluate", run, "--num-images", "3", *RANDOM, *out)
    swept = ("--sweep", "steps=2", "--num-images", "3")
    assert "3 real images are too few" in refused("evaluate", run, *swept, *RANDOM, *out)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "pets" / name / f"{i}.png")
    pets = json.dumps([{"source": "folder", "path": str(tmp_path / "pets"), "scan": {"min_file_bytes": 0}}])
    assert "other classes (cat, dog) than" in refused("evaluate", run, "--data", pets, *RANDOM, *out)
    assert "stepz: unknown key" in refused("evaluate", run, "--sweep", "stepz=3", *RANDOM, *out)
    assert "leave one out" in refused("evaluate", run, "--part", "train", "--data", tmp_path, *RANDOM)
    assert "give --data FOLDER" in refused("evaluate", tmp_path, *RANDOM)
    assert "--sweep is about samples" in refused("evaluate", run, "--likelihood", "--sweep", "steps=1")
    assert "--likelihood draws none" in refused("evaluate", run, "--likelihood", "--guidance", "2")
    shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("step_*", "final"))
    assert "holds no checkpoint" in refused("evaluate", tmp_path / "bare", *RANDOM)
    nowhere = refused("evaluate", tmp_path / "nowhere", "--inception-weights", tmp_path / "none")
    assert "there is no such run" in nowhere, "before what else is missing"
    assert not (tmp_path / "x").exists()


def test_samples_are_measured_while_a_run_trains(smoke_run: Path, tmp_path: Path) -> None:
    """configs/smoke/ddpm.json asks for it, and the best is remembered by it (on two processes the distances are equal:
    tests/test_scripts.py)."""
    distances = [line["frechet_distance"] for line in metrics(smoke_run) if "frechet_distance" in line]
    assert len(distances) == 2
    progress = json.loads((smoke_run / "checkpoints" / "step_00000030" / "progress.json").read_text())
    best = progress["best"]
    assert best["frechet_distance"] == min(distances) and best["measured"] == "16 samples in random"
    assert best["kept"] and spared_steps(progress) == {best["step"]}, "without checkpoint.keep_best"
    assert (smoke_run / "checkpoints" / f"step_{best['step']:08d}").exists()
    assert "frechet_distance: 16 samples for 16 features" in (smoke_run / "log.txt").read_text()
    levels = [value for name, value in metrics(smoke_run)[-1].items() if name.startswith("held_out_loss_")]
    assert 1 < len(levels) <= 10 and min(levels) <= metrics(smoke_run)[-1]["held_out_loss"] <= max(levels)
    evaluate(smoke_run / "checkpoints" / "step_00000030", "--num-samples", "16", "--steps", "5", "--out", tmp_path / "x")
    assert figures(tmp_path / "x")["random"]["frechet"] == pytest.approx(distances[-1], rel=1e-4), "as evaluate.py has it"


def test_a_run_that_held_nothing_out_and_never_learned_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, sets = tmp_path / "run", settings(steps=2, held_out=0, label_dropout=0, preview__every=None, checkpoint__every=None)
    run_here("ddpm_accelerate", "-cfg", SMOKE, "--run-dir", run, *sets)
    capsys.readouterr()
    evaluate(run, "--num-samples", "10", "--steps", "2", "--out", tmp_path / "out")
    assert "no images were held out, so no number says how near new images would be" in capsys.readouterr().out
    document = figures(tmp_path / "out")
    assert document["of"] == "training pictures" and not {"nearer", "copied", "frechet_held_out"} & set(document["random"])
    (tmp_path / "flat").mkdir()
    for i in range(10):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    flat = json.dumps([{"source": "folder", "path": str(tmp_path / "flat"), "scan": {"min_file_bytes": 0}}])
    assert "never learned to go without a class" in refused("evaluate", run, "--data", flat, *RANDOM, "--num-samples", "10")


@pytest.mark.parametrize("share", [0.1, {"fraction": 0.3, "together": "[0-9]+"}])
def test_a_blend_that_starts_from_few_images(tmp_path: Path, share: Any, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"source": "shapes", "count": 20, "size": 16}
    images = open_sources(ShapesSource(**few))
    _, held_out = open_data(images, share if isinstance(share, float) else HeldOutShare(**share))
    assert held_out is not None
    sets = settings(source=few, held_out=share, class_conditional=False, steps=2, preview__every=None, checkpoint__every=None)
    run_here("train_iadb", "-cfg", "configs/smoke/iadb.json", "--run-dir", tmp_path / "run", *sets)
    capsys.readouterr()
    evaluate(tmp_path / "run", "--num-samples", "40", "--steps", "2", "--out", tmp_path / "out")
    expected = f"samples start from {len(held_out)} images: a solver without noise draws no more"
    assert expected in capsys.readouterr().out


def test_distances_measured_otherwise_do_not_compare() -> None:
    config = SimpleNamespace(checkpoint=SimpleNamespace(keep_best=False), preview=SimpleNamespace(quality=None))
    session: Any = SimpleNamespace(best=None, step=10, cfg=config)

    def better(*words: Any) -> bool:
        return Session.note_if_best(session, *words)

    assert better("frechet_distance", 8.0, "100 samples in a") and not better("frechet_distance", 9.0, "100 samples in a")
    assert better("frechet_distance", 300.0, "100 samples in b") and session.best["measured"] == "100 samples in b"
    assert not session.best["kept"] and spared_steps({"best": session.best}) == set()
    config.preview.quality = "asked for"
    assert better("frechet_distance", 200.0, "100 samples in b") and spared_steps({"best": session.best}) == {10}


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (("preview.quality.features=inception",), "get them from https"),
        (("preview.quality.features=inceptio",), "preview.quality.features 'inceptio' is not known"),
        (("data.count=10",), "8 training images are too few to measure anything"),
    ],
)
def test_what_a_run_that_is_to_be_measured_refuses(
    sets: tuple[str, ...], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    words = [word for one in sets for word in ("--set", one)]
    message = refused("ddpm_accelerate", "-cfg", SMOKE, "--run-dir", tmp_path / "run", *words)
    assert reason in message and "--features" not in message and not (tmp_path / "run").exists()
    assert "inception" not in sets[0][-9:] or "name the file with preview.quality.weights" in message


def test_figures_are_kept_where_their_sheets_cannot_be_drawn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_font(*_: Any, **__: Any) -> Any:
        raise ValueError("no font")

    for name in ("grid", "curves", "save"):
        monkeypatch.setattr("src.figures." + name, no_font)
    monkeypatch.setattr("src.report.report.make_report", no_font)
    words = (run, "--num-samples", "12", "--num-images", "12", "--steps", "2", *RANDOM)
    done = run_in_process("evaluate.py", *words, "--out", tmp_path / "quality", "--json")
    assert done.status == 0 and json.loads(done.out)["num_samples"] == 12, done.all
    assert "warning: nearest.png failed (ValueError: no font)" in done.err and "warning: report.html failed" in done.err
    assert figures(tmp_path / "quality")["num_samples"] == 12 and metrics(run)[-1]["evaluation_network_calls"] == 2
    done = run_in_process("evaluate.py", *words, "--out", tmp_path / "swept", "--sweep", "steps=1,2")
    assert done.status == 0 and "best: " in done.out and "sweep.png" not in done.out and "sweep.png failed" in done.err
    bits = (run, "--likelihood", "--num-images", "4", "--steps", "2", "--out", tmp_path / "bits")
    done = run_in_process("evaluate.py", *bits)
    assert done.status == 0 and "bits per dimension" in done.out and "likelihood.png failed" in done.err, done.all
