"""What a training script's `train` takes from Python besides a config: a network and a data set of the caller's own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from ..config import UserError, quoted
from ..data import GIVEN, ImageConfig, ImageSet, open_data, open_given
from ..models import build_model
from ..runtime.processes import same_on_all
from ..runtime.sharding import build_device
from .config import DiffusionConfig, TrainConfig
from .entry import train_here
from .given import given_network, needs_null_class
from .run_mode import RunMode


@dataclass(frozen=True)
class Given:
    """The caller's `network` and `dataset`; None where the config's are used."""

    network: Any = None
    dataset: Any = None

    @property
    def has_network(self) -> bool:
        """Whether the network is the caller's."""
        return self.network is not None

    @property
    def facts(self) -> dict[str, str]:
        """What travels with the weights: no config builds the caller's network."""
        return {"network": "python"} if self.has_network else {}

    def open_data(self, data: Any, held_out: Any, image: ImageConfig) -> tuple[ImageSet, ImageSet | None]:
        """The images to train on and those held out: of the config's data, or of the caller's."""
        if self.dataset is None:
            return open_data(data, held_out)
        train_set, held_out_set = open_given(self.dataset, held_out, image)
        same_on_all(train_set.fingerprint)
        return train_set, held_out_set

    def build(
        self, cfg: DiffusionConfig, accelerator: Accelerator, shape: tuple[int, ...], num_classes: int | None, *sets: Any
    ) -> nn.Module:
        """The network of the config, or the caller's, checked; on its device, before it is prepared. `sets` are the data."""
        place, dtype = build_device(accelerator), getattr(torch, cfg.dtype)
        learned = cfg.process.variance == "learned"
        if self.has_network:
            checks = {"null_class": needs_null_class(cfg.label_dropout, *sets), "learned": learned}
            return given_network(self.network, accelerator, place, dtype, shape, num_classes, **checks)
        return build_model(cfg.model, shape, num_classes, learned=learned).to(place, dtype)

    def how_to_draw(self, run_dir: Path, options: str = "") -> str:
        """What a finished run says."""
        if self.has_network:
            return "open_trained from Python, as docs/python.md says"
        return f"python sample.py {quoted(run_dir)}{options}"


class Train(Protocol):
    def __call__(
        self,
        cfg: Any,
        run_dir: Path | str,
        run_mode: RunMode | None = None,
        stop_at: int | None = None,
        *,
        network: Any = None,
        dataset: Any = None,
    ) -> int: ...


def from_python(train: Callable[[Any, Path, RunMode, int | None, Given], int]) -> Train:
    """Decorator of a script's `train`: it can be called from Python, too, as train(cfg, run_dir, network=..., dataset=...), of
    which either may be left out; docs/python.md says what they are. It gives 0 where the run has finished, 1 where it was
    stopped."""

    @wraps(train)
    def called(
        cfg: Any,
        run_dir: Path | str,
        run_mode: RunMode | None = None,
        stop_at: int | None = None,
        *,
        network: Any = None,
        dataset: Any = None,
    ) -> int:
        if not isinstance(cfg, TrainConfig):
            raise UserError(
                f"the config is a {type(cfg).__name__}; hand in what load(FILE, Config) gives, as docs/python.md says"
            )
        if run_mode is None:
            return train_here(called, cfg, run_dir, stop_at, network=network, dataset=dataset)
        run_cfg = cfg if dataset is None else replace(cfg, data=GIVEN)  # so that the run's config.json says the truth
        return train(run_cfg, Path(run_dir), run_mode, stop_at, Given(network, dataset))

    return called
