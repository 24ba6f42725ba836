"""The sampler, which previews, sample.py and all else draw images with. It is long, since all of a batch's way is here."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import UserError, dump
from ..config.sizes import describe_size, is_divisible
from ..data.conditions import Condition
from ..data.names import join_names, same_names
from ..diffusion import (
    SOLVERS,
    BlendSchedule,
    Denoiser,
    Prediction,
    Process,
    guidance,
    inversion_times,
    shift_times,
    times,
    transitions,
)
from ..diffusion.schedules import like
from ..diffusion.solvers import Callback, invertible_solvers
from ..diffusion.variance import Transitions
from ..runs.autoencoder import LatentCodec
from ..runs.classifier import OpenedClassifier
from ..runs.densities import Bound, SourceSampler, Start
from ..runs.opened import Opened, Run
from ..runtime.seeds import noise_of
from ..runtime.stream import Examples
from ..storage.finite import is_finite
from .autoguidance import Guide, guided_run, open_guide
from .config import SamplerConfig
from .edit import Edit


class Sampler:
    """Draws images from a network and a process as `spec` says.

    `shape` is (C, H, W) of what the network sees (or (2,) of a point), `codec` decodes that to images. `source` draws what
    sampling starts from, where that is not standard normal noise. `clip_x0` are the bounds of the estimate of x_0, numbers or
    tensors (C, 1, 1). `num_classes` is None for an unconditional network, `guidable` says whether the network learned to go
    without a class. `shapes` says how many images of each shape the run was trained on, where they are several. A UserError
    says what does not fit together, and, where `origin` names the network (its run and step), that the samples are not finite.
    A network that draws from a `condition` is given one for each image, in previews those of the examples `conditioned`;
    `condition_guidance` is the scale of its guidance (1 is none), for which the network must have learned to go without
    (`condition_guidable`). With a `guide`, the scale of the guidance is that of autoguidance by it.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        process: Process,
        spec: SamplerConfig,
        *,
        shape: Sequence[int],
        num_classes: int | None,
        clip_x0: tuple[Bound, Bound] | None = None,
        guidable: bool = True,
        codec: LatentCodec | None = None,
        classifier: OpenedClassifier | None = None,
        source: Start | None = None,
        origin: str | None = None,
        shapes: Mapping[tuple[int, ...], int] | None = None,
        condition: Condition | None = None,
        conditioned: Examples | None = None,
        condition_guidance: float = 1.0,
        condition_guidable: bool = False,
        guide: Guide | None = None,
    ) -> None:
        by_classifier = spec.guided and spec.guidance_method == "classifier"
        self._is_classifier_free = spec.guided and not by_classifier and guide is None
        if guide is not None and (spec.guidance_method == "classifier" or condition_guidance != 1):
            raise UserError(
                "guidance by another run (guide_with) goes together neither with a classifier nor with guidance by the "
                "condition; leave one of them out"
            )
        if guide is None and spec.guide_with is not None:
            raise UserError(f"guide_with {spec.guide_with} was not opened: build_sampler does it")
        if source is not None:
            spec.refuse_gaussian()
        if self._is_classifier_free and num_classes is None:
            raise UserError("guidance needs a class-conditional network; this one has no classes")
        if self._is_classifier_free and not guidable:
            raise UserError("guidance needs a network that was trained with label_dropout above 0")
        if by_classifier and classifier is None:
            raise UserError(
                "guidance by a classifier needs one: sample.py takes --classifier RUN, a run of train_classifier.py"
            )
        if condition_guidance != 1 and not condition_guidable:
            raise UserError(
                "guidance by the condition needs a network that was trained with a condition and condition_dropout above 0; "
                "leave --condition-guidance out"
            )
        if condition_guidance != 1 and by_classifier:
            raise UserError("guidance by a classifier and by the condition do not go together; leave one of them out")
        self.condition, self.conditioned = condition, conditioned
        self.condition_guidance, self._guidable = condition_guidance, guidable and num_classes is not None
        if spec.threshold is not None and codec is not None:
            raise UserError("dynamic thresholding is for pixels: latents have no bounds at -1 and 1; leave threshold out")
        self.network, self.process, self.spec, self.solver = network, process, spec, SOLVERS[spec.solver]
        self.shape, self.num_classes, self.clip_x0, self.codec = tuple(shape), num_classes, clip_x0, codec
        self.shapes = dict(shapes or {self.shape: 1})
        self.source, self.origin, self.classifier = source, origin, classifier if by_classifier else None
        self.dtype = next(network.parameters()).dtype if isinstance(network, nn.Module) else torch.float32
        self.guide = guide
        if guide is not None and isinstance(guide.network, nn.Module):
            guide.network.to(self.dtype)
        self.times = self.times_for(self.shape)

    def times_for(self, shape: Sequence[int]) -> Tensor:
        """The sampling times (steps + 1,) for what the network sees of this shape, on which a shift depends."""
        spec, schedule = self.spec, self.process.schedule
        if spec.alphas is not None:
            if not isinstance(schedule, BlendSchedule):
                raise UserError("alphas belong to the blend; this run has a table of levels: give steps and a spacing")
            return 1 - torch.tensor(spec.alphas, dtype=torch.float64)
        even = times(schedule, spec.steps if isinstance(spec.steps, int) else list(spec.steps), spec.spacing)
        return even if spec.shift is None else shift_times(schedule, even, spec.shift.factor(math.prod(shape)))

    def at_shape(self, shape: Sequence[int]) -> "Sampler":
        """The same sampler for what the network sees of images of another size. A UserError where it starts from a source that
        has none of that shape."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        other = copy.copy(self)
        other.shape, other.times = shape, self.times_for(shape)
        if isinstance(self.source, SourceSampler):
            other.source = self.source.at_shape(shape)
        return other

    def deal_shapes(self, count: int, most: int = 4) -> list[tuple[tuple[int, ...], range]]:
        """The `most` most frequent shapes that the run was trained on, with the indices of as many of `count` samples each."""
        frequent = sorted(self.shapes, key=lambda shape: -self.shapes[shape])[: min(most, count)]
        bounds = [i * count // len(frequent) for i in range(len(frequent) + 1)]
        return [(shape, range(*bounds[i : i + 2])) for i, shape in enumerate(frequent)]

    def start(self, seed: int, indices: Sequence[int], draw: int = 0) -> Tensor:
        """What the images `indices` of `seed` start from, (B, *shape) float32 on the CPU; each `draw` gives other values."""
        return self.source(seed, indices, draw) if self.source is not None else noise_of(seed, indices, self.shape, draw)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def calls(self, edit: Edit | None = None) -> int:
        """Network calls for one batch. A step of several calls counts as guided where there is guidance at its start."""
        each, spec = self.solver.calls_per_step, self.spec
        first, times = (edit.start_at, edit.resamplings if edit.mask is not None else 1) if edit is not None else (0, 1)
        once = range(first, self.steps if spec.stop_at is None else spec.stop_at)
        twice = range(spec.double_sampling, self.steps) if spec.double_sampling is not None else range(0)
        last = each if self.process.schedule.network_at_clean else 1
        counts = [(i, times * (each if i < self.steps - 1 else last)) for part in (once, twice) for i in part]
        counts += [(spec.stop_at, 1)] if spec.stop_at is not None else []
        return sum(count * (self._guided_calls if self.guides(self.times[i]) else 1) for i, count in counts)

    @property
    def _guided_calls(self) -> int:
        """Network calls for one guided estimate."""
        by_class, by_condition = self._is_classifier_free or self._is_autoguided, self.condition_guidance != 1
        both = by_condition and self._guidable and self.condition_guidance != self.spec.guidance
        return 3 if both else 2 if by_class or by_condition else 1

    def guides(self, t: Tensor) -> bool:
        """Whether there is guidance at the level of `t`: none outside the interval, and none by a guide that does not know the
        level."""
        levels, schedule, guide = self.spec.guidance_interval, self.process.schedule, self.guide
        known = guide is None or guidance.is_trained_at(guide.process.schedule, schedule, t)
        return known and (levels is None or guidance.is_within(levels, schedule, t))

    @property
    def _is_autoguided(self) -> bool:
        return self.guide is not None and self.spec.guided

    def gradient(self, labels: Tensor | None) -> guidance.Gradient | None:
        """The gradient of the classifier that guides, where there is one."""
        if self.classifier is None:
            return None
        assert labels is not None
        logits = guidance.on_schedule(self.classifier.logits, self.classifier.schedule, self.process.schedule)
        return guidance.classifier_gradient(logits, labels, self.spec.guidance)

    def denoiser(
        self, labels: Tensor | None, gradient: guidance.Gradient | None = None, condition: Tensor | None = None
    ) -> Denoiser:
        """The network with guidance, then clipping. A classifier shifts the eps of the clipped estimate, as in
        guided-diffusion, and the result is clipped once more: in almost pure noise, where sigma^2 / alpha is large, the shift
        would throw x0 far out."""
        schedule, spec = self.process.schedule, self.spec
        inputs = {} if self.num_classes is None or labels is None else {"labels": labels}
        inputs |= {"condition": condition} if condition is not None else {}
        plain = self.process.denoiser(self.network, **inputs)

        def bounded(denoiser: Denoiser) -> Denoiser:
            if spec.threshold is not None:
                return guidance.dynamic_threshold(denoiser, schedule, spec.threshold)
            return guidance.clip(denoiser, schedule, *self.clip_x0) if self.clip_x0 is not None else denoiser

        guided = outside = bounded(plain)
        if gradient is not None and not self.solver.takes("mean_shift"):
            guided = bounded(guidance.classifier_guided(outside, gradient, schedule))
        elif self.guide is not None and spec.guided:
            bad = self.guide.denoiser(inputs.get("labels"), condition)
            guided = bounded(guidance.autoguided(plain, bad, self.guide.process.schedule, schedule, spec.guidance))
        elif gradient is None and ((spec.guided and labels is not None) or self.condition_guidance != 1):
            guided = bounded(self._guided(plain, inputs))
        if spec.guidance_interval is not None and guided is not outside:
            return guidance.within(spec.guidance_interval, guided, outside, schedule)
        return guided

    def _guided(self, plain: Denoiser, inputs: dict[str, Tensor]) -> Denoiser:
        """The network with `inputs` (labels, condition), `plain`, guided by both of them."""
        without_class, by_class = None, self.spec.guidance if self.spec.guided else 1.0
        if "labels" in inputs and (self.spec.guided or self._guidable):
            labels = inputs["labels"]
            inputs = {**inputs, "labels": torch.full((len(labels),), self.num_classes or 0, device=labels.device)}
            without_class = self.process.denoiser(self.network, **inputs)
        if "condition" not in inputs or self.condition_guidance == 1:
            return guidance.classifier_free(plain, without_class or plain, by_class)
        neither = self.process.denoiser(self.network, **{**inputs, "condition": torch.zeros_like(inputs["condition"])})
        return guidance.two_scales(plain, without_class, neither, self.condition_guidance, by_class)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """What the network sees (B, *shape) as images (B, C, H, W)."""
        if self.codec is None:
            return x
        images = self.codec.decode(x)
        if self.origin is not None and not is_finite(images) and is_finite(x):
            raise UserError(
                f"the autoencoder of {self.origin} makes images that are not finite (NaN or infinity) of finite latents; draw "
                "from an earlier checkpoint, or on another device (--device)"
            )
        return images

    def show_condition(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """What the network is told (B, k, h, w) as images of this shape, (C, H, W): (B, C, H, W)."""
        assert self.condition is not None
        if self.codec is not None and self.condition.is_encoded:
            return self.decode(values[:, : self.shape[0]])
        return self.condition.show(values, shape)

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
        condition: Tensor | None = None,
    ) -> Tensor:
        """The images `indices` of `seed`, (len(indices), C, H, W) in about [-1, 1], on the device. A callback sees what the
        network sees. A network that draws from a `condition` (len(indices), k, h, w) is given it.

        The network runs at `batch_size` (the last image fills the batch up), so no image depends on how many are asked for.
        """
        missing = (batch_size or len(indices)) - len(indices)
        padded, classes = [*indices, *[indices[-1]] * missing], None
        if self.num_classes is not None or self.classifier is not None:
            chosen = list(labels) if labels is not None else [self.num_classes or 0] * len(indices)
            classes = torch.tensor([*chosen, *[chosen[-1]] * missing], device=device)
        x = self.start(seed, padded).to(device, self.dtype)
        if condition is not None:
            condition = torch.cat([condition, condition[-1:].expand(missing, -1, -1, -1)]).to(x)
        x = self.move(x, classes, seed=seed, indices=padded, callback=callback, edit=edit, condition=condition)
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
        condition: Tensor | None = None,
    ) -> Tensor:
        """From the source to the data, both (B, *shape) as the network sees them. Labels are (B,), or (B, classes and null
        class) weights that blend them. The noise of each step is that of the images `indices` of `seed`."""
        trajectory = Trajectory(self, labels, seed, indices or range(len(x)), callback, edit, condition)
        spec, first = self.spec, edit.start_at if edit is not None else 0
        if edit is not None and first:
            x = self.process.add_noise(edit.x0.to(x).expand_as(x), x, self.times[first])
        if spec.stop_at is not None and first >= spec.stop_at:
            raise UserError(f"start_at {first} is not before stop_at {spec.stop_at}: nothing would be drawn")
        if edit is not None and edit.mask is not None and self.solver.multistep:
            raise UserError(f"{spec.solver} remembers the step before, which a mask changes; use another solver")
        x = trajectory.run(x, first, spec.stop_at or self.steps)
        if spec.stop_at is not None:
            x = trajectory.estimate(x, spec.stop_at)
        if spec.double_sampling is not None:
            x = trajectory.repeat(x, spec.double_sampling)
        self._check_finite(x, trajectory.finite)
        return x

    def _check_finite(self, x: Tensor, steps: Sequence[tuple[int, Tensor]] = ()) -> None:
        """A UserError where the samples are not finite. It names the network and the first of the `steps` (number, whether its
        estimate was finite) that was not."""
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
            names = ", ".join(invertible_solvers())
            raise UserError(f"the solver {self.spec.solver} cannot be gone back; allowed: {names} (with eta 0)")

    @torch.no_grad()
    def invert(self, x0: Tensor, labels: Tensor | None = None) -> Tensor:
        """From the data back to the source, both (B, *shape) as the network sees them: the solver's way in the other direction.

        On a table it begins at the first trained level, where the image is scaled by the alpha of that level.
        """
        self.check_invertible()
        assert self.solver.inverse is not None
        schedule = self.process.schedule
        way_back = inversion_times(self.times, schedule)
        x = self.solver.inverse(self.denoiser(labels), like(schedule.level(way_back[0]).alpha, x0) * x0, way_back, schedule)
        self._check_finite(x)
        return x


class Trajectory:
    """One batch on its way along the times of a sampler: what the solver is given, and what an edit keeps.

    `sweep` counts how often a step was taken before; each sweep has other noise. Where the samples must be finite, `finite`
    gets (step, whether the estimate was finite) of each step, on the device, so that nobody waits.
    """

    def __init__(
        self,
        sampler: Sampler,
        labels: Tensor | None,
        seed: int,
        indices: Sequence[int],
        callback: Callback | None = None,
        edit: Edit | None = None,
        condition: Tensor | None = None,
    ) -> None:
        self.sampler, self.seed, self.indices, self.callback, self.edit = sampler, seed, indices, callback, edit
        self.gradient = sampler.gradient(labels)
        self.denoiser = sampler.denoiser(labels, self.gradient, condition)
        self.sweep, self.finite = 0, list[tuple[int, Tensor]]()

    def noise(self, step: int, x: Tensor) -> Tensor:
        return noise_of(self.seed, self.indices, self.sampler.shape, step + 1, self.sweep).to(x)

    def source(self, step: int, x: Tensor) -> Tensor:
        return self.sampler.start(self.seed, self.indices, step + 1 + self.sweep * (self.sampler.steps + 1)).to(x)

    def mean_shift(self, x_t: Tensor, t: Tensor, variance: Tensor) -> Tensor:
        assert self.gradient is not None
        return variance * self.gradient(x_t, t) if self.sampler.guides(t) else torch.zeros_like(x_t)

    def _solve(self, x: Tensor, first: int, end: int) -> Tensor:
        """From where `first` steps are done to where `end` are."""
        sampler, solver, process = self.sampler, self.sampler.solver, self.sampler.process

        def callback(step: int, t: Tensor, x_t: Tensor, prediction: Prediction) -> None:
            if sampler.origin is not None:
                self.finite.append((first + step, torch.isfinite(prediction.x0).all()))
            if self.callback is not None:
                self.callback(first + step, t, x_t, prediction)

        options = {
            "noise": lambda step, x: self.noise(first + step, x),
            "source": lambda step, x: self.source(first + step, x),
            "eta": sampler.spec.eta,
            "variance": process.variance,
            "mean_shift": self.mean_shift if self.gradient is not None else None,
        }
        taken = {name: value for name, value in options.items() if solver.takes(name)}
        if solver.takes("steps"):  # of the whole chain
            taken["steps"] = Transitions(*(values[first:end] for values in transitions(process.schedule, sampler.times)))
        return solver.function(self.denoiser, x, sampler.times[first : end + 1], process.schedule, callback=callback, **taken)

    def run(self, x: Tensor, first: int, end: int) -> Tensor:
        """From where `first` steps are done to where `end` are; what an edit keeps is put back after each step."""
        edit, process, times, steps = self.edit, self.sampler.process, self.sampler.times, self.sampler.steps
        if edit is None or edit.mask is None:
            return self._solve(x, first, end)
        alpha, sigma = process.schedule.level(times)
        x0, before = edit.x0.to(x).expand_as(x), self.sweep
        for i in range(first, end):
            for self.sweep in range(before, before + edit.resamplings):
                if self.sweep > before:
                    ratio = alpha[i] / alpha[i + 1]
                    spread = (sigma[i] ** 2 - ratio**2 * sigma[i + 1] ** 2).sqrt()
                    x = like(ratio, x) * x + like(spread, x) * self.noise(2 * steps + i, x)
                x = self._solve(x, i, i + 1)
                x = edit.put_back(x, process.add_noise(x0, self.noise(steps + i, x), times[i + 1]))
        return x

    def estimate(self, x: Tensor, step: int) -> Tensor:
        """The estimate of x_0 where `step` steps are done, with what an edit keeps."""
        t, edit = self.sampler.times[step], self.edit
        prediction = self.denoiser(x, t)
        if self.callback is not None:
            self.callback(step, t, x, prediction)
        return prediction.x0 if edit is None else edit.put_back(prediction.x0, edit.x0.to(x))

    def repeat(self, x0: Tensor, first: int) -> Tensor:
        """The finished image noised again to where `first` steps are done, and denoised once more."""
        sampler, self.sweep = self.sampler, self.sweep + 1
        x = sampler.process.add_noise(x0, self.noise(3 * sampler.steps, x0), sampler.times[first])
        return self.run(x, first, sampler.steps)


def build_sampler(
    run: Run,
    spec: SamplerConfig,
    classifier: OpenedClassifier | None = None,
    *,
    source: Start | None = None,
    condition_guidance: float = 1.0,
    guide: Guide | None = None,
) -> Sampler:
    """The sampler of an opened run. It starts from `source`, or else where the run itself starts. The `guide` of autoguidance
    is opened where `spec` names one that is not given. A UserError says why the `classifier` or the guide, of other images or
    classes, does not fit the run."""
    if isinstance(run, Opened) and classifier is not None:
        image, names = classifier.image, classifier.class_names
        if run.codec is not None:
            raise UserError(f"{run.path} draws latents, which no classifier of images sees; use classifier_free guidance")
        fits = run.shape == image.shape or (
            image.aspect is not None and is_divisible(run.image.sides, classifier.network.config.factor)
        )
        if run.shape[0] != image.channels or not fits:
            raise UserError(
                f"the classifier {classifier.path} sees {describe_size(image.size)} in {image.channels} channel(s), {run.path} "
                f"draws {describe_size(run.image.sides)} in {run.shape[0]}; train one with the same image"
            )
        if run.num_classes is not None and not same_names(run.class_names, names):
            raise UserError(
                f"the classifier {classifier.path} knows other classes ({join_names(names)}) than {run.path} "
                f"({join_names(run.class_names)})"
            )
    if guide is None and spec.guide_with is not None:
        if not isinstance(run, Opened):
            raise UserError(f"guide_with is about images, and {run.path} is a run of 2-D points; leave it out")
        guide = open_guide(guided_run(run), spec.guide_with, next(run.network.parameters()).device)
    options: dict[str, Any] = {"guide": guide, "source": source or run.starts(), "origin": run.origin}
    if isinstance(run, Opened):  # not 2-D points
        bounds = run.bounds if run.config["process"]["clip"] else None
        options |= {"clip_x0": bounds, "codec": run.codec, "classifier": classifier, "shapes": run.shapes}
        options["condition"] = run.condition
    options |= {"guidable": run.config["label_dropout"] > 0, "condition_guidance": condition_guidance}
    options["condition_guidable"] = run.config.get("condition_dropout", 0.0) > 0
    return Sampler(run.network, run.process, spec, shape=run.shape, num_classes=run.num_classes, **options)


def build_samplers(run: Opened, specs: Sequence[SamplerConfig], classifier: OpenedClassifier | None) -> list[Sampler]:
    """The samplers of an opened run, one for each of these settings; a guide that several of them name is opened once."""
    guided, device = guided_run(run), next(run.network.parameters()).device
    names = dict.fromkeys(spec.guide_with for spec in specs if spec.guide_with is not None)
    guides: dict[Any, Guide] = {name: open_guide(guided, name, device) for name in names}
    return [build_sampler(run, spec, classifier, guide=guides.get(spec.guide_with)) for spec in specs]


def random_labels(seed: int, indices: Sequence[int], num_classes: int) -> list[int]:
    """A class for each image, a function of (seed, image)."""
    keys = (np.array([seed, i], dtype=np.uint64) for i in indices)
    generators = (np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 1 << 32, 0])) for key in keys)
    return [int(generator.integers(num_classes)) for generator in generators]


def describe(sampler: Sampler, seed: int, edit: Edit | None = None) -> dict[str, Any]:
    """What is needed to draw the same images again, besides the weights."""
    by_condition = {"condition_guidance": sampler.condition_guidance} if sampler.condition_guidance != 1 else {}
    return {**describe_spec(sampler), **by_condition, "seed": seed, "network_calls": sampler.calls(edit)}


def describe_spec(sampler: Sampler) -> dict[str, Any]:
    """The settings of a sampler; its guide, where it has one, by the hash of the weights in place of the path."""
    return {**dump(sampler.spec), **({"guide_with": sampler.guide.digest} if sampler.guide is not None else {})}
