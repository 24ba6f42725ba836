#!/usr/bin/env python
"""What only a GPU can show, in two commands of at most nine minutes each on one large card, which need nothing from outside.

  python benchmarks/gpu.py first  [--minutes 8.5] [--out runs/gpu] [--parts tests parallel resumed steps]
  python benchmarks/gpu.py second [--minutes 8.5] [--out runs/gpu] [--set optimizer.lr=2e-3]

The first runs the GPU's tests (tests/test_gpu.py); then DDP and FSDP of one process against the plain run; then a killed and
resumed run with `deterministic: true` against one that was left alone, compiled too; then training steps on pixels, on latents
and of an autoencoder in float32, bf16, channels_last, compiled and with CUDA graphs, with the share of the card's peak rate.
Each part has a limit, and one for which too little time is left is skipped; both are said.

The second trains on CIFAR-10 (../shared/data, or --data) for the time that is left once the images are prepared, in pieces that
resume, and measures each (benchmarks/gpu_cifar10.py). The same command goes on where it was.

JSON and images are written into --out as it goes, and gpu.md with the tables; so a limit, or a kill, loses only what was
being measured. `--small` tries everything at toy size, on a CPU.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import gpu_cifar10, gpu_runs, gpu_steps, race
from benchmarks.common import ROOT, machine
from src.config import UserError, read_json, run_script
from src.storage.files import as_json, write_whole


class Part(NamedTuple):
    """A part of the first command: what runs it, what shows its JSON, and how many seconds it takes at least and at most."""

    title: str
    run: Callable[..., dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    least: float
    most: float


def _steps_apart(file: Path, deadline: float, *, small: bool = False) -> dict[str, Any]:
    """The table of steps in a process of its own, since nothing can stop a compiler that hangs in this one."""
    seconds = deadline - time.monotonic()
    words = [sys.executable, "benchmarks/gpu.py", "steps", "--out", str(file.parent), "--minutes", f"{seconds / 60:.3f}"]
    log = file.with_suffix(".txt")
    status = gpu_runs.wait_until(gpu_runs.start([*words, *(["--small"] if small else [])], log), deadline + 5)
    table = read_json(file) if file.exists() else {"rows": [], "machine": machine(), "peak": None, "product": 0.0}
    state = gpu_runs.say_end(status, log)
    for row in table["rows"]:
        if row["state"] == "running":
            row["state"] = state
    table["state"] = state
    write_whole(file, as_json(table))
    return table


PARTS = {
    "tests": Part("The GPU's tests", gpu_runs.run_tests, gpu_runs.tests_table, 40, 150),
    "parallel": Part("DDP and FSDP of one process", gpu_runs.run_parallel, gpu_runs.parallel_table, 25, 50),
    "resumed": Part("Killed and resumed, deterministic, in bf16", gpu_runs.run_resumed, gpu_runs.resumed_table, 40, 90),
    "steps": Part("A training step", _steps_apart, gpu_steps.table_of, 30, float("inf")),
}


def run_first(out: Path, minutes: float, names: list[str], *, small: bool = False) -> None:
    """Run the parts one after the other until the minutes are over, each with its limit; one without enough time is skipped."""
    deadline = time.monotonic() + 60 * minutes
    for name in names:
        part, file, left = PARTS[name], out / f"{name}.json", deadline - time.monotonic()
        print(f"{name}: {left:.0f} s are left", flush=True)
        if left < part.least and not small:
            why = f"skipped: it takes {part.least:.0f} s, and {max(0.0, left):.0f} s are left"
            write_whole(file, as_json({"state": why}))
        else:
            file.unlink(missing_ok=True)
            try:
                part.run(file, time.monotonic() + min(left, part.most), small=small)
            except Exception as error:  # the other parts are worth having
                write_whole(file, as_json({"state": f"failed: {type(error).__name__}: {error}"[:500]}))
        write_page(out)
        print(shown(name, read_json(file)), flush=True)


def run_second(out: Path, minutes: float, archive: Path, **options: Any) -> None:
    """Prepare the images, then train on them for what is left of the minutes, with the `options` of train_cifar10."""
    deadline = time.monotonic() + 60 * minutes
    folder = race.prepare_images(ROOT / "datasets", archive)
    print(f"{folder.name}: {deadline - time.monotonic():.0f} s are left for training, drawing and measuring", flush=True)
    try:
        gpu_cifar10.train_cifar10(out, folder, deadline, **options)
    finally:
        write_page(out)
    print(shown("cifar10", read_json(out / "cifar10.json")), flush=True)


# ---------------------------------------------------------------------------------------------- what is shown


def shown(name: str, result: dict[str, Any]) -> str:
    """A part's title, its state where it is not done, and its table."""
    title, table = "CIFAR-10", gpu_cifar10.table_of
    if name in PARTS:
        title, table = PARTS[name].title, PARTS[name].table
    lines, state = [f"## {title}", ""], result.get("state", "done")
    lines += [] if state == "done" else [state, ""]
    return "\n".join([*lines, *([table(result)] if len(result) > 1 or "rows" in result else [])])


def write_page(out: Path) -> None:
    """gpu.md: the tables of all parts whose JSON is in the folder."""
    known = {name: out / f"{name}.json" for name in (*PARTS, "cifar10")}
    parts = [shown(name, read_json(file)) for name, file in known.items() if file.exists()]
    head = f"`python benchmarks/gpu.py first`, `second`, {time.strftime('%Y-%m-%d')}\n\n{machine('accelerate')}"
    write_whole(out / "gpu.md", ("\n\n".join([head, *parts]) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["first", "second", "steps"], help="steps: the table of training steps alone")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of the command")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="of the first command")
    parser.add_argument("--small", action="store_true", help="at toy size")
    parser.add_argument("--data", type=Path, default=race.ARCHIVE, help="CIFAR-10; where it is missing digits are drawn")
    parser.add_argument("--pieces", type=int, default=3, help="of the second command")
    parser.add_argument("--samples", type=int, default=1000, help="that are measured after each piece")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change the second command's training")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.minutes <= 0 or args.pieces < 1 or args.samples < 2:
        raise UserError("--minutes must be above 0, --pieces at least 1 and --samples at least 2")
    if bad := next((pair for pair in args.set if "=" not in pair), None):
        raise UserError(f"--set {bad}: write KEY=VALUE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends, too
    try:
        print(machine("accelerate"), flush=True)
        if args.command == "steps":
            gpu_steps.measure_steps(out / "steps.json", time.monotonic() + 60 * args.minutes, small=args.small)
        elif args.command == "first":
            run_first(out, args.minutes, args.parts, small=args.small)
        else:
            settings = {**(gpu_cifar10.SMALL if args.small else {}), **dict(pair.split("=", 1) for pair in args.set)}
            options = {"features": "random"} if args.small else {}
            options |= {"pieces": args.pieces, "samples": args.samples, "settings": settings}
            run_second(out, args.minutes, args.data, **options)
    finally:
        gpu_runs.end_all()


if __name__ == "__main__":
    run_script(main)
