"""The weights of an earlier run as the start of a new one, whose classes and conditions may be others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.names import normal_form, same_names
from ..runtime.checkpoint import load_weights
from .opened import LABELS, Opened, open_run

AUGMENTATION = "augmentation.weight"  # of the map that tells a network how images were augmented
INPUT = "stem.weight"  # of the convolution that sees x_t and the condition


def start_from(name: str, class_names: Sequence[str], *networks: Any, condition: Sequence[str] = ()) -> str:
    """Put the EMA weights of the diffusion run `name` into networks of the same architecture; where its classes are others,
    all but the embedding of the labels, and where its condition is another, the input's weights of the channels that both
    have. `condition` are the names of those channels (`channel_names`). Gives what was done, in words."""
    opened = open_run(name, torch.device("cpu"))
    weights, fresh = opened.network.state_dict(), networks[0].state_dict()
    notice = f"starting from the weights of {name} (step {opened.step})"
    number = {normal_form(name): i for i, name in enumerate(opened.class_names)}
    as_they_stand, labels = same_names(opened.class_names, class_names), weights.pop(LABELS, None)
    before = opened.condition_names if isinstance(opened, Opened) else []
    if before != list(condition) and INPUT in weights:
        weights[INPUT] = _exchange_channels(weights[INPUT], opened.shape[0], before, condition)
        added, lost = (sum(n not in others for n in names) for names, others in ((condition, before), (before, condition)))
        notice += f"; its input has zeros for {added} new channels of the condition" if added else ""
        notice += f"; {lost} channels of its condition are left out" if lost else ""
    if AUGMENTATION in weights and AUGMENTATION not in fresh:
        del weights[AUGMENTATION]
        notice += "; without what it was told of augmentation"
    elif AUGMENTATION in fresh and AUGMENTATION not in weights:
        weights[AUGMENTATION] = torch.zeros_like(fresh[AUGMENTATION])
        notice += "; what it is told of augmentation is new, and zero at first"
    if LABELS not in fresh:
        notice += "; without its label embedding, since this run learns no classes" if labels is not None else ""
    elif labels is None or not (as_they_stand or sorted(number) == sorted(map(normal_form, class_names))):
        notice, labels = f"{notice}; its classes are others, so the label embedding is new", None
    else:
        if not as_they_stand:  # in another order, as names in another spelling may be
            order = [number[normal_form(name)] for name in class_names]
            labels = torch.cat([labels[order], labels[len(order) :]])
        if len(labels) < len(fresh[LABELS]):  # it never learned to go without a label
            labels = torch.cat([labels, labels.mean(0, keepdim=True)])
            notice += "; its null class is new, the mean of the others"
    for network in networks:
        embedding = {LABELS: network.state_dict()[LABELS] if labels is None else labels} if LABELS in fresh else {}
        load_weights(network, weights | embedding, Path(name))
    return notice


def _exchange_channels(weight: Tensor, channels: int, before: Sequence[str], now: Sequence[str]) -> Tensor:
    """The weight (D, inputs, 3, 3) of an input convolution that sees `channels` and the condition, with the channels `now` of
    the condition in place of those `before`: those of the same name, and 0 for the others. A network that works on patches of
    p x p has p^2 inputs for each channel, one after the other."""
    area = weight.shape[1] // (channels + len(before))
    by_channel = weight.unflatten(1, (channels + len(before), area))  # (D, channels, p^2, 3, 3)
    known = {name: by_channel[:, channels + i] for i, name in enumerate(before)}
    others = [known[name] if name in known else torch.zeros_like(by_channel[:, 0]) for name in now]
    return torch.cat([by_channel[:, :channels], *(other[:, None] for other in others)], dim=1).flatten(1, 2)
