"""Train, sample and evaluate with two commits on this machine, and compare all results to the bit.

python tests/compare_commits.py REFERENCE [COMMIT] [--only NAME ...] [--processes 2] [--keep FOLDER]

REFERENCE is the older commit. COMMIT is the newer one; "." (the default) stands for the working tree. The shrunk configs of the
reference's tests/resumes.py are trained by both, each side in one process (or one launch), on CPUs, with equal `cpu_threads`.
Then the newer commit goes on with runs that the older one left half way, with the older one's caches. The exit status is 1 if
anything differs or if nothing was there to compare. This file calls scripts by their command lines alone, which every commit
keeps; it imports nothing of the package.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `tests`; of the package nothing is imported
from tests.comparison.commands import READ_JOBS, Job, commands_of, extra_commands, read_jobs, write_files  # noqa: E402
from tests.comparison.files import Comparison, compare_folders  # noqa: E402

# Runs with which the newer commit goes on; one for each script and each kind of cache.
RESUMED = (
    "smoke_ddpm",
    "smoke_ldm",
    "smoke_vae",
    "smoke_iadb",
    "smoke_classifier",
    "points2d_iadb",
    "folder_ddpm",
    "folder_ldm",
)
# Configs that both sides may refuse, and why. There is none.
REFUSED: dict[str, str] = {}


@dataclass(frozen=True)
class Side:
    """A commit's checkout, and the folder in which its commands run. Paths in commands and configs are relative to that folder,
    so that both sides have the same ones."""

    name: str
    checkout: Path
    folder: Path
    processes: int

    def start(self, commands: list[list[str]]) -> subprocess.Popen[bytes]:
        """Begin to run commands; their results are read by `errors`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "commands.json").write_text(json.dumps(commands))
        (self.folder / "results.json").unlink(missing_ok=True)
        words = [
            str(ROOT / "tests" / "comparison" / "driver.py"),
            self.name,
            str(self.checkout),
            "commands.json",
            "results.json",
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        return subprocess.Popen(
            [sys.executable, *(launcher if self.processes > 1 else []), *words], cwd=self.folder, env=environment(self.folder)
        )

    def errors(self) -> dict[str, str]:
        """The error, or nothing, of each command line; one that did not run has no entry."""
        path = self.folder / "results.json"
        return json.loads(path.read_text()) if path.exists() else {}


def environment(folder: Path) -> dict[str, str]:
    """The same for both sides, but for the folder of caches."""
    launched = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    fixed = {
        "ATELIER_CACHE": str(folder / "cache"),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    return {key: value for key, value in os.environ.items() if key not in launched} | fixed


def make_checkout(commit: str, folder: Path) -> Path:
    """The files of a commit in a new folder; of "." the working tree itself."""
    if commit == ".":
        return ROOT
    folder.mkdir(parents=True)
    content = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=content, check=True)
    return folder


def prepare(reference: Side, wanted: list[str]) -> list[Job]:
    """Write the configs and what they need into the reference's folder, with its own commands; return the wanted configs."""
    words = [sys.executable, "-c", READ_JOBS]
    done = subprocess.run(words, cwd=reference.checkout, env=environment(reference.folder), stdout=subprocess.PIPE, check=True)
    jobs = read_jobs(done.stdout.decode())
    if unknown := set(wanted) - jobs.keys():
        sys.exit(f"there is no config {', '.join(sorted(unknown))}; there are {', '.join(jobs)}")
    chosen = [jobs[name] for name in wanted or jobs]
    commands = write_files(reference.folder, chosen, jobs["smoke_vae"])
    if commands and (reference.start(commands).wait() or any(reference.errors().values())):
        sys.exit(f"the reference did not make the autoencoders; see {reference.folder}/{reference.name}_rank0.log")
    return chosen


def run_both(old: Side, new: Side, commands: list[list[str]]) -> None:
    """Run the commands of both sides, at the same time where there are processors for it."""
    at_once = (os.cpu_count() or 1) >= 2 * old.processes
    first = old.start(commands)
    if not at_once:
        first.wait()
    new.start(commands).wait()
    first.wait()


def go_back(run: Path) -> None:
    """Leave of a run what a kill half way would have left."""
    shutil.rmtree(run / "final")
    checkpoints = sorted((run / "checkpoints").glob("step_*"))
    for folder in checkpoints[len(checkpoints) // 2 :]:
        shutil.rmtree(folder)


def times_of(folder: Path) -> dict[str, int]:
    """When each file of the caches was written (locks are taken anew)."""
    places = [folder / "cache", *folder.glob("autoencoders/*/latents")]
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for place in places
        for path in place.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def report(name: str, result: Comparison, commands: list[list[str]], sides: tuple[Side, ...]) -> bool:
    """Print one line of a config (and more where something differs); return whether all is equal."""
    for words in commands:
        line = " ".join(words)
        errors = [side.errors().get(line, "it did not run") for side in sides]
        if name not in REFUSED or len(set(errors)) > 1:
            result.differences += [f"{side.name}: {line}: {error}" for side, error in zip(sides, errors, strict=True) if error]
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(result.counts.items()))
    print(f"{'DIFFERS' if result.differences else 'equal  '} {name} ({counted or 'nothing'} compared)", flush=True)
    for line in result.differences[:20]:
        print(f"          {line}")
    if len(result.differences) > 20:
        print(f"          and {len(result.differences) - 20} more")
    return not result.differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", help="the older commit")
    parser.add_argument("commit", nargs="?", default=".", help='the newer commit; "." is the working tree')
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these configs alone")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that holds all files afterwards")
    args = parser.parse_args()
    began = time.monotonic()
    if args.keep is not None and args.keep.exists():
        sys.exit(f"{args.keep} is there already; give a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        place = (args.keep or Path(temporary) / "work").resolve()
        checkouts = [make_checkout(commit, place / name) for commit, name in ((args.reference, "old"), (args.commit, "new"))]
        old, new = (
            Side(name, checkout, place / "results" / name, args.processes)
            for name, checkout in zip(("old", "new"), checkouts, strict=True)
        )
        jobs = prepare(replace(old, processes=1), args.only)
        shutil.copytree(old.folder, new.folder, symlinks=True)
        groups = {job.name: list(commands_of(job)) for job in jobs}
        if args.processes == 1:
            groups |= extra_commands(set(groups))
        run_both(old, new, [words for commands in groups.values() for words in commands])
        groups |= {name: [] for name in ("autoencoders", "cache/features") if (old.folder / name).exists()}
        passed = [
            report(name, compare_folders(old.folder / name, new.folder / name), commands, (old, new))
            for name, commands in groups.items()
        ]

        # The newer commit goes on with runs of the older one, where they are, since caches know folders by their paths.
        names = [name for name in RESUMED if (old.folder / name / "run" / "final").exists()]
        for name in names:
            shutil.copytree(old.folder / name, place / "results" / "whole" / name)
            go_back(old.folder / name / "run")
        before, resumed = times_of(old.folder), replace(old, name="resumed", checkout=new.checkout)
        resumed.start([words for name in names for words in groups[name]]).wait()
        for name in names:
            result = compare_folders(place / "results" / "whole" / name, old.folder / name)
            passed.append(report(f"{name}, gone on with", result, groups[name], (resumed,)))
        if names:
            result = Comparison()
            result.compare("cached files", before, times_of(old.folder), "times of the older commit's caches")
            passed.append(report("caches, used again", result, [], ()))
    minutes = (time.monotonic() - began) / 60
    print(f"{sum(passed)} of {len(passed)} are equal, in {minutes:.1f} minutes, on {args.processes} process(es)")
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
