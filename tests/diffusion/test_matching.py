"""Noise that is matched to images, and targets of other classes that outputs are pushed away from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_accelerate import Config
from src.config import UserError, load, validate
from src.diffusion import ProcessConfig, build_process
from src.diffusion.contrast import ContrastConfig, contrast, find_partners
from src.diffusion.matching import match_noise
from src.doctor.own_script import shrink
from src.runs.densities import open_density
from src.runtime.launch import MachineConfig
from src.runtime.stream import BatchPlan, MicroBatch, plan_batch
from src.training.inputs import Coupling
from src.training.step_noise import StepNoise, TimeSampler, check_contrast
from tests.conftest import ROOT, SMOKE
from train_iadb import Config as BlendConfig

CPU = torch.device("cpu")
BLEND = {"schedule": {"kind": "blend"}, "target": "blend", "clip": False}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_candidate_that_points_to_the_image_is_taken() -> None:
    """Not the nearest: a short noise that points elsewhere would be."""
    centred = torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    first, second = torch.tensor([[0.1, 0.0], [0.0, -2.0]]), torch.tensor([[9.0, 5.0], [0.0, 2.0]])
    assert torch.equal(match_noise(centred, [first, second]), torch.stack([second[0], first[1]]))
    assert match_noise(centred, [first]) is first


def test_matched_noise_points_to_its_image_as_often_as_order_statistics_say() -> None:
    """Of k standard normal products the largest is taken: for k = 2 its mean is 1 / sqrt(pi), for k = 4 1.0294."""
    images = normal(4000, 8)
    for count, mean in ((2, 0.5642), (4, 1.0294)):
        chosen = match_noise(images, [normal(4000, 8, seed=i + 1) for i in range(count)])
        products = (chosen * images).sum(1) / images.norm(dim=1)
        assert float(products.mean()) == pytest.approx(mean, abs=0.05)


def of_step(step: int, *changes: str, plan: BatchPlan | None = None) -> tuple[StepNoise, Any]:

    cfg = load(ROOT / SMOKE, Config, list(changes))
    plan = plan or plan_batch(16, 8, rank=0, world=1)
    return StepNoise(cfg, TimeSampler(cfg.times, build_process(cfg.process)), plan, (3, 16, 16), step, CPU), cfg


def match(step_noise: StepNoise, x0: Tensor, part: slice) -> Tensor:
    """The noise of images with the mean 0."""
    return step_noise.match(MicroBatch(x0, torch.zeros(len(x0)), 0), None, part, no_mean)


def no_mean(x0: Tensor) -> Tensor:
    return torch.zeros_like(x0[0])


def test_the_noise_of_a_row_is_a_function_of_seed_and_step() -> None:
    """One candidate is plain noise; of more, no row depends on how the batch is split."""
    x0 = normal(16, 3, 16, 16)
    plain, _ = of_step(3)
    whole = slice(0, 16)
    assert torch.equal(match(plain, x0, whole), plain.eps)
    several, _ = of_step(3, "noise.candidates=4")
    assert torch.equal(several.eps, plain.eps), "it is the first candidate"
    matched = match(several, x0, whole)
    parts = [match(several, x0[part], part) for part in (slice(0, 4), slice(4, 16))]
    assert torch.equal(torch.cat(parts), matched)
    is_plain = (matched == plain.eps).flatten(1).all(1)
    assert 0 < int(is_plain.sum()) < 16
    assert ((matched * x0).flatten(1).sum(1) >= (plain.eps * x0).flatten(1).sum(1)).all()


def test_the_mean_of_the_data_is_that_of_its_training_images() -> None:
    _, cfg = of_step(0)
    density = open_density(cfg.data, cfg.held_out, cfg.image)
    coupling, x0 = Coupling(density), torch.zeros(2, 3, 16, 16)
    images = density.examples(of_train=True)
    everything = torch.stack([images.load(torch.tensor([i]).numpy())[0] for i in range(len(images.labels))])
    torch.testing.assert_close(coupling.mean(x0), everything.mean(0))
    assert coupling.mean(x0) is coupling.mean(x0), "it is measured once"


def test_partners_are_the_next_of_another_class_in_the_group() -> None:
    labels = torch.tensor([0, 0, 1, 2, 1, 1, 1, 1, -1, 3, -1, 4])
    assert find_partners(labels, 4).tolist() == [2, 2, 3, 0, -1, -1, -1, -1, -1, 11, -1, 9]
    halves = [find_partners(part, 4) for part in (labels[:4], labels[4:8])]
    assert torch.equal(find_partners(labels[:8], 4), torch.cat([halves[0], torch.where(halves[1] < 0, -1, halves[1] + 4)]))


def test_the_best_output_is_pushed_away_from_the_other_class() -> None:
    """Of |v - y|^2 - w |v - y_partner|^2 the minimum is (y - w y_partner) / (1 - w)."""
    x0, eps, t, weight = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1), torch.tensor([0.3, 0.7]), 0.4
    process = build_process(validate(ProcessConfig, {**BLEND, "loss": {"contrast": {"weight": weight, "group": 2}}}))
    partners = torch.tensor([1, 0])
    target = process.make_target(x0, eps, t)
    output = ((target - weight * target[partners]) / (1 - weight)).requires_grad_()

    def network(x: Tensor, time: Tensor) -> Tensor:
        return output

    terms = process.losses(network, x0, eps, t, partners=partners)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), output)
    assert float(gradient.abs().max()) < 1e-6 and {*terms.terms} == {"mse", "contrast"}
    torch.testing.assert_close(terms.contrast, contrast(output, target[partners], partners))
    for plain in (process.losses(network, x0, eps, t), process.losses(network, x0, eps, t, partners=torch.tensor([-1, -1]))):
        assert plain.mse is not None and torch.equal(plain.loss, plain.mse)


def test_the_partner_counts_at_the_time_of_the_row() -> None:
    """With v the target depends on the time: that of a partner is made of its image and noise at the row's own time."""
    x0, eps, t = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1), torch.tensor([10, 800])
    v = {"schedule": {"kind": "cosine", "steps": 1000}, "target": "v", "loss": {"contrast": {"weight": 0.5, "group": 2}}}
    process = build_process(validate(ProcessConfig, v))
    zero: Callable[..., Tensor] = lambda x, time: torch.zeros_like(x)  # noqa: E731
    terms = process.losses(zero, x0, eps, t, partners=torch.tensor([1, 0]))
    expected = process.make_target(x0.flip(0), eps.flip(0), t).square().flatten(1).mean(1)
    assert terms.contrast is not None and terms.mse is not None
    torch.testing.assert_close(terms.contrast, expected)
    torch.testing.assert_close(terms.loss, terms.mse - 0.5 * expected)


def test_rows_without_a_class_have_no_partner() -> None:
    """Neither images without a label, nor those whose label the network is not told."""
    step_noise, _ = of_step(3, "process.loss.contrast.group=4", "label_dropout=0.5")
    labels = torch.arange(16) % 4
    labels[0] = -1
    inputs = step_noise.condition(MicroBatch(torch.zeros(16), labels, 48), slice(0, 16), 4)
    is_null = inputs["labels"] == 4
    assert is_null[0] and 2 < int(is_null.sum()) < 14
    assert (inputs["partners"][is_null] < 0).all()
    chosen = inputs["partners"][inputs["partners"] >= 0]
    assert len(chosen) and not is_null[chosen].any()


def test_what_cannot_be_is_said() -> None:
    spec, plan = ContrastConfig(group=4), plan_batch(12, 6, rank=0, world=1)
    with pytest.raises(UserError, match="group 4 does not divide the 6 image"):
        check_contrast(spec, 3, plan)
    with pytest.raises(UserError, match="needs classes, and the data has none"):
        check_contrast(spec, None, plan)
    check_contrast(ContrastConfig(group=3), 3, plan)
    with pytest.raises(UserError, match="class_conditional is false"):
        of_step(0, "process.loss.contrast.group=4", "class_conditional=false", "label_dropout=0")
    with pytest.raises(UserError, match="belongs to a squared error"):
        of_step(0, 'process.loss={"kind": "kl", "contrast": {}}', "process.variance=learned", "process.target=eps")
    with pytest.raises(UserError, match="only Gaussian noise is matched"):
        load(ROOT / "configs/smoke/iadb.json", BlendConfig, ["noise.candidates=2", 'source={"source":"folder","path":"x"}'])


def test_the_doctor_shrinks_a_group_and_leaves_a_guide_out(tmp_path: Path) -> None:
    """Its micro-batches are smaller than most groups, and a guide would be of larger images."""
    changes = ["process.loss.contrast.group=8", "preview.sampler.guide_with=somewhere", "preview.quality=null"]
    small: Any = shrink(load(ROOT / SMOKE, Config, changes), tmp_path, MachineConfig(), 4, 2)
    assert small.process.loss.contrast == ContrastConfig(group=2) and small.preview.sampler.guide_with is None
    assert small.micro_batch_size == 2
    stop = ["held_out=0.1", 'optimizer.schedule={"kind":"wsd"}', 'stop={"kind":"held_out","every":5}']
    assert shrink(load(ROOT / SMOKE, Config, stop), tmp_path, MachineConfig(), 4, 2).held_out == 0.0, "so nothing is measured"
