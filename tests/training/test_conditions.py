"""Training from conditions: what a step draws of them, what streams and caches give, and how they are resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import ddpm_accelerate
import train_iadb
import train_ldm
from src.config import UserError, load, validate
from src.data import ImageConfig, open_data
from src.data.conditions import GreyCondition, LowCondition, MaskCondition, PairedCondition, draw_masks, edges, luminance
from src.data.pairs import open_matched, open_pairs
from src.data.sources import ShapesSource
from src.diffusion import build_process
from src.diffusion.augmentation import CODES
from src.runs.densities import ImageDensity
from src.runtime.seeds import torch_seed
from src.runtime.stream import MicroBatch, plan_batch
from src.training.given import Given
from src.training.inputs import Coupling, blank_inputs, open_coupling
from src.training.step_noise import StepNoise, TimeSampler
from tests.conftest import ROOT, SMOKE, refused

CPU = torch.device("cpu")
PLAIN = ("preview.quality=null", "log.trackers=[]", "data.count=40")


def config_of(*changes: str) -> Any:
    return load(ROOT / SMOKE, ddpm_accelerate.Config, [*PLAIN, *changes])


def step_noise(cfg: Any, step: int = 3) -> StepNoise:
    times = TimeSampler(cfg.times, build_process(cfg.process))
    return StepNoise(cfg, times, plan_batch(16, 8, rank=0, world=1), (3, 16, 16), step, CPU)


def test_a_step_drops_conditions_independently_of_labels() -> None:
    dropping = config_of('condition={"kind":"grey"}', "condition_dropout=0.5", "label_dropout=0.5")
    labels, condition = torch.zeros(16, dtype=torch.long), torch.rand(16, 1, 16, 16) + 1
    micro_batch = MicroBatch(torch.zeros(16, 3, 16, 16), labels, 0, condition)
    pairs: list[tuple[bool, bool]] = []
    for step in range(20):
        whole = step_noise(dropping, step).condition(micro_batch, slice(0, 16), 4)
        flags = whole["condition"][:, 1, 0, 0]
        assert torch.equal(whole["condition"][:, :1], condition * flags[:, None, None, None]) and set(flags.tolist()) <= {0, 1}
        pairs += zip((flags == 1).tolist(), (whole["labels"] == 0).tolist(), strict=True)
        part = micro_batch._replace(labels=labels[8:], condition=condition[8:])
        half = step_noise(dropping, step).condition(part, slice(8, 16), 4)
        assert torch.equal(half["condition"], whole["condition"][8:])
    counts = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
    assert min(counts) > 50, "neither decides the other"


def test_without_a_condition_a_step_draws_what_it_drew_before() -> None:
    plain, conditioned = config_of(), config_of('condition={"kind":"grey"}', "condition_dropout=0.5")
    one, other = step_noise(plain), step_noise(conditioned)
    assert torch.equal(one.t, other.t) and torch.equal(one.dropped, other.dropped) and torch.equal(one.eps, other.eps)
    assert one.condition(MicroBatch(torch.zeros(8, 3, 16, 16), torch.zeros(8), 0), slice(0, 8), None) == {}


def test_noise_of_a_small_image_has_a_level_that_the_network_is_told() -> None:
    cfg = config_of('condition={"kind":"low","size":8,"noise":0.6}')
    low = torch.ones(16, 3, 8, 8)
    condition = step_noise(cfg).condition(MicroBatch(low, torch.zeros(16), 0, low), slice(0, 16), None)["condition"]
    levels = condition[:, 3, 0, 0]
    assert condition.shape == (16, 5, 8, 8) and torch.equal(condition[:, 4], torch.ones(16, 8, 8))
    assert 0 <= float(levels.min()) < 0.1 < 0.45 < float(levels.max()) <= 0.6
    noise = (condition[:, :3] - (1 - levels**2).sqrt()[:, None, None, None] * low) / levels[:, None, None, None]
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    part = MicroBatch(low[4:8], torch.zeros(4), 4, low[4:8])
    assert torch.equal(step_noise(cfg).condition(part, slice(4, 8), None)["condition"], condition[4:8])


@pytest.mark.parametrize("kind", ["paired", "low", "grey", "edges", "mask"])
def test_streams_and_examples_give_the_condition_of_each_image(kind: str) -> None:
    """The condition is that of the image as it was cut and flipped: made of it, or the other half of its file."""
    raw = {"paired": {"side": "left"}, "low": {"size": 8}}.get(kind, {})
    cfg = config_of("image.size=[16,8]" if kind == "paired" else "image.size=16")
    condition = validate(type_of(kind), {"kind": kind, **raw})
    source = ShapesSource(source="shapes", count=24, size=16)
    train, held_out = open_pairs(source, 0.3, condition)
    assert held_out is not None
    density = ImageDensity(train, held_out, replace(cfg.image, flip=True), 1, condition)
    whole = open_data(source, 0.3)[0]
    batches = Coupling(density).stream(cfg, plan_batch(8, 4, rank=0, world=1), 2, CPU)
    micro_batch, _ = next(batches)
    batches.close()
    assert micro_batch.condition is not None
    check(kind, micro_batch.images, micro_batch.condition, torch_seed(cfg.seed, "masks"), range(16, 20), whole)
    examples = density.examples()
    assert examples.condition is not None
    values = examples.condition(np.array([0, 2]))
    assert torch.equal(values[:, -1], torch.ones_like(values[:, -1]))
    check(kind, examples.load(np.array([0, 2])), values[:, :-1], 0, [0, 2], open_data(source, 0.3)[1])


def type_of(kind: str) -> Any:
    from src.data.conditions import CONDITIONS

    return next(cls for cls in CONDITIONS.classes if cls.__name__.lower().startswith(kind))


def check(kind: str, x0: torch.Tensor, condition: torch.Tensor, seed: int, numbers: Any, whole: Any) -> None:
    if kind == "low":
        assert torch.equal(condition, torch.nn.functional.avg_pool2d(x0, 2))
    elif kind == "grey":
        assert torch.equal(condition, luminance(x0))
    elif kind == "edges":
        assert torch.equal(condition, edges(x0))
    elif kind == "mask":
        mask = draw_masks(seed, numbers, (16, 16))
        assert torch.equal(condition, torch.cat([x0 * (1 - mask), mask], dim=1))
    else:  # both halves are of one file, and both are mirrored or none
        files = torch.from_numpy(whole.batch(np.arange(len(whole)), ImageConfig(size=16), np.full((len(whole), 3), 0.5)))
        files = files.permute(0, 3, 1, 2) / 127.5 - 1
        sides = [(files[..., :8], files[..., 8:]), (files[..., :8].flip(3), files[..., 8:].flip(3))]
        for image, partner in zip(x0, condition, strict=True):
            both = [(left - partner).abs().amax((1, 2, 3)) + (right - image).abs().amax((1, 2, 3)) for left, right in sides]
            assert float(torch.stack(both).min()) < 1e-5


def test_what_a_network_is_called_with_before_training() -> None:
    assert len(blank_inputs(config_of(), (3, 8, 8), CPU, torch.float32)) == 2
    both = config_of('condition={"kind":"grey"}', "augmentation={}")
    x, time, labels, condition, codes = blank_inputs(both, (3, 8, 8), CPU, torch.float64)
    assert labels is None and x is not None and time is not None and condition is not None and codes is not None
    assert condition.shape == (1, 2, 8, 8) and condition.dtype == codes.dtype == torch.float64 and codes.shape == (1, CODES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["condition_dropout=0.1"], "condition_dropout: there is no condition to leave out"),
        (['condition={"kind":"grey"}', "image.channels=1"], "condition.kind: grey images have no colours to add"),
        (['condition={"kind":"low","size":16}'], "condition.size: it must be less than the shorter side of the images, 16"),
        (['condition={"kind":"grey","as":"pixels"}'], "condition.as: a run on pixels has no latents; leave it out"),
        (['condition={"kind":"mask","copies":2}'], "condition.copies: a run on pixels draws a new mask each time"),
        (['condition={"kind":"grey"}', "preview.sheets=class"], "preview.sheets: images with a condition are shown on one"),
    ],
)
def test_mistakes_in_a_config(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(*changes)


def test_more_mistakes() -> None:
    with pytest.raises(UserError, match="preview.quality: it draws images from noise alone"):
        load(ROOT / SMOKE, ddpm_accelerate.Config, ['condition={"kind":"grey"}'])
    with pytest.raises(UserError, match="condition: 2-D points are drawn from no image"):
        load(ROOT / "configs/points2d_iadb.json", train_iadb.Config, ['condition={"kind":"grey"}'])
    with pytest.raises(UserError, match="condition: pairs of an earlier run have no condition"):
        load(ROOT / "configs/smoke/iadb.json", train_iadb.Config, ['condition={"kind":"grey"}', "pairs=runs/x"])
    paired = 'condition={"kind":"paired","column":"edges"}'
    assert "is for the source datasets, and the data's source is shapes" in refused(
        "ddpm_accelerate", "-cfg", SMOKE, *(word for change in (*PLAIN, paired) for word in ("--set", change))
    )


def test_names_of_channels_in_configs() -> None:
    pixels = config_of('condition={"kind":"low","size":8,"noise":0.5}')
    assert pixels.condition == LowCondition(kind="low", size=8, noise=0.5)
    assert len(pixels.condition_names((3, 16, 16))) == 5 and config_of().condition_names((3, 16, 16)) == []
    latent = load(ROOT / "configs/smoke/ldm.json", train_ldm.Config, ["preview.sheets=one", 'condition={"kind":"mask"}'])
    assert latent.condition == MaskCondition(kind="mask") and len(latent.condition_names((4, 8, 8))) == 6
    assert GreyCondition(kind="grey").contract == {"kind": "grey"}
    assert PairedCondition(kind="paired", path="A").contract == {"kind": "paired"}
    assert pixels.condition.contract == {"kind": "low", "size": 8}
    assert (pixels.sample_options, config_of().sample_options) == (" --condition FOLDER", "")


def test_sources_and_data_of_the_same_names_are_paired(tmp_path: Path) -> None:
    """Image i starts from image i of the source, cut and mirrored alike; held out, too. One has no partner."""
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        for folder, values in (("before", 255 - pixels), ("after", pixels)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "before" / "7.png").unlink()
    places = [
        f'{key}={{"source":"folder","path":"{tmp_path / key2}"}}' for key, key2 in (("source", "before"), ("data", "after"))
    ]
    cfg: Any = load(ROOT / "configs/smoke/iadb.json", train_iadb.Config, [*places, "coupling=paired", "held_out=0.3"])
    coupling = open_coupling(cfg.data, cfg.source, cfg.held_out, cfg.image, paired=True)
    assert coupling.source is not None and coupling.num_images + len(coupling.data.held_out or ()) == 23
    batches = coupling.stream(cfg, plan_batch(8, 4, rank=0, world=1), 0, CPU)
    for _ in range(3):
        micro_batch, source = next(batches)
        assert source is not None and torch.allclose(source, -micro_batch.images, atol=1e-6)
    batches.close()
    start, held_out = coupling.sampler_options(cfg, CPU)["source"], coupling.held_out_examples()
    assert held_out is not None
    assert torch.allclose(start(0, [0, 2]), -held_out.load(np.array([0, 2])), atol=1e-6)
    assert not torch.equal(start(0, [0], 1), start(0, [0]))
    for changes, message in (
        (["coupling=paired"], "coupling: only images of a source have partners"),
        ([*places, "coupling=paired", "pairs=runs/x"], "coupling: pairs of an earlier run are coupled already"),
        (
            [*places, "coupling=paired", 'condition={"kind":"paired","path":"A"}'],
            "coupling: data has the partners of its source",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load(ROOT / "configs/smoke/iadb.json", train_iadb.Config, changes)
    with pytest.raises(UserError, match="one source; give one instead of a list"):
        open_matched(cfg.data, 0.0, [cfg.source])


def test_a_network_from_python_must_take_the_condition() -> None:
    class WithoutCondition(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    cfg, accelerator = config_of('condition={"kind":"grey"}'), Accelerator(cpu=True)
    with pytest.raises(UserError, match=r"fails at network\(.* condition \(2, 2, 16, 16\)\): TypeError.*: condition null"):
        Given(network=WithoutCondition()).build(cfg, accelerator, (3, 16, 16), None)
    paired = PairedCondition(kind="paired", path="A")
    with pytest.raises(UserError, match="'paired' is for data that the config names"):
        Given(dataset=[]).open_data(None, 0.0, cfg.image, paired)
    with pytest.raises(UserError, match="coupling 'paired' is for data that the config names"):
        open_coupling(None, None, 0.0, cfg.image, [], paired=True)
