"""A network and a data set that the caller hands in from Python: checked before anything is trained, and used in place of the
config's."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..config import UserError, quoted
from ..data import ImageConfig, ImageSet, PointSet, open_given
from ..data.conditions import Condition
from ..data.pairs import open_pairs, refuse_pairs
from ..diffusion.augmentation import CODES
from ..models import build_model
from ..runtime.processes import same_on_all
from ..runtime.sharding import build_device
from ..storage.finite import check_finite, is_finite
from .config import DiffusionConfig

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator


@dataclass(frozen=True)
class Given:
    """The caller's `network` and `dataset`; None where the config's are used."""

    network: Any = None
    dataset: Any = None

    @property
    def facts(self) -> dict[str, str]:
        """What travels with the weights: no config builds the caller's network."""
        return {"network": "python"} if self.network is not None else {}

    def open_data(
        self, data: Any, held_out: Any, image: ImageConfig, condition: Condition | None
    ) -> tuple[ImageSet, ImageSet | None]:
        """The images to train on and those held out: of the config's data, or of the caller's."""
        if self.dataset is None:
            return open_pairs(data, held_out, condition)
        refuse_pairs(condition)
        train_set, held_out_set = open_given(self.dataset, held_out, image)
        same_on_all(train_set.fingerprint)
        return train_set, held_out_set

    def build(
        self,
        cfg: DiffusionConfig,
        accelerator: "Accelerator",
        shape: tuple[int, ...],
        num_classes: int | None,
        *sets: ImageSet | PointSet | None,
    ) -> nn.Module:
        """The network of the config, or the caller's own, its weights as they are (of several processes those of the first); on
        its device, before it is prepared. `sets` are the data: the network is told that there is no class where labels are
        dropped, or one of them has none.

        The caller's is called as network(x, time) or, where there are classes, network(x, time, labels=...), and the label
        num_classes is no class; with `condition=...` and `augmentation=...` where the config has them; x is (B, *shape), and
        what it gives is as large, with twice the channels where a variance is learned. A UserError says what is not like that.
        """
        condition_channels = len(cfg.condition_names(shape))
        place, dtype, learned = build_device(accelerator), getattr(torch, cfg.dtype), cfg.process.variance == "learned"
        if self.network is None:
            augmented = cfg.augmentation is not None
            options = {"learned": learned, "condition_channels": condition_channels, "augmented": augmented}
            return build_model(cfg.model, shape, num_classes, **options).to(place, dtype)
        _refuse_odd(self.network, accelerator)
        network = self.network.to(place, dtype)
        if accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for value in [*network.parameters(), *network.buffers()]:
                value.data.copy_(broadcast(value.data))
        x = torch.linspace(-1, 1, 2 * math.prod(shape), device=place, dtype=dtype).reshape(2, *shape)
        condition: dict[str, torch.Tensor] = {}
        if num_classes is not None:
            null_class = cfg.label_dropout > 0 or any(bool((each.labels < 0).any()) for each in sets if each is not None)
            condition["labels"] = torch.tensor([0, num_classes if null_class else num_classes - 1], device=place)
        if cfg.augmentation is not None:
            condition["augmentation"] = x.new_zeros(2, CODES)
        if condition_channels:
            condition["condition"] = x.new_zeros(2, condition_channels, *shape[1:])
        _try(network, x, condition, (2, shape[0] * (2 if learned else 1), *shape[1:]))
        return network

    def how_to_draw(self, run_dir: "Path", options: str = "") -> str:
        """What a finished run says."""
        if self.network is not None:
            return "open_trained from Python, as docs/python.md says"
        return f"python sample.py {quoted(run_dir)}{options}"


def _refuse_odd(network: Any, accelerator: "Accelerator") -> None:
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        raise UserError("the network that was handed in is no torch.nn.Module with parameters")
    values = [*network.parameters(), *network.buffers()]
    is_lazy = any(isinstance(value, UninitializedParameter | UninitializedBuffer) for value in values)
    averages = accelerator.num_processes > 1 and any(isinstance(module, _BatchNorm) for module in network.modules())
    learns, is_meta = any(value.requires_grad for value in values), any(value.is_meta for value in values)
    problems = {
        "FSDP cuts the networks of this project alone; launch without it to train one of your own": accelerator.is_fsdp2,
        "the network has BatchNorm, whose averages differ between processes; use GroupNorm, or one process": averages,
        "the network has parameters without a shape (it is lazy): call it once on a batch before you hand it in": is_lazy,
        "the network is on the meta device, so its weights have no values; build it on the CPU": is_meta,
        "no parameter of the network has requires_grad, so there is nothing to train; unfreeze what is to learn": not learns,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise UserError(problem)
    check_finite(network.state_dict(), "the network that was handed in", "start it anew, or from other weights")
    shared = defaultdict(list)
    for name, value in network.state_dict().items():
        if value.numel():
            shared[value.untyped_storage().data_ptr(), value.storage_offset()].append(name)
    tied = next((names for names in shared.values() if len(names) > 1), None)
    if tied is not None:
        names = ", ".join(tied[:3])
        raise UserError(f"the network has one weight under several names ({names}), which cannot be saved; untie it")


@torch.enable_grad()
def _try(network: nn.Module, x: torch.Tensor, condition: dict[str, torch.Tensor], wanted: tuple[int, ...]) -> None:
    """Call it once: a UserError where that fails, or gives something that is not of the `wanted` shape."""
    before, time = x.clone(), torch.full((2,), 0.5, device=x.device)
    labels = f", labels={condition['labels'].tolist()}" if "labels" in condition else ""
    beside = f", condition {tuple(condition['condition'].shape)}" if "condition" in condition else ""
    words = f"network(x {tuple(x.shape)}, time (2,){labels}{beside})"
    training = network.training
    try:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            output = network.eval()(x, time, **condition)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        hint = "; without classes: class_conditional false" if labels else ""
        hint += "; without a condition: condition null" if beside else ""
        raise UserError(f"the network fails at {words}: {type(error).__name__}: {reason}{hint}") from None
    finally:
        network.train(training)
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != wanted:
        gives = f"a tensor {tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise UserError(f"{words} gives {gives}; it should give a tensor {wanted}")
    if not torch.equal(x, before):
        raise UserError(f"{words} changes x in place, and x is needed afterwards; have it change a copy")
    if not is_finite(output.detach()):
        raise UserError(f"{words} gives NaN or infinity, where x is between -1 and 1 and time 0.5")
    if not output.requires_grad:
        raise UserError(f"{words} gives a tensor without a gradient; take torch.no_grad, detach or inference_mode out of it")
