"""One step of a codebook: what the micro-batches of all ranks say, added up, then one update."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ..models.vae import Codebook, Reconstruction
from ..runtime.seeds import generator


class CodebookStep:
    """`latents` is the shape (B, D, h, w) of the whole batch's. Which vectors of it would take the place of dead codes is a
    function of (seed, step), whoever holds them."""

    def __init__(self, codebook: Codebook, latents: Sequence[int], seed: int, step: int) -> None:
        self.codebook = codebook
        rng, codes, device = generator(seed, "codes", step), codebook.spec.codes, codebook.codebook.device
        self._image = torch.from_numpy(rng.integers(latents[0], size=codes)).to(device)
        self._place = torch.from_numpy(rng.integers(latents[2] * latents[3], size=codes)).to(device)
        self._sums: Tensor | None = None

    def add(self, outputs: Reconstruction, local_slice: slice) -> Tensor:
        """Count the codes of the micro-batch that is this slice of the batch; gives the vectors of its codes, (b, D, h, w)."""
        assert outputs.codes is not None
        sums = self.codebook.statistics(outputs.mean.detach(), outputs.codes, self._image - local_slice.start, self._place)
        self._sums = sums if self._sums is None else self._sums + sums
        return self.codebook.look_up(outputs.codes)

    def update(self, accelerator: Accelerator, finite: Tensor) -> None:
        """The codebook follows, unless `finite` () bool says that this step's gradients were not finite."""
        assert self._sums is not None
        sums = accelerator.reduce(self._sums)
        assert isinstance(sums, Tensor)
        self.codebook.update(sums, finite)
