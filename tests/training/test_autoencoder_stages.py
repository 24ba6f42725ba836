"""The autoencoder's stages, its adversary's weight, the guard, a codebook's step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from src.config import validate
from src.data import ImageConfig
from src.diffusion import ProcessConfig, build_process
from src.diffusion.weightings import UniformTimes
from src.models import DiscriminatorConfig, VAEConfig
from src.models.vae import Codebook, Reconstruction, VQBottleneck
from src.runtime.checkpoint import spared_steps
from src.runtime.stream import MicroBatch, plan_batch
from src.training.autoencoder_stages import Guard, GuardConfig, StageConfig, plan_stages, stage_warnings
from src.training.loss_terms import AdaptiveWeight, CodebookStep, winner_warnings
from src.training.optimizer import OptimizerConfig
from src.training.step_noise import StepNoise, TimeSampler


def stages(*raw: dict[str, Any]) -> tuple[StageConfig, ...]:
    return tuple(validate(StageConfig, entry) for entry in raw)


def config_of(*raw: dict[str, Any]) -> Any:
    return SimpleNamespace(
        stages=stages(*raw),
        image=ImageConfig(size=32),
        model=VAEConfig(widths=(8, 16), blocks=1),
        discriminator=DiscriminatorConfig(base_channels=8, layers=2),
        batch_size=8,
        micro_batch_size=4,
    )


def test_stages_follow_each_other_in_steps_and_images() -> None:
    late = {"weight": 0.5, "start_step": {"epochs": 0.5}}
    cfg = config_of(
        {"steps": {"epochs": 1}, "adversarial": late}, {"steps": 5, "image_size": 64, "batch_size": 2}, {"steps": 3}
    )
    first, second, third = plan_stages(cfg, 100, rank=0, world=1)
    assert (first.first, first.end, first.adversary_from) == (0, 13, 7), "13 steps of 8 are an epoch of 100"
    assert (second.first, second.end, second.batch_plan.images_before, second.batch_plan.micro) == (13, 18, 104, 2)
    assert (third.batch_plan.images_before, third.batch_plan.images_at(19), third.image.size) == (114, 122, 32)
    assert second.batch_plan.positions(14, 0) == range(106, 108) and second.batch_plan.of_step(0) == slice(0, 2)
    assert first.adversary_at(6) is None and first.adversary_at(7) is first.config.adversarial
    assert first.adversary_at(6) is None and first.adversary_at(7) is not None and second.adversary_at(13) is None
    assert "stage 2 of 3: steps 13 to 18, 64 px, l1 + 0.0001 KL" in second.describe(3)


def test_rates_start_anew_in_each_stage() -> None:
    spec = validate(OptimizerConfig, {"lr": 0.1, "schedule": {"kind": "one_cycle"}})
    cfg = config_of(
        {"steps": 10, "adversarial": {"start_step": 4}}, {"steps": 10, "lr": 0.01, "schedule": {"kind": "constant"}}
    )
    first, second = plan_stages(cfg, 100, rank=0, world=1)
    assert first.rate(spec)(0) == pytest.approx(0.1 / 25) and max(first.rate(spec)(step) for step in range(10)) > 0.09
    assert second.rate(spec)(10) == second.rate(spec)(19) == 0.01
    assert first.adversary_rate(spec)(4) == pytest.approx(0.1 / 25), "the discriminator's starts where it does"


def test_what_is_seldom_wanted_is_said() -> None:
    model, perceptual = VAEConfig(), {"steps": 1, "perceptual": {}}
    warnings = stage_warnings(stages({"steps": 1, "tanh": True}, perceptual), model, from_scratch=True)
    assert len(warnings) == 1 and "leaves blobs" in warnings[0], "tanh stays on, so the second stage is in order"
    assert stage_warnings(stages({"steps": 1, "tanh": True}), model, from_scratch=False) == []
    assert "perceptual without tanh" in stage_warnings(stages(perceptual), model, from_scratch=True)[0]


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"downsample": "conv", "upsample": "transposed"}, "model.downsample conv and model.upsample transposed leave"),
        ({"upsample": "transposed"}, "model.upsample transposed leaves checkerboards"),
        ({"downsample": "conv"}, "model.downsample conv leaves checkerboards"),
        ({"downsample": "max", "upsample": "bilinear"}, None),
        ({"widths": [8], "upsample": "transposed"}, None),
    ],
)
def test_checkerboards_are_warned_of(options: dict, warning: str | None) -> None:
    warnings = stage_warnings(stages({"steps": 1}), validate(VAEConfig, options), from_scratch=True)
    assert len(warnings) == (warning is not None)
    assert warning is None or (warning in warnings[0] and "Odena et al. 2016" in warnings[0])


def test_the_adaptive_weight_is_the_ratio_of_gradients_of_the_whole_batch() -> None:
    last = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    adaptive = AdaptiveWeight(last, Accelerator(cpu=True))
    assert adaptive.value == 0
    for x in (1.0, 2.0):  # two micro-batches: gradients 3 (1, 1) and 3 (0.5, 0)
        adaptive.measure((x * last).sum(), 0.5 * x * last[0])
    assert adaptive.value == 0, "it holds from the next step on"
    adaptive.update(torch.tensor(True))
    assert float(adaptive.value) == pytest.approx(2**0.5 / 0.5)
    adaptive.measure((9 * last).sum(), last[0])
    adaptive.update(torch.tensor(False))
    assert float(adaptive.value) == pytest.approx(2**0.5 / 0.5), "a step that did not count changes nothing"
    adaptive.measure(last.sum(), 0 * last[0])
    adaptive.update(torch.tensor(True))
    assert float(adaptive.value) == 1e4, "bounded"
    adaptive.update(torch.tensor(True))
    assert adaptive.value == 0, "and forgotten when a step has no adversary"


def test_the_guard_holds_reconstruction_against_the_stages_best() -> None:
    spec, guard = GuardConfig(worse_factor=1.5, rollback=True, max_rollbacks=1), Guard()
    assert guard.enter_stage(1) and not guard.enter_stage(1)
    assert guard.watch(spec, 0, 0.4) and guard.healthy_step is None
    assert guard.watch(spec, 10, 0.2) and guard.watch(spec, 20, 0.29) and not guard.watch(spec, 30, 0.31)
    assert (guard.best, guard.healthy_step) == (0.2, 20) and guard.rolls_back(spec)
    assert not guard.watch(spec, 40, float("nan"))
    assert "1.55 times" in guard.explain(spec, 30, 0.31, {}) and "going back to step 20, with 0.25 times" in guard.explain(
        spec, 30, 0.31, {}
    )
    reloaded = Guard.load(guard.saved())
    assert reloaded == guard and Guard.load(None) == Guard() == Guard.load(Guard().saved())
    reloaded.rollbacks = 1
    assert not reloaded.rolls_back(spec) and "rolled back 1 times already" in reloaded.explain(spec, 30, 0.31, {})
    assert guard.enter_stage(2) and guard.best == float("inf") and not guard.rolls_back(spec)
    assert "no checkpoint of this stage" in guard.explain(spec, 1, 0.5, {})


def test_a_dip_at_the_start_of_a_stage_leaves_a_checkpoint_to_go_back_to() -> None:
    spec, guard = GuardConfig(worse_factor=1.5, rollback=True), Guard()
    guard.enter_stage(2)
    guard.saved_before(20)
    assert guard.watch(spec, 20, 0.1)
    assert guard.watch(spec, 24, 0.3, adversary=False), "no fault of an adversary that has not begun"
    assert (guard.best, guard.healthy_step) == (0.3, 24)
    assert guard.watch(spec, 28, 0.4) and not guard.watch(spec, 32, 0.5) and guard.back_to == 28
    assert not guard.watch(spec, 36, float("nan"), adversary=False) and guard.best == 0.3

    guard = Guard()
    guard.enter_stage(1)
    assert guard.watch(spec, 0, 0.05) and guard.back_to is None and not guard.rolls_back(spec), "nothing is saved at step 0"
    guard.saved_before(0)
    assert guard.back_to is None
    guard.saved_before(6)
    assert not guard.watch(spec, 10, 0.2) and guard.rolls_back(spec) and guard.back_to == 6
    assert "going back to step 6, with 0.25 times" in guard.explain(spec, 10, 0.2, {})
    assert spared_steps({"guard": guard.saved()}) == {6}, "however many are saved after it"
    reloaded = Guard.load(guard.saved())
    assert reloaded == guard and reloaded.enter_stage(2) and reloaded.back_to is None
    guard.watch(spec, 12, 0.04)
    assert guard.back_to == 12 and spared_steps({"guard": guard.saved()}) == {12}
    before = {key: value for key, value in guard.saved().items() if key != "before_step"}
    assert Guard.load(before).back_to == 12, "what an earlier version saved is read"


def test_an_adversary_that_has_won_is_named() -> None:
    assert winner_warnings({"discriminator_accuracy": 0.7, "adaptive_weight": 3.0}) == [] == winner_warnings({})
    assert "has won (accuracy 0.990)" in winner_warnings({"discriminator_accuracy": 0.99})[0]
    assert "at its limit" in winner_warnings({"adaptive_weight": 1e4})[0]


def test_a_codebooks_step_is_the_same_however_the_batch_is_split() -> None:
    torch.manual_seed(0)
    mean, codebooks = torch.randn(8, 3, 2, 2), []
    for parts in (1, 2, 4):
        torch.manual_seed(1)
        book = Codebook(VQBottleneck(kind="vq", codes=6), 3).double()
        step = CodebookStep(book, mean.shape, 5, 0)
        for i in range(parts):
            local_slice = slice(i * 8 // parts, (i + 1) * 8 // parts)
            codes = book.nearest(mean[local_slice].double())
            vectors = step.add(Reconstruction(mean[local_slice], mean[local_slice].double(), None, codes), local_slice)
            assert torch.equal(vectors, book.look_up(codes))
        step.update(Accelerator(cpu=True), torch.tensor(True))
        codebooks.append(book.codebook)
    for other in codebooks[1:]:
        torch.testing.assert_close(other, codebooks[0], rtol=0, atol=1e-12)


def test_what_a_step_draws_is_a_function_of_seed_and_step() -> None:
    process = build_process(validate(ProcessConfig, {"schedule": {"kind": "cosine", "steps": 50}, "target": "v"}))
    split, times = plan_batch(64, 16, rank=0, world=2), TimeSampler(UniformTimes(), process)

    def draw(step: int, dropout: float = 0.25) -> StepNoise:
        cfg: Any = SimpleNamespace(seed=3, label_dropout=dropout, dtype="float32")
        return StepNoise(cfg, times, split, (1, 2, 2), step, torch.device("cpu"))

    one, same, other = draw(7), draw(7), draw(8)
    assert torch.equal(one.eps, same.eps) and torch.equal(one.t, same.t) and torch.equal(one.dropped, same.dropped)
    assert not torch.equal(one.eps, other.eps) and one.eps.shape == (64, 1, 2, 2) and 0 < int(one.dropped.sum()) < 40
    micro = MicroBatch(torch.zeros(16, 2, 2, 1), torch.tensor([0, 1, -1, 2] * 4), 0)
    local_slice = split.of_step(1)
    assert one.condition(micro, local_slice, None) == {}
    labels = one.condition(micro, local_slice, 5)["labels"]
    null = one.dropped[local_slice] | (micro.labels < 0)
    assert torch.equal(labels == 5, null) and torch.equal(labels[~null], micro.labels[~null])
    assert not draw(7, dropout=0.0).dropped.any() and draw(7, dropout=1.0).dropped.all()
