#!/usr/bin/env python
"""Measure a run: its likelihood in bits per dimension, term by term, on pictures that it did or did not see."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from src.config import UserError, config, parse_json, run_script, validate
from src.data import HeldOut, Sources, open_data
from src.diffusion import SPACINGS, TableSchedule, times
from src.sampling import open_trained
from src.sampling.likelihood import measure_likelihood
from src.sampling.sampler import parse_steps
from src.training.launch import explain_out_of_memory, start_sampling


@config
class Data:
    """What is measured on."""

    data: Sources
    held_out: HeldOut = 0.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python evaluate.py runs/digits_ddpm --likelihood --steps 100"
    )
    parser.add_argument("run", help="a run, a checkpoint, a final folder, or an export")
    parser.add_argument("--likelihood", action="store_true", help="the variational bound, in bits per dimension")
    parser.add_argument(
        "--part", choices=("held_out", "train"), help="of the run's pictures (default held_out where there are)"
    )
    parser.add_argument("--data", metavar="FOLDER", help="other pictures: a folder, or a source as in a config, as JSON")
    parser.add_argument("--num-images", type=int, metavar="N", help="the N whose names hash lowest (default all)")
    parser.add_argument("--steps", help="a respaced chain: how many, or counts for equal sections (default the whole table)")
    parser.add_argument("--spacing", choices=SPACINGS, default="even")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for the figures (default evaluations/RUN/...)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--json", action="store_true", help="the figures for another program, on standard output")
    return parser.parse_args()


def open_pictures(args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """The pictures that are meant: the run's own, or others."""
    few = {"subset": args.num_images} if args.num_images is not None else {}
    if args.data is not None and args.part is not None:
        raise UserError("--part is of the run's own pictures and --data are others; leave one out")
    if args.data is not None:
        source = parse_json(args.data) if args.data[:1] == "{" else {"source": "folder", "path": args.data}
        return open_data(validate(Data, {"data": {**source, **few}}, origin="--data").data, 0.0)[0]
    if "data" not in settings:
        raise UserError(f"{args.run} was imported and names no pictures: give --data FOLDER")
    spec = validate(Data, {key: settings[key] for key in ("data", "held_out") if key in settings}, origin=args.run)
    train_set, held_out = open_data(spec.data, spec.held_out)
    if args.part == "held_out" and held_out is None:
        raise UserError(f"{args.run} held nothing out; give --part train, or --data FOLDER")
    chosen = train_set if held_out is None or args.part == "train" else held_out
    return chosen.lowest(args.num_images) if args.num_images is not None else chosen


def main() -> None:
    args = arguments()
    if not args.likelihood:
        raise UserError("say what to measure: --likelihood")
    if args.batch_size < 1 or not 0 <= args.seed < 2**64 or (args.num_images is not None and args.num_images < 1):
        raise UserError("--batch-size and --num-images must be at least 1, --seed from 0 to 2^64 - 1")
    state, device = start_sampling(args.device)
    opened = open_trained(args.run, device)
    data = open_pictures(args, opened.config)
    schedule = opened.process.schedule
    if not isinstance(schedule, TableSchedule):
        raise UserError(f"{args.run} is on the blend: it has no chain of steps, so no bits per dimension")
    try:
        steps = parse_steps(args.steps) if args.steps is not None else schedule.num_steps
    except ValueError:
        raise UserError(f"--steps {args.steps}: give a number, or counts for equal sections, such as 100,50,25") from None
    chain = times(schedule, steps, args.spacing)
    told = json.dumps([opened.digest, data.fingerprint, chain.tolist(), args.batch_size, args.seed])
    out = Path(args.out or f"evaluations/{opened.name}/likelihood_{hashlib.sha256(told.encode()).hexdigest()[:8]}")
    with explain_out_of_memory(args.batch_size, args.batch_size, key="--batch-size"):
        found = measure_likelihood(
            opened,
            data,
            chain,
            out,
            batch_size=args.batch_size,
            seed=args.seed,
            rank=state.process_index,
            world=state.num_processes,
            barrier=state.wait_for_everyone,
        )
    if not state.is_main_process:
        return
    if args.json:
        print(json.dumps(found))
        return
    between = found["bits_per_dimension"] - found["prior"] - found["decoder"]
    print(
        f"{opened.path} (step {opened.step}) on {len(data)} pictures, {len(chain) - 1} steps:\n"
        f"  {found['bits_per_dimension']:.4f} +- {found['standard_error']:.4f} bits per dimension = prior "
        f"{found['prior']:.4f} + steps {between:.4f} + decoder {found['decoder']:.4f}\n  {out}/likelihood.png"
    )


if __name__ == "__main__":
    run_script(main)
