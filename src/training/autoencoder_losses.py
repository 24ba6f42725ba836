"""The loss terms of the autoencoder and of its discriminator, for a micro-batch; and one step of a codebook."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import losses
from ..models.vae import Codebook, Reconstruction
from ..runtime.seeds import generator
from .adversary import AdaptiveWeight
from .stages import AdversarialTerm, StageConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

LossTerms = dict[str, Tensor]  # (b,) each, by the name that the log has


def generator_terms(
    outputs: Reconstruction,
    images: Tensor,
    stage_cfg: StageConfig,
    *,
    perceptual: nn.Module | None,
    adversarial: AdversarialTerm | None,
    discriminator: nn.Module,
    adaptive: AdaptiveWeight,
    shrink: float,
    accelerator: "Accelerator",
) -> tuple[Tensor, LossTerms]:
    """The autoencoder's loss (b,) but for its bottleneck's term, and what it is made of. The discriminator is frozen here, and
    its term is `shrink` times as heavy as the config says. Gradients of an `adaptive` weight are measured."""
    kind = stage_cfg.reconstruction
    loss_terms = {kind: losses.reconstruction_loss(kind, outputs.images, images)}
    loss = loss_terms[kind]
    if stage_cfg.perceptual is not None and perceptual is not None:
        with accelerator.autocast():
            loss_terms["perceptual"] = perceptual(outputs.images, images)
        loss = loss + stage_cfg.perceptual.weight * loss_terms["perceptual"]
    if adversarial is not None:
        discriminator.requires_grad_(False)
        with accelerator.autocast():
            loss_terms["adversarial"] = losses.generator_loss(adversarial.loss, discriminator(outputs.images))
        discriminator.requires_grad_(True)
        weight: float | Tensor = adversarial.weight * shrink
        if adversarial.adaptive:
            adaptive.measure(loss.sum(), loss_terms["adversarial"].sum())
            weight = weight * adaptive.value
        loss = loss + weight * loss_terms["adversarial"]
    return loss, loss_terms


def bottleneck_terms(
    outputs: Reconstruction, stage_cfg: StageConfig, codes: "CodebookStep | None", local_slice: slice
) -> tuple[Tensor, LossTerms]:
    """The weighted loss (b,) of the bottleneck, and the same without its weight: KL, or of a codebook its commitment. The codes
    of the micro-batch, which is this slice of the batch, are counted."""
    if codes is None:
        assert outputs.logvar is not None
        kl = losses.kl_divergence(outputs.mean, outputs.logvar)
        return stage_cfg.kl_weight * kl, {"kl": kl}
    commitment = losses.commitment_loss(outputs.mean, codes.add(outputs, local_slice))
    return codes.codebook.spec.commitment * commitment, {"commitment": commitment}


def discriminator_terms(
    discriminator_ddp: nn.Module, adversarial: AdversarialTerm, images: Tensor, reconstruction: Tensor
) -> LossTerms:
    """The discriminator's loss (b,) on images and on the detached reconstruction, and how often it is right."""
    real, fake = discriminator_ddp(torch.cat([images, reconstruction.detach().to(images.dtype)])).chunk(2)
    accuracy = losses.discriminator_accuracy(real, fake)
    return {"discriminator": losses.discriminator_loss(adversarial.loss, real, fake), "discriminator_accuracy": accuracy}


class CodebookStep:
    """`latents` is the shape (B, D, h, w) of the whole batch's. Which vectors of it would take the place of dead codes is a
    function of (seed, step), whoever holds them."""

    def __init__(self, codebook: Codebook, latents: Sequence[int], seed: int, step: int) -> None:
        self.codebook = codebook
        rng, codes, device = generator(seed, "codes", step), codebook.spec.codes, codebook.codebook.device
        self._image = torch.from_numpy(rng.integers(latents[0], size=codes)).to(device)
        self._place = torch.from_numpy(rng.integers(latents[2] * latents[3], size=codes)).to(device)
        self._sums: Tensor | None = None

    def add(self, outputs: Reconstruction, local_slice: slice) -> Tensor:
        """Count the codes of the micro-batch that is this slice of the batch; gives the vectors of its codes, (b, D, h, w)."""
        assert outputs.codes is not None
        sums = self.codebook.statistics(outputs.mean.detach(), outputs.codes, self._image - local_slice.start, self._place)
        self._sums = sums if self._sums is None else self._sums + sums
        return self.codebook.look_up(outputs.codes)

    def update(self, accelerator: "Accelerator", finite: Tensor) -> None:
        """The codebook follows, unless `finite` () bool says that this step's gradients were not finite."""
        assert self._sums is not None
        sums: Any = accelerator.reduce(self._sums)
        self.codebook.update(sums, finite)
