#!/usr/bin/env python
"""What a training step costs besides the network: the script's own loop around a network of zero cost.

  python benchmarks/overhead.py [--steps 300] [--threads 2] [--points]

The loop is the script's own (stream of batches, noise, targets, loss, gate, clipping, AdamW, EMA, log); the network is one
parameter. A second row adds what grows with the parameters (clipping, AdamW and EMA of the demo's network).
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor, nn

import ddpm_accelerate
import train_iadb
from benchmarks.common import machine
from src.config import load
from src.models import build_model
from src.training import given
from src.training.ema import EMA
from src.training.optimizer import build_optimizer
from src.training.run_mode import RunMode

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Nothing(nn.Module):
    """A network of zero cost: its input times one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        return x * self.scale


def loop_milliseconds(script: Any, config: Path, steps: int) -> float:
    """Milliseconds of a step of a script's `train` at its size around `Nothing`; previews and saves left out."""
    cadence = ["preview.every=null", "checkpoint.every=null", f"log.every={steps // 3}", f"steps={steps}", "held_out=0.0"]
    fast_preview = ["preview.calls=[1]"] if script is train_iadb else ["preview.sampler.steps=1"]
    cfg = load(config, script.Config, [*cadence, *fast_preview, "log.trackers=[]", "preview.num_samples=1"])
    given.build_model = lambda *_, **__: Nothing()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.train(cfg, Path(folder) / "run", RunMode())
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(1e3 * cfg.batch_size / line["images_per_second"] for line in lines[1:])


def network_milliseconds(cfg: Any, network: nn.Module, x: Tensor, labels: Tensor | None, rounds: int) -> tuple[float, float]:
    """Forward and backward of a network alone; and clipping, AdamW and EMA of its parameters."""
    optimizer, ema = build_optimizer(network, cfg.optimizer), EMA(network, cfg.ema)
    t = torch.rand(len(x))
    spent: list[tuple[float, float]] = []
    for _ in range(rounds):
        began = time.perf_counter()
        network(x, t, labels).square().mean().backward()
        between = time.perf_counter()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(network, 1000, cfg.batch_size)
        spent.append((between - began, time.perf_counter() - between))
    network_seconds, update = zip(*spent[2:], strict=True)
    return 1e3 * statistics.median(network_seconds), 1e3 * statistics.median(update)


def table(title: str, network: float, update: float, loop: float) -> None:
    print(f"| {title} | ms a step | share of a step |")
    print("| --- | --- | --- |")
    for name, spent in (
        ("forward and backward of the network", network),
        ("the loop around a network of zero cost", loop),
        ("clipping, AdamW and EMA of the network's parameters", update),
    ):
        print(f"| {name} | {spent:.2f} | {100 * spent / (network + loop + update):.1f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--points", action="store_true", help="the MLP of points2d_iadb on one core, instead of the demo's U-Net"
    )
    args = parser.parse_args()
    torch.set_num_threads(1 if args.points else args.threads)
    if args.points:
        config = CONFIGS / "points2d_iadb.json"
        cfg = load(config, train_iadb.Config)
        parts = network_milliseconds(cfg, build_model(cfg.model, (2,)), torch.randn(cfg.batch_size, 2), None, 60)
        loop, title = loop_milliseconds(train_iadb, config, args.steps), f"points2d_iadb (batch {cfg.batch_size})"
    else:
        config = CONFIGS / "digits_ddpm.json"
        cfg = load(config, ddpm_accelerate.Config)
        network = build_model(cfg.model, (1, *cfg.image.sides), 10)
        x, labels = torch.randn(cfg.batch_size, 1, 16, 16), torch.randint(0, 10, (cfg.batch_size,))
        parts = network_milliseconds(cfg, network, x, labels, 25)
        loop, title = loop_milliseconds(ddpm_accelerate, config, args.steps), "at the demo's size (16 px, batch 64)"
    print(machine())
    table(title, *parts, loop)
    whole = parts[0] + parts[1] + loop
    if args.points:
        share, most = (parts[1] + loop) / whole, 0.25
        subject = "what is not the network"
    else:
        share, most, subject = loop / whole, 0.03, "the loop around it"
    print(
        f"\n{'met' if share < most else 'MISSED'}: {subject} is {100 * share:.1f} % of a step (goal: under {100 * most:.0f} %)"
    )


if __name__ == "__main__":
    main()
