#!/usr/bin/env python
"""The quick tests on each Python that this machine has: `make matrix`. Needs uv, and gigabytes of disk for each Python.

  python tests/matrix.py [--python 3.12] [--keep DIR]

Each Python from 3.11 to 3.14 gets an environment of its own in a temporary folder, with what pyproject.toml asks for, and runs
the tests that start no other process. At the end a table says of each: passed, failed, no such Python here, or what could not
be installed (torch has no wheels for a Python until some months after its release).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
QUICK = ("tests/diffusion", "tests/models", "tests/metrics", "tests/data")  # folders of tests that launch nothing


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said last."""
    return next((line.strip() for line in reversed((done.stdout + done.stderr).splitlines()) if line.strip()), "")


def try_python(version: str, folder: Path) -> tuple[bool, str]:
    """Whether the tests pass on this Python or there is none of it, and a line that says so."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    if run("uv", "python", "find", "--no-python-downloads", version).returncode:
        return True, "no such Python on this machine"
    python = str(folder / "bin" / "python")
    steps = [
        ("uv", "venv", "--quiet", "--seed", "--no-python-downloads", "--python", version, str(folder)),
        (python, ".ci/torch_cpu_build.py"),
        (python, "-m", "pip", "install", "--quiet", "--prefer-binary", "-e", ".[dev]"),
    ]
    for step in steps:
        done = run(*step)
        if done.returncode:
            return False, f"not installed: {last_line(done)}"
    done = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUICK)
    return done.returncode == 0, last_line(done)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", choices=PYTHONS, help="one version; repeatable (default: all)")
    parser.add_argument("--keep", metavar="DIR", help="keep the environments in this folder")
    args = parser.parse_args()
    if shutil.which("uv") is None:
        print("error: uv is not on this machine: pip install uv", file=sys.stderr)
        return 2
    results: dict[str, tuple[bool, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for version in args.python or PYTHONS:
            print(f"Python {version} ...", flush=True)
            results[version] = try_python(version, Path(args.keep or temporary) / version)
    for version, (_, words) in results.items():
        print(f"Python {version}: {words}")
    return 0 if all(is_well for is_well, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
