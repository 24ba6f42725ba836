"""Contrastive flow matching: an output is pulled to its own target and pushed away from that of an image of another class."""

import pydantic
import torch
from torch import Tensor

from ..config import config


@config
class ContrastConfig:
    """How much the loss pushes outputs away from the targets of other classes: `weight` times their squared distance. The
    partner of an image is looked for in its group of `group` images that follow each other in the stream."""

    weight: float = pydantic.Field(0.05, gt=0, lt=1)
    group: int = pydantic.Field(8, ge=2)


def find_partners(labels: Tensor, group: int) -> Tensor:
    """Of each row the next one of its group that has another label, (B,); -1 where there is none, and for rows without a class
    (label -1), which are nobody's partner. Groups are consecutive rows, so whole groups alone decide; after the last row of a
    group comes its first. `labels` are (B,), and B is a multiple of `group`."""
    labels = labels.unflatten(0, (-1, group))  # (B / group, group)
    rows, partners = torch.arange(group), torch.full_like(labels, -1)
    for distance in reversed(range(1, group)):  # the nearest is written last
        others = labels.roll(-distance, dims=1)
        differs = (labels >= 0) & (others >= 0) & (labels != others)
        partners = torch.where(differs, (rows + distance) % group, partners)
    first = torch.arange(len(labels))[:, None] * group
    return torch.where(partners >= 0, first + partners, -1).flatten()


def contrast(output: Tensor, other_target: Tensor, partners: Tensor) -> Tensor:
    """The squared distance of each output (B, ...) to the target of its partner, (B,); 0 without one.

    The loss is |v - y|^2 - weight |v - y_partner|^2 (Stoica et al. 2025, arXiv:2506.05350), whose minimum for weight < 1
    is (E[y] - weight E[y_partner]) / (1 - weight).
    """
    distance = (output.to(other_target.dtype) - other_target).square().flatten(1).mean(1)
    return torch.where(partners >= 0, distance, torch.zeros_like(distance))
