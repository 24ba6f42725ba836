#!/usr/bin/env python
"""Draw pictures from a run: PNGs, a grid, what is needed to draw them again, and the GIF of how they came about."""

import argparse
import hashlib
import json
from pathlib import Path

from src.config import UserError, run_script, validate
from src.diffusion import SOLVERS, SPACINGS
from src.sampling import SamplerConfig, open_trained
from src.sampling.files import write_samples
from src.sampling.sampler import random_labels
from src.training.launch import explain_out_of_memory, start_sampling


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python sample.py runs/digits_ddpm --classes 3/7 --num-samples 16 --guidance 2 --frames",
    )
    parser.add_argument("run", help="a run, a checkpoint, a final folder, or an export")
    parser.add_argument("--out", help="folder for the pictures (default samples/RUN/...)")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time; changes them only by rounding")
    parser.add_argument("--classes", help="names or numbers, A/B/C, dealt in equal blocks (default: random)")
    parser.add_argument("--solver", choices=SOLVERS, default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--spacing", choices=SPACINGS, default="even")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM's noise: 0 none, 1 as ancestral sampling")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale of classifier-free guidance; 1 is none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", action="store_true", help="write the denoising GIF and its frames")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.num_samples < 1 or args.batch_size < 1 or not 0 <= args.seed < 2**64:
        raise UserError("--num-samples and --batch-size must be at least 1, --seed from 0 to 2^64 - 1")
    spec = validate(
        SamplerConfig,
        {key: getattr(args, key) for key in ("solver", "steps", "spacing", "eta", "guidance")},
        origin="arguments",
    )
    state, device = start_sampling(args.device)
    opened = open_trained(args.run, device)
    sampler = opened.sampler(spec)
    labels = None
    if args.classes is not None:
        labels = opened.labels(args.classes, args.num_samples)
    elif opened.num_classes is not None:
        labels = random_labels(args.seed, range(args.num_samples), opened.num_classes)

    out = args.out
    if out is None:
        told = json.dumps([opened.digest, args.num_samples, args.batch_size, labels, vars(args)["spacing"], args.eta])
        tag = hashlib.sha256(told.encode()).hexdigest()[:6]
        out = f"samples/{opened.name}/{args.solver}{args.steps}_guidance{args.guidance:g}_seed{args.seed}_{tag}"
    with explain_out_of_memory(args.batch_size, args.batch_size, key="--batch-size"):
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
            rank=state.process_index,
            world=state.num_processes,
            barrier=state.wait_for_everyone,
        )
    if state.is_main_process:
        made = f"{args.num_samples} pictures of {opened.path} (step {opened.step}), {sampler.calls} network calls a batch"
        made += f", {state.num_processes} process(es)"
        print(f"{made}\n  {out}/grid.png")
        if args.frames:
            print(f"  {out}/denoising.gif")


if __name__ == "__main__":
    run_script(main)
