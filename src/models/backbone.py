"""The networks that denoise: the base of their configs, their union by `kind`, and the one door that builds them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any

import pydantic
from torch import nn

from ..config import OpenUnion, UserError, config, config_error
from ..config.sizes import describe_size, is_divisible, nearest_sizes


@config
class Backbone(ABC):
    """The base of the configs of networks that denoise. A config is registered by `@BACKBONES.add` and builds its network.

    The network is called as network(x, time) or, of a run with classes, network(x, time, labels): x (B, *shape), time (B,),
    labels (B,) of which num_classes means no class. Where it keeps its classes in an `nn.Embedding` of the name
    `label_embedding`, a run on other classes can start from its weights. Two attributes of it are asked for: `null_class`,
    whether it has learned a label for no class, and `fsdp_blocks`, the names of the classes that FSDP cuts one at a time.
    """

    kind: str
    takes_points = False  # 2-D points (2,) instead of images or latents (C, H, W)
    takes_augmentation = False  # build(augmented=True) makes a network that is told how its images were augmented

    @property
    def factor(self) -> int:
        """Height and width of images must be divisible by this; `build_model` checks it."""
        return 1

    @property
    def factor_keys(self) -> str:
        """The keys of the config that decide the factor, for the message."""
        return "the keys of model"

    @abstractmethod
    def build(
        self, shape: Sequence[int], num_classes: int | None, *, learned: bool, null_class: bool, condition_channels: int
    ) -> nn.Module:
        """The network, as `build_model` says."""


BACKBONES = OpenUnion("kind", default="unet")
ModelConfig = Annotated[Backbone, BACKBONES]


def _check_images(model: Backbone) -> Backbone:
    if model.takes_points:
        raise config_error(f"{model.kind} is a network of 2-D points, and this script trains on images; choose another kind")
    return model


ImageModelConfig = Annotated[ModelConfig, pydantic.AfterValidator(_check_images)]


def build_model(
    config: Backbone,
    shape: Sequence[int],
    num_classes: int | None = None,
    *,
    learned: bool = False,
    null_class: bool = True,
    condition_channels: int = 0,
    augmented: bool = False,
) -> nn.Module:
    """The network that `config` names, for images or latents (C, H, W) or 2-D points (2,).

    With `learned` its output has C channels more, for the variance. With `num_classes` and `null_class` it has a label for no
    class. With `condition_channels` it is also called with a condition of so many channels, and `augmented` with the codes
    (B, CODES) of what was done to its images. A UserError says what does not fit the config.
    """
    if config.takes_points != (len(shape) == 1):
        takes, gets = ("2-D points", "images") if config.takes_points else ("images", "2-D points")
        raise UserError(f"model.kind {config.kind} is a network of {takes}, and the data are {gets}; choose another kind")
    if augmented and not config.takes_augmentation:
        raise UserError(f"model.kind {config.kind} cannot be told how images were augmented; leave augmentation out")
    sides, factor = tuple(shape[1:]), config.factor
    if len(sides) == 2 and not is_divisible(sides, factor):
        raise UserError(
            f"the network sees {describe_size(sides)}, not divisible by {factor}, what {config.factor_keys} ask for; change "
            f"them, or image.size, so it sees {nearest_sizes(sides, factor)}"
        )
    options: dict[str, Any] = {"augmented": True} if augmented else {}
    options |= {"learned": learned, "null_class": null_class, "condition_channels": condition_channels}
    return config.build(shape, num_classes, **options)
