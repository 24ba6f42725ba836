"""Noise that is matched to images: of several candidates each image takes the one that points its way."""

from collections.abc import Sequence

import pydantic
import torch
from torch import Tensor

from ..config import config


@config
class NoiseConfig:
    """How many `candidates` of noise are drawn for each image, which takes the one that suits it best; 1 is plain noise."""

    candidates: int = pydantic.Field(1, ge=1, le=1024)


def match_noise(centred: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """For each image the candidate with the largest inner product <x0 - mean, eps>, in float64: (B, ...). `centred` (B, ...)
    are images minus the mean of the data, and candidates have that shape.

    Images and noise are coupled more closely, so that paths cross less (immiscible diffusion, Li et al. 2024,
    arXiv:2406.12303, which takes the nearest noise; that favours short noise, and an inner product does not).
    """
    images = centred.double().flatten(1)
    products = torch.stack([(images * eps.double().flatten(1)).sum(1) for eps in candidates])  # (candidates, B)
    best, chosen = products.argmax(0), candidates[0]
    for i, eps in enumerate(candidates[1:], start=1):
        chosen = torch.where((best == i).view(-1, *[1] * (eps.ndim - 1)), eps, chosen)
    return chosen
