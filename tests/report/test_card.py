"""The card of a run on the hub, and which files go there: all that opens it again, and none of its data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from src.config import UserError, dump, load
from src.report.card import draws_from_noise, find_previews, make_card
from src.runs.opened import open_run
from src.runs.sharing import share_run
from src.runtime.checkpoint import verify_checkpoint, write_folder
from tests.conftest import ROOT
from tests.test_house import CONFIGS, script_of

OLD = ROOT / "tests" / "old_runs"
CPU = torch.device("cpu")


def written(files: dict[str, Path | bytes], folder: Path) -> Path:
    """The files as the hub would give them."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(OLD / "ddpm_accelerate" / "run", tmp_path / "run")
    samples = tmp_path / "run" / "samples"
    (samples / "step_00000003").mkdir(parents=True)
    for name in ("step_00000002.png", "step_00000003/sample_circle_4x4.png", "step_00000009.png"):
        (samples / name).write_bytes(b"png")
    (tmp_path / "run" / "contact_sheet.png").write_bytes(b"images of the data")
    return tmp_path / "run"


def test_what_is_shared_opens_again(run: Path, tmp_path: Path) -> None:
    shared = share_run(run)
    assert shared.step == 4 and shared.directory == run
    folder = written(shared.files, tmp_path / "shared")
    assert verify_checkpoint(folder) is None and {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    one, other = open_run(folder, CPU), open_run(run, CPU)
    assert (one.digest, one.step, one.class_names) == (other.digest, other.step, other.class_names)
    assert share_run(folder).files.keys() == shared.files.keys()
    document = json.loads((run / "checkpoints" / "step_00000004" / "data.json").read_text())
    write_folder(tmp_path / "python", {"ema": {}}, {"config": {}, "data": {**document, "network": "python"}, "progress": {}})
    with pytest.raises(UserError, match="was handed in from Python, which no config builds"):
        share_run(tmp_path / "python")


def test_a_latent_run_is_shared_with_its_autoencoder(ldm_run: Path, tmp_path: Path) -> None:
    for name, place in (("final", ldm_run), ("checkpoint", max((ldm_run / "checkpoints").glob("step_*")))):
        shared = share_run(place)
        assert {"autoencoder.safetensors", "autoencoder_config.json"} <= shared.files.keys()
        opened = open_run(written(shared.files, tmp_path / name), CPU)
        assert getattr(opened, "codec", None) is not None and opened.digest == open_run(place, CPU).digest
    card = make_card(shared, "me/cats", *find_previews(shared))
    assert "Diffusion on latents" in card and "- latent-diffusion" in card and "`autoencoder.safetensors`" in card


def test_the_newest_previews_of_runs_from_noise_are_shown(run: Path) -> None:
    shared = share_run(run)
    step, sheets = find_previews(shared)
    assert step == 3 and sheets == {"circle": run / "samples" / "step_00000003" / "sample_circle_4x4.png"}
    card = make_card(shared, "me/cats@v2", step, sheets)
    assert "![Samples of circle at step 3](previews/step_00000003/sample_circle_4x4.png)" in card
    for line in (
        "# license: give the one",
        "27 images; 5 more were held out",
        "Classes: circle, cross, square, triangle.",
        "| held out loss | 3 | 0.09392 |",
        "python sample.py me/cats@v2 --num-samples 16 --classes 0",
        'model = atelier.from_pretrained("me/cats@v2")',
        "python convert.py to-diffusers me/cats@v2 --out FOLDER",
        "**To be filled in**",
    ):
        assert line in card, line
    assert card.startswith("---\nlibrary_name: atelier\n") and str(run) not in card


@pytest.mark.parametrize(
    "changes",
    [
        {"condition": {"kind": "grey"}},
        {"low_resolution": 8},
        {"source": {"source": "folder", "path": "datasets/mine"}},
        {"pairs": "runs/other"},
        {"coupling": "paired"},
        {"image": None},
    ],
)
def test_previews_that_show_images_of_the_data_stay_here(run: Path, changes: dict[str, Any]) -> None:
    shared = share_run(run)
    assert draws_from_noise(shared.config)
    assert draws_from_noise(shared.config | {"source": {"source": "gaussian"}, "coupling": "random", "pairs": None})
    shared = shared._replace(config=shared.config | changes)
    assert not draws_from_noise(shared.config) and find_previews(shared) == (0, {})
    assert "from_pretrained" not in make_card(shared, "me/cats", 0, {})


def test_cards_of_what_draws_nothing() -> None:
    autoencoder = share_run(max((OLD / "train_vae" / "run" / "checkpoints").glob("step_*")))
    assert find_previews(autoencoder) == (0, {}), "reconstructions stand beside images of the data"
    card = make_card(autoencoder, "me/vae", 0, {})
    assert "autoencoder=me/vae" in card and "sample.py" not in card and "from_pretrained" not in card
    classifier = share_run(max((OLD / "train_classifier" / "run" / "checkpoints").glob("step_*")))
    card = make_card(classifier, "me/clf", 0, {})
    assert "--classifier me/clf" in card and "- image-classification" in card


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_has_a_card(run: Path, path: Path) -> None:
    shared = share_run(run)._replace(config=dump(load(path, script_of(path).Config)))
    shared.facts["class_names"] = ["<b>", "a|b"]
    card = make_card(shared, "me/cats", 0, {})
    assert shared.config["name"] in card and "<b>" not in card and "None" not in card
