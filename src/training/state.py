"""What a checkpoint holds besides the step: weights, moments, EMA, and the loss since the last line of the log."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import checkpoint
from .ema import EMA
from .optimizer import load_optimizer_state, optimizer_state


class Trained:
    """A network with its optimiser and its EMA: to tensors keyed by parameter name, and back."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> None:
        self.network, self.optimizer, self.ema = network, optimizer, ema
        self._names = {parameter: name for name, parameter in network.named_parameters()}

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._names)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "model": {name: value.detach().cpu() for name, value in self.network.state_dict().items()},
            "ema": {name: value.detach().cpu() for name, value in self.ema.network.state_dict().items()},
            "optimizer": optimizer_state(self.optimizer, self._names),
        }

    def load(self, folder: Path) -> None:
        """Put a checkpoint's tensors back; one of another architecture is a UserError."""
        checkpoint.load_weights(self.network, checkpoint.read_tensors(folder, "model"), folder)
        checkpoint.load_weights(self.ema.network, checkpoint.read_tensors(folder, "ema"), folder)
        load_optimizer_state(self.optimizer, self._names, checkpoint.read_tensors(folder, "optimizer"))


class Meter:
    """The mean loss of a stretch of steps. It stays on the device until it is read; what is not finite is not counted."""

    def __init__(self, accelerator: Accelerator, saved: dict[str, float] | None = None) -> None:
        self._accelerator = accelerator
        self._sums = torch.zeros(2, device=accelerator.device)
        if saved is not None and accelerator.is_main_process:
            self._sums += torch.tensor([saved["sum"], saved["count"]], device=accelerator.device)

    def add(self, loss: Tensor, images: int) -> None:
        """`loss` () is a sum over `images`."""
        finite = torch.isfinite(loss)
        self._sums += torch.stack([torch.where(finite, loss, 0), finite * images]).to(self._sums.dtype)

    def saved(self) -> dict[str, float]:
        """What a checkpoint keeps of it, all ranks together."""
        summed: Any = self._accelerator.reduce(self._sums)
        total, count = summed.tolist()
        return {"sum": total, "count": count}

    def read(self) -> float:
        """The mean over all ranks since the last reading; NaN where nothing was counted."""
        saved = self.saved()
        self._sums.zero_()
        return saved["sum"] / saved["count"] if saved["count"] else float("nan")
