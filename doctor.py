#!/usr/bin/env python
"""Does this machine train correctly? Versions, disks, weights, bucket, devices; then the proof on all processes together.

python doctor.py                                          one process for each GPU, or one on a CPU
python doctor.py -cfg configs/landscape64_ddpm.json       and whether this run has all that it asks for
python doctor.py --processes 2 --json                     two processes, for another program
accelerate launch --num_machines 2 ... doctor.py          on several machines; the first one's rows are printed
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from src.config import CommandLine, UserError, load, read_json, run_script, script_command
from src.doctor import health, needs
from src.doctor.health import Row, examine
from src.doctor.proof import STAGES, UNREACHED, Broken, prove

ROOT = Path(__file__).resolve().parent
TRAINING = ("ddpm_accelerate", "train_vae", "train_ldm", "train_iadb", "train_classifier")
WIDTH = 20  # of the names' column


def arguments() -> argparse.Namespace:
    parser = CommandLine(description=__doc__)
    parser.add_argument("-cfg", "--config", metavar="FILE", help="a training script's config: is all there that it asks for?")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
    parser.add_argument("--run-dir", metavar="DIR", help="where the run will live (default runs/NAME)")
    parser.add_argument("--processes", type=int, metavar="N", help="how many to start (default one for each GPU)")
    parser.add_argument("--bucket", metavar="gs://NAME/FOLDER", help="default the config's, or ATELIER_BUCKET")
    parser.add_argument("--limit", type=float, default=90.0, metavar="SECONDS", help="what takes longer hangs (default 90)")
    parser.add_argument("--json", action="store_true", help="the rows for another program, on standard output")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args()


def load_config(path: str, overrides: list[str]) -> Any:
    """The config of whichever training script it is for: as its $schema says, else the one that knows most of its keys."""
    raw = read_json(path)
    named = Path(str(raw.get("$schema", ""))).stem if isinstance(raw, dict) else ""
    # A root config stands at the top of its script: that is where this one, which judges them all, has to look.
    roots = {name: importlib.import_module(name).Config for name in ([named] if named in TRAINING else TRAINING)}

    def unfit(name: str) -> int:
        fields, keys = roots[name].__pydantic_fields__, set(raw) if isinstance(raw, dict) else set()
        return len(keys - set(fields)) + sum(field.is_required() for key, field in fields.items() if key not in keys)

    return load(path, roots[min(roots, key=unfit)], overrides)


class Table:
    """Rows as they come: a line each, and what to do under those that are no pass."""

    def __init__(self, *, quiet: bool) -> None:
        self.rows: list[Row] = []
        self.quiet, self.began = quiet, time.monotonic()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.quiet:
            return
        print(f"{row.name:<{WIDTH}} {row.status}  {row.found}", flush=True)
        if row.status != "pass" and row.advice:  # in one line, so that commands can be copied
            print(f"{'':<{WIDTH}}       > {row.advice}", flush=True)

    def end(self) -> int:
        """What was not reached, and the last line, or the JSON; gives the exit status."""
        known = {row.name: row.status for row in self.rows}
        for name in STAGES:
            if name not in known:
                self.add(Row(name, "skip", "not reached", "", 0.0))
        count = {status: sum(row.status == status for row in self.rows) for status in ("pass", "warn", "fail", "skip")}
        if self.quiet:
            print(json.dumps([row._asdict() for row in self.rows], indent=1))
        else:
            words = ", ".join(f"{number} {status}" for status, number in count.items())
            proven = all(known.get(name) == "pass" for name in ("gradients", "ten steps", "resume"))
            last = "several processes were not tried (--processes N)"
            last = "these processes train as one does, and go on where they were" if proven else last
            last = "mend what failed, and run it again" if count["fail"] else last
            print(f"\n{words}, in {time.monotonic() - self.began:.0f} s: {last}")
        return 1 if count["fail"] else 0


def checks(
    args: argparse.Namespace, cfg: Any, run_dir: Path, local_world: int, world: int
) -> dict[str, Callable[[], health.Verdict]]:
    """What is looked at without the devices, top to bottom; `local_world` of `world` processes are on this machine. A config's
    own checks stand in for the general ones."""
    url = args.bucket or getattr(cfg, "bucket", None) or os.environ.get("ATELIER_BUCKET")
    of_config = needs.checks(cfg, run_dir, local_world, world, url) if cfg is not None else {}
    first = {"versions": partial(health.versions, ROOT / "pyproject.toml")}
    general = {
        "rename": partial(health.rename, run_dir),
        "flush": partial(health.flush, run_dir),
        "free space": partial(health.free_space, run_dir),
        "lock": partial(health.lock, run_dir),
        "file system": partial(health.file_system, run_dir),
        "shared memory": health.shared_memory,
        "ffmpeg": health.ffmpeg,
        "weights Inception": health.inception_weights,
        "weights VGG16": partial(health.backbone_weights, "vgg"),
        "weights EfficientNet": health.efficientnet_weights,
        "weights Real-ESRGAN": health.upscaler_weights,
        "bucket": partial(health.bucket, url),
    }
    extra = {name: check for name, check in of_config.items() if name not in general}
    return first | extra | general | of_config


def together(command: list[str], extra: dict[str, str], folder: Path, limit: float, report: Callable[[Row], None]) -> None:
    """Start processes that append their rows to `folder`/rows, and pass them on; what says nothing for `limit` seconds hangs.

    They are ended before this returns.
    """
    file, num_rows, heard, hung = folder / "rows", 0, time.monotonic(), False
    file.touch()
    known: dict[str, Row] = {}
    with open(folder / "said", "w+", encoding="utf-8", errors="replace") as output:
        group = subprocess.Popen(command, env={**extra, **os.environ}, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            running = True
            while running and not hung:
                running = group.poll() is None
                lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be half written
                for row in (Row(**json.loads(line)) for line in lines[num_rows:]):
                    if known.setdefault(row.name, row) is row:
                        report(row)
                    heard = time.monotonic()
                num_rows = len(lines)
                hung = running and time.monotonic() - heard > limit
                time.sleep(0.1)
        finally:
            if group.poll() is None:
                group.terminate()  # the launcher ends its processes, which are in sessions of their own
                try:
                    group.wait(40)
                except subprocess.TimeoutExpired:
                    group.kill()
        output.seek(0)
        text = output.readlines()
    missing = [name for name in STAGES if name not in known]
    if missing and (hung or not known or list(known.values())[-1].status != "fail"):
        last = [line.strip()[:300] for line in text if "rror" in line and "raceback" not in line] or ["no word why"]
        words = f"nothing was heard for {limit:g} s (--limit)" if hung else f"the processes ended: {last[0]}"
        bad, advice = "fail", UNREACHED
        if missing[0] == "compile":
            bad, advice = "warn", "the first compilation takes long here; leave `compile` out, or wait"
        report(Row(missing[0], bad, words, advice, round(time.monotonic() - heard, 2)))


def write_row(file: Path, row: Row) -> None:
    with open(file, "a", encoding="utf-8") as rows:
        rows.write(json.dumps(row._asdict()) + "\n")


def give_up(table: Table, limit: float) -> None:
    """Under a launcher there is nobody outside to notice that a collective hangs."""
    while sum(row.name in STAGES for row in table.rows) < len(STAGES):
        rows = len(table.rows)
        time.sleep(limit)
        if len(table.rows) == rows:
            name = next(name for name in STAGES if name not in {row.name for row in table.rows})
            table.add(Row(name, "fail", f"nothing was heard for {limit:g} s (--limit)", UNREACHED, limit))
            table.end()
            sys.stdout.flush()
            os._exit(1)


def main() -> int:
    args = arguments()
    if args.limit <= 0 or (args.processes is not None and args.processes < 1):
        raise UserError("--limit must be above 0, and --processes at least 1")
    cfg = load_config(args.config, args.set) if args.config is not None else None
    if args.set and cfg is None:
        raise UserError("--set changes a config: name one with -cfg FILE")
    script_cfg = cfg if cfg is not None else load_config(str(ROOT / "configs" / "smoke" / "ddpm.json"), [])
    run_dir = Path(args.run_dir or f"runs/{cfg.name if cfg is not None else 'NAME'}")
    if args.worker is not None:
        prove(cfg, script_cfg, Path(args.worker), partial(write_row, Path(args.worker) / "rows"), seconds=args.limit)
        return 0

    # One of several that a launcher started: rank 0 speaks.
    rank, launched, gpus = int(os.environ.get("RANK", "0")), "WORLD_SIZE" in os.environ, torch.cuda.device_count()
    if launched and args.processes is not None:
        raise UserError("--processes is for doctor.py without a launcher; this one has its own")
    if gpus and (args.processes or 0) > gpus:
        raise UserError(f"--processes {args.processes}: there are {gpus} GPUs, and each takes one process")
    world = int(os.environ["WORLD_SIZE"]) if launched else args.processes or max(1, gpus)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    table = Table(quiet=args.json or rank > 0)
    if rank == 0:
        if cfg is not None:
            table.add(Row("config", "pass", f"{args.config} is one of {type(cfg).__module__}.py", "", 0.0))
        for name, check in checks(args, cfg, run_dir, local_world, world).items():
            table.add(examine(name, check))

    # The devices, and the proof, with rank 0's checkpoint on the run's file system, if that can be written.
    sound = any(row.name == "rename" and row.status == "pass" for row in table.rows)
    with health.scratch(run_dir if sound else Path(tempfile.gettempdir())) as folder:
        if launched:
            if rank == 0:
                threading.Thread(target=give_up, args=(table, args.limit), daemon=True).start()
            with suppress(Broken):  # which the table says
                prove(cfg, script_cfg, folder, table.add, seconds=args.limit)
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
            passed = ["-cfg", args.config, *(word for pair in args.set for word in ("--set", pair))] if args.config else []
            python, *this = script_command(ROOT / "doctor.py")
            command = [python, *launcher, *this, "--worker", str(folder), *passed]
            extra = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world))} if world > 1 else {}
            extra |= {"ACCELERATE_USE_CPU": "true"} if not gpus and world > 1 else {}
            together([*command, "--limit", str(args.limit)], extra, folder, args.limit, table.add)
    if rank == 0:
        return table.end()
    for row in table.rows:  # of its own failure alone
        print(f"{row.name}: {row.found}", file=sys.stderr)
    return 1 if table.rows else 0


if __name__ == "__main__":
    run_script(main)
