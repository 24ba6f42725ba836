#!/usr/bin/env python
"""Draw from a run: PNGs, a grid, what is needed to draw them again, the GIF of how they came about; or go back."""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from src.config import UserError, run_script
from src.runs.classifier import open_classifier
from src.runs.opened import Opened, Run, open_run
from src.runtime.launch import explain_out_of_memory, start_sampling
from src.runtime.looks import asked_for
from src.sampling import SamplerConfig, build_sampler
from src.sampling.arguments import add_arguments, sampler_config
from src.sampling.build import count_for_classes
from src.sampling.config import SAMPLER_KEYS
from src.sampling.edit import files_of, from_nowhere, load_edit, load_low, start_from_pictures
from src.sampling.files import nothing_left, write_samples
from src.sampling.inversion import fingerprint, write_inversions
from src.sampling.points import write_points
from src.sampling.sampler import describe, random_labels
from src.sampling.upscaling import open_upscaler, upscale_folder

ONE_WAY = {"stop_at", "double_sampling"}  # of pictures that are drawn


def arguments() -> tuple[argparse.Namespace, argparse.Namespace]:
    """What was asked, and what is not asked."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python sample.py runs/digits_ddpm --classes 3/7 --num-samples 16 --guidance 2 --frames",
    )
    parser.add_argument("run", nargs="?", help="a run, a checkpoint, a final folder, or an export")
    parser.add_argument("--out", help="folder for the pictures (default samples/RUN/...)")
    parser.add_argument("--num-samples", type=int, help="default 16 or a few more for --classes; one for each picture of --low")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time; changes them only by rounding")
    parser.add_argument("--classes", help="names or numbers, A/B/C, dealt in equal blocks (default: random)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", action="store_true", help="write the denoising GIF and its frames")
    parser.add_argument("--npz", action="store_true", help="also all in one file, as guided-diffusion's evaluator reads it")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    add_arguments(parser)
    edit = parser.add_argument_group("from a picture")
    edit.add_argument("--image", metavar="FILE", help="a picture to start from, or to draw a part of anew")
    edit.add_argument("--start-at", type=int, default=0, metavar="S", help="noise it to where S steps are done")
    edit.add_argument("--mask", metavar="FILE", help="white where it is drawn anew; of the picture's size")
    edit.add_argument("--resamplings", type=int, default=1, metavar="N", help="take each step N times, so that parts agree")
    edit.add_argument("--source", metavar="FOLDER", help="of a run between two data sets: what to start from")
    edit.add_argument("--invert", metavar="PLACE", help="a picture, or a folder: back to the source, and forth again")
    edit.add_argument("--low", metavar="FOLDER", help="what an upsampler makes larger: pictures, or an .npz of samples")
    upscale = parser.add_argument_group("upscaling (Real-ESRGAN)")
    upscale.add_argument("--upscale", action="store_true", help="the samples four times as large, too")
    upscale.add_argument("--upscale-only", metavar="FOLDER", help="the pictures of a folder instead, into --out")
    upscale.add_argument("--upscaler", metavar="FILE", help="weights (default models/RealESRGAN_x4plus.pth)")
    return parser.parse_args(), parser.parse_args([])


def check(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Refuse what makes no sense together, before anything is opened."""
    wanted = 1 if args.num_samples is None else args.num_samples
    if wanted < 1 or args.batch_size < 1 or args.resamplings < 1 or not 0 <= args.seed < 2**64:
        raise UserError("--num-samples, --batch-size and --resamplings must be at least 1, --seed from 0 to 2^64 - 1")
    if (args.run is None) == (args.upscale_only is None):
        raise UserError("give a run to sample from, or --upscale-only FOLDER")
    alone = {"upscale_only", "upscaler", "out", "batch_size", "device"}
    idle = [key for key, value in vars(args).items() if key not in alone and value != getattr(defaults, key)]
    if args.upscale_only is not None and idle:
        raise UserError(f"--{idle[0].replace('_', '-')} is about drawing pictures, and --upscale-only draws none; leave it out")
    if args.image is None and (args.mask is not None or args.start_at):
        raise UserError("--mask and --start-at are about a picture: give it with --image")
    if args.resamplings > 1 and args.mask is None:
        raise UserError("--resamplings belongs to --mask")
    if args.upscaler is not None and not (args.upscale or args.upscale_only):
        raise UserError("--upscaler is for --upscale and --upscale-only")


def hashed(*words: Any) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:6]


def draw_points(
    run: Run, how: SamplerConfig, args: argparse.Namespace, defaults: argparse.Namespace, device: torch.device
) -> None:
    """The pictures of a run of 2-D points."""
    taken = {"run", "out", "num_samples", "classes", "seed", "frames", "device", *SAMPLER_KEYS} - ONE_WAY - {"threshold"}
    idle = [key for key, value in vars(args).items() if key not in taken and value != getattr(defaults, key)]
    if idle:
        raise UserError(f"--{idle[0].replace('_', '-')} is about pictures, and {args.run} is a run of 2-D points; leave it out")
    count = args.num_samples or count_for_classes(20_000, args.classes, run.class_names)
    labels = random_labels(args.seed, range(count), run.num_classes) if run.num_classes is not None else None
    labels = run.labels(args.classes, count) if args.classes is not None else labels
    sampler = build_sampler(run, how)
    request = {"weights": run.digest, "num_samples": count, "classes": args.classes, **describe(sampler, args.seed)}
    out = Path(args.out or f"samples/{run.folder}/{args.solver}{sampler.steps}_{hashed(request)}")
    more = {"labels": labels, "device": device, "frames": args.frames, "told": request}
    with nothing_left(out), asked_for(f"{out}: all that was to be drawn of the points"):
        made = write_points(sampler, out, count=count, seed=args.seed, **more)
    print(f"{count} points of {run.path} (step {run.step}), {sampler.calls()} network calls")
    for path in made:
        print(f"  {path}")


def invert(opened: Opened, how: SamplerConfig, args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Pictures back to their source, and forth again."""
    taken = {"run", "invert", "out", "classes", "batch_size", "device", *SAMPLER_KEYS} - ONE_WAY
    idle = [key for key, value in vars(args).items() if key not in taken and value != getattr(defaults, key)]
    if idle:
        raise UserError(f"--{idle[0].replace('_', '-')} is about drawing new pictures, and --invert draws none; leave it out")
    files = files_of(args.invert)
    label = opened.labels(args.classes, 1)[0] if args.classes is not None else None
    sampler = build_sampler(opened, how, source=None if opened.gaussian else from_nowhere)
    tag = hashed(opened.digest, fingerprint(files), label, describe(sampler, 0))
    out = Path(args.out or f"samples/{opened.folder}/inversion_{args.solver}{sampler.steps}_{tag}")
    with nothing_left(out):
        mean = write_inversions(opened, sampler, files, out, label=label, batch_size=args.batch_size)
    print(f"{len(files)} pictures to their source and back by {opened.path}, {sampler.calls()} network calls each way:")
    print(
        f"  lost on the way {100 * mean['rms']:.2f} % RMS; source of standard deviation {mean['std']:.3f}, correlation with the"
    )
    print(f"  picture {mean['correlation']:.3f}\n  {out}/inversion.png, {out}/sources.npy")


def main() -> None:
    args, defaults = arguments()
    check(args, defaults)
    how = sampler_config(args)
    state, device = start_sampling(args.device)
    ranks = {"rank": state.process_index, "world": state.num_processes, "barrier": state.wait_for_everyone}
    upscaler = open_upscaler(args.upscaler, device) if args.upscale or args.upscale_only else None
    if args.upscale_only:
        out = Path(args.out or f"samples/{Path(args.upscale_only).resolve().name}_upscaled")
        assert upscaler is not None
        with explain_out_of_memory(args.batch_size, args.batch_size, key="--batch-size"):
            paths = upscale_folder(Path(args.upscale_only), out, upscaler, batch_size=args.batch_size, **ranks)
        if state.is_main_process:
            print(f"{len(paths)} pictures, {upscaler.scale} times as large, in {out}")
        return

    opened = open_run(args.run, device)
    if not isinstance(opened, Opened):
        if state.is_main_process:
            draw_points(opened, how, args, defaults, device)
        return
    if args.invert is not None:
        if state.is_main_process:
            invert(opened, how, args, defaults)
        return
    classifier = open_classifier(args.classifier, device) if args.classifier is not None else None
    given = start_from_pictures(opened, args.source) if args.source is not None else None
    sampler = build_sampler(opened, how, classifier, source=given)
    known = classifier.class_names if classifier is not None else ()
    class_names = opened.class_names if opened.num_classes is not None else known
    labels, low, told = None, None, {}
    if args.low is not None:
        low, labels = load_low(opened, args.low)
        if (args.num_samples or 1) > len(low):
            raise UserError(f"--num-samples {args.num_samples}: {args.low} has {len(low)} pictures")
        args.num_samples = args.num_samples or len(low)
        told["low"] = hashlib.sha256(low.numpy().tobytes()).hexdigest()
    elif opened.low_resolution is not None:
        raise UserError(f"{args.run} is an upsampler: give --low the pictures of {opened.low_resolution} px to make larger")
    if args.source is not None:
        files = files_of(args.source)
        args.num_samples, told["source"] = args.num_samples or len(files), fingerprint(files)
    args.num_samples = args.num_samples or count_for_classes(16, args.classes, class_names)
    if args.classes is not None:
        labels = opened.labels(args.classes, args.num_samples, class_names)
    elif labels is not None and opened.num_classes is not None:
        labels = labels[: args.num_samples]
    elif opened.num_classes is not None or classifier is not None:
        labels = random_labels(args.seed, range(args.num_samples), len(class_names))
    edit = None
    if args.image is not None:
        keep = {"start_at": args.start_at, "resamplings": args.resamplings}
        edit = load_edit(opened, args.image, args.mask, steps=sampler.steps, **keep)
        files = {key: hashlib.sha256(Path(getattr(args, key)).read_bytes()).hexdigest() for key in ("image", "mask")
                 if getattr(args, key) is not None}  # fmt: skip
        told["edit"] = {**files, **keep}
    if classifier is not None:
        told["classifier"] = classifier.digest
    if upscaler is not None:
        told["upscaler"] = upscaler.digest

    out = args.out
    if out is None:
        how_told = {key: getattr(args, key) for key in SAMPLER_KEYS}
        tag = hashed(opened.digest, args.num_samples, args.batch_size, labels, how_told, told)
        out = f"samples/{opened.folder}/{args.solver}{sampler.steps}_guidance{args.guidance:g}_seed{args.seed}_{tag}"
    with (
        nothing_left(Path(out), state.process_index),
        explain_out_of_memory(args.batch_size, args.batch_size, key="--batch-size"),
    ):
        write_samples(
            opened,
            sampler,
            Path(out),
            count=args.num_samples,
            batch_size=args.batch_size,
            labels=labels,
            seed=args.seed,
            frames=args.frames,
            device=device,
            class_names=class_names,
            edit=edit,
            low=low,
            upscaler=upscaler,
            npz=args.npz,
            told=told,
            **ranks,
        )
    if state.is_main_process:
        made = f"{args.num_samples} pictures of {opened.path} (step {opened.step}), {sampler.calls(edit)} network calls a batch"
        made += f", {state.num_processes} process(es)"
        print(f"{made}\n  {out}")
        made = ((args.frames, "denoising.gif"), (args.upscale, "upscaled"), (args.npz, "samples_*.npz"))
        for wanted, name in ((True, "grid.png"), *made, (sampler.source is not None, "ways.png")):
            if wanted and (name.startswith("samples_") or (Path(out) / name).exists()):
                print(f"  {out}/{name}")


if __name__ == "__main__":
    run_script(main)
