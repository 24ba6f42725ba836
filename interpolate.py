#!/usr/bin/env python
"""Animate the way from image to image: through seeds along great circles, or through your own images; MP4 and GIF.

The noise that a solver draws in a step is the same in all frames.
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
import hashlib
import json
from pathlib import Path

import torch

from src import figures
from src.config import CommandLine, UserError, run_script
from src.diffusion import invertible_solvers
from src.runs.opened import Opened, open_trained
from src.runtime.failures import explain_failure, explain_out_of_memory
from src.runtime.launch import start_sampling
from src.runtime.processes import ranks_of
from src.sampling import build_sampler
from src.sampling.config import SIZE_HELP, add_arguments, count_for_classes, sampler_config
from src.sampling.edit import at_size, encode_images, files_of, no_start, start_from_images
from src.sampling.files import claim, remove_if_empty
from src.sampling.paths import difference, inverted, plan_frames, write_frames
from src.sampling.sampler import describe, random_labels


def arguments() -> argparse.Namespace:
    parser = CommandLine(
        description=__doc__,
        epilog="example: python interpolate.py runs/digits_ddpm --seeds 3/14/15 --classes 1/7/4 --guidance 2 --loop",
    )
    parser.add_argument("run", help="a run, a checkpoint, a final folder, an export, or OWNER/NAME on the hub")
    keys = parser.add_argument_group("keys: what the animation goes through")
    keys.add_argument("--seeds", metavar="A/B/C", help="the first image that sample.py draws of each of these seeds")
    keys.add_argument("--num-seeds", type=int, metavar="N", help="the same of N seeds from --seed on (default about 5)")
    keys.add_argument("--seed", type=int, default=0)
    keys.add_argument("--pictures", nargs="+", metavar="FILE", help="your own, inverted; with --solver rk4 they come back best")
    keys.add_argument("--source", metavar="FOLDER", help="of a run between two data sets: what becomes of these images")
    keys.add_argument("--classes", help="names or numbers, A/B/C, dealt to the keys in equal blocks and blended between them")
    keys.add_argument("--loop", action="store_true", help="go on from the last key to the first")
    keys.add_argument("--frames-between", type=int, default=48, metavar="N", help="from one key to the next (default 48)")
    keys.add_argument("--fps", type=int, default=24, help="frames a second (default 24)")
    parser.add_argument("--size", metavar="HxW", help=SIZE_HELP)
    parser.add_argument("--out", help="folder for frames, MP4 and GIF (default samples/RUN/interpolation_...)")
    parser.add_argument("--batch-size", type=int, default=16, help="frames at a time; changes them only by rounding")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    add_arguments(parser, of_animation=True)
    return parser.parse_args()


def check(args: argparse.Namespace) -> tuple[list[int], list[Path]]:
    """The keys: seeds, or files; a UserError for arguments that make no sense, before anything is opened."""
    if sum(value is not None for value in (args.seeds, args.num_seeds, args.pictures, args.source)) > 1:
        raise UserError("--seeds, --num-seeds, --pictures and --source each name the keys; give one of them")
    if args.frames_between < 1 or args.batch_size < 1 or not 1 <= args.fps <= 100:
        raise UserError("--frames-between and --batch-size must be at least 1, --fps from 1 to 100")
    words = args.seeds.split("/") if args.seeds is not None else []
    if not all(word.isdecimal() and word.isascii() for word in words):
        raise UserError(f"--seeds {args.seeds}: give numbers with a slash between them, such as 3/14/15")
    places = args.pictures or ([args.source] if args.source is not None else [])
    files = [file for place in places for file in files_of(place)]
    count = 0 if files else count_for_classes(5, args.classes) if args.num_seeds is None else args.num_seeds
    seeds = [int(word) for word in words] or list(range(args.seed, args.seed + count))
    if not all(0 <= seed < 2**64 for seed in (*seeds, args.seed)):
        raise UserError("seeds go from 0 to 2^64 - 1")
    if len(files or seeds) < 2:
        raise UserError(f"an animation goes through two keys or more, and here is {len(files or seeds)}; give more")
    if args.pictures and (args.solver not in invertible_solvers() or args.eta):
        name = f"{args.solver} with eta {args.eta:g}" if args.eta else args.solver
        raise UserError(
            f"{name} cannot be gone back, as --pictures need; allowed: {', '.join(invertible_solvers())} (with eta 0)"
        )
    return seeds, files


def classes_of(opened: Opened, words: str | None, seeds: list[int], files: list[Path]) -> list[int] | None:
    """A class for each key: those of --classes, else of a seed the class that sample.py draws, and of a file no class."""
    if words is not None:
        return opened.labels(words, len(seeds or files))
    if opened.num_classes is None:
        return None
    if files:
        return [opened.no_class() or 0] * len(files)
    return [random_labels(seed, [0], opened.num_classes)[0] for seed in seeds]


def main() -> None:
    args = arguments()
    seeds, files = check(args)
    spec = sampler_config(args)
    state, device = start_sampling(args.device)
    ranks = ranks_of(state)
    opened = open_trained(args.run, device)
    if opened.condition is not None:
        raise UserError(f"{args.run} is an upsampler, which draws from other images; give the run that draws those")
    opened = at_size(opened, args.size, files[0] if files else None)
    source = start_from_images(opened, args.source) if args.source is not None else None
    source = no_start if args.pictures and not opened.gaussian else source
    sampler = build_sampler(opened, spec, source=source)
    labels = classes_of(opened, args.classes, seeds, files)
    x0 = encode_images(opened, files) if args.pictures else None

    # Claim the folder of the frames
    names = [*opened.class_names, None]
    request = {
        "weights": opened.digest,
        "run": opened.name,
        "step": opened.step,
        **describe(sampler, seeds[0] if seeds else args.seed),
        "keys": seeds or [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        "inverted": x0 is not None,
        "classes": [names[label] for label in labels] if labels is not None else None,
        "frames_between": args.frames_between,
        "loop": args.loop,
        "batch_size": args.batch_size,
    }
    if args.size is not None or opened.buckets:
        request["size"] = list(opened.image.sides)
    tag = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:6]
    out = Path(args.out or f"samples/{opened.folder}/interpolation_{tag}")
    facts = {"files": [str(file) for file in files], "path": str(opened.path), "config": opened.config}
    claim(out, request, facts, what="frames", ranks=ranks)

    # Draw the frames
    places, batch = plan_frames(len(seeds or files), args.frames_between, loop=args.loop), args.batch_size
    with remove_if_empty(out, ranks.rank), explain_out_of_memory(batch, batch, key="--batch-size"):
        if x0 is not None:
            starts = inverted(sampler, x0, labels, batch_size=batch)
        else:  # the start of each seed, or the images of the source in their order
            starts = torch.cat([sampler.start(seed, [0]) for seed in seeds] or [sampler.start(0, range(len(files)))])
        options = {"seed": request["seed"], "batch_size": batch, "device": device, "ranks": ranks}
        paths = write_frames(opened, sampler, starts, labels, places, out / "frames", **options)
    if not state.is_main_process:
        return

    # Write the GIF, and the MP4 where ffmpeg is installed
    pattern = out / "frames" / "frame_%05d.png"
    written = [out / "frames", out / "animation.gif"]
    try:
        figures.mp4(pattern, out / "animation.mp4", fps=args.fps)
        written.append(out / "animation.mp4")
    except (UserError, RuntimeError) as error:
        print(error)
    with explain_failure(out / "animation.gif"):
        figures.gif(paths, pattern, out / "animation.gif", fps=args.fps)
    title = f"{len(paths)} frames through {len(seeds or files)} keys of {opened.path} (step {opened.step})"
    print(f"{title}, {ranks.world} process(es)")
    print(f"  {sampler.calls()} network calls a frame, {len(paths) / args.fps:.1f} seconds at {args.fps} frames a second")
    if x0 is not None:
        levels = difference(sampler.decode(x0), paths[:: args.frames_between][: len(files)])
        print(
            f"  the images come back to {levels:.1f} of 255 levels on average; more --steps or --solver rk4 bring them closer"
        )
    print("\n".join(f"  {path}" for path in written))


if __name__ == "__main__":
    run_script(main)
