#!/usr/bin/env python
"""The peers of the race, trained as their own projects do: started by benchmarks/race.py, each in a process of its own.

  python benchmarks/peers.py diffusers --lr 1e-4 --seconds 1200 --pictures DIR --out DIR

`diffusers` is examples/unconditional_image_generation/train_unconditional.py with its defaults (and --use_ema, --center_crop
and --random_flip, as in its README): network, optimiser, schedule of 100 epochs, EMA. `ddp` is denoising-diffusion-pytorch's
own Unet (as in its README), GaussianDiffusion and Trainer, without its sampling and FID on the way. Both only at 32 px.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from src.models.pretrained import import_torchvision

SIZE, CALLS = 32, 50
FRACTIONS = (0.125, 0.25, 0.5, 1.0)
PARAMETERS = {"diffusers": 113_673_219, "ddp": 35_711_491}


class TimeIsUp(Exception):
    """Ends a training."""


class Snapshots:
    """Saves weights when fractions of the time are over, and ends the training at its end. The clock runs from `began` (seconds
    since the epoch: when the process was launched), and stands while weights are written."""

    def __init__(self, out: Path, began: float, seconds: float, fractions: Sequence[float] = FRACTIONS) -> None:
        self.out, self.began, self.seconds, self.left = out, began, seconds, list(fractions)
        self.saved: dict[str, Any] = {}

    def save_if_due(self, images: int, weights: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> None:
        """After a step: `images` are seen by now. TimeIsUp at the end."""
        spent = time.time() - self.began
        while self.left and spent >= self.left[0] * self.seconds:
            fraction, writing = self.left.pop(0), time.time()
            folder = self.out / "weights" / str(fraction)
            folder.mkdir(parents=True, exist_ok=True)
            for kind, tensors in weights().items():
                save_file(
                    {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
                    folder / f"{kind}.safetensors",
                )
            self.saved[str(fraction)] = {"images": images, "seconds": round(spent, 1)}
            self.began += time.time() - writing
        if not self.left:
            raise TimeIsUp


def build(name: str) -> Any:
    """A peer's network."""
    import_torchvision()
    if name == "ddp":
        from denoising_diffusion_pytorch import Unet  # pyright: ignore[reportMissingImports]

        return Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True)
    from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel(
        sample_size=SIZE,
        layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def train_diffusers(network: Any, images_folder: Path, lr: float, snapshots: Snapshots, batch: int = 16) -> None:
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel
    from torchvision import datasets, transforms

    accelerator = Accelerator()
    preparation = [transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.RandomHorizontalFlip()]
    preparation += [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    data = datasets.ImageFolder(str(images_folder), transforms.Compose(preparation))
    loader: Any = torch.utils.data.DataLoader(data, batch, shuffle=True)
    optimizer: Any = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rates: Any = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100 * len(loader))
    network, optimizer, loader, rates = accelerator.prepare(network, optimizer, loader, rates)
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    process: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    names, images = [name for name, _ in network.named_parameters()], 0

    def weights() -> dict[str, Mapping[str, Tensor]]:
        return {"ema": dict(zip(names, ema.shadow_params, strict=True)), "raw": network.state_dict()}

    while True:
        for x0, _ in loader:
            noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=x0.device)
            loss = F.mse_loss(network(process.add_noise(x0, noise, t), t).sample, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            ema.step(network.parameters())
            images += len(x0)
            snapshots.save_if_due(images, weights)


def diffusion_of(network: Any) -> Any:
    """denoising-diffusion-pytorch's process; sampled by its own DDIM."""
    from denoising_diffusion_pytorch import GaussianDiffusion  # pyright: ignore[reportMissingImports]

    return GaussianDiffusion(network, image_size=SIZE, sampling_timesteps=CALLS)


def train_ddp(network: Any, images_folder: Path, lr: float, snapshots: Snapshots, batch: int = 16) -> None:
    from denoising_diffusion_pytorch import Trainer  # pyright: ignore[reportMissingImports]

    diffusion, never = diffusion_of(network), 10**9
    trainer: Any = Trainer(
        diffusion,
        str(images_folder),
        train_batch_size=batch,
        train_lr=lr,
        train_num_steps=never,
        save_and_sample_every=never,
        calculate_fid=False,
        results_folder=str(snapshots.out),
    )
    own_update, images = trainer.ema.update, 0

    def update() -> None:
        nonlocal images
        own_update()
        images += batch
        snapshots.save_if_due(images, lambda: {"ema": trainer.ema.ema_model.model.state_dict(), "raw": network.state_dict()})

    trainer.ema.update = update  # what the trainer does last in a step
    trainer.train()


TRAINERS = {"diffusers": train_diffusers, "ddp": train_ddp}


@torch.inference_mode()
def draw(name: str, weights: Path, count: int, batch: int = 50) -> Tensor:
    """(count, 3, 32, 32) uint8, from weights that a training left: 50 steps of DDIM by the peer's own scheduler."""
    network: nn.Module = build(name).eval()
    network.load_state_dict(load_file(weights))
    torch.manual_seed(0)
    samples = []
    for start in range(0, count, batch):
        shape = (min(batch, count - start), 3, SIZE, SIZE)
        samples.append(_ddp_samples(network, shape) if name == "ddp" else _diffusers_samples(network, shape))
    return (torch.cat(samples).clamp(0, 1) * 255).round().to(torch.uint8)


def _diffusers_samples(network: Any, shape: tuple[int, ...]) -> Tensor:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    solver: Any = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    solver.set_timesteps(CALLS)
    x = torch.randn(shape)
    for t in solver.timesteps:
        x = solver.step(network(x, t).sample, t, x).prev_sample
    return x / 2 + 0.5


def _ddp_samples(network: Any, shape: tuple[int, ...]) -> Tensor:
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return diffusion_of(network).sample(batch_size=shape[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=TRAINERS)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--began", type=float, default=time.time(), help="when the clock began (seconds since the epoch)")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    network = build(args.peer)
    snapshots = Snapshots(args.out, args.began, args.seconds)
    try:
        TRAINERS[args.peer](network, args.pictures, args.lr, snapshots)
    except TimeIsUp:
        count = sum(parameter.numel() for parameter in network.parameters())
        summary = {
            "parameters": count,
            "fractions": snapshots.saved,
            "used": "the weights after the first step that ended past the limit",
        }
        (args.out / "trained.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
