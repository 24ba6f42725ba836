"""Tensors of which each process holds a part (torch's DTensor, whose import takes half a second), and whole ones."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


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
    whole = {}
    for name, tensor in tensors.items():
        gathered = full(tensor.detach())
        if keep:
            whole[name] = gathered.cpu()
    return whole


def part_of(like: Tensor, value: Tensor) -> Tensor:
    """The part of the whole `value` that this process holds of `like`, on its device; all where `like` is not in parts."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    part = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # not a view, which would keep the whole
