"""FSDP, for networks too big for one card: weights, moments and EMA in parts, one on each process.

accelerate and torch's `fully_shard` do it. What is saved is whole, keyed by parameter name, as everywhere.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

# What accelerate takes from its fsdp_config: (what it takes without one, what is supported, why).
_SUPPORTED = {
    "FSDP_VERSION": ("1", "2", "torch's fully_shard"),
    "FSDP_AUTO_WRAP_POLICY": ("NO_WRAP", "TRANSFORMER_BASED_WRAP", "the others do not fit these networks"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("", "Block,ResidualBlock", "what a card holds whole, one at a time"),
    "FSDP_OFFLOAD_PARAMS": ("false", "false", "the EMA follows on the device"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "false", "use model.gradient_checkpointing, which keeps the parameters' names"),
}


def plugin_for(precision: str) -> "FullyShardedDataParallelPlugin | None":
    """The plugin for the Accelerator where the launcher asks for FSDP, else None; an unsupported setting is a UserError.

    accelerate's own bf16 would round all inputs, the time among them (999 becomes 1000), and sum gradients in bf16. Here the
    blocks' weights are gathered in bf16 and nothing else is cast: `prepare` brings the autocast that DDP has.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    for name, (default, supported, why) in _SUPPORTED.items():
        value = os.environ.get(name, default)
        if value.lower() != supported.lower():
            key = name.lower().replace("transformer_cls", "transformer_layer_cls")
            raise UserError(
                f"the launcher's {key} is {value or 'not set'}; set {key}: {supported} ({why}), as "
                "configs/accelerate/fsdp.yaml does"
            )
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    bf16: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    policy = MixedPrecisionPolicy(**bf16 if precision == "bf16" else {})
    # Every rank has the weights, from the seed or from the checkpoint; accelerate need not send them.
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy, cpu_ram_efficient_loading=False)


def build_device(accelerator: "Accelerator") -> torch.device:
    """Where networks are built and loaded: the device; with FSDP the CPU, since a network may be too big for one card."""
    return torch.device("cpu") if accelerator.is_fsdp2 else accelerator.device


def shard_as(copy: nn.Module, network: Any) -> None:
    """Cut `copy` into the parts that FSDP has cut `network` into. Outside of a forward nothing of it stays whole."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = next(network.parameters()).device_mesh
    units = [name for name, module in network.named_modules() if isinstance(module, FSDPModule)]
    for name in reversed(units):  # the inner ones first
        fully_shard(copy.get_submodule(name), mesh=mesh, reshard_after_forward=True)


def full(tensor: Tensor) -> Tensor:
    """A whole tensor, of which each process may hold a part; where one does, all processes call this together."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def on_cpu(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """The whole tensors on the CPU; without `keep` nothing, for a process that only takes part in gathering them."""
    whole = ((name, full(tensor.detach())) for name, tensor in tensors.items())  # one at a time
    return {name: tensor.cpu() for name, tensor in whole if keep}


def part_of(like: Tensor, value: Tensor) -> Tensor:
    """The part of the whole `value` that this process holds of `like`, on its device; all where `like` is not in parts."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    part = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # not a view, which would keep the whole
