#!/usr/bin/env python
"""Training and sampling steps of our U-Net against diffusers' UNet2DModel of the same shape and weights, in one run.

python benchmarks/unet.py [--rounds 12] [--threads 2]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor, nn

from src.interop.diffusers import unet_from_diffusers
from src.vision import import_torchvision

PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}
PLAIN |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
SHAPES = {
    "16 px, 16/32/64, 1 block (the demo's size)": (16, 64, {"block_out_channels": (16, 32, 64), "layers_per_block": 1}),
    "32 px, 32/64/64, 2 blocks": (32, 16, {"block_out_channels": (32, 64, 64), "layers_per_block": 2}),
    "32 px, 64/128/128, 2 blocks": (32, 16, {"block_out_channels": (64, 128, 128), "layers_per_block": 2}),
    "64 px, 32/64/128, 2 blocks": (64, 8, {"block_out_channels": (32, 64, 128), "layers_per_block": 2}),
}


def machine() -> str:
    """What the numbers were measured on."""
    import platform

    import diffusers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, diffusers {diffusers.__version__}, {model}, {threads} threads"


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each, measured in turns, so that what else the machine does falls on all alike."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn > 1:
                spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in spent.items()}


def main() -> None:
    import_torchvision()
    from diffusers.models.unets.unet_2d import UNet2DModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    print("| shape | batch | training: diffusers | ours | ratio | sampling: diffusers | ours | ratio | largest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for title, (size, batch, options) in SHAPES.items():
        theirs = UNet2DModel(sample_size=size, norm_num_groups=8, **PLAIN, **options)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.05)
        ours = unet_from_diffusers(theirs.config, theirs.state_dict())
        ours = ours.to(memory_format=torch.channels_last)  # as the scripts do  # pyright: ignore[reportCallIssue]
        x, t = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
        networks: dict[str, Callable[[], Tensor]] = {
            "diffusers": lambda theirs=theirs, x=x, t=t: theirs(x, t).sample,
            "ours": lambda ours=ours, x=x, t=t: ours(x, t.float()),
        }

        def train(network: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: network().square().mean().backward()

        def sample(network: Callable[[], Tensor]) -> Callable[[], object]:
            return torch.no_grad()(network)

        training = interleaved({name: train(network) for name, network in networks.items()}, args.rounds)
        sampling = interleaved({name: sample(network) for name, network in networks.items()}, args.rounds)
        with torch.no_grad():
            difference = float((networks["ours"]() - networks["diffusers"]()).abs().max())
        cells = []
        for found in (training, sampling):
            cells += [f"{found['diffusers'] * 1e3:.1f} ms", f"{found['ours'] * 1e3:.1f} ms"]
            cells.append(f"{found['diffusers'] / found['ours']:.2f}")
        print(f"| {title} | {batch} | {' | '.join(cells)} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
