#!/usr/bin/env python
"""The same minutes of the same cores for this project, diffusers and denoising-diffusion-pytorch, and what each then draws.

  nice -n 10 python benchmarks/race.py [--minutes 20] [--samples 256] [--only ours] [--out runs/race]

CIFAR-10 from ../shared/data (scikit-learn's digits where it is missing); the last 500 training images of each class are held
out. Each contestant trains in a process of its own, from its launch to the limit; weights are kept at an eighth, a quarter and
half of the time. Ours is configs/cifar10_race.json, its `steps` set by a probe of the speed so that its schedule ends within
the limit. The peers stand there twice. With their defaults (benchmarks/peers.py), at their own learning rate and at two more,
the best of the three counts. With a network of our operations an image (benchmarks/equal.py), our batch and precision, the best
of three learning rates in probes of --probe-minutes runs the whole time. Off the clock each draws with 50 network calls an
image, ours from its EMA weights, the peers from those of EMA and raw that draw the better 64 images (which choose the learning
rate, too: sampling takes as long as training). Measured is how far the samples are from 10,000 of the training images, in the
features of EfficientNet-Lite2; Lite0's stand beside them (benchmarks/measures.py).

What is there already in --out is not done again, so that a race may be run in pieces (--only takes the beginning of a name).
At the end there are the table, a sheet of samples and the distance against minutes, without --out in benchmarks/results, too.
Takes up to 20 GB while it runs. The file is long because the race, its table and its figures are here.
"""

import argparse
import json
import os
import shutil
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
from torch import Tensor

from benchmarks import equal, peers
from benchmarks.common import ROOT, installed, machine
from benchmarks.measures import HEADS, LITE2, Numbers, Reference, ask_for_networks, cells, is_win
from benchmarks.peers import CALLS, FRACTIONS, SIZE
from benchmarks.photos import open_folder, write_digits, write_memory_file
from benchmarks.timed import measure_speed, precision_of, shown, train_for, wait_for
from src import figures
from src.config import UserError, config, read_json, run_script, validate
from src.data import open_sources
from src.data.packing import pack
from src.data.sources import PackedSource
from src.evaluation.registry import FEWEST
from src.models import ImageModelConfig, build_model
from src.runs.opened import open_trained
from src.sampling import SamplerConfig, build_sampler

ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10.tar.xz"
CONFIG = ROOT / "configs" / "cifar10_race.json"
RESULTS = ROOT / "benchmarks" / "results"
RATES = {"diffusers": ("1e-4", "3e-4", "1e-3"), "ddp": ("1e-4", "3e-4", "1e-3")}  # the first is its own
EQUAL = {"diffusers-equal": "diffusers", "ddp-equal": "ddp"}  # peers with networks of our operations
EQUAL_RATES = ("5e-4", "1e-3", "2e-3")  # larger ones: these networks are small
PEERS = (*RATES, *EQUAL)
TITLES = {"ours": "ours", "diffusers": "diffusers", "ddp": "denoising-diffusion-pytorch"}
TITLES |= {name: f"{TITLES[peer]}, our operations" for name, peer in EQUAL.items()}
MEASURED = 10_000  # of the training images, which samples are measured against
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
        write_digits(source_folder, SIZE)
    for part, files in zip(("train", "held_out"), split_classes(source_folder, held_out), strict=True):
        for file in files:
            place = staged / part / file.parent.name / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            file.rename(place)
    shutil.rmtree(staged / "all")
    pack(open_folder(staged / "train"), staged / "packed", size=SIZE, channels=3)
    staged.rename(folder)
    return folder


@cache
def reference(folder: Path, part: str) -> Reference:
    """The images of a part, train or held_out, or MEASURED of them; their features take ten minutes for 10,000, once."""
    return Reference(open_folder(folder / part).lowest(MEASURED), SIZE)


def floor_of(folder: Path, samples: int) -> dict[str, Numbers]:
    """What a perfect model would get with so many samples."""
    return reference(folder, "train").floor(reference(folder, "held_out"), samples)


def memory_file(folder: Path) -> Path:
    """The packed training images as one array for the peers of our operations; made once."""
    file = folder / "train.npz"
    if not file.exists():
        packed = open_sources(PackedSource(source="packed", path=str(folder / "packed")))
        write_memory_file(file, packed, SIZE)
    return file


# ---------------------------------------------------------------------------------------------- training


def train_ours(
    out: Path, images_folder: Path, seconds: float, overrides: Sequence[str] = (), recipe: Path = CONFIG
) -> dict[str, Any]:
    """Train, keep the newest checkpoint there was at each fraction of the time, and end what is still running at the limit."""
    script, sets = "ddpm_accelerate.py", [f"data.path={os.path.relpath(images_folder / 'packed', ROOT)}", *overrides]
    speed = measure_speed(script, recipe, out / "probe", sets, min(30.0, seconds / 8))
    training = train_for(script, recipe, out / "run", sets, speed, seconds, FRACTIONS, out / "weights")
    network = open_trained(out / "weights" / "1.0", torch.device("cpu")).network
    if (out / "run" / "ema").exists():  # of ablations
        (out / "run" / "ema").rename(out / "ema")
    shutil.rmtree(out / "run")
    return {"parameters": sum(parameter.numel() for parameter in network.parameters()), **training}


@config
class Shape:
    """A network's config alone."""

    model: ImageModelConfig


def our_operations() -> int:
    """Of our network for one image."""
    shape = (3, SIZE, SIZE)
    network = build_model(validate(Shape, {"model": read_json(CONFIG)["model"]}).model, shape, None)
    return equal.operations(network.eval(), torch.zeros(1, *shape), torch.zeros(1))


def train_equal(name: str, out: Path, folder: Path, seconds: float, probe_seconds: float) -> dict[str, Any]:
    """The best of three learning rates in probes, each of which ends its schedule, then the whole time with that."""
    out.mkdir(parents=True, exist_ok=True)
    data, file = memory_file(folder), out / "network.json"
    if not file.exists():
        operations = our_operations()
        document = equal.of_equal_operations(EQUAL[name], operations, (3, SIZE, SIZE), 0)
        file.write_text(json.dumps(document | {"ours": operations}) + "\n")
    settings = read_json(CONFIG)
    options = ["--batch", str(settings["batch_size"]), "--precision", precision_of(settings["mixed_precision"])]

    def train(place: Path, lr: str, seconds: float, fractions: Sequence[float]) -> dict[str, Any]:
        command = [sys.executable, "benchmarks/equal.py", str(file), "--lr", lr, "--seconds", f"{seconds:g}", *options]
        command += ["--data", str(data), "--out", str(place), "--fractions", *map(str, fractions)]
        place.mkdir(parents=True, exist_ok=True)
        wait_for([*command, "--began", str(time.time())], place / "log.txt", name)
        return read_json(place / "trained.json") | {"command": shown(command), "lr": lr}

    probes = read_json(out / "probes.json") if (out / "probes.json").exists() else {}
    for lr in EQUAL_RATES:
        if lr not in probes:
            print(f"{name}: a probe of learning rate {lr} for {probe_seconds / 60:g} minutes", flush=True)
            place = out / "probes" / lr
            shutil.rmtree(place, ignore_errors=True)
            train(place, lr, probe_seconds, (1.0,))
            pixels = {kind: to_pixels(equal.draw(place, kind, PAIR)) for kind in ("ema", "raw")}
            probes[lr] = {kind: reference(folder, "train").distance(samples) for kind, samples in pixels.items()}
            (out / "probes.json").write_text(json.dumps(probes, indent=1) + "\n")
    best = min(EQUAL_RATES, key=lambda lr: min(probes[lr].values()))
    print(f"{name}: training for {seconds / 60:g} minutes at {best}", flush=True)
    return train(out, best, seconds, FRACTIONS) | {"probes": probes}


def train_peer(name: str, out: Path, images_folder: Path, lr: str, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/peers.py", name, "--lr", lr, "--seconds", f"{seconds:g}"]
    command += ["--pictures", str(images_folder / "train"), "--out", str(out)]
    wait_for([*command, "--began", str(time.time())], out / "log.txt", name)
    return read_json(out / "trained.json") | {"command": shown(command), "lr": lr}


# ---------------------------------------------------------------------------------------------- drawing and measuring


def draw_ours(weights: Path, count: int, sampler: dict[str, Any] | None = None, batch: int = 100) -> Tensor:
    """(count, 3, H, W) uint8 by the sampler of the race's config as it is now (or another), with at most 50 network calls."""
    run = open_trained(weights, torch.device("cpu"))
    solver = build_sampler(run, SamplerConfig(**(read_json(CONFIG)["preview"]["sampler"] if sampler is None else sampler)))
    if solver.calls() > CALLS:
        raise UserError(f"the sampler makes {solver.calls()} network calls, more than {CALLS}; give it fewer steps")
    parts = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    return to_pixels(torch.cat([solver.draw(0, part, None, device=torch.device("cpu")) for part in parts]))


def to_pixels(images: Tensor) -> Tensor:
    """In [-1, 1] -> uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Contestant:
    """One training of one contestant in its own folder, and what is known of it: `result` is kept in result.json."""

    def __init__(self, name: str, out: Path, folder: Path) -> None:
        self.name, self.kind = name, name.partition("_")[0]
        self.out, self.folder, self.file = out / name, folder, out / name / "result.json"
        self.result: Result = read_json(self.file) if self.file.exists() else {}
        if self.result and self.result.get("decides") != LITE2:  # of before: its training counts, its measurements do not
            self.result = {key: value for key, value in self.result.items() if key not in ("weights", "pair")}
            self.result |= {"distances": {}, "decides": LITE2}

    def save(self) -> None:
        staged = self.file.with_suffix(".part")
        staged.write_text(json.dumps(self.result, indent=1) + "\n")
        staged.rename(self.file)

    def train(self, seconds: float, probe_seconds: float) -> None:
        if self.result:
            if self.result["minutes"] != round(seconds / 60, 3):
                raise UserError(
                    f"{self.out} was trained for {self.result['minutes']} minutes; give another --out, or remove it"
                )
            return
        if self.kind in EQUAL:  # its probes are kept, each of which is whole
            training = train_equal(self.kind, self.out, self.folder, seconds, probe_seconds)
        else:
            shutil.rmtree(self.out, ignore_errors=True)  # of a race that was ended in the middle
            self.out.mkdir(parents=True)
            print(f"{self.name}: training for {seconds / 60:g} minutes", flush=True)
            if self.kind == "ours":
                training = train_ours(self.out, self.folder, seconds)
            else:
                training = train_peer(self.kind, self.out, self.folder, self.name.partition("_")[2], seconds)
        hardware = machine("accelerate", *(["denoising-diffusion-pytorch"] if "ddp" in self.kind else []))
        self.result = {"name": self.name, "minutes": round(seconds / 60, 3), "machine": hardware, **training}
        self.result |= {"distances": {}, "decides": LITE2}
        self.save()

    def draw(self, fraction: str, weights: str, count: int) -> Tensor:
        place = self.out / "weights" / fraction
        if self.kind == "ours":
            return draw_ours(place, count)
        if self.kind in EQUAL:
            return to_pixels(equal.draw(self.out, weights, count, fraction=fraction))
        return peers.draw(self.kind, place / f"{weights}.safetensors", count)

    def weights(self) -> str:
        """Whether its EMA or its raw weights draw better at the limit."""
        if "weights" not in self.result:
            self.result["weights"] = "ema"
            if self.kind != "ours":
                real = reference(self.folder, "train")
                pair = {kind: real.distance(self.draw("1.0", kind, PAIR)) for kind in ("ema", "raw")}
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
        images, place = self.draw(key, self.weights(), samples), self.out / f"samples_{key}.npy"
        np.save(place, images.numpy())
        self.result["distances"][key] = {"samples": samples, **reference(self.folder, "train").measure(images)}
        self.save()


# ---------------------------------------------------------------------------------------------- what is shown


def at_the_end(result: Result) -> Numbers:
    """Lite2's numbers."""
    return result["distances"]["1.0"][LITE2]


def best_of(results: Sequence[Result], peer: str) -> Result | None:
    """A peer's training with the best of its learning rates, judged by few images."""
    candidates = [result for result in results if result["name"].partition("_")[0] == peer and "pair" in result]
    return min(candidates, key=lambda result: result["pair"][result["weights"]], default=None)


def better_peer(results: Sequence[Result]) -> Result | None:
    """The best training of all peers; None while one is not measured."""
    best = [best_of(results, peer) for peer in PEERS]
    measured = [one for one in best if one is not None and "1.0" in one["distances"]]
    return min(measured, key=lambda one: at_the_end(one)["frechet"]) if len(measured) == len(PEERS) else None


def goals(results: Sequence[Result], held_out: float) -> list[str]:
    """The goals in words, and whether each is met; nothing while a contestant is missing."""
    ours = next((result for result in results if result["name"] == "ours" and "1.0" in result["distances"]), None)
    peer = better_peer(results)
    if ours is None or peer is None:
        return ["some contestants are missing: nothing can be said of the goals yet"]
    end, theirs = at_the_end(ours), at_the_end(peer)
    above, share = end["frechet"] - held_out, (end["frechet"] - held_out) / (theirs["frechet"] - held_out)
    margin = "by more than" if is_win(end, theirs) else "and not by"
    lines = [
        f"{'met' if above <= 10 else 'MISSED'}: ours is {above:.1f} above the held-out images (goal: at most 10)",
        f"{'met' if share <= 0.25 else 'MISSED'}: our distance above that of the held-out images is {share:.2f} of that of "
        f"the best peer, {peer['name']}, {margin} two standard errors (goal: at most 0.25)",
    ]
    quarter = ours["distances"].get("0.25")
    if quarter is not None:
        early = quarter[LITE2]["frechet"]
        reached = f"after a quarter of the time ours is {early:.1f}, {peer['name']} at the end {theirs['frechet']:.1f}"
        lines.append(f"{'met' if early <= theirs['frechet'] else 'MISSED'}: {reached} (goal: no more than that)")
    return lines


def row(result: Result, floor: dict[str, Numbers], title: str) -> str:
    full = result["fractions"]["1.0"]
    words = [title, f"{result['parameters'] / 1e6:.1f} M", f"{full['images']:,}", f"{full['images'] / full['seconds']:.1f}"]
    return f"| {' | '.join([*words, result['weights'], *cells(result['distances']['1.0'], floor)])} |"


def table(results: Sequence[Result], floor: dict[str, Numbers], samples: int) -> str:
    """The learning rates of the peers, the race, the distance against time, and the goals."""
    done = [result for result in results if "1.0" in result["distances"]]
    lines = [f"| peer | learning rate | weights | distance of {PAIR} samples |", "| --- | --- | --- | --- |"]
    of_peers = [result for result in results if kind_of(result) in PEERS]
    for result in sorted(of_peers, key=lambda result: PEERS.index(kind_of(result))):
        if "probes" in result:
            known = [(lr, min(pair, key=lambda kind: pair[kind]), pair) for lr, pair in result["probes"].items()]
            note = " (a probe)"
            lines += [f"| {TITLES[kind_of(result)]} | {lr}{note} | {kind} | {pair[kind]:.1f} |" for lr, kind, pair in known]
        elif "pair" in result:
            note, few = " (its own)" if result["lr"] == RATES[kind_of(result)][0] else "", result["pair"][result["weights"]]
            lines.append(f"| {TITLES[kind_of(result)]} | {result['lr']}{note} | {result['weights']} | {few:.1f} |")
    lines += ["", f"| {' | '.join(['', 'parameters', 'images seen', 'images/s', 'weights', *HEADS])} |", "|" + " --- |" * 9]
    shown: list[tuple[Result, str]] = [(result, "ours") for result in done if result["name"] == "ours"]
    for peer, rates in RATES.items():
        best = best_of(results, peer)
        shown += [(result, TITLES[peer]) for result in done if result["name"] == f"{peer}_{rates[0]}"]
        if best is not None and best in done and best["lr"] != rates[0]:
            shown.append((best, f"{TITLES[peer]}, learning rate {best['lr']}"))
    shown += [(result, f"{TITLES[peer]}, {result['lr']}") for peer in EQUAL for result in done if result["name"] == peer]
    lines += [row(result, floor, title) for result, title in shown]
    lines.append(f"| {' | '.join([f'{samples} held-out images', '', '', '', '', *cells(floor, floor)])} |")
    minutes = done[0]["minutes"] if done else 0
    lines += ["", f"| distance after minutes | {' | '.join(f'{minutes * part:g}' for part in FRACTIONS)} |"]
    lines.append("|" + " --- |" * (1 + len(FRACTIONS)))
    for result, title in shown:
        known = [result["distances"].get(str(part)) for part in FRACTIONS]
        lines.append(f"| {title} | {' | '.join(format(one[LITE2]['frechet'], '.1f') if one else '' for one in known)} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in goals(results, floor[LITE2]["frechet"]))])


def kind_of(result: Result) -> str:
    """ours, or the peer."""
    return result["name"].partition("_")[0]


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
            part: result["distances"][str(part)][LITE2]["frechet"] for part in FRACTIONS if str(part) in result["distances"]
        }
        if len(distance_at) > 1:
            lines[title] = ([part * result["minutes"] for part in distance_at], list(distance_at.values()))
        else:  # of the peer that is not the better one, the end alone
            lines[f"{title}, at the end"] = ([0, last], 2 * list(distance_at.values()))
    lines["held-out images"] = ([0, last], [held_out, held_out])
    figures.curves(
        path, {"Fréchet distance, EfficientNet-Lite2": lines}, xlabel="minutes", log=["Fréchet distance, EfficientNet-Lite2"]
    )


def names() -> list[str]:
    return ["ours", *(f"{peer}_{lr}" for peer, rates in RATES.items() for lr in rates), *EQUAL]


def race(
    out: Path,
    folder: Path,
    minutes: float,
    samples: int,
    only: str = "",
    chosen: Callable[[], list[str]] = names,
    probe_minutes: float | None = None,
) -> str:
    """Train and measure what is asked for and not there yet; gives the table of all that is."""
    field = [Contestant(name, out, folder) for name in chosen()]
    for contestant in field:  # what was measured with other numbers of samples does not compare
        known = contestant.result.get("distances", {})
        for key in [key for key, distance in known.items() if distance["samples"] != samples]:
            del known[key]
    selected = [contestant for contestant in field if contestant.name.startswith(only)]
    for contestant in selected:
        contestant.train(60 * minutes, 60 * (probe_minutes or minutes / 4))
        contestant.weights()
    results = [contestant.result for contestant in field if contestant.result]
    best = [best_of(results, peer) for peer in PEERS]
    default_names = [f"{peer}_{rates[0]}" for peer, rates in RATES.items()]
    for contestant in selected:
        if contestant.name in ("ours", *default_names) or contestant.result in best:
            contestant.measure(1.0, samples)
    for contestant in selected:
        if contestant.name == "ours" or contestant.result == better_peer(results):
            for fraction in FRACTIONS:
                contestant.measure(fraction, samples)
    shown = [one for one in field if one.name == "ours" or one.result in best]
    floor = floor_of(folder, samples)
    text = table(results, floor, samples)
    missing = [contestant.name for contestant in field if "weights" not in contestant.result]
    text += f"\n- so far without {', '.join(missing)}" if missing else ""
    ready = [(TITLES[one.kind], one) for one in shown if "1.0" in one.result.get("distances", {})]
    if ready:
        draw_sheet([(title, one.out / "samples_1.0.npy") for title, one in ready], out / "samples.png")
        draw_curve([(title, one.result) for title, one in ready], floor[LITE2]["frechet"], out / "distance.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--probe-minutes", type=float, help="of a learning rate of the peers with our operations (default a quarter)"
    )
    parser.add_argument("--only", default="", help="a contestant, or the beginning of its name: ours, diffusers, ddp_1e-4")
    parser.add_argument("--out", type=Path, help="default runs/race")
    args = parser.parse_args()
    if not any(name.startswith(args.only) for name in names()):
        raise UserError(f"--only {args.only}: there is no such contestant; there are {', '.join(names())} (or ddp, diffusers)")
    needs_ddp = any(name.startswith("ddp") for name in names() if name.startswith(args.only))
    if needs_ddp and installed("denoising-diffusion-pytorch") is None:
        raise UserError("denoising-diffusion-pytorch is missing: pip install -e '.[bench]', or --only ours")
    ask_for_networks()
    folder = prepare_images(ROOT / "datasets")
    held_out = sum(path.is_file() for path in (folder / "held_out").rglob("*"))
    if not FEWEST <= args.samples <= held_out:
        raise UserError(f"--samples {args.samples}: from {FEWEST} to {held_out}, of which there are held-out images")
    print(machine("denoising-diffusion-pytorch"), flush=True)
    out = (args.out or ROOT / "runs" / "race").resolve()
    text = race(out, folder, args.minutes, args.samples, args.only, probe_minutes=args.probe_minutes)
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
