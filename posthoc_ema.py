#!/usr/bin/env python
"""Average the weights of a finished run over another length, and draw from the average: no training is done again.

python posthoc_ema.py runs/wikiart256_ldm 0.03 0.06 0.12     into runs/wikiart256_ldm/ema/width_0.03 and so on
python evaluate.py runs/wikiart256_ldm/ema/width_0.06        which is the best? (sample.py and the others take it, too)

A width is the standard deviation of the times that are averaged, as a part of the training: 0.05 is a short average, 0.2 a
long one. The run must have been trained with `ema.snapshot_every`. Karras et al. 2023, arXiv:2312.02696.
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
from pathlib import Path

from src.config import CommandLine, UserError, quoted, read_json, run_script
from src.runs.folders import read_weights
from src.training.ema import post_hoc

LEAST, MOST, POOR = 0.01, 0.28, 0.1


def main() -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("widths", type=float, nargs="+", metavar="WIDTH")
    args = parser.parse_args()
    for width in args.widths:
        if not LEAST <= width <= MOST:
            raise UserError(f"a width of {width:g}: give one from {LEAST} to {MOST}")
    if not args.run.is_dir():
        raise UserError(f"{args.run}: there is no such run")
    last_step = read_weights(args.run).step  # of the run itself: a run that went back may have later snapshots
    out = args.run
    for width in args.widths:
        out, missed = post_hoc(args.run, last_step, width)
        note = f"; POORLY: {missed:.0%} of it is missed, as there are few snapshots" if missed > POOR else ""
        print(f"{out}: at step {read_json(out / 'progress.json')['step']}{note}")
    print(f"which is the best: python evaluate.py {quoted(out)}; draw from it: python sample.py {quoted(out)}")


if __name__ == "__main__":
    run_script(main)
