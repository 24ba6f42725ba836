"""Opening what was trained, samples as files, and the folders that they go to."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from src.config import UserError, read_json
from src.runs.folders import run_name
from src.runs.opened import open_trained
from src.sampling import SamplerConfig, build_sampler
from src.sampling.files import Frames, short_hash, write_samples
from src.storage.blocks import Ranks
from tests.conftest import launch, one_line, refused, run_here, run_in_process

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------- opening


def test_a_run_a_checkpoint_a_final_folder_and_an_export_are_the_same(smoke_run: Path, tmp_path: Path) -> None:
    shutil.copytree(smoke_run / "final", tmp_path / "moved")
    export = next((smoke_run.parent / "models").glob("ckpt_epoch4_ddpm.pt"))
    results = []
    for path in (smoke_run, smoke_run / "checkpoints" / "step_00000030", tmp_path / "moved", export):
        opened = open_trained(path, CPU)
        assert opened.class_names == ("circle", "cross", "square", "triangle") and opened.step == 30
        sampler = build_sampler(opened, SamplerConfig(steps=3))
        results.append(sampler.draw(0, [0, 1], opened.labels("cross/0", 2), device=CPU))
    assert all(torch.equal(images, results[0]) for images in results)


def test_classes_by_name_and_number_in_equal_blocks(smoke_run: Path) -> None:
    opened = open_trained(smoke_run, CPU)
    assert opened.labels("square/0/triangle", 6) == [2, 2, 0, 0, 3, 3]
    with pytest.raises(UserError, match="'hexagon' is not known; the classes are: circle, cross"):
        opened.labels("hexagon", 4)
    with pytest.raises(UserError, match="'4' is not known"):
        opened.labels("4", 4)
    with pytest.raises(UserError, match="16 images cannot be dealt to 3 classes in equal blocks; ask for 15 or 18"):
        opened.labels("0/1/2", 16)


def spoil(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 255
    (folder / name).write_bytes(content)


def test_what_cannot_be_opened(smoke_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run or checkpoint"):
        open_trained(tmp_path / "none", CPU)
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_trained(tmp_path, CPU)
    shutil.copytree(smoke_run / "final", tmp_path / "final")
    spoil(tmp_path / "final", "ema.safetensors")
    with pytest.raises(UserError, match="ema.safetensors is damaged"):
        open_trained(tmp_path / "final", CPU)
    export = next((smoke_run.parent / "models").iterdir())
    (tmp_path / "cut.pt").write_bytes(export.read_bytes()[:2000])
    with pytest.raises(UserError, match="damaged or no export"):
        open_trained(tmp_path / "cut.pt", CPU)
    document = torch.load(export, weights_only=True)
    document["config"]["model"]["base_channels"] = 24
    torch.save(document, tmp_path / "other.pt")
    with pytest.raises(UserError, match="another architecture"):
        open_trained(tmp_path / "other.pt", CPU)


# ---------------------------------------------------------------------------------------------- files


def draw_files(run: Path, out: Path, *, count: int = 7, world: int = 1, frames: bool = False, seed: int = 0) -> list[Path]:
    opened = open_trained(run, CPU)
    sampler = build_sampler(opened, SamplerConfig(steps=3, guidance=2.0))
    paths: list[Path] = []
    for rank in reversed(range(world)):  # the first rank last: it waits for the others' files
        labels = [i * 3 // count for i in range(count)]
        paths = write_samples(
            opened, sampler, out, count=count, batch_size=3, labels=labels, seed=seed, frames=frames,
            device=CPU, ranks=Ranks(rank, world, lambda: out.mkdir(exist_ok=True)),
        )  # fmt: skip
    return paths


def test_a_killed_sampling_goes_on_and_gives_the_same_files(smoke_run: Path, tmp_path: Path) -> None:
    paths = draw_files(smoke_run, tmp_path / "out")
    whole = [path.read_bytes() for path in paths]
    stamp = paths[0].stat().st_mtime_ns
    for lost in (paths[1], paths[4], paths[5]):
        lost.unlink()
    draw_files(smoke_run, tmp_path / "out")
    assert [path.read_bytes() for path in paths] == whole
    assert paths[0].stat().st_mtime_ns == stamp, "what was there is not written again"
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["num_samples"] == 7 and metadata["seed"] == 0 and metadata["classes"][0] == "circle"
    assert metadata["guidance"] == 2.0 and metadata["config"]["name"] == "smoke_ddpm" and len(metadata["weights"]) == 64
    with pytest.raises(UserError, match="holds other images"):
        draw_files(smoke_run, tmp_path / "out", seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds other images"):
        draw_files(smoke_run, tmp_path / "other")


def test_frames_have_one_size_and_their_images_one_height() -> None:
    sampler: Any = SimpleNamespace(steps=50)
    way, black = Frames([0], sampler), np.zeros((1, 16, 16, 3), np.uint8)
    sheets = [way.sheet((step, black, black), "a_long_name_of_a_run-with_parts") for step in (0, 7, 10, 50)]
    assert len({sheet.size for sheet in sheets}) == 1
    pixels = np.asarray(sheets[0].convert("L"))
    assert (pixels[-68:-4, 4:68] == 0).all() and (pixels[-68:-4, 76:140] == 0).all(), "side by side"


def test_frames_and_gif(smoke_run: Path, tmp_path: Path) -> None:
    draw_files(smoke_run, tmp_path / "out", frames=True)
    frames = sorted((tmp_path / "out" / "frames").iterdir())
    assert [frame.name for frame in frames] == [f"frame_{i:03d}.png" for i in range(4)]
    with Image.open(tmp_path / "out" / "denoising.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 4
    with Image.open(frames[-1]) as last:
        left, right = np.split(np.asarray(last.convert("RGB"))[22:], 2, axis=1)  # below the titles
        assert np.array_equal(left, right), "at the end x_t is the estimate of x_0"
    with Image.open(frames[0]) as first:
        left, right = np.split(np.asarray(first.convert("RGB"))[22:], 2, axis=1)
        assert not np.array_equal(left, right)


def test_frames_keep_both_ends_of_a_long_way() -> None:
    sampler: Any = SimpleNamespace(steps=250)
    frames = Frames([0], sampler)
    assert len(frames.kept_steps) == 60 and {0, 249} <= frames.kept_steps


def test_one_process_and_two_write_the_same_files(smoke_run: Path, tmp_path: Path) -> None:
    arguments = ("sample.py", smoke_run, "--num-samples", "10", "--batch-size", "4", "--steps", "4", "--guidance", "2")
    one = run_in_process(*arguments, "--out", tmp_path / "one")
    two = launch(*arguments, "--out", tmp_path / "two", processes=2)
    assert one.status == two.status == 0, one.all + two.all
    assert "1 process(es)" in one.out and two.out.count("2 process(es)") == 1, "there were two, and one of them spoke"
    names = sorted(path.name for path in (tmp_path / "one").glob("0*.png"))
    assert len(names) == 10
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "two" / "grid.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "hexagon"], "the classes are: circle"),
        (["--eta", "0.5", "--solver", "heun"], "eta belongs to the solver ddim"),
        (["--shift-base", "0"], "shift.base: input should be greater than 0, not 0"),
        (["--shift-base", "many"], "argument --shift-base: invalid int value: 'many'"),
        (["--steps", "1000"], "more than the schedule's 100"),
        (["--num-samples", "0"], "at least 1"),
        (["--device", "toaster"], "--device toaster cannot be used"),
    ],
)
def test_mistakes_of_sample_py(smoke_run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in one_line(run_in_process("sample.py", smoke_run, "--out", tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- where they go


def test_folders_have_the_names_that_they_had_before_there_was_a_shift(smoke_run: Path, tmp_path: Path) -> None:
    words = ("--steps", "3", "--num-samples", "2", "--batch-size", "2", "--classes", "0/1")
    for shift in ((), ("--shift-base", "48")):
        assert run_in_process("sample.py", smoke_run, *words, *shift, cwd=tmp_path).status == 0
    folders = sorted((tmp_path / "samples").rglob("metadata.json"))
    plain, shifted = sorted(map(read_json, folders), key=lambda metadata: "shift" in metadata)
    assert shifted["shift"] == {"base": 48} and "shift" not in plain and plain.keys() == shifted.keys() - {"shift"}
    keys = ("solver", "steps", "alphas", "spacing", "eta", "guidance", "guidance_method", "guidance_interval")
    how = {key: plain[key] for key in (*keys, "threshold", "stop_at", "double_sampling")} | {"steps": "3"}
    tag = hashlib.sha256(json.dumps([plain["weights"], 2, 2, [0, 1], how, {}]).encode()).hexdigest()[:6]
    assert len(folders) == 2 and sum(folder.parent.name.endswith(f"seed0_{tag}") for folder in folders) == 1
    images = [(folder.parent / "00000.png").read_bytes() for folder in folders]
    assert images[0] != images[1]


def test_the_name_of_a_run_is_that_of_its_directory(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "a_b"
    for place in ("", "checkpoints/step_00000010", "final", "ema/width_0.05", "ema/step_00000020"):
        assert run_name(run / place) == "a_b"
    run.mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to(run)
    (run / "ckpt_epoch3_ddpm.pt").touch()
    assert (
        run_name(tmp_path / "runs" / "latest" / "final") == "a_b"
        and run_name(run / "ckpt_epoch3_ddpm.pt") == "ckpt_epoch3_ddpm"
    )
    monkeypatch.chdir(run)
    assert run_name(".") == run_name("final") == "a_b" and run_name("imported/model") == "model"


def test_two_runs_of_one_config_do_not_mix(smoke_run: Path, tmp_path: Path) -> None:
    for name in ("a_b", "c d"):
        shutil.copytree(smoke_run / "final", tmp_path / "runs" / name / "final")
    words = ("--steps", "1", "--num-samples", "2")
    for place in ("runs/a_b", "runs/c d/final"):
        assert run_in_process("sample.py", place, *words, cwd=tmp_path).status == 0
        few = ("--num-samples", "12", "--num-images", "12", "--steps", "1", "--features", "random")
        assert run_in_process("evaluate.py", place, *few, cwd=tmp_path).status == 0
    for folder in ("samples", "evaluations"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["a_b", "c d"]
    run_here("interpolate", "runs/a_b", "--steps", "1", "--num-seeds", "2", "--frames-between", "1", cwd=tmp_path)
    assert list((tmp_path / "samples" / "a_b").glob("interpolation_*"))


@pytest.mark.parametrize(("classes", "count"), [("0/1/2", 18), ("0", 16), ("0/1/2/3/0/1/2", 21), (None, 16)])
def test_the_default_count_is_dealt_to_any_number_of_classes(
    classes: str | None, count: int, smoke_run: Path, tmp_path: Path
) -> None:
    words = ("--classes", classes) if classes is not None else ()
    done = run_in_process("sample.py", smoke_run, "--steps", "1", *words, "--out", tmp_path / "out")
    assert done.status == 0 and done.out.startswith(f"{count} images of"), done.all
    assert len(list((tmp_path / "out").glob("0*.png"))) == count


def test_keys_by_default_are_dealt_too(smoke_run: Path, tmp_path: Path) -> None:
    words = ("--steps", "1", "--frames-between", "1", "--out", tmp_path / "out", "--classes", "0/1/2")
    done = run_in_process("interpolate.py", smoke_run, *words)
    assert done.status == 0 and "through 6 keys" in done.out, done.all
    assert "4 images cannot be dealt to 3 classes" in refused("interpolate", smoke_run, *words, "--num-seeds", "4")


def test_the_default_folder_depends_on_all_that_images_depend_on() -> None:
    assert short_hash("weights", 16, [1, 2]) == short_hash("weights", 16, [1, 2]) and len(short_hash()) == 6
    assert len({short_hash("weights", 16), short_hash("weights", 17), short_hash("weights", 16, None)}) == 3
