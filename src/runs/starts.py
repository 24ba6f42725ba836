"""Where sampling starts, if that is not Gaussian noise; and the range of latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.seeds import generator
from ..runtime.stream import Examples

Bound = float | Tensor
Start = Callable[[int, Sequence[int], int], Tensor]  # (seed, indices of images, draw) -> (B, *shape) on the CPU


@dataclass(frozen=True)
class SourceSampler:
    """A Start for sampling: the examples, in an order that is a function of (seed, draw)."""

    examples: Examples

    def __call__(self, seed: int, indices: Sequence[int], draw: int = 0) -> Tensor:
        order = generator(seed, "source", draw).permutation(len(self))
        return self.examples.load(order[np.array(indices, dtype=np.int64) % len(self)]).float().cpu()

    def __len__(self) -> int:
        return len(self.examples.labels)


def latent_bounds(facts: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The lowest and highest value of each channel over all latents, from the facts of a latent run: (D, 1, 1) each."""
    low, high = (torch.tensor(facts[key], device=device)[:, None, None] for key in ("low", "high"))
    return low, high
