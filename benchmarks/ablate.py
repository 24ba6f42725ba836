#!/usr/bin/env python
"""The race's recipe, one change a row: each row trains for the same minutes and is measured with a few hundred images.

  nice -n 10 python benchmarks/ablate.py [benchmarks/ablations.json] [--minutes 5] [--samples 256] [--seed 2] [--only NAME]

The file lists rows: {"name", "set": [overrides of configs/cifar10_race.json]}, where a "first": {"size", "share"} trains for
that share of the time on images of that size and goes on from there, or {"name", "of": another row} with a "sampler": {}, or
with an "ema": width (of posthoc_ema.py), which draws from that row's weights without training. A "guide": 0.125, 0.25 or 0.5
beside the "sampler" is autoguidance by the weights after that share of the time, whose training costs nothing and whose calls
count. Results are added to benchmarks/results/ablations.json; a row that is done there with this seed, these minutes and this
recipe is not done again. At the end the table is printed and written beside them. EfficientNet-Lite2 decides, with one standard
error; Lite0's distance, which alone older rows have, stands beside it. (EDM's preconditioning has no row: for data of variance
1 its network learns what the baseline's does, the target `v`.)
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import ROOT, machine
from benchmarks.measures import LITE0, LITE2, ask_for_networks
from benchmarks.peers import FRACTIONS
from benchmarks.photos import open_folder
from benchmarks.race import CONFIG, draw_ours, floor_of, prepare_images, reference, train_ours
from src.config import UserError, read_json, run_script
from src.data.packing import pack
from src.training.ema import post_hoc

RESULTS = ROOT / "benchmarks" / "results" / "ablations.json"
# What makes a result this row's.
KEYS = ("name", "seed", "minutes", "samples", "recipe", "set", "first", "of", "sampler", "ema", "guide")
Row = dict[str, Any]


def check(rows: Sequence[Row]) -> None:
    """A UserError for a row that cannot be run."""
    trained_names = [row["name"] for row in rows if "set" in row]
    for row in rows:
        if ("set" in row) == ("of" in row) or ("of" in row and not {"sampler", "ema"} & set(row)):
            raise UserError(f"the row {row.get('name')!r} needs a `set`, or `of` with `sampler` or `ema`")
        if "guide" in row and ("sampler" not in row or row["guide"] not in FRACTIONS[:-1]):
            raise UserError(
                f"the guide of the row {row['name']!r} is one of {FRACTIONS[:-1]}, beside a `sampler` with a guidance"
            )
        if row.get("of", trained_names[0]) not in trained_names:
            raise UserError(
                f"the row {row['name']!r} is of {row['of']!r}, which is no row that trains: {', '.join(trained_names)}"
            )


def identified(row: Row, *, seed: int, minutes: float, samples: int, config: Path = CONFIG) -> Row:
    """A row with all that its result depends on."""
    recipe = hashlib.sha256(json.dumps(read_json(config), sort_keys=True).encode()).hexdigest()[:8]
    return {**row, "seed": seed, "minutes": minutes, "samples": samples, "recipe": recipe}


def is_same(row: Row, result: Row) -> bool:
    return all(row.get(key) == result.get(key) for key in KEYS)


def is_done(row: Row, results: Sequence[Row]) -> bool:
    """Whether the row was measured by the network that decides today."""
    return any("lite2" in result and is_same(row, result) for result in results)


def small_first(first: Row, out: Path, folder: Path, seconds: float, sets: list[str]) -> tuple[list[str], float]:
    """Train on smaller images; gives the overrides that go on from there, and the seconds that are left."""
    size, spent = first["size"], first["share"] * seconds
    small = folder / f"packed_{size}"
    if not small.exists():
        pack(open_folder(folder / "train"), small, size=size, channels=3)
    (out / "first").mkdir()
    training = train_ours(out / "first", folder, spent, [*sets, f"data.path={small}", f"image.size={size}"])
    print(f"first {training['fractions']['1.0']['images']} images of {size} px", flush=True)
    return [*sets, f"init_from={out / 'first' / 'weights' / '1.0'}"], seconds - spent


def run_row(row: Row, work: Path, folder: Path) -> Row:
    """Train where there is something to train, draw and measure."""
    out = work / f"{row['recipe']}_{row['minutes']:g}_{row['seed']}" / (row.get("of") or row["name"])
    weights, summary_file = out / "weights" / "1.0", out / "trained.json"
    if not summary_file.exists():
        if "of" in row:
            raise UserError(f"the row {row['name']!r} draws from {row['of']!r}, whose weights are gone: run that one first")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        seconds, sets = 60 * row["minutes"], [f"seed={row['seed']}", *row["set"]]
        if "first" in row:
            sets, seconds = small_first(row["first"], out, folder, seconds, sets)
        training = train_ours(out, folder, seconds, sets)
        summary_file.write_text(json.dumps(training))
    training = read_json(summary_file)
    if "ema" in row:
        weights, _ = post_hoc(out, read_json(weights / "progress.json")["step"], row["ema"])
    began = time.perf_counter()
    guide = {"guide_with": str(out / "weights" / str(row["guide"]))} if "guide" in row else {}
    samples = draw_ours(weights, row["samples"], {**row["sampler"], **guide} if "sampler" in row else None)
    seconds = time.perf_counter() - began
    numbers = reference(folder, "train").measure(samples)
    measured = {
        "lite2": numbers[LITE2],
        "distance": numbers[LITE0]["frechet"],
        "seconds_of_sampling": round(seconds, 1),
        "machine": machine("accelerate"),
    }
    return {**row, **measured, "parameters": training["parameters"], **training["fractions"]["1.0"], "used": training["used"]}


def table(results: Sequence[Row], held_out: Sequence[float] = (), recipe: str | None = None) -> str:
    """The rows, the best first, each against its own seed's baseline: a table for each length of training and each recipe,
    `recipe` first. `held_out` are the distances of as many held-out images, in Lite2 and in Lite0."""

    def kin(row: Row) -> tuple[Any, ...]:
        return row["recipe"] != recipe, row["recipe"], row["minutes"], row["samples"], row["seed"], "lite2" not in row

    def value(row: Row) -> float:
        return row["lite2"]["frechet"] if "lite2" in row else row["distance"]

    base = {kin(row): row for row in results if row["name"] == "baseline"}
    lines, group = list[str](), None
    for row in sorted(results, key=lambda row: (kin(row)[:-2], kin(row)[-1], kin(row)[-2], value(row))):
        if group != (group := kin(row)[:-2]):
            which = "The recipe as it is" if row["recipe"] == recipe else f"An earlier recipe ({row['recipe']})"
            lines += ["", f"{which}, {row['minutes']:g} minutes, {row['samples']} images", ""]
            lines.append("| row | change | seed | parameters | images seen | Lite2 | against the baseline | Lite0 |")
            lines.append("|" + " --- |" * 8)
        how = json.dumps(row["sampler"]) if "sampler" in row else f"post-hoc EMA of width {row.get('ema')}"
        how += f" guided by {row['guide']:g} of the time" if "guide" in row else ""
        before = [f"{row['first']['share']:.0%} of the time at {row['first']['size']} px"] if "first" in row else []
        change = " ".join([*before, *row["set"]]) if "set" in row else f"{row['of']} with {how}"
        against, first = "", ""
        if kin(row) in base:
            against = f"{value(row) - value(base[kin(row)]):+.1f}"
        if "lite2" in row:
            first = f"{row['lite2']['frechet']:.1f} ± {row['lite2']['frechet_error']:.1f}"
            if against and row["name"] != "baseline":
                errors = row["lite2"]["frechet_error"], base[kin(row)]["lite2"]["frechet_error"]
                against += f" ± {math.hypot(*errors):.1f}"
        cells = [
            row["name"],
            change,
            f"{row['seed']}",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['images']:,}",
            first,
            against,
        ]
        lines.append(f"| {' | '.join([*cells, format(row['distance'], '.1f')])} |")
    if held_out:
        lines.append(f"\nas many held-out images: {held_out[0]:.1f} in Lite2, {held_out[1]:.1f} in Lite0")
    return "\n".join(lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="?", default=ROOT / "benchmarks" / "ablations.json")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", help="the name of a row; repeatable")
    args = parser.parse_args()
    rows = read_json(args.rows)
    check(rows)
    unknown = set(args.only or ()) - {row["name"] for row in rows}
    if unknown:
        raise UserError(f"--only {', '.join(sorted(unknown))}: no such row; there are {', '.join(row['name'] for row in rows)}")
    ask_for_networks()
    folder = prepare_images(ROOT / "datasets")
    results = read_json(RESULTS) if RESULTS.exists() else []
    for row in rows:
        wanted = identified(row, seed=args.seed, minutes=args.minutes, samples=args.samples)
        if (args.only and row["name"] not in args.only) or is_done(wanted, results):
            continue
        print(f"{row['name']} ...", flush=True)
        measured = run_row(wanted, ROOT / "runs" / "ablations", folder)
        results = [*(result for result in results if not is_same(wanted, result)), measured]
        staged = RESULTS.with_suffix(".part")
        staged.write_text(json.dumps(results, indent=1) + "\n")
        staged.rename(RESULTS)
        print(f"{row['name']}: {measured['lite2']['frechet']:.1f}", flush=True)
    now = identified({}, seed=args.seed, minutes=args.minutes, samples=args.samples)["recipe"]
    floor = floor_of(folder, args.samples)
    held_out = [floor[network]["frechet"] for network in (LITE2, LITE0)]
    text = f"{machine('accelerate')}\n\n{table(results, held_out, now)}\n"
    RESULTS.with_suffix(".md").write_text(f"`python benchmarks/ablate.py`, {time.strftime('%Y-%m-%d')}\n\n{text}")
    print(text)


if __name__ == "__main__":
    run_script(main)
