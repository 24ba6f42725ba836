#!/usr/bin/env python
"""How long to train on few images: distance, held-out loss and copies against images seen, of 300, 1,000 and 3,000 photos.

  nice -n 10 python benchmarks/few_images.py [--photos 300 1000 3000] [--most 512000] [--only "300 plain"] [--out DIR]

One long run of diffusion on pixels, by class, for each number of photos of clothes (../shared/data) and each of four recipes:
configs/cifar10_race.json as it is, with augmentation that the network is told of, with dropout, with both; at a constant rate,
so that a checkpoint is what a run of its length would have, roughly. Checkpoints are kept after 8,000 images seen and each
doubling up to --most, and of each --samples images are drawn from its EMA weights with 50 network calls. Measured are distances
from the 372 test photos with standard errors (benchmarks/measures.py), and copies of what was trained on. The loss on the 341
photos to choose by is the run's own.

A run that was interrupted goes on, one that has got --most images seen is not trained again, and what was measured is not
measured again. At the end there are the table, few_images.json and a chart, without --out in benchmarks/results, too.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from PIL import Image

from benchmarks.common import ROOT, machine
from benchmarks.measures import LITE0, LITE2, ask_for_networks, cells
from benchmarks.photos import Photos, Result, prepare_photos, write_json
from benchmarks.race_latent import draw_ours
from benchmarks.timed import end, keep, launch, our_command, shown
from src import figures
from src.config import UserError, read_json, run_script
from src.evaluation.registry import FEWEST

CONFIG = ROOT / "configs" / "cifar10_race.json"
RESULTS = ROOT / "benchmarks" / "results"
FIRST = 8_000  # images seen at the first checkpoint
ENDLESS = 10_000_000  # steps: the rate is constant, so a run is ended where it is long enough
RECIPE = ["class_conditional=true", "label_dropout=0.1"]
RECIPE += ['optimizer.schedule={"kind":"constant","warmup":{"images":2000}}', f"steps={ENDLESS}", "preview.num_samples=1"]
AT_SIZE = {32: [], 64: ["model.channel_mult=[1,2,2,2]", 'model.attention=["none","none","none","none"]']}
AUGMENTED, DROPOUT = 'augmentation={"probability":0.12}', "model.dropout=0.1"
VARIANTS = {"plain": [], "augmented": [AUGMENTED], "dropout": [DROPOUT], "augmented and dropout": [AUGMENTED, DROPOUT]}
SAMPLER = {"solver": "ddim", "steps": 50, "spacing": "dense_noise"}


def points(most: int, first: int = FIRST) -> list[int]:
    """Images seen at the checkpoints: `first`, and each doubling up to `most`."""
    return [first * 2**k for k in range(max(1, (most // first).bit_length()))]


class LongRun:
    """One run in its own folder, its checkpoints at the points, and what was measured of them, kept in result.json."""

    def __init__(self, out: Path, photos: Photos, count: int, variant: str, first: int = FIRST) -> None:
        self.name, self.count, self.variant, self.photos, self.first = f"{count} {variant}", count, variant, photos, first
        self.out = out / f"{count}_{variant.replace(' ', '_')}"
        self.run, self.file = self.out / "run", self.out / "result.json"
        self.result: Result = read_json(self.file) if self.file.exists() else {"photos": count, "recipe": variant, "points": {}}

    def weights(self, images: int) -> Path:
        return self.out / "weights" / str(images)

    def train(self, most: int) -> None:
        """Until there is a checkpoint at every point; the run goes on where it was."""
        wanted = points(most, self.first)
        batch = read_json(CONFIG)["batch_size"]
        every = self.first // batch
        sets = [*self.photos.overrides, *RECIPE, f"image.size={self.photos.size}", *AT_SIZE[self.photos.size]]
        sets += [*VARIANTS[self.variant], f"checkpoint.every={every}", "checkpoint.every_minutes=null", "checkpoint.keep=3"]
        sets += [f"preview.every={every}", f"log.every={max(1, every // 5)}"]
        command = our_command("ddpm_accelerate.py", CONFIG, self.run, sets)
        self.result["command"] = shown(command)
        self._keep(wanted, every)
        if self._missing(wanted):
            print(f"{self.name}: training until {wanted[-1]:,} images are seen", flush=True)
            self.out.mkdir(parents=True, exist_ok=True)
            process = launch(command, self.out / "log.txt")
            try:
                while self._missing(wanted):
                    if process.poll() is not None:
                        raise UserError(f"{self.name} ended: {(self.out / 'log.txt').read_text()[-2000:]}")
                    time.sleep(0.2)
                    self._keep(wanted, every)
            finally:
                end(process)
        self._read_losses(batch)

    def _missing(self, wanted: Sequence[int]) -> list[int]:
        return [images for images in wanted if not self.weights(images).exists()]

    def _keep(self, wanted: Sequence[int], every: int) -> None:
        """Checkpoints of the points that the run has now, where its rotation cannot remove them."""
        for images in self._missing(wanted):
            checkpoint = self.run / "checkpoints" / f"step_{images // self.first * every:08d}"
            staged = self.weights(images).with_suffix(".part")
            if checkpoint.exists():
                shutil.rmtree(staged, ignore_errors=True)
                keep(checkpoint, staged)
                staged.rename(self.weights(images))

    def _read_losses(self, batch: int) -> None:
        """The loss on the photos to choose by, at each checkpoint of the run: [[images seen, loss], ...]."""
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        known = {line["step"] * batch: line["held_out_loss"] for line in lines if "held_out_loss" in line}
        self.result["held_out_loss"] = sorted(known.items())
        write_json(self.file, self.result)

    def measure(self, most: int, samples: int) -> None:
        """Draw and measure at each point, where that was not done."""
        for images in points(most, self.first):
            known = self.result["points"].get(str(images))
            if known is None or known["samples"] != samples:
                print(f"{self.name}: {samples} samples after {images:,} images seen", flush=True)
                labels = self.photos.labels("test", samples)
                pixels = draw_ours(self.weights(images), labels, SAMPLER)
                np.save(self.out / f"samples_{images}.npy", pixels[:40].numpy())
                self.result["points"][str(images)] = self.photos.measure(pixels, labels, reading=False)
                write_json(self.file, self.result)


def table(results: Sequence[Result], floor: Result) -> str:
    """For each run its points, then where each run is best."""
    heads = ["images seen", "times each photo", "held-out loss", "Fréchet, Lite2", "above the floor", "kernel x 1000, Lite2"]
    heads += ["Fréchet, Lite0", "precision", "recall", "nearer", "copied"]
    lines = list[str]()
    for result in results:
        losses = dict(map(tuple, result["held_out_loss"]))
        lines += [f"{result['photos']:,} photos, {result['recipe']}", ""]
        lines += [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        for images, measured in sorted(result["points"].items(), key=lambda point: int(point[0])):
            loss = losses.get(int(images))
            words = [f"{int(images):,}", f"{int(images) / result['photos']:.0f}", f"{loss:.4f}" if loss is not None else ""]
            words += [*cells(measured, floor), f"{measured['precision']:.2f}", f"{measured['recall']:.2f}"]
            words += [f"{measured['nearer']:.2f}", f"{measured['copied']:.1%}"]
            lines.append(f"| {' | '.join(words)} |")
        lines.append("")
    lines += ["| photos | recipe | lowest held-out loss at | lowest distance at | distance there | copied there |"]
    lines.append("|" + " --- |" * 6)
    for result in results:
        best = min(result["points"], key=lambda images: result["points"][images][LITE2]["frechet"])
        by_loss = min(result["held_out_loss"], key=lambda pair: pair[1], default=None)
        there = result["points"][best]
        words = [f"{result['photos']:,}", result["recipe"], f"{by_loss[0]:,}" if by_loss is not None else "", f"{int(best):,}"]
        words += [f"{there[LITE2]['frechet']:.1f} ± {there[LITE2]['frechet_error']:.1f}", f"{there['copied']:.1%}"]
        lines.append(f"| {' | '.join(words)} |")
    summary = (
        f"the floor, {floor['samples']} training photos: {floor[LITE2]['frechet']:.1f} in Lite2, {floor[LITE0]['frechet']:.1f}"
    )
    lines += ["", f"- {summary} in Lite0; of new images {floor['copied_if_new']:.1%} count as `copied`, and `nearer` is 0.5"]
    return "\n".join(lines)


def draw_chart(results: Sequence[Result], floor: Result, path: Path) -> None:
    """Distance, copies and held-out loss against images seen: a row for each number of photos, a line for each recipe."""
    rows = list[Image.Image]()
    for count in sorted({result["photos"] for result in results}):
        names = ["Fréchet distance, EfficientNet-Lite2", "share of copies", "held-out loss"]
        panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {name: {} for name in names}
        for result in results:
            if result["photos"] == count and result["points"]:
                known = sorted((int(images), measured) for images, measured in result["points"].items())
                x = [float(images) for images, _ in known]
                panels[names[0]][result["recipe"]] = (x, [measured[LITE2]["frechet"] for _, measured in known])
                panels[names[1]][result["recipe"]] = (x, [measured["copied"] for _, measured in known])
                losses = [pair for pair in result["held_out_loss"] if pair[0] <= x[-1]]
                panels[names[2]][result["recipe"]] = ([pair[0] for pair in losses], [pair[1] for pair in losses])
        span = [min(x[0] for x, _ in panels[names[0]].values()), max(x[-1] for x, _ in panels[names[0]].values())]
        for name, value in ((names[0], floor[LITE2]["frechet"]), (names[1], floor["copied_if_new"])):
            panels[name]["real photos" if name == names[0] else "new images"] = (span, [value, value])
        figures.curves(path, panels, xlabel="images seen", title=f"{count:,} photos", log=["images seen"])
        rows.append(Image.open(path).copy())
    if rows:
        figures.save(figures.in_a_column(rows), path)


def study(out: Path, sets: Mapping[int, Photos], *, most: int, samples: int, only: str = "", first: int = FIRST) -> str:
    """Train and measure what is asked for and not there yet; gives the table of all that is."""
    runs = [LongRun(out, photos, count, variant, first) for count, photos in sets.items() for variant in VARIANTS]
    for run in runs:
        if run.name.startswith(only):
            run.train(most)
            run.measure(most, samples)
    file = out / f"floor_{samples}.json"
    if not file.exists():
        photos = next(iter(sets.values()))
        floor = photos.measure_part("train", samples, reading=False)
        of_new = photos.measure_part("test", samples, reading=False)["copied_if_new"]
        write_json(file, {**floor, "copied_if_new": of_new})
    results = [run.result for run in runs if run.result["points"]]
    write_json(out / "few_images.json", results)
    draw_chart(results, read_json(file), out / "few_images.png")
    return table(results, read_json(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[300, 1000, 3000], help="how many to train on")
    parser.add_argument("--size", type=int, choices=sorted(AT_SIZE), default=32)
    parser.add_argument("--most", type=int, default=512_000, help="images seen at the last checkpoint, at least")
    parser.add_argument("--samples", type=int, default=372)
    parser.add_argument("--only", default="", help=f"a run, or the beginning of its name: '300 plain'; {', '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, help="default runs/few_images_SIZE")
    args = parser.parse_args()
    names = [f"{count} {variant}" for count in args.photos for variant in VARIANTS]
    if not any(name.startswith(args.only) for name in names):
        raise UserError(f"--only {args.only}: there is no such run; there are {', '.join(names)}")
    if args.samples < FEWEST or args.most < FIRST:
        raise UserError(f"--samples is at least {FEWEST}, and --most at least {FIRST}")
    ask_for_networks()
    folder = prepare_photos(ROOT / "datasets", args.size)
    out = (args.out or ROOT / "runs" / f"few_images_{args.size}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    sets = {count: Photos(folder, args.size, count) for count in args.photos}
    text = study(out, sets, most=args.most, samples=args.samples, only=args.only)
    print(text)
    if args.out is None:
        command = f"`python benchmarks/few_images.py --size {args.size} --most {args.most} --samples {args.samples}`"
        page = f"{command}, {time.strftime('%Y-%m-%d')}\n\n{machine('accelerate')}\n\n{text}\n"
        (RESULTS / "few_images.md").write_text(page)
        for name in ("few_images.json", "few_images.png"):
            if (out / name).exists():
                shutil.copy(out / name, RESULTS / name)


if __name__ == "__main__":
    run_script(main)
