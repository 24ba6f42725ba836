#!/usr/bin/env python
"""What a step costs more while checkpoints go into a bucket beside it.

  python benchmarks/uploads.py [--pairs 3] [--steps 90]

The demo's pixel run on one thread with a checkpoint every 15 steps, each of which is uploaded to a local server (another
process) that speaks Google storage's protocol; with `bucket` and without, in turns. A step's time is read from its line in
metrics.jsonl; steps that write a checkpoint themselves are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from benchmarks.common import machine

ROOT = Path(__file__).resolve().parent.parent
EVERY = 15


def step_seconds(folder: Path, steps: int, url: str | None) -> tuple[list[float], float]:
    """The seconds of each step that wrote nothing, and the megabytes of a checkpoint."""
    sets = {"steps": steps, "held_out": 0.0, "log.every": 1, "log.trackers": "[]", "preview.every": "null", "workers": 0}
    sets |= {
        "checkpoint.every": EVERY,
        "checkpoint.every_minutes": "null",
        "preview.num_samples": 1,
        "preview.sampler.steps": 1,
    }
    sets |= {"cpu_threads": 1} | ({"bucket": "gs://bucket"} if url is not None else {})
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "ddpm_accelerate.py", "-cfg", "configs/digits_ddpm.json", "--run-dir", str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"STORAGE_EMULATOR_HOST": url} if url is not None else {})
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [64 / line["images_per_second"] for line in lines if line["step"] > 5 and line["step"] % EVERY != 1]
    one = folder / "checkpoints" / f"step_{steps:08d}"
    return times, sum(path.stat().st_size for path in one.iterdir()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=90)
    args = parser.parse_args()
    torch.set_num_threads(1)
    step_means: dict[bool, list[float]] = {False: [], True: []}
    ratios, megabytes = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "tests.storage_server", "0", f"{folder}/objects"]
        server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            for i in range(args.pairs):
                for uploads in (False, True) if i % 2 == 0 else (True, False):
                    times, megabytes = step_seconds(Path(folder) / f"run_{i}_{uploads}", args.steps, url if uploads else None)
                    step_means[uploads].append(statistics.mean(times))
                ratios.append(step_means[True][-1] / step_means[False][-1])
        finally:
            server.terminate()
            server.wait()
            server.stdout.close()
    print(f"{machine()}\n\n{args.pairs} pairs in turns; {megabytes:.1f} MB go up every {EVERY} steps\n")
    print("| | ms a step (mean, of each run) |\n| --- | --- |")
    for uploads, name in ((False, "no bucket"), (True, "`bucket`")):
        print(f"| {name} | {', '.join(f'{1e3 * value:.1f}' for value in step_means[uploads])} |")
    print(f"| ratio | {', '.join(f'{ratio:.3f}' for ratio in ratios)}: median {statistics.median(ratios):.3f} |")
    outcome = f"a step beside uploads takes {statistics.median(ratios):.3f} times one without"
    print(f"\n{'met' if statistics.median(ratios) <= 1.01 else 'MISSED'}: {outcome} (goal: at most 1.01)")


if __name__ == "__main__":
    main()
