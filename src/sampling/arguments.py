"""A script's arguments for how images are drawn."""

import argparse

from ..config import UserError, validate
from ..diffusion import SOLVERS, SPACINGS
from .config import SAMPLER_KEYS, SamplerConfig


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A script's arguments for how images are drawn."""
    solver = parser.add_argument_group("solver")
    solver.add_argument("--solver", choices=SOLVERS, default="ddim")
    solver.add_argument("--steps", default="50", help="a number, or counts for equal sections: 100,50,25 (default 50)")
    solver.add_argument(
        "--alphas",
        type=parse_alphas,
        metavar="A,B,..",
        help="of the blend: each step's alpha, from 0 to 1",
    )
    solver.add_argument("--spacing", choices=SPACINGS, default="even")
    solver.add_argument("--eta", type=float, default=0.0, help="noise of ddim: 0 is none, 1 as much as ancestral sampling")
    solver.add_argument("--threshold", type=float, metavar="Q", help="dynamic thresholding by this quantile, such as 0.995")
    solver.add_argument("--stop-at", type=int, metavar="S", help="end after S steps, with the estimate of x_0")
    solver.add_argument("--double-sampling", type=int, metavar="S", help="noise again to step S, and denoise once more")
    guidance = parser.add_argument_group("guidance")
    guidance.add_argument("--guidance", type=float, default=1.0, help="scale; 1 is none of classifier_free, 0 of a classifier")
    guidance.add_argument("--guidance-method", choices=("classifier_free", "classifier"), default="classifier_free")
    guidance.add_argument("--classifier", metavar="RUN", help="a run of train_classifier.py, or an imported classifier")
    guidance.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels sigma/alpha")


def sampler_config(args: argparse.Namespace) -> SamplerConfig:
    """The sampler that those arguments ask for. A UserError says what does not fit."""
    if args.classifier is not None and args.guidance_method != "classifier":
        raise UserError("--classifier guides only with --guidance-method classifier")
    keys = {name: getattr(args, name) for name in SAMPLER_KEYS} | {"steps": parse_steps(args.steps)}
    return validate(SamplerConfig, keys, origin="arguments")
