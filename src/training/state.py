"""What a checkpoint holds besides the step: weights, moments, EMA, and the losses since the last line of the log."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import UserError
from ..runtime import checkpoint
from ..runtime.sharding import on_cpu
from .ema import EMA
from .optimizer import Muon, load_optimizer_state, optimizer_state
from .step_noise import TimeSampler

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainState:
    """A network with its optimiser and its EMA, an adversary with its own, what `times` has learned, and a `projection` that
    the network's optimiser trains: to tensors keyed by parameter name, and back."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        adversary: tuple[nn.Module, torch.optim.Optimizer] | None = None,
        times: TimeSampler | None = None,
        projection: nn.Module | None = None,
    ) -> None:
        self.network, self.ema, self._times = network, ema, times if times is not None and times.learns else None
        self._pairs = {("model", "optimizer"): (network, optimizer)}
        if adversary is not None:
            self._pairs["discriminator", "discriminator_optimizer"] = adversary
        if projection is not None:
            self._pairs["projection", "projection_optimizer"] = projection, optimizer

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The EMA weights, whole, on the CPU: what a finished run leaves. All ranks call it; those that need nothing say so."""
        return on_cpu(self.ema.network.state_dict(), keep=keep)

    def tensors(self, *, keep: bool = True) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds, likewise."""
        state = {name: on_cpu(network.state_dict(), keep=keep) for name, network in self.ema.networks.items()}
        for (name, moments), (network, optimizer) in self._pairs.items():
            state[name] = on_cpu(network.state_dict(), keep=keep)
            state[moments] = optimizer_state(optimizer, network, keep=keep)
        return state if self._times is None else {**state, "times": self._times.tensors()}

    def averages(self, *, keep: bool = True) -> dict[str, dict[str, Tensor]]:
        """What a snapshot holds for post-hoc averages, in half precision, likewise."""
        states = {name: on_cpu(network.state_dict(), keep=keep) for name, network in self.ema.averages.items()}
        return {name: {key: value.half() for key, value in tensors.items()} for name, tensors in states.items()}

    def load(self, folder: Path) -> None:
        """Put a checkpoint's tensors back; one of another architecture is a UserError. A projection stays as it is where
        the run went on from one without."""
        pairs = {
            names: pair
            for names, pair in self._pairs.items()
            if names[0] != "projection" or (folder / "projection.safetensors").exists()
        }
        networks = self.ema.networks | {name: network for (name, _), (network, _) in pairs.items()}
        for name, network in networks.items():
            checkpoint.load_weights(network, checkpoint.read_tensors(folder, name), folder)
        for (_, moments), (network, optimizer) in pairs.items():
            load_optimizer_state(optimizer, network, checkpoint.read_tensors(folder, moments))
        if self._times is not None:
            self._times.load(checkpoint.read_tensors(folder, "times", finite=False))  # it passes over losses that are not


def prepare(
    accelerator: "Accelerator", network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA
) -> tuple[nn.Module, Any]:
    """accelerate's `prepare` of a network and its optimiser. With FSDP these and the EMA, whole until now, are cut in place,
    and each process goes on with its part; from then on all of them call what runs the networks or gathers tensors."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare(network, optimizer)
    if isinstance(optimizer, Muon):
        raise UserError(
            "optimizer.muon needs whole matrices, and FSDP cuts them: set optimizer.muon to null, or launch without"
        )
    blocks = getattr(network, "fsdp_blocks", ())
    if not blocks:
        raise UserError(
            f"FSDP cuts a network block by block, and {type(network).__name__} names none in fsdp_blocks; launch without FSDP"
        )
    assert accelerator.state.fsdp_plugin is not None
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(blocks)
    moments = optimizer_state(optimizer, network)
    optimizer.state.clear()  # accelerate moves the optimiser's parameters to the parts, and leaves the moments behind
    for module in (network, *ema.networks.values()):  # FSDP cuts rows, and takes no channels_last
        module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    if accelerator.native_amp:
        from accelerate.utils import convert_outputs_to_fp32

        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        network.forward = convert_outputs_to_fp32(autocast(network.forward))
    model, prepared = accelerator.prepare(network, optimizer)
    load_optimizer_state(optimizer, network, moments)
    ema.shard_as(network)
    return model, prepared


class Meter:
    """The means of named losses over a stretch of steps. They stay on the device until they are read; what is not finite is
    not counted."""

    def __init__(self, accelerator: "Accelerator", saved: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        for name, sums in (saved or {}).items():
            start = [sums["sum"], sums["count"]] if accelerator.is_main_process else [0.0, 0.0]
            self._sums[name] = torch.tensor(start, device=accelerator.device)

    def add(self, images: int, **losses: Tensor) -> None:
        """Each loss () is a sum over `images`."""
        for name, loss in losses.items():
            finite = torch.isfinite(loss)
            new = torch.stack([torch.where(finite, loss, 0), finite * images]).detach().to(torch.float32)
            self._sums[name] = self._sums[name] + new if name in self._sums else new

    def saved(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps of it, all ranks together."""
        if not self._sums:
            return {}
        summed: Any = self._accelerator.reduce(torch.stack(list(self._sums.values())))
        return {name: {"sum": total, "count": count} for name, (total, count) in zip(self._sums, summed.tolist(), strict=True)}

    def read(self) -> dict[str, float]:
        """The means over all ranks since the last reading; NaN where nothing was counted."""
        saved = self.saved()
        self._sums = {}
        return {name: sums["sum"] / sums["count"] if sums["count"] else float("nan") for name, sums in saved.items()}
