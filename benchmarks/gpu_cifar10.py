"""CIFAR-10 on a GPU for the minutes that there are, in pieces that resume, for benchmarks/gpu.py.

The recipe is the race's (configs/cifar10_race.json) with a wider network and larger batches. A probe measures its speed, which
sets the number of steps, so that the schedule ends in time. After each piece the training is stopped as a scheduler stops it,
its last checkpoint draws, and the distance of these samples to the training images is measured; the next piece goes on.
"""

import json
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor

from benchmarks import gpu_runs
from benchmarks.common import ROOT, machine
from benchmarks.photos import open_folder
from benchmarks.race import CONFIG, SIZE
from src import figures
from src.config import UserError, read_json
from src.data import ImageConfig, open_sources
from src.data.sources import PackedSource
from src.evaluation.results import extract_features, pixels_of, real_features
from src.metrics import distances
from src.metrics.features import Features, open_features
from src.runs.opened import open_trained
from src.runtime.checkpoint import newest
from src.sampling import SamplerConfig, build_sampler
from src.storage.files import as_json, write_whole

RECIPE = {
    "mixed_precision": "auto",
    "batch_size": 256,
    "workers": 8,
    "model.base_channels": 128,
    "model.blocks": 2,
    "model.attention": '["none", "full", "none"]',
    "model.norm_groups": 32,
    "optimizer.lr": 3e-3,
    "ema.half_life_images": 500_000,
    "preview.num_samples": 16,
}
SMALL = {"model.base_channels": 8, "model.attention": '["none", "none", "none"]', "model.norm_groups": 4, "model.blocks": 1}
SMALL |= {"batch_size": 8, "workers": 0, "preview.num_samples": 1, "preview.sampler.steps": 1}  # for trying it out on a CPU
BATCH = 250  # samples that are drawn at a time
SAFETY = 0.9  # of the time that the steps may take, as the probe has it: other pieces start more slowly
STOP_SECONDS = 12.0  # for the last step, the checkpoint and the next start


def words_of(run: Path, folder: Path, settings: dict[str, Any], **options: Any) -> list[str]:
    """The command of the training, as a user types it."""
    path = os.path.relpath(folder / "packed", ROOT)
    merged = {**RECIPE, "data.path": path, "log.trackers": "[]", "preview.every": "null", **settings, **options}
    sets = [word for key, value in merged.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "ddpm_accelerate.py", "-cfg", str(CONFIG.relative_to(ROOT)), "--run-dir", str(run), *sets]


def rates_of(run: Path) -> list[float]:
    """Images a second of all lines of a run's log but the first, in which it starts."""
    metrics = run / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line["images_per_second"] for line in lines[1:] if "images_per_second" in line]


def probe(out: Path, folder: Path, settings: dict[str, Any], seconds: float) -> dict[str, float]:
    """Images a second of the training, watched for so many seconds after its start; and the seconds that the start takes."""
    run, log, began = out / "probe", out / "probe.txt", time.monotonic()
    shutil.rmtree(run, ignore_errors=True)
    process = gpu_runs.start(words_of(run, folder, settings, steps=1_000_000, **{"log.every": 20}), log)
    first: float | None = None
    while process.poll() is None and (first is None or time.monotonic() - first < seconds or len(rates_of(run)) < 2):
        time.sleep(0.1)
        first = time.monotonic() if first is None and rates_of(run) else first
    gpu_runs.end(process, signal.SIGKILL)
    rates = rates_of(run)
    shutil.rmtree(run, ignore_errors=True)
    if first is None or not rates:
        raise UserError(f"the training ended in its probe: {gpu_runs.last_words(log)}")
    return {"images_per_second": statistics.median(rates), "start_seconds": first - began}


def plan_steps(seconds: float, images_per_second: float, batch: int, pieces: int) -> int:
    """How many steps a schedule has that ends within the time; at least one for each piece."""
    return max(pieces, int(SAFETY * seconds * images_per_second / batch))


def train_piece(words: list[str], log: Path, deadline: float) -> None:
    """Train until a time, or to the end: the run is asked to stop, saves, and the same command goes on later."""
    process = gpu_runs.start(words, log)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    gpu_runs.end(process, patience=60.0)


class Reference:
    """Distances of samples to the training images of a folder, in the features of a network on the device."""

    def __init__(self, folder: Path, name: str, device: torch.device) -> None:
        self.network: Features = open_features(name).to(device)
        image = ImageConfig(size=SIZE)
        packed = open_sources(PackedSource(source="packed", path=str(folder / "packed")))  # it need not be looked through
        self.train = real_features(self.network, packed, image)
        self.held_out = real_features(self.network, open_folder(folder / "held_out"), image)
        self.moments = distances.moments(self.train)

    def compare(self, features: Any) -> dict[str, float]:
        """The Fréchet distance, and the kernel distance with the standard deviation over its subsets."""
        size = min(len(features), 500)
        kernel, deviation = distances.kernel_distance(features, self.train, subsets=50, size=size)
        return {
            "frechet_distance": distances.frechet(features, self.moments),
            "kernel_distance": kernel,
            "kernel_std": deviation,
        }

    def floor(self, count: int) -> dict[str, float]:
        """What a perfect model would get with so many samples: that of as many held-out images."""
        return self.compare(self.held_out[np.random.default_rng(0).permutation(len(self.held_out))[:count]])

    def features(self, pixels: Tensor) -> Any:
        return np.concatenate([extract_features(self.network, part) for part in pixels.split(BATCH)])


def draw(weights: Path, count: int, device: torch.device) -> Tensor:
    """(count, 3, H, W) uint8 by the sampler of the run's previews, from its EMA weights."""
    run = open_trained(weights, device)
    sampler = build_sampler(run, SamplerConfig(**read_json(CONFIG)["preview"]["sampler"]))
    size = min(BATCH, count)
    parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
    return torch.cat([pixels_of(sampler.draw(0, part, None, device=device, batch_size=size).cpu()) for part in parts])


def train_cifar10(
    out: Path,
    folder: Path,
    deadline: float,
    *,
    pieces: int = 3,
    samples: int = 1000,
    features: str = "efficientnet_lite0",
    settings: dict[str, Any] | None = None,
    probe_seconds: float = 10.0,
) -> dict[str, Any]:
    """Train until `deadline` (of time.monotonic) on the images in `folder`, as race.prepare_images makes it, in so many pieces;
    each is measured. cifar10.json and the images are written into `out` as it goes, and the same call goes on there."""
    settings, file = settings or {}, out / "cifar10.json"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    begun_with = {"settings": settings, "samples": samples, "features": features}
    result: dict[str, Any] = read_json(file) if file.exists() else {"machine": machine(), **begun_with, "pieces": []}
    if any(result[name] != value for name, value in begun_with.items()):
        raise UserError(f"{out} was begun with other settings or samples; give another --out, or remove it")

    def save() -> None:
        write_whole(file, as_json(result))

    reference = Reference(folder, features, device)
    result |= {"floor": reference.floor(samples), "state": "running"}
    save()
    if "steps" not in result:
        result["probe"] = probe(out, folder, settings, probe_seconds)
        between = draw_seconds(samples) + result["probe"]["start_seconds"] + STOP_SECONDS
        seconds = max(0.0, deadline - time.monotonic() - pieces * between)
        batch = int(settings.get("batch_size", RECIPE["batch_size"]))
        rate = result["probe"]["images_per_second"]
        result |= {"planned_seconds": seconds, "steps": plan_steps(seconds, rate, batch, pieces)}
        save()
        few = " (fewer than four minutes: give it more)" if seconds < 240 else ""
        print(f"{rate:.0f} images/s: {result['steps']} steps in {seconds:.0f} s{few}", flush=True)
    run, words = out / "run", words_of(out / "run", folder, settings, steps=result["steps"])
    for left in range(pieces, 0, -1):
        if _is_finished(result):
            break
        began = time.monotonic()
        measuring = max([piece["measure_seconds"] for piece in result["pieces"]], default=draw_seconds(samples))
        until = began + (deadline - began) / left - measuring - STOP_SECONDS
        if result["pieces"] and until - began < result["probe"]["start_seconds"]:
            continue  # it would end before its first step; the next piece has more time
        train_piece(words, out / f"piece_{len(result['pieces']) + 1}.txt", until)
        checkpoint = newest(run / "checkpoints")[0]
        if checkpoint is None:
            raise UserError(
                f"there was no time for a checkpoint: {gpu_runs.last_words(out / 'piece_1.txt')}; give more --minutes"
            )
        stopped_at = time.monotonic()
        step = read_json(checkpoint / "progress.json")["step"]
        pixels = draw(checkpoint, samples, device)
        piece = {"step": step, "images": step * read_json(checkpoint / "config.json")["batch_size"]}
        piece |= {"seconds": stopped_at - began, **reference.compare(reference.features(pixels))}
        piece |= {"measure_seconds": time.monotonic() - stopped_at, "image": f"samples_{step:06d}.png"}
        shown = pixels[:64].permute(0, 2, 3, 1).contiguous().numpy()
        figures.save(
            figures.grid(shown, columns=8, title=f"step {step}: {piece['frechet_distance']:.1f}"), out / piece["image"]
        )
        result["pieces"].append(piece)
        save()
        draw_curve(result, out / "distance.png")
    result["state"] = "done" if _is_finished(result) else "the schedule has not come to its end"
    save()
    return result


def _is_finished(result: dict[str, Any]) -> bool:
    return bool(result["pieces"]) and result["pieces"][-1]["step"] >= result["steps"]


def draw_seconds(samples: int) -> float:
    """What drawing and measuring so many images takes on a large card, before it was measured."""
    return 5.0 + 0.02 * samples


def draw_curve(result: dict[str, Any], path: Path) -> None:
    """The distance of the samples against the images seen, and that of held-out images."""
    images = [piece["images"] for piece in result["pieces"]]
    lines = {"samples": (images, [piece["frechet_distance"] for piece in result["pieces"]])}
    lines["held-out images"] = (images, [result["floor"]["frechet_distance"]] * len(images))
    figures.curves(path, {"Fréchet distance": lines}, xlabel="images seen", marker="o")


def table_of(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    seconds = sum(piece["seconds"] for piece in result["pieces"])
    lines = [f"{result['samples']} samples of 50 calls from the EMA weights, in features of {result['features']}"]
    if "probe" in result:
        lines[0] += f"; {result['probe']['images_per_second']:.0f} images/s; {seconds:.0f} s of training with the starts"
    lines += ["", "| step | images seen | Fréchet distance | kernel distance |", "| --- | --- | --- | --- |"]
    for piece in result["pieces"]:
        kernel = f"{piece['kernel_distance']:.4f} ± {piece['kernel_std']:.4f}"
        lines.append(
            f"| {piece['step']} of {result['steps']} | {piece['images']:,} | {piece['frechet_distance']:.1f} | {kernel} |"
        )
    floor = result["floor"]
    lines.append(f"| held-out images | | {floor['frechet_distance']:.1f} | {floor['kernel_distance']:.4f} |")
    return "\n".join(lines)
