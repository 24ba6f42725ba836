"""The loss on what is held out, at each level of noise."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.transforms import position_uniforms
from ..runs.densities import SourceSampler
from ..runtime.stream import Examples
from ..sampling.sampler import Sampler

if TYPE_CHECKING:
    from accelerate import Accelerator

LEVELS = 10  # of noise, for each of which the held-out loss is logged
MOST = 1024  # held-out examples that the loss is measured on


@torch.no_grad()
def held_out_loss(sampler: Sampler, held_out: Examples, batch_size: int, accelerator: "Accelerator") -> dict[str, float]:
    """The mean loss of the sampler's network on up to `MOST` held-out examples, spread over all, each always with the same
    start and time: held_out_loss, and held_out_loss_0 to _9 of those whose times are in each tenth, the cleanest first."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    process, num_classes, dtype = sampler.process, sampler.num_classes, sampler.dtype
    chosen = np.linspace(0, len(held_out.labels) - 1, min(MOST, len(held_out.labels))).astype(np.int64)
    totals = torch.zeros(2, LEVELS, device=device, dtype=dtype)  # of losses, and how many
    batches = held_out.batches(chosen, batch_size)
    for i in range(rank, -(-len(batches) // world) * world, world):
        real = i < len(batches)  # with FSDP no rank can run alone: one that has no batch left runs along
        indices = batches[i] if real else chosen[:1]
        x0 = held_out.load(indices).to(device, dtype)
        source = sampler.source
        if isinstance(source, SourceSampler) and not source.shuffled:  # the partners of these very images
            eps = source.examples.load(indices).to(x0)
        else:
            eps = sampler.at_shape(x0.shape[1:]).start(0, indices.tolist()).to(x0)
        u = torch.from_numpy(position_uniforms(0, indices)[:, 0])
        condition = {}
        if num_classes is not None:
            labels = torch.from_numpy(held_out.labels[indices])
            condition = {"labels": torch.where(labels < 0, num_classes, labels).to(device)}
        if held_out.condition is not None:
            condition["condition"] = held_out.condition(indices).to(x0)
        loss = process.losses(sampler.network, x0, eps, process.draw_times(u), **condition).loss.to(dtype)
        if real:
            totals.index_add_(1, (u * LEVELS).long().to(device), torch.stack([loss, torch.ones_like(loss)]))
    summed: Any = accelerator.reduce(totals)
    losses, counts = summed.tolist()
    levels = {f"held_out_loss_{i}": losses[i] / counts[i] for i in range(LEVELS) if counts[i]}
    return {"held_out_loss": sum(losses) / len(chosen), **levels}
