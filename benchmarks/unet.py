#!/usr/bin/env python
"""Training and sampling steps of our U-Net against diffusers' UNet2DModel of the same shape and weights, in one run; with
--options those of guided-diffusion's 64 px network, each option on and off.

python benchmarks/unet.py [--rounds 12] [--threads 2]
python benchmarks/unet.py --options [--width 192] [--batch 32] [--device cuda]
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ddpm_accelerate
from benchmarks.common import ROOT, goal, interleaved, machine, wait
from src.config import load
from src.diffusion import build_process
from src.interop.unet_2d import unet_from_diffusers
from src.models import UNet, UNetConfig
from src.models.layers import channels_last
from src.models.pretrained import import_torchvision

PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}
PLAIN |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
SHAPES = {
    "16 px, 16/32/64, 1 block (the demo's size)": (16, 64, {"block_out_channels": (16, 32, 64), "layers_per_block": 1}),
    "32 px, 32/64/64, 2 blocks": (32, 16, {"block_out_channels": (32, 64, 64), "layers_per_block": 2}),
    "32 px, 64/128/128, 2 blocks": (32, 16, {"block_out_channels": (64, 128, 128), "layers_per_block": 2}),
    "64 px, 32/64/128, 2 blocks": (64, 8, {"block_out_channels": (32, 64, 128), "layers_per_block": 2}),
}


PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16 operations a second, by the makers


def measure_options(args: argparse.Namespace) -> None:
    """guided-diffusion's class-conditional 64 px network (configs/imagenet64_ddpm.json) at a width: a training step (forward,
    loss, backward, AdamW) and a network call, from the plain one, one option after the other."""
    cfg = load(ROOT / "configs" / "imagenet64_ddpm.json", ddpm_accelerate.Config)
    assert isinstance(cfg.model, UNetConfig)
    model = replace(cfg.model, base_channels=args.width, head_channels=min(64, args.width), gradient_checkpointing=False)
    device, process = torch.device(args.device), build_process(cfg.process)
    x0 = torch.rand(args.batch, 3, 64, 64, device=device) * 2 - 1
    eps, labels = torch.randn_like(x0), torch.randint(0, 1000, (args.batch,), device=device)
    t = torch.randint(0, 1000, (args.batch,)).double()

    def step(
        *, bf16: bool, last: bool, compiled: bool, fused: bool, graphs: bool
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        torch.manual_seed(0)
        network: nn.Module = UNet(model, in_channels=3, out_channels=6, num_classes=1000, null_class=False).to(device)
        network = channels_last(network) if last else network
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=fused, foreach=not fused)
        if compiled:
            network.compile(mode="reduce-overhead" if graphs else "default")

        def train() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = process.losses(network, x0, eps, t, labels=labels).loss.mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            wait(device)

        @torch.no_grad()
        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                network(x0, t.float().to(device), labels)
            wait(device)

        return train, call

    ways = {
        "float32": {}, "+ channels_last": {"last": True}, "+ fused AdamW": {"last": True, "fused": True},
        "+ compile": {"last": True, "fused": True, "compiled": True}, "bf16": {"bf16": True},
        "bf16 + channels_last": {"bf16": True, "last": True},
        "bf16 + channels_last + fused AdamW": {"bf16": True, "last": True, "fused": True},
        "bf16 + channels_last + fused AdamW + compile": {"bf16": True, "last": True, "fused": True, "compiled": True},
    }  # fmt: skip
    if device.type == "cuda":
        fastest = "bf16 + channels_last + fused AdamW + compile"
        ways[f"{fastest} + CUDA graphs"] = {**ways[fastest], "graphs": True}
    off = {"bf16": False, "last": False, "compiled": False, "fused": False, "graphs": False}
    built = {name: step(**{**off, **way}) for name, way in ways.items()}
    counter = FlopCounterMode(display=False)
    with counter:
        built["float32"][0]()
    training = interleaved({name: train for name, (train, _) in built.items()}, args.rounds)
    sampling = interleaved({name: call for name, (_, call) in built.items()}, args.rounds)
    peak = next((value for name, value in PEAK.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None)
    print(f"{args.width} channels, batch {args.batch}, {counter.get_total_flops() / 1e12:.3f} TFLOP a training step")
    print("| | training step | against float32 | of the peak rate | images/s | network call | against float32 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in ways:
        train, call = training[name], sampling[name]
        share = f"{counter.get_total_flops() / train / peak:.0%}" if peak is not None and "bf16" in name else ""
        print(
            f"| {name} | {train * 1e3:.0f} ms | {training['float32'] / train:.2f} | {share} | {args.batch / train:.1f} | "
            f"{call * 1e3:.0f} ms | {sampling['float32'] / call:.2f} |"
        )


def main() -> None:
    import_torchvision()
    from diffusers.models.unets.unet_2d import UNet2DModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--options", action="store_true", help="what each option is worth")
    parser.add_argument("--width", type=int, default=192, help="with --options: channels of the first level")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    if args.options:
        measure_options(args)
        return
    ratios: list[tuple[str, float]] = []
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
        for seconds in (training, sampling):
            cells += [f"{seconds['diffusers'] * 1e3:.1f} ms", f"{seconds['ours'] * 1e3:.1f} ms"]
            cells.append(f"{seconds['diffusers'] / seconds['ours']:.2f}")
        ratios.append((title, training["diffusers"] / training["ours"]))
        print(f"| {title} | {batch} | {' | '.join(cells)} | {difference:.1e} |", flush=True)
    print()
    for title, ratio in ratios:
        print(goal(f"training against diffusers in the same shape, {title}", ratio, 1.1))


if __name__ == "__main__":
    main()
