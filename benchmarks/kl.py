#!/usr/bin/env python
"""diffusers' AutoencoderKL of our autoencoder's operations, trained as its script trains it: started by race_latent.py.

  python benchmarks/kl.py network.json --lr 1e-3 --seconds 600 --data train.npz --out DIR

The loss is that of diffusers' train_autoencoderkl.py: L1 + 0.5 LPIPS + 1e-6 KL, sums over an image, and the hinge loss of a
PatchGAN, which begins at half of the time and is weighted by the gradients at the last layer. (Its script gives LPIPS no
gradient; here it has one.) LPIPS is on the network that ours uses, EfficientNet-Lite0, and the PatchGAN is ours. AdamW, a
cosine rate that ends with the time, and EMA, as of the other peers. At the end DIR has the weights and latents.npz, the latents
of the images and of their mirror images, at unit variance.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.equal import TOLERANCE, Data, Document, operations, rate_at
from src import losses
from src.config import read_json
from src.models import Discriminator, DiscriminatorConfig
from src.models.pretrained import import_torchvision

PERCEPTUAL, KL, ADVERSARY_FROM = 0.5, 1e-6, 0.5  # weights, and the share of the time
DISCRIMINATOR_LR = 2e-4


def build(document: Document) -> Any:
    """The AutoencoderKL of `widths`, with one block a level, and `latent_channels`."""
    import_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    widths, kinds = document["widths"], dict[str, Any]()
    kinds |= {"down_block_types": ("DownEncoderBlock2D",) * len(widths), "up_block_types": ("UpDecoderBlock2D",) * len(widths)}
    return AutoencoderKL(
        **kinds,
        block_out_channels=tuple(widths),
        layers_per_block=1,
        latent_channels=document["latent_channels"],
        norm_num_groups=8,
        sample_size=document["shape"][1],
    )


def of_equal_operations(wanted: float, shape: Sequence[int], latent_channels: int, multiples: Sequence[int]) -> Document:
    """The AutoencoderKL for images of this shape whose operations, of encoder and decoder, are nearest to `wanted`: its levels
    have our `multiples` of the channels, roughly. An AssertionError where it is further off than TOLERANCE."""
    best: tuple[float, Document] = (math.inf, {})
    for first in range(8, 257, 8):
        inner = [[first * multiple + wider for wider in (0, 8, -8)] for multiple in multiples[1:]]
        for rest in itertools.product(*inner):
            widths = [first, *rest]
            document = {"widths": widths, "shape": list(shape), "latent_channels": latent_channels}
            with torch.device("meta"):
                count = operations(build(document).eval(), torch.zeros(1, *shape))
            if abs(count / wanted - 1) < best[0]:
                best = (abs(count / wanted - 1), {**document, "operations": count})
            if count > 2 * wanted:
                break
        else:
            continue
        break
    assert best[0] <= TOLERANCE, f"the nearest AutoencoderKL has {best[1].get('operations', 0):.3g} of {wanted:.3g} operations"
    return best[1]


def train(document: Document, data: Data, out: Path, *, lr: float, batch: int, seconds: float, began: float) -> int:
    """Train until the time is over, and write the EMA's weights; gives the number of images seen."""
    from diffusers.training_utils import EMAModel

    network, critic = build(document), Discriminator(DiscriminatorConfig(base_channels=32, layers=2), 3)
    perceptual = losses.Perceptual(losses.PerceptualConfig(network="efficientnet_lite0"))
    rates = {"lr": lr, "weight_decay": 1e-2, "fused": True}
    optimizer: Any = torch.optim.AdamW(network.parameters(), **rates)
    critic_optimizer: Any = torch.optim.AdamW(critic.parameters(), **{**rates, "lr": DISCRIMINATOR_LR})
    ema = EMAModel(network.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    last, images = network.decoder.conv_out.weight, 0
    while (spent := (time.time() - began) / seconds) < 1 or not images:
        x, _ = data.draw(batch)
        posterior = network.encode(x).latent_dist
        y = network.decode(posterior.sample()).sample
        per_pixel = losses.reconstruction_loss("l1", y, x).mean() + PERCEPTUAL * perceptual(y, x).mean()
        loss = per_pixel * x[0].numel() + KL * posterior.kl().mean()
        adversarial = spent >= ADVERSARY_FROM
        if adversarial:
            critic.requires_grad_(False)
            verdict = losses.generator_loss("hinge", critic(y)).mean()
            ours, theirs = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, verdict))
            loss = loss + (ours / (theirs + 1e-4)).clamp(max=1e4).detach() * verdict
        loss.backward()
        _step(optimizer, network, lr * rate_at(spent))
        ema.step(network.parameters())
        if adversarial:
            critic.requires_grad_(True)
            losses.discriminator_loss("hinge", critic(x), critic(y.detach())).mean().backward()
            _step(critic_optimizer, critic, DISCRIMINATOR_LR)
        images += batch
    ema.copy_to(network.parameters())
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, out / "kl.safetensors")
    return images


def _step(optimizer: Any, network: torch.nn.Module, lr: float) -> None:
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def open_kl(out: Path) -> Any:
    """A trained one."""
    network = build(read_json(out / "trained.json")["network"]).eval()
    network.load_state_dict(load_file(out / "kl.safetensors"))
    return network


@torch.inference_mode()
def encode(network: Any, x: Tensor, batch: int = 50) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] -> the means of their latents, (N, C, h, w)."""
    return torch.cat([network.encode(part).latent_dist.mean for part in x.split(batch)])


@torch.inference_mode()
def decode(out: Path, latents: Tensor, batch: int = 50) -> Tensor:
    """Latents at unit variance, (N, C, h, w) -> images in about [-1, 1]."""
    network, scale = open_kl(out), read_json(out / "trained.json")["scale"]
    return torch.cat([network.decode(part * scale).sample for part in latents.split(batch)])


@torch.inference_mode()
def reconstruct(out: Path, x: Tensor, batch: int = 50) -> Tensor:
    """(N, 3, H, W) in [-1, 1], and what the autoencoder makes of it."""
    network = open_kl(out)
    return torch.cat([network.decode(encode(network, part)).sample for part in x.split(batch)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="a document of `of_equal_operations`")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--began", type=float, default=time.time(), help="when the clock began (seconds since the epoch)")
    parser.add_argument("--data", type=Path, required=True, help="an .npz with x, (N, H, W, 3) uint8, and labels")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    document, data = read_json(args.network), Data(args.data)
    options = {"lr": args.lr, "batch": args.batch, "seconds": args.seconds, "began": args.began}
    images = train(document, data, args.out, **options)
    network = build(document).eval()
    network.load_state_dict(load_file(args.out / "kl.safetensors"))
    x = data.x.permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = torch.cat([encode(network, x), encode(network, x.flip(3))])
    scale = float(latents.std())
    np.savez(args.out / "latents.npz", x=(latents / scale).numpy(), labels=torch.cat([data.labels] * 2).numpy())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    seconds = round(time.time() - args.began, 1)
    summary = {"parameters": parameters, "network": document, "images": images, "seconds": seconds, "scale": scale}
    (args.out / "trained.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
