#!/usr/bin/env python
"""The peers' networks at our network's operations, trained and sampled as well as we know: started by the races, each in a
process of its own.

  python benchmarks/equal.py network.json --lr 1e-3 --seconds 300 --data train.npz --out DIR

The channel widths of diffusers' `UNet2DModel` and of denoising-diffusion-pytorch's `Unet` are those at which torch counts our
operations an image (`of_equal_operations` gives network.json). The rest is what does best of what they have: the target v with
their weights for min-SNR 5, AdamW, a cosine rate that ends with the time, diffusers' EMA with warm-up, our batch size and
precision, images from memory. A file of data has x, (N, H, W, 3) uint8 or latents (N, C, h, w) float32, and labels (N,).
"""

import argparse
import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import CALLS, FRACTIONS, Snapshots, TimeIsUp
from src.config import read_json
from src.models.pretrained import import_torchvision

TOLERANCE = 0.1  # of the operations an image
WARMUP = 0.05  # of the time
LABEL_DROPOUT = 0.1
Document = dict[str, Any]  # what a network is built from; kept beside its weights


# ---------------------------------------------------------------------------------------------- networks


def operations(network: torch.nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of one forward pass, two for a product with its sum, as torch counts them. Attention is done
    as plain products, since torch counts none of its fused ones on a CPU."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(*inputs)
    return counter.get_total_flops()


def build(document: Document) -> Any:
    """A peer's network: `kind` diffusers or ddp; `widths` of its levels; (C, H, W) as its `shape`; `classes`, 0 for none."""
    import_torchvision()
    (channels, size, _), widths, classes = document["shape"], document["widths"], document["classes"]
    if document["kind"] == "diffusers":
        from diffusers.models.unets.unet_2d import UNet2DModel

        attended = [document["attention"] and i == len(widths) - 1 for i in range(len(widths))]
        return UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=tuple(widths),
            down_block_types=tuple("AttnDownBlock2D" if one else "DownBlock2D" for one in attended),
            up_block_types=tuple("AttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attended)),
            attention_head_dim=8,
            norm_num_groups=8,
            add_attention=document["attention"],
            num_class_embeds=classes + 1 if classes else None,  # the last is no class
        )
    options: dict[str, Any] = {"dim": widths[0], "dim_mults": [width // widths[0] for width in widths], "channels": channels}
    if not classes:
        from denoising_diffusion_pytorch import Unet  # pyright: ignore[reportMissingImports]

        return Unet(**options)
    from denoising_diffusion_pytorch import classifier_free_guidance as guided  # pyright: ignore[reportMissingImports]

    network = guided.Unet(**options, num_classes=classes, cond_drop_prob=LABEL_DROPOUT)
    scaled = network.forward_with_cond_scale

    def with_scale(*args: Any, cond_scale: float = 1.0, **kwargs: Any) -> Any:  # its own gives one tensor where two are read
        if cond_scale != 1:
            return scaled(*args, cond_scale=cond_scale, **kwargs)
        return (network(*args, cond_drop_prob=0.0),) * 2

    network.forward_with_cond_scale = with_scale
    return network


def inputs_of(document: Document) -> list[Tensor]:
    """One blank image, its time, and its class where there are classes."""
    blank = [torch.zeros(1, *document["shape"]), torch.zeros(1, dtype=torch.long)]
    return blank + [torch.zeros(1, dtype=torch.long)] * bool(document["classes"])


def _widths(kind: str, multiples: Sequence[int]) -> Iterator[list[int]]:
    """Channels of the levels, narrow ones first. Those of diffusers are multiples of 8, its groups, so that not all levels grow
    at once; the other's are any even number, times the multiples."""
    for first in range(8, 513, 8 if kind == "diffusers" else 2):
        steps = (-8, 0, 8) if kind == "diffusers" else (0,)
        for wider in steps:
            for last in steps if len(multiples) > 2 else (0,):
                widths = [first, *((first + wider) * multiple for multiple in multiples[1:])]
                widths[-1] += last
                if min(widths) > 0:
                    yield widths


def of_equal_operations(
    kind: str, wanted: float, shape: Sequence[int], classes: int, multiples: Sequence[int] = (1, 2, 2)
) -> Document:
    """The network of a peer for images of this shape (C, H, W) whose operations are nearest to `wanted`: its levels have
    `multiples` of the channels, roughly, and the last one attention where images have classes. An AssertionError where it is
    further off than TOLERANCE."""
    best: tuple[float, Document] = (math.inf, {})
    for widths in _widths(kind, multiples):
        document = {"kind": kind, "widths": widths, "shape": list(shape), "classes": classes, "attention": classes > 0}
        document |= {"pixels": shape[0] == 3}
        with torch.device("meta"):
            network, inputs = build(document), inputs_of(document)
        count = operations(network.eval(), *inputs)
        if abs(count / wanted - 1) < best[0]:
            best = (abs(count / wanted - 1), {**document, "operations": count})
        if count > 2 * wanted:
            break
    assert best[0] <= TOLERANCE, (
        f"{kind}: the nearest network has {best[1].get('operations', 0):.3g} of {wanted:.3g} operations"
    )
    return best[1]


# ---------------------------------------------------------------------------------------------- training


class Data:
    """Images or latents in memory, by batches; images are mirrored at random."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as arrays:
            self.x = torch.from_numpy(arrays["x"])
            self.labels = torch.from_numpy(arrays["labels"])
        self.is_pixels = self.x.dtype == torch.uint8

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(count, C, H, W) float32, images in [-1, 1], and labels (count,)."""
        rows = torch.randint(0, len(self.x), (count,))
        x = self.x[rows]
        if self.is_pixels:
            x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
            x = torch.where(torch.rand(count, 1, 1, 1) < 0.5, x, x.flip(3))
        return x, self.labels[rows]


def diffusion_of(network: Any, document: Document, calls: int = CALLS) -> Any:
    """denoising-diffusion-pytorch's process, of v with its weights for min-SNR."""
    options: dict[str, Any] = {"image_size": document["shape"][1], "sampling_timesteps": calls, "objective": "pred_v"}
    options |= {"min_snr_loss_weight": True, "ddim_sampling_eta": 0.0}
    if document["classes"]:
        from denoising_diffusion_pytorch import classifier_free_guidance as guided  # pyright: ignore[reportMissingImports]

        return guided.GaussianDiffusion(network, **options)
    from denoising_diffusion_pytorch import GaussianDiffusion  # pyright: ignore[reportMissingImports]

    return GaussianDiffusion(network, **options)


def loss_of(network: Any, document: Document) -> Callable[[Tensor, Tensor | None], Tensor]:
    """loss(x (B, C, H, W), labels (B,) or None) by the peer's own process."""
    if document["kind"] == "ddp":
        diffusion = diffusion_of(network, document)
        return lambda x, labels: diffusion(x / 2 + 0.5, **({} if labels is None else {"classes": labels}))
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import compute_snr

    process: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def loss(x: Tensor, labels: Tensor | None) -> Tensor:
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        if labels is not None:
            labels = torch.where(torch.rand(len(x)) < LABEL_DROPOUT, document["classes"], labels)
        snr = compute_snr(process, t)
        output = network(process.add_noise(x, noise, t), t, labels).sample
        each = F.mse_loss(output.float(), process.get_velocity(x, noise, t), reduction="none").mean((1, 2, 3))
        return (each * snr.clamp(max=5) / (snr + 1)).mean()

    return loss


def rate_at(spent: float) -> float:
    """The share of the highest rate when this share of the time is spent: it rises linearly, and falls to 0 as a cosine."""
    if spent < WARMUP:
        return max(spent / WARMUP, 0.02)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (spent - WARMUP) / (1 - WARMUP))))


def train(document: Document, data: Data, snapshots: Snapshots, *, lr: float, batch: int, precision: str) -> None:
    """Until TimeIsUp."""
    from diffusers.training_utils import EMAModel

    network = build(document)
    loss_at, names = loss_of(network, document), [name for name, _ in network.named_parameters()]
    betas = (0.95, 0.999) if document["kind"] == "diffusers" else (0.9, 0.99)  # their own
    optimizer: Any = torch.optim.AdamW(network.parameters(), lr=lr, betas=betas, weight_decay=1e-6, fused=True)
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    images = 0

    def weights() -> dict[str, Mapping[str, Tensor]]:
        return {"ema": dict(zip(names, ema.shadow_params, strict=True)), "raw": dict(network.named_parameters())}

    while True:
        x, labels = data.draw(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_at(x, labels if document["classes"] else None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_at((time.time() - snapshots.began) / snapshots.seconds)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        images += batch
        snapshots.save_if_due(images, weights)


# ---------------------------------------------------------------------------------------------- drawing


@torch.inference_mode()
def draw(
    folder: Path,
    weights: str,
    count: int,
    labels: Sequence[int] | None = None,
    guidance: float = 1.0,
    fraction: str = "1.0",
    batch: int = 50,
) -> Tensor:
    """(count, C, H, W), images in about [-1, 1], of a training's folder and the `weights` ema or raw: DDIM of the peer's own
    with CALLS network calls an image, half as many steps with guidance."""
    document = read_json(folder / "trained.json")["network"]
    network = build(document).eval()
    network.load_state_dict(load_file(folder / "weights" / fraction / f"{weights}.safetensors"))
    torch.manual_seed(0)
    steps, samples = CALLS if guidance == 1 else CALLS // 2, list[Tensor]()
    for start in range(0, count, batch):
        classes = torch.tensor(labels[start : min(start + batch, count)]) if labels is not None else None
        shape = (min(batch, count - start), *document["shape"])
        if document["kind"] == "ddp":
            samples.append(_ddp_samples(network, document, shape, classes, guidance, steps))
        else:
            samples.append(_diffusers_samples(network, document, shape, classes, guidance, steps))
    return torch.cat(samples)


def _ddp_samples(
    network: Any, document: Document, shape: Sequence[int], classes: Tensor | None, guidance: float, steps: int
) -> Tensor:
    diffusion = diffusion_of(network, document, steps)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        x = diffusion.sample(batch_size=shape[0]) if classes is None else diffusion.sample(classes, cond_scale=guidance)
    return x * 2 - 1


def _diffusers_samples(
    network: Any, document: Document, shape: Sequence[int], classes: Tensor | None, guidance: float, steps: int
) -> Tensor:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    options: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    options |= {"timestep_spacing": "trailing", "clip_sample": document["pixels"]}
    solver: Any = DDIMScheduler(num_train_timesteps=1000, **options)
    solver.set_timesteps(steps)
    x = torch.randn(*shape)
    for t in solver.timesteps:
        output = network(x, t, classes).sample
        if classes is not None and guidance != 1:
            without = network(x, t, torch.full_like(classes, document["classes"])).sample
            output = without + guidance * (output - without)
        x = solver.step(output, t, x).prev_sample
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="a document of `of_equal_operations`")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--began", type=float, default=time.time(), help="when the clock began (seconds since the epoch)")
    parser.add_argument("--data", type=Path, required=True, help="an .npz with x and labels")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="of the time, when weights are kept")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    data, document = Data(args.data), read_json(args.network)
    snapshots = Snapshots(args.out, args.began, args.seconds, args.fractions)
    try:
        train(document, data, snapshots, lr=args.lr, batch=args.batch, precision=args.precision)
    except TimeIsUp:
        summary = {
            "parameters": sum(parameter.numel() for parameter in build(document).parameters()),
            "network": document,
            "fractions": snapshots.saved,
            "used": "the weights after the first step that ended past the limit",
        }
        (args.out / "trained.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
