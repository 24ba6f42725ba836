"""A network, its optimizer and its EMA, prepared by accelerate; with FSDP each process goes on with its part of them."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from ..config import UserError
from .ema import EMA
from .optimizer import Muon, load_optimizer_state, names_of, optimizer_state


def prepare(accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> tuple[Any, Any]:
    """accelerate's `prepare` of a network and its optimiser. With FSDP these and the EMA, whole until now, are cut in place,
    and each process goes on with its part; from then on all of them call what runs the networks or gathers tensors."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare(network, optimizer)
    if isinstance(optimizer, Muon):
        raise UserError(
            "optimizer.muon needs whole matrices, and FSDP cuts them: set optimizer.muon to null, or launch without"
        )
    blocks = getattr(network, "fsdp_blocks", ())
    if not blocks:
        raise UserError(
            f"FSDP cuts a network block by block, and {type(network).__name__} names none in fsdp_blocks; launch without FSDP"
        )
    assert accelerator.state.fsdp_plugin is not None
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(blocks)
    moments = optimizer_state(optimizer, names_of(network))
    optimizer.state.clear()  # accelerate moves the optimiser's parameters to the parts, and leaves the moments behind
    for module in (network, *ema.networks.values()):  # FSDP cuts rows, and takes no channels_last
        module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    if accelerator.native_amp:
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        network.forward = convert_outputs_to_fp32(autocast(network.forward))
    model, prepared = accelerator.prepare(network, optimizer)
    load_optimizer_state(optimizer, names_of(network), moments)
    ema.shard_as(network)
    return model, prepared
