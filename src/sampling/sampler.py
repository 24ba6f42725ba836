"""One sampler for previews, sample.py and everything else that draws pictures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from ..config import UserError, config
from ..diffusion import DETERMINISTIC, Denoiser, Process, ancestral, classifier_free, clip, ddim, times
from ..diffusion.schedules import Spacing
from ..diffusion.solvers import Callback, Noise

Bound = float | Tensor


@config
class SamplerConfig:
    """How pictures are drawn: the solver, its steps and their spacing, DDIM's eta, and the scale of classifier-free guidance
    (1 is none)."""

    solver: Literal["euler", "midpoint", "heun", "rk4", "dpmpp_2m", "ddim", "ancestral"] = "ddim"
    steps: int | tuple[int, ...] = 50
    spacing: Spacing = "even"
    eta: float = pydantic.Field(0.0, ge=0)
    guidance: float = 1.0

    @pydantic.model_validator(mode="after")
    def _used(self) -> "SamplerConfig":
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta belongs to the solver ddim, not to {self.solver}")
        return self

    def without_guidance(self, unguided: bool = True) -> "SamplerConfig":
        return replace(self, guidance=1.0) if unguided else self


class Codec(Protocol):
    """Between pictures (B, C, H, W) in [-1, 1] and what diffusion sees, (B, D, h, w) with unit variance. Pixels have none."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def noise_of(seed: int, indices: Sequence[int], shape: Sequence[int], step: int = 0) -> Tensor:
    """Standard normal noise, (len(indices), *shape) float32 on the CPU: a function of (seed, picture, step) alone.

    Philox (Salmon et al. 2011) with (seed, picture) as its key and the step in its counter.
    """
    drawn = []
    for i in indices:
        bits = np.random.Philox(key=np.array([seed, i], dtype=np.uint64), counter=np.array([0, 0, 0, step], dtype=np.uint64))
        drawn.append(np.random.Generator(bits).standard_normal(tuple(shape), dtype=np.float32))
    return torch.from_numpy(np.stack(drawn))


def starting_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """What the pictures `indices` start from, (B, *shape)."""
    return noise_of(seed, indices, shape)


class Sampler:
    """Draws pictures from a network and a process as `spec` says.

    `shape` is (C, H, W) of what the network sees, `codec` what makes pictures of that. `clip_x0` are the bounds that the
    estimate of x_0 is held to, numbers or tensors (C, 1, 1). `num_classes` is None for an unconditional network. A UserError
    says what does not fit.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        process: Process,
        spec: SamplerConfig,
        *,
        shape: Sequence[int],
        num_classes: int | None,
        clip_x0: tuple[Bound, Bound] | None,
        guidable: bool = True,
        codec: Codec | None = None,
    ) -> None:
        if spec.guidance != 1 and num_classes is None:
            raise UserError("guidance needs a class-conditional network; this one has no classes")
        if spec.guidance != 1 and not guidable:
            raise UserError("guidance needs a network that was trained with label_dropout above 0")
        self.network, self.process, self.spec = network, process, spec
        self.shape, self.num_classes, self.clip_x0, self.codec = tuple(shape), num_classes, clip_x0, codec
        self.dtype = next(network.parameters()).dtype if isinstance(network, nn.Module) else torch.float32
        steps = spec.steps if isinstance(spec.steps, int) else list(spec.steps)
        self.times = times(process.schedule, steps, spec.spacing)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def calls(self) -> int:
        """Network calls for one batch."""
        each = {"midpoint": 2, "heun": 2, "rk4": 4}.get(self.spec.solver, 1)
        last = each if self.process.schedule.network_at_clean else 1
        return ((self.steps - 1) * each + last) * (1 if self.spec.guidance == 1 else 2)

    def _denoiser(self, labels: Tensor | None) -> Denoiser:
        denoiser = self.process.denoiser(self.network, **({} if labels is None else {"labels": labels}))
        if self.spec.guidance != 1 and labels is not None:
            null = torch.full_like(labels, self.num_classes or 0)
            unconditional = self.process.denoiser(self.network, labels=null)
            denoiser = classifier_free(denoiser, unconditional, self.spec.guidance)
        return clip(denoiser, self.process.schedule, *self.clip_x0) if self.clip_x0 is not None else denoiser

    @torch.no_grad()
    def pictures(self, x: Tensor) -> Tensor:
        """What the network sees (B, *shape) as pictures (B, C, H, W)."""
        return self.codec.decode(x) if self.codec is not None else x

    @torch.no_grad()
    def draw(
        self,
        seed: int,
        indices: Sequence[int],
        labels: Sequence[int] | None,
        *,
        device: torch.device,
        callback: Callback | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """The pictures `indices` of `seed`, (len(indices), C, H, W) in about [-1, 1], on the device. A callback sees what the
        network sees.

        The network runs at `batch_size` (padded with the last picture), so a picture does not depend on how many are asked.
        """
        padded = [*indices, *[indices[-1]] * ((batch_size or len(indices)) - len(indices))]
        classes = None
        if self.num_classes is not None:
            chosen = list(labels) if labels is not None else [self.num_classes] * len(indices)
            classes = torch.tensor([*chosen, *[chosen[-1]] * (len(padded) - len(indices))], device=device)
        x = starting_noise(seed, padded, self.shape).to(device, self.dtype)

        def noise(step: int, like: Tensor) -> Tensor:
            return noise_of(seed, padded, self.shape, step + 1).to(like)

        x = self._solve(self._denoiser(classes), x, noise, callback)
        return self.pictures(x)[: len(indices)]

    def _solve(self, denoiser: Denoiser, x: Tensor, noise: Noise, callback: Callback | None) -> Tensor:
        schedule = self.process.schedule
        if self.spec.solver == "ddim":
            return ddim(denoiser, x, self.times, schedule, noise=noise, eta=self.spec.eta, callback=callback)
        if self.spec.solver == "ancestral":
            variance = self.process.variance
            return ancestral(denoiser, x, self.times, schedule, noise=noise, variance=variance, callback=callback)
        return DETERMINISTIC[self.spec.solver](denoiser, x, self.times, schedule, callback=callback)


def random_labels(seed: int, indices: Sequence[int], num_classes: int) -> list[int]:
    """A class for each picture, a function of (seed, picture)."""
    return [
        int(
            np.random.Generator(
                np.random.Philox(key=np.array([seed, i], dtype=np.uint64), counter=[0, 0, 1 << 32, 0])
            ).integers(num_classes)
        )
        for i in indices
    ]


def describe(sampler: Sampler, seed: int) -> dict[str, Any]:
    """What is needed to draw the same pictures again, besides the weights."""
    spec = sampler.spec
    steps = spec.steps if isinstance(spec.steps, int) else list(spec.steps)
    return {
        "solver": spec.solver,
        "steps": steps,
        "spacing": spec.spacing,
        "eta": spec.eta,
        "guidance": spec.guidance,
        "seed": seed,
        "network_calls": sampler.calls,
    }
