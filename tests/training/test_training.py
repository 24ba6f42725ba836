"""The parts of the loop: each number against its formula or against torch."""

import copy
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import ddpm_accelerate
from src.config import UserError, load, validate
from src.data import ImageConfig, open_sources
from src.data.buckets import make_buckets
from src.data.facts import describe_data
from src.data.sources import ShapesSource
from src.report.run_files import read_lines
from src.runtime import checkpoint
from src.runtime.checkpoint import CheckpointConfig, load_weights, newest, retain, step_folder, verify_checkpoint, write_folder
from src.runtime.failures import explain_out_of_memory
from src.runtime.launch import MachineConfig, start, start_sampling
from src.runtime.order import Order
from src.runtime.precision import has_bf16_units, precision_for
from src.runtime.processes import Heartbeats
from src.runtime.seeds import generator, normal, torch_seed, uniforms
from src.runtime.stopping import StepGate, StopRequest
from src.runtime.stream import StepOrder, plan_batch, stream, to_network
from src.training.clock import Cadence, Clock, peak_memory_gigabytes
from src.training.ema import EMA, WIDTHS, EMAConfig, exponent, post_hoc_weights
from src.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    orthogonal,
    update,
)
from src.training.run_directory import RunDirectory
from src.training.state import Meter, TrainState
from tests.conftest import ROOT, SMOKE, environment, run_here

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------- learning rates


def rates(schedule: dict, total: int, lr: float = 0.1) -> list[float]:
    spec = validate(OptimizerConfig, {"lr": lr, "schedule": schedule})
    rate = learning_rate(spec, lambda length: length if isinstance(length, int) else int(length.epochs or 0) * 10)
    return [rate(step, total) for step in range(total)]


def torch_rates(make: object, total: int, lr: float = 0.1) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)  # pyright: ignore[reportCallIssue]
    lrs = []
    for step in range(total):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return lrs


@pytest.mark.parametrize("total", [14, 97])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pct_start": 0.1, "anneal_strategy": "linear"},
        {"three_phase": True, "pct_start": 0.4},
        {"div_factor": 5.0, "final_div_factor": 100.0},
    ],
    ids=str,
)
def test_one_cycle_is_torchs(options: dict, total: int) -> None:
    wanted = torch_rates(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=total, cycle_momentum=False, **options), total
    )
    assert rates({"kind": "one_cycle", **options}, total) == pytest.approx(wanted)


def test_one_cycle_of_a_run_too_short_for_its_phases() -> None:
    assert all(0 < rate <= 0.1 for total in (1, 2, 10) for rate in rates({"kind": "one_cycle", "pct_start": 0.1}, total))


def test_multistep_is_torchs() -> None:
    wanted = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [5, 20], gamma=0.3), 40)
    assert rates({"kind": "multistep", "milestones": [5, {"epochs": 2}], "gamma": 0.3}, 40) == pytest.approx(wanted)


def test_warm_up_and_annealing_to_a_floor() -> None:
    constant = rates({"kind": "constant", "warmup": 3}, 8)
    assert constant == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])
    cosine = rates({"kind": "cosine", "floor": 0.1}, 100)
    wanted = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100, eta_min=0.01), 100)
    assert cosine == pytest.approx(wanted)
    linear = rates({"kind": "linear", "floor": 0.5, "warmup": 10}, 110)
    assert linear[10] == pytest.approx(0.1) and linear[60] == pytest.approx(0.075) and min(linear[10:]) > 0.05


# ---------------------------------------------------------------------------------------------- steps


class Prepared:
    """What accelerate gives, as far as `update` looks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.scaler = optimizer, None
        self.param_groups = optimizer.param_groups
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


def network_and_optimizer() -> tuple[nn.Module, torch.optim.AdamW]:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    return network, build_optimizer(network, validate(OptimizerConfig, {"lr": 0.1, "weight_decay": 0.1}))


def take_step(network: nn.Module, optimizer: torch.optim.Optimizer, spoil: float = 1.0) -> torch.Tensor:
    (network(torch.ones(2, 3)).sum() * spoil).backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    update(Prepared(optimizer), 0.1, norm)
    return norm


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(spoil: float) -> None:
    network, optimizer = network_and_optimizer()
    take_step(network, optimizer)
    run_state = TrainState(network, optimizer, EMA(network, EMAConfig()))
    before = {part: {k: v.clone() for k, v in state.items()} for part, state in run_state.tensors().items()}
    norm = take_step(network, optimizer, spoil)
    assert not torch.isfinite(norm)
    for part, state in run_state.tensors().items():
        for name, value in state.items():
            assert torch.equal(value, before[part][name]), (part, name)
    take_step(network, optimizer)
    assert not torch.equal(run_state.tensors()["model"]["0.weight"], before["model"]["0.weight"])


def test_update_is_adamw() -> None:
    torch.manual_seed(0)
    network, optimizer = network_and_optimizer()
    torch.manual_seed(0)
    other, _ = network_and_optimizer()
    plain = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.1, foreach=False)
    for _ in range(3):
        take_step(network, optimizer)
        other(torch.ones(2, 3)).sum().backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
    for ours, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_muon_is_torchs_on_matrices_and_adamw_on_the_rest() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    spec = validate(OptimizerConfig, {"lr": 0.02, "weight_decay": 0.1, "muon": {"momentum": 0.9, "iterations": 5}})
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 3, 1))
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    theirs = [nn.Parameter(network[i].weight.detach().flatten(1).clone()) for i in (0, 2, 3)]  # pyright: ignore
    rest = [value for i, value in enumerate(network.parameters()) if i not in (0, 2, 4)]
    others = [nn.Parameter(value.detach().clone()) for value in rest]
    starts = {i: network[i].weight.detach().flatten(1).clone() for i in (0, 2, 3)}  # pyright: ignore
    muon = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adam, ours = torch.optim.AdamW(others, lr=0.02, weight_decay=0.1, fused=True), Prepared(build_optimizer(network, spec))
    for _ in range(4):
        for one, parameter in zip([*theirs, *others], [*(network[i].weight for i in (0, 2, 3)), *rest], strict=True):
            parameter.grad = torch.randn_like(parameter)  # of full rank: where a singular value is nearly 0, rounding decides
            one.grad = parameter.grad.detach().reshape(one.shape).clone()
        muon.step()
        adam.step()
        update(ours, 0.02, torch.tensor(1.0))
        for one, parameter in zip(others, rest, strict=True):
            torch.testing.assert_close(parameter, one)
        for one, i in zip(theirs, (0, 2, 3), strict=True):
            apart = (network[i].weight.flatten(1) - one).norm() / (one - starts[i]).norm()
            assert apart < 0.1, apart  # both iterate in bfloat16, and round in another order
    before = [value.detach().clone() for value in network.parameters()]
    momentum = {name: value.clone() for name, value in optimizer_state(ours.optimizer, network).items()}
    network(torch.full((2, 16, 9, 9), float("nan"))).sum().backward()
    ours.optimizer.found_inf = torch.tensor(1.0)  # as on a GPU, which decides itself
    ours.optimizer.step()
    del ours.optimizer.found_inf
    update(ours, 0.02, torch.tensor(float("nan")))
    assert all(torch.equal(value, old) for value, old in zip(network.parameters(), before, strict=True))
    after = optimizer_state(ours.optimizer, network)
    assert after.keys() == momentum.keys() and all(torch.equal(after[name], momentum[name]) for name in after)
    twin = copy.deepcopy(network)
    other = Prepared(build_optimizer(twin, spec))
    other.optimizer.found_inf = torch.tensor(0.0)
    for value, same in zip(network.parameters(), twin.parameters(), strict=True):
        other.optimizer.state[same] = copy.deepcopy(ours.optimizer.state[value])
        value.grad = torch.randn_like(value)
        same.grad = value.grad.clone()
    update(ours, 0.02, torch.tensor(1.0))
    update(other, 0.02, torch.tensor(1.0))
    for value, same in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, same)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonal_has_the_singular_vectors_and_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonal(matrices, 5) @ vh.mT  # diagonal where the vectors are the same
    values = torch.diagonal(rotated, dim1=1, dim2=2)
    assert values.min() > 0.3 and values.max() < 1.3 and values.median() > 0.6
    torch.testing.assert_close(rotated, torch.diag_embed(values), rtol=0, atol=1e-9)
    near = orthogonal(matrices.float(), 5).double()
    assert (near - orthogonal(matrices, 5)).abs().max() < 0.05


def test_moments_come_back_in_the_memory_format_of_their_parameter() -> None:
    """A fused kernel walks parameter and moments side by side in memory."""
    weights = []
    for resumed in (False, True):
        torch.manual_seed(0)
        network = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(network, validate(OptimizerConfig, {"lr": 0.1}))
        for step in range(4):
            if resumed and step == 2:
                state = {name: value.contiguous() for name, value in optimizer_state(optimizer, network).items()}
                optimizer = build_optimizer(network, validate(OptimizerConfig, {"lr": 0.1}))
                load_optimizer_state(optimizer, network, state)
            x = torch.arange(3 * 25, dtype=torch.float32).reshape(1, 3, 5, 5).sin() * (step + 1)
            network(x).square().sum().backward()
            update(Prepared(optimizer), 0.1, torch.tensor(1.0))
        weights.append(network.weight.detach().contiguous())
    assert torch.equal(weights[0], weights[1])


def test_ema_by_its_formula() -> None:
    network = nn.Linear(2, 2)
    ema = EMA(network, EMAConfig(half_life_images=100, ramp_up=None))
    assert ema.decay(10**6, 50) == pytest.approx(0.5**0.5)
    start_weight = network.weight.detach().clone()
    assert ema.network.weight.data_ptr() != network.weight.data_ptr()
    with torch.no_grad():
        network.weight.fill_(3.0)
    ema.update(network, 50, 50)
    ema.update(network, 100, 50)
    torch.testing.assert_close(ema.network.weight.data, 0.5 * start_weight + 0.5 * 3.0)  # two steps are one half-life
    assert not ema.network.weight.requires_grad
    ramped = EMA(network, EMAConfig(half_life_images=1000, ramp_up=0.1))
    assert ramped.decay(100, 10) == pytest.approx(0.5) and ramped.decay(10**6, 10) == pytest.approx(0.5**0.01)


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25])
def test_the_width_of_an_average_is_that_of_its_times(width: float) -> None:
    """The standard deviation of tau in (gamma + 1) tau^gamma on [0, 1]."""
    gamma, tau = exponent(width), (np.arange(200_000) + 0.5) / 200_000
    weight = (gamma + 1) * tau**gamma / len(tau)
    mean = (weight * tau).sum()
    assert np.sqrt((weight * (tau - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)


def average_of(path: np.ndarray, width: float) -> float:
    """Of a weight (steps,), each step's counted as tau^gamma where it stood."""
    gamma, times = exponent(width), np.arange(len(path) + 1) / len(path)
    return float(path @ (times[1:] ** (gamma + 1) - times[:-1] ** (gamma + 1)))


def test_post_hoc_averages_are_those_of_the_whole_path(tmp_path: Path) -> None:
    """A weight that wanders for 2,000 steps of 8 images, with a snapshot of its two averages at every tenth of them."""
    path = np.cumsum(np.random.default_rng(0).normal(size=2000)) / 50
    network = nn.Linear(1, 1, bias=False)
    ema, snapshots = EMA(network, EMAConfig(snapshot_every=200)), []
    for step, value in enumerate(path, 1):
        with torch.no_grad():
            network.weight.fill_(float(value))
        ema.update(network, 8 * step, 8)
        if step % 200 == 0:
            for width, name in zip(WIDTHS, ema.averages, strict=True):
                average = float(ema.averages[name].weight)
                assert average == pytest.approx(average_of(path[:step], width), abs=0.02)
                snapshots.append(((width, 8 * step), average))
    shots, values = [shot for shot, _ in snapshots], np.array([value for _, value in snapshots])
    for width in (0.04, 0.05, 0.08, 0.1, 0.15):
        weights, missed = post_hoc_weights(shots, width)
        assert missed < 0.06 and weights @ values == pytest.approx(average_of(path, width), abs=0.02)
    weights, missed = post_hoc_weights(shots, 0.05)  # one that was kept
    assert missed < 1e-3 and weights[shots.index((0.05, 16_000))] == pytest.approx(1, abs=1e-3)
    assert abs(average_of(path, 0.04) - average_of(path, 0.15)) > 0.1  # so that they can be told apart
    assert post_hoc_weights(shots[:2], 0.2)[1] > 0.1  # a single snapshot cannot make a long one


def wide_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 2))


def train_wide(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        network(torch.randn(4, 3, 5, 5, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("muon", [None, {}, {"momentum": 0.8, "iterations": 2}])
def test_optimizer_state_goes_out_and_in(muon: dict | None) -> None:
    """By our checkpoints, by torch's own load_state_dict (which accelerate's `prepare` calls) and by deepcopy: each twin then
    moves as the original does."""
    spec = validate(OptimizerConfig, {"lr": 0.01, "weight_decay": 0.1, "muon": muon})
    network = wide_network()
    optimizer = build_optimizer(network, spec)
    train_wide(network, optimizer, 3)
    state, start_weights = optimizer_state(optimizer, network), copy.deepcopy(network.state_dict())
    assert {key.rpartition("/")[0] for key in state} == {name for name, _ in network.named_parameters()}, (
        "each parameter has moments"
    )

    def by_checkpoint(twin: nn.Module) -> torch.optim.Optimizer:
        fresh = build_optimizer(twin, spec)
        load_optimizer_state(fresh, twin, state)
        assert all(torch.equal(value, state[name]) for name, value in optimizer_state(fresh, twin).items())
        return fresh

    def by_torch(twin: nn.Module) -> torch.optim.Optimizer:
        fresh = build_optimizer(twin, spec)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return fresh

    def by_prepare(twin: nn.Module) -> torch.optim.Optimizer:
        return start(MachineConfig()).prepare(by_checkpoint(twin)).optimizer

    twins = [(twin := copy.deepcopy(network), load(twin)) for load in (by_checkpoint, by_torch, by_prepare)]
    twins.append(copy.deepcopy((network, optimizer)))
    train_wide(network, optimizer, 2)
    for twin, its_optimizer in twins:
        train_wide(twin, its_optimizer, 2)
        for name, value in network.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name
            assert not torch.equal(value, start_weights[name])


@pytest.mark.parametrize("muon", [None, {}])
def test_moments_that_do_not_fit_are_refused(muon: dict | None) -> None:
    spec, network = validate(OptimizerConfig, {"lr": 0.01, "muon": muon}), wide_network()
    optimizer = build_optimizer(network, spec)
    train_wide(network, optimizer, 1)
    state = optimizer_state(optimizer, network)
    other = validate(OptimizerConfig, {"lr": 0.01, "muon": {} if muon is None else None})

    def refused(changed: dict, message: str, spec: OptimizerConfig = spec) -> None:
        with pytest.raises(UserError, match=message):
            load_optimizer_state(build_optimizer(network, spec), network, changed)

    refused({key: value for key, value in state.items() if not key.startswith("3.weight/")}, "it lacks 3.weight/")
    refused({key: value for key, value in state.items() if not key.endswith("bias/exp_avg_sq")}, "it lacks 0.bias/exp_avg_sq")
    refused(state | {"5.weight/exp_avg": torch.zeros(2)}, "it has in excess 5.weight/exp_avg")
    refused(state | {"4.bias/exp_avg": torch.zeros(3)}, r"4.bias/exp_avg has the shape \(3,\) and not \(2,\)")
    refused(state, "it lacks 0.weight/.*; it has in excess", other)
    load_optimizer_state(build_optimizer(network, spec), network, {})  # before the first step there are none


# ---------------------------------------------------------------------------------------------- randomness and the stream


def test_seeds_are_functions_of_their_words() -> None:
    assert generator(0, "a", 1).random() == generator(0, "a", 1).random() != generator(0, "a", 2).random()
    assert torch_seed(0, "a") != torch_seed(0, "b") and 0 <= torch_seed(5) < 2**63
    noise = normal((4, 1000), 0, "noise", 3, device=CPU, dtype=torch.float32)
    assert torch.equal(noise, normal((4, 1000), 0, "noise", 3, device=CPU, dtype=torch.float32))
    assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.05
    assert normal((2,), 0, device=CPU, dtype=torch.float64).dtype == torch.float64
    u = uniforms(generator(1), 1000)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1


def test_batches_are_split_exactly() -> None:
    whole = plan_batch(16, 4, rank=0, world=1)
    assert whole.accumulation == 4
    covered = [p for part in range(4) for p in whole.positions(2, part)]
    assert covered == list(range(32, 48))
    halves = [plan_batch(16, 4, rank=rank, world=2) for rank in (0, 1)]
    assert [p for half in halves for part in range(2) for p in half.positions(2, part)] == covered
    assert halves[1].of_step(1) == slice(12, 16)
    assert plan_batch(16, None, rank=0, world=2).micro == 8
    with pytest.raises(UserError, match="1 process.* times micro_batch_size 3; set .* 12 or 15, or micro_batch_size 1 or 2$"):
        plan_batch(14, 3, rank=0, world=1)
    with pytest.raises(UserError, match="batch_size 4 is not a multiple of 3 process.es.; set batch_size to 3 or 6$"):
        plan_batch(4, 4, rank=0, world=3)
    with pytest.raises(UserError, match="set batch_size to 4$"):
        plan_batch(2, None, rank=0, world=4)


def test_a_devices_share_smaller_than_the_micro_batch_is_taken_whole() -> None:
    splits = [plan_batch(128, 32, rank=0, world=world) for world in (1, 2, 4, 8)]
    assert [(split.accumulation, split.micro) for split in splits] == [(4, 32), (2, 32), (1, 32), (1, 16)], "the README's table"
    last = plan_batch(128, 32, rank=7, world=8)
    assert last.of_step(0) == slice(112, 128) and last.positions(1, 0) == range(240, 256)
    assert plan_batch(8, 64, rank=0, world=1).micro == 8


def test_each_epoch_has_every_image_once() -> None:
    order = Order(np.zeros(10, dtype=np.int64), seed=0, balanced=False)
    first, second = order(range(10)), order(range(10, 20))
    assert sorted(first) == sorted(second) == list(range(10)) and list(first) != list(second)
    assert order(range(7, 13)).tolist() == [*first[7:], *second[:3]]
    assert Order(np.zeros(10, dtype=np.int64), seed=1, balanced=False)(range(10)).tolist() != first.tolist()


def test_balanced_order_has_as_many_of_each_class() -> None:
    labels = np.array([0] * 90 + [1] * 10, dtype=np.int64)
    sampled = labels[Order(labels, seed=0, balanced=True)(range(100))]
    assert (sampled == 0).sum() == (sampled == 1).sum() == 50


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_starts_anywhere(workers: int, tmp_path: Path) -> None:
    from src.data.sources import FolderSource

    shapes = open_sources(ShapesSource(source="shapes", count=10, size=16))
    for i in range(10):
        from PIL import Image

        Image.fromarray(np.asarray(shapes.parts[0].load(i, channels=3))).save(tmp_path / f"{i}.png")
    images = open_sources(validate(FolderSource, {"source": "folder", "path": str(tmp_path)}))
    spec, split = ImageConfig(size=12, crop="random", flip=True), plan_batch(4, 2, rank=0, world=1)

    def take(start_step: int, count: int) -> list:
        order = StepOrder(make_buckets(spec, images.sides, 1), images.labels, split, 3)
        batches = stream(images, order, start_step=start_step, workers=workers, device=CPU)
        return [next(batches) for _ in range(count)]

    whole, later = take(0, 12), take(4, 4)
    for early, late in zip(whole[8:], later, strict=True):
        assert torch.equal(early.images, late.images) and early.position == late.position
    assert whole[3].images.shape == (2, 12, 12, 3) and whole[3].images.dtype == torch.uint8 and whole[3].position == 6


def test_to_network_is_minus_one_to_one() -> None:
    x = to_network(torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8), CPU)
    assert x.shape == (1, 3, 1, 1) and x.flatten().tolist() == pytest.approx([-1, -0.00392, 1], abs=1e-4)


def test_cadence() -> None:
    assert [step for step in range(1, 10) if Cadence("log", 3)(step)] == [3, 6, 9] and not Cadence("log", None)(5)


# ---------------------------------------------------------------------------------------------- checkpoints


def write(folder: Path, step: int) -> Path:
    target = step_folder(folder, step)
    write_folder(target, {"model": {"w": torch.full((3,), float(step))}}, {"progress": {"step": step}})
    return target


def test_a_checkpoint_is_whole_and_knows_it(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    assert verify_checkpoint(folder) is None
    assert checkpoint.read_tensors(folder, "model")["w"].tolist() == [5, 5, 5]
    assert {path.name for path in folder.iterdir()} == {"MANIFEST.json", "model.safetensors", "progress.json"}
    assert write(tmp_path, 5) == folder and verify_checkpoint(folder) is None, "written again in place"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
            "bytes instead of",
        ),
        (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "MANIFEST.json").write_text("[]"), "cannot be read"),
    ],
)
def test_damage_is_found_and_passed_over(tmp_path: Path, spoil: object, message: str) -> None:
    write(tmp_path, 5)
    latest = write(tmp_path, 10)
    spoil(latest)  # pyright: ignore[reportCallIssue]
    folder, passed = newest(tmp_path)
    assert folder == step_folder(tmp_path, 5) and len(passed) == 1 and message in passed[0]


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert verify_checkpoint(folder) == "model.safetensors is damaged"


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    (tmp_path / ".step_00000009.partial").mkdir()
    retain(tmp_path, 2, {3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000005", "step_00000006"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    write(tmp_path, 1)
    code = (
        "import resource, sys, torch; from pathlib import Path; from src.config import run_script\n"
        "from src.runtime.checkpoint import write_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "run_script(lambda: write_folder(Path(sys.argv[1]), {'model': {'w': torch.zeros(100_000)}}, {}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(step_folder(tmp_path, 2))],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"] and verify_checkpoint(
        step_folder(tmp_path, 1)
    ) is None


def test_weights_of_another_architecture() -> None:
    network = nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"it lacks bias; it has in excess extra"):
        load_weights(network, {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}, Path("ckpt"))
    with pytest.raises(UserError, match=r"weight is \(4, 2\) and not \(3, 2\)"):
        load_weights(network, {"weight": torch.zeros(4, 2), "bias": torch.zeros(3)}, Path("ckpt"))


def test_an_export_is_read_without_running_anything(tmp_path: Path) -> None:
    checkpoint.export(tmp_path / "models" / "a.pt", {"w": torch.ones(2)}, {"name": "a"}, {"class_names": []}, 7)
    export = torch.load(tmp_path / "models" / "a.pt", weights_only=True)
    assert export["step"] == 7 and export["config"] == {"name": "a"} and export["weights"]["w"].tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------- the gate


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def stop_request():
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_gate_counts_finite_steps_and_ends_a_run_of_bad_ones(accelerator: Accelerator, stop_request: StopRequest) -> None:
    gate = StepGate(accelerator, stop_request, every_minutes=None, patience=3)
    good, bad = torch.tensor(True), torch.tensor(False)
    gate.send(1, good)
    assert gate.read() == 1 and gate.read() is None
    for step in (2, 3):
        gate.send(step, bad)
        assert gate.read() is None
    assert gate.skipped_in_a_row == 2
    gate.send(4, good)
    assert gate.read() == 4 and gate.skipped_in_a_row == 0
    for step in (5, 6):
        gate.send(step, bad)
        gate.read()
    gate.send(7, bad)
    with pytest.raises(UserError, match="step 7: .* not finite, the 3th time in a row; there is no checkpoint yet: lower"):
        gate.read()
    gate.saved(6)
    gate.send(8, bad)
    with pytest.raises(UserError, match="the last checkpoint is of step 6, from before: lower optimizer.lr"):
        gate.read()


def test_the_gate_carries_stop_and_clock(accelerator: Accelerator, stop_request: StopRequest) -> None:
    gate = StepGate(accelerator, stop_request, every_minutes=1e-9, patience=3)
    time.sleep(0.01)
    gate.send(1, torch.tensor(True))
    gate.read()
    assert gate.save and not gate.stop
    gate.saved()
    stop_request.requested = True
    gate.send(2, torch.tensor(True))
    gate.read()
    assert gate.stop


def test_meter(accelerator: Accelerator) -> None:
    meter = Meter(accelerator, {"loss": {"sum": 10.0, "count": 2.0}})
    meter.add(3, loss=torch.tensor(20.0), kl=torch.tensor(6.0))
    meter.add(3, loss=torch.tensor(float("nan")))
    assert meter.saved() == {"loss": {"sum": 30.0, "count": 5.0}, "kl": {"sum": 6.0, "count": 3.0}}
    assert meter.read() == {"loss": 6.0, "kl": 2.0}
    assert meter.read() == {} == meter.saved(), "nothing was counted since"


# ---------------------------------------------------------------------------------------------- launch and run directory


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, "no WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP"),
        ({"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP is '1', which accelerate does not take"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, "asks for DEEPSPEED"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision fp16 and the config for no"),
        ({"ACCELERATE_MIXED_PRECISION": "FP8"}, "mixed_precision fp8 and the config for no"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            r"sets ACCELERATE_GRADIENT_ACCUMULATION_STEPS to 4, .* batch_size and micro_batch_size \(here batch_size 16, "
            r"micro_batch_size 8\)",
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"ACCELERATE_DYNAMO_BACKEND to INDUCTOR, .*\(here compile false\)"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG to true"),
        ({"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, r'to BF16, .*\(here mixed_precision "no", dtype "float32"\)'),
        ({"NVIDIA_TF32_OVERRIDE": "1"}, "NVIDIA_TF32_OVERRIDE to 1"),
        ({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, "CUBLAS_WORKSPACE_CONFIG is :0:0, and deterministic true needs"),
    ],
)
def test_an_environment_that_contradicts(variables: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would change a result is refused, with the value of the environment and that of the config."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        start(load(ROOT / SMOKE, ddpm_accelerate.Config, ["deterministic=true"]))


def test_sampling_is_held_to_what_changes_its_arithmetic_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # left in the shell by a training elsewhere
    assert start_sampling("cpu")[1] == CPU
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "ANY")
    with pytest.raises(UserError, match="ONEDNN_DEFAULT_FPMATH_MODE to ANY"):
        start_sampling("cpu")


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "x"), ("ACCELERATE_DEBUG_MODE", "maybe")])
def test_an_environment_that_accelerate_cannot_read(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person reads the name of the variable, and no traceback of accelerate's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(name, value)
    try:
        with pytest.raises(UserError, match=f"cannot start with what the environment .* unset what is wrong of .*{name}"):
            start(MachineConfig())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_what_accelerate_launch_sets_by_itself_contradicts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    neutral = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", " ")  # in a script of a shell: no value was given
    start(MachineConfig())
    for name, value in (neutral | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ONEDNN_DEFAULT_FPMATH_MODE": ""}).items():
        monkeypatch.setenv(name, value)
    torch.backends.cuda.matmul.allow_tf32 = True  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE makes it
    assert start(MachineConfig()).gradient_accumulation_steps == 1
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.parametrize(
    ("known", "units"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True}, True),  # torch does not say
    ],
)
def test_a_processor_without_units_for_bf16_is_named(
    known: dict, units: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert has_bf16_units() == units
    quick = ["--set", "steps=1", "--set", "mixed_precision=bf16", "--set", "log.trackers=[]", "--set", "preview.num_measured=2"]
    run_here("train_classifier", "-cfg", ROOT / "configs/smoke/classifier.json", "--run-dir", tmp_path / "run", *quick)
    advice = "no units for bf16, so float32 is faster here: start a run with --set mixed_precision=no"
    assert (advice in (tmp_path / "run" / "log.txt").read_text()) == (not units)


@pytest.mark.parametrize(("variables", "keeps_memory"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_glibc_keeps_what_is_freed_unless_the_environment_says_how(variables: dict[str, str], keeps_memory: bool) -> None:
    """64 MB are freed: how many of them go back to the system?"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    code = (
        "import psutil, torch; from src.runtime.launch import keep_freed_memory; print(keep_freed_memory());"
        "x = torch.ones(16 << 20); me = psutil.Process(); before = me.memory_info().rss; del x;"
        "print(before - me.memory_info().rss > 32 << 20)"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain | variables, capture_output=True, text=True)
    assert done.stdout.split() == [str(keeps_memory), str(not keeps_memory)], done.stderr


def test_precision_without_a_gpu() -> None:
    assert precision_for("bf16") == "bf16" or torch.cuda.is_available()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a GPU"):
            start(MachineConfig(mixed_precision="fp16"))
    with pytest.raises(UserError, match="float64 goes with"):
        start(MachineConfig(mixed_precision="bf16", dtype="float64"))


BEATS = """
import sys, time
from src.runtime.processes import Heartbeats
heart = Heartbeats(int(sys.argv[1]), 3, seconds=0.4, patience=10)
time.sleep(1)
print("beats", flush=True)
sys.stdin.readline()
heart.close()
"""


def test_a_rank_that_gives_no_sign_of_life_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is killed, rank 2 comes to its end; then the store goes, which is on the first machine."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    began = [
        subprocess.Popen(
            [sys.executable, "-c", BEATS, rank], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port)),
        )
        for rank in ("1", "2")
    ]  # fmt: skip
    heart = Heartbeats(0, 3, seconds=0.4, patience=10)
    try:
        for one in began:
            assert one.stdout is not None and one.stdout.readline() == "beats\n"
        began[1].communicate("end\n", timeout=60)
        time.sleep(2)
        assert capsys.readouterr().err == "", "all live, or have said that they are done"
        began[0].kill()
        began[0].communicate()
        deadline, warning = time.monotonic() + 30, ""
        while not warning and time.monotonic() < deadline:
            warning = capsys.readouterr().err
            time.sleep(0.1)
        assert warning == "warning on rank 0: rank 1 of 3 gave no sign of life for 4 s\n"
    finally:
        heart.close()
        for one in began:
            one.kill()
    other = Heartbeats(2, 3, seconds=0.2)
    del store
    other._thread.join(30)
    assert "warning on rank 2: rank 0's machine (127.0.0.1) does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_try(error: Exception) -> None:
    with pytest.raises(UserError, match="at micro_batch_size 15; try --set micro_batch_size=6"), explain_out_of_memory(30, 15):
        raise error
    with pytest.raises(UserError, match="smaller image.size"), explain_out_of_memory(1):
        raise error
    with pytest.raises(UserError, match="try --batch-size 7"), explain_out_of_memory(15, 15, key="--batch-size"):
        raise error
    refusal = pytest.raises(UserError, match="try --set stages.3.micro_batch_size=2 ")
    with refusal, explain_out_of_memory(15) as trying:
        trying(4, 4, "stages.3.micro_batch_size")
        raise error
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(8):
        raise RuntimeError("another")


def test_a_live_run_directory_is_refused_and_a_dead_ones_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from src.training.run_directory import RunDirectory\n"
        "run = RunDirectory(Path(sys.argv[1]), writes=True); print('owned', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "owned\n"
        with pytest.raises(UserError, match=f"in use by process {owner.pid} on"):
            RunDirectory(tmp_path / "run", writes=True)
        owner.kill()
    with closing(RunDirectory(tmp_path / "run", writes=True)) as run:
        assert run.writes


def test_metrics_are_cut_to_the_step(tmp_path: Path) -> None:
    images = open_sources(ShapesSource(source="shapes", count=4, size=8))
    facts = describe_data(images, None)
    assert facts["counts"] == {"circle": 1, "cross": 1, "square": 1, "triangle": 1}
    lines = [{"step": step, "loss": 1.0 / step} for step in (5, 10, 15)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "lo')
    run = RunDirectory(tmp_path, writes=True)
    run.begin(10, validate(OptimizerConfig, {"lr": 0.1}), facts, images, None)
    run.log(15, {"loss": 0.5})
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path / "metrics.jsonl")] == [(5, 0.2), (10, 0.1), (15, 0.5)]
    run.draw_curves({"loss": ["loss", "absent"], "none": ["absent"]})
    run.close()
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert json.loads((tmp_path / "data.json").read_text()) == facts


def test_a_damaged_checkpoint_is_not_kept_instead_of_whole_ones(tmp_path: Path) -> None:
    images = open_sources(ShapesSource(source="shapes", count=4, size=8))
    for step in (5, 9):
        write(tmp_path / "checkpoints", step)
    (step_folder(tmp_path / "checkpoints", 9) / "model.safetensors").write_bytes(b"cut")
    with closing(RunDirectory(tmp_path, writes=True)) as run:
        assert run.newest_checkpoint() == step_folder(run.checkpoints, 5)
        run.begin(5, validate(OptimizerConfig, {"lr": 0.1}), {}, images, None)
        assert (run.checkpoints / ".step_00000009.damaged").is_dir(), "until there is a newer one"
        run.save({}, {"progress": {"step": 6}}, CheckpointConfig(keep=1))
        assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000006"]
        write(run.checkpoints, 8)
        run.save({}, {"progress": {"step": 7}}, CheckpointConfig(keep=1))
        assert verify_checkpoint(step_folder(run.checkpoints, 7)) is None, "never the one that was just written"


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    images = open_sources(ShapesSource(source="shapes", count=4, size=8))
    run = RunDirectory(tmp_path / "run", writes=False)
    run.begin(0, validate(OptimizerConfig, {"lr": 0.1}), {}, images, None)
    run.say("unsaid")
    run.log(1, {"loss": 1.0})
    run.write_status("running", 1, 2)
    assert not (tmp_path / "run").exists()


def test_the_clock_counts_images() -> None:
    clock = Clock(10, 40, 80, shown=False)
    for _ in range(3):
        clock.tick(4)
    time.sleep(0.05)
    read = clock.read(52)
    assert read["epoch"] == 1.0 and 0 < read["images_per_second"] <= 12 / 0.05
    assert not clock.bar_shown
    clock.close()
    assert 0 < peak_memory_gigabytes(CPU) < 100
