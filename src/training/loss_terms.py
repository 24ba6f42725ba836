"""The loss terms of the autoencoder and of its discriminator, for a micro-batch; the adversary's weight; a codebook's step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import losses
from ..models.vae import Codebook, Reconstruction
from ..runtime.seeds import generator
from .alignment import Aligner
from .autoencoder_stages import AdversarialTerm, StageConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST = 1e4  # the largest adaptive weight
LossTerms = dict[str, Tensor]  # (b,) each, by the name that the log has


class AdaptiveWeight:
    """The ratio |gradient of the reconstruction| / |gradient of the verdict| at the decoder's last layer (Eq. 7, Esser et al.
    2020, arXiv:2012.09841), over the global batch; of an alignment, in place of the verdict, at the encoder's last layer.

    `value` () is used by the step after the one that measured it, so that no step needs a collective in its middle; it is
    0 until then. After rollbacks the adversary's weight is `shrink` times what the config says, adaptive or not.
    """

    def __init__(self, last_layer: Tensor, accelerator: "Accelerator", saved: float = 0.0, shrink: float = 1.0) -> None:
        self.last_layer, self.accelerator, self.shrink = last_layer, accelerator, shrink
        self.value = torch.tensor(saved, device=accelerator.device, dtype=last_layer.dtype)
        self._sums: Tensor | None = None

    def measure(self, reconstruction: Tensor, verdict: Tensor) -> None:
        """Add a micro-batch: two losses (), sums over its images, whose graphs are kept."""
        terms = (reconstruction, verdict)
        pair = torch.stack([torch.autograd.grad(term, self.last_layer, retain_graph=True)[0] for term in terms])
        self._sums = pair if self._sums is None else self._sums + pair

    def update(self, finite: Tensor) -> None:
        """All micro-batches are measured: set the next step's value, unless this step was not `finite`, () bool."""
        if self._sums is None:  # nothing was measured: what was known is of another stage
            self.value = torch.zeros_like(self.value)
            return
        sums: Any = self.accelerator.reduce(self._sums)
        ours, theirs = sums.flatten(1).norm(dim=1)
        ratio = (ours / theirs.clamp(min=1e-12)).clamp(max=MOST)
        self.value = torch.where(finite & torch.isfinite(ratio), ratio, self.value)
        self._sums = None


def generator_terms(
    outputs: Reconstruction,
    images: Tensor,
    targets: Tensor,
    stage_cfg: StageConfig,
    adversarial: AdversarialTerm | None,
    codes: "CodebookStep | None",
    features: Tensor | None,
    local_slice: slice,
    *,
    perceptual: nn.Module | None,
    discriminator: nn.Module,
    adaptive: AdaptiveWeight,
    aligner: Aligner | None,
    alignment_weight: AdaptiveWeight,
) -> tuple[Tensor, LossTerms]:
    """The autoencoder's loss (b,) of a micro-batch, which is this slice of the batch, and what it is made of, without the
    weights: last the bottleneck's term, KL or of a codebook its commitment. The discriminator is frozen here. Gradients of an
    adaptive weight are measured, and the micro-batch's codes are counted. The `targets` of the reconstruction are the `images`
    themselves, or the transformed ones; then its term is called `equivariance`. Latents are aligned to the teacher's
    `features` (b, F, h', w') of the images."""
    kind, autocast = stage_cfg.reconstruction, adaptive.accelerator.autocast
    loss = losses.reconstruction_loss(kind, outputs.images, targets)
    loss_terms = {kind if targets is images else "equivariance": loss}
    if stage_cfg.perceptual is not None and perceptual is not None:
        with autocast():
            loss_terms["perceptual"] = perceptual(outputs.images, targets)
        loss = loss + stage_cfg.perceptual.weight * loss_terms["perceptual"]
    if stage_cfg.alignment is not None and aligner is not None and features is not None:
        with autocast():
            loss_terms["alignment"] = aligner.loss(stage_cfg.alignment, outputs.mean, features)
        of_alignment: float | Tensor = stage_cfg.alignment.weight
        if stage_cfg.alignment.adaptive:
            alignment_weight.measure(loss.sum(), loss_terms["alignment"].sum())
            of_alignment = of_alignment * alignment_weight.value
        loss = loss + of_alignment * loss_terms["alignment"]
    if adversarial is not None:
        discriminator.requires_grad_(False)
        with autocast():
            loss_terms["adversarial"] = losses.generator_loss(adversarial.loss, discriminator(outputs.images))
        discriminator.requires_grad_(True)
        weight: float | Tensor = adversarial.weight * adaptive.shrink
        if adversarial.adaptive:
            adaptive.measure(loss.sum(), loss_terms["adversarial"].sum())
            weight = weight * adaptive.value
        loss = loss + weight * loss_terms["adversarial"]
    if codes is not None:
        loss_terms["commitment"] = losses.commitment_loss(outputs.mean, codes.add(outputs, local_slice))
        return loss + codes.codebook.spec.commitment * loss_terms["commitment"], loss_terms
    assert outputs.logvar is not None
    loss_terms["kl"] = losses.kl_divergence(outputs.mean, outputs.logvar)
    return loss + stage_cfg.kl_weight * loss_terms["kl"], loss_terms


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


def winner_warnings(values: dict[str, float]) -> list[str]:
    """A warning where, by what was logged, one of the two networks has won."""
    lines = []
    if values.get("discriminator_accuracy", 0.5) > 0.98:
        lines.append(
            f"the discriminator has won (accuracy {values['discriminator_accuracy']:.3f}), so its verdict says nothing; lower "
            "discriminator_optimizer.lr, or start it later"
        )
    if values.get("adaptive_weight", 0.0) >= MOST:
        lines.append("the adaptive weight is at its limit: the discriminator's gradient is as good as 0")
    return lines
