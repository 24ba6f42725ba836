#!/usr/bin/env python
"""Every table but those of race.py, ablate.py and times.py, in under half an hour on two cores: `make bench`.

Each command's words go to the screen and, with the command and the date, into benchmarks/results/.
"""

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import ROOT, environment

COMMANDS = {
    "speed": "benchmarks/speed.py --rounds 20",
    "overhead": "benchmarks/overhead.py",
    "overhead_points": "benchmarks/overhead.py --points",
    "unet": "benchmarks/unet.py --rounds 4",
    "unet_options": "benchmarks/unet.py --options --width 32 --batch 4 --rounds 4",
    "latent": "benchmarks/latent.py --rounds 8",
    "data": "benchmarks/data.py --rounds 3",
    "uploads": "benchmarks/uploads.py",
}
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    missed, failed, began = list[str](), list[str](), time.monotonic()
    for name, command in COMMANDS.items():
        print(f"\n`python {command}`\n", flush=True)
        words = [sys.executable, *command.split()]
        done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            failed.append(f"{command}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
            continue
        missed += [f"{line} ({command})" for line in done.stdout.splitlines() if line.startswith("MISSED")]
        (RESULTS / f"{name}.md").write_text(f"`python {command}`, {time.strftime('%Y-%m-%d')}\n\n{done.stdout}")
    print(f"\nin {(time.monotonic() - began) / 60:.0f} minutes; {len(missed)} goals missed, {len(failed)} commands failed")
    print("\n".join([*missed, *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
