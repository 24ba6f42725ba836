"""A network and a data set that the caller hands in from Python, checked before anything is trained."""

import math
from collections import defaultdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..config import UserError
from ..data import ImageSet, PointSet
from ..storage.finite import check_finite, is_finite


def needs_null_class(label_dropout: float, *sets: ImageSet | PointSet | None) -> bool:
    """Whether a run tells its network that there is no class: where labels are dropped, or data has none."""
    return label_dropout > 0 or any(bool((each.labels < 0).any()) for each in sets if each is not None)


def given_network(
    network: Any,
    accelerator: Accelerator,
    place: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    num_classes: int | None,
    *,
    null_class: bool = False,
    learned: bool = False,
) -> nn.Module:
    """The caller's own network, its weights as they are (of several processes those of the first), on the device.

    It is called as network(x, time) or, where there are classes, network(x, time, labels=...), and the label num_classes is
    no class, where a `null_class` is needed; x is (B, *shape), and what it gives is as large, with twice the channels where a
    variance is `learned`. A UserError says what is not like that.
    """
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        raise UserError("the network that was handed in is no torch.nn.Module with parameters")
    if accelerator.is_fsdp2:
        raise UserError("FSDP cuts the networks of this project alone; launch without it to train one of your own")
    if accelerator.num_processes > 1 and any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise UserError("the network has BatchNorm, whose averages differ between processes; use GroupNorm, or one process")
    values = [*network.parameters(), *network.buffers()]
    if any(isinstance(value, UninitializedParameter | UninitializedBuffer) for value in values):
        raise UserError(
            "the network has parameters without a shape (it is lazy): call it once on a batch before you hand it in"
        )
    if any(value.is_meta for value in values):
        raise UserError("the network is on the meta device, so its weights have no values; build it on the CPU")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(
            "no parameter of the network has requires_grad, so there is nothing to train; unfreeze what is to learn"
        )
    check_finite(network.state_dict(), "the network that was handed in", "start it anew, or from other weights")
    shared = defaultdict(list)
    for name, value in network.state_dict().items():
        if value.numel():
            shared[value.untyped_storage().data_ptr(), value.storage_offset()].append(name)
    tied = next((names for names in shared.values() if len(names) > 1), None)
    if tied is not None:
        raise UserError(
            f"the network has one weight under several names ({', '.join(tied[:3])}), which cannot be saved; untie it"
        )
    network = network.to(place, dtype)
    if accelerator.num_processes > 1:
        for value in [*network.parameters(), *network.buffers()]:
            value.data.copy_(broadcast(value.data))
    _try(network, place, dtype, shape, num_classes, null_class=null_class, learned=learned)
    return network


@torch.enable_grad()
def _try(
    network: nn.Module,
    place: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    num_classes: int | None,
    *,
    null_class: bool,
    learned: bool,
) -> None:
    """Call it once: a UserError where that fails, or gives something of another shape."""
    size = 2 * math.prod(shape)
    x, time = torch.linspace(-1, 1, size, device=place, dtype=dtype).reshape(2, *shape), torch.full((2,), 0.5, device=place)
    before = x.clone()
    condition: dict[str, torch.Tensor] = {}
    if num_classes is not None:
        last = num_classes if null_class else num_classes - 1
        condition = {"labels": torch.tensor([0, last], device=place)}
    words = f"network(x {tuple(x.shape)}, time (2,){', labels=' + str(condition['labels'].tolist()) if condition else ''})"
    training = network.training
    try:
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
            output = network.eval()(x, time, **condition)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        hint = "; without classes: class_conditional false" if condition else ""
        raise UserError(f"the network fails at {words}: {type(error).__name__}: {reason}{hint}") from None
    finally:
        network.train(training)
    wanted = (2, shape[0] * (2 if learned else 1), *shape[1:])
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != wanted:
        gives = f"a tensor {tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise UserError(f"{words} gives {gives}; it should give a tensor {wanted}")
    if not torch.equal(x, before):
        raise UserError(f"{words} changes x in place, and x is needed afterwards; have it change a copy")
    if not is_finite(output.detach()):
        raise UserError(f"{words} gives NaN or infinity, where x is between -1 and 1 and time 0.5")
    if not output.requires_grad:
        raise UserError(f"{words} gives a tensor without a gradient; take torch.no_grad, detach or inference_mode out of it")
