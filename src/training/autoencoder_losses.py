"""The loss terms of the autoencoder and of its discriminator, for a micro-batch."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .. import losses
from ..models.vae import Reconstruction
from .adversary import AdaptiveWeight
from .codebook import CodebookStep
from .stages import AdversarialTerm, StageConfig

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
    accelerator: Accelerator,
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
    outputs: Reconstruction, stage_cfg: StageConfig, codes: CodebookStep | None, local_slice: slice
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
