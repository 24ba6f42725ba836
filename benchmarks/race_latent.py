#!/usr/bin/env python
"""The race for the main job: photos of clothes at 64 px with classes, an hour of two cores from images to samples.

  nice -n 10 python benchmarks/race_latent.py [--minutes 60] [--samples 500] [--only ours] [--images 1000] [--out DIR]

Photos from ../shared/data (scikit-learn's digits where they are missing): 3,068 to train on (or --images of them), 341 to
choose by, 372 to measure by. The contestants, each from its launch to the limit:

- ours: train_vae.py and train_ldm.py with configs/clothing64_vae.json and _ldm.json, their steps scaled to fit the time. Each
  row of benchmarks/race_latent.json is one: {"name", "share" of the time for the autoencoder, "vae": [overrides], "ldm":
  [overrides]}, or {"name", "of": another row}, which draws from its weights. Both may have a "sampler": {} in place of the
  guidance that is chosen, and a "guide": 0.25 or 0.5, autoguidance by the weights after that share of the diffusion's time.
- diffusers and ddp: diffusers' `UNet2DModel` and denoising-diffusion-pytorch's `Unet` on pixels, whose operations an image are
  those of our autoencoder and our U-Net together (benchmarks/equal.py).
- diffusers-latent: diffusers' AutoencoderKL with the operations of our autoencoder (benchmarks/kl.py), --share of the time, and
  its `UNet2DModel` with those of our U-Net on the latents.

All have our batch sizes and precision. The peers' learning rates are the best of three in probes of --probe-minutes, whose
schedules end: by samples, of the AutoencoderKL by reconstructions, against the photos to choose by. These also choose the
guidance, and between EMA and raw weights. Off the clock each draws with 50 network calls an image. Measured against the test
photos, beside as many training photos (the floor) and the photos to choose by: the distances in EfficientNet-Lite2 and -Lite0
with standard errors, precision, recall, how many samples are read as their class (by a classifier of train_classifier.py, and
by a regression on Lite2's features), and copies.

What is there already in --out is not done again, so that a race may be run in pieces (--only takes the beginning of a name).
At the end there are the table and a sheet of samples, without --out in benchmarks/results, too. The file is long because the
race, its table and its sheet are here.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor

import train_ldm
import train_vae
from benchmarks import equal, kl
from benchmarks.common import ROOT, installed, machine
from benchmarks.measures import HEADS, LITE2, Numbers, ask_for_networks, cells, is_win
from benchmarks.peers import CALLS
from benchmarks.photos import Photos, Result, pixels_of, prepare_photos, write_json
from benchmarks.race import to_pixels
from benchmarks.timed import Speed, measure_speed, our_command, precision_of, shown, train_for, wait_for
from src import figures
from src.config import UserError, load, read_json, run_script
from src.evaluation.registry import FEWEST
from src.models import VAE, build_model
from src.runs.opened import open_trained
from src.sampling import SamplerConfig, build_sampler

SIZE, FEW = 64, 128  # pixels, and the samples that choose rates, weights and guidance
VAE_CONFIG, LDM_CONFIG = ROOT / "configs" / "clothing64_vae.json", ROOT / "configs" / "clothing64_ldm.json"
ROWS = ROOT / "benchmarks" / "race_latent.json"
RESULTS = ROOT / "benchmarks" / "results"
RATES = ("5e-4", "1e-3", "2e-3")
FRACTIONS = (0.25, 0.5, 1.0)  # of the time of our diffusion, after which weights are kept
GUIDANCES = (1.0, 1.5, 2.5)  # of which the photos to choose by choose one; 1 is none, with twice the steps
PEERS = {"diffusers": "diffusers, pixels", "ddp": "denoising-diffusion-pytorch, pixels"}
PEERS |= {"diffusers-latent": "diffusers, its autoencoder and latents"}
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------- ours


def scaled(length: Any, factor: float) -> Any:
    """A length of a config, times a factor: a number of steps, or {"epochs": number}."""
    if isinstance(length, dict):
        return {unit: number * factor for unit, number in length.items()}
    return max(1, round(length * factor))


def scaled_stages(stages: Sequence[dict[str, Any]], factor: float) -> str:
    """All stages of an autoencoder, and where in them the adversary begins, at `factor` of their steps, as an override."""
    shorter = []
    for stage in stages:
        adversarial = stage.get("adversarial")
        if adversarial is not None and adversarial.get("start_step") is not None:
            adversarial = {**adversarial, "start_step": scaled(adversarial["start_step"], factor)}
        shorter.append({**stage, "steps": scaled(stage["steps"], factor), "adversarial": adversarial})
    return f"stages={json.dumps(shorter)}"


def our_operations() -> tuple[int, int, tuple[int, int, int]]:
    """Of our autoencoder and of our U-Net for one image, and the shape of the latents."""
    vae, ldm = load(VAE_CONFIG, train_vae.Config, []), load(LDM_CONFIG, train_ldm.Config, [])
    latent = vae.model.latent_shape(SIZE)
    network = build_model(ldm.model, latent, 10).eval()
    inputs = [torch.zeros(1, *latent), torch.zeros(1), torch.zeros(1, dtype=torch.long)]
    of_vae = equal.operations(VAE(vae.model, 3).eval(), torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, *latent))
    return of_vae, equal.operations(network, *inputs), latent


def train_ours(row: dict[str, Any], out: Path, photos: Photos, seconds: float, probe: float = 1 / 25) -> Result:
    """The autoencoder in its share of the time, then diffusion on its latents in what is left. How fast both are is measured
    before, off the clock, by trainings of this share of their steps."""
    vae_sets = [*photos.overrides, *row["vae"]]
    ldm_sets = [*photos.overrides, "preview.sheets=one", "preview.num_samples=1", *row["ldm"]]  # at its end it draws a preview
    stages = read_json(VAE_CONFIG)["stages"]
    known = next((one.partition("=")[2] for one in reversed(row["vae"]) if one.startswith("stages=")), None)
    stages = json.loads(known) if known is not None else stages
    vae_sets = [one for one in vae_sets if not one.startswith("stages=")]
    for place in ("vae", "ldm", "weights"):  # of a training that was ended in the middle
        shutil.rmtree(out / place, ignore_errors=True)
    if not (out / "speeds.json").exists():
        shorter = [*vae_sets, scaled_stages(stages, probe)]
        vae_speed = measure_speed("train_vae.py", VAE_CONFIG, out / "vae_probe", shorter, keep=True)
        ldm_sets_of_probe = [*ldm_sets, f"autoencoder={out / 'vae_probe'}"]
        watched = min(30.0, seconds / 10)
        ldm_speed = measure_speed("train_ldm.py", LDM_CONFIG, out / "ldm_probe", ldm_sets_of_probe, watched)
        shutil.rmtree(out / "vae_probe")
        write_json(out / "speeds.json", {"vae": vae_speed, "ldm": ldm_speed})
    vae_speed, ldm_speed = (Speed(*read_json(out / "speeds.json")[name]) for name in ("vae", "ldm"))
    began, vae, share = time.time(), out / "vae", row["share"]
    config = load(VAE_CONFIG, train_vae.Config, [*vae_sets, scaled_stages(stages, 1)])
    steps = sum(stage["steps"] for stage in stages)
    factor = vae_speed.steps(share * seconds, config.batch_size) / steps
    command = our_command("train_vae.py", VAE_CONFIG, vae, [*vae_sets, scaled_stages(stages, factor), "preview.every=null"])
    wait_for(command, out / "vae.txt", "our autoencoder")
    of_vae = {"images": round(factor * steps) * config.batch_size, "seconds": round(time.time() - began, 1)}
    left = seconds - (time.time() - began)
    ldm_sets = [*ldm_sets, f"autoencoder={vae}"]
    diffusion = train_for("train_ldm.py", LDM_CONFIG, out / "ldm", ldm_sets, ldm_speed, left, FRACTIONS, out / "weights")
    shutil.copytree(out / "ldm" / "autoencoder", out / "autoencoder", dirs_exist_ok=True)  # where the weights look for it
    opened = open_trained(out / "weights" / "1.0", CPU)
    count = sum(parameter.numel() for parameter in opened.network.parameters())
    of_vae |= {"command": shown(command), "parameters": len_of(VAE(config.model, 3))}
    return {"parameters": count + of_vae["parameters"], "autoencoder": of_vae, **diffusion}


def len_of(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def draw_ours(weights: Path, labels: Sequence[int], sampler: dict[str, Any], batch: int = 50) -> Tensor:
    """(N, 3, H, W) uint8 of these classes."""
    run = open_trained(weights, CPU)
    solver = build_sampler(run, SamplerConfig(**sampler))
    if solver.calls() > CALLS:
        raise UserError(f"the sampler makes {solver.calls()} network calls, more than {CALLS}; give it fewer steps")
    parts = [range(start, min(start + batch, len(labels))) for start in range(0, len(labels), batch)]
    return to_pixels(torch.cat([solver.draw(0, part, [labels[i] for i in part], device=CPU) for part in parts]))


# ---------------------------------------------------------------------------------------------- contestants


class Contestant:
    """One of ours (a `row`) or a peer, in its own folder: `result` is kept in result.json."""

    def __init__(self, name: str, out: Path, photos: Photos, row: dict[str, Any] | None = None) -> None:
        self.name, self.row, self.photos, self.out = name, row, photos, out / name
        self.file = self.out / "result.json"
        self.result: Result = read_json(self.file) if self.file.exists() else {}
        self.weights_of = out / ((row or {}).get("of") or name)

    @property
    def title(self) -> str:
        return PEERS.get(self.name, self.name)

    def save(self) -> None:
        write_json(self.file, self.result)

    def train(self, seconds: float, probe_seconds: float, share: float) -> None:
        minutes = round(seconds / 60, 3)
        if self.result:
            if self.result["minutes"] != minutes:
                raise UserError(
                    f"{self.out} was trained for {self.result['minutes']} minutes; give another --out, or remove it"
                )
            if self.result.get("row") != self.row:
                raise UserError(f"{self.out} is of another row of this name; give this one another name")
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if self.row is not None and "of" in self.row:
            known = read_json(self.weights_of / "result.json") if (self.weights_of / "result.json").exists() else {}
            if known.get("minutes") != minutes:
                raise UserError(
                    f"{self.name} draws from the weights of {self.row['of']}, which are not there: run that one first"
                )
            training = {key: value for key, value in known.items() if key not in ("chosen", "measured")}
            self.result = {**training, "name": self.name, "row": self.row}
            self.save()
            return
        print(f"{self.name}: training for {minutes:g} minutes", flush=True)
        if self.row is not None:
            training = train_ours(self.row, self.out, self.photos, seconds)
        elif self.name == "diffusers-latent":
            training = self.train_latent(seconds, probe_seconds, share)
        else:
            of_vae, of_ldm, _ = our_operations()
            shape, multiples = (3, SIZE, SIZE), (1, 2, 2, 2)
            network = self.network_file("network", lambda: self.unet(of_vae + of_ldm, shape, multiples))
            training = self.train_equal(network, self.photos.memory_file(), seconds, probe_seconds)
        self.result = {"name": self.name, "minutes": minutes, "machine": machine("accelerate"), **training, "row": self.row}
        self.save()

    def unet(self, operations: float, shape: Sequence[int], multiples: Sequence[int]) -> equal.Document:
        kind = self.name.partition("-")[0]
        document = equal.of_equal_operations(kind, operations, shape, len(self.photos.class_names), multiples)
        return {**document, "ours": operations}

    def network_file(self, name: str, find: Callable[[], Any]) -> Path:
        """A network of our operations, which is found once."""
        file = self.out / f"{name}.json"
        if not file.exists():
            write_json(file, find())
        return file

    def best_rate(self, name: str, train: Callable[[Path, str], Any], measure: Callable[[Path], float]) -> tuple[str, Result]:
        """The best of three learning rates in probes, each of which is kept once it is measured; and what all got."""
        file = self.out / f"{name}.json"
        known: Result = read_json(file) if file.exists() else {}
        for lr in RATES:
            if lr not in known:
                print(f"{self.name}: a probe of learning rate {lr} ({name})", flush=True)
                place = self.out / name / lr
                shutil.rmtree(place, ignore_errors=True)
                train(place, lr)
                known[lr] = measure(place)
                write_json(file, known)
        return min(RATES, key=lambda lr: known[lr]), known

    def run(self, script: str, network: Path, data: Path, lr: str, seconds: float, place: Path, began: float) -> Result:
        """A training in a process of its own."""
        settings = read_json(LDM_CONFIG if script == "equal" else VAE_CONFIG)
        words = ["--lr", lr, "--seconds", f"{seconds:g}", "--data", str(data), "--out", str(place)]
        words += ["--batch", str(settings["batch_size"])]
        if script == "equal":
            words += ["--precision", precision_of(settings["mixed_precision"]), "--fractions", "1.0"]
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, f"benchmarks/{script}.py", str(network), *words]
        wait_for([*command, "--began", str(began)], place / "log.txt", self.name)
        return read_json(place / "trained.json") | {"command": shown(command), "lr": lr}

    def train_equal(self, network: Path, data: Path, seconds: float, probe_seconds: float) -> Result:
        """At the best of three learning rates for the whole time."""

        def probe(place: Path, lr: str) -> None:
            self.run("equal", network, data, lr, probe_seconds, place, time.time())

        best, known = self.best_rate("probes", probe, lambda place: self.distance(self.draw_from(place, "ema", 1.0, FEW)))
        training = self.run("equal", network, data, best, seconds, self.out / "whole", time.time())
        return {**training, "probes": known}

    def train_latent(self, seconds: float, probe_seconds: float, share: float) -> Result:
        """The AutoencoderKL at the best of three rates, then the U-Net on its latents in the time that is left."""
        of_vae, of_ldm, latent = our_operations()
        data, kl_place = self.photos.memory_file(), self.out / "kl"
        widths = read_json(VAE_CONFIG)["model"]["widths"]
        multiples = [width // widths[0] for width in widths]
        network = self.network_file("kl", lambda: kl.of_equal_operations(of_vae, (3, SIZE, SIZE), latent[0], multiples))

        def train_kl(place: Path, lr: str, seconds: float = probe_seconds) -> Result:
            return self.run("kl", network, data, lr, seconds, place, time.time())

        best, known = self.best_rate("kl_probes", train_kl, self.distance_of_reconstructions)
        if not (kl_place / "trained.json").exists():
            shutil.rmtree(kl_place, ignore_errors=True)
            train_kl(kl_place, best, share * seconds)
        of_kl = read_json(kl_place / "trained.json")
        unet = self.network_file("network", lambda: self.unet(of_ldm, latent, (1, 2, 2)))
        left = seconds - of_kl["seconds"]
        training = self.train_equal(unet, kl_place / "latents.npz", left, probe_seconds)
        training["parameters"] += of_kl["parameters"]
        return {**training, "autoencoder": {**of_kl, "lr": best, "probes": known}}

    def distance(self, pixels: Tensor) -> float:
        """From the photos to choose by."""
        return self.photos.sets["validation"].distance(pixels)

    def distance_of_reconstructions(self, place: Path) -> float:
        """Those of the photos to choose by, from themselves."""
        images = torch.from_numpy(pixels_of(self.photos.sets["validation"].images, SIZE)).permute(0, 3, 1, 2)
        return self.distance(to_pixels(kl.reconstruct(place, images / 127.5 - 1)))

    def draw_from(self, place: Path, weights: str, guidance: float, count: int, part: str = "validation") -> Tensor:
        """(count, 3, H, W) uint8 of a peer's training, in the shares of the classes of a part."""
        samples = equal.draw(place, weights, count, self.photos.labels(part, count), guidance)
        return to_pixels(kl.decode(self.out / "kl", samples) if self.name == "diffusers-latent" else samples)

    def draw(self, weights: str, guidance: float, count: int, part: str = "validation") -> Tensor:
        """The same of the whole training, of ours, too."""
        if self.row is None:
            return self.draw_from(self.out / "whole", weights, guidance, count, part)
        sampler = read_json(LDM_CONFIG)["preview"]["sampler"] | self.row.get("sampler", {})
        calls = {"steps": CALLS if guidance == 1 else CALLS // 2, "guidance": guidance}
        chosen = sampler if "sampler" in self.row else {**sampler, **calls}
        weights_folder = self.weights_of / "weights"
        if "guide" in self.row and chosen["guidance"] != 1:
            chosen["guide_with"] = str(weights_folder / str(self.row["guide"]))
        return draw_ours(weights_folder / "1.0", self.photos.labels(part, count), chosen)

    def choose(self) -> None:
        """Between EMA and raw weights, then the guidance."""
        if "chosen" in self.result:
            return
        print(f"{self.name}: choosing weights and guidance", flush=True)
        tried = {"ema": self.distance(self.draw("ema", 1.0, FEW))}
        if self.row is None:
            tried["raw"] = self.distance(self.draw("raw", 1.0, FEW))
        weights = min(tried, key=lambda kind: tried[kind])
        by_guidance = {1.0: tried[weights]}
        for guidance in GUIDANCES[1:] if self.row is None or "sampler" not in self.row else ():
            by_guidance[guidance] = self.distance(self.draw(weights, guidance, FEW))
        guidance = min(by_guidance, key=lambda one: by_guidance[one])
        self.result["chosen"] = {"weights": weights, "guidance": guidance, "tried": [tried, list(by_guidance.items())]}
        self.save()

    def measure(self, samples: int) -> None:
        """Draw and measure, where that was not done."""
        if self.result.get("measured", {}).get("samples") == samples:
            return
        print(f"{self.name}: {samples} images", flush=True)
        chosen, labels = self.result["chosen"], self.photos.labels("test", samples)
        pixels = self.draw(chosen["weights"], chosen["guidance"], samples, "test")
        np.save(self.out / "samples.npy", pixels.numpy())
        self.result["measured"] = self.photos.measure(pixels, labels)
        self.save()


# ---------------------------------------------------------------------------------------------- what is shown


def table(results: Sequence[tuple[str, Result]], floors: dict[str, Result], samples: int) -> str:
    """The contestants, real photos, the learning rates, and the goals."""
    heads = ["", "parameters", "images seen", "weights, guidance", *HEADS, "precision", "recall", "read", "read by Lite2"]
    heads += ["nearer", "copied"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for title, result in results:
        full, chosen = result["fractions"]["1.0"], result["chosen"]
        before = [result["autoencoder"]["images"]] if "autoencoder" in result else []
        words = [title, f"{result['parameters'] / 1e6:.1f} M", " + ".join(f"{count:,}" for count in [*before, full["images"]])]
        words.append(f"{chosen['weights']}, {chosen['guidance']:g}")
        lines.append(f"| {' | '.join([*words, *row_of(result['measured'], floors)])} |")
    for title, measured in floors.items():
        words = [f"{measured['samples']} {title}", "", "", ""]
        lines.append(f"| {' | '.join([*words, *row_of(measured, floors)])} |")
    lines += ["", "| learning rate | " + " | ".join(RATES) + " |", "|" + " --- |" * (1 + len(RATES))]
    for title, result in results:
        probes = [("", result.get("probes")), (", autoencoder", result.get("autoencoder", {}).get("probes"))]
        for what, known in probes:
            if known is not None:
                lines.append(f"| {title}{what} | {' | '.join(f'{known[lr]:.1f}' for lr in RATES)} |")
    if_new = next(iter(floors.values()))["copied_if_new"]
    lines += ["", f"`nearer` is 0.5 and `copied` {if_new:.1%} where samples are as far from the training photos as test photos"]
    return "\n".join([*lines, *(f"- {line}" for line in goals(results, floors))])


def row_of(measured: Result, floors: dict[str, Result]) -> list[str]:
    """The cells of what was measured."""
    shares = [f"{measured[key]:.1%}" for key in ("read", "read_lite2")]
    words = [f"{measured['precision']:.2f}", f"{measured['recall']:.2f}", *shares]
    return [*cells(measured, next(iter(floors.values()))), *words, f"{measured['nearer']:.2f}", f"{measured['copied']:.1%}"]


def goals(results: Sequence[tuple[str, Result]], floors: dict[str, Result]) -> list[str]:
    """Half of the best peer's distance above the floor, and no copies."""
    peers = [one for title, one in results if title in PEERS.values()]
    ours = [one for title, one in results if title not in PEERS.values()]
    if not ours or not peers:
        return ["some contestants are missing: nothing can be said of the goals yet"]
    best, peer = (min(some, key=lambda one: frechet(one)["frechet"]) for some in (ours, peers))
    floor = next(iter(floors.values()))[LITE2]["frechet"]
    share = (frechet(best)["frechet"] - floor) / (frechet(peer)["frechet"] - floor)
    margin = "by more than" if is_win(frechet(best), frechet(peer)) else "and not by"
    copied, if_new = best["measured"]["copied"], best["measured"]["copied_if_new"]
    expected = if_new + 2 * (if_new * (1 - if_new) / best["measured"]["samples"]) ** 0.5
    return [
        f"{'met' if share <= 0.5 else 'MISSED'}: the distance of {best['name']} above the floor is {share:.2f} of that of the "
        f"best peer that is there, {peer['name']}, {margin} two standard errors (goal: at most 0.5)",
        f"{'met' if copied <= expected else 'MISSED'}: {copied:.1%} of its samples are copies (new images: {if_new:.1%})",
    ]


def frechet(result: Result) -> Numbers:
    return result["measured"][LITE2]


def draw_sheet(contestants: Sequence[tuple[str, Path]], labels: Sequence[int], path: Path, each: int = 3) -> None:
    """The first samples of each class, a column for each class, one contestant below the other."""
    sheets = []
    for title, file in contestants:
        samples = np.load(file)
        rows = [[int(i) for i in np.flatnonzero(np.asarray(labels) == k)[:each]] for k in sorted(set(labels))]
        chosen = [row[i] for i in range(min(each, *map(len, rows))) for row in rows]
        pixels = np.ascontiguousarray(samples[chosen].transpose(0, 2, 3, 1))
        sheets.append(figures.grid(pixels, columns=len(rows), title=title, zoom=1))
    figures.save(figures.in_a_column(sheets).quantize(256), path)


def contestants(out: Path, photos: Photos, rows: Sequence[dict[str, Any]]) -> list[Contestant]:
    ours = [Contestant(row["name"], out, photos, row) for row in rows]
    return [*ours, *(Contestant(name, out, photos) for name in PEERS)]


def race(
    out: Path,
    photos: Photos,
    rows: Sequence[dict[str, Any]],
    *,
    minutes: float,
    samples: int,
    only: str = "",
    share: float = 0.4,
    probe_minutes: float = 10.0,
) -> str:
    """Train and measure what is asked for and not there yet; gives the table of all that is."""
    field = contestants(out, photos, rows)
    for contestant in field:
        if contestant.name.startswith(only):
            contestant.train(60 * minutes, 60 * probe_minutes, share)
            contestant.choose()
            contestant.measure(samples)
    file = out / f"floors_{samples}.json"
    if not file.exists():
        parts = {"training photos": ("train", samples), "photos to choose by": ("validation", samples)}
        write_json(file, {title: photos.measure_part(*part) for title, part in parts.items()})
    field = contestants(out, photos, rows)  # another process may have added to it
    done = [one for one in field if one.result.get("measured", {}).get("samples") == samples]
    text = table([(one.title, one.result) for one in done], read_json(file), samples)
    if done:
        sheet = [(one.title, one.out / "samples.npy") for one in done]
        draw_sheet(sheet, photos.labels("test", samples), out / "samples.png")
    return text


def check(rows: Sequence[dict[str, Any]], file: Path) -> Sequence[dict[str, Any]]:
    """The rows; a UserError for one that cannot be run."""
    with_weights = [row.get("name") for row in rows if "of" not in row]
    for row in rows:
        trains = {"name", "share", "vae", "ldm"} <= set(row) and 0 < row["share"] < 1
        if (row.get("of") not in with_weights and not trains) or row.get("name") in (None, *PEERS):
            needs = "a `name`, and a `share` between 0 and 1, `vae` and `ldm`, or `of` a row that trains"
            raise UserError(f"{file}: a row needs {needs}, and this is {row}")
        if row.get("guide", 0.5) not in FRACTIONS[:-1]:
            raise UserError(f"{file}: the guide of {row['name']!r} is one of {FRACTIONS[:-1]}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--probe-minutes", type=float, default=10.0, help="of each learning rate of a peer")
    parser.add_argument(
        "--share", type=float, default=0.4, help="of the time for the peer's autoencoder; ours says it in its row"
    )
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--images", type=int, help="train on so many of the photos (default all)")
    parser.add_argument("--rows", type=Path, default=ROWS, help="ours (default benchmarks/race_latent.json)")
    parser.add_argument("--only", default="", help="a contestant, or the beginning of its name")
    parser.add_argument("--out", type=Path, help="default runs/race_latent, with --images runs/race_latent_IMAGES")
    args = parser.parse_args()
    rows = check(read_json(args.rows), args.rows)
    names = [*(row["name"] for row in rows), *PEERS]
    selected = [name for name in names if name.startswith(args.only)]
    if not selected:
        raise UserError(f"--only {args.only}: there is no such contestant; there are {', '.join(names)}")
    if "ddp" in selected and installed("denoising-diffusion-pytorch") is None:
        raise UserError("denoising-diffusion-pytorch is missing: pip install -e '.[bench]', or --only ours")
    ask_for_networks()
    photos = Photos(prepare_photos(ROOT / "datasets", SIZE), SIZE, args.images)
    if args.samples < FEWEST:
        raise UserError(f"--samples {args.samples}: at least {FEWEST}")
    tail = f"_{args.images}" if args.images is not None else ""
    out = (args.out or ROOT / "runs" / f"race_latent{tail}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    options = {"minutes": args.minutes, "samples": args.samples, "share": args.share, "probe_minutes": args.probe_minutes}
    text = race(out, photos, rows, only=args.only, **options)
    print(text)
    if args.out is None:
        images = f" --images {args.images}" if args.images is not None else ""
        command = f"`python benchmarks/race_latent.py --minutes {args.minutes:g} --samples {args.samples}{images}`"
        hardware = machine("accelerate", "denoising-diffusion-pytorch")
        page = f"{command}, {time.strftime('%Y-%m-%d')}\n\n{hardware}\n\n{text}\n"
        (RESULTS / f"race_latent{tail}.md").write_text(page)
        if (out / "samples.png").exists():
            shutil.copy(out / "samples.png", RESULTS / f"race_latent{tail}_samples.png")


if __name__ == "__main__":
    run_script(main)
