#!/usr/bin/env python
"""How long a waiting thread spins, and how many threads there are, beside 0, 1 and 2 busy neighbours: images/s of training.

python benchmarks/threads.py
python benchmarks/threads.py --configs digits_ddpm --seconds 20 --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import ROOT, machine

SETTINGS = {
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "asleep at once": {"OMP_WAIT_POLICY": "passive"},
    "spin 700": {"GOMP_SPINCOUNT": "700"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "as the scripts have it": {},
}
DATA = {"source": "shapes", "count": 512}
CONFIGS = {
    "digits_ddpm": ("ddpm_accelerate.py", {}),
    "cifar10_race": ("ddpm_accelerate.py", {"data": {**DATA, "size": 32}, "mixed_precision": "no", "steps": 100_000}),
    "clothing64_vae": ("train_vae.py", {"data": {**DATA, "size": 64}, "held_out": 0.05}),
}
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that keep a core busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def images_per_second(config: str, setting: dict[str, str], seconds: float) -> float:
    """The median speed of a training that runs for so long; 0 where it does not come to a second line of its log."""
    script, changes = CONFIGS[config]
    plain = {key: value for key, value in os.environ.items() if key not in NAMES}
    environment = plain | setting
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        quiet = {
            "log": {"every": 5, "trackers": []},
            "preview.every": None if script.startswith("ddpm") else 10**6,
            "workers": 0,
        }
        sets = [word for key, value in (changes | quiet).items() for word in ("--set", f"{key}={json.dumps(value)}")]
        command = [sys.executable, script, "-cfg", f"configs/{config}.json", "--run-dir", str(run), *sets]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path, began = run / "metrics.jsonl", None
        while process.poll() is None and (began is None or time.monotonic() - began < seconds):
            time.sleep(0.1)
            if began is None and path.exists() and path.stat().st_size:
                began = time.monotonic()
            if began is None and time.monotonic() - _started(process) > 90 + seconds:
                break
        process.kill()
        process.wait()
        lines = path.read_text().splitlines() if path.exists() else []
    speeds = [json.loads(line).get("images_per_second") for line in lines[1:] if line.endswith("}")]
    return statistics.median([speed for speed in speeds if speed]) if any(speeds) else 0.0


_starts: dict[int, float] = {}


def _started(process: subprocess.Popen) -> float:
    return _starts.setdefault(process.pid, time.monotonic())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--neighbours", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    speeds: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(args.rounds):
        for config in args.configs:
            for count in args.neighbours:
                for name in args.settings:
                    with neighbours(count):
                        speed = images_per_second(config, SETTINGS[name], args.seconds)
                    speeds.setdefault((config, name, count), []).append(speed)
                    print(f"{config}, {name}, {count} neighbours: {speed:.1f} images/s", file=sys.stderr, flush=True)
    print(f"Images a second of training, the median of {args.rounds} rounds of {args.seconds:g} s; {machine()}\n")
    print(f"| | {' | '.join(f'{config}, {count} beside' for config in args.configs for count in args.neighbours)} |")
    print("| --- |" + " --- |" * (len(args.configs) * len(args.neighbours)))
    for name in args.settings:
        cells = []
        for config in args.configs:
            quiet = statistics.median(speeds[config, name, args.neighbours[0]])
            for count in args.neighbours:
                speed = statistics.median(speeds[config, name, count])
                cells.append(f"{speed:.1f}" + (f" ({speed / quiet:.2f})" if count and quiet else ""))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
