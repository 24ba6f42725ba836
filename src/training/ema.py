"""Exponential moving averages of the weights, and averages of other lengths made of what was kept of them."""

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config import Length, UserError, config, quoted, read_json
from ..runtime.checkpoint import read_tensors, verify_checkpoint, write_folder
from ..runtime.sharding import shard_as
from ..runtime.stream import BatchPlan

WIDTHS = (0.05, 0.1)  # of the averages that snapshots are taken of


@config
class EMAConfig:
    """`half_life_images`: after so many images a weight counts half; early on, `ramp_up` times the images seen.

    Every `snapshot_every` and at the end, two averages more go into RUN/ema, of which posthoc_ema.py makes the average of any
    length once the run is over: two more copies of the network in memory and in each checkpoint, and in each snapshot, there
    in half precision.
    """

    half_life_images: float = pydantic.Field(500_000, gt=0)
    ramp_up: float | None = pydantic.Field(0.05, gt=0)
    snapshot_every: Length | None = None


class EMA:
    """Float32 copies of a network (float64 of a float64 one) whose weights follow: `network` is what previews use, `networks`
    all of them by the name of their file.

    Eq. (App. F), Karras et al. 2022, arXiv:2206.00364: beta = 0.5^(batch / half life). Those that snapshots are taken of have
    beta(t) = (1 - 1 / t)^(gamma + 1), gamma by their width: Karras et al. 2023, arXiv:2312.02696.
    """

    def __init__(self, network: nn.Module, spec: EMAConfig) -> None:
        self.spec = spec
        self._exponents = {average_name(width): exponent(width) for width in WIDTHS} if spec.snapshot_every is not None else {}
        self.networks: dict[str, Any] = {
            name: copy.deepcopy(network).eval().requires_grad_(False) for name in ("ema", *self._exponents)
        }
        self.network = self.networks["ema"]
        self.averages = {name: self.networks[name] for name in self._exponents}  # that snapshots are taken of

    def shard_as(self, network: nn.Module) -> None:
        """Cut them as FSDP has cut `network`, before the first update: the same values, each process with its part."""
        for follower in self.networks.values():
            shard_as(follower, network)

    @cached_property
    def _parameters(self) -> dict[str, list[Tensor]]:
        return {name: list(follower.parameters()) for name, follower in self.networks.items()}

    def decay(self, images_seen: int, batch_size: int, name: str = "ema") -> float:
        """How much of an old average is kept by the update after `images_seen` images, the last `batch_size` of them new."""
        if name in self._exponents:
            return (1 - batch_size / images_seen) ** (self._exponents[name] + 1)
        half_life = self.spec.half_life_images
        if self.spec.ramp_up is not None:
            half_life = min(half_life, max(1.0, images_seen * self.spec.ramp_up))
        return 0.5 ** (batch_size / half_life)

    def update_after(self, step: int | None, network: nn.Module, batch_plan: BatchPlan) -> None:
        """Take in the weights of `network` after this step of the run; nothing for None, of a step that was not finite."""
        if step is not None:
            self.update(network, batch_plan.images_at(step), batch_plan.batch)

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move towards the weights of `network`, which have seen `images_seen` images, the last `batch_size` in one step."""
        theirs: list[Tensor] = list(network.parameters())
        for name, follower in self.networks.items():
            weight = 1 - self.decay(images_seen, batch_size, name)
            torch._foreach_lerp_(self._parameters[name], theirs, weight)  # pyright: ignore[reportPrivateImportUsage]
            for follower_buffer, buffer in zip(follower.buffers(), network.buffers(), strict=True):
                follower_buffer.copy_(buffer)


# ---------------------------------------------------------------------------------------------- of any length, afterwards


def average_name(width: float) -> str:
    return f"ema_{width:g}"


def exponent(width: float) -> float:
    """gamma of the average in which the weights of time tau count as tau^gamma, whose standard deviation is `width` (above 0,
    below 0.288) of the time of training: the root of width = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)).

    Karras et al. 2023, arXiv:2312.02696.
    """
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def post_hoc_weights(snapshots: Sequence[tuple[float, int]], width: float) -> tuple[NDArray[np.float64], float]:
    """What each snapshot (an average's width, after so many images) counts in the average of `width` at the end of the latest,
    by least squares of the weight over time; and the root of the squares that are left, as a part of those of the average
    itself.

    Karras et al. 2023, arXiv:2312.02696: A x = b of the products of p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1).
    """
    end = max(images for _, images in snapshots)
    times = np.array([images / end for _, images in snapshots])
    gammas = np.array([exponent(snapshot_width) for snapshot_width, _ in snapshots])

    def product(gamma_a: Any, t_a: Any, gamma_b: Any, t_b: Any) -> NDArray[np.float64]:
        total = gamma_a + gamma_b + 1
        shared = total * np.log(np.minimum(t_a, t_b)) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
        return (gamma_a + 1) * (gamma_b + 1) / total * np.exp(shared)

    gamma = exponent(width)
    products = product(gammas[:, None], times[:, None], gammas, times)
    wanted, norm = product(gammas, times, gamma, 1.0), float(product(gamma, 1.0, gamma, 1.0))
    weights = np.asarray(np.linalg.lstsq(products, wanted, rcond=1e-12)[0], np.float64)
    left = norm - 2 * weights @ wanted + weights @ products @ weights
    return weights, float(np.sqrt(max(left, 0.0) / norm))


def post_hoc(run: Path, last_step: int, width: float) -> tuple[Path, float]:
    """Write the average of `width` at the last snapshot of `run` up to `last_step` into its folder `ema`, as a final folder is
    written. Gives the folder, and what of the average is missed (see post_hoc_weights). A UserError where there is no snapshot,
    or one is damaged."""
    folders = sorted(path for path in (run / "ema").glob("step_*") if int(path.name.removeprefix("step_")) <= last_step)
    if not folders:
        raise UserError(f"{run} kept no averages to make others of: train it with ema.snapshot_every")
    for folder in folders:
        if (reason := verify_checkpoint(folder)) is not None:
            raise UserError(
                f"{folder} is damaged: {reason}; without it there are fewer to make averages of: rm -r {quoted(folder)}"
            )
    places = [(folder, each) for folder in folders for each in WIDTHS]
    snapshots = [(each, read_json(folder / "progress.json")["images"]) for folder, each in places]
    weights, missed = post_hoc_weights(snapshots, width)
    average: dict[str, Tensor] = {}
    for (folder, each), weight in zip(places, weights, strict=True):
        for name, tensor in read_tensors(folder, average_name(each)).items():
            part = tensor.to(torch.float64) * float(weight)
            average[name] = average[name] + part if name in average else part
    out = run / "ema" / f"width_{width:g}"
    documents = {name: read_json(folders[-1] / f"{name}.json") for name in ("config", "data", "progress")}
    write_folder(out, {"ema": {name: tensor.to(torch.float32) for name, tensor in average.items()}}, documents)
    return out, missed
