"""Latents that agree with what a frozen network sees in the images: its features, kept, and the latents' projection to them."""

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import losses
from ..runtime.stream import to_network
from .latent_terms import AlignmentTerm

if TYPE_CHECKING:
    from accelerate import Accelerator

BLOCK = 8  # images that the teacher takes at a time, always so many, so that features are a function of the image alone


class Aligner:
    """The teacher, its features of the images that were seen, and `projection`, which is trained with the autoencoder: a matrix
    (features, latent channels), as a convolution. `projection_ddp` is what has gradients on several processes."""

    def __init__(self, spec: losses.TeacherConfig, latent_channels: int, device: torch.device, dtype: torch.dtype) -> None:
        self.teacher = losses.Teacher(spec).to(device)
        self.device, self.dtype, self._room = device, dtype, spec.cache_gib * 2**30
        self.projection = nn.Conv2d(latent_channels, self.teacher.channels, 1, bias=False).to(device, dtype)
        self.projection_ddp: nn.Module = self.projection
        self._known: dict[bytes, Tensor] = {}

    def prepare(self, accelerator: "Accelerator") -> nn.Module:
        prepared: Any = accelerator.prepare(self.projection)
        self.projection_ddp = prepared
        return prepared

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """(B, H, W, C) uint8 on the CPU -> the teacher's features (B, F, h, w), of half precision in the autoencoder's dtype.
        They are kept on the device by the image's bytes while there is room, so that each image, and each mirrored one, is
        seen once. They are the same to the bit whether they were kept or not."""
        keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in pixels]
        rows = {key: self._known[key] for key in keys if key in self._known}
        missing = [i for i, key in enumerate(keys) if key not in rows]
        for start in range(0, len(missing), BLOCK):
            block = missing[start : start + BLOCK]
            padded = block + block[:1] * (BLOCK - len(block))
            values = self.teacher(to_network(pixels[padded], self.device)).half()
            rows |= {keys[i]: values[row].clone() for row, i in enumerate(block)}
        for i in missing:
            row = rows[keys[i]]
            if keys[i] not in self._known and self._room >= row.nbytes:
                self._known[keys[i]] = row
                self._room -= row.nbytes
        return torch.stack([rows[key] for key in keys]).to(self.dtype)

    def loss(self, term: AlignmentTerm, latents: Tensor, features: Tensor) -> Tensor:
        """The term (B,) of latents (B, D, h, w) and the teacher's features (B, F, h', w') of their images."""
        margins = term.margin, term.distance_margin
        return losses.alignment_loss(latents, self.projection_ddp(latents), features, *margins)
