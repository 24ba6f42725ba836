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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
READ_JOBS = "import json; from tests.resumes import jobs; print(json.dumps([[j.name, j.script, j.raw] for j in jobs()]))"
HUB_JOB = "cats512_latent_iadb"  # its autoencoder is a folder of diffusers
RESUMED = ("smoke_ddpm", "smoke_ldm", "smoke_vae", "smoke_iadb", "smoke_classifier", "points2d_iadb", "cats64_iadb")

# What is not compared, and why.
NOT_COMPARED = {
    "log.txt": "sentences, which may be reworded",
    "README.md": "sentences, which may be reworded",
    "report.html": "sentences, which may be reworded",
    "loss.png": "a chart of metrics.jsonl, which is compared, with words",
    ".lock": "it names the process",
    "config.json": "a later commit may know more keys, and call them otherwise",
    "MANIFEST.json": "hashes of files, config.json among them; the files are compared",
}
KEYS_NOT_COMPARED = {
    "images_per_second": "the clock",
    "pid": "the process",
    "time": "the clock, in status.json",
    "config": "as config.json",
}
# Configs that both sides may refuse, and why. There is none.
REFUSED: dict[str, str] = {}

# More commands, on the runs of the configs; each is one line of the result. They run on one process.
SOLVERS = ("euler", "midpoint", "heun", "rk4", "dpmpp_2m", "ddim --eta 0.5", "ancestral", "redraw")
EXTRAS = {
    "solvers": [
        f"sample smoke_ddpm/run --num-samples 2 --steps 4 --guidance 2 --out solvers/{words.split()[0]} --solver {words}"
        for words in SOLVERS
    ],
    "classifier_guidance": [
        "sample smoke_ddpm/run --guidance-method classifier --classifier smoke_classifier/run --guidance 2 --num-samples 2"
        " --steps 3 --out classifier_guidance/samples"
    ],
    "editing": [
        "sample smoke_ddpm/run --image smoke_ddpm/samples/00.png --start-at 1 --num-samples 2 --steps 3 --out editing/start",
        "sample smoke_ddpm/run --invert smoke_ddpm/samples/00.png --steps 3 --solver euler --out editing/inversion",
        "sample shirts_to_dresses_iadb/run --source smoke_ddpm/samples --steps 2 --out editing/source",
    ],
    "interpolation": [
        "interpolate smoke_ddpm/run --seeds 1/2 --frames-between 3 --steps 3 --out interpolation/seeds",
        "interpolate smoke_ldm/run --seeds 1/2 --frames-between 2 --steps 2 --out interpolation/latents",
    ],
    "evaluation": [
        "evaluate smoke_ddpm/run/final --likelihood --steps 4 --num-images 4 --json --out evaluation/likelihood",
        "evaluate smoke_ddpm/run/final --sweep steps=2,3 --num-samples 10 --features random --json --out evaluation/sweep",
    ],
    "post_hoc_ema": [
        "posthoc_ema ddpm_1/run 0.1",
        "sample ddpm_1/run/ema/width_0.1 --num-samples 2 --steps 2 --out post_hoc_ema/s",
    ],
    "exports": [
        "convert safetensors smoke_ddpm/run --out exports/ddpm.safetensors",
        "convert safetensors smoke_vae/run --out exports/vae",
        "convert safetensors smoke_ldm/run --out exports/ldm",
        "convert to-diffusers smoke_ddpm/run --out exports/diffusers_ddpm",
        "convert to-diffusers smoke_vae/run --out exports/diffusers_vae",
        "convert to-diffusers smoke_ldm/run --out exports/diffusers_ldm",
        "convert diffusers exports/diffusers_ddpm --out exports/ddpm_again",
        "sample exports/ddpm_again --num-samples 2 --steps 2 --out exports/samples_ddpm",
        "convert diffusers exports/diffusers_ldm --out exports/ldm_again",
        "sample exports/ldm_again --num-samples 2 --steps 2 --out exports/samples_ldm",
    ],
}


# ---------------------------------------------------------------------------------------------- comparing files


@dataclass
class Comparison:
    """How many values of each kind were compared, and what differs, by name."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def compare(self, kind: str, old: dict[str, Any], new: dict[str, Any], where: str) -> None:
        """Compare the values of two dictionaries to the bit, and remember the keys that one side lacks."""
        for side, only in (("reference", old.keys() - new.keys()), ("other commit", new.keys() - old.keys())):
            self.differences += [f"{where}: {key} is in the {side} alone" for key in sorted(only)]
        for key in sorted(old.keys() & new.keys()):
            self.counts[kind] += 1
            if reason := difference(old[key], new[key]):
                self.differences.append(f"{where}: {key}: {reason}")


def difference(old: Any, new: Any) -> str:
    """Why two tensors, arrays, numbers or texts are not the same to the bit, or nothing."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return f"{old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}"
        left, right = (value.detach().contiguous().flatten().view(torch.uint8) for value in (old, new))
        if torch.equal(left, right):
            return ""
        return f"differs by up to {(old.double() - new.double()).abs().max().item():.3g}"
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return f"{old.dtype} {old.shape} became {new.dtype} {new.shape}"
        return "" if old.tobytes() == new.tobytes() else f"{int((old != new).sum())} of {old.size} values differ"
    return "" if repr(old) == repr(new) else f"{old!r:.80} became {new!r:.80}"


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries and lists by their paths, without those of KEYS_NOT_COMPARED."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [flatten(below, f"{path}.{key}" if path else str(key)) for key, below in pairs if key not in KEYS_NOT_COMPARED]
        return {key: leaf for part in parts for key, leaf in part.items()} or {path: type(value)()}
    return {path: value}


def read(path: Path) -> tuple[str, dict[str, Any]] | None:
    """What kind of values a file holds, and the values by name; None of a file that is not compared."""
    if path.name in NOT_COMPARED:
        return None
    if path.suffix == ".safetensors":
        return "tensors", load_file(path)
    if path.suffix in (".pt", ".pth", ".ckpt"):
        return "tensors", flatten(torch.load(path, weights_only=True))
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return "arrays", dict(arrays)
    if path.suffix == ".npy":
        return "arrays", {"array": np.load(path)}
    if path.suffix in (".png", ".gif"):
        with Image.open(path) as image:
            return "images", {
                f"frame {i}": np.asarray(frame.convert("RGBA")) for i, frame in enumerate(ImageSequence.Iterator(image))
            }
    if path.suffix == ".json":
        return "numbers", flatten(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return "numbers", flatten([json.loads(line) for line in path.read_text().splitlines()])
    return "files", {"bytes": path.read_bytes()}


def compare_folders(old: Path, new: Path) -> Comparison:
    """Compare all files below two folders."""
    result = Comparison()
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (old, new)]
    for side, only in (("reference", names[0] - names[1]), ("other commit", names[1] - names[0])):
        result.differences += [f"{name} is in the {side} alone" for name in sorted(only)]
    for name in sorted(names[0] & names[1]):
        values = read(old / name), read(new / name)
        if values[0] is not None and values[1] is not None:
            result.compare(values[0][0], values[0][1], values[1][1], name)
    if not result.counts:
        result.differences.append("there is nothing to compare")
    return result


# ---------------------------------------------------------------------------------------------- running commands


@dataclass(frozen=True)
class Side:
    """A commit's checkout, and the folder in which its commands run. Paths in commands and configs are relative to that folder,
    so that both sides have the same ones."""

    checkout: Path
    folder: Path
    processes: int

    def start(self, commands: list[list[str]]) -> subprocess.Popen[bytes]:
        """Begin to run commands; their results are read by `errors`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "commands.json").write_text(json.dumps(commands))
        (self.folder / "results.json").unlink(missing_ok=True)
        words = [str(ROOT / "tests" / "run_commands.py"), str(self.checkout), "commands.json", "results.json"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        return subprocess.Popen(
            [sys.executable, *(launcher if self.processes > 1 else []), *words], cwd=self.folder, env=environment(self.folder)
        )

    def errors(self) -> dict[int, str]:
        """The error, or nothing, of each command by its number; a command that did not run has no entry."""
        path = self.folder / "results.json"
        return {int(number): error for number, error in json.loads(path.read_text()).items()} if path.exists() else {}


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
    """The files of a commit in a new folder, beside a link to `shared`; of "." the working tree itself."""
    if commit == ".":
        return ROOT
    folder.mkdir(parents=True)
    content = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=content, check=True)
    if (ROOT.parent / "shared").is_dir() and not (folder.parent / "shared").exists():
        (folder.parent / "shared").symlink_to(ROOT.parent / "shared")
    return folder


def random_vgg(path: Path) -> None:
    """Write random weights of VGG16's convolutions, named as torchvision's file has them."""
    generator, channels, position, weights = torch.Generator().manual_seed(0), 3, 0, {}
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):  # 0 is a pooling
        if width:
            spread = (2 / (9 * channels)) ** 0.5
            weights[f"features.{position}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * spread
            weights[f"features.{position}.bias"] = torch.zeros(width)
            channels = width
        position += 2 if width else 1
    torch.save(weights, path)


def write_configs(reference: Side, wanted: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Write configs, weights and autoencoders into the reference's folder; return each config's name, script and content."""
    done = subprocess.run(
        [sys.executable, "-c", READ_JOBS],
        cwd=reference.checkout,
        env=environment(reference.folder),
        stdout=subprocess.PIPE,
        check=True,
    )
    jobs = json.loads(done.stdout)
    if unknown := set(wanted) - {name for name, _, _ in jobs}:
        sys.exit(f"there is no config {', '.join(sorted(unknown))}; there are {', '.join(name for name, _, _ in jobs)}")
    raw_vae = next(raw for name, _, raw in jobs if name == "smoke_vae")
    jobs = [job for job in jobs if not wanted or job[0] in wanted]
    (reference.folder / "configs").mkdir(parents=True)
    random_vgg(reference.folder / "vgg16.pth")
    trainings: dict[str, list[list[str]]] = {}
    for name, _, raw in jobs:
        if raw.get("autoencoder") == "AUTOENCODER":
            channels = raw["image"].get("channels", 3)
            run, config = f"autoencoders/run_{channels}", f"configs/autoencoder_{channels}.json"
            stages = [{"steps": 1, "adversarial": {"weight": 0.1}}]
            changed = raw_vae | {"stages": stages, "image": raw_vae["image"] | {"channels": channels}}
            (reference.folder / config).write_text(json.dumps(changed))
            raw["autoencoder"] = run
            trainings[run] = [["train_vae", "-cfg", config, "--run-dir", run]]
            if name == HUB_JOB:
                raw["autoencoder"] = "autoencoders/diffusers"
                trainings[run].append(["convert", "to-diffusers", run, "--out", "autoencoders/diffusers"])
        if raw.get("perceptual", {}).get("weights") == "WEIGHTS":
            raw["perceptual"]["weights"] = "vgg16.pth"
        if "export_every" in raw:
            raw["export_dir"] = f"{name}/exports"
        (reference.folder / "configs" / f"{name}.json").write_text(json.dumps(raw))
    commands = [words for run in trainings.values() for words in run]
    if commands and (reference.start(commands).wait() or any(reference.errors().values())):
        sys.exit(f"the reference did not make the autoencoders; see {reference.folder}/results.rank0.log")
    return jobs


def commands_of(name: str, script: str, raw: dict[str, Any]) -> Iterator[list[str]]:
    """What is run of a config: its training, then samples and an evaluation where it has them."""
    run = f"{name}/run"
    yield [script, "-cfg", f"configs/{name}.json", "--run-dir", run]
    evaluation = ["evaluate", run, "--features", "random", "--batch-size", "8", "--json", "--out", f"{name}/evaluation"]
    sampling = ["sample", run, "--steps", "2", "--frames", "--out", f"{name}/samples", "--num-samples"]
    if script == "train_vae":
        yield evaluation
    elif "image" not in raw:
        yield [*sampling, "50"]
    elif script != "train_classifier":
        yield [*sampling, "3", "--npz"]
        yield [*evaluation, "--num-samples", "16", "--steps", "2"]


def extra_commands(names: list[str]) -> dict[str, list[list[str]]]:
    """Those of EXTRAS whose runs are trained."""
    extras = {name: [line.split() for line in lines] for name, lines in EXTRAS.items()}
    runs = {
        name: {word.partition("/")[0] for words in lines for word in words if "/run" in word} for name, lines in extras.items()
    }
    return {name: lines for name, lines in extras.items() if runs[name] <= set(names)}


def run_both(sides: tuple[Side, Side], commands: list[list[str]]) -> None:
    """Run the commands of both sides, at the same time where there are processors for it."""
    if (os.cpu_count() or 1) >= 2 * sides[0].processes:
        for process in [side.start(commands) for side in sides]:
            process.wait()
    else:
        for side in sides:
            side.start(commands).wait()


def go_back(run: Path) -> None:
    """Leave of a run what a kill half way would have left."""
    shutil.rmtree(run / "final")
    checkpoints = sorted((run / "checkpoints").glob("step_*"))
    for folder in checkpoints[len(checkpoints) // 2 :]:
        shutil.rmtree(folder)


def copy_half_way(old: Path, new: Path, names: list[str]) -> None:
    """Copy what the reference made into a new folder, with its caches, and with its runs half way."""
    for part in ("configs", "autoencoders", "cache", "vgg16.pth"):
        if (old / part).is_dir():
            shutil.copytree(old / part, new / part)
        elif (old / part).exists():
            shutil.copy2(old / part, new / part)
    for name in names:
        shutil.copytree(old / name, new / name)
        go_back(new / name / "run")


def times_of(folder: Path) -> dict[str, int]:
    """When each file of the caches was written."""
    places = [folder / "cache", *folder.glob("autoencoders/*/latents")]
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for place in places
        for path in place.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------------------------------------- the program


def report(
    name: str, commands: list[list[str]], errors: tuple[dict[int, str], dict[int, str]], first: int, result: Comparison
) -> bool:
    """Print one line of a config (and more where something differs); return whether all is equal."""
    for number, words in enumerate(commands, first):
        for side, outcomes in zip(("reference", "other commit"), errors, strict=True):
            error = outcomes.get(number, "it was not run")
            if error and not (name in REFUSED and errors[0].get(number) == errors[1].get(number)):
                result.differences.append(f"{side}: {words[0]}.py {' '.join(words[1:])}: {error}")
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(result.counts.items()))
    print(f"{'DIFFERS' if result.differences else 'equal  '} {name} ({counted or 'nothing'} compared)")
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
        checkouts = [
            make_checkout(commit, place / name / "checkout") for name, commit in (("old", args.reference), ("new", args.commit))
        ]
        old, new, resumed = (
            Side(checkouts[name != "old"], place / name / "results", args.processes) for name in ("old", "new", "resumed")
        )
        jobs = write_configs(Side(checkouts[0], old.folder, 1), args.only)
        shutil.copytree(old.folder, new.folder)
        groups = {name: list(commands_of(name, script, raw)) for name, script, raw in jobs}
        names = list(groups)
        if args.processes == 1:
            groups |= extra_commands(names)
        run_both((old, new), [words for lines in groups.values() for words in lines])
        passed, first = [], 0
        for name, lines in groups.items():
            passed.append(
                report(name, lines, (old.errors(), new.errors()), first, compare_folders(old.folder / name, new.folder / name))
            )
            first += len(lines)

        # The newer commit goes on with runs of the older one.
        again = [name for name in RESUMED if name in groups and (old.folder / name / "run" / "final").exists()]
        copy_half_way(old.folder, resumed.folder, again)
        before = times_of(resumed.folder)
        resumed.start([words for name in again for words in groups[name]]).wait()
        first = 0
        for name in again:
            result = compare_folders(old.folder / name, resumed.folder / name)
            passed.append(report(f"{name} resumed", groups[name], (resumed.errors(), resumed.errors()), first, result))
            first += len(groups[name])
        if again:
            result = Comparison()
            result.compare(
                "cached files", before, times_of(resumed.folder), "caches of the reference, used by the other commit"
            )
            passed.append(report("caches", [], ({}, {}), 0, result))
    minutes = (time.monotonic() - began) / 60
    print(f"{sum(passed)} of {len(passed)} are equal, in {minutes:.1f} minutes, on {args.processes} process(es)")
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
