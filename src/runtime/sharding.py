"""FSDP, for networks too big for one card: weights, moments and EMA in parts, one on each process.

accelerate and torch's `fully_shard` do it. What is saved is whole, keyed by parameter name, as everywhere.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from torch import nn

from ..config import UserError
from ..training.ema import EMA
from ..training.optimizer import Muon, load_optimizer_state, names_of, optimizer_state

# What accelerate takes from its fsdp_config: (what it takes without one, what is supported, why).
_SUPPORTED = {
    "FSDP_VERSION": ("1", "2", "torch's fully_shard"),
    "FSDP_AUTO_WRAP_POLICY": ("NO_WRAP", "TRANSFORMER_BASED_WRAP", "the others do not fit these networks"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("", "Block,ResidualBlock", "what a card holds whole, one at a time"),
    "FSDP_OFFLOAD_PARAMS": ("false", "false", "the EMA follows on the device"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "false", "use model.gradient_checkpointing, which keeps the parameters' names"),
}


def plugin_for(precision: str) -> FullyShardedDataParallelPlugin | None:
    """What the Accelerator is told where the launcher asks for FSDP; what is not supported is a UserError.

    accelerate's own bf16 would round all inputs, the time among them (999 becomes 1000), and sum gradients in bf16. Here the
    blocks' weights are gathered in bf16 and nothing else is cast: `prepare` brings the autocast that DDP has.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    for name, (default, supported, why) in _SUPPORTED.items():
        found = os.environ.get(name, default)
        if found.lower() != supported.lower():
            key = name.lower().replace("transformer_cls", "transformer_layer_cls")
            raise UserError(
                f"the launcher's {key} is {found or 'not set'}; set {key}: {supported} ({why}), as "
                "configs/accelerate/fsdp.yaml does"
            )
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Every rank has the weights, from the seed or from the checkpoint; accelerate need not send them.
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy, cpu_ram_efficient_loading=False)


def home(accelerator: Accelerator) -> torch.device:
    """Where networks are built and loaded: on the device; with FSDP on the CPU, since no card may hold them whole."""
    return torch.device("cpu") if accelerator.is_fsdp2 else accelerator.device


def prepare(accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> tuple[Any, Any]:
    """accelerate's `prepare` of a network and its optimiser. With FSDP these and the EMA, whole until now, are cut in place,
    and each process goes on with its part; from then on all of them call what runs the networks or gathers tensors."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare(network, optimizer)
    if isinstance(optimizer, Muon):
        raise UserError(
            "optimizer.muon needs whole matrices, and FSDP cuts them: set optimizer.muon to null, or launch without"
        )
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
