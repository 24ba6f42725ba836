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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
READ_JOBS = "import json; from tests.resumes import jobs; print(json.dumps([[j.name, j.script, j.raw] for j in jobs()]))"
HUB_JOB = "cats512_latent_iadb"  # its autoencoder is a folder of diffusers
STAGES = [{"steps": 1, "adversarial": {"weight": 0.1}}]  # of the autoencoders on whose latents others are trained
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
        "sample smoke_ddpm/run --image images/class_0/00.png --start-at 1 --num-samples 2 --steps 3 --out editing/start",
        "sample smoke_ddpm/run --invert images/class_0/00.png --steps 3 --solver euler --out editing/inversion",
        "sample shirts_to_dresses_iadb/run --source images/class_1 --steps 2 --out editing/source",
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
        "convert to-diffusers autoencoders/smoke_plain --out exports/diffusers_vae",
        "convert to-diffusers cats512_latent_iadb/run --out exports/diffusers_ldm",
        "convert diffusers exports/diffusers_ddpm --out exports/ddpm_again",
        "sample exports/ddpm_again --num-samples 2 --steps 2 --out exports/samples_ddpm",
        "convert diffusers exports/diffusers_ldm --out exports/ldm_again",
        "sample exports/ldm_again --num-samples 2 --steps 2 --out exports/samples_ldm",
    ],
    "imports": [
        "convert guided-diffusion shared/vectors/adm_64_class_conditional.pt --out imports/network"
        " --flags shared/vectors/adm_64_class_conditional.json",
        "convert guided-diffusion shared/vectors/adm_64_classifier.pt --out imports/classifier"
        " --flags shared/vectors/adm_64_classifier.json",
        "sample imports/network --guidance-method classifier --classifier imports/classifier --classes 7/900 --num-samples 2"
        " --steps 2 --solver ancestral --out imports/samples",
    ],
    "prepared_data": [
        "prepare_data latents autoencoders/smoke_3 --out prepared_data/latents",
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
    if path.name in NOT_COMPARED and not (path.suffix == ".json" and "_class_name" in path.read_text()):
        return None  # (a config.json of diffusers is compared)
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

    name: str
    checkout: Path
    folder: Path
    processes: int

    def start(self, commands: list[list[str]]) -> subprocess.Popen[bytes]:
        """Begin to run commands; their results are read by `errors`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "commands.json").write_text(json.dumps(commands))
        (self.folder / "results.json").unlink(missing_ok=True)
        words = [str(ROOT / "tests" / "run_commands.py"), self.name, str(self.checkout), "commands.json", "results.json"]
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


def draw_images(folder: Path) -> None:
    """Write 24 small images of several sizes, grey ones too, into a folder for each of three classes."""
    numbers = np.random.default_rng(0)
    for i in range(24):
        place = folder / f"class_{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(numbers.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((20 + i, 28 - i % 5))
        (pixels.convert("L") if i % 4 == 3 else pixels).save(place / f"{i:02d}.{'jpg' if i % 2 else 'png'}")


def read_jobs(reference: Side) -> dict[str, tuple[str, dict[str, Any]]]:
    """Script and config by name: those of the reference's tests/resumes.py, and three that read a folder of images."""
    words = [sys.executable, "-c", READ_JOBS]
    done = subprocess.run(words, cwd=reference.checkout, env=environment(reference.folder), stdout=subprocess.PIPE, check=True)
    jobs = {name: (script, raw) for name, script, raw in json.loads(done.stdout)}
    for name, like, source in (
        ("folder_ddpm", "smoke_ddpm", {"source": "folder", "path": "images"}),
        ("packed_ddpm", "smoke_ddpm", {"source": "packed", "path": "packed_ddpm/images"}),
        ("folder_ldm", "smoke_ldm", {"source": "folder", "path": "images"}),
    ):
        script, raw = jobs[like]
        jobs[name] = (script, raw | {"data": source, "name": name})
    return jobs


def prepare(reference: Side, wanted: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Write configs, images, weights and autoencoders into the reference's folder; return each config's name, script and
    content."""
    folder, jobs = reference.folder, read_jobs(reference)
    if unknown := set(wanted) - jobs.keys():
        sys.exit(f"there is no config {', '.join(sorted(unknown))}; there are {', '.join(jobs)}")
    (folder / "configs").mkdir(parents=True)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())
    draw_images(folder / "images")
    random_vgg(folder / "vgg16.pth")
    trainings: dict[str, list[list[str]]] = {}
    chosen = [(name, script, raw) for name, (script, raw) in jobs.items() if not wanted or name in wanted]
    for name, _, raw in chosen:
        if raw.get("autoencoder") == "AUTOENCODER":
            like, channels = jobs["smoke_vae"][1], raw["image"].get("channels", 3)
            run = f"autoencoders/smoke_{channels}" if name != HUB_JOB else "autoencoders/smoke_plain"
            changed = like | {"stages": STAGES, "image": like["image"] | {"channels": channels}, "name": run.rpartition("/")[2]}
            trainings[run] = [["train_vae", "-cfg", f"configs/{changed['name']}.json", "--run-dir", run]]
            raw["autoencoder"] = run
            if name == HUB_JOB:  # diffusers has no linear attention
                changed["image"] |= {"size": raw["image"]["size"]}
                changed["model"] = like["model"] | {"attention": ["none", "none"], "mid_attention": "full"}
                raw["autoencoder"] = "autoencoders/diffusers"
                trainings[run].append(["convert", "to-diffusers", run, "--out", "autoencoders/diffusers"])
            (folder / "configs" / f"{changed['name']}.json").write_text(json.dumps(changed))
        if raw.get("perceptual", {}).get("weights") == "WEIGHTS":
            raw["perceptual"]["weights"] = "vgg16.pth"
        if "export_every" in raw:
            raw["export_dir"] = f"{name}/exports"
        (folder / "configs" / f"{name}.json").write_text(json.dumps(raw))
    commands = [words for lines in trainings.values() for words in lines]
    if commands and (reference.start(commands).wait() or any(reference.errors().values())):
        sys.exit(f"the reference did not make the autoencoders; see {folder}/old_rank0.log")
    return chosen


def commands_of(name: str, script: str, raw: dict[str, Any]) -> Iterator[list[str]]:
    """What is run of a config: its training, then samples and an evaluation where it has them."""
    run = f"{name}/run"
    if name.startswith("packed"):
        yield ["prepare_data", "pack", "images", "--size", "16", "--out", raw["data"]["path"]]
    yield [script, "-cfg", f"configs/{name}.json", "--run-dir", run]
    evaluation = ["evaluate", run, "--features", "random", "--batch-size", "8", "--json", "--out", f"{name}/evaluation"]
    sampling = ["sample", run, "--steps", "2", "--frames", "--out", f"{name}/samples", "--num-samples"]
    if script == "train_vae":
        yield [*evaluation, "--part", "train"]
    elif "image" not in raw:
        yield [*sampling, "50"]
    elif script != "train_classifier":
        yield [*sampling, "3", "--npz"]
        yield [*evaluation, "--num-samples", "16", "--steps", "2"]


def extra_commands(names: set[str]) -> dict[str, list[list[str]]]:
    """Those of EXTRAS that have what they need: the runs, and `shared` where the words name it."""
    extras = {name: [line.split() for line in lines] for name, lines in EXTRAS.items()}
    for name, lines in list(extras.items()):
        words = {word for line in lines for word in line}
        runs = {word.partition("/")[0] for word in words if "/run" in word}
        if not runs <= names or (any(word.startswith("shared") for word in words) and not (ROOT.parent / "shared").is_dir()):
            del extras[name]
    return extras


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
    """When each file of the caches was written."""
    places = [folder / "cache", *folder.glob("autoencoders/*/latents")]
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for place in places
        for path in place.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------------------------------------- the program


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
        groups = {name: list(commands_of(name, script, raw)) for name, script, raw in jobs}
        if args.processes == 1:
            groups |= extra_commands(set(groups))
        run_both(old, new, [words for lines in groups.values() for words in lines])
        passed = [
            report(name, compare_folders(old.folder / name, new.folder / name), lines, (old, new))
            for name, lines in groups.items()
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
