"""Samples of several runs, checkpoints or exports from the same noise, as `ddpm_accelerate.py --ckpt_sampling` draws them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import figures
from ..config import UserError, quoted
from ..config.progress import Progress
from ..runs.classifier import open_classifier
from ..runs.opened import Opened, open_trained
from ..runtime.failures import explain_failure, explain_out_of_memory
from ..runtime.launch import start_sampling
from .config import add_arguments, count_for_classes, sampler_config
from .files import Frame, Frames, columns_for, in_batches, write_animation
from .sampler import Sampler, build_sampler

SHOWN = 16  # samples in the frames


def parse_with_sampling(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, bool]:
    """The arguments of a training script, with those of sample.py; and whether they ask for samples of each --ckpt instead of
    training. A UserError where an argument of the one is given for the other."""
    training = set(vars(parser.parse_args([])))
    sampling = parser.add_argument_group("samples of checkpoints")
    sampling.add_argument("--ckpt", metavar="FILE", action="append", default=[], help="with --ckpt_sampling; repeatable")
    sampling.add_argument("--ckpt_sampling", action="store_true", help="draw from each --ckpt into --out, and train nothing")
    sampling.add_argument("--out", metavar="DIR", default="results", help="folder for grids, frames and GIFs (default results)")
    sampling.add_argument("--num-samples", type=int, help="of each (default 16, or a few more for --classes)")
    sampling.add_argument("--batch-size", type=int, default=16, help="images at a time; changes them only by rounding")
    sampling.add_argument("--classes", help="names or numbers, A/B/C, dealt in equal blocks (default: all of them)")
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    add_arguments(parser)
    args = parser.parse_args()
    none = argparse.Namespace(**dict.fromkeys(vars(args)))  # tells what is given, even where it has its default
    given = [key for key, value in vars(parser.parse_args(namespace=none)).items() if value is not None]
    options = {key: f"--{key.replace('_', '-')}" for key in given} | {"config": "-cfg", "ckpt_sampling": "--ckpt_sampling"}
    idle = [options[key] for key in given if (key in training) == args.ckpt_sampling]
    if args.ckpt_sampling:
        if idle:
            raise UserError(f"{idle[0]} is about training, and --ckpt_sampling only draws from each --ckpt: leave it out")
        if not args.ckpt:
            raise UserError("--ckpt_sampling needs at least one --ckpt FILE: a run, a checkpoint, or an export")
    elif args.ckpt:
        raise UserError("--ckpt is for sampling: add --ckpt_sampling; a run goes on by itself when started again")
    elif idle:
        raise UserError(f"{idle[0]} is about drawing from a --ckpt: add --ckpt_sampling; what training does is set by --set")
    return args, args.ckpt_sampling


Drawing = tuple[Opened, Sampler, list[int] | None, Sequence[str]]  # a run, the classes of the samples, the names of classes


def _open(file: str, args: argparse.Namespace, device: torch.device) -> Drawing:
    run, count = open_trained(file, device), args.num_samples
    if run.condition is not None and run.low_resolution is None:
        raise UserError(f"this run draws from images: python sample.py {quoted(file)} --condition FOLDER")
    if run.low_resolution is not None:
        raise UserError(f"an upsampler draws from other images: python sample.py {quoted(file)} --low IMAGES")
    classifier = open_classifier(args.classifier, device) if args.classifier is not None else None
    sampler = build_sampler(run, sampler_config(args), classifier)
    known = classifier.class_names if classifier is not None else ()
    names = run.class_names if run.num_classes is not None else known
    labels = [i * len(names) // count for i in range(count)] if names else None
    return run, sampler, run.labels(args.classes, count, names) if args.classes is not None else labels, names


def _draw(
    run: Opened, sampler: Sampler, labels: list[int] | None, args: argparse.Namespace, state: Any, device: torch.device
) -> tuple[figures.Pixels, list[Frame]]:
    """Whole batches dealt to ranks: all samples (count, H, W, C), and the frames of SHOWN of them, on every rank."""
    from accelerate.utils import gather_object

    count, few = args.num_samples, min(SHOWN, args.num_samples)
    shown = {i * count // few for i in range(few)}  # spread over all, so that every class is among them
    batches = in_batches(range(count), args.batch_size)[state.process_index :: state.num_processes]
    parts, steps = list[tuple[int, figures.Pixels, list[Frame]]](), sampler.steps * len(batches)
    with Progress(f"sampling {run.name}", steps, unit="steps", shown=state.is_main_process) as bar:
        for batch in batches:
            frames = Frames([i - batch.start for i in batch if i in shown], sampler)

            def callback(*step: Any) -> None:
                frames(*step)  # noqa: B023
                bar.update()

            classes = labels[batch.start : batch.stop] if labels is not None else None
            options: dict[str, Any] = {"callback": callback, "batch_size": args.batch_size}
            x = sampler.draw(args.seed, batch, classes, device=device, **options)
            frames.finish(x)
            parts.append((batch.start, figures.to_uint8(x), frames.frames))
    parts = sorted(gather_object(parts), key=lambda part: part[0])
    joined = list[Frame]()
    for same_step in zip(*(frames for _, _, frames in parts if frames), strict=True):
        steps, x_t, x0 = zip(*same_step, strict=True)
        joined.append((steps[0], np.concatenate(x_t), np.concatenate(x0)))
    return np.concatenate([pixels for _, pixels, _ in parts]), joined


def sample_checkpoints(args: argparse.Namespace) -> int:
    """Draw samples of each run, checkpoint or export of --ckpt, all from the same noise, on all ranks: grid, numbered frames
    and GIF in --out. `args` are those of `parse_with_sampling`."""
    wanted = 1 if args.num_samples is None else args.num_samples
    if wanted < 1 or args.batch_size < 1 or not 0 <= args.seed < 2**64:
        raise UserError("--num-samples and --batch-size must be at least 1, --seed from 0 to 2^64 - 1")
    sampler_config(args)
    args.num_samples, out = args.num_samples or count_for_classes(16, args.classes), Path(args.out)
    state, device = start_sampling(args.device)
    with explain_out_of_memory(args.batch_size, args.batch_size, key="--batch-size"):
        # All are opened first, so that a mistake in the last is reported at once.
        opened = [_open(file, args, device) for file in args.ckpt]
        for number, (run, sampler, labels, names) in enumerate(opened, 1):
            pixels, frames = _draw(run, sampler, labels, args, state, device)
            if state.is_main_process:
                suffix = "" if len(opened) == 1 else f"_{number}_{run.name}_{run.step}"
                grid, moving = out / f"grid{suffix}.png", out / f"denoised{suffix}.gif"
                captions = [names[label] for label in labels] if labels is not None else None
                with explain_failure(grid):
                    figures.save(figures.grid(pixels, columns=columns_for(len(pixels)), labels=captions), grid)
                with explain_failure(moving):
                    sheets = (Frames([], sampler).sheet(frame, run.name) for frame in frames)
                    command = write_animation(out / f"denoised{suffix}" / "denoised_%03d.jpg", sheets, moving, fps=5)
                print(f"{args.ckpt[number - 1]}: {grid}, {moving}; the GIF again:\n  {command}")
    return 0
