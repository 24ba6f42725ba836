#!/usr/bin/env python
"""Draw images from a run: PNGs, a grid, the facts to draw them again, the GIF of how they came about; or invert images."""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
from pathlib import Path

import torch

from src.config import CommandLine, UserError, refuse_options, run_script
from src.config.sizes import describe_size
from src.runs.classifier import open_classifier
from src.runs.opened import Opened, Run, open_run
from src.runtime.failures import explain_failure, explain_out_of_memory
from src.runtime.launch import start_sampling
from src.runtime.processes import ranks_of
from src.sampling import SamplerConfig, build_sampler
from src.sampling.cascade import open_upsampler, sampler_of, write_larger
from src.sampling.conditions import add_condition_arguments, check_conditions
from src.sampling.config import SAMPLER_KEYS, SIZE_HELP, add_arguments, count_for_classes, sampler_config, without_newer
from src.sampling.edit import at_size, files_of, fingerprint, no_start, start_from_images
from src.sampling.files import remove_if_empty, short_hash, write_samples
from src.sampling.paths import write_inversions, write_points
from src.sampling.plan import plan_samples
from src.sampling.sampler import describe, random_labels
from src.sampling.upscaling import open_upscaler, upscale_folder

IMAGES_ONLY = {"stop_at", "double_sampling"}  # these options are for drawing new images


def arguments() -> tuple[argparse.Namespace, argparse.Namespace]:
    """The arguments of the command line, and the defaults."""
    parser = CommandLine(
        description=__doc__,
        epilog="example: python sample.py runs/digits_ddpm --classes 3/7 --num-samples 16 --guidance 2 --frames",
    )
    parser.add_argument("run", nargs="?", help="a run, a checkpoint, a final folder, an export, or OWNER/NAME on the hub")
    parser.add_argument("--out", help="folder for the images (default samples/RUN/...)")
    parser.add_argument("--num-samples", type=int, help="default 16, or a few more for --classes; of each of --condition 1")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time; changes them only by rounding")
    parser.add_argument("--classes", help="names or numbers, A/B/C, dealt in equal blocks (default: random)")
    parser.add_argument("--size", metavar="HxW", help=SIZE_HELP)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", action="store_true", help="write the denoising GIF and its frames")
    parser.add_argument("--npz", action="store_true", help="also all in one file, as guided-diffusion's evaluator reads it")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    add_arguments(parser)
    edit = parser.add_argument_group("from an image")
    edit.add_argument("--image", metavar="FILE", help="an image to start from, or to draw a part of anew")
    edit.add_argument(
        "--start-at", type=int, default=0, metavar="S", help="add noise to the image, as after S steps, and go on from there"
    )
    edit.add_argument("--mask", metavar="FILE", help="white where the image is drawn anew; of the same size")
    edit.add_argument("--resamplings", type=int, default=1, metavar="N", help="take each step N times, so that parts agree")
    edit.add_argument("--source", metavar="FOLDER", help="of a run between two data sets: what to start from")
    edit.add_argument("--invert", metavar="PLACE", help="an image, or a folder: back to the source, and forth again")
    edit.add_argument("--low", metavar="FOLDER", help="what an upsampler makes larger: images, or an .npz of samples")
    add_condition_arguments(parser)
    upscale = parser.add_argument_group("upscaling (Real-ESRGAN)")
    upscale.add_argument("--upscale", action="store_true", help="the samples four times as large, too")
    upscale.add_argument("--upscale-only", metavar="FOLDER", help="the images of a folder instead, into --out")
    upscale.add_argument("--upscaler", metavar="FILE", help="its weights, or anime (default: those for photos)")
    return parser.parse_args(), parser.parse_args([])


def check(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """A UserError for arguments that make no sense together, before anything is opened."""
    wanted = 1 if args.num_samples is None else args.num_samples
    if wanted < 1 or args.batch_size < 1 or args.resamplings < 1 or not 0 <= args.seed < 2**64:
        raise UserError("--num-samples, --batch-size and --resamplings must be at least 1, --seed from 0 to 2^64 - 1")
    if (args.run is None) == (args.upscale_only is None):
        raise UserError("give a run to sample from, or --upscale-only FOLDER")
    if args.upscale_only is not None:
        used = {"upscale_only", "upscaler", "out", "batch_size", "device"}
        refuse_options(args, defaults, vars(args).keys() - used, "is about drawing images, and --upscale-only draws none")
    check_conditions(args)
    if args.image is None and ((args.mask is not None and args.condition is None) or args.start_at):
        raise UserError("--mask and --start-at are about an image: give it with --image")
    if args.resamplings > 1 and args.mask is None:
        raise UserError("--resamplings belongs to --mask")
    if args.upscaler is not None and not (args.upscale or args.upscale_only):
        raise UserError("--upscaler is for --upscale and --upscale-only")


def draw_points(
    run: Run, spec: SamplerConfig, args: argparse.Namespace, defaults: argparse.Namespace, device: torch.device
) -> None:
    """Draw points from a run of 2-D points, and plot them."""
    used = {"run", "out", "num_samples", "classes", "seed", "frames", "device", *SAMPLER_KEYS} - IMAGES_ONLY
    used -= {"threshold", "guide_with"}
    refuse_options(args, defaults, vars(args).keys() - used, f"is about images, and {args.run} is a run of 2-D points")
    count = args.num_samples or count_for_classes(20_000, args.classes, run.class_names)
    labels = random_labels(args.seed, range(count), run.num_classes) if run.num_classes is not None else None
    labels = run.labels(args.classes, count) if args.classes is not None else labels
    sampler = build_sampler(run, spec)
    request = {"weights": run.digest, "num_samples": count, "classes": args.classes, **describe(sampler, args.seed)}
    out = Path(args.out or f"samples/{run.folder}/{args.solver}{sampler.steps}_{short_hash(request)}")
    options = {"labels": labels, "device": device, "frames": args.frames, "request": request}
    with remove_if_empty(out), explain_failure(f"{out}: the plots of the points"):
        paths = write_points(sampler, out, count=count, seed=args.seed, **options)
    print(f"{count} points of {run.path} (step {run.step}), {sampler.calls()} network calls")
    print("\n".join(f"  {path}" for path in paths))


def invert(opened: Opened, spec: SamplerConfig, args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Bring images back to their source, and forth again."""
    used = {"run", "invert", "out", "classes", "size", "batch_size", "device", *SAMPLER_KEYS} - IMAGES_ONLY
    refuse_options(args, defaults, vars(args).keys() - used, "is about drawing new images, and --invert draws none")
    files = files_of(args.invert)
    opened = at_size(opened, args.size, args.invert)
    label = opened.labels(args.classes, 1)[0] if args.classes is not None else None
    sampler = build_sampler(opened, spec, source=None if opened.gaussian else no_start)
    tag = short_hash(opened.digest, fingerprint(files), label, describe(sampler, 0))
    out = Path(args.out or f"samples/{opened.folder}/inversion_{args.solver}{sampler.steps}_{tag}")
    with remove_if_empty(out):
        mean = write_inversions(opened, sampler, files, out, label=label, batch_size=args.batch_size)
    print(
        f"{len(files)} images to their source and back by {opened.path}, {sampler.calls()} network calls each way:\n"
        f"  lost on the way {100 * mean['rms']:.2f} % RMS; source of standard deviation {mean['std']:.3f}, correlation with "
        f"the\n  image {mean['correlation']:.3f}\n  {out}/inversion.png, {out}/sources.npy"
    )


def main() -> None:
    args, defaults = arguments()
    check(args, defaults)
    spec = sampler_config(args)
    state, device = start_sampling(args.device)
    upscaler = open_upscaler(args.upscaler, device) if args.upscale or args.upscale_only else None
    if args.upscale_only:
        out = Path(args.out or f"samples/{Path(args.upscale_only).resolve().name}_upscaled")
        assert upscaler is not None
        with explain_out_of_memory(args.batch_size, args.batch_size, key="--batch-size"):
            paths = upscale_folder(Path(args.upscale_only), out, upscaler, batch_size=args.batch_size, ranks=ranks_of(state))
        if state.is_main_process:
            print(f"{len(paths)} images, {upscaler.scale} times as large, in {out}")
        return

    opened = open_run(args.run, device)
    if not isinstance(opened, Opened):
        if state.is_main_process:
            draw_points(opened, spec, args, defaults, device)
        return
    if args.invert is not None:
        if opened.condition is not None:
            raise UserError(f"{args.run} draws from images, and --invert knows none for each source; leave it out")
        if state.is_main_process:
            invert(opened, spec, args, defaults)
        return
    opened = at_size(opened, args.size, args.image or args.source)
    larger = open_upsampler(args.then, device) if args.then is not None else None
    classifier = open_classifier(args.classifier, device) if args.classifier is not None else None
    source = start_from_images(opened, args.source) if args.source is not None else None
    sampler = build_sampler(opened, spec, classifier, source=source, condition_guidance=args.condition_guidance)
    plan = plan_samples(opened, sampler, args, classifier)
    labels, class_names, request = plan.labels, plan.class_names, plan.request
    if upscaler is not None:
        request["upscaler"] = upscaler.digest

    words = without_newer({key: getattr(args, key) for key in SAMPLER_KEYS})
    words |= {"guide_with": sampler.guide.digest} if sampler.guide is not None else {}
    tag = short_hash(opened.digest, args.num_samples, args.batch_size, labels, words, request)
    name = f"{args.solver}{sampler.steps}_guidance{args.guidance:g}_seed{args.seed}_{tag}"
    out = Path(args.out or f"samples/{opened.folder}/{name}")
    job = {**plan.job, "upscale": upscaler.upscale if upscaler is not None else None}
    job |= {key: getattr(args, key) for key in ("batch_size", "seed", "frames", "npz")}
    with remove_if_empty(out, state.process_index), explain_out_of_memory(args.batch_size, args.batch_size, key="--batch-size"):
        write_samples(opened, sampler, out, **job, device=device, ranks=ranks_of(state), request=request)
        if larger is not None:
            names = [class_names[label] for label in labels] if labels is not None else None
            options = {"class_names": names, "level": args.condition_noise, "seed": args.seed, "batch_size": args.batch_size}
            write_larger(larger, sampler_of(larger, spec), out, device=device, ranks=ranks_of(state), **options)
    if state.is_main_process:
        calls, processes = sampler.calls(plan.edit), state.num_processes
        print(
            f"{args.num_samples} images of {opened.path} (step {opened.step}), {calls} network calls a batch, "
            f"{processes} process(es)\n  {out}"
        )
        if sampler.guide is not None and not spec.guided:
            print("  --guide-with changed nothing, since --guidance was 1: give --guidance 2")
        if larger is not None:
            print(f"  {out}/larger: the same, {describe_size(larger.image.sides)}, by {larger.path} (step {larger.step})")
        beside = {"side_by_side.png": plan.conditioned is not None, "ways.png": sampler.source is not None}
        wanted = {"grid.png": True, "denoising.gif": args.frames, "upscaled": args.upscale, "samples_*.npz": args.npz}
        for name, is_wanted in {**wanted, **beside}.items():
            if is_wanted and any(out.glob(name)):
                print(f"  {out}/{name}")


if __name__ == "__main__":
    run_script(main)
