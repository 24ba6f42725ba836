#!/usr/bin/env python
"""What a training step costs besides the network: the script's own loop around a network of zero cost.

  python benchmarks/overhead.py [--steps 300] [--threads 2]

The loop is the real one (stream of batches, noise, targets, loss, gate, clipping, AdamW, EMA, log); the network is one
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor, nn

import ddpm_accelerate as script
from benchmarks.unet import machine
from src.config import load
from src.sampling.opened import build_unet
from src.training.ema import EMA
from src.training.optimizer import adamw

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits_ddpm.json"


class Nothing(nn.Module):
    """A network of zero cost: its input times one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        return x * self.scale


def loop_milliseconds(steps: int) -> float:
    """Milliseconds of a step of `ddpm_accelerate.train` at the demo's size around `Nothing`; previews and saves left out."""
    cadence = ["preview.every=null", "checkpoint.every=null", f"log.every={steps // 3}", f"steps={steps}", "held_out=0.0"]
    cfg = load(CONFIG, script.Config, [*cadence, "log.trackers=[]", "preview.num_samples=1", "preview.sampler.steps=1"])
    script.build_unet = lambda *_: Nothing()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        script.train(cfg, Path(folder) / "run", dry_run=False)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(1e3 * cfg.batch_size / line["images_per_second"] for line in lines[1:])


def network_milliseconds(rounds: int) -> tuple[float, float]:
    """Forward and backward of the demo's network alone; and clipping, AdamW and EMA of its parameters."""
    cfg = load(CONFIG, script.Config)
    network = build_unet(cfg.model, (1, cfg.image.size, cfg.image.size), 10)
    optimizer, ema = adamw(network.parameters(), cfg.optimizer), EMA(network, cfg.ema)
    x = torch.randn(cfg.batch_size, 1, 16, 16)
    t, y = torch.rand(cfg.batch_size) * 1000, torch.randint(0, 10, (cfg.batch_size,))
    spent: list[tuple[float, float]] = []
    for _ in range(rounds):
        began = time.perf_counter()
        network(x, t, y).square().mean().backward()
        between = time.perf_counter()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(network, 1000, cfg.batch_size)
        spent.append((between - began, time.perf_counter() - between))
    alone, update = zip(*spent[2:], strict=True)
    return 1e3 * statistics.median(alone), 1e3 * statistics.median(update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network, update = network_milliseconds(25)
    loop = loop_milliseconds(args.steps)
    print(machine())
    print("| at the demo's size (16 px, batch 64) | ms a step | share of a step |")
    print("| --- | --- | --- |")
    for name, spent in (
        ("forward and backward of the network", network),
        ("the loop around a network of zero cost", loop),
        ("clipping, AdamW and EMA of the network's parameters", update),
    ):
        print(f"| {name} | {spent:.2f} | {100 * spent / (network + loop + update):.1f} % |")


if __name__ == "__main__":
    main()
