#!/usr/bin/env python
"""The variance of the variational term's gradient: uniform times against times by the loss's second moment.

python benchmarks/times.py runs/digits_guided_ddpm --figure docs/second_moment.png
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import machine
from src import figures
from src.config import config, validate
from src.data import HeldOut, Sources, open_data
from src.data.buckets import make_buckets
from src.diffusion import LossConfig
from src.diffusion.weightings import SecondMomentTimes, UniformTimes
from src.runs.opened import open_trained
from src.runtime.stream import image_examples
from src.training.step_noise import TimeSampler


@config
class Data:
    data: Sources
    held_out: HeldOut = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run of pixels with learned variance")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--figure", help="where to draw the terms and how often their times are drawn")
    args = parser.parse_args()
    opened, accelerator = open_trained(args.run, torch.device("cpu")), Accelerator(cpu=True)
    spec = validate(Data, {key: opened.config[key] for key in ("data", "held_out")})
    train_set, _ = open_data(spec.data, spec.held_out)
    examples = image_examples(train_set, make_buckets(opened.image, train_set.sides, 1))
    process = replace(opened.process, loss=LossConfig(kind="rescaled_kl"))
    network, dimensions = opened.network.requires_grad_(True), math.prod(opened.shape)
    rng = np.random.default_rng(0)

    def batch(count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen = rng.integers(0, len(train_set), count)
        labels = {"labels": torch.from_numpy(train_set.labels[chosen])} if opened.num_classes is not None else {}
        return examples.load(chosen), labels

    # Fill the history as training does.
    learned = TimeSampler(SecondMomentTimes(kind="second_moment", history=10), process)
    steps = process.chain.beta.numel()
    while learned.probabilities() is None:
        x0, labels = batch(500)
        t = learned.draw(torch.from_numpy((rng.permutation(500) + rng.random(500)) / 500), dimensions)
        with torch.no_grad():
            losses = process.losses(network, x0, torch.from_numpy(rng.standard_normal(x0.shape, np.float32)), t, **labels)
        learned.weigh(losses.loss, slice(0, 500))
        learned.observe(accelerator)
    history, chances = learned.tensors()["history"], learned.probabilities()
    assert chances is not None

    # The same number of batches with either: the spread of the gradient of the whole network.
    rows: list[dict[str, Any]] = []
    for name, times in (("uniform", TimeSampler(UniformTimes(), process)), ("second moment", learned)):
        mean = square = None
        values = []
        for _ in range(args.batches):
            x0, labels = batch(64)
            t = times.draw(torch.from_numpy(rng.random(64)), dimensions)
            losses = process.losses(network, x0, torch.from_numpy(rng.standard_normal(x0.shape, np.float32)), t, **labels)
            loss = times.weigh(losses.loss, slice(0, 64)).mean()
            times._losses.clear()  # pyright: ignore[reportPrivateUsage] - what is measured teaches it nothing
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])
            mean = gradient if mean is None else mean + gradient
            square = gradient.square() if square is None else square + gradient.square()
            values.append(float(loss.detach()))
        assert mean is not None and square is not None
        mean, square = mean / args.batches, square / args.batches
        spread = float((square - mean.square()).sum())
        rows.append({"times": name, "loss": np.mean(values), "std": np.std(values), "variance": spread})
    print(f"{machine()}\n\n{opened.path}, {steps} steps, {args.batches} batches of 64, L_vlb in bits/dim")
    print("| times | L_vlb | its deviation over batches | variance of the gradient | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        ratio = row["variance"] / rows[0]["variance"]
        print(f"| {row['times']} | {row['loss']:.3f} | {row['std']:.3f} | {row['variance']:.4g} | {ratio:.3f} |")
    if args.figure:
        t = list(range(steps))
        panels = {
            "root of E[L_t^2], bits/dim": {"L_t": (t, (history.square().mean(1).sqrt() / steps).tolist())},
            "chance of t": {"second moment": (t, chances.tolist()), "uniform": (t, [1 / steps] * steps)},
        }
        figures.curves(Path(args.figure), panels, xlabel="t", log=panels.keys())


if __name__ == "__main__":
    main()
