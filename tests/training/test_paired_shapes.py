"""Pairs of several shapes: partners share a bucket, even where their own ratio would put them into the next one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import train_iadb
from src.config import UserError, load
from src.models import VAE, VAEConfig
from src.runs.autoencoder import Autoencoder
from src.runs.densities import SourceSampler
from src.runtime.stream import plan_batch
from src.training.inputs import Coupling, open_coupling
from tests.conftest import ROOT, randomise, run_here

CPU = torch.device("cpu")
SIDES = ((40, 40), (129, 100), (60, 36), (36, 60))  # width and height; the second is a square by a hair
PARTNERS = ((40, 40), (131, 101), (60, 36), (36, 60))  # and its partner is not
ASPECT = 'image={"size":16,"aspect":{"step":4,"min_images":2}}'


def colour_of(i: int) -> int:
    """Below 118; that of a partner is above 137."""
    return 3 * i


def words(folder: Path, *changes: str) -> list[str]:
    places = [
        f'{key}={{"source":"folder","path":"{folder / name}"}}' for key, name in (("source", "before"), ("data", "after"))
    ]
    return [*places, ASPECT, "coupling=paired", "held_out=0.3", "class_conditional=false", "label_dropout=0", *changes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of one grey each, and partners of the opposite one."""
    folder = tmp_path_factory.mktemp("pairs")
    for i in range(40):
        for name, sides, grey in (("after", SIDES, colour_of(i)), ("before", PARTNERS, 255 - colour_of(i))):
            (folder / name).mkdir(exist_ok=True)
            Image.new("RGB", sides[i % 4], (grey, grey, grey)).save(folder / name / f"{i}.png")
    return folder


def coupling_of(folder: Path, *changes: str) -> tuple[Any, Coupling]:
    cfg: Any = load(ROOT / "configs/smoke/iadb.json", train_iadb.Config, words(folder, *changes))
    return cfg, open_coupling(cfg.data, cfg.source, cfg.held_out, cfg.image, factor=4, paired=True)


def test_partners_are_streamed_together(folder: Path) -> None:
    cfg, coupling = coupling_of(folder)
    assert coupling.source is not None and len(coupling.shapes) == 3
    assert (coupling.source.buckets.which == coupling.data.buckets.which).all()
    batches, shapes = coupling.stream(cfg, plan_batch(4, 2, rank=0, world=1), 0, CPU), set()
    for step in range(12):
        for _ in range(2):
            micro_batch, source = next(batches)
            assert source is not None and torch.allclose(source, -micro_batch.images, atol=1e-6)
            assert micro_batch.images.shape[1:] == coupling.shape_at(step)
        shapes.add(coupling.shape_at(step))
    batches.close()
    assert len(shapes) == 3


def test_what_is_held_out_starts_from_its_partner_at_every_shape(folder: Path) -> None:
    cfg, coupling = coupling_of(folder)
    start, held_out = coupling.sampler_options(cfg, CPU)["source"], coupling.held_out_examples()
    assert isinstance(start, SourceSampler) and not start.shuffled and held_out is not None
    for shape, members in held_out.groups.items():
        if len(members):
            first = start.at_shape(shape)(0, range(len(members)))
            assert torch.allclose(first, -held_out.load(members), atol=1e-6)
            moved = start.at_shape(shape)(0, [0], 1)
            assert torch.equal(moved[0], first[1 % len(members)])


def test_partners_are_encoded_in_one_bucket(folder: Path, tmp_path: Path) -> None:
    cfg, coupling = coupling_of(folder, "autoencoder=somewhere", f"latents={tmp_path / 'latents'}")
    network = randomise(VAE(VAEConfig(widths=(8, 16), blocks=1), 3)).eval().requires_grad_(False)
    facts: dict[str, Any] = {"path": "somewhere", "document": {}, "digest": "d"}
    autoencoder = Autoencoder(network=network, channels=3, latent_channels=4, factor=2, **facts)
    encoded: Any = coupling.encoded(cfg, autoencoder, Accelerator(cpu=True), tmp_path)
    data: Any = coupling.data
    for bucket, spec in enumerate(data.buckets.specs):
        members = data.buckets.members(bucket)
        moments = encoded.source.latents.train.moments(members, np.zeros(len(members), dtype=bool))
        names = [int(Path(data.train.names[i]).stem) for i in members]
        greys = torch.tensor([(255 - colour_of(i)) / 127.5 - 1 for i in names])
        mean, _ = network.moments(greys[:, None, None, None].expand(-1, *spec.shape))
        torch.testing.assert_close(moments[:, 0], mean, rtol=1e-3, atol=1e-4)
    assert encoded.paired and encoded.source.latents.facts["paired_with"] == data.train.fingerprint


def test_a_source_without_one_of_the_shapes_is_refused(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "square.png")
    cfg, _ = coupling_of(folder)
    spec = type(cfg.source)(source="folder", path=str(tmp_path))
    with pytest.raises(UserError, match="the source has no image of about the shape 20x12 px, which the data has"):
        open_coupling(cfg.data, spec, 0.0, cfg.image, factor=4)


def test_previews_show_the_truth_beside_what_is_drawn(folder: Path, tmp_path: Path) -> None:
    changes = words(folder, "steps=2", 'preview={"every":2,"num_samples":6,"calls":[1]}', "log.trackers=[]")
    arguments = [word for change in changes for word in ("--set", change)]
    run_here("train_iadb", "-cfg", ROOT / "configs/smoke/iadb.json", *arguments, "--run-dir", tmp_path / "run")
    with Image.open(tmp_path / "run" / "samples" / "step_00000002.png") as sheet:
        greys, counts = np.unique(np.asarray(sheet.convert("L")), return_counts=True)
    areas = {int(grey) for grey, count in zip(greys, counts, strict=True) if count >= 12 * 20}  # whole images of one grey
    truths = {colour_of(i) for i in range(40)} & areas
    assert len(truths) >= 3 and {255 - grey for grey in truths} <= areas
