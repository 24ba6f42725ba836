#!/usr/bin/env python
"""The same minutes of the same cores for this project, diffusers and denoising-diffusion-pytorch, and what each then draws.

  nice -n 10 python benchmarks/race.py [--minutes 20] [--samples 256] [--only ours] [--out runs/race]

CIFAR-10 from ../shared/data (scikit-learn's digits where it is missing); the last 500 training images of each class are held
out. Each contestant trains in a process of its own, from its launch to the limit; weights are kept at an eighth, a quarter and
half of the time. Ours is configs/cifar10_race.json, its `steps` set by a probe of the speed so that its schedule ends within
the limit. The peers (benchmarks/peers.py) have their defaults, at their own learning rate and at two more; the best of the
three is the peer that counts. Off the clock each draws with 50 network calls an image, ours from its EMA weights, the peers
from those of EMA and raw that draw the better 64 images (which choose the learning rate, too: sampling takes as long as
training). Measured is the Fréchet distance to the training images in features of EfficientNet-Lite0.

What is there already in --out is not done again, so that a race may be run in pieces (--only takes the beginning of a name).
At the end there are the table, a sheet of samples and the distance against minutes, without --out in benchmarks/results, too.
Takes up to 20 GB while it runs.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import peers
from benchmarks.common import ROOT, environment, installed, machine
from benchmarks.peers import CALLS, FRACTIONS, SIZE
from src import figures
from src.config import UserError, read_json, run_script
from src.data import ImageConfig, ImageSet, open_sources
from src.data.packing import pack
from src.data.scan import ScanConfig
from src.data.sources import FolderSource
from src.evaluation.registry import FEWEST
from src.evaluation.results import extract_features, real_features
from src.metrics import distances
from src.metrics.distances import Array
from src.metrics.features import Features, open_features
from src.runs.opened import open_trained
from src.sampling import SamplerConfig, build_sampler

ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10.tar.xz"
CONFIG = ROOT / "configs" / "cifar10_race.json"
RESULTS = ROOT / "benchmarks" / "results"
RATES = {"diffusers": ("1e-4", "3e-4", "1e-3"), "ddp": ("1e-4", "3e-4", "1e-3")}  # the first is its own
TITLES = {"ours": "ours", "diffusers": "diffusers", "ddp": "denoising-diffusion-pytorch"}
PAIR = 64  # images that decide between EMA and raw weights, and between learning rates
Result = dict[str, Any]


# ---------------------------------------------------------------------------------------------- the images


def split_classes(folder: Path, held_out: int) -> tuple[list[Path], list[Path]]:
    """The files of class subfolders, and the last `held_out` of each class, sorted by name."""
    train, held_out_files = [], []
    for one in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(one.iterdir())
        train += files[:-held_out]
        held_out_files += files[-held_out:]
    return train, held_out_files


def prepare_images(datasets: Path, archive: Path = ARCHIVE) -> Path:
    """A folder with train/CLASS, held_out/CLASS and the training images packed; made once."""
    name, held_out = ("cifar10_race", 500) if archive.exists() else ("digits_race", 30)
    folder, staged = datasets / name, datasets / f"{name}.partial"
    if folder.exists():
        return folder
    shutil.rmtree(staged, ignore_errors=True)
    if archive.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(staged / "all", filter="data")
        source_folder = min((staged / "all").rglob("train"))
    else:
        source_folder = staged / "all"
        write_digits(source_folder)
    for part, files in zip(("train", "held_out"), split_classes(source_folder, held_out), strict=True):
        for file in files:
            place = staged / part / file.parent.name / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            file.rename(place)
    shutil.rmtree(staged / "all")
    pack(open_image_set(staged / "train"), staged / "packed", size=SIZE, channels=3)
    staged.rename(folder)
    return folder


def open_image_set(folder: Path) -> ImageSet:
    """All of a folder, however few bytes a file has."""
    return open_sources(FolderSource(source="folder", path=str(folder), scan=ScanConfig(min_file_bytes=0)))


def write_digits(folder: Path) -> None:
    """scikit-learn's digits at 32 px, in classes."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        resized = Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        resized.convert("RGB").save(folder / str(label) / f"{i:04d}.png")


@cache
def network() -> Features:
    return open_features("efficientnet_lite0")


def features(pixels: Tensor) -> Array:
    """(N, 3, H, W) uint8 -> (N, 1280)."""
    return np.concatenate([extract_features(network(), part) for part in pixels.split(32)])


@cache
def known_features(folder: Path, part: str) -> Array:
    """Those of all images of a part, worked out once and kept: minutes for 45,000."""
    return real_features(network(), open_image_set(folder / part), ImageConfig(size=SIZE))


@cache
def known_moments(folder: Path) -> distances.Moments:
    return distances.moments(known_features(folder, "train"))


def held_out_distance(folder: Path, samples: int) -> float:
    """What a perfect model would get: the mean over as many disjoint sets of `samples` held-out images as there are."""
    real = known_features(folder, "held_out")
    order, count = np.random.default_rng(0).permutation(len(real)), max(1, len(real) // samples)
    parts = [real[order[i * samples : (i + 1) * samples]] for i in range(count)]
    return float(np.mean([distances.frechet(part, known_moments(folder)) for part in parts]))


# ---------------------------------------------------------------------------------------------- training


def launch(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process whose words go into a file."""
    with open(log, "wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)


def shown(command: Sequence[str]) -> str:
    """A command in words, its paths as seen from this folder."""
    return shlex.join(["python", *(os.path.relpath(word, ROOT) if word.startswith("/") else word for word in command[1:])])


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def our_command(run: Path, images_folder: Path, overrides: Sequence[str], config: Path = CONFIG) -> list[str]:
    """What a user types, in the repository's folder."""
    sets = [f"data.path={os.path.relpath(images_folder / 'packed', ROOT)}", *overrides]
    words = [word for one in sets for word in ("--set", one)]
    return [sys.executable, "ddpm_accelerate.py", "-cfg", str(config), "--run-dir", str(run), *words]


def probe(out: Path, images_folder: Path, overrides: Sequence[str], config: Path, seconds: float) -> tuple[float, float]:
    """Of our recipe: seconds from the launch to the first step, and images/s, watched for so many seconds."""
    run = out / "probe"
    shutil.rmtree(run, ignore_errors=True)
    command = our_command(run, images_folder, [*overrides, "steps=1000000", "log.every=2", "preview.every=null"], config)
    began, first, process = time.time(), None, launch(command, out / "probe.txt")
    metrics, rates = run / "metrics.jsonl", list[float]()
    try:
        while first is None or time.time() - first < seconds or len(rates) < 3:
            time.sleep(0.2)
            if process.poll() is not None:
                raise UserError(f"our training ended in its probe: {(out / 'probe.txt').read_text()[-2000:]}")
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            rates = [json.loads(line)["images_per_second"] for line in lines[1:-1]]  # the last may be half written
            if len(lines) > 1 and first is None:
                first = time.time()
    finally:
        end(process, signal.SIGKILL)
    rate, batch = len(rates) / sum(1 / each for each in rates), read_json(run / "config.json")["batch_size"]
    shutil.rmtree(run)
    return max(0.0, first - began - 4 * batch / rate), rate


def train_ours(
    out: Path, images_folder: Path, seconds: float, overrides: Sequence[str] = (), config: Path = CONFIG
) -> dict[str, Any]:
    """Train, keep the newest checkpoint there was at each fraction of the time, and end what is still running at the limit."""
    start, rate = probe(out, images_folder, overrides, config, min(30.0, seconds / 8))
    batch = read_json(config)["batch_size"]
    batch = next((int(one.partition("=")[2]) for one in overrides if one.startswith("batch_size=")), batch)
    steps = max(10, int((0.97 * seconds - start) * rate / batch))
    timed = [f"steps={steps}", f"checkpoint.every_minutes={seconds / 60 / 40:.4g}", "preview.every=null"]
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = our_command(run, images_folder, [*overrides, *timed], config)
    began, process, fractions, used = time.time(), launch(command, out / "log.txt"), {}, ""
    ended: float | None = None
    try:
        for fraction in FRACTIONS:
            while time.time() - began < fraction * seconds and process.poll() is None:
                time.sleep(0.05)
            if process.poll() is not None:
                if process.returncode:
                    raise UserError(f"our training failed: {(out / 'log.txt').read_text()[-2000:]}")
                ended = ended or time.time() - began
            checkpoint = run / "final" if ended else max((run / "checkpoints").glob("step_*"), default=None)
            if checkpoint is None:
                continue
            shutil.copytree(checkpoint, out / "weights" / str(fraction), copy_function=os.link, dirs_exist_ok=True)
            images = read_json(checkpoint / "progress.json")["step"] * batch
            fractions[str(fraction)] = {"images": images, "seconds": round(ended or fraction * seconds, 1)}
            used = "the finished run" if ended else f"{checkpoint.name} of {steps}, the last checkpoint before the limit"
    finally:
        end(process)
    if "1.0" not in fractions:
        raise UserError("our training had no checkpoint at the limit; give it more minutes")
    network = open_trained(out / "weights" / "1.0", torch.device("cpu")).network
    count = sum(parameter.numel() for parameter in network.parameters())
    if (run / "ema").exists():  # of ablations
        (run / "ema").rename(out / "ema")
    shutil.rmtree(run)
    return {"parameters": count, "fractions": fractions, "used": used, "command": shown(command)}


def train_peer(name: str, out: Path, images_folder: Path, lr: str, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/peers.py", name, "--lr", lr, "--seconds", f"{seconds:g}"]
    command += ["--pictures", str(images_folder / "train"), "--out", str(out)]
    process = launch([*command, "--began", str(time.time())], out / "log.txt")
    try:
        process.wait()
    finally:
        end(process, signal.SIGKILL)
    if process.returncode or not (out / "trained.json").exists():
        raise UserError(f"{name} failed: {(out / 'log.txt').read_text()[-2000:]}")
    return read_json(out / "trained.json") | {"command": shown(command), "lr": lr}


# ---------------------------------------------------------------------------------------------- drawing and measuring


def draw_ours(weights: Path, count: int, sampler: dict[str, Any] | None = None, batch: int = 100) -> Tensor:
    """(count, 3, H, W) uint8 by the sampler of the race's config as it is now (or another), with at most 50 network calls."""
    run = open_trained(weights, torch.device("cpu"))
    solver = build_sampler(run, SamplerConfig(**(read_json(CONFIG)["preview"]["sampler"] if sampler is None else sampler)))
    if solver.calls() > CALLS:
        raise UserError(f"the sampler makes {solver.calls()} network calls, more than {CALLS}; give it fewer steps")
    parts = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    samples = torch.cat([solver.draw(0, part, None, device=torch.device("cpu")) for part in parts])
    return ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def distance_of(samples: Tensor, folder: Path) -> float:
    return distances.frechet(features(samples), known_moments(folder))


class Contestant:
    """One training of one contestant in its own folder, and what is known of it: `result` is kept in result.json."""

    def __init__(self, name: str, out: Path, folder: Path) -> None:
        self.name, self.kind = name, name.partition("_")[0]
        self.out, self.folder, self.file = out / name, folder, out / name / "result.json"
        self.result: Result = read_json(self.file) if self.file.exists() else {}

    def save(self) -> None:
        staged = self.file.with_suffix(".part")
        staged.write_text(json.dumps(self.result, indent=1) + "\n")
        staged.rename(self.file)

    def train(self, seconds: float) -> None:
        if self.result:
            if self.result["minutes"] != round(seconds / 60, 3):
                raise UserError(
                    f"{self.out} was trained for {self.result['minutes']} minutes; give another --out, or remove it"
                )
            return
        shutil.rmtree(self.out, ignore_errors=True)  # of a race that was ended in the middle
        self.out.mkdir(parents=True)
        print(f"{self.name}: training for {seconds / 60:g} minutes", flush=True)
        if self.kind == "ours":
            training = train_ours(self.out, self.folder, seconds)
        else:
            training = train_peer(self.kind, self.out, self.folder, self.name.partition("_")[2], seconds)
        hardware = machine("accelerate", *(["denoising-diffusion-pytorch"] if self.kind == "ddp" else []))
        self.result = {"name": self.name, "minutes": round(seconds / 60, 3), "machine": hardware, **training, "distances": {}}
        self.save()

    def draw(self, fraction: str, weights: str, count: int) -> Tensor:
        place = self.out / "weights" / fraction
        if self.kind == "ours":
            return draw_ours(place, count)
        return peers.draw(self.kind, place / f"{weights}.safetensors", count)

    def weights(self) -> str:
        """Whether its EMA or its raw weights draw better at the limit."""
        if "weights" not in self.result:
            self.result["weights"] = "ema"
            if self.kind != "ours":
                pair = {kind: distance_of(self.draw("1.0", kind, PAIR), self.folder) for kind in ("ema", "raw")}
                self.result |= {"weights": min(pair, key=lambda kind: pair[kind]), "pair": pair}
            self.save()
        return self.result["weights"]

    def measure(self, fraction: float, samples: int) -> None:
        """Draw and measure at a fraction of the time, where that was not done."""
        key = str(fraction)
        known = self.result["distances"].get(key)
        if key not in self.result["fractions"] or (known is not None and known["samples"] == samples):
            return
        print(f"{self.name}: {samples} images after {fraction:g} of the time", flush=True)
        images = self.draw(key, self.weights(), samples)
        np.save(self.out / f"samples_{key}.npy", images.numpy())
        self.result["distances"][key] = {"distance": distance_of(images, self.folder), "samples": samples}
        self.save()


# ---------------------------------------------------------------------------------------------- what is shown


def at_the_end(result: Result) -> float:
    return result["distances"]["1.0"]["distance"]


def best_of(results: Sequence[Result], peer: str) -> Result | None:
    """A peer's training with the best of its learning rates, judged by few images."""
    candidates = [result for result in results if result["name"].startswith(f"{peer}_") and "pair" in result]
    return min(candidates, key=lambda result: result["pair"][result["weights"]], default=None)


def better_peer(results: Sequence[Result]) -> Result | None:
    """The best training of all peers; None while one is not measured."""
    best = [best_of(results, peer) for peer in RATES]
    measured = [one for one in best if one is not None and "1.0" in one["distances"]]
    return min(measured, key=at_the_end) if len(measured) == len(RATES) else None


def goals(results: Sequence[Result], held_out: float) -> list[str]:
    """The two goals in words, and whether each is met; nothing while a contestant is missing."""
    ours = next((result for result in results if result["name"] == "ours" and "1.0" in result["distances"]), None)
    peer = better_peer(results)
    if ours is None or peer is None:
        return ["some contestants are missing: nothing can be said of the goals yet"]
    share = (at_the_end(ours) - held_out) / (at_the_end(peer) - held_out)
    lines = [
        f"{'met' if share <= 0.5 else 'MISSED'}: our distance above that of the held-out images is {share:.2f} of that of "
        f"the better peer, {peer['name']} (goal: at most 0.5)"
    ]
    quarter = ours["distances"].get("0.25")
    if quarter is not None:
        met = quarter["distance"] <= at_the_end(peer)
        reached = (
            f"after a quarter of the time ours is {quarter['distance']:.1f}, {peer['name']} at the end {at_the_end(peer):.1f}"
        )
        lines.append(f"{'met' if met else 'MISSED'}: {reached} (goal: no more than that)")
    return lines


def row(result: Result, held_out: float, title: str) -> str:
    full = result["fractions"]["1.0"]
    cells = [title, f"{result['parameters'] / 1e6:.1f} M", f"{full['images']:,}", f"{full['images'] / full['seconds']:.1f}"]
    cells += [result["weights"], f"{at_the_end(result):.1f}", f"{at_the_end(result) - held_out:.1f}"]
    return f"| {' | '.join(cells)} |"


def table(results: Sequence[Result], held_out: float, samples: int) -> str:
    """The learning rates of the peers, the race, the distance against time, and the goals."""
    done = [result for result in results if "1.0" in result["distances"]]
    lines = [f"| peer | learning rate | weights | distance of {PAIR} samples |", "| --- | --- | --- | --- |"]
    for peer, rates in RATES.items():
        for result in results:
            if result["name"].startswith(f"{peer}_") and "pair" in result:
                note, few = " (its own)" if result["lr"] == rates[0] else "", result["pair"][result["weights"]]
                lines.append(f"| {TITLES[peer]} | {result['lr']}{note} | {result['weights']} | {few:.1f} |")
    head = "| | parameters | images seen | images/s | weights | Fréchet distance | above the held-out |"
    lines += ["", head, "|" + " --- |" * 7]
    shown: list[tuple[Result, str]] = [(result, "ours") for result in done if result["name"] == "ours"]
    for peer, rates in RATES.items():
        best = best_of(results, peer)
        shown += [(result, TITLES[peer]) for result in done if result["name"] == f"{peer}_{rates[0]}"]
        if best is not None and best in done and best["lr"] != rates[0]:
            shown.append((best, f"{TITLES[peer]}, learning rate {best['lr']}"))
    lines += [row(result, held_out, title) for result, title in shown]
    lines.append(f"| {samples} held-out images | | | | | {held_out:.1f} | 0 |")
    minutes = done[0]["minutes"] if done else 0
    lines += ["", f"| distance after minutes | {' | '.join(f'{minutes * part:g}' for part in FRACTIONS)} |"]
    lines.append("|" + " --- |" * (1 + len(FRACTIONS)))
    for result, title in shown:
        known = [result["distances"].get(str(part)) for part in FRACTIONS]
        cells = [format(one["distance"], ".1f") if one else "" for one in known]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in goals(results, held_out))])


def draw_sheet(contestants: Sequence[tuple[str, Path]], path: Path, most_bytes: int = 300_000) -> None:
    """8 x 8 samples of each side by side, under `most_bytes`."""
    sheets = []
    for title, file in contestants:
        samples = np.load(file)[:64].transpose(0, 2, 3, 1)
        sheets.append(figures.grid(np.ascontiguousarray(samples), columns=8, title=title, zoom=1))
    whole = figures.in_a_row(sheets)
    for colours in (256, 128, 64, 32, 16):
        figures.save(whole.quantize(colours), path)
        if path.stat().st_size <= most_bytes:
            return


def draw_curve(results: Sequence[tuple[str, Result]], held_out: float, path: Path) -> None:
    """Distance against minutes of training."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    last = max(result["minutes"] for _, result in results)
    for title, result in results:
        distance_at = {
            part: result["distances"][str(part)]["distance"] for part in FRACTIONS if str(part) in result["distances"]
        }
        if len(distance_at) > 1:
            lines[title] = ([part * result["minutes"] for part in distance_at], list(distance_at.values()))
        else:  # of the peer that is not the better one, the end alone
            lines[f"{title}, at the end"] = ([0, last], 2 * list(distance_at.values()))
    lines["held-out images"] = ([0, last], [held_out, held_out])
    figures.curves(
        path, {"Fréchet distance, EfficientNet-Lite0": lines}, xlabel="minutes", log=["Fréchet distance, EfficientNet-Lite0"]
    )


def names() -> list[str]:
    return ["ours", *(f"{peer}_{lr}" for peer, rates in RATES.items() for lr in rates)]


def race(out: Path, folder: Path, minutes: float, samples: int, only: str = "", chosen: Callable[[], list[str]] = names) -> str:
    """Train and measure what is asked for and not there yet; gives the table of all that is."""
    field = [Contestant(name, out, folder) for name in chosen()]
    for contestant in field:  # what was measured with other numbers of samples does not compare
        known = contestant.result.get("distances", {})
        for key in [key for key, distance in known.items() if distance["samples"] != samples]:
            del known[key]
    selected = [contestant for contestant in field if contestant.name.startswith(only)]
    for contestant in selected:
        contestant.train(60 * minutes)
        contestant.weights()
    results = [contestant.result for contestant in field if contestant.result]
    best = [best_of(results, peer) for peer in RATES]
    default_names = [f"{peer}_{rates[0]}" for peer, rates in RATES.items()]
    for contestant in selected:
        if contestant.name in ("ours", *default_names) or contestant.result in best:
            contestant.measure(1.0, samples)
    for contestant in selected:
        if contestant.name == "ours" or contestant.result == better_peer(results):
            for fraction in FRACTIONS:
                contestant.measure(fraction, samples)
    shown = [one for one in field if one.name == "ours" or one.result in best]
    held_out = held_out_distance(folder, samples)
    text = table(results, held_out, samples)
    missing = [contestant.name for contestant in field if "weights" not in contestant.result]
    text += f"\n- so far without {', '.join(missing)}" if missing else ""
    ready = [(TITLES[one.kind], one) for one in shown if "1.0" in one.result.get("distances", {})]
    if ready:
        draw_sheet([(title, one.out / "samples_1.0.npy") for title, one in ready], out / "samples.png")
        draw_curve([(title, one.result) for title, one in ready], held_out, out / "distance.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--only", default="", help="a contestant, or the beginning of its name: ours, diffusers, ddp_1e-4")
    parser.add_argument("--out", type=Path, help="default runs/race")
    args = parser.parse_args()
    if not any(name.startswith(args.only) for name in names()):
        raise UserError(f"--only {args.only}: there is no such contestant; there are {', '.join(names())} (or ddp, diffusers)")
    if (
        any(name.startswith("ddp") for name in names() if name.startswith(args.only))
        and installed("denoising-diffusion-pytorch") is None
    ):
        raise UserError("denoising-diffusion-pytorch is missing: pip install -e '.[bench]', or --only ours")
    folder = prepare_images(ROOT / "datasets")
    held_out = sum(path.is_file() for path in (folder / "held_out").rglob("*"))
    if not FEWEST <= args.samples <= held_out:
        raise UserError(f"--samples {args.samples}: from {FEWEST} to {held_out}, of which there are held-out images")
    print(machine("denoising-diffusion-pytorch"), flush=True)
    out = (args.out or ROOT / "runs" / "race").resolve()
    text = race(out, folder, args.minutes, args.samples, args.only)
    print(text)
    if args.out is None:
        command = (
            f"`python benchmarks/race.py --minutes {args.minutes:g} --samples {args.samples}`, {time.strftime('%Y-%m-%d')}"
        )
        (RESULTS / "race.md").write_text(f"{command}\n\n{machine('accelerate', 'denoising-diffusion-pytorch')}\n\n{text}\n")
        for name in ("samples", "distance"):
            if (out / f"{name}.png").exists():
                shutil.copy(out / f"{name}.png", RESULTS / f"race_{name}.png")


if __name__ == "__main__":
    run_script(main)
