"""torch's `fully_shard` on two processes of a CPU: what is saved is whole, and goes back into parts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from src.config import UserError, validate
from src.models import UNet, UNetConfig
from src.runtime import checkpoint
from src.runtime.sharding import full
from src.training.ema import EMA, EMAConfig
from src.training.optimizer import OptimizerConfig, build_optimizer, update
from src.training.state import TrainState, prepare
from tests.conftest import randomise
from tests.training.test_training import Prepared


def build(base_channels: int = 8) -> UNet:
    spec = {
        "base_channels": base_channels,
        "channel_mult": [1, 2],
        "blocks": 1,
        "attention": ["none", "full"],
        "norm_groups": 4,
    }
    network = UNet(validate(UNetConfig, spec), num_classes=3)
    randomise(network)
    return network.double()


def shard(network: UNet, ema: EMA) -> None:
    for block in [module for module in network.modules() if type(module).__name__ in ("Block", "ResidualBlock")][::-1]:
        fully_shard(block)
    fully_shard(network)
    ema.shard_as(network)


def train(network: UNet, sharded: bool) -> tuple[TrainState, Prepared]:
    ema = EMA(network, EMAConfig(snapshot_every=1))
    if sharded:
        shard(network, ema)
    optimizer = build_optimizer(network, validate(OptimizerConfig, {"lr": 1e-2}))
    return TrainState(network, optimizer, ema), Prepared(optimizer)


X, TIME, LABELS = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4.0).double(), torch.tensor([0, 1, 2, 3])


def step(state: TrainState, prepared: Prepared, share: slice, ranks: int, *, finite: bool = True) -> torch.Tensor:
    """Gives the norm of all gradients. `share` is that of one of `ranks`."""
    (state.network(X[share], TIME[share], LABELS[share]).square().sum() * ranks / 4).backward()
    norm = full(torch.nn.utils.clip_grad_norm_(state.network.parameters(), 1.0))
    update(prepared, 1e-2, norm if finite else norm * float("nan"))
    state.ema.update(state.network, 100, 50)
    return norm


def round_trip(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    X.copy_(torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(0)))
    everything, half = slice(0, 4), slice(2 * rank, 2 * rank + 2)

    single = train(build(), sharded=False)
    step(*single, everything, ranks=1)
    if rank == 0:
        checkpoint.write_folder(folder / "saved", single[0].tensors(), {})
    dist.barrier()

    # A whole checkpoint goes into parts, and comes back as it was; only who asks for it gets it.
    network = randomise(build(), scale=0.3)
    assert isinstance(network, UNet)
    parts = train(network, sharded=True)
    parts[0].load(folder / "saved")
    for named in (parts[0].network, parts[0].ema.network):
        local_count = sum(parameter.to_local().numel() for parameter in named.parameters())  # pyright: ignore[reportCallIssue]
        assert local_count < 0.55 * parts[0].num_parameters, "half of it, and what does not divide by two"
    back = parts[0].tensors(keep=rank == 0)
    for name, tensors in single[0].tensors().items():
        assert back[name].keys() == (tensors.keys() if rank == 0 else set())
        assert all(torch.equal(back[name][key], tensors[key]) for key in back[name])

    # Steps, one of which is not finite and changes nothing but the EMA: on two halves what they are on the whole.
    for finite in (True, False, True):
        norms = step(*parts, half, ranks=2, finite=finite), step(*single, everything, ranks=1, finite=finite)
        torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
        with torch.no_grad():  # previews see the EMA of now: none before has left anything whole behind
            outputs = [state.ema.network(X[half], TIME[half]) for state in (parts[0], single[0])]
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    gathered = parts[0].tensors()
    for name, tensors in single[0].tensors().items():
        for key, value in tensors.items():
            torch.testing.assert_close(gathered[name][key], value, rtol=0, atol=1e-12)

    with pytest.raises(UserError, match="of another architecture"):
        train(build(16), sharded=True)[0].load(folder / "saved")
    dist.destroy_process_group()


def test_whole_checkpoints_go_into_parts_and_back(tmp_path: Path) -> None:
    mp.spawn(round_trip, args=(tmp_path,), nprocs=2)


def test_muon_is_refused_where_matrices_are_cut() -> None:
    network = build()
    optimizer = build_optimizer(network, validate(OptimizerConfig, {"lr": 1e-2, "muon": {}}))
    with pytest.raises(UserError, match="optimizer.muon needs whole matrices"):
        prepare(cast(Any, SimpleNamespace(is_fsdp2=True)), network, optimizer, EMA(network, EMAConfig()))


def test_a_network_says_which_blocks_are_cut() -> None:
    network, plugin = build(), SimpleNamespace(transformer_cls_names_to_wrap=None)
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    linear = torch.nn.Linear(2, 2)
    for module in (linear, network):
        optimizer = build_optimizer(module, validate(OptimizerConfig, {"lr": 1e-2}))
        with pytest.raises(
            UserError if module is linear else AttributeError, match="Linear names none in fsdp_blocks|native_amp"
        ):
            prepare(cast(Any, accelerator), module, optimizer, EMA(module, EMAConfig()))
    assert plugin.transformer_cls_names_to_wrap == ["Block", "ResidualBlock"]
    names = {type(module).__name__ for module in network.modules()}
    assert set(plugin.transformer_cls_names_to_wrap) <= names
