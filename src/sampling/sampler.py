"""One sampler for previews, sample.py and everything else that draws pictures."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..config import UserError, dump
from ..diffusion import (
    SOLVERS,
    BlendSchedule,
    Denoiser,
    Prediction,
    Process,
    Schedule,
    classifier_free,
    classifier_gradient,
    classifier_guided,
    clip,
    dynamic_threshold,
    inversion_times,
    invertible_solvers,
    is_within,
    on_schedule,
    times,
    transitions,
    within,
)
from ..diffusion.guidance import Gradient
from ..diffusion.schedules import like
from ..diffusion.solvers import Callback
from ..diffusion.variance import Transitions
from ..runs.starts import Bound, Start
from ..runtime.seeds import noise_of
from ..storage.finite import is_finite
from .config import SamplerConfig


class Codec(Protocol):
    """Between pictures (B, C, H, W) in [-1, 1] and what diffusion sees, (B, D, h, w) with unit variance. Pixels have none."""

    def encode(self, images: Tensor, indices: Sequence[int]) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Classifier(Protocol):
    """What guides: the logits (B, K) of pictures noised along its own schedule."""

    @property
    def schedule(self) -> Schedule: ...

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor: ...


class Edit(NamedTuple):
    """What a sampling keeps of a given picture: it starts from it (C, H, W), as the network sees it, where `start_at` steps are
    done, and keeps it where `mask` (1, H, W) is 0. `resamplings` times each step is drawn, noised again in between, so that
    what is drawn and what is kept agree (Alg. 1, Lugmayr et al. 2022, arXiv:2201.09865)."""

    x0: Tensor
    start_at: int = 0
    mask: Tensor | None = None
    resamplings: int = 1


class Sampler:
    """Draws pictures from a network and a process as `spec` says.

    `shape` is (C, H, W) of what the network sees (or (2,) of a point), `codec` what makes pictures of that. `source` draws what
    sampling starts from, where that is not standard normal noise. `clip_x0` are the bounds that the estimate of x_0 is held to,
    numbers or tensors (C, 1, 1). `num_classes` is None for an unconditional network. A UserError says what does not fit, and,
    where `origin` says in words whose network it is (the run and its step), that what it draws is not finite.
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
        classifier: Classifier | None = None,
        source: Start | None = None,
        origin: str | None = None,
    ) -> None:
        self.origin = origin
        if source is not None:
            _refuse_gaussian(spec)
        free = spec.guided and spec.guidance_method == "classifier_free"
        if free and num_classes is None:
            raise UserError("guidance needs a class-conditional network; this one has no classes")
        if free and not guidable:
            raise UserError("guidance needs a network that was trained with label_dropout above 0")
        if spec.guided and spec.guidance_method == "classifier" and classifier is None:
            raise UserError(
                "guidance by a classifier needs one: sample.py takes --classifier RUN, a run of train_classifier.py"
            )
        self.network, self.process, self.spec, self.solver = network, process, spec, SOLVERS[spec.solver]
        self.shape, self.num_classes, self.clip_x0, self.codec = tuple(shape), num_classes, clip_x0, codec
        if spec.threshold is not None and codec is not None:
            raise UserError("dynamic thresholding is for pixels: latents have no bounds at -1 and 1; leave threshold out")
        self.source = source
        self.classifier = classifier if spec.guided and spec.guidance_method == "classifier" else None
        self.dtype = next(network.parameters()).dtype if isinstance(network, nn.Module) else torch.float32
        steps = spec.steps if isinstance(spec.steps, int) else list(spec.steps)
        if spec.alphas is None:
            self.times = times(process.schedule, steps, spec.spacing)
        elif isinstance(process.schedule, BlendSchedule):
            self.times = 1 - torch.tensor(spec.alphas, dtype=torch.float64)
        else:
            raise UserError("alphas belong to the blend; this run has a table of levels: give steps and a spacing")

    def start(self, seed: int, indices: Sequence[int], draw: int = 0) -> Tensor:
        """What the pictures `indices` of `seed` start from, (B, *shape) float32 on the CPU; another `draw` of it is new."""
        if self.source is not None:
            return self.source(seed, indices, draw)
        return noise_of(seed, indices, self.shape, draw)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def calls(self, edit: Edit | None = None) -> int:
        """Network calls for one batch."""
        each = self.solver.calls_per_step
        first, times = (edit.start_at, edit.resamplings if edit.mask is not None else 1) if edit is not None else (0, 1)
        done = range(first, self.steps if self.spec.stop_at is None else self.spec.stop_at)
        again = range(self.spec.double_sampling, self.steps) if self.spec.double_sampling is not None else range(0)
        last = each if self.process.schedule.network_at_clean else 1
        made = [(i, times * (each if i < self.steps - 1 else last)) for part in (done, again) for i in part]
        made += [(self.spec.stop_at, 1)] if self.spec.stop_at is not None else []
        free = self.spec.guided and self.spec.guidance_method == "classifier_free"
        return sum(count * (2 if free and self._guides(self.times[i]) else 1) for i, count in made)

    def _guides(self, t: Tensor) -> bool:
        levels = self.spec.guidance_interval
        return levels is None or is_within(levels, self.process.schedule, t)

    def _gradient(self, labels: Tensor | None) -> Gradient | None:
        if self.classifier is None:
            return None
        assert labels is not None
        logits = on_schedule(self.classifier.logits, self.classifier.schedule, self.process.schedule)
        return classifier_gradient(logits, labels, self.spec.guidance)

    def _denoiser(self, labels: Tensor | None, gradient: Gradient | None, low: Tensor | None) -> Denoiser:
        """Guidance, then clipping. A classifier shifts the eps of the clipped estimate, as in guided-diffusion, which does not
        clip again; in almost pure noise, where sigma^2 / alpha is large, the shift would throw x0 far out."""
        schedule, spec = self.process.schedule, self.spec
        condition = {} if self.num_classes is None or labels is None else {"labels": labels}
        condition |= {"low": low} if low is not None else {}
        plain = self.process.denoiser(self.network, **condition)

        def bounded(denoiser: Denoiser) -> Denoiser:
            if spec.threshold is not None:
                return dynamic_threshold(denoiser, schedule, spec.threshold)
            return clip(denoiser, schedule, *self.clip_x0) if self.clip_x0 is not None else denoiser

        guided = outside = bounded(plain)
        if gradient is not None and not self.solver.takes("mean_shift"):
            guided = bounded(classifier_guided(outside, gradient, schedule))
        elif gradient is None and spec.guided and labels is not None:
            nobody = torch.full((len(labels),), self.num_classes or 0, device=labels.device)
            null = {**condition, "labels": nobody}
            guided = bounded(classifier_free(plain, self.process.denoiser(self.network, **null), spec.guidance))
        if spec.guidance_interval is not None and guided is not outside:
            return within(spec.guidance_interval, guided, outside, schedule)
        return guided

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """What the network sees (B, *shape) as pictures (B, C, H, W)."""
        if self.codec is None:
            return x
        decoded = self.codec.decode(x)
        if self.origin is not None and not is_finite(decoded) and is_finite(x):
            raise UserError(
                f"the autoencoder of {self.origin} makes images that are not finite (NaN or infinity) of finite latents; draw "
                "from an earlier checkpoint, or on another device (--device)"
            )
        return decoded

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
        edit: Edit | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """The pictures `indices` of `seed`, (len(indices), C, H, W) in about [-1, 1], on the device. A callback sees what the
        network sees. An upsampler is given the pictures that it makes larger, `low` (len(indices), C, h, w).

        The network runs at `batch_size` (padded with the last picture), so a picture does not depend on how many are asked.
        """
        padded = [*indices, *[indices[-1]] * ((batch_size or len(indices)) - len(indices))]
        classes = None
        if self.num_classes is not None or self.classifier is not None:
            chosen = list(labels) if labels is not None else [self.num_classes or 0] * len(indices)
            classes = torch.tensor([*chosen, *[chosen[-1]] * (len(padded) - len(indices))], device=device)
        x = self.start(seed, padded).to(device, self.dtype)
        if low is not None:
            low = torch.cat([low, low[-1:].expand(len(padded) - len(indices), -1, -1, -1)]).to(x)
        x = self.move(x, classes, seed=seed, indices=padded, callback=callback, edit=edit, low=low)
        return self.decode(x)[: len(indices)]

    @torch.no_grad()
    def move(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        indices: Sequence[int] = (),
        callback: Callback | None = None,
        edit: Edit | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """From the source to the data, both (B, *shape) as the network sees them. Labels are (B,), or (B, classes and null
        class) weights that blend them; what a step draws anew is that of the pictures `indices` of `seed`."""
        indices = indices or range(len(x))

        def noise(step: int, like: Tensor, sweep: int = 0) -> Tensor:
            return noise_of(seed, indices, self.shape, step + 1, sweep).to(like)

        def source(step: int, like: Tensor, sweep: int = 0) -> Tensor:
            return self.start(seed, indices, step + 1 + sweep * (self.steps + 1)).to(like)

        way = _Way(self, labels, noise, callback, low, source)
        first = edit.start_at if edit is not None else 0
        if edit is not None and first:
            x = self.process.add_noise(edit.x0.to(x).expand_as(x), x, self.times[first])
        if self.spec.stop_at is not None and first >= self.spec.stop_at:
            raise UserError(f"start_at {first} is not before stop_at {self.spec.stop_at}: nothing would be drawn")
        if edit is not None and edit.mask is not None and self.solver.multistep:
            raise UserError(f"{self.spec.solver} remembers the step before, which a mask changes; use another solver")
        x = way.go(x, first, self.spec.stop_at or self.steps, edit)
        if self.spec.stop_at is not None:
            x = way.estimate(x, self.spec.stop_at, edit)
        if self.spec.double_sampling is not None:
            x = way.again(x, self.spec.double_sampling, edit)
        self._check_finite(x, way.finite)
        return x

    def _check_finite(self, x: Tensor, steps: Sequence[tuple[int, Tensor]] = ()) -> None:
        """A UserError where what was drawn is not finite: whose network it is, and at which of the steps that began, each with
        whether its estimate was finite."""
        if self.origin is None or is_finite(x):
            return
        first = next((step for step, finite in steps if not bool(finite)), None)
        since = f", from sampling step {first + 1} of {self.steps} on" if first is not None else ""
        raise UserError(
            f"the samples of {self.origin} are not finite (NaN or infinity){since}; draw from an earlier checkpoint, or with "
            "another --solver, more --steps or less --guidance"
        )

    def check_invertible(self) -> None:
        """A UserError where the solver's way cannot be gone back."""
        if self.solver.inverse is None or self.spec.eta:
            those = ", ".join(invertible_solvers())
            raise UserError(f"the solver {self.spec.solver} cannot be gone back; allowed: {those} (with eta 0)")

    @torch.no_grad()
    def invert(self, x0: Tensor, labels: Tensor | None = None, *, callback: Callback | None = None) -> Tensor:
        """From the data back to the source, both (B, *shape) as the network sees them: the solver's way in the other direction.

        On a table it begins at the first trained level, where the picture has the size that it has there.
        """
        self.check_invertible()
        solve, schedule = self.solver.inverse, self.process.schedule
        assert solve is not None
        way = inversion_times(self.times, schedule)
        x = like(schedule.level(way[0]).alpha, x0) * x0
        x = solve(self._denoiser(labels, None, None), x, way, schedule, callback=callback)
        self._check_finite(x)
        return x


def _refuse_gaussian(spec: SamplerConfig) -> None:
    """A UserError for what assumes that sampling starts from Gaussian noise."""
    asked = {
        f"the solver {spec.solver}": SOLVERS[spec.solver].gaussian,
        "eta": spec.eta > 0,
        "double_sampling": spec.double_sampling is not None,
        "guidance by a classifier": spec.guided and spec.guidance_method == "classifier",
    }
    found = [word for word, is_asked in asked.items() if is_asked]
    if found:
        others = ", ".join(name for name, solver in SOLVERS.items() if not solver.gaussian)
        raise UserError(f"{found[0]} assumes Gaussian noise at the start, and this run starts from other data; use {others}")


class _Way:
    """One batch on its way along the sampler's times. `sweep` counts how often a step was taken before: its noise is new."""

    def __init__(
        self,
        sampler: Sampler,
        labels: Tensor | None,
        noise: Callable[..., Tensor],
        callback: Callback | None,
        low: Tensor | None = None,
        source: Callable[..., Tensor] | None = None,
    ) -> None:
        self.sampler, self.noise, self.callback, self.sweep = sampler, noise, callback, 0
        self.source = source
        self.finite: list[tuple[int, Tensor]] = []  # of each step, whether its estimate was: on the device, for nobody to wait
        self.gradient = sampler._gradient(labels)
        self.denoiser = sampler._denoiser(labels, self.gradient, low)

    def _shift(self, x_t: Tensor, t: Tensor, variance: Tensor) -> Tensor:
        assert self.gradient is not None
        return variance * self.gradient(x_t, t) if self.sampler._guides(t) else torch.zeros_like(x_t)

    def _solve(self, x: Tensor, first: int, end: int) -> Tensor:
        """From where `first` steps are done to where `end` are."""
        spec, process = self.sampler.spec, self.sampler.process
        part, schedule = self.sampler.times[first : end + 1], process.schedule

        def told(step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
            if self.sampler.origin is not None:
                self.finite.append((first + step, torch.isfinite(prediction.x0).all()))
            if self.callback is not None:
                self.callback(first + step, t, x_t, prediction)

        def noise(step: int, like: Tensor) -> Tensor:
            return self.noise(first + step, like, self.sweep)

        def source(step: int, like: Tensor) -> Tensor:
            assert self.source is not None
            return self.source(first + step, like, self.sweep)

        def transitions_of_part() -> Transitions:
            return Transitions(*(values[first:end] for values in transitions(schedule, self.sampler.times)))

        arguments = {  # of these a solver is given what it takes
            "noise": lambda: noise,
            "source": lambda: source,
            "eta": lambda: spec.eta,
            "variance": lambda: process.variance,
            "mean_shift": lambda: self._shift if self.gradient is not None else None,
            "steps": transitions_of_part,
        }
        solver = self.sampler.solver
        options = {name: value() for name, value in arguments.items() if solver.takes(name)}
        return solver.function(self.denoiser, x, part, schedule, callback=told, **options)

    def go(self, x: Tensor, first: int, end: int, edit: Edit | None) -> Tensor:
        """The same, held to what an edit keeps."""
        if edit is None or edit.mask is None:
            return self._solve(x, first, end)
        process, times, n = self.sampler.process, self.sampler.times, self.sampler.steps
        alpha, sigma = process.schedule.level(times)
        kept, mask, before = edit.x0.to(x).expand_as(x), edit.mask.to(x), self.sweep
        for i in range(first, end):
            for self.sweep in range(before, before + edit.resamplings):
                if self.sweep > before:
                    ratio = alpha[i] / alpha[i + 1]
                    spread = (sigma[i] ** 2 - ratio**2 * sigma[i + 1] ** 2).sqrt()
                    x = like(ratio, x) * x + like(spread, x) * self.noise(2 * n + i, x, self.sweep)
                x = self._solve(x, i, i + 1)
                noised = process.add_noise(kept, self.noise(n + i, x, self.sweep), times[i + 1])
                x = mask * x + (1 - mask) * noised
        return x

    def estimate(self, x: Tensor, step: int, edit: Edit | None) -> Tensor:
        """The estimate of x_0 where `step` steps are done, and what an edit keeps."""
        t = self.sampler.times[step]
        prediction = self.denoiser(x, t)
        if self.callback is not None:
            self.callback(step, t, x, prediction)
        if edit is None or edit.mask is None:
            return prediction.x0
        mask = edit.mask.to(x)
        return mask * prediction.x0 + (1 - mask) * edit.x0.to(x)

    def again(self, x0: Tensor, first: int, edit: Edit | None) -> Tensor:
        """The finished picture noised again to where `first` steps are done, and denoised once more."""
        self.sweep += 1
        x = self.sampler.process.add_noise(x0, self.noise(3 * self.sampler.steps, x0, self.sweep), self.sampler.times[first])
        return self.go(x, first, self.sampler.steps, edit)


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


def describe(sampler: Sampler, seed: int, edit: Edit | None = None) -> dict[str, Any]:
    """What is needed to draw the same pictures again, besides the weights."""
    return {**dump(sampler.spec), "seed": seed, "network_calls": sampler.calls(edit)}
