"""How images are drawn: the keys of a sampler in configs and on the command line."""

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic

from ..config import NameIn, UserError, config, config_error, validate
from ..config.sizes import Sides
from ..data.names import parse_classes
from ..diffusion import SOLVERS, SPACINGS, TimeShift
from ..diffusion.schedules import Spacing

NEWER_KEYS = ("shift", "shift_base", "guide_with")  # of a sampler, or of its arguments: they are None while they are not set


def without_newer(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a sampler, or its arguments, without the newer ones that are not set."""
    return {key: value for key, value in keys.items() if not (key in NEWER_KEYS and value is None)}


@config
class SamplerConfig:
    """How images are drawn: the solver, its steps (or counts for equal sections) and their spacing, DDIM's eta, and guidance.

    `guidance` is the scale of classifier-free guidance (1 is none), or of the gradient of a classifier (0 is none);
    `guidance_interval` holds it to noise levels sigma / alpha between two. `threshold` is the quantile of dynamic
    thresholding. `stop_at` ends after so many steps, with the estimate of x_0; `double_sampling` noises the finished image
    again to where so many steps are done, and denoises it once more. On the blend, `alphas` from 0 to 1 are the steps
    themselves; `steps` and `spacing` are ignored then. `shift` moves the steps to the noise for large images.
    `guide_with` is a smaller or less trained run (or a checkpoint, or the width of a post-hoc average of the run itself), whose
    faults are subtracted (autoguidance): `guidance` is the scale of that instead, and classes are given to both networks.
    """

    solver: Annotated[str, NameIn(SOLVERS)] = "ddim"
    steps: int | tuple[int, ...] = 50
    alphas: tuple[float, ...] | None = None
    spacing: Spacing = "even"
    eta: float = pydantic.Field(0.0, ge=0)
    guidance: float = 1.0
    guidance_method: Literal["classifier_free", "classifier"] = "classifier_free"
    guidance_interval: tuple[float, float] | None = None
    threshold: float | None = pydantic.Field(None, gt=0, le=1)
    stop_at: int | None = pydantic.Field(None, ge=1)
    double_sampling: int | None = pydantic.Field(None, ge=0)
    shift: TimeShift | None = None
    guide_with: str | float | None = None

    @pydantic.model_serializer(mode="wrap")
    def _without_newer_keys(self, serialize: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Samples, pairs and results remember how they were drawn: keys that came later are left out there while they are not
        set, so that what was drawn before them counts as the same."""
        return without_newer(serialize(self))

    @pydantic.model_validator(mode="after")
    def _used(self) -> "SamplerConfig":
        steps = self.steps if isinstance(self.steps, int) else sum(self.steps)
        if self.alphas is not None:
            steps = len(self.alphas) - 1
            if self.shift is not None:
                raise config_error("shift: alphas are the steps themselves, which nothing shifts; leave one of them out")
            outside = [alpha for alpha in self.alphas if not 0 <= alpha <= 1]
            if outside:
                raise config_error(f"alphas: {outside[0]:g} lies outside [0, 1]; alpha goes from 0, the source, to 1, the data")
            rising = all(before < after for before, after in zip(self.alphas, self.alphas[1:], strict=False))
            if not rising or len(self.alphas) < 2 or (self.alphas[0], self.alphas[-1]) != (0, 1):
                raise config_error("alphas: give them rising from 0 to 1, such as 0,0.3,0.6,0.8,1")
        if self.eta and not SOLVERS[self.solver].takes("eta"):
            those = " and ".join(name for name, solver in SOLVERS.items() if solver.takes("eta"))
            raise config_error(f"eta belongs to the solver {those}, not to {self.solver}")
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise config_error("guidance_interval: give two noise levels sigma / alpha, the lower one first, such as [0.3, 3]")
        if self.guidance_interval is not None and not self.guided:
            raise config_error("guidance_interval: there is no guidance to hold to it; give a guidance scale")
        if self.stop_at is not None and self.stop_at >= steps:
            raise config_error(f"stop_at: {self.stop_at} of {steps} steps leaves none out; give less")
        if self.double_sampling is not None and self.double_sampling >= steps:
            raise config_error(
                f"double_sampling: after {self.double_sampling} of {steps} steps there is none to do again; give less"
            )
        if self.stop_at is not None and self.double_sampling is not None:
            raise config_error("stop_at and double_sampling do not go together; leave one out")
        return self

    @property
    def guided(self) -> bool:
        return self.guidance != (1 if self.guidance_method == "classifier_free" else 0)

    def refuse_gaussian(self) -> None:
        """A UserError for what is right only where sampling starts from Gaussian noise."""
        assumptions = {
            f"the solver {self.solver}": SOLVERS[self.solver].gaussian,
            "eta": self.eta > 0,
            "double_sampling": self.double_sampling is not None,
            "guidance by a classifier": self.guided and self.guidance_method == "classifier",
        }
        others = ", ".join(name for name, solver in SOLVERS.items() if not solver.gaussian)
        for name in (name for name, is_asked_for in assumptions.items() if is_asked_for):
            raise UserError(
                f"{name} assumes Gaussian noise at the start, and this run starts from other data; allowed there: the solvers "
                f"{others} (with eta 0)"
            )

    def without_guidance(self, unguided: bool = True) -> "SamplerConfig":
        """The same without guidance by the class, where it is to be `unguided`; autoguidance needs no classes, and stays."""
        return dataclasses.replace(self, guidance=1.0, guidance_interval=None) if unguided and self.guide_with is None else self


# The arguments of a command line that ask for a sampler.
SAMPLER_KEYS = ["shift_base" if key.name == "shift" else key.name for key in dataclasses.fields(SamplerConfig)]


SHIFT_HELP = "shift the steps to the noise by the root of dimensions / N; 4096 is usual (default: no shift)"


GUIDE_HELP = "autoguidance by a smaller or less trained run, a checkpoint, or the width of an average of RUN, such as 0.10"


def count_for_classes(count: int, classes: str | None, class_names: Sequence[str] = ()) -> int:
    """The least number of images from `count` on that can be dealt to the classes A/B/C in equal blocks. Without the
    `class_names`, which a name with a slash in it needs, each slash divides two classes."""
    if classes is None:
        return count
    each = len(parse_classes(classes, class_names)) if class_names else len(re.split(r"(?<!\\)/", classes))
    return -(-count // each) * each


def parse_size(text: str) -> Sides:
    """48x88 as height and width, 64 as those of a square. A UserError for other text."""
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdecimal() and 2 <= int(part) <= 4096 for part in parts):
        raise UserError(f"--size {text}: give HEIGHTxWIDTH, such as 48x88, or one number; sides go from 2 to 4096 px")
    return int(parts[0]), int(parts[-1])


SIZE_HELP = "HEIGHTxWIDTH in pixels (default: that of the image given, else the size that most training images had)"


def parse_alphas(text: str) -> list[float]:
    """0,0.3,0.7,1 as numbers. A ValueError where it is no list of numbers."""
    return [float(part) for part in text.split(",")]


def parse_steps(text: str) -> int | list[int]:
    """50 as a number; 100,50,25 as counts for equal sections of the table, the cleanest first. A UserError for other text."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--steps {text}: give a number, or counts for equal sections, such as 100,50,25") from None
    return counts[0] if len(counts) == 1 else counts


def add_arguments(parser: argparse.ArgumentParser, *, of_animation: bool = False) -> None:
    """A script's arguments for how images are drawn. An animation goes the whole path of every frame, without a classifier."""
    solver = parser.add_argument_group("solver")
    solver.add_argument("--solver", choices=SOLVERS, default="ddim")
    solver.add_argument("--steps", default="50", help="a number, or counts for equal sections: 100,50,25 (default 50)")
    solver.add_argument("--alphas", type=parse_alphas, metavar="A,B,..", help="of the blend: each step's alpha, from 0 to 1")
    solver.add_argument("--spacing", choices=SPACINGS, default="even")
    solver.add_argument("--shift-base", type=int, metavar="N", help=SHIFT_HELP)
    solver.add_argument("--eta", type=float, default=0.0, help="noise of ddim: 0 is none, 1 as much as ancestral sampling")
    solver.add_argument("--threshold", type=float, metavar="Q", help="dynamic thresholding by this quantile, such as 0.995")
    guidance = parser.add_argument_group("guidance")
    guidance.add_argument("--guidance", type=float, default=1.0, help="scale; 1 is none (of a classifier 0)")
    guidance.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels sigma/alpha")
    guidance.add_argument("--guide-with", metavar="RUN", help=GUIDE_HELP)
    if of_animation:
        parser.set_defaults(stop_at=None, double_sampling=None, guidance_method="classifier_free", classifier=None)
        return
    solver.add_argument("--stop-at", type=int, metavar="S", help="end after S steps, with the estimate of x_0")
    solver.add_argument("--double-sampling", type=int, metavar="S", help="noise again to step S, and denoise once more")
    guidance.add_argument("--guidance-method", choices=("classifier_free", "classifier"), default="classifier_free")
    guidance.add_argument("--classifier", metavar="RUN", help="a run of train_classifier.py, or an imported classifier")


def sampler_config(args: argparse.Namespace) -> SamplerConfig:
    """The sampler that those arguments ask for. A UserError says what does not fit."""
    if args.classifier is not None and args.guidance_method != "classifier":
        raise UserError("--classifier guides only with --guidance-method classifier")
    keys = {name: getattr(args, name) for name in SAMPLER_KEYS} | {"steps": parse_steps(args.steps)}
    base = keys.pop("shift_base")
    return validate(SamplerConfig, keys | {"shift": {"base": base} if base is not None else None}, origin="arguments")


def sampler_words(spec: SamplerConfig) -> list[str]:
    """The arguments of the command line that ask for this sampler: what `sampler_config` makes of them is `spec`. Solver and
    steps are always among them, the others where they are not the default."""
    default = SamplerConfig()
    words = ["--solver", spec.solver, "--steps", _comma_separated(spec.steps)]
    for key in dataclasses.fields(SamplerConfig):
        value, option = getattr(spec, key.name), f"--{key.name.replace('_', '-')}"
        if key.name in ("solver", "steps") or value == getattr(default, key.name):
            continue
        if isinstance(value, TimeShift):
            words += ["--shift-base", str(value.base)]
        elif key.name == "guidance_interval":
            words += [option, *map(str, value)]
        else:
            words += [option, _comma_separated(value)]
    return words


def _comma_separated(value: Any) -> str:
    """A number, a word, or a sequence of numbers as an argument."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
