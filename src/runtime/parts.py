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
    """All of a tensor, of which each process may hold a part: then all of them call this together."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def on_cpu(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """All of each tensor, on the CPU; for a process that only takes part in gathering them (`keep` False), nothing."""
    found = {}
    for name, tensor in tensors.items():
        gathered = full(tensor.detach())
        if keep:
            found[name] = gathered.cpu()
    return found


def part_of(own: Tensor, value: Tensor) -> Tensor:
    """Of `value`, which is whole, the part that this process holds of `own`, on its device; where that is all, `value`."""
    if not hasattr(own, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    cut = distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return cut.clone()  # not a view that keeps the whole alive
